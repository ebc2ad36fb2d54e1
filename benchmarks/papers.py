"""Do LIMA, ISARA and SPA show on the miniature world? Each paper's claims over pipeline seeds, in pairs.

  python -m benchmarks.papers run --paper=spa --workdir=runs/papers [--seeds=300-309] [--arms=...] [--workers=2]
  python -m benchmarks.papers table --paper=spa                      from the committed results alone

`run` makes what `benchmarks/results/PAPER/` lacks: a small JSON file for each seed and arm, an arm being a run of
`configs/PAPER.py:mini` with a few values changed. It goes on where it was stopped; with --workers=2 two processes share
the seeds, each on a core of its own. A seed changes the human data, the order of training and everything drawn.
Everything is graded by the ground truth, on prompts that no setting was chosen on.
"""

import argparse
import contextlib
import importlib
import io
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import workers
from benchmarks.effects_arms import keep
from benchmarks.effects_tables import line, mean_line, summary
from benchmarks.papers_arms import PAPERS, Arm, Numbers, Paper

RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("run", "table"))
  parser.add_argument("--paper", choices=PAPERS, required=True)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/papers"))
  parser.add_argument("--seeds", default="300-309", help="such as 300-309 or 3,5")
  parser.add_argument("--arms", default="", help="some of the paper's arms; all by default")
  parser.add_argument("--workers", type=int, default=1, help="processes, each on a core of its own")
  parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  paper, results = PAPERS[flags.paper], RESULTS / flags.paper
  arms = [paper.arm(name) for name in flags.arms.split(",")] if flags.arms else list(paper.arms)
  if flags.what == "table":
    table(paper, results)
  elif flags.workers > 1 and flags.worker is None:
    workers.share("benchmarks.papers", flags.workers)
  else:
    workers.begin(flags.worker)
    for seed in (seed for seed in workers.seeds(flags.seeds) if workers.mine(flags, seed)):
      for arm in arms:
        path = results / f"{seed}_{arm.name}.json"
        if not path.exists():
          began = time.process_time()
          numbers = make(paper, arm, seed, flags.workdir / flags.paper / str(seed))
          spent = round(time.process_time() - began, 1)
          keep(path, {"seed": seed, "arm": arm.name, "cpu_seconds": spent, "numbers": numbers})
          print(f"seed {seed} {arm.name}: {spent:.0f} CPU s", flush=True)


def make(paper: Paper, arm: Arm, seed: int, work: pathlib.Path) -> Numbers:
  """Runs the arm in `work`, beside the other arms of the seed, and returns its numbers."""
  from alma_jax import start
  from alma_jax.mini import seeds

  place, like = work / arm.name, work / arm.like
  config = arm.config(importlib.import_module(f"configs.{paper.name}").get_config)
  config.seed = seed
  if config.data.eval == "mini":
    results = [{"prompt": prompt} for prompt, _ in seeds.results_prompts()]
    config.data.eval = str(seeds.write(work / "data", {"results": results})["results"])
  if arm.like and like.is_dir() and not place.exists():
    part = work / f"{arm.name}.part"  # all of them or none, however this ends
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in paper.shared:
      if (like / name).is_dir():
        shutil.copytree(like / name, part / name)
    part.rename(place)
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    status = start.run(config, str(place))
  if status:
    sys.exit(f"{said.getvalue()}\n{place}: the run ended with status {status}")
  return paper.measured(place, config)


def load(results: pathlib.Path) -> dict[str, dict[int, Numbers]]:
  """The numbers that are kept, by arm and seed."""
  found: dict[str, dict[int, Numbers]] = {}
  for path in sorted(results.glob("*.json")):
    kept = json.loads(path.read_text())
    found.setdefault(kept["arm"], {})[kept["seed"]] = kept["numbers"]
  return found


def table(paper: Paper, results: pathlib.Path) -> None:
  """Prints the paper's claims, then the numbers of every arm."""
  found = load(results)
  if not found:
    sys.exit(f"{results} holds no results; make some: python -m benchmarks.papers run --paper={paper.name}")
  print("n, mean +- t over seeds, seeds above 0, smallest difference that is found 8 times in 10, and what that says")
  for row in paper.rows:
    if values := paired(found, row.left, row.right):
      print(line(row.what, summary(np.array(values) - row.less), row.paper, row.digits))
  for arm, by_seed in found.items():
    told = list(by_seed.values())
    print(f"\n{arm}, {len(told)} seeds")
    for name in told[0]:
      print(f"  {name:40} {mean_line([numbers[name] for numbers in told if name in numbers], 3)}")


Place = tuple[str, str]  # an arm, and one of its numbers


def paired(found: Mapping[str, Mapping[int, Numbers]], left: Place, right: Place | None) -> Sequence[float]:
  """The differences of two numbers, or one number, of the seeds that have both."""

  def value(place: Place | None, seed: int) -> float | None:
    return 0.0 if place is None else found.get(place[0], {}).get(seed, {}).get(place[1])

  pairs = [(value(left, seed), value(right, seed)) for seed in found.get(left[0], {})]
  return [a - b for a, b in pairs if a is not None and b is not None]


if __name__ == "__main__":
  main()
