"""Compares models on the same questions by the same judge.

  python -m alma_jax.tools.evaluate compare --input grades/mine grades/other [--output=compared.csv]
  python -m alma_jax.tools.evaluate compare --input runs/alma

An input is the --output of `evaluate grade`, whose name is that of the model; or a run, or the grades of one, whose
rounds are the models: a block for each of its sets and judges. Means and paired differences to --against (the first
model if not given) have 95 % intervals over questions; p values are adjusted by Holm's method over all of them;
`detectable` is the difference that so many questions would show with a probability of 80 %. Numbers of two judges are
never compared.
--categories=true adds a block for each category. A model wins a question that it answers with a higher score than
--against; equal scores are a tie, which counts half. --html=FILE writes tables and charts as .html, .svg or .png.
"""

import csv
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

from markupsafe import Markup

from alma_jax.errors import RunError
from alma_jax.evals import comparison, runs
from alma_jax.evals.comparison import ComparisonError, Group, Row, Scores
from alma_jax.options import Checked, labelled, option
from alma_jax.report import charts, leaflet
from alma_jax.report.charts import ChartBar, Line, Point
from alma_jax.report.leaflet import Block
from alma_jax.report.wording import Table
from alma_jax.store import layout
from alma_jax.tools import command

NOTE = (
  "Means and paired differences with 95 % intervals over the questions; p holm is adjusted over all rows of the file;"
  " detectable: the difference that so many questions would show with a probability of 80 %."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  input: tuple[str, ...] = option(doc="outputs of `evaluate grade`, or runs")
  against: str = option("", doc="the model to compare with; the first one if not given")
  categories: bool = option(False, doc="each category, too")
  output: str = option("", doc="a CSV file of the rows")
  html: str = option("", doc="a file of tables and charts, .html, .svg or .png")


FLAGS = command.Flags("evaluate compare", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(command.one_flag_each(arguments))
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  if options.html:
    leaflet.check(pathlib.Path(options.html))
  groups = groups_of([pathlib.Path(name) for name in options.input])
  found = comparison.rows(groups, options.against or None, options.categories)
  print("\n".join(comparison.in_lines(found)))
  if options.output:
    path = pathlib.Path(options.output)
    command.check_place(path)
    table = [comparison.in_columns(row) for row in found]
    with open(path, "w", encoding="utf-8", newline="") as file:
      writer = csv.DictWriter(file, list(table[0]))
      writer.writeheader()
      writer.writerows(table)
  if options.html:
    leaflet.save(pathlib.Path(options.html), "Models compared", blocks(found))
    print(options.html)


def blocks(found: Sequence[Row]) -> list[Block]:
  """A chart and a table for each set, judge and category."""
  out = []
  for (asked, judge, category), group in itertools.groupby(found, _of_block):
    rows = list(group)
    title = f"{asked}{f', {category}' if category else ''}, graded by {judge}"
    columns = [comparison.in_columns(row) for row in rows]
    names = [name for name in columns[0] if name not in ("set", "judge", "category")]
    cells = [[_cell(row[name]) for name in names] for row in columns]
    table = Table([name.replace("_", " ") for name in names], cells)
    out.append(Block(title, [_chart(rows)], table, NOTE))
  return out


def _of_block(row: Row) -> tuple[str, str, str]:
  return row.asked, row.judge, row.category


def _chart(rows: Sequence[Row]) -> Markup:
  """A line over the rounds of a run, else a bar for each model."""
  numbers = [row.name.removeprefix("round").strip(" _") for row in rows]
  if len(rows) > 1 and all(number.isdigit() for number in numbers):
    points = [Point(int(number), row.mean.value, row.mean.ci95) for number, row in zip(numbers, rows, strict=True)]
    return charts.lines([Line(f"{points[-1].y:.2f}", points, 0)], "round", "mean score")
  return charts.bars([ChartBar(row.name, max(0.0, row.mean.value), comparison.shown(row.mean)) for row in rows])


def _cell(value: object) -> str:
  if value is None:
    return ""
  return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def groups_of(inputs: Sequence[pathlib.Path]) -> list[Group]:
  """The graded models of all inputs, by set and judge."""
  groups: list[Group] = []
  graded: list[pathlib.Path] = []
  for directory in inputs:
    if (directory / "summary.json").is_file():
      graded.append(directory)
    elif layout.config_in(directory):
      groups += of_run(directory)
    elif rounds := sorted(path.parent for path in directory.glob("*/*/summary.json")):  # `grade --input=RUN` wrote it
      for chosen in dict.fromkeys(path.parent for path in rounds):
        groups.append(_of_grades([path for path in rounds if path.parent == chosen], chosen.name))
    else:
      raise ComparisonError(f"{directory} is neither an --output of `evaluate grade` nor a run")
  return groups + ([_of_grades(graded, "answers")] if graded else [])


def _of_grades(directories: Sequence[pathlib.Path], asked: str) -> Group:
  """The models whose grades are in these directories, all by one judge."""
  first, *others = [(directory, layout.read_json(directory / "summary.json")) for directory in directories]
  for directory, summary in others:
    for name in ("judge", "protocol"):
      if summary.get(name) != first[1].get(name):
        raise ComparisonError(
          f"{first[0]} and {directory} cannot be compared: {name} {first[1].get(name)!r} and {summary.get(name)!r}"
        )
  judge = f"{first[1]['judge']}, {first[1].get('protocol', '')}"
  return Group(asked, judge, [_scores(directory) for directory in directories])


def _scores(directory: pathlib.Path) -> Scores:
  """The grades in a directory; a verdict that is missing is left out."""
  lines = [json.loads(line) for line in (directory / "grades.jsonl").read_text(encoding="utf-8").splitlines()]
  known = {str(line["id"]): float(line["score"]) for line in lines if line.get("score") is not None}
  return Scores(directory.name, known, {str(line["id"]): line.get("category") or "" for line in lines})


def of_run(run: pathlib.Path) -> list[Group]:
  """A group for each set and judge of a run; its models are the rounds that are graded."""
  named = labelled("sets", (layout.config_in(run) or {}).get("eval", {}).get("sets", ()))
  found: dict[tuple[str, str], list[Scores]] = {}
  categories: dict[str, dict[str, str]] = {}
  for answered in runs.answered(run):
    if answered.chosen not in categories:
      categories[answered.chosen] = answered.categories(runs.about(run, answered.chosen, named))
    for name in layout.graders(run, answered.round, answered.chosen):
      judge = runs.identity(run, answered.round, answered.chosen, name)
      scores = runs.scores(run, answered.round, answered.chosen, name)
      key = (answered.chosen or "data.eval", judge)
      found.setdefault(key, []).append(Scores(answered.name, scores, categories[answered.chosen]))
  if not found:
    raise RunError(f"{run}: no round has been graded yet")
  return [Group(asked, judge, models) for (asked, judge), models in found.items()]
