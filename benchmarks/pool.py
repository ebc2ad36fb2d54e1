"""A rehearsal of a run's pool at a large size: its stages run, and their results are checked.

  python -m benchmarks.pool [--prompts=500000] [--dims=64] [--k=10000] [--iterations=3] [--rounds=10] [--draw=12500]
  python -m benchmarks.pool --prompts=2000000 --k=20000 --draw=50000     # five minutes, or ten on a busy machine

The benchmark runs the stages of stages/prompts.py, clusters.py and draw.py in a run directory of their own. Two things
are made up: the texts that the model writes (the prompts of benchmarks/dedup.py in random order, so that similar ones
lie in different parts) and its hidden states (one of many topics, plus noise). The script pins itself to one core. For
every part it prints wall and process time, without the parts inside it, and the largest memory of the process during
it, which includes JAX (0.3 GB), the remains of earlier parts and the pages of mapped files. The last column is a
projection, not a measurement, to 100 million prompts in the pool and a million clusters, in hours of one such core:

  k-means      time x 100M / prompts in the pool x 1M / clusters, for as many passes and dimensions as here
  all others   time x 100M / prompts in the pool; draws for as many rounds as here

What to expect: a minute by default. The script ends with an AssertionError if a spelling is not recognised, if more
than 0.02 of the pairs of similar texts among the first 10,000 survive, if the pool holds an evaluation prompt, if a
label is not that of the nearest centroid, or if a prompt is drawn twice. Memory is measured on Linux only.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

import numpy as np
from ml_collections import ConfigDict
from rapidfuzz.distance import Indel

from alma_jax.corpus import draw as drawing
from alma_jax.corpus import duplicates
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.engine import embed, kmeans
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.stages import clusters, draw, prompts
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, Pool
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact, Run
from benchmarks import dedup

PART = 50_000  # prompts
ORACLE = 10_000  # texts that are compared each with each
ASKED = 500  # evaluation prompts that the model "writes" too
POOL, CLUSTERS = 100_000_000, 1_000_000  # sizes of the projection
RECALL = 0.98
LOOKS = 500  # labels that are checked
PARTS: dict[str, tuple[Any, str, str | None]] = {  # a part's module and function, and what its time grows with
  "equal prompts": (prompts, "_first_of_each", "texts"),
  "near: signatures": (duplicates, "sign", "texts"),
  "near: pairs": (duplicates, "find_pairs", "texts"),
  "near: ROUGE-L": (duplicates, "verify", "texts"),
  "near: decisions": (duplicates, "decide", "texts"),
  "contamination": (prompts, "_contamination", "texts"),
  "projection": (clusters, "_projection", None),
  "16-bit shards": (clusters, "_embeddings", "texts"),
  "k-means": (kmeans, "fit", "k-means"),
  "draws: index": (drawing, "build", "texts"),
  "draws: rows": (drawing, "draw", "texts"),
}
OTHERS: dict[str, str | None] = {"drafts (made up)": None, "embeddings (made up)": None}
OTHERS |= dict.fromkeys(["prompts: files", "clusters: files", "draws: files"], "texts")


@dataclasses.dataclass
class Part:
  wall: float = 0.0
  cpu: float = 0.0
  memory: int = 0  # bytes


class Meter:
  """The cost of named parts; the time of a part inside another counts for the inner one only."""

  def __init__(self) -> None:
    self.parts: dict[str, Part] = {}
    self.inside: list[Part] = []

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    part = self.parts.setdefault(name, Part())
    self._look()
    self.inside.append(part)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
      yield
    finally:
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      self._look()
      self.inside.pop()
      part.wall, part.cpu = part.wall + wall, part.cpu + cpu
      if self.inside:
        self.inside[-1].wall -= wall
        self.inside[-1].cpu -= cpu

  def _look(self) -> None:
    most = peak()
    for part in self.inside:
      part.memory = max(part.memory, most)


def main() -> None:
  flags = argparse.ArgumentParser(description="What do the stages of the pool cost, and do they do what they should?")
  sizes = dict(prompts=500_000, dims=64, k=10_000, iterations=3, rounds=10, draw=12_500)
  for name, value in sizes.items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  with tempfile.TemporaryDirectory() as directory:
    for line in lines(directory, flags):
      print(line, flush=True)


def lines(directory: str | pathlib.Path, flags: argparse.Namespace) -> Iterator[str]:
  """Runs the stages; yields each line of the output as soon as it is known."""
  embedder = clusters.Embedder(clusters.EmbeddingOptions(dims=flags.dims), max_prompt_tokens=2048)
  clustering = clusters.Options(k=flags.k, iterations=flags.iterations)
  meter, drawn = Meter(), []
  with Run(pathlib.Path(directory) / "run") as run:
    session = stand_in(run, parts=-(-flags.prompts // PART))
    with meter("drafts (made up)"):
      world = written(session, flags.prompts)
    with measured(meter, world, 2 * flags.dims):
      with meter("prompts: files"):
        pool = prompts.build(session, world.data, world.drafts, prompts.Options())
      yield entered(pool, world)
      with meter("clusters: files"):
        clustered = clusters.build(session, pool, embedder, clustering)
      yield near_their_centroids(clustered)
      for round in range(flags.rounds):
        with meter("draws: files"):
          drawn.append(draw.build(session.at(round), [clustered], drawn, draw.Options(prompts=flags.draw)))
    yield each_once(clustered, drawn, flags.draw)
    yield from table(meter, pool.manifest["rows"], flags)


# What is made up

Turns = tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class World:
  drafts: Artefact[Prompt]
  spellings: int  # how many texts equal another one but for their spelling
  oracle: list[str]  # the first texts
  data: Data


class StandIn(Session[Any]):
  """A Session whose base model is made up."""

  @property
  def base(self) -> Checkpoint:
    return Checkpoint("base", pathlib.Path(), "made up")

  def describe_text(self) -> dict[str, Any]:
    return {}


def stand_in(run: Run, parts: int) -> StandIn:
  """As much of a Session as the stages of the pool use, in a run directory."""
  host: Any = types.SimpleNamespace(dtype="float32", display=Display(speaks=False))
  mesh: Any = None
  return StandIn(run, host, mesh, {0: types.SimpleNamespace(seed=0, shards=parts)}, ConfigDict())


def written(session: StandIn, n: int) -> World:
  """Drafts as a model would have written them, and human data whose evaluation prompts are among the drafts."""
  texts, spellings = dedup.prompts(n)
  oracle, asked = texts[:ORACLE], texts[-ASKED:]
  random.Random(0).shuffle(texts)
  stage = session.run.stage(layout.pool_stage(0, layout.DRAFTS), {})
  parts = session.options.shards
  for part in stage.mine(parts):
    records = [Prompt(prompt_id(turns(text)), turns(text), "synthetic") for text in texts[part::parts]]
    stage.write_part(part, parts, records, Prompt, {"draws": len(records), "usable": len(records)})
  stage.finish()
  others = dedup.prompts(2000, seed=1)[0]
  human = {"sft": others[:1000], "judge": others[1000:], "eval": asked}
  rows = {name: [SeedRow(turns(text), None, None, 0) for text in of] for name, of in human.items()}
  return World(Artefact(stage, Prompt), spellings, oracle, Data(**rows, digests=dict.fromkeys(rows, "made up")))


def turns(text: str) -> Turns:
  return ({"role": "user", "content": text},)


def states(found: Sequence[Prompt], width: int) -> np.ndarray:
  """Made-up hidden states of prompts, fp32 [n, width]: the state of a topic plus noise.

  A few of the 2,000 topics are common, and the scale of the dimensions falls.
  """
  topics = np.random.default_rng(0).standard_normal((2000, width), np.float32)
  weights = np.cumsum(1 / np.arange(1, len(topics) + 1) ** 0.7)
  ids = shards.id_numbers([prompt.id for prompt in found])
  random = drawing.hashed(0, 3, ids) / 2.0**64
  noise = np.random.default_rng(int(ids[0]) if len(ids) else 0).standard_normal((len(ids), width), np.float32)
  scales = (np.arange(1, width + 1) ** -0.25).astype(np.float32)
  return (topics[np.searchsorted(weights, random * weights[-1], side="right")] + noise) * scales


@contextlib.contextmanager
def measured(meter: Meter, world: World, width: int) -> Iterator[None]:
  """Inside, the stages' parts are measured, and made-up states stand in for the model's."""

  def points(
    embedder: clusters.Embedder, session: Any, found: Sequence[Prompt], projection: Any, progress: Callable[[int], Any]
  ) -> np.ndarray:
    with meter("embeddings (made up)"):
      x = states(found, width)
      if projection is None:
        return x
      x = (x - projection.mean) @ projection.matrix
      return x / np.linalg.norm(x, axis=1, keepdims=True)

  changes: dict[tuple[Any, str], Callable[..., Any]] = {(clusters.Embedder, "points"): points}
  for name, (module, function, _) in PARTS.items():
    changes[module, function] = timed(meter, name, getattr(module, function))
  before = {(module, name): getattr(module, name) for module, name in changes}
  for (module, name), function in changes.items():
    setattr(module, name, function)
  try:
    yield
  finally:
    for (module, name), function in before.items():
      setattr(module, name, function)


def timed(meter: Meter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """The function with its cost counted under `name`."""

  @functools.wraps(function)
  def run(*arguments: Any, **more: Any) -> Any:
    with meter(name):
      return function(*arguments, **more)

  return run


# Checks of the results


def entered(pool: Artefact[Prompt], world: World) -> str:
  """A line about the prompts that have entered the pool."""
  counts, drafts = pool.manifest["counts"], world.drafts.manifest["rows"]
  ids = pool.ids()
  asked = {prompt_id(row.messages) for row in world.data.eval}
  fresh = drafts - counts["duplicate"] - counts.get("equals_eval_prompt", 0)
  assert fresh == drafts - world.spellings - len(asked), f"a spelling was not recognised: {fresh:,} texts are left"
  assert len(np.unique(ids)) == len(ids) == pool.manifest["rows"] == counts["unique"], "a prompt is in the pool twice"
  assert not np.isin(shards.id_numbers(sorted(asked)), ids).any(), "an evaluation prompt is in the pool"
  report = json.loads((pool.dir / "report.json").read_text())
  assert report["contamination"]["pool"]["equal"] == 0
  for example in report["near_duplicates"]:
    pair = (normalised(example[name]).split() for name in ("removed", "kept"))
    assert abs(Indel.normalized_similarity(*pair) - example["similarity"]) < 1e-3, f"not so similar: {example}"
  texts = dedup.different(world.oracle)
  inside = np.isin(shards.id_numbers([prompt_id(turns(text)) for text in texts]), ids)
  recall, pairs = dedup.recall(texts, set(np.flatnonzero(~inside).tolist()))
  assert recall >= RECALL, f"the recall is {recall:.4f}, under {RECALL}"
  near = sum(count for name, count in counts.items() if name.startswith("near_"))
  return (
    f"{drafts:,} drafts in {pool.parts} parts: {world.spellings:,} spellings, all recognised; {near:,} near-duplicates"
    f" removed, recall {recall:.4f} of {pairs:,} pairs; {len(ids):,} prompts in the pool"
  )


def near_their_centroids(pool: Pool) -> str:
  """A line about the clusters; the labels of some points are checked."""
  stage = pool.clusters
  labels, centroids = (shards.load_array(stage.dir / f"{name}.npy") for name in ("labels", "centroids"))
  points = embed.Rows(tuple(map(shards.load_array, sorted((stage.dir.parent / "embeddings").glob("*.npy")))))
  for at in np.linspace(0, len(points) - 1, LOOKS).astype(int).tolist():
    distances = ((points[at : at + 1].astype(np.float64) - centroids) ** 2).sum(axis=1)
    assert distances[labels[at]] <= distances.min() + 1e-5, f"point {at} is not in the nearest cluster"
  report = json.loads((stage.dir / "report.json").read_text())
  inertia = [*report["inertia"], report["inertia_final"]]
  assert len(labels) == len(points) and (np.diff(inertia) <= 0).all(), f"inertia rises: {inertia}"
  kept = pool.projection.manifest["counts"]["variance_kept"]
  return (
    f"{len(centroids):,} clusters of {len(points):,} points with {points.shape[1]} dimensions, {kept:.3f} of the"
    f" variance kept: inertia {' '.join(f'{x:.5g}' for x in inertia)}, {report['singletons']:,} singletons"
  )


def each_once(pool: Pool, drawn: Sequence[Artefact[Prompt]], k: int) -> str:
  """A line about the draws of all rounds."""
  labels, ids = (shards.load_array(pool.clusters.dir / f"{name}.npy") for name in ("labels", "ids"))
  left = np.bincount(labels)
  for stage in drawn:
    rows, records = np.load(stage.dir / "rows.npy"), stage.read()
    assert [(r.id, r.cluster) for r in records] == [(f"{ids[row]:016x}", labels[row]) for row in rows]
    given = np.bincount(labels[rows], minlength=len(left))
    assert len(rows) == k and (given >= np.minimum(left, given.max() - 1)).all(), "not spread over the clusters"
    left -= given
  rows = np.concatenate([np.load(stage.dir / "rows.npy") for stage in drawn])
  assert len(np.unique(rows)) == len(rows) == k * len(drawn), "a prompt was drawn twice"
  return f"{len(drawn)} rounds of {k:,}: {len(rows):,} prompts, each once, of {len(np.unique(labels[rows])):,} clusters"


# The cost


def table(meter: Meter, pool: int, flags: argparse.Namespace) -> Iterator[str]:
  """Lines: a row per part, the sum, and the rate of k-means."""
  grows = {name: how for name, (_, _, how) in PARTS.items()} | OTHERS
  more: Mapping[str | None, float] = {"texts": POOL / pool, "k-means": POOL / pool * CLUSTERS / flags.k, None: 0.0}
  yield f"\n{'':22} {'wall':>9} {'process':>9} {'memory':>9} {'projection':>12}"
  for name, part in meter.parts.items():
    hours = part.cpu * more[grows[name]] / 3600
    told = f"{hours:10,.2f} h" if hours else ""
    yield f"{name:22} {part.wall:7.1f} s {part.cpu:7.1f} s {part.memory / 2**30:6.2f} GB {told:>12}"
  wall, cpu = (sum(getattr(part, name) for part in meter.parts.values()) for name in ("wall", "cpu"))
  most = max(part.memory for part in meter.parts.values())
  yield f"{'all':22} {wall:7.1f} s {cpu:7.1f} s {most / 2**30:6.2f} GB"
  passes, k_means = flags.iterations + 2, meter.parts["k-means"]  # seeding and the labels are one each
  rate = 2 * pool * flags.k * flags.dims * passes / k_means.cpu
  full = 2 * POOL * CLUSTERS * 1024 * 12
  yield (
    f"k-means at {rate / 1e9:.0f} GFLOP/s in {passes} passes of n x k x d; ten iterations at 100M x 1M x 1024 are"
    f" {full:.1e} FLOP, {full / rate / 3600:,.0f} hours of this core"
  )


def peak() -> int:
  """The most bytes of memory that the process has had since the last call; 0 where the system does not tell."""
  try:
    with open("/proc/self/status") as file:
      most = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
    return most * 1024
  except OSError:
    return 0


if __name__ == "__main__":
  main()
