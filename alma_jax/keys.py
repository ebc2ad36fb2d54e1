"""Where every random number comes from: words such as (seed, round, stage, prompt id, sample id).

A sample or a draw is the same on every host, after every restart and in every batch, because its key follows from these
words alone.
"""

import hashlib

import numpy as np

Key = tuple[int, int]


def key_of(*words: object) -> Key:
  """Two 32-bit numbers that follow from the words alone, for a JAX key."""
  digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
  return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_numbers(*words: object) -> np.random.Generator:
  """A NumPy generator that follows from the words alone."""
  return np.random.default_rng(key_of(*words))
