"""The records that flow from stage to stage; the same names in files, code and reports.

A record is a plain frozen dataclass. `store.shards.schema` turns its annotations into a Parquet schema, so
every artefact opens with pandas, duckdb or anything else that reads Parquet. A prompt's `id` is
`corpus.normalise.prompt_id` of its messages.
"""

import dataclasses

FORMAT = 3  # goes up when a field changes meaning; part of every stage's fingerprint
VERSIONS = {1: "0.1", 2: "0.2 before its release", 3: "0.2"}  # format -> the alma_jax that writes it
Turns = tuple[dict[str, str], ...]  # {"role", "content"} each


@dataclasses.dataclass(frozen=True)
class Prompt:
  id: str
  messages: Turns
  source: str
  cluster: int = -1


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The pairs of a pool that a prompt is answered after, by number, as they are shown: the nearest one comes last."""

  prompt_id: str
  shots: tuple[int, ...]
  similarities: tuple[float, ...]  # cosines; none where the shots are random


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
  score: float  # in the judge's own unit
  probs: tuple[float, ...] | None  # normalised over the eleven scores; None for a judge without them
  mass: float | None  # raw probability that the model gave to the eleven scores together


@dataclasses.dataclass(frozen=True)
class HeldOut:
  prompt_id: str
  label: float  # the annotator's score
  score: float  # in the judge's own unit
  probs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Example:
  prompt_id: str
  messages: Turns
  response: str
  round: int
  source: str
  score: float


@dataclasses.dataclass(frozen=True)
class Pair:
  prompt_id: str
  messages: Turns
  chosen: str
  rejected: str
  chosen_score: float
  rejected_score: float
  round: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Two answers to a prompt, the better one first, as the judge that selects scores them."""

  prompt_id: str
  source: str  # who says which is better: "held_out" for people's pairs, else the gold judge
  margin: float  # the judge's score of the better answer minus that of the worse one
  gold: float  # the same by who says it; 1 for people


@dataclasses.dataclass(frozen=True)
class Graded:
  prompt_id: str
  messages: Turns
  sample_id: int
  response: str
  finished: bool
  score: float
  advantage: float  # over the other responses to the prompt, in their standard deviations
  round: int
  source: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """A checkpoint's answer to an evaluation prompt."""

  prompt_id: str
  messages: Turns
  response: str
  tokens: int
  finished: bool


@dataclasses.dataclass(frozen=True)
class Loss:
  """How likely a checkpoint finds a demonstration's answer."""

  prompt_id: str
  tokens: int  # supervised ones
  logprob: float  # their sum


@dataclasses.dataclass(frozen=True)
class EpochGrade:
  """How good a checkpoint's answers to a prompt are, by who chooses among the epochs."""

  epoch: int
  prompt_id: str
  value: float


@dataclasses.dataclass(frozen=True)
class Compared:
  """What a judge, or a person, says of two answers to one prompt."""

  prompt_id: str
  share: float | None  # of the win, of the checkpoint's answer: 1, 0.5 for a tie, 0; None without a verdict


@dataclasses.dataclass(frozen=True)
class Rated:
  """The level that an answer reaches, by number from the lowest."""

  prompt_id: str
  level: int | None  # None without a verdict


@dataclasses.dataclass(frozen=True)
class Grade:
  """What one judge gives an Answer."""

  prompt_id: str
  score: float | None  # None: the judge's own answer held no score
