"""Attention on TPUs: the splash kernels that come with JAX. Decoding, a query per row, stays with plain XLA.

The functions keep the contract of `llama.attention` and are called through it only. A kernel either gives the
log-sum-exp or has a gradient; where a gradient is taken there are both, and XLA drops what nobody uses of them.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from alma_jax.llama import attention

BLOCK = 512  # queries and keys per tile, where there are as many


def causal(q, k, v, segments, interpret=False):
  T = q.shape[1]
  mask = splash.CausalMask((_padded(T), _padded(T)))
  return _attend(attention.striped_causal, mask, (q, k, v, segments), segments, segments, interpret)


def over(q, k, v, lengths, interpret=False):
  (B, T), S = q.shape[:2], k.shape[1]
  mask = splash.FullMask((_padded(T), _padded(S)))
  seen = jnp.arange(S) < jnp.maximum(lengths, 1)[:, None]  # the kernel divides by zero where there is nothing to see
  queries = jnp.ones((B, T), jnp.int32)
  out, lse = _attend(attention.reference_over, mask, (q, k, v, lengths), queries, seen.astype(jnp.int32), interpret)
  sees = (lengths > 0)[:, None, None]
  return jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, attention.NEVER)


def _attend(reference, mask, inputs, q_segments, k_segments, interpret):
  q, k, v = inputs[:3]
  (T, N, H), S = q.shape[1:], k.shape[1]
  by_head = lambda x: jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
  # Padding is a segment of its own, which nothing real looks at.
  numbers = lambda x: jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1])), constant_values=-1)
  segments = splash.SegmentIds(numbers(q_segments), numbers(k_segments))
  heads = by_head((q * H**-0.5).astype(q.dtype)), by_head(k), by_head(v)

  def kernel(statistics):
    t, s = min(BLOCK, _padded(T)), min(BLOCK, _padded(S))
    sizes = splash.BlockSizes(t, s, s, t, s, s, t, s)
    masks = splash.MultiHeadMask([mask] * N)
    make = splash.make_splash_mha_single_device
    return jax.vmap(make(masks, block_sizes=sizes, save_residuals=statistics, interpret=interpret))

  def both(*heads):
    out, (lse,) = kernel(statistics=True)(*heads, segments)
    return out, lse

  def forward(*heads):
    out, backward = jax.vjp(lambda *heads: kernel(statistics=False)(*heads, segments), *heads)
    return (out, both(*heads)[1]), backward

  attend = jax.custom_vjp(both)
  attend.defvjp(forward, lambda backward, cotangents: backward(cotangents[0]))
  out, lse = (x.swapaxes(1, 2)[:, :T] for x in attend(*heads))
  return out.astype(v.dtype), attention.with_gradient_of(lambda *inputs: reference(*inputs)[1], lse, *inputs)


def _padded(length):
  """To whole tiles: the kernels take lengths that divide into blocks, and those are multiples of 128."""
  return -(-length // 128) * 128 if length <= BLOCK else -(-length // BLOCK) * BLOCK
