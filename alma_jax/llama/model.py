"""Llama 2, 3, 3.1 and 3.2 as a typed pytree of weights and pure functions over it.

`Llama` is a flax.nnx Module in tree style: it holds weights and nothing else changes, so plain jax.jit / grad / scan
work on it. Two layouts of the same weights:

  stacked    blocks is one Block whose leaves lead with the layer axis; run by lax.scan      (training, scoring)
  unrolled   blocks is a tuple of Blocks; each has its own K and V buffer in the cache       (decoding)

Numbers follow the weights' dtype (cast the tree to change it); norms, rotary angles, softmax and logits are fp32.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim, D width,
F feed-forward width, V vocabulary, L layers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from alma_jax.llama.attention import attention
from alma_jax.llama.sharding import constrain_batch, constrain_vocab


def param(rngs, shape, axes, scale):
  """A weight with its logical axes; `axes` is our own metadata, so flax never shards anything by itself."""
  init = jnp.ones(shape, jnp.float32) if scale is None else scale * jax.random.normal(rngs.params(), shape)
  return nnx.Param(init, axes=axes)


class Block(nnx.Module):
  def __init__(self, c, rngs):
    D, N, K, H, F = c.width, c.heads, c.kv_heads, c.head_dim, c.ffn
    out = (2 * c.depth) ** -0.5  # residual branches start small, so depth does not grow the stream
    self.attn_norm = param(rngs, (D,), ("norm",), None)
    self.q = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
    self.k = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
    self.v = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
    self.o = param(rngs, (N, H, D), ("heads", "head_dim", "embed"), (N * H) ** -0.5 * out)
    self.mlp_norm = param(rngs, (D,), ("norm",), None)
    self.gate = param(rngs, (D, F), ("embed", "ffn"), D**-0.5)
    self.up = param(rngs, (D, F), ("embed", "ffn"), D**-0.5)
    self.down = param(rngs, (F, D), ("ffn", "embed"), F**-0.5 * out)


class Llama(nnx.Module):
  def __init__(self, c, rngs):
    self.c = c
    self.embed = param(rngs, (c.vocab, c.width), ("vocab", "embed"), 0.02)
    self.blocks = nnx.data(jax.vmap(lambda key: Block(c, nnx.Rngs(key)))(jax.random.split(rngs.params(), c.depth)))
    self.norm = param(rngs, (c.width,), ("norm",), None)
    self.head = nnx.data(None if c.tied else param(rngs, (c.width, c.vocab), ("embed", "vocab"), c.width**-0.5))


def init(c, seed):
  """A random model in fp32, stacked."""
  return Llama(c, nnx.Rngs(seed))


def cast(model, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), model)


def unrolled(model):
  """The decoding layout: one Block per layer. Call it under jit, so that the stacked weights are sliced once."""
  blocks = tuple(jax.tree.map(lambda x: x[i], model.blocks) for i in range(model.c.depth))
  return _with_blocks(model, blocks)


def _with_blocks(model, blocks):
  new = nnx.clone(model)
  new.blocks = nnx.data(blocks)
  return new


def rope_frequencies(c):
  """fp32 [H/2] rotary frequencies with the config's scaling."""
  frequency = 1.0 / c.rope_base ** (jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  s = c.rope_scaling
  if s is None:
    return frequency
  if s.kind == "linear":
    return frequency / s.factor
  wavelength = 2 * math.pi / frequency
  smooth = (s.original_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  smooth = jnp.clip(smooth, 0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
  return (1 - smooth) * frequency / s.factor + smooth * frequency


def rope_angles(c, positions):
  """(cos, sin), each fp32 [B, T, 1, H/2]."""
  angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x, cos_sin):
  """Rotary embedding with half-split pairs, as in the Hugging Face weights."""
  cos, sin = cos_sin
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x, weight, eps):
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (weight[...].astype(jnp.float32) * x32).astype(x.dtype)


def run_block(block, c, x, cos_sin, attend):
  """One layer; `attend(q, k, v) -> (out, kept)` decides what is looked at and what is kept of k and v."""
  x = constrain_batch(x)
  h = rms_norm(x, block.attn_norm, c.norm_eps)
  q = rotate(jnp.einsum("btd,dnh->btnh", h, block.q[...]), cos_sin)
  k = rotate(jnp.einsum("btd,dkh->btkh", h, block.k[...]), cos_sin)
  v = jnp.einsum("btd,dkh->btkh", h, block.v[...])
  out, kept = attend(q, k, v)
  x = x + jnp.einsum("btnh,nhd->btd", out, block.o[...])
  h = rms_norm(x, block.mlp_norm, c.norm_eps)
  h = jax.nn.silu(jnp.einsum("btd,df->btf", h, block.gate[...])) * jnp.einsum("btd,df->btf", h, block.up[...])
  return x + jnp.einsum("btf,fd->btd", h, block.down[...]), kept


def causal_mask(segments):
  """[B, T, T]: earlier or equal place, same segment. Segments [B, T] number the packed examples; padding is 0."""
  T = segments.shape[1]
  return (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))


