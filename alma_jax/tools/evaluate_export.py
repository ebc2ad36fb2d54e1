"""Writes answers, or a judge's test, as the files that the official tools read.

  python -m alma_jax.tools.evaluate export --input=answers/alma --as=alpaca_eval --output=model_outputs.json

--input is the --output of `evaluate answer`, and --as one of alpaca_eval, fastchat, arena_hard_2024, arena_hard_2025,
ifeval; or that of `evaluate judge --kind=rewardbench`, and --as=rewardbench. Arena-Hard and FastChat take a model's
name from the file's, which must then be NAME.jsonl. A batch file for an endpoint is what `grade --batch_out` writes.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from alma_jax.errors import RunError
from alma_jax.evals import export
from alma_jax.evals.export import FORMS, ModelAnswers, ScoredPair
from alma_jax.evals.sets import Question
from alma_jax.options import Checked, option, refuse
from alma_jax.store import layout, shards
from alma_jax.tools import command

REWARDBENCH = "rewardbench"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  input: str = option(doc="the --output of `evaluate answer`, or of `evaluate judge`")
  as_: str = option(doc=", ".join((*FORMS, REWARDBENCH)))
  output: str = option(doc="a file")

  def __post_init__(self) -> None:
    super().__post_init__()
    known = (*FORMS, REWARDBENCH)
    if self.as_ not in known:
      refuse("as_", self.as_, f"may be {', '.join(known)}", known)


FLAGS = command.Flags("evaluate export", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  source, output = pathlib.Path(options.input), pathlib.Path(options.output)
  command.check_place(output)
  if options.as_ == REWARDBENCH:
    text, count = _rewardbench(source)
  else:
    given = [_given(line) for line in _lines(source / "answers.jsonl", "answer")]
    wanted = export.file_name(options.as_, given[0].model)
    if output.name != wanted and wanted.endswith(f"{given[0].model}.jsonl"):
      raise RunError(f"--output: {options.as_} takes the model's name from the file's; call it {wanted}")
    text, count = export.text(export.rows(options.as_, given, time.time()), options.as_), len(given)
  with shards.atomic(output) as file:
    file.write(text.encode())
  print(f"{output}: {count:,} {'pairs' if options.as_ == REWARDBENCH else 'answers'} as {options.as_}")


def _lines(path: pathlib.Path, made_by: str) -> list[dict[str, Any]]:
  if not path.is_file():
    raise RunError(f"{path} is missing: --input names the --output of `evaluate {made_by}`")
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _given(line: dict[str, Any]) -> ModelAnswers:
  if "turns" in line:
    first, *later = line["turns"]
    messages: tuple[dict[str, str], ...] = ({"role": "user", "content": first},)
  else:
    messages, later = tuple(line["messages"]), []
  question = Question(line.get("id"), messages, tuple(later), line["category"])
  return ModelAnswers(question, tuple(line["responses"]), line["model"], tuple(line["tokens"]))


def _rewardbench(source: pathlib.Path) -> tuple[str, int]:
  """The result file, and the number of pairs."""
  lines = _lines(source / "grades.jsonl", "judge")
  summary = layout.read_json(source / "summary.json")
  if summary.get("kind") != REWARDBENCH:
    raise RunError(f"{source} holds no test by RewardBench 1: run `evaluate judge --kind=rewardbench`")
  pairs = [ScoredPair(line["id"], line["subset"], *line["scores"]) for line in lines if None not in line["scores"]]
  found = export.rewardbench(pairs, summary["judge"], "Seq. Classifier", "")
  return json.dumps(found, ensure_ascii=False, indent=2) + "\n", len(pairs)
