"""Users' data in: JSONL, a JSON array, Parquet or a TFDS data set, read into checked rows.

`load_examples("seeds.jsonl")` or `load_examples("tfds:name/config:train")` returns (rows, report). A row of
the file has `messages`, a list of {"role", "content"} whose last turn is the assistant's, or `prompt` and
`response`; the judge's seeds also need a `score` from 0 to 10: `need=("response", "score")`. Preference pairs have a
`chosen` and a `rejected` answer: `need=("chosen", "rejected")`. With `need=()` only prompts are read. A row that cannot
be read raises a DataError that names file, line and field. Rows with an empty prompt or answer, pairs of equal answers,
exact repetitions of earlier rows, and dialogues with turns out of order are left out; the report counts them and names
the first lines of each kind.

The turns of a dialogue alternate: after a system turn, if there is one, the user's comes first, then the
assistant's, and so on; the last one before the answer is the user's. A row without a user's turn to answer is
an error. A row whose earlier turns do not alternate (user, user; assistant first) counts as `odd_turns`: chat
formats disagree on what it would mean. A row may hold 16 MB of text.
"""

import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alma_jax.errors import UserError
from alma_jax.store import verify
from alma_jax.store.records import Turns

ROLES = ("system", "user", "assistant")
FIELDS = ("messages", "prompt", "response", "score", "category")
_TFDS = re.compile(r"tfds:(?P<name>[^:]+(:\d+\.\d+\.\d+)?):(?P<split>.+)")
LONGEST = 16_000_000  # bytes of a JSONL line, characters of a row: a row is one conversation
_SHOWN = 10  # first lines of each kind that the report lists


class DataError(UserError):
  """A mistake in a data file; its text is the whole message: where it is and how to mend it."""


@dataclasses.dataclass(frozen=True)
class SeedRow:
  messages: Turns  # up to and including the user's turn that is answered
  response: str | None
  score: float | None
  line: int  # line of a JSONL file, else the row or item, from 1
  chosen: str | None = None  # of a preference pair
  rejected: str | None = None
  category: str | None = None  # what it is about, where the row has a text in this field
  reason: str | None = None  # of an annotation: why it has this score

  @property
  def answers(self) -> tuple[str, ...]:
    """The response, or both answers of a pair; none of a prompt alone."""
    return tuple(text for text in (self.response, self.chosen, self.rejected) if text is not None)


def load_examples(
  source: str | pathlib.Path, need: Sequence[str] = ("response",)
) -> tuple[list[SeedRow], dict[str, Any]]:
  """Reads and checks all rows; returns (rows, report). `need` names what a row has besides its prompt."""
  unit, items = objects(str(source))
  rows, seen, total = [], set(), 0
  dropped: dict[str, list[int]] = {"empty": [], "duplicate": [], "odd_turns": []}
  dropped |= {"identical": []} if "chosen" in need else {}
  ignored: set[str] = set()
  for line, item in items:
    total += 1
    row = row_of(item, need, line, f"{source}, {unit} {line}")
    ignored.update(item.keys() - {*FIELDS, *need, *(("reason",) if "score" in need else ())})
    # Two annotators may give one answer different scores: such rows are both kept.
    key = (tuple((m["role"], m["content"]) for m in row.messages), row.answers, row.score)
    texts = [m["content"] for m in row.messages if m["role"] != "system"]
    if not all(text.strip() for text in (*texts, *row.answers)):
      dropped["empty"].append(line)
    elif row.chosen is not None and row.chosen == row.rejected:
      dropped["identical"].append(line)
    elif not alternates(row.messages):
      dropped["odd_turns"].append(line)
    elif key in seen:
      dropped["duplicate"].append(line)
    else:
      seen.add(key)
      rows.append(row)
  if not rows:
    what = f"all {total} rows have an empty prompt or response" if total else "it holds no rows"
    if same := len(dropped.get("identical", ())):
      what = f"the two answers of {same} of {total} rows are equal, and the others are empty"
    if odd := len(dropped["odd_turns"]):
      what = f"the turns of {odd} of {total} rows do not alternate between user and assistant, and the others are empty"
    raise DataError(f"{source}: nothing to read: {what}.")
  counts = {why: len(lines) for why, lines in dropped.items()}
  examples = {why: lines[:_SHOWN] for why, lines in dropped.items()}
  report = {"rows": total, "kept": len(rows), **counts, "examples": examples, "ignored_fields": sorted(ignored)}
  return rows, report


