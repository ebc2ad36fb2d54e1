"""Answers of a model as items of a protocol: our own lines and the public tools' layouts, joined strictly.

  items = joined("answers.jsonl", questions="question.jsonl", against="baseline.jsonl", references="gpt-4.jsonl")

A file is JSONL, or a JSON list. A row is recognised by its fields:

  {"prompt" | "messages", "response"}                      ours, of `alma sample` with `responses`, or with `turns`
  {"turns": [..], "responses": [..]}                       a conversation of two turns
  {"instruction", "output"}                                AlpacaEval
  {"question_id", "choices": [{"turns": [..]}]}            FastChat and Arena-Hard 2024; the questions are another file
  {"uid", "messages": [.., {"content": {"answer": ..}}]}   Arena-Hard 2025

The questions are a set in any layout of `sets`. Files are joined by `id`, `question_id`, `key` or `uid` where both have
one, else by the exact prompt. A row without its partner is an error that counts and names them: nothing is graded that
only seems complete.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alma_jax.errors import UserError
from alma_jax.evals import protocols, sets
from alma_jax.evals.protocols import Item

IDS = ("id", "question_id", "key", "uid")
SHOWN = 3  # rows that an error names


class AnswersError(UserError):
  """A file of answers that cannot be read, or does not fit another one."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of any of the files; what it does not hold is empty."""

  where: str
  id: str | None
  turns: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  category: str = ""
  references: tuple[str, ...] = ()
  said: Mapping[str, Any] | None = None  # the row itself

  @property
  def prompt(self) -> str:
    return "\n".join(self.turns)


def joined(
  path: str | pathlib.Path,
  questions: str | pathlib.Path | None = None,
  against: str | pathlib.Path | None = None,
  references: str | pathlib.Path | None = None,
) -> list[Item]:
  """The items of the file, in its order."""
  rows = read(path)
  if questions:
    asked = _partners(rows, _questions(questions), path, questions)
    rows = [_with_question(row, question) for row, question in zip(rows, asked, strict=True)]
  if bare := [row for row in rows if not row.turns]:
    raise AnswersError(
      f"{bare[0].where}: the row has answers and no question; --set=FILE names the file of the questions"
    )
  _unique(rows, path)
  others: Sequence[Row | None] = [None] * len(rows)
  if against:
    other = read(against)
    if questions:
      asked = _partners(other, _questions(questions), against, questions)
      other = [_with_question(row, question) for row, question in zip(other, asked, strict=True)]
    others = _partners(rows, other, path, against)
  told: Sequence[Row | None] = [None] * len(rows)
  if references:
    # Only some categories have references: a row without one is an item without one.
    told = _partners(rows, read(references), path, references, all_of=False)
  return [
    Item(
      row.id or f"row {at}",
      row.turns,
      row.answers,
      other.answers if other else (),
      (reference.answers or reference.references) if reference else row.references,
      row.category,
      row.said,
    )
    for at, (row, other, reference) in enumerate(zip(rows, others, told, strict=True))
  ]


def read(path: str | pathlib.Path) -> list[Row]:
  """The rows of a file; several responses to one prompt are rows of their own."""
  found = [row for where, item in _objects(pathlib.Path(path)) for row in _rows(item, where)]
  if not found:
    raise AnswersError(f"{path}: the file holds no rows")
  return found


def _questions(path: str | pathlib.Path) -> list[Row]:
  """The questions of a set, in any layout of `sets`."""
  found = []
  for question in sets.read(str(path)).questions:
    turns = (*protocols.item_of("", question.messages, "").turns, *question.later)
    id, category = None if question.key is None else str(question.key), question.category or ""
    found.append(Row(f"{path}, line {question.line}", id, turns, (), category, question.references, question.row))
  return found


def _rows(item: Mapping[str, Any], where: str) -> list[Row]:
  name = next((name for name in IDS if item.get(name) is not None), None)
  id = None if name is None else str(item[name])
  reference = item.get("reference") or ()
  row = Row(
    where,
    id,
    category=str(item.get("category") or ""),
    said=item,
    references=_texts([reference] if isinstance(reference, str) else reference, where, "reference"),
  )
  if "choices" in item:
    turns = _at(item["choices"], 0, where, "choices").get("turns")
    return [dataclasses.replace(row, answers=_texts(turns, where, "choices[0].turns"))]
  if isinstance(item.get("instruction"), str):
    answers = () if item.get("output") is None else _texts([item["output"]], where, "output")
    return [dataclasses.replace(row, turns=(item["instruction"],), answers=answers)]
  if "turns" in item:
    answers = item.get("responses", item.get("answers", ()))
    turns, said = _texts(item["turns"], where, "turns"), _texts(answers, where, "responses")
    return [dataclasses.replace(row, turns=turns, answers=said)]
  turns, before, last = _conversation(item, where)
  row = dataclasses.replace(row, turns=turns, answers=(*before, *last))
  if item.get("responses") is not None:
    several = item["responses"]
    if not isinstance(several, list) or not several or last:
      raise AnswersError(f"{where}, field responses: expected a list of answers to the row's prompt")
    many = len(several) > 1
    return [
      dataclasses.replace(
        row, id=f"{id or row.prompt}/{at}" if many else id, answers=(*before, *_texts([x], where, "responses"))
      )
      for at, x in enumerate(several)
    ]
  return [row]


