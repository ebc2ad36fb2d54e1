"""What texts have in common with evaluation prompts: the whole text, or a run of `n` words.

  index = Index({"alpaca_eval": prompts, "mt_bench": others})       # small, held in memory
  overlaps = shared(index, ids, texts)                              # of any part of the texts, on any host
  counts = summary(index, all_overlaps)                             # plain numbers and a few examples, for a manifest

Prompts and texts are given normalised (`corpus.normalise.normalised`); words are those of `corpus.words`. A prompt of
fewer than n words is found only where a text equals it: everyone uses runs that short.

What to expect: every overlap and no other, as words are compared wherever the hashes of two runs are equal. One pass
over the texts, about 2 us each; the memory needed follows the prompts and what they share, not the texts.
"""

import collections
import dataclasses

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
  equal: tuple[int, ...]  # places in the set of the prompts that are this text
  sharing: tuple[int, ...]  # of the others that have a run of words in common with it
  run: str  # the first shared run; all of a text that is shorter


class Index:
  """The evaluation sets, {name: [prompt, ...]}, ready for `shared`."""

  def __init__(self, sets, n=8):
    if n < 1:
      raise ValueError(f"n={n}: a shared run has at least one word; 8 is usual")
    self.n, self.sets = n, {name: list(prompts) for name, prompts in sets.items()}
    self.places = [(name, i) for name, prompts in self.sets.items() for i in range(len(prompts))]
    prompts = [self.sets[name][i] for name, i in self.places]
    self.words = [words.split(prompt) for prompt in prompts]
    self.equal = collections.defaultdict(list)  # text -> numbers of the prompts, counted over all sets
    for number, prompt in enumerate(prompts):
      self.equal[prompt].append(number)
    hashes, numbers, starts = _runs(prompts, n)
    order = np.argsort(hashes, kind="stable")
    self.hashes, self.numbers, self.starts = hashes[order], numbers[order], starts[order]
    # Nearly every run of a text is unknown; one look at this table tells it.
    bits = max(16, (64 * len(hashes)).bit_length())
    self.shift, self.known = np.uint64(64 - bits), np.zeros(1 << bits, bool)
    self.known[self.hashes >> self.shift] = True


def shared(index, ids, texts):
  """[Overlap] of the texts, in their order: one for each set that a text has something in common with."""
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


def summary(index, overlaps, examples=3):
  """{set: {"prompts", "short" (fewer than n words), "equal" (texts that are one of its prompts), "overlapping" (other
  texts that share a run), "prompts_met" (prompts that are found either way), "examples"}}."""
  by_set = {name: [] for name in index.sets}
  for overlap in overlaps:
    by_set[overlap.name].append(overlap)
  lengths = collections.Counter(name for (name, _), prompt in zip(index.places, index.words) if len(prompt) < index.n)
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


def _overlaps(index, id, text, runs):
  """The overlaps of one text; `runs`: {number of a prompt: first shared run}, in the order of the text."""
  equal, sharing, first = collections.defaultdict(list), collections.defaultdict(list), {}
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


def _shared_runs(index, texts):
  """{row: {number of a prompt: the first run of the text that it has}}."""
  hashes, rows, starts = _runs(texts, index.n)
  likely = np.flatnonzero(index.known[hashes >> index.shift])
  low, high = (np.searchsorted(index.hashes, hashes[likely], side=side) for side in ("left", "right"))
  hits = low < high
  columns = [column[hits].tolist() for column in (rows[likely], starts[likely], low, high)]
  found, row_of_words, of_row = {}, None, []
  for row, start, a, b in zip(*columns):
    if row != row_of_words:
      row_of_words, of_row = row, words.split(texts[row])
    run = of_row[start : start + index.n]
    for number, its in zip(index.numbers[a:b].tolist(), index.starts[a:b].tolist()):
      if index.words[number][its : its + index.n] == run:
        found.setdefault(row, {}).setdefault(number, " ".join(run))
  return found


def _runs(texts, n):
  """(uint64 hash, row of the text, place of its first word) of every run of n words."""
  hashes, offsets = words.hashes(texts)
  lengths = np.diff(offsets)
  count = max(len(hashes) - n + 1, 0)
  runs = hashes[:count].copy()
  for i in range(1, n):
    runs *= _FACTOR
    runs += hashes[i : i + count]
  rows = np.repeat(np.arange(len(texts)), lengths)[:count]
  starts = np.arange(count) - offsets[rows]
  inside = starts + n <= lengths[rows]
  return runs[inside], rows[inside], starts[inside]
