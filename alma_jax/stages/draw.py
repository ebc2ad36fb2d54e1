"""A round's draw: prompts that no round has used before, from as many clusters as there are prompts to draw.

The ledger of what is used is nothing but the earlier rounds' own files.
"""

import dataclasses

import numpy as np

from alma_jax.corpus import draw as rounds_draw
from alma_jax.errors import RunError
from alma_jax.store import shards
from alma_jax.store.records import Prompt
from alma_jax.store.runs import rows_of


def build(session, round, pools, earlier, c):
  """The finished stage `round_RR/prompts`; `earlier` are the prompt stages of the rounds before."""
  fields = {"config": {"seed": c.seed, "draw": c.draw.to_dict()}, "round": round}
  inputs = {stage.name: stage for pool in pools for stage in (pool.prompts, pool.clusters)}
  stage = session.run.stage(f"round_{round:02d}/prompts", fields, inputs | {stage.name: stage for stage in earlier})
  if stage.done:
    return stage
  if stage.mine(1):
    stored = lambda x: _joined([shards.load_array(pool.clusters.dir / f"{x}.npy") for pool in pools])
    labels, ids = stored("labels"), stored("ids")
    used = _joined([shards.load_array(stage.dir / "rows.npy") for stage in earlier] or [np.zeros(0, np.int64)])
    rows = drawn(labels, ids, used, c.draw, c.seed, round)
    chosen = [
      dataclasses.replace(prompt, cluster=int(labels[row]))
      for prompt, row in zip(_prompts_of(pools, rows), rows.tolist())
    ]
    shards.save_array(stage.dir / "rows.npy", rows)
    counts = {"used_before": len(used), "clusters_drawn": len({p.cluster for p in chosen})}
    stage.write_part(0, 1, chosen, Prompt, counts)
  stage.finish(files=["rows.npy"])
  return stage


def drawn(labels, ids, used, options, seed, round):
  """The row numbers of the round's prompts: none of the `used` ones; corpus/draw.py says which."""
  k = options.prompts
  try:
    queues = rounds_draw.build(labels, ids, seed)
    return rounds_draw.draw(queues, used, k, round, options.method, options.coverage)
  except rounds_draw.Exhausted as error:
    knob, more = "judge.distil.prompts", "a larger prompts.draws in a new --workdir"
    if round > 1:
      override = f"{{{round}: {{'prompts': {{'draws': NUMBER}}}}}}"
      knob, more = (
        "draw.prompts",
        f'more prompts from this round on: --config.rounds="{override}", in all rounds together',
      )
    raise RunError(
      f"round {round} draws {k} prompts, but of the pool's {len(labels)} only {error.left} are unused. What helps: a"
      f" smaller {knob}, or {more} (pool/drafts/manifest.json and pool/prompts/manifest.json say how many draws make"
      " how many prompts)"
    ) from None


def _joined(arrays):
  return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _prompts_of(pools, rows):
  """The prompts at these rows of all pools together, in their order."""
  ends = np.cumsum([pool.prompts.manifest["rows"] for pool in pools])
  found = [None] * len(rows)
  for pool, end in zip(pools, ends):
    at = np.flatnonzero((rows < end) & (rows >= end - pool.prompts.manifest["rows"]))
    for place, prompt in zip(at, rows_of(pool.prompts, Prompt, rows[at] - end + pool.prompts.manifest["rows"])):
      found[place] = prompt
  return found
