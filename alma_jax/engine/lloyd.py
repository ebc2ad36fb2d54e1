"""The programs of a Lloyd iteration on a mesh ("data", "k"): points are spread over "data", centroids over "k".

  programs = programs_for(mesh, tile, spherical)
  *sums, objective = programs.accumulate(*sums, x, squares, c, rows, k)   # for every chunk of the points
  c, counts, spread = programs.move(*sums, c)
  labels, distances = programs.assign(x, squares, c, rows, k)

On every device x [L, d] are its share of a chunk's points, squares [L] their |x|^2, c [K, d] its share of the
centroids; of all points of the chunk `rows` count, of all centroids k. A device's sums are those of its own points for
its own centroids:

                 "k" 0: centroids 0, 1     "k" 1: centroids 2, 3
    "data" 0     its points' sums [2, d]   its points' sums [2, d]     accumulate: nothing is exchanged but which
    "data" 1     its points' sums [2, d]   its points' sums [2, d]     centroid is nearest, along "k"
                 --------- sum ---------   --------- sum ---------     move: along "data"
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import nearest as searching
from alma_jax.engine.nearest import Tile

FAR = 3e38  # the score of centroids that only fill a tile
NOISE = 2.0**-18  # squared distances up to this share of |x|^2 + |c|^2 may be 0 but for fp32's rounding
NONE = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Programs:
  assign: Callable[..., Any]  # labels and squared distances of all points of the chunk, on every device
  accumulate: Callable[..., Any]  # sums, counts, spreads, and partial sums of the squared distances
  move: Callable[..., Any]  # the means of the sums, and the counts and spreads of all centroids
  repair: Callable[..., Any]  # (c, empty, donors, apart): donors' centroids halved, see `programs_for`
  block: Callable[..., Any]  # (c, at, size): these centroids on every device


def platform_of(mesh: Mesh | AbstractMesh) -> str:
  """The platform of its devices, in JAX's words; they may be elsewhere."""
  device = mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def unit(c: Array) -> Array:
  return c / jnp.maximum(jnp.linalg.norm(c, axis=1, keepdims=True), 1e-30)


def _share(count: Array, axis: str, mine: int) -> Array:
  """How many of the first `count` are this device's; each device along the axis has `mine` places."""
  return jnp.clip(count - lax.axis_index(axis) * mine, 0, mine)


def _wrapped(
  mesh: Mesh | AbstractMesh, f: Callable[..., Any], inputs: Any, outputs: Any, **more: Any
) -> Callable[..., Any]:
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False), **more)


@functools.cache
def look_for(mesh: Mesh) -> Callable[..., Any]:
  """The program (x, rows) -> |x|^2 of a chunk's points, and where the first one is that is not finite, or NONE."""

  def look(x: Array, rows: Array) -> tuple[Array, Array]:
    squares = (x.astype(jnp.float32) ** 2).sum(axis=1)
    wrong = ~jnp.isfinite(squares) & (jnp.arange(len(x)) < _share(rows, "data", len(x)))
    first = jnp.where(wrong.any(), jnp.argmax(wrong) + lax.axis_index("data") * len(x), NONE)
    return squares, lax.pmin(first, "data")

  return _wrapped(mesh, look, (P("data"), P()), (P("data"), P()))


