"""The paper's figures, of runs of yours.

  python -m alma_jax.tools.evaluate figure 2 --input=runs/alma [--reference=instruct=8.1 ...] --html=progress.svg
  python -m alma_jax.tools.evaluate figure 3 --input=by_judge.jsonl --extrinsic=by_armo.jsonl --html=best_of_n.svg
  python -m alma_jax.tools.evaluate figure 3 --input=runs/alma --with=reward:models/ArmoRM --output=best_of_n

  2   the mean score of every round, for each set and judge, and of the base model; --reference draws a line for another
      model: NAME=VALUE, or an output of `evaluate grade`, which is drawn where the same judge graded
  3   best-of-n: the score that an extrinsic judge gives to the response which the selecting judge puts first of n, for
      all n up to the number of responses, at most 400. The estimate is exact: the mean over all choices of n of the
      responses. Beside it stand the choice by the extrinsic judge itself and one at random

Figure 3 takes two outputs of alma_jax.tools.score for the same responses; or a run, whose own judgments of a round
select, and whose responses --with grades: those to --prompts of the prompts of --round, the last one if not given. The
grades are in --output, and a killed command goes on where it stopped. --html=FILE writes the figure as .html, .svg or
.png.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from alma_jax import names
from alma_jax.errors import RunError
from alma_jax.evals import paper, runs
from alma_jax.judges import contract
from alma_jax.options import ConfigError, option, spread
from alma_jax.report import charts, leaflet, wording
from alma_jax.report.charts import Line, Point
from alma_jax.report.leaflet import Block
from alma_jax.report.wording import Table
from alma_jax.store import layout, shards, statistics
from alma_jax.store.data import DataError
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.store.statistics import Mean
from alma_jax.tools import command, jsonl

MOST = 400  # responses to a prompt
PART = 4  # prompts in a part
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 400)  # n in the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  input: str = option(doc="a run; for figure 3 also the selecting judge's scores by alma_jax.tools.score")
  extrinsic: str = option("", doc="figure 3: the extrinsic judge's scores of the same responses")
  with_: str = option("", doc="figure 3 of a run: the extrinsic judge, own:DIR, " + ", ".join(names.EVALUATORS.words))
  own: command.OwnOptions = spread(command.OwnOptions)
  round: int = option(0, least=0, doc="figure 3 of a run: the round whose responses are taken; 0: the last one")
  prompts: int = option(100, least=2, doc="figure 3 of a run: how many prompts")
  reference: tuple[str, ...] = option((), doc="figure 2: NAME=VALUE or an output of `evaluate grade`")
  output: str = option("", doc="figure 3 of a run: the directory of the grades")
  html: str = option("", doc="a file of the figure, .html, .svg or .png")
  model: str = option("", doc="a model, for judges that need one")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.with_:
      command.check_judge(self.with_, self.own, "with_")


FLAGS = command.Flags("evaluate figure 2|3", __doc__, Options, ("slots", "tensor"))


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  if arguments[:1] in (["-h"], ["--help"]):
    FLAGS.print_help()
    return 0
  if not arguments or arguments[0] not in FIGURES:
    FLAGS.error(f"evaluate figure {' '.join(arguments[:1])}: there are the figures {', '.join(FIGURES)}")
  options = FLAGS.values(arguments[1:])
  return command.status(lambda: run(arguments[0], options))


def run(number: str, options: Options) -> None:
  if options.html:
    leaflet.check(pathlib.Path(options.html))
  blocks = FIGURES[number](options)
  for block in blocks:
    print("\n".join([block.title, *(wording.in_lines(block.table) if block.table else ())]))
    print(f"{block.note}\n" if block.note else "")
  if options.html:
    leaflet.save(pathlib.Path(options.html), f"Figure {number}", blocks)
    print(options.html)


# Figure 2


def progress(options: Options) -> list[Block]:
  run = pathlib.Path(options.input)
  if not layout.config_in(run):
    raise RunError(f"--input: {run} is no run")
  means: dict[tuple[str, str], dict[int, Mean]] = {}
  for answered in runs.answered(run):
    for judge in layout.graders(run, answered.round, answered.chosen):
      mean = statistics.mean(list(runs.scores(run, answered.round, answered.chosen, judge).values()))
      if mean:
        key = (answered.chosen or "data.eval", runs.identity(run, answered.round, answered.chosen, judge))
        means.setdefault(key, {})[answered.round] = mean
  blocks = []
  for (asked, judge), by_round in means.items():
    points = [Point(round, mean.value, mean.ci95) for round, mean in by_round.items() if round > 0]
    if not points:
      continue
    drawn = [Line(f"{points[-1].y:.2f}", points, 0)]
    levels = {"base": by_round[0]} if 0 in by_round else {}
    levels |= {name: mean for name, mean in _references(options.reference, judge).items()}
    for colour, (name, mean) in enumerate(levels.items(), 1):
      drawn.append(Line("", [], colour, Point(0, mean.value, mean.ci95), f"{name} {mean.value:.2f}"))
    rows = [[f"round {round}", f"{mean.n:,}", wording.mean(mean, digits=3)] for round, mean in by_round.items()]
    rows += [[name, f"{mean.n:,}" if mean.n else "", wording.mean(mean, digits=3)] for name, mean in levels.items()
             if name != "base"]  # fmt: skip
    chart = charts.lines([*drawn[1:], drawn[0]], "round", "mean score")
    blocks.append(Block(f"{run}, {asked}, graded by {judge}", [chart], Table(["model", "n", "mean score"], rows)))
  if not blocks:
    raise RunError(f"{run}: no trained round has been graded yet")
  return blocks


def _references(given: Sequence[str], judge: str) -> dict[str, Mean]:
  """The lines of --reference that this judge's chart has."""
  found = {}
  for entry in given:
    name, equals, value = entry.partition("=")
    if equals:
      try:
        found[name] = Mean(float(value), None, 0)
      except ValueError:
        raise ConfigError(f"--reference is {entry!r}; {value!r} is no number") from None
      continue
    summary = pathlib.Path(entry) / "summary.json"
    if not summary.is_file():
      raise ConfigError(f"--reference is {entry!r}: neither NAME=VALUE nor an output of `evaluate grade`")
    held = layout.read_json(summary)
    number = held.get("numbers", {}).get("mean")
    if number and judge.endswith(f": {held['judge']}"):  # another judge's numbers are not drawn here
      half = (number["high"] - number["low"]) / 2 if number.get("high") is not None else None
      found[pathlib.Path(entry).name] = Mean(number["value"], half, number["n"])
  return found


