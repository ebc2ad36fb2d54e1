"""Benchmarks: answers to their prompts, grades by a judge that did not choose the training data, comparisons.

  python -m alma_jax.tools.evaluate answer ...    a model's answers to a benchmark; answer --help says more
  python -m alma_jax.tools.evaluate grade ...     grades of answers; below
  python -m alma_jax.tools.evaluate compare ...   models side by side; compare --help
  python -m alma_jax.tools.evaluate judge ...     how often a judge puts the right answer first; judge --help
  python -m alma_jax.tools.evaluate export ...    files for the official tools; export --help

`grade`:

  python -m alma_jax.tools.evaluate grade --input=answers.jsonl --with=api:gpt-4o@https://api.openai.com/v1 \
      --protocol=mt_bench --set=question.jsonl --references=gpt-4.jsonl --output=grades/mine

The input is a file of answers: lines of alma_jax.tools.sample, {"prompt", "response"}, or the layout of AlpacaEval,
FastChat or Arena-Hard (their answers need --set, the file of the questions). --against names the answers of the model
to compare with. Files are joined by id where both have one, else by the exact prompt; rows without a partner are an
error.

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
The answers of an endpoint are kept in the directory: a killed command asks nothing twice. summary.json has the numbers.
"""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alma_jax import names
from alma_jax.errors import RunError, UserError
from alma_jax.evals import answers, protocols, scoring
from alma_jax.evals.protocols import Item
from alma_jax.judges import api, contract
from alma_jax.judges.api_asking import Answers, Asking, Limits, estimate, price_of, served_by
from alma_jax.options import ConfigError, option, spread
from alma_jax.runtime.display import Display
from alma_jax.store import shards, statistics
from alma_jax.tools import command, evaluate_answer, evaluate_compare, evaluate_export, evaluate_judge

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
PARTS = {"answer": evaluate_answer, "judge": evaluate_judge, "compare": evaluate_compare, "export": evaluate_export}
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


def grade(options: Options) -> None:
  items = answers.joined(options.input, options.set, options.against, options.references)
  if unanswered := [item for item in items if not item.answers]:
    raise answers.AnswersError(f"{options.input}: {unanswered[0].id} and {len(unanswered) - 1:,} more have no answer")
  directory = pathlib.Path(options.output)
  command.check_place(directory)
  if directory.is_file():
    raise RunError(f"--output: {directory} is a file; name a directory")
  if options.through_api:
    _through_api(options, items, directory)
  else:
    _with_judge(options, items, directory)


# An endpoint


def _through_api(options: Options, items: Sequence[Item], directory: pathlib.Path) -> None:
  grader = api.grader_of(options.with_.removeprefix("api:"), options.protocol)
  if grader.protocol.pairwise and not options.against:
    raise ConfigError(f"--protocol={grader.protocol.name} compares with another model's answers: give --against=FILE")
  kept = Answers(directory / "answers")
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
  graded = [grader.graded(item, kept, refused) for item in items]
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
    for item, x in zip(items, graded, strict=True)
  ]
  served = collections.Counter(
    served_by(response)
    for request in grader.requests(items, kept)
    if (response := kept.get(grader.endpoint, request)) is not None
  )
  spent = {
    "requests": asking.spent.requests,
    "tokens in": asking.spent.tokens_in,
    "tokens out": asking.spent.tokens_out,
  }
  more = {"scale": grader.protocol.scale, "answered by": dict(served), "this start": spent}
  _finish(options, directory, grader.identity, grader.protocol.name, lines, more)


def _limits(options: Options) -> Limits:
  return Limits(concurrency=options.concurrency, requests=options.budget, tokens=options.budget_tokens)


# Any other judge


