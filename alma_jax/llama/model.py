"""Llama 2, 3, 3.1 and 3.2 as a typed pytree of weights and pure functions over it.

  model = init(c, seed)                                                  # or weights.load(directory)
  z = logits(model, hidden_states(model, tokens, positions, segments))   # training, scoring
  hidden, kv = prefill(model, tokens, lengths)                           # prompts; then `decode`, token by token

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
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from alma_jax.llama import attention
from alma_jax.llama.attention_reference import Attended
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


def _run_layers(model: Llama, layer: Layer, x: Array, per_layer: Any) -> tuple[Array, Any]:
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
  x, _ = _run_layers(model, layer, embedded(model, tokens), jnp.arange(c.depth))
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


# ---- Rows after a shared prefix: prompts and judging


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """What came before: keys and values of every layer. The fields are Any because a Prefix of PartitionSpecs is also
  used, to say where these arrays lie."""

  kv: Any  # [P, S, K, H]: in the model's layout, a tuple of (k, v) per layer, or (k, v) that lead with the layer axis
  lengths: Any  # [P] how many of the S places are real
  # [n] which of the P the rows continue, B / n of them each. None: all of them in order. With the stacked layout alone
  places: Any = None


def prefill(model: Llama, tokens: Array, lengths: Array, prefix: Prefix | None = None) -> tuple[Array, Any]:
  """Hidden states [B, T, D] of right-padded rows, and every layer's (k, v) [B, T, K, H] in the model's layout.

  With a `prefix` of P rows, B / P consecutive rows of tokens continue each of them; its part is read and not computed
  again.
  """
  layer, x = _layer(model.c, _cos_sin(model.c, tokens, prefix), lengths, prefix), embedded(model, tokens)
  if prefix is None or isinstance(model.blocks, tuple):
    x, kept = _run_layers(model, layer, x, prefix and prefix.kv)
  else:
    each = jnp.arange(model.c.depth)
    x, kept = _run_layers(model, lambda x, block, i: layer(x, block, _past(prefix, i)), x, each)
  return rms_norm(x, model.norm, model.c.norm_eps), kept


def keys_values(model: Llama, tokens: Array, lengths: Array, prefix: Prefix | None = None) -> KeysValues:
  """The (k, v) of `prefill`, [L, B, T, K, H] each, without what follows them in the last layer. Stacked layout.

  With a `prefix`, [L, B, S + T, K, H]: its own come first, whose S places must all be real, so that there is no gap.
  """
  c, (B, T), cos_sin = model.c, tokens.shape, _cos_sin(model.c, tokens, prefix)
  layer = _layer(c, cos_sin, lengths, prefix)
  before = 0 if prefix is None else prefix.kv[0].shape[2]
  # One buffer for all layers, which XLA writes in place: joining parts would have them in memory twice.
  kept = jnp.zeros((c.depth, B, before + T, c.kv_heads, c.head_dim), model.embed[...].dtype)

  def upper(i: Array, carry: tuple[Array, KeysValues]) -> tuple[Array, KeysValues]:
    x, buffers = carry
    past = _past(prefix, i)
    x, new = layer(x, _at(model.blocks, i), past)
    return x, written(buffers, i, past, new)

  def written(buffers: KeysValues, i: int | Array, past: KeysValues | None, new: KeysValues) -> KeysValues:
    def put(buffer: Array, x: Array, at: int) -> Array:
      return jax.lax.dynamic_update_slice(buffer, jnp.repeat(x, B // x.shape[0], axis=0)[None], (i, 0, at, 0, 0))

    if past is not None:
      buffers = put(buffers[0], past[0], 0), put(buffers[1], past[1], 0)
    return put(buffers[0], new[0], before), put(buffers[1], new[1], before)

  last = c.depth - 1
  x, buffers = jax.lax.fori_loop(0, last, upper, (embedded(model, tokens), (kept, kept)))
  return written(buffers, last, _past(prefix, last), _last_keys_values(model, x, cos_sin))


def read(model: Llama, tokens: Array, lengths: Array, places: Array, prefix: Prefix | None = None) -> Array:
  """fp32 final-norm hidden states [B, R, D] at the places [B, R] of the rows of `prefill`. Stacked layout.

  In the last layer every place gets keys and values, and only these R places the rest.
  """
  c, last, cos_sin = model.c, model.c.depth - 1, _cos_sin(model.c, tokens, prefix)
  layer = _layer(c, cos_sin, lengths, prefix)

  def upper(i: Array, x: Array) -> Array:
    return layer(x, _at(model.blocks, i), _past(prefix, i))[0]

  x = jax.lax.fori_loop(0, last, upper, embedded(model, tokens))
  k, v = _last_keys_values(model, x, cos_sin)

  def attend(q: Array, *_: Array) -> tuple[Array, None]:
    parts = [attention.over(q[:, r : r + 1], k, v, places[:, r] + 1) for r in range(places.shape[1])]
    found = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return _with_prefix(found, q, _past(prefix, last), prefix), None

  x = jnp.take_along_axis(x, places[..., None], axis=1)
  x, _ = run_block(_at(model.blocks, last), c, x, rope_angles(c, places + _before(prefix, len(tokens))), attend)
  return rms_norm(x.astype(jnp.float32), model.norm, c.norm_eps)


def _layer(c: LlamaConfig, cos_sin: CosSin, lengths: Array, prefix: Prefix | None) -> Layer:
  """layer(x, block, the prefix's (k, v) of this layer) -> (x, the rows' own (k, v)), for right-padded rows."""
  segments = (jnp.arange(cos_sin[0].shape[1]) < lengths[:, None]).astype(jnp.int32)

  def layer(x: Array, block: Block, past: KeysValues | None) -> tuple[Array, KeysValues]:
    def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues]:
      return _with_prefix(attention.causal(q, k, v, segments, few=PADDED), q, past, prefix), (k, v)

    return run_block(block, c, x, cos_sin, attend)

  return layer


def _last_keys_values(model: Llama, x: Array, cos_sin: CosSin) -> KeysValues:
  """(k, v) of the last layer from its input; nothing uses the rest of the block, so the compiler leaves it out."""
  block = _at(model.blocks, model.c.depth - 1)
  return run_block(block, model.c, x, cos_sin, lambda q, k, v: (q, (k, v)))[1]


def _at(stacked: Any, i: int | Array) -> Any:
  """Layer i of a stacked tree, without a copy of the others."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)


