"""The draw of a round's prompts: unused ones, spread over the clusters, at 100 million prompts as at a hundred.

  queues = build(labels, ids, seed)         # once: the rows of every cluster in a fixed random order
  rows = draw(queues, used, k, round)       # k row numbers, first drawn first; `used`: those of all earlier rounds

All random numbers are hashes of (seed, stream, id), so a draw is the same for any order of the rows, on any number of
hosts, and after every restart; its only ledger is the rows that earlier rounds have drawn. The cost of a round grows
with the clusters and the used rows, not with all rows. Methods:

  diverse       k clusters without replacement and from each its first unused prompt. With fewer than k clusters left
                each gives a second one, and so on. coverage="round": every round permutes the clusters anew (the
                paper's reading); "fresh": clusters that have given least come first
  random        any unused prompts, whatever their clusters
  proportional  every cluster gives its share of k by its size, give or take one or two: more even than a random draw

A larger k only appends rows. Prompts added to a cluster change a diverse draw in that cluster alone, and no used prompt
is ever drawn again. Row numbers are those of `labels` and `ids`: after rows have moved, build the queues again and
translate the used ids.
"""

import bisect
import dataclasses

import numpy as np
from numpy.typing import ArrayLike

METHODS = ("diverse", "random", "proportional")
COVERAGES = ("round", "fresh")
GOLDEN = 0x9E3779B97F4A7C15
CHUNK = 2**20  # rows in work at a time
# Streams of random numbers, one for each use; those of a round have its number added.
MEMBERS, SAMPLE, CLUSTERS, POSITIONS, SHARES = 1, 2, 1000, 2**32, 2**33


class Exhausted(ValueError):
  """Fewer prompts are unused than a round asks for."""

  def __init__(self, left: int, asked: int) -> None:
    super().__init__(f"{asked:,} prompts are asked for, and only {left:,} are unused")
    self.left, self.asked = left, asked


@dataclasses.dataclass(frozen=True)
class Queues:
  """A queue of row numbers for every cluster, in the order in which the cluster gives them."""

  labels: np.ndarray  # [n] the cluster of every row
  order: np.ndarray  # [n] row numbers, one queue after another
  offsets: np.ndarray  # [clusters + 1] where each queue begins in `order`
  seed: int

  @property
  def sizes(self) -> np.ndarray:
    return np.diff(self.offsets)


def hashed(seed: int, stream: int, values: ArrayLike) -> np.ndarray:
  """A random uint64 for each of the integers: two rounds of splitmix64, which will never change."""
  start = _mixed(np.array([(int(seed) * GOLDEN + stream) % 2**64], np.uint64))
  return _mixed(np.asarray(values).astype(np.uint64) * np.uint64(GOLDEN) + start)


def _mixed(x: np.ndarray) -> np.ndarray:
  """splitmix64's finaliser, in place; a bijection, so different values never share a hash."""
  x ^= x >> np.uint64(30)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(27)
  x *= np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return x


# The queues -------------------------------------------------------------------------------------------------


def build(labels: np.ndarray, ids: np.ndarray, seed: int) -> Queues:
  """The queues of rows with these clusters [n] and different uint64 ids [n]; both may be memory maps.

  It takes 12 bytes of memory per row at its peak, 4 afterwards. Each row becomes one 64-bit word, and one sort of these
  words does the work. With 5 clusters and 1,000 rows:

    [ cluster, 3 bits | first 51 bits of the id's hash | row, 10 bits ]

  Rows of one cluster whose hashes begin with the same bits, many in a cluster of millions, are then sorted by their
  whole hashes."""
  n = len(labels)
  if len(ids) != n or not 1 <= n <= 2**32:
    raise ValueError(f"{n} labels and {len(ids)} ids: as many of both, from 1 to 2^32")
  if labels.min() < 0:
    raise ValueError(f"row {int(labels.argmin())} has no cluster: its label is {int(labels.min())}")
  clusters, row_bits = int(labels.max()) + 1, (n - 1).bit_length()
  label_bits, low = (clusters - 1).bit_length(), np.uint64(2**row_bits - 1)
  shift = np.uint64(64 - label_bits)  # 64 where all labels are 0; NumPy's shift by 64 gives 0
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
  return Queues(labels, order, offsets, seed)


