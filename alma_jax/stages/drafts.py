"""Drafts: what the base model writes when it is shown a few of the demonstrations' prompts as a list.

Every draw shows 3 to 5 of them and lets the base model write the next item. What ended properly and is short enough is
a draft; stages/prompts.py decides which drafts enter the pool.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from alma_jax import names
from alma_jax.corpus import words
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.engine.sample import Request
from alma_jax.keys import key_of, random_numbers
from alma_jax.options import ConfigError, fingerprint, option
from alma_jax.runtime import sampling
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Example, Prompt
from alma_jax.store.runs import Artefact
from alma_jax.text import fewshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(sampling.Options):
  draws: int = option(least=1)  # of all rounds together; a larger number in a later round adds to the pool
  shots: tuple[int, int] = (3, 5)  # the fewest and the most prompts that a draw shows
  template: str = option("requests", names=names.LISTS)
  max_characters: int = option(4000, least=1)

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 1 <= self.shots[0] <= self.shots[1]:
      raise ConfigError(f"shots is {self.shots}; it must be the fewest and the most prompts shown, at least (1, 1)")


@dataclasses.dataclass(frozen=True)
class Growing:
  """Drafts of a round that are not the base model's, written after all pairs so far."""

  writer: Checkpoint
  shown: Sequence[Trainset]  # the pairs whose questions are shown
  words: tuple[int, int]  # the fewest and the most of a draft


def build(
  s: Session[Any], data: Data, options: Options, pool: str, first: int = 0, growing: Growing | None = None
) -> Artefact[Prompt]:
  """Stage `POOL/drafts` of the draws from `first` on, a part per share of them."""
  template = names.resolve(names.LISTS, options.template, "prompts.template")
  seed, parts = s.options.seed, s.options.shards
  fields: dict[str, Any] = {
    "config": {"seed": seed, "first": first, "prompts": fingerprint(options)},
    "text": {"few_shot": dataclasses.asdict(template), **s.describe_text()},
  }
  if growing:
    fields |= {"writer": growing.writer.content, "words": growing.words, "round": s.round}
    stage = s.run.stage(f"{pool}/{layout.DRAFTS}", fields, {pairs.name: pairs for pairs in growing.shown})
  else:
    fields |= {"data": {"sft": data.digests["sft"]}, "base": s.base.content}
    stage = s.run.stage(f"{pool}/{layout.DRAFTS}", fields)
  missing = stage.mine(parts)
  if stage.done:
    return Artefact(stage, Prompt)
  talks = [x.messages for pairs in growing.shown for x in pairs.in_order(Example)] if growing else None
  shown = list(dict.fromkeys(map(fewshot.first_user_turn, talks or [row.messages for row in data.sft])))
  writer, least_and_most = (growing.writer, growing.words) if growing else (s.base, None)
  tok = s.host.tokenizer
  stops = sampling.Stops(() if tok.eos_id is None else (tok.eos_id,), (template.stop,))
  round, drawn = (s.round, ("shots", s.round)) if growing else (0, ("shots",))
  shots = _shots(random_numbers(seed, *drawn), options.draws, len(shown), options.shots)
  # Neighbours in this order begin with the same shots, which the sampler then reads once.
  shares = np.array_split(first + np.lexsort(shots[first:].T[::-1]), parts)
  with s.display.bar("pool: prompts", sum(len(shares[i]) for i in missing), "prompts") as bar:
    for part in missing:
      requests, too_long = [], 0
      for draw in shares[part].tolist():
        ids = fewshot.few_shot_ids(tok, template, [{"prompt": shown[i]} for i in shots[draw] if i >= 0])
        if len(ids) > options.max_prompt_tokens:
          too_long += 1
        else:
          requests.append(Request(tuple(ids), key_of(seed, round, "prompts", draw), f"draft {draw}"))
      written = sampling.drafts(s.host, writer, requests, options, stops, bar)
      records, counts = [], collections.Counter(context_too_long=too_long)
      for draft in written:
        reason = _dropped(draft, options, least_and_most)
        counts[reason or "usable"] += 1
        if not reason:
          messages = ({"role": "user", "content": draft.text},)
          records.append(Prompt(prompt_id(messages), messages, "synthetic"))
      stage.write_part(part, parts, records, Prompt, {"draws": len(shares[part]), **counts})
  stage.finish()
  lost = {
    "context_too_long": f"draws have no room: their examples take more than {options.max_prompt_tokens:,} tokens",
    "cut_off": f"drafts are dropped: they are cut off at {options.decoding.max_new_tokens:,} tokens",
    "empty": "drafts are dropped: they are empty",
    "too_few_or_many_words": f"drafts are dropped: their number of words is not within {least_and_most}",
    "too_long": f"drafts are dropped: they have more than {options.max_characters:,} characters",
  }
  s.tell(stage.name, stage.manifest["counts"], stage.manifest["counts"]["draws"], lost)
  return Artefact(stage, Prompt)


def _dropped(draft: sampling.Draft, options: Options, least_and_most: tuple[int, int] | None) -> str | None:
  """Why a draft is left out, None if it is usable."""
  if not draft.finished:
    return "cut_off"
  if not draft.text:
    return "empty"
  if least_and_most:
    least, most = least_and_most
    if not least <= len(words.split(normalised(draft.text))) <= most:
      return "too_few_or_many_words"
  return "too_long" if len(draft.text) > options.max_characters else None


def _shots(random: np.random.Generator, draws: int, seeds: int, sizes: tuple[int, int]) -> np.ndarray:
  """[draws, most] seeds that each draw shows, different ones in random order, then -1.

  Each draw shows a number of seeds between the two of `sizes`. More draws leave the first ones unchanged.
  """
  least, most = (min(size, seeds) for size in sizes)
  numbers = random.random((draws, most + 1))
  shots = np.empty((draws, most), np.int64)
  for place in range(most):
    # Choose one of the seeds not shown yet by its rank among them: 0 .. seeds - place - 1. Every smaller seed that is
    # shown moves it up by one. With 0 and 3 shown, rank 2 is seed 4: past 0 it is 3, past 3 it is 4.
    shots[:, place] = numbers[:, place] * (seeds - place)
    for shown in np.sort(shots[:, :place], axis=1).T:
      shots[:, place] += shots[:, place] >= shown
  size = least + (numbers[:, most] * (most - least + 1)).astype(int)
  return np.where(np.arange(most) < size[:, None], shots, -1)