def _past(prefix: Prefix | None, i: int | Array) -> KeysValues | None:
  """The (k, v) [n, S, K, H] of layer i that rows continue, of a prefix in the stacked layout. Where the prefix has
  `places` they are copied together, one layer at a time."""
  if prefix is None:
    return None
  if prefix.places is None:
    return _at(prefix.kv, i)
  places, kv = prefix.places, prefix.kv
  if platform() != "tpu" or kv[0].shape[4] % attention.LANES:
    return jax.tree.map(lambda x: x.at[i, places].get(mode="promise_in_bounds"), kv)

  # One after the other: a gather on TPUs first copies what it takes from, all layers of it. Narrow heads lie otherwise
  # there, and for slices of them all layers would be laid out anew.
  def put(to: Array, copies: KeysValues) -> KeysValues:
    def one(copy: Array, x: Array) -> Array:
      taken = jax.lax.dynamic_slice(x, (i, places[to], 0, 0, 0), (1, 1, *x.shape[2:]))
      return jax.lax.dynamic_update_slice(copy, taken[0], (to, 0, 0, 0))

    return jax.tree.map(one, copies, kv)

  return jax.lax.fori_loop(
    0, len(places), put, jax.tree.map(lambda x: jnp.zeros((len(places), *x.shape[2:]), x.dtype), kv)
  )


def _lengths(prefix: Prefix) -> Array:
  """[n] of the prefixes that rows continue."""
  return prefix.lengths if prefix.places is None else prefix.lengths[prefix.places]


def _before(prefix: Prefix | None, rows: int) -> int | Array:
  """[rows, 1] how many tokens stand before each row."""
  if prefix is None:
    return 0
  lengths = _lengths(prefix)
  return jnp.repeat(lengths, rows // lengths.shape[0])[:, None]


def _cos_sin(c: LlamaConfig, tokens: Array, prefix: Prefix | None) -> CosSin:
  B, T = tokens.shape
  return rope_angles(c, jnp.broadcast_to(jnp.arange(T) + _before(prefix, B), (B, T)))


def _with_prefix(own: Attended, q: Array, past: KeysValues | None, prefix: Prefix | None) -> Array:
  """Attention [B, T, N, H] over what `own` has looked at and over the prefix's keys and values of this layer."""
  if past is None or prefix is None:
    return own[0]
  # The B / P rows after one prefix become queries of one row: [B, T, N, H] -> [P, B / P * T, N, H], and back.
  shared = attention.over(q.reshape(past[0].shape[0], -1, *q.shape[2:]), *past, _lengths(prefix))
  return attention.merged(own, jax.tree.map(lambda new, old: new.reshape(old.shape), shared, own))[0]


# ---- One token after another: decoding

Cache = tuple[KeysValues, ...]  # per layer, K and V buffers [slots, capacity, K / n, n H]: n heads side by side


def new_cache(model: Llama, slots: int, capacity: int, mesh: Mesh | AbstractMesh | None = None) -> Cache:
  """A cache of zeros: masked entries are multiplied, so they must never be NaN. `mesh`: where it will be, if known."""
  dtype = model.embed[...].dtype
  shape = (slots, capacity, *cache_heads(model.c, dtype, mesh))
  return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.c.depth))


