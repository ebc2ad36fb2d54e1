"""ROUGE-L F1: the share of words that two texts have in common, in the same order.

of_pairs(read, rows, others)   # "a b c d" and "a x c d" give 0.75: 2 * 3 / (4 + 4); read(rows) gives words' hashes
"""

import itertools
from collections.abc import Callable

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

WORDS = 1 << 20  # words that are compared together; every distinct one needs a code point of its own


def of_pairs(
  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], left: np.ndarray, right: np.ndarray
) -> np.ndarray:
  """float64 [n]: ROUGE-L F1 of pairs of rows, 0 where neither has words. `read` gives the words' hashes and the offsets
  of rows that ascend."""
  rows, at = np.unique(np.concatenate([left, right]), return_inverse=True)
  hashes, offsets = read(rows)
  if len(hashes) > WORDS and len(left) > 1:
    half = len(left) // 2
    return np.concatenate([of_pairs(read, left[i], right[i]) for i in (slice(half), slice(half, None))])
  # Each distinct word becomes one character, so a text is a string that rapidfuzz compares.
  codes = np.unique(hashes, return_inverse=True)[1].astype("<u4")
  codes[codes >= 0xD800] += 0x800  # skips the surrogates, which are no characters
  characters = codes.tobytes().decode("utf-32-le")
  texts = [characters[a:b] for a, b in itertools.pairwise(offsets.tolist())]
  sides = at.reshape(2, -1)
  one, other = ([texts[i] for i in side] for side in sides.tolist())
  common = process.cpdist(one, other, scorer=LCSseq.similarity, dtype=np.int32)
  # From whole numbers: the F1 is the double nearest to the fraction, so one of exactly 7/10 reaches a threshold of 0.7.
  return 2.0 * common / np.maximum(np.diff(offsets)[sides].sum(axis=0), 1)
