"""The command cluster: what it writes against NumPy and the embeddings' own functions, killed and resumed starts, and
what it says of a user's mistakes."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine import embed, kmeans
from alma_jax.llama import sharding
from alma_jax.runtime import clustering
from alma_jax.runtime import host as hosts
from alma_jax.store import layout
from alma_jax.store.runs import Run
from alma_jax.text import chat
from alma_jax.tools import cluster

ROWS = [{"prompt": f"{kind} of {city} {n}"} for kind in ("country", "food", "sport") for city in ("paris", "turin")
        for n in range(8)]  # fmt: skip
K = 5


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture(scope="module")
def points():
  rng = np.random.default_rng(0)
  return (rng.normal(size=(300, 8)) + 3 * rng.normal(size=(7, 8))[rng.integers(7, size=300)]).astype(np.float32)


def start(source, output, *flags, k=K):
  return cluster.main([f"--input={source}", f"--output={output}", f"--k={k}", *flags])


def prompts_file(tmp_path, rows=ROWS):
  path = tmp_path / "in.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def written(output):
  """(assignments, centroids, report)."""
  return (
    pq.read_table(output / "assignments.parquet").to_pydict(),
    np.load(output / "centroids.npy"),
    json.loads((output / "report.json").read_text()),
  )


def content(output):
  """The bytes of every file but the manifests, which hold times."""
  paths = (p for p in sorted(output.rglob("*")) if p.is_file() and p.name != layout.MANIFEST)
  return {str(p.relative_to(output)): p.read_bytes() for p in paths}


def nearest(x, centroids):
  """In fp64: (labels, distances)."""
  apart = np.linalg.norm(np.asarray(x, float)[:, None] - np.asarray(centroids, float), axis=2)
  return apart.argmin(axis=1), apart.min(axis=1)


# Vectors


def test_vectors_go_to_their_nearest_centroids_and_the_report_counts_them(points, tmp_path, capsys):
  np.save(tmp_path / "x.npy", points)
  assert start(tmp_path / "x.npy", tmp_path / "out", "--iterations=50") == 0
  assignments, centroids, report = written(tmp_path / "out")
  assert list(assignments) == ["row", "cluster", "distance"] and assignments["row"] == list(range(300))
  labels, distances = nearest(points, centroids)
  assert assignments["cluster"] == labels.tolist() and centroids.dtype == np.float32
  np.testing.assert_allclose(assignments["distance"], distances, rtol=1e-5)
  members = np.stack([points[labels == c].mean(axis=0) for c in range(K)])
  np.testing.assert_allclose(centroids, members, rtol=1e-4, atol=1e-4)
  sizes = np.bincount(labels, minlength=K)
  expected = {"smallest": sizes.min(), "median": np.median(sizes), "largest": sizes.max(), "singletons": 0, "empty": 0}
  assert report["sizes"] == expected and (report["rows"], report["dimensions"], report["k"]) == (300, 8, K)
  assert report["k-means"]["inertia_final"] == pytest.approx((distances**2).sum(), rel=1e-5)
  said = capsys.readouterr().out
  assert "300 rows of 8 numbers in 5 clusters\n" in said and f"largest {sizes.max()}" in said


def test_copies_of_points_far_from_zero(tmp_path, capsys):
  different = np.array([[0, 0], [1, 0], [0, 1]], np.float32) + np.float32(1e5)
  np.save(tmp_path / "x.npy", np.repeat(different, 50, axis=0))
  assert start(tmp_path / "x.npy", tmp_path / "out") == 0
  assignments, centroids, report = written(tmp_path / "out")
  np.testing.assert_array_equal(centroids[assignments["cluster"]], np.repeat(different, 50, axis=0))
  assert set(assignments["distance"]) == {0.0} and np.isfinite(centroids).all() and report["sizes"]["empty"] == 2
  said = capsys.readouterr()
  assert "3 of 5 clusters have members" in said.err and "2 empty" in said.out


def test_spherical_clusters_compare_angles(points, tmp_path):
  np.save(tmp_path / "x.npy", points * np.random.default_rng(1).uniform(0.1, 9, size=(300, 1)))
  assert start(tmp_path / "x.npy", tmp_path / "out", "--spherical") == 0
  assignments, centroids, _ = written(tmp_path / "out")
  unit = points / np.linalg.norm(points, axis=1, keepdims=True)
  np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
  labels, distances = nearest(unit, centroids)
  assert assignments["cluster"] == labels.tolist() == (unit @ centroids.T).argmax(axis=1).tolist()
  np.testing.assert_allclose(assignments["distance"], distances, atol=1e-5)


def test_shards_in_a_directory_or_of_a_pattern_are_one_array(points, tmp_path):
  np.save(tmp_path / "x.npy", points)
  (tmp_path / "shards").mkdir()
  for name, part in zip("abc", np.split(points, [100, 101]), strict=True):
    np.save(tmp_path / "shards" / f"part-{name}.npy", part)
  found = []
  for i, source in enumerate(("x.npy", "shards", "shards/part-*")):
    assert start(tmp_path / source, tmp_path / f"out{i}") == 0
    found.append({k: v for k, v in content(tmp_path / f"out{i}").items() if k != layout.FINGERPRINT})
  assert found[0] == found[1] == found[2] and len(found[0]) == 3


def test_any_slice_of_shards_is_that_of_the_whole(points):
  parts = np.split(points.astype(np.float16), [7, 7, 20, 299])
  halves = embed.Rows(tuple(parts))
  assert halves.shape == (300, 8) and halves.dtype == np.float16
  mixed = embed.Rows((*parts[:4], parts[4].astype(float)))
  for begin, end in ((0, 300), (0, 7), (6, 8), (7, 20), (19, 301), (5, 5), (250, 900)):
    for vectors, dtype in ((halves, np.float16), (mixed, np.float32)):
      assert vectors[begin:end].dtype == dtype == vectors.dtype
      np.testing.assert_array_equal(vectors[begin:end], points.astype(np.float16)[begin:end])


# Prompts


def embedded(rows, most=None):
  """(the embeddings of the rows, whose tokens after the first `most` are left out; their lengths before)."""
  options = hosts.ModelOptions("mini", "mini")
  host = hosts.Host(options, hosts.EngineOptions(), sharding.make_mesh(devices=jax.devices()[:1]))
  checkpoint = hosts.Checkpoint("it", host.directory, hosts.content_of(host.directory))
  encoded = [chat.encode_prompt(host.tokenizer, host.chat, [{"role": "user", "content": r["prompt"]}]) for r in rows]
  found = embed.embeddings(host.model(checkpoint, "stacked"), [ids[:most] for ids in encoded], 32, fit=True)
  return found, list(map(len, encoded))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(input, output) of the prompts, one of which has an id of its own."""
  directory = tmp_path_factory.mktemp("prompts")
  source = prompts_file(directory, [{**ROWS[0], "id": 17}, *ROWS[1:]])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert start(source, directory / "out", "--model=mini", k=4) == 0
  return source, directory / "out"