def cache_heads(
  c: LlamaConfig, dtype: Any, mesh: Mesh | AbstractMesh | None = None, target: str | None = None
) -> tuple[int, int]:
  """The last two sizes of a cache on a mesh's devices, or on those of the platform `target`: the rows that heads lie in
  side by side, and the numbers of such a row."""
  ways = 1 if mesh is None or c.kv_heads % mesh.shape["tensor"] else mesh.shape["tensor"]
  n = attention.side_by_side(target or platform(mesh), dtype, c.kv_heads // ways, c.head_dim)
  return c.kv_heads // n, n * c.head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """The slots that read each prefix together, up to W of them, so that its keys are read once for them and where they
  lie. A prefix that more slots continue has several rows.

  Slots 0, 2 and 3 continue prefix p, slot 1 continues prefix q; W = 2, `-` is a place to spare:

    row   prefix   slots    live    results, rows x W      place of slots 0 1 2 3
     0      p       0 2      2            0 1                            0 4 1 2
     1      p       3 -      1            2 .
     2      q       1 -      1            4 .
  """

  slots: Array | np.ndarray  # [rows, W] the slots of each row; any slot in a place to spare
  live: Array | np.ndarray  # [rows] how many they are
  place: Array | np.ndarray  # [B] where slot b's result stands among the rows x W


def decode(
  model: Llama, tokens: Array, counts: Array, cache: Cache, prefix: Prefix, tiles: Tiles | None
) -> tuple[Array, Cache]:
  """Hidden states [B, D] after one step, and the updated cache. Unrolled layout.

  Token [B] takes place `counts` [B] of its slot's own cache and sees the slot's prefix before that. Without `tiles`
  slot b has prefix b.
  """
  c = model.c
  if tiles is None:
    before = lengths = prefix.lengths
  else:
    before = prefix.lengths[tiles.place // tiles.slots.shape[1]]
    lengths = jnp.where(tiles.live > 0, prefix.lengths, 0)
  cos_sin = rope_angles(c, (before + counts)[:, None])

  def grouped(x: Array) -> Array:  # a slot per row -> a tile per row, [B, 1, ...] -> [rows, W, ...]
    return x if tiles is None else x[tiles.slots][:, :, 0]

  def single(x: Array) -> Array:  # and back
    return x if tiles is None else x.reshape(-1, 1, *x.shape[2:])[tiles.place]

  @jax.vmap  # slot by slot: indexed with [slots, counts], each device would ask all others for their slots' indices
  def put(buffer: Array, at: Array, new: Array) -> Array:
    return buffer.at[at].set(new)

  def layer(x: Array, block: Block, own: tuple[KeysValues, KeysValues]) -> tuple[Array, KeysValues]:
    (keys, values), (prefix_keys, prefix_values) = own

    def in_rows(x: Array) -> Array:  # [B, 1, K, H] as in the cache, [B, K / n, n H]
      return x[:, 0].reshape(-1, *keys.shape[2:])

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues]:
      if platform() == "tpu":  # both calls read it, and XLA would make it for each of them
        q = jax.lax.optimization_barrier(q)
      written = put(keys, counts, in_rows(k)), put(values, counts, in_rows(v))
      new = attention.over(q, *written, counts + 1)
      old = (attention.over if tiles is None else attention.over_tiles)(grouped(q), prefix_keys, prefix_values, lengths)
      return attention.merged(new, jax.tree.map(single, old))[0], written

    return run_block(block, c, x, cos_sin, attend)

  own = tuple(zip(cache, prefix.kv, strict=True))
  x, cache = _run_layers(model, layer, embedded(model, tokens[:, None]), own)
  return rms_norm(x, model.norm, c.norm_eps)[:, 0], cache
