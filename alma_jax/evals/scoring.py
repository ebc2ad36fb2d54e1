"""The benchmarks' numbers from verdicts, as their own tools compute them. Missing verdicts are counted, not filled in.

  win_rate([0.5, 0.91, None])           AlpacaEval: percent, with ties counted half
  length_controlled(rows, gamed)        AlpacaEval's win rate at equal length
  mt_bench(ratings)                     means by turn and category, and the official average
  arena_hard(battles)                   (wins + ties / 2) / battles, in percent

Intervals are the caller's (store/statistics.py): the values per question are what goes in here.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from alma_jax.errors import UserError


class ScoringError(UserError):
  """Verdicts that a number cannot be computed from."""


@dataclasses.dataclass(frozen=True)
class WinRate:
  """In percent, over the n questions that have a verdict."""

  value: float
  standard_error: float | None  # None for one question
  discrete: float  # each question won, lost or tied, after rounding
  wins: int
  losses: int
  ties: int
  n: int
  missing: int


def win_rate(shares: Sequence[float | None]) -> WinRate:
  """From the model's share of the win in every question: 1 won, 0 lost, 0.5 a tie."""
  known = np.array([share for share in shares if share is not None], np.float64)
  if not len(known):
    raise ScoringError(f"none of the {len(shares)} questions has a verdict; there is no win rate")
  n = len(known)
  wins, losses = int((known > 0.5).sum()), int((known < 0.5).sum())
  error = 100 * float(known.std(ddof=1)) / math.sqrt(n) if n > 1 else None
  discrete = 100 * (wins + (n - wins - losses) / 2) / n
  return WinRate(100 * float(known.mean()), error, discrete, wins, losses, n - wins - losses, n, len(shares) - n)


@dataclasses.dataclass(frozen=True)
class Compared:
  """A question for the length-controlled win rate."""

  share: float  # the model's share of the win
  characters: int  # of the model's answer
  baseline_characters: int
  difficulty: float  # of the question, from the user's file


@dataclasses.dataclass(frozen=True)
class Gamed:
  """A question answered by a baseline that was told to be brief or long, which holds the length's weight down."""

  share: float
  length: float  # the difference of lengths in standard deviations, baseline - gamed
  difficulty: float


@dataclasses.dataclass(frozen=True)
class LengthControlled:
  value: float  # percent
  standard_error: float | None  # of the mean over questions, as AlpacaEval prints it
  length: float  # the three weights
  difficulty: float
  model: float
  n: int


GAMED_WEIGHT = 0.1  # of each of the two gamed baselines' rows