def test_prompts_are_clustered_by_their_whitened_embeddings(finished):
  assignments, centroids, report = written(finished[1])
  expected, _ = embedded(ROWS)
  np.testing.assert_array_equal(np.load(finished[1] / "embeddings" / "rows-00000.npy"), expected.astype(np.float16))
  half = expected.astype(np.float16).astype(np.float64)
  deviation = half.std(axis=0)
  white = (half - half.mean(axis=0)) / np.maximum(deviation, 1e-3 * np.median(deviation))
  white /= np.linalg.norm(white, axis=1, keepdims=True)
  labels, distances = nearest(white, centroids)
  assert assignments["cluster"] == labels.tolist()
  np.testing.assert_allclose(assignments["distance"], distances, atol=1e-5)
  ids = [prompt_id(({"role": "user", "content": row["prompt"]},)) for row in ROWS]
  assert assignments["id"] == ["17", *ids[1:]] and len(set(labels.tolist())) == 4
  assert (report["rows"], report["cut"]) == (len(ROWS), 0)


def test_the_report_shows_the_most_central_prompts_of_the_largest_and_other_clusters(finished):
  assignments, _, report = written(finished[1])
  labels, distances = np.array(assignments["cluster"]), np.array(assignments["distance"])
  sizes = np.bincount(labels)
  shown = [example["cluster"] for example in report["examples"]]
  assert sorted(shown) == [0, 1, 2, 3] and shown[:3] == np.argsort(-sizes, kind="stable")[:3].tolist()
  assert [example["why"] for example in report["examples"]] == ["largest"] * 3 + ["random"]
  for example in report["examples"]:
    assert example["prompts"] == [ROWS[row]["prompt"] for row in example["rows"]]
    assert (labels[example["rows"]] == example["cluster"]).all() and example["size"] == sizes[example["cluster"]]
    inside = np.unique(distances[labels == example["cluster"]])
    assert distances[example["rows"]].tolist() == inside[:3].tolist()


