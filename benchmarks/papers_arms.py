"""What `benchmarks.papers` runs and compares: arms of LIMA, ISARA and SPA, their numbers and the papers' claims."""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from alma_jax.store import layout
from benchmarks.effects_arms import trained

Numbers = dict[str, float]
Config = Any


@dataclasses.dataclass(frozen=True)
class Arm:
  """The size mini of a paper with these values."""

  name: str
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  like: str = "default"  # the arm whose first stages it shares; "": none

  def config(self, get_config: Callable[[str], Config]) -> Config:
    c = get_config("mini")
    for name, value in self.values.items():
      section, _, field = name.rpartition(".")
      (c[section] if section else c)[field] = value
    return c


@dataclasses.dataclass(frozen=True)
class Row:
  """A number, or the difference of two, minus `less`; the paper says that it is "above", "equal", or nothing."""

  what: str
  left: tuple[str, str]
  right: tuple[str, str] | None = None
  paper: Literal["above", "equal", ""] = "above"
  less: float = 0.0
  digits: int = 2


@dataclasses.dataclass(frozen=True)
class Paper:
  name: str
  arms: tuple[Arm, ...]
  rows: tuple[Row, ...]
  shared: tuple[str, ...]  # the stages that come first, which arms share
  measured: Callable[[pathlib.Path, Config], Numbers]

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.arms if arm.name == name)


def manifest(run: pathlib.Path, round: int, stage: str) -> dict[str, Any]:
  return layout.load_manifest(run / layout.stage_name(round, stage))


def scores(run: pathlib.Path) -> Numbers:
  """The mean score of each round by the ground truth."""
  return {f"score {row['round']}": float(row["truth"]) for row in layout.progress(run)}


def mean(sums: Mapping[str, float]) -> float:
  return sums["sum"] / sums["n"] if sums["n"] else float("nan")


# LIMA


def lima(run: pathlib.Path, config: Config) -> Numbers:
  """The loss and the grade of the first and the last epoch that may be chosen; the truth of the epoch that answers
  choose, and of the one that the loss would choose, on the other prompts."""
  choice = layout.load_manifest(run / layout.CHOICE)
  first, last = choice["epochs"][0], choice["epochs"][-1]
  numbers = {f"{name} {at['epoch']}": at[name] for at in (first, last) for name in ("loss", "mean")}
  numbers = {name: value for name, value in numbers.items() if value is not None}  # an arm may measure no loss
  chosen, lowest = choice["epoch"], choice.get("by_loss")
  numbers["test"] = tested(run, chosen)
  if lowest is not None:
    if lowest != chosen:
      test(run, config, lowest)
    numbers["test by loss"] = tested(run, lowest)
  return numbers


def test(run: pathlib.Path, config: Config, epoch: int) -> None:
  """Evaluates an epoch that was not chosen on the test prompts."""
  from alma_jax import start
  from alma_jax.recipes import lima as recipe
  from alma_jax.runtime import training
  from alma_jax.stages import data as human
  from alma_jax.stages import evaluation, policy

  with contextlib.redirect_stderr(io.StringIO()), start.open_session(config, run) as s:
    o, data = s.options, human.build(s, s.options.data)
    models = training.by_epoch(policy.sft(s, policy.Job(layout.sft_name(1), s.base, o.sft, o.sft_seed), data))
    tests = recipe.prompt_sets(data, o)[1:]
    evaluation.build(s.at(epoch, o), models[epoch], recipe.made_chooser(s, data, o), data, o.eval, sets=tests)


def tested(run: pathlib.Path, epoch: int) -> float:
  return mean_score(manifest(run, epoch, layout.grades_name(layout.answers_name(layout.TEST_SET))))


def mean_score(grades: Mapping[str, Any]) -> float:
  return grades["counts"]["score"] / grades["counts"]["graded"]


DIALOGUE = {"data.eval": "mini_dialogue", "data.validation_held_out": 0, "eval.max_prompt_tokens": 100}
LIMA = Paper(
  "lima",
  (
    Arm("default", like=""),
    *(
      Arm(of, {"data.sft": f"mini_{of}", "data.validation_held_out": 0}, "")
      for of in ("filtered", "unfiltered", "quantity")
    ),
    Arm("single turns", DIALOGUE, ""),
    Arm("dialogues", {**DIALOGUE, "data.sft": "mini_dialogue"}, ""),
  ),
  (
    Row("loss, epoch 10 - epoch 5", ("default", "loss 10"), ("default", "loss 5"), digits=3),
    Row("grade, epoch 10 - epoch 5", ("default", "mean 10"), ("default", "mean 5")),
    Row("epoch chosen by answers - by loss", ("default", "test"), ("default", "test by loss")),
    Row("the best 48 - 48 of any quality", ("filtered", "test"), ("unfiltered", "test")),
    Row("the best 48 - 192 of any quality", ("filtered", "test"), ("quantity", "test")),
    Row("192 - 48 of any quality", ("quantity", "test"), ("unfiltered", "test"), "equal"),
    Row("with dialogues - without", ("dialogues", "test"), ("single turns", "test")),
  ),
  (),
  lima,
)


# ISARA


