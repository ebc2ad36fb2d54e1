"""Pairs without a judge (ISARA): the human ones that a run begins with, and those of the model's own that are kept.

An answer is kept if it ended properly, has a proper length, is not the question or an answer that it was shown, and is
not nearly one that was kept before it. report.json holds up to 20 of the dropped pairs for each reason.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alma_jax.corpus import rouge, words
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.keys import key_of
from alma_jax.options import Checked, ConfigError, fingerprint, option
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Example, Neighbours, Prompt, Response
from alma_jax.store.runs import Artefact, Stage
from alma_jax.text import fewshot

SHOWN = 20  # dropped pairs in the report, for each reason
TOGETHER = 2**17  # pairs of answers that are compared at once
KEPT = "kept"
HUMAN = "human"  # the source of a human pair


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  tokens: tuple[int, int] = (5, 512)  # the fewest and the most of an answer
  similarity: float = option(0.7, least=0, most=1)  # ROUGE-L to a kept answer from which one is dropped; 0: if equal
  repeats: bool = False  # keep answers that repeat others, as refusals do

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 1 <= self.tokens[0] <= self.tokens[1]:
      raise ConfigError(f"tokens is {self.tokens}; it must be the fewest and the most of an answer, at least (1, 1)")


def human(s: Session[Any], rows: Sequence[SeedRow], fields: Mapping[str, Any]) -> Trainset:
  """Stage `round_01/trainset` of these human pairs; `fields` say which rows they are."""
  shares = s.options.shards
  stage = s.stage(layout.TRAINSET, {"config": {"shards": shares}, **fields})
  if not stage.done:
    found = [
      Example(prompt_id(row.messages), row.messages, row.response or "", s.round, HUMAN, math.nan) for row in rows
    ]
    _write(s, stage, list(enumerate(found)), [{"kept": len(found[share::shares])} for share in range(shares)])
    stage.finish(files=["order.npy"])
  return Trainset(stage, Example)


@dataclasses.dataclass(frozen=True)
class Answered:
  """A round's questions, the pairs that each was answered after, and the answers."""

  asked: Artefact[Prompt]
  chosen: Artefact[Neighbours]
  answers: Artefact[Response]
  generated: int  # questions that were generated for them


def build(s: Session[Any], found: Answered, pool: Sequence[Trainset], options: Options) -> Trainset:
  """The round's `trainset` of the pairs that are kept; `pool` holds all pairs before them."""
  shares = s.options.shards
  fields = {"config": {"pairs": fingerprint(options), "shards": shares, "generated": found.generated}}
  inputs = {"prompts": found.asked, "shots": found.chosen, "responses": found.answers}
  stage = s.stage(layout.TRAINSET, fields, inputs | {pairs.name: pairs for pairs in pool})
  if stage.done:
    return Trainset(stage, Example)
  prompts, before = found.asked.read(), [x for pairs in pool for x in pairs.in_order(Example)]
  shots = {x.prompt_id: [before[i].response for i in x.shots] for x in found.chosen.read()}
  by_prompt = {prompt.id: list[Response]() for prompt in prompts}
  for response in found.answers.read():
    by_prompt[response.prompt_id].append(response)
  candidates = [
    _Candidate(i, prompt, min(by_prompt[prompt.id], key=_sample_id, default=None), shots[prompt.id])
    for i, prompt in enumerate(prompts)
  ]
  reasons = _judged(candidates, [x.response for x in before], options)
  counts = [collections.Counter(why for why, _ in reasons[share::shares]) for share in range(shares)]
  kept = [(c.at, _example(c, s.round)) for c, (why, _) in zip(candidates, reasons, strict=True) if why == KEPT]
  _write(s, stage, kept, [{"asked": sum(of.values()), **of} for of in counts])
  if s.run.process == 0:
    shards.write_json(stage.dir / layout.REPORT, {"dropped": _dropped(candidates, reasons)})
  first = sum(x.source == HUMAN for x in before)
  share, growth = len(kept) / max(1, found.generated), (len(before) - first + len(kept)) / max(1, first)
  stage.finish(files=["order.npy", layout.REPORT], generated=found.generated, kept_share=share, growth=growth)
  return Trainset(stage, Example)


def _sample_id(response: Response) -> int:
  return response.sample_id


