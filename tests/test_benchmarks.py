"""The benchmarks' own pieces in small: they run, and what they assert is noticed when it is broken."""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import statistics
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # they are no package that is installed

from benchmarks import draw as drawing
from benchmarks import padding, training
from benchmarks import sampling as bench

SMALL = dict(
  vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=8,
)  # fmt: skip


class FakeTunix:
  """Answers as the process of tunix would: with what transformers' generate gives."""

  def __init__(self, hf):
    self.hf = hf

  def generate(self, prompts, new, temperature):
    return bench.generated(self.hf, prompts, new, temperature).tolist(), 1.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  hf = bench.saved_model(directory, **SMALL)
  return bench.our_model(directory), hf


@pytest.fixture(scope="module")
def sampled(models):
  prompts = bench.random_prompts(2, 12, 96)
  return prompts, bench.sampled(models[0], prompts, 3, 5, 4)


def test_equal_lengths(models):
  rows = bench.equal_lengths(*models, FakeTunix(models[1]), bench.Equal(3, 12, 5), 1)
  assert [(row.what.split(",")[0], row.target) for row in rows] == [
    ("sampling", 3.0), ("sampling", None), ("sampling", 2.0), ("prefix sharing", None)
  ]  # fmt: skip
  rates = [float(row.ours.split()[0].replace(",", "")) for row in rows]
  assert rates[0] > 0 and len(set(rates)) == 1
  tunix = rows[2]
  assert tunix.peer == "15 tunix" and tunix.ratio == pytest.approx(rates[2] / 15, rel=0.05)


def test_without_tunix_its_row_says_so(models):
  row = bench.equal_lengths(*models, None, bench.Equal(3, 12, 5), 1)[2]
  assert row.peer == "tunix: not installed" and row.ratio is None


def test_other_greedy_tokens_are_noticed(models):
  model, hf = models
  prompts = bench.random_prompts(2, 12, 96)
  bench.same_greedy_tokens(model, hf, None, prompts, 5)

  class Other(FakeTunix):
    def generate(self, *what):
      tokens, seconds = super().generate(*what)
      tokens[1][4] ^= 1
      return tokens, seconds

  with pytest.raises(AssertionError, match="tunix"):
    bench.same_greedy_tokens(model, hf, Other(hf), prompts, 5)


def test_other_logprobs_are_noticed(models, sampled):
  prompts, results = sampled
  bench.same_logprobs(models[1], prompts[1], results[3:])
  off = dataclasses.replace(results[4], logprobs=(*results[4].logprobs[:-1], results[4].logprobs[-1] + 2e-4))
  with pytest.raises(AssertionError, match=r"off by 0\.0002"):
    bench.same_logprobs(models[1], prompts[1], [results[3], off])


def test_heavy_tails(models):
  rate, efficiency = bench.heavy_tails(*models, bench.Heavy(4, 12, 3, 1, 0.02), 1)
  lengths = bench.drawn_lengths(3, 4, 0.02)
  assert rate.target == 8 and rate.ratio > 0
  assert efficiency.peer == f"{lengths.mean() / lengths.max(axis=1).mean():.3f} fixed batches"
  assert lengths.sum() / 4 / efficiency.ratio >= lengths.max()  # steps that were run


def test_requests_that_do_not_have_their_length_are_noticed(models, monkeypatch):
  right = bench.sampled
  monkeypatch.setattr(bench, "sampled", lambda *x, ends=None, **more: right(*x, **more))
  with pytest.raises(AssertionError, match="length"):
    bench.heavy_tails(*models, bench.Heavy(4, 12, 2, 1, 0.02), 1)


def test_generate_stops_at_the_longest_row(models):
  assert bench.generated(models[1], bench.random_prompts(3, 12, 96), 9, lengths=[2, 7, 3]).shape == (3, 7)


def test_lengths_have_the_shape_of_chat_answers():
  lengths = bench.drawn_lengths(100, 64, 1.0)
  assert lengths.max() == bench.CAP and lengths.min() >= 1
  assert statistics.fmean(lengths.ravel()) == pytest.approx(bench.MEAN, rel=0.03)
  assert np.median(lengths) == pytest.approx(bench.MEDIAN, rel=0.03)
  assert np.quantile(lengths, 0.95) == pytest.approx(1075, rel=0.05)