@functools.cache
def programs_for(mesh: Mesh | AbstractMesh, tile: Tile, spherical: bool, kernels: bool = True) -> Programs:
  """kernels: whether accelerators use their kernels; False: plain XLA."""
  platform = platform_of(mesh)

  def nearest(x: Array, squares: Array, c: Array, rows: Array, k: Array) -> tuple[Array, Array]:
    """The index among all centroids, and the squared distance, of this device's points."""
    c = c.astype(jnp.float32 if platform == "cpu" else x.dtype)  # a CPU has no fast product of halves
    half = 0.5 if spherical else (c.astype(jnp.float32) ** 2).sum(axis=1) / 2
    half = jnp.where(jnp.arange(len(c)) < _share(k, "k", len(c)), half, FAR)
    search = searching.chosen(platform if kernels else "cpu", x, len(c), tile)
    score, index = search(x, c, half, _share(rows, "data", len(x)), _share(k, "k", len(c)))
    if mesh.shape["k"] > 1:
      index += lax.axis_index("k") * len(c)
      least = lax.pmin(score, "k")
      score, index = least, lax.pmin(jnp.where(score == least, index, NONE), "k")
    return index, jnp.maximum(squares + 2 * score, 0.0)

  def assign(x: Array, squares: Array, c: Array, rows: Array, k: Array) -> tuple[Array, ...]:
    return tuple(lax.all_gather(y, "data", tiled=True) for y in nearest(x, squares, c, rows, k))

  def accumulate(
    sums: Array, counts: Array, spread: Array, x: Array, squares: Array, c: Array, rows: Array, k: Array
  ) -> tuple[Array, Array, Array, Array]:
    index, distance = nearest(x, squares, c, rows, k)
    apart = jnp.where(distance > 2 * NOISE * squares, distance, 0.0)  # exactly 0 for copies of a centroid
    # Where a point's centroid is on this device; len(c), which is dropped, if it is on another one.
    mine = jnp.arange(len(x)) < _share(rows, "data", len(x))
    index -= lax.axis_index("k") * len(c)
    index = jnp.where(mine & (index >= 0) & (index < len(c)), index, len(c))

    def add(t: Array, to: tuple[Array, ...]) -> tuple[Array, ...]:
      xt, at, apart_t = (lax.dynamic_slice_in_dim(y, t * tile[0], tile[0]) for y in (x, index, apart))
      news = xt.astype(jnp.float32), 1, apart_t
      return tuple(old.at[at].add(new, mode="drop") for old, new in zip(to, news, strict=True))

    tiles = -(-_share(rows, "data", len(x)) // tile[0])
    sums, counts, spread = lax.fori_loop(0, tiles, add, (sums[0], counts[0], spread[0]))
    objective = jnp.where(mine, distance, 0.0).reshape(-1, tile[0]).sum(axis=1)  # the host adds these up
    return sums[None], counts[None], spread[None], lax.all_gather(objective, "data", tiled=True)

  def move(sums: Array, counts: Array, spread: Array, c: Array) -> tuple[Array, Array, Array]:
    sums, counts, spread = (lax.psum(y[0], "data") for y in (sums, counts, spread))
    means = sums / jnp.maximum(counts, 1)[:, None]
    # An empty cluster stays. A sum of points may be zero, and then has no direction.
    moves = counts > 0 if not spherical else (counts > 0) & (jnp.abs(means).max(axis=1) > 0)
    c = jnp.where(moves[:, None], unit(means) if spherical else means, c)
    return c, lax.all_gather(counts, "k", tiled=True), lax.all_gather(spread, "k", tiled=True)

  def repair(c: Array, empty: Array, donors: Array, apart: Array) -> Array:
    """Each empty centroid becomes a copy of its donor's; both move by `apart`, dimensions taking turns in sign."""
    sign = jnp.where(jnp.arange(c.shape[1]) % 2, 1.0, -1.0)
    rows = c.at[donors].get(mode="fill", fill_value=0)
    halves = (unit(y) if spherical else y for y in (rows + apart[:, None] * sign, rows - apart[:, None] * sign))
    for at, half in zip((empty, donors), halves, strict=True):
      c = c.at[at].set(half, mode="drop")
    return c

  def block(c: Array, at: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(c, at, size)

  x, c, own, whole = P("data"), P("k"), P("data", "k"), P()
  return Programs(
    assign=_wrapped(mesh, assign, (x, x, c, whole, whole), (whole, whole)),
    accumulate=_wrapped(
      mesh, accumulate, (own, own, own, x, x, c, whole, whole), (own, own, own, whole), donate_argnums=(0, 1, 2)
    ),
    move=_wrapped(mesh, move, (own, own, own, c), (c, whole, whole), donate_argnums=(0, 1, 2)),
    repair=jax.jit(repair, out_shardings=NamedSharding(mesh, c), donate_argnums=0),
    block=jax.jit(block, static_argnums=2, out_shardings=NamedSharding(mesh, whole)),
  )
