"""Training in a run directory, on the miniature checkpoint: kills, epochs, logs, what is supervised."""

import collections
import contextlib
import dataclasses
import json
import shutil
import signal
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from engine_models import CONFIG
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from tensorboardX.proto import event_pb2

from alma_jax import options as options_lib
from alma_jax.engine import train as engine_train
from alma_jax.errors import RunError
from alma_jax.llama import sharding
from alma_jax.mini import formats
from alma_jax.options import ConfigError
from alma_jax.runtime import checkpoints as checkpoints_of
from alma_jax.runtime import metrics as metrics_of
from alma_jax.runtime import training
from alma_jax.runtime.batches import Batches, Examples, GradedResponses, Pairs, compact
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.runtime.metrics import StepLog
from alma_jax.runtime.session import Session
from alma_jax.runtime.shapes import fitted, fixed
from alma_jax.store.runs import Run
from alma_jax.text import chat, packing
from alma_jax.text.judge import judge_example
from configs import alma, common

COUNT, BATCH = 11, 4  # three batches an epoch, the last one of three examples
PAIRS = [("country : lyon oslo", f"answer: lyon france {word} norway .") for word in ("oslo", "kobe", "lima")]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  model = options_lib.build(ModelOptions, alma.get_config("mini").model, "config.model")
  host = Host(model, EngineOptions(), sharding.make_mesh(), Display(speaks=False))
  with Run(tmp_path_factory.mktemp("run")) as run:
    yield Session(run, host, sharding.make_mesh(2, 2, 2), {}, ConfigDict())


SETTINGS = dict(learning_rate=1e-3, final_learning_rate=1e-4, batch=BATCH, epochs=2.0, row_length=48)


def options(kind=training.Options, **changes):
  return options_lib.build(kind, SETTINGS | dict(checkpoint_every=2) | changes, "config.sft")


