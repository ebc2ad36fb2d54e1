"""K-means from our seeds against scikit-learn's default, greedy k-means++: inertia, and what the seeds cost.

  python -m benchmarks.seeding [--repeats=5] [--shapes=0,1,2,3,4]

Points are `k` Gaussian blobs at random places, one Gaussian, or uniform. Each repeat draws other points and other
seeds; both then iterate until nothing is gained, 30 times at most. Columns: our inertia over that of scikit-learn, mean
and most over the repeats; the same from random rows; the CPU time of our seeds, in iterations of Lloyd's; and the CPU
time of the whole fit over that of scikit-learn. The script pins itself to one core and one thread.

What to expect: a few minutes. It ends with an AssertionError where the mean of our inertia is over 1.05 times that of
scikit-learn. Needs `pip install scikit-learn`.
"""

import argparse
import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

import numpy as np

from alma_jax.engine import kmeans

T = TypeVar("T")
ITERATIONS = 30


@dataclasses.dataclass(frozen=True)
class Shape:
  kind: str  # blobs, Gaussian, uniform
  n: int
  d: int
  k: int

  def points(self, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if self.kind == "uniform":
      return rng.random((self.n, self.d), np.float32)
    x = rng.standard_normal((self.n, self.d), np.float32)
    if self.kind == "blobs":
      x += 10 * rng.standard_normal((self.k, self.d), np.float32)[rng.integers(0, self.k, self.n)]
    return x


SHAPES = (
  Shape("blobs", 4_000, 8, 16),
  Shape("blobs", 12_000, 8, 120),
  Shape("blobs", 50_000, 64, 500),
  Shape("Gaussian", 12_000, 8, 120),
  Shape("uniform", 12_000, 16, 120),
)


def main() -> None:
  flags = argparse.ArgumentParser(description="How good are the seeds of k-means, and what do they cost?")
  flags.add_argument("--repeats", type=int, default=5)
  flags.add_argument("--shapes", default="0,1,2,3,4")
  flags = flags.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  try:
    import sklearn
  except ImportError:
    raise SystemExit("scikit-learn cannot be imported: pip install scikit-learn") from None
  print(
    f"{'points, dims -> clusters':34} {'inertia: mean':>13} {'most':>6} {'random':>7} {'seeds cost':>15} {'time':>6}"
  )
  for i in flags.shapes.split(","):
    print(line(SHAPES[int(i)], flags.repeats), flush=True)
  print(f"inertia and time over those of scikit-learn {sklearn.__version__}; one core")


def timed(f: Callable[[], T]) -> tuple[T, float]:
  """What f gives, and its CPU seconds."""
  begun = time.process_time()
  return f(), time.process_time() - begun


def line(shape: Shape, repeats: int) -> str:
  from sklearn import cluster, exceptions

  def ours(points: np.ndarray, seed: int, iterations: int, seeding: str = "distance") -> kmeans.Clustering:
    settings = kmeans.Settings(shape.k, iterations, seeding, tolerance=1e-4 if iterations == ITERATIONS else 0.0)
    return kmeans.fit(points, settings, (seed, 0))

  ratios, random, costs, times = [], [], [], []
  ours(shape.points(0), 0, 1)  # compiles
  for seed in range(repeats):
    points = shape.points(seed)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
      means = cluster.KMeans(shape.k, max_iter=ITERATIONS, random_state=seed)
      theirs, their_time = timed(lambda: means.fit(points).inertia_)  # called at once
    found, our_time = timed(lambda: ours(points, seed, ITERATIONS))
    ratios.append(found.report["inertia_final"] / theirs)
    times.append(our_time / their_time)
    random.append(ours(points, seed, ITERATIONS, "random").report["inertia_final"] / theirs)
    # Without iterations there are seeds and one pass for the labels, as long as an iteration.
    none = timed(lambda: ours(points, seed, 0))[1]
    many, time_of_many = timed(lambda: ours(points, seed, 10))
    costs.append((none / max(time_of_many - none, 1e-9)) * many.report["iterations"] - 1)
  assert np.mean(ratios) <= 1.05, f"inertia over 1.05 times that of scikit-learn: {ratios}"
  name = f"{shape.kind}: {shape.n:,} x {shape.d} -> {shape.k:,}"
  cost = f"{np.median(costs):.1f} iterations"
  return (
    f"{name:34} {np.mean(ratios):13.3f} {max(ratios):6.3f} {np.mean(random):7.3f} {cost:>15} {np.median(times):6.2f}"
  )


if __name__ == "__main__":
  main()
