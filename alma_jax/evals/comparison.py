"""Models side by side on the same questions by the same judge.

  group = Group("eval", "own a2 ...", [Scores("sft", {...}), Scores("last", {...})])
  rows([group], against="sft")        a Row for every model: its mean, and its difference to "sft", question by question

A model wins a question where its score is above that of the model compared with; equal scores are a tie, which counts
half. All p values of one call are a family: `adjusted` is Holm's. `detectable` is the true difference that the n common
questions would show at p < 0.05 with a probability of 80 %; a smaller one is not to be expected to show.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from alma_jax.errors import UserError
from alma_jax.store import statistics
from alma_jax.store.statistics import Mean, Wins


class ComparisonError(UserError):
  """Grades that cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Scores:
  """One model's scores by question; a missing verdict is left out."""

  name: str
  by_question: Mapping[str, float]
  categories: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Group:
  """The models that one judge graded on one set of questions."""

  asked: str
  judge: str
  models: Sequence[Scores]


@dataclasses.dataclass(frozen=True)
class Row:
  asked: str
  judge: str
  category: str  # "" for all
  name: str
  mean: Mean
  difference: Mean | None = None  # to the model compared with; None for that model
  p: float | None = None
  adjusted: float | None = None
  detectable: float | None = None
  wins: Wins | None = None  # question by question over the model compared with


def rows(groups: Sequence[Group], against: str | None = None, by_category: bool = False) -> list[Row]:
  """The rows of all groups; `against` is the model compared with, the first of each group if not given."""
  found = [row for group in groups for part in _parts(group, by_category) for row in _rows(*part, against)]
  tested = [i for i, row in enumerate(found) if row.p is not None]
  for i, adjusted in zip(tested, statistics.holm([found[i].p or 0.0 for i in tested]), strict=True):
    found[i] = dataclasses.replace(found[i], adjusted=float(adjusted))
  return found


def _parts(group: Group, by_category: bool) -> list[tuple[Group, str]]:
  """The group, and the group of each category."""
  out = [(group, "")]
  if by_category:
    categories = dict.fromkeys(name for model in group.models for name in model.categories.values() if name)
    for category in categories:
      models = [
        dataclasses.replace(m, by_question={q: x for q, x in m.by_question.items() if m.categories.get(q) == category})
        for m in group.models
      ]
      out.append((dataclasses.replace(group, models=[m for m in models if m.by_question]), category))
  return out


def _rows(group: Group, category: str, against: str | None) -> list[Row]:
  names = [model.name for model in group.models]
  if len(set(names)) < len(names):
    raise ComparisonError(f"two of the models are called {next(x for x in names if names.count(x) > 1)!r}")
  base = next((model for model in group.models if model.name == (against or names[0])), None)
  if base is None:
    raise ComparisonError(f"there is no {against!r} to compare with; there are {', '.join(names)}")
  out = []
  for model in group.models:
    if (mean := statistics.mean(list(model.by_question.values()))) is None:
      continue
    row = Row(group.asked, group.judge, category, model.name, mean)
    common = [question for question in model.by_question if question in base.by_question]
    values = np.array([model.by_question[question] - base.by_question[question] for question in common])
    if model is not base and len(common) > 1:
      row = dataclasses.replace(
        row,
        difference=statistics.mean(values),
        p=statistics.p_value(values),
        detectable=statistics.detectable(float(values.std(ddof=1)), len(values)),
        wins=statistics.wins(model.by_question, base.by_question),
      )
    out.append(row)
  return out


def in_lines(found: Sequence[Row]) -> list[str]:
  """The rows as a text table, a block for each set, judge and category."""
  lines, block = [], None
  width = max([5, *(len(row.name) for row in found)])
  for row in found:
    if block != (row.asked, row.judge, row.category):
      block = (row.asked, row.judge, row.category)
      lines += ["", f"{row.asked}{f', {row.category}' if row.category else ''}, graded by {row.judge}"]
      columns = {
        "n": 6,
        "mean": 16,
        "difference": 18,
        "p (Holm)": 9,
        "detectable": 11,
        "won %": 14,
        "won/tied/lost": 15,
      }
      lines.append(f"  {'model':<{width}} " + " ".join(f"{name:>{wide}}" for name, wide in columns.items()))
    cells = [f"{row.mean.n:>6,}", f"{shown(row.mean):>16}"]
    if row.difference and row.adjusted is not None and row.detectable is not None:
      cells += [f"{shown(row.difference, '+'):>18}", f"{row.adjusted:>9.3f}", f"{row.detectable:>11.3f}"]
    if row.wins:
      share = row.wins.share
      cells += [f"{100 * share.value:>6.1f}" + ("" if share.ci95 is None else f" ± {100 * share.ci95:>4.1f} ")]
      cells += [f"{f'{row.wins.won:,}/{row.wins.tied:,}/{row.wins.lost:,}':>15}"]
    lines.append(f"  {row.name:<{width}} {' '.join(cells)}")
  return lines[1:]


def in_columns(row: Row) -> dict[str, str | int | float | None]:
  """The row for a CSV file."""
  difference = row.difference
  return {
    "set": row.asked,
    "judge": row.judge,
    "category": row.category,
    "model": row.name,
    "n": row.mean.n,
    "mean": row.mean.value,
    "ci95": row.mean.ci95,
    "difference": difference and difference.value,
    "difference_ci95": difference and difference.ci95,
    "common": difference and difference.n,
    "p": row.p,
    "p_holm": row.adjusted,
    "won": row.wins and row.wins.won,
    "tied": row.wins and row.wins.tied,
    "lost": row.wins and row.wins.lost,
    "win_rate": row.wins and 100 * row.wins.share.value,
    "win_rate_ci95": row.wins and row.wins.share.ci95 and 100 * row.wins.share.ci95,
    "detectable": row.detectable if row.detectable is None or math.isfinite(row.detectable) else None,
  }


def shown(mean: Mean, sign: str = "") -> str:
  return f"{mean.value:{sign}.3f}" + ("" if mean.ci95 is None else f" ± {mean.ci95:.3f}")
