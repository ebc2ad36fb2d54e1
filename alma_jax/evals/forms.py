"""Forms for people: a CSV file that hides who wrote a text, filled in with any spreadsheet and read back strictly.

  form = Form(path, ("prompt", "response"), "grade", {"1": 1.0, ..., "6": 6.0})
  form.write([Row("9f3a", ("country : lyon", "answer: lyon france ."))])       row,prompt,response,grade
  form.read(["9f3a"])                                                          {"9f3a": 5.0}, or an error

A row's name says nothing of its writer, and rows come in the order of their names, which are hashes. A cell that begins
with =, +, - or @ gets a space in front: a spreadsheet would take it for a formula. The file is read with commas,
semicolons or tabs between the cells, as spreadsheets of different countries write them.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Collection, Mapping, Sequence

from alma_jax.errors import UserError
from alma_jax.store import shards

NAME = "row"  # the first column


class FormError(UserError):
  """A row of a form that cannot be read; the message names file, line and column."""


@dataclasses.dataclass(frozen=True)
class Row:
  name: str
  texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Form:
  path: pathlib.Path
  texts: tuple[str, ...]  # the columns that are read by the person
  column: str  # the one that is filled in
  allowed: Mapping[str, float]  # what may stand there, and the number that it means

  @property
  def columns(self) -> tuple[str, ...]:
    return (NAME, *self.texts, self.column)

  def write(self, rows: Sequence[Row]) -> None:
    """Write the form with an empty last column; a form that is there already is left alone, filled or not."""
    if self.path.exists():
      return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(self.columns)
    for row in sorted(rows, key=_name):
      writer.writerow([row.name, *map(_plain, row.texts), ""])
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with shards.atomic(self.path) as file:
      file.write(text.getvalue().encode("utf-8-sig"))  # the mark by which spreadsheets know UTF-8

  def read(self, names: Collection[str]) -> dict[str, float]:
    """The number in each row that is filled. A row that is unknown, missing, there twice or filled with something else
    is an error."""
    try:
      text = self.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
      line = self.path.read_bytes().count(b"\n", 0, error.start) + 1
      raise FormError(f"{self.path}, line {line}: not UTF-8 text; save the file as CSV in UTF-8") from None
    header = text.splitlines()[0] if text else ""
    separator = next((mark for mark in ",;\t" if mark.join(self.columns) == header.replace('"', "")), None)
    if separator is None:
      raise FormError(f"{self.path}, line 1: the columns must be {','.join(self.columns)}; found {header!r:.100}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    next(reader)
    found: dict[str, float] = {}
    lines: dict[str, int] = {}
    line = reader.line_num + 1
    for cells in reader:
      start, line = line, reader.line_num + 1  # a text may go over several lines
      where = f"{self.path}, line {start}"
      if not any(cell.strip() for cell in cells):
        continue
      if len(cells) != len(self.columns):
        raise FormError(f"{where}: {len(cells)} cells instead of {len(self.columns)} ({', '.join(self.columns)})")
      name, value = cells[0].strip(), cells[-1].strip()
      if name not in names:
        raise FormError(
          f"{where}, column {NAME}: {name!r} is no row of this form; take the change back, or delete the"
          " file to have an empty form written"
        )
      if name in lines:
        raise FormError(f"{where}, column {NAME}: {name!r} stands in line {lines[name]}, too; delete one of them")
      lines[name] = start
      if not value:
        continue
      if value.lower() not in self.allowed:
        raise FormError(f"{where}, column {self.column}: {value!r:.40}; it may be {', '.join(self.allowed)}")
      found[name] = self.allowed[value.lower()]
    if lost := sorted(set(names) - lines.keys()):
      raise FormError(
        f"{self.path}, column {NAME}: {len(lost)} rows are missing, such as {lost[0]!r}; bring them back, or delete the"
        " file to have an empty form written again"
      )
    return found


def _name(row: Row) -> str:
  return row.name


def _plain(text: str) -> str:
  return f" {text}" if text[:1] in ("=", "+", "-", "@") else text