@dataclasses.dataclass(frozen=True)
class _Candidate:
  at: int  # among the round's prompts
  prompt: Prompt
  response: Response | None  # the first one; None for a prompt that found no room
  shots: Sequence[str]  # the answers that it was shown

  @property
  def text(self) -> str:
    return self.response.text if self.response else ""


def _example(c: _Candidate, round: int) -> Example:
  source = c.response.checkpoint if c.response else ""
  return Example(c.prompt.id, c.prompt.messages, c.text, round, source, math.nan)


def _alone(c: _Candidate, options: Options) -> str:
  """Why a pair is dropped whatever else there is, or KEPT."""
  if c.response is None:
    return "no_room"
  if not c.response.finished:
    return "cut_off"
  if not options.tokens[0] <= len(c.response.tokens) <= options.tokens[1] or not c.text.strip():
    return "length"
  said = normalised(c.text)
  if said == normalised(fewshot.last_user_turn(c.prompt.messages)):
    return "equals_question"
  return "copies_shot" if not options.repeats and said in map(normalised, c.shots) else KEPT


def _judged(candidates: Sequence[_Candidate], before: Sequence[str], options: Options) -> list[tuple[str, str]]:
  """For each candidate KEPT or why it is dropped, and the answer that it is nearly, if that is why. Earlier candidates
  come first: one that is dropped drops nothing."""
  found = [(_alone(c, options), "") for c in candidates]
  if options.repeats:
    return found
  alone = [i for i, (why, _) in enumerate(found) if why == KEPT]
  texts = [*before, *(candidates[i].text for i in alone)]
  near = similar([normalised(text) for text in texts], len(before), options.similarity)
  stays = np.ones(len(texts), bool)
  for row, i in enumerate(alone, start=len(before)):
    others = near[row - len(before)]
    others = others[stays[others]]
    if len(others):
      stays[row] = False
      found[i] = "near_answer", texts[others[0]]
  return found


def similar(texts: Sequence[str], first: int, similarity: float) -> list[np.ndarray]:
  """For each of the normalised texts from number `first` on, the earlier ones with at least this ROUGE-L, or, at 0,
  that equal it."""
  if not similarity:
    seen: dict[str, list[int]] = collections.defaultdict(list)
    found = []
    for i, text in enumerate(texts):
      if i >= first:
        found.append(np.array(seen[text], np.int64))
      seen[text].append(i)
    return found
  hashes, offsets = words.hashes(texts)

  def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return words.taken(hashes, offsets, rows)

  found, block = [], max(1, TOGETHER // max(1, len(texts)))
  for begin in range(first, len(texts), block):
    rows = range(begin, min(begin + block, len(texts)))
    left, right = np.repeat(rows, rows), np.concatenate([np.arange(i) for i in rows])
    near = rouge.of_pairs(read, left, right) >= similarity if len(left) else np.zeros(0, bool)
    ends = np.cumsum(rows)[:-1]
    found += [np.flatnonzero(part) for part in np.split(near, ends)]
  return found


def _write(
  s: Session[Any], stage: Stage, kept: Sequence[tuple[int, Example]], counts: Sequence[dict[str, int]]
) -> None:
  """The parts of the examples, which come with their places among the round's prompts, and order.npy."""
  shares = s.options.shards
  for share in stage.mine(shares):
    records = [x for at, x in kept if at % shares == share]
    stage.write_part(share, shares, records, Example, counts[share])
  s.run.barrier(f"{stage.name}: parts")
  if s.run.process == 0:
    by_part = [at for share in range(shares) for at, _ in kept if at % shares == share]
    shards.save_array(stage.dir / "order.npy", np.argsort(np.array(by_part, np.int64), kind="stable"))


def _dropped(candidates: Sequence[_Candidate], reasons: Sequence[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
  """Some of the dropped pairs for each reason."""
  found: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
  for c, (why, near) in zip(candidates, reasons, strict=True):
    if why != KEPT and len(found[why]) < SHOWN:
      row = {"question": fewshot.last_user_turn(c.prompt.messages), "answer": c.text}
      found[why].append(row | ({"near": near} if near else {}))
  return dict(found)


def drawn(rows: Sequence[SeedRow], most: int, seed: int) -> list[SeedRow]:
  """At most so many of the rows, in their order; 0: all."""
  if not most or len(rows) <= most:
    return list(rows)
  ids = [prompt_id(row.messages) for row in rows]
  chosen = sorted(range(len(rows)), key=lambda i: key_of(seed, "D_0", ids[i], i))[:most]
  return [rows[i] for i in sorted(chosen)]
