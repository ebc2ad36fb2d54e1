"""Benchmarks: answers to their prompts, grades by a judge that did not choose the training data, comparisons.

  python -m alma_jax.tools.evaluate answer ...    a model's answers to a benchmark; answer --help says more
  python -m alma_jax.tools.evaluate grade ...     grades of answers; below
  python -m alma_jax.tools.evaluate compare ...   models side by side; compare --help
  python -m alma_jax.tools.evaluate judge ...     how often a judge puts the right answer first; judge --help
  python -m alma_jax.tools.evaluate export ...    files for the official tools; export --help
  python -m alma_jax.tools.evaluate table 1|2|3|5 ...   figure 2|3 ...     the paper's, of runs; table --help

`grade`:

  python -m alma_jax.tools.evaluate grade --input=answers.jsonl --with=api:gpt-4o@https://api.openai.com/v1 \
      --protocol=mt_bench --set=question.jsonl --references=gpt-4.jsonl --output=grades/mine

The input is a run, all of whose rounds and sets are graded, each in its own folder of the output; or the --output of
`evaluate answer`; or a file of answers: lines of alma_jax.tools.sample, {"prompt", "response"}, or the layout of
AlpacaEval, FastChat or Arena-Hard (their answers need --set, the file of the questions). --against names the answers
of the model to compare with, of a run one of its rounds, such as round_01. Files are joined by id where both have one,
else by the exact prompt; rows without a partner are an error.

--with=api:MODEL@URL asks an OpenAI-compatible endpoint by a --protocol: alma, mt_bench, lima_1_6 rate; lima_pairwise,
alpaca_eval, arena_hard_2024 and arena_hard_2025 compare. The key is the environment's ALMA_API_KEY (docs/api_judge.md).

  --dry_run             requests, tokens and, with --prices, money; nothing is sent
  --budget=N            send N requests at most in this start; the same command goes on
  --batch_out=FILE      write the requests as an OpenAI batch file, which vLLM's run_batch reads, too; nothing is sent
  --batch_in=FILE       read the results of that file, in any order, and grade with them; nothing is sent

--with=own:RUN (or a stage, or a model's directory) is a fine-tuned judge as alma_jax.tools.score has it. Any other
judge (a word of the list below, or my_judges:NAME) rates each answer; --model is for judges of yours that need one.

--output is a directory. Its grades.jsonl has a line per answer:

  {"id", "category", "score", "parts", "battles", "replies", "missing", "details"}

`score` is null where the verdict is missing; it is never guessed, and the command fails if more than 2 % are missing.
A killed command goes on where it stopped, and the answers of an endpoint are kept in the directory: nothing is asked
twice. summary.json has the numbers.
"""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alma_jax import names
from alma_jax.errors import RunError
from alma_jax.evals import answers, protocols, runs, totals
from alma_jax.evals.protocols import Item
from alma_jax.judges import api, contract
from alma_jax.judges.api_asking import Answers, Asking, Limits, estimate, price_of, served_by
from alma_jax.options import ConfigError, labelled, option, spread
from alma_jax.runtime.display import Display
from alma_jax.store import layout, shards
from alma_jax.tools import (
  command,
  evaluate_answer,
  evaluate_compare,
  evaluate_export,
  evaluate_figure,
  evaluate_judge,
  evaluate_table,
  jsonl,
)

