"""The nearest centroid of every point, with a kernel for each kind of accelerator behind one contract.

  search = chosen(platform, x, centroids, tile)
  score, index = search(x, c, half, rows, k)

score [L] is the least of `half - x c` over the first k centroids, index [L] says where; of equal scores the lowest
index. They are those of the first `rows` points x [L, d]; the others may be anything. c [K, d], half [K] is fp32, and
past k so large that it is never the least. Products are exact, their sums fp32.

`plain` says it in XLA: on CPUs, for points of 32 bits, and wherever a kernel does not fit. On accelerators it writes
tiles of scores to memory and reads them again, 12 bytes for each score. The kernels `engine.nearest_tpu` and
`engine.nearest_gpu` keep them on the chip; they are tested against the definition in their interpreters on a CPU, and
once more on the device before their first use.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from alma_jax.llama.trial import flaw_on

FOLD = 8  # rows of a tile of scores that are compared in one go
BLOCK = 128, 256  # points and centroids: kernels take whole blocks
WIDEST = 8192  # dimensions
HALVES = {"tpu": (jnp.bfloat16,), "gpu": (jnp.bfloat16, jnp.float16)}  # what the kernels multiply

Tile = tuple[int, int]  # points, centroids
Search = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]


def chosen(platform: str, x: Array, centroids: int, tile: Tile) -> Search:
  """What searches points such as x [L, d] among so many centroids on the devices of a platform."""
  if fits(platform, x.dtype, len(x), centroids, x.shape[1]):
    wrong = flaw(platform, jnp.dtype(x.dtype), x.shape[1])
    _warn(platform, wrong)
    if wrong is None:
      return lambda x, c, half, rows, k: _kernel(platform)(x, c, half, rows, tile[0])
  return functools.partial(plain, tile=tile)


def fits(platform: str, dtype: DTypeLike, length: int, centroids: int, d: int) -> bool:
  """Whether a platform, in JAX's words, has a kernel for these shapes."""
  whole = length % BLOCK[0] == 0 and centroids % BLOCK[1] == 0
  return dtype in HALVES.get(platform, ()) and whole and d <= WIDEST and centroids * d < 2**31


def _kernel(platform: str) -> Callable[..., Any]:
  """Imported at its first use: each needs what JAX has for its platform only, and a failure must reach `flaw`."""
  return importlib.import_module(f"alma_jax.engine.nearest_{platform}").nearest


def plain(x: Array, c: Array, half: Array, rows: Array, k: Array, tile: Tile) -> tuple[Array, Array]:
  """The tile divides L and K. The loops go as far as rows and k do, so that padding costs next to nothing. Points are
  the columns of a tile of scores, so that comparing needs whole vectors only:

    scores [centroids, points]   fold by FOLD -> [centroids / FOLD, points]    least of the rows -> [points]
    tile s, t                    the best of rows i, i + part, i + 2 part, ... the best so far keeps score and index
  """
  points, centroids = tile
  fold = min(FOLD, centroids // 64)
  part = centroids // fold

  def against(s: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
    ct = lax.dynamic_slice_in_dim(c, s * centroids, centroids)
    ht = lax.dynamic_slice_in_dim(half, s * centroids, centroids)[:, None]

    def one(t: Array, better: tuple[Array, Array]) -> tuple[Array, ...]:
      xt = lax.dynamic_slice_in_dim(x, t * points, points).astype(c.dtype)
      dot = lax.dot_general(ct, xt, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)
      # Folding keeps XLA from going over the tile twice, for the least score and for where it is.
      score, which = (ht - dot)[:part], jnp.zeros((part, points), jnp.int32)
      for r in range(1, fold):
        other = (ht - dot)[r * part : (r + 1) * part]
        which = jnp.where(other < score, r, which)
        score = jnp.where(other < score, other, score)
      score, which = lax.optimization_barrier((score, which))
      # Of equal scores the lowest index, here and (because of the strict comparison) between tiles.
      least = score.min(axis=0)
      index = which * part + lax.broadcasted_iota(jnp.int32, which.shape, 0)
      index = jnp.where(score == least, index, len(half)).min(axis=0) + s * centroids
      held = [lax.dynamic_slice_in_dim(b, t * points, points) for b in best]
      held = jnp.where(least < held[0], least, held[0]), jnp.where(least < held[0], index, held[1])
      return tuple(lax.dynamic_update_slice_in_dim(b, h, t * points, 0) for b, h in zip(better, held, strict=True))

    # What a step reads is not what it writes, or XLA would copy all scores in every step.
    return lax.fori_loop(0, -(-rows // points), one, best)

  start = jnp.full(len(x), jnp.inf, jnp.float32), jnp.zeros(len(x), jnp.int32)
  return lax.fori_loop(0, -(-k // centroids), against, start)


# ---- The check before first use


@functools.cache
def flaw(platform: str, dtype: DTypeLike, d: int) -> str | None:
  """Why a kernel cannot be used on the devices of its platform; None if it is right, or if none of them is here."""
  return flaw_on(platform, lambda: disagreement(_kernel(platform), dtype, d, 4096, 1024))


def disagreement(nearest: Callable[..., Any], dtype: DTypeLike, d: int, length: int, centroids: int) -> str | None:
  """How a kernel differs from the definition on small whole numbers, of which all sums are exact."""
  random = np.random.default_rng(0)
  x, c = (random.integers(-15, 16, (n, d)).astype(np.float32) for n in (length, centroids))
  c[centroids // 2] = c[-1] = c[3]  # of these the first counts
  x[::7] = c[3]
  half = (c**2).sum(axis=1) / 2
  score = half - x @ c.T
  rows, tile = length - 200, length // 2
  given = (jnp.asarray(x, dtype), jnp.asarray(c, dtype), jnp.asarray(half), jnp.int32(rows))
  got = jax.device_get(jax.jit(functools.partial(nearest, tile=tile))(*given))
  for what, found, wanted in zip(("least score", "index"), got, (score.min(axis=1), score.argmin(axis=1)), strict=True):
    wrong = int((found[:rows] != wanted[:rows]).sum())
    if wrong:
      return f"its {what} is wrong for {wrong} of {rows} points"
  return None


@functools.cache
def _warn(platform: str, flaw: str | None) -> None:
  if flaw:
    message = f"k-means searches in plain XLA, which is slower than the kernel for a {platform}: {flaw}"
    warnings.warn(message, stacklevel=2)
