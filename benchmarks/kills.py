"""A run that is killed again and again, against one that is not: the number of files that differ must be 0.

  python -m benchmarks.kills [--kills=50] [--seed=0] [--workdir=DIR] [--straight=RUN] [flags of alma_jax.main]

A reduced miniature run is started, killed at a random moment by SIGKILL, SIGTERM or SIGINT, and started again by the
same command, until it ends; then another one begins, until there were so many kills. Each start is given time to write
at least one file, so that kills fall into all stages; many fall into the middle of a file, a checkpoint or unwinding.
`--straight` is a finished run of the same flags, so that none has to be made. Flags of alma_jax.main (--config.A=...)
replace those of the reduced run.

Compared are all files but logs, times, the report, TensorBoard's events and the configs, which are those of the last
start; of manifests the content that they vouch for, without dates. Exit status 1 if a file differs, or if a start ends
in another way than its signal asks for.
"""

import argparse
import collections
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

from alma_jax.store import layout

os.environ |= {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}

ENDS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}  # signal -> exit status
SPREAD = 3.0  # seconds: a kill comes so long at most after the first file
PATIENCE = 600.0  # for one start
REDUCED = [
  f"--config.{value}"
  for value in (
    "feedback_rounds=2", "prompts.draws=192", "clusters.k=24", "draw.prompts=6", "responses.n=6",
    "judge.distil.prompts=24", "sft.epochs=2.0", "policy.epochs=2.0", "policy.checkpoint_every=4",
    "sft.checkpoint_every=10", "judge.train.epochs=1.0", "data.eval=", "data.held_out=24",
  )
]  # fmt: skip
VOLATILE = {"log.jsonl", "report.html", "speed.jsonl", ".digests.json"}


def main(arguments: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workdir", type=pathlib.Path)
  parser.add_argument("--straight", type=pathlib.Path)
  options, flags = parser.parse_known_args(arguments)
  # Starts are forked from this process, which has imported everything and holds no device yet.
  for module in ("alma_jax.start", "alma_jax.recipes.alma", "transformers.models.auto"):
    importlib.import_module(module)
  workdir = options.workdir or pathlib.Path(tempfile.mkdtemp())
  workdir.mkdir(parents=True, exist_ok=True)
  straight, flags = options.straight or workdir / "straight", flags or REDUCED
  if not options.straight:
    process = begun(straight, flags)
    process.join()
    expect(process.exitcode, 0, straight)
  rng, kills, runs, differing = random.Random(options.seed), collections.Counter(), 0, []
  while kills.total() < options.kills:
    runs += 1
    run = workdir / f"killed_{runs}"
    kills += killed(run, flags, rng, options.kills - kills.total())
    found, wanted = files(run), files(straight)
    differing += [f"{run.name}/{name}" for name in sorted(found.keys() | wanted) if found.get(name) != wanted.get(name)]
    print(f"{run}: {len(wanted)} files, {len(differing)} differ so far, after {kills.total()} kills", flush=True)
  for name in differing:
    print(f"  differs: {name}")
  told = ", ".join(f"{count} {sent}" for sent, count in sorted(kills.items()))
  print(f"{kills.total()} kills ({told}) in {runs} runs: {len(differing)} files differ")
  return bool(differing)


def killed(run: pathlib.Path, flags: Sequence[str], rng: random.Random, most: int) -> collections.Counter[str]:
  """The kills, by signal, of a run that is then finished."""
  kills = collections.Counter()
  while True:
    process = begun(run, flags)
    if kills.total() < most:
      before, deadline = count(run), time.monotonic() + PATIENCE
      while process.is_alive() and count(run) <= before and time.monotonic() < deadline:
        time.sleep(0.02)
      process.join(rng.uniform(0, SPREAD))
      sent = rng.choice(list(ENDS))
      if process.is_alive() and process.pid:
        os.kill(process.pid, sent)
        process.join(PATIENCE)
        if process.exitcode != 0:  # else it had just ended
          expect(process.exitcode, ENDS[sent], run)
          kills[sent.name] += 1
          continue
    process.join()
    expect(process.exitcode, 0, run)
    return kills


def begun(run: pathlib.Path, flags: Sequence[str]) -> BaseProcess:
  """A start of the run in a process of its own."""
  process = multiprocessing.get_context("fork").Process(target=_start, args=(run, flags))
  process.start()
  return process


def _start(run: pathlib.Path, flags: Sequence[str]) -> None:
  output = os.open(f"{run}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  for stream in (1, 2):
    os.dup2(output, stream)
  from alma_jax import main as door

  config = [] if any(flag.startswith("--config=") for flag in flags) else ["--config=configs/alma.py:mini"]
  sys.argv = ["alma_jax.main", *config, f"--workdir={run}", *flags]  # ml_collections reads it
  door.run(sys.argv)


def expect(status: int | None, wanted: int, run: pathlib.Path) -> None:
  if status != wanted:
    sys.exit(f"{run}: a start ended with status {status}, not {wanted}; its output is in {run}.output")


def count(run: pathlib.Path) -> int:
  """The files that are whole; every start of a training begins one for TensorBoard, which is no progress."""
  # os.walk passes over a directory that goes while it is looked at.
  listed = (names for folder, _, names in os.walk(run) if "tensorboard" not in pathlib.Path(folder).parts)
  return sum(not name.startswith(".") for names in listed for name in names)


def files(run: pathlib.Path) -> dict[str, str]:
  """name -> digest of every file that must not depend on when and how often the run was started."""
  found = {}
  for path in sorted(run.rglob("*")):
    name = str(path.relative_to(run))
    if not path.is_file() or path.name in VOLATILE or "tensorboard" in path.parts:
      continue
    if path.name == layout.CONFIG and path.parent.name != layout.MODEL:
      continue
    content = path.read_bytes()
    if path.name == "manifest.json":
      content = json.loads(content)["content"].encode()
    found[name] = hashlib.sha256(content).hexdigest()
  return found


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
