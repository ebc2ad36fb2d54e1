"""The shapes of a training's batches: how many rows of how many places each step takes.

  fitted([[9, 4, 3], [4, 4, 4, 4, 3], [2, 2]], row_length=16, unit=1)    [Shape(1, 16), Shape(2, 16), Shape(1, 16)]

Every shape is a program to compile, and a place that no example fills costs what a filled one does. `fitted` sorts the
steps by the places that they need and cuts them into a few runs. All steps of a run fit the shape of least cost; both
its rows and their length follow from them. One more program must save a share of all places (SAVING). The steps above:

  tokens            16  19   4
  in one row        16  32  16       the length that it needs, in multiples of 16
  in two rows       16  16  16       that of each row
  one shape          2 x 16          96 places
  two shapes         1 x 16, 2 x 16  64 places
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alma_jax.engine import buckets
from alma_jax.text import packing

# Programs of a training. The second to FEW-th one must save the places of three steps, the further ones of twelve,
# at least 1 % of all places, and 5 % always pay. A step of an 8B model on eight chips takes 0.2 to 1.7 seconds by the
# plan, and its program compiles in 9 to 57 (docs/speed.md).
PROGRAMS, FEW = 8, 4
STEPS, SAVING = (3, 12), (0.01, 0.05)
EXAMPLES, SAMPLE = 8192, (16, 128)  # the shapes are chosen from so many examples, but from 16 to 128 steps
COUNTS = 16  # numbers of rows that are tried
ATTENTION = 2**15  # the length of a row at which attention over it costs about what all else does
FINE = 16  # lengths and numbers of rows are rounded to so many or more for a doubling: like trainings share programs


class Shape(NamedTuple):
  """The rows of a batch and the places of each."""

  rows: int
  length: int

  @property
  def places(self) -> int:
    return self.rows * self.length


def fixed(steps: Sequence[Sequence[int]], row_length: int, unit: int) -> list[Shape]:
  """The same shape for all steps: whole rows, as many as the largest step needs, a multiple of `unit`."""
  most = max(len(packing.pack(lengths, row_length)) for lengths in steps)
  return [Shape(-(-most // unit) * unit, row_length)] * len(steps)


def fitted(steps: Sequence[Sequence[int]], row_length: int, unit: int, programs: int = PROGRAMS) -> list[Shape]:
  """A shape for each step, of at most `programs` different ones, with a multiple of `unit` rows. `steps` holds the
  lengths of each step's examples. No row is longer than twice `row_length`. Segments keep their positions."""
  less, more = (float(np.clip(count / len(steps), *SAVING)) for count in STEPS)
  prices = 1 + np.cumsum([0.0, *[less] * (FEW - 1), *[more] * (PROGRAMS - FEW)])[:programs]
  some, weights = _sample(steps)
  while True:
    shapes = _chosen([steps[i] for i in some], np.array(weights), row_length, unit, prices)
    at = [next((i for i, shape in enumerate(shapes) if _holds(shape, lengths)), -1) for lengths in steps]
    missing = [step for step, i in enumerate(at) if i < 0]
    if not missing:
      return [shapes[i] for i in at]
    missing = missing[:: -(-len(missing) // SAMPLE[1])]  # the sample had no step that needs so much
    some, weights = some + missing, weights + [1.0] * len(missing)


def _sample(steps: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
  """Steps of all sizes, and how many each of them stands for."""
  most = int(np.clip(EXAMPLES // max(map(len, steps)), *SAMPLE))
  if len(steps) <= most:
    return list(range(len(steps))), [1.0] * len(steps)
  sizes = [sum(lengths) for lengths in steps]
  order = np.argsort(sizes, kind="stable")
  some = order[((np.arange(most) + 0.5) * len(steps) / most).astype(int)].tolist()
  extreme = [int(order[-1]), int(np.argmax([max(lengths) for lengths in steps]))]
  return some + extreme, [len(steps) / most] * most + [1.0] * len(extreme)


def _chosen(
  steps: Sequence[Sequence[int]], weights: np.ndarray, row_length: int, unit: int, prices: np.ndarray
) -> list[Shape]:
  """The shapes, cheapest first, that hold these steps at the least cost; a step stands for `weights` ones."""
  tried = _counts(steps, row_length, unit)
  widths = np.array([[_width(lengths, rows, row_length) for rows in tried] for lengths in steps])  # [S, R]
  counts = np.array(tried)
  order = np.argsort(_cost(counts, widths).min(axis=1), kind="stable")
  widths, weights = widths[order], weights[order]
  costs = np.full((len(steps), len(steps)), math.inf)
  for first in range(len(steps)):  # the steps from `first` to each later one have the widths that hold them all
    costs[first, first:] = _cost(counts, np.maximum.accumulate(widths[first:])).min(axis=1) * weights[first:].cumsum()
  shapes, first = set(), 0
  for last in buckets.runs(costs, prices):
    needed = widths[first : last + 1].max(axis=0)
    best = int(_cost(counts, needed).argmin())
    shapes.add(Shape(int(counts[best]), int(needed[best])))
    first = last + 1
  return sorted(shapes, key=_price)


def _cost(rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
  return rows * widths * (1 + widths / ATTENTION)


def _price(shape: Shape) -> float:
  return shape.places * (1 + shape.length / ATTENTION)


def _counts(steps: Sequence[Sequence[int]], row_length: int, unit: int) -> list[int]:
  """Numbers of rows, multiples of `unit`: from few rows of twice `row_length` to rows as short as the longest example.
  The greatest number has room for every step."""
  sizes, longest = [sum(lengths) for lengths in steps], max(max(lengths) for lengths in steps)
  enough = max(math.ceil(max(sizes) / longest), *(len(packing.pack(lengths, row_length)) for lengths in steps))
  counts = [1]
  while counts[-1] * unit < enough:  # each up to 16, then eight for a doubling
    counts.append(counts[-1] + max(1, (1 << (counts[-1].bit_length() - 1)) * 2 // FINE))
  least = min(sizes) / (2 * row_length * unit)
  counts = [unit * count for count in counts if count >= least]
  return counts[:: -max(1, -(-len(counts) // COUNTS))]


def _width(lengths: Sequence[int], rows: int, row_length: int) -> float:
  """The length that so many rows need, in sixteenths; infinite if it would be above twice `row_length`."""
  width = _rounded(max(max(lengths), -(-sum(lengths) // rows)), row_length)
  while width <= 2 * row_length and not _holds(Shape(rows, width), lengths):
    width = _rounded(width + 1, row_length)
  return width if width <= 2 * row_length else math.inf


def _rounded(length: int, row_length: int) -> int:
  """The next multiple of a sixteenth of the doubling; `row_length` is one, too."""
  step = max(buckets.STEP, (1 << (length - 1).bit_length()) // FINE)
  found = -(-length // step) * step
  return row_length if length <= row_length < found else found


def _holds(shape: Shape, lengths: Sequence[int]) -> bool:
  """True if the step's examples can be packed into the shape. One row takes all that it has room for."""
  if sum(lengths) > shape.places or max(lengths) > shape.length:
    return False
  return shape.rows == 1 or len(lengths) <= shape.rows or len(packing.pack(lengths, shape.length)) <= shape.rows