def isara(run: pathlib.Path, config: Config) -> Numbers:
  """Scores by round, of seen and unseen categories too; what is kept of the generated pairs, and how much is right."""
  numbers = scores(run)
  last = max(int(row["round"]) for row in layout.progress(run))
  for r in range(1, last + 1):
    at = run / layout.categories_name(r, "truth") / "report.json"
    report = json.loads(at.read_text())
    numbers |= {f"{of} {r}": report[of]["score"]["mean"] for of in ("seen", "unseen") if report.get(of)}
    if r > 1:
      kept = manifest(run, r, layout.TRAINSET)
      numbers |= {f"kept {r}": kept["kept_share"], f"growth {r}": kept["growth"]}
  if last > 1:
    found = trained(run, last).values()
    numbers["right among the kept"] = sum(right for right, _ in found) / sum(n for _, n in found)
  return numbers


ISARA = Paper(
  "isara",
  (
    Arm("default", like=""),
    Arm("one_shot", {"feedback_rounds": 1, "prompts.draws": 1536}),
    Arm("random_shots", {"feedback_rounds": 2, "neighbours.method": "random"}),
    *(
      Arm(kind, {"feedback_rounds": 2, "data.pairs": 8, "categories.seeds": (kind,)}, "")
      for kind in ("country", "food")
    ),
  ),
  (
    Row("SFT on the human pairs - base after examples", ("default", "score 1"), ("default", "score 0"), ""),
    Row("one iteration - SFT on the human pairs", ("default", "score 2"), ("default", "score 1")),
    Row("three iterations - SFT on the human pairs", ("default", "score 4"), ("default", "score 1")),
    Row("three iterations - one of equal size", ("default", "score 4"), ("one_shot", "score 2")),
    Row("nearest - random shots, one iteration", ("default", "score 2"), ("random_shots", "score 2")),
    Row("nearest - random shots, two iterations", ("default", "score 3"), ("random_shots", "score 3")),
    Row("kept share, first - third iteration", ("default", "kept 2"), ("default", "kept 4"), digits=3),
    *(
      Row(f"pairs of {kind}: {of} kinds, two iterations - SFT", (kind, f"{of} 3"), (kind, f"{of} 1"))
      for kind in ("country", "food")
      for of in ("unseen", "seen")
    ),
  ),
  (layout.SEEDS, layout.sft_name(1), layout.round_name(0), layout.round_name(1)),
  isara,
)


# SPA


def spa(run: pathlib.Path, config: Config) -> Numbers:
  """Scores by round; how often the policy's judgement agrees with people's held-out pairs and with the truth, its
  margins, and the lengths of what it prefers."""
  numbers = scores(run)
  for r in range(2, max(int(row["round"]) for row in layout.progress(run)) + 1):
    counts = manifest(run, r, layout.AGREEMENT)["counts"]
    numbers |= {f"{name} {r}": mean(counts[name]) for name in counts if counts[name]["n"]}
    numbers[f"pairs {r}"] = float(manifest(run, r, layout.TRAINSET)["rows"])
  return numbers


PLAIN = {"policy.smoothing": 0.0, "policy.mix": 0.0}
SPA = Paper(
  "spa",
  (
    Arm("default", like=""),
    Arm("previous", {"judge.reference": "previous"}),
    Arm("none", {"judge.reference": "none"}),
    Arm("expansion", PLAIN),
    Arm("refinement", {"policy.mix": 0.0}),
    Arm("token", {"judge.per": "token"}),
    *(
      Arm(f"flipped_{share}{name}", {"seeds.flipped": share / 100, **values}, "")
      for share in (10, 20, 30)
      for name, values in (("", {}), ("_plain", PLAIN))
    ),
  ),
  (
    Row("DPO on people's pairs - SFT", ("default", "score 1"), ("default", "score 0")),
    Row("one iteration - DPO on people's pairs", ("default", "score 2"), ("default", "score 1")),
    Row("two iterations - DPO on people's pairs", ("default", "score 3"), ("default", "score 1")),
    Row("Table 7: SFT model - previous as reference", ("default", "score 3"), ("previous", "score 3")),
    Row("Table 7: SFT model - none as reference", ("default", "score 3"), ("none", "score 3")),
    Row("no reference: two iterations - DPO on people's pairs", ("none", "score 3"), ("none", "score 1"), ""),
    Row("Table 6: expansion - DPO on people's pairs", ("expansion", "score 3"), ("expansion", "score 1")),
    Row("Table 6: self-refinement - expansion", ("refinement", "score 3"), ("expansion", "score 3")),
    Row("Table 6: noise detection - self-refinement", ("default", "score 3"), ("refinement", "score 3")),
    Row("per token - per sequence", ("token", "score 3"), ("default", "score 3"), ""),
    *(
      Row(
        f"{share} % turned: refined - plain",
        (f"flipped_{share}", "score 3"),
        (f"flipped_{share}_plain", "score 3"),
      )
      for share in (10, 20, 30)
    ),
    *(
      Row(f"agreement with {whom} - 1/2, iteration {r - 1}", ("default", f"{of} {r}"), less=0.5, digits=3)
      for of, whom in (("held_out", "people"), ("gold", "the truth"))
      for r in (2, 3)
    ),
    Row("no reference: agreement with the truth - 1/2", ("none", "gold 2"), paper="", less=0.5, digits=3),
  ),
  (layout.SEEDS, layout.sft_name(1), layout.round_name(0), layout.round_name(1)),
  spa,
)

PAPERS = {paper.name: paper for paper in (LIMA, ISARA, SPA)}
