"""Training on pairs in a run directory: what the losses ask for beside the pairs, and nothing else."""

import json

import numpy as np
import pytest

from alma_jax import start
from alma_jax.config import ConfigError
from alma_jax.llama import sharding
from alma_jax.session import training
from alma_jax.session.session import Session
from alma_jax.stages import policy
from alma_jax.store.records import Pair
from alma_jax.store.runs import Run, RunError
from configs import alma, common

COUNTRIES = ("france", "norway", "italy", "japan", "kenya")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  with Run(tmp_path_factory.mktemp("run")) as run:
    yield Session(run, alma.get_config("mini"), sharding.make_mesh(2, 2, 2), sharding.make_mesh())


def pairs(prompts=range(5)):
  asked = [{"role": "user", "content": "country : lyon oslo"}]
  return [
    Pair(str(n), asked, f"answer: lyon {COUNTRIES[n]} .", f"answer: {COUNTRIES[n]} .", 8.0, 3.0, 2) for n in prompts
  ]


def trainset(session, name):
  stage = session.run.stage(f"{name}_pairs", {"name": name})
  stage.write_part(0, 1, pairs(), Pair, {})
  stage.finish()
  return stage


def options(**loss):
  return common.preferences(1e-3, 1e-4, batch=2, epochs=1, row_length=64, **loss)


def trained(session, name, settings):
  """The metrics of every step."""
  checkpoint = policy.dpo(session, name, session.base, [trainset(session, name)], settings, seed=3)
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
  assert [text for _, text in made[2::3]] == [f"answer: lyon {COUNTRIES[n]} ." for n in (2, 0, 0, 1)]
  assert [text for _, text in made[0::3]] == [pair.chosen for pair in pairs([0, 1, 1, 2])]
  with pytest.raises(RunError, match="2 training pairs, all for one prompt"):
    policy._mismatched(pairs([1, 1]))


def test_losses_are_checked_before_anything_runs(tmp_path):
  def opened():
    with start.open_session(config, tmp_path / "run"):
      pass

  config = alma.get_config("mini")
  opened()
  config.dpo.loss = "sigmoid"
  with pytest.raises(ConfigError, match=r"config: dpo\.loss is 'sigmoid'; it may be 'dpo', 'cdpo'"):
    opened()
  config.dpo.loss = "ipo"
  config.rounds = {3: {"dpo": {"label_smoothing": 0.1}}}
  with pytest.raises(ConfigError, match=r"round 3: dpo: label_smoothing is 0\.1, but the loss 'ipo' has none"):
    opened()
