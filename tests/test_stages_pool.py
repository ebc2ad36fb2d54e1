"""The pool in a run directory, of texts that the model is made to write: who enters and why, the same on any number of
hosts and after any kill; prompts that are added later, and draws from everything."""

import collections
import dataclasses
import itertools
import json
import os
import types

import numpy as np
import pytest
from engine_models import hidden_states
from rapidfuzz.distance import Indel
from sessions import changed, on_two_hosts, session_in

from alma_jax.corpus import duplicates
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.errors import RunError
from alma_jax.keys import key_of
from alma_jax.mini import CHECKPOINT
from alma_jax.recipes import alma as alma_recipe
from alma_jax.runtime import clustering, sampling
from alma_jax.runtime.sampling import Draft
from alma_jax.stages import clusters, drafts, draw, prompts
from alma_jax.store import shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact, Run
from alma_jax.text import chat
from alma_jax.text.tokenizer import load_tokenizer
from configs import alma

HUMAN = ("demonstration", "annotation", "eval_prompt")
DRAWS, MORE = 72, 48  # of the first pool, and of what is added
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def without_syncing():
  """Waiting for the disk would be most of the tests' time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda handle: None)
    yield


class Crash(BaseException):
  """Stands for the process being killed: nothing catches it."""


# What the model writes


@pytest.fixture(scope="module")
def world():
  """Human data, and what is written: {number of the draw: text, or None for one without an end}."""
  mini = load_tokenizer(CHECKPOINT)
  words = [word for i in range(mini.size) if (word := mini.decode([i])).isalpha()]

  def text(n=12):
    return " ".join(rng.choice(words, n))

  human = {name: [text() for _ in range(6)] for name in HUMAN}
  fresh = [text() for _ in range(24)]
  first = [*fresh, "oslo", "paris lima", "Paris, LIMA!"]
  first += [respelled for i in range(5) for respelled in (fresh[i].upper(), f"“{fresh[i]}”.")]
  first += [edited(fresh[i], words) for i in range(5, 15)]
  for name, equal in zip(HUMAN, (3, 2, 1), strict=True):
    first += [f"{original}?" for original in human[name][:equal]]
    first += [edited(original, words) for original in human[name][equal : equal + 2]]
  shared = human["eval_prompt"][4].split()[:9]
  first += [f"{text(14)} {' '.join(shared)} {text(14)}", "", "x" * 400, None, None]
  first += [text() for _ in range(DRAWS - len(first))]
  later = [text() for _ in range(24)]
  more = [*later, *fresh[:4], *(f"({x})" for x in fresh[20:]), *(edited(x, words) for x in fresh[15:20])]
  more += [edited(later[0], words), human["demonstration"][0], edited(human["eval_prompt"][5], words)]
  more += [text() for _ in range(MORE - len(more))]
  written = [rng.permutation(np.array(of, object)).tolist() for of in (first, more)]
  rows = {name: [SeedRow(turn(x), None, None, 0) for x in of] for name, of in human.items()}
  seeds = Data(*rows.values(), digests=dict.fromkeys(("sft", "judge", "eval"), "0"))
  everyone = [*itertools.chain(*human.values())]
  written = dict(enumerate(itertools.chain(*written)))
  return types.SimpleNamespace(seeds=seeds, human=human, everyone=everyone, written=written)


def edited(text, words):
  """Another text, of which one word was changed."""
  out = text.split()
  out[rng.integers(len(out))] = "another"
  return " ".join(out)


def turn(text):
  return ({"role": "user", "content": text},)


@pytest.fixture(scope="module")
def asked():
  """The draws that were made, in all tests together."""
  return []


@pytest.fixture(autouse=True)
def planted(world, asked, monkeypatch):
  """The model writes the planted texts."""
  draws = {key_of(0, 0, "prompts", draw): draw for draw in world.written}

  def written(host, checkpoint, requests, options, stops, bar):
    mine = [draws[request.key] for request in requests]
    asked.extend(mine)
    return [Draft(world.written[draw] or "", (1,), world.written[draw] is not None, (-1.0,)) for draw in mine]

  monkeypatch.setattr(sampling, "drafts", written)
  return asked


@pytest.fixture(scope="module")
def config():
  c = alma.get_config("mini")
  c.shards, c.feedback_rounds, c.judge.distil.prompts = 3, 2, 24
  c.prompts.update(dict(draws=DRAWS, similarity=0.7, max_characters=350, max_prompt_tokens=96))
  c.clusters.update(dict(k=8, iterations=4))
  c.embeddings.update(dict(dims=12, sample=30, pooling="mean"))
  c.draw.prompts = 9
  return c


def pool_in(s, data, name="pool", first=0, earlier=()):
  drafted = drafts.build(s, data, s.options.prompts.writing, name, first)
  return prompts.build(s, data, drafted, s.options.prompts.entering, earlier)


def clustered_in(s, pool):
  return clusters.build(s, pool, alma_recipe.embedder(s.options), s.options.clusters)


def drawn_in(s, round, pools, earlier, k=9):
  return draw.build(s.at(round), pools, earlier, draw.Options(prompts=k))


@pytest.fixture(scope="module")
def session(tmp_path_factory, config):
  return session_in(tmp_path_factory.mktemp("run"), config)


@pytest.fixture
def pool(session, world, config):
  """The finished stage; made by the first test that asks for it."""
  return pool_in(session, world.seeds)


@pytest.fixture
def clustered(session, pool):
  return clustered_in(session, pool)


@pytest.fixture
def later(session, world, pool):
  """The finished stage of what was added."""
  writing = dataclasses.replace(session.options.prompts.writing, draws=DRAWS + MORE)
  return pool_in(changed(session, prompts=dict(writing=writing)), world.seeds, "pool_03", DRAWS, [pool])


def artefacts(directory):
  """Every file of the pool with its bytes, without times."""
  found = {}
  for path in sorted(path for path in directory.glob("pool/**/*") if path.is_file()):
    content = path.read_bytes()
    if path.name == "manifest.json":
      content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "finished_at", "seal")}
    found[path.relative_to(directory).as_posix()] = content
  return found


# Who enters


def entering(texts, human, earlier=()):
  """The texts that should enter: each spelling once, none that equals or is like what stands before it."""
  before = [normalised(x).split() for x in (*human, *earlier)]
  new = {prompt_id(turn(x)): normalised(x).split() for x in texts}
  near = []
  for id in sorted(new):
    if new[id] in before:
      continue
    if any(Indel.normalized_similarity(new[id], words) >= 0.7 for words in before):
      near.append(id)
    else:
      before.append(new[id])
  kept = {id for id, words in new.items() if words in before[len(human) + len(earlier) :]}
  return kept, set(near)


def usable(written, draws):
  return [written[i] for i in draws if written[i] and len(written[i]) <= 350]


def test_who_enters_the_pool_and_the_counts_of_those_who_do_not(session, pool, world):
  texts = usable(world.written, range(DRAWS))
  kept, near = entering(texts, world.everyone)
  found = pool.read()
  assert [p.id for p in found] and {p.id for p in found} == kept and len(found) == len(kept)
  assert all(p.id == prompt_id(p.messages) and p.source == "synthetic" for p in found)
  made = json.loads((session.run.dir / "pool" / "drafts" / "manifest.json").read_text())["counts"]
  assert made == dict(draws=DRAWS, context_too_long=0, usable=len(texts), empty=1, too_long=1, cut_off=2)
  counts = collections.Counter(pool.manifest["counts"])
  assert [counts[f"equals_{name}"] for name in HUMAN] == [3, 2, 1]
  assert [counts[f"near_{name}"] for name in HUMAN] == [2, 2, 2]
  assert counts["near_duplicate"] == 10 == len(near) - 6
  assert counts["duplicate"] == 11 and counts["unique"] == len(kept)
  assert counts.total() == len(texts)


def test_of_equal_drafts_the_first_stands_however_many_are_sorted_at_once(tmp_path, monkeypatch):
  columns = [np.random.default_rng(i).integers(2**62, 2**62 + 40, n) for i, n in enumerate((30, 0, 25))]
  taken = {name: np.array([2**62 + i for i in of], np.uint64) for name, of in (("one", (3, 7)), ("two", (7, 8, 9)))}
  draws = types.SimpleNamespace(parts=3, paths=[tmp_path / f"{part}.parquet" for part in range(3)])
  wanted, seen = [], set()
  for part, column in enumerate(columns):
    shards.write_records(draws.paths[part], [Prompt(f"{id:016x}", (), "test") for id in column], Prompt)
    why = []
    for id in column.tolist():
      equal = next((i for i, ids in enumerate(taken.values(), start=1) if id in ids.tolist()), 0)
      why.append(equal or (prompts.DUPLICATE if id in seen else 0))
      seen.add(id)
    wanted.append(why)
  for together in (2**25, 7):
    monkeypatch.setattr(prompts, "TOGETHER", together)
    assert [why.tolist() for why in prompts._first_of_each(draws, taken)] == wanted


def test_the_report_has_examples_of_what_was_removed_and_of_what_evaluation_prompts_share(pool, world):
  report = json.loads((pool.dir / "report.json").read_text())
  counts = collections.Counter(f"near_{example['near']}" for example in report["near_duplicates"])
  assert 10 < counts.total() <= prompts.SHOWN and len(counts) == 4
  assert all(count <= pool.manifest["counts"][name] for name, count in counts.items())
  kept = {p.messages[0]["content"] for p in pool.read()}
  for example in report["near_duplicates"]:
    one, two = (normalised(example[name]).split() for name in ("removed", "kept"))
    assert example["similarity"] == pytest.approx(Indel.normalized_similarity(one, two), abs=1e-3)
    assert example["removed"] in world.written.values() and example["removed"] not in kept
    assert example["kept"] in world.human.get(example["near"], kept)
  shared = report["contamination"]
  assert list(shared) == ["demonstration", "annotation", "pool"]
  assert [(shared[name]["equal"], shared[name]["overlapping"]) for name in shared] == [(0, 0), (0, 0), (0, 1)]
  (example,) = shared["pool"]["examples"]
  run = example["run"]
  assert run.split() == world.human["eval_prompt"][4].split()[:8]
  assert run in example["text"] and example["prompt"] == world.human["eval_prompt"][4]


def test_without_a_similarity_only_equal_ones_are_left_out(world, config, tmp_path):
  c = config.copy_and_resolve_references()
  c.prompts.similarity = 0.0
  stage = pool_in(session_in(tmp_path, c), world.seeds)
  texts = {prompt_id(turn(x)) for x in usable(world.written, range(DRAWS))}
  assert {p.id for p in stage.read()} == texts - {prompt_id(turn(x)) for x in world.everyone}
  assert not any("near_" in name for name in stage.manifest["counts"])
  report = json.loads((stage.dir / "report.json").read_text())
  assert set(report) == {"contamination"} and report["contamination"]["pool"]["overlapping"] == 3


def test_two_hosts_and_any_kill_give_the_same_bytes(session, clustered, world, config, tmp_path, monkeypatch):
  wanted = artefacts(session.run.dir)

  def pooled(one):
    clustered_in(one, pool_in(one, world.seeds))

  on_two_hosts(tmp_path / "two", config, pooled)
  assert artefacts(tmp_path / "two") == wanted

  # Killed before every second file has its name, and after every other one.
  seen, replace = collections.Counter(), os.replace
  monkeypatch.setattr(clustering, "EVERY", 0.0)

  def killed(old, new):
    name = f"{new}{seen['iterations']}" if str(new).endswith("iteration.npz") else str(new)
    kill = not seen[name] and not name.endswith(".json")
    seen[name] += 1
    seen["kills"] += kill
    if kill and seen["kills"] % 2:
      raise Crash
    replace(old, new)
    seen["iterations"] += str(new).endswith("iteration.npz")
    if kill:
      raise Crash

  one = session_in(tmp_path / "killed", config)
  monkeypatch.setattr(os, "replace", killed)
  for _ in range(200):
    try:
      clustered_in(one, pool_in(one, world.seeds))
      break
    except Crash:
      shards.remove_temporaries(one.run.dir)
  assert artefacts(one.run.dir) == wanted
  assert seen["kills"] > duplicates.BANDS + 20 and seen["iterations"] >= 3


# Points and clusters


def test_points_are_the_projected_states_of_the_prompts_and_labels_their_nearest_centroids(session, clustered):
  directory = session.run.dir / "pool"
  counts = clustered.projection.manifest["counts"]
  assert (counts["sample"], counts["dimensions"]) == (30, 12) and 0.4 < counts["variance_kept"] < 1
  mean, matrix = (np.load(directory / "projection" / f"{name}.npy").astype(np.float64) for name in ("mean", "matrix"))
  points = np.concatenate([np.load(path) for path in sorted((directory / "embeddings").glob("*.npy"))])
  found = clustered.prompts.read()
  assert points.dtype == np.float16 and len(points) == len(found)
  model = session.host.model(session.base, "stacked")
  for at in (0, len(found) - 1):
    ids = chat.encode_prompt(session.host.tokenizer, session.host.chat, found[at].messages)
    x = (hidden_states(model, ids)[1:].mean(axis=0) - mean) @ matrix
    np.testing.assert_allclose(points[at], x / np.linalg.norm(x), atol=2e-3)
  labels, ids, centroids = (np.load(directory / "clusters" / f"{x}.npy") for x in ("labels", "ids", "centroids"))
  assert [f"{id:016x}" for id in ids] == [p.id for p in found]
  np.testing.assert_array_equal(labels, nearest(points, centroids))
  report = json.loads((directory / "clusters" / "report.json").read_text())
  assert report["inertia_final"] == pytest.approx(((points - centroids[labels]) ** 2).sum(), rel=1e-3)


def nearest(points, centroids):
  return ((points[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2).argmin(axis=1)


def test_an_empty_pool_says_where_to_look(session, tmp_path):
  run = Run(tmp_path)
  stage = run.stage("pool/prompts", {})
  stage.write_part(0, 1, [], Prompt)
  stage.finish()
  with pytest.raises(RunError, match=r"the pool is empty.*pool/drafts/manifest\.json"):
    clustered_in(session, Artefact(stage, Prompt))


@pytest.mark.parametrize("more", [0, 1])
def test_more_clusters_than_prompts_are_said(more, session, pool, tmp_path, monkeypatch, capsys):
  rows, begun = pool.manifest["rows"], RuntimeError("k-means begins")
  for name in ("_projection", "_embeddings"):
    monkeypatch.setattr(clusters, name, lambda *_: pool)
  monkeypatch.setattr(clusters, "_points", lambda _: np.zeros((rows, 2)))
  monkeypatch.setattr(clusters.clustering, "fitted", lambda *_: (_ for _ in ()).throw(begun))
  s = dataclasses.replace(session, run=Run(tmp_path))
  with pytest.raises(RuntimeError, match="k-means begins"):
    clusters.build(s, pool, None, dataclasses.replace(s.options.clusters, k=rows + more))
  said = f"pool/clusters: clusters.k is {rows + more:,} and the pool has {rows:,} prompts"
  assert (said in capsys.readouterr().err) == bool(more)


# What is added later


def test_what_is_added_is_new(clustered, world, asked, later):
  stage = later
  assert sorted(draw for draw in asked if draw >= DRAWS) == list(range(DRAWS, DRAWS + MORE))
  old = {p.id: p.messages[0]["content"] for p in clustered.prompts.read()}
  kept, near = entering(usable(world.written, range(DRAWS, DRAWS + MORE)), world.everyone, old.values())
  found = stage.read()
  assert {p.id for p in found} == kept and len(found) == len(kept) and not kept & old.keys()
  counts = stage.manifest["counts"]
  assert counts["equals_prompt_of_pool"] == 8 and counts["near_prompt_of_an_earlier_pool"] == 5
  assert counts["near_duplicate"] == counts["near_eval_prompt"] == counts["equals_demonstration"] == 1 == len(near) - 6
  report = json.loads((stage.dir / "report.json").read_text())
  like_old = [x for x in report["near_duplicates"] if x["near"] == "prompt_of_an_earlier_pool"]
  assert len(like_old) == 5 and all(x["kept"] in old.values() for x in like_old)


def test_added_prompts_go_to_the_nearest_old_cluster_and_draws_never_repeat(session, clustered, later):
  before = artefacts(session.run.dir)
  second = drawn_in(session, 2, [clustered], [])
  more = clusters.added(session, later, clustered, alma_recipe.embedder(session.options), session.options.clusters)
  assert artefacts(session.run.dir) == before and not (more.clusters.dir / "centroids.npy").exists()
  points = np.concatenate([np.load(path) for path in sorted((session.run.dir / "pool_03/embeddings").glob("*.npy"))])
  centroids = np.load(clustered.clusters.dir / "centroids.npy")
  labels, ids = (np.load(more.clusters.dir / f"{name}.npy") for name in ("labels", "ids"))
  np.testing.assert_array_equal(labels, nearest(points, centroids))
  assert [f"{id:016x}" for id in ids] == [p.id for p in later.read()]

  pools, drawn = [clustered, more], [second]
  both = [p for pool in pools for p in pool.prompts.read()]
  of = [x for pool in pools for x in np.load(pool.clusters.dir / "labels.npy").tolist()]
  for round in itertools.count(3):
    left = len(both) - sum(stage.manifest["rows"] for stage in drawn)
    if not left:
      break
    drawn.append(drawn_in(session, round, pools, drawn, min(19, left)))
    assert drawn[-1].manifest["counts"]["used_before"] == len(both) - left
  rows = [np.load(stage.dir / "rows.npy").tolist() for stage in drawn]
  assert sorted(itertools.chain(*rows)) == list(range(len(both)))  # the ledger: each once, and in the end all
  assert max(rows[0]) < len(clustered.prompts.read()) <= max(rows[1])
  for stage, mine in zip(drawn, rows, strict=True):
    assert [(p.id, p.messages, p.cluster) for p in stage.read()] == [
      (both[row].id, both[row].messages, of[row]) for row in mine
    ]
  assert drawn[0].manifest["counts"]["clusters_drawn"] == 8
  with pytest.raises(RunError, match=f"round {round} draws 1 prompts, but of the pool's {len(both)} only 0 are unused"):
    drawn_in(session, round, pools, drawn, 1)


def test_few_prompts_or_none_are_added(session, clustered):
  """There are fewer of them than clusters."""
  some = clustered.prompts.read()[:3]
  for name, records in (("pool_08", some), ("pool_09", [])):
    stage = session.run.stage(f"{name}/prompts", {})
    stage.write_part(0, 1, records, Prompt)
    stage.finish()
    options = session.options
    added = clusters.added(session, Artefact(stage, Prompt), clustered, alma_recipe.embedder(options), options.clusters)
    labels = np.load(added.clusters.dir / "labels.npy")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.load(clustered.clusters.dir / "labels.npy")[: len(records)])
