"""People's preference pairs as a trainset, some of them held out to measure a judge."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.keys import key_of
from alma_jax.options import Checked, fingerprint, option
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Pair


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  held_out: int = option(200, least=0)  # prompts whose pairs are never trained on; at most a quarter of all prompts
  flipped: float = option(0.0, least=0, most=1)  # the share of the pairs that are turned round, to see what noise does


def held_out(data: Data, options: Options, seed: int) -> list[SeedRow]:
  """The pairs of the prompts that are held out, in their order."""
  ids = sorted({prompt_id(r.messages) for r in data.preferences}, key=lambda i: key_of(seed, "held out", i))
  held = set(ids[: min(options.held_out, len(ids) // 4)])
  return [r for r in data.preferences if prompt_id(r.messages) in held]


def build(s: Session[Any], data: Data, options: Options) -> Trainset:
  """The round's `trainset`: the pairs that are not held out. People's scores of them are 1 and 0."""
  fields = {
    "config": {"seed": s.options.seed, "seeds": fingerprint(options)},
    "round": s.round,
    "data": {"preferences": data.digests["preferences"]},
  }
  stage = s.stage(layout.TRAINSET, fields)
  if stage.done:
    return Trainset(stage, Pair)
  held = {id(row) for row in held_out(data, options, s.options.seed)}
  rows = [row for row in data.preferences if id(row) not in held]
  made, turned = _pairs(rows, s.round, options, s.options.seed)
  if stage.mine(1):
    counts = {"selected": len(made), "held_out": len(held), "flipped": turned}
    stage.write_part(0, 1, made, Pair, counts)
  if s.run.process == 0:
    shards.save_array(stage.dir / "order.npy", np.arange(len(made)))
  stage.finish(files=["order.npy"])
  return Trainset(stage, Pair)


def _pairs(rows: Sequence[SeedRow], round: int, options: Options, seed: int) -> tuple[list[Pair], int]:
  """The pairs of the rows, and how many of them are turned round: those that come first in an order of their own."""
  ids = [prompt_id(row.messages) for row in rows]
  texts = [(row.chosen or "", row.rejected or "") for row in rows]
  order = sorted(range(len(rows)), key=lambda i: key_of(seed, "flipped", ids[i], *texts[i]))
  turned = set(order[: int(options.flipped * len(rows) + 0.5)])
  pairs = []
  for i, (row, of) in enumerate(zip(rows, texts, strict=True)):
    chosen, rejected = of[::-1] if i in turned else of
    pairs.append(Pair(ids[i], row.messages, chosen, rejected, 1.0, 0.0, round))
  return pairs, len(turned)
