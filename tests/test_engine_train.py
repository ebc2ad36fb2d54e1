"""The training loop against optax and itself: any number of devices, any place of interruption, the same weights."""

import dataclasses
import json
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine_models import CONFIG, on_mesh, stacked

from alma_jax.engine import crossentropy, losses
from alma_jax.engine import train as engine
from alma_jax.engine.losses import Preference
from alma_jax.engine.optimizer import SCHEDULES, Optimizer, learning_rate
from alma_jax.engine.train import Hooks, Objective, TrainingError, TrainingTask, fit
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.options import ConfigError
from alma_jax.text import packing

STEPS, ROW, ROWS = 5, 24, 16
SFT = Objective()
# A large eps: Adam's first steps are otherwise the signs of gradients, also of those that are rounding noise.
OPTIMIZER = Optimizer(
  learning_rate=1e-2,
  final_learning_rate=2e-3,
  warmup=0.4,
  beta1=0.9,
  beta2=0.95,
  eps=1e-3,
  weight_decay=0.1,
  clip=0.5,
)


def batches(step):
  rng = np.random.default_rng(step)
  examples = [(rng.integers(1, CONFIG.vocab, n).tolist(), np.arange(n) >= n // 3) for n in rng.integers(3, ROW, 11)]
  packed = packing.pack([len(ids) for ids, _ in examples], ROW)
  return packing.rows(examples, packed, ROW, ROWS, pad_id=0)


def one_device():
  return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


def task_on(mesh, steps=STEPS, optimizer=OPTIMIZER, objective=SFT, seed=0):
  return TrainingTask(optimizer, objective, mesh, steps, seed)


def trained(mesh, steps=STEPS, optimizer=OPTIMIZER, objective=SFT, make=batches, seed=0, plan=None, **hooks):
  """(weights by name, metrics of every step)."""
  metrics = []
  model, task = on_mesh(jax.tree.map(jnp.copy, stacked()), mesh), task_on(mesh, steps, optimizer, objective, seed)
  return by_name(fit(model, make, task, plan, Hooks(report=lambda _, m: metrics.append(m), **hooks))), metrics


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_close(a, b, atol):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def alone():
  """On one device: the weights, the metrics, and the weights after the first step."""
  first = []

  def keep(step, state):
    return first.append(by_name(state[0])) if step == 1 else None

  return *trained(one_device(), save=keep), *first


# Devices


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_the_number_of_devices_changes_neither_the_weights_nor_the_curve(sizes, alone):
  saved = []
  kept = {"save": lambda step, state: saved.append(by_name(state[0])) if step == 1 else None}
  weights, metrics = trained(sharding.make_mesh(*sizes), **kept)
  wanted, curve, first = alone
  for found, expected in zip(metrics, curve, strict=True):
    assert found == pytest.approx(expected, rel=1e-4)
  assert_close(weights, wanted, 1e-5)
  assert_close(saved[0], first, 1e-5)


def test_tiles_change_neither_the_weights_nor_the_curve(alone, monkeypatch):
  monkeypatch.setattr(crossentropy, "_tile", lambda model, targets: 7)
  engine._plan.cache_clear()
  engine._programs.cache_clear()
  weights, metrics = trained(sharding.make_mesh(2, 2, 2))
  engine._plan.cache_clear()  # nobody else gets this one
  for found, expected in zip(metrics, alone[1], strict=True):
    assert found == pytest.approx(expected, rel=1e-4)
  assert_close(weights, alone[0], 1e-5)


def pairs(p):
  """step -> a batch of five pairs, one of which is not real, with forks."""

  def batch(step):
    rng = np.random.default_rng(step)

    def side(text, n):
      return (text + rng.integers(1, CONFIG.vocab, n).tolist(), np.arange(len(text) + n) >= len(text))

    texts = [rng.integers(1, CONFIG.vocab, n).tolist() for n in rng.integers(2, 12, 5)]
    made = [(side(text, 5), side(text, 8)) for text in texts]
    packed = packing.pack([packing.forked_length(*pair) for pair in made], 2 * ROW)
    found = packing.forked_rows(made, packed, 2 * ROW, ROWS, pad_id=0) | {"real": np.float32([1, 1, 0, 1, 1])}
    if p.has_reference:
      found["reference"] = np.full((5, p.sides), -40.0, np.float32)
    if p.loss == "kto":
      others = [side(text, 6) for text in texts]
      found["other"] = packing.rows(others, [[i] for i in range(5)], ROW, ROWS, pad_id=0)
    return found

  return batch


def responses(step):
  """A batch of graded responses, as if the model had been another."""
  batch, rng = batches(step), np.random.default_rng(step)
  values = {
    name: rng.normal(mean, 0.3, (ROWS, ROW)) for name, mean in (("old", -5), ("reference", -5), ("advantage", 0))
  }
  return batch | {name: x.astype(np.float32) for name, x in values.items()}


OTHERS = {
  "simpo": (Objective(Preference("simpo", beta=2.0)), pairs(Preference("simpo"))),
  "kto": (Objective(Preference("kto", nll_weight=0.2)), pairs(Preference("kto"))),
  "grpo": (Objective(losses.Grpo()), responses),
}


@pytest.mark.parametrize("name", OTHERS)
def test_neither_devices_nor_passes_change_training_on_pairs_and_responses(name):
  objective, make = OTHERS[name]
  wanted, curve = trained(one_device(), 2, objective=objective, make=make)
  mesh = sharding.make_mesh(2, 2, 2)
  plan = engine.planned(CONFIG, task_on(mesh, objective=objective), make(0), passes=4)
  weights, metrics = trained(mesh, 2, objective=objective, make=make, plan=plan)
  assert_close(weights, wanted, 1e-5)
  for found, expected in zip(metrics, curve, strict=True):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
  before = by_name(stacked())
  assert all(np.any(x != before[name]) for name, x in weights.items())


@pytest.mark.parametrize("passes", [2, 16])
def test_passes_change_neither_the_weights_nor_the_curve(passes, alone):
  plan = engine.planned(CONFIG, task_on(one_device()), batches(0), passes)
  weights, metrics = trained(one_device(), plan=plan)
  for found, expected in zip(metrics, alone[1], strict=True):
    assert found == pytest.approx(expected, rel=1e-5)
  assert_close(weights, alone[0], 1e-5)


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (dict(remat="ful"), "remat is 'ful'; it may be 'auto', 'none', 'products', 'full'.*did you mean 'full'"),
    (dict(dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
    (dict(dropout=-0.1), "dropout is -0.1; it must be at least 0"),
  ],
)
def test_invalid_objectives_are_refused(wrong, said):
  with pytest.raises(ConfigError, match=said):
    Objective(**wrong)


def test_the_words_of_remat_are_those_of_the_model():
  assert typing.get_args(typing.get_type_hints(Objective)["remat"]) == ("auto", *llama.REMAT)


def test_adam_moments_are_sharded_like_the_weights():
  mesh = sharding.make_mesh(2, 2, 2)
  seen = []

  def save(step, state):
    model, moments, _ = state
    adam = next(s for s in jax.tree.leaves(moments, is_leaf=is_adam) if is_adam(s))
    for moment in (adam.mu, adam.nu):
      seen.append(
        [x.sharding == w.sharding for x, w in zip(jax.tree.leaves(moment), jax.tree.leaves(model), strict=True)]
      )
    seen.append([model.blocks.q[...].sharding.spec == jax.P(None, "fsdp", "tensor", None)])
    seen.append([x.dtype == jnp.float32 for x in jax.tree.leaves((model, adam.mu, adam.nu))])

  trained(mesh, steps=2, save=save)
  assert len(seen) == 4 and all(map(all, seen))


def is_adam(x):
  return isinstance(x, optax.ScaleByAdamState)


def test_host_arrays_are_spread_by_rows_and_vectors_are_whole():
  mesh = sharding.make_mesh(2, 2, 2)
  rows, vector = np.arange(24).reshape(8, 3), np.arange(4)
  spread, whole = engine.global_array(rows, mesh), engine.global_array(vector, mesh)
  np.testing.assert_array_equal(spread, rows)
  np.testing.assert_array_equal(whole, vector)
  assert spread.addressable_shards[0].data.shape == (2, 3)
  assert whole.sharding.is_fully_replicated
  odd = engine.global_array(rows[:3], mesh)
  assert odd.sharding.is_fully_replicated
  np.testing.assert_array_equal(odd, rows[:3])


# The update


def test_updates_equal_those_of_optax_adamw(alone):
  rates = [learning_rate(OPTIMIZER, step, STEPS) for step in range(STEPS)]
  o = OPTIMIZER
  weights = by_name(stacked())
  tx = optax.chain(
    optax.clip_by_global_norm(o.clip),
    optax.adamw(
      lambda count: jnp.asarray(rates)[count],
      o.beta1,
      o.beta2,
      o.eps,
      weight_decay=o.weight_decay,
      mask={name: "norm" not in name for name in weights},
    ),
  )
  moments, structure = tx.init(weights), jax.tree.structure(stacked())
  value_and_gradient = jax.jit(jax.value_and_grad(losses.sft, has_aux=True))
  norms = []
  for step in range(STEPS):
    model = jax.tree.unflatten(structure, weights.values())
    (loss, _), gradient = value_and_gradient(model, batches(step))
    gradient = by_name(gradient)
    norms.append(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values())))
    assert alone[1][step]["loss"] == pytest.approx(float(loss), rel=1e-5)
    updates, moments = tx.update(gradient, moments, weights)
    weights = optax.apply_updates(weights, updates)
  assert_close(alone[0], weights, 1e-6)
  assert [m["gradient_norm"] for m in alone[1]] == pytest.approx(norms, rel=1e-4)
  assert max(norms) > OPTIMIZER.clip  # the clipping was at work
  assert [m["learning_rate"] for m in alone[1]] == rates


