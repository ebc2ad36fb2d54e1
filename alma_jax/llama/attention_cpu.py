"""Attention on CPUs: score tiles that stay in the cache, walked over batch rows and key/value heads.

The functions keep the contract of `llama.attention` and are called through it only. Tiles are [keys, G, queries]: the
softmax runs along the leading axis, which XLA vectorises, as it does not along the last one. The mask of a batch row
is made once for all its heads. Everything inside is fp32, because CPUs have no faster arithmetic.

  causal   one stripe of queries after the other, each against the keys up to its end: the upper triangle is left out
           but for half a tile. The backward pass computes the scores again and keeps nothing of [T, T].
  over     many queries: the same tiles. One query per row (decoding): reads only the blocks of keys that a row has.
           With `rows`, the tiles of a sampler's slots: one row after the other, empty ones skipped.
"""

import jax
import jax.numpy as jnp

from alma_jax.llama import attention

STRIPE = 128  # queries of each head per tile
COLUMNS = 512  # the same, times G, where all queries look at the same keys
BLOCK = 32  # keys a decoding step reads at a time


@jax.custom_vjp
def causal(q, k, v, segments):
  return _causal_forward(q, k, v, segments)[0]


def _causal_forward(q, k, v, segments):
  G = q.shape[2] // k.shape[2]

  def head(seen, q, k, v):
    parts = []
    for (start, end), mask in zip(_stripes(q.shape[1]), seen):
      parts.append(_tile(q[:, start:end], k[:end], v[:end], mask[:, None]))
    return jnp.concatenate([out for out, _ in parts], axis=1), jnp.concatenate([lse for _, lse in parts], axis=1)

  heads = _queries(q, G) * q.shape[3] ** -0.5, _keys(k), _keys(v)
  out, lse = _walk(head, _masks, segments, heads)
  out, lse = _rows(out).astype(v.dtype), _rows(lse[..., None])[..., 0]
  return (out, lse), (q, k, v, segments, out, lse)


def _causal_backward(residuals, cotangents):
  q, k, v, segments, out, lse = residuals
  d_out, d_lse = cotangents
  G, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5

  def head(seen, q, k, v, lse, d_out, delta):
    d_q, d_k, d_v = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for (start, end), mask in zip(_stripes(q.shape[1]), seen):
      at, keys = slice(start, end), slice(0, end)
      scores = _dot(k[keys], q[:, at], (1,), (2,))
      weights = jnp.where(mask[:, None], jnp.exp(scores - lse[:, at]), 0.0)
      d_scores = weights * (_dot(v[keys], d_out[:, at], (1,), (2,)) - delta[:, at])
      d_v = d_v.at[keys].add(_dot(weights, d_out[:, at], (1, 2), (0, 1)))
      d_k = d_k.at[keys].add(_dot(d_scores, q[:, at], (1, 2), (0, 1)))
      d_q.append(_dot(k[keys], d_scores, (0,), (0,)).transpose(1, 2, 0))
    return jnp.concatenate(d_q, axis=1), d_k, d_v

  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
  per_row = lambda x: _queries(x[..., None], G)[..., 0]
  heads = _queries(q, G) * scale, _keys(k), _keys(v), per_row(lse), _queries(d_out, G), per_row(delta)
  d_q, d_k, d_v = _walk(head, _masks, segments, heads)
  turned = lambda x, like: x.transpose(0, 2, 1, 3).astype(like.dtype)
  return (_rows(d_q) * scale).astype(q.dtype), turned(d_k, k), turned(d_v, v), None


causal.defvjp(_causal_forward, _causal_backward)


def over(q, k, v, lengths):
  return (_decoding if q.shape[1] == 1 else _many)(q, k, v, lengths)


