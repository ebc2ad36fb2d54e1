"""Near-duplicates among 1,000 to 100 million texts, found without comparing every pair and without holding them all.

A small pool, in one call:

  keep, removals = near_duplicates(texts, ids, protected=mask)   # bool [n]; [Removal(id, kept_id, similarity, ...)]

A pool in parts on a shared file system, with the units of every step divided over hosts:

  search = Search(directory, generations=(0, 1, 1, 1))   # of every part; the texts of generation 0 are never removed
  for part in range(4)[host::hosts]:
    if not signed(search, part):
      sign(search, part, ids, texts)                     # step 1: words and keys; the only step that reads texts
  barrier()
  for unit in pair_units(search)[host::hosts]:
    find_pairs(search, unit)                             # step 2: pairs that agree in a key
  barrier()
  for part in newest(search)[host::hosts]:
    verify(search, part)                                 # step 3: the pairs whose ROUGE-L reaches the threshold
  barrier()
  if host == 0:
    decide(search)                                       # step 4: which texts are removed
  barrier()
  keep, removals = decisions(search, part)               # for each part of newest(search)

Texts come normalised (`corpus.normalise.normalised`), with ids of 16 hex digits of a hash; texts with equal ids are
removed before, all but one. Words are those of `corpus.words`.

Which texts survive: x is removed if and only if a kept text y before it was found to have a ROUGE-L F1 of at least the
threshold with x. "Before" means a lower generation or, in the same one, a lower id. So every removal has a kept and
verified partner (no chains), and the result depends on the texts, their generations and the seed alone: the order in
files, the division into parts and the number of hosts change nothing. Parts of a higher generation can be added later;
the files of the earlier ones are used again and their decisions stand.

What is found: pairs that agree in a band of MinHash values (corpus/minhash.py), 0.99 of the texts with two words edited
at 15 words and 0.91 at 11. Texts of up to SHORT words have too few bigrams for that, so they are also found by what
remains without one or two of their words. A single word has no near-duplicate. Of the texts that agree in a band, each
is compared with the COMPARED first ones only, so the cost stays linear where thousands share a template. Later ones are
compared where they agree in a rarer band, as texts do that share more than the template.

Memory: one byte per text in step 4; else what a part needs in step 1 (about 0.5 KB per text) and a slice of keys or
pairs later (some 100 MB). Files: 272 bytes per text, up to 450 more for a short one, 8 per word, and 8 per pair. No
unit is done twice, so a killed run goes on at the first missing unit and gives the same bytes.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Sequence

import numpy as np

from alma_jax.corpus import minhash, rouge, words
from alma_jax.corpus.minhash import BANDS, ROW_BITS, ROW_MASK
from alma_jax.corpus.search import Search, Unit, load, save

COMPARED = 8  # texts of a bucket, the first ones, with which all others are compared

_SLICE = 1 << 21  # band keys that are sorted together
_PAIRS = 1 << 22  # pairs that are held together
_COMPARISONS = 1 << 15  # pairs whose words are read together

_EDGE = np.dtype([("later", "<u4"), ("earlier", "<u4"), ("similarity", "<f8")])
_REMOVED = np.dtype(
  [("row", "<u4"), ("kept_part", "<u4"), ("kept_row", "<u4"), ("id", "<u8"), ("kept_id", "<u8"), ("similarity", "<f8")]
)
_KEPT, _REMOVE, _OPEN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Removal:
  id: str
  kept_id: str  # the most similar one of the kept texts before it that were found
  similarity: float  # ROUGE-L F1 of the two
  row: int  # in its part
  kept_part: int
  kept_row: int


def near_duplicates(
  texts: Sequence[str],
  ids: Sequence[str],
  protected: np.ndarray | None = None,
  threshold: float = 0.7,
  directory: str | os.PathLike[str] | None = None,
  seed: int = 0,
) -> tuple[np.ndarray, list[Removal]]:
  """Which texts of a pool that fits into memory stay, bool [n], and the removals in their order. `protected`, bool [n],
  are texts that come first and always stay. All texts are part 0 here. Without a directory the files are temporary."""
  if len(set(ids)) < len(ids):
    raise ValueError("two texts have the same id: remove equal texts first")
  mask = np.zeros(len(texts), bool) if protected is None else np.asarray(protected, bool)
  places = [np.flatnonzero(mask), np.flatnonzero(~mask)]
  with contextlib.nullcontext(directory) if directory else tempfile.TemporaryDirectory() as directory:
    search = Search(directory, (0, 1), threshold, seed)
    for part, mine in enumerate(place.tolist() for place in places):
      sign(search, part, [ids[i] for i in mine], [texts[i] for i in mine])
    for unit in pair_units(search):
      find_pairs(search, unit)
    verify(search, 1)
    decide(search)
    stays, found = decisions(search, 1)
  keep = mask.copy()
  keep[places[1]] = stays
  return keep, [
    dataclasses.replace(x, row=int(places[1][x.row]), kept_part=0, kept_row=int(places[x.kept_part][x.kept_row]))
    for x in found
  ]


def newest(search: Search) -> list[int]:
  """The parts of the highest generation, about which steps 2 to 4 decide."""
  last = max(search.generations)
  return [part for part, generation in enumerate(search.generations) if generation == last]


def signed(search: Search, part: int) -> bool:
  """True if step 1 is done for the part, so that its texts need not be read again."""
  return search.signed_path(part, "bands").exists()


def sign(search: Search, part: int, ids: Sequence[str], texts: Sequence[str]) -> None:
  """Step 1 for a part: its ids, its words, and its sorted keys: of every band, and of what short texts share."""
  numbers = _numbers(ids)
  if len(texts) != len(ids):
    raise ValueError(f"part {part} has {len(ids)} ids for {len(texts)} texts")
  if signed(search, part):
    if not np.array_equal(numbers, search.column(part, "ids")):
      raise ValueError(f"{search.directory}: part {part} was signed with other texts; take another directory")
    return
  hashes, offsets = words.hashes(texts)
  lengths, most = np.diff(offsets), rouge.WORDS // 2
  if lengths.max(initial=0) > most:
    raise ValueError(f"text {ids[int(lengths.argmax())]} has {lengths.max()} words, the most is {most}: cut it")
  rows = np.flatnonzero(lengths > 1)  # the others have no bigrams, and no near-duplicates
  keys = np.empty((BANDS, len(rows)), np.uint64)
  for start in range(0, len(rows), minhash.TEXTS):
    mine = rows[start : start + minhash.TEXTS]
    signatures = minhash.signatures(*words.taken(hashes, offsets, mine), search.seed)
    keys[:, start : start + len(mine)] = minhash.band_keys(signatures)
  # An entry: the first 36 bits of the key, then the row. Sorted, texts that agree in a key stand side by side.
  keys &= ~ROW_MASK
  keys |= rows.astype(np.uint64)
  keys.sort(axis=1)
  short = minhash.shared_keys(hashes, offsets)
  # The bands come last: their presence says that the others are there.
  for name, column in {"ids": numbers, "words": hashes, "offsets": offsets, "short": short, "bands": keys}.items():
    save(search.signed_path(part, name), column)


def pair_units(search: Search) -> list[Unit]:
  """The units of step 2: more keys, more slices. The keys of short texts are one more band."""
  rows, short = int(search.starts()[-1]), sum(len(search.keys(p, BANDS)) for p in range(len(search.generations)))
  slices = [max(1, -(-size // _SLICE)) for size in [rows] * BANDS + [short]]
  return [Unit(band, at, count) for band, count in enumerate(slices) for at in range(count)]


def find_pairs(search: Search, unit: Unit) -> None:
  """Step 2 for a unit: the pairs (text of the newest generation, text before it) whose keys are equal, sorted."""
  path = search.pairs_path(unit)
  if path.exists():
    return
  starts = search.starts()
  entries = search.entries(starts, unit)
  # Only entries whose key another one has, too.
  equal = np.zeros(len(entries) + 1, bool)
  equal[1:-1] = entries[1:] >> ROW_BITS == entries[:-1] >> ROW_BITS
  entries = entries[equal[1:] | equal[:-1]]
  keys, rows = entries >> ROW_BITS, entries & ROW_MASK
  # A bucket is the texts of one key, in the order in which they come before each other. Each is paired with the first
  # COMPARED of those before it, whatever comes behind it.
  #   texts   p q r   x y        the buckets p q r and x y; all texts of the newest generation
  #   first   0 0 0   3 3        the place where a bucket begins
  #   counts  0 1 2   0 1        pairs qp, rp, rq, yx; ends = 0 1 3 3 4
  generations, ids = search.ranks(starts, rows)
  order = np.lexsort((ids, generations, keys))
  keys, rows, generations = keys[order], rows[order], generations[order]
  place = np.arange(len(keys))
  opens = np.ones(len(keys), bool)
  opens[1:] = keys[1:] != keys[:-1]
  first = np.maximum.accumulate(np.where(opens, place, 0))
  counts = np.where(generations == max(search.generations), np.minimum(place - first, COMPARED), 0)
  ends = np.cumsum(counts)
  # Pair number n belongs to the first text whose `ends` is above n, and is its (n - ends + counts)th one. A pair is one
  # number, (later row, earlier row), so that sorted pairs can be cut by rows.
  pairs = np.empty(counts.sum(), np.uint64)
  for low in range(0, len(pairs), _PAIRS):
    wanted = np.arange(low, min(low + _PAIRS, len(pairs)))
    later = np.searchsorted(ends, wanted, side="right")
    earlier = first[later] + wanted - (ends - counts)[later]
    pairs[wanted] = rows[later] << ROW_BITS | rows[earlier]
  save(path, np.unique(pairs))


def verify(search: Search, part: int) -> None:
  """Step 3 for a part of the newest generation: its pairs whose ROUGE-L reaches the threshold, as edges."""
  path = search.edges_path(part)
  if path.exists():
    return
  starts = search.starts()
  columns = [search.pairs_path(unit) for unit in pair_units(search)]
  # Some rows at a time, with their pairs from all units; fewer rows where these are too many pairs.
  low, last, rows, edges = int(starts[part]), int(starts[part + 1]), _PAIRS, [np.empty(0, _EDGE)]
  while low < last:
    high = min(low + rows, last)
    found = []
    for column in map(load, columns):
      a, b = np.searchsorted(column, np.array([low, high], np.uint64) << ROW_BITS)
      found.append(column[a:b])
    if sum(map(len, found)) > _PAIRS and rows > 1:
      rows //= 4
      continue
    pairs = np.unique(np.concatenate(found))
    edges += [_verified(search, starts, pairs[i : i + _COMPARISONS]) for i in range(0, len(pairs), _COMPARISONS)]
    low = high
  edges = np.concatenate(edges)
  # Of each later text the most similar earlier one comes first.
  generations, ids = search.ranks(starts, edges["earlier"])
  save(path, edges[np.lexsort((ids, generations, -edges["similarity"], edges["later"]))])


def _verified(search: Search, starts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  edges = np.empty(len(pairs), _EDGE)
  edges["later"], edges["earlier"] = pairs >> ROW_BITS, pairs & ROW_MASK
  edges["similarity"] = rouge.of_pairs(lambda rows: search.words_of(starts, rows), edges["later"], edges["earlier"])
  return edges[edges["similarity"] >= search.threshold]


def decide(search: Search) -> None:
  """Step 4, on one host: removes every text that has an edge to a kept text before it."""
  parts, starts = newest(search), search.starts()
  missing = [part for part in parts if not search.removed_path(part).exists()]
  if not missing:
    return
  # Earlier generations are decided, texts without edges stay, and the others are open.
  state = np.full(starts[-1], _KEPT, np.uint8)
  for part, generation in enumerate(search.generations):
    if 0 < generation < max(search.generations):
      state[starts[part] + search.removed(part)["row"]] = _REMOVE
  for part in parts:
    state[load(search.edges_path(part))["later"]] = _OPEN
  # A text can be decided when all before it are. Ids are hashes, their order is random, so this takes few rounds.
  undecided = parts
  while undecided:
    undecided = [part for part in undecided if _decide(state, load(search.edges_path(part)))]
  for part in missing:
    edges = load(search.edges_path(part))
    edges = edges[(state[edges["later"]] == _REMOVE) & (state[edges["earlier"]] == _KEPT)]
    later, best = np.unique(edges["later"], return_index=True)  # the most similar one comes first
    kept = edges["earlier"][best].astype(np.int64)
    removed = np.empty(len(later), _REMOVED)
    removed["row"], removed["similarity"] = later - starts[part], edges["similarity"][best]
    removed["kept_part"] = np.searchsorted(starts, kept, side="right") - 1
    removed["kept_row"] = kept - starts[removed["kept_part"]]
    removed["id"], removed["kept_id"] = (search.ranks(starts, rows)[1] for rows in (later, kept))
    save(search.removed_path(part), removed)


def _decide(state: np.ndarray, edges: np.ndarray) -> bool:
  """Decides each open text that has a kept neighbour before it, or only removed ones; True if some text stays open."""
  later, earlier = edges["later"], edges["earlier"]
  still = state[later] == _OPEN
  later, before = later[still], state[earlier[still]]
  # A text has several edges: it is removed if one leads to a kept text, else open if one leads to an open text.
  state[later] = _KEPT
  state[later[before == _OPEN]] = _OPEN
  state[later[before == _KEPT]] = _REMOVE
  return bool((state[later] == _OPEN).any())


def decisions(search: Search, part: int) -> tuple[np.ndarray, list[Removal]]:
  """Which texts of the part stay, bool [n], and the removals in the order of its rows, when step 4 is done."""
  keep = np.ones(len(search.column(part, "ids")), bool)
  if not search.generations[part]:
    return keep, []
  found = search.removed(part)
  keep[found["row"]] = False
  columns = [found[name].tolist() for name in ("id", "kept_id", "similarity", "row", "kept_part", "kept_row")]
  return keep, [Removal(f"{id:016x}", f"{kept:016x}", *rest) for id, kept, *rest in zip(*columns, strict=True)]


def _numbers(ids: Sequence[str]) -> np.ndarray:
  """uint64 [n] of ids in hexadecimal."""
  wrong = next((id for id in ids if not re.fullmatch("[0-9a-f]{16}", id)), None)
  if wrong is not None:
    raise ValueError(f"an id has 16 hex digits, not {wrong!r}")
  return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)
