"""The records that flow from stage to stage; the same names in files, code and reports.

A record is a plain frozen dataclass. `store.shards.schema` turns its annotations into a Parquet schema, so
every artefact opens with pandas, duckdb or anything else that reads Parquet. A float may be None: it was
not measured. `prompt_id` is the identity of a prompt everywhere: a hash of its normalised text, so the same
request typed twice is one prompt.
"""

import dataclasses
import hashlib
import unicodedata

FORMAT = 1  # goes up when a field changes meaning; part of every stage's fingerprint


@dataclasses.dataclass(frozen=True)
class Prompt:
  id: str
  messages: tuple[dict, ...]  # {"role", "content"} each
  source: str
  cluster: int = -1


@dataclasses.dataclass(frozen=True)
class Response:
  prompt_id: str
  sample_id: int
  checkpoint: str
  text: str
  tokens: tuple[int, ...]
  finished: bool  # ended with a stop token, not by the length limit
  logprob: float


@dataclasses.dataclass(frozen=True)
class Judgment:
  prompt_id: str
  sample_id: int
  score: float  # probability-weighted mean of 0..10, or what the scoring mode says
  probs: tuple[float, ...]  # normalised over the eleven scores
  mass: float  # raw probability that the model gave to the eleven scores together


@dataclasses.dataclass(frozen=True)
class Example:
  prompt_id: str
  messages: tuple[dict, ...]  # {"role", "content"} each
  response: str
  round: int
  source: str
  score: float


@dataclasses.dataclass(frozen=True)
class Pair:
  prompt_id: str
  messages: tuple[dict, ...]  # {"role", "content"} each
  chosen: str
  rejected: str
  chosen_score: float
  rejected_score: float
  round: int


@dataclasses.dataclass(frozen=True)
class Graded:
  prompt_id: str
  messages: tuple[dict, ...]
  sample_id: int
  response: str
  finished: bool
  score: float
  advantage: float  # over the other responses to the prompt, in their standard deviations
  round: int
  source: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
  prompt_id: str
  messages: tuple[dict, ...]
  response: str
  tokens: int
  finished: bool
  judge_score: float
  score: float  # of the evaluator; None where the judge is the only one


class _Blanks(dict):
  """For str.translate: quotes, sentence marks and control characters become blanks. Learnt as characters come up."""

  def __missing__(self, code):
    ch = chr(code)
    dropped = ch in ".,;:!?\"'`()[]{}…" or unicodedata.category(ch) in ("Pi", "Pf", "Cc", "Cf")
    return self.setdefault(code, " " if dropped else ch)


_BLANKS = _Blanks()


def normalised(text):
  """NFKC, case-folded, quotes and sentence marks dropped, white space collapsed: texts with equal results are one
  prompt. Signs that carry meaning ("C#", "6*7", "6/7") stay."""
  text = unicodedata.normalize("NFKC", text).casefold()
  words = " ".join(text.translate(_BLANKS).split())
  return words or " ".join(text.split())  # a prompt of nothing but punctuation keeps it


def prompt_id(messages):
  """16 hex digits of the hash of the normalised conversation."""
  text = "\n".join(f"{m['role']}: {normalised(m['content'])}" for m in messages)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
