"""The evaluations of a run: who graded its answers, the scores prompt by prompt, and the best round.

read(run, 3).scores["truth"]          [prompts] of round 3, by the judge that the run calls "truth"
best(run).round                       the round that a judge which selects nothing puts first
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alma_jax.report import judged
from alma_jax.store import layout, statistics
from alma_jax.store.statistics import Mean, Wins

CI95 = "_ci95"  # ends the column of a score's interval


@dataclasses.dataclass(frozen=True)
class Answers:
  """A round's answers to one set of prompts, with the grades that are finished."""

  prompts: list[str]  # ids
  scores: dict[str, np.ndarray]  # [prompts] by judge; nan where it gave none
  characters: np.ndarray  # [prompts]


@dataclasses.dataclass(frozen=True)
class Grader:
  name: str
  identity: str
  scale: tuple[float, float] | None
  selects: bool  # its scores choose what is trained on


@dataclasses.dataclass(frozen=True)
class Best:
  """The round with the highest mean score by a judge that selects nothing."""

  by: Grader
  round: int
  score: Mean
  last: int  # the last round that was graded
  ahead: Mean | None  # the best round's score minus the last one's, prompt by prompt; None if they are one

  def in_words(self, step: str = "round") -> str:
    score = f"{self.score.value:.2f} ± {self.score.ci95 or 0:.2f}, n = {self.score.n}"
    head = f"best {step} by {self.by.name}, which selects nothing: {self.round} ({score})"
    if self.ahead is None:
      return f"{head}, the last one"
    differs = "differs from" if self.ahead.value > (self.ahead.ci95 or 0.0) else "cannot be told from"
    return f"{head}; it {differs} the last, {self.last}: {self.ahead.value:+.2f} ± {self.ahead.ci95 or 0:.2f}"


def read(run: pathlib.Path, round: int, chosen: str = layout.MAIN_SET) -> Answers | None:
  """The answers of a round; None until they are finished."""
  stage = run / layout.stage_name(round, layout.answers_name(chosen))
  parts = layout.parts_of(stage)
  if parts is None:
    return None
  prompts, characters = [], [np.zeros(0)]
  for batch in judged.batches(parts, ["prompt_id", "response"]):
    prompts += batch.column("prompt_id").to_pylist()
    characters.append(judged.characters(batch.column("response")))
  scores = {}
  for name in layout.graders(run, round, chosen):
    grades = layout.parts_of(run / layout.grades_name(layout.stage_name(round, layout.answers_name(chosen)), name))
    batches = judged.batches(grades or [], ["score"])
    scores[name] = np.concatenate([np.zeros(0), *(judged.floats(batch.column("score")) for batch in batches)])
  return _by_prompt(Answers(prompts, scores, np.concatenate(characters)))


def _by_prompt(found: Answers) -> Answers:
  """The means over the answers to each prompt, where there are several."""
  ids, code, count = np.unique(np.array(found.prompts, str), return_inverse=True, return_counts=True)
  if len(ids) == len(found.prompts):
    return found
  scores = {}
  for name, of in found.scores.items():
    graded = np.bincount(code, np.isfinite(of), len(ids))
    scores[name] = np.where(graded > 0, np.bincount(code, np.nan_to_num(of), len(ids)) / np.maximum(1, graded), np.nan)
  return Answers(ids.tolist(), scores, np.bincount(code, found.characters, len(ids)) / count)


def difference(these: Answers, those: Answers, judge: str) -> Mean | None:
  """The mean difference of a judge's score over the prompts that both hold."""
  if judge not in these.scores or judge not in those.scores:
    return None
  left, right = (dict(zip(x.prompts, x.scores[judge].tolist(), strict=True)) for x in (these, those))
  return statistics.paired(left, right)


def wins(these: Answers, those: Answers, judge: str) -> Wins | None:
  """How often a judge scores these answers above those, over the prompts that both hold."""
  if judge not in these.scores or judge not in those.scores:
    return None
  left, right = (dict(zip(x.prompts, x.scores[judge].tolist(), strict=True)) for x in (these, those))
  return statistics.wins(left, right)


def agreement(found: Answers, one: str, other: str) -> Mean | None:
  """The correlation of two judges' scores over the prompts that both scored."""
  if one not in found.scores or other not in found.scores:
    return None
  left, right = found.scores[one], found.scores[other]
  both = np.isfinite(left) & np.isfinite(right)
  return statistics.correlation(left[both], right[both], np.arange(both.sum()))


def judges(progress: Sequence[dict[str, Any]], chosen: str = layout.MAIN_SET) -> list[str]:
  """Who graded a set, in the order of the columns of progress.csv: the run's own judge is the last."""
  prefix = f"{chosen}/" if chosen else ""
  columns = dict.fromkeys(name for row in progress for name in row)
  found = [name for name in columns if name.startswith(prefix) and name.endswith(CI95)]
  names = [name.removeprefix(prefix).removesuffix(CI95) for name in found]
  return sorted((name for name in names if "/" not in name), key=layout.JUDGE.__eq__)


def sets(progress: Sequence[dict[str, Any]]) -> list[str]:
  """The sets beside data.eval that progress.csv has columns of."""
  found = [name.partition("/")[0] for row in progress for name in row if "/" in name]
  return list(dict.fromkeys(found))


def grader(run: pathlib.Path, name: str) -> Grader | None:
  """Who is behind a judge's name in this run."""
  for round in reversed(layout.rounds(run)):
    stage = layout.grades_name(layout.stage_name(round, layout.EVALUATION), name)
    if manifest := layout.manifest_of(run, stage):
      judge = manifest["judge"]
      return Grader(name, judge["identity"], judge["scale"] and tuple(judge["scale"]), judge["selects"])
  return None


def best(run: pathlib.Path, by: str | None = None) -> Best | None:
  """The best round by this judge; None if no judge that selects nothing has graded a trained round.

  Without `by` the first such judge in progress.csv decides.
  """
  names = judges(layout.progress(run)) if by is None else [by]
  chosen = next((found for name in names if (found := grader(run, name)) and not found.selects), None)
  if chosen is None:
    return None
  graded = {r: x for r in layout.rounds(run) if r > 0 and (x := read(run, r)) and chosen.name in x.scores}
  means = {r: mean for r, x in graded.items() if (mean := statistics.mean(_finite(x.scores[chosen.name])))}
  if not means:
    return None
  first, last = max(means, key=lambda r: (means[r].value, -r)), max(means)
  ahead = difference(graded[first], graded[last], chosen.name) if first != last else None
  return Best(chosen, first, means[first], last, ahead)


def _finite(values: np.ndarray) -> np.ndarray:
  return values[np.isfinite(values)]
