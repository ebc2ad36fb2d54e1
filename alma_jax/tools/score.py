"""Scores responses with a judge, from 0 to 10, without generating anything.

  python -m alma_jax.tools.score --model=runs/mini --input=pairs.jsonl --output=scores.jsonl

A row of the input has `messages` or `prompt`, and `response`, or `messages` that end with the assistant's turn; or it
is a line of alma_jax.tools.sample, with many `responses` to one prompt. A line of the output is one response, in the
order of the input:

  {"id", "sample_id" (where there were `responses`), "score", "probs" (of the scores 0 .. 10), "mass"}

`id` is the row's own, else a hash of its prompt. `mass` is the probability that the judge gave to the eleven scores
together before `probs` were made to sum to 1: far below 1, the judge was not trained on this template. --mode says what
`score` is: the mean of the scores under `probs`, the likeliest one, or one drawn from them, which depends on seed, id,
sample_id and the response alone.

The same command goes on where a killed one stopped; the file then has the bytes of one that was never killed (on the
same devices and with the same --rows, else the last digits differ).
"""

import dataclasses
import sys
import time

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges.own import TEMPLATES, Judge, template_by_name, verdicts
from alma_jax.keys import random_numbers
from alma_jax.llama.config import read_config
from alma_jax.store import data
from alma_jax.store.data import DataError
from alma_jax.text import judge as text
from alma_jax.tools import command, jsonl

FILLINGS = 64  # calls of --rows responses in a chunk
MASS = 0.9  # a judge that knows its template gives nearly all probability to the scores


def main(arguments):
  """The exit status."""
  flags = _flags().values(arguments)
  return command.status(lambda: run(flags))


def _flags():
  flags = command.Flags("alma_jax.tools.score", __doc__)
  add = flags.add_argument
  model = command.MODEL.format(stage="its judge")
  add("--model", required=True, metavar="DIR", help=model)
  add("--input", required=True, metavar="FILE", help="JSONL")
  add("--output", required=True, metavar="FILE", help="JSONL; FILE.meta.json beside it says how it was made")
  modes = command.word("expected", "argmax", "sampled")
  add("--mode", type=modes, default="expected", help="expected, argmax or sampled (expected)")
  templates = command.word(*TEMPLATES)
  add("--template", type=templates, help=f"{', '.join(TEMPLATES)} (that of the model's run, else a2)")
  add("--seed", type=command.NATURAL, default=0, help="of --mode=sampled (0)")
  add("--chat", type=command.CHAT, help="chat format, where the model's files do not tell")
  add("--rows", type=command.COUNT, default=32, help="responses per call, per copy of the model (32)")
  add("--tensor", type=command.COUNT, default=1, help="devices that share one copy of the model (1)")
  return flags


def run(flags):
  model, host, checkpoint = command.opened(flags, command.judge_of)
  judge = Judge(checkpoint, template_by_name(flags.template or model.template or "a2"), "expected")
  total = _survey(flags, host, judge.template)
  fields, names = command.decides("score", flags, host, checkpoint)
  fields |= {"mode": flags.mode, "seed": flags.seed if flags.mode == "sampled" else None}
  fields |= {"template": judge.template.name, "template text": jsonl.short_digest(dataclasses.asdict(judge.template))}
  per_chunk, answers = FILLINGS * flags.rows * host.local_ways, lambda row: len(row.answers)
  began, scored, scores, masses, warned = time.monotonic(), 0, 0.0, 0.0, False
  with jsonl.Output(flags.output, fields, names, total) as out:
    host.say(f"{model.directory}: template {judge.template.name}, {flags.mode} score of {total:,} responses")
    with host.bar("scoring", total, "responses", done=out.done) as bar:
      for rows in jsonl.chunks(asked(flags), per_chunk, answers):
        if out.has(sum(map(answers, rows))):
          continue
        lines = _scored(flags, host, judge, rows, bar)
        out.write(lines)
        scored, scores = scored + len(lines), scores + sum(line["score"] for line in lines)
        masses += sum(line["mass"] for line in lines)
        if masses < MASS * scored and not warned:
          warned = True
          host.say(_warning(judge.template.name, masses / scored))
  seconds = time.monotonic() - began
  print(f"{flags.output}: {total:,} responses" + ("" if scored else ", all there before"))
  if scored:
    now = f"{scored:,} responses now: mean score {scores / scored:.2f}, mean mass {masses / scored:.3f}"
    print(f"{now}; {seconds:.1f} s, {scored / seconds:,.0f} responses/s")