def _settled(keys: np.ndarray, low: np.uint64, ids: np.ndarray, seed: int) -> np.ndarray:
  """The rows of sorted keys. Neighbours whose keys differ only in the row, the bits of `low`, are sorted by the whole
  hashes of their ids."""
  rows, keys = (keys & low).astype(np.int64), keys & ~low
  same = keys[1:] == keys[:-1]
  tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
  hashes = hashed(seed, MEMBERS, ids[rows[tied]])
  turn = np.lexsort((hashes, keys[tied]))
  rows[tied], hashes = rows[tied[turn]], hashes[turn]
  # Whole hashes are equal only where ids are.
  equal = np.flatnonzero((hashes[1:] == hashes[:-1]) & (keys[tied[1:]] == keys[tied[:-1]]))
  if len(equal):
    one, two = sorted(rows[tied[equal[0] : equal[0] + 2]].tolist())
    raise ValueError(f"rows {one} and {two} have the same id, {int(ids[one]):016x}: leave duplicates out first")
  return rows


# The draw ---------------------------------------------------------------------------------------------------


def draw(
  queues: Queues, used: ArrayLike, k: int, round: int, method: str = "diverse", coverage: str = "round"
) -> np.ndarray:
  """int64 [k] different row numbers, none of them in `used`, the first drawn first; Exhausted if there are too few.

  The draw first picks clusters, then rows. With queues A: 0 3 5, B: 1 4, C: 2, and row 3 used:

    picks  B A C B          a cluster for each prompt (here k=4: all three once in a random order, then the first again)
    rows   1 0 2 4          each pick takes the next unused row of its cluster's queue
  """
  if method not in METHODS or coverage not in COVERAGES or k < 1:
    raise ValueError(f"no such draw: method {method!r}, coverage {coverage!r}, k={k}")
  n, used = len(queues.order), np.sort(np.asarray(used, np.int64))
  if len(used) and not 0 <= used[0] <= used[-1] < n:
    raise ValueError(f"used rows are {used[0]} to {used[-1]}, and there are {n} rows")
  used = used[np.diff(used, prepend=-1) > 0]  # each once; np.unique takes 30 times as long
  if k > n - len(used):
    raise Exhausted(n - len(used), k)
  if method == "random":
    return _anywhere(queues, used, k, round)
  spent = np.bincount(queues.labels[used], minlength=len(queues.sizes))
  left = queues.sizes - spent
  if method == "proportional":
    picks = _by_size(queues, left, k, round)
  else:
    active = np.flatnonzero(left)
    times = spent[active] if coverage == "fresh" else np.zeros_like(active)
    picks = _in_turns(_ranked(active, times, hashed(queues.seed, CLUSTERS + round, active), k), left, k)
  return _next_unused(queues, used, spent, picks)


def _ranked(active: np.ndarray, times: np.ndarray, hashes: np.ndarray, k: int) -> np.ndarray:
  """The first k of the active clusters, or all of them, in the order of (times, hash)."""
  if k < len(active):
    # Sorting a million clusters takes longer than all else. So the k smallest of (times, first bits of the hash), in
    # one word, are found without sorting, and all that tie with the last one stay: a few too many, never too few.
    bits = np.uint64(int(times.max()).bit_length())
    rough = times.astype(np.uint64) << (np.uint64(64) - bits) | hashes >> bits
    near = np.flatnonzero(rough <= np.partition(rough, k - 1)[k - 1])
    active, times, hashes = active[near], times[near], hashes[near]
  return active[np.lexsort((hashes, times))[:k]]


