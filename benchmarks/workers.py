"""What the benchmarks over seeds share: several processes, each on a core of its own, take the seeds among them."""

import os
import subprocess
import sys
from typing import Any


def seeds(text: str) -> list[int]:
  """The seeds that a flag names, such as 100-109 or 3,5."""
  low, dash, high = text.partition("-")
  return list(range(int(low), int(high) + 1)) if dash else [int(seed) for seed in text.split(",")]


def share(module: str, count: int) -> None:
  """Starts the command once more for every worker, and waits for all of them."""
  command = [sys.executable, "-m", module, *sys.argv[1:]]
  started = [subprocess.Popen([*command, f"--worker={i}"]) for i in range(count)]
  if any(process.wait() for process in started):
    sys.exit("a worker failed; the same command goes on")


def mine(flags: Any, seed: int) -> bool:
  """Whether a seed is this worker's, or there is one worker."""
  return flags.worker is None or seeds(flags.seeds).index(seed) % flags.workers == flags.worker


def begin(worker: int | None) -> None:
  """Gives a worker its core, before the first array: JAX counts the cores then."""
  if worker is not None and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
  os.environ |= {"TQDM_DISABLE": "1"}
