"""The prompts of a round: its own part of the user's prompts, disjoint from those of all other rounds.

The prompts lie in one order that follows from the seed; the first part is round 2's, the next round 3's, and so on.
"""

import dataclasses
import itertools
from typing import Any

from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import RunError
from alma_jax.keys import key_of
from alma_jax.options import Checked, option, refuse
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.handles import Data
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  parts: tuple[int, ...] = option(least=1)  # prompts of round 2, 3, ...; later rounds take as many as the last one

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.parts:
      refuse("parts", self.parts, "must name how many prompts a round has")

  def size(self, round: int) -> int:
    return self.parts[min(round - 2, len(self.parts) - 1)]

  def needed(self, last: int) -> int:
    """The prompts of all rounds up to the last one."""
    return sum(self.size(round) for round in range(2, last + 1))


def check(data: Data, options: Options, last: int) -> None:
  """Raise a RunError if there are fewer prompts than the rounds up to the last one take."""
  for round in range(2, last + 1):
    if options.needed(round) > len(data.prompts):
      raise RunError(
        f"round {round} takes the prompts {options.needed(round - 1):,} .. {options.needed(round):,} of data.prompts,"
        f" which has {len(data.prompts):,} that are no seed and no evaluation prompt: give more prompts, smaller parts"
        " (config.split.parts) or fewer rounds (config.feedback_rounds)"
      )


def build(s: Session[Any], data: Data, options: Options) -> Artefact[Prompt]:
  """The round's `prompts`."""
  begin, end = options.needed(s.round - 1), options.needed(s.round)
  fields = {"config": {"seed": s.options.seed, "part": (begin, end)}, "round": s.round}
  stage = s.stage(layout.PROMPTS, fields | {"data": {"prompts": data.digests["prompts"]}})
  if stage.done:
    return Artefact(stage, Prompt)
  if stage.mine(1):
    prompts = [Prompt(prompt_id(row.messages), row.messages, "data.prompts") for row in data.prompts]
    prompts.sort(key=lambda prompt: key_of(s.options.seed, "split", prompt.id))
    stage.write_part(0, 1, list(itertools.islice(prompts, begin, end)), Prompt)
  stage.finish()
  return Artefact(stage, Prompt)
