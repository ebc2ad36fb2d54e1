"""The files of a search for near-duplicates (corpus/duplicates.py): what it knows of every part of the texts.

  signed-SEED/           step 1, of every part: ids, words, offsets; sorted entries of its `bands`, and of `short` texts
  generation-1-HASH/     steps 2 to 4: pairs-*.npy of every unit, edges-*.npy and removed-*.npy of every part

A file appears when it is complete. Texts are numbered through all parts: `row` is a number in the whole pool.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alma_jax.corpus import words
from alma_jax.corpus.minhash import BANDS, ROW_BITS, ROW_MASK
from alma_jax.errors import writing


class Unit(NamedTuple):
  """A piece of step 2: one of the equal slices of a band's range of keys. Band BANDS is that of the short texts."""

  band: int
  at: int
  slices: int


@dataclasses.dataclass(frozen=True)
class Search:
  """A pool of texts in parts, numbered from 0, and a directory for what is found out about them."""

  directory: str | os.PathLike[str]
  generations: tuple[int, ...]  # of every part; 0: never removed
  threshold: float = 0.7  # of ROUGE-L F1
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold}: a ROUGE-L F1 lies above 0 and up to 1; 0.7 is usual")
    if max(self.generations, default=0) < 1 or min(self.generations) < 0:
      raise ValueError(f"generations={self.generations}: 0 is protected, and a part of 1 or higher must be there")

  def starts(self) -> np.ndarray:
    """int64 [parts + 1]: the first row of every part, and the number of all rows."""
    parts = range(len(self.generations))
    missing = [part for part in parts if not self.signed_path(part, "bands").exists()]
    if missing:
      raise ValueError(f"{self.directory}: part {missing[0]} is not signed; step 1 comes first, for all parts")
    starts = np.cumsum([0, *(len(self.column(part, "ids")) for part in parts)])
    if starts[-1] > ROW_MASK:
      raise ValueError(f"{self.directory}: the pool has {starts[-1]} texts, the most is {ROW_MASK}")
    return starts

  def column(self, part: int, name: str) -> np.ndarray:
    return load(self.signed_path(part, name))

  def keys(self, part: int, band: int) -> np.ndarray:
    """uint64, sorted: the entries (key, row in the part) of a band."""
    return self.column(part, "bands")[band] if band < BANDS else self.column(part, "short")

  def entries(self, starts: np.ndarray, unit: Unit) -> np.ndarray:
    """uint64, sorted: the entries (key, row) of a unit, from all parts."""
    # Keys have 36 bits; slice `at` begins at the key 2^36 * at / slices, and the last one is open at its end.
    edges = [i for i in (unit.at, unit.at + 1) if i < unit.slices]
    bounds = [np.uint64((i << 64 - ROW_BITS) // unit.slices << ROW_BITS) for i in edges]
    found = []
    for part, start in enumerate(starts[:-1]):
      keys = self.keys(part, unit.band)
      low, high = [*np.searchsorted(keys, bounds), len(keys)][:2]
      found.append(keys[low:high] + np.uint64(start))
    entries = np.concatenate(found)
    entries.sort()
    return entries

  def ranks(self, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The generations and ids of texts: they come before each other in this order."""
    generations, ids = np.empty(len(rows), np.int64), np.empty(len(rows), np.uint64)
    for part, places, mine in _by_part(starts, rows):
      generations[places], ids[places] = self.generations[part], self.column(part, "ids")[mine]
    return generations, ids

  def words_of(self, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of words and the offsets of texts, whose rows ascend."""
    parts = _by_part(starts, rows)
    found = [words.taken(self.column(part, "words"), self.column(part, "offsets"), mine) for part, _, mine in parts]
    lengths = np.concatenate([np.diff(offsets) for _, offsets in found])
    return np.concatenate([hashes for hashes, _ in found]), np.append(0, np.cumsum(lengths))

  def removed(self, part: int) -> np.ndarray:
    path = self.removed_path(part)
    if not path.exists():
      raise ValueError(f"{self.directory}: part {part} is not decided; its generation comes before the higher ones")
    return load(path)

  def signed_path(self, part: int, name: str) -> pathlib.Path:
    return pathlib.Path(self.directory) / f"signed-{self.seed}" / f"{name}-{part:05d}.npy"

  def pairs_path(self, unit: Unit) -> pathlib.Path:
    name = f"pairs-{unit.band:02d}-{unit.at:05d}-of-{unit.slices:05d}.npy"
    return self._decided(max(self.generations)) / name

  def edges_path(self, part: int) -> pathlib.Path:
    return self._decided(self.generations[part]) / f"edges-{part:05d}.npy"

  def removed_path(self, part: int) -> pathlib.Path:
    return self._decided(self.generations[part]) / f"removed-{part:05d}.npy"

  def _decided(self, generation: int) -> pathlib.Path:
    """The directory for a generation's results, named after everything they depend on besides the texts."""
    before = [(part, its) for part, its in enumerate(self.generations) if its <= generation]
    name = hashlib.blake2b(json.dumps([before, self.threshold, self.seed]).encode(), digest_size=6).hexdigest()
    return pathlib.Path(self.directory) / f"generation-{generation}-{name}"


def _by_part(starts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Yields, for every part that has some of the rows: its number, their places in `rows`, their rows in the part."""
  rows = rows.astype(np.int64)
  order = np.argsort(rows)
  bounds = np.searchsorted(rows[order], starts)
  for part, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
    if low < high:
      yield part, order[low:high], rows[order[low:high]] - starts[part]


def load(path: pathlib.Path) -> np.ndarray:
  return np.load(path, mmap_mode="r", allow_pickle=False)


def save(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes a `.npy` that appears when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with writing(path), open(temporary, "wb") as file:
    np.save(file, array, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