def test_tokens_that_do_not_follow_the_distribution_are_noticed():
  logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
  choose = bench.chooser()
  bench.fits(choose, logits, 500, 20_000)
  with pytest.raises(AssertionError, match="chi-square"):
    bench.fits(lambda x, *rest: choose(x * 1.1, *rest), logits, 500, 20_000)


def test_token_choice():
  (row,) = bench.token_choice(20, 100, 2000, 1)
  assert row.what == "token choice, 20 x 100" and row.ratio > 0


def test_an_interpreter_without_tunix_is_no_error(tmp_path):
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\nexit 1\n")
  python.chmod(0o755)
  with bench.Tunix(str(python), tmp_path) as tunix:
    assert not tunix


def test_the_process_of_tunix_is_asked_and_answers(tmp_path):
  python, answer = tmp_path / "python", {"tokens": [[5]], "seconds": 2.5}
  python.write_text(f'#!/bin/sh\necho \'{{"jax": "1"}}\'\nread work\necho "$work" >{tmp_path}/asked\n')
  with open(python, "a") as file:
    file.write(f"echo '{json.dumps(answer)}'\n")
  python.chmod(0o755)
  with bench.Tunix(str(python), tmp_path) as tunix:
    assert tunix and tunix.generate([(1, 2)], 1, 0.0) == ([[5]], 2.5)
  assert json.loads((tmp_path / "asked").read_text()) == {"prompts": [[1, 2]], "new": 1, "temperature": 0.0}


def test_table():
  rows = [
    bench.Row("a", "2 tok/s", "1 b", 2.0, 3.0),
    bench.Row("c", "3 tok/s", "1 d", 3.0, 3.0),
    bench.Row("e", "1", "f"),
  ]
  lines = bench.table(rows).strip().splitlines()
  assert [line.split()[-2:] for line in lines[1:3]] == [["not", "met"], ["3", "met"]]
  assert lines[3].split() == ["e", "1", "f"]


def test_padding_of_several_ways_is_never_less_than_must_be():
  lines = list(padding.shares([60]))
  assert sum(line.startswith(("| 20 to 399", "| log-normal")) for line in lines) == 2 * len(padding.CELLS)
  found = [match for line in lines for match in re.findall(r"([.\d]+) \(\d\), most ([.\d]+)", line)]
  assert len(found) == len(padding.CELLS) and all(0.3 < float(share) <= float(most) <= 1 for share, most in found)


def test_draws_from_a_small_pool_are_measured_and_wrong_ones_noticed(monkeypatch):
  labels, ids = drawing.world(20_000, 300)
  assert len(np.unique(ids)) == 20_000 and len(np.unique(labels)) == 300
  assert len(list(drawing.measured(labels, ids, 5, 40))) == 7
  right = drawing.draw.draw
  monkeypatch.setattr(drawing.draw, "draw", lambda index, used, *rest: right(index, [], *rest))
  with pytest.raises(AssertionError, match="a prompt was drawn twice"):
    list(drawing.measured(labels, ids, 5, 40))
  monkeypatch.setattr(drawing.draw, "draw", lambda *rest: right(*rest[:-2], "random", "round"))
  with pytest.raises(AssertionError, match=r"diverse, round: \d+ clusters, not"):
    list(drawing.measured(labels, ids, 5, 40))
  index = drawing.draw.build(labels, ids, 0)
  index.order[[7, 8]] = index.order[[8, 7]]
  with pytest.raises(AssertionError):
    drawing.assert_sorted(index, ids)


