"""Attention on CPUs: score tiles that stay in the cache, one batch row and key/value head after another.

The functions keep the contract of `llama.attention` and are called through it only. Tiles are [keys, G, queries]: the
softmax runs along the leading axis, which XLA vectorises, unlike the last one. The mask of a batch row is made once for
all its heads. Everything inside is fp32, because CPUs have no faster arithmetic.

  causal   one stripe of queries after another, each against the keys up to its end (picture at `_stripes`). The
           backward pass computes the scores again and keeps nothing of [T, T].
  over     many queries: the same tiles. One query per row (decoding): reads only the blocks of keys that a row has.
           The tiles of a sampler's slots: one row after another, empty ones skipped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from alma_jax.llama.attention_reference import NEVER, Attended, reference_over, with_gradient_of

STRIPE = 128  # queries of each head per tile
COLUMNS = 512  # the same, times G, where all queries look at the same keys
BLOCK = 32  # keys a decoding step reads at a time


@jax.custom_vjp
def causal(q: Array, k: Array, v: Array, segments: Array) -> Attended:
  return _causal_forward(q, k, v, segments)[0]


def _causal_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Attended, tuple[Array, ...]]:
  G = q.shape[2] // k.shape[2]

  def head(seen: list[Array], q: Array, k: Array, v: Array) -> Attended:  # q [G, T, H]; k, v [T, H]
    parts = []
    for (start, end), mask in zip(_stripes(q.shape[1]), seen, strict=True):
      parts.append(_tile(q[:, start:end], k[:end], v[:end], mask[:, None]))
    return _joined(parts)

  heads = _queries(q, G) * q.shape[3] ** -0.5, _keys(k), _keys(v)
  out, lse = _walk(head, _masks, segments, heads)
  out, lse = _rows(out).astype(v.dtype), _rows(lse[..., None])[..., 0]
  return (out, lse), (q, k, v, segments, out, lse)


def _causal_backward(residuals: tuple[Array, ...], cotangents: Attended) -> tuple[Array, Array, Array, None]:
  """Gradients of q, k and v, a stripe at a time, with p = exp(q k - lse) computed again:

  d_v = p^T d_out      d_s = p (d_out v^T - delta),  delta = sum(out d_out) - d_lse      d_q = d_s k      d_k = d_s^T q
  """
  q, k, v, segments, out, lse = residuals
  d_out, d_lse = cotangents
  G, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5

  def head(
    seen: list[Array], q: Array, k: Array, v: Array, lse: Array, d_out: Array, delta: Array
  ) -> tuple[Array, Array, Array]:  # q, d_out [G, T, H]; k, v [T, H]; lse, delta [G, T]
    d_q, d_k, d_v = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for (start, end), mask in zip(_stripes(q.shape[1]), seen, strict=True):
      at, keys = slice(start, end), slice(0, end)
      scores = _dot(k[keys], q[:, at], (1,), (2,))  # [keys, G, queries], as are weights and d_scores
      weights = jnp.where(mask[:, None], jnp.exp(scores - lse[:, at]), 0.0)
      d_scores = weights * (_dot(v[keys], d_out[:, at], (1,), (2,)) - delta[:, at])
      d_v = d_v.at[keys].add(_dot(weights, d_out[:, at], (1, 2), (0, 1)))
      d_k = d_k.at[keys].add(_dot(d_scores, q[:, at], (1, 2), (0, 1)))
      d_q.append(_dot(k[keys], d_scores, (0,), (0,)).transpose(1, 2, 0))
    return jnp.concatenate(d_q, axis=1), d_k, d_v

  def per_row(x: Array) -> Array:  # [B, T, N] -> [B, K, G, T]
    return _queries(x[..., None], G)[..., 0]

  def turned(x: Array, like: Array) -> Array:  # [B, K, S, H] -> [B, S, K, H]
    return x.transpose(0, 2, 1, 3).astype(like.dtype)

  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
  heads = _queries(q, G) * scale, _keys(k), _keys(v), per_row(lse), _queries(d_out, G), per_row(delta)
  d_q, d_k, d_v = _walk(head, _masks, segments, heads)
  return (_rows(d_q) * scale).astype(q.dtype), turned(d_k, k), turned(d_v, v), None


causal.defvjp(_causal_forward, _causal_backward)


def over(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  return (_decoding if q.shape[1] == 1 else _many)(q, k, v, lengths)


def over_tiles(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """`over` for the tiles of a sampler, one row after another: rows without keys cost nothing. It has no gradient."""
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  G = N // K

  def row(x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    q, length, b = x

    def looking() -> tuple[Array, Array]:
      keys, values = (jax.lax.dynamic_index_in_dim(x, b, keepdims=False).astype(jnp.float32) for x in (k, v))
      scores = jnp.where(jnp.arange(S) < length, jnp.einsum("kth,skh->kts", q, keys), NEVER)
      top = scores.max(axis=-1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = weights.sum(axis=-1, keepdims=True)
      return jnp.einsum("kts,skh->kth", weights, values) / total, (top + jnp.log(total))[..., 0]

    nothing = jnp.zeros((K, G * T, H)), jnp.full((K, G * T), NEVER)
    return jax.lax.cond(length > 0, looking, lambda: nothing)

  out, lse = jax.lax.map(row, ((_queries(q, G) * H**-0.5).reshape(B, K, G * T, H), lengths, jnp.arange(B)))
  return _unfolded(out, G).astype(v.dtype), _unfolded(lse[..., None], G)[..., 0]


def _many(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """Many queries per row: all of them look at the same keys, so the G heads and T queries form one long axis."""
  (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
  G = N // K

  def head(seen: Array, q: Array, k: Array, v: Array) -> Attended:  # q [1, G * T, H]; k, v [S, H]
    cuts = range(0, q.shape[1], COLUMNS)
    return _joined([_tile(q[:, start : start + COLUMNS], k, v, seen[:, None, None]) for start in cuts])

  queries = _queries(q, G).reshape(B, K, 1, -1, H) * H**-0.5
  out, lse = _walk(head, lambda length: jnp.arange(S) < length, lengths, (queries, _keys(k), _keys(v)))
  return _unfolded(out, G).astype(v.dtype), _unfolded(lse[..., None], G)[..., 0]


def _decoding(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """One query per row: row by row, a block of keys at a time, no further than the row's length.

  S = 80, BLOCK = 32, length = 70: the loop reads keys 0-31, 32-63, and 48-79 with 48-63 and 70-79 masked.
  """
  (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
  inputs = q, k, v, lengths
  q, k, v = (jax.lax.stop_gradient(x) for x in (q, k, v))
  queries = (q[:, 0] * H**-0.5).astype(jnp.float32).reshape(B, K, N // K, H)
  block = min(BLOCK, S)

  def row(b: Array, q: Array, length: Array) -> Attended:  # q [K, G, H]
    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      """Take in block i; the state is the highest score so far, and the sums of weights and of weighted values."""
      top, total, out = state
      start = jnp.minimum(i * block, S - block)  # the last block may begin early: the keys it repeats are masked
      place = start + jnp.arange(block)

      def cut(x: Array) -> Array:  # [block, K, H]
        return jax.lax.dynamic_slice(x, (b, start, 0, 0), (1, block, K, H))[0].astype(jnp.float32)

      scores = jnp.einsum("kgh,skh->kgs", q, cut(k))
      scores = jnp.where((place >= i * block) & (place < length), scores, NEVER)
      higher = jnp.maximum(top, scores.max(axis=-1))
      # The old sums were relative to exp(top); `fade` makes them relative to exp(higher).
      weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
      new = jnp.einsum("kgs,skh->kgh", weights, cut(v))
      return higher, total * fade + weights.sum(axis=-1), out * fade[..., None] + new

    shape = (K, N // K)
    nothing = jnp.full(shape, 0.5 * NEVER), jnp.zeros(shape), jnp.zeros((*shape, H))
    top, total, out = jax.lax.fori_loop(0, (length + block - 1) // block, step, nothing)
    return out / jnp.maximum(total, 1e-37)[..., None], _log_sum_exp(top, total)

  out, lse = jax.lax.map(lambda x: row(*x), (jnp.arange(B), queries, lengths))
  out, lse = out.reshape(B, 1, N, H).astype(v.dtype), lse.reshape(B, 1, N)
  return with_gradient_of(reference_over, (out, lse), *inputs)


# ---- Tiles


def _stripes(T: int) -> list[tuple[int, int]]:
  """(start, end) of nearly equal stripes of at most STRIPE queries; longer ones where there would be more than 16.

  T = 300, three stripes of 100:      keys   0-99  100-199  200-299
                      queries   0-99           /       .        .        /  half masked
                              100-199          #       /        .        #  computed whole
                              200-299          #       #        /        .  never computed
  """
  count = min(-(-T // STRIPE), 16)  # each stripe is compiled
  size = -(-T // count)
  return [(start, min(start + size, T)) for start in range(0, T, size)]


def _masks(segments: Array) -> list[Array]:
  """Per stripe [keys, queries], true where the query looks at the key; segments [T]."""
  place, masks = jnp.arange(segments.shape[0]), []
  for start, end in _stripes(segments.shape[0]):
    same = segments[:end, None] == segments[start:end]
    masks.append(same & (place[:end, None] <= place[start:end]))
  return masks


def _walk(head: Callable[..., Any], masks: Callable[[Array], Any], seen: Array, arrays: tuple[Array, ...]) -> Any:
  """`head(masks(seen of the row), *its arrays)` for each batch row and key/value head; arrays lead with [B, K]."""

  def row(x: tuple[Array, tuple[Array, ...]]) -> Any:
    seen, arrays = x
    mask = masks(seen)
    return jax.lax.map(lambda x: head(mask, *x), arrays)

  return jax.lax.map(row, (seen, arrays))


def _tile(q: Array, k: Array, v: Array, mask: Array) -> Attended:
  """(out [G, t, H], log-sum-exp [G, t]) of scaled q [G, t, H]; k, v [s, H]; mask broadcasts to [s, G, t]."""
  scores = jnp.where(mask, _dot(k, q, (1,), (2,)), NEVER)
  top = jnp.maximum(scores.max(axis=0), 0.5 * NEVER)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=0)
  out = _dot(v, weights, (0,), (0,)) / jnp.maximum(total, 1e-37)
  return out.transpose(1, 2, 0), _log_sum_exp(top, total)


def _joined(parts: Sequence[Attended]) -> Attended:
  """The results of all tiles of a head, one behind another along the queries."""
  return jnp.concatenate([out for out, _ in parts], axis=1), jnp.concatenate([lse for _, lse in parts], axis=1)


def _log_sum_exp(top: Array, total: Array) -> Array:
  return jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), NEVER)


def _dot(a: Array, b: Array, over_a: Sequence[int], over_b: Sequence[int]) -> Array:
  """fp32 sum of products over these axes; the result has a's other axes, then b's."""
  return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def _queries(x: Array, G: int) -> Array:
  """[B, T, N, H] -> fp32 [B, K, G, T, H]"""
  B, T, N, H = x.shape
  return x.astype(jnp.float32).reshape(B, T, N // G, G, H).transpose(0, 2, 3, 1, 4)


def _keys(x: Array) -> Array:
  """[B, S, K, H] -> fp32 [B, K, S, H]"""
  return x.astype(jnp.float32).transpose(0, 2, 1, 3)


def _rows(x: Array) -> Array:
  """[B, K, G, T, H] -> [B, T, N, H]"""
  B, K, G, T, H = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _unfolded(x: Array, G: int) -> Array:
  """[B, K, G * T, H] (also with axes of length 1 before G * T) -> [B, T, N, H]"""
  return _rows(x.reshape(*x.shape[:2], G, -1, x.shape[-1]))
