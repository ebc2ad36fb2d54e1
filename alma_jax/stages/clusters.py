"""Diversity: the pool's clusters, from which every round draws (stages/draw.py).

The pool is embedded with the base model's hidden states and clustered once; prompts that are added later go to the
nearest of the same clusters. At a hundred million prompts there are texts in parts, embeddings in memory-mapped 16-bit
shards, and the 12 bytes of a prompt that a draw reads.
"""

import dataclasses
import time

import numpy as np

from alma_jax.corpus import draw as engine
from alma_jax.engine import embed, kmeans
from alma_jax.errors import RunError
from alma_jax.keys import key_of
from alma_jax.store import shards
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Stage, rows_of
from alma_jax.text import chat

EVERY = 60.0  # seconds between two checkpoints of k-means
FEW = 39  # prompts per cluster; with fewer, centroids follow single prompts


@dataclasses.dataclass(frozen=True)
class Pool:
  """Prompts, and for each of them its cluster; the first pool's centroids are everybody's."""

  prompts: Stage
  projection: Stage
  clusters: Stage


def build(session, prompts, c):
  """The Pool of these prompts, with the finished stages `pool/projection`, `pool/embeddings`, `pool/clusters`."""
  if not prompts.manifest["rows"]:
    raise RunError("the pool is empty: every drafted prompt was dropped; see pool/drafts/manifest.json for why")
  projection = _projection(session, prompts, c)
  embedded = _embeddings(session, prompts, projection, c)
  fields = {"config": {"seed": c.seed, "clusters": c.clusters.to_dict()}}
  stage = session.run.stage("pool/clusters", fields, {"prompts": prompts, "embeddings": embedded})
  if not stage.done:
    points = _points(embedded)
    k = min(c.clusters.k, len(points))
    if len(points) < FEW * k:
      session.run.log("few prompts per cluster", prompts=len(points), clusters=k)
    options = {name: value for name, value in c.clusters.to_dict().items() if name != "k"}
    found = _fitted(session, stage, points, kmeans.Settings(k, **options), key_of(c.seed, "k-means"))
    _finish(session, stage, prompts, found.labels, found)
  return Pool(prompts, projection, stage)


def added(session, prompts, first, c):
  """The Pool of prompts that were added to the Pool `first`, in its clusters."""
  name = prompts.name.partition("/")[0]
  embedded = _embeddings(session, prompts, first.projection, c)
  inputs = {"prompts": prompts, "embeddings": embedded, "first": first.clusters}
  stage = session.run.stage(f"{name}/clusters", {"config": {"spherical": c.clusters.spherical}}, inputs)
  if not stage.done:
    centroids = shards.load_array(first.clusters.dir / "centroids.npy")
    _finish(session, stage, prompts, _nearest(_points(embedded), centroids, c))
  return Pool(prompts, first.projection, stage)


def _projection(session, prompts, c):
  """Stage `pool/projection`: how hidden states become points, from a sample of the pool."""
  options, name = c.embeddings, "pool/projection"
  stage = session.run.stage(name, _fields(session, c) | {"seed": c.seed}, {"prompts": prompts})
  if stage.done:
    return stage
  if stage.mine(1):
    n = prompts.manifest["rows"]
    rows = np.sort(np.argsort(engine.hashed(c.seed, engine.SAMPLE, np.arange(n)), kind="stable")[: options.sample])
    with session.bar("pool: sample of embeddings", len(rows), "prompts") as bar:
      states = _embedded(session, rows_of(prompts, Prompt, rows), c, None, bar.update)
    found, kept = embed.projection(states, options.dims)
    shards.save_array(stage.dir / "mean.npy", found.mean)
    shards.save_array(stage.dir / "matrix.npy", found.matrix)
    facts = {"sample": len(rows), "dimensions": found.matrix.shape[1], "variance_kept": kept}
    stage.write_part(0, 1, [], Prompt, facts)
  stage.finish(files=["mean.npy", "matrix.npy"])
  return stage


