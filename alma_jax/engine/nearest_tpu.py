"""The nearest centroid on TPUs: a product of tiles whose scores stay in the fast memory of a core (VMEM).

A block of points stays while all centroids pass, a block after the other, and keeps the best score so far:

  grid (points, centroids)      x block i [B, d]     c block j [BLOCK, d]     scores [BLOCK, B] -> least, where [1, B]
  HBM traffic of a score        2 d / B bytes of centroids; scores none

A score costs 2 d operations, so that the product is limited by the matrix unit where B is more than its operations per
byte of HBM: 240 on a v5e, 166 on a v5p, 560 on a v6e. `engine.nearest` has the contract.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 256  # centroids
MOST = 2048  # points of a block, if they are at most BYTES
BYTES = 4 * 2**20


def nearest(x: Array, c: Array, half: Array, rows: Array, tile: int, interpret: bool = False) -> tuple[Array, Array]:
  del tile  # a grid goes over all points
  (length, d), blocks = x.shape, c.shape[0] // BLOCK
  size = _points(length, d)

  def kernel(rows: Array, x: Array, c: Array, half: Array, best: Array, index: Array) -> None:
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _() -> None:
      best[...] = jnp.full_like(best, jnp.inf)
      index[...] = jnp.zeros_like(index)

    @pl.when(i * size < rows[0])
    def _() -> None:
      dot = lax.dot_general(c[...], x[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      score = half[...] - dot  # [BLOCK, points]
      least = score.min(axis=0, keepdims=True)
      at = lax.broadcasted_iota(jnp.int32, score.shape, 0)
      # Of equal scores the lowest index, here and (because of the strict comparison) between blocks.
      at = jnp.where(score == least, at, BLOCK).min(axis=0, keepdims=True) + j * BLOCK
      better = least < best[...]
      index[...] = jnp.where(better, at, index[...])
      best[...] = jnp.where(better, least, best[...])

  # Blocks past the rows that count are not computed; what is in VMEM already is not copied again.
  def points(i: Array, j: Array, rows: Array) -> tuple[Array, int]:
    del j
    return jnp.minimum(i, lax.div(jnp.maximum(rows[0] - 1, 0), size)), 0

  def centroids(i: Array, j: Array, rows: Array) -> tuple[Array, int]:
    return jnp.where(i * size < rows[0], j, 0), 0

  def places(i: Array, j: Array, rows: Array) -> tuple[int, Array]:
    del j, rows
    return 0, i

  of_points, of_centroids, of_halves = ((size, d), points), ((BLOCK, d), centroids), ((BLOCK, 1), centroids)
  out = pl.BlockSpec((1, size), places)
  score, index = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(length // size, blocks),
      in_specs=[pl.BlockSpec(*block) for block in (of_points, of_centroids, of_halves)],
      out_specs=[out, out],
    ),
    out_shape=[jax.ShapeDtypeStruct((1, length), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    interpret=interpret,
    name="nearest_centroid",
  )(rows[None], x, c, half[:, None])
  return score[0], index[0]


def _points(length: int, d: int) -> int:
  """Points of a block: a power of two that divides them all."""
  size = MOST
  while length % size or 2 * size * d > BYTES:
    size //= 2
  return size
