"""Makes demonstrations like LIMA's from a dump of question-and-answer sites.

  python -m alma_jax.tools.curate --input=dump.jsonl --output=lima_400.jsonl --count=400

A line of the input is a question with its answers, in HTML or plain text:

  {"source": "astronomy", "title": "...", "body": "<p>...</p>", "score": 31, "answers": [{"body": "...", "score": 42}]}

`group`, if rows have one, is a set of sources ("stem", "other"): groups share the sample evenly. The best answer is
taken if its score, its length and its words pass the rules below. Links, images and HTML go, code blocks and lists
stay. The prompt is the title or the body. Sources share the sample by size^(1/temperature); within a source the
questions with the highest scores come first.

The output has a line for each demonstration, {"prompt", "response", "source", "group", "score", "answer_score"}, which
`data.sft` reads. OUTPUT.report.json says how many questions each rule left out, with examples, and what each source
gives. The same input and flags give the same bytes. --first_person=false, --references=false, --least_score=-1000000,
--least_characters=0 and --most_characters=1000000000 make the paper's unfiltered set.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alma_jax.corpus import curate
from alma_jax.corpus.curate import Curated, Rules
from alma_jax.errors import RunError
from alma_jax.options import Checked, option
from alma_jax.store import shards
from alma_jax.store.data import DataError, text_of
from alma_jax.tools import command, jsonl

SHOWN = 5  # examples of what a rule leaves out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  input: str = option(doc="JSONL, a question with its answers in a line")
  output: str = option(doc="JSONL of demonstrations")
  count: int = option(400, least=1, doc="demonstrations")
  seed: int = option(0, least=0, doc="another seed, other choices of title or body")
  least_score: float = option(10.0, doc="of the best answer")
  least_characters: int = option(1200, least=0, doc="of the answer")
  most_characters: int = option(4096, least=1, doc="of the answer")
  first_person: bool = option(True, doc="leave out answers that say I or my")
  references: bool = option(True, doc="leave out answers that point at other answers or the site")
  prompt: Literal["either", "title", "body"] = option("either", doc="either, title or body")
  temperature: float = option(3.0, least=1, doc="of sources; 1: by their sizes")

  @property
  def rules(self) -> Rules:
    names = [field.name for field in dataclasses.fields(Rules)]
    return Rules(**{name: getattr(self, name) for name in names})


FLAGS = command.Flags("curate", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  output = pathlib.Path(options.output)
  command.check_place(output)
  if output.is_dir():
    raise RunError(f"--output: {output} is a directory; name a file")
  found, dropped = Curated(options.rules, options.count, options.seed), collections.defaultdict(list)
  for line, item in jsonl.read(options.input):
    row = checked(item, f"{options.input}, line {line}")
    why = found.add(curate.question_of(row))
    if why != "kept" and len(dropped[why]) < SHOWN:
      dropped[why].append({"line": line, "source": row["source"], "title": row.get("title", "")})
  sample = found.sampled()
  if not sample:
    raise DataError(f"{options.input}: no question passes the rules: {_told(found.counts)}")
  by_source = collections.Counter((x.group, x.source) for x in sample)
  report = {
    "input": {"file": options.input, "digest": shards.digest(options.input)},
    "rules": dataclasses.asdict(options.rules) | {"count": options.count, "seed": options.seed},
    "counts": dict(found.counts),
    "sampled": len(sample),
    "characters": sum(len(x.response) for x in sample),
    "sources": [
      {"group": group, "source": source, "fit": size, "sampled": by_source[group, source]}
      for (group, source), size in sorted(found.sizes.items())
    ],
    "left_out": dropped,
  }
  with shards.atomic(output) as file:
    file.write(shards.json_lines(dataclasses.asdict(x) for x in sample))
  with shards.atomic(output.with_name(f"{output.name}.report.json")) as file:
    file.write(json.dumps(report, indent=2, ensure_ascii=False).encode())
  print(f"{output}: {len(sample):,} demonstrations from {len(by_source):,} sources; {_told(found.counts)}")
  if len(sample) < options.count:
    print(f"fewer than --count={options.count:,}: only {len(sample):,} questions pass the rules")


def checked(item: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The row's fields, or a DataError that names line and field."""
  row: dict[str, Any] = {"answers": []}
  for name in ("source", "group", "title", "body"):
    if item.get(name) is not None:
      row[name] = text_of(item[name], f"{where}, field {name}")
  for name in ("source", "answers"):
    if item.get(name) is None:
      raise DataError(f"{where}: `{name}` is missing or null; present: {', '.join(item) or 'none'}.")
  row["score"] = _number(item.get("score", 0), f"{where}, field score")
  if not isinstance(item["answers"], list):
    raise DataError(f'{where}, field answers: expected a list of {{"body", "score"}}.')
  for i, answer in enumerate(item["answers"]):
    here = f"{where}, field answers[{i}]"
    if not isinstance(answer, dict) or not {"body", "score"} <= answer.keys():
      raise DataError(f'{here}: expected {{"body", "score"}}, found {json.dumps(answer)[:60]}.')
    body, score = text_of(answer["body"], f"{here}.body"), _number(answer["score"], f"{here}.score")
    row["answers"].append({"body": body, "score": score})
  return row


def _number(value: Any, where: str) -> float:
  if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
    raise DataError(f"{where}: expected a number, found {json.dumps(value)[:40]}.")
  return float(value)


def _told(counts: Mapping[str, int]) -> str:
  """Say "12,000 questions, 400 pass; left out: score 9,000, ..."."""
  left_out = {name.replace("_", " "): n for name, n in counts.items() if name not in ("questions", "kept")}
  others = ", ".join(f"{name} {n:,}" for name, n in left_out.items())
  return f"{counts.get('questions', 0):,} questions, {counts.get('kept', 0):,} pass; left out: {others or 'none'}"
