"""Words of texts, as strings or as hashes of many texts at once; near-duplicates and contamination count in them.

  split("a man a plan")                        # ["a", "man", "a", "plan"]
  found, offsets = hashes(texts)               # text i holds found[offsets[i] : offsets[i + 1]]

Texts come normalised (`corpus.normalise.normalised`), and words stand between blanks. A character of a script that is
written without blanks (Thai, Lao, Burmese, Khmer, Han, kana) is a word. Two words with the same 64-bit hash are equal,
but for one pair in 10^19. NumPy hashes a text of 17 words in about one microsecond.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

_WITHOUT_BLANKS = np.array(
  [0xE00, 0xF00, 0x1000, 0x10A0, 0x1780, 0x1800, 0x2E80, 0xA000, 0xF900, 0xFB00, 0x20000, 0x40000], np.uint32
)  # where the scripts without blanks begin and end
_RANGES = "".join(f"{chr(a)}-{chr(b - 1)}" for a, b in _WITHOUT_BLANKS.reshape(-1, 2).tolist())
_WORD = re.compile(f"[{_RANGES}]|[^\0- {_RANGES}]+")
_CODES = 1 << 16  # code points hashed together: their arrays fit into a core's cache
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_MIX = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], np.uint64)


def split(text: str) -> list[str]:
  return _WORD.findall(text)


def hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """The uint64 hashes [words] of all words, and the int64 offsets [texts + 1] where each text's words begin."""
  found, size = [(np.empty(0, np.uint64), np.zeros(1, np.int64))], 0
  block: list[str] = []
  for at, text in enumerate(texts, 1):
    block.append(text)
    size += len(text) + 1
    if size >= _CODES or at == len(texts):
      found.append(_of_block(block))
      block, size = [], 0
  values, counts = map(np.concatenate, zip(*found, strict=True))
  return values, np.cumsum(counts)


def taken(hashes: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The hashes and offsets of the texts in these rows alone."""
  lengths = offsets[rows + 1] - offsets[rows]
  ends = np.cumsum(lengths)
  return hashes[np.arange(lengths.sum()) + np.repeat(offsets[rows] - (ends - lengths), lengths)], np.append(0, ends)


def mixed(values: np.ndarray) -> np.ndarray:
  """The uint64 numbers, changed in place so that every bit depends on all of theirs (the end of MurmurHash3)."""
  for factor in _MIX:
    values ^= values >> 33
    values *= factor
  values ^= values >> 33
  return values


def _of_block(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """The hashes of the texts' words, and how many words each text has."""
  # One array of code points for all texts; `opens` marks the first one of every word:
  #   "a man\nplan\n"  ->  inside  1 0 1 1 1 0 1 1 1 1 0
  #                         opens   1 0 1 0 0 0 1 0 0 0 0
  joined = "\n".join(texts) + "\n"
  if joined.isascii():
    codes = np.frombuffer(joined.encode(), np.uint8)
    inside = codes > 32
    opens = inside.copy()
    opens[1:] &= ~inside[:-1]
  else:
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    inside = codes > 32
    alone = np.searchsorted(_WITHOUT_BLANKS, codes, side="right") % 2 == 1
    opens = inside.copy()
    opens[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
  at = np.flatnonzero(opens)
  # A word's hash is the polynomial c0 + c1 B + c2 B^2 + ... of its characters modulo 2^64. For a word that begins at
  # place p, the same terms of one polynomial over the whole array are B^p times that: they are summed, then divided.
  powers, inverses = _powers(1 << len(codes).bit_length())
  terms = codes.astype(np.uint64)
  terms *= inside
  terms *= powers[: len(terms)]
  values = np.add.reduceat(terms, at) if len(at) else terms[:0]
  values *= inverses[at]
  ends = np.cumsum([len(text) + 1 for text in texts])
  return mixed(values), np.diff(np.searchsorted(at, ends), prepend=0)


@functools.lru_cache(maxsize=2)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
  """The first n powers of _BASE and of its inverse, both uint64 [n], modulo 2^64."""
  powers, inverses = (np.cumprod(np.append(np.uint64(1), np.full(n - 1, base))) for base in (_BASE, _INVERSE))
  return powers, inverses
