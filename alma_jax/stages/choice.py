"""Which epoch's model a run goes on with, by what the models write: LIMA finds that the loss does not tell.

A judge grades each epoch's answers, or compares them with those of the epoch before; or a person does, through a form
(judges/human.py). The loss stands beside, with the epoch that it would have chosen. Of epochs that are equally good the
earliest is taken.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from alma_jax import names
from alma_jax.judges import human, pairwise
from alma_jax.judges.contract import Answered, check_missing
from alma_jax.options import Checked, fingerprint, option, refuse
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.records import Answer, EpochGrade, Grade
from alma_jax.store.runs import Artefact, Stage
from alma_jax.store.statistics import Mean

OWN = "own"  # the judge that the config's section `judge` describes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  # "human": a form; "own": the judge of the section `judge`; or a judge as of names.EVALUATORS
  judge: str = human.HUMAN
  pairwise: bool = False  # each epoch's answers are compared with those of the epoch before, not graded
  margin: float = option(0.0, least=0)  # pairwise: scores that differ by at most this are a tie
  first: int = option(5, least=1)  # of the epochs to choose from
  last: int = option(10, least=1)
  prompts: int = option(50, least=0)  # of data.eval, set apart to choose by; 0: all of them

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.judge not in (human.HUMAN, OWN):
      names.check(names.EVALUATORS, self.judge, "judge")
    if self.first > self.last:
      refuse("first", self.first, f"must be at most last, which is {self.last}")


@dataclasses.dataclass(frozen=True)
class Epoch:
  """What is known of the model that an epoch ended with."""

  checkpoint: Checkpoint
  answers: Artefact[Answer]
  grades: Artefact[Grade] | None  # by the judge that chooses; None where a person does, or a judge of pairs
  loss: Mean | None


@dataclasses.dataclass(frozen=True)
class Choice:
  epoch: int
  checkpoint: Checkpoint


def build(
  s: Session[Any], epochs: Mapping[int, Epoch], options: Options, judge: pairwise.PairJudge | None = None
) -> Choice:
  """The epoch whose answers are best, with all numbers in the stage `choice`. `judge` compares, if `pairwise` is set
  and no person does."""
  inputs: dict[str, Any] = {f"answers of epoch {e}": epoch.answers for e, epoch in epochs.items()}
  inputs |= {f"grades of epoch {e}": epoch.grades for e, epoch in epochs.items() if epoch.grades}
  fields = {
    "config": fingerprint(options),
    "judge": judge.identity if judge else None,
    "loss": {str(e): epoch.loss.value if epoch.loss else None for e, epoch in epochs.items()},
  }
  stage = s.run.stage(layout.CHOICE, fields, inputs)
  if not stage.done:
    facts: dict[str, Any] = {}
    if options.judge == human.HUMAN or s.run.process == 0:  # an endpoint is asked by one host
      values = _chain(s, stage, epochs, options, judge) if options.pairwise else _grades(s, stage, epochs, options)
      records = [EpochGrade(e, prompt, value) for e, of in values.items() for prompt, value in of.items()]
      if stage.mine(1):
        stage.write_part(0, 1, records, EpochGrade)
      found = table(values, {e: epoch.loss for e, epoch in epochs.items()})
      by = judge.identity if judge else _identity(epochs, options)
      facts = dict(epoch=best(found), by=by, pairwise=options.pairwise, epochs=found, by_loss=_lowest(found))
    stage.finish(**facts)
    chosen, by = stage.manifest["epoch"], stage.manifest["by"]
    s.display.say(f"{stage.name}: epoch {chosen} of {', '.join(map(str, epochs))}, by {by}")
  epoch = stage.manifest["epoch"]
  return Choice(epoch, epochs[epoch].checkpoint)


def table(values: Mapping[int, Mapping[str, float]], losses: Mapping[int, Mean | None]) -> list[dict[str, Any]]:
  """The mean value of every epoch, and its loss."""
  found = []
  for epoch, by_prompt in values.items():
    mean, loss = statistics.mean(list(by_prompt.values())), losses[epoch]
    row: dict[str, Any] = {"epoch": epoch, "mean": mean and mean.value, "ci95": mean and mean.ci95, "n": len(by_prompt)}
    found.append(row | {"loss": loss and loss.value, "loss_ci95": loss and loss.ci95})
  return found


def best(found: list[dict[str, Any]]) -> int:
  """The epoch with the highest mean, the earliest of several; sums of the same values may differ in the last bits."""
  return max((round(row["mean"], 9), -row["epoch"], row["epoch"]) for row in found if row["mean"] is not None)[2]


def _lowest(found: list[dict[str, Any]]) -> int | None:
  return min(((row["loss"], row["epoch"]) for row in found if row["loss"] is not None), default=(0.0, None))[1]


def _identity(epochs: Mapping[int, Epoch], options: Options) -> str:
  first = next(iter(epochs.values())).grades
  return first.manifest["judge"]["identity"] if first else f"a person, {options.judge}"


def _grades(
  s: Session[Any], stage: Stage, epochs: Mapping[int, Epoch], options: Options
) -> dict[int, dict[str, float]]:
  """By epoch the mean grade of the answers to each prompt."""
  if options.judge != human.HUMAN:
    return {
      e: _by_prompt([(row.prompt_id, row.score) for row in epoch.grades.read() if row.score is not None])
      for e, epoch in epochs.items()
      if epoch.grades
    }
  rows = [(e, row) for e, epoch in epochs.items() for row in epoch.answers.read()]
  given = human.graded(s, stage, layout.CHOICE, [(human.shown(row.messages), row.response) for _, row in rows])
  graded = list(zip(rows, given, strict=True))
  return {e: _by_prompt([(row.prompt_id, grade) for (at, row), grade in graded if at == e]) for e in epochs}


def _by_prompt(graded: list[tuple[str, float]]) -> dict[str, float]:
  found: dict[str, list[float]] = {}
  for prompt, score in graded:
    found.setdefault(prompt, []).append(score)
  return {prompt: float(np.mean(of)) for prompt, of in found.items()}


def _chain(
  s: Session[Any], stage: Stage, epochs: Mapping[int, Epoch], options: Options, judge: pairwise.PairJudge | None
) -> dict[int, dict[str, float]]:
  """By epoch the sum, over the steps to it, of the share of the win less a half. The first epoch has 0; a prompt for
  which a verdict is missing counts nowhere.

     epoch 5 -> 6: won, 1       6 -> 7: tie, 0.5       values 0, 0.5, 0.5
  """
  order = list(epochs)
  steps = [
    (e, mine, theirs)
    for before, e in itertools.pairwise(order)
    for mine, theirs in zip(epochs[e].answers.read(), epochs[before].answers.read(), strict=True)
  ]
  if judge is None:
    pairs = [human.Pair(human.shown(mine.messages), mine.response, theirs.response) for _, mine, theirs in steps]
    shares: list[float | None] = list(human.compared(s, stage, layout.CHOICE, pairs))
  else:
    with s.display.bar(stage.name, len(steps), "pairs") as bar:
      shares = judge.shares([pairwise.Contest(answered(mine), answered(theirs)) for _, mine, theirs in steps], bar)
    check_missing(judge.identity, sum(share is None for share in shares), len(shares))
  lost = {mine.prompt_id for (_, mine, _), share in zip(steps, shares, strict=True) if share is None}
  prompts = [row.prompt_id for row in epochs[order[0]].answers.read() if row.prompt_id not in lost]
  found = {order[0]: dict.fromkeys(prompts, 0.0)}
  for before, e in itertools.pairwise(order):
    won = _by_prompt(
      [(mine.prompt_id, x) for (at, mine, _), x in zip(steps, shares, strict=True) if at == e and x is not None]
    )
    found[e] = {prompt: found[before][prompt] + won[prompt] - 0.5 for prompt in found[before]}
  return found


def answered(row: Answer) -> Answered:
  return Answered(row.messages, row.response, row.finished, f"evaluation prompt {row.prompt_id}")
