"""A person as a judge: a blind form in the run's folder `forms`, and a run that waits until it is filled in.

  grades = graded(s, stage, "choice", [("country : lyon", "answer: lyon france .")])          [5.0], of 1 .. 6
  shares = compared(s, stage, "compare-alpaca", [Pair("country : lyon", "answer: ...", "It is ...")])      [1.0]

A row is called by a hash of what it shows, so the form says nothing of who wrote it; the run's artefacts, which the
person need not see, do. While a row is empty the run ends with exit status 75 and a line that names the file; the same
command goes on when every row is filled.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alma_jax.errors import Waiting
from alma_jax.evals.forms import Form, Row
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.runs import Stage

HUMAN = "human"  # the word in configs
GRADES = {str(grade): float(grade) for grade in range(1, 7)}  # LIMA's 1 to 6
SIDES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # the first answer's share of the win


def shown(messages: Sequence[Mapping[str, str]]) -> str:
  """A prompt as a person reads it; the speakers are named where there are several turns."""
  if len(messages) == 1:
    return messages[0]["content"]
  return "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in messages)


def form_of(s: Session[Any], name: str, texts: tuple[str, ...], column: str, allowed: Mapping[str, float]) -> Form:
  return Form(s.run.dir / layout.FORMS / f"{name}.csv", texts, column, allowed)


def row_name(*words: object) -> str:
  """What a row is called: a hash, by which the rows are ordered, too."""
  return hashlib.sha256(repr(words).encode()).hexdigest()[:12]


def filled(s: Session[Any], stage: Stage, form: Form, rows: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
  """The number in every row of the form, by name; Waiting while one of them is empty."""
  if s.run.process == 0:
    form.write([Row(name, texts) for name, texts in rows.items()])
  s.run.barrier(f"{stage.name}: {form.path.name}")
  found = form.read(rows.keys())
  if len(found) < len(rows):
    raise Waiting(
      f"waiting: {len(rows) - len(found):,} of {len(rows):,} rows of {form.path} have no {form.column}"
      f" ({', '.join(form.allowed)}); fill them in and start the same command again"
    )
  return found


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt that a person compares; equal ones are a tie that nobody is asked about."""

  prompt: str
  mine: str
  theirs: str

  @property
  def sides(self) -> tuple[str, str]:
    """The answers as they are shown: which comes first follows from the texts, not from who wrote them."""
    one, other = sorted((self.mine, self.theirs), key=functools.partial(row_name, self.prompt))
    return one, other

  @property
  def name(self) -> str:
    return row_name(self.prompt, *self.sides)


def compared(s: Session[Any], stage: Stage, name: str, pairs: Sequence[Pair], rater: int | None = None) -> list[float]:
  """The share of the win of each pair's `mine`, once the form NAME.csv, or that of a rater, is filled in."""
  form = form_of(s, name if rater is None else f"{name}.{rater}", ("prompt", "a", "b"), "better", SIDES)
  rows = {pair.name: (pair.prompt, *pair.sides) for pair in pairs if pair.mine != pair.theirs}
  found = filled(s, stage, form, rows)
  return [
    0.5 if pair.mine == pair.theirs else found[pair.name] if pair.mine == pair.sides[0] else 1 - found[pair.name]
    for pair in pairs
  ]


def graded(
  s: Session[Any],
  stage: Stage,
  name: str,
  answers: Iterable[tuple[str, str]],
  column: str = "grade",
  allowed: Mapping[str, float] = GRADES,
) -> list[float]:
  """The number of each (prompt, answer), once the form NAME.csv is filled in. One text is asked about once."""
  asked = [(row_name(*texts), texts) for texts in answers]
  found = filled(s, stage, form_of(s, name, ("prompt", "response"), column, allowed), dict(asked))
  return [found[row] for row, _ in asked]
