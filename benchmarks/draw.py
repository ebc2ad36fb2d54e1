"""The time and memory of drawing rounds of prompts from clusters at any size, with asserted counts.

  python -m benchmarks.draw [--prompts=10000000] [--clusters=100000] [--rounds=10] [--draw=5000]
  python -m benchmarks.draw --prompts=100000000 --clusters=1000000 --draw=50000    # the paper's sizes; 3 GB of memory

Cluster sizes are Pareto-distributed, their median 0.4 of the mean, and rows stand in random order. The script prints
process time of one thread and the process's peak memory; 12 bytes per prompt of that are its labels and ids. It ends
with an AssertionError where a queue is not sorted, a prompt is drawn twice, or the number of different clusters is more
than four standard deviations from that of independent draws.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from alma_jax.corpus import draw

CHUNK = 2**22
T = TypeVar("T")


def main() -> None:
  flags = argparse.ArgumentParser(description="How long does a round's draw take, and is it what it should be?")
  for name, value in dict(prompts=10_000_000, clusters=100_000, rounds=10, draw=5_000).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  labels, ids = world(flags.prompts, flags.clusters)
  print("\n".join(measured(labels, ids, flags.rounds, flags.draw)))


def world(n: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
  """The labels and ids of n prompts: cluster sizes are Pareto-distributed, rows in random order, ids all different."""
  rng = np.random.default_rng(0)
  weights = 1 + rng.pareto(1.3, clusters)
  edges = np.round(np.cumsum(weights) / weights.sum() * n).astype(np.int64)
  labels = np.repeat(np.arange(clusters, dtype=np.int32), np.diff(edges, prepend=0))
  rng.shuffle(labels)
  ids = np.empty(n, np.uint64)
  for start in range(0, n, CHUNK):
    ids[start : start + CHUNK] = draw.hashed(7, 7, np.arange(start, min(n, start + CHUNK)))
  return labels, ids


def measured(labels: np.ndarray, ids: np.ndarray, rounds: int, k: int) -> Iterator[str]:
  """Yields the lines of the report; every count in it is checked."""
  sizes, before = np.bincount(labels), memory()
  queues, seconds = timed(lambda: draw.build(labels, ids, 0))
  yield f"{len(ids):,} prompts in {len(sizes):,} clusters: median {np.median(sizes):g}, largest {sizes.max():,}"
  yield f"queues: {seconds:.2f} s, {memory():.2f} GB of memory at most ({before:.2f} before)"
  assert_sorted(queues, ids)
  yield f"{f'{rounds} rounds of {k:,}':24} {'s per round':>14} {'prompts':>10} {'clusters':>10}   expected"
  chances = {
    "diverse, round": permuted(sizes, rounds, k),
    "diverse, fresh": (min(rounds * k, np.count_nonzero(sizes)), 0.0),
    "random": scattered(sizes, rounds * k),
    "proportional": None,
  }
  for name, chance in chances.items():
    method, _, coverage = name.partition(", ")
    used, took = np.empty(0, np.int64), []
    for round in range(rounds):
      rows, seconds = timed(lambda: draw.draw(queues, used, k, round, method, coverage or "round"))
      used, took = np.append(used, rows), [*took, seconds]
      if name == "proportional":
        assert_shares(np.bincount(labels[rows], minlength=len(sizes)), sizes / len(ids) * k)
    clusters = len(np.unique(labels[used]))
    assert len(np.unique(used)) == rounds * k, f"{name}: a prompt was drawn twice"
    assert chance is None or abs(clusters - chance[0]) <= 4 * chance[1], f"{name}: {clusters} clusters, not {chance}"
    told = f"{chance[0]:,.0f} +- {chance[1]:.0f}" if chance else "each its share +- 3"
    yield f"  {name:22} {f'{min(took):.3f} - {max(took):.3f}':>14} {len(used):10,} {clusters:10,}   {told}"


def assert_sorted(queues: draw.Queues, ids: np.ndarray) -> None:
  """Checks that each row stands in the queues once, sorted by cluster, then by the hash of its id."""
  order, last = queues.order, (-1, 0)
  for start in range(0, len(order), CHUNK):
    rows = order[start : start + CHUNK]
    labels, hashes = queues.labels[rows].astype(np.int64), draw.hashed(0, draw.MEMBERS, ids[rows])
    labels, hashes = np.append(last[0], labels), np.append(np.uint64(last[1]), hashes)
    # Strictly ascending: no row stands there twice, so none is missing.
    assert ((labels[1:] > labels[:-1]) | (labels[1:] == labels[:-1]) & (hashes[1:] > hashes[:-1])).all()
    last = labels[-1], hashes[-1]
  assert (queues.sizes == np.bincount(queues.labels)).all()


def assert_shares(found: np.ndarray, share: np.ndarray) -> None:
  worst = np.abs(found - share).max()
  assert worst <= 3, f"proportional: a cluster is {worst:.1f} off its share"


def permuted(sizes: np.ndarray, rounds: int, k: int) -> tuple[float, float]:
  """Mean and deviation of the number of clusters drawn at least once, if each round draws k without replacement."""
  n = np.count_nonzero(sizes)
  out, both = (1 - k / n) ** rounds, ((n - k) * (n - k - 1) / (n * (n - 1))) ** rounds
  return n * (1 - out), math.sqrt(max(0.0, n * out * (1 - out) + n * (n - 1) * (both - out**2)))


def scattered(sizes: np.ndarray, k: int) -> tuple[float, float]:
  """The same for k prompts drawn from all, whatever their clusters; the deviation is an upper bound."""
  out = (1 - k / sizes.sum()) ** sizes
  return (1 - out).sum(), math.sqrt((out * (1 - out)).sum())


def timed(work: Callable[[], T]) -> tuple[T, float]:
  """What `work` returns, and the seconds of process time it took."""
  start = time.process_time()
  result = work()
  return result, time.process_time() - start


def memory() -> float:
  """The process's peak memory in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
  main()
