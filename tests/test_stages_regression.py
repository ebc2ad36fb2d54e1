"""The judge with a trained scalar head: its training starts at the error of its first head, and its directory is a
reward model for everybody."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sessions import changed, session_in

from alma_jax import names
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered
from alma_jax.llama import heads, reading, sharding, weights
from alma_jax.mini import seeds
from alma_jax.stages import judge
from alma_jax.store.data import load_examples
from alma_jax.store.handles import Data
from alma_jax.text import chat
from configs import alma


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("seeds")
  seeds.make(directory, 0)
  rows, _ = load_examples(directory / "judge.jsonl", ("response", "score"))
  return Data([], rows[:160], [], {"judge": "0"})


def trained(directory, data, monkeypatch, **train):
  """(judge, judge on the base model with the head that training began with, the manifest, steps' metrics)."""
  made = {}
  rated = judge._rated
  monkeypatch.setattr(judge, "_rated", lambda *of: made.setdefault("rated", rated(*of)))
  s = session_in(directory, alma.get_config("mini"), sharding.make_mesh(devices=jax.devices()[:1]))
  s.host.local_mesh = s.mesh  # one device compiles quicker than eight
  s = changed(
    s, judge=dict(kind="regression", held_out=0.25, train=dataclasses.replace(s.options.judge.train, **train))
  )
  found = judge.regression(s, data, s.options.judge)
  again = judge.regression(s, data, s.options.judge)  # read, not trained
  assert again.identity == found.identity
  stage = found.directory.parent
  manifest = json.loads((stage / "manifest.json").read_text())
  lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
  return s, found, made["rated"][0], manifest, lines


def test_a_head_is_trained_on_the_annotations_and_loads_as_a_reward_model(data, monkeypatch, tmp_path):
  s, found, rated, manifest, steps = trained(tmp_path / "run", data, monkeypatch, batch=1000, epochs=8.0)
  held = manifest["held_out"]
  assert manifest["counts"]["annotations"] + held["rows"] == len(data.judge) and held["rows"] > 10

  # Before the first step, the loss over all annotations is the error of the fitted head on the base model's states.
  hidden, scores = states(s, data)
  wanted = np.mean((hidden @ rated.head[:, 0] - scores) ** 2)
  assert steps[0]["loss"] == pytest.approx(wanted, rel=1e-3)
  assert wanted < np.var(scores) and steps[-1]["loss"] < 0.9 * steps[0]["loss"]

  # The directory is a reward model, by its chat template, and gives the scores of the run's judge.
  other = contract.by_name(names.JUDGES, f"reward:{found.directory}", s.host, None, "judge.kind")
  assert isinstance(other.head, heads.Scalar) and found.scale is None
  pairs = [Answered(row.messages, row.response) for row in data.judge[:6]]
  mine = [v.score for v in found.scores(pairs)]
  np.testing.assert_allclose([v.score for v in other.scores(pairs)], mine, atol=1e-5)

  torch = pytest.importorskip("torch")
  from transformers import LlamaForSequenceClassification

  model = LlamaForSequenceClassification.from_pretrained(found.directory, dtype=torch.float32).eval()
  for pair, score in zip(pairs, mine, strict=True):
    ids = found.written.prompt(pair[0]) + found.written.response(pair[1])
    with torch.inference_mode():
      assert model(torch.tensor([ids])).logits[0, 0].item() == pytest.approx(score, abs=1e-4)


def states(s, data):
  """Of the annotations that are trained on: the base model's last hidden states in padded rows, and the scores."""
  train, _ = judge._split(data.judge, 0.25, s.options.seed)
  model = weights.load(s.host.directory)
  rows = [chat.encode_example(s.host.tokenizer, s.host.chat, row.messages, row.response)[0] for row in train]
  lengths = np.array([len(ids) for ids in rows])
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for at, ids in enumerate(rows):
    tokens[at, : len(ids)] = ids
  hidden, _ = jax.jit(reading.prefill)(model, tokens, lengths)
  return np.asarray(hidden)[np.arange(len(rows)), lengths - 1], np.array([row.score for row in train])
