"""Training on pairs in a run directory: what the losses ask for beside the pairs, and nothing else."""

import json
import types

import numpy as np
import pytest
from sessions import session_in

from alma_jax import start
from alma_jax.errors import NotFinite, RunError
from alma_jax.options import ConfigError, build
from alma_jax.runtime import training
from alma_jax.stages import policy
from alma_jax.store import records, shards
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Pair
from alma_jax.text import chat
from configs import alma, common

COUNTRIES = ("france", "norway", "italy", "japan", "kenya")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  s = session_in(tmp_path_factory.mktemp("run"), alma.get_config("mini"))
  with s.run:
    yield s


def pairs(prompts=range(5)):
  asked = [{"role": "user", "content": "country : lyon oslo"}]
  return [
    Pair(str(n), asked, f"answer: lyon {COUNTRIES[n]} .", f"answer: {COUNTRIES[n]} .", 8.0, 3.0, 2) for n in prompts
  ]


def trainset(session, name):
  stage = session.run.stage(name, {"name": name})
  return finished(stage, pairs(), Pair)


def finished(stage, rows, kind):
  stage.write_part(0, 1, rows, kind, {})
  shards.save_array(stage.dir / "order.npy", np.arange(len(rows)))
  stage.finish(files=["order.npy"])
  return Trainset(stage, kind)


def options(**loss):
  section = common.preferences(1e-3, 1e-4, batch=2, epochs=1, row_length=64, **loss)
  return build(training.PreferenceOptions, section, "config.dpo")


def dpo(session, name, init, trainsets, settings):
  return policy.dpo(session, policy.Job(name, init, settings, 3), init, trainsets)


