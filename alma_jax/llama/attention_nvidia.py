"""Attention on NVIDIA GPUs: cuDNN's fused kernels, forwards and backwards, with the fp32 log-sum-exp.

The functions keep the contract of `llama.attention` and are called through it only. jax.nn.dot_product_attention rounds
the log-sum-exp to the inputs' dtype and packs no rows, so this file alone uses the private function behind it; if that
has changed, or disagrees with the reference on this device, `llama.attention` warns and uses plain XLA instead.

  causal   each run of one segment is a sequence of cuDNN's packed layout, padding too (needs compute capability 9.0).
           That layout takes a fixed number of runs per row; a batch with more of them in any row goes in stripes. The
           caller says which it is; for a caller that does not know, the device decides in every layer, which makes it
           wait for the host and compiles both ways. The backward pass sums dq in fp32 over a whole row's length for
           every run that a row may have: 17 GB for 8 rows of 2,048 with 32 heads of 128, which only a compilation on a
           real device counts. So large batches go in pieces of rows, then of heads, of at most `WORKSPACE`.
  over     the G heads that share keys become queries of one head, so that keys are read once for all of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from alma_jax.llama.attention_reference import (
  NEVER,
  Attend,
  Attended,
  few_runs,
  packed_piece,
  reference_over,
  striped_causal,
  with_gradient_of,
)


def causal(q: Array, k: Array, v: Array, segments: Array, few: bool | int | None = None) -> Attended:
  runs = few_runs(segments.shape[1])
  if few is False:
    return striped_causal(q, k, v, segments)
  if few is not None:
    return _packed(runs if few is True else few, q, k, v, segments)
  fits = (_begins(segments).sum(axis=1) <= runs).all()
  return jax.lax.cond(fits, functools.partial(_packed, runs), striped_causal, q, k, v, segments)


def over(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  (B, T, N, H), K = q.shape, k.shape[2]
  G = N // K
  folded = q.reshape(B, T, K, G, H).transpose(0, 1, 3, 2, 4).reshape(B, T * G, K, H)
  attend: Callable[..., Any] = cudnn.dot_product_attention  # its annotation allows for a third result
  out, lse = attend(
    folded,
    k,
    v,
    q_seqlen=jnp.full(B, T * G, jnp.int32),
    kv_seqlen=jnp.maximum(lengths, 1).astype(jnp.int32),  # cuDNN does not say what it gives for a row without keys
    scale=H**-0.5,
    mask_type=cudnn.MaskType.PADDING,
    return_residual=True,
  )
  out = out.reshape(B, T, G, K, H).transpose(0, 1, 3, 2, 4).reshape(q.shape)
  lse = lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, N)
  sees = (lengths > 0)[:, None, None]
  out, lse = jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, NEVER)
  return out, with_gradient_of(_lse_of(reference_over), lse, q, k, v, lengths)


def _begins(segments: Array) -> Array:
  """[B, T]: where a run of one segment starts."""
  return (segments != jnp.roll(segments, 1, axis=1)).at[:, 0].set(True)


def _packed(runs: int, q: Array, k: Array, v: Array, segments: Array) -> Attended:
  """Causal attention, a sequence per run, in pieces as large as the backward pass can afford."""
  (B, T, N, H), K = q.shape, k.shape[2]
  rows, heads = packed_piece(runs, q.shape, K)
  if (rows, heads) == (B, K):
    out, lse = _packed_piece(runs, q, k, v, segments)
  else:

    def split(x: Array) -> Array:  # [B, T, n, H] -> [pieces, rows, T, n of a piece, H]
      x = x.reshape(B // rows, rows, T, K // heads, -1, H)
      return jnp.moveaxis(x, 3, 1).reshape(-1, rows, T, *x.shape[4:])

    def joined(x: Array) -> Array:  # [pieces, rows, T, n of a piece, ...] -> [B, T, N, ...]
      x = x.reshape(B // rows, K // heads, *x.shape[1:])
      return jnp.moveaxis(x, 1, 3).reshape(B, T, N, *x.shape[5:])

    def piece(x: tuple[Array, Array, Array, Array]) -> Attended:
      return _packed_piece(runs, *x)

    each = jnp.repeat(segments.reshape(-1, rows, T), K // heads, axis=0)
    out, lse = map(joined, jax.lax.map(piece, (split(q), split(k), split(v), each)))
  return out, with_gradient_of(_lse_of(striped_causal), lse, q, k, v, segments)


def _packed_piece(runs: int, q: Array, k: Array, v: Array, segments: Array) -> Attended:
  """One call of cuDNN; its log-sum-exp has no gradient. One row of T = 8 with runs = 4:

  segments   1 1 1 2 2 0 0 0        starts    0 3 5 8 8     T fills up
  begins     x . . x . x . .        lengths   3 2 3 -1      -1: no such run
  run        0 0 0 1 1 2 2 2        offsets   0 3 5 -1 -1
  """
  (T, N, H), place = q.shape[1:], jnp.arange(q.shape[1])
  begins = _begins(segments)
  run = begins.cumsum(axis=1) - 1  # [B, T]: the run of each place, counted within its row
  count = run[:, -1:] + 1
  starts = jax.vmap(lambda b: jnp.nonzero(b, size=runs + 1, fill_value=T)[0])(begins)  # [B, runs + 1]
  lengths = jnp.where(jnp.arange(runs) < count, jnp.diff(starts), -1).astype(jnp.int32)
  offsets = jnp.where(jnp.arange(runs + 1) < count, starts, -1).astype(jnp.int32)

  def repeated(x: Array) -> Array:
    """A key/value head for each head: with fewer, some versions place the packed keys wrongly (jax#39521)."""
    return jnp.repeat(x, N // x.shape[2], axis=2)

  attend: Callable[..., Any] = cudnn.dot_product_attention
  out, stats = attend(
    q,
    repeated(k),
    repeated(v),
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=H**-0.5,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
    return_residual=True,
  )
  # Statistics are per run, [B * runs, N, T], with the runs of all rows numbered without gaps: those of row b follow the
  # `before[b]` runs of earlier rows, and a place stands at its distance from the start of its run.
  before = jnp.cumsum(count) - count[:, 0]
  at = place - jnp.take_along_axis(starts, run, axis=1)
  return out, jax.lax.stop_gradient(stats[before[:, None] + run, :, at])


@functools.cache
def _lse_of(function: Attend) -> Callable[..., Array]:
  """`function`'s log-sum-exp. cuDNN passes no gradient through its own; this has one, for the rare use."""
  return lambda *inputs: function(*inputs)[1]