@dataclasses.dataclass(frozen=True)
class Asked:
  line: int
  id: str | int
  messages: tuple
  answers: tuple  # (sample id or None, text)


def asked(flags):
  """The rows of the input as Asked; a DataError names line and field of what cannot be one."""
  for line, item in jsonl.read(flags.input):
    where = f"{flags.input}, line {line}"
    many = item.get("responses") is not None
    if many and item.get("response") is not None:
      raise DataError(f"{where}: both `response` and `responses`; remove one")
    row = data.row_of(item, () if many else ("response",), line, where)
    answers = _answers(item["responses"], f"{where}, field responses") if many else ((None, row.response),)
    given = jsonl.id_of(item, where)
    yield Asked(line, prompt_id(row.messages) if given is None else given, row.messages, answers)


def _answers(value, where):
  if not isinstance(value, list):
    raise DataError(f'{where}: expected a list of {{"sample_id", "text"}}, found {str(value)[:40]}')
  found = []
  for at, answer in enumerate(value):
    if not isinstance(answer, dict) or "text" not in answer:
      raise DataError(f'{where}[{at}]: expected an object with "text", found {str(answer)[:40]}')
    sample = answer.get("sample_id", at)
    if isinstance(sample, bool) or not isinstance(sample, str | int):
      raise DataError(f"{where}[{at}].sample_id: expected a whole number or a string, found {str(sample)[:40]}")
    found.append((sample, data.text_of(answer["text"], f"{where}[{at}].text")))
  return tuple(found)


def _survey(flags, host, template):
  """How many responses the input holds; all of it is checked before the first one is scored."""
  positions, tok = read_config(host.directory).max_positions, host.tokenizer
  forced = len(text.score_paths(tok, template).inner)
  around = len(f"{template.instruction}{template.item}{template.answer_open}".encode()) + 64
  total = rows = 0
  for row in asked(flags):
    rows += 1
    total += len(row.answers)
    prompt = sum(len(m["role"]) + len(m["content"].encode()) for m in row.messages) + around
    for _, answer in row.answers:
      if prompt + len(answer.encode()) <= positions:  # a token is a byte at least: no need to count
        continue
      length = len(text.judge_prefix(tok, host.chat, template, row.messages)) + forced
      length += len(text.judge_suffix(tok, host.chat, template, answer))
      if length > positions:
        raise DataError(
          f"{flags.input}, line {row.line}: prompt and response are {length} tokens in template {template.name};"
          f" the model has {positions} positions: shorten them"
        )
  if not rows:
    raise DataError(f"{flags.input}: the file holds no rows")
  return total


def _scored(flags, host, judge, rows, bar):
  """The output lines of a chunk."""
  places = [(row, sample, answer) for row in rows for sample, answer in row.answers]
  found = verdicts(host, judge, [(row.messages, answer) for row, _, answer in places], bar)
  lines = []
  for (row, sample, answer), verdict in zip(places, found):
    score = _score(flags.mode, verdict, (flags.seed, "score", row.id, sample, answer))
    known = {"id": row.id} if sample is None else {"id": row.id, "sample_id": sample}
    lines.append({**known, "score": score, "probs": verdict.probs, "mass": verdict.mass})
  return lines


def _score(mode, verdict, words):
  if mode == "expected":
    return verdict.score
  if mode == "argmax":
    return float(np.argmax(verdict.probs))
  reached = np.cumsum(verdict.probs)
  return float(np.searchsorted(reached, random_numbers(*words).random() * reached[-1], side="right"))


def _warning(template, mass):
  return (
    f"warning: the judge gives a probability of only {mass:.2f} to the eleven scores together: template {template!r}"
    f" does not fit it, and the scores mean little. --template may be {', '.join(TEMPLATES)}; a judge that a run has"
    " trained is known with its template when --model is the run or its stage."
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
