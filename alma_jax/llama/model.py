"""Llama 2, 3, 3.1 and 3.2 as a typed pytree of weights and pure functions over it.

  model = init(c, seed)                                                  # or weights.load(directory)
  z = logits(model, hidden_states(model, tokens, positions, segments))   # training, scoring

Prompts and rows that follow a shared prefix are in reading.py, decoding token by token in decoder.py.

`Llama` is a flax.nnx Module in tree style: it holds weights and nothing in it changes, so plain jax.jit / grad / scan
work on it. The same weights come in two layouts; with L layers, the query weights are

  stacked    blocks.q [L, D, N, H]: blocks is one Block whose leaves lead with the layer axis, run by lax.scan
  unrolled   blocks[i].q [D, N, H]: blocks is a tuple of L Blocks; each has its own K and V buffer in the cache

Training and scoring use the stacked layout, decoding the unrolled one. What is made per layer (keys and values, the
cache) comes in the model's layout. Numbers follow the weights' dtype (cast the tree to change it); norms, rotary
angles, softmax and logits are fp32.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim, D width,
F feed-forward width, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from alma_jax.llama import attention
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.sharding import constrain_batch, constrain_vocab, holds_all_rows, on_own_rows, platform

CosSin = tuple[Array, Array]  # fp32 [B, T, 1, H/2] each
KeysValues = tuple[Array, Array]  # [B, S, K, H] each
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q, k, v -> attention's out, and what is kept of the layer
Drop = Callable[[Array, int], Array]  # x, site -> x
Layer = Callable[[Array, "Block", Any], tuple[Array, Any]]  # x, block, the layer's own input -> x, and what is kept

PADDED = 2  # runs of one segment in a row of one text: it, and padding


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float | None) -> nnx.Param[Array]:
  """A normal weight (ones without `scale`) and its logical axes, which are our own metadata: flax shards nothing."""
  init = jnp.ones(shape, jnp.float32) if scale is None else scale * jax.random.normal(rngs.params(), shape)
  return nnx.Param(init, axes=axes)


class Block(nnx.Module):
  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs) -> None:
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
  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs) -> None:
    self.c = c
    self.embed = param(rngs, (c.vocab, c.width), ("vocab", "embed"), 0.02)
    self.blocks: Any = nnx.data(jax.vmap(lambda key: Block(c, nnx.Rngs(key)))(jax.random.split(rngs.params(), c.depth)))
    self.norm = param(rngs, (c.width,), ("norm",), None)
    columns = c.outputs or (None if c.tied else c.vocab)
    head = param(rngs, (c.width, columns), ("embed", "vocab"), c.width**-0.5) if columns else None
    self.head: nnx.Param[Array] | None = nnx.data(head)


def init(c: LlamaConfig, seed: int) -> Llama:
  """A random model in fp32, stacked."""
  return Llama(c, nnx.Rngs(seed))


def cast(model: Llama, dtype: Any) -> Llama:
  return jax.tree.map(lambda x: x.astype(dtype), model)


def unrolled(model: Llama) -> Llama:
  """The decoding layout: one Block per layer. Call it under jit, so that the stacked weights are sliced once."""
  return _with_blocks(model, tuple(jax.tree.map(lambda x: x[i], model.blocks) for i in range(model.c.depth)))


def first_layers(model: Llama, count: int | None) -> Llama:
  """The model cut behind its first `count` layers (None: whole), in its layout, with the same final norm."""
  if count is None or count >= model.c.depth:
    return model
  unrolled = isinstance(model.blocks, tuple)
  new = _with_blocks(model, model.blocks[:count] if unrolled else jax.tree.map(lambda x: x[:count], model.blocks))
  new.c = dataclasses.replace(model.c, depth=count)
  return new


def _with_blocks(model: Llama, blocks: Any) -> Llama:
  new = nnx.clone(model)
  new.blocks = nnx.data(blocks)
  return new


# ---- The parts of a layer


def rope_frequencies(c: LlamaConfig) -> Array:
  """fp32 [H/2] rotary frequencies with the config's scaling."""
  frequency = 1.0 / c.rope_base ** (jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  s = c.rope_scaling
  if s is None:
    return frequency
  if s.kind == "linear":
    return frequency / s.factor
  low, high, original = s.low_freq_factor, s.high_freq_factor, s.original_positions
  assert low is not None and high is not None and original is not None  # `llama3` has them all
  wavelength = 2 * math.pi / frequency
  smooth = (original / wavelength - low) / (high - low)
  smooth = jnp.clip(smooth, 0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
  return (1 - smooth) * frequency / s.factor + smooth * frequency


def rope_angles(c: LlamaConfig, positions: Array) -> CosSin:
  """(cos, sin) of the rotary angles at positions [B, T]."""
  angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)
  if platform() != "cpu":
    return jnp.cos(angle), jnp.sin(angle)
  # XLA leaves a loop alone; without it the angles are made again for each use in each layer, a tenth of a forward pass.
  cos, sin = jax.lax.map(lambda first: jnp.where(first, jnp.cos(angle), jnp.sin(angle)), jnp.array([True, False]))
  return cos, sin


def rotate(x: Array, cos_sin: CosSin) -> Array:
  """Rotary embedding of x [B, T, heads, H] with half-split pairs, as in the Hugging Face weights.

  Entry i and entry i + H/2 turn by position * frequency i. H = 4: (x0, x2) turn by one angle, (x1, x3) by another.
  """
  cos, sin = cos_sin
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x: Array, weight: nnx.Param[Array], eps: float) -> Array:
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (weight[...].astype(jnp.float32) * x32).astype(x.dtype)


