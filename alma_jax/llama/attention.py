"""Attention behind one contract, with back ends per platform: `causal` and `over` give `(out, log_sum_exp)`.

  causal(q, k, v, segments)   every place looks at the earlier ones of its own segment and at itself; T = S
  over(q, k, v, lengths)      every query of row b looks at the first lengths[b] keys; lengths[b] may be 0
  merged(a, b)                attention over the union of what two calls looked at

q is [B, T, N, H]; k and v are [B, S, K, H] (grouped queries: G = N / K heads share a key/value head). Scores, softmax
and the log-sum-exp [B, T, N] are fp32 whatever the inputs are, so that two parts can be merged exactly. The functions
of this file are the plain reference that every back end is tested against.
"""

import jax
import jax.numpy as jnp

NEVER = -1e30  # a score, or a log-sum-exp, of nothing: finite, so that no NaN arises


def causal(q, k, v, segments):
  """Attention within packed rows. Segments [B, T] number the packed examples; padding is a segment of its own."""
  T = segments.shape[1]
  return _reference(q, k, v, (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool)))


def over(q, k, v, lengths):
  """Attention over the first keys of each row; where a row has none, out is 0 and the log-sum-exp `NEVER`."""
  return _reference(q, k, v, (jnp.arange(k.shape[1]) < lengths[:, None])[:, None])


def merged(a, b):
  """(out, log_sum_exp) over the keys of both parts, which share no key."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  lse = jnp.logaddexp(lse_a, lse_b)
  weigh = lambda out, part: out.astype(jnp.float32) * jnp.exp(part - lse)[..., None]
  return (weigh(out_a, lse_a) + weigh(out_b, lse_b)).astype(out_a.dtype), lse


def _reference(q, k, v, mask):
  """mask: boolean [B, 1 or T, S], true where a query may look."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  # One batched matrix product over B x K with the G query heads folded into the rows: on CPUs several times faster than
  # the five-dimensional einsum, elsewhere the same.
  q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  scores = jnp.einsum("bkth,bskh->bkts", q, k, preferred_element_type=jnp.float32) * H**-0.5
  seen = jnp.broadcast_to(mask[:, None, None], (B, 1, G, T, S)).reshape(B, 1, G * T, S)
  scores = jnp.where(seen, scores, NEVER)
  top = jnp.maximum(scores.max(axis=-1, keepdims=True), 0.5 * NEVER)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), NEVER)
  weights = (weights / jnp.maximum(total, 1e-37)).astype(v.dtype)
  out = jnp.einsum("bkts,bskh->bkth", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

  def unfold(x):
    return x.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

  return unfold(out), unfold(lse)[..., 0]
