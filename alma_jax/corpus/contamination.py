"""What texts have in common with evaluation prompts: the whole text, or a run of `n` words.

  index = Index({"alpaca_eval": prompts, "mt_bench": others})       # small, held in memory
  overlaps = shared(index, ids, texts)                              # of any part of the texts, on any host
  counts = summary(index, all_overlaps)                             # plain numbers and a few examples, for a manifest

Prompts and texts come normalised (`corpus.normalise.normalised`); words are those of `corpus.words`. A prompt of fewer
than n words is found only where a text equals it, since runs that short occur everywhere.

The result is every overlap and nothing else: where the hashes of two runs agree, their words are compared. One pass
over the texts takes about 2 us each; memory grows with the prompts and what they share, not with the texts.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alma_jax.corpus import words

_TEXTS = 4096  # texts whose runs are looked up together
_FACTOR = np.uint64(0x9FB21C651E98DF25)


@dataclasses.dataclass(frozen=True)
class Overlap:
  """A text and what it shares with the prompts of one set."""

  id: str
  text: str
  name: str  # of the set
  equal: tuple[int, ...]  # places in the set of the prompts that equal the text
  sharing: tuple[int, ...]  # places of the other prompts that share a run of words with it
  run: str  # the first shared run; the whole text where it is shorter


class _Runs(NamedTuple):
  """All runs of n words, text by text; three arrays of one length."""

  hashes: np.ndarray  # uint64
  rows: np.ndarray  # the number of the text
  starts: np.ndarray  # the place of the run's first word in its text


class Index:
  """The evaluation sets, prepared for `shared`."""

  def __init__(self, sets: Mapping[str, Iterable[str]], n: int = 8) -> None:
    if n < 1:
      raise ValueError(f"n={n}: a shared run has at least one word; 8 is usual")
    self.n, self.sets = n, {name: list(prompts) for name, prompts in sets.items()}
    self.places = [(name, i) for name, prompts in self.sets.items() for i in range(len(prompts))]
    prompts = [self.sets[name][i] for name, i in self.places]
    self.words = [words.split(prompt) for prompt in prompts]
    self.equal = collections.defaultdict[str, list[int]](list)  # text -> numbers of the prompts, counted over all sets
    for number, prompt in enumerate(prompts):
      self.equal[prompt].append(number)
    runs = _runs(prompts, n)
    order = np.argsort(runs.hashes, kind="stable")
    self.hashes, self.numbers, self.starts = (column[order] for column in runs)
    # Nearly every run of a text is unknown; one look at this table, by the hash's first bits, tells that.
    bits = max(16, (64 * len(order)).bit_length())
    self.shift, self.known = np.uint64(64 - bits), np.zeros(1 << bits, bool)
    self.known[self.hashes >> self.shift] = True


def shared(index: Index, ids: Sequence[str], texts: Sequence[str]) -> list[Overlap]:
  """The overlaps of the texts, in their order: one for each set with which a text has something in common."""
  if len(ids) != len(texts):
    raise ValueError(f"{len(ids)} ids for {len(texts)} texts")
  found = []
  for start in range(0, len(texts), _TEXTS):
    mine = texts[start : start + _TEXTS]
    runs = _shared_runs(index, mine)
    for row, text in enumerate(mine):
      if row in runs or text in index.equal:
        found += _overlaps(index, ids[start + row], text, runs.get(row, {}))
  return found


def summary(index: Index, overlaps: Iterable[Overlap], examples: int = 3) -> dict[str, dict[str, Any]]:
  """For each set: "prompts", "short" (prompts of fewer than n words), "equal" (texts that equal a prompt),
  "overlapping" (other texts that share a run), "prompts_met" (prompts found either way) and "examples"."""
  by_set: dict[str, list[Overlap]] = {name: [] for name in index.sets}
  for overlap in overlaps:
    by_set[overlap.name].append(overlap)
  short = (name for (name, _), prompt in zip(index.places, index.words, strict=True) if len(prompt) < index.n)
  lengths = collections.Counter(short)
  return {
    name: {
      "prompts": len(prompts),
      "short": lengths[name],
      "equal": sum(bool(o.equal) for o in by_set[name]),
      "overlapping": sum(not o.equal for o in by_set[name]),
      "prompts_met": len({i for o in by_set[name] for i in o.equal + o.sharing}),
      "examples": [
        {"id": o.id, "text": o.text, "prompt": prompts[(o.equal + o.sharing)[0]], "run": o.run}
        for o in sorted(by_set[name], key=lambda o: o.id)[:examples]
      ],
    }
    for name, prompts in index.sets.items()
  }


def _overlaps(index: Index, id: str, text: str, runs: Mapping[int, str]) -> list[Overlap]:
  """The overlaps of one text. `runs`: its first shared run by number of the prompt, in the order of the text."""
  equal, sharing = collections.defaultdict[str, list[int]](list), collections.defaultdict[str, list[int]](list)
  first: dict[str, str] = {}
  for number in index.equal.get(text, ()):
    name, place = index.places[number]
    equal[name].append(place)
    first[name] = " ".join(index.words[number][: index.n])
  for number, run in runs.items():
    name, place = index.places[number]
    if place not in equal[name]:
      sharing[name].append(place)
    first.setdefault(name, run)
  return [
    Overlap(id, text, name, tuple(equal[name]), tuple(sorted(sharing[name])), first[name])
    for name in index.sets
    if name in first
  ]


def _shared_runs(index: Index, texts: Sequence[str]) -> dict[int, dict[int, str]]:
  """For each row with a shared run: the number of every prompt that shares one, and the first run it shares."""
  runs = _runs(texts, index.n)
  likely = np.flatnonzero(index.known[runs.hashes >> index.shift])
  # The prompts' runs with the same hash are index.numbers[low:high].
  low, high = (np.searchsorted(index.hashes, runs.hashes[likely], side=side) for side in ("left", "right"))
  hits = low < high
  columns = [column[hits].tolist() for column in (runs.rows[likely], runs.starts[likely], low, high)]
  found: dict[int, dict[int, str]] = {}
  row_of_words, of_row = None, list[str]()
  for row, start, a, b in zip(*columns, strict=True):
    if row != row_of_words:
      row_of_words, of_row = row, words.split(texts[int(row)])
    run = of_row[start : start + index.n]
    for number, its in zip(index.numbers[a:b].tolist(), index.starts[a:b].tolist(), strict=True):
      if index.words[number][its : its + index.n] == run:
        found.setdefault(row, {}).setdefault(number, " ".join(run))
  return found


def _runs(texts: Sequence[str], n: int) -> _Runs:
  hashes, offsets = words.hashes(texts)
  lengths = np.diff(offsets)
  # The hash of every n neighbours in the one array of all words; runs across the end of a text are dropped afterwards.
  count = max(len(hashes) - n + 1, 0)
  runs = hashes[:count].copy()
  for i in range(1, n):
    runs *= _FACTOR
    runs += hashes[i : i + count]
  rows = np.repeat(np.arange(len(texts)), lengths)[:count]
  starts = np.arange(count) - offsets[rows]
  inside = starts + n <= lengths[rows]
  return _Runs(runs[inside], rows[inside], starts[inside])