def run_block(
  block: Block, c: LlamaConfig, x: Array, cos_sin: CosSin, attend: Attend, drop: Drop = lambda x, site: x
) -> tuple[Array, Any]:
  """x after one layer, and what `attend` keeps of it. `drop` changes what attention (site 0) and the feed-forward part
  (site 1) add to the stream."""
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


def _times(x: Array, weight: Array) -> Array:
  """x [B, T, inputs...] times a weight [inputs..., outputs...].

  One device: a product of two matrices, because with more axes its backward pass copies activations on CPUs, a fifth of
  a training step. Several devices: the axes stay apart, because they carry the shardings.
  """
  B, T, *inputs = x.shape
  if not _on_one_device():
    return jnp.tensordot(x, weight, len(inputs))
  outputs = weight.shape[len(inputs) :]
  return (x.reshape(B * T, -1) @ weight.reshape(math.prod(inputs), -1)).reshape(B, T, *outputs)


def _on_one_device() -> bool:
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def embedded(model: Llama, tokens: Array) -> Array:
  """[..., D] rows of the embedding table."""
  table = model.embed[...]

  def rows(table: Array, tokens: Array) -> Array:
    return constrain_vocab(table)[tokens]

  if _on_one_device() or holds_all_rows(tokens.shape[0]):
    return rows(table, tokens)
  return on_own_rows(rows, 1, model.c.width, 1)(table, tokens)


def logits(model: Llama, hidden: Array) -> Array:
  """fp32 logits [..., V], or the values [..., outputs] of a head that scores texts."""
  if model.head is None:
    return jnp.einsum("...d,vd->...v", hidden, model.embed[...], preferred_element_type=jnp.float32)
  return jnp.einsum("...d,dv->...v", hidden, model.head[...], preferred_element_type=jnp.float32)


def run_layers(model: Llama, layer: Layer, x: Array, per_layer: Any) -> tuple[Array, Any]:
  """x after all blocks, and what the layers keep, in the model's layout: a tuple with one entry per layer, or arrays
  that lead with the layer axis. `per_layer` holds the layers' own inputs in that layout, or is None."""
  if not isinstance(model.blocks, tuple):
    return jax.lax.scan(lambda x, inputs: layer(x, *inputs), x, (model.blocks, per_layer))
  kept = []
  for i, block in enumerate(model.blocks):
    x, keep = layer(x, block, None if per_layer is None else per_layer[i])
    kept.append(keep)
  return x, tuple(kept)