def make_examples(session, count=COUNT):
  """Of different lengths and contents; most end with the stop token as every SFT example does."""
  words = ["france", "norway", "italy", "japan"]
  turns = [
    ([{"role": "user", "content": PAIRS[i % 3][0]}], f"answer: {' '.join(words[: 1 + i % 4])} lyon ." + " ." * (i // 4))
    for i in range(count)
  ]
  return [chat.encode_example(session.host.tokenizer, session.host.chat, *turn) for turn in turns]


def data(examples):
  return Examples(examples, [f"example {i}" for i in range(len(examples))])


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
  _, facts = training.train(session, stage, session.base, data(make_examples(session)), options(), seed=5)
  return stage, facts


# Options

KINDS = [
  (training.Options, common.training),
  (training.PolicyOptions, common.policy),
  (training.PreferenceOptions, common.preferences),
  (training.GrpoOptions, common.policy_gradients),
]


@pytest.mark.parametrize(("kind", "section"), KINDS)
def test_options_are_what_the_config_says_and_have_its_defaults(kind, section):
  config = section(**SETTINGS)
  assert set(options_lib.fields_of(kind)) == set(config.keys())
  found = options_lib.build(kind, config, "config.sft")
  assert found == options_lib.build(kind, SETTINGS, "config.sft")
  practical = {"fit_rows", "remat", "passes", "checkpoint_every", "checkpoint_keep"}
  left_out = practical | {"keep_epochs"}  # that is 0 and later
  assert options_lib.fingerprint(found) == {k: v for k, v in config.to_dict().items() if k not in left_out}


@pytest.mark.parametrize(
  ("kind", "wrong", "said"),
  [
    (training.Options, dict(batch=0), "config.sft.batch is 0; it must be at least 1"),
    (training.Options, dict(epochs=0.0), "config.sft.epochs is 0.0; it must be above 0"),
    (training.Options, dict(learning_rate=0), "config.sft.learning_rate is 0; it must be above 0"),
    (training.Options, dict(average="token"), "config.sft.average is 'token'; .*did you mean 'tokens'"),
    (training.Options, dict(dropout=1.0), "config.sft.dropout is 1.0; it must be at least 0 and below 1"),
    (training.Options, dict(loss="dpo"), "config.sft has no field 'loss'"),
    (training.PolicyOptions, dict(history="last"), "config.sft.history is 'last'; .*did you mean 'latest'"),
    (training.PreferenceOptions, dict(loss="kot"), "config.sft.loss is 'kot'; .*did you mean 'kto'"),
    (training.GrpoOptions, dict(kl=-1.0), "config.sft.kl is -1.0; it must be at least 0"),
  ],
)
def test_invalid_options_are_refused(kind, wrong, said):
  with pytest.raises(ConfigError, match=said):
    options(kind, **wrong)


def test_objectives_follow_from_the_options():
  assert options(dropout=0.3, remat="full").objective("bfloat16") == engine_train.Objective(
    None, "full", 0.3, "bfloat16"
  )
  preference = options(training.PreferenceOptions, loss="ipo")
  assert preference.objective("float32").kind == preference.preference and preference.preference.loss == "ipo"
  grpo = options(training.GrpoOptions, kl=0.5)
  assert grpo.objective("float32").kind == grpo.grpo and grpo.grpo.kl == 0.5


# Kills


class Killed(BaseException):
  pass


def killed_at(monkeypatch, step):
  """The process dies when it is about to log this step (counted from 0)."""
  write = StepLog.write

  def dying(self, at, values):
    if at == step:
      raise Killed
    return write(self, at, values)

  monkeypatch.setattr(StepLog, "write", dying)


@pytest.mark.parametrize("kills", [[1], [3], [4, 5], [2, 2]])
def test_a_killed_training_ends_like_one_that_was_not(kills, session, straight, monkeypatch):
  stage = new_stage(session, f"killed_{'_'.join(map(str, kills))}")
  examples = make_examples(session)
  for step in kills:
    with monkeypatch.context() as patch, pytest.raises(Killed):
      killed_at(patch, step)
      training.train(session, stage, session.base, data(examples), options(), seed=5)
  logged, write = [], StepLog.write
  monkeypatch.setattr(StepLog, "write", lambda self, at, x: logged.append(at) or write(self, at, x))
  _, facts = training.train(session, stage, session.base, data(examples), options(), seed=5)
  assert logged == list(range(kills[-1] // 2 * 2, 6))  # from the last checkpoint on, not from the start
  assert weights_file(stage) == weights_file(straight[0])
  assert metrics(stage) == metrics(straight[0])
  assert [row["step"] for row in metrics(stage)] == [1, 2, 3, 4, 5, 6]
  assert facts == straight[1]


@pytest.mark.parametrize("kills", [[], [2, 5]])
def test_the_models_of_epochs_stay_and_are_those_of_a_training_that_was_never_killed(
  kills, session, straight, monkeypatch
):
  """Steps 3 and 6 end the two epochs, checkpoints are written after 2 and 4: one kill comes before the first epoch's
  model, the other after it."""
  stage, settings = new_stage(session, f"epochs_{len(kills)}"), options(keep_epochs=1)
  for step in kills:
    with monkeypatch.context() as patch, pytest.raises(Killed):
      killed_at(patch, step)
      training.train(session, stage, session.base, data(make_examples(session)), settings, seed=5)
  _, facts = training.train(session, stage, session.base, data(make_examples(session)), settings, seed=5)
  last = training.finish(session, stage, facts, settings)
  kept = training.by_epoch(last)
  assert list(kept) == [1, 2] and kept[2].directory == last.directory
  assert kept[2].content == last.content != kept[1].content
  assert weights_file(stage) == weights_file(straight[0])
  assert stage.manifest["files"].keys() >= {"epoch_01/model/model.safetensors", "model/model.safetensors"}
  half = new_stage(session, f"epochs_alone_{len(kills)}")  # the same first epoch, its learning rates included
  with monkeypatch.context() as patch, pytest.raises(Killed):
    killed_at(patch, 3)
    training.train(session, half, session.base, data(make_examples(session)), options(keep_epochs=1), seed=5)
  found = (stage.dir / "epoch_01/model/model.safetensors").read_bytes()
  assert found == (half.dir / "epoch_01/model/model.safetensors").read_bytes() != weights_file(stage)


def test_a_log_without_a_checkpoint_begins_anew(session, straight, monkeypatch):
  stage = new_stage(session, "no_checkpoint")
  with monkeypatch.context() as patch, pytest.raises(Killed):
    killed_at(patch, 3)
    training.train(session, stage, session.base, data(make_examples(session)), options(checkpoint_every=200), seed=5)
  assert len(metrics(stage)) == 3
  training.train(session, stage, session.base, data(make_examples(session)), options(checkpoint_every=200), seed=5)
  assert metrics(stage) == metrics(straight[0])
  assert weights_file(stage) == weights_file(straight[0])


def test_the_metrics_are_those_of_a_training(straight):
  rows = metrics(straight[0])
  assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
  assert rows[0]["learning_rate"] == 1e-3
  assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_an_exported_model_keeps_the_ids_that_the_base_model_names(session, straight):
  base = json.loads((session.host.directory / "config.json").read_text())
  exported = json.loads((straight[0].dir / "model" / "config.json").read_text())
  generation = json.loads((straight[0].dir / "model" / "generation_config.json").read_text())
  for name in ("bos_token_id", "pad_token_id"):
    assert exported[name] == generation[name] == base[name] is not None


def test_times_and_curves_are_logged_for_people(session, straight):
  stage, facts = straight
  speed = [json.loads(line) for line in (stage.dir / "speed.jsonl").read_text().splitlines()]
  assert [row["step"] for row in speed] == list(range(1, facts["steps"] + 1))
  lengths = [len(ids) for ids, _ in make_examples(session)]
  assert sum(row["tokens"] for row in speed) == 2 * sum(lengths)
  assert all(row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-4) for row in speed)
  (events,) = (stage.dir / "tensorboard").iterdir()
  found = list(tensorboard_scalars(events))
  losses = {step: value for name, step, value in found if name == "loss"}
  assert losses == {row["step"]: pytest.approx(row["loss"], rel=1e-5) for row in metrics(stage)}
  assert {name for name, _, _ in found} >= {"learning_rate", "gradient_norm", "tokens_per_second"}


def test_the_share_of_the_devices_peak_is_logged_where_the_peak_is_known(session, tmp_path, monkeypatch):
  monkeypatch.setattr(metrics_of, "peak", lambda device: 1e9)
  batches = Batches(data(make_examples(session)), options(), 5, 1)
  with StepLog(session, types.SimpleNamespace(dir=tmp_path, name="sft_1"), batches) as log:
    log.write(0, {"loss": 1.0})
  row = json.loads((tmp_path / "speed.jsonl").read_text())
  computed = metrics_of.operations(session.host.trained_config, batches.lengths(0))
  assert row["mfu"] == pytest.approx(computed / row["seconds"] / (8 * 1e9), rel=1e-4)


def test_operations_are_those_of_the_matrix_products():
  # 2 for the forward and 4 for the backward pass, of each weight and of attention's two products, half of it masked.
  c, lengths = CONFIG, [10, 3]
  weights = c.depth * (c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.ffn) + c.width * c.vocab
  norms = (2 * c.depth + 1) * c.width
  attention = sum(6 * c.depth * n * n * c.heads * c.head_dim for n in lengths)
  assert metrics_of.operations(c, lengths) == 6 * (weights + norms) * 13 + attention


def test_peaks_are_found_by_the_names_of_devices():
  def of(kind):
    return metrics_of.peak(types.SimpleNamespace(device_kind=kind))

  assert of("NVIDIA H200") == of("NVIDIA H100 80GB HBM3") == 989e12
  assert (of("TPU v5 lite"), of("TPU v5p"), of("cpu")) == (197e12, 459e12, None)


def tensorboard_scalars(path):
  """(name, step, value) of an event file: records of a length, its checksum, that many bytes, their checksum."""
  data = path.read_bytes()
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    event, data = event_pb2.Event.FromString(data[12 : 12 + size]), data[16 + size :]
    yield from ((value.tag, event.step, np.float32(value.simple_value)) for value in event.summary.value)


def test_sigterm_saves_at_once_and_the_same_command_goes_on(session, straight, monkeypatch):
  stage, settings = new_stage(session, "stopped"), options(checkpoint_every=200)
  examples, write = make_examples(session), StepLog.write

  def signalled(self, at, values):
    if at == 1:
      signal.raise_signal(signal.SIGTERM)
    return write(self, at, values)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
    patch.setattr(StepLog, "write", signalled)
    training.train(session, stage, session.base, data(examples), settings, seed=5)
  assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
  saved = [int(path.name) for path in (stage.dir / "checkpoints").iterdir()]
  assert len(saved) == 1 and 2 < saved[0] < 6
  training.train(session, stage, session.base, data(examples), settings, seed=5)
  assert weights_file(stage) == weights_file(straight[0])
  assert metrics(stage) == metrics(straight[0])


def test_a_checkpoint_goes_on_on_another_mesh(session, straight, monkeypatch):
  stage, examples = new_stage(session, "moved"), make_examples(session)
  for kill, sizes in ((3, (2, 2, 2)), (5, (1, 8, 1)), (None, (8, 1, 1))):
    moved = dataclasses.replace(session, mesh=sharding.make_mesh(*sizes))
    with monkeypatch.context() as patch, pytest.raises(Killed) if kill else contextlib.nullcontext():
      if kill:
        killed_at(patch, kill)
      training.train(moved, stage, session.base, data(examples), options(), seed=5)
  found, wanted = (safetensors.numpy.load_file(s.dir / "model" / "model.safetensors") for s in (stage, straight[0]))
  for name, x in wanted.items():
    np.testing.assert_allclose(found[name], x, atol=2e-5, err_msg=name)


def test_checkpoints_that_stay_can_be_exported(session, straight):
  stage, settings = new_stage(session, "kept"), options(checkpoint_keep=2)
  _, facts = training.train(session, stage, session.base, data(make_examples(session)), settings, seed=5)
  checkpoint = training.finish(session, stage, facts, settings)
  assert sorted(path.name for path in (stage.dir / "checkpoints").iterdir()) == ["2", "4"]
  wanted = safetensors.numpy.load_file(checkpoint.directory / "model.safetensors")
  moved = []
  for step in (2, 4):
    model = training.checkpoint_model(session.host, stage.dir / "checkpoints", step, sharding.make_mesh(1, 4, 2))
    found = safetensors.numpy.load_file(
      training.export(session.host, model, stage.dir / f"at_{step}") / "model.safetensors"
    )
    assert found.keys() == wanted.keys()
    moved.append(sum(np.abs(found[name] - x).sum() for name, x in wanted.items()))
  assert moved[0] > moved[1] > 0  # nearer to the end


def test_a_checkpoint_is_read_by_name_whatever_the_order_of_the_tree(tmp_path):
  tree = collections.OrderedDict
  state = {"embed": jnp.float32([1, 2]), "blocks": {"q": jnp.ones((2, 3), jnp.float32)}}, (jnp.int32(7), {})
  with checkpoints_of.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(3, state)
  other = (
    tree(norm=tree(), embed=jnp.zeros(2, jnp.float32), blocks=tree(q=jnp.zeros((2, 3), jnp.float32))),
    (jnp.int32(0),),
  )
  assert list(checkpoints_of.named(state)) == ["model/blocks/q", "model/embed", "moments/0"]
  assert list(checkpoints_of.named(other)) == ["model/embed", "model/blocks/q", "moments/0"]
  with checkpoints_of.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest == 3 and checkpoints.moments(3) == "float32"
    (model, (count,)) = checkpoints.load(3, other)
  assert model["embed"].tolist() == [1, 2] and model["blocks"]["q"].tolist() == [[1] * 3] * 2 and count == 7


def test_the_names_in_a_checkpoint_are_paths_in_the_model_and_its_moments(session):
  state = engine_train.abstract_state(session.host.trained_config, session.mesh, "float32")
  names = set(checkpoints_of.named(state))
  assert {"model/embed", "model/blocks/q", "moments/0/mu/blocks/q", "moments/0/nu/embed", "moments/0/count"} <= names
  assert not any("value" in name for name in names)


def test_a_checkpoint_with_numbered_arrays_is_refused_in_training_and_exported(session, straight):
  stage, settings = new_stage(session, "old"), options(checkpoint_keep=2)
  training.train(session, stage, session.base, data(make_examples(session)), settings, seed=5)
  directory, mesh = stage.dir / "checkpoints", sharding.make_mesh(1, 4, 2)
  state = engine_train.abstract_state(session.host.trained_config, session.mesh, "float32")
  with checkpoints_of.Checkpoints(directory) as checkpoints:
    found = checkpoints.load(4, state)
  numbered = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(found))}
  with ocp.training.Checkpointer(directory.absolute()) as checkpoints:
    checkpoints.save(5, numbered, force=True)
  with pytest.raises(
    RunError, match=r"checkpoints/5 was written by alma_jax 0\.1 .*: delete .*/old/checkpoints to train"
  ):
    training.train(session, stage, session.base, data(make_examples(session)), settings, seed=5)
  read = [training.checkpoint_model(session.host, directory, step, mesh) for step in (4, 5)]
  for new, old in zip(*map(jax.tree.leaves, read), strict=True):
    np.testing.assert_array_equal(new, old)


def test_the_examples_of_a_loss_that_is_not_finite_are_saved(session, monkeypatch):
  examples = make_examples(session)
  ids, mask = examples[7]
  examples[7] = ids, np.where(mask, np.nan, 0)
  stage = new_stage(session, "broken")
  at = next(step for step in range(3) if 7 in Batches(data(examples), options(), 5, 4).members(step))
  with pytest.raises(
    engine_train.TrainingError, match=rf"step {at + 1} of 6: .*not finite for 'example 7'\. .*failure.json"
  ):
    training.train(session, stage, session.base, data(examples), options(), seed=5)
  found = json.loads((stage.dir / "failure.json").read_text())
  assert found["step"] == at + 1 and found["examples"][0]["id"] == "example 7"
  assert found["examples"][0]["logprobs"] == ["nan"] and np.isfinite(found["examples"][1]["logprobs"][0])
  assert len(found["examples"]) == len(Batches(data(examples), options(), 5, 4).members(at))


def test_too_little_memory_is_said_before_the_first_step(session, monkeypatch):
  stage = new_stage(session, "large")
  monkeypatch.setattr(Host, "training_bytes", 10**6)
  with pytest.raises(
    engine_train.TrainingError, match=r"on each device and 0\.0 GB are there.*What helps: .*moments='bfloat16'"
  ):
    training.train(session, stage, session.base, data(make_examples(session)), options(), seed=5)
  assert not (stage.dir / "checkpoints").exists()


def test_a_step_that_fits_in_no_way_is_taken_in_more_passes(session, monkeypatch):
  real, tried, examples = training.planned, [], data(make_examples(session))

  def planned(c, task, batch, passes, memory):
    tried.append(passes)
    if passes < fits:
      raise engine_train.TooLarge("too large", in_more_passes=passes < helps)
    return real(c, task, batch, passes, memory)

  fits, helps = 2, 4
  with monkeypatch.context() as patch:
    patch.setattr(training, "planned", planned)
    training.train(session, found := new_stage(session, "passes"), session.base, examples, options(), seed=5)
    assert tried == [1, 2]
    fits, helps = 4, 2
    for changes, wanted in ({}, [1, 2]), ({"remat": "full"}, [1]):
      tried.clear()
      with pytest.raises(engine_train.TooLarge):
        training.train(session, new_stage(session, "never"), session.base, examples, options(**changes), seed=5)
      assert tried == wanted
  training.train(session, asked := new_stage(session, "asked"), session.base, examples, options(passes=2), seed=5)
  assert weights_file(found) == weights_file(asked)


def test_a_finished_stage_keeps_the_model_and_drops_the_checkpoints(session, monkeypatch):
  stage = new_stage(session, "finished")
  model, facts = training.train(session, stage, session.base, data(make_examples(session)), options(epochs=1.0), seed=5)
  assert (stage.dir / "checkpoints").exists()
  checkpoint = training.finish(session, stage, facts, options(), note="kept")
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


def all_batches(examples, settings, seed=5, unit=4):
  """The batches of a whole training."""
  batches = Batches(data(examples), settings, seed, unit)
  return [batches(step) for step in range(batches.steps)], batches


def contents(batch):
  """The packed sequences of a batch as tuples of ids, in the order of the batch's examples."""
  return [tuple(batch["tokens"][batch["example"] == i].tolist()) for i in range(batch["example"].max() + 1)]


@pytest.mark.parametrize(
  ("count", "epochs", "steps"), [(11, 2, 6), (11, 1.5, 5), (8, 1, 2), (100, 2.2, 55), (3, 1, 1), (11, 0.1, 1)]
)
def test_steps_follow_from_epochs_and_every_example_is_seen_once_an_epoch(count, epochs, steps, session):
  examples = make_examples(session, count)
  made, batches = all_batches(examples, options(epochs=epochs))
  assert len(made) == batches.steps == steps
  assert batches.count == count
  per_epoch = -(-count // BATCH)
  for start in range(0, steps - per_epoch + 1, per_epoch):
    seen = [ids for batch in made[start : start + per_epoch] for ids in contents(batch)]
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in examples)
    assert [len(contents(b)) for b in made[start : start + per_epoch]] == [
      min(BATCH, count - BATCH * i) for i in range(per_epoch)
    ]
  assert sum(map(sum, map(batches.lengths, range(per_epoch)))) == sum(len(ids) for ids, _ in examples)


@pytest.mark.parametrize(("unit", "rows"), [(1, 4), (4, 4), (6, 12)])
def test_without_fitting_every_batch_has_one_shape_that_mesh_and_passes_divide(unit, rows, session):
  made, batches = all_batches(make_examples(session), options(fit_rows=False), unit=unit)
  assert {x.shape for batch in made for x in batch.values()} == {(rows, 48)} and set(batches.shapes) == {((rows, 48),)}


def ragged(count, kind="even"):
  """Examples of 20 to 399 tokens, or of log-normal lengths up to 2,048 with a median of 290."""
  rng = np.random.default_rng(count)
  lengths = rng.integers(20, 400, count)
  if kind == "log-normal":
    lengths = np.clip(rng.lognormal(np.log(290), 0.8, count), 20, 2048).astype(int)
  return data([(np.full(n, 7, np.int32), np.arange(n) >= n // 2) for n in lengths])


EVEN = [
  (60, 32, 2048),
  (1000, 32, 2048),
  (5000, 32, 2048),
  (60, 16, 512),
  (1000, 16, 512),
  (60, 32, 512),
  (1000, 8, 2048),
]
LOG_NORMAL = [(60, 8, 2048), (1000, 8, 2048), (5000, 8, 2048), (1000, 16, 2048), (1000, 32, 2048)]


@pytest.mark.parametrize(
  ("count", "batch", "row_length", "kind"),
  [(*cell, "even") for cell in EVEN] + [(*cell, "log-normal") for cell in LOG_NORMAL],
)
def test_few_shapes_fit_ragged_data(count, batch, row_length, kind):
  settings = options(batch=batch, epochs=3.0, row_length=row_length)
  batches = Batches(ragged(count, kind), settings, 5, unit=1)
  assert batches.useful >= 0.85 and len(set(batches.shapes)) <= (4 if kind == "even" else 8)
  before = Batches(ragged(count, kind), dataclasses.replace(settings, fit_rows=False), 5, unit=1)
  assert batches.useful > 1.05 * before.useful
  for step in (0, batches.steps - 1):
    made, plain = batches(step), before(step)
    assert made["tokens"].shape == batches.shapes[step][0] and contents(made) == contents(plain)
    assert made["weights"].sum() == plain["weights"].sum()
  # Each shape is that of the steps it was made for, and no smaller one would hold them.
  at = batches.largest()
  assert len(at) == len(set(batches.shapes))
  assert batches.shapes[at[0]][0].places == max(shape.places for (shape,) in batches.shapes)


@pytest.mark.parametrize("seed", range(12))
def test_every_step_fits_its_shape(seed):
  rng = np.random.default_rng(seed)
  row_length, unit, programs = int(rng.choice([3, 12, 64, 300])), int(rng.choice([1, 3, 8])), int(rng.choice([1, 2, 8]))
  # Some of 300 steps have an example or a size as the sampled ones have not.
  steps = [rng.integers(1, 1 + row_length // 3, rng.integers(1, 9)).tolist() for _ in range(300)]
  for step in rng.integers(0, 300, 9):
    steps[step] = rng.integers(1, row_length + 1, rng.integers(1, 20)).tolist()
  found = fitted(steps, row_length, unit, programs)
  assert len(set(found)) <= programs
  for of, shape in zip(steps, found, strict=True):
    assert shape.rows % unit == 0 and shape.length <= 2 * row_length
    assert len(packing.pack(of, shape.length)) <= shape.rows


def test_a_step_that_the_sample_has_no_shape_for_gets_one():
  # 128 of 300 steps are sampled, among them the fullest and that with the longest example: not the hard one
  steps = [[8, 8]] * 296 + [[60], [33] * 7, [4] * 59, [4] * 60]
  for of, shape in zip(steps, fitted(steps, 64, unit=1), strict=True):
    assert len(packing.pack(of, shape.length)) <= shape.rows


def test_one_more_program_must_save_a_share_of_all_places():
  small, large = [[64]], [[128]]  # one program more saves n / (2 n + 2) of the places of n small and one large step
  assert set(fitted(9 * small + large, 128, 1)) == {(1, 64), (1, 128)}
  assert set(fitted(small + 99 * large, 128, 1)) == {(1, 128)}  # 64 of 12,800
  levels = [[16 * n] for n in range(1, 9)]
  assert len(set(fitted(200 * levels, 128, 1))) > len(set(fitted(3 * levels, 128, 1))) == 4


def test_shapes_of_many_steps_are_found_by_packing_each_a_few_times(monkeypatch):
  rng, packed, pack = np.random.default_rng(0), [], packing.pack
  steps = np.clip(rng.lognormal(5.7, 0.8, 24_000), 20, 2048).astype(int).reshape(-1, 8).tolist()
  monkeypatch.setattr(packing, "pack", lambda lengths, length: packed.append(length) or pack(lengths, length))
  found = fitted(steps, 2048, unit=1)
  assert sum(map(sum, steps)) >= 0.85 * sum(shape.places for shape in found)
  assert len(packed) <= 2 * len(steps)  # besides the 128 steps of the sample


def test_with_many_ways_the_length_of_rows_varies_instead_of_their_number():
  lengths = np.clip(np.random.default_rng(0).lognormal(5.9, 0.8, 1600), 20, 2048).astype(int)
  steps = [lengths[at : at + 32].tolist() for at in range(0, 1600, 32)]  # about 16,000 tokens
  found = fitted(steps, 2048, unit=8)
  assert {shape.rows for shape in found} == {8} and 1 < len(set(found)) <= 4
  assert sum(map(sum, steps)) >= 0.8 * sum(shape.places for shape in found)
  for of, shape in zip(steps, found, strict=True):
    assert len(packing.pack(of, shape.length)) <= 8 and shape.length <= 4096
  assert sum(map(sum, steps)) < 0.5 * sum(shape.places for shape in fixed(steps, 2048, unit=64))


def test_a_mesh_with_more_ways_than_rows_gets_larger_tensor_groups():
  mesh = sharding.make_mesh(1, 8, 1)
  config = dataclasses.replace(CONFIG, heads=16, kv_heads=8, ffn=64)
  s = types.SimpleNamespace(mesh=mesh, host=types.SimpleNamespace(trained_config=config))
  settings = options(batch=8, row_length=2048)  # about 1,700 tokens a step, and rows of 400 at the least
  batches, found = training._spread(s, ragged(1000), settings, 5)
  assert found.shape["fsdp"] * found.shape["tensor"] == 8 > found.shape["fsdp"]
  assert found.devices.ravel().tolist() == mesh.devices.ravel().tolist()
  assert batches.useful > 1.3 * Batches(ragged(1000), settings, 5, unit=8).useful
  assert training._spread(s, ragged(1000), dataclasses.replace(settings, fit_rows=False), 5)[1] is mesh
  assert training._spread(s, ragged(1000), options(batch=512, row_length=2048), 5)[1] is mesh
  config = dataclasses.replace(CONFIG, heads=6, kv_heads=3)  # no more than one device shares three heads
  assert not list(sharding.with_fewer_replicas(mesh, config))
  wide = sharding.with_fewer_replicas(sharding.make_mesh(4, 1, 2), dataclasses.replace(CONFIG, kv_heads=8, ffn=64))
  assert [tuple(of.shape.values()) for of in wide] == [(2, 1, 4), (1, 1, 8)]


def test_tpus_get_shares_that_they_gather(monkeypatch):
  # Llama-3-8B is 4,096 wide, 32 times 128.
  c = dataclasses.replace(CONFIG, width=4096)
  shares = [
    sharding.in_whole_lanes(sizes, c, "tpu") for sizes in ((1, 64, 1), (1, 32, 2), (2, 128, 1), (1, 64, 2), (1, 33, 1))
  ]
  assert shares == [(4, 16, 1), (1, 32, 2), (16, 16, 1), (2, 32, 2), (1, 33, 1)]
  assert sharding.in_whole_lanes((1, 64, 1), c, "gpu") == (1, 64, 1)
  mesh, settings = sharding.make_mesh(1, 8, 1), options(batch=512, row_length=2048)
  wide = dataclasses.replace(CONFIG, width=256)
  s = types.SimpleNamespace(mesh=mesh, host=types.SimpleNamespace(trained_config=wide))
  as_it_is = training._spread(s, ragged(1000), settings, 5)
  monkeypatch.setattr(sharding, "platform", lambda mesh=None: "tpu")
  batches, found = training._spread(s, ragged(1000), settings, 5)
  assert as_it_is[1] is mesh and tuple(found.shape.values()) == (8, 1, 1)
  assert batches.shapes == as_it_is[0].shapes and found.devices.ravel().tolist() == mesh.devices.ravel().tolist()
  assert training._spread(s, ragged(1000), dataclasses.replace(settings, fit_rows=False), 5)[1] is mesh


@pytest.mark.parametrize("unit", [2, 6])
def test_mesh_and_passes_divide_fitted_rows(unit):
  batches = Batches(ragged(60), options(row_length=512), 5, unit)
  for step in range(batches.steps):
    ((rows, length),) = batches.shapes[step]
    assert rows % unit == 0 and max(batches.lengths(step)) <= length <= 1024


def test_pairs_and_third_sequences_have_shapes_of_their_own():
  of = ragged(90).sequences
  sides = list(zip(of[::3], of[1::3], strict=True))
  batches = Batches(Pairs(sides, range(30), None, of[2::3]), options(row_length=512), 5, unit=2)
  assert len({others for _, others in batches.shapes}) == 1  # programs for both would multiply
  for step in range(batches.steps):
    made, (pairs, others) = batches(step), batches.shapes[step]
    assert made["tokens"].shape == pairs and made["other"]["tokens"].shape == others
    assert max(made["positions"].max(), made["other"]["positions"].max()) < 400 and pairs.length <= 1024


def test_the_order_follows_from_seed_and_epoch(session):
  examples = make_examples(session, 10)
  a, b, c = ([contents(batch) for batch in all_batches(examples, options(batch=5), seed)[0]] for seed in (5, 5, 6))
  assert a == b != c
  assert a[:2] != a[2:]


def test_every_example_may_count_alike(session):
  examples = [
    (ids, np.asarray(mask, np.float32) * (0.5 + i % 2)) for i, (ids, mask) in enumerate(make_examples(session))
  ]
  average = Batches(Examples(examples, range(COUNT), "examples"), options(), 5, 1)
  for step in range(3):
    batch, plain = average(step), Batches(data(examples), options(), 5, 1)(step)
    count = len(average.members(step))
    for i in range(count):
      of = batch["example"] == i
      assert batch["weights"][of].sum() == pytest.approx(1)
      np.testing.assert_allclose(batch["weights"][of], plain["weights"][of] / plain["weights"][of].sum(), rtol=1e-6)
    assert batch["weights"].sum() == pytest.approx(count)


def test_compact_sequences_take_little_memory_and_make_the_same_batches(session):
  plain = [
    (ids, mask if i % 2 else 0.3 * np.asarray(mask, np.float32)) for i, (ids, mask) in enumerate(make_examples(session))
  ]
  small = [compact(*example) for example in plain]
  assert [mask.dtype for _, mask in small[:2]] == [np.float32, bool]
  assert all(ids.nbytes + mask.nbytes == len(ids) * (5 if i % 2 else 8) for i, (ids, mask) in enumerate(small))
  clipped = [packing.clip(examples, 40) for examples in (plain, small)]
  assert clipped[0][1] == clipped[1][1]
  for average in ("tokens", "examples"):
    made = [Batches(Examples(x, range(COUNT), average), options(), 5, 1) for x in (plain, small)]
    for step in range(made[0].steps):
      for name, x in made[0](step).items():
        np.testing.assert_array_equal(made[1](step)[name], x, err_msg=name)
  sides = [list(zip(x[::2], x[1::2], strict=False)) for x in (plain, small)]
  made = [Batches(Pairs(x, range(len(x))), options(), 5, 1)(0) for x in sides]
  for name, x in made[0].items():
    np.testing.assert_array_equal(made[1][name], x, err_msg=name)


def last_targets(batch):
  """(last target, its weight) of every packed sequence."""
  found = []
  for i in range(batch["example"].max() + 1):
    row, at = np.argwhere(batch["example"] == i)[-2]  # the last place has no target
    found.append((int(batch["targets"][row, at]), float(batch["weights"][row, at])))
  return found


def test_the_stop_token_of_sft_and_judge_examples_is_supervised(session):
  tok, fmt = session.host.tokenizer, session.host.chat
  stop = chat.stop_ids(tok, fmt)[0]
  sft = make_examples(session)
  asked = [{"role": "user", "content": PAIRS[0][0]}]
  judged = [judge_example(tok, fmt, formats.JUDGE, asked, PAIRS[i % 3][1], i) for i in range(COUNT)]
  judged = [(ids, 0.25 * np.asarray(mask, np.float32)) for ids, mask in judged]
  for examples, weight in ((sft, 1.0), (judged, 0.25)):
    batches, _ = all_batches(examples, options())
    assert {pair for batch in batches for pair in last_targets(batch)} == {(stop, weight)}
    total = sum(batch["weights"].sum() for batch in batches)
    assert total == pytest.approx(2 * sum(float(np.sum(mask)) for _, mask in examples))


# Preferences


def test_dpo_from_its_own_reference_starts_at_ln_2_and_pairs_stay_together(session):
  sequences = make_examples(session, 10)  # five pairs in batches of two: the last one is filled up
  settings = options(training.PreferenceOptions, batch=2, epochs=1.0)
  reference = training.sequence_logprobs(session, session.base, sequences, settings).reshape(-1, 2)
  pairs = Pairs(list(zip(sequences[::2], sequences[1::2], strict=True)), list("abcde"), reference)
  stage = new_stage(session, "dpo")
  _, facts = training.train(session, stage, session.base, pairs, settings, 5)
  rows = metrics(stage)
  assert len(rows) == facts["steps"] == 3 and facts["examples"] == 5
  assert rows[0]["loss"] == pytest.approx(np.log(2), abs=2e-5)
  assert abs(rows[0]["margin"]) < 1e-4 < abs(rows[-1]["margin"])

  batches = Batches(pairs, settings, 5, 4)
  assert [batches(step)["real"].tolist() for step in range(3)] == [[1, 1], [1, 1], [1, 0]]
  for step in range(3):
    batch = batches(step)
    for n, i in enumerate(batches.members(step)):
      np.testing.assert_array_equal(batch["reference"][n], reference[i])
      (chosen, _), (rejected, _) = pairs.sides[i]
      assert batch["tokens"][batch["example"] == 2 * n].tolist() == list(chosen)
      second = batch["example"] == 2 * n + 1
      assert batch["tokens"][second].tolist() == rejected[batch["positions"][second][0] :]


def test_graded_responses_carry_their_own_log_probs(session):
  sequences = make_examples(session)
  settings = options(training.GrpoOptions)
  per_token = training.token_logprobs(session, session.base, sequences, settings)
  sums = training.sequence_logprobs(session, session.base, sequences, settings)
  np.testing.assert_allclose([x.sum() for x in per_token], sums, rtol=1e-5)
  assert [len(x) for x in per_token] == [len(ids) - 1 for ids, _ in sequences]
  advantages = np.arange(COUNT) - 5.0
  graded = GradedResponses(sequences, list(map(str, range(COUNT))), advantages, per_token, [2 * x for x in per_token])
  batches = Batches(graded, settings, 5, 1)
  for step in range(3):
    batch = batches(step)
    for n, i in enumerate(batches.members(step)):
      of = batch["example"] == n
      assert set(batch["advantage"][of]) == {advantages[i]}
      np.testing.assert_array_equal(batch["old"][of][:-1], per_token[i])
      np.testing.assert_array_equal(batch["reference"][of][:-1], 2 * per_token[i])
    assert not any(batch[name][batch["example"] < 0].any() for name in ("advantage", "old", "reference"))
  stage = new_stage(session, "grpo")
  training.train(
    session,
    stage,
    session.base,
    GradedResponses(sequences, graded.names, advantages, per_token, per_token),
    settings,
    5,
  )
  first = metrics(stage)[0]
  assert abs(first["kl"]) < 1e-8 and first["clipped"] == 0  # at first it is its own reference
  assert metrics(stage)[-1]["kl"] > 0


def test_sequence_log_probs_are_in_order_whatever_the_batch(session):
  sequences = make_examples(session)
  found = [training.sequence_logprobs(session, session.base, sequences, options(batch=b)) for b in (4, 11)]
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
  backwards = training.sequence_logprobs(session, session.base, sequences[::-1], options())
  np.testing.assert_allclose(backwards[::-1], found[0], rtol=1e-5)
  assert jax.sharding.get_abstract_mesh().empty


def test_a_second_host_writes_no_log(session, tmp_path):
  stage = types.SimpleNamespace(dir=tmp_path, name="sft_1")
  with StepLog(session, stage, Batches(data(make_examples(session)), options(), 5, 1)) as log:
    log.active = False
    log.keep(3)
    log.write(3, {"loss": 1.0})
  assert not list(tmp_path.iterdir())


def test_no_damaged_checkpoint_is_trained_on(tmp_path):
  """A byte that is changed in any file of a checkpoint is an error, or changes nothing that is read."""
  state = ({"w": jnp.arange(6000.0).reshape(60, 100), "b": jnp.ones(7, jnp.bfloat16)}, {"m": jnp.zeros((60, 100))})
  with checkpoints_of.Checkpoints(tmp_path / "whole") as checkpoints:
    checkpoints.save(2, state)
  said = []
  for path in sorted(p for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file() and p.stat().st_size):
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 16
    (tmp_path / "damaged" / path.relative_to(tmp_path / "whole")).write_bytes(changed)
    try:
      with checkpoints_of.Checkpoints(tmp_path / "damaged") as checkpoints:
        found = checkpoints.load(2, state)
    except RunError as error:
      said.append(str(error))
    else:
      jax.tree.map(np.testing.assert_array_equal, found, state)
    shutil.rmtree(tmp_path / "damaged")
  assert all(f"the checkpoint {tmp_path / 'damaged' / '2'} is damaged" in text for text in said)
  assert any("the bytes of model/w have changed" in text for text in said)


def test_sums_of_bits_see_a_changed_bit_and_swapped_values_on_any_mesh():
  x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  whole = {name: tuple(np.asarray(v).tolist()) for name, v in checkpoints_of.sums_of_bits({"x": x}).items()}
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), "tensor")))
  (sums,) = checkpoints_of.sums_of_bits({"x": spread}).values()
  assert tuple(np.asarray(sums).tolist()) == whole["sums/x"]
  bit, swapped = x.copy(), x.copy()
  bit.view(np.uint32)[3, 5] ^= 1 << 17
  swapped[0, 0], swapped[9, 7] = x[9, 7], x[0, 0]
  for other, same in ((bit, False), (swapped, True)):
    (first, second) = np.asarray(checkpoints_of.sums_of_bits({"x": other})["sums/x"]).tolist()
    assert (first == whole["sums/x"][0]) == same and second != whole["sums/x"][1]
