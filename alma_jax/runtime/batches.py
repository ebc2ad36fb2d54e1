"""What is trained on, as the steps' packed batches: examples, pairs, graded responses, or rated conversations.

  data = Examples([compact(*example) for example in encoded], names)    names: what errors call them
  batches = Batches(data, options, seed, unit=8)        batches(step) -> dict of arrays, of few shapes for all steps

A step takes `batch` items from a permutation that follows from (seed, epoch), packs them best-fit into rows, and fills
up to one of a few shapes (runtime/shapes.py), for each of which the step compiles once. With `fit_rows=False` there is
one shape, of rows as long as may be, in a multiple of ROWS:

  5 examples of 9, 4, 3, 2, 2 tokens, batch 3, row_length 12, unit 2

  step 0   items 4 0 2   [0 0 0 0 0 0 0 0 0 2 2 2] [4 4 . . . . . . . . . .] [empty] [empty]
  step 1   items 1 3     [1 1 1 1 3 3 . . . . . .] [empty] [empty] [empty]      2 rows at most -> lcm(ROWS, unit) = 4
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alma_jax.options import Checked, option
from alma_jax.runtime import shapes
from alma_jax.runtime.shapes import Shape
from alma_jax.text import packing
from alma_jax.text.packing import Encoded

ROWS = 4  # without `fit_rows` the number of rows is rounded up to this

Arrays = dict[str, Any]  # arrays by name, and for KTO a dict of more of them under "other"


class Part(NamedTuple):
  """What is packed into rows of its own: the places that each item takes there, and the length of a whole row."""

  lengths: np.ndarray  # [items]
  row_length: int


def compact(ids: Sequence[int], mask: Sequence[float] | np.ndarray) -> Encoded:
  """The sequence as arrays of 4 bytes a token, and 1 for a mask without fractions (else 4)."""
  weights = np.asarray(mask)
  return np.asarray(ids, np.int32), weights.astype(np.float32 if weights.dtype.kind == "f" else bool)


class _Sequences:
  """Items that are one sequence each."""

  sequences: Sequence[Encoded]

  def lengths(self, i: int) -> list[int]:
    return [len(self.sequences[i][0])]

  def parts(self, row_length: int) -> tuple[Part, ...]:
    return (Part(_lengths(self.sequences), row_length),)

  def packed(self, members: np.ndarray, to: Sequence[Shape]) -> Arrays:
    return _packed([self.sequences[i] for i in members], to[0])


def _lengths(sequences: Sequence[Encoded]) -> np.ndarray:
  return np.array([len(ids) for ids, _ in sequences])


def _packed(sequences: Sequence[Encoded], to: Shape) -> Arrays:
  packed = packing.pack([len(ids) for ids, _ in sequences], to.length)
  return packing.rows(sequences, packed, to.length, to.rows, pad_id=0)


@dataclasses.dataclass(frozen=True)
class Examples(_Sequences):
  """For SFT. `average`: "tokens" weighs every supervised token alike, "examples" every example. `shares` weigh the
  examples on top of that: a step's loss is the weighted mean over the step."""

  sequences: Sequence[Encoded]
  names: Sequence[object]
  average: str = "tokens"
  shares: np.ndarray | None = None  # [sequences]

  def rows(self, members: np.ndarray, to: Sequence[Shape], batch: int) -> Arrays:
    made = self.packed(members, to)
    if self.average == "examples":
      whole = np.array([np.sum(self.sequences[i][1][1:]) for i in members] + [1.0])  # the last one is padding's
      made["weights"] /= whole[made["example"]].astype(np.float32)
    if self.shares is not None:
      made["weights"] *= np.append(self.shares[members], 0.0)[made["example"]].astype(np.float32)
    return made


@dataclasses.dataclass(frozen=True)
class Pairs:
  """For preferences: rows of twice the length, packed as `packing.forked_rows` shows, [prompt][chosen][rejected]."""

  sides: Sequence[tuple[Encoded, Encoded]]  # (chosen, rejected)
  names: Sequence[object]
  reference: np.ndarray | None = None  # [pairs, 2 or 3] the reference's log-probs, if the loss has one
  others: Sequence[Encoded] | None = None  # for KTO: for each pair a response to another prompt

  def lengths(self, i: int) -> list[int]:
    return [len(ids) for ids, _ in self.sides[i]]

  def parts(self, row_length: int) -> tuple[Part, ...]:
    pairs = Part(np.array([packing.forked_length(*sides) for sides in self.sides]), 2 * row_length)
    return (pairs, Part(_lengths(self.others), row_length)) if self.others else (pairs,)

  def rows(self, members: np.ndarray, to: Sequence[Shape], batch: int) -> Arrays:
    sides = [self.sides[i] for i in members]
    packed = packing.pack([packing.forked_length(*pair) for pair in sides], to[0].length)
    made: Arrays = dict(packing.forked_rows(sides, packed, to[0].length, to[0].rows, pad_id=0))
    # The last step of an epoch may have fewer pairs: arrays by pairs are filled up with ones that are not real.
    made["real"] = (np.arange(batch) < len(members)).astype(np.float32)
    if self.reference is not None:
      made["reference"] = np.zeros((batch, self.reference.shape[1]), np.float32)
      made["reference"][: len(members)] = self.reference[members]
    if self.others:
      made["other"] = _packed([self.others[i] for i in members], to[1])
    return made


