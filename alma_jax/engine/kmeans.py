"""K-means: exact Lloyd iterations over points on any number of devices and hosts, or streamed from disk.

  settings = Settings(k=1000)                                        # ten iterations from D-squared seeds
  found = fit(points, settings, key_of(seed, "k-means"))             # found.labels, found.centroids, found.report
  found = fit(points, settings, key, mesh=mesh_for(1000, d))         # over all devices of all hosts
  found = fit(points, settings, key, mesh, chunk=1 << 20)            # a million rows on the devices at a time
  found = fit(points, settings, key, hooks=starting_at(centroids))   # no seeding: from these centroids

`points` is anything with a shape (n, d), a dtype and points[a:b]: an array, a memory map, a view over many `.npy`. Half
precision is kept until it reaches a tile; everything is summed in fp32. What to expect:

- The points-by-centroids matrix never exists: a tile of centroids meets one tile of points after the other, and every
  point keeps the best score so far. Of equally near centroids the lowest counts.
- On a GPU or TPU points of half precision meet centroids that are rounded to it, and their scores stay on the chip
  (engine/nearest.py). On TPUs all halves are bfloat16, in which points closer than 0.004 of their size count as equal.
  Points of 32 bits are multiplied in full, which takes many times as long.
- Seeds are those of greedy k-means++, in eight rounds over pools of points (engine/seeding.py); the noise follows from
  (key, round, row) alone. The same points and key give the same clusters, whatever the chunks; on other devices or
  meshes sums may differ in their last bits. So may they from run to run on a GPU, unless XLA_FLAGS has
  --xla_gpu_deterministic_ops=true.
- An empty cluster takes half of the largest one, the next that of the second largest, and so on. A cluster of equal
  points gives nothing away: with fewer different points than clusters, some stay empty, and `empty` counts them.
- Labels are always those of the nearest centroid, also of points that were not trained on.
- Every process of a run calls `fit` with the same points, reads the rows of its own devices (and a share of the seeds),
  and gets the whole result.
- Distances are |x|^2 - 2xc + |c|^2 in fp32, which has no digits left for points far from zero. Points whose mean is
  further from zero than they are from it are therefore read minus that mean; half precision becomes fp32 then.
  Centroids are the caller's in any case. Points closer than 0.002 of their size count as equal.
- spherical: centroids have length 1, and points should; longer ones weigh more. Nothing is subtracted from them.

The programs of an iteration are in engine/lloyd.py, the search in engine/nearest.py; engine/points.py brings points and
centroids to the devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alma_jax.engine import seeding
from alma_jax.engine.lloyd import Programs
from alma_jax.engine.points import (
  Centred,
  ClusteringError,
  Picked,
  Points,
  Source,
  fetched,
  mesh_for,
  mesh_of,
  origin_of,
)
from alma_jax.keys import Key

__all__ = ["Clustering", "ClusteringError", "FitHooks", "Settings", "fit", "mesh_for", "starting_at"]

SAMPLE = 1 << 17  # the stream of the noise by which training rows are drawn; those of seeding are below
HAIR = 0.125  # by which a centroid's halves move, as a share of its cluster's spread

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
  k: int
  iterations: int = 10  # at most
  seeding: str = "distance"  # "distance": greedy k-means++; "random": any rows
  spherical: bool = False
  per_centroid: int = 0  # train on this many rows per centroid, drawn by the key; 0: on all
  tolerance: float = 1e-5  # an iteration that lowers the inertia by no more than this share is the last

  def __post_init__(self) -> None:
    for name, least in dict(k=1, iterations=0, per_centroid=0).items():
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ClusteringError(f"k-means: {name}={value!r}, but it must be a whole number, {least} or more")
    if self.seeding not in ("distance", "random"):
      raise ClusteringError(f"k-means: seeding={self.seeding!r}, but it must be one of distance, random")
    if not 0 <= self.tolerance < 1:
      raise ClusteringError(f"k-means: tolerance={self.tolerance!r}, but it must be 0 or more, and less than 1")


@dataclasses.dataclass(frozen=True)
class Clustering:
  labels: np.ndarray  # int32 [n]
  centroids: np.ndarray  # fp32 [k, d]
  report: dict[str, Any]  # plain numbers and lists


@dataclasses.dataclass(frozen=True)
class FitHooks:
  """What `fit` calls on every process, with the same arrays."""

  progress: Callable[[int], object] | None = None  # progress(1) after every iteration
  save: Callable[[int, Arrays], object] | None = None  # save(step, arrays) after seeding and every iteration
  restore: Callable[[], tuple[int, Arrays] | None] | None = None  # the last (step, arrays) that was saved, or None

  def after(self, step: int, arrays: Callable[[], Arrays]) -> None:
    """Seeding is step 0; the iterations count from 1."""
    if self.save:
      self.save(step, arrays())
    if self.progress and step:
      self.progress(1)


NO_HOOKS = FitHooks()


def fit(
  points: Source, settings: Settings, key: Key, mesh: Mesh | None = None, chunk: int | None = None,
  hooks: FitHooks = NO_HOOKS,
) -> Clustering:  # fmt: skip
  """The Clustering of points [n, d].

  key: two 32-bit words. mesh: axes "data", which spreads the points, and "k", which spreads the centroids (see
  `mesh_for`); None: one device. chunk: rows on all devices together at a time; None: all if they fit, else what does.
  """
  n = _checked(points, settings.k, mesh, chunk)
  word = _word(key)
  mesh = mesh_of(1, 1, jax.local_devices()[:1]) if mesh is None else mesh
  restored = hooks.restore and hooks.restore()
  saved = restored[1] if restored else {}
  zeros = np.zeros(points.shape[1], np.float32)
  origin = saved["origin"] if "origin" in saved else zeros if settings.spherical else origin_of(points, mesh)
  if origin.any():
    points = Centred(points, origin)
  # Train on all points or on a sample of them, then give every point its label.
  rows, train = settings.per_centroid * settings.k, points
  if 0 < rows < n:
    train = Picked(points, seeding.largest(-seeding.noise(word, SAMPLE, n), rows))
  data = Points(train, mesh, chunk, settings.k, settings.spherical)
  if saved:
    state = _restored(saved, settings.k, origin)
  else:
    seeds = seeding.by_distance if settings.seeding == "distance" else seeding.at_random
    state = _State(seeds(data, settings.k, word), origin)
    hooks.after(0, state.arrays)
  _lloyd(data, state, settings, hooks)
  if train is not points:
    data = Points(points, mesh, chunk, settings.k, settings.spherical)
  centroids = state.written()
  labels, distances = data.assigned(_minus(centroids, origin))  # of the centroids as they are written
  sizes = np.bincount(labels, minlength=settings.k)
  facts = {
    "inertia_final": float(distances.sum(dtype=np.float64)),
    "trained_on": train.shape[0],
    "largest": int(sizes.max()),
    "singletons": int((sizes == 1).sum()),
    "empty": int((sizes == 0).sum()),
    "balance": float(settings.k * (sizes.astype(np.float64) ** 2).sum() / n**2),
  }
  return Clustering(labels, centroids, state.facts() | facts)


def starting_at(centroids: np.ndarray) -> FitHooks:
  """Hooks that begin with these centroids [k, d] instead of seeds."""
  state = _State(np.asarray(centroids), np.zeros(0))
  return FitHooks(restore=lambda: (0, {name: x for name, x in state.arrays().items() if name != "origin"}))


def _checked(points: Source, k: int, mesh: Mesh | None, chunk: int | None) -> int:
  """How many points there are."""
  shape = tuple(points.shape)
  if len(shape) != 2 or 0 in shape:
    raise ClusteringError(f"k-means: the points have shape {shape}; it must be (n, d), with at least one point")
  if np.dtype(points.dtype).kind not in "fiuV" or np.dtype(points.dtype).names:
    raise ClusteringError(f"k-means: the points are {points.dtype}; they must be real numbers")
  if np.dtype(points.dtype).kind == "V" and np.dtype(points.dtype) != jnp.bfloat16:
    raise ClusteringError(
      f"k-means: the points are {points.dtype}; view them as the type they were saved in (bfloat16?)"
    )
  if k > shape[0]:
    raise ClusteringError(f"k-means: k={k} clusters, but there are {shape[0]} points; k can be at most that")
  if mesh is not None and mesh.axis_names != ("data", "k"):
    raise ClusteringError(f"k-means: the mesh has axes {mesh.axis_names}; they must be ('data', 'k'), see mesh_for")
  if chunk is not None and chunk < 1:
    raise ClusteringError(f"k-means: chunk={chunk}, but it must be 1 or more rows, or None")
  return shape[0]


def _word(key: Key) -> int:
  """Both words of the key in one of 64 bits."""
  words = np.asarray(key if isinstance(key, tuple | list | np.ndarray) else [], dtype=object).ravel()
  if len(words) != 2 or not all(isinstance(w, int | np.integer) and 0 <= w < 2**32 for w in words):
    raise ClusteringError(f"k-means: the key is {key!r}; it must be two whole numbers below 2**32")
  return int(words[0]) | int(words[1]) << 32


# Lloyd's iterations


@dataclasses.dataclass
class _State:
  """Where Lloyd's iterations are: what is saved after each."""

  centroids: np.ndarray  # fp32 [k, d], minus the origin
  origin: np.ndarray  # fp32 [d]: what is subtracted from the points
  inertia: list[float] = dataclasses.field(default_factory=list)  # of every iteration
  repaired: int = 0  # empty clusters
  settled: bool = False

  def arrays(self) -> Arrays:
    return {
      "centroids": self.centroids, "origin": self.origin, "inertia": np.array(self.inertia, np.float64),
      "repaired": np.array(self.repaired), "settled": np.array(self.settled),
    }  # fmt: skip

  def written(self) -> np.ndarray:
    """fp32 [k, d]: the centroids in the caller's coordinates."""
    return self.centroids if not self.origin.any() else _minus(self.centroids, -self.origin)

  def facts(self) -> dict[str, Any]:
    return {"iterations": len(self.inertia), "inertia": self.inertia, "empty_repaired": self.repaired}


