"""Llama 2, 3, 3.1 and 3.2 as a typed pytree of weights and pure functions over it.

`Llama` is a flax.nnx Module in tree style: it holds weights and nothing else changes, so plain jax.jit / grad / scan
work on it. Two layouts of the same weights:

  stacked    blocks is one Block whose leaves lead with the layer axis; run by lax.scan      (training, scoring)
  unrolled   blocks is a tuple of Blocks; each has its own K and V buffer in the cache       (decoding)

Numbers follow the weights' dtype (cast the tree to change it); norms, rotary angles, softmax and logits are fp32.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim, D width,
F feed-forward width, V vocabulary, L layers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from alma_jax.llama import attention
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
  if jax.default_backend() != "cpu":
    return jnp.cos(angle), jnp.sin(angle)
  # In a loop, which XLA leaves alone: else it makes them again for every use in every layer, a tenth of a forward pass.
  return tuple(jax.lax.map(lambda first: jnp.where(first, jnp.cos(angle), jnp.sin(angle)), jnp.array([True, False])))


def rotate(x, cos_sin):
  """Rotary embedding with half-split pairs, as in the Hugging Face weights."""
  cos, sin = cos_sin
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x, weight, eps):
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (weight[...].astype(jnp.float32) * x32).astype(x.dtype)


def run_block(block, c, x, cos_sin, attend, drop=lambda x, site: x):
  """One layer; `attend(q, k, v) -> (out, kept)` decides what is looked at and what is kept of k and v. `drop` is
  applied to what the attention (site 0) and the feed-forward part (site 1) add to the stream."""
  x = constrain_batch(x)
  h = rms_norm(x, block.attn_norm, c.norm_eps)
  q = rotate(_times(h, block.q[...]), cos_sin)
  k = rotate(_times(h, block.k[...]), cos_sin)
  v = _times(h, block.v[...])
  out, kept = attend(q, k, v)
  x = x + drop(_times(out, block.o[...]), 0)
  h = rms_norm(x, block.mlp_norm, c.norm_eps)
  h = jax.nn.silu(_times(h, block.gate[...])) * _times(h, block.up[...])
  return x + drop(_times(h, block.down[...]), 1), kept


def _times(x, weight):
  """x [B, T, inputs...] times a weight [inputs..., outputs...]. On one device as a product of two matrices: with more
  axes its backward pass copies activations on CPUs, which takes a fifth of a training step. Spread over devices the
  axes stay as they are, because they carry the shardings."""
  B, T, *inputs = x.shape
  if not _on_one_device():
    return jnp.tensordot(x, weight, len(inputs))
  outputs = weight.shape[len(inputs) :]
  return (x.reshape(B * T, -1) @ weight.reshape(math.prod(inputs), -1)).reshape(B, T, *outputs)


def embedded(model, tokens):
  """[..., D] rows of the embedding table."""
  return constrain_vocab(model.embed[...])[tokens]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forks:
  """Rows in which a second continuation of a text stands behind the first: [text][first][second]. To it the first one
  is not there; everything before it in its segment is, up to where the first one began."""

  second: Any  # [B, T] bool: the places of second continuations
  order: Any  # [B, T] the places of each row with every second continuation right behind its text
  segments: Any  # [B, T] in that order: text and second continuation are one segment, the first one is another


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """Residual dropout: the rate rises evenly from 0 in the first layer to `last` in the last one."""

  last: Any
  key: Any


# What the backward pass finds kept of every layer, from the quickest to the leanest: everything; the results of matrix
# products, so that the rest is computed again; the layer's input alone.
REMAT = {"none": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def hidden_states(model, tokens, positions, segments, remat="none", forks=None, dropout=None, depth=None):
  """Final-norm hidden states [B, T, D] of right-padded or packed rows; positions restart with every segment. Segments
  [B, T] number the packed examples; padding is 0. `depth`: stop after so many layers."""
  c, cos_sin = model.c, rope_angles(model.c, positions)
  depth = c.depth if depth is None else min(depth, c.depth)

  def attend(q, k, v):
    return attention.causal(q, k, v, segments)[0] if forks is None else _forked(q, k, v, segments, forks), None

  def layer(x, block, i):
    drop = (lambda x, site: x) if dropout is None else lambda x, site: _dropped(x, dropout, c.depth, i, site)
    return run_block(block, c, x, cos_sin, attend, drop)

  if remat != "none":
    layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
  if isinstance(model.blocks, tuple):
    model = _with_blocks(model, model.blocks[:depth])
  elif remat == "none" and _unroll(depth, tokens.size * c.width):
    model = _with_blocks(model, tuple(jax.tree.map(lambda x: x[i], model.blocks) for i in range(depth)))
  elif depth < c.depth:
    model = _with_blocks(model, jax.tree.map(lambda x: x[:depth], model.blocks))
  x, _ = _run_layers(model, layer, embedded(model, tokens), jnp.arange(depth))
  return rms_norm(x, model.norm, c.norm_eps)


def _unroll(depth, size):
  """Whether to write out the layers, hidden states having so many numbers: on CPUs a scan spends a tenth of the time on
  putting together and taking apart what it keeps for the backward pass. Small ones had rather compile quickly."""
  return jax.default_backend() == "cpu" and _on_one_device() and depth <= 8 and size >= 2**18


def _on_one_device():
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def _forked(q, k, v, segments, forks):
  """Attention over rows with forks: once as they stand, which is right for all but the second continuations, and once
  in the order in which these follow their texts."""
  moved = lambda x, to: jnp.take_along_axis(x, to[..., None, None], axis=1)
  first = attention.causal(q, k, v, segments)[0]
  second = attention.causal(*(moved(x, forks.order) for x in (q, k, v)), forks.segments)[0]
  return jnp.where(forks.second[..., None, None], moved(second, jnp.argsort(forks.order, axis=1)), first)


def _dropped(x, dropout, depth, i, site):
  rate = dropout.last * i / max(1, depth - 1)
  kept = jax.random.uniform(jax.random.fold_in(dropout.key, 2 * i + site), x.shape) >= rate
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _run_layers(model, layer, x, per_layer):
  """`layer(x, block, its own) -> (x, kept)` through all blocks of either layout; what is kept comes in that layout: a
  tuple with one entry per layer, or arrays that lead with the layer axis. So does `per_layer`, unless it is None."""
  if not isinstance(model.blocks, tuple):
    return jax.lax.scan(lambda x, inputs: layer(x, *inputs), x, (model.blocks, per_layer))
  kept = []
  for i, block in enumerate(model.blocks):
    x, keep = layer(x, block, None if per_layer is None else per_layer[i])
    kept.append(keep)
  return x, tuple(kept)


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Keys and values [P, S, K, H] of every layer that came before, and how many of the S places are real, [P]."""

  kv: Any  # as the model's layout has it: a tuple of (k, v) per layer, or (k, v) that lead with the layer axis
  lengths: Any