def test_norms_are_not_decayed_and_everything_else_is():
  def nothing(step):
    return {name: x * (name != "weights") for name, x in batches(step).items()}

  weights, _ = trained(one_device(), steps=1, make=nothing)
  rate = learning_rate(OPTIMIZER, 0, 1)
  for name, before in by_name(stacked()).items():
    factor = 1 if "norm" in name else 1 - rate * OPTIMIZER.weight_decay
    np.testing.assert_allclose(weights[name], factor * before, rtol=1e-6, err_msg=name)


def test_learning_rates_warm_up_linearly_and_follow_their_schedule():
  o = dataclasses.replace(OPTIMIZER, learning_rate=5.5e-6, final_learning_rate=1.1e-6, warmup=0.1)
  schedules = {
    "cosine": optax.cosine_decay_schedule(5.5e-6, decay_steps=180, alpha=0.2),
    "linear": optax.linear_schedule(5.5e-6, 1.1e-6, 180),
    "constant": optax.constant_schedule(5.5e-6),
  }
  assert schedules.keys() == SCHEDULES.keys()
  for name, wanted in schedules.items():
    rates = [learning_rate(dataclasses.replace(o, schedule=name), step, 200) for step in range(201)]
    np.testing.assert_allclose(rates[:20], 5.5e-6 * np.arange(1, 21) / 20)
    np.testing.assert_allclose(rates[20:], [wanted(i) for i in range(181)], rtol=1e-5)
    assert rates[19] == rates[20] == max(rates)


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (dict(schedule="cos"), "schedule is 'cos'; it may be 'cosine', 'linear', 'constant'"),
    (dict(moments="float16"), "moments is 'float16'"),
    (dict(moments="bfloat16", beta2=0.999), "beta2=0.999: bfloat16 has 8 bits"),
    (dict(warmup=1.5), "warmup is 1.5"),
    (dict(learning_rate=0.0), "learning_rate is 0.0"),
    (dict(final_learning_rate=1.0), "final_learning_rate is 1.0"),
    (dict(clip=0.0), "clip is 0.0"),
  ],
)
def test_invalid_optimizers_are_refused(wrong, said):
  with pytest.raises(ConfigError, match=said):
    dataclasses.replace(OPTIMIZER, **wrong)


