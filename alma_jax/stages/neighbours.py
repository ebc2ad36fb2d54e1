"""Neighbours: the pairs after which each prompt is answered, the nearest ones of all so far (ISARA).

Questions are embedded with the base model's hidden states; the cosine decides, exactly. The nearest pair comes last, so
that it stands right before the prompt; equal cosines go to the lower id. `method="random"` is the ablation.

  pool         a: capital of france ?    b: bake a cake    c: capital of spain ?      shots = 2
  prompt       capital of italy ?        cosines  a .91  b .12  c .93                 -> shown: a c

A pool is a few thousand pairs at most: every host embeds all of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.engine import embed
from alma_jax.errors import NotFinite, RunError
from alma_jax.keys import random_numbers
from alma_jax.options import Checked, fingerprint, option
from alma_jax.runtime import clustering
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Example, Neighbours, Prompt
from alma_jax.store.runs import Artefact
from alma_jax.text import chat

DIGITS = 6  # of a cosine that count: how a batch is cut to size changes later ones


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  method: Literal["knn", "random"] = "knn"
  shots: int = option(5, least=1)  # C
  layers: int = option(0, least=0)  # of the base model; 0: all
  pooling: Literal["mean", "last"] = "mean"  # "last": the last token's state
  centred: bool = True  # states minus the pool's mean, over its deviations: raw states have a large part in common


def build(
  s: Session[Any], asked: Artefact[Prompt], pool: Sequence[Trainset], options: Options, max_tokens: int
) -> Artefact[Neighbours]:
  """The round's `neighbours` of the prompts `asked`, a part per share. Questions are embedded up to `max_tokens`."""
  seed, shares = s.options.seed, s.options.shards
  fields: dict[str, Any] = {"config": {"neighbours": fingerprint(options), "shards": shares}}
  if options.method == "random":
    fields["config"] |= {"seed": seed, "round": s.round}
  else:
    fields |= {"base": s.base.content, "text": s.describe_text(), "dtype": s.host.dtype, "max_tokens": max_tokens}
  stage = s.stage(layout.NEIGHBOURS, fields, {"prompts": asked, **{pairs.name: pairs for pairs in pool}})
  if stage.done:
    return Artefact(stage, Neighbours)
  pairs = [x for of in pool for x in of.in_order(Example)]
  if not pairs:
    raise RunError(f"{stage.name}: the pool holds no pair that could be shown")
  prompts, missing = asked.read(), stage.mine(shares)
  knn = options.method == "knn" and bool(missing)
  total = sum(len(prompts[share::shares]) for share in missing)
  with s.display.bar(stage.name, total + knn * len(pairs), "questions") as bar:
    states = _states(s, pairs, options, max_tokens, bar.update) if knn else None
    for share in missing:
      mine = prompts[share::shares]
      if states is None:
        found = _random(s, mine, len(pairs), options.shots)
      else:
        own = _states(s, mine, options, max_tokens, bar.update)
        near, cosines = nearest(*_points(states, own, options.centred), options.shots, [x.prompt_id for x in pairs])
        found = [
          Neighbours(prompt.id, tuple(shots), tuple(values))
          for prompt, shots, values in zip(mine, near.tolist(), cosines.tolist(), strict=True)
        ]
      nearness = sum(x.similarities[-1] for x in found if x.similarities)
      stage.write_part(share, shares, found, Neighbours, {"prompts": len(found), "nearest_sum": nearness})
  stage.finish(pool=len(pairs))
  return Artefact(stage, Neighbours)


def nearest(pool: np.ndarray, of: np.ndarray, k: int, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """[m, k] the rows of `pool` [n, D] with the largest cosine to each row of `of` [m, D], the largest last, and these
  cosines. Equal ones go to the lower of the pool's `ids`. A pool of fewer than k rows gives them all."""
  k = min(k, len(pool))
  rank = np.argsort(np.argsort(ids, kind="stable"), kind="stable")
  rows, cosines = np.empty((len(of), k), np.int64), np.empty((len(of), k))
  unit = _unit(pool)
  for block in clustering.blocks(len(of), len(pool)):
    found = np.round(_unit(of[block]) @ unit.T, DIGITS)
    first = np.lexsort((np.broadcast_to(rank, found.shape), -found), axis=-1)[:, :k][:, ::-1]
    rows[block], cosines[block] = first, np.take_along_axis(found, first, axis=1)
  return rows, cosines


def _unit(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _points(pool: np.ndarray, of: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
  """The states of the pool and of the prompts, centred and scaled by those of the pool."""
  if not centred or len(pool) < 2:
    return pool, of
  mean, scale = pool.mean(axis=0, dtype=np.float64), embed.floored(pool.std(axis=0, dtype=np.float64))
  return (pool - mean) / scale, (of - mean) / scale


def _states(
  s: Session[Any],
  of: Sequence[Prompt] | Sequence[Example],
  options: Options,
  max_tokens: int,
  progress: Callable[[int], object],
) -> np.ndarray:
  """fp32 [n, D]: the hidden states of the questions."""
  host = s.host
  rows = [chat.encode_prompt(host.tokenizer, host.chat, x.messages)[:max_tokens] for x in of]
  try:
    return clustering.embedded(host, s.base, rows, embed.Embedding(options.layers or None, options.pooling), progress)
  except NotFinite as error:
    raise s.base.gave(error, f"question {error.item + 1} of {len(rows)}") from None


def _random(s: Session[Any], prompts: Sequence[Prompt], n: int, k: int) -> list[Neighbours]:
  """Pairs at random, of which each prompt has its own."""

  def drawn(prompt: Prompt) -> tuple[int, ...]:
    random = random_numbers(s.options.seed, s.round, "shots", prompt.id)
    return tuple(random.choice(n, min(k, n), replace=False).tolist())

  return [Neighbours(prompt.id, drawn(prompt), ()) for prompt in prompts]
