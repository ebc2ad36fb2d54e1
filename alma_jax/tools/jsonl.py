"""JSONL in and out for commands that take hours: rows are read one at a time, and the output survives a kill.

  for line, item in read("prompts.jsonl"): ...           # the number of a line and its object
  for row in prompts("prompts.jsonl", host): ...         # Asked: a prompt as token ids
  with stage_of(output, options, fields) as stage:       # resumed, locked, or refused if a value has changed
    parts = Parts(stage, sizes, together=8)
    for numbers, rows in parts.missing(chunks(prompts(...), PART)):
      parts.write(number, lines, counts)                 # JSON objects, a line each
    finish(stage, output)                                # OUTPUT appears, whole

`OUTPUT.parts` beside the output is a run directory (store/runs.py) with one stage, whose parts are the output's lines.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import RunError
from alma_jax.runtime.host import Host
from alma_jax.store import data, shards, verify
from alma_jax.store.data import DataError
from alma_jax.store.digests import Digest, Writer
from alma_jax.store.runs import Stage
from alma_jax.text import chat
from alma_jax.text.chat import Messages
from alma_jax.text.tokenizer import TextError
from alma_jax.tools import command

R = TypeVar("R")

# Rows


def read(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """The number and the object of every line that is not blank."""
  path = pathlib.Path(path)
  if not path.is_file():
    what = "is a directory" if path.is_dir() else "no such file"
    raise DataError(f"{path}: {what}; --input names a file with one JSON object per line")
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        data.check_size(len(line), f"{path}, line {number}")
        yield number, _object(line, f"{path}, line {number}")


def id_of(item: Mapping[str, Any], messages: Messages, where: str) -> str | int:
  """The row's own id, else a hash of its prompt."""
  value, field = item.get("id"), f"{where}, field id"
  if value is None:
    return prompt_id(messages)
  if isinstance(value, str):
    return data.text_of(value, field)
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  raise DataError(f"{field}: expected a string or a whole number, found {json.dumps(value)[:40]}")


@dataclasses.dataclass(frozen=True)
class Asked:
  """A prompt of the input."""

  line: int
  id: str | int
  said: Mapping[str, Any]  # the row's `messages` or `prompt`, for the output
  ids: tuple[int, ...]


def prompts(path: str, host: Host) -> Iterator[Asked]:
  """The rows of the input as Asked; a DataError names line and field of what cannot be one."""
  for line, item in read(path):
    where = f"{path}, line {line}"
    messages, turns = data.row_of(item, (), line, where).messages, item.get("messages")
    if isinstance(turns, list) and turns[-1]["role"] == "assistant":
      raise DataError(f"{where}, field messages: the last turn must be the user's, found role 'assistant'; remove it")
    data.check_turns(messages, where)
    said = {"prompt": messages[0]["content"]} if turns is None else {"messages": list(messages)}
    yield Asked(line, id_of(item, messages, where), said, _ids(host, messages, said, where))


def _ids(host: Host, messages: Messages, said: Mapping[str, Any], where: str) -> tuple[int, ...]:
  tok = host.tokenizer
  if host.raw and "messages" in said:
    raise DataError(f"{where}: --raw takes a text, the field `prompt`; `messages` need a chat format")
  try:
    if host.raw:
      ids = [*tok.opening, *tok.encode(said["prompt"])]
    else:
      ids = chat.encode_prompt(tok, host.chat, messages)
  except TextError as error:
    raise DataError(f"{where}: {error}") from None
  if not ids or not (host.raw or messages[-1]["content"].strip()):
    raise DataError(f"{where}: the prompt is empty")
  return tuple(ids)


def chunks(rows: Iterable[R], size: int, weight: Callable[[R], int] | None = None) -> Iterator[list[R]]:
  """Lists of successive rows that weigh `size` or just more, 1 each unless `weight` tells; the last may weigh less."""
  chunk, weighs = [], 0
  for row in rows:
    chunk.append(row)
    weighs += weight(row) if weight else 1
    if weighs >= size:
      yield chunk
      chunk, weighs = [], 0
  if chunk:
    yield chunk


