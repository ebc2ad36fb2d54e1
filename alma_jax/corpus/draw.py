"""The draw of a round's prompts: unused ones, spread over the clusters, at 100 million prompts as at a hundred.

  index = build(labels, ids, seed)        # once: the rows of every cluster in a fixed random order
  rows = draw(index, used, k, seed, round)  # k row numbers, first drawn first; `used`: those of all earlier rounds

Everything random is a hash of (seed, stream, id), so that a draw is the same for any order of the rows, on any number
of hosts, and after every restart; the ledger is nothing but the rows that earlier rounds have drawn. A round costs
what clusters and used rows cost, never a pass over all rows. Methods:

  diverse       k clusters without replacement and from each its first unused prompt. With fewer than k clusters left
                each gives a second one, and so on. coverage="round": every round permutes the clusters anew (the
                paper's reading); "fresh": clusters that have given least come first
  random        any unused prompts, whatever their clusters
  proportional  every cluster gives its share of k by its size, give or take one or two: a random draw without its luck

A larger k only appends rows. Prompts that were added to a cluster change a diverse draw in that cluster alone, and
whatever was added, no used prompt is drawn again. Row numbers are those of `labels` and `ids`; after rows have moved,
build anew and translate the used ids.
"""

import bisect
import dataclasses

import numpy as np

METHODS = ("diverse", "random", "proportional")
COVERAGES = ("round", "fresh")
GOLDEN = 0x9E3779B97F4A7C15
CHUNK = 2**20  # rows in work at a time
# Streams of random numbers, one for each use; those of a round have its number added.
MEMBERS, SAMPLE, CLUSTERS, POSITIONS, SHARES = 1, 2, 1000, 2**32, 2**33


class Exhausted(ValueError):
  """Fewer prompts are unused than a round asks for."""

  def __init__(self, left, asked):
    super().__init__(f"{asked:,} prompts are asked for, and only {left:,} are unused")
    self.left, self.asked = left, asked


@dataclasses.dataclass(frozen=True)
class Index:
  labels: np.ndarray  # [n] the cluster of every row, as they were given
  order: np.ndarray  # [n] row numbers, cluster by cluster, in the order in which a cluster gives them
  offsets: np.ndarray  # [clusters + 1] where each cluster begins in `order`


def hashed(seed, stream, values):
  """A random uint64 for every one of the integers: two rounds of splitmix64, the same for ever."""
  start = _mixed(np.array([(int(seed) * GOLDEN + stream) % 2**64], np.uint64))
  return _mixed(np.asarray(values).astype(np.uint64) * np.uint64(GOLDEN) + start)


def _mixed(x):
  """splitmix64's finaliser, in place; a bijection, so different values never share a hash."""
  x ^= x >> np.uint64(30)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(27)
  x *= np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return x


def build(labels, ids, seed):
  """The Index of rows with these clusters [n] and different ids [n]; both may be memory maps.

  12 bytes of memory per row at its peak, 4 afterwards. One sort of whole 64-bit words does the work: cluster, the
  first bits of the id's hash, and row number in one word. The few neighbours that have these bits in common, and many
  in a cluster of millions, are put in order by all bits afterwards."""
  n = len(labels)
  if len(ids) != n or not 1 <= n <= 2**32:
    raise ValueError(f"{n} labels and {len(ids)} ids: as many of both, from 1 to 2^32")
  if labels.min() < 0:
    raise ValueError(f"row {int(labels.argmin())} has no cluster: its label is {int(labels.min())}")
  clusters, row_bits = int(labels.max()) + 1, (n - 1).bit_length()
  label_bits, low = (clusters - 1).bit_length(), np.uint64(2**row_bits - 1)
  shift = np.uint64(64 - label_bits)  # a shift by 64, of labels that are all 0, makes 0
  keys = np.empty(n, np.uint64)
  for start in range(0, n, CHUNK):
    end = min(n, start + CHUNK)
    keys[start:end] = hashed(seed, MEMBERS, ids[start:end]) >> np.uint64(label_bits) & ~low
    keys[start:end] |= labels[start:end].astype(np.uint64) << shift
    keys[start:end] |= np.arange(start, end, dtype=np.uint64)
  keys.sort()
  offsets = np.append(np.searchsorted(keys, np.arange(clusters, dtype=np.uint64) << shift), n)
  order, start = np.empty(n, np.uint32), 0
  while start < n:
    end = min(n, start + CHUNK)
    end += int(np.searchsorted(keys[end:], keys[end - 1] | low, side="right"))  # all that tie with the last one
    order[start:end] = _settled(keys[start:end], low, ids, seed)
    start = end
  return Index(labels, order, offsets)


def _settled(keys, low, ids, seed):
  """The rows of these sorted keys, those whose keys differ in the row alone sorted by the whole hash."""
  rows, keys = (keys & low).astype(np.int64), keys & ~low
  same = keys[1:] == keys[:-1]
  tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
  hashes = hashed(seed, MEMBERS, ids[rows[tied]])
  turn = np.lexsort((hashes, keys[tied]))
  rows[tied], hashes = rows[tied[turn]], hashes[turn]
  equal = np.flatnonzero((hashes[1:] == hashes[:-1]) & (keys[tied[1:]] == keys[tied[:-1]]))
  if len(equal):
    one, two = sorted(rows[tied[equal[0] : equal[0] + 2]].tolist())
    raise ValueError(f"rows {one} and {two} have the same id, {int(ids[one]):016x}: leave duplicates out first")
  return rows


