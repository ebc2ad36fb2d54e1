"""The records that flow from stage to stage; the same names in files, code and reports.

A record is a plain frozen dataclass. `store.shards.schema` turns its annotations into a Parquet schema, so
every artefact opens with pandas, duckdb or anything else that reads Parquet. A float may be None: it was
not measured. A prompt's `id` is `corpus.normalise.prompt_id` of its messages.
"""

import dataclasses

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
