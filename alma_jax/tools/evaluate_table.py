"""The paper's tables, of runs and files of yours.

  python -m alma_jax.tools.evaluate table 1 --input=runs/alma
  python -m alma_jax.tools.evaluate table 2 --input=annotations.json --difficulty=difficulty.json
  python -m alma_jax.tools.evaluate table 3 --input runs/alma runs/few_shot tests/armo
  python -m alma_jax.tools.evaluate table 5 --input=runs/alma [--rounds=1,9]

  1   sets x judges: the base model (few-shot), the initial SFT and the last round, and the mean over the sets
  2   AlpacaEval's win rates, raw and length-controlled, of files of its annotations; --difficulty has the difficulty of
      each instruction, --gamed the annotations of the baselines that were told to be brief or long
  3   judges: the share of held-out pairs that a run's judge orders as the annotators did, its rank correlation and its
      error; of an output of `evaluate judge` its accuracies
  5   categories: the initial SFT and the round before the last, or --rounds, with the difference prompt by prompt

Every mean has its 95 % interval and its n. --html=FILE writes the table as .html, .svg or .png.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from alma_jax.errors import RunError
from alma_jax.evals import paper, runs
from alma_jax.options import Checked, ConfigError, labelled, option
from alma_jax.report import charts, leaflet, wording
from alma_jax.report.charts import ChartBar
from alma_jax.report.leaflet import Block
from alma_jax.report.wording import Table
from alma_jax.store import layout, statistics
from alma_jax.store.statistics import Mean
from alma_jax.tools import command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  input: tuple[str, ...] = option(doc="runs, or the files of the table")
  difficulty: str = option("", doc="table 2: each instruction's difficulty, JSON {instruction: number}")
  gamed: tuple[str, ...] = option((), doc="table 2: annotations of the gamed baselines")
  rounds: str = option("", doc="table 5: two rounds, such as 1,9")
  html: str = option("", doc="a file of the table, .html, .svg or .png")


FLAGS = command.Flags("evaluate table 1|2|3|5", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  if arguments[:1] in (["-h"], ["--help"]):
    FLAGS.print_help()
    return 0
  if not arguments or arguments[0] not in TABLES:
    FLAGS.error(f"evaluate table {' '.join(arguments[:1])}: there are the tables {', '.join(TABLES)}")
  options = FLAGS.values(command.one_flag_each(arguments[1:]))
  return command.status(lambda: run(arguments[0], options))


def run(number: str, options: Options) -> None:
  if options.html:
    leaflet.check(pathlib.Path(options.html))
  blocks = TABLES[number](options)
  for block in blocks:
    print("\n".join([block.title, *wording.in_lines(block.table)] if block.table else [block.title]))
    print(f"{block.note}\n" if block.note else "")
  if options.html:
    leaflet.save(pathlib.Path(options.html), f"Table {number}", blocks)
    print(options.html)


def _run(name: str) -> pathlib.Path:
  run = pathlib.Path(name)
  if not layout.config_in(run):
    raise RunError(f"--input: {name} is no run")
  return run


def sets_and_judges(options: Options) -> list[Block]:
  """Table 1."""
  blocks = []
  for run in map(_run, options.input):
    found = list(runs.answered(run))
    rounds = sorted({x.round for x in found})
    columns = {"base, few-shot": 0, "initial SFT": 1, f"round {rounds[-1]}": rounds[-1]}
    columns = {name: round for name, round in columns.items() if round in rounds}
    by_judge: dict[str, dict[str, dict[str, Mean]]] = {}  # identity -> set -> column
    for name, round in columns.items():
      for answered in (x for x in found if x.round == round):
        for judge in layout.graders(run, round, answered.chosen):
          mean = statistics.mean(list(runs.scores(run, round, answered.chosen, judge).values()))
          if mean:
            of = by_judge.setdefault(runs.identity(run, round, answered.chosen, judge), {})
            of.setdefault(answered.chosen or "data.eval", {})[name] = mean
    for judge, sets in by_judge.items():
      head = ["set", "n", *columns]
      rows = [
        [asked, f"{max(mean.n for mean in of.values()):,}", *(wording.mean(of.get(name), digits=3) for name in columns)]
        for asked, of in sets.items()
      ]
      if len(sets) > 1:
        rows.append(["mean over the sets", "", *(_over_sets(sets, name) for name in columns)])
      bars = [ChartBar(f"{asked}, {name}", max(0.0, of[name].value), wording.mean(of[name], digits=2))
              for asked, of in sets.items() for name in columns if name in of]  # fmt: skip
      blocks.append(Block(f"{run}, graded by {judge}", [charts.bars(bars)], Table(head, rows)))
  return blocks


def _over_sets(sets: Mapping[str, Mapping[str, Mean]], name: str) -> str:
  """The unweighted mean of the sets' means, if all of them have one."""
  means = [of[name] for of in sets.values() if name in of]
  if len(means) < len(sets):
    return ""
  half = sum((mean.ci95 or 0.0) ** 2 for mean in means) ** 0.5 / len(means)
  return wording.mean(Mean(sum(mean.value for mean in means) / len(means), half, len(means)), digits=3)