def prefill(model, tokens, lengths, prefix=None):
  """(hidden states [B, T, D], every layer's (k, v) [B, T, K, H]) of right-padded rows, B of them.

  With a `prefix` of P rows, B / P consecutive rows of tokens continue each of them: it is read, never computed again.
  """
  c, (B, T) = model.c, tokens.shape
  segments = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
  before = 0 if prefix is None else jnp.repeat(prefix.lengths, B // prefix.lengths.shape[0])[:, None]
  cos_sin = rope_angles(c, jnp.broadcast_to(jnp.arange(T) + before, (B, T)))

  def layer(x, block, past):
    def attend(q, k, v):
      own = attention.causal(q, k, v, segments)
      if past is None:
        return own[0], (k, v)
      shared = attention.over(q.reshape(past[0].shape[0], -1, *q.shape[2:]), *past, prefix.lengths)
      shared = jax.tree.map(lambda new, old: new.reshape(old.shape), shared, own)
      return attention.merged(own, shared)[0], (k, v)

    return run_block(block, c, x, cos_sin, attend)

  x, kept = _run_layers(model, layer, embedded(model, tokens), None if prefix is None else prefix.kv)
  return rms_norm(x, model.norm, c.norm_eps), kept


def keys_values(model, tokens, lengths, prefix=None):
  """`prefill` for the keys and values alone: the last layer ends with them. Stacked layout."""
  last, layer, own = model.c.depth - 1, *_continued(model, tokens, lengths, prefix)
  x, kept = jax.lax.scan(layer, embedded(model, tokens), jnp.arange(last))
  return jax.tree.map(lambda upper, x: jnp.concatenate([upper, x[None]]), kept, own(x))


def read(model, tokens, lengths, places, prefix=None):
  """fp32 final-norm hidden states [B, R, D] at the places [B, R] of the rows of `prefill`. Of the last layer all places
  get keys and values, and only these the rest. Stacked layout."""
  c, (layer, own) = model.c, _continued(model, tokens, lengths, prefix)
  x = jax.lax.fori_loop(0, c.depth - 1, lambda i, x: layer(x, i)[0], embedded(model, tokens))
  k, v = own(x)

  def attend(q, *_):
    parts = [attention.over(q[:, r : r + 1], k, v, places[:, r] + 1) for r in range(places.shape[1])]
    found = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return _with_prefix(found, q, None if prefix is None else _at(prefix.kv, c.depth - 1), prefix), None

  x = jnp.take_along_axis(x, places[..., None], axis=1)
  cos_sin = rope_angles(c, places + _before(prefix, len(tokens)))
  x, _ = run_block(_at(model.blocks, c.depth - 1), c, x, cos_sin, attend)
  return rms_norm(x.astype(jnp.float32), model.norm, c.norm_eps)


def _continued(model, tokens, lengths, prefix):
  """(layer(x, i) -> (x, (k, v)), own(x) -> the last layer's (k, v)) for the rows of `prefill`."""
  c, (B, T) = model.c, tokens.shape
  segments = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
  cos_sin = rope_angles(c, jnp.broadcast_to(jnp.arange(T) + _before(prefix, B), (B, T)))

  def layer(x, i):
    past = None if prefix is None else _at(prefix.kv, i)
    attend = lambda q, k, v: (_with_prefix(attention.causal(q, k, v, segments), q, past, prefix), (k, v))
    return run_block(_at(model.blocks, i), c, x, cos_sin, attend)

  def own(x):  # what the block makes of the queries is not used, so the compiler leaves it out
    return run_block(_at(model.blocks, c.depth - 1), c, x, cos_sin, lambda q, k, v: (q, (k, v)))[1]

  return layer, own


def _at(stacked, i):
  """Layer i of a stacked tree, without a copy of the others."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)


def _before(prefix, rows):
  """[rows, 1] how many tokens stand before every row."""
  return (
    jnp.zeros((rows, 1), int) if prefix is None else jnp.repeat(prefix.lengths, rows // len(prefix.lengths))[:, None]
  )


def _with_prefix(own, q, past, prefix):
  """Attention [B, T, N, H] over what `own` has looked at and over the prefix's keys and values of this layer."""
  if past is None:
    return own[0]
  shared = attention.over(q.reshape(past[0].shape[0], -1, *q.shape[2:]), *past, prefix.lengths)
  return attention.merged(own, jax.tree.map(lambda new, old: new.reshape(old.shape), shared, own))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """Which slots read which prefix: up to W slots of one prefix form a tile, so that its keys are read once for them."""

  prefix: Any  # [n] the prefix of every tile; -1: the tile is not used
  slots: Any  # [n, W] its slots; where a tile is not full, any slot
  place: Any  # [B] where slot b's result stands among the n x W


def decode(model, tokens, counts, cache, prefix, tiles):
  """One step: token [B] takes place `counts` [B] of its slot's own cache and sees the slot's prefix before that.

  Unrolled layout. Without `tiles` slot b has prefix b. Returns hidden [B, D] and the updated cache.
  """
  c = model.c
  if tiles is None:
    before, grouped, single = prefix.lengths, lambda x: x, lambda x: x
  else:
    before = prefix.lengths[tiles.prefix[tiles.place // tiles.slots.shape[1]]]
    grouped = lambda x: x[tiles.slots][:, :, 0]  # [B, 1, ...] -> [n, W, ...]
    single = lambda x: x.reshape(-1, 1, *x.shape[2:])[tiles.place]
  lengths = prefix.lengths if tiles is None else jnp.where(tiles.prefix < 0, 0, prefix.lengths[tiles.prefix])
  cos_sin = rope_angles(c, (before + counts)[:, None])
  # Written slot by slot: indexed with [slots, counts], every device would ask all others for their slots' indices.
  put = jax.vmap(lambda buffer, at, new: buffer.at[at].set(new))

  def layer(x, block, own):
    (keys, values), (prefix_keys, prefix_values) = own

    def attend(q, k, v):
      written = put(keys, counts, k[:, 0]), put(values, counts, v[:, 0])
      new = attention.over(q, *written, counts + 1)
      old = attention.over(grouped(q), prefix_keys, prefix_values, lengths, tiles and jnp.maximum(tiles.prefix, 0))
      return attention.merged(new, jax.tree.map(single, old))[0], written

    return run_block(block, c, x, cos_sin, attend)

  x, cache = _run_layers(model, layer, embedded(model, tokens[:, None]), tuple(zip(cache, prefix.kv)))
  return rms_norm(x, model.norm, c.norm_eps)[:, 0], cache