def row_of(item: Any, need: Sequence[str], line: int, where: str) -> SeedRow:
  """The checked row of one object; `where` begins the messages of its errors."""
  if not isinstance(item, dict):
    raise DataError(f'{where}: expected an object such as {{"prompt": ..., "response": ...}}, found {_kind(item)}.')
  item = {key: value for key, value in item.items() if value is not None}
  _require(("prompt", "messages"), item, where)
  answer = None
  if "response" in need and "response" in item:
    answer = text_of(item["response"], f"{where}, field response")
  if "messages" in item:
    messages, answer = _split(_messages(item["messages"], where), answer, where)
  else:
    messages = ({"role": "user", "content": text_of(item["prompt"], f"{where}, field prompt")},)
  if "chosen" in need:
    return _pair(item, messages, line, where)
  check_size(sum(len(turn["content"]) for turn in messages) + len(answer or ""), where)
  category = item["category"] if isinstance(item.get("category"), str) else None
  if "response" not in need:
    return SeedRow(messages, None, None, line, category=category)
  if answer is None:
    if "messages" in item:
      raise DataError(f"{where}, field messages: the last turn must be the assistant's, found role 'user'.")
    _require(("response",), item, where)
  score, reason = None, None
  if "score" in need:
    _require(("score",), item, where)
    score = _score(item["score"], f"{where}, field score")
    reason = text_of(item["reason"], f"{where}, field reason") if "reason" in item else None
  return SeedRow(messages, answer, score, line, category=category, reason=reason)


def _pair(item: dict[str, Any], messages: Turns, line: int, where: str) -> SeedRow:
  """The row of a preference pair. An answer is a text, or a conversation that repeats the prompt and ends with it."""
  answers = {}
  for name in ("chosen", "rejected"):
    _require((name,), item, where)
    value = item[name]
    if isinstance(value, str | bytes):
      answers[name] = text_of(value, f"{where}, field {name}")
      continue
    *before, last = _messages(value, where, name)
    if last["role"] != "assistant" or (before and tuple(before) != messages):
      raise DataError(
        f"{where}, field {name}: expected an answer, or the turns of the prompt and the assistant's answer after them;"
        f" found {len(before) + 1} turns, the last by {last['role']!r}, that are not the row's prompt and an answer."
      )
    answers[name] = last["content"]
  check_size(sum(len(turn["content"]) for turn in messages) + sum(map(len, answers.values())), where)
  return SeedRow(messages, None, None, line, **answers)


def alternates(messages: Turns) -> bool:
  """True if the turns, after a system turn, are the user's and the assistant's in turn, the user's first."""
  roles = [turn["role"] for turn in messages if turn["role"] != "system"]
  return all(role == ("assistant" if i % 2 else "user") for i, role in enumerate(roles))


def check_turns(messages: Turns, where: str) -> None:
  """Raise a DataError for turns that do not alternate, where a row cannot be left out."""
  if not alternates(messages):
    found = ", ".join(turn["role"] for turn in messages[:6]) + (", ..." if len(messages) > 6 else "")
    raise DataError(f"{where}, field messages: the turns must alternate, user, assistant, user; found {found}.")


def check_size(size: int, where: str) -> None:
  """Raise a DataError for a row that is too large to be one conversation."""
  if size > LONGEST:
    raise DataError(
      f"{where}: a row of {size / 1e6:,.1f} MB; a row is one conversation, of at most {LONGEST / 1e6:,.0f} MB: split"
      " it, or see whether line ends are missing in the file."
    )


def _split(messages: Turns, answer: str | None, where: str) -> tuple[Turns, str | None]:
  """The conversation up to the last user's turn, and the answer: the last turn or the field `response`."""
  if messages[-1]["role"] == "assistant":
    messages, last = messages[:-1], messages[-1]
    if answer not in (None, last["content"]):
      raise DataError(f"{where}: `messages` end with one answer and `response` is another; remove one.")
    answer = last["content"]
  if not messages or messages[-1]["role"] != "user":
    found = f"found role {messages[-1]['role']!r}" if messages else "found none"
    raise DataError(f"{where}, field messages: expected a user's turn before the answer, {found}.")
  return messages, answer


def _messages(value: Any, where: str, field: str = "messages") -> Turns:
  where = f"{where}, field {field}"
  if isinstance(value, dict) and value.keys() >= {"role", "content"}:  # TFDS turns a list of dicts inside out
    value = _turned(value["role"], value["content"], where)
  if not isinstance(value, list | tuple) or not value:
    raise DataError(f'{where}: expected a list of {{"role", "content"}}, found {_kind(value) if value else "none"}.')
  turns = []
  for i, turn in enumerate(value):
    here = f"{where}[{i}]"
    if not isinstance(turn, dict):
      raise DataError(f'{here}: expected {{"role": ..., "content": ...}}, found {_kind(turn)}.')
    for key in ("role", "content"):
      _require((key,), turn, here)
    role = text_of(turn["role"], f"{here}.role")
    if role not in ROLES:
      near = "".join(f" Did you mean {name!r}?" for name in _near(role, ROLES))
      raise DataError(f"{here}.role: unknown role {role!r}; expected one of {', '.join(ROLES)}.{near}")
    if role == "system" and i > 0:
      raise DataError(f"{here}.role: a system turn is allowed only as the first.")
    turns.append({"role": role, "content": text_of(turn["content"], f"{here}.content")})
  return tuple(turns)


