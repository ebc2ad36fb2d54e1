"""What a run generated for itself (ISARA): how much of it is kept, and how categories that its human pairs are of and
others are answered. Both parts are None for a run without them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from alma_jax.report import charts, numbers, wording
from alma_jax.report.charts import Figure, Line, Point
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout
from alma_jax.store.statistics import Mean

COLOURS = 6  # of the lines
DROPPED = 4  # pairs that are shown of a round, for each reason
COUNTS = ("asked", "kept")  # of the pairs of a round; the other counts are reasons


@dataclasses.dataclass(frozen=True)
class Generated:
  figures: list[Figure]
  table: Table
  dropped: Table | None  # some pairs and why they are dropped


def generated(facts: Facts) -> Generated | None:
  """Round by round, the pairs that were generated and those that were kept."""
  found = {r: m for r, m in facts.manifests(layout.TRAINSET).items() if "kept_share" in m}
  if not found:
    return None
  head = [facts.step, "questions generated", "asked", "pairs kept", "kept share", "generated for each human pair"]
  head += ["nearest shot, cosine", "why pairs are dropped"]
  near, rows = facts.manifests(layout.NEIGHBOURS), []
  for r, m in found.items():
    counts = m["counts"]
    cosine = near[r]["counts"] if r in near else {}
    shown = f"{cosine['nearest_sum'] / cosine['prompts']:.3f}" if cosine.get("nearest_sum") else ""
    cells = [f"{r}", f"{m['generated']:,}", f"{counts.get('asked', 0):,}", f"{m['rows']:,}"]
    cells += [wording.share(m["kept_share"]), f"{m['growth']:.2f}", shown]
    rows.append([*cells, wording.counts({why: n for why, n in counts.items() if why not in COUNTS})])
  kept = [Point(r, 100 * m["kept_share"], None) for r, m in found.items()]
  grown = [Point(r, m["growth"], None) for r, m in found.items()]
  alpha, growth = facts.config.get("alpha"), "Generated pairs, all rounds together, for each human one"
  line = Line(f"kept {kept[-1].y:.0f} %", kept, 0, Point(0, 100 * alpha, None) if alpha else None, "alpha, the end")
  figures = [
    Figure(charts.lines([line], facts.step, "%", low=0), "Generated pairs that pass all filters"),
    Figure(charts.lines([Line(f"{grown[-1].y:.1f}", grown, 2)], facts.step, "ratio", low=0), growth),
  ]
  return Generated(figures, Table(head, rows), _dropped(facts.run, max(found)))


def _dropped(run: pathlib.Path, round: int) -> Table | None:
  """Some of the last round's dropped pairs."""
  report = numbers.stage_report(run, layout.stage_name(round, layout.TRAINSET)) or {}
  rows = [
    [wording.words(why), *(wording.cut(pair.get(part, "")) for part in ("question", "answer", "near"))]
    for why, pairs in report.get("dropped", {}).items()
    for pair in pairs[:DROPPED]
  ]
  return Table(["dropped", "question", "answer", "nearly this kept answer"], rows, text=4) if rows else None


@dataclasses.dataclass(frozen=True)
class CategorySection:
  """The scores that one judge gives one set."""

  title: str
  chart: Markup
  table: Table


def categories(facts: Facts) -> list[CategorySection]:
  """Each judge's scores by category, round by round."""
  shown: dict[str, dict[int, Mapping[str, Any]]] = {}
  for stage in facts.stages:
    kind, round = stage.name.rpartition("/")[2], layout.round_of(stage.name)
    if kind.startswith(layout.CATEGORIES) and stage.manifest and round is not None:
      report = numbers.stage_report(facts.run, stage.name)
      if report and report["by"]:
        shown.setdefault(kind.removeprefix(layout.CATEGORIES), {})[round] = report
  return [_section(facts, name, dict(sorted(rounds.items()))) for name, rounds in sorted(shown.items())]


def _section(facts: Facts, name: str, rounds: Mapping[int, Mapping[str, Any]]) -> CategorySection:
  chosen, _, judge = name.rpartition(".")
  title = f"{judge}, {chosen.removeprefix('-') or 'the evaluation prompts'}"
  last = rounds[max(rounds)]
  halves = [half for half in ("seen", "unseen") if "seen" in last and "unseen" in last]
  known = {category: row["seen"] for category, row in last["by"].items()}

  def rows_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {half: report[half] for half in halves if half in report} | dict(report["by"])

  lines = []
  for colour, line in enumerate(halves or known):
    points = [
      Point(r, found["score"]["mean"], found["score"]["ci95"])
      for r, report in rounds.items()
      if (found := rows_of(report).get(line))
    ]
    lines.append(Line(f"{line} {points[-1].y:.2f}", points, colour % COLOURS))
  names = [*halves, *known]
  head = [facts.step, *(f"{x} (seen)" if known.get(x) and halves else x for x in names)]
  harmful = any("harmful" in row for row in last["by"].values())
  head += [f"harmful: {x}" for x in names] if harmful else []
  table = []
  for r, report in rounds.items():
    found = rows_of(report)
    cells = [f"{r}", *(_mean(found.get(x, {}).get("score"), 2) for x in names)]
    table.append(cells + ([_mean(found.get(x, {}).get("harmful"), 3) for x in names] if harmful else []))
  return CategorySection(title, charts.lines(lines, facts.step, "score"), Table(head, table))


def _mean(found: Mapping[str, Any] | None, digits: int) -> str:
  return wording.mean(Mean(found["mean"], found["ci95"], found["n"]), digits=digits, n=True) if found else ""
