"""K-means against faiss and scikit-learn: ratios of time on one core, with equal inertia asserted in the same run.

  python -m benchmarks.clustering [--scale=0.25] [--repeats=5] [--shapes=0,1,2,3]

Four sets of points of `--scale` times 200k x 128, 1M x 64, 100k x 256 and 40k x 1024 are clustered into 1000, 1000,
4096 and 1024. Everyone begins with the same centroids, does the same number of Lloyd iterations in fp32 and then gives
each point its label. The script pins itself to one core and one thread; everyone takes turns, and what counts is the
median ratio of process times of the same turn:

  faiss           faiss.Kmeans without subsampling, then its index searched for the labels
  scikit-learn    KMeans with algorithm="lloyd"
  sgemm           a product as large as all distances together, in blocks of 1024, by NumPy

What to expect: ratios move by a few hundredths from run to run; the default takes about two minutes. It ends with an
AssertionError where inertia is over 1.001 times the least of the others (1.01 if a cluster became empty, because each
fills empty ones in its own way). Needs `pip install faiss-cpu scikit-learn`.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

import jax
import numpy as np

from alma_jax.engine import kmeans

FAISS, SKLEARN, SGEMM, OURS = "faiss", "scikit-learn", "sgemm", "alma_jax"


class Fitted(NamedTuple):
  labels: np.ndarray
  centroids: np.ndarray
  filled: int = 0  # empty clusters


class Compared(NamedTuple):
  seconds: dict[str, list[float]]  # of each turn, by name
  inertias: dict[str, float]
  filled: int  # empty clusters that we filled


@dataclasses.dataclass(frozen=True)
class Shape:
  n: int
  d: int
  k: int
  iterations: int
  faiss: float  # our time should be at most so many times that of faiss,
  sgemm: float  # and our products at least this share of NumPy's rate
  sklearn: float = 0.80


SHAPES = (
  Shape(200_000, 128, 1000, 5, 0.90, 0.65),
  Shape(1_000_000, 64, 1000, 3, 0.85, 0.50),
  Shape(100_000, 256, 4096, 2, 1.00, 0.70),
  Shape(40_000, 1024, 1024, 5, 1.20, 0.70),
)


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast is k-means against its peers, on one core?")
  flags.add_argument("--scale", type=float, default=0.25)
  flags.add_argument("--repeats", type=int, default=5)
  flags.add_argument("--shapes", default="0,1,2,3")
  flags = flags.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  missing = [name for name in ("faiss", "sklearn") if not _importable(name)]
  if missing:
    raise SystemExit(f"{' and '.join(missing)} cannot be imported: pip install faiss-cpu scikit-learn")
  print(f"{'':34} {'time of':>20} {'time of':>20} {'rate of':>20} {'inertia of':>23} {'empty:':>6}")
  print(
    f"{'points, dims -> clusters':26} seconds {FAISS:>20} {SKLEARN:>20} {SGEMM:>20} {FAISS:>10} {SKLEARN:>12} filled"
  )
  for i in flags.shapes.split(","):
    shape = SHAPES[int(i)]
    shape = dataclasses.replace(shape, n=max(4 * shape.k, round(shape.n * flags.scale)))
    print(line(shape, *compared(shape, flags.repeats)), flush=True)
  import faiss  # pyright: ignore[reportMissingImports]  # the [bench] extra has it
  import sklearn

  print(f"jax {jax.__version__}, faiss {faiss.__version__}, scikit-learn {sklearn.__version__}; fp32, one core")


def _importable(name: str) -> bool:
  try:
    __import__(name)
  except ImportError:
    return False
  return True


def compared(shape: Shape, repeats: int) -> Compared:
  points = mixture(shape.n, shape.d, shape.k)
  start = points[np.random.default_rng(1).choice(shape.n, shape.k, replace=False)]
  runs: dict[str, Callable[[], Any]] = {
    OURS: lambda: ours(points, start, shape.iterations),
    FAISS: lambda: by_faiss(points, start, shape.iterations),
    SKLEARN: lambda: by_sklearn(points, start, shape.iterations),
    SGEMM: lambda: sgemm(points, start, shape.iterations),
  }
  found = {name: run() for name, run in runs.items()}  # compiles
  seconds = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      begun = time.process_time()
      run()
      seconds[name].append(time.process_time() - begun)
  inertias = {name: inertia(points, found[name]) for name in (OURS, FAISS, SKLEARN)}
  check(inertias, found[OURS].filled)
  return Compared(seconds, inertias, found[OURS].filled)


def check(inertias: Mapping[str, float], filled: int) -> None:
  most = 1.01 if filled else 1.001
  least = min(inertias[FAISS], inertias[SKLEARN])
  assert inertias[OURS] <= most * least, f"inertia over {most} times that of the others: {inertias}"


def mixture(n: int, d: int, k: int) -> np.ndarray:
  """Points of k / 2 topics, a few common and most rare, in dimensions of falling weight."""
  rng = np.random.default_rng(0)
  weights = 1 / np.arange(1, k // 2 + 1) ** 0.7
  topics = rng.choice(k // 2, n, p=weights / weights.sum())
  scales = (np.arange(1, d + 1) ** -0.25).astype(np.float32)
  centres = rng.standard_normal((k // 2, d), np.float32)
  return (centres[topics] + rng.standard_normal((n, d), np.float32)) * scales


def ours(points: np.ndarray, start: np.ndarray, iterations: int) -> Fitted:
  settings = kmeans.Settings(k=len(start), iterations=iterations, tolerance=0.0)
  found = kmeans.fit(points, settings, (0, 0), hooks=kmeans.starting_at(start))
  return Fitted(found.labels, found.centroids, found.report["empty_repaired"])


def by_faiss(points: np.ndarray, start: np.ndarray, iterations: int) -> Fitted:
  import faiss  # pyright: ignore[reportMissingImports]  # the [bench] extra has it

  faiss.omp_set_num_threads(1)
  n, d = points.shape
  means = faiss.Kmeans(d, len(start), niter=iterations, max_points_per_centroid=n, min_points_per_centroid=1)
  means.train(points, init_centroids=start)
  return Fitted(means.index.search(points, 1)[1][:, 0], means.centroids)


def by_sklearn(points: np.ndarray, start: np.ndarray, iterations: int) -> Fitted:
  import warnings

  from sklearn import cluster, exceptions

  with warnings.catch_warnings():
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    how: dict[str, Any] = dict(init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    means = cluster.KMeans(len(start), **how).fit(points)
  return Fitted(np.asarray(means.labels_), means.cluster_centers_)


def sgemm(points: np.ndarray, start: np.ndarray, iterations: int) -> None:
  out = np.empty((1024, 1024), np.float32)
  for _ in range(iterations + 1):
    for a in range(0, len(points), 1024):
      for b in range(0, len(start), 1024):
        x, c = points[a : a + 1024], start[b : b + 1024]
        np.matmul(x, c.T, out=out[: len(x), : len(c)])


def inertia(points: np.ndarray, found: Fitted) -> float:
  total = 0.0
  for a in range(0, len(points), 4096):
    apart = points[a : a + 4096] - found.centroids[found.labels[a : a + 4096]]
    total += float((apart**2).sum(dtype=np.float64))
  return total


def line(shape: Shape, seconds: Mapping[str, list[float]], inertias: Mapping[str, float], filled: int) -> str:
  def ratio(name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[OURS], seconds[name], strict=True))

  def goal(value: float, target: float, met: bool) -> str:
    return f"{f'{value:.2f} ({target:.2f} ' + ('met)' if met else 'not met)'):>20}"

  faiss, sklearn, share = ratio(FAISS), ratio(SKLEARN), 1 / ratio(SGEMM)
  columns = [
    f"{f'{shape.n:,} x {shape.d} -> {shape.k:,}':26} {min(seconds[OURS]):7.2f}",
    goal(faiss, shape.faiss, faiss <= shape.faiss),
    goal(sklearn, shape.sklearn, sklearn <= shape.sklearn),
    goal(share, shape.sgemm, share >= shape.sgemm),
    f"{inertias[OURS] / inertias[FAISS]:10.5f} {inertias[OURS] / inertias[SKLEARN]:12.5f} {filled:6d}",
  ]
  return " ".join(columns)


if __name__ == "__main__":
  main()
