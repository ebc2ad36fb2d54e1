"""Packing examples of different lengths into rows of one length, without a target across a border.

  kept, counts = clip(examples, row_length)   # examples: [(ids, mask)]; what is cut or dropped is counted
  packing = pack([len(ids) for ids, _ in kept], row_length)
  batch = rows(kept, packing[:8], row_length, n_rows=8, pad_id=0)

What to expect: best-fit decreasing, the same rows for the same lengths, typically over 97 % full. The sum of
`weights` is the number of supervised targets. An example's first token carries no loss: nothing stands
before it.
"""

import bisect

import numpy as np


def clip(examples, row_length):
  """(examples cut to the row's length, without those that have no target left; counts of both)."""
  kept, truncated, no_target = [], 0, 0
  for ids, mask in examples:
    truncated += len(ids) > row_length
    ids, mask = ids[:row_length], mask[:row_length]
    if any(mask[1:]):
      kept.append((ids, mask))
    else:
      no_target += 1
  return kept, {"truncated": truncated, "no_target": no_target}


def pack(lengths, row_length):
  """[[index of example, ...] per row], each row at most `row_length` long."""
  if len(lengths) and not 0 < min(lengths) <= max(lengths) <= row_length:
    raise ValueError(
      f"lengths must lie in 1..{row_length}, got {min(lengths)}..{max(lengths)}: clip the examples first"
    )
  packing = []
  open_rows, free = {}, []  # room left -> rows with exactly that room; the rooms that have rows, sorted
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


def rows(examples, packing, row_length, n_rows, pad_id):
  """Arrays [n_rows, row_length] of the packed examples; rows beyond the packing are empty.

  tokens, targets (the next token of the same example), weights (1 where the target carries loss), segments
  (1.. in each row, 0 is pad), positions (from 0 in each segment), example (index into `examples`, -1 is pad).
  """
  if len(packing) > n_rows:
    raise ValueError(f"{len(packing)} packed rows do not fit into n_rows={n_rows}")
  shape = (n_rows, row_length)
  tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  segments, positions, example = (
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.full(shape, -1, np.int32),
  )
  for row, members in enumerate(packing):
    start = 0
    for segment, index in enumerate(members, 1):
      ids, mask = examples[index]
      stop = start + len(ids)
      if stop > row_length:
        raise ValueError(f"row {row} of the packing holds more than {row_length} tokens")
      tokens[row, start:stop] = ids
      targets[row, start : stop - 1] = ids[1:]
      weights[row, start : stop - 1] = mask[1:]
      segments[row, start:stop] = segment
      positions[row, start:stop] = np.arange(len(ids))
      example[row, start:stop] = index
      start = stop
  return {
    "tokens": tokens,
    "targets": targets,
    "weights": weights,
    "segments": segments,
    "positions": positions,
    "example": example,
  }