def test_moments_in_bfloat16_take_half_and_learn_the_same(alone):
  seen = []

  def save(step, state):
    adam = next(s for s in jax.tree.leaves(state[1], is_leaf=is_adam) if is_adam(s))
    seen.append({x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))})
    seen.append({x.dtype for x in jax.tree.leaves(state[0])})

  o = dataclasses.replace(OPTIMIZER, moments="bfloat16")
  weights, metrics = trained(one_device(), optimizer=o, save=save, every=4)
  assert seen == [{jnp.dtype("bfloat16")}, {jnp.dtype("float32")}]
  assert metrics[-1]["loss"] == pytest.approx(alone[1][-1]["loss"], rel=2e-3)
  before = by_name(stacked())
  for name, x in weights.items():
    moved, wanted = x - before[name], alone[0][name] - before[name]
    assert np.linalg.norm(moved - wanted) < 0.02 * np.linalg.norm(wanted), name


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 4), (0.1, 1), (1.0, 3)])
def test_learning_rate_of_short_trainings(warmup, steps):
  o = dataclasses.replace(OPTIMIZER, warmup=warmup)
  rates = [learning_rate(o, step, steps) for step in range(steps)]
  assert rates[-1 if warmup == 1 else 0] == pytest.approx(o.learning_rate)
  assert all(0 < rate <= o.learning_rate for rate in rates)


