"""What the page shows of a run of LIMA: grades and loss by epoch, wins and losses against other models, audits."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from alma_jax.report import charts, wording
from alma_jax.report.charts import Line, Point, Shares
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout, shards, statistics
from alma_jax.store.records import Compared
from alma_jax.store.statistics import Mean


@dataclasses.dataclass(frozen=True)
class ChoiceSection:
  said: str
  charts: list[Markup]
  table: Table


def choice(facts: Facts) -> ChoiceSection | None:
  """By epoch what the answers are worth, and the loss beside it."""
  manifest = facts.manifest(layout.CHOICE)
  if manifest is None:
    return None
  rows, value = manifest["epochs"], "ahead of the first epoch" if manifest["pairwise"] else "grade"
  drawn = []
  for name, colour, means in (
    (value, 0, {row["epoch"]: _mean(row, "mean", "ci95") for row in rows}),
    ("loss, nats per token", 1, {row["epoch"]: _mean(row, "loss", "loss_ci95") for row in rows}),
  ):
    points = [Point(epoch, mean.value, mean.ci95) for epoch, mean in means.items() if mean]
    if points:
      drawn.append(charts.lines([Line(name, points, colour)], "epoch", name))
  chosen, lowest = manifest["epoch"], manifest["by_loss"]
  said = f"Epoch {chosen}, by {manifest['by']}."
  if lowest is not None:
    same = "the same one" if lowest == chosen else f"epoch {lowest}"
    said += f" By the lowest loss it would be {same}."
  pairs = [(row["mean"], row["loss"]) for row in rows if row["mean"] is not None and row["loss"] is not None]
  if len(pairs) > 2:
    rank = statistics.spearman([x for x, _ in pairs], [x for _, x in pairs], np.arange(len(pairs)))
    said += f" Rank correlation of {value} and loss over the epochs: {wording.mean(rank)}." if rank else ""
  head = ["epoch", "n", value, "loss"]
  cells = [
    [
      f"{row['epoch']}{' (chosen)' * (row['epoch'] == chosen)}",
      f"{row['n']:,}",
      wording.mean(_mean(row, "mean", "ci95"), digits=3),
      wording.mean(_mean(row, "loss", "loss_ci95"), digits=4),
    ]
    for row in rows
  ]
  return ChoiceSection(said, drawn, Table(head, cells))


@dataclasses.dataclass(frozen=True)
class ComparedSection:
  chart: Markup | None
  table: Table | None
  agreement: Table | None
  levels: Table | None


def compared(facts: Facts) -> ComparedSection | None:
  """Won, tied and lost against other models' answers; the agreement of those who judged; levels of the audits."""
  found = {s.name: s for s in facts.stages if s.manifest and layout.kind_of(s.name).startswith(f"{layout.COMPARED}-")}
  audits = {s.name: s for s in facts.stages if s.manifest and layout.kind_of(s.name).startswith(f"{layout.AUDIT}-")}
  if not (found or audits):
    return None
  bars, rows = [], []
  for name, stage in sorted(found.items()):
    manifest = stage.manifest or {}
    outcomes = {word: Mean(**of) for word, of in manifest["outcomes"].items() if of}
    if outcomes:
      n = next(iter(outcomes.values())).n
      label = f"{manifest['model']} ({name.rpartition('.')[2]})"
      bars.append(Shares(label, {word: round(mean.value * n) for word, mean in outcomes.items()}, f"n = {n:,}"))
      rows.append([label, f"{n:,}", *(wording.mean(mean) for mean in outcomes.values()), manifest["judge"]])
  head = ["against (by)", "n", "won", "tied", "lost", "judge"]
  return ComparedSection(
    charts.stacked(bars, ["win", "tie", "lose"]) if bars else None,
    Table(head, rows) if rows else None,
    _agreement(found),
    _levels(audits),
  )


def _agreement(found: Mapping[str, layout.Found]) -> Table | None:
  """The tie-discounted agreement of every two who judged the same answers."""
  rows = []
  for one, other in itertools.combinations(sorted(found), 2):
    if one.rpartition(".")[0] == other.rpartition(".")[0]:
      left, right = (_shares(found[name]) for name in (one, other))
      mean = statistics.tie_discounted(left, right)
      model = (found[one].manifest or {})["model"]
      rows.append([model, f"{one.rpartition('.')[2]} and {other.rpartition('.')[2]}", wording.mean(mean, n=True)])
  return Table(["against", "judges", "agreement"], rows, text=2) if rows else None


def _shares(stage: layout.Found) -> dict[str, float]:
  rows = shards.read_records(layout.parts_of(stage.dir) or [], Compared)
  return {row.prompt_id: row.share for row in rows if row.share is not None}


def _levels(audits: Mapping[str, layout.Found]) -> Table | None:
  rows = []
  for name, stage in sorted(audits.items()):
    manifest: dict[str, Any] = stage.manifest or {}
    means = {level: Mean(**of) for level, of in manifest["levels"].items() if of}
    shares = ", ".join(f"{level} {wording.mean(mean)}" for level, mean in means.items())
    n = next((mean.n for mean in means.values()), 0)
    rows.append([name.rpartition("-")[2], manifest["asked"], shares, manifest["judge"], f"{n:,}"])
  return Table(["audit", "set", "levels", "by", "n"], rows, text=4) if rows else None


def _mean(row: Mapping[str, Any], value: str, ci95: str) -> Mean | None:
  return None if row[value] is None else Mean(row[value], row[ci95], row["n"])
