"""K-means as a stage and a command run it: points from a model, and a fit that goes on after a kill.

  points = embedded(host, checkpoint, rows, kind, bar.update)              # of token ids
  found = fitted(stage, points, settings, key_of(seed, "k-means"), mesh, display)
  apart = distances(points, found)

`fitted` saves its iterations in the stage's file ITERATION, which the caller removes after writing the result.
"""

import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from alma_jax.engine import embed, kmeans
from alma_jax.engine.lloyd import platform_of
from alma_jax.engine.points import Halved, Source
from alma_jax.errors import NotFinite
from alma_jax.keys import Key
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.store import shards
from alma_jax.store.runs import Stage

ITERATION = "iteration.npz"  # the file of the last iteration
EVERY = 60.0  # seconds between two of them
FEW = 39  # points per cluster; with fewer, centroids follow single points
BLOCK = 2**24  # numbers that are read at a time


def embedded(
  host: Host,
  checkpoint: Checkpoint,
  rows: Sequence[Sequence[int]],
  kind: embed.Embedding,
  progress: Callable[[int], object],
  fit: bool = False,
) -> np.ndarray:
  """fp32 [rows, dimensions]: the embeddings of rows of token ids. `fit` as in engine.embed."""
  model = host.model(checkpoint, embed.layout(host.local_mesh))
  return embed.embeddings(model, rows, host.engine.rows, host.local_mesh, progress, kind, fit)


def fitted(
  stage: Stage, points: embed.Rows, settings: kmeans.Settings, key: Key, mesh: Mesh, display: Display
) -> kmeans.Clustering:
  """The clustering by all processes of the stage together; it goes on from what a killed start has saved."""
  path, saved = stage.dir / ITERATION, None
  if path.exists():
    try:
      with np.load(path, allow_pickle=False) as file:
        saved = int(file["step"]), {name: file[name] for name in file.files if name != "step"}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error):  # zip files have check sums
      display.say(f"{path} is damaged; k-means begins again")
  stage.run.barrier(f"{stage.name}: begun")  # all have read the same
  last = time.monotonic()

  def save(step: int, arrays: dict[str, np.ndarray]) -> None:
    nonlocal last
    if stage.run.process == 0 and time.monotonic() - last >= EVERY:
      with shards.atomic(path) as file:
        np.savez(file, step=step, **arrays)  # pyright: ignore[reportArgumentType]  # NumPy's allow_pickle comes by name
      stage.beat()
      last = time.monotonic()

  with display.bar("k-means", settings.iterations, "iterations", done=saved[0] if saved else 0) as bar:
    hooks = kmeans.FitHooks(bar.update, save, lambda: saved)
    found = kmeans.fit(source_for(mesh, points), settings, key, mesh, hooks=hooks)
  wrong = np.flatnonzero(~np.isfinite(found.centroids).all(axis=1))
  if len(wrong):
    raise NotFinite(int(wrong[0]), f"{stage.name}: the centroid of cluster {wrong[0]} is not finite")
  if empty := found.report["empty"]:
    used = settings.k - empty
    display.say(f"k-means: {used:,} of {settings.k:,} clusters have members; are there fewer different points?")
  return found


def source_for(mesh: Mesh | AbstractMesh, points: embed.Rows) -> Source:
  """The points as the devices of a mesh want them. Accelerators multiply 16 bits many times faster, and rows of
  length 1 that are computed from 16 bits hold no more."""
  return Halved(points) if points.halves and points.unit and platform_of(mesh) != "cpu" else points


def blocks(n: int, width: int) -> Iterator[slice]:
  """The rows of an array [n, width], a block of bounded size at a time."""
  step = max(1, BLOCK // width)
  return (slice(begin, min(begin + step, n)) for begin in range(0, n, step))


def whitening(points: embed.Rows) -> np.ndarray:
  """fp32 [2, dimensions]: the mean and the floored deviation of every dimension."""
  total, squares = np.zeros((2, points.shape[1]))
  for rows in blocks(*points.shape):
    total += points[rows].sum(axis=0, dtype=np.float64)
  mean = total / len(points)
  for rows in blocks(*points.shape):
    squares += ((points[rows] - mean) ** 2).sum(axis=0)
  deviation = np.sqrt(squares / len(points))
  return np.stack([mean, embed.floored(deviation)]).astype(np.float32)


def distances(points: embed.Rows, found: kmeans.Clustering) -> np.ndarray:
  """fp32 [n]: of every point to the centroid of its cluster."""
  out = np.empty(len(points), np.float32)
  for rows in blocks(*points.shape):
    out[rows] = np.linalg.norm(points[rows] - found.centroids[found.labels[rows]], axis=1)
  return out