def test_bfloat16_forward_passes_keep_fp32_masters(alone):
  slow = dataclasses.replace(OPTIMIZER, learning_rate=1e-6, final_learning_rate=1e-6, warmup=0.0, weight_decay=0.0)
  weights, metrics = trained(one_device(), 2, slow, Objective(compute_dtype="bfloat16"))
  exact = alone[1][0]["loss"]
  assert 0 < abs(metrics[0]["loss"] - exact) < 0.02 * exact
  before = by_name(stacked())
  for name, x in weights.items():
    assert x.dtype == np.float32
    moved = x - before[name]
    assert np.any(moved) and np.abs(moved).max() < 1e-5, name  # bfloat16 weights would not have moved


# The loop


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step():
  def broken(step):
    batch = batches(step)
    return batch | {"weights": batch["weights"] * (np.nan if step == 2 else 1)}

  saved = []
  with pytest.raises(TrainingError, match=r"step 3 of 5: the loss is nan"):
    trained(one_device(), make=broken, save=lambda step, state: saved.append(step))
  assert saved == [1, 2]


def test_a_training_that_goes_on_from_a_saved_state_gives_the_same_bits(alone):
  mesh = one_device()
  states = {}
  trained(mesh, save=lambda step, state: states.update({step: jax.tree.map(np.array, state)}))
  asked = []

  def restore(state):
    return jax.tree.map(lambda host, old: jax.device_put(host, old.sharding), states[3], state), 3

  weights, metrics = trained(mesh, restore=restore, make=lambda step: asked.append(step) or batches(step))
  assert asked == [3, 4]
  assert metrics == alone[1][3:]
  for name, x in weights.items():
    np.testing.assert_array_equal(x, alone[0][name], err_msg=name)


def test_other_rates_and_step_counts_share_the_compilation(alone):
  mesh = one_device()
  trained(mesh)
  compiled = engine._plan.cache_info().currsize
  o = dataclasses.replace(OPTIMIZER, learning_rate=1e-4, final_learning_rate=0.0, warmup=0.0)
  _, metrics = trained(mesh, 2, o)
  assert engine._plan.cache_info().currsize == compiled
  assert metrics[0]["learning_rate"] == 1e-4
  json.dumps(metrics)  # plain numbers


def test_an_update_that_is_not_finite_is_not_made_and_its_step_is_looked_at():
  def broken(step):
    batch = batches(step)
    return batch | {"weights": np.where(batch["weights"] > 0, np.inf if step == 2 else 1, 0).astype(np.float32)}

  kept, looked = [], []
  with pytest.raises(TrainingError, match=r"step 3 of 5: .*; look here"):
    trained(
      one_device(),
      make=broken,
      save=lambda step, state: kept.append(by_name(state[0])),
      failed=lambda step, model: looked.append((step, by_name(model))) or "; look here",
    )
  (step, model), last = looked[0], kept[-1]
  assert step == 2 and len(kept) == 2
  for name, x in model.items():
    np.testing.assert_array_equal(x, last[name])


