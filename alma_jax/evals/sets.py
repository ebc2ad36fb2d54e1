"""Prompt sets of benchmarks, read from the user's files by their public layouts.

  found = read("question.jsonl")                # the layout is told by the fields of the first row
  found.layout, found.questions[0].messages     # "mt_bench", ({"role": "user", "content": ...},)

The package holds no benchmark text. A row becomes a Question; all of its fields stay in `row`, for judges that need
them. A row that cannot be read raises a DataError that names file, line and field; so does a key that two rows share. A
prompt that stands twice in a set without keys is asked once, and its other lines are listed.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alma_jax.errors import UserError
from alma_jax.evals import ifeval
from alma_jax.store import data
from alma_jax.store.data import DataError, SeedRow
from alma_jax.store.records import Turns

Key = int | str
Row = Mapping[str, Any]


class JoinError(UserError):
  """Answers and a set that do not belong together; its text lists the differences."""


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt of a set."""

  key: Key | None  # the set's own; None: the set has none, and answers are joined by the exact prompt
  messages: Turns  # the conversation up to the first turn that is answered
  later: tuple[str, ...] = ()  # the user's further turns; each is asked after the answer to the one before
  category: str | None = None
  references: tuple[str, ...] = ()  # right answers, one per turn where there are several turns
  row: Row = dataclasses.field(default_factory=dict)  # all fields, as they stand in the file
  line: int = 0

  @property
  def prompt(self) -> str:
    """The user's first question."""
    return self.messages[-1]["content"]

  @property
  def joined_by(self) -> Key:
    return self.prompt if self.key is None else self.key


@dataclasses.dataclass(frozen=True)
class Benchmark:
  path: str
  layout: str
  questions: tuple[Question, ...]
  sha256: str  # of the file
  repeated: tuple[int, ...] = ()  # lines whose prompt had stood before, in a set without keys

  @property
  def note(self) -> str:
    """A line for the screen where the set has not the size that it was published with, else ""."""
    sizes, n = SIZES.get(self.layout, ()), len(self.questions)
    if not sizes or n in sizes:
      return ""
    return f"{self.path}: {n:,} prompts; {self.layout} was published with {' or '.join(map(str, sizes))}"

  @property
  def rows(self) -> list[SeedRow]:
    """The prompts alone, each up to the first turn that is answered."""
    return [SeedRow(question.messages, None, None, question.line) for question in self.questions]


SIZES = {"mt_bench": (80,), "alpaca_eval": (805,), "arena_hard_2024": (500,), "arena_hard_2025": (500, 750),
         "lima": (300,), "ifeval": (541,)}  # fmt: skip


def read(path: str, layout: str | None = None) -> Benchmark:
  """The set of a .jsonl, .json or .parquet file; `layout` is a word of LAYOUTS, or told by the first row's fields."""
  if layout is not None and layout not in LAYOUTS:
    raise DataError(f"{path}: no layout is called {layout!r}; known are {', '.join(LAYOUTS)}.")
  unit, rows = data.objects(path)
  questions, lines, repeated = [], {}, []
  for line, row in rows:
    where = f"{path}, {unit} {line}"
    if not isinstance(row, dict):
      raise DataError(f"{where}: expected an object with the fields of a prompt set, found {row!r:.40}.")
    layout = layout or layout_of(row)
    question = dataclasses.replace(LAYOUTS[layout](row, where), row=row, line=line)
    earlier = lines.setdefault((question.key is None, question.joined_by), line)
    if earlier == line:
      questions.append(question)
    elif question.key is None:
      repeated.append(line)
    else:
      raise DataError(f"{where}: the key {question.key!r} stands in {unit} {earlier}, too.")
  if layout is None:
    raise DataError(f"{path}: it holds no rows.")
  digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  return Benchmark(path, layout, tuple(questions), digest, tuple(repeated))


def layout_of(row: Row) -> str:
  """The layout that a row's fields tell."""
  turns = row.get("turns")
  if "question_id" in row and isinstance(turns, list):
    return "arena_hard_2024" if turns and isinstance(turns[0], dict) else "mt_bench"
  for layout, fields in (
    ("ifeval", ("instruction_id_list", "prompt")),
    ("arena_hard_2025", ("uid", "prompt")),
    ("lima", ("conversations",)),
    ("alpaca_eval", ("instruction",)),
  ):
    if all(field in row for field in fields):
      return layout
  return "plain"


# Layouts: a row and its place to a Question


def _mt_bench(row: Row, where: str) -> Question:
  first, *later = _texts(row, "turns", where)
  references = _texts(row, "reference", where) if row.get("reference") is not None else ()
  return Question(
    _key(row, "question_id", where), _asked(first), tuple(later), _category(row, where), tuple(references)
  )