def test_dedup_of_a_small_pool_is_measured_and_wrong_findings_are_noticed(monkeypatch):
  pytest.importorskip("datasketch")
  from benchmarks import dedup

  monkeypatch.setattr("os.fsync", lambda file: None)
  lines = list(dedup.lines(rows=2000, oracle=1500, most=1600, repeats=1))
  assert "200 of them spellings" in lines[0] and lines[2].split()[0] == "datasketch" and lines[2].split()[-1] == "5.0x"
  recall, pairs = lines[5].split()[1:4:2]
  assert float(recall) >= 0.98 and 200 < int(pairs.replace(",", "")) < 320
  assert [int(line.split()[0].replace(",", "")) for line in lines[7:10]] == pytest.approx([90, 360, 1440], rel=0.02)
  texts = dedup.different(dedup.prompts(300)[0])
  assert dedup.recall(texts, removed=set())[0] == 0
  first, second = sorted(range(2), key=lambda row: dedup.in_parts(texts)[0][0][row])
  for wrong in ([(second, first, 0.7)], [(first, first, 1.0)]):
    with pytest.raises(AssertionError, match="wrongly removed"):
      dedup.check(texts, wrong)
  monkeypatch.setattr(dedup, "normalised", str.strip)
  with pytest.raises(AssertionError, match="spellings were recognised"):
    next(dedup.lines(rows=300, oracle=100, most=16, repeats=1))


@pytest.fixture
def own_environment(monkeypatch):
  """For modules that set variables when they are imported."""
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS"):
    monkeypatch.setenv(name, os.environ.get(name, ""))


def test_clustering(own_environment):
  pytest.importorskip("faiss")
  pytest.importorskip("sklearn")
  from benchmarks import clustering

  shape = clustering.Shape(300, 6, 12, 2, 0.9, 0.5)
  seconds, inertias, filled = clustering.compared(shape, 1)
  assert {len(x) for x in seconds.values()} == {1} and max(inertias.values()) < 1.01 * min(inertias.values())
  row = clustering.line(shape, {name: [2.0] for name in seconds}, inertias, filled)
  assert row.split()[:9] == ["300", "x", "6", "->", "12", "2.00", "1.00", "(0.90", "not"]
  with pytest.raises(AssertionError, match=r"inertia over 1.001 times"):
    clustering.check({"alma_jax": 1.002, "faiss": 1.0, "scikit-learn": 1.1}, 0)
  clustering.check({"alma_jax": 1.002, "faiss": 1.0, "scikit-learn": 1.1}, 3)


def test_seeds_are_compared(own_environment):
  pytest.importorskip("sklearn")
  from benchmarks import seeding

  row = seeding.line(seeding.Shape("blobs", 300, 6, 12), 1).split()
  assert row[:6] == ["blobs:", "300", "x", "6", "->", "12"] and float(row[6]) <= float(row[7]) < 1.05 < float(row[8])


def test_embeddings_are_compared_and_other_vectors_noticed(models, own_environment, monkeypatch):
  from benchmarks import embedding

  monkeypatch.setattr(embedding, "BATCHES", (2, 4))
  wanted = embedding.lengths(2000)
  assert np.mean(wanted) == pytest.approx(21, rel=0.05) and min(wanted) >= 2
  rows = embedding.rows_of([5, 30, 2, 17, 2], 96)
  assert [len(row) for row in rows] == [5, 30, 2, 17, 2] and {row[0] for row in rows} == {1}
  lines = list(embedding.compared("ragged", *models[::-1], rows, repeats=1))
  assert [line.split("  ")[1] for line in lines] == [embedding.THEIRS, embedding.PADDED, embedding.OURS]
  lines = list(embedding.compared("equal", *models[::-1], embedding.rows_of([6] * 5, 96), repeats=1))
  told = ["both 2 rows at a time", "both 4 rows at a time", embedding.THEIRS, embedding.OURS]
  assert [line.split("  ")[1] for line in lines] == told
  right = embedding.embed.embeddings
  monkeypatch.setattr(embedding.embed, "embeddings", lambda *what: right(*what) + 2e-4)
  with pytest.raises(AssertionError, match="the vectors differ"):
    list(embedding.compared("ragged", *models[::-1], rows, repeats=1))