def _minus(x: np.ndarray, origin: np.ndarray) -> np.ndarray:
  """x [k, d] minus the origin [d], rounded once."""
  return (x.astype(np.float64) - origin).astype(np.float32) if origin.any() else x.astype(np.float32, copy=False)


def _restored(arrays: Arrays, k: int, origin: np.ndarray) -> _State:
  """The state of these arrays; without an "origin" their centroids are in the caller's coordinates."""
  shape = np.shape(arrays["centroids"])
  if shape != (k, len(origin)):
    raise ClusteringError(
      f"k-means: what was restored has centroids of shape {shape}, not {(k, len(origin))}: it is another run's"
    )
  found = {name: np.asarray(arrays[name]) for name in ("centroids", "inertia", "repaired", "settled")}
  centroids = found["centroids"] if "origin" in arrays else _minus(found["centroids"], origin)
  return _State(
    centroids.astype(np.float32), origin, found["inertia"].tolist(), int(found["repaired"]), bool(found["settled"])
  )


def _lloyd(data: Points, state: _State, settings: Settings, hooks: FitHooks) -> None:
  """Iterate until the state settles, or for as many iterations as the settings allow."""
  k = settings.k
  c, programs = data.placed(state.centroids)
  while not state.settled and len(state.inertia) < settings.iterations:
    # Every point joins the sum of its nearest centroid, which then moves to the mean.
    sums, inertia = data.joined(c, programs, k)
    c, counts, spread = programs.move(*sums, c)
    c, repaired = _repaired(c, np.asarray(counts)[:k], np.asarray(spread)[:k], programs)
    gain = state.inertia[-1] - inertia if state.inertia else math.inf
    state.inertia.append(inertia)
    state.repaired += repaired
    state.settled = not repaired and gain <= settings.tolerance * inertia
    hooks.after(len(state.inertia), lambda: dataclasses.replace(state, centroids=fetched(c, k, programs)).arrays())
  state.centroids = fetched(c, k, programs)


def _repaired(c: Array, counts: np.ndarray, spread: np.ndarray, programs: Programs) -> tuple[Array, int]:
  """The e-th empty centroid becomes a copy of the e-th largest cluster's, both moved a hair apart. Counts 5 0 9 0 1:
  empty are 1 and 3, donors 2 and 0. A cluster of equal points, whose squared distances have the sum `spread` 0, gives
  nothing away."""
  empty = np.flatnonzero(counts == 0)
  donors = np.argsort(-counts, kind="stable")
  donors = donors[(counts[donors] > 1) & (spread[donors] > 0)][: len(empty)]
  if not len(donors):
    return c, 0
  apart = HAIR * np.sqrt(spread[donors] / (counts[donors] * c.shape[1]))

  def padded(x: np.ndarray, fill: float) -> np.ndarray:  # few shapes; what is past the last centroid is dropped
    most = 1 << (len(donors) - 1).bit_length()
    return np.pad(x, (0, most - len(donors)), constant_values=fill)

  at = (padded(rows, len(c)).astype(np.int32) for rows in (empty[: len(donors)], donors))
  return programs.repair(c, *at, padded(apart, 0.0).astype(np.float32)), len(donors)