@dataclasses.dataclass(frozen=True)
class GradedResponses(_Sequences):
  """For policy gradients: responses with their advantages, and the log-prob of each token under two models.

  old[i][t] is that of token t + 1 of sequence i, so it is one shorter than the sequence.
  """

  sequences: Sequence[Encoded]
  names: Sequence[object]
  advantages: np.ndarray  # [sequences]
  old: Sequence[np.ndarray]  # under the model that wrote the responses
  reference: Sequence[np.ndarray]  # under the reference

  def rows(self, members: np.ndarray, to: Sequence[Shape], batch: int) -> Arrays:
    """The packed rows, and the values of each place. Sequences a of 3 tokens and b of 2, packed as [b a]:

    flat       a1 a2  0 b1  0  0       every sequence's values and a 0 for its last token, then one 0 for padding
    starts      0        3     5       where each begins in `flat`; the last is the padding's
    example     1  1  0  0  0 -1       of a row of 6 places
    positions   0  1  0  1  2  0
    at          3  4  0  1  2  5       starts[example] + positions: the row is b1 0 a1 a2 0 0
    """
    made = self.packed(members, to)
    starts = np.cumsum([0, *(len(self.sequences[i][0]) for i in members)])
    at = np.where(made["example"] < 0, starts[-1], starts[made["example"]] + made["positions"])

    def flat(logprobs: Sequence[np.ndarray]) -> np.ndarray:
      return np.concatenate([np.append(logprobs[i], 0.0) for i in members] + [np.zeros(1)])

    spread = np.concatenate([np.repeat(self.advantages[members], np.diff(starts)), [0.0]])
    for name, values in {"advantage": spread, "old": flat(self.old), "reference": flat(self.reference)}.items():
      made[name] = values[at].astype(np.float32)
    return made


@dataclasses.dataclass(frozen=True)
class Rated(_Sequences):
  """For regression: whole conversations and their scores."""

  sequences: Sequence[Encoded]
  names: Sequence[object]
  scores: np.ndarray  # [sequences]
  head: np.ndarray  # fp32 [D, 1], what the head begins as

  def rows(self, members: np.ndarray, to: Sequence[Shape], batch: int) -> Arrays:
    """The packed rows; at each example's last place `weights` is 1 and `score` its score, elsewhere both are 0."""
    made = self.packed(members, to)
    last = np.array([len(self.sequences[i][0]) - 1 for i in members] + [-1])  # the last one is padding's
    made["weights"] = (made["positions"] == last[made["example"]]).astype(np.float32)
    made["score"] = made["weights"] * np.append(self.scores[members], 0.0)[made["example"]].astype(np.float32)
    return made


TrainingData = Examples | Pairs | GradedResponses | Rated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Checked):
  """How data becomes steps."""

  batch: int = option(least=1)  # items of a step
  epochs: float = option(above=0)
  row_length: int = option(least=1)  # tokens; longer examples are cut and counted
  # Rows as many and as long as the data need; False: of row_length each, in multiples of 4. It changes the result only
  # by rounding, and what dropout drops.
  fit_rows: bool = option(True, practical=True)


class Batches:
  """step -> the step's packed batch, a function of (data, options, seed, step) alone; no seed: in order, once."""

  def __init__(self, data: TrainingData, options: Sizes, seed: int | None, unit: int) -> None:
    self.data, self.seed, self.batch = data, seed, options.batch
    self.count = len(data.names)
    self.per_epoch = math.ceil(self.count / self.batch)
    # 2.2 * 25 is 55.00000000000001
    self.steps = self.per_epoch if seed is None else max(1, math.ceil(round(options.epochs * self.per_epoch, 6)))
    self._order: tuple[int, np.ndarray] = (-1, np.arange(0))  # (epoch, its permutation)
    self._parts = data.parts(options.row_length)
    unit = unit if options.fit_rows else math.lcm(ROWS, unit)
    epochs = math.ceil(self.steps / self.per_epoch)
    of_steps = [self.members(step) for step in range(self.steps if options.fit_rows else epochs * self.per_epoch)]
    found = []
    for i, part in enumerate(self._parts):
      steps = [part.lengths[members].tolist() for members in of_steps]
      programs = 1 if i else shapes.PROGRAMS  # shapes of the parts multiply
      fit = functools.partial(shapes.fitted, programs=programs) if options.fit_rows else shapes.fixed
      found.append(fit(steps, part.row_length, unit))
    self.shapes: list[tuple[Shape, ...]] = list(zip(*found, strict=True))  # of each step, one for each part

  def members(self, step: int) -> np.ndarray:
    """Which items the step takes."""
    epoch, at = divmod(step, self.per_epoch)
    if self._order[0] != epoch:
      order = np.arange(self.count)
      self._order = epoch, order if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(order)
    return self._order[1][at * self.batch : (at + 1) * self.batch]

  def lengths(self, step: int) -> list[int]:
    """The lengths of all sequences of the step."""
    return [length for i in self.members(step) for length in self.data.lengths(i)]

  @property
  def useful(self) -> float:
    """The share of all steps' places that hold a token."""
    filled = sum(int(part.lengths[self.members(step)].sum()) for step in range(self.steps) for part in self._parts)
    return filled / sum(shape.places for step in range(self.steps) for shape in self.shapes[step])

  def largest(self) -> list[int]:
    """A step of each of the different shapes, that with the most places first."""
    first = {shape: step for step, shape in reversed(list(enumerate(self.shapes[: self.steps])))}
    return [first[shape] for shape in sorted(first, key=lambda found: -sum(part.places for part in found))]

  def __call__(self, step: int) -> Arrays:
    return self.data.rows(self.members(step), self.shapes[step], self.batch)
