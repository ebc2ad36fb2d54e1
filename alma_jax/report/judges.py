"""What the page and the terminal say about the judge itself, and the alarms of all stages."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from alma_jax.report import charts, wording
from alma_jax.report.charts import ChartBar
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout
from alma_jax.store.statistics import Mean

Quality = Mapping[str, Any]  # one judge's numbers on held-out annotations, as the manifest of `judge_quality` has them


class Raised(NamedTuple):
  stage: str
  sentence: str


def alarms(stages: Iterable[layout.Found]) -> list[Raised]:
  """The alarms of all finished stages."""
  return [Raised(s.name, text) for s in stages if s.manifest for text in s.manifest.get("alarms", {}).values()]


def qualities(stages: Iterable[layout.Found]) -> list[Quality]:
  """The numbers of each judge that was measured."""
  return [q for s in stages if s.manifest and s.name == layout.QUALITY for q in s.manifest.get("quality", [])]


def in_words(quality: Quality) -> str:
  """A judge's quality in one line, for wherever its scores are shown."""
  agreement, error, rank = (_mean(quality[name]) for name in ("agreement", "error", "spearman"))
  if agreement is None:
    return f"{quality['rows']:,} held-out annotations do not differ in score: nothing to measure the judge by"
  said = [f"orders {wording.mean(agreement, digits=3)} of {agreement.n:,} held-out pairs as the annotators did"]
  said += [f"mean error {wording.mean(error)} of 10"] if error else []
  said += [f"Spearman {wording.mean(rank)}"] if rank else []
  return f"{', '.join(said)} (n = {quality['rows']:,} annotations; {quality['judge']})"


@dataclasses.dataclass(frozen=True)
class Distilled:
  chart: Markup
  examples: int
  accepted: bool
  change: str
  held_out: int
  pairs: int | None
  reason: str


@dataclasses.dataclass(frozen=True)
class Measured:
  said: str
  calibration: Table | None
  error: float | None  # of the calibration
  entropy: str


@dataclasses.dataclass(frozen=True)
class JudgeSection:
  tuned: Mapping[str, int] | None  # the counts of its training
  distilled: Distilled | None
  few_shot: bool
  measured: list[Measured]


def judge(facts: Facts) -> JudgeSection | None:
  tuned, distilled = facts.manifest(layout.JUDGE), facts.manifest(layout.DISTILLED)
  told = _distilled(distilled) if distilled and "after" in distilled.get("held_out", {}) else None
  few_shot = told is None and facts.config.get("judge", {}).get("kind") == "few_shot"
  measured = [_measured(q) for q in qualities(facts.stages)]
  if not (tuned or told or few_shot or measured):
    return None
  return JudgeSection(tuned["counts"] if tuned else None, told, few_shot, measured)


def _distilled(manifest: Mapping[str, Any]) -> Distilled:
  held = manifest["held_out"]

  def share(name: str) -> Mean:
    return Mean(held[name], held.get(f"{name}_ci95"), held["rows"])

  rows = [
    ChartBar(name, held[when], wording.mean(share(when), digits=3))
    for name, when in (("fine-tuned", "before"), ("distilled", "after"))
  ]
  change = Mean(held["after"] - held["before"], held.get("change_ci95"), held["rows"])
  return Distilled(
    chart=charts.bars(rows, 1),
    examples=manifest["counts"]["examples"],
    accepted=manifest["accepted"],
    change=wording.mean(change, sign=True, digits=3),
    held_out=held["rows"],
    pairs=held.get("pairs"),
    reason=manifest.get("reason", ""),
  )


def _measured(quality: Quality) -> Measured:
  bins, table = quality["calibration"], None
  if bins:
    head = ["the judge's score", "annotations", "its mean", "the annotators' mean"]
    rows = [
      [f"{b['low']:g} to {b['high']:g}", f"{b['rows']:,}", f"{b['score']:.2f}", f"{b['label']:.2f}"] for b in bins
    ]
    table = Table(head, rows)
  entropy = ""
  if quality["entropy"] is not None:
    entropy = f"{quality['entropy']:.2f} bits on average; the annotations' scores together"
    entropy += f" {quality['entropy_of_labels']:.2f}"
  return Measured(in_words(quality), table, quality["calibration_error"], entropy)


def _mean(found: Mapping[str, Any] | None) -> Mean | None:
  return None if found is None else Mean(**found)
