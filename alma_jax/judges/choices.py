"""Multiple choice by log-probability: which of a row's `choices` a model finds the likeliest answer to the prompt.

The response is not looked at: the model whose log-probabilities are read is the one that is graded.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from alma_jax.engine import score
from alma_jax.errors import NotFinite
from alma_jax.judges.contract import Answered, Scale, Verdict, name_of, row_field
from alma_jax.options import ConfigError
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.text import chat


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  """Score 1 where the choice with the largest log-probability, its stop token included, is the right one.

  `details` has all log-probabilities, the likeliest choice, and whether the one with the largest log-probability per
  character would have been right (`right_per_character`).
  """

  host: Host
  checkpoint: Checkpoint
  needs: tuple[str, ...] = ("choices", "answer")
  evaluates: bool = False  # the checkpoint whose answers are graded, which is another one every round

  def of(self, checkpoint: Checkpoint) -> "MultipleChoice":
    return dataclasses.replace(self, checkpoint=checkpoint, evaluates=True)

  @property
  def identity(self) -> str:
    if self.evaluates:
      return f"rules:multiple_choice 1 {self.host.chat.name} of the graded checkpoint"
    return f"rules:multiple_choice 1 {self.host.chat.name} {self.checkpoint.content[:16]}"

  @property
  def scale(self) -> Scale:
    return (0.0, 1.0)

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    tok, fmt, host = self.host.tokenizer, self.host.chat, self.host
    asked = [_choices(pair, name_of(pairs, i)) for i, pair in enumerate(pairs)]
    rows, owner = [], []
    for i, (pair, (choices, _)) in enumerate(zip(pairs, asked, strict=True)):
      prefix = chat.encode_prompt(tok, fmt, pair[0])
      for choice in choices:
        whole = chat.encode_example(tok, fmt, pair[0], choice)[0]
        rows.append((tuple(prefix), tuple(whole[len(prefix) :])))
        owner.append(i)
        if len(whole) > host.config.max_positions:
          raise ConfigError(
            f"{name_of(pairs, i)}: prompt and choice are {len(whole)} tokens; the model has"
            f" {host.config.max_positions} positions"
          )
    model = host.model(self.checkpoint, "stacked")
    try:
      logprobs = score.sequence_logprobs(model, rows, host.reading())
    except NotFinite as error:
      raise self.checkpoint.gave(error, f"{name_of(pairs, owner[error.item])}, a choice") from None
    ends = np.cumsum([0, *(len(choices) for choices, _ in asked)])
    return [
      _verdict(choices, right, logprobs[a:b])
      for (choices, right), (a, b) in zip(asked, itertools.pairwise(ends), strict=True)
    ]


def _choices(pair: Answered, name: str) -> tuple[list[str], int]:
  """The choices of the pair's row, and the place of the right one: `answer` is that place from 0, or the text."""
  choices = row_field(pair, name, "rules:multiple_choice", "choices")
  right = row_field(pair, name, "rules:multiple_choice", "answer")
  texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices)
  if not texts or len(set(choices)) < len(choices):
    raise ConfigError(f"{name}: `choices` must be a list of two or more different texts, found {choices!r:.60}")
  if isinstance(right, str) and right in choices:
    return choices, choices.index(right)
  if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
    raise ConfigError(
      f"{name}: `answer` must be one of the choices, or its number from 0 to {len(choices) - 1}, found {right!r:.60}"
    )
  return choices, right


def _verdict(choices: Sequence[str], right: int, logprobs: np.ndarray) -> Verdict:
  per_character = logprobs / [len(choice) for choice in choices]
  details = {
    "picked": int(np.argmax(logprobs)),
    "right_per_character": bool(np.argmax(per_character) == right),
    "logprobs": [float(x) for x in logprobs],
  }
  return Verdict(float(np.argmax(logprobs) == right), details=details)
