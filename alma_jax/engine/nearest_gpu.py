"""The nearest centroid on NVIDIA GPUs: a Triton kernel whose scores stay in registers.

A program has a block of points and a share of the centroids, which pass block by block while each point keeps its best
score; the shares of a point are compared at the end. Programs that run at once have the same share, so that centroids
come from HBM once for `tile` points and the points of a tile stay in the cache. `engine.nearest` has the contract.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Sizes:
  points: int = 128
  centroids: int = 256
  dimensions: int = 64
  warps: int = 8
  stages: int = 3
  programs: int = 512  # at least, where there are as many blocks: four for each processor of an H100


SIZES = Sizes()


def nearest(x: Array, c: Array, half: Array, rows: Array, tile: int, interpret: bool = False) -> tuple[Array, Array]:
  def one(t: Array, found: tuple[Array, Array]) -> tuple[Array, ...]:
    xt = lax.dynamic_slice_in_dim(x, t * tile, tile)
    news = _nearest(xt, c, half, interpret)
    return tuple(lax.dynamic_update_slice_in_dim(f, new, t * tile, 0) for f, new in zip(found, news, strict=True))

  start = jnp.full(len(x), jnp.inf, jnp.float32), jnp.zeros(len(x), jnp.int32)
  found = lax.fori_loop(0, -(-rows // tile), one, start)
  return found[0], found[1]


def _nearest(x: Array, c: Array, half: Array, interpret: bool) -> tuple[Array, Array]:
  """All points of a tile."""
  (length, d), s = x.shape, SIZES
  blocks, shares = len(c) // s.centroids, 1
  while length // s.points * shares < s.programs and blocks % (2 * shares) == 0:
    shares *= 2
  share = len(c) // shares

  def kernel(x: Any, c: Any, half: Any, best: Any, index: Any) -> None:
    def against(j: Array, held: tuple[Array, Array]) -> tuple[Array, Array]:
      block = pl.ds(j * s.centroids, s.centroids)

      def product(b: Array, dot: Array) -> Array:
        part = pl.ds(b * s.dimensions, s.dimensions)
        there = (b * s.dimensions + jnp.arange(s.dimensions) < d)[None]
        more: dict[str, Any] = {} if d % s.dimensions == 0 else {"mask": there, "other": 0.0}
        xs, cs = plgpu.load(x.at[:, part], **more), plgpu.load(c.at[block, part], **more)
        return dot + lax.dot_general(xs, cs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

      nothing = jnp.zeros((s.points, s.centroids), jnp.float32)
      score = half[block][None] - lax.fori_loop(0, -(-d // s.dimensions), product, nothing)
      # Of equal scores the lowest index, here and (because of the strict comparison) between blocks.
      least, at = score.min(axis=1), jnp.argmin(score, axis=1) + j * s.centroids
      better = least < held[0]
      return jnp.where(better, least, held[0]), jnp.where(better, at, held[1])

    start = jnp.full((s.points,), jnp.inf, jnp.float32), jnp.zeros((s.points,), jnp.int32)
    score, at = lax.fori_loop(0, share // s.centroids, against, start)
    best[...] = score
    index[...] = at + pl.program_id(1) * share

  def points(i: Array, part: Array) -> tuple[Array, int]:
    del part
    return i, 0

  def of_share(i: Array, part: Array) -> tuple[Array, int]:
    del i
    return part, 0

  out = pl.BlockSpec((None, s.points), lambda i, part: (part, i))
  score, index = pl.pallas_call(
    kernel,
    grid=(length // s.points, shares),
    in_specs=[
      pl.BlockSpec((s.points, d), points),
      pl.BlockSpec((share, d), of_share),
      pl.BlockSpec((share,), lambda i, part: (part,)),
    ],
    out_specs=[out, out],
    out_shape=[jax.ShapeDtypeStruct((shares, length), jnp.float32), jax.ShapeDtypeStruct((shares, length), jnp.int32)],
    compiler_params=plgpu.CompilerParams(num_warps=s.warps, num_stages=s.stages),
    interpret=interpret,
    name="nearest_centroid",
  )(x, c, half)
  first = score.argmin(axis=0)[None]  # of equal scores the first share
  return tuple(jnp.take_along_axis(y, first, axis=0)[0] for y in (score, index))  # pyright: ignore[reportReturnType]