def test_who_asks_to_stop_gets_a_saved_state_that_goes_on_to_the_same_bits(alone):
  states, asked = {}, []

  def stop():
    asked.append(1)
    return len(asked) == 2  # when the second step has been made

  def save(step, state):
    return states.update({step: jax.tree.map(np.array, state)})

  with pytest.raises(engine.Stopped):
    trained(one_device(), save=save, every=100, stop=stop)
  (step,) = states
  assert step == 2

  def again(state):
    return (jax.tree.map(lambda host, old: jax.device_put(host, old.sharding), states[2], state), 2)

  weights, _ = trained(one_device(), restore=again)
  for name, x in weights.items():
    np.testing.assert_array_equal(x, alone[0][name], err_msg=name)


# Memory


def test_the_plan_is_the_quickest_that_fits_and_says_what_would_help():
  mesh, c = one_device(), dataclasses.replace(CONFIG, width=128, ffn=512, depth=3, head_dim=32)
  rng = np.random.default_rng(0)
  rows = packing.rows([(rng.integers(1, 96, 240).tolist(), np.ones(240))] * 8, [[i] for i in range(8)], 240, 8, 0)

  def planned(remat="auto", passes=1, memory=None, optimizer=OPTIMIZER):
    return engine.planned(c, task_on(mesh, 1, optimizer, Objective(remat=remat)), rows, passes, memory)

  plans = [planned(remat) for remat in ("none", "products", "full")]
  sizes = [plan.bytes for plan in plans]
  assert sizes[0] > 1.2 * sizes[1] > 1.2 * 1.2 * sizes[2]
  state = 3 * 4 * c.parameters
  assert state < plans[2].state < 1.3 * state + sum(x.nbytes for x in rows.values())
  assert [planned(memory=memory).remat for memory in (None, *sizes)] == ["none", "none", "products", "full"]
  with pytest.raises(TrainingError, match=r"remat='full' and 8 rows of 240 tokens in 1 pass over 1 .*passes=2.*bfloat"):
    planned(memory=sizes[2] - 1)
  assert planned("none", passes=2).working < plans[0].working
  lean = planned("none", optimizer=dataclasses.replace(OPTIMIZER, moments="bfloat16"))
  assert lean.state < plans[0].state - 0.9 * state / 3


@pytest.fixture
def compiled(monkeypatch):
  """The passes and remat of steps that are compiled, and which of them the compiler refuses."""
  found = types.SimpleNamespace(remats=[], refused=(), error="RESOURCE_EXHAUSTED: Ran out of memory.\nMore follows")
  plan, compile = engine._plan.__wrapped__, jax.stages.Lowered.compile

  def noted(c, mesh, o, objective, shapes, passes):
    found.remats.append(objective.remat)
    return plan(c, mesh, o, objective, shapes, passes)

  def refusing(self, *args, **options):
    if found.remats[-1] in found.refused:
      raise jax.errors.JaxRuntimeError(found.error)
    return compile(self, *args, **options)

  monkeypatch.setattr(engine, "_plan", noted)
  monkeypatch.setattr(jax.stages.Lowered, "compile", refusing)
  return found


def planned_with(remat="auto", memory=None):
  return engine.planned(CONFIG, task_on(one_device(), objective=Objective(remat=remat)), batches(0), memory=memory)


def test_after_a_refusal_of_the_compiler_the_next_remat_is_tried(compiled):
  compiled.refused = ("none", "products")
  assert planned_with().remat == "full" and compiled.remats == ["none", "products", "full"]
  compiled.refused = ("none", "products", "full")
  with pytest.raises(
    TrainingError, match=r"compiler: RESOURCE_EXHAUSTED: Ran out of memory\.\), with remat='full' .*passes=2.*bfloat16"
  ):
    planned_with(memory=1e9)
  with pytest.raises(TrainingError, match=r"remat='none' .*helps: remat='full'"):
    planned_with("none")
  compiled.error = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    planned_with()