def _embeddings(session, prompts, projection, c):
  """Stage `NAME/embeddings`: one .npy for each part of the prompts, rows in its order, 16 bits."""
  name = f"{prompts.name.partition('/')[0]}/embeddings"
  stage = session.run.stage(name, _fields(session, c), {"prompts": prompts, "projection": projection})
  if stage.done:
    return stage
  names = [f"rows-{part:05d}-of-{prompts.parts:05d}.npy" for part in range(prompts.parts)]
  rows = [part["rows"] for part in prompts.manifest["parts"]]
  mine = range(session.run.process, prompts.parts, session.run.processes)
  missing = [i for i in mine if not (stage.dir / names[i]).exists()]
  how = embed.Projection(*(np.array(shards.load_array(projection.dir / f"{x}.npy")) for x in ("mean", "matrix")))
  with session.bar("pool: embeddings", sum(rows[i] for i in missing), "prompts") as bar:
    for part in missing:
      found = _embedded(session, prompts.read(Prompt, part), c, how, bar.update)
      shards.save_array(stage.dir / names[part], found.astype(np.float16))
      stage.beat()
  stage.finish(files=names)
  return stage


def _fields(session, c):
  return {
    "config": {"embeddings": c.embeddings.to_dict(), "max_prompt_tokens": c.prompts.max_prompt_tokens},
    "base": session.base.content,
    "text": session.describe_text(),
    "dtype": session.dtype,
  }


def _embedded(session, prompts, c, projection, progress):
  longest = c.prompts.max_prompt_tokens
  rows = [chat.encode_prompt(session.tokenizer, session.chat, p.messages)[:longest] for p in prompts]
  model, layers = session.model(session.base, embed.layout()), c.embeddings.layers or None
  how = layers, c.embeddings.pooling, projection
  return embed.embeddings(model, rows, c.engine.rows, session.local_mesh, progress, *how)


def _points(embedded):
  return embed.Rows(tuple(shards.load_array(embedded.dir / name) for name in sorted(embedded.manifest["files"])))


def _fitted(session, stage, points, settings, key):
  """The Clustering by all hosts together; what a killed start has saved of it counts."""
  path, saved = stage.dir / "iteration.npz", None
  if path.exists():
    with np.load(path, allow_pickle=False) as file:
      saved = int(file["step"]), {name: file[name] for name in file.files if name != "step"}
  session.run.barrier(f"{stage.name}: begun")  # all have read the same
  last = time.monotonic()

  def save(step, arrays):
    nonlocal last
    if session.run.process == 0 and time.monotonic() - last >= EVERY:
      with shards.atomic(path) as file:
        np.savez(file, step=step, **arrays)
      stage.beat()
      last = time.monotonic()

  mesh = kmeans.mesh_for(settings.k, points.shape[1])
  with session.bar("pool: k-means", settings.steps, "iterations", done=saved[0] if saved else 0) as bar:
    return kmeans.fit(points, settings, key, mesh, progress=bar.update, save=save, restore=lambda: saved)


def _nearest(points, centroids, c):
  """int32 [n]: the nearest of the centroids for each point, of which there may be few or none."""
  n, k = len(points), len(centroids)
  if not n:
    return np.zeros(0, np.int32)
  if n < k:  # k-means has at least one point for each cluster
    points = embed.Rows((*points.arrays, np.zeros((k - n, points.shape[1]), np.float16)))
  settings = kmeans.Settings(k, iterations=0, spherical=c.clusters.spherical)
  key, mesh = key_of(c.seed, "k-means"), kmeans.mesh_for(*centroids.shape)
  return kmeans.fit(points, settings, key, mesh, restore=kmeans.starting_at(centroids)).labels[:n]


def _finish(session, stage, prompts, labels, clustering=None):
  """What was added to a pool has no `clustering` of its own."""
  if session.run.process == 0:
    ids = shards.read_ids([prompts.part_path(part, prompts.parts) for part in range(prompts.parts)])
    shards.save_array(stage.dir / "labels.npy", labels)
    shards.save_array(stage.dir / "ids.npy", ids)
    if clustering:
      shards.save_array(stage.dir / "centroids.npy", clustering.centroids)
      shards.write_json(stage.dir / "report.json", clustering.report)
    (stage.dir / "iteration.npz").unlink(missing_ok=True)
  facts = {name: x for name, x in clustering.report.items() if not isinstance(x, list)} if clustering else {}
  stage.finish(facts, ["labels.npy", "ids.npy", *(["centroids.npy", "report.json"] if clustering else [])])
