"""Diversity: the pool's clusters, and each round's draw of prompts that no round has used before.

The pool is embedded with the base model's hidden states and clustered once. A round draws K clusters and from each one
prompt that is still unused; with fewer than K clusters left, clusters give a second prompt, and so on. The ledger of
what is used is nothing but the earlier rounds' own prompt files.
"""

import collections

import jax
import numpy as np

from alma_jax.engine import embed, kmeans
from alma_jax.session.session import key_of
from alma_jax.store import shards
from alma_jax.store.records import Prompt
from alma_jax.store.runs import RunError
from alma_jax.text import chat


def build(session, pool, c):
  """The finished stage `pool/clusters`: the pool's prompts with their clusters."""
  embedded = _embeddings(session, pool, c)
  fields = {"config": {"seed": c.seed, "clusters": c.clusters.to_dict()}}
  stage = session.run.stage("pool/clusters", fields, {"prompts": pool, "embeddings": embedded})
  if stage.done:
    return stage
  if stage.mine(1):
    prompts = pool.read(Prompt)
    if not prompts:
      raise RunError("the pool is empty: every drafted prompt was dropped; see pool/drafts/manifest.json for why")
    points = np.concatenate([shards.load_array(embedded.dir / name) for name in sorted(embedded.manifest["files"])])
    k = min(c.clusters.k, len(prompts))
    with session.bar("pool: k-means", c.clusters.iterations, "iterations") as bar:
      key = jax.random.key(key_of(c.seed, "k-means")[0])
      labels, centroids, report = kmeans.kmeans(embed.whitened(points), k, key, c.clusters.iterations, bar.update)
    records = [Prompt(p.id, p.messages, p.source, int(label)) for p, label in zip(prompts, labels)]
    stage.write_part(0, 1, records, Prompt)
    shards.save_array(stage.dir / "centroids.npy", centroids)
    shards.write_json(stage.dir / "report.json", report)
  stage.finish(files=["centroids.npy", "report.json"])
  return stage


def _embeddings(session, pool, c):
  """Stage `pool/embeddings`: one .npy per share of the pool, rows in the pool's order."""
  fields = {"base": session.base.content, "text": session.describe_text(), "dtype": session.dtype}
  stage = session.run.stage("pool/embeddings", fields, {"prompts": pool})
  if stage.done:
    return stage
  prompts = pool.read(Prompt)
  names = [f"rows-{part:05d}-of-{c.shards:05d}.npy" for part in range(c.shards)]
  bounds = np.linspace(0, len(prompts), c.shards + 1).astype(int)
  mine = [i for i in range(c.shards) if i % session.run.hosts == session.run.host]
  missing = [i for i in mine if not (stage.dir / names[i]).exists()]
  with session.bar("pool: embeddings", sum(int(bounds[i + 1] - bounds[i]) for i in missing), "prompts") as bar:
    for part in missing:
      rows = [
        chat.encode_prompt(session.tokenizer, session.chat, p.messages)[: c.prompts.max_prompt_tokens]
        for p in prompts[bounds[part] : bounds[part + 1]]
      ]
      model = session.model(session.base, "stacked")
      vectors = embed.embeddings(model, rows, c.engine.rows, session.local_mesh, bar.update)
      shards.save_array(stage.dir / names[part], vectors.astype(np.float16))
  stage.finish(files=names)
  return stage


def draw(session, round, pool, earlier, c):
  """The finished stage `round_RR/prompts`; `earlier` are the prompt stages of the rounds before."""
  fields = {"config": {"seed": c.seed, "draw": c.draw.to_dict()}, "round": round}
  inputs = {"pool": pool, **{stage.name: stage for stage in earlier}}
  stage = session.run.stage(f"round_{round:02d}/prompts", fields, inputs)
  if stage.done:
    return stage
  if stage.mine(1):
    used = {p.id for stage in earlier for p in stage.read(Prompt)}
    chosen = drawn(pool.read(Prompt), used, c.draw.prompts, c.draw.method, (c.seed, round))
    clusters = len({p.cluster for p in chosen})
    stage.write_part(0, 1, chosen, Prompt, {"used_before": len(used), "clusters_drawn": clusters})
  stage.finish()
  return stage


def drawn(prompts, used, k, method, words):
  """k unused prompts. "diverse": one from each of k random clusters, then a second from each, ...; "random": any."""
  unused = [p for p in prompts if p.id not in used]
  if len(unused) < k:
    raise RunError(
      f"round {words[1]} draws {k} prompts, but of the pool's {len(prompts)} only {len(unused)} are unused; set a"
      " larger prompts.draws (the pool is then made again, in a new --workdir) or a smaller draw.prompts"
    )
  # Every prompt and every cluster has its own random number, so that order in the file plays no part.
  rank = {p.id: key_of(*words, p.id) for p in unused}
  if method == "random":
    return sorted(unused, key=lambda p: rank[p.id])[:k]
  clusters = collections.defaultdict(list)
  for prompt in sorted(unused, key=lambda p: rank[p.id]):
    clusters[prompt.cluster].append(prompt)
  order = sorted(clusters, key=lambda cluster: key_of(*words, "cluster", cluster))
  chosen, turn = [], 0
  while len(chosen) < k:
    chosen += [clusters[cluster][turn] for cluster in order if len(clusters[cluster]) > turn][: k - len(chosen)]
    turn += 1
  return chosen
