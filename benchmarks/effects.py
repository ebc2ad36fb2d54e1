"""Does the paper show on the miniature world? Every effect over pipeline seeds and base models, in pairs.

  python -m alma_jax.mini.pretrain --seed=2 --out=runs/base_2          another base; use it if it is fit to ship
  python -m benchmarks.effects run --workdir=runs/effects [--seeds=100-109] [--bases=shipped,runs/base_2] [--parts=...]
  python -m benchmarks.effects table                                   from the committed results alone
  python -m benchmarks.effects figures                                 likewise: docs/effects_*.svg

`run` prints a plan of its time and makes what `benchmarks/results/` lacks: a small JSON file for each base, seed and
arm. It goes on where it was stopped; with --workers=2 two processes share the seeds, each on a core of its own. A seed
changes the human data, the order of training and everything drawn. Everything is graded by the ground truth on the
2,304 prompts of `mini.seeds.results_prompts`, which no setting was chosen on.

The parts and their place in the paper:
  growth       base 3-shot, initial SFT, rounds 6 and 10                          Figure 2
  prompts      diverse against random prompts after rounds 6 and 10               Table 4
  judges       pairs in the right order                                           Table 3
  samples      the judge's choice among N, by how samples are truncated           Figure 3
  checkpoints  who writes the responses                                           Table 5
  budget       N against K against rounds at equal N x K x R                      Table 6
  dpo          DPO, and without its NLL term                                      Table 7
  control      no judge: a random response

Not among the default parts:
  grpo         not in the paper: policy gradients on the latest model's responses
  density      what the effect of prompts rests on: another pooling; and other worlds, see below

A base of another world goes apart from the others: `pretrain --chatter=all` has chatter around rare prompts, too, and
`--chatter=front` in front of the dense kind's alone. Run the parts growth and prompts with it.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import workers
from benchmarks.effects_arms import ARMS, CONTROLS, Arm, Base, keep, make, result_path

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results"
JUDGES = "judges"  # the result that is no arm
PARTS = {
  "growth": ("default",),
  "prompts": ("default", "random_prompts"),
  "judges": ("default", JUDGES),
  "samples": ("default", JUDGES),
  "checkpoints": ("default", "latest_only", "two_sft_only", "one_sft_only"),
  "budget": ("default", "more_n", "more_k", "fewer_rounds"),
  "dpo": ("default", "dpo", "dpo_without_nll"),
  "control": ("default", "no_judge"),
  "grpo": ("default", "grpo"),
  "density": tuple(arm.name for arm in CONTROLS),
}
MAIN = tuple(part for part in PARTS if part not in ("density", "grpo"))
GUESS = 60.0  # CPU seconds of a result that nothing is known about


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("run", "plan", "table", "figures"))
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/effects"))
  parser.add_argument("--seeds", default="100-109", help="such as 100-109 or 3,5")
  parser.add_argument("--bases", default="shipped", help="'shipped', or directories that pretrain wrote")
  parser.add_argument("--parts", default=",".join(MAIN), help=", ".join(PARTS))
  parser.add_argument("--size", default="mini_paper")
  parser.add_argument("--workers", type=int, default=1, help="processes, each on a core of its own")
  parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.what == "table":
    from benchmarks import effects_tables

    effects_tables.show(RESULTS / flags.size)
    return
  if flags.what == "figures":
    from benchmarks import effects_figures

    print(*effects_figures.save(RESULTS / flags.size, ROOT.parent / "docs"), sep="\n")
    return
  todo = list(missing(flags))
  if flags.worker is None:
    plan(flags, todo)
  if flags.what == "run":
    work(flags, todo) if flags.workers == 1 or flags.worker is not None else workers.share(
      "benchmarks.effects", flags.workers
    )


def bases(names: str) -> list[Base]:
  """The bases that --bases names. A directory's name is the base's."""
  from alma_jax.mini import CHECKPOINT, PRETRAINED

  found = []
  for name in names.split(","):
    place = CHECKPOINT if name == "shipped" else pathlib.Path(name)
    if not (place / PRETRAINED).is_file():
      sys.exit(f"error: {name} holds no base model with its samples; python -m alma_jax.mini.pretrain --out={name}")
    chatter = json.loads((place / PRETRAINED).read_text())["chatter"]
    found.append(Base("shipped" if place == CHECKPOINT else place.name, place, chatter))
  return found


def wanted(parts: str) -> list[str]:
  """The names of the results that these parts need, each once, the default first."""
  return list(dict.fromkeys(name for part in parts.split(",") for name in PARTS[part]))


def missing(flags: Any) -> Iterator[tuple[Base, int, str]]:
  """What is to be made: for every seed and base the results that are not there."""
  for seed in workers.seeds(flags.seeds):
    for base in bases(flags.bases):
      for name in wanted(flags.parts):
        if not result_path(RESULTS / flags.size, base, seed, name).exists():
          yield base, seed, name


def plan(flags: Any, todo: Sequence[tuple[Base, int, str]]) -> None:
  """Says what is to be made and how long that takes, by the CPU seconds of what was made before."""
  spent: dict[str, list[float]] = {}
  for path in (RESULTS / flags.size).glob("*.json"):
    found = json.loads(path.read_text())
    spent.setdefault(found["arm"], []).append(found["cpu_seconds"])
  costs = {name: sum(x) / len(x) for name, x in spent.items()}
  known = sum(costs.values()) / len(costs) if costs else GUESS
  total = sum(costs.get(name, known) for _, _, name in todo)
  print(f"{len(todo)} results to make, about {total / 60:.0f} CPU minutes, {total / 60 / flags.workers:.0f} minutes")
  for name in wanted(flags.parts):
    count = sum(name == n for _, _, n in todo)
    print(f"  {name:20} {count:4} x {costs.get(name, known):5.0f} CPU s{'' if name in costs else ' (a guess)'}")


def work(flags: Any, todo: Sequence[tuple[Base, int, str]]) -> None:
  """Makes what is missing, or a worker's share of it: its own seeds, in one warm process on one core."""
  workers.begin(flags.worker)
  mine = [x for x in todo if workers.mine(flags, x[1])]
  arms = {arm.name: arm for arm in (*ARMS, *CONTROLS)}
  for i, (base, seed, name) in enumerate(mine, start=1):
    began, place = time.monotonic(), flags.workdir / f"{base.name}_{seed:02d}"
    found = one(arms.get(name), base, seed, place, flags.size)
    about = {"base": base.name, "seed": seed, "arm": name, "size": flags.size}
    about |= {} if base.chatter == "dense" else {"chatter": base.chatter}
    keep(result_path(RESULTS / flags.size, base, seed, name), about | found)
    print(f"{i}/{len(mine)}  {base.name} seed {seed} {name}: {time.monotonic() - began:.0f} s", flush=True)


def one(arm: Arm | None, base: Base, seed: int, place: pathlib.Path, size: str) -> dict[str, Any]:
  """The result of an arm, or, for None, of the judges."""
  if arm is not None:
    return make(arm, base, seed, place, size)
  from benchmarks import effects_judges

  return effects_judges.measured(base, seed, place, size)


if __name__ == "__main__":
  main()
