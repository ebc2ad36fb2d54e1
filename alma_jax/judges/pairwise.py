"""Judges of two answers to one prompt: the first one's share of the win, 1, 0.5 for a tie, or 0.

  judge = made(host, options, "api:gpt-4o@https://api.openai.com/v1#lima_pairwise", margin=0.0)
  judge.shares([Contest(mine, theirs)])          [0.5]; None where the judge's answer holds no verdict

An endpoint with a pairwise protocol of evals/protocols.py is asked for both orders, as the protocol says. Any other
judge, of single answers, scores both; scores that differ by at most `margin` are a tie.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from alma_jax import names
from alma_jax.evals import protocols
from alma_jax.judges import api, contract
from alma_jax.judges.api_asking import Answers, Asking, Limits
from alma_jax.judges.contract import Answered, Judge
from alma_jax.options import ConfigError
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Host


class Contest(NamedTuple):
  """Two answers to one prompt."""

  mine: Answered
  theirs: Answered


class PairJudge(Protocol):
  @property
  def identity(self) -> str: ...

  def shares(self, contests: Sequence[Contest], bar: Bar | None = None) -> list[float | None]: ...


@dataclasses.dataclass(frozen=True)
class ByScores:
  """A judge of single answers that scores both."""

  judge: Judge
  margin: float

  @property
  def identity(self) -> str:
    return f"{self.judge.identity}, tie within {self.margin:g}"

  def shares(self, contests: Sequence[Contest], bar: Bar | None = None) -> list[float | None]:
    pairs = [pair for contest in contests for pair in contest]
    scores = [v.score for v in contract.scores(self.judge, pairs, missing=True)]
    if bar is not None:
      bar.update(len(contests))
    found: list[float | None] = []
    for mine, theirs in zip(scores[::2], scores[1::2], strict=True):
      if mine is None or theirs is None:
        found.append(None)
      else:
        found.append(0.5 if abs(mine - theirs) <= self.margin else float(mine > theirs))
    return found


@dataclasses.dataclass(frozen=True)
class ByProtocol:
  """A pairwise protocol at an endpoint."""

  grader: api.Grader
  asking: Asking

  @property
  def identity(self) -> str:
    return self.grader.identity

  def shares(self, contests: Sequence[Contest], bar: Bar | None = None) -> list[float | None]:
    items = []
    for at, (mine, theirs) in enumerate(contests):
      item = protocols.item_of(str(at), *mine)
      items.append(dataclasses.replace(item, baseline=(theirs[1],)))
    refused = self.grader.ask(items, self.asking)
    if bar is not None:
      bar.update(len(contests))
    return [self.grader.graded(item, self.asking.answers, refused).grade.score for item in items]


def compares(name: str) -> bool:
  """True for an endpoint that is asked about two answers."""
  kind, _, argument = name.partition(":")
  return kind == "api" and "#" in argument and api.grader_of(argument, "lima_pairwise").protocol.pairwise


def made(host: Host, options: Any, name: str, margin: float, field: str) -> PairJudge:
  """The judge that a word of names.EVALUATORS or a user's "package.module:NAME" stands for."""
  if compares(name):
    grader = api.grader_of(name.partition(":")[2], "lima_pairwise")
    return ByProtocol(grader, Asking(grader.endpoint, Answers(api.kept_answers()), Limits()))
  judge = contract.by_name(names.EVALUATORS, name, host, options, field)
  if getattr(judge, "needs", ()):
    raise ConfigError(f"{field}: {name!r} reads the fields of a set's rows; two free answers are not compared by it")
  return ByScores(judge, margin)