def length_controlled(rows: Sequence[Compared], gamed: Sequence[Gamed] = ()) -> LengthControlled:
  """AlpacaEval 2.0's length-controlled win rate.

  Logistic regression without intercept: logit p = length * tanh(D / sd(D)) + difficulty * d + model, where D is the
  baseline's characters - the model's. The win rate is the mean of p at D = 0. AlpacaEval fits with an L1 penalty that
  cross-validation makes small; here there is none, which a test holds to 0.15 points.
  """
  if len(rows) < 2:
    raise ScoringError(f"a length-controlled win rate needs at least 2 questions, not {len(rows)}")
  difference = np.array([row.baseline_characters - row.characters for row in rows], np.float64)
  spread = difference.std(ddof=1)
  if spread == 0:
    raise ScoringError(
      "all answers differ from the baseline's by the same length: a length-controlled win rate needs more"
    )
  # Columns: length, difficulty, model. Rows: the model's questions, then the gamed baselines' with 0 for the model.
  own = np.stack([np.tanh(difference / spread), [row.difficulty for row in rows], np.ones(len(rows))], 1)
  others = np.array([[math.tanh(row.length), row.difficulty, 0.0] for row in gamed]).reshape(-1, 3)
  features = np.concatenate([own, others])
  target = np.array([row.share for row in (*rows, *gamed)], np.float64)
  weight = np.r_[np.ones(len(rows)), np.full(len(gamed), GAMED_WEIGHT)]
  found = _logistic(features, target, weight)
  at_equal_length = _sigmoid(own[:, 1:] @ found[1:])
  error = 100 * float(at_equal_length.std(ddof=1)) / math.sqrt(len(rows))
  length, difficulty, model = map(float, found)
  return LengthControlled(100 * float(at_equal_length.mean()), error, length, difficulty, model, len(rows))


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def _logistic(features: np.ndarray, target: np.ndarray, weight: np.ndarray, penalty: float = 1e-6) -> np.ndarray:
  """The weights [columns] that maximise the weighted log-likelihood of soft targets, by Newton's method.

  The tiny ridge penalty gives separable data an answer.
  """

  def loss(w: np.ndarray) -> float:
    z = features @ w
    return float(weight @ (np.logaddexp(0, z) - target * z) + penalty / 2 * w @ w)

  found = np.zeros(features.shape[1])
  for _ in range(100):
    p = _sigmoid(features @ found)
    gradient = features.T @ (weight * (p - target)) + penalty * found
    curvature = (features * (weight * p * (1 - p))[:, None]).T @ features + penalty * np.eye(len(found))
    step = np.linalg.solve(curvature, gradient)
    size, before = 1.0, loss(found)
    while loss(found - size * step) > before and size > 1e-8:  # a full step may overshoot
      size /= 2
    found = found - size * step
    if np.abs(size * step).max() < 1e-10:
      break
  return found


@dataclasses.dataclass(frozen=True)
class Rated:
  """One judgement of MT-Bench."""

  question: str | int
  turn: int
  category: str
  rating: float | None


@dataclasses.dataclass(frozen=True)
class MtBench:
  average: float  # over all ratings that are there: the official number
  turns: Mapping[int, float]
  categories: Mapping[str, float]
  n: int
  missing: int


def mt_bench(ratings: Sequence[Rated]) -> MtBench:
  """FastChat's means. The average is over all ratings; the mean of the two turns' means differs if one is missing."""
  known = [(x.turn, x.category, x.rating) for x in ratings if x.rating is not None]
  if not known:
    raise ScoringError(f"none of the {len(ratings)} answers has a rating; there is no average")
  turns, categories = collections.defaultdict(list), collections.defaultdict(list)
  for turn, category, rating in known:
    turns[turn].append(rating)
    categories[category].append(rating)
  return MtBench(
    _mean([rating for _, _, rating in known]),
    {turn: _mean(found) for turn, found in sorted(turns.items())},
    {category: _mean(found) for category, found in sorted(categories.items())},
    len(known),
    len(ratings) - len(known),
  )


@dataclasses.dataclass(frozen=True)
class ArenaHard:
  value: float  # percent
  battles: int
  questions: int  # with a battle
  missing: int  # questions without one


def arena_hard(battles: Sequence[Sequence[float]]) -> ArenaHard:
  """From each question's battles, the model's share in each: (wins + ties / 2) / battles.

  The 2024 edition fits a Bradley-Terry model; against a single baseline its win rate is this number. The 2025 edition
  prints the mean of 100 bootstraps of it.
  """
  flat = [share for question in battles for share in question]
  if not flat:
    raise ScoringError(f"none of the {len(battles)} questions has a verdict; there is no score")
  questions = sum(1 for question in battles if question)
  return ArenaHard(100 * _mean(flat), len(flat), questions, len(battles) - questions)


def consistent(labels: Sequence[tuple[float | None, float | None]]) -> float | None:
  """The share of questions whose two games, each as the model's share, name the same winner; None without any."""
  known = [(one, other) for one, other in labels if one is not None and other is not None]
  if not known:
    return None
  return sum((one > 0.5) - (one < 0.5) == (other > 0.5) - (other < 0.5) for one, other in known) / len(known)


def _mean(values: Sequence[float]) -> float:
  return math.fsum(values) / len(values)