def _turned(roles: Any, contents: Any, where: str) -> list[dict[str, Any]]:
  """A list of turns from a list of roles and one of contents, as TFDS and a Parquet struct of lists hold them."""
  for name, found in (("role", roles), ("content", contents)):
    if isinstance(found, str | bytes | dict) or not hasattr(found, "__len__"):
      raise DataError(f'{where}: expected a list of {{"role", "content"}}, found an object whose {name} is no list.')
  if len(roles) != len(contents):
    raise DataError(f"{where}: {len(roles)} roles and {len(contents)} contents; every turn needs one of each.")
  return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def text_of(value: Any, where: str) -> str:
  """The value if it is a string of valid Unicode."""
  try:
    value = value.decode() if isinstance(value, bytes) else value  # TFDS gives bytes
    if not isinstance(value, str):
      raise DataError(f"{where}: expected a string, found {_kind(value)}.")
    value.encode()
  except (UnicodeDecodeError, UnicodeEncodeError) as e:
    raise DataError(f"{where}: not valid Unicode text ({e.reason}).") from None
  return value


def _score(value: Any, where: str) -> float:
  value = value.item() if hasattr(value, "item") else value
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (number and 0 <= value <= 10):
    raise DataError(f"{where}: expected a number from 0 to 10, found {_kind(value)}: {value!r:.40}.")
  return float(value)


def _require(fields: Sequence[str], present: Collection[str], where: str) -> None:
  """Raises unless one of `fields` is present."""
  if not set(fields) & set(present):
    wanted = " or ".join(f"`{field}`" for field in fields)
    near = [f" Did you misspell {name!r}?" for field in fields for name in _near(field, present)]
    found = ", ".join(map(str, present)) or "none"
    raise DataError(f"{where}: {wanted} is missing or null; present: {found}.{''.join(near)}")


def is_tfds(source: str) -> bool:
  """True for the name of a data set, False for a file."""
  return source.startswith("tfds:")


def objects(source: str) -> tuple[str, Iterable[tuple[int, Any]]]:
  """What a row of the source is called, and the rows with their numbers; they are not checked."""
  if is_tfds(source):
    return "row", enumerate(_tfds_rows(source), 1)
  path = pathlib.Path(source)
  verify.check(path)  # of a run's own copy
  if not path.exists():
    raise DataError(f"{source}: no such file.{_neighbours(path)}")
  if path.suffix == ".parquet":
    return "row", enumerate(_parquet_rows(path), 1)
  if path.suffix not in (".jsonl", ".json") or not path.is_file():
    raise DataError(f"{source}: expected a .jsonl, .json or .parquet file, or tfds:NAME[/CONFIG]:SPLIT.")
  data = path.read_bytes()
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    line = data.count(b"\n", 0, e.start) + 1
    raise DataError(f"{source}, line {line}: not UTF-8 text (byte {e.start} of the file).") from None
  if not text.strip():
    raise DataError(f"{source}: the file is empty.")
  if text.lstrip().startswith("["):
    return "item", enumerate(_json(text, source, 1, whole=True), 1)
  # Not splitlines: it also breaks at characters that JSON allows inside strings.
  lines = enumerate(text.split("\n"), 1)
  return "line", ((i, _json(line, source, i)) for i, line in lines if line.strip())


def _json(text: str, source: str, line: int, whole: bool = False) -> Any:
  """The value of a line, or of a whole file."""
  if not whole:
    check_size(len(text), f"{source}, line {line}")
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    where = f"{source}, line {line + e.lineno - 1}, column {e.colno}"
    raise DataError(f"{where}: not valid JSON ({e.msg}); expected one object per line, or one array.") from None
  except (ValueError, RecursionError) as e:  # numbers of thousands of digits, nesting of thousands of levels
    raise DataError(f"{source}, line {line}: cannot be read: {e}.") from None


def _parquet_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  try:
    with pq.ParquetFile(path) as file:
      present = file.schema_arrow.names
      _require(("prompt", "messages"), present, str(path))
      for batch in file.iter_batches(batch_size=4096):
        yield from batch.to_pylist()
  except (pa.ArrowException, OSError) as e:
    raise DataError(f"{path}: cannot be read as Parquet: {e}") from None


def _tfds_rows(source: str) -> Iterator[Any]:
  match = _TFDS.fullmatch(source)
  if not match:
    raise DataError(f"{source}: expected tfds:NAME[/CONFIG]:SPLIT, such as tfds:my_seeds/english:train.")
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise DataError(f"{source}: needs TFDS: pip install tensorflow-datasets array-record") from None
  name = match["name"]
  try:
    data: Any = tfds.data_source(name, split=match["split"])
  except Exception as e:  # TFDS raises whatever its builders raise
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise DataError(
      f"{source}: TFDS cannot open data set {name!r}, split {match['split']!r}: {reason}\n"
      "Prepare it once as random-access files: tfds build NAME --file_format=array_record"
      " (TFDS_DATA_DIR says where data sets lie)."
    ) from e
  return (data[i] for i in range(len(data)))


def _neighbours(path: pathlib.Path) -> str:
  if not path.parent.is_dir():
    return f" There is no directory {path.parent} either."
  names = sorted(p.name for p in path.parent.iterdir())
  near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
  return f" Near names there: {', '.join(near)}." if near else ""


def _near(name: str, known: Iterable[Any]) -> list[str]:
  return difflib.get_close_matches(name, [str(k) for k in known], n=1)


def _kind(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
  return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
