"""Rows of different lengths in calls of a few fixed shapes, so that few programs are compiled.

  rounded(100)    the width of a row of 100 tokens
  coarse(100)     the same where compiling a program for each width would cost more than padding
  batches(...)    single rows, one width per batch
  waves(...)      rows that continue shared prefixes: which device holds which prefix, and which rows run together

All of this happens on the host and follows from the rows' lengths and order alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

STEP = 16  # every width is a multiple of it
TILE = 4  # rows that read one copy of their prefix's keys and values; more would not save much
LONG = 64  # tokens of a prefix from which a copy for every row is worth saving
SPARE = 1.125  # and only where tiles leave at most an eighth of all places empty
ROOM = 1024  # tokens of prefixes that are held for every row of a call
FEW = 4  # up to so many full batches of rows are few
FINE, LEVELS, SAVING = 8, 3, 0.1  # few rows: what widths are multiples of, how many, what a further one must save
# Operations of a call below which one program more costs more than padding. A CPU core compiles a prefill of three
# layers in two seconds, about 2e11 operations; coarse shapes make up to eight times the work, and mostly twice.
LITTLE = 2.5e10


def rounded(length: int) -> int:
  """The least width that holds the length: multiples of 16 up to 64, of 32 up to 128, of 64 up to 1024, and from there
  on eight per doubling. Powers of two are widths."""
  octave = 1 << (max(length, 1) - 1).bit_length()
  step = min(max(STEP, octave // 4), max(64, octave // 16))
  return -(-max(length, 1) // step) * step


def little(parameters: int, rows: Iterable[Sequence[int]]) -> bool:
  """True if a call for these rows is so little work that few programs count for more than little padding."""
  return 2 * parameters * sum(map(len, rows)) < LITTLE


def coarse(length: int, least: int = 2 * STEP) -> int:
  """The first of `least`, 4 x least, 16 x least, ... that holds the length."""
  while least < length:
    least *= 4
  return least


def padded(rows: Sequence[Sequence[int] | None], width: int, least: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [rows, width] and lengths [rows] of right-padded rows; a row that is None has length `least`."""
  tokens, lengths = np.zeros((len(rows), width), np.int32), np.full(len(rows), least, np.int32)
  for at, row in enumerate(rows):
    if row is not None:
      tokens[at, : len(row)], lengths[at] = row, len(row)
  return tokens, lengths


class Bucket(NamedTuple):
  """Rows of one rounded length; batches may have places that no row fills."""

  indices: list[int]  # of the rows, in order of their places
  tokens: np.ndarray  # [batch, width]
  lengths: np.ndarray  # [batch]


def levels(sizes: np.ndarray, most: int, saving: float) -> np.ndarray:
  """At most `most` of these numbers, ascending, to which all of them are rounded up so that their sum is least.

  One more level must save a share `saving` of it: 3 3 4 9 have the levels [3 4 9] with 0.05, and [9] with 0.9.
  """
  values, counts = np.unique(sizes, return_counts=True)
  upto = np.cumsum(counts)
  costs = values * (upto - upto[:, None] + counts[:, None])  # [i, j]: the values from i to j become the value j
  ends = runs(np.where(np.tri(len(values), dtype=bool).T, costs, math.inf), 1 + saving * np.arange(most))
  return values[ends]


def runs(costs: np.ndarray, prices: np.ndarray) -> list[int]:
  """The last things of the runs into which n things are cut, so that the sum of the runs' costs is least.

  `costs[i, j]` is that of a run from i to j, infinite for j < i. The sum of k runs counts `prices[k - 1]` times, and
  there are no more than `len(prices)` runs. Of equal cuts it is that of fewer runs, then of shorter ones first.
  """
  least, ends = [costs[:, -1]], [np.full(len(costs), len(costs) - 1)]  # of what begins at i, in one run
  for _ in prices[1 : len(costs)]:  # in one more: a run to j, and then the best of what begins at j + 1
    sums = costs + np.append(least[-1][1:], math.inf)
    least.append(sums.min(axis=1))
    ends.append(sums.argmin(axis=1))
  count = int(np.argmin([found[0] * price for found, price in zip(least, prices, strict=False)]))
  last = [-1]
  for left in range(count, -1, -1):
    last.append(int(ends[left][last[-1] + 1]))
  return last[1:]