def _in_turns(clusters: np.ndarray, left: np.ndarray, k: int) -> np.ndarray:
  """k picks: every cluster once, in this order, then every one that has more, and so on.

  With clusters A B C that have 3, 1 and 2 rows left, and k=4:

    turns  1       whole turns that fit into k: A B C
    take   2 1 1   rows of each; the last pick goes to the first cluster that has more
    picks  A B C A
  """
  room = left[clusters]
  turns = bisect.bisect_right(range(1, int(room.max()) + 1), k, key=lambda t: int(np.minimum(room, t).sum()))
  take = np.minimum(room, turns)
  take[np.flatnonzero(room > turns)[: k - take.sum()]] += 1
  # A A B C, in turns 0 1 0 0: a stable sort by turn puts the first turn before the second.
  return np.repeat(clusters, take)[np.argsort(_counted(take), kind="stable")]


def _by_size(queues: Queues, left: np.ndarray, k: int, round: int) -> np.ndarray:
  """k picks of clusters in proportion to their sizes.

  Steps of the golden ratio from a random place, around the circle of all rows, leave no stretch of it out for long;
  each step picks the cluster in whose stretch it lands. A cluster with no rows left is passed over, which takes more
  steps."""
  start, tried = hashed(queues.seed, SHARES + round, [0]), k
  while True:
    steps = start + np.arange(tried, dtype=np.uint64) * np.uint64(GOLDEN)
    picks = np.searchsorted(queues.offsets, _places(steps, queues.offsets[-1]), side="right") - 1
    order = np.argsort(picks, kind="stable")
    nth = np.empty(tried, np.int64)  # a pick is the nth one of its cluster
    nth[order] = _counted(np.bincount(picks))
    picks = picks[nth < left[picks]]
    if len(picks) >= k:
      return picks[:k]
    tried *= 2


def _anywhere(queues: Queues, used: np.ndarray, k: int, round: int) -> np.ndarray:
  """k rows at random places; used rows and those that came before are passed over."""
  tried = k + k // 8 + 8
  while True:
    places = _places(hashed(queues.seed, POSITIONS + round, np.arange(tried)), len(queues.order))
    rows = queues.order[places[np.sort(np.unique(places, return_index=True)[1])]].astype(np.int64)
    rows = rows[~_among(rows, used)]
    if len(rows) >= k:
      return rows[:k]
    tried *= 2


def _places(numbers: np.ndarray, n: int) -> np.ndarray:
  """The places 0 .. n - 1 that random uint64 numbers stand for, as fractions of 2^64."""
  return ((numbers >> np.uint64(11)) * 2.0**-53 * n).astype(np.int64)


def _next_unused(queues: Queues, used: np.ndarray, spent: np.ndarray, picks: np.ndarray) -> np.ndarray:
  """For every pick the next row of its cluster that is neither used nor given to an earlier pick.

  `spent` says how many rows of each cluster are used. Two picks of A, whose queue is 0 3 5 7 and has row 3 used:

    reach  3            the first wanted + spent rows hold enough unused ones, wherever the used ones stand
    rows   0 3 5
    free   1 0 1
    nth    0 1 1        unused rows before this one in the queue
    given  0   5        those that are free and whose nth is below 2
  """
  clusters, wanted = np.unique(picks, return_counts=True)
  reach = np.minimum(wanted + spent[clusters], queues.sizes[clusters])
  rows = queues.order[np.repeat(queues.offsets[clusters], reach) + _counted(reach)].astype(np.int64)
  free = ~_among(rows, used)
  before = np.cumsum(free) - free
  nth = before - np.repeat(before[np.cumsum(reach) - reach], reach)
  # The rows stand cluster by cluster; a stable sort of the picks leads to the same order.
  chosen = np.empty(len(picks), np.int64)
  chosen[np.argsort(picks, kind="stable")] = rows[free & (nth < np.repeat(wanted, reach))]
  return chosen


def _counted(counts: np.ndarray) -> np.ndarray:
  """The numbers 0 .. c - 1 for every c, one after another: 2 3 -> 0 1 0 1 2."""
  return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _among(rows: np.ndarray, used: np.ndarray) -> np.ndarray:
  """True for each of the rows that is in `used`, which is sorted."""
  return np.append(used, -1)[np.searchsorted(used, rows)] == rows