def over_rows(q, k, v, lengths, rows):
  """Row after row, so that no keys are gathered and rows without keys cost nothing. Not to be differentiated."""
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  G = N // K

  def row(x):
    q, length, at = x

    def looking():
      keys, values = (jax.lax.dynamic_index_in_dim(x, at, keepdims=False).astype(jnp.float32) for x in (k, v))
      scores = jnp.where(jnp.arange(S) < length, jnp.einsum("kth,skh->kts", q, keys), attention.NEVER)
      top = scores.max(axis=-1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = weights.sum(axis=-1, keepdims=True)
      return jnp.einsum("kts,skh->kth", weights, values) / total, (top + jnp.log(total))[..., 0]

    nothing = jnp.zeros((K, G * T, H)), jnp.full((K, G * T), attention.NEVER)
    return jax.lax.cond(length > 0, looking, lambda: nothing)

  out, lse = jax.lax.map(row, ((_queries(q, G) * H**-0.5).reshape(B, K, G * T, H), lengths, rows))
  unfolded = lambda x: _rows(x.reshape(B, K, G, T, -1))
  return unfolded(out).astype(v.dtype), unfolded(lse[..., None])[..., 0]


def _many(q, k, v, lengths):
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]

  def head(seen, q, k, v):
    cuts = range(0, q.shape[1], COLUMNS)
    parts = [_tile(q[:, start : start + COLUMNS], k, v, seen[:, None, None]) for start in cuts]
    return jnp.concatenate([out for out, _ in parts], axis=1), jnp.concatenate([lse for _, lse in parts], axis=1)

  queries = _queries(q, N // K).reshape(B, K, 1, -1, H) * H**-0.5
  out, lse = _walk(head, lambda length: jnp.arange(S) < length, lengths, (queries, _keys(k), _keys(v)))
  unfolded = lambda x: _rows(x.reshape(B, K, N // K, T, -1))
  return unfolded(out).astype(v.dtype), unfolded(lse)[..., 0]


def _decoding(q, k, v, lengths):
  """One query per row: row by row, a block of keys at a time, no further than the row's length."""
  (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
  inputs = q, k, v, lengths
  q, k, v = (jax.lax.stop_gradient(x) for x in (q, k, v))
  queries = (q[:, 0] * H**-0.5).astype(jnp.float32).reshape(B, K, N // K, H)
  block = min(BLOCK, S)

  def row(b, q, length):
    def step(i, state):
      top, total, out = state
      start = jnp.minimum(i * block, S - block)  # the last block may begin before its turn: what it repeats is masked
      place = start + jnp.arange(block)
      cut = lambda x: jax.lax.dynamic_slice(x, (b, start, 0, 0), (1, block, K, H))[0].astype(jnp.float32)
      scores = jnp.einsum("kgh,skh->kgs", q, cut(k))
      scores = jnp.where((place >= i * block) & (place < length), scores, attention.NEVER)
      higher = jnp.maximum(top, scores.max(axis=-1))
      weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
      new = jnp.einsum("kgs,skh->kgh", weights, cut(v))
      return higher, total * fade + weights.sum(axis=-1), out * fade[..., None] + new

    shape = (K, N // K)
    nothing = jnp.full(shape, 0.5 * attention.NEVER), jnp.zeros(shape), jnp.zeros((*shape, H))
    top, total, out = jax.lax.fori_loop(0, (length + block - 1) // block, step, nothing)
    return out / jnp.maximum(total, 1e-37)[..., None], _log_sum_exp(top, total)

  out, lse = jax.lax.map(lambda x: row(*x), (jnp.arange(B), queries, lengths))
  out, lse = out.reshape(B, 1, N, H).astype(v.dtype), lse.reshape(B, 1, N)
  return attention.with_gradient_of(attention.reference_over, (out, lse), *inputs)


def _stripes(T):
  """(start, end) of about equal stripes of at most STRIPE queries; longer ones where there would be too many."""
  count = min(-(-T // STRIPE), 16)  # every stripe is compiled
  size = -(-T // count)
  return [(start, min(start + size, T)) for start in range(0, T, size)]


def _masks(segments):
  """Per stripe [keys, queries]."""
  place, masks = jnp.arange(segments.shape[0]), []
  for start, end in _stripes(segments.shape[0]):
    same = segments[:end, None] == segments[start:end]
    masks.append(same & (place[:end, None] <= place[start:end]))
  return masks


def _walk(head, masks, seen, arrays):
  """`head(masks(seen of the row), *its arrays)` for every batch row and key/value head; arrays lead with [B, K]."""

  def row(x):
    seen, arrays = x
    mask = masks(seen)
    return jax.lax.map(lambda x: head(mask, *x), arrays)

  return jax.lax.map(row, (seen, arrays))


def _tile(q, k, v, mask):
  """(out [G, t, H], log-sum-exp [G, t]) of scaled q [G, t, H]; k, v [s, H]; mask broadcasts to [s, G, t]."""
  scores = jnp.where(mask, _dot(k, q, (1,), (2,)), attention.NEVER)
  top = jnp.maximum(scores.max(axis=0), 0.5 * attention.NEVER)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=0)
  out = _dot(v, weights, (0,), (0,)) / jnp.maximum(total, 1e-37)
  return out.transpose(1, 2, 0), _log_sum_exp(top, total)


def _log_sum_exp(top, total):
  return jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), attention.NEVER)


def _dot(a, b, over_a, over_b):
  return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def _queries(x, G):
  """[B, T, N, H] -> fp32 [B, K, G, T, H]"""
  B, T, N, H = x.shape
  return x.astype(jnp.float32).reshape(B, T, N // G, G, H).transpose(0, 2, 3, 1, 4)


def _keys(x):
  """[B, S, K, H] -> fp32 [B, K, S, H]"""
  return x.astype(jnp.float32).transpose(0, 2, 1, 3)


def _rows(x):
  """[B, K, G, T, H] -> [B, T, N, H]"""
  B, K, G, T, H = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
