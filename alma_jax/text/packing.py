"""Packing examples of different lengths into rows of one length, without a target across a border.

  packing = pack([len(ids) for ids, _ in examples], row_length)   # examples: [(ids, mask)], see `clip`
  batch = rows(examples, packing[:8], row_length, n_rows=8, pad_id=0)

  batch = forked_rows(pairs, pack([forked_length(*pair) for pair in pairs], row_length), row_length, 8, pad_id=0)

The packing is best-fit decreasing: the same rows for the same lengths, typically over 97 % full. The sum of `weights`
is the number of supervised targets. An example's first token carries no loss, since nothing stands before it. Pairs are
two continuations of one text, which is packed once.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Encoded = tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]  # ids, and the weight of each as a target
Batch = dict[str, np.ndarray]


def clip(
  examples: Sequence[Encoded], row_length: int, group: int = 1
) -> tuple[list[list[Encoded] | None], dict[str, int]]:
  """Groups of `group` consecutive examples, cut to the row's length, and counts of what was cut or dropped. A group is
  None if an example of it has no target left."""
  cut = [(ids[:row_length], mask[:row_length]) for ids, mask in examples]
  groups = [cut[at : at + group] for at in range(0, len(cut), group)]
  kept = [group if all(any(mask[1:]) for _, mask in group) else None for group in groups]
  return kept, {
    "truncated": sum(len(ids) > row_length for ids, _ in examples),
    "dropped_without_target": kept.count(None),
  }


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """The numbers of the examples in each row; a row is at most `row_length` long.

  The longest example comes first, and each goes into the fullest row that still takes it. Lengths 2 3 5 3 and rows of
  8: 5 opens row 0, 3 fills it, the other 3 opens row 1, 2 joins it: [[2, 1], [3, 0]]."""
  if len(lengths) and not 0 < min(lengths) <= max(lengths) <= row_length:
    raise ValueError(
      f"lengths must lie in 1..{row_length}, got {min(lengths)}..{max(lengths)}: clip the examples first"
    )
  packing: list[list[int]] = []
  open_rows: dict[int, list[int]] = {}  # room left -> the rows with exactly that room
  free: list[int] = []  # the rooms that have rows, sorted
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    at = bisect.bisect_left(free, lengths[index])  # the fullest row that still takes it
    if at == len(free):
      row, room = len(packing), row_length
      packing.append([])
    else:
      room = free[at]
      row = open_rows[room].pop()
      if not open_rows[room]:
        del open_rows[room], free[at]
    packing[row].append(index)
    left = room - lengths[index]
    if left not in open_rows:
      open_rows[left] = []
      bisect.insort(free, left)
    open_rows[left].append(row)
  return packing


def rows(
  examples: Sequence[Encoded], packing: Sequence[Sequence[int]], row_length: int, n_rows: int, pad_id: int
) -> Batch:
  """Arrays [n_rows, row_length] of the packed examples; rows beyond the packing are empty.

  tokens, targets (the next token of the same example), weights (1 where the target carries loss), segments
  (1, 2, ... within a row, 0 is pad), positions (from 0 in each segment), example (index into `examples`, -1 is pad).
  """
  batch = _empty(packing, row_length, n_rows, pad_id)
  for row, members in enumerate(packing):
    start = 0
    for segment, index in enumerate(members, 1):
      start = _put(batch, row, start, examples[index], 0, segment, index)
  return batch


def shared(first: Encoded, second: Encoded) -> int:
  """The number of places that two continuations of a text share: all before its last token, since that one's target
  differs between them."""
  (a, mask_a), (b, mask_b) = first, second
  n = min(len(a), len(b))
  apart = (np.asarray(a[:n]) != b[:n]) | (np.asarray(mask_a[:n]) != 0) | (np.asarray(mask_b[:n]) != 0)
  return max(0, int(apart.argmax() if apart.any() else n) - 1)


def forked_length(first: Encoded, second: Encoded) -> int:
  """The number of places that a pair takes."""
  return len(first[0]) + len(second[0]) - shared(first, second)


def forked_rows(
  pairs: Sequence[tuple[Encoded, Encoded]], packing: Sequence[Sequence[int]], row_length: int, n_rows: int, pad_id: int
) -> Batch:
  """The arrays of `rows` for pairs packed as [prompt][chosen][rejected], and those of `llama.model.Forks`: second,
  order and order_segments. The rejected response attends to the prompt but not to the chosen response. The sides of
  pair i are the examples 2 i and 2 i + 1.

  With the prompt p q r, chosen a b and rejected x y z (r is there twice, as it has two targets):

    place           0 1 2 3 4 5 6 7 8
    tokens          p q r a b r x y z
    targets         q r a b . x y z .
    weights         0 0 1 1 0 1 1 1 0
    segments        1 1 1 1 1 2 2 2 2
    positions       0 1 2 3 4 2 3 4 5
    second          0 0 0 0 0 1 1 1 1
    order           0 1 5 6 7 8 2 3 4      in this order of places the rejected response follows its prompt,
    order_segments  1 1 1 1 1 1 2 2 2      and is one segment with it
  """
  batch = _empty(packing, row_length, n_rows, pad_id)
  shape = (n_rows, row_length)
  batch["second"], batch["order_segments"] = np.zeros(shape, bool), np.zeros(shape, np.int32)
  batch["order"] = np.tile(np.arange(row_length, dtype=np.int32), (n_rows, 1))
  for row, members in enumerate(packing):
    start = 0
    for at, index in enumerate(members):
      first, second = pairs[index]
      text = start + shared(first, second)
      middle = _put(batch, row, start, first, 0, 2 * at + 1, 2 * index)
      stop = _put(batch, row, middle, second, text - start, 2 * at + 2, 2 * index + 1)
      batch["second"][row, middle:stop] = True
      batch["order"][row, text:stop] = [*range(middle, stop), *range(text, middle)]
      batch["order_segments"][row, start : text + stop - middle] = 2 * at + 1
      batch["order_segments"][row, text + stop - middle : stop] = 2 * at + 2
      start = stop
  return batch


def _empty(packing: Sequence[Sequence[int]], row_length: int, n_rows: int, pad_id: int) -> Batch:
  if len(packing) > n_rows:
    raise ValueError(f"{len(packing)} packed rows do not fit into n_rows={n_rows}")
  shape = (n_rows, row_length)
  return {
    "tokens": np.full(shape, pad_id, np.int32),
    "targets": np.full(shape, pad_id, np.int32),
    "weights": np.zeros(shape, np.float32),
    "segments": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "example": np.full(shape, -1, np.int32),
  }


def _put(batch: Batch, row: int, start: int, example: Encoded, skip: int, segment: int, index: int) -> int:
  """Places an example without its first `skip` tokens; returns where it ends."""
  ids, mask = example
  stop = start + len(ids) - skip
  if stop > batch["tokens"].shape[1]:
    raise ValueError(f"row {row} of the packing holds more than {batch['tokens'].shape[1]} tokens")
  batch["tokens"][row, start:stop] = ids[skip:]
  batch["targets"][row, start : stop - 1] = ids[skip + 1 :]
  batch["weights"][row, start : stop - 1] = mask[skip + 1 :]
  batch["segments"][row, start:stop] = segment
  batch["positions"][row, start:stop] = np.arange(skip, len(ids))
  batch["example"][row, start:stop] = index
  return stop
