"""What a judge is: the same for the run's own judge, for an evaluator of rounds, and on the command line.

A judge is made by calling NAME(runtime, options), where NAME is a known word of `names.JUDGES` or `names.EVALUATORS` or
a user's "package.module:NAME", `runtime` a `runtime.host.Host` and `options` the section of the config that names it.
A word with an argument, such as "reward:DIR", makes its judge by NAME(runtime, options, argument=DIR).

A judge whose answer cannot be read gives a Verdict without a score. No score is ever guessed: an evaluator and the
command line count what is missing and fail above 2 %; the judge that selects must score every response.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from alma_jax import names
from alma_jax.errors import NotFinite, RunError
from alma_jax.options import ConfigError
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.text.chat import Messages

MISSING = 0.02  # the share of responses that an evaluator may leave without a score
Scale = tuple[float, float]


class MissingScores(RunError):
  """A judge's answers hold no score for too many responses."""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The score of one response, in the judge's own unit."""

  score: float | None  # None: the judge answered, and its answer holds no score
  probs: tuple[float, ...] | None = None  # of the scores that the judge can give, where it has probabilities
  mass: float | None = None  # the raw probability of all these scores together
  details: Mapping[str, Any] | None = None

  @property
  def number(self) -> float:
    """The score of a verdict that `scores` returned with `missing=False`."""
    if self.score is None:
      raise RuntimeError("a verdict without a score reached code that needs one")
    return self.score


class Answered(tuple):
  """A pair (messages, response). `finished` is False for a response that the length limit cut; `name` is for
  messages; `row` has the fields of the prompt's row in its set, for judges that need a reference."""

  finished: bool
  name: str
  row: Mapping[str, Any] | None

  def __new__(
    cls,
    messages: Messages,
    response: str,
    finished: bool = True,
    name: str = "",
    row: Mapping[str, Any] | None = None,
  ) -> "Answered":
    pair = super().__new__(cls, (messages, response))
    pair.finished, pair.name, pair.row = finished, name, row
    return pair


class Judge(Protocol):
  @property
  def identity(self) -> str:
    """Says who judges: two judges with one identity give equal scores. Part of fingerprints and reports."""
    ...

  @property
  def scale(self) -> Scale | None:
    """The lowest and the highest score; None where there is no bound."""
    ...

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]: ...


@runtime_checkable
class ShowsProgress(Protocol):
  """A judge that takes so long that it moves a bar itself."""

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar) -> list[Verdict]: ...


@runtime_checkable
class ReadsModel(Protocol):
  """A judge that grades a model by its log-probabilities, and not by its response alone."""

  def of(self, checkpoint: Checkpoint) -> Judge:
    """The judge that grades this checkpoint."""
    ...


def scores(judge: Judge, pairs: Sequence[Answered], bar: Bar | None = None, missing: bool = False) -> list[Verdict]:
  """One Verdict for each pair. All their numbers are finite, and the scores lie in the judge's own scale. Without
  `missing` each has a score; with it the caller counts those that have none, and asks `check_missing` about the sum."""
  asked = judge.judge if isinstance(judge, FromUser) else judge
  if bar is not None and isinstance(asked, ShowsProgress):
    found = asked.shown_scores(pairs, bar)
  else:
    found = judge.scores(pairs)
    if bar is not None:
      bar.update(len(pairs))
  if len(found) != len(pairs):
    raise ConfigError(f"the judge {judge.identity!r} gave {len(found)} verdicts for {len(pairs)} responses")
  low, high = judge.scale or (-math.inf, math.inf)
  for i, verdict in enumerate(found):
    if wrong := _not_finite(verdict):
      raise NotFinite(i, f"{name_of(pairs, i)}: the judge {judge.identity!r} gave {wrong}; it must be finite")
    if verdict.score is not None and not low <= verdict.score <= high:
      raise ConfigError(
        f"{name_of(pairs, i)}: the judge {judge.identity!r} gave the score {verdict.score}, outside its scale"
        f" {low:g} .. {high:g}"
      )
  if not missing and (lost := sum(v.score is None for v in found)):
    raise MissingScores(f"{_lost(judge.identity, lost, len(found))}; the judge that selects must score every response")
  return found


def check_missing(identity: str, missing: int, total: int) -> None:
  """Raise if more than 2 % of the answers that this judge gave hold no score."""
  if missing > MISSING * total:
    raise MissingScores(
      f"{_lost(identity, missing, total)}, more than {MISSING:.0%}; the answers that it gave are kept"
    )


def _lost(identity: str, missing: int, total: int) -> str:
  return f"the judge {identity!r} gave {missing:,} of {total:,} responses no score that can be read"


def name_of(pairs: Sequence[Answered], i: int) -> str:
  """The name of a pair for messages; a list of plain tuples has none."""
  return getattr(pairs[i], "name", "") or f"response {i + 1} of {len(pairs)}"


def row_field(pair: Answered, name: str, judge: str, field: str) -> Any:
  """What the row of a pair has in a field; an error that begins with the pair's name where it has nothing."""
  row = getattr(pair, "row", None)
  if row is None or row.get(field) is None:
    present = "the prompt has no row of a set" if row is None else f"the prompt's row has {', '.join(row) or 'none'}"
    raise ConfigError(f"{name}: {judge} reads the field `{field}` of a set's row; {present}")
  return row[field]


def without_rows(judge: Judge, field: str) -> Judge:
  """The judge, if it reads no rows of sets: `field` names it for prompts that have none."""
  if needs := getattr(judge, "needs", ()):
    raise ConfigError(
      f"{field}: the judge {judge.identity!r} reads the fields {', '.join(needs)} of a set's rows, and these prompts"
      " have none; it grades sets that have them"
    )
  return judge


def _not_finite(verdict: Verdict) -> str:
  """The first number of a verdict that is not finite, in words, or ""."""
  if verdict.score is not None and not math.isfinite(verdict.score):
    return f"the score {verdict.score}"
  if verdict.mass is not None and not math.isfinite(verdict.mass):
    return f"the mass {verdict.mass}"
  if verdict.probs is not None and not all(map(math.isfinite, verdict.probs)):
    return f"the probabilities {verdict.probs}"
  return ""


def by_name(table: names.Names, name: str, host: Host, options: Any, field: str) -> Judge:
  """The judge that a config names. A user's identity gains the digest of the source file it stands in."""
  made = names.resolve(table, name, field)(host, options)
  missing = [part for part in ("identity", "scale", "scores") if not hasattr(made, part)]
  if missing:
    raise ConfigError(f"{field} is {name!r}: what it makes has no {', '.join(missing)} (see docs/your_own_judge.md)")
  source = names.source_of(table, name)
  return made if source is None else FromUser(made, f"{made.identity} {source[:16]}")


@dataclasses.dataclass(frozen=True)
class FromUser:
  """A user's judge, whose identity changes with its source file."""

  judge: Judge
  identity: str

  @property
  def scale(self) -> Scale | None:
    return self.judge.scale

  @property
  def needs(self) -> Sequence[str]:
    return getattr(self.judge, "needs", ())

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.judge.scores(pairs)
