"""Keys on which near-duplicates agree: bands of MinHash values, and what short texts share.

  hashes, offsets = words.hashes(texts)
  keys = band_keys(signatures(hashes, offsets))   # uint64 [BANDS, n]: two texts are compared if they agree in a band
  entries = shared_keys(hashes, offsets)          # uint64, sorted: further keys of the short ones, each with its row

A MinHash value is the least hash among a text's word bigrams. Two texts agree in one with the probability J, the
Jaccard similarity of their bigrams, and in at least one of 32 bands of 4 values with probability 1 - (1 - J^4)^32.
"""

import functools
import itertools
import math

import numpy as np

from alma_jax.corpus import words

PERMUTATIONS, BANDS = 128, 32
SHORT, LEFT_OUT = 10, 2  # texts of up to SHORT words are also found by what is left without up to LEFT_OUT of them
ROW_BITS = 28  # an entry is one number: the key's first 36 bits, then the text's row
ROW_MASK = np.uint64((1 << ROW_BITS) - 1)

TEXTS = 1024  # texts whose keys are made together: arrays that fit into a core's cache
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)


def signatures(hashes: np.ndarray, offsets: np.ndarray, seed: int = 0) -> np.ndarray:
  """uint32 [PERMUTATIONS, n]: the MinHash values of texts whose words have these hashes, all ones for fewer than two.

  All texts advance together, one bigram in each step, with the longest text first. Then every step works on the left
  columns of contiguous arrays. The texts "a b c d", "x y" and "p q r", with the bigrams ab bc cd, xy and pq qr:

    column       0   1   2      the texts by their number of bigrams
    step 0      ab  pq  xy      values = ab pq xy bc qr cd, starts = 0 3 5, widths = 3 2 1
    step 1      bc  qr
    step 2      cd
    least       the minimum of every column, for each of the permutations
  """
  lengths = np.diff(offsets)
  counts = np.maximum(lengths - 1, 0)
  # Bigrams of the one array of all words, without those across the end of a text.
  bigrams = hashes[:-1] * _ODD[0]
  bigrams += hashes[1:]
  inside = np.ones(len(hashes), bool)
  inside[offsets[1:][lengths > 0] - 1] = False
  bigrams = words.mixed(bigrams[inside[:-1]]).astype(np.uint32)
  # Each bigram moves to its step's place, and there to its text's column.
  order = np.argsort(-counts, kind="stable")
  column = np.empty_like(order)
  column[order] = np.arange(len(order))
  step = np.arange(len(bigrams)) - np.repeat(np.cumsum(counts) - counts, counts)
  widths = np.bincount(step)
  starts = np.cumsum(widths) - widths
  values = np.empty_like(bigrams)
  values[starts[step] + np.repeat(column, counts)] = bigrams
  # The running minimum of all permutations, step by step.
  factors, shifts = permutations(seed)
  least = np.full((PERMUTATIONS, len(counts)), 0xFFFFFFFF, np.uint32)
  work = np.empty_like(least)
  for start, width in zip(starts.tolist(), widths.tolist(), strict=True):
    hashed = np.multiply(values[start : start + width], factors, out=work[:, :width])
    hashed += shifts
    np.minimum(least[:, :width], hashed, out=least[:, :width])
  found = np.empty_like(least)
  found[:, order] = least
  return found


@functools.cache
def permutations(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """uint32 [PERMUTATIONS, 1] factors and shifts: x -> factor * x + shift is a permutation, since the factor is odd."""
  start = words.mixed(np.array([seed % 2**64], np.uint64))
  numbers = words.mixed(start + np.arange(PERMUTATIONS, dtype=np.uint64)[:, None] * _ODD[2])
  return (numbers >> 32).astype(np.uint32) | np.uint32(1), numbers.astype(np.uint32)


def band_keys(signatures: np.ndarray) -> np.ndarray:
  """uint64 [BANDS, n]: equal where all four values of a band are equal; every bit depends on all four.

  Band i holds the values 4 i to 4 i + 3 of a signature; a, b, c and d are the first to fourth values of all bands."""
  a, b, c, d = (signatures[i :: PERMUTATIONS // BANDS].astype(np.uint64) for i in range(4))
  keys = (a << 32 | b) * _ODD[1]
  keys ^= keys >> 32
  keys += c << 32 | d
  return words.mixed(keys)


def shared_keys(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
  """uint64, sorted: entries (key, row) of what remains of each text of 3 to SHORT words when up to LEFT_OUT of them are
  left out, as long as more than half remain.

  Two texts that are one or two words apart share such a remainder: "a b c" has keys for ab, ac, bc and abc, and meets
  "a x c" in ac."""
  lengths, found = np.diff(offsets), [np.empty(0, np.uint64)]
  for length in range(3, SHORT + 1):
    rows = np.flatnonzero(lengths == length)
    for start in range(0, len(rows), TEXTS):
      mine = rows[start : start + TEXTS]
      word = hashes[offsets[mine][:, None] + np.arange(length)]  # [texts, length]
      for left in range(max(length - LEFT_OUT, length // 2 + 1), length + 1):
        # A column for each choice of `left` words; all columns hash their first word, then their second one, ...
        keys = np.full((len(mine), math.comb(length, left)), left, np.uint64)
        for place in zip(*itertools.combinations(range(length), left), strict=True):
          keys = keys * _ODD[0] + word[:, place]
        found.append((words.mixed(keys) & ~ROW_MASK | mine[:, None].astype(np.uint64)).ravel())
  return np.unique(np.concatenate(found))