def win_rates(options: Options) -> list[Block]:
  """Table 2."""
  if not options.difficulty:
    raise ConfigError("--difficulty is missing: table 2 needs the difficulty of each instruction")
  found = [paper.alpaca_eval(path, options.difficulty, options.gamed) for path in options.input]
  rows, bars = [], []
  for x in found:
    lc = Mean(x.controlled.value, statistics.Z95 * (x.controlled.standard_error or 0.0), x.controlled.n)
    raw = Mean(x.raw.value, statistics.Z95 * (x.raw.standard_error or 0.0), x.raw.n)
    rates = wording.mean(lc), wording.mean(raw)
    rows.append([x.name, f"{raw.n:,}", f"{x.raw.missing:,}", *rates, f"{x.characters:,.0f}"])
    bars.append(ChartBar(x.name, lc.value, wording.mean(lc)))
  head = ["model", "n", "missing", "LC win rate %", "win rate %", "characters"]
  note = "Half widths are 1.96 standard errors as AlpacaEval prints them."
  note += "" if options.gamed else " Without --gamed nothing holds the weight of the length down, as AlpacaEval does."
  return [Block("AlpacaEval 2.0", [charts.bars(bars)], Table(head, rows), note)]


def judges(options: Options) -> list[Block]:
  """Table 3."""
  rows, tested, bars = [], [], []
  for name in options.input:
    place = pathlib.Path(name)
    if (place / "summary.json").is_file():
      summary = layout.read_json(place / "summary.json")
      if "kind" not in summary:
        raise RunError(f"--input: {name} is no output of `evaluate judge`")
      tested += [
        [place.name, what, wording.mean(Mean(x["value"], x["ci95"], x["n"]), digits=3), f"{x['n']:,}", summary["judge"]]
        for what, x in summary["numbers"].items()
      ]
      continue
    manifest = layout.manifest_of(_run(name), layout.QUALITY)
    if manifest is None:
      raise RunError(f"{name}: the run has not measured its judge yet (its stage {layout.QUALITY})")
    for quality in manifest["quality"]:
      agreement, spearman, error = (
        None if quality[what] is None else Mean(**quality[what]) for what in ("agreement", "spearman", "error")
      )
      pairs = f"{agreement.n:,}" if agreement else "0"
      numbers = [wording.mean(mean, digits=3) for mean in (agreement, spearman, error)]
      rows.append([place.name, f"{quality['rows']:,}", pairs, *numbers, quality["judge"]])
      bars += [ChartBar(place.name, agreement.value, wording.mean(agreement, digits=3))] if agreement else []
  blocks = []
  if rows:
    head = ["run", "annotations", "pairs", "accuracy on pairs", "Spearman", "mean error", "judge"]
    note = "Held-out annotations of each run; a pair of equal scores by the judge counts half."
    blocks.append(Block("Judges of runs", [charts.bars(bars)] if bars else [], Table(head, rows), note))
  if tested:
    blocks.append(Block("Judges tested", [], Table(["test", "subset", "accuracy", "n", "judge"], tested, text=2)))
  return blocks


def categories(options: Options) -> list[Block]:
  """Table 5."""
  blocks = []
  for run in map(_run, options.input):
    named = labelled("sets", (layout.config_in(run) or {}).get("eval", {}).get("sets", ()))
    found = list(runs.answered(run))
    for chosen in dict.fromkeys(x.chosen for x in found):
      rounds = {x.round: x for x in found if x.chosen == chosen}
      first, second = _two(options.rounds, list(rounds))
      about = runs.about(run, chosen, named)
      of = rounds[first].categories(about)
      for judge in sorted(set(layout.graders(run, first, chosen)) & set(layout.graders(run, second, chosen))):
        scores = {r: runs.scores(run, r, chosen, judge) for r in (first, second)}
        rows = []
        for category in [*dict.fromkeys(of.values()), ""]:
          own = {r: {q: x for q, x in scores[r].items() if not category or of.get(q) == category} for r in scores}
          means = [statistics.mean(list(own[r].values())) for r in (first, second)]
          difference = statistics.paired(own[second], own[first])
          n = f"{difference.n if difference else 0:,}" + (" (few)" if difference and difference.n < FEW else "")
          cells = [wording.mean(mean, digits=3) for mean in means]
          rows.append([category or "all", n, *cells, wording.mean(difference, sign=True, digits=3)])
        head = ["category", "n", f"round {first}", f"round {second}", "difference"]
        note = "" if of else "The prompts have no category: give their rows one."
        title = f"{run}, {chosen or 'data.eval'}, graded by {runs.identity(run, first, chosen, judge)}"
        blocks.append(Block(title, [], Table(head, rows), note))
  return blocks


FEW = 30  # prompts of a category below which its mean says little


def _two(given: str, rounds: Sequence[int]) -> tuple[int, int]:
  """The two rounds of --rounds; the initial SFT and the round before the last if not given."""
  if given:
    parts = given.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) in rounds for part in parts):
      raise ConfigError(f"--rounds is {given!r}; give two of {', '.join(map(str, rounds))}, such as 1,{rounds[-1]}")
    return int(parts[0]), int(parts[1])
  trained = [round for round in rounds if round > 0]
  if len(trained) < 2:
    raise RunError("table 5 compares two rounds, and fewer have been evaluated")
  return trained[0], trained[-2] if len(trained) > 2 else trained[-1]


TABLES: Mapping[str, Callable[[Options], list[Block]]] = {
  "1": sets_and_judges,
  "2": win_rates,
  "3": judges,
  "5": categories,
}
