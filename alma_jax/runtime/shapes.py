"""The shapes of a training's batches: how many rows of how many places each step takes.

  shapes = fitted([[9, 4, 3], [2, 2]], row_length=12, unit=1)        [Shape(1, 16), Shape(1, 16)]

Every shape is a program to compile, and a place that no example fills costs what a filled one does. `fitted` looks for
the length of rows and for up to PROGRAMS numbers of rows with the fewest places in all; one more number of rows must
save SAVING of them. Steps of 20, 12 and 11 full rows, on one device:

  one shape       20 20 20        60 places, of which 43 are filled
  two shapes      20 12 12        44
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alma_jax.engine import buckets
from alma_jax.text import packing

PROGRAMS = 4
SAVING = 0.01, 0.05  # of all places, in long and in short trainings
SAMPLE = 48  # steps from which the length of rows is chosen
FINE = 16  # numbers of rows above this many times the unit are rounded: trainings of like size share their programs


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
  lengths of each step's examples.

  Either rows have one length of at most `row_length`, and their number varies; or, where a step has few rows for each
  of the `unit`, their number stays and their length varies, up to twice `row_length`. Segments keep their positions.
  """
  longest = max(max(lengths) for lengths in steps)
  some, saving = steps[:: -(-len(steps) // SAMPLE)], float(np.clip(3 / len(steps), *SAVING))

  def levels(sizes: np.ndarray) -> np.ndarray:
    return buckets.levels(sizes, programs, saving)

  def cost(sizes: np.ndarray) -> float:
    found = levels(sizes)
    return float(found[np.searchsorted(found, sizes)].sum()) * (1 + saving * (len(found) - 1))

  length = min(_lengths(longest, row_length), key=lambda length: length * cost(_rows(some, length, unit)))
  rows = _rows(steps, length, unit)
  best = length * cost(rows), [Shape(int(n), length) for n in levels(rows)[np.searchsorted(levels(rows), rows)]]
  if unit > 1:
    most = max(map(sum, steps)) / row_length / unit  # rows for each of the `unit`
    for count in range(max(1, math.ceil(most / 2)), min(4, math.ceil(most)) + 1):
      widths = _widths(steps, count * unit, 2 * row_length)
      if widths is not None and (found := count * unit * cost(widths)) < best[0]:
        to = levels(widths)
        best = found, [Shape(count * unit, int(width)) for width in to[np.searchsorted(to, widths)]]
  return best[1]


def _lengths(longest: int, row_length: int) -> Iterator[int]:
  """Lengths of rows that hold the longest example, a sixth apart or more, and `row_length`, which comes last."""
  length = buckets.rounded(longest)
  while length < row_length:
    yield length
    length = buckets.rounded(length + length // 6)
  yield row_length


def _rows(steps: Sequence[Sequence[int]], length: int, unit: int) -> np.ndarray:
  """[steps] the rows of this length that each step needs, a multiple of `unit`, in sixteenths where there are many."""
  found = []
  for lengths in steps:
    count = -(-len(packing.pack(lengths, length)) // unit)
    grain = max(1, (1 << (count.bit_length() - 1)) // FINE)
    found.append(-(-count // grain) * grain * unit)
  return np.array(found)


def _widths(steps: Sequence[Sequence[int]], rows: int, most: int) -> np.ndarray | None:
  """[steps] the length that so many rows need for each step; None if one of them needs more than `most`."""
  found = []
  for lengths in steps:
    width = buckets.rounded(max(max(lengths), -(-sum(lengths) // rows)))
    while width <= most and len(packing.pack(lengths, width)) > rows:
      width = buckets.rounded(width + 1)
    if width > most:
      return None
    found.append(width)
  return np.array(found)
