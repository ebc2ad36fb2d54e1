"""Diversity: the pool's clusters, from which every round draws (stages/draw.py).

The pool is embedded with the base model's hidden states and clustered once; prompts that are added later go to the
nearest of the same clusters. At a hundred million prompts there are texts in parts, embeddings in memory-mapped 16-bit
shards, and the 12 bytes of a prompt that a draw reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.corpus import draw
from alma_jax.engine import embed, kmeans
from alma_jax.errors import NotFinite, RunError
from alma_jax.keys import Key, key_of
from alma_jax.options import Checked, fingerprint, option
from alma_jax.runtime import clustering
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.handles import Pool
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact, Stage
from alma_jax.text import chat


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions(Checked):
  layers: int = option(0, least=0)  # of the base model; 0: all
  pooling: Literal["mean", "last"] = "mean"  # "last": the last token's state
  dims: int = option(1024, least=1)  # principal dimensions that are kept
  sample: int = option(131_072, least=1)  # prompts from which these follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  k: int = option(least=1)  # at most the number of prompts in the pool
  iterations: int = option(10, least=0)
  spherical: bool = False
  per_centroid: int = option(0, least=0)  # train on so many prompts for each cluster; 0: on all


@dataclasses.dataclass(frozen=True)
class Embedder:
  """How prompts become points: with the base model, of which states, cut to how many tokens."""

  options: EmbeddingOptions
  max_prompt_tokens: int

  def fields(self, s: Session[Any]) -> dict[str, Any]:
    return {
      "config": {"embeddings": fingerprint(self.options), "max_prompt_tokens": self.max_prompt_tokens},
      "base": s.base.content,
      "text": s.describe_text(),
      "dtype": s.host.dtype,
    }

  def points(
    self,
    s: Session[Any],
    prompts: Sequence[Prompt],
    projection: embed.Projection | None,
    progress: Callable[[int], object],
  ) -> np.ndarray:
    """[prompts, dimensions]; without a `projection` the hidden states themselves."""
    host = s.host
    rows = [chat.encode_prompt(host.tokenizer, host.chat, p.messages)[: self.max_prompt_tokens] for p in prompts]
    kind = embed.Embedding(self.options.layers or None, self.options.pooling, projection)
    try:
      return clustering.embedded(host, s.base, rows, kind, progress)
    except NotFinite as error:
      raise s.base.gave(error, f"prompt {prompts[error.item].id}") from None


def build(s: Session[Any], prompts: Artefact[Prompt], embedder: Embedder, options: Options) -> Pool:
  """The Pool of these prompts, with the finished stages `pool/projection`, `pool/embeddings`, `pool/clusters`."""
  if not prompts.manifest["rows"]:
    raise RunError("the pool is empty: every drafted prompt was dropped; see pool/drafts/manifest.json for why")
  seed = s.options.seed
  projection = _projection(s, prompts, embedder)
  embedded = _embeddings(s, prompts, projection, embedder)
  fields = {"config": {"seed": seed, "clusters": fingerprint(options)}}
  inputs = {"prompts": prompts, "embeddings": embedded}
  stage = s.run.stage(layout.beside(prompts.name, layout.CLUSTERS), fields, inputs)
  if not stage.done:
    points = _points(embedded)
    k = min(options.k, len(points))
    if k < options.k:
      s.display.say(
        f"{stage.name}: clusters.k is {options.k:,} and the pool has {k:,} prompts: each is a cluster of its own, and a"
        " draw is as good as random. Lower clusters.k, or raise prompts.draws"
      )
    if len(points) < clustering.FEW * k:
      s.run.log("few prompts per cluster", prompts=len(points), clusters=k)
    settings = kmeans.Settings(**dataclasses.asdict(dataclasses.replace(options, k=k)))
    mesh = kmeans.mesh_for(k, points.shape[1])
    found = clustering.fitted(stage, points, settings, key_of(seed, "k-means"), mesh, s.display)
    _finish(s, stage, prompts, found.labels, found)
  return Pool(prompts, projection, stage)


def added(s: Session[Any], prompts: Artefact[Prompt], first: Pool, embedder: Embedder, options: Options) -> Pool:
  """The Pool of prompts that were added to the Pool `first`, in its clusters."""
  embedded = _embeddings(s, prompts, first.projection, embedder)
  inputs = {"prompts": prompts, "embeddings": embedded, "first": first.clusters}
  fields = {"config": {"spherical": options.spherical}}
  stage = s.run.stage(layout.beside(prompts.name, layout.CLUSTERS), fields, inputs)
  if not stage.done:
    centroids = shards.load_array(first.clusters.dir / "centroids.npy")
    key = key_of(s.options.seed, "k-means")
    _finish(s, stage, prompts, _nearest(_points(embedded), centroids, options.spherical, key))
  return Pool(prompts, first.projection, stage)


def _projection(s: Session[Any], prompts: Artefact[Prompt], embedder: Embedder) -> Stage:
  """Stage `pool/projection`: how hidden states become points, from a sample of the pool."""
  options, seed = embedder.options, s.options.seed
  name = layout.beside(prompts.name, layout.PROJECTION)
  stage = s.run.stage(name, embedder.fields(s) | {"seed": seed}, {"prompts": prompts})
  if stage.done:
    return stage
  if stage.mine(1):
    n = prompts.manifest["rows"]
    rows = np.sort(np.argsort(draw.hashed(seed, draw.SAMPLE, np.arange(n)), kind="stable")[: options.sample])
    with s.display.bar("pool: sample of embeddings", len(rows), "prompts") as bar:
      states = embedder.points(s, prompts.rows(rows), None, bar.update)
    found, kept = embed.projection(states, options.dims)
    shards.save_array(stage.dir / "mean.npy", found.mean)
    shards.save_array(stage.dir / "matrix.npy", found.matrix)
    facts = {"sample": len(rows), "dimensions": found.matrix.shape[1], "variance_kept": kept}
    stage.write_part(0, 1, [], Prompt, facts)
  stage.finish(files=["mean.npy", "matrix.npy"])
  return stage


def _embeddings(s: Session[Any], prompts: Artefact[Prompt], projection: Stage, embedder: Embedder) -> Stage:
  """Stage `POOL/embeddings`: one .npy for each part of the prompts, rows in its order, 16 bits."""
  name = layout.beside(prompts.name, layout.EMBEDDINGS)
  inputs = {"prompts": prompts, "projection": projection}
  stage = s.run.stage(name, embedder.fields(s), inputs, suffix=".npy")
  if stage.done:
    return stage
  rows, missing = prompts.sizes, stage.mine(prompts.parts)
  how = embed.Projection(*(np.array(shards.load_array(projection.dir / f"{x}.npy")) for x in ("mean", "matrix")))
  with s.display.bar("pool: embeddings", sum(rows[i] for i in missing), "prompts") as bar:
    for part in missing:
      found = embedder.points(s, prompts.read(part), how, bar.update)
      half = found.astype(np.float16)
      stage.write_file(part, prompts.parts, functools.partial(shards.save_array, array=half), len(half))
  stage.finish()
  return stage


def _points(embedded: Stage) -> embed.Rows:
  return embed.Rows(
    tuple(shards.ArrayRows(embedded.dir / name) for name in (p["name"] for p in embedded.manifest["parts"]))
  )


def _nearest(points: embed.Rows, centroids: np.ndarray, spherical: bool, key: Key) -> np.ndarray:
  """int32 [n]: the nearest of the centroids for each of n points, few or none perhaps."""
  n, k = len(points), len(centroids)
  if not n:
    return np.zeros(0, np.int32)
  if n < k:  # k-means has at least one point for each cluster
    points = embed.Rows((*points.arrays, np.repeat(points[:1], k - n, axis=0)))
  settings, mesh = kmeans.Settings(k, iterations=0, spherical=spherical), kmeans.mesh_for(*centroids.shape)
  return kmeans.fit(points, settings, key, mesh, hooks=kmeans.starting_at(centroids)).labels[:n]


def _finish(
  s: Session[Any],
  stage: Stage,
  prompts: Artefact[Prompt],
  labels: np.ndarray,
  found: kmeans.Clustering | None = None,
) -> None:
  """Write the arrays of a stage of clusters; `found` is None for prompts that were added to a pool."""
  if s.run.process == 0:
    shards.save_array(stage.dir / "labels.npy", labels)
    shards.save_array(stage.dir / "ids.npy", prompts.ids())
    if found:
      shards.save_array(stage.dir / "centroids.npy", found.centroids)
      shards.write_json(stage.dir / layout.REPORT, found.report)
    (stage.dir / clustering.ITERATION).unlink(missing_ok=True)
  facts = {name: x for name, x in found.report.items() if not isinstance(x, list)} if found else {}
  stage.finish(facts, ["labels.npy", "ids.npy", *(["centroids.npy", layout.REPORT] if found else [])])
