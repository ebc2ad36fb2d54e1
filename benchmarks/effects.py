"""Does the paper show on the miniature world? Every effect over several pipeline seeds, with intervals.

  python -m benchmarks.effects --workdir=runs/effects [--seeds=0,1,2] [--parts=rounds,judge,best_of_n,variants]

The comparisons, and their place in the paper:
  rounds      base 3-shot, initial SFT and every round                                         (Figure 2)
  judge       pairwise accuracy of five judges on pairs of sampled responses (T = 1)           (Table 3)
  best_of_n   the judge's choice among n samples, scored by the ground truth                   (Figure 3)
  variants    after round 6: random prompts, other checkpoints, DPO, no judge                  (Tables 4, 5, 7, control)

Every seed changes the human data, the order of training and everything drawn; the base model and the evaluation prompts
stay. Runs are ordinary run directories and resume; a variant starts from the finished early stages of the main run.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from alma_jax.store import layout, statistics

VARIANTS = {
  "default": (),
  "random prompts (T4)": ("draw.method=random",),
  "latest only (T5)": ("responses.checkpoints=('latest',)",),
  "two SFT only (T5)": ("responses.checkpoints=('sft',)",),
  "one SFT only (T5)": ("responses.checkpoints=('sft_1',)",),
  "DPO (T7)": ("trainset.method=dpo",),
  "GRPO": ("trainset.method=grpo", "responses.checkpoints=('latest',)"),
  "integer judge": ("judge.mode=integer",),
  "no judge (random response)": ("trainset.method=random",),
}
ROUND = 6  # where the variants are compared
EARLY = (layout.SEEDS, layout.POOL, layout.JUDGE, layout.DISTILLED, *map(layout.sft_name, (1, 2)), layout.round_name(1))


@dataclasses.dataclass(frozen=True)
class Graded:
  """An answer with its ground truth."""

  text: str
  truth: float
  finished: bool


@dataclasses.dataclass(frozen=True)
class Asked:
  """A prompt and its answers."""

  messages: Any
  answers: list[Graded]


class Found(TypedDict, total=False):
  """What is measured in one run, as measured.json holds it."""

  judge: dict[str, dict[str, float]]  # of each judge: pairs, strict, half, ties
  best_of_n: dict[str, list[float]]  # n -> ground truth of the judge's choice, and of the truly best


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--parts", default="rounds,judge,best_of_n,variants")
  flags = parser.parse_args()
  workdir, seeds = pathlib.Path(flags.workdir), [int(s) for s in flags.seeds.split(",")]
  mains = [run(workdir / f"seed_{seed}", f"seed={seed}") for seed in seeds]
  parts = flags.parts.split(",")
  if "rounds" in parts:
    rounds_table(mains)
  if "judge" in parts or "best_of_n" in parts:
    found = [measure(directory, seed, parts) for directory, seed in zip(mains, seeds, strict=True)]
    judge_table([f["judge"] for f in found if "judge" in f])
    best_of_n_table([f["best_of_n"] for f in found if "best_of_n" in f])
  if "variants" in parts:
    variants_table(workdir, mains, seeds)


def run(directory: pathlib.Path, *values: str) -> pathlib.Path:
  """The directory of a run of the default config with these values; a finished run is not made again."""
  command = [
    sys.executable, "-m", "alma_jax.main", "--config=configs/alma.py:mini", f"--workdir={directory}",
    *(f"--config.{value}" for value in values),
  ]  # fmt: skip
  done = subprocess.run(command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True)
  if done.returncode:
    sys.exit(done.stdout + done.stderr)
  return directory


def scores(directory: pathlib.Path) -> dict[int, float]:
  """The score by the world's oracle, by round."""
  return {int(row["round"]): float(row["truth"]) for row in layout.progress(directory)}


def rounds_table(mains: Sequence[pathlib.Path]) -> None:
  table = [scores(directory) for directory in mains]

  def mean(t: dict[int, float], rounds: tuple[int, ...]) -> float:
    return float(np.mean([t[r] for r in rounds]))

  print(f"\nScore by round (0..10, ground truth, {len(table)} pipeline seeds; round 0 is the base model with 3 shots)")
  for r in sorted(table[0]):
    print(
      f"  round {r:2d}   " + "  ".join(f"{t[r]:5.2f}" for t in table) + f"   mean {interval([t[r] for t in table])}"
    )
  last = max(table[0])
  for name, values in (
    ("initial SFT minus base", [t[1] - t[0] for t in table]),
    (f"round {last} minus initial SFT", [t[last] - t[1] for t in table]),
    ("mean of rounds 8-10 minus mean of 2-4", [mean(t, (8, 9, 10)) - mean(t, (2, 3, 4)) for t in table]),
  ):  # fmt: skip
    print(f"  {name:40} " + "  ".join(f"{v:+5.2f}" for v in values) + f"   mean {interval(values)}")


