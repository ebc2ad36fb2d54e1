"""The benchmarks' own pieces in small: they run, and what they assert is noticed when it is broken."""

import dataclasses
import json
import pathlib
import statistics
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # they are no package that is installed

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
  rows = bench.equal_lengths(*models, FakeTunix(models[1]), 3, 12, 5, 1)
  assert [(row.what.split(",")[0], row.target) for row in rows] == [
    ("sampling", 3.0), ("sampling", None), ("sampling", 2.0), ("prefix sharing", None)
  ]  # fmt: skip
  rates = [float(row.ours.split()[0].replace(",", "")) for row in rows]
  assert rates[0] > 0 and len(set(rates)) == 1
  tunix = rows[2]
  assert tunix.peer == "15 tunix" and tunix.ratio == pytest.approx(rates[2] / 15, rel=0.05)


def test_without_tunix_its_row_says_so(models):
  row = bench.equal_lengths(*models, None, 3, 12, 5, 1)[2]
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
  rate, efficiency = bench.heavy_tails(*models, 4, 12, 3, 1, 0.02, 1)
  lengths = bench.drawn_lengths(3, 4, 0.02)
  assert rate.target == 8 and rate.ratio > 0
  assert efficiency.peer == f"{lengths.mean() / lengths.max(axis=1).mean():.3f} fixed batches"
  assert lengths.sum() / 4 / efficiency.ratio >= lengths.max()  # steps that were run


def test_requests_that_do_not_have_their_length_are_noticed(models, monkeypatch):
  right = bench.sampled
  monkeypatch.setattr(bench, "sampled", lambda *x, ends=None, **more: right(*x, **more))
  with pytest.raises(AssertionError, match="length"):
    bench.heavy_tails(*models, 4, 12, 2, 1, 0.02, 1)


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
