"""Attention on NVIDIA GPUs: cuDNN's fused kernels, forwards and backwards, with the fp32 log-sum-exp.

The functions keep the contract of `llama.attention` and are called through it only. jax.nn.dot_product_attention rounds
the log-sum-exp to the inputs' dtype and packs no rows, so this file alone uses the private function behind it; if that
has changed, or disagrees with the reference on this device, `llama.attention` says so and does without this file.

  causal   every run of one segment is a sequence of cuDNN's packed layout, padding too (needs compute capability 9.0).
           That layout takes a fixed number of runs per row; a batch with more of them in any row goes in stripes.
  over     the G heads that share keys become queries of one head, so that keys are read once for all of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from alma_jax.llama import attention


def causal(q, k, v, segments):
  runs = _most_runs(segments.shape[1])
  fits = (_begins(segments).sum(axis=1) <= runs).all()
  return jax.lax.cond(fits, functools.partial(_packed, runs), attention.striped_causal, q, k, v, segments)


def over(q, k, v, lengths):
  (B, T, N, H), K = q.shape, k.shape[2]
  G = N // K
  folded = q.reshape(B, T, K, G, H).transpose(0, 1, 3, 2, 4).reshape(B, T * G, K, H)
  some = jnp.maximum(lengths, 1).astype(jnp.int32)  # what it makes of a row without keys is nowhere written
  out, lse = cudnn.dot_product_attention(
    folded,
    k,
    v,
    q_seqlen=jnp.full(B, T * G, jnp.int32),
    kv_seqlen=some,
    scale=H**-0.5,
    mask_type=cudnn.MaskType.PADDING,
    return_residual=True,
  )
  out = out.reshape(B, T, G, K, H).transpose(0, 1, 3, 2, 4).reshape(q.shape)
  lse = lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, N)
  sees = (lengths > 0)[:, None, None]
  out, lse = jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, attention.NEVER)
  return out, attention.with_gradient_of(_lse_of(attention.reference_over), lse, q, k, v, lengths)


def _most_runs(T):
  """How many runs of one segment a row may have: each costs statistics [N, T]."""
  return max(2, min(T // 32, 64))


def _begins(segments):
  """[B, T]: where a run of one segment starts."""
  return (segments != jnp.roll(segments, 1, axis=1)).at[:, 0].set(True)


def _packed(runs, q, k, v, segments):
  (T, N, H), place = q.shape[1:], jnp.arange(q.shape[1])
  begins = _begins(segments)
  run = begins.cumsum(axis=1) - 1  # [B, T]: which run of its row a place is in
  count = run[:, -1:] + 1
  starts = jax.vmap(lambda b: jnp.nonzero(b, size=runs + 1, fill_value=T)[0])(begins)  # [B, runs + 1]; T ends the last
  lengths = jnp.where(jnp.arange(runs) < count, jnp.diff(starts), -1).astype(jnp.int32)
  offsets = jnp.where(jnp.arange(runs + 1) < count, starts, -1).astype(jnp.int32)
  # With fewer key/value heads than heads, some versions place the packed keys wrongly (jax#39521): repeated, none does.
  repeated = lambda x: jnp.repeat(x, N // x.shape[2], axis=2)
  out, stats = cudnn.dot_product_attention(
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
  # Statistics are per run, [B * runs, N, T], runs of all rows one after the other without gaps.
  before = jnp.cumsum(count) - count[:, 0]
  at = place - jnp.take_along_axis(starts, run, axis=1)
  lse = stats[before[:, None] + run, :, at]
  return out, attention.with_gradient_of(_lse_of(attention.striped_causal), lse, q, k, v, segments)


@functools.cache
def _lse_of(function):
  """cuDNN passes no gradient through its log-sum-exp; this has one, for the rare use."""
  return lambda *inputs: function(*inputs)[1]