def test_the_embeddings_of_an_output_are_an_input(finished, tmp_path):
  assert start(finished[1] / "embeddings", tmp_path / "again", k=4) == 0
  for one, two in zip(written(finished[1])[:2], written(tmp_path / "again")[:2], strict=True):
    if isinstance(one, dict):
      assert {k: v for k, v in one.items() if k != "id"} == two
    else:
      np.testing.assert_array_equal(one, two)


def test_long_prompts_are_cut_and_counted(tmp_path):
  rows = [{"prompt": "paris " * n} for n in (1, 2, 3, 9, 20)]
  assert start(prompts_file(tmp_path, rows), tmp_path / "out", "--model=mini", "--max_tokens=6", k=2) == 0
  expected, lengths = embedded(rows, most=6)
  found = np.load(tmp_path / "out" / "embeddings" / "rows-00000.npy")
  np.testing.assert_array_equal(found, expected.astype(np.float16))
  cut = written(tmp_path / "out")[2]["cut"]
  assert cut == sum(length > 6 for length in lengths) and 0 < cut < 5


def test_a_finished_output_is_shown_and_not_made_again(finished, capsys, monkeypatch):
  before = content(finished[1])
  monkeypatch.setattr(kmeans, "fit", None)
  monkeypatch.setattr(embed, "embeddings", None)
  assert start(*finished, "--model=mini", "--rows=8", k=4) == 0
  said = capsys.readouterr().out
  assert "48 rows of 64 numbers in 4 clusters, all there before\n" in said and said.count("(largest)") == 3
  assert content(finished[1]) == before


# Killed and resumed


def test_a_start_killed_anywhere_is_completed_to_the_same_bytes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cluster, "PART", 16)
  monkeypatch.setattr(clustering, "EVERY", 0.0)
  source, flags = prompts_file(tmp_path), ("--model=mini", "--iterations=9")
  assert start(source, tmp_path / "whole", *flags) == 0
  whole, calls = content(tmp_path / "whole"), []
  assert len(written(tmp_path / "whole")[2]["k-means"]["inertia"]) > 2

  def dies(patch, module, name, at):
    function = getattr(module, name)

    def counted(*args, **more):
      calls.append(name)
      if calls.count(name) == at:
        raise KeyboardInterrupt
      return function(*args, **more)

    patch.setattr(module, name, counted)

  fit, begun = kmeans.fit, []

  def fitted(*args, hooks, **more):
    begun.append(hooks.restore() and hooks.restore()[0])
    return fit(*args, hooks=dataclasses.replace(hooks, progress=iterated), **more)

  def iterated(n):
    calls.append("iteration")
    if calls.count("iteration") == 3:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(kmeans, "fit", fitted)
    dies(patch, embed, "embeddings", 2)
    dies(patch, clustering, "distances", 1)
    dies(patch, cluster, "_write_assignments", 1)
    for left in ("embeddings", "iteration", "distances", "_write_assignments"):
      assert start(source, tmp_path / "cut", *flags) == 130 and calls[-1] == left
      assert not (tmp_path / "cut" / "report.json").exists()
    assert start(source, tmp_path / "cut", *flags) == 0
  assert calls.count("embeddings") == 4  # three parts, one of them twice
  assert begun[:2] == [None, 3] and begun[2] == begun[3] == calls.count("iteration")
  assert content(tmp_path / "cut") == whole
  assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flag", "change"),
  [
    ("--k=3", "k: 4 -> 3"),
    ("--iterations=3", "iterations: 20 -> 3"),
    ("--seed=1", "seed: 0 -> 1"),
    ("--spherical", "spherical: false -> true"),
    ("--max_tokens=9", "max_tokens: 2048 -> 9"),
    ("--raw", 'chat: "mini" -> null'),
  ],
)
def test_a_start_with_another_value_is_refused_by_its_name(flag, change, finished, capsys):
  before = content(finished[1])
  assert start(*finished, "--model=mini", flag, k=4) == 1
  assert_said(capsys, f"  {re.escape(change)}\n.*--input=.*embeddings has the same vectors")
  assert content(finished[1]) == before