def _conversation(item: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
  """The user's turns, the answers before the last one, and the last answer if there is one."""
  last = () if item.get("response") is None else _texts([item["response"]], where, "response")
  if "messages" not in item:
    if not isinstance(item.get("prompt"), str):
      raise AnswersError(
        f"{where}: expected one of the fields prompt, messages, turns, instruction, choices; found {', '.join(item)}"
      )
    return (item["prompt"],), (), last
  if not isinstance(item["messages"], list):
    raise AnswersError(f"{where}, field messages: expected a list of turns")
  turns, answers, system = [], [], ""
  for message in item["messages"]:
    role = message.get("role") if isinstance(message, dict) else None
    (text,) = _texts([message.get("content") if isinstance(message, dict) else message], where, "messages")
    if role == "system":
      system += f"{text}\n\n"
    elif role == "user":
      turns.append(system + text)
      system = ""
    else:
      answers.append(text)
  if last or len(answers) < len(turns):
    return tuple(turns), tuple(answers), last
  return tuple(turns), tuple(answers[:-1]), tuple(answers[-1:])


def _texts(values: Any, where: str, field: str) -> tuple[str, ...]:
  """Texts from strings, {"content"}, {"text"} or {"answer"}, which may stand in each other."""
  if not isinstance(values, list | tuple):
    raise AnswersError(f"{where}, field {field}: expected a list of texts, found {str(values)[:40]!r}")
  found = []
  for value in values:
    while isinstance(value, dict):
      value = next((value[name] for name in ("content", "text", "answer") if name in value), None)
    if not isinstance(value, str):
      raise AnswersError(f"{where}, field {field}: expected a text, found {str(value)[:40]!r}")
    found.append(value)
  return tuple(found)


def _at(values: Any, at: int, where: str, field: str) -> dict[str, Any]:
  if not (isinstance(values, list) and len(values) > at and isinstance(values[at], dict)):
    raise AnswersError(f"{where}, field {field}: expected a list of objects")
  return values[at]


def _with_question(row: Row, question: Row | None) -> Row:
  if question is None:
    return row
  return dataclasses.replace(
    row,
    id=row.id or question.id,
    turns=question.turns,
    category=row.category or question.category,
    references=row.references or question.references,
    said={**(question.said or {}), **(row.said or {})},
  )


# Joins


def _partners(
  rows: Sequence[Row], others: Sequence[Row], path: object, other_path: object, all_of: bool = True
) -> list[Row | None]:
  """For each row the other file's row of the same question."""
  key = "id" if all(row.id for row in (*rows, *others)) else "prompt"
  table: dict[str | None, Row] = {}
  for other in others:
    name = getattr(other, key)
    if not name:
      raise AnswersError(f"{other.where}: the row has no {key}, by which it is joined with {path}")
    if name in table:
      raise AnswersError(f"{other.where} has the same {key} as {table[name].where}: {str(name)[:60]!r}")
    table[name] = other
  lost = [row for row in rows if getattr(row, key) not in table]
  names = {getattr(row, key) for row in rows}
  extra = [other for other in others if getattr(other, key) not in names]
  if all_of and (lost or extra):
    said = [
      f"{path} and {other_path} do not hold the same questions (joined by {key}):",
      *_listed(f"only in {path}", lost, key),
      *_listed(f"only in {other_path}", extra, key),
    ]
    raise AnswersError("\n".join(said))
  return [table.get(getattr(row, key)) for row in rows]


def _listed(what: str, rows: Sequence[Row], key: str) -> list[str]:
  if not rows:
    return []
  shown = ", ".join(repr(str(getattr(row, key))[:60]) for row in rows[:SHOWN])
  return [f"  {what}: {len(rows):,}, {shown}{' ...' if len(rows) > SHOWN else ''}"]


def _unique(rows: Sequence[Row], path: object) -> None:
  seen: dict[str, Row] = {}
  for row in rows:
    if row.id is not None and row.id in seen:
      raise AnswersError(f"{row.where} has the same id as {seen[row.id].where}: {row.id!r}")
    if row.id is not None:
      seen[row.id] = row


def _objects(path: pathlib.Path) -> Iterable[tuple[str, dict[str, Any]]]:
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise AnswersError(f"cannot read {path}: {error}") from None
  if text.lstrip().startswith("["):
    lines: Iterable[tuple[str, str]] = [(str(path), text)]
  else:
    lines = ((f"{path}, line {at}", line) for at, line in enumerate(text.split("\n"), 1) if line.strip())
  for where, line in lines:
    try:
      item = json.loads(line)
    except ValueError as error:
      raise AnswersError(f"{where}: not valid JSON ({error})") from None
    items = [(f"{where}, item {at}", x) for at, x in enumerate(item)] if isinstance(item, list) else [(where, item)]
    for place, one in items:
      if not isinstance(one, dict):
        raise AnswersError(f"{place}: expected an object, found {str(one)[:40]!r}")
      yield place, one