def test_what_cannot_fit_is_not_compiled_and_nothing_else_is_left_out(compiled):
  task, places = task_on(one_device()), batches(0)["tokens"].size
  least = []
  for remat in llama.REMAT:
    how = CONFIG, task.mesh, engine._unscheduled(task.optimizer), Objective(remat=remat)
    least.append(engine.least_bytes(*how, places))
    assert 12 * CONFIG.parameters < least[-1] < planned_with(remat).bytes
    spread = sharding.make_mesh(2, 2, 2)
    assert least[-1] / 8 <= engine.least_bytes(CONFIG, spread, *how[2:], places) < least[-1]
  assert least == sorted(least, reverse=True)
  compiled.remats.clear()
  with pytest.raises(TrainingError, match="remat='full'"):
    planned_with(memory=1e3)
  assert compiled.remats == ["full"]


def test_a_plan_counts_the_peak_that_the_compilers_of_accelerators_give():
  sizes = dict(argument_size_in_bytes=100, output_size_in_bytes=90, alias_size_in_bytes=80, temp_size_in_bytes=50)
  found = types.SimpleNamespace(**sizes, peak_memory_in_bytes=130)
  assert engine._state_and_working(found, "tpu") == (110, 20)
  assert engine._state_and_working(found, "cpu") == (110, 50)
  for without in (types.SimpleNamespace(**sizes, peak_memory_in_bytes=0), types.SimpleNamespace(**sizes)):
    assert engine._state_and_working(without, "gpu") == (110, 50)


# Dropout


def test_residual_dropout_rises_by_layer_keeps_the_mean_and_follows_the_key():
  def dropout(key):
    return llama.Dropout(0.3, jax.random.key(key))

  x = jnp.ones((64, 32, 32))
  for depth, i, wanted in ((32, 0, 0.0), (32, 1, 0.3 / 31), (32, 15, 0.3 * 15 / 31), (32, 31, 0.3), (1, 0, 0.0)):
    out = np.asarray(llama._dropped(x, dropout(0), depth, i, 0))
    assert (out == 0).mean() == pytest.approx(wanted, abs=0.006)
    assert np.unique(out[out != 0]) == pytest.approx([1 / (1 - wanted)])
    assert out.mean() == pytest.approx(1, abs=0.01)

  def of(key, i, site):
    return np.asarray(llama._dropped(x, dropout(key), 3, i, site))

  assert np.array_equal(of(1, 2, 0), of(1, 2, 0))
  for other in ((2, 2, 0), (1, 1, 0), (1, 2, 1)):
    assert not np.array_equal(of(1, 2, 0) == 0, of(*other) == 0)


def test_dropout_in_training_follows_seed_and_step_and_is_the_same_on_all_devices_and_when_rematerialised():
  objective = Objective(dropout=0.5)
  first, curve = trained(one_device(), 3, objective=objective)
  for mesh, remat in ((sharding.make_mesh(2, 2, 2), "none"), (one_device(), "full")):
    weights, metrics = trained(mesh, 3, objective=dataclasses.replace(objective, remat=remat))
    assert_close(weights, first, 1e-5)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in curve], rel=1e-4)
  _, other = trained(one_device(), 1, objective=objective, seed=1)
  _, without = trained(one_device(), 1)
  assert len({curve[0]["loss"], other[0]["loss"], without[0]["loss"]}) == 3

  def same(step):
    return batches(0)

  still = dataclasses.replace(OPTIMIZER, learning_rate=1e-12, final_learning_rate=0.0)
  _, metrics = trained(one_device(), 2, still, objective, same)
  assert metrics[0]["loss"] != pytest.approx(metrics[1]["loss"], rel=1e-4)  # a new mask at every step


# Scoring


def test_sequence_logprobs_are_the_same_on_all_devices_and_leave_no_mesh_behind():
  made = [batches(0), batches(1)]
  wanted = [
    losses.sequence_logprobs(losses.batch_logprobs(stacked(), batch), batch, 11) for batch in map(jax.device_put, made)
  ]
  for mesh in (one_device(), sharding.make_mesh(2, 2, 2)):
    found = []
    for scored in engine.sequence_logprobs(on_mesh(stacked(), mesh), made, 11, "float32", mesh):
      assert jax.sharding.get_abstract_mesh().empty
      found.append(scored)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