def test_another_input_is_refused(points, tmp_path, capsys):
  np.save(tmp_path / "x.npy", points)
  assert start(tmp_path / "x.npy", tmp_path / "out") == 0
  np.save(tmp_path / "x.npy", points[::-1])
  assert start(tmp_path / "x.npy", tmp_path / "out") == 1
  assert_said(capsys, r'  input: "\w+" -> "\w+" \(.*x.npy\)\n')


def test_two_processes_do_not_write_one_output(points, tmp_path, capsys):
  np.save(tmp_path / "x.npy", points)
  with Run(tmp_path / "out"):
    (tmp_path / "out" / layout.FINGERPRINT).write_text("{}")
    assert start(tmp_path / "x.npy", tmp_path / "out") == 1
    assert_said(capsys, "out: another process is writing there")


# What users are told


def assert_said(capsys, message):
  said = "\n".join(line for line in capsys.readouterr().err.split("\n") if "\r" not in line)
  assert re.search(message, said, re.DOTALL), said
  assert "error: " in said and "Traceback" not in said


def spoilt(points, row, value):
  points = points.copy()
  points[row, 3] = value
  return points


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (lambda x: {"a.npy": x, "b.npy": spoilt(x, 17, np.nan)}, r"b.npy, row 17 \(from 0\): a value that is not finite"),
    (lambda x: {"a.npy": spoilt(x, 299, -np.inf)}, r"a.npy, row 299 \(from 0\)"),
    (lambda x: {"a.npy": x, "b.npy": x[:, :7]}, "b.npy: rows of 7 numbers; those of .*a.npy have 8"),
    (lambda x: {"a.npy": x[:, 0]}, r"a.npy: an array of shape \(300,\); expected \[rows, dimensions\]"),
    (lambda x: {"a.npy": x.astype(int)}, "a.npy: values of type int64; expected float16"),
    (lambda x: {"a.npy": x[:0]}, "there are no rows"),
    (lambda x: {"a.npy": x[:4]}, "--k=5: .* has only 4 rows"),
    (lambda x: {"a.npy": b"\x93NUMPY"}, "a.npy: no .npy file of numbers"),
    (lambda x: {"a.npy": b"text"}, "a.npy: no .npy file of numbers"),
    (lambda x: {"a.txt": b"text"}, "there is no .npy file in "),
    (lambda x: {"a.npy": x, "whitening.npy": x[:2], "b.npy": x, "c": b""}, None),
  ],
)
def test_mistakes_in_vectors_are_named(arrays, message, points, tmp_path, capsys):
  (tmp_path / "in").mkdir()
  for name, array in arrays(points).items():
    if isinstance(array, bytes):
      (tmp_path / "in" / name).write_bytes(array)
    else:
      np.save(tmp_path / "in" / name, array)
  status = start(tmp_path / "in", tmp_path / "out")
  if message is None:
    assert status == 0 and written(tmp_path / "out")[2]["rows"] == 600
    return
  assert status == 1 and not (tmp_path / "out" / "report.json").exists()
  assert_said(capsys, message)