def measure(directory: pathlib.Path, seed: int, parts: Sequence[str]) -> Found:
  """Judge accuracy and best-of-n curves of one finished run; kept in measured.json in its directory."""
  path = directory / "measured.json"
  if path.exists():
    return json.loads(path.read_text())
  from alma_jax import start
  from alma_jax.runtime.host import Checkpoint
  from alma_jax.stages import data as human
  from alma_jax.stages import judge, policy
  from configs.alma import get_config

  config = get_config("mini")
  config.seed = seed
  with start.open_session(config, directory) as session:
    o = session.options
    data = human.build(session, o.data)
    jobs = [policy.Job(layout.sft_name(i), session.base, o.sft, s) for i, s in enumerate(o.sft_seeds, start=1)]
    sft = [policy.sft(session, job, data) for job in jobs]
    tuned, few_shot = judge.finetuned(session, data, o.judge), judge.few_shot(session, data, o.judge)
    model = directory / layout.DISTILLED / layout.MODEL  # measured whether it was accepted or not
    distilled = dataclasses.replace(tuned, checkpoint=Checkpoint(layout.DISTILLED, model, f"distilled {seed}"))
    judges = {
      "fine-tuned, real-valued, self-distilled": distilled,
      "fine-tuned, real-valued": tuned,
      "fine-tuned, integer": dataclasses.replace(tuned, mode="integer"),
      "base 3-shot, real-valued": few_shot,
      "base 3-shot, integer": dataclasses.replace(few_shot, mode="integer"),
    }
    found: Found = {}
    if "judge" in parts:
      asked = sampled(session, sft, data.eval, each=1, temperature=1.0)
      base = answered_by_base(session, data)
      asked = [Asked(a.messages, [*a.answers, by_base]) for a, by_base in zip(asked, base, strict=True)]
      found["judge"] = {name: accuracy(judge_, asked) for name, judge_ in judges.items()}
    if "best_of_n" in parts:
      temperature = o.responses.sampling.decoding.temperature
      found["best_of_n"] = best_of_n(distilled, sampled(session, sft, data.eval[::6], 64, temperature))
  path.write_text(json.dumps(found))
  return found