# ---- Whole rows: training and scoring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forks:
  """Packed rows with two continuations of a text: [text][first][second]. The second attends to the text and to itself,
  but not to the first. `text.packing.forked_rows` makes them; t, a, b are tokens of the text, the first and the second:

    place        0 1 2 3 4 5 6 7         order         0 1 2 5 6 3 4 7
    row          t t t a a b b .         row in order  t t t b b a a .
    positions    0 1 2 3 4 3 4 0
    segments     1 1 1 1 1 2 2 0         segments      1 1 1 1 1 2 2 0
    right for    x x x x x               right for     x x x x x        (b b, at places 5 and 6)
  """

  second: Array  # [B, T] bool: the places of second continuations
  order: Array  # [B, T] the places of each row, with each second continuation right behind its text
  segments: Array  # [B, T] in that order: text and second continuation are one segment, the first one is another


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """Residual dropout: the rate rises evenly from 0 in the first layer to `last` in the last one."""

  last: float | Array
  key: Array


# What the forward pass keeps of each layer for the backward pass, from the quickest to the leanest: everything; the
# results of matrix products, the rest is computed again; the layer's input alone.
REMAT: dict[str, Any] = dict(none=None, products=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, full=None)


@dataclasses.dataclass(frozen=True)
class TrainingPass:
  """What training adds to a forward pass."""

  remat: str = "none"  # a word of REMAT
  dropout: Dropout | None = None
  few: bool | int | None = None  # what `attention.causal` may be told of the rows


def hidden_states(
  model: Llama,
  tokens: Array,
  positions: Array,
  segments: Array,
  forks: Forks | None = None,
  training: TrainingPass = TrainingPass(),
) -> Array:
  """Final-norm hidden states [B, T, D] of right-padded or packed rows.

  Segments [B, T] number the packed examples, positions restart with each of them; padding is segment 0.
  """
  c, cos_sin = model.c, rope_angles(model.c, positions)

  def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
    if forks is not None:
      return _forked(q, k, v, segments, forks, training.few), None
    return attention.causal(q, k, v, segments, training.few)[0], None

  def layer(x: Array, block: Block, i: Array) -> tuple[Array, None]:
    def drop(x: Array, site: int) -> Array:
      return x if training.dropout is None else _dropped(x, training.dropout, c.depth, i, site)

    return run_block(block, c, x, cos_sin, attend, drop)

  if training.remat != "none":
    layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[training.remat])
  elif not isinstance(model.blocks, tuple) and _unroll(c.depth, tokens.size * c.width):
    model = unrolled(model)
  x, _ = run_layers(model, layer, embedded(model, tokens), jnp.arange(c.depth))
  return rms_norm(x, model.norm, c.norm_eps)


def _unroll(depth: int, size: int) -> bool:
  """Whether to write out the layers, for hidden states of `size` numbers. On CPUs a scan spends a tenth of the time on
  copying what it keeps for the backward pass; small sizes gain more from compiling quickly."""
  return platform() == "cpu" and _on_one_device() and depth <= 8 and size >= 2**18


def _forked(q: Array, k: Array, v: Array, segments: Array, forks: Forks, few: bool | int | None) -> Array:
  """Attention over rows with forks: once as they stand, right for text and first continuations, and once in the order
  where second continuations follow their texts."""

  def moved(x: Array, to: Array) -> Array:  # place t of the result holds place to[t]
    return jnp.take_along_axis(x, to[..., None, None], axis=1)

  first = attention.causal(q, k, v, segments, few)[0]
  q, k, v = (moved(x, forks.order) for x in (q, k, v))
  second = attention.causal(q, k, v, forks.segments, few)[0]
  back = moved(second, jnp.argsort(forks.order, axis=1))  # a permutation's argsort is its inverse
  return jnp.where(forks.second[..., None, None], back, first)


def _dropped(x: Array, dropout: Dropout, depth: int, i: int | Array, site: int) -> Array:
  """x with dropout as in layer i; each layer and site draws from a key of its own."""
  rate = dropout.last * i / max(1, depth - 1)
  kept = jax.random.uniform(jax.random.fold_in(dropout.key, 2 * i + site), x.shape) >= rate
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