@pytest.mark.parametrize(
  ("text", "flags", "message"),
  [
    (None, [], "in.jsonl: no such file"),
    ("", [], "in.jsonl: the file holds no rows"),
    ('{"prompt": "a"}\n{oops}\n', [], "in.jsonl, line 2, column 2: not valid JSON"),
    ('{"prompt": " "}', [], "line 1: the prompt is empty"),
    ('{"prompt": "a"}', [], "--k=5: .*in.jsonl has only 1 rows"),
    ('{"prompt": "a"}', ["--model=nowhere"], "the directory nowhere does not exist"),
    ('{"prompt": "a"}', ["--output=nowhere/out"], "--output: there is no directory nowhere; make it first"),
  ],
)
def test_mistakes_in_prompts_are_named_before_anything_is_written(text, flags, message, tmp_path, capsys):
  if text is not None:
    (tmp_path / "in.jsonl").write_text(text)
  assert start(tmp_path / "in.jsonl", tmp_path / "out", "--model=mini", *flags) == 1
  assert_said(capsys, message)
  assert not (tmp_path / "out").exists()


def test_hidden_states_that_16_bits_do_not_hold_name_the_line(tmp_path, capsys, monkeypatch):
  states = np.ones((len(ROWS), 64), np.float32)
  states[7, 3] = 1e6
  monkeypatch.setattr(embed, "embeddings", lambda *_: states)
  assert start(prompts_file(tmp_path), tmp_path / "out", "--model=mini") == 1
  assert_said(capsys, "in.jsonl, line 8: the model's hidden states are not finite, or too large for 16 bits")
  assert not list((tmp_path / "out").rglob("rows-*"))


def test_outputs_and_inputs_that_are_something_else_are_named(finished, points, tmp_path, capsys):
  np.save(tmp_path / "x.npy", points)
  assert start(tmp_path / "x.npy", tmp_path / "x.npy") == 1
  assert_said(capsys, "x.npy is a file; name a directory")
  assert start(tmp_path / "x.npy", tmp_path) == 1
  assert_said(capsys, "holds other files; name a new directory")
  half = shutil.copytree(finished[1], tmp_path / "half")
  (half / "embeddings" / layout.MANIFEST).unlink()
  assert start(half / "embeddings", tmp_path / "out") == 1
  assert_said(capsys, "embeddings is half made")
  (half / layout.MANIFEST).write_text("{")
  assert start(finished[0], half, "--model=mini") == 1
  assert_said(capsys, "manifest.json is damaged")
  (half / layout.MANIFEST).unlink()
  (half / layout.FINGERPRINT).write_text("{")
  assert start(finished[0], half, "--model=mini") == 1
  assert_said(capsys, "fingerprint.json is damaged")


def test_a_run_is_no_base_model(tmp_path, capsys):
  (tmp_path / "run").mkdir()
  config = {"recipe": "alma", "rounds": {}, "model": {"path": "base", "chat": "llama3", "dtype": "auto"}}
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  assert start(prompts_file(tmp_path), tmp_path / "out", f"--model={tmp_path / 'run'}") == 1
  assert_said(capsys, "is a run.*give --model=base --chat=llama3; or give one of its stages, such as .*sft_1")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--input=a.jsonl"], "--input=a.jsonl holds prompts: give --model"),
    (["--input=a.npy", "--model=mini"], "--input=a.npy means vectors: leave --model out"),
    (["--input=a.npy", "--k=0"], "--k is 0; it must be at least 1"),
    (["--input=a.npy", "--k=many"], "--k is 'many'; it must be a whole number"),
    (["--input=a.npy", "--method=flat"], "there is no flag '--method'"),
    (["--input=a.npy", "--iteration=3"], "no flag '--iteration=3'"),
  ],
)
def test_mistaken_flags_are_named(flags, message, capsys):
  with pytest.raises(SystemExit) as stop:
    cluster.main(["--output=out", "--k=3", *flags])
  said = capsys.readouterr().err
  assert stop.value.code == 2 and said.count("\n") == 1
  assert message.split("=3")[0] in said


def test_few_rows_per_cluster_are_pointed_out(points, tmp_path, capsys):
  np.save(tmp_path / "x.npy", points)
  for k, warned in ((5, False), (8, True)):
    assert start(tmp_path / "x.npy", tmp_path / f"out{k}", k=k) == 0
    assert ("warning: 37.5 rows per cluster; below 39" in capsys.readouterr().err) == warned
