"""JSONL in and out for commands that take hours: rows are read one at a time, and the output survives a kill.

  for line, item in read("prompts.jsonl"): ...          # (line number, object); errors name file and line
  with Output("out.jsonl", fields, names, lines) as out:  # `lines`: how many there will be
    for chunk in chunks:
      if not out.has(len(chunk)):                       # True: this chunk was written before
        out.write(made(chunk))                          # objects, one line each

`OUTPUT.meta.json` beside the output holds `fields`, what decides the lines. A start with the same fields keeps the
lines that are there, drops a torn last one and goes on; a chunk that was written in part is made again as a whole, so
that the bytes are those of a start that was never killed. A start with other fields is refused.
"""

import fcntl
import hashlib
import json
import os
import pathlib

from alma_jax.errors import RunError
from alma_jax.store import data, shards
from alma_jax.store.data import DataError

FORMAT = 1  # goes up when the lines of an output change meaning


def read(path):
  """(line number, object) of every line that is not blank."""
  path = pathlib.Path(path)
  if not path.is_file():
    what = "is a directory" if path.is_dir() else "no such file"
    raise DataError(f"{path}: {what}; --input names a file with one JSON object per line")
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield number, _object(line, f"{path}, line {number}")


def id_of(item, where):
  """The row's own id, or None."""
  value, field = item.get("id"), f"{where}, field id"
  if value is None or isinstance(value, str):
    return value if value is None else data.text_of(value, field)
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  raise DataError(f"{field}: expected a string or a whole number, found {json.dumps(value)[:40]}")


def chunks(rows, size, lines=lambda row: 1):
  """Lists of successive rows that make `size` lines of output or just more; the last one may make fewer."""
  chunk, made = [], 0
  for row in rows:
    chunk.append(row)
    made += lines(row)
    if made >= size:
      yield chunk
      chunk, made = [], 0
  if chunk:
    yield chunk


def short_digest(value):
  """A digest of a JSON value, for `fields` that would be too long to show."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _object(line, where):
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


class Output:
  """The lines of a file, appended; `done` of them were there at the start."""

  def __init__(self, path, fields, names, lines):
    """`fields`: name -> what decides the lines; `names`: for some of them how to call them, such as a path."""
    self.path, self.lines, self._passed = pathlib.Path(path), lines, 0
    fields = json.loads(json.dumps(fields | {"format": FORMAT}))
    if not self.path.parent.is_dir():
      raise RunError(f"--output: there is no directory {self.path.parent}; make it first")
    if self.path.is_dir():
      raise RunError(f"--output: {self.path} is a directory; name a file in it")
    try:
      self._file = open(self.path, "ab+")
    except OSError as e:
      raise RunError(f"--output: cannot write {self.path}: {e.strerror}") from None
    try:
      self._lock()
      self._agree(fields, names)
      self.done = self._kept()
    except BaseException:
      self._file.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()

  def has(self, n):
    """Whether the next n lines are there already; then they are passed over."""
    if self._passed + n > self.done:
      return False
    self._passed += n
    return True

  def write(self, items):
    """Writes those of the next lines that are not there yet."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    there = max(0, self.done - self._passed)
    self._passed += len(lines)
    try:
      self._file.write("".join(lines[there:]).encode())
      self._file.flush()
      os.fsync(self._file.fileno())
    except OSError as e:
      raise RunError(f"cannot write {self.path}: {e.strerror}; the same command goes on from here") from None

  def _lock(self):
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise RunError(f"{self.path}: another process is writing it; wait for it or give another --output") from None
    except OSError:
      pass  # a file system without locks

  def _agree(self, fields, names):
    """Raises unless an output that has lines was made with the same fields."""
    meta = self.path.with_name(f"{self.path.name}.meta.json")
    if self._file.seek(0, os.SEEK_END) == 0:
      shards.write_json(meta, {"fields": fields, "names": names})
      return
    if not meta.exists():
      raise RunError(
        f"{self.path} exists, and no {meta.name} beside it says how it was made: give another --output, or move it away"
      )
    try:
      old = json.loads(meta.read_text(encoding="utf-8"))
      was, called = old["fields"], old["names"]
    except (ValueError, KeyError):
      raise RunError(f"{meta} is damaged: give another --output, or delete both files") from None
    shown = lambda values, calls, key: f"{calls[key]} ({values.get(key)})" if key in calls else _json(values.get(key))
    changed = [
      f"  {key}: {shown(was, called, key)} -> {shown(fields, names, key)}"
      for key in sorted(was.keys() | fields.keys())
      if was.get(key) != fields.get(key)
    ]
    if changed:
      raise RunError(
        f"{self.path} was made with other values than this start asks for:\n" + "\n".join(changed) + "\n"
        f"Put the old value back, or give another --output, or delete {self.path} to have it made again."
      )

  def _kept(self):
    """The number of whole lines; what follows the last of them is cut off."""
    self._file.seek(0)
    count = size = at = 0
    while block := self._file.read(2**20):
      count += block.count(b"\n")
      if b"\n" in block:
        size = at + block.rindex(b"\n") + 1
      at += len(block)
    self._file.truncate(size)
    if count > self.lines:
      raise RunError(
        f"{self.path} has {count} lines and should have {self.lines} at most: it was changed; move it away"
      )
    return count


def _json(value):
  return json.dumps(value, ensure_ascii=False)
