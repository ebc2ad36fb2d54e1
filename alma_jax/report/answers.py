"""What the rounds answer: how often each is ahead of the first one, and the answers of all to the same prompts."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from alma_jax.report import charts, graded, judged, wording
from alma_jax.report.charts import Line, Point
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout

FIRST = 1  # the round that all later ones are compared with: the initial SFT
AT_RANDOM = 4  # prompts that are shown beside the two that changed most


@dataclasses.dataclass(frozen=True)
class Answered:
  title: str  # "round 3: truth 7.10, judge 6.84"
  text: str


@dataclasses.dataclass(frozen=True)
class SideBySide:
  """The answers of all rounds to one prompt."""

  why: str  # it is shown
  asked: str
  answers: list[Answered]


@dataclasses.dataclass(frozen=True)
class AnswersSection:
  first: str  # "round 1"
  chart: Markup | None
  table: Table | None
  prompts: list[SideBySide]


def answers(facts: Facts) -> AnswersSection | None:
  found = {r: x for r, x in sorted(facts.answers.items()) if x.prompts}
  if not found:
    return None
  judges = [name for name in graded.judges(facts.progress) if any(name in x.scores for x in found.values())]
  first = f"{facts.step} {FIRST}"
  chart, table = _won(facts, found, judges) if FIRST in found else (None, None)
  prompts = side_by_side(facts.run, found, judges, facts.step) if len(found) > 1 else []
  return AnswersSection(first, chart, table, prompts) if table or prompts else None


def _won(
  facts: Facts, found: Mapping[int, graded.Answers], judges: Sequence[str]
) -> tuple[Markup | None, Table | None]:
  """The share of prompts on which each judge scores a round above the first one."""
  lines, rows = [], []
  for colour, name in enumerate(judges):
    points = []
    for r, x in found.items():
      if r > FIRST and (wins := graded.wins(x, found[FIRST], name)):
        share = wins.share
        points.append(Point(r, 100 * share.value, None if share.ci95 is None else 100 * share.ci95))
        counts = f"{wins.won:,} / {wins.tied:,} / {wins.lost:,}"
        shown = f"{points[-1].y:.1f} %" + ("" if points[-1].ci95 is None else f" ± {points[-1].ci95:.1f}")
        rows.append([name, f"{r}", f"{share.n:,}", shown, counts])
    if points:
      lines.append(Line(f"{name} {points[-1].y:.0f} %", points, colour))
  if not lines:
    return None, None
  lines[0] = dataclasses.replace(lines[0], level=Point(0, 50.0, None), level_name="as often as not")
  head = ["judge", facts.step, "n", "ahead", "won / tied / lost"]
  return charts.lines(lines, facts.step, "% ahead"), Table(head, rows)


def side_by_side(
  run: pathlib.Path, found: Mapping[int, graded.Answers], judges: Sequence[str], step: str
) -> list[SideBySide]:
  """A few prompts with the answers of all rounds: those whose score changed most, and some at random."""
  common = set.intersection(*(set(x.prompts) for x in found.values()))
  scores = {r: {name: dict(zip(x.prompts, x.scores[name], strict=True)) for name in x.scores} for r, x in found.items()}
  shown = {id: "at random" for id in sorted(common)[:AT_RANDOM]}  # ids are hashes
  last, begin = max(found), FIRST if FIRST in found else min(found)
  by = next((name for name in judges if name in scores[last] and name in scores[begin]), None)
  if by is not None and last != begin:
    changes = {id: scores[last][by][id] - scores[begin][by][id] for id in common}
    ranked = sorted((change, id) for id, change in changes.items() if math.isfinite(change))
    for word, pick in (("lost", ranked[:1]), ("gained", ranked[-1:])):
      for change, id in pick:
        if (change > 0) == (word == "gained") and change:
          said = f"{word} most from {step} {begin} to {step} {last} by {by}, {wording.signed(change)}"
          shown = {id: said} | {other: why for other, why in shown.items() if other != id}
  texts = {r: _texts(run, r, set(shown)) for r in found}
  out = []
  for id, why in shown.items():
    said = []
    for r in found:
      given = [f"{name} {scores[r][name][id]:.2f}" for name in judges if math.isfinite(_score(scores[r], name, id))]
      said.append(Answered(f"{step} {r}" + (f": {', '.join(given)}" if given else ""), texts[r][id][1]))
    out.append(SideBySide(why, texts[begin][id][0], said))
  return out


def _score(scores: Mapping[str, Mapping[str, float]], name: str, id: str) -> float:
  return scores.get(name, {}).get(id, math.nan)


def _texts(run: pathlib.Path, round: int, ids: set[str]) -> dict[str, tuple[str, str]]:
  """The conversation and the answer to each of these prompts."""
  parts = layout.parts_of(run / layout.stage_name(round, layout.answers_name())) or []
  found = {}
  for batch in judged.batches(parts, ["prompt_id", "messages", "response"]):
    for at, id in enumerate(batch.column("prompt_id").to_pylist()):
      if id in ids:
        found[id] = (wording.asked(batch.column("messages")[at].as_py()), batch.column("response")[at].as_py())
  return found