def batches(
  rows: Sequence[Sequence[int]], batch: int, unit: int = 1, least: int = 1, fit: bool = True,
  width: Callable[[int], int] = rounded,
) -> Iterator[Bucket]:  # fmt: skip
  """Yields Buckets that hold every row once, shortest first. Empty places have length `least`.

  Many rows come in Buckets of `batch` places and lengths as `width` rounds them, which every call for many rows has in
  common. FEW times that or less come in up to LEVELS sizes that fit them, of at most `batch` places, in multiples of
  `unit`; unless not `fit`, because such sizes, and so the last digits of results, follow the number of devices.
  """
  if fit and 0 < len(rows) <= FEW * batch:
    yield from _fitted(rows, batch, unit, least)
    return
  widths = [width(len(row)) for row in rows]
  order = sorted(range(len(rows)), key=lambda i: (widths[i], i))
  for wide, members in itertools.groupby(order, key=widths.__getitem__):
    members = list(members)
    for start in range(0, len(members), batch):
      take = members[start : start + batch]
      filled = [*(rows[i] for i in take), *[None] * (batch - len(take))]
      yield Bucket(take, *padded(filled, wide, least))


def _fitted(rows: Sequence[Sequence[int]], batch: int, unit: int, least: int) -> Iterator[Bucket]:
  lengths = np.array([max(1, -(-len(row) // FINE)) * FINE for row in rows])
  widths = levels(lengths, LEVELS, SAVING)
  for at, width in enumerate(widths):
    members = np.flatnonzero(np.searchsorted(widths, lengths) == at).tolist()
    size = -(-len(members) // -(-len(members) // batch))  # of as many equal parts as are needed
    size = -(-size // unit) * unit
    for start in range(0, len(members), size):
      take = members[start : start + size]
      filled = [*(rows[i] for i in take), *[None] * (size - len(take))]
      yield Bucket(take, *padded(filled, int(width), least))


@dataclasses.dataclass(frozen=True)
class Suffix:
  """What follows a prefix, once for all rows that are equal."""

  ids: tuple[int, ...]
  indices: list[int]  # of those rows


Tile = list[Suffix]  # rows of one prefix, up to W of them, longest first


@dataclasses.dataclass(frozen=True)
class Call:
  """Tiles of rows that run together, replica by replica."""

  prefixes: np.ndarray  # [replicas * n] which of its replica's prefixes each tile continues
  rows: list[Suffix | None]  # replicas x n x W of them; None where no row is


@dataclasses.dataclass(frozen=True)
class Wave:
  """Prefixes that are on the devices together, and the calls in which everything that continues them runs."""

  prefixes: list[tuple[int, ...] | None]  # replicas x P of them; None where no prefix is
  calls: list[Call]


def held(rows: int, width: int) -> int:
  """The most prefixes of this width that a replica holds at a time, whose calls have so many rows."""
  return max(rows, rows * ROOM // width)


def waves(
  grouped: Mapping[tuple[int, ...], list[Suffix]],
  replicas: int,
  rows: int,
  before: int = 0,
  fixed: bool = False,
  fitting: Callable[[int, int, int, int], int] | None = None,
) -> Iterator[Wave]:
  """Yields the Waves of {prefix: its suffixes}; a replica runs `rows` rows per call.

  Up to W rows of one prefix and of like length form a tile, W = TILE or 1. Prefixes of like length, with suffixes of
  like length, share a wave, and in a wave the long tiles come first. `before`: tokens that precede every prefix.
  `fixed`: every wave has places for `rows` prefixes on each replica, however few they are. `fitting(rows, width,
  before, W)`: how many of these rows fit, of such a width, behind prefixes of so many places.

  Prefixes p with five rows and q with two, on one replica with rows = 8 and W = 4, so that a call has n = 2 tiles:

    tiles   p: [a b c d] [e]   q: [f g]       Wave.prefixes  [p, q, None, None]
    calls   prefixes [0, 1]    rows a b c d f g - -      (longest first; - is None)
            prefixes [0, 0]    rows e - - - - - - -      (the second tile is empty)
  """
  W = _tile_width(grouped, rows, before)
  tiled = {prefix: _tiles(found, W) for prefix, found in grouped.items()}
  # A prefix with more than a replica's share of all tiles is held by several of them.
  share = -(-sum(map(len, tiled.values())) // replicas)
  pieces = [(prefix, tiles[at : at + share]) for prefix, tiles in tiled.items() for at in range(0, len(tiles), share)]

  def size(piece: tuple[tuple[int, ...], list[Tile]]) -> tuple[int, float]:
    prefix, tiles = piece
    return rounded(len(prefix)), sum(len(tile[0].ids) for tile in tiles) / len(tiles)

  pieces.sort(key=size, reverse=True)
  while pieces:
    if fixed:
      many = most = rows
    else:
      width = before + rounded(len(pieces[0][0]))
      many, most = rows, held(rows, width)
      if fitting:
        longest = max(len(tile[0].ids) for _, tiles in pieces[: replicas * most] for tile in tiles)
        many = fitting(rows, rounded(longest), width, W)
        most = held(many, width)
    now, pieces = pieces[: replicas * most], pieces[replicas * most :]
    yield _wave(now, replicas, many, (most if fixed else 1, most), W)


def _tile_width(grouped: Mapping[tuple[int, ...], list[Suffix]], rows: int, before: int) -> int:
  """W: TILE where prefixes are long and tiles nearly full, else 1."""
  tiles = [tile for found in grouped.values() for tile in _tiles(found, TILE)]
  places = TILE * sum(len(tile[0].ids) for tile in tiles)
  full = rows % TILE == 0 and places <= SPARE * sum(len(row.ids) for tile in tiles for row in tile)
  long = before + sum(map(len, grouped)) / len(grouped) >= LONG
  return TILE if full and long else 1


def _tiles(rows: list[Suffix], W: int) -> list[Tile]:
  ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
  return [ordered[at : at + W] for at in range(0, len(ordered), W)]


def _wave(
  pieces: list[tuple[tuple[int, ...], list[Tile]]], replicas: int, rows: int, places: tuple[int, int], W: int
) -> Wave:
  """The Wave of these (prefix, tiles); each replica has at least and at most so many `places` for prefixes."""
  least, most = places
  held: list[dict[tuple[int, ...], int]] = [{} for _ in range(replicas)]  # prefix -> its place, for each replica
  tiles: list[list[tuple[int, Tile]]] = [[] for _ in range(replicas)]  # (place of the prefix, tile), for each replica
  # The prefix with most tiles first, each to the replica with the fewest tiles that still has room.
  for prefix, found in sorted(pieces, key=lambda piece: len(piece[1]), reverse=True):
    to = min((i for i in range(replicas) if len(held[i]) < most), key=lambda i: len(tiles[i]))
    place = held[to].setdefault(prefix, len(held[to]))
    tiles[to] += [(place, tile) for tile in found]
  for share in tiles:
    share.sort(key=lambda tile: len(tile[1][0].ids), reverse=True)
  P, n = _few(max(least, *map(len, held)), rows, most), rows // W
  prefixes = [prefix for share in held for prefix in (*share, *[None] * (P - len(share)))]
  calls = [_call([share[at : at + n] for share in tiles], n, W) for at in range(0, max(map(len, tiles)), n)]
  return Wave(prefixes, calls)


def _few(count: int, rows: int, most: int) -> int:
  """One of a few numbers of prefixes that hold the count: powers of four up to `rows`, then twice that and so on."""
  size = 1
  while size < count:
    size = min(4 * size, rows) if size < rows else 2 * size
  return min(size, most)


def _call(tiles: list[list[tuple[int, Tile]]], n: int, W: int) -> Call:
  """The Call of each replica's tiles, at most n of them, filled up to n tiles of W rows."""
  prefixes = np.zeros((len(tiles), n), np.int32)
  rows: list[Suffix | None] = []
  for replica, found in enumerate(tiles):
    prefixes[replica, : len(found)] = [place for place, _ in found]
    for _, tile in found:
      rows += [*tile, *[None] * (W - len(tile))]
    rows += [None] * (W * (n - len(found)))
  return Call(prefixes.ravel(), rows)
