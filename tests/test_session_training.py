"""Training in a run directory, on the miniature checkpoint: kills, epochs, logs, what is supervised."""

import json
import types

import jax
import numpy as np
import pytest

from alma_jax.llama import sharding
from alma_jax.session import training
from alma_jax.session.session import Session
from alma_jax.store.runs import Run
from alma_jax.text import chat
from alma_jax.text.judge import MINI_JUDGE, judge_example
from configs import alma, common

COUNT, BATCH = 11, 4  # three batches an epoch, the last one of three examples
PAIRS = [("country : lyon oslo", f"answer: lyon france {word} norway .") for word in ("oslo", "kobe", "lima")]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  mesh = sharding.make_mesh(2, 2, 2)
  with Run(tmp_path_factory.mktemp("run")) as run:
    yield Session(run, alma.get_config("mini"), mesh, sharding.make_mesh())


def options(section=common.training, **changes):
  settings = dict(batch=BATCH, epochs=2.0, row_length=48, checkpoint_every=2) | changes
  return section(1e-3, 1e-4, **settings)


def make_examples(session, count=COUNT):
  """Of different lengths and contents; most end with the stop token as every SFT example does."""
  words = ["france", "norway", "italy", "japan"]
  turns = [
    ([{"role": "user", "content": PAIRS[i % 3][0]}], f"answer: {' '.join(words[: 1 + i % 4])} lyon ." + " ." * (i // 4))
    for i in range(count)
  ]
  return [chat.encode_example(session.tokenizer, session.chat, *turn) for turn in turns]


def new_stage(session, name):
  return session.run.stage(name, {"name": name})


def metrics(stage):
  return [json.loads(line) for line in (stage.dir / "metrics.jsonl").read_text().splitlines()]


def weights_file(stage):
  return (stage.dir / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(session):
  """(stage, facts) of a training that nobody killed."""
  stage = new_stage(session, "straight")
  _, facts = training.train(session, stage, session.base, make_examples(session), options(), seed=5)
  return stage, facts


# Kills


class Killed(BaseException):
  pass


def killed_at(monkeypatch, step):
  """The process dies when it is about to log this step (counted from 0)."""
  write = training._Log.write

  def dying(self, at, values):
    if at == step:
      raise Killed
    write(self, at, values)

  monkeypatch.setattr(training._Log, "write", dying)


@pytest.mark.parametrize("kills", [[1], [3], [4, 5], [2, 2]])
def test_a_killed_training_ends_like_one_that_was_not(kills, session, straight, monkeypatch):
  stage = new_stage(session, f"killed_{'_'.join(map(str, kills))}")
  examples = make_examples(session)
  for step in kills:
    with monkeypatch.context() as patch, pytest.raises(Killed):
      killed_at(patch, step)
      training.train(session, stage, session.base, examples, options(), seed=5)
  logged, write = [], training._Log.write
  monkeypatch.setattr(training._Log, "write", lambda self, at, x: logged.append(at) or write(self, at, x))
  _, facts = training.train(session, stage, session.base, examples, options(), seed=5)
  assert logged == list(range(kills[-1] // 2 * 2, 6))  # from the last checkpoint on, not from the start
  assert weights_file(stage) == weights_file(straight[0])
  assert metrics(stage) == metrics(straight[0])
  assert [row["step"] for row in metrics(stage)] == [1, 2, 3, 4, 5, 6]
  assert facts == straight[1]


def test_a_log_without_a_checkpoint_begins_anew(session, straight, monkeypatch):
  stage = new_stage(session, "no_checkpoint")
  with monkeypatch.context() as patch, pytest.raises(Killed):
    killed_at(patch, 3)
    training.train(session, stage, session.base, make_examples(session), options(checkpoint_every=200), seed=5)
  assert len(metrics(stage)) == 3
  training.train(session, stage, session.base, make_examples(session), options(checkpoint_every=200), seed=5)
  assert metrics(stage) == metrics(straight[0])
  assert weights_file(stage) == weights_file(straight[0])


def test_the_metrics_are_those_of_a_training(straight):
  rows = metrics(straight[0])
  assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
  assert rows[0]["learning_rate"] == 1e-3
  assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_a_finished_stage_keeps_the_model_and_drops_the_checkpoints(session, monkeypatch):
  stage = new_stage(session, "finished")
  model, facts = training.train(session, stage, session.base, make_examples(session), options(epochs=1.0), seed=5)
  assert (stage.dir / "checkpoints").exists()
  checkpoint = training.finish(session, stage, facts, note="kept")
  assert not (stage.dir / "checkpoints").exists()
  again = new_stage(session, "finished")
  assert again.done and again.manifest["note"] == "kept" and again.manifest["counts"]["steps"] == 3
  assert training.trained(again) == checkpoint
  assert checkpoint.directory == model
  # What was exported is what scores: better than the base on what it was trained on.
  sequences = make_examples(session)
  before = training.sequence_logprobs(session, session.base, sequences, options())
  after = training.sequence_logprobs(session, checkpoint, sequences, options())
  assert after.sum() > before.sum() + 1


# Epochs, batches and what they hold


def captured(session, monkeypatch, name, examples, settings, seed=5, **more):
  """(the batches that the engine would have trained on, facts)."""
  seen = []

  def fit(model, batches, steps, *_):
    seen.extend(batches(step) for step in range(steps))
    return model

  monkeypatch.setattr(training.engine, "fit", fit)
  monkeypatch.setattr(training, "export", lambda *_: None)
  _, facts = training.train(session, new_stage(session, name), session.base, examples, settings, seed, **more)
  return seen, facts


def contents(batch):
  """The packed sequences of a batch as tuples of ids, in the order of the batch's examples."""
  return [tuple(batch["tokens"][batch["example"] == i].tolist()) for i in range(batch["example"].max() + 1)]


@pytest.mark.parametrize(
  ("count", "epochs", "steps"), [(11, 2, 6), (11, 1.5, 5), (8, 1, 2), (100, 2.2, 55), (3, 1, 1), (11, 0.1, 1)]
)
def test_steps_follow_from_epochs_and_every_example_is_seen_once_an_epoch(count, epochs, steps, session, monkeypatch):
  examples = make_examples(session, count)
  name = f"epochs_{count}_{epochs}"
  batches, facts = captured(session, monkeypatch, name, examples, options(epochs=epochs))
  assert len(batches) == facts["steps"] == steps
  assert facts["examples"] == count
  per_epoch = -(-count // BATCH)
  for start in range(0, steps - per_epoch + 1, per_epoch):
    seen = [ids for batch in batches[start : start + per_epoch] for ids in contents(batch)]
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in examples)
    assert [len(contents(b)) for b in batches[start : start + per_epoch]] == [
      min(BATCH, count - BATCH * i) for i in range(per_epoch)
    ]


def test_every_batch_has_one_shape_that_the_mesh_divides(session, monkeypatch):
  batches, facts = captured(session, monkeypatch, "shapes", make_examples(session), options())
  assert {x.shape for batch in batches for x in batch.values()} == {(facts["rows"], 48)}
  assert facts["rows"] % 4 == 0


def test_the_order_follows_from_seed_and_epoch(session, monkeypatch):
  examples = make_examples(session, 10)
  order = {}
  for name, seed in (("a", 5), ("b", 5), ("c", 6)):
    with monkeypatch.context() as patch:
      batches, _ = captured(session, patch, f"order_{name}", examples, options(batch=5), seed)
    order[name] = [contents(batch) for batch in batches]
  assert order["a"] == order["b"] != order["c"]
  assert order["a"][:2] != order["a"][2:]


def last_targets(batch):
  """(last target, its weight) of every packed sequence."""
  found = []
  for i in range(batch["example"].max() + 1):
    row, at = np.argwhere(batch["example"] == i)[-2]  # the last place has no target
    found.append((int(batch["targets"][row, at]), float(batch["weights"][row, at])))
  return found


def test_the_stop_token_of_sft_and_judge_examples_is_supervised(session, monkeypatch):
  tok, fmt = session.tokenizer, session.chat
  stop = chat.stop_ids(tok, fmt)[0]
  sft = make_examples(session)
  asked = [{"role": "user", "content": PAIRS[0][0]}]
  judged = [judge_example(tok, fmt, MINI_JUDGE, asked, PAIRS[i % 3][1], i) for i in range(COUNT)]
  judged = [(ids, 0.25 * np.asarray(mask, np.float32)) for ids, mask in judged]
  for name, examples, weight in (("stop_sft", sft, 1.0), ("stop_judge", judged, 0.25)):
    with monkeypatch.context() as patch:
      batches, _ = captured(session, patch, name, examples, options())
    assert {pair for batch in batches for pair in last_targets(batch)} == {(stop, weight)}
    total = sum(batch["weights"].sum() for batch in batches)
    assert total == pytest.approx(2 * sum(float(np.sum(mask)) for _, mask in examples))


# Preferences


def test_dpo_from_its_own_reference_starts_at_ln_2_and_pairs_stay_together(session, monkeypatch):
  sequences = make_examples(session, 10)  # five pairs in batches of two: the last one is filled up
  settings = options(common.preferences, batch=2, epochs=1.0)
  reference = training.sequence_logprobs(session, session.base, sequences, settings).reshape(-1, 2)
  stage = new_stage(session, "dpo")
  _, facts = training.train(session, stage, session.base, sequences, settings, 5, "dpo", reference)
  rows = metrics(stage)
  assert len(rows) == facts["steps"] == 3 and facts["examples"] == 5
  assert rows[0]["loss"] == pytest.approx(np.log(2), abs=2e-5)
  assert abs(rows[0]["margin"]) < 1e-4 < abs(rows[-1]["margin"])

  batches, _ = captured(session, monkeypatch, "dpo_batches", sequences, settings, objective="dpo", reference=reference)
  assert [batch["real"].tolist() for batch in batches] == [[1, 1], [1, 1], [1, 0]]
  whole = {(tuple(sequences[2 * i][0]), tuple(sequences[2 * i + 1][0])): reference[i] for i in range(5)}
  seen = 0
  for batch in batches:
    ids = contents(batch)
    for n in range(len(ids) // 2):
      np.testing.assert_array_equal(batch["reference"][n], whole[ids[2 * n], ids[2 * n + 1]])
      seen += 1
  assert seen == 5


def test_sequence_log_probs_are_in_order_whatever_the_batch(session):
  sequences = make_examples(session)
  found = [training.sequence_logprobs(session, session.base, sequences, options(batch=b)) for b in (4, 11)]
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
  backwards = training.sequence_logprobs(session, session.base, sequences[::-1], options())
  np.testing.assert_allclose(backwards[::-1], found[0], rtol=1e-5)
  assert jax.sharding.get_abstract_mesh().empty


def test_a_second_host_writes_no_log(session, tmp_path):
  stage = types.SimpleNamespace(dir=tmp_path)
  log = training._Log(types.SimpleNamespace(run=types.SimpleNamespace(host=1)), stage)
  log.keep(3)
  log.write(3, {"loss": 1.0})
  assert not list(tmp_path.iterdir())