PART = 256  # answers in a part: what a killed command does again at most
PROTOCOLS = Literal[
  "alma", "mt_bench", "lima_1_6", "lima_pairwise", "alpaca_eval", "arena_hard_2024", "arena_hard_2025"
]
assert set(PROTOCOLS.__args__) == set(protocols.NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  with_: str = option(doc="the judge: own:DIR, " + ", ".join(names.EVALUATORS.words))
  protocol: PROTOCOLS = option("alma", doc=", ".join(protocols.NAMES))
  set: str | None = option(None, doc="the file of the questions, where the answers do not hold them")
  against: str | None = option(None, doc="the answers of the model to compare with")
  references: str | None = option(None, doc="right answers, for the categories of mt_bench that need them")
  own: command.OwnOptions = spread(command.OwnOptions)
  model: str = option("", doc="a model, for judges that need one")
  batch_out: str | None = option(None, doc="write the requests here instead of sending them")
  batch_in: str | None = option(None, doc="the results of such a file")
  prices: str | None = option(None, doc='JSON: {"MODEL": {"input": 2.5, "output": 10.0}}, of a million tokens')
  budget: int | None = option(None, least=0, doc="requests that this start may send")
  budget_tokens: int | None = option(None, least=0, doc="tokens, in and out, that this start may use")
  concurrency: int = option(8, least=1, doc="requests at a time")
  dry_run: bool = option(False, doc="say what would be sent")

  def __post_init__(self) -> None:
    super().__post_init__()
    command.check_judge(self.with_, self.own, "with_")
    live_only = ("batch_out", "batch_in", "prices", "budget", "budget_tokens", "dry_run")
    given = [name for name in live_only if getattr(self, name) not in (None, False)]
    if given and not self.through_api:
      raise ConfigError(f"{given[0]} is for --with=api:MODEL@URL, and with_ is {self.with_!r}")
    if self.batch_out and self.batch_in:
      raise ConfigError("batch_out and batch_in are two commands: write the file, run it, then read its results")

  @property
  def through_api(self) -> bool:
    return self.with_.startswith("api:")


# The commands that are files of their own
PARTS = {
  "answer": evaluate_answer,
  "judge": evaluate_judge,
  "compare": evaluate_compare,
  "export": evaluate_export,
  "table": evaluate_table,
  "figure": evaluate_figure,
}
FLAGS = command.Flags("evaluate grade", __doc__, Options, ("slots", "tensor"))


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  if not arguments or arguments[0] in ("-h", "--help"):
    FLAGS.print_help()
    return 0
  if arguments[0] in PARTS:
    return PARTS[arguments[0]].main(arguments[1:])
  if arguments[0] != "grade":
    known = ", ".join(("grade", *PARTS))
    print(
      f"error: alma evaluate has no command {arguments[0]!r}; there are {known} (--help says more)", file=sys.stderr
    )
    return 2
  options = FLAGS.values(arguments[1:])
  return command.status(lambda: grade(options))


@dataclasses.dataclass(frozen=True)
class Unit:
  """One model's answers to one set, and where their grades go."""

  directory: pathlib.Path
  items: Sequence[Item]
  asked: Sequence[contract.Answered]  # the same for judges of single responses
  made_of: Mapping[str, str]  # digests
  name: str = ""  # of a run's: "round 2, mt_bench"


def grade(options: Options) -> None:
  directory = pathlib.Path(options.output)
  command.check_place(directory)
  if directory.is_file():
    raise RunError(f"--output: {directory} is a file; name a directory")
  run = pathlib.Path(options.input)
  units = _of_run(options, run) if layout.config_in(run) else [_of_file(options)]
  if options.through_api:
    _through_api(options, units, directory)
  else:
    _with_judge(options, units)


def _of_file(options: Options) -> Unit:
  """The answers of a file, or of the --output of `evaluate answer`."""
  path = pathlib.Path(options.input)
  path = path / "answers.jsonl" if path.is_dir() else path
  if not path.is_file():
    raise RunError(f"--input: {options.input} is no file of answers, no --output of `evaluate answer` and no run")
  items = answers.joined(path, options.set, options.against, options.references)
  if unanswered := [item for item in items if not item.answers]:
    raise answers.AnswersError(f"{path}: {unanswered[0].id} and {len(unanswered) - 1:,} more have no answer")
  asked = [contract.Answered(_messages(item), item.answers[-1], name=item.id, row=item.row) for item in items]
  files = {"input": path, "set": options.set, "against": options.against, "references": options.references}
  made_of = {name: shards.digest(file)[:16] for name, file in files.items() if file}
  return Unit(pathlib.Path(options.output), items, asked, made_of)


def _of_run(options: Options, run: pathlib.Path) -> list[Unit]:
  """The answers of all rounds of a run to all of its sets; --against names a round."""
  if options.set or options.references:
    raise ConfigError("--set and --references are for files of answers; a run's config names the files of its sets")
  named = labelled("sets", (layout.config_in(run) or {}).get("eval", {}).get("sets", ()))
  found, units = list(runs.answered(run)), []
  for chosen in dict.fromkeys(answered.chosen for answered in found):
    about, rounds = runs.about(run, chosen, named), [x for x in found if x.chosen == chosen]
    other = next((x for x in rounds if options.against in (x.name, layout.round_name(x.round))), None)
    if options.against and other is None:
      raise RunError(f"--against: {run} has no {options.against!r}; there are {', '.join(x.name for x in rounds)}")
    for answered in rounds:
      if answered == other:
        continue
      items = answered.items(about, other)
      asked = [
        contract.Answered(r.messages, r.response, r.finished, f"{answered.stage}, prompt {r.prompt_id}", item.row)
        for r, item in zip(answered.records(), items, strict=True)
      ]
      made_of = {"input": answered.digest[:16]} | ({"against": other.digest[:16]} if other else {})
      place = pathlib.Path(options.output) / layout.answers_name(chosen) / layout.round_name(answered.round)
      units.append(Unit(place, items, asked, made_of, f"{answered.name}, {chosen or 'data.eval'}"))
  return units


# An endpoint


def _through_api(options: Options, units: Sequence[Unit], directory: pathlib.Path) -> None:
  grader = api.grader_of(options.with_.removeprefix("api:"), options.protocol)
  if grader.protocol.pairwise and not options.against:
    raise ConfigError(f"--protocol={grader.protocol.name} compares with another model's answers: give --against=FILE")
  kept, items = Answers(directory / "answers"), [item for unit in units for item in unit.items]
  requests = grader.requests(items, kept)
  if options.dry_run:
    price = price_of(options.prices, grader.endpoint.model) if options.prices else None
    print(
      "\n".join([f"{grader.identity}: {len(items):,} items", *estimate(grader.endpoint, kept, requests).lines(price)])
    )
    return
  directory.mkdir(exist_ok=True)
  if options.batch_out:
    count = kept.write_batch(requests, grader.endpoint, options.batch_out)
    print(f"{options.batch_out}: {count:,} requests; run it, then give its results as --batch_in")
    return
  asking = Asking(grader.endpoint, kept, _limits(options))
  refused: dict[str, str] = {}
  if options.batch_in:
    found = kept.read_batch(options.batch_in, requests, grader.endpoint)
    refused = found.failed
    print(f"{options.batch_in}: {found.kept:,} answers, {len(found.failed):,} errors, {len(found.absent):,} not there")
    if found.strange:
      raise RunError(
        f"{options.batch_in} holds {len(found.strange):,} results of other requests, the first {found.strange[0]!r}:"
        " it was made for other answers, another judge or another protocol"
      )
  else:
    missing = len(kept.unanswered(grader.endpoint, requests))
    with Display().bar("judging", missing, "requests") as bar:

      def progress(count: int) -> None:
        bar.update(count)

      refused = grader.ask(items, asking, progress)
  spent = {
    "requests": asking.spent.requests,
    "tokens in": asking.spent.tokens_in,
    "tokens out": asking.spent.tokens_out,
  }
  for unit in units:
    served = collections.Counter(
      served_by(response)
      for request in grader.requests(unit.items, kept)
      if (response := kept.get(grader.endpoint, request)) is not None
    )
    graded = [grader.graded(item, kept, refused) for item in unit.items]
    lines = [
      {
        "id": item.id,
        "category": item.category,
        "score": x.grade.score,
        "parts": dict(x.grade.parts),
        "battles": list(x.grade.battles),
        "replies": dict(x.replies),
        "missing": dict(x.missing),
      }
      for item, x in zip(unit.items, graded, strict=True)
    ]
    more = {"scale": grader.protocol.scale, "answered by": dict(served), "this start": spent}
    _finish(unit, {"judge": grader.identity, "protocol": grader.protocol.name}, lines, more, written=False)


def _limits(options: Options) -> Limits:
  return Limits(concurrency=options.concurrency, requests=options.budget, tokens=options.budget_tokens)


# Any other judge


def _with_judge(options: Options, units: Sequence[Unit]) -> None:
  host, judge = command.opened_judge(options, options.with_, options.own)
  by = {"judge": judge.identity, "protocol": "rating"}
  for unit in units:
    unit.directory.mkdir(exist_ok=True, parents=True)
    command.check_held(unit.directory, by | {"made_of": unit.made_of})
    output = unit.directory / "grades.jsonl"
    jsonl.check_output(output)
    with jsonl.stage_of(output, options, {"tool": "evaluate grade", **by, **unit.made_of}) as stage:
      shares = [range(len(unit.items))[begin : begin + PART] for begin in range(0, len(unit.items), PART)]
      parts = jsonl.Parts(stage, [len(share) for share in shares], 1)
      called = f"judging {unit.name}" if unit.name else "judging"
      with host.display.bar(called, parts.total, "answers", done=parts.done) as bar:
        for numbers, groups in parts.missing(list(share) for share in shares):
          for number, share in zip(numbers, groups, strict=True):
            verdicts = contract.scores(judge, [unit.asked[i] for i in share], bar, missing=True)
            found = [_line(unit.items[i], v) for i, v in zip(share, verdicts, strict=True)]
            if options.with_ == "rules:ifeval":  # as its official checker's lines
              keys = [(unit.items[i].row or {}).get("key", unit.items[i].id) for i in share]
              found = [{"key": key, **(line["details"] or {}), **line} for key, line in zip(keys, found, strict=True)]
            parts.write(number, found, {})
      jsonl.finish(stage, output)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    _finish(unit, by, lines, {"scale": judge.scale}, written=True)


def _line(item: Item, verdict: contract.Verdict) -> dict[str, Any]:
  return {
    "id": item.id,
    "category": item.category,
    "score": verdict.score,
    "parts": {f"turn_{len(item.turns)}": verdict.score},
    "battles": [],
    "mass": verdict.mass,
    "details": None if verdict.details is None else dict(verdict.details),
  }


def _messages(item: Item) -> list[dict[str, str]]:
  """The conversation up to its last turn."""
  said = []
  for at, turn in enumerate(item.turns):
    said.append({"role": "user", "content": turn})
    if at < len(item.turns) - 1:
      said.append({"role": "assistant", "content": item.answers[at]})
  return said


# What is written


def _finish(
  unit: Unit, by: Mapping[str, str], lines: Sequence[dict[str, Any]], more: Mapping[str, Any], written: bool
) -> None:
  """Write grades.jsonl, unless it is `written`, and summary.json; raise if too much is missing."""
  verdicts = [verdict for line in lines for verdict in line["parts"].values()]
  missing = sum(verdict is None for verdict in verdicts)
  numbers = totals.numbers_of(by["protocol"], lines) if missing < len(verdicts) else {}
  summary = {"items": len(lines), "missing": missing, "of": len(verdicts), "numbers": numbers, **more}
  unit.directory.mkdir(exist_ok=True, parents=True)
  command.write_grades(unit.directory, {**by, "made_of": unit.made_of}, None if written else lines, summary)
  place, judge = unit.directory / "grades.jsonl", by["judge"]
  print(f"{place}: {len(lines):,} answers, {missing:,} of {len(verdicts):,} verdicts missing; {judge}")
  for name, number in numbers.items():
    print(f"  {name:24} {number['value']:.3f}" + _interval(number) + f"  n={number['n']:,}")
  if missing:
    why = next((reason for line in lines for reason in line.get("missing", {}).values()), "no score")
    print(f"  the first one missing: {why}")
  contract.check_missing(judge, missing, len(verdicts))


def _interval(number: dict[str, Any]) -> str:
  low, high = number.get("low"), number.get("high")
  return "" if low is None or high is None else f"  [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
