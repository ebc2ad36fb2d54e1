"""Near-duplicates among 1,000 to 100 million texts, found without comparing every pair and without holding them all.

A small pool, in one call:

  keep, removals = near_duplicates(texts, ids, protected=mask)   # bool [n]; [Removal(id, kept_id, similarity, ...)]

A pool in parts on a shared file system, with the units of every step divided over hosts:

  pool = Pool(directory, generations=(0, 1, 1, 1))       # of every part; the texts of generation 0 are never removed
  for part in range(4)[host::hosts]:
    if not signed(pool, part):
      sign(pool, part, ids, texts)                       # step 1: words and signatures; the only one that sees texts
  barrier()
  for unit in pair_units(pool)[host::hosts]:
    find_pairs(pool, unit)                               # step 2: pairs that agree in a key
  barrier()
  for part in newest(pool)[host::hosts]:
    verify(pool, part)                                   # step 3: those of a ROUGE-L of at least the threshold
  barrier()
  if host == 0:
    decide(pool)                                         # step 4: who is removed
  barrier()
  keep, removals = decisions(pool, part)                 # for each part of newest(pool)

Texts are given normalised (`corpus.normalise.normalised`), ids are 16 hex digits of a hash, and of texts with equal ids
all but one are removed before. Words are those of `corpus.words`.

Who survives: x is removed if and only if a kept text y before it was found to have a ROUGE-L F1 of at least the
threshold with x. "Before" means a lower generation or, in the same one, a lower id. So every removal has a kept and
verified partner (no chains), and the result depends on the texts, their generations and the seed alone: not on the
order in files, the division into parts or the number of hosts. Parts of a higher generation can be added later; the
files of the earlier ones are used again and their decisions stand.

What to expect: pairs are found by 128 MinHash values of the word bigrams, in 32 bands of 4. A pair that has the
fraction J of its bigrams in common is found with probability 1 - (1 - J^4)^32. Of texts with two words edited that is
0.99 at 15 words and 0.91 at 11. Texts of up to SHORT words have too few bigrams for that: they are also found by what
is left of them without one or two of their words, which two texts share that are one or two words apart. A word alone
has no near-duplicate. Of the texts that agree in a band, each is compared with the COMPARED first ones only, which
keeps the cost of a template that thousands share linear. Later ones are then compared where they agree in a rarer band,
as texts do that have more than the template in common.

Memory: one byte per text in step 4; else what a part needs in step 1 (about 0.5 KB per text) and a slice of keys or
pairs later (some 100 MB). Files: 272 bytes per text, up to 450 more for a short one, 8 per word, and 8 per pair. A file
appears when it is complete and no unit is done again, so a killed run goes on at the first missing unit and gives the
same bytes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alma_jax.corpus import words

PERMUTATIONS, BANDS = 128, 32
SHORT, LEFT_OUT = 10, 2  # texts of so many words are also found by what is left of them without so many
COMPARED = 8  # texts of a bucket, the first ones, with which all others are compared
ROW_BITS = 28  # of a text's number in the pool; the other 36 bits of an entry are the key of a band
ROW_MASK = np.uint64((1 << ROW_BITS) - 1)

_TEXTS = 1024  # texts whose signatures are made together: arrays that fit into a core's cache
_SLICE = 1 << 21  # band keys that are sorted together
_PAIRS = 1 << 22  # pairs that are held together
_COMPARISONS = 1 << 15  # pairs whose words are read together
_WORDS = 1 << 20  # words that are compared together; every distinct one needs a code point of its own
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)

_EDGE = np.dtype([("later", "<u4"), ("earlier", "<u4"), ("similarity", "<f8")])
_REMOVED = np.dtype(
  [("row", "<u4"), ("kept_part", "<u4"), ("kept_row", "<u4"), ("id", "<u8"), ("kept_id", "<u8"), ("similarity", "<f8")]
)
_KEPT, _REMOVE, _OPEN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Pool:
  """Parts of texts, numbered from 0, and a directory for what is found out about them."""

  directory: str | os.PathLike
  generations: tuple[int, ...]  # of every part; 0: never removed
  threshold: float = 0.7  # of ROUGE-L F1
  seed: int = 0

  def __post_init__(self):
    if not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold}: a ROUGE-L F1 lies above 0 and up to 1; 0.7 is usual")
    if max(self.generations, default=0) < 1 or min(self.generations) < 0:
      raise ValueError(f"generations={self.generations}: 0 is protected, and a part of 1 or higher must be there")


@dataclasses.dataclass(frozen=True)
class Removal:
  id: str
  kept_id: str  # of the kept texts before it that were found, the most similar one
  similarity: float  # ROUGE-L F1 of the two
  row: int  # in its part
  kept_part: int
  kept_row: int


def near_duplicates(texts, ids, protected=None, threshold=0.7, directory=None, seed=0):
  """(bool [n]: which texts stay, [Removal] in their order) of a pool that fits into memory. `protected`: bool [n], the
  texts that come first and always stay. All texts are part 0 here; files go to a temporary directory if to none."""
  if len(set(ids)) < len(ids):
    raise ValueError("two texts have the same id: remove equal texts first")
  mask = np.zeros(len(texts), bool) if protected is None else np.asarray(protected, bool)
  places = [np.flatnonzero(mask), np.flatnonzero(~mask)]
  with contextlib.nullcontext(directory) if directory else tempfile.TemporaryDirectory() as directory:
    pool = Pool(directory, (0, 1), threshold, seed)
    for part, mine in enumerate(places):
      sign(pool, part, [ids[i] for i in mine], [texts[i] for i in mine])
    for unit in pair_units(pool):
      find_pairs(pool, unit)
    verify(pool, 1)
    decide(pool)
    stays, found = decisions(pool, 1)
  keep = mask.copy()
  keep[places[1]] = stays
  at = lambda part, row: int(places[part][row])
  return keep, [
    dataclasses.replace(x, row=at(1, x.row), kept_part=0, kept_row=at(x.kept_part, x.kept_row)) for x in found
  ]


def newest(pool):
  """The parts of the highest generation, about which steps 2 to 4 decide."""
  last = max(pool.generations)
  return [part for part, generation in enumerate(pool.generations) if generation == last]


def signed(pool, part):
  """Whether step 1 is done for the part, so that its texts need not be read again."""
  return _path(pool, part, "bands").exists()


def sign(pool, part, ids, texts):
  """Step 1 for a part: its ids, its words, and its sorted keys: of every band, and of what short texts share."""
  numbers = _numbers(ids)
  if len(texts) != len(ids):
    raise ValueError(f"part {part} has {len(ids)} ids for {len(texts)} texts")
  if signed(pool, part):
    if not np.array_equal(numbers, _column(pool, part, "ids")):
      raise ValueError(f"{pool.directory}: part {part} was signed with other texts; take another directory")
    return
  hashes, offsets = words.hashes(texts)
  lengths = np.diff(offsets)
  if lengths.max(initial=0) > _WORDS // 2:
    raise ValueError(f"text {ids[lengths.argmax()]} has {lengths.max()} words, the most is {_WORDS // 2}: cut it")
  rows = np.flatnonzero(lengths > 1)  # the others have no bigrams, and no near-duplicates
  keys = np.empty((BANDS, len(rows)), np.uint64)
  for start in range(0, len(rows), _TEXTS):
    mine = rows[start : start + _TEXTS]
    keys[:, start : start + len(mine)] = band_keys(signatures(*_taken(hashes, offsets, mine), pool.seed))
  keys &= ~ROW_MASK
  keys |= rows.astype(np.uint64)
  keys.sort(axis=1)
  short = _shared_keys(hashes, offsets)
  # The bands come last: they say that the others are there.
  for name, column in {"ids": numbers, "words": hashes, "offsets": offsets, "short": short, "bands": keys}.items():
    _save(_path(pool, part, name), column)


def pair_units(pool):
  """The units of step 2, [(band, slice of the keys, number of slices)]: more keys, more slices. The keys of short texts
  are one band more."""
  sizes = [int(_starts(pool)[-1])] * BANDS + [sum(len(_keys(pool, p, BANDS)) for p in range(len(pool.generations)))]
  slices = [max(1, -(-size // _SLICE)) for size in sizes]
  return [(band, at, count) for band, count in enumerate(slices) for at in range(count)]


def find_pairs(pool, unit):
  """Step 2 for a unit: the pairs (text of the newest generation, text before it) whose keys are equal, sorted."""
  path = _pairs_path(pool, unit)
  if path.exists():
    return
  starts = _starts(pool)
  entries = _entries(pool, starts, unit)
  equal = np.zeros(len(entries) + 1, bool)
  equal[1:-1] = entries[1:] >> ROW_BITS == entries[:-1] >> ROW_BITS
  entries = entries[equal[1:] | equal[:-1]]
  keys, rows = entries >> ROW_BITS, entries & ROW_MASK
  generations, ids = _ranks(pool, starts, rows)
  order = np.lexsort((ids, generations, keys))
  keys, rows, generations = keys[order], rows[order], generations[order]
  place = np.arange(len(keys))
  opens = np.ones(len(keys), bool)
  opens[1:] = keys[1:] != keys[:-1]
  first = np.maximum.accumulate(np.where(opens, place, 0))
  # A text is compared with some that come before it; which ones does not change when others come later.
  counts = np.where(generations == max(pool.generations), np.minimum(place - first, COMPARED), 0)
  ends = np.cumsum(counts)
  pairs = np.empty(counts.sum(), np.uint64)
  for low in range(0, len(pairs), _PAIRS):
    wanted = np.arange(low, min(low + _PAIRS, len(pairs)))
    later = np.searchsorted(ends, wanted, side="right")
    earlier = first[later] + wanted - (ends - counts)[later]
    pairs[wanted] = rows[later] << ROW_BITS | rows[earlier]
  _save(path, np.unique(pairs))


def verify(pool, part):
  """Step 3 for a part of the newest generation: its pairs whose ROUGE-L reaches the threshold."""
  path = _edges_path(pool, part)
  if path.exists():
    return
  starts, paths = _starts(pool), [_pairs_path(pool, unit) for unit in pair_units(pool)]
  low, last, rows, edges = int(starts[part]), int(starts[part + 1]), _PAIRS, [np.empty(0, _EDGE)]
  while low < last:
    high = min(low + rows, last)
    pairs = []
    for column in map(_load, paths):
      a, b = np.searchsorted(column, np.array([low, high], np.uint64) << ROW_BITS)
      pairs.append(column[a:b])
    if sum(map(len, pairs)) > _PAIRS and rows > 1:
      rows //= 4
      continue
    pairs = np.unique(np.concatenate(pairs))
    edges += [_verified(pool, starts, pairs[i : i + _COMPARISONS]) for i in range(0, len(pairs), _COMPARISONS)]
    low = high
  edges = np.concatenate(edges)
  generations, ids = _ranks(pool, starts, edges["earlier"])
  _save(path, edges[np.lexsort((ids, generations, -edges["similarity"], edges["later"]))])


def decide(pool):
  """Step 4, on one host: removes every text that has a kept one before it among its verified pairs."""
  parts, starts = newest(pool), _starts(pool)
  missing = [part for part in parts if not _removed_path(pool, part).exists()]
  if not missing:
    return
  state = np.full(starts[-1], _KEPT, np.uint8)
  for part, generation in enumerate(pool.generations):
    if 0 < generation < max(pool.generations):
      state[starts[part] + _removed(pool, part)["row"]] = _REMOVE
  for part in parts:
    state[_load(_edges_path(pool, part))["later"]] = _OPEN
  # A text is decided when all before it are. Ids are hashes, their order is random, so this takes few rounds.
  undecided = parts
  while undecided:
    undecided = [part for part in undecided if _decide(state, _load(_edges_path(pool, part)))]
  for part in missing:
    edges = _load(_edges_path(pool, part))
    edges = edges[(state[edges["later"]] == _REMOVE) & (state[edges["earlier"]] == _KEPT)]
    later, best = np.unique(edges["later"], return_index=True)  # the most similar one comes first
    kept = edges["earlier"][best].astype(np.int64)
    removed = np.empty(len(later), _REMOVED)
    removed["row"], removed["similarity"] = later - starts[part], edges["similarity"][best]
    removed["kept_part"] = np.searchsorted(starts, kept, side="right") - 1
    removed["kept_row"] = kept - starts[removed["kept_part"]]
    removed["id"], removed["kept_id"] = (_ranks(pool, starts, rows)[1] for rows in (later, kept))
    _save(_removed_path(pool, part), removed)


def decisions(pool, part):
  """(bool [n]: which texts of the part stay, [Removal] in the order of its rows), when step 4 is done."""
  keep = np.ones(len(_column(pool, part, "ids")), bool)
  if not pool.generations[part]:
    return keep, []
  found = _removed(pool, part)
  keep[found["row"]] = False
  columns = [found[name].tolist() for name in ("id", "kept_id", "similarity", "row", "kept_part", "kept_row")]
  return keep, [Removal(f"{id:016x}", f"{kept:016x}", *rest) for id, kept, *rest in zip(*columns)]


def rouge_l(left, right):
  """float64 [n]: ROUGE-L F1 of the texts of two lists, pair by pair; 0 where neither has words."""
  hashes, offsets = words.hashes([*left, *right])
  return _rouge_l(lambda rows: _taken(hashes, offsets, rows), *np.arange(2 * len(left)).reshape(2, -1))


def signatures(hashes, offsets, seed=0):
  """uint32 [PERMUTATIONS, n]: MinHash values of the bigrams of texts whose words have these hashes. Two texts agree in
  one with a probability that is the Jaccard similarity of their bigrams. All ones for fewer than two words."""
  lengths = np.diff(offsets)
  counts = np.maximum(lengths - 1, 0)
  bigrams = hashes[:-1] * _ODD[0]
  bigrams += hashes[1:]
  inside = np.ones(len(hashes), bool)
  inside[offsets[1:][lengths > 0] - 1] = False
  bigrams = words.mixed(bigrams[inside[:-1]]).astype(np.uint32)
  # The first bigrams of all texts, then the second ones of all that have them, and so on. With the longest text first,
  # every step works on the left columns of contiguous arrays.
  order = np.argsort(-counts, kind="stable")
  column = np.empty_like(order)
  column[order] = np.arange(len(order))
  step = np.arange(len(bigrams)) - np.repeat(np.cumsum(counts) - counts, counts)
  widths = np.bincount(step)
  starts = np.cumsum(widths) - widths
  values = np.empty_like(bigrams)
  values[starts[step] + np.repeat(column, counts)] = bigrams
  factors, shifts = _permutations(seed)
  least = np.full((PERMUTATIONS, len(counts)), 0xFFFFFFFF, np.uint32)
  work = np.empty_like(least)
  for start, width in zip(starts.tolist(), widths.tolist()):
    hashed = np.multiply(values[start : start + width], factors, out=work[:, :width])
    hashed += shifts
    np.minimum(least[:, :width], hashed, out=least[:, :width])
  found = np.empty_like(least)
  found[:, order] = least
  return found


def band_keys(signatures):
  """uint64 [BANDS, n]: equal where all values of a band are equal; every bit depends on all of them."""
  a, b, c, d = (signatures[i::4].astype(np.uint64) for i in range(PERMUTATIONS // BANDS))
  keys = (a << 32 | b) * _ODD[1]
  keys ^= keys >> 32
  keys += c << 32 | d
  return words.mixed(keys)


def _shared_keys(hashes, offsets):
  """uint64 [n], sorted: the entries (key, row) of what is left of every text of 3 to SHORT words without up to LEFT_OUT
  of them, but more than half."""
  lengths, found = np.diff(offsets), [np.empty(0, np.uint64)]
  for length in range(3, SHORT + 1):
    rows = np.flatnonzero(lengths == length)
    for start in range(0, len(rows), _TEXTS):
      mine = rows[start : start + _TEXTS]
      word = hashes[offsets[mine][:, None] + np.arange(length)]
      for left in range(max(length - LEFT_OUT, length // 2 + 1), length + 1):
        keys = np.full((len(mine), math.comb(length, left)), left, np.uint64)
        for place in zip(*itertools.combinations(range(length), left)):
          keys = keys * _ODD[0] + word[:, place]
        found.append((words.mixed(keys) & ~ROW_MASK | mine[:, None].astype(np.uint64)).ravel())
  return np.unique(np.concatenate(found))


@functools.cache
def _permutations(seed):
  """uint32 [PERMUTATIONS, 1] factors and shifts: x -> factor * x + shift is a permutation, as the factor is odd."""
  start = words.mixed(np.array([seed % 2**64], np.uint64))
  numbers = words.mixed(start + np.arange(PERMUTATIONS, dtype=np.uint64)[:, None] * _ODD[2])
  return (numbers >> 32).astype(np.uint32) | np.uint32(1), numbers.astype(np.uint32)


def _entries(pool, starts, unit):
  """uint64 [n]: the entries (key, row in the pool) of a slice of one band, sorted."""
  band, at, slices = unit
  bounds = [np.uint64((i << 64 - ROW_BITS) // slices << ROW_BITS) for i in (at, at + 1) if i < slices]
  found = []
  for part, start in enumerate(starts[:-1]):
    column = _keys(pool, part, band)
    low, high = [*np.searchsorted(column, bounds), len(column)][:2]
    found.append(column[low:high] + np.uint64(start))
  found = np.concatenate(found)
  found.sort()
  return found


def _verified(pool, starts, pairs):
  """The edges among some pairs."""
  edges = np.empty(len(pairs), _EDGE)
  edges["later"], edges["earlier"] = pairs >> ROW_BITS, pairs & ROW_MASK
  read = functools.partial(_hashes, pool, starts)
  edges["similarity"] = _rouge_l(read, edges["later"], edges["earlier"])
  return edges[edges["similarity"] >= pool.threshold]


def _rouge_l(read, left, right):
  """ROUGE-L F1 of pairs of rows; `read(rows)` gives (hashes of their words, offsets)."""
  rows, at = np.unique(np.concatenate([left, right]), return_inverse=True)
  hashes, offsets = read(rows)
  if len(hashes) > _WORDS and len(left) > 1:
    half = len(left) // 2
    return np.concatenate([_rouge_l(read, left[i], right[i]) for i in (slice(half), slice(half, None))])
  codes = np.unique(hashes, return_inverse=True)[1].astype("<u4")
  codes[codes >= 0xD800] += 0x800  # the code points between are no characters
  characters = codes.tobytes().decode("utf-32-le")
  texts = [characters[a:b] for a, b in itertools.pairwise(offsets.tolist())]
  sides = at.reshape(2, -1)
  common = process.cpdist(
    *([texts[i] for i in side] for side in sides.tolist()), scorer=LCSseq.similarity, dtype=np.int32
  )
  # From whole numbers: the F1 is the double nearest to the fraction, so one of exactly 7/10 reaches a threshold of 0.7.
  return 2.0 * common / np.maximum(np.diff(offsets)[sides].sum(axis=0), 1)


def _decide(state, edges):
  """Decides about each open text of which all that come before are decided; returns whether one is still open."""
  later, earlier = edges["later"], edges["earlier"]
  still = state[later] == _OPEN
  later, before = later[still], state[earlier[still]]
  state[later] = _KEPT
  state[later[before == _OPEN]] = _OPEN
  state[later[before == _KEPT]] = _REMOVE
  return bool((state[later] == _OPEN).any())


def _ranks(pool, starts, rows):
  """(generations, ids) of texts of the pool; texts come before each other in this order."""
  generations, ids = np.empty(len(rows), np.int64), np.empty(len(rows), np.uint64)
  for part, places, mine in _by_part(starts, rows):
    generations[places], ids[places] = pool.generations[part], _column(pool, part, "ids")[mine]
  return generations, ids


def _hashes(pool, starts, rows):
  """(hashes of words, offsets) of texts of the pool, whose rows ascend."""
  columns = ("words", "offsets")
  found = [_taken(*(_column(pool, part, c) for c in columns), mine) for part, _, mine in _by_part(starts, rows)]
  lengths = np.concatenate([np.diff(offsets) for _, offsets in found])
  return np.concatenate([hashes for hashes, _ in found]), np.append(0, np.cumsum(lengths))


def _by_part(starts, rows):
  """Yields (part, places in `rows`, rows within the part) for every part that has some."""
  rows = rows.astype(np.int64)
  order = np.argsort(rows)
  bounds = np.searchsorted(rows[order], starts)
  for part, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
    if low < high:
      yield part, order[low:high], rows[order[low:high]] - starts[part]


def _taken(hashes, offsets, rows):
  """(hashes of words, offsets) of the texts in these rows."""
  lengths = offsets[rows + 1] - offsets[rows]
  ends = np.cumsum(lengths)
  return hashes[np.arange(lengths.sum()) + np.repeat(offsets[rows] - (ends - lengths), lengths)], np.append(0, ends)


def _numbers(ids):
  """uint64 [n] of ids in hexadecimal."""
  wrong = next((id for id in ids if not re.fullmatch("[0-9a-f]{16}", id)), None)
  if wrong is not None:
    raise ValueError(f"an id has 16 hex digits, not {wrong!r}")
  return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)


def _starts(pool):
  """int64 [parts + 1]: where every part begins in the pool, and its size."""
  parts = range(len(pool.generations))
  missing = [part for part in parts if not signed(pool, part)]
  if missing:
    raise ValueError(f"{pool.directory}: part {missing[0]} is not signed; step 1 comes first, for all parts")
  starts = np.cumsum([0, *(len(_column(pool, part, "ids")) for part in parts)])
  if starts[-1] > ROW_MASK:
    raise ValueError(f"{pool.directory}: the pool has {starts[-1]} texts, the most is {ROW_MASK}")
  return starts


def _column(pool, part, name):
  return _load(_path(pool, part, name))


def _keys(pool, part, band):
  return _column(pool, part, "bands")[band] if band < BANDS else _column(pool, part, "short")


def _removed(pool, part):
  path = _removed_path(pool, part)
  if not path.exists():
    raise ValueError(f"{pool.directory}: part {part} is not decided; its generation comes before the higher ones")
  return _load(path)


def _path(pool, part, name):
  return pathlib.Path(pool.directory) / f"signed-{pool.seed}" / f"{name}-{part:05d}.npy"


def _pairs_path(pool, unit):
  band, at, slices = unit
  return _decided(pool, max(pool.generations)) / f"pairs-{band:02d}-{at:05d}-of-{slices:05d}.npy"


def _edges_path(pool, part):
  return _decided(pool, pool.generations[part]) / f"edges-{part:05d}.npy"


def _removed_path(pool, part):
  return _decided(pool, pool.generations[part]) / f"removed-{part:05d}.npy"


def _decided(pool, generation):
  """The directory of what was decided about a generation, named after all that it depends on besides the texts."""
  before = [(part, its) for part, its in enumerate(pool.generations) if its <= generation]
  name = hashlib.blake2b(json.dumps([before, pool.threshold, pool.seed]).encode(), digest_size=6).hexdigest()
  return pathlib.Path(pool.directory) / f"generation-{generation}-{name}"


def _load(path):
  return np.load(path, mmap_mode="r", allow_pickle=False)


def _save(path, array):
  """Writes a `.npy` that appears when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    np.save(file, array, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
