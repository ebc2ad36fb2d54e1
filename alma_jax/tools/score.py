"""Scores responses with a judge, without generating anything.

  python -m alma_jax.tools.score --model=runs/mini --input=pairs.jsonl --output=scores.jsonl

A row of the input has `messages` or `prompt`, and `response`, or `messages` that end with the assistant's turn; or it
is a line of alma_jax.tools.sample, with many `responses` to one prompt. A line of the output is one response, in the
order of the input:

  {"id", "sample_id" (where there were `responses`), "score", "probs" (of the scores 0 .. 10), "mass"}

`id` is the row's own, else a hash of its prompt. `mass` is the probability that the judge gave to the eleven scores
together before `probs` were made to sum to 1: far below 1, the judge was not trained on this template. --mode says what
`score` is: the mean of the scores under `probs`, the likeliest one, or the mean of --samples drawn from them, which
depends on seed, id, sample_id and the response alone. --shots=FILE shows the model, a base model, those annotations as
examples. A template that reasons first (a2_reasoned) has --samples reasonings, and the score is read behind them.

--judge=reward:DIR is a reward model, --judge=implicit:DIR,REF two checkpoints (docs/judges.md); neither needs --model.
--judge=rules:NAME judges by rule: rules:ifeval by the row's `instruction_id_list` and `kwargs`, rules:exact_match by
its `reference` (docs/benchmarks.md).
--judge=my_judges:NAME names a judge of your own (docs/your_own_judge.md). It is called with the model, if --model names
one, and with these flags. Its scores are in its own unit; `probs` and `mass` are null where it has none, and a line has
its `details` where it gives some. `score` is null where the judge's answer could not be read; the command fails if that
is so for more than 2 % of the responses.

FILE appears when it is whole; until then its parts are in FILE.parts, and the same command goes on where a killed one
stopped. The file then has the bytes of one that was never killed (on the same devices and with the same --rows, else
the last digits differ). Delete both to have the file made again.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax import names
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge, Verdict
from alma_jax.judges.own import OwnJudge
from alma_jax.keys import random_numbers
from alma_jax.options import ConfigError, option
from alma_jax.runtime.host import Host
from alma_jax.store import data, layout
from alma_jax.store.data import DataError
from alma_jax.text.chat import Messages
from alma_jax.tools import command, jsonl

PART = 2048  # responses in a part
FILLINGS = 64  # calls of --rows responses that are computed together
MASS = 0.9  # a judge that knows its template gives nearly all probability to the scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  model: str = option("", doc="as for alma_jax.tools.sample; of a run it is the judge")
  judge: str | None = option(
    None,
    names=names.EVALUATORS,
    doc="reward:DIR, implicit:DIR,REF or a judge of your own as package.module:NAME, instead of the model as a judge",
  )
  mode: Literal["expected", "argmax", "sampled"] = option("expected", doc="expected, argmax or sampled")
  template: str | None = option(
    None, names=names.JUDGE_TEMPLATES, doc="the judge's template (that of the model's run, else a2)"
  )

  samples: int = option(1, least=1, doc="draws of --mode=sampled; reasonings of a template that reasons first")
  shots: str | None = option(None, doc="a file of annotations that the model, a base model, is shown as examples")
  skip: bool = option(False, doc="leave out responses that are too long for the judge's model, and count them")

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.model and not self.has_judge:
      raise ConfigError("model is missing: give the model that judges, or --judge")

  @property
  def has_judge(self) -> bool:
    """True if --judge names the judge, False if the model is the judge."""
    return self.judge not in (None, "none")


FLAGS = command.Flags("score", __doc__, Options, ("slots",))


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  output = pathlib.Path(options.output)
  jsonl.check_output(output)
  raw = options.shots is not None  # what examples are shown to is a base model, which has no chat format
  opened = command.open_model(options, layout.judge_of, raw) if options.model else None
  host = opened.host if opened else command.WithoutModel(options, "--judge")
  judge = _judge(options, opened, host)
  sizes, skipped = _survey(options, judge)
  together = max(1, FILLINGS * options.engine.rows * host.local_ways // max(1, sizes[0]))
  scored, masses, warned = 0, 0.0, False
  fields = command.decides("score", options, opened) | {"judge": judge.identity, "mode": options.mode}
  fields["seed"] = options.seed if options.mode == "sampled" else None
  fields |= {"samples": options.samples} if options.mode == "sampled" and options.samples > 1 else {}
  with jsonl.stage_of(output, options, fields) as stage:
    there, parts = stage.done, jsonl.Parts(stage, sizes, together)
    host.display.say(f"{judge.identity}: {options.mode} score of {parts.total:,} responses")
    with host.display.bar("scoring", parts.total, "responses", done=parts.done) as bar:
      for numbers, rows in parts.missing(_in_parts(options, judge)):
        pairs = [
          Answered(row.messages, a.text, a.finished, f"{options.input}, id {row.id}" + _of_sample(a), row.fields)
          for part in rows
          for row in part
          for a in row.answers
        ]
        found = iter(contract.scores(judge, pairs, bar, missing=True))
        for number, part in zip(numbers, rows, strict=True):
          lines = [_line(options, judge, row, a, next(found)) for row in part for a in row.answers]
          mass = [line["mass"] for line in lines if line["mass"] is not None]
          known = [line["score"] for line in lines if line["score"] is not None]
          counts = {"score_sum": sum(known), "mass_sum": sum(mass), "masses": len(mass)}
          counts["missing"] = len(lines) - len(known)
          parts.write(number, lines, counts)
          scored, masses = scored + len(mass), masses + sum(mass)
          if masses < MASS * scored and not warned and isinstance(judge, OwnJudge):
            warned = True
            host.display.say(_warning(judge.template.name, masses / scored))
    scorer = {"identity": judge.identity, "scale": judge.scale}
    manifest = jsonl.finish(stage, output, judge=scorer, skipped=skipped)
  counts, seconds = manifest["counts"], manifest["seconds"]
  print(f"{output}: {parts.total:,} responses" + (", all there before" if there else ""))
  if skipped:
    share = skipped / (skipped + parts.total)
    print(f"{skipped:,} responses left out ({share:.1%}): too long for the {host.config.max_positions:,} positions")
  if known := parts.total - counts["missing"]:
    mass = f", mean mass {counts['mass_sum'] / counts['masses']:.3f}" if counts["masses"] else ""
    rate = f"{seconds:.1f} s, {parts.total / max(seconds, 1e-3):,.0f} responses/s"
    print(f"{known:,} responses: mean score {counts['score_sum'] / known:.2f}{mass}; {rate}")
  contract.check_missing(judge.identity, counts["missing"], parts.total)


# The judge


def _judge(options: Options, opened: command.Opened | None, host: Host) -> Judge:
  if options.has_judge:
    return contract.by_name(names.EVALUATORS, str(options.judge), host, options, "--judge")
  if opened is None:
    raise RuntimeError("neither a model nor a judge")
  own = command.OwnOptions(template=options.template, samples=options.samples, shots=options.shots)
  judge = command.own_judge(opened, own, options.seed)
  return judge  # pyright: ignore[reportReturnType]  # a cached_property is a property


def _warning(template: str, mass: float) -> str:
  return (
    f"warning: the judge gives a probability of only {mass:.2f} to the eleven scores together: template {template!r}"
    f" does not fit it, and the scores mean little. --template may be {', '.join(names.JUDGE_TEMPLATES.words)}; a judge"
    " that a run has trained is known with its template when --model is the run or its stage."
  )


# Rows


@dataclasses.dataclass(frozen=True)
class Answer:
  sample: str | int | None
  text: str
  finished: bool = True  # False where the length limit cut it, as a line of the sampler says


@dataclasses.dataclass(frozen=True)
class Row:
  line: int
  id: str | int
  messages: Messages
  answers: tuple[Answer, ...]
  fields: Mapping[str, Any]  # as the file has them, for judges that need a reference
  skipped: int = 0  # answers that are too long and left out


def _in_parts(options: Options, judge: Judge) -> Iterator[list[Row]]:
  rows = rows_of(options.input)
  if options.skip and isinstance(judge, OwnJudge):
    rows = (_shortened(judge, row) for row in rows)
  return jsonl.chunks(rows, PART, lambda row: len(row.answers))


def _shortened(judge: OwnJudge, row: Row) -> Row:
  """The row without the answers that are too long for the judge's model."""
  kept = tuple(answer for answer in row.answers if not _too_long(judge, row, answer))
  return dataclasses.replace(row, answers=kept, skipped=len(row.answers) - len(kept))