def sampled(
  session: Any, checkpoints: Sequence[Any], rows: Sequence[Any], each: int, temperature: float
) -> list[Asked]:
  """The rows' prompts with `each` answers from every checkpoint."""
  from alma_jax.engine.sample import Request
  from alma_jax.keys import key_of
  from alma_jax.stages.evaluation import Asker

  o = session.options
  options = at_temperature(o.responses.sampling, temperature)
  asker = Asker(session, o.eval.template(), ())
  out = [Asked(row.messages, []) for row in rows]
  prompts = [asker.ids(row) for row in rows for _ in range(each)]
  for checkpoint in checkpoints:
    keys = (key_of(o.seed, "effects", temperature, checkpoint.name, i) for i in range(len(prompts)))
    requests = list(map(Request, prompts, keys))
    for i, graded in enumerate(drafted(session, checkpoint, requests, options, asker, out, each)):
      out[i // each].answers.append(graded)
  return out


def answered_by_base(session: Any, data: Any) -> list[Graded]:
  """One answer of the base model with three examples to every evaluation prompt."""
  from alma_jax.engine.sample import Request
  from alma_jax.keys import key_of
  from alma_jax.stages.evaluation import Asker

  o = session.options
  asker = Asker(session, o.eval.template(), data.sft[: o.eval.shots])
  requests = [Request(asker.ids(row), key_of(o.seed, "effects", "base", i)) for i, row in enumerate(data.eval)]
  asked = [Asked(row.messages, []) for row in data.eval]
  return drafted(session, session.base, requests, at_temperature(o.eval, 1.0), asker, asked)


def at_temperature(options: Any, temperature: float) -> Any:
  """Sampling options with another temperature."""
  return dataclasses.replace(options, decoding=dataclasses.replace(options.decoding, temperature=temperature))


def drafted(
  session: Any,
  checkpoint: Any,
  requests: Sequence[Any],
  options: Any,
  asker: Any,
  asked: Sequence[Asked],
  each: int = 1,
) -> list[Graded]:
  """The checkpoint's answers to the requests, of which `each` belong to a prompt."""
  from alma_jax.mini import world
  from alma_jax.runtime import sampling

  with session.display.bar("effects", len(requests), "answers") as bar:
    found = sampling.drafts(session.host, checkpoint, requests, options, asker.stops, bar)
  prompts = [asked[i // each].messages[-1]["content"] for i in range(len(found))]
  return [
    Graded(d.text, float(world.score(prompt, d.text, d.finished)), d.finished)
    for prompt, d in zip(prompts, found, strict=True)
  ]


def accuracy(judge_: Any, asked: Sequence[Asked]) -> dict[str, float]:
  """The share of pairs of different worth that the judge orders rightly: a tie counts as wrong ("strict"), or half."""
  pairs = [
    (x.messages, a, b)
    for x in asked
    for a, b in itertools.combinations(x.answers, 2)
    if a.truth != b.truth and a.text and b.text
  ]
  first = judged(judge_, [(messages, a) for messages, a, _ in pairs])
  second = judged(judge_, [(messages, b) for messages, _, b in pairs])
  margin = (first - second) * np.sign([a.truth - b.truth for _, a, b in pairs])
  return {
    "pairs": len(pairs),
    "strict": float((margin > 0).mean()),
    "half": float((margin > 0).mean() + (margin == 0).mean() / 2),
    "ties": float((margin == 0).mean()),
  }


def judged(judge_: Any, answers: Sequence[tuple[Any, Graded]]) -> np.ndarray:
  """The judge's scores [answers] of answers to these messages."""
  from alma_jax.judges.contract import Answered

  return np.array([v.score for v in judge_.scores([Answered(messages, a.text, a.finished) for messages, a in answers])])


def best_of_n(judge_: Any, asked: Sequence[Asked]) -> dict[str, list[float]]:
  """The mean ground truth of the judge's choice among n samples, and of the truly best one, by n.

  The samples of a prompt [size] are cut into disjoint groups of n, so that each is used once.
  """
  size = len(asked[0].answers)
  order = np.random.default_rng(0).permutation(size)  # mixes the checkpoints
  told = judged(judge_, [(x.messages, a) for x in asked for a in x.answers]).reshape(len(asked), size)[:, order]
  truth = np.array([[a.truth for a in x.answers] for x in asked])[:, order]
  eligible = np.array([[a.finished and bool(a.text) for a in x.answers] for x in asked])[:, order]
  told = np.where(eligible, told, -1.0)
  out = {}
  for n in (1, 2, 4, 8, 16, 32, 64, 128):
    if n <= size:
      j, t = (x[:, : size // n * n].reshape(-1, n) for x in (told, truth))
      out[str(n)] = [float(t[np.arange(len(t)), j.argmax(axis=1)].mean()), float(t.max(axis=1).mean())]
  return out


def judge_table(found: Sequence[dict[str, dict[str, float]]]) -> None:
  if found:
    print("\nJudge: pairs of answers of both initial models and the base in the right order (strict: a tie is wrong)")
    for name in found[0]:
      strict, half = ([f[name][key] for f in found] for key in ("strict", "half"))
      ties = np.mean([f[name]["ties"] for f in found])
      print(f"  {name:42} strict {interval(strict, 3)}   ties half {interval(half, 3)}   tied {ties:.3f}")
    print(f"  pairs per seed: {[f[name]['pairs'] for f in found]}")


def best_of_n_table(found: Sequence[dict[str, list[float]]]) -> None:
  if found:
    print("\nBest of n: ground truth of the judge's choice, and of the truly best")
    for n in found[0]:
      chosen, best = ([f[n][k] for f in found] for k in (0, 1))
      print(f"  n = {int(n):3d}   judge {interval(chosen)}   truth {interval(best)}")


def variants_table(workdir: pathlib.Path, mains: Sequence[pathlib.Path], seeds: Sequence[int]) -> None:
  print(f"\nVariants: score after round {ROUND}, and minus the same seed's initial SFT")
  for name, values in VARIANTS.items():
    after = []
    for directory, seed in zip(mains, seeds, strict=True):
      if values:
        place = workdir / f"seed_{seed}_{name.partition(' (')[0].replace(' ', '_')}"
        if not place.exists():
          begin(directory, place)
        run(place, f"seed={seed}", f"feedback_rounds={ROUND - 1}", *values)
      else:
        place = directory
      after.append(scores(place))
    gain = [t[ROUND] - t[1] for t in after]
    print(f"  {name:28} " + "  ".join(f"{t[ROUND]:5.2f}" for t in after) + f"   gain {interval(gain)}")


def begin(source: pathlib.Path, place: pathlib.Path) -> None:
  """Copies the stages that come before the rounds into a run directory, so that a variant makes only its rounds."""

  def not_shared(directory: str, names: list[str]) -> list[str]:
    if pathlib.Path(directory) == source:
      return [name for name in names if name not in EARLY]
    return [layout.EVALUATION] if pathlib.Path(directory) == source / layout.round_name(1) else []

  shutil.copytree(source, place, ignore=not_shared)


def interval(values: Sequence[float], digits: int = 2) -> str:
  """The mean +- the half width of its 95 % interval (Student's t over the seeds)."""
  mean = statistics.student(values)
  assert mean, "no seeds"
  return f"{mean.value:.{digits}f}" + ("" if mean.ci95 is None else f" +- {mean.ci95:.{digits}f}")


if __name__ == "__main__":
  main()
