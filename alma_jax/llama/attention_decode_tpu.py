"""Attention on TPUs for few queries in each row, as in decoding: each row's own keys are read, and no more of them.

`over` keeps the contract of `llama.attention` and is called through it only. The cache lies in HBM as it is, and a row
of it is read as S * K rows of H numbers, so that nothing is laid out anew. BLOCK = 2, lengths 3, 0, 1:

  keys of rows       [x x|x .|. .]  [. .|. .|. .]  [x .|. .|. .]        x live
  steps              row 0, block 0; row 0, block 1; row 1; row 2, block 0

The grid is as long as there are steps: one for each live block, and one for a row without keys. The list of them is
prefetched and tells each step what to copy; the copy of the next block runs while one is computed. A row without keys
names the block before it, which is there, so that nothing is copied for it. Scores stay in the fast memory (VMEM) of a
core. The kernels that come with JAX read pages that lie otherwise, heads first or keys beside values, and keep the
log-sum-exp to themselves.

Heads narrower than a row of tiles lie side by side in the cache, and count as one head here. Their queries have zeros
where the other heads of the row are, and of what they find their own part is taken; n = 2:

  row of keys     [ head 0 | head 1 ]     queries of head 0  [ q | 0 ]     of head 1  [ 0 | q ]
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from alma_jax.llama.attention_reference import NEVER, Attended, apart, reference_over, with_gradient_of

LANES = 128


def over(q: Array, k: Array, v: Array, lengths: Array, interpret: bool = False) -> Attended:
  narrow = q.shape[3]
  inputs = q, apart(k, narrow), apart(v, narrow), lengths
  q, k, v = (lax.stop_gradient(x) for x in (q, k, v))
  q = _in_own_part(q, k.shape[3] // narrow, inputs[1].shape[2])
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  size = block(S, K)
  steps, count = _steps(lengths, size, -(-S // size))
  of_row, of_keys = (None, T, N, H), (1, size * K, H)

  def row(i: Array, steps: Array, _: Array) -> tuple[Array, int, int, int]:
    return steps[0, i], 0, 0, 0

  def keys(i: Array, steps: Array, _: Array) -> tuple[Array, Array, int]:
    return steps[1, i], steps[2, i], 0

  def statistics(i: Array, steps: Array, _: Array) -> tuple[Array, int, int]:
    return steps[0, i], 0, 0

  out, lse = pl.pallas_call(
    functools.partial(_kernel, S=S, K=K, scale=narrow**-0.5),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(count,),
      in_specs=[pl.BlockSpec(of_row, row), pl.BlockSpec(of_keys, keys), pl.BlockSpec(of_keys, keys)],
      out_specs=[pl.BlockSpec(of_row, row), pl.BlockSpec((None, 1, N * T), statistics)],
      scratch_shapes=[pltpu.VMEM((N * T, n), jnp.float32) for n in (H, H, LANES, LANES)],
    ),
    out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, 1, N * T), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=interpret,
    name=f"attention_over_few_{K}",
  )(steps, lengths, q, k.reshape(B, S * K, H), v.reshape(B, S * K, H))
  lse = lse.reshape(B, K, T, N // K).transpose(0, 2, 1, 3).reshape(B, T, N)
  out = _own_part(out, H // narrow, inputs[1].shape[2])
  return with_gradient_of(reference_over, (out, lse), *inputs)


def _in_own_part(q: Array, n: int, K: int) -> Array:
  """[B, T, N, n H]: queries [B, T, N, H] of K heads of keys, n of them side by side, and zeros beside them."""
  if n == 1:
    return q
  B, T, N, H = q.shape
  parts = q.reshape(B, T, K // n, n, N // K, 1, H) * jnp.eye(n, dtype=q.dtype)[:, None, :, None]
  return parts.reshape(B, T, N, n * H)


def _own_part(out: Array, n: int, K: int) -> Array:
  """[B, T, N, H] of [B, T, N, n H], likewise."""
  if n == 1:
    return out
  B, T, N, wide = out.shape
  parts = out.reshape(B, T, K // n, n, N // K, n, wide // n)
  return jnp.stack([parts[:, :, :, i, :, i] for i in range(n)], axis=3).reshape(B, T, N, wide // n)


def block(S: int, K: int) -> int:
  """Keys of a step: a quarter of a MiB with H = 128 in bfloat16, from 128 keys to 512."""
  return min(S, max(128, min(512, 1024 // K)))


def _steps(lengths: Array, size: int, most: int) -> tuple[Array, Array]:
  """[3, B * most]: the row of each step, and row and number of the block that it copies; and how many steps there are.
  In the picture above:

    row             0 0 1 2
    block's row     0 0 0 2
    block           0 1 1 0
  """
  B, live = lengths.shape[0], (lengths + size - 1) // size
  ends = jnp.cumsum(jnp.maximum(live, 1))
  step = jnp.arange(B * most)
  row = jnp.minimum((step[:, None] >= ends).sum(axis=1), B - 1)
  of = jnp.maximum(lax.cummax(jnp.where(live > 0, jnp.arange(B), -1)), 0)  # the last row with keys, up to each row
  first = (ends - jnp.maximum(live, 1))[row]
  at = jnp.clip(jnp.where(live[row] > 0, step - first, live[of][row] - 1), 0, most - 1)
  return jnp.stack([row, of[row], at]).astype(jnp.int32), ends[-1].astype(jnp.int32)


def _kernel(
  steps: Array, lengths: Array, q: Array, k: Array, v: Array, out: Array, lse: Array,
  queries: Array, sums: Array, top: Array, total: Array, *, S: int, K: int, scale: float,
) -> None:  # fmt: skip
  """Takes in one block of keys. The state of a row are queries and sums of weighted values [K * T * G, H], and of each
  query the highest score so far and the sum of weights, in all lanes [K * T * G, 128]."""
  (T, N, H), size, G = q.shape, k.shape[1] // K, q.shape[1] // K
  i = pl.program_id(0)
  length = lengths[steps[0, i]]
  at = jnp.where(length > 0, steps[2, i], 0)

  def places() -> Iterator[tuple[slice, slice]]:  # of G queries, in the order of q and in that of the state
    for t, h in itertools.product(range(T), range(K)):
      yield slice((t * K + h) * G, (t * K + h + 1) * G), slice((h * T + t) * G, (h * T + t + 1) * G)

  @pl.when(at == 0)
  def _() -> None:
    for t in range(T):
      sums[t * N : (t + 1) * N] = q[t].astype(jnp.float32)
    for theirs, mine in places():
      queries[mine] = sums[theirs]
    sums[...] = jnp.zeros_like(sums)
    total[...] = jnp.zeros_like(total)
    top[...] = jnp.full_like(top, 0.5 * NEVER)

  left = length - at * size  # keys from here on

  @pl.when(left > 0)
  def _() -> None:
    seen = lax.broadcasted_iota(jnp.int32, (T * G, size), 1) < left
    real = lax.broadcasted_iota(jnp.int32, (size, H), 0) < left if S % size else None
    for h, (keys, values) in enumerate(zip(_heads(k, K), _heads(v, K), strict=True)):
      mine = slice(h * T * G, (h + 1) * T * G)
      scores = lax.dot_general(
        queries[mine].astype(k.dtype), keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )
      scores = jnp.where(seen, scores * scale, NEVER)
      before = top[mine]
      higher = jnp.maximum(before, scores.max(axis=1, keepdims=True))
      # The old sums were relative to exp(before); `fade` makes them relative to exp(higher).
      weights, fade = jnp.exp(scores - higher[:, :1]), jnp.exp(before - higher)
      # What lies past the last key of an array is no number.
      values = values if real is None else jnp.where(real, values, jnp.zeros_like(values))
      new = jnp.dot(weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
      top[mine], total[mine] = higher, total[mine] * fade + weights.sum(axis=1, keepdims=True)
      sums[mine] = sums[mine] * fade[:, :1] + new

  @pl.when(left <= size)
  def _() -> None:
    sum_ = jnp.maximum(total[...], 1e-37)
    sums[...] = sums[...] / sum_[:, :1]
    for theirs, mine in places():
      queries[theirs] = sums[mine]
    for t in range(T):
      out[t] = queries[t * N : (t + 1) * N].astype(out.dtype)
    lse[...] = jnp.where(length > 0, (top[...] + jnp.log(sum_)).T[:1], NEVER)


def _heads(x: Any, K: int) -> list[Array]:
  """The keys or values [size, H] of each head. In a block [1, size * K, H] the heads of a key follow each other.

  Numbers of 16 bits lie in pairs: two rows, and so two heads, share a row of words.
  """
  if K == 1:
    return [x[0]]
  if x.dtype.itemsize == 4:
    return [x[:, h::K][0] for h in range(K)]
  words, found = x.bitcast(jnp.uint32), []
  for h in range(0, K, 2):
    pair = words[:, h // 2 :: K // 2][0]
    for half in (pair << 16, pair & jnp.uint32(0xFFFF0000)):
      found.append(pltpu.bitcast(half, jnp.float32).astype(x.dtype))
  return found
