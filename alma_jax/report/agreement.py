"""What a policy's own judgement is worth, round by round (SPA): how often it agrees with people and with a gold judge,
and the margins and lengths of the pairs that came of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alma_jax.report import charts, wording
from alma_jax.report.charts import Figure, Line, Point
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout, statistics

SOURCES = {"held_out": "people's held-out pairs", "gold": "the gold judge's order"}  # as stages/agreement.py has them
LENGTHS = {"chosen_characters": "chosen", "rejected_characters": "rejected"}


@dataclasses.dataclass(frozen=True)
class AgreementSection:
  figures: list[Figure]
  table: Table


def agreement(facts: Facts) -> AgreementSection | None:
  manifests = facts.manifests(layout.AGREEMENT)
  if not manifests:
    return None
  found = {round: manifest["counts"] for round, manifest in manifests.items()}
  agrees = charts.lines(_lines(found, SOURCES), facts.step, "agreement", low=0)
  margins = charts.lines(_lines(found, {"margin": "margin"}), facts.step, "nats")
  lengths = charts.lines(_lines(found, LENGTHS), facts.step, "characters", low=0)
  figures = [
    Figure(agrees, "Share of pairs that the policy's own reward orders as who knows better does; chance is 0.5."),
    Figure(margins, "Reward of the chosen minus that of the rejected response."),
    Figure(lengths, "Mean lengths of what is chosen and rejected."),
  ]
  head = [facts.step, *SOURCES.values(), "pairs", "margin", *(f"{name}, characters" for name in LENGTHS.values())]
  rows = []
  for round, counts in found.items():
    means = {name: statistics.mean_of_counts(counts.get(name)) for name in (*SOURCES, "margin", *LENGTHS)}
    margin = means["margin"]
    cells = [f"{round}", *(wording.mean(means[name], digits=3, n=True) for name in SOURCES)]
    cells += [f"{margin.n:,}" if margin else "", wording.mean(margin)]
    rows.append([*cells, *(wording.mean(means[name], digits=1) for name in LENGTHS)])
  return AgreementSection(figures, Table(head, rows))


def _lines(found: Mapping[int, Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
  drawn = []
  for colour, (name, said) in enumerate(names.items()):
    means = {round: statistics.mean_of_counts(counts.get(name)) for round, counts in found.items()}
    drawn.append(Line(said, [Point(round, m.value, m.ci95) for round, m in means.items() if m], colour))
  return drawn