def embedded(model, tokens):
  """[..., D] rows of the embedding table."""
  return constrain_vocab(model.embed[...])[tokens]


def hidden_states(model, tokens, positions, segments, remat=False):
  """Final-norm hidden states [B, T, D] of right-padded or packed rows; positions restart with every segment."""
  c = model.c
  cos_sin, mask = rope_angles(c, positions), causal_mask(segments)

  def layer(x, block):
    x, _ = run_block(block, c, x, cos_sin, lambda q, k, v: (attention(q, k, v, mask)[0], None))
    return x, None

  x = embedded(model, tokens)
  if remat:
    layer = jax.checkpoint(layer, prevent_cse=False)
  if isinstance(model.blocks, tuple):
    for block in model.blocks:
      x, _ = layer(x, block)
  else:
    x, _ = jax.lax.scan(layer, x, model.blocks)
  return rms_norm(x, model.norm, c.norm_eps)


def logits(model, hidden):
  """fp32 logits [..., V]."""
  if model.c.tied:
    return jnp.einsum("...d,vd->...v", hidden, model.embed[...], preferred_element_type=jnp.float32)
  return jnp.einsum("...d,dv->...v", hidden, model.head[...], preferred_element_type=jnp.float32)


def new_cache(model, slots, capacity):
  """One K and one V buffer [slots, capacity, K, H] per layer, zeros (masked entries are multiplied, never NaN)."""
  c, dtype = model.c, model.embed[...].dtype
  shape = (slots, capacity, c.kv_heads, c.head_dim)
  return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(c.depth))


def prefill(model, tokens, segments):
  """Hidden states of right-padded prompts and their per-layer (k, v) [B, T, K, H]; unrolled layout."""
  c = model.c
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  cos_sin, mask = rope_angles(c, positions), causal_mask(segments)
  x, kept = embedded(model, tokens), []
  for block in model.blocks:
    x, kv = run_block(block, c, x, cos_sin, lambda q, k, v: (attention(q, k, v, mask)[0], (k, v)))
    kept.append(kv)
  return rms_norm(x, model.norm, c.norm_eps), tuple(kept)


def decode(model, tokens, lengths, cache):
  """One step: tokens [B] take place `lengths` [B] of their slots. Returns hidden [B, D] and the updated cache."""
  c = model.c
  S = cache[0][0].shape[1]
  cos_sin = rope_angles(c, lengths[:, None])
  mask = (jnp.arange(S) <= lengths[:, None])[:, None, :]
  x, kept = embedded(model, tokens[:, None]), []
  # Written slot by slot: indexed with [slots, lengths], every device would ask all others for their slots' indices.
  put = jax.vmap(lambda buffer, at, new: buffer.at[at].set(new))
  for block, (keys, values) in zip(model.blocks, cache):

    def attend(q, k, v, keys=keys, values=values):
      keys, values = put(keys, lengths, k[:, 0]), put(values, lengths, v[:, 0])
      return attention(q, keys, values, mask)[0], (keys, values)

    x, kv = run_block(block, c, x, cos_sin, attend)
    kept.append(kv)
  return rms_norm(x, model.norm, c.norm_eps)[:, 0], tuple(kept)
