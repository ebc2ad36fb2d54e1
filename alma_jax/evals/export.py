"""Answers and results in the files that the official tools read.

  text(rows("fastchat", answers, stamp=time.time()), "fastchat")

Every function is pure: equal answers give equal bytes. The tools' own random ids are digests of the answer here.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alma_jax.errors import UserError
from alma_jax.evals.sets import Question

Rows = list[dict[str, Any]]
ARRAYS = ("alpaca_eval",)  # a JSON array; the other files have one row per line


class ExportError(UserError):
  """Answers that the official file has no place for."""


@dataclasses.dataclass(frozen=True)
class ModelAnswers:
  """A model's answers to a prompt of a set."""

  question: Question
  responses: tuple[str, ...]  # one per turn of the user
  model: str
  tokens: tuple[int, ...] = ()  # of each response, by the model's own tokenizer


def rows(form: str, answers: Sequence[ModelAnswers], stamp: float = 0.0) -> Rows:
  """The rows of the official file; `form` is a word of FORMS, `stamp` the time in seconds where it has one."""
  if form not in FORMS:
    raise ExportError(f"no file of answers is called {form!r}; known are {', '.join(FORMS)}")
  models = sorted({given.model for given in answers})
  if len(models) > 1:
    raise ExportError(f"{form}: one file holds the answers of one model, found {', '.join(models)}")
  return [FORMS[form](given, stamp) for given in answers]


def text(rows: Rows, form: str) -> str:
  if form in ARRAYS:
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def file_name(form: str, model: str) -> str:
  """What the official reader wants the file to be called; Arena-Hard takes the model's name from it."""
  names = {"alpaca_eval": "model_outputs.json", "ifeval": "input_response_data.jsonl"}
  if form not in names and (not model or "/" in model):
    raise ExportError(f"{form}: the file's name is the model's, and {model!r} is none that a file can have")
  return names.get(form, f"{model}.jsonl")


# One row


def _alpaca_eval(given: ModelAnswers, stamp: float) -> dict[str, Any]:
  dataset = {} if given.question.category is None else {"dataset": given.question.category}
  return {"instruction": given.question.prompt, "output": _only(given), "generator": given.model} | dataset


def _fastchat(given: ModelAnswers, stamp: float) -> dict[str, Any]:
  return _in_choices(given, stamp, list(given.responses))


def _arena_hard_2024(given: ModelAnswers, stamp: float) -> dict[str, Any]:
  counts = _tokens(given)
  turns = [{"content": text, "token_len": n} for text, n in zip(given.responses, counts, strict=True)]
  return _in_choices(given, stamp, turns)


def _arena_hard_2025(given: ModelAnswers, stamp: float) -> dict[str, Any]:
  response, (tokens,) = _only(given), _tokens(given)
  said = [*given.question.messages, {"role": "assistant", "content": {"answer": response}}]
  return {
    "uid": _key(given),
    "ans_id": _digest(given),
    "model": given.model,
    "messages": said,
    "tstamp": stamp,
    "metadata": {"token_len": tokens} | style(response),  # token_len comes first: the reader goes by the order
  }


def _ifeval(given: ModelAnswers, stamp: float) -> dict[str, Any]:
  return {"prompt": given.question.prompt, "response": _only(given)}


FORMS: dict[str, Callable[[ModelAnswers, float], dict[str, Any]]] = {
  "alpaca_eval": _alpaca_eval,
  "fastchat": _fastchat,
  "arena_hard_2024": _arena_hard_2024,
  "arena_hard_2025": _arena_hard_2025,
  "ifeval": _ifeval,
}


def _in_choices(given: ModelAnswers, stamp: float, turns: Sequence[Any]) -> dict[str, Any]:
  return {
    "question_id": _key(given),
    "answer_id": _digest(given),
    "model_id": given.model,
    "choices": [{"index": 0, "turns": turns}],
    "tstamp": stamp,
  }


def _key(given: ModelAnswers) -> int | str:
  if given.question.key is None:
    raise ExportError(
      f"line {given.question.line} of the set has no key, which this file needs: {given.question.prompt!r:.60}"
    )
  return given.question.key


def _only(given: ModelAnswers) -> str:
  if len(given.responses) != 1:
    raise ExportError(f"{given.question.joined_by!r:.60} has {len(given.responses)} answers; this file holds one")
  return given.responses[0]


def _tokens(given: ModelAnswers) -> tuple[int, ...]:
  if len(given.tokens) != len(given.responses):
    raise ExportError(
      f"{given.question.joined_by!r:.60}: this file holds the number of tokens, and the answers have none"
    )
  return given.tokens


def _digest(given: ModelAnswers) -> str:
  decides = json.dumps([given.question.joined_by, given.model, given.responses])
  return hashlib.sha256(decides.encode()).hexdigest()[:22]  # as long as the tools' own


def style(response: str) -> dict[str, dict[str, int]]:
  """What Arena-Hard controls for: headers, list items and bold texts outside of ``` blocks."""
  for block in re.findall("```([^`]*)```", response):
    response = response.replace(block, "")
  return {
    "header_count": {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", response, re.MULTILINE)) for n in range(1, 7)},
    "list_count": {
      "ordered": len(re.findall(r"^\s*\d+\.\s", response, re.MULTILINE)),
      "unordered": len(re.findall(r"^\s*[-*+]\s", response, re.MULTILINE)),
    },
    "bold_count": {
      "**": len(re.findall(r"\*\*[^*\n]+\*\*", response)),
      "__": len(re.findall(r"__[^_\n]+__", response)),
    },
  }


# RewardBench: a judge's results on pairs


@dataclasses.dataclass(frozen=True)
class ScoredPair:
  """A pair of RewardBench as a judge scored it."""

  id: int | str
  subset: str
  chosen: float
  rejected: float

  @property
  def right(self) -> int:
    """A tie is wrong, as RewardBench has it."""
    return int(self.chosen > self.rejected)


def rewardbench(pairs: Sequence[ScoredPair], model: str, model_type: str, chat_template: str) -> dict[str, Any]:
  """The result file: accuracy by subset, beside who was measured."""
  found: dict[str, list[int]] = {}
  for pair in pairs:
    found.setdefault(pair.subset, []).append(pair.right)
  accuracies = {subset: sum(right) / len(right) for subset, right in found.items()}
  return {"model": model, "model_type": model_type, "chat_template": chat_template} | accuracies


def rewardbench_scores(pairs: Sequence[ScoredPair], model: str, model_type: str) -> dict[str, Any]:
  """The file of scores, column by column."""
  columns: Mapping[str, list[Any]] = {
    "id": [pair.id for pair in pairs],
    "subset": [pair.subset for pair in pairs],
    "results": [pair.right for pair in pairs],
    "scores_chosen": [pair.chosen for pair in pairs],
    "scores_rejected": [pair.rejected for pair in pairs],
  }
  return {**columns, "model": model, "model_type": model_type}
