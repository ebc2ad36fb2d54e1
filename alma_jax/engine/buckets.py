"""Rows of different lengths in calls of a few fixed shapes, so that few programs are compiled.

  rounded(100)    the width of a row of 100 tokens
  batches(...)    single rows, one width per batch
  waves(...)      rows that continue shared prefixes: which device holds which prefix, and which rows run together

All of this happens on the host and follows from the rows' lengths and order alone.
"""

import dataclasses
import itertools

import numpy as np

STEP = 16  # every width is a multiple of it
TILE = 4  # rows that read one copy of their prefix's keys and values; more would not save much
LONG = 64  # tokens of a prefix from which a copy for every row is worth saving
SPARE = 1.125  # and only where tiles leave at most an eighth of all places empty
ROOM = 1024  # tokens of prefixes that are held for every row of a call


def rounded(length):
  """The least width that holds the length: multiples of 16 up to 64, of 32 up to 128, of 64 up to 1024, and from there
  on eight per doubling. Powers of two are widths."""
  octave = 1 << (max(length, 1) - 1).bit_length()
  step = min(max(STEP, octave // 4), max(64, octave // 16))
  return -(-max(length, 1) // step) * step


def padded(rows, width, least=0):
  """(tokens [rows, width], lengths [rows]) of right-padded rows; a row that is None has length `least`."""
  tokens, lengths = np.zeros((len(rows), width), np.int32), np.full(len(rows), least, np.int32)
  for at, row in enumerate(rows):
    if row is not None:
      tokens[at, : len(row)], lengths[at] = row, len(row)
  return tokens, lengths


def batches(rows, batch, least=1):
  """Yields (indices into rows, tokens [batch, width], lengths [batch]): rows of one rounded length together, shortest
  first. Places that no row fills have length `least`."""
  order = sorted(range(len(rows)), key=lambda i: (rounded(len(rows[i])), i))
  for width, members in itertools.groupby(order, key=lambda i: rounded(len(rows[i]))):
    members = list(members)
    for start in range(0, len(members), batch):
      take = members[start : start + batch]
      filled = [rows[i] for i in take] + [None] * (batch - len(take))
      yield take, *padded(filled, width, least)


@dataclasses.dataclass(frozen=True)
class Row:
  suffix: tuple
  indices: list  # of all rows that are equal to this one


@dataclasses.dataclass(frozen=True)
class Call:
  """Tiles of rows that run together, replica by replica."""

  prefixes: np.ndarray  # [replicas * n] which of its replica's prefixes each tile continues
  rows: list  # replicas x n x W of them; None where no row is


@dataclasses.dataclass(frozen=True)
class Wave:
  """Prefixes that are on the devices together, and the calls in which everything that continues them runs."""

  prefixes: list  # replicas x P of them; None where no prefix is
  calls: list


def waves(grouped, replicas, rows, before=0):
  """Yields the Waves of {prefix: Rows}; a replica runs `rows` rows per call.

  Up to W rows of one prefix and of like length form a tile, W = TILE or 1. Prefixes of like length, with suffixes of
  like length, share a wave, and in a wave the long tiles come first. `before`: tokens that precede every prefix.
  """
  W = _tile_width(grouped, rows, before)
  tiled = {prefix: _tiles(found, W) for prefix, found in grouped.items()}
  # A prefix with more than a replica's share of all tiles is held by several of them.
  share = -(-sum(map(len, tiled.values())) // replicas)
  pieces = [(prefix, tiles[at : at + share]) for prefix, tiles in tiled.items() for at in range(0, len(tiles), share)]
  mean = lambda tiles: sum(len(tile[0].suffix) for tile in tiles) / len(tiles)
  pieces.sort(key=lambda piece: (rounded(len(piece[0])), mean(piece[1])), reverse=True)
  while pieces:
    most = max(rows, rows * ROOM // (before + rounded(len(pieces[0][0]))))
    now, pieces = pieces[: replicas * most], pieces[replicas * most :]
    yield _wave(now, replicas, rows, most, W)


def _tile_width(grouped, rows, before):
  tiles = [tile for found in grouped.values() for tile in _tiles(found, TILE)]
  places = TILE * sum(len(tile[0].suffix) for tile in tiles)
  full = rows % TILE == 0 and places <= SPARE * sum(len(row.suffix) for tile in tiles for row in tile)
  long = before + sum(map(len, grouped)) / len(grouped) >= LONG
  return TILE if full and long else 1


def _tiles(rows, W):
  ordered = sorted(rows, key=lambda row: len(row.suffix), reverse=True)
  return [ordered[at : at + W] for at in range(0, len(ordered), W)]


def _wave(pieces, replicas, rows, most, W):
  """Each replica holds at most `most` prefixes."""
  held, tiles = [{} for _ in range(replicas)], [[] for _ in range(replicas)]
  for prefix, found in sorted(pieces, key=lambda piece: len(piece[1]), reverse=True):
    to = min((i for i in range(replicas) if len(held[i]) < most), key=lambda i: len(tiles[i]))
    place = held[to].setdefault(prefix, len(held[to]))
    tiles[to] += [(place, tile) for tile in found]
  for share in tiles:
    share.sort(key=lambda tile: len(tile[1][0].suffix), reverse=True)
  P, n = _few(max(map(len, held)), rows, most), rows // W
  prefixes = [prefix for share in held for prefix in (*share, *[None] * (P - len(share)))]
  calls = [_call([share[at : at + n] for share in tiles], n, W) for at in range(0, max(map(len, tiles)), n)]
  return Wave(prefixes, calls)


def _few(count, rows, most):
  """One of a few numbers of prefixes that hold the count: powers of four up to `rows`, then twice that and so on."""
  size = 1
  while size < count:
    size = min(4 * size, rows) if size < rows else 2 * size
  return min(size, most)


def _call(tiles, n, W):
  prefixes, rows = np.zeros((len(tiles), n), np.int32), []
  for replica, found in enumerate(tiles):
    prefixes[replica, : len(found)] = [place for place, _ in found]
    for _, tile in found:
      rows += [*tile, *[None] * (W - len(tile))]
    rows += [None] * (W * (n - len(found)))
  return Call(prefixes.ravel(), rows)