# Figure 3


@dataclasses.dataclass(frozen=True)
class Scored:
  """Both judges' scores of the same responses, [prompts, N]."""

  judge: np.ndarray
  extrinsic: np.ndarray
  said: str


def best_of_n(options: Options) -> list[Block]:
  scored = _of_run(options) if layout.config_in(pathlib.Path(options.input)) else _of_files(options)
  prompts, most = scored.judge.shape
  curves = {
    "by the judge": paper.best_of_n(scored.judge, scored.extrinsic),
    "by the extrinsic judge": paper.best_of_n(scored.extrinsic, scored.extrinsic),
    "at random": np.repeat(scored.extrinsic.mean(axis=1, keepdims=True), most, axis=1),
  }
  means = {name: [statistics.mean(of[:, i]) for i in range(most)] for name, of in curves.items()}
  drawn = []
  for colour, (name, of) in enumerate(means.items()):
    points = [Point(n, mean.value, None if name == "at random" else mean.ci95) for n, mean in enumerate(of, 1) if mean]
    drawn.append(Line(name, points, 2 * colour))
  rows = []
  for n in [n for n in SHOWN if n < most] + [most]:
    rows.append([f"{n}", *(wording.mean(of[n - 1], digits=3) for of in means.values())])
  by_judge = [mean.value for mean in means["by the judge"] if mean]
  ranks = [statistics.spearman(a, b, np.arange(most)) for a, b in zip(scored.judge, scored.extrinsic, strict=True)]
  agreement = statistics.mean([found.value for found in ranks if found])
  note = f"{prompts:,} prompts with {most:,} responses each, {scored.said}; 95 % intervals over the prompts."
  note += f" The judge's choice is best at n = {1 + int(np.argmax(by_judge))}."
  if agreement:
    note += f" Rank correlation of the two judges within a prompt: {wording.mean(agreement)}."
  chart = charts.lines(drawn, "n", "extrinsic score", log=True)
  return [Block("Best of n responses", [chart], Table(["n", *means], rows), note)]


def _of_files(options: Options) -> Scored:
  if not options.extrinsic:
    raise ConfigError("--extrinsic is missing: figure 3 needs an extrinsic judge's scores of the same responses")
  judge, extrinsic = _scores(options.input), _scores(options.extrinsic)
  if judge.keys() != extrinsic.keys():
    odd = sorted(judge.keys() ^ extrinsic.keys(), key=str)
    raise DataError(
      f"{options.input} and {options.extrinsic} score different prompts: {len(odd):,} stand in one alone, the first"
      f" {odd[0]!r}"
    )
  return _square([(judge[id], extrinsic[id]) for id in judge], f"{options.input} and {options.extrinsic}")


def _scores(path: str) -> dict[object, dict[object, float]]:
  """id -> sample id -> score, of an output of alma_jax.tools.score; those without a score are left out."""
  found: dict[object, dict[object, float]] = {}
  for line, row in jsonl.read(path):
    if "id" not in row or "score" not in row or "sample_id" not in row:
      raise DataError(f"{path}, line {line}: expected a line of alma_jax.tools.score with id, sample_id and score")
    of = found.setdefault(row["id"], {})
    if row["score"] is not None:
      of[row["sample_id"]] = float(row["score"])
  return found