def rows_of(path: str) -> Iterator[Row]:
  """The rows of the input; a DataError names line and field of what cannot be one."""
  for line, item in jsonl.read(path):
    where = f"{path}, line {line}"
    many = item.get("responses") is not None
    if many and item.get("response") is not None:
      raise DataError(f"{where}: both `response` and `responses`; remove one")
    row = data.row_of(item, () if many else ("response",), line, where)
    data.check_turns(row.messages, where)
    answers = _answers(item["responses"], f"{where}, field responses") if many else (Answer(None, row.response or ""),)
    yield Row(line, jsonl.id_of(item, row.messages, where), row.messages, answers, item)


def _answers(value: Any, where: str) -> tuple[Answer, ...]:
  if not isinstance(value, list):
    raise DataError(f'{where}: expected a list of {{"sample_id", "text"}}, found {str(value)[:40]}')
  found = []
  for at, answer in enumerate(value):
    if not isinstance(answer, dict) or "text" not in answer:
      raise DataError(f'{where}[{at}]: expected an object with "text", found {str(answer)[:40]}')
    sample = answer.get("sample_id", at)
    if isinstance(sample, bool) or not isinstance(sample, str | int):
      raise DataError(f"{where}[{at}].sample_id: expected a whole number or a string, found {str(sample)[:40]}")
    text = data.text_of(answer["text"], f"{where}[{at}].text")
    found.append(Answer(sample, text, answer.get("finished") is not False))
  return tuple(found)


