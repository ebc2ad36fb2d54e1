"""The shapes of a training's batches: how many rows of how many places each step takes.

  shapes = fitted([[9, 4, 3], [2, 2]], row_length=12, unit=1)        [Shape(1, 16), Shape(1, 16)]

Every shape is a program to compile, and a place that no example fills costs what a filled one does. `fitted` looks for
the length of rows and for up to PROGRAMS numbers of rows, or the other way around, with the fewest places in all; one
more program must save SAVING of them. Steps of 20, 12 and 11 full rows, on one device:

  one shape       20 20 20        60 places, of which 43 are filled
  two shapes      20 12 12        44
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alma_jax.engine import buckets
from alma_jax.text import packing

PROGRAMS = 4
SAVING = 0.01, 0.05  # of all places, in long and in short trainings
SAMPLE = 48  # steps from which the length of rows is chosen
FEW = 8  # rows for each of the unit up to which their length may vary
ATTENTION = 2**15  # the length of a row at which attention over it costs about what all else does
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

  Either rows have one length and their number varies; or, where a step has few rows for each of the `unit`, their
  number stays and their length varies. No row is longer than twice `row_length`. Segments keep their positions.
  """
  some, saving = steps[:: -(-len(steps) // SAMPLE)], float(np.clip(3 / len(steps), *SAVING))

  def levels(sizes: np.ndarray) -> np.ndarray:
    """[steps] these numbers, each rounded up to one of a few levels."""
    found = buckets.levels(sizes, programs, saving)
    return found[np.searchsorted(found, sizes)]

  def cost(shapes: Sequence[Shape]) -> float:
    places = sum(shape.places * (1 + shape.length / ATTENTION) for shape in shapes)
    return places * (1 + saving * (len(set(shapes)) - 1))

  def by_rows(steps: Sequence[Sequence[int]], length: int) -> list[Shape]:
    return [Shape(int(rows), length) for rows in levels(_rows(steps, length, unit))]

  def by_widths(steps: Sequence[Sequence[int]], rows: int) -> list[Shape] | None:
    widths = _widths(steps, rows, 2 * row_length)
    return None if widths is None else [Shape(rows, int(width)) for width in levels(widths)]

  longest = max(max(lengths) for lengths in steps)
  ways: list[Callable[[Sequence[Sequence[int]]], list[Shape] | None]] = [
    functools.partial(by_rows, length=length) for length in _lengths(longest, row_length)
  ]
  most = max(map(sum, some)) / row_length / unit  # rows for each of the `unit`
  for count in range(max(1, math.ceil(most / 2)), min(FEW, math.ceil(2 * most)) + 1):
    ways.append(functools.partial(by_widths, rows=count * unit))
  costs = [math.inf if (found := way(some)) is None else cost(found) for way in ways]
  # What suits the sample may have no room for another step; rows of a fixed length always have.
  tried = (ways[i](steps) for i in np.argsort(costs, kind="stable"))
  return next(found for found in tried if found is not None)


def _lengths(longest: int, row_length: int) -> Iterator[int]:
  """Lengths of rows that hold the longest example, a sixth apart or more, up to twice `row_length`, which is one."""
  yield row_length
  length = buckets.rounded(longest)
  while length < 2 * row_length:
    yield length
    length = buckets.rounded(length + length // 6)


def _rows(steps: Sequence[Sequence[int]], length: int, unit: int) -> np.ndarray:
  """[steps] the rows of this length that each step needs, a multiple of `unit`, in sixteenths where there are many."""
  found = []
  for lengths in steps:
    count = -(-len(packing.pack(lengths, length)) // unit)
    grain = max(1, (1 << (count.bit_length() - 1)) // FINE)
    found.append(-(-count // grain) * grain * unit)
  return np.array(found)


def _widths(steps: Sequence[Sequence[int]], rows: int, most: int) -> np.ndarray | None:
  """[steps] the length that so many rows need for each step, in sixteenths; None if one of them needs over `most`."""

  def rounded(length: int) -> int:
    step = max(buckets.STEP, (1 << (length - 1).bit_length()) // FINE)
    return -(-length // step) * step

  found = []
  for lengths in steps:
    width = rounded(max(max(lengths), -(-sum(lengths) // rows)))
    while width <= most and len(packing.pack(lengths, width)) > rows:
      width = rounded(width + 1)
    if width > most:
      return None
    found.append(width)
  return np.array(found)