def _square(pairs: Sequence[tuple[Mapping, Mapping]], said: str) -> Scored:
  """The scores of as many responses to each prompt as the prompt with the fewest has from both judges."""
  common = [[sample for sample in left if sample in right] for left, right in pairs]
  most = min(MOST, min(map(len, common), default=0))
  if most < 2:
    raise DataError(f"{said}: a prompt has fewer than 2 responses that both judges scored; best-of-n needs several")
  left = np.array([[of[0][sample] for sample in samples[:most]] for of, samples in zip(pairs, common, strict=True)])
  right = np.array([[of[1][sample] for sample in samples[:most]] for of, samples in zip(pairs, common, strict=True)])
  return Scored(left, right, f"scores of {said}")


def _of_run(options: Options) -> Scored:
  run, directory = pathlib.Path(options.input), pathlib.Path(options.output)
  if not options.with_ or not options.output:
    raise ConfigError("--with and --output are missing: figure 3 of a run needs an extrinsic judge and a directory")
  judged = [r for r in layout.rounds(run) if layout.manifest_of(run, layout.stage_name(r, layout.JUDGMENTS))]
  round = options.round or max(judged, default=0)
  if round not in judged:
    raise RunError(f"{run}: round {round} has no finished judgments; there are those of {judged or 'no round'}")
  command.check_place(directory)
  directory.mkdir(exist_ok=True)
  stages = {name: layout.stage_name(round, name) for name in (layout.PROMPTS, layout.RESPONSES, layout.JUDGMENTS)}
  asked = sorted(shards.read_records(layout.parts_of(run / stages[layout.PROMPTS]) or [], Prompt), key=_id)
  asked = asked[: options.prompts]  # ids are hashes: these are as good as drawn
  kept = {prompt.id for prompt in asked}
  texts = {(x.prompt_id, x.sample_id): x for x in _kept(run, stages[layout.RESPONSES], Response, kept)}
  scores = {(x.prompt_id, x.sample_id): x.score for x in _kept(run, stages[layout.JUDGMENTS], Judgment, kept)}
  samples = {prompt.id: sorted(k for id, k in scores if id == prompt.id)[:MOST] for prompt in asked}
  asked = [prompt for prompt in asked if samples[prompt.id]]

  host, judge = command.opened_judge(options, options.with_, options.own)
  fields = {"tool": "evaluate figure 3", "judge": judge.identity, "prompts": options.prompts, "round": round}
  fields["judgments"] = layout.load_manifest(run / stages[layout.JUDGMENTS])["content"][:16]
  output = directory / "scores.jsonl"
  jsonl.check_output(output)
  groups = [asked[begin : begin + PART] for begin in range(0, len(asked), PART)]
  with jsonl.stage_of(output, options, fields) as stage:
    parts = jsonl.Parts(stage, [sum(len(samples[p.id]) for p in group) for group in groups], 1)
    with host.display.bar("judging", parts.total, "responses", done=parts.done) as bar:
      for numbers, found in parts.missing(groups):
        for number, group in zip(numbers, found, strict=True):
          pairs = [
            contract.Answered(p.messages, texts[p.id, k].text, texts[p.id, k].finished, f"prompt {p.id}, sample {k}")
            for p in group
            for k in samples[p.id]
          ]
          verdicts = iter(contract.scores(judge, pairs, bar, missing=True))
          lines = [
            {"id": p.id, "sample_id": k, "judge": scores[p.id, k], "extrinsic": next(verdicts).score}
            for p in group
            for k in samples[p.id]
          ]
          parts.write(number, lines, {"missing": sum(line["extrinsic"] is None for line in lines)})
    missing = jsonl.finish(stage, output)["counts"].get("missing", 0)
  contract.check_missing(judge.identity, missing, parts.total)
  by_prompt: dict[str, tuple[dict, dict]] = {}
  for line in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
    left, right = by_prompt.setdefault(line["id"], ({}, {}))
    left[line["sample_id"]] = line["judge"]
    if line["extrinsic"] is not None:
      right[line["sample_id"]] = line["extrinsic"]
  return _square(list(by_prompt.values()), f"{run}, round {round}, by its judge and by {judge.identity}")


def _kept(run: pathlib.Path, stage: str, kind: type, ids: set[str]) -> Iterator:
  """The records of these prompts, read part by part."""
  for path in layout.parts_of(run / stage) or []:
    yield from (record for record in shards.read_records(path, kind) if record.prompt_id in ids)


def _id(prompt: Prompt) -> str:
  return prompt.id


FIGURES: Mapping[str, Callable[[Options], list[Block]]] = {"2": progress, "3": best_of_n}
