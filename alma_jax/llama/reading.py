"""Forward passes over whole rows that may follow a shared prefix: prompts, and texts that are judged or scored.

  hidden, kv = prefill(model, tokens, lengths)                         # prompts; then `decoder.decode`, token by token
  kv = keys_values(model, tokens, lengths)                             # of prefixes, which many rows continue
  hidden = read(model, tokens, lengths, places, Prefix(kv, lengths))   # at single places of such rows

Axes as in model.py; S places of a prefix, P prefixes, R places to read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from alma_jax.llama import attention
from alma_jax.llama import model as llama
from alma_jax.llama.attention_reference import Attended
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Block, CosSin, KeysValues, Layer, Llama
from alma_jax.llama.sharding import platform


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
  layer, x = _layer(model.c, _cos_sin(model.c, tokens, prefix), lengths, prefix), llama.embedded(model, tokens)
  if prefix is None or isinstance(model.blocks, tuple):
    x, kept = llama.run_layers(model, layer, x, prefix and prefix.kv)
  else:
    each = jnp.arange(model.c.depth)
    x, kept = llama.run_layers(model, lambda x, block, i: layer(x, block, _past(prefix, i)), x, each)
  return llama.rms_norm(x, model.norm, model.c.norm_eps), kept


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
  x, buffers = jax.lax.fori_loop(0, last, upper, (llama.embedded(model, tokens), (kept, kept)))
  return written(buffers, last, _past(prefix, last), _last_keys_values(model, x, cos_sin))


def read(model: Llama, tokens: Array, lengths: Array, places: Array, prefix: Prefix | None = None) -> Array:
  """fp32 final-norm hidden states [B, R, D] at the places [B, R] of the rows of `prefill`. Stacked layout.

  In the last layer every place gets keys and values, and only these R places the rest.
  """
  c, last, cos_sin = model.c, model.c.depth - 1, _cos_sin(model.c, tokens, prefix)
  layer = _layer(c, cos_sin, lengths, prefix)

  def upper(i: Array, x: Array) -> Array:
    return layer(x, _at(model.blocks, i), _past(prefix, i))[0]

  x = jax.lax.fori_loop(0, last, upper, llama.embedded(model, tokens))
  k, v = _last_keys_values(model, x, cos_sin)

  def attend(q: Array, *_: Array) -> tuple[Array, None]:
    parts = [attention.over(q[:, r : r + 1], k, v, places[:, r] + 1) for r in range(places.shape[1])]
    found = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return _with_prefix(found, q, _past(prefix, last), prefix), None

  x = jnp.take_along_axis(x, places[..., None], axis=1)
  cos_sin = llama.rope_angles(c, places + _before(prefix, len(tokens)))
  x, _ = llama.run_block(_at(model.blocks, last), c, x, cos_sin, attend)
  return llama.rms_norm(x.astype(jnp.float32), model.norm, c.norm_eps)


def _layer(c: LlamaConfig, cos_sin: CosSin, lengths: Array, prefix: Prefix | None) -> Layer:
  """layer(x, block, the prefix's (k, v) of this layer) -> (x, the rows' own (k, v)), for right-padded rows."""
  segments = (jnp.arange(cos_sin[0].shape[1]) < lengths[:, None]).astype(jnp.int32)

  def layer(x: Array, block: Block, past: KeysValues | None) -> tuple[Array, KeysValues]:
    def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues]:
      return _with_prefix(attention.causal(q, k, v, segments, few=llama.PADDED), q, past, prefix), (k, v)

    return llama.run_block(block, c, x, cos_sin, attend)

  return layer


def _last_keys_values(model: Llama, x: Array, cos_sin: CosSin) -> KeysValues:
  """(k, v) of the last layer from its input; nothing uses the rest of the block, so the compiler leaves it out."""
  block = _at(model.blocks, model.c.depth - 1)
  return llama.run_block(block, model.c, x, cos_sin, lambda q, k, v: (q, (k, v)))[1]


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
  return llama.rope_angles(c, jnp.broadcast_to(jnp.arange(T) + _before(prefix, B), (B, T)))


def _with_prefix(own: Attended, q: Array, past: KeysValues | None, prefix: Prefix | None) -> Array:
  """Attention [B, T, N, H] over what `own` has looked at and over the prefix's keys and values of this layer."""
  if past is None or prefix is None:
    return own[0]
  # The B / P rows after one prefix become queries of one row: [B, T, N, H] -> [P, B / P * T, N, H], and back.
  shared = attention.over(q.reshape(past[0].shape[0], -1, *q.shape[2:]), *past, _lengths(prefix))
  return attention.merged(own, jax.tree.map(lambda new, old: new.reshape(old.shape), shared, own))[0]
