"""Attention on TPUs for few queries in each row, as in decoding: each row's own keys are read, and no more of them.

`over` keeps the contract of `llama.attention` and is called through it only. The cache lies in HBM as it is, and a row
of it is read as S * K rows of H numbers, so that nothing is laid out anew. BLOCK = 2, lengths 3, 0, 1:

  keys of rows       [x x|x .|. .]  [. .|. .|. .]  [x .|. .|. .]        x live
  steps              (0, 0) (0, 1) (2, 0)          row and block: a step for each live block, as many as there are

The grid is as long as there are live blocks: the list of steps is prefetched, tells each step what to copy, and the
copy of the next block runs while one is computed. Scores stay in the fast memory (VMEM) of a core. The kernels that
come with JAX read pages that lie otherwise, heads first or keys beside values, and keep the log-sum-exp to themselves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from alma_jax.llama.attention_reference import NEVER, Attended, reference_over, with_gradient_of

LANES = 128


def over(q: Array, k: Array, v: Array, lengths: Array, interpret: bool = False) -> Attended:
  inputs = q, k, v, lengths
  q, k, v = (lax.stop_gradient(x) for x in (q, k, v))
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  size = block(S, K)
  rows, blocks, count = _steps(lengths, size, -(-S // size))
  of_row, of_keys = (None, T, K, N // K, H), (1, size * K, H)

  def row(i: Array, rows: Array, *_: Array) -> tuple[Array, int, int, int, int]:
    return rows[i], 0, 0, 0, 0

  def keys(i: Array, rows: Array, blocks: Array, *_: Array) -> tuple[Array, Array, int]:
    return rows[i], blocks[i], 0

  def statistics(i: Array, rows: Array, *_: Array) -> tuple[Array, int, int]:
    return rows[i], 0, 0

  out, lse = pl.pallas_call(
    functools.partial(_kernel, S=S),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(count,),
      in_specs=[pl.BlockSpec(of_row, row), pl.BlockSpec(of_keys, keys), pl.BlockSpec(of_keys, keys)],
      out_specs=[pl.BlockSpec(of_row, row), pl.BlockSpec((None, 1, N * T), statistics)],
      scratch_shapes=[pltpu.VMEM((N * T, n), jnp.float32) for n in (H, H, LANES, LANES)],
    ),
    out_shape=[jax.ShapeDtypeStruct((B, *of_row[1:]), v.dtype), jax.ShapeDtypeStruct((B, 1, N * T), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=interpret,
    name="attention_over_few",
  )(rows, blocks, lengths, q.reshape(B, *of_row[1:]), k.reshape(B, S * K, H), v.reshape(B, S * K, H))
  sees = (lengths > 0)[:, None, None]  # a row without keys has no step, and its results are what was there
  out = jnp.where(sees[..., None], out.reshape(B, T, N, H), 0)
  lse = jnp.where(sees, lse.reshape(B, K, T, N // K).transpose(0, 2, 1, 3).reshape(B, T, N), NEVER)
  return with_gradient_of(reference_over, (out, lse), *inputs)


def block(S: int, K: int) -> int:
  """Keys of a step: a quarter of a MiB with H = 128 in bfloat16, from 128 keys to 512."""
  return min(S, max(128, min(512, 1024 // K)))


def _steps(lengths: Array, size: int, most: int) -> tuple[Array, Array, Array]:
  """The row and the block of each step, [rows * most] each, and how many steps there are. Without any live block there
  is one step, on the last row."""
  live = (lengths + size - 1) // size
  ends = jnp.cumsum(live)
  step = jnp.arange(lengths.shape[0] * most)
  row = jnp.minimum((step[:, None] >= ends).sum(axis=1), lengths.shape[0] - 1).astype(jnp.int32)
  at = jnp.clip(step - (ends - live)[row], 0, most - 1).astype(jnp.int32)
  return row, at, jnp.maximum(ends[-1], 1).astype(jnp.int32)


def _kernel(
  rows: Array, blocks: Array, lengths: Array, q: Array, k: Array, v: Array, out: Array, lse: Array,
  queries: Array, sums: Array, top: Array, total: Array, *, S: int,
) -> None:  # fmt: skip
  """Takes in one block of keys. The state of a row are queries and sums of weighted values [K * T * G, H], and of each
  query the highest score so far and the sum of weights, in all lanes [K * T * G, 128]."""
  (T, K, G, H), size = q.shape, k.shape[1] // q.shape[1]
  i = pl.program_id(0)
  at, length = blocks[i], lengths[rows[i]]

  def places() -> list[tuple[int, int, slice]]:  # where the G queries of place t and key head h stand
    return [(t, h, slice((h * T + t) * G, (h * T + t + 1) * G)) for t in range(T) for h in range(K)]

  @pl.when(at == 0)
  def _() -> None:
    for t, h, mine in places():
      queries[mine] = q[t, h].astype(jnp.float32)
    sums[...] = jnp.zeros_like(sums)
    total[...] = jnp.zeros_like(total)
    top[...] = jnp.full_like(top, 0.5 * NEVER)

  left = length - at * size
  seen = lax.broadcasted_iota(jnp.int32, (T * G, size), 1) < left
  real = lax.broadcasted_iota(jnp.int32, (size, H), 0) < left if S % size else None
  for h, (keys, values) in enumerate(zip(_heads(k, K), _heads(v, K), strict=True)):
    mine = slice(h * T * G, (h + 1) * T * G)
    scores = lax.dot_general(
      queries[mine].astype(k.dtype), keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    scores = jnp.where(seen, scores * H**-0.5, NEVER)
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
    for t, h, mine in places():
      out[t, h] = sums[mine].astype(out.dtype)
    lse[...] = (top[...] + jnp.log(sum_)).T[:1]


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