def _arena_hard_2024(row: Row, where: str) -> Question:
  turns = _list(row, "turns", where)
  found = []
  for i, turn in enumerate(turns):
    if not isinstance(turn, dict) or "content" not in turn:
      raise DataError(f'{where}, field turns[{i}]: expected {{"content": ...}}, found {turn!r:.40}.')
    found.append(_full(turn["content"], f"{where}, field turns[{i}].content"))
  first, *later = found
  return Question(_key(row, "question_id", where), _asked(first), tuple(later), _category(row, where, "cluster"))


def _arena_hard_2025(row: Row, where: str) -> Question:
  category = _category(row, where)
  return Question(_key(row, "uid", where), _asked(_text(row, "prompt", where)), category=category)


def _alpaca_eval(row: Row, where: str) -> Question:
  if row.get("input"):
    raise DataError(f"{where}, field input: an AlpacaEval row has none; write it into `instruction`.")
  return Question(None, _asked(_text(row, "instruction", where)), category=_category(row, where, "dataset"))


def _lima(row: Row, where: str) -> Question:
  """`conversations` are the turns of user and assistant in turn: the last question, and its answer if there is one."""
  texts = _texts(row, "conversations", where)
  references = (texts[-1],) if len(texts) % 2 == 0 else ()
  asked = texts[: len(texts) - len(references)]
  messages = tuple({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(asked))
  return Question(None, messages, category=_category(row, where, "source"), references=references)


def _ifeval(row: Row, where: str) -> Question:
  ifeval.instructions_of(row, where)
  return Question(_key(row, "key", where), _asked(_text(row, "prompt", where)))


def _plain(row: Row, where: str) -> Question:
  """`prompt` or `messages`; `key` or `id`, `category` and `reference`, a text or a list of texts, may stand beside."""
  found = data.row_of(dict(row), (), 0, where)
  if not all(turn["content"].strip() for turn in found.messages):
    raise DataError(f"{where}: a turn of the prompt is empty.")
  name = next((name for name in ("key", "id") if row.get(name) is not None), None)
  reference = row.get("reference")
  if isinstance(reference, str) or reference is None:
    references = () if reference is None else (_full(reference, f"{where}, field reference"),)
  else:
    references = tuple(_texts(row, "reference", where))
  key = None if name is None else _key(row, name, where)
  return Question(key, found.messages, category=_category(row, where), references=references)


LAYOUTS: dict[str, Callable[[Row, str], Question]] = {
  "mt_bench": _mt_bench,
  "alpaca_eval": _alpaca_eval,
  "arena_hard_2024": _arena_hard_2024,
  "arena_hard_2025": _arena_hard_2025,
  "lima": _lima,
  "ifeval": _ifeval,
  "plain": _plain,
}


def _asked(text: str) -> Turns:
  return ({"role": "user", "content": text},)


def _full(value: Any, where: str) -> str:
  text = data.text_of(value, where)
  if not text.strip():
    raise DataError(f"{where}: it is empty.")
  return text


def _text(row: Row, field: str, where: str) -> str:
  if row.get(field) is None:
    raise DataError(f"{where}: `{field}` is missing or null; present: {', '.join(row) or 'none'}.")
  return _full(row[field], f"{where}, field {field}")


def _list(row: Row, field: str, where: str) -> list[Any]:
  value = row.get(field)
  if not isinstance(value, list) or not value:
    raise DataError(f"{where}, field {field}: expected a list that is not empty, found {value!r:.40}.")
  return value


def _texts(row: Row, field: str, where: str) -> list[str]:
  return [_full(text, f"{where}, field {field}[{i}]") for i, text in enumerate(_list(row, field, where))]


def _key(row: Row, field: str, where: str) -> Key:
  value = row.get(field)
  if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
    raise DataError(f"{where}, field {field}: expected a whole number or a text, found {value!r:.40}.")
  return value


def _category(row: Row, where: str, field: str = "category") -> str | None:
  return None if row.get(field) is None else data.text_of(row[field], f"{where}, field {field}")


# Joins


def joined(questions: Sequence[Question], rows: Iterable[tuple[Key, Any]], source: str) -> list[Any]:
  """For each question what `rows`, (key or exact prompt, value), give it; a JoinError lists what does not fit."""
  found: dict[Key, Any] = {}
  twice = []
  for key, value in rows:
    if key in found:
      twice.append(key)
    found[key] = value
  wanted = [question.joined_by for question in questions]
  lacking, extra = [key for key in wanted if key not in found], sorted(found.keys() - set(wanted), key=repr)
  if lacking or extra or twice:
    parts = ((lacking, "not answered"), (extra, "not in the set"), (twice, "answered twice"))
    said = [f"{len(keys)} {what}: {', '.join(f'{k!r:.60}' for k in keys[:5])}" for keys, what in parts if keys]
    raise JoinError(f"{source} does not fit the set of {len(wanted):,} prompts: {'; '.join(said)}")
  return [found[key] for key in wanted]