def _object(line: bytes, where: str) -> dict[str, Any]:
  try:
    text = line.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise DataError(f"{where}: not UTF-8 text (byte {e.start} of the line)") from None
  if text.lstrip().startswith("["):
    raise DataError(f"{where}: a JSON array; expected one object per line (jq -c '.[]' FILE makes that of an array)")
  try:
    item = json.loads(text)
  except json.JSONDecodeError as e:
    raise DataError(f"{where}, column {e.colno}: not valid JSON ({e.msg}); expected one object per line") from None
  except (ValueError, RecursionError) as e:  # numbers of thousands of digits, nesting of thousands of levels
    raise DataError(f"{where}: cannot be read: {e}") from None
  if not isinstance(item, dict):
    raise DataError(f'{where}: expected an object such as {{"prompt": ...}}, found {text.strip()[:40]}')
  return item


# The output and its parts


def check_output(output: pathlib.Path) -> None:
  """Raise unless the output can be written, or was made here."""
  command.check_place(output)
  if output.is_dir():
    raise RunError(f"--output: {output} is a directory; name a file in it")
  if output.exists() and not command.parts_of(output).is_dir():
    raise RunError(
      f"{output} exists, and no {command.parts_of(output).name} beside it says how it was made: give another"
      " --output, or move it away"
    )


@contextlib.contextmanager
def stage_of(output: pathlib.Path, options: command.Shared, fields: Mapping[str, Any]) -> Iterator[Stage]:
  """The stage whose parts are the output's lines, for this process alone."""
  directory = command.parts_of(output)
  mend = f"give another --output, or delete {output} and {directory}"
  with command.run_of(output, directory, options, mend) as run:
    stage = run.stage("lines", fields, suffix=".jsonl")
    if output.exists():
      size = sum(part["size"] for part in stage.manifest["parts"]) if stage.done else None
      if output.stat().st_size != size:
        raise RunError(f"{output} differs from its parts in {directory}: it was changed; move it away")
    yield stage


@dataclasses.dataclass(frozen=True)
class Parts:
  """The parts of an output. `together` successive ones are computed in one go, which keeps the devices busy.

  parts      0 1 2 | 3 4 5 | 6 7     together=3
  on disk    0 1 2 |   4   |         of a killed start
  computed         | 3 4 5 | 6 7     the same groups as ever, which gives the same bytes
  written          | 3   5 | 6 7
  """

  stage: Stage
  sizes: Sequence[int]  # samples or responses in each part
  together: int

  @functools.cached_property
  def _missing(self) -> frozenset[int]:
    return frozenset(self.stage.missing(len(self.sizes)))

  @functools.cached_property
  def _groups(self) -> list[range]:
    n = len(self.sizes)
    return [range(at, min(at + self.together, n)) for at in range(0, n, self.together)]

  @property
  def total(self) -> int:
    return sum(self.sizes)

  @property
  def done(self) -> int:
    """The samples or responses that this start does not compute."""
    return sum(self.sizes[part] for group in self._groups if not self._missing & set(group) for part in group)

  def missing(self, parts: Iterable[list[R]]) -> Iterator[tuple[range, list[list[R]]]]:
    """Of all `parts`, given as their rows, the groups in which one is missing, with the numbers of their parts."""
    for group, rows in zip(self._groups, chunks(parts, self.together), strict=True):
      if self._missing & set(group):
        yield group, rows

  def write(self, part: int, lines: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> None:
    """Write a part unless it is there; `counts` are summed in the manifest."""
    if part not in self._missing:
      return
    text = shards.json_lines(lines)

    def write(path: pathlib.Path) -> Digest:
      with shards.atomic(path) as file:
        hashed = Writer(file)
        hashed.write(text)
      return hashed.digest()

    self.stage.write_file(part, len(self.sizes), write, len(lines), counts)


def finish(stage: Stage, output: pathlib.Path, **extra: Any) -> dict[str, Any]:
  """Write the manifest, which is returned, and the output, unless they are there."""
  manifest = stage.finish(**extra)
  if not output.exists():
    whole = stage.run.dir / output.name  # on the output's own file system
    with shards.atomic(whole) as file:
      for part in manifest["parts"]:
        with verify.opened(stage.dir / part["name"]) as lines:
          shutil.copyfileobj(lines, file)
    os.replace(whole, output)
  return manifest
