"""ROUGE-L F1: the share of words that two texts have in common, in the same order.

rouge_l(["a b c d"], ["a x c d"])            # [0.75]: 2 * 3 / (4 + 4)
of_pairs(read, rows, others)                 # the same for rows of a pool; read(rows) gives their words' hashes
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alma_jax.corpus import words

WORDS = 1 << 20  # words that are compared together; every distinct one needs a code point of its own


def rouge_l(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
  """float64 [n]: ROUGE-L F1 of the texts of two lists, pair by pair; 0 where neither has words."""
  hashes, offsets = words.hashes([*left, *right])
  rows = np.arange(2 * len(left))
  return of_pairs(lambda rows: words.taken(hashes, offsets, rows), rows[: len(left)], rows[len(left) :])


def of_pairs(
  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], left: np.ndarray, right: np.ndarray
) -> np.ndarray:
  """float64 [n]: ROUGE-L F1 of pairs of rows. `read` gives the words' hashes and the offsets of rows that ascend."""
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
