"""`alma report --compare A B`: two runs on one page, with both progressions, paired differences and what was configured
differently."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from alma_jax.errors import RunError
from alma_jax.evals import comparison
from alma_jax.evals.comparison import Group, Row, Scores
from alma_jax.report import charts, graded, numbers, page, wording
from alma_jax.report.charts import Line, Point
from alma_jax.report.wording import Table
from alma_jax.store import fingerprints, layout


@dataclasses.dataclass(frozen=True)
class Compared:
  """What the page shows."""

  names: tuple[str, str]
  rows: list[Row]  # two for each round and judge: both means, and the second run's difference to the first
  apart: list[str]  # sentences about judges whose numbers are not compared
  changed: dict[str, str]  # config values: "first -> second"


def compare(first: pathlib.Path, second: pathlib.Path) -> Compared:
  """The differences of two runs, prompt by prompt, in the rounds and by the judges that both have."""
  for run in (first, second):
    if layout.config_in(run) is None:
      raise RunError(f"{run} is no run directory: there is no {layout.CONFIG} of a run in it")
  names = _names(first, second)
  groups, apart = [], []
  for judge in _judges(first, second):
    graders = [graded.grader(run, judge) for run in (first, second)]
    if any(grader is None for grader in graders):
      continue
    one, other = (grader.identity for grader in graders if grader)
    if one != other:
      apart.append(f"{judge}: each run has its own ({one}; {other}), and numbers of two judges are not compared")
      continue
    groups += _groups(first, second, names, judge)
  configs = [fingerprints.fingerprint_of(layout.config_in(run) or {}, {}) for run in (first, second)]
  return Compared(names, comparison.rows(groups, against=names[0]), apart, fingerprints.differences(*configs))


def write(first: pathlib.Path, second: pathlib.Path, output: pathlib.Path) -> list[str]:
  """Write the page; lines for the terminal."""
  found = compare(first, second)
  page.write_comparison(output, f"{found.names[0]} and {found.names[1]}", list(_sections(found, first, second)))
  lines = comparison.in_lines(found.rows) or ["the runs have no round in common that one judge has graded in both"]
  changes = [f"  {name}: {change}" for name, change in found.changed.items()] or ["  nothing"]
  return [*lines, *found.apart, "", "configured differently:", *changes, f"page: {output}"]


def _sections(found: Compared, first: pathlib.Path, second: pathlib.Path) -> Iterator[tuple[str, list[object]]]:
  """Titles with charts, tables and sentences."""
  drawn: list[object] = []
  for judge in _judges(first, second):
    pictured = []
    for colour, (name, run) in enumerate(zip(found.names, (first, second), strict=True)):
      rows = [row for row in numbers.progress(run) if judge in row and row["round"] > 0]
      points = [Point(row["round"], row[judge], row.get(f"{judge}_ci95")) for row in rows]
      if points:
        pictured.append(Line(f"{name} {points[-1].y:.2f}", points, colour))
    if pictured:
      drawn += [f"By {judge}, with 95 % intervals", charts.lines(pictured, "round", "score")]
  yield "Progress", [*drawn, *found.apart]
  head = [
    "graded by",
    "round",
    f"{found.names[0]}",
    f"{found.names[1]}",
    "difference",
    "prompts",
    "p (Holm)",
    "detectable",
  ]
  rows = []
  for base, row in zip(found.rows[::2], found.rows[1::2], strict=True):
    said = row.difference is not None and row.adjusted is not None and row.detectable is not None
    difference = [wording.mean(row.difference, sign=True), f"{row.difference.n:,}"] if row.difference else ["", ""]
    more = [f"{row.adjusted:.3f}", f"{row.detectable:.2f}"] if said else ["", ""]
    rows.append([row.judge, row.asked, wording.mean(base.mean), wording.mean(row.mean), *difference, *more])
  note = f"{found.names[1]} minus {found.names[0]}, prompt by prompt; p values are adjusted over all rows."
  yield "Differences", [note, Table(head, rows, text=2)] if rows else ["No judge has graded a round of both runs."]
  values = [[name, *change.split(" -> ", 1)] for name, change in found.changed.items()]
  yield "Configured differently", [Table(["value", *found.names], values, text=3)] if values else ["Nothing."]


def _groups(first: pathlib.Path, second: pathlib.Path, names: tuple[str, str], judge: str) -> Iterator[Group]:
  """The scores of each round that both runs have, by a judge that is the same in both."""
  grader = graded.grader(first, judge)
  for round in sorted(set(layout.rounds(first)) & set(layout.rounds(second))):
    answers = [graded.read(run, round) for run in (first, second)]
    models = [
      Scores(name, {p: x for p, x in zip(a.prompts, a.scores[judge].tolist(), strict=True) if x == x})
      for name, a in zip(names, answers, strict=True)
      if a and judge in a.scores
    ]
    if grader and len(models) == 2 and all(model.by_question for model in models):
      yield Group(f"round {round}", f"{judge}: {grader.identity}", models)


def _judges(first: pathlib.Path, second: pathlib.Path) -> Sequence[str]:
  other = graded.judges(layout.progress(second))
  return [name for name in graded.judges(layout.progress(first)) if name in other]


def _names(first: pathlib.Path, second: pathlib.Path) -> tuple[str, str]:
  """The directories' names, with their parents' where they are the same."""
  one, other = first.resolve(), second.resolve()
  if one == other:
    raise RunError(f"{first} and {second} are one run")
  return (one.name, other.name) if one.name != other.name else (str(first), str(second))
