"""A round's draw: prompts that no round has used before, from as many clusters as there are prompts to draw.

The ledger of what is used is nothing but the earlier rounds' own files. corpus/draw.py says which prompts are drawn.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.corpus import draw
from alma_jax.errors import RunError
from alma_jax.options import Checked, option
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.handles import Pool
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  prompts: int = option(least=1)  # K
  # "diverse": one prompt from each of K clusters; "random": any (Table 4); "proportional": by the clusters' sizes
  method: Literal["diverse", "random", "proportional"] = "diverse"
  # "round": every round draws from all clusters; "fresh": the clusters that gave least come first
  coverage: Literal["round", "fresh"] = "round"


def build(
  s: Session[Any], pools: Sequence[Pool], earlier: Sequence[Artefact[Prompt]], options: Options
) -> Artefact[Prompt]:
  """The round's `prompts`; `earlier` are those of the rounds before."""
  fields = {"config": {"seed": s.options.seed, "draw": dataclasses.asdict(options)}, "round": s.round}
  inputs = {stage.name: stage for pool in pools for stage in (pool.prompts, pool.clusters)}
  stage = s.stage(layout.PROMPTS, fields, inputs | {stage.name: stage for stage in earlier})
  if stage.done:
    return Artefact(stage, Prompt)
  if stage.mine(1):
    labels, ids = (_of_all(pools, name) for name in ("labels", "ids"))
    used = [shards.load_array(stage.dir / "rows.npy") for stage in earlier]
    used = np.concatenate(used) if used else np.zeros(0, np.int64)
    rows = drawn(draw.build(labels, ids, s.options.seed), used, options, s.round)
    chosen = [
      dataclasses.replace(prompt, cluster=int(labels[row]))
      for prompt, row in zip(_prompts_of(pools, rows), rows.tolist(), strict=True)
    ]
    shards.save_array(stage.dir / "rows.npy", rows)
    counts = {"used_before": len(used), "clusters_drawn": len({p.cluster for p in chosen})}
    stage.write_part(0, 1, chosen, Prompt, counts)
  stage.finish(files=["rows.npy"])
  return Artefact(stage, Prompt)


def drawn(queues: draw.Queues, used: np.ndarray, options: Options, round: int) -> np.ndarray:
  """The row numbers of the round's prompts, none of them `used`."""
  k = options.prompts
  try:
    return draw.draw(queues, used, k, round, options.method, options.coverage)
  except draw.Exhausted as error:
    knob, more = "judge.distil.prompts", "a larger prompts.draws in a new --workdir"
    if round > 1:
      override = f"{{{round}: {{'prompts': {{'draws': NUMBER}}}}}}"
      knob, more = (
        "draw.prompts",
        f'more prompts from this round on: --config.rounds="{override}", in all rounds together',
      )
    raise RunError(
      f"round {round} draws {k} prompts, but of the pool's {len(queues.labels)} only {error.left} are unused. What"
      f" helps: a smaller {knob}, or {more} (pool/drafts/manifest.json and pool/prompts/manifest.json say how many"
      " draws make how many prompts)"
    ) from None


def _of_all(pools: Sequence[Pool], name: str) -> np.ndarray:
  """An array of the pools' clusters, joined; the one of a single pool stays memory-mapped."""
  arrays = [shards.load_array(pool.clusters.dir / f"{name}.npy") for pool in pools]
  return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _prompts_of(pools: Sequence[Pool], rows: np.ndarray) -> list[Prompt]:
  """The prompts at these rows of all pools together, in their order."""
  found: list[Any] = [None] * len(rows)
  begin = 0
  for pool in pools:
    end = begin + pool.prompts.manifest["rows"]
    at = np.flatnonzero((rows >= begin) & (rows < end))
    for place, prompt in zip(at, pool.prompts.rows(rows[at] - begin), strict=True):
      found[place] = prompt
    begin = end
  return found
