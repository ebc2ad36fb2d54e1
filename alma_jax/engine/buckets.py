"""Rows of different lengths in batches of a few fixed shapes, so that few programs are compiled."""

import itertools

import numpy as np

BUCKET = 16  # lengths are rounded up to this


def rounded(length):
  return -(-length // BUCKET) * BUCKET


def batches(rows, batch, least=1):
  """Yields (indices into rows, tokens [batch, width], lengths [batch]): rows of one rounded length together, shortest
  first. Places that no row fills have length `least`."""
  order = sorted(range(len(rows)), key=lambda i: (rounded(len(rows[i])), i))
  for width, members in itertools.groupby(order, key=lambda i: rounded(len(rows[i]))):
    members = list(members)
    for start in range(0, len(members), batch):
      take = members[start : start + batch]
      tokens, lengths = np.zeros((batch, width), np.int32), np.full(batch, least, np.int32)
      for at, i in enumerate(take):
        tokens[at, : len(rows[i])], lengths[at] = rows[i], len(rows[i])
      yield take, tokens, lengths