def _with_judge(options: Options, items: Sequence[Item], directory: pathlib.Path) -> None:
  host, judge = command.opened_judge(options, options.with_, options.own)
  directory.mkdir(exist_ok=True)
  pairs = [contract.Answered(_messages(item), item.answers[-1], name=item.id, row=item.row) for item in items]
  with host.display.bar("judging", len(pairs), "answers") as bar:
    verdicts = contract.scores(judge, pairs, bar, missing=True)
  lines = [
    {
      "id": item.id,
      "category": item.category,
      "score": verdict.score,
      "parts": {f"turn_{len(item.turns)}": verdict.score},
      "battles": [],
      "mass": verdict.mass,
      "details": None if verdict.details is None else dict(verdict.details),
    }
    for item, verdict in zip(items, verdicts, strict=True)
  ]
  if options.with_ == "rules:ifeval":  # as its official checker's lines
    keys = [(item.row or {}).get("key", item.id) for item in items]
    lines = [{"key": key, **(line["details"] or {}), **line} for key, line in zip(keys, lines, strict=True)]
  _finish(options, directory, judge.identity, "rating", lines, {"scale": judge.scale})


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
  options: Options, directory: pathlib.Path, identity: str, protocol: str, lines: Sequence[dict[str, Any]], more: Any
) -> None:
  """Write grades.jsonl and summary.json; raise if too much is missing."""
  named = ("input", "set", "against", "references")
  made_of = {name: shards.digest(file)[:16] for name in named if (file := getattr(options, name))}
  decides = {"judge": identity, "protocol": protocol, "made_of": made_of}
  parts = [verdict for line in lines for verdict in line["parts"].values()]
  missing = sum(verdict is None for verdict in parts)
  numbers = numbers_of(protocol, lines) if missing < len(parts) else {}
  summary = {"items": len(lines), "missing": missing, "of": len(parts), "numbers": numbers} | more
  command.write_grades(directory, decides, lines, summary)
  print(
    f"{directory / 'grades.jsonl'}: {len(lines):,} answers, {missing:,} of {len(parts):,} verdicts missing; {identity}"
  )
  for name, number in numbers.items():
    print(f"  {name:24} {number['value']:.3f}" + _interval(number) + f"  n={number['n']:,}")
  if missing:
    why = next((reason for line in lines for reason in line.get("missing", {}).values()), "no score")
    print(f"  the first one missing: {why}")
  contract.check_missing(identity, missing, len(parts))


def _interval(number: dict[str, Any]) -> str:
  low, high = number.get("low"), number.get("high")
  return "" if low is None or high is None else f"  [{low:.3f}, {high:.3f}]"


def numbers_of(protocol: str, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """name -> value, n and 95 % interval over questions."""
  if protocol == "mt_bench":
    return _mt_bench(lines)
  if protocol.startswith("arena_hard"):
    held = [line["battles"] for line in lines]
    found = scoring.arena_hard(held)
    sums = np.array([(sum(x), len(x)) for x in held if x], np.float64)
    interval = statistics.bootstrap(sums, lambda x: float(100 * x[:, 0].sum() / x[:, 1].sum()))
    ci = {"low": interval.low, "high": interval.high}
    return {"win rate %": {"value": found.value, "n": found.questions, **ci}} | _consistency(lines)
  scores = [line["score"] for line in lines]
  if protocol in ("alpaca_eval", "lima_pairwise"):
    found = scoring.win_rate(scores)
    half = None if found.standard_error is None else statistics.Z95 * found.standard_error
    both = {
      "win rate %": _number(found.value, half, found.n),
      "discrete win rate %": _number(found.discrete, None, found.n),
    }
    return both | (_consistency(lines) if protocol == "lima_pairwise" else {})
  return {"mean": _mean([score for score in scores if score is not None])}


def _mt_bench(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  rated = [
    scoring.Rated(line["id"], int(part.rpartition("_")[2]), line["category"], rating)
    for line in lines
    for part, rating in line["parts"].items()
  ]
  known = [x for x in rated if x.rating is not None]
  found, out = scoring.mt_bench(rated), {}

  def clustered(kept: Sequence[scoring.Rated], value: float) -> dict[str, Any]:
    mean = statistics.clustered([x.rating or 0.0 for x in kept], np.array([str(x.question) for x in kept]))
    return _number(value, mean.ci95 if mean else None, len(kept))

  out["average"] = clustered(known, found.average)
  for turn, value in found.turns.items():
    out[f"turn {turn}"] = clustered([x for x in known if x.turn == turn], value)
  for category, value in found.categories.items():
    if category:
      out[category] = clustered([x for x in known if x.category == category], value)
  return out


def _consistency(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """How often both orders name the same winner; the model stands second in game_1."""
  first = {"A": 1.0, "B": 0.0, "C": 0.5} | {label: share for label, (share, _) in protocols.LABELS.items()}
  both = [(line["parts"].get("game_1"), line["parts"].get("game_2")) for line in lines]
  shares = [(None if a is None else 1 - first[a], None if b is None else first[b]) for a, b in both]
  same, n = scoring.consistent(shares), sum(a is not None and b is not None for a, b in shares)
  return {} if same is None else {"both orders agree": _number(same, None, n)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
  mean = statistics.mean(values)
  if mean is None:
    raise UserError("no answer has a score")
  return _number(mean.value, mean.ci95, mean.n)


def _number(value: float, half: float | None, n: int) -> dict[str, Any]:
  ends = {} if half is None else {"low": value - half, "high": value + half}
  return {"value": value, "n": n, **ends}


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