def draw(index, used, k, seed, round, method="diverse", coverage="round"):
  """k different row numbers, none of them in `used`, the first drawn first; Exhausted where there are not so many."""
  if method not in METHODS or coverage not in COVERAGES or k < 1:
    raise ValueError(f"no such draw: method {method!r}, coverage {coverage!r}, k={k}")
  n, used = len(index.order), np.sort(np.asarray(used, np.int64))
  if len(used) and not 0 <= used[0] <= used[-1] < n:
    raise ValueError(f"used rows are {used[0]} to {used[-1]}, and there are {n} rows")
  used = used[np.diff(used, prepend=-1) > 0]  # np.unique takes 30 times as long
  if k > n - len(used):
    raise Exhausted(n - len(used), k)
  if method == "random":
    return _anywhere(index, used, k, seed, round)
  spent = np.bincount(index.labels[used], minlength=len(index.offsets) - 1)
  left = np.diff(index.offsets) - spent
  if method == "proportional":
    picks = _by_size(index.offsets, left, k, seed, round)
  else:
    times = spent if coverage == "fresh" else np.zeros_like(spent)
    picks = _in_turns(_ranked(np.flatnonzero(left), times, k, seed, round), left, k)
  return _next_unused(index, used, spent, picks)


def _ranked(active, times, k, seed, round):
  """The first k of the active clusters in the round's order, or all of them; smaller `times` go first."""
  times, hashes = times[active], hashed(seed, CLUSTERS + round, active)
  if k < len(active):
    # Sorting a million clusters takes longer than all else. What passes here may be a few too many, never too few.
    bits = np.uint64(int(times.max()).bit_length())
    rough = times.astype(np.uint64) << (np.uint64(64) - bits) | hashes >> bits
    near = np.flatnonzero(rough <= np.partition(rough, k - 1)[k - 1])
    active, times, hashes = active[near], times[near], hashes[near]
  return active[np.lexsort((hashes, times))[:k]]


def _in_turns(clusters, left, k):
  """k picks: every cluster once, in this order, then every one that has more, and so on."""
  room = left[clusters]
  turns = bisect.bisect_right(range(1, int(room.max()) + 1), k, key=lambda t: int(np.minimum(room, t).sum()))
  take = np.minimum(room, turns)
  take[np.flatnonzero(room > turns)[: k - take.sum()]] += 1
  return np.repeat(clusters, take)[np.argsort(_counted(take), kind="stable")]


def _by_size(offsets, left, k, seed, round):
  """k picks of clusters in proportion to their sizes: steps of the golden ratio through all places, from a random one,
  which leave no stretch of them out for long. A cluster that has no more to give is passed over."""
  start, tried = hashed(seed, SHARES + round, [0]), k
  while True:
    steps = start + np.arange(tried, dtype=np.uint64) * np.uint64(GOLDEN)
    picks = np.searchsorted(offsets, _places(steps, offsets[-1]), side="right") - 1
    order = np.argsort(picks, kind="stable")
    nth = np.empty(tried, np.int64)
    nth[order] = _counted(np.bincount(picks))
    picks = picks[nth < left[picks]]
    if len(picks) >= k:
      return picks[:k]
    tried *= 2


def _anywhere(index, used, k, seed, round):
  """k rows from random places, passing over those that are used or were met before."""
  tried = k + k // 8 + 8
  while True:
    places = _places(hashed(seed, POSITIONS + round, np.arange(tried)), len(index.order))
    rows = index.order[places[np.sort(np.unique(places, return_index=True)[1])]].astype(np.int64)
    rows = rows[~_among(rows, used)]
    if len(rows) >= k:
      return rows[:k]
    tried *= 2


def _places(numbers, n):
  """Of random uint64, places 0 .. n - 1."""
  return ((numbers >> np.uint64(11)) * 2.0**-53 * n).astype(np.int64)


def _next_unused(index, used, spent, picks):
  """For every pick the next row of its cluster that is neither used nor given to an earlier pick."""
  clusters, wanted = np.unique(picks, return_counts=True)
  first, size = index.offsets[clusters], index.offsets[clusters + 1] - index.offsets[clusters]
  reach = np.minimum(wanted + spent[clusters], size)  # if all used ones come first, here are still enough
  rows = index.order[np.repeat(first, reach) + _counted(reach)].astype(np.int64)
  free = ~_among(rows, used)
  before = np.cumsum(free) - free
  nth = before - np.repeat(before[np.cumsum(reach) - reach], reach)
  chosen = np.empty(len(picks), np.int64)
  chosen[np.argsort(picks, kind="stable")] = rows[free & (nth < np.repeat(wanted, reach))]
  return chosen


def _counted(counts):
  """0 .. c - 1 for every c, one after another."""
  return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _among(rows, used):
  """Whether each of the rows is in `used`, which is sorted."""
  return np.append(used, -1)[np.searchsorted(used, rows)] == rows