def trained(session, name, settings):
  """The metrics of every step."""
  base, pairs = session.base, trainset(session, f"{name}/trainset")
  checkpoint = dpo(session, f"{name}/policy", base, [pairs], settings)
  lines = (checkpoint.directory.parent / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_simpo_asks_nothing_of_a_reference(session, monkeypatch):
  monkeypatch.setattr(training, "sequence_logprobs", None)
  rows = trained(session, "simpo", options(loss="simpo", beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1))
  assert len(rows) == 3 and rows[0]["margin"] != 0


def test_losses_with_a_reference_start_where_they_should(session):
  starts = {"rdpo": np.log(2), "ipo": (1 / (2 * 0.1)) ** 2, "kto": 0.5}
  for loss, wanted in starts.items():
    rows = trained(session, loss, options(loss=loss, label_smoothing=0.2 if loss == "rdpo" else 0.0))
    assert rows[0]["loss"] == pytest.approx(wanted, abs=2e-5)
    assert rows[-1]["margin"] > 0


def test_kto_has_responses_to_other_prompts():
  made = policy._mismatched(pairs([0, 1, 1, 2]))
  assert made == [f"answer: lyon {COUNTRIES[n]} ." for n in (2, 0, 0, 1)]
  with pytest.raises(RunError, match="2 training pairs, all for one prompt"):
    policy._mismatched(pairs([1, 1]))


def test_the_log_probs_of_a_reference_are_computed_once_for_all_rounds_and_checked(session, monkeypatch):
  first, second = trainset(session, "once_2/trainset"), trainset(session, "once_3/trainset")
  computed, plain = [], training.sequence_logprobs
  monkeypatch.setattr(training, "sequence_logprobs", lambda *x: computed.append(len(x[2])) or plain(*x))
  sft_1 = dpo(session, "once_2/policy", session.base, [first], options())
  assert computed == [10]
  dpo(session, "once_3/policy", session.base, [first, second], options())
  assert computed == [10, 10]  # of the new pairs alone
  dpo(session, "other/policy", sft_1, [first], options())
  assert computed == [10, 10, 10]  # another reference has its own
  stored = session.run.dir / "once_2" / "reference_base" / "logprobs.npy"
  found = np.load(stored)
  sides = [x for of in policy._pairs(session, first, options()).sides for x in of]
  np.testing.assert_allclose(found.ravel(), plain(session, session.base, sides, options()), rtol=1e-6)
  stage = types.SimpleNamespace(dir=stored.parent)
  with pytest.raises(RunError, match=r"not complete: it has the shape \(5, 2\) and 10 finite values"):
    policy._stored(stage, 6, 2)
  found[3, 1] = np.nan
  np.save(stored, found)
  with pytest.raises(RunError, match=r"logprobs\.npy is damaged"):
    policy._stored(stage, 5, 2)
  monkeypatch.setattr(training, "_sequence_logprobs", lambda *_: found.ravel())
  with pytest.raises(NotFinite, match=r"^a pair of prompt 3, model base: its log-prob is nan"):
    dpo(session, "broken/policy", session.base, [trainset(session, "broken/trainset")], options())


def test_policy_gradients_learn_to_prefer_what_scored_well(session):
  rows = []
  for n, prompt in enumerate(("country : lyon oslo", "country : oslo kobe", "country : lima lyon")):
    texts = ["answer: france .", "answer: norway norway .", "answer: italy"]
    for i, (text, advantage) in enumerate(zip(texts, (1.0, -0.5, -0.5), strict=True)):
      asked = ({"role": "user", "content": prompt},)
      rows.append(records.Graded(str(n), asked, i, text, i < 2, 5.0, advantage, 2, "sft_1"))
  stage = session.run.stage("graded", {"name": "graded"})
  graded = finished(stage, rows, records.Graded)
  section = common.policy_gradients(1e-3, 1e-3, batch=9, epochs=4, row_length=64, schedule="constant")
  settings = build(training.GrpoOptions, section, "config.grpo")
  job = policy.Job("graded/policy", session.base, settings, 3)
  checkpoint = policy.grpo(session, job, session.base, graded)
  lines = [json.loads(line) for line in (checkpoint.directory.parent / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 4 and abs(lines[0]["kl"]) < 1e-8 < lines[-1]["kl"]
  assert lines[-1]["loss"] < lines[0]["loss"] - 0.01

  def encode(text):
    return chat.encode_example(session.host.tokenizer, session.host.chat, rows[0].messages, text)

  texts = [encode(row.response) for row in rows[:2]]
  before, after = (training.sequence_logprobs(session, m, texts, settings) for m in (session.base, checkpoint))
  assert after[0] - before[0] > after[1] - before[1]


def test_losses_are_checked_before_anything_runs(tmp_path):
  def opened():
    with start.open_session(config, tmp_path / "run"):
      pass

  config = alma.get_config("mini")
  opened()
  config.dpo.loss = "sigmoid"
  with pytest.raises(ConfigError, match=r"config\.dpo\.loss is 'sigmoid'; it may be 'dpo', 'cdpo'"):
    opened()
  config.dpo.loss = "ipo"
  config.rounds = {3: {"dpo": {"label_smoothing": 0.1}}}
  with pytest.raises(ConfigError, match=r"round 3: config\.dpo\.label_smoothing is 0\.1, but the loss 'ipo' has none"):
    opened()
  config.rounds = {}
  wrong = {
    "sft.epochs": (0.0, r"config\.sft\.epochs is 0\.0; it must be above 0"),
    "policy.schedule": ("cos", r"config\.policy\.schedule is 'cos'; it may be 'cosine'"),
    "judge.distil.train.batch": (0, r"config\.judge\.distil\.train\.batch is 0"),
    "judge.train.remat": ("all", r"config\.judge\.train\.remat is 'all'; it may be 'auto', 'none'"),
    "policy.dropout": (1.0, r"config\.policy\.dropout is 1\.0"),
    "policy.average": ("rows", r"config\.policy\.average is 'rows'"),
    "grpo.clip_ratio": (0.0, r"config\.grpo\.clip_ratio is 0\.0"),
    "policy.init_from": ("sft_3", r"policy\.init_from is 'sft_3'; it may be 'base', 'latest', 'sft_1', 'sft_2'"),
    "trainset.method": ("grpo", r"set responses\.checkpoints to \('latest',\)"),
  }
  for name, (value, said) in wrong.items():
    config = alma.get_config("mini")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError, match=said):
      opened()
