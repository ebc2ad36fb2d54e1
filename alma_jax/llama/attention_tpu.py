"""Attention on TPUs: the splash kernels that come with JAX. For few queries in each row, as in decoding, see
`llama.attention_decode_tpu`.

The functions keep the contract of `llama.attention` and are called through it only. A kernel either gives the
log-sum-exp or has a gradient; where a gradient is taken both kinds run, and XLA drops results that nothing uses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from alma_jax.llama.attention_reference import NEVER, Attend, Attended, reference_over, striped_causal, with_gradient_of

BLOCK = 512  # queries and keys per tile, where there are as many


def causal(q: Array, k: Array, v: Array, segments: Array, interpret: bool = False) -> Attended:
  T = q.shape[1]
  mask = splash.CausalMask((_padded(T), _padded(T)))
  return _attend(striped_causal, mask, (q, k, v, segments), segments, segments, interpret)


def over(q: Array, k: Array, v: Array, lengths: Array, interpret: bool = False) -> Attended:
  (B, T), S = q.shape[:2], k.shape[1]
  mask = splash.FullMask((_padded(T), _padded(S)))
  seen = jnp.arange(S) < jnp.maximum(lengths, 1)[:, None]  # the kernel divides by zero where a row has no keys
  queries = jnp.ones((B, T), jnp.int32)
  out, lse = _attend(reference_over, mask, (q, k, v, lengths), queries, seen.astype(jnp.int32), interpret)
  sees = (lengths > 0)[:, None, None]
  return jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, NEVER)


def _attend(
  reference: Attend, mask: Any, inputs: tuple[Array, ...], q_segments: Array, k_segments: Array, interpret: bool
) -> Attended:
  """Attention where `mask` allows it and a query's segment [B, T] is the key's [B, S]."""
  q, k, v = inputs[:3]
  (T, N, H), S = q.shape[1:], k.shape[1]

  def padded(x: Array, fill: int = 0) -> Array:  # [B, T, ...] -> [B, whole tiles, ...]
    return jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=fill)

  segments = splash.SegmentIds(padded(q_segments, -1), padded(k_segments, -1))  # nothing real looks at segment -1
  heads = tuple(padded(x).transpose(0, 2, 1, 3) for x in ((q * H**-0.5).astype(q.dtype), k, v))

  def kernel(statistics: bool) -> Callable[..., Any]:
    t, s = min(BLOCK, _padded(T)), min(BLOCK, _padded(S))
    sizes = splash.BlockSizes(t, s, s, t, s, s, t, s)
    masks = splash.MultiHeadMask([mask] * N)
    make = splash.make_splash_mha_single_device
    return jax.vmap(make(masks, block_sizes=sizes, save_residuals=statistics, interpret=interpret))

  def both(*heads: Array) -> Attended:
    out, (lse,) = kernel(statistics=True)(*heads, segments)
    return out, lse

  def forward(*heads: Array) -> tuple[Attended, Callable[..., Any]]:
    """The statistics of one kernel, and the out and gradient of the other."""
    out, backward = jax.vjp(lambda *heads: kernel(statistics=False)(*heads, segments), *heads)
    return (out, both(*heads)[1]), backward

  attend = jax.custom_vjp(both)
  attend.defvjp(forward, lambda backward, cotangents: backward(cotangents[0]))
  out, lse = (x.swapaxes(1, 2)[:, :T] for x in attend(*heads))
  return out.astype(v.dtype), with_gradient_of(lambda *inputs: reference(*inputs)[1], lse, *inputs)


def _padded(length: int) -> int:
  """`length` in whole tiles: blocks must divide the kernels' lengths, and are multiples of 128."""
  return -(-length // 128) * 128 if length <= BLOCK else -(-length // BLOCK) * BLOCK
