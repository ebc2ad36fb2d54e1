"""What is trained on, as the steps' packed batches: examples, pairs, or graded responses.

  data = Examples(sequences, names)                     sequences: [(token ids, weights)], names: what errors call them
  batches = Batches(data, options, seed, unit=8)        batches(step) -> dict of arrays, of one shape for all steps

A step takes `batch` items from a permutation that follows from (seed, epoch), packs them best-fit into rows, and fills
up to the same number of rows at every step, so that the step compiles once.
"""

import dataclasses
import math

import numpy as np

from alma_jax.text import packing

ROWS = 4  # the number of rows is rounded up to this, so that rounds of like size share a compilation


class _Sequences:
  """Items that are one sequence each."""

  def lengths(self, i):
    return [len(self.sequences[i][0])]

  def packings(self, members, row_length):
    return (packing.pack([len(self.sequences[i][0]) for i in members], row_length),)

  def packed(self, members, packings, row_length, counts):
    return packing.rows([self.sequences[i] for i in members], packings[0], row_length, counts[0], pad_id=0)


@dataclasses.dataclass(frozen=True)
class Examples(_Sequences):
  """For SFT. `average`: "tokens" weighs every supervised token alike, "examples" every example."""

  sequences: list
  names: list
  average: str = "tokens"

  def rows(self, members, packings, row_length, counts, batch):
    made = self.packed(members, packings, row_length, counts)
    if self.average == "examples":
      whole = np.array([np.sum(self.sequences[i][1][1:]) for i in members] + [1.0])  # the last one is padding's
      made["weights"] /= whole[made["example"]].astype(np.float32)
    return made


@dataclasses.dataclass(frozen=True)
class Pairs:
  """For preferences: sides [(chosen, rejected)], the reference's log-probs [pairs, 2 or 3] if the loss has one, and for
  KTO a third sequence for each pair, a response to another prompt."""

  sides: list
  names: list
  reference: np.ndarray | None = None
  others: list | None = None

  def lengths(self, i):
    return [len(ids) for ids, _ in self.sides[i]]

  def packings(self, members, row_length):
    pairs = packing.pack([packing.forked_length(*self.sides[i]) for i in members], 2 * row_length)
    others = packing.pack([len(self.others[i][0]) for i in members], row_length) if self.others else ()
    return pairs, others

  def rows(self, members, packings, row_length, counts, batch):
    made = packing.forked_rows([self.sides[i] for i in members], packings[0], 2 * row_length, counts[0], pad_id=0)
    made["real"] = (np.arange(batch) < len(members)).astype(np.float32)
    if self.reference is not None:
      made["reference"] = np.zeros((batch, self.reference.shape[1]), np.float32)
      made["reference"][: len(members)] = self.reference[members]
    if self.others:
      made["other"] = packing.rows([self.others[i] for i in members], packings[1], row_length, counts[1], pad_id=0)
    return made


@dataclasses.dataclass(frozen=True)
class Graded(_Sequences):
  """For policy gradients: responses with their advantages, and the log-prob of each token under the model that wrote it
  and under the reference; old[i][t] is that of token t + 1 of sequence i, so that there is one less than tokens."""

  sequences: list
  names: list
  advantages: np.ndarray
  old: list
  reference: list

  def rows(self, members, packings, row_length, counts, batch):
    made = self.packed(members, packings, row_length, counts)
    starts = np.cumsum([0, *(len(self.sequences[i][0]) for i in members)])
    # Behind everything stands a 0 for padding, whose example is -1.
    at = np.where(made["example"] < 0, starts[-1], starts[made["example"]] + made["positions"])
    flat = lambda logprobs: np.concatenate([np.append(logprobs[i], 0.0) for i in members] + [[0.0]])
    spread = np.concatenate([np.repeat(self.advantages[members], np.diff(starts)), [0.0]])
    for name, values in {"advantage": spread, "old": flat(self.old), "reference": flat(self.reference)}.items():
      made[name] = values[at].astype(np.float32)
    return made


class Batches:
  """step -> the step's packed batch, a function of (data, options, seed, step) alone; no seed: in order, once."""

  def __init__(self, data, options, seed, unit):
    self.data, self.seed = data, seed
    self.batch, self.row_length = options.batch, options.row_length
    self.count = len(data.names)
    self.per_epoch = math.ceil(self.count / self.batch)
    # 2.2 * 25 is 55.00000000000001
    self.steps = self.per_epoch if seed is None else max(1, math.ceil(round(options.epochs * self.per_epoch, 6)))
    self._order = (None, None)
    epochs = math.ceil(self.steps / self.per_epoch)
    needed = [self._packings(self.members(step)) for step in range(epochs * self.per_epoch)]
    unit = math.lcm(ROWS, unit)
    self.counts = [-(-max(map(len, packings)) // unit) * unit for packings in zip(*needed)]

  def members(self, step):
    """Which items the step takes."""
    epoch, at = divmod(step, self.per_epoch)
    if self._order[0] != epoch:
      order = np.arange(self.count)
      self._order = epoch, order if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(order)
    return self._order[1][at * self.batch : (at + 1) * self.batch]

  def lengths(self, step):
    """Of all sequences of the step."""
    return [length for i in self.members(step) for length in self.data.lengths(i)]

  def _packings(self, members):
    return self.data.packings(members, self.row_length)

  def __call__(self, step):
    members = self.members(step)
    return self.data.rows(members, self._packings(members), self.row_length, self.counts, self.batch)