def test_a_small_pool_is_rehearsed_and_what_is_wrong_is_noticed(own_environment, monkeypatch, tmp_path):
  pytest.importorskip("datasketch")
  from benchmarks import pool

  monkeypatch.setattr("os.fsync", lambda file: None)
  monkeypatch.setattr(pool, "PART", 700)
  monkeypatch.setattr(pool, "ORACLE", 1200)
  flags = argparse.Namespace(prompts=2000, dims=8, k=20, iterations=2, rounds=3, draw=90)
  lines = list(pool.lines(tmp_path / "right", flags))
  assert "drafts in 3 parts: 200 spellings, all recognised" in lines[0] and lines[2].startswith("3 rounds of 90: 270 ")
  told = {line[:22].strip(): line.split() for line in lines[4:-2]}
  assert set(told) == set(pool.PARTS) | set(pool.OTHERS)
  assert not hasattr(pool.draw.build, "__wrapped__") and not hasattr(pool.drawing.draw, "__wrapped__")

  def fails(match, module, name, wrong):
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=match):
      patch.setattr(module, name, wrong)
      list(pool.lines(tmp_path / match.replace(" ", "_"), flags))

  fails("a spelling was not recognised", pool, "prompt_id", lambda messages: pool_id(messages[0]["content"]))
  fails("the recall is", pool.duplicates, "find_pairs", no_pairs(pool.duplicates))
  assign = pool.kmeans.fit

  def turned(*what, **more):
    return dataclasses.replace(found := assign(*what, **more), labels=found.labels[::-1])

  fails("not in the nearest cluster", pool.kmeans, "fit", turned)
  first = pool.drawing.draw
  fails("drawn twice|not spread", pool.drawing, "draw", lambda index, used, *rest: first(index, used[:0], *rest))


def pool_id(text):
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def no_pairs(duplicates):
  return lambda pool, unit: duplicates.save(pool.pairs_path(unit), np.empty(0, np.uint64))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  directory = tmp_path_factory.mktemp("training")
  bench.saved_model(directory, **SMALL)
  return directory


def test_training_beside_transformers(small):
  (row,) = training.equal_rows(small, 96, 4, 64, 3, 1)  # the shape of the next test: it compiles once
  assert row.peer.endswith("ms transformers") and row.ratio > 0 and row.target == 1.2
  theirs = training.steps_of_transformers(small, [([5, 6, 7, 8], [0, 1, 1, 1])], 2)
  start = training.leaves(training.read(small))
  training.check("x", theirs, theirs, start, 1e-4)
  with pytest.raises(AssertionError, match=r"differs by 2\.0e-03"):
    training.check("x", dataclasses.replace(theirs, losses=[y * 1.002 for y in theirs.losses]), theirs, start, 1e-3)
  longer = [y + 0.02 * (y - x) for x, y in zip(start, theirs.weights, strict=True)]
  with pytest.raises(AssertionError, match=r"differ by 2\.0e-02 of the way"):
    training.check("x", dataclasses.replace(theirs, weights=longer), theirs, start, 1e-4)


def test_training_beside_trl(small, monkeypatch):
  pytest.importorskip("trl")
  monkeypatch.setenv("TQDM_DISABLE", "1")
  rows = training.ragged(small, 96, 8, 4, 1, 64) + training.preferences(small, 96, 4, 2, 1, 64)
  assert [row.target for row in rows] == [2.0, None, None, 1.5, None] and all(row.ratio > 0 for row in rows)
  assert [row.peer.split(" ", 1)[1] for row in rows] == [
    "TRL", "TRL, padding-free by 1", "TRL, packing", "TRL", "TRL, by 1"
  ]  # fmt: skip
  monkeypatch.setattr(training, "labels", lambda ids, mask: [-100, *ids[1:]])  # prompts are learnt as well
  with pytest.raises(AssertionError, match="SFT, TRL: the loss of a step differs"):
    training.ragged(small, 96, 8, 4, 1, 64)
  right = training.logprobs
  monkeypatch.setattr(training, "logprobs", lambda *x: right(*x) + np.arange(8) % 2)  # another reference
  with pytest.raises(AssertionError, match="DPO, TRL: the loss of a step differs"):
    training.preferences(small, 96, 4, 2, 1, 64)


def test_training_without_trl(small, monkeypatch):
  monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
  (row,) = training.ragged(small, 96, 8, 4, 1, 64)
  assert row.ratio is None and row.peer == "TRL: not installed (pip install trl==1.16.0)"