def _survey(options: Options, judge: Judge) -> tuple[list[int], int]:
  """The number of responses in each part, and of those that are left out; all of the input is checked before the first
  one is scored."""
  sizes, skipped = [], 0
  for part in _in_parts(options, judge):
    sizes.append(sum(len(row.answers) for row in part))
    skipped += sum(row.skipped for row in part)
    if isinstance(judge, OwnJudge) and not options.skip:
      for row in part:
        _check_length(options, judge, row)
  if not sizes:
    raise DataError(f"{options.input}: the file holds no rows")
  return sizes, skipped


def _check_length(options: Options, judge: OwnJudge, row: Row) -> None:
  for length in filter(None, (_too_long(judge, row, answer) for answer in row.answers)):
    raise DataError(
      f"{options.input}, line {row.line}: prompt and response are {length} tokens in template {judge.template.name};"
      f" the model has {judge.host.config.max_positions} positions: shorten them, or give --skip to leave such rows out"
    )


def _too_long(judge: OwnJudge, row: Row, answer: Answer) -> int:
  """The tokens of a response with its prompt and the template if the model has no positions for them, else 0."""
  template, positions = judge.template, judge.host.config.max_positions
  around = len(f"{template.instruction}{template.item}{template.answer_open}".encode()) + 64
  most = sum(len(m["role"]) + len(m["content"].encode()) for m in row.messages) + around + len(answer.text.encode())
  if not (judge.shots or judge.draws) and most <= positions:  # a token is a byte at least: no need to count
    return 0
  length = judge.tokens(row.messages, answer.text)
  return length if length > positions else 0


def _of_sample(answer: Answer) -> str:
  return "" if answer.sample is None else f", sample {answer.sample}"


def _line(options: Options, judge: Judge, row: Row, answer: Answer, verdict: Verdict) -> dict[str, Any]:
  if options.mode != "expected" and verdict.probs is None:
    raise ConfigError(f"--mode={options.mode} needs probabilities, and the judge {judge.identity!r} none")
  words = options.seed, "score", row.id, answer.sample, answer.text
  score = _score(options.mode, verdict, words, options.samples)
  known = {"id": row.id} if answer.sample is None else {"id": row.id, "sample_id": answer.sample}
  details = {} if verdict.details is None else {"details": verdict.details}
  return {**known, "score": score, "probs": verdict.probs, "mass": verdict.mass, **details}


def _score(mode: str, verdict: Verdict, words: Sequence[object], samples: int = 1) -> float | None:
  """What --mode reads from a verdict; `words` decide what is drawn."""
  if mode == "expected" or verdict.probs is None:
    return verdict.score
  if mode == "argmax":
    return float(np.argmax(verdict.probs))
  reached = np.cumsum(verdict.probs)
  drawn = random_numbers(*words).random(samples) * reached[-1]
  return float(np.searchsorted(reached, drawn, side="right").mean())


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
