"""The normalised form of texts, by which two of them count as one prompt, and the id that follows from it.

`prompt_id` is the identity of a prompt everywhere, so the same request typed twice is one prompt.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence


class _Blanks(dict[int, str]):
  """A table for str.translate: quotes, sentence marks and control characters become blanks. It grows as they occur."""

  def __missing__(self, code: int) -> str:
    ch = chr(code)
    dropped = ch in ".,;:!?\"'`()[]{}…" or unicodedata.category(ch) in ("Pi", "Pf", "Cc", "Cf")
    return self.setdefault(code, " " if dropped else ch)


_BLANKS = _Blanks()


def normalised(text: str) -> str:
  """NFKC, case-folded, quotes and sentence marks dropped, white space collapsed: texts with equal results are one
  prompt. Signs that carry meaning ("C#", "6*7", "6/7") stay."""
  text = unicodedata.normalize("NFKC", text).casefold()
  words = " ".join(text.translate(_BLANKS).split())
  return words or " ".join(text.split())  # a prompt of nothing but punctuation keeps it


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
  """16 hex digits of the hash of the normalised conversation."""
  text = "\n".join(f"{m['role']}: {normalised(m['content'])}" for m in messages)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
