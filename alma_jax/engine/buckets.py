"""Rows of different lengths in calls of a few fixed shapes, so that few programs are compiled.

  rounded(100)    the width of a row of 100 tokens
  batches(...)    single rows, one width per batch
  waves(...)      rows that continue shared prefixes: which device holds which prefix, and which rows run together

All of this happens on the host and follows from the rows' lengths and order alone.
"""

import dataclasses
import itertools

import numpy as np

STEP = 16  # between two widths, at least
TILE = 4  # rows that read one copy of their prefix's keys and values; more would not save much
SPARE = 1.125  # there are no such tiles where they would leave more than an eighth of all places empty


def rounded(length):
  """The least width that holds the length: multiples of 16 up to 128, then four per doubling up to the next."""
  octave = 1 << (max(length, 1) - 1).bit_length()
  step = max(STEP, octave // 8)
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
  """Tiles of rows that run together, lane by lane; a lane is a group of devices that holds its own share of arrays."""

  prefixes: np.ndarray  # [lanes, n] which of the lane's prefixes each tile continues
  rows: list  # lanes x n x W of them; None where no row is


@dataclasses.dataclass(frozen=True)
class Wave:
  """Prefixes that are on the devices together, and the calls in which everything that continues them runs."""

  prefixes: list  # lanes x P, P a power of two; None where no prefix is
  calls: list


def waves(grouped, lanes, rows):
  """Yields the Waves of {prefix: Rows}; a lane runs `rows` rows per call and holds at most as many prefixes.

  W rows of one prefix and of like length form a tile, W = TILE or 1. Prefixes of like length, with suffixes of like length, share a
  wave, and in a wave the long tiles come first.
  """
  W = _tile_width([len(found) for found in grouped.values()], rows)
  tiled = {prefix: _tiles(found, W) for prefix, found in grouped.items()}
  # A prefix with more than a lane's share of all tiles is held by several lanes.
  share = -(-sum(map(len, tiled.values())) // lanes)
  pieces = [(prefix, tiles[at : at + share]) for prefix, tiles in tiled.items() for at in range(0, len(tiles), share)]
  mean = lambda tiles: sum(len(tile[0].suffix) for tile in tiles) / len(tiles)
  pieces.sort(key=lambda piece: (rounded(len(piece[0])), mean(piece[1])), reverse=True)
  for at in range(0, len(pieces), lanes * rows):
    yield _wave(pieces[at : at + lanes * rows], lanes, rows, W)


def _tile_width(sizes, rows):
  full = rows % TILE == 0 and sum(-(-n // TILE) for n in sizes) * TILE <= SPARE * sum(sizes)
  return TILE if full else 1


def _tiles(rows, W):
  ordered = sorted(rows, key=lambda row: len(row.suffix), reverse=True)
  return [ordered[at : at + W] for at in range(0, len(ordered), W)]


def _wave(pieces, lanes, rows, W):
  held, tiles = [{} for _ in range(lanes)], [[] for _ in range(lanes)]
  for prefix, found in sorted(pieces, key=lambda piece: len(piece[1]), reverse=True):
    lane = min((i for i in range(lanes) if len(held[i]) < rows), key=lambda i: len(tiles[i]))
    place = held[lane].setdefault(prefix, len(held[lane]))
    tiles[lane] += [(place, tile) for tile in found]
  for lane in tiles:
    lane.sort(key=lambda tile: len(tile[1][0].suffix), reverse=True)
  P = 1 << (max(map(len, held)) - 1).bit_length()
  prefixes = [prefix for lane in held for prefix in (*lane, *[None] * (P - len(lane)))]
  n = rows // W
  calls = [_call([lane[at : at + n] for lane in tiles], n, W) for at in range(0, max(map(len, tiles)), n)]
  return Wave(prefixes, calls)


def _call(tiles, n, W):
  prefixes, rows = np.zeros((len(tiles), n), np.int32), []
  for lane, found in enumerate(tiles):
    prefixes[lane, : len(found)] = [place for place, _ in found]
    for _, tile in found:
      rows += [*tile, *[None] * (W - len(tile))]
    rows += [None] * (W * (n - len(found)))
  return Call(prefixes, rows)
