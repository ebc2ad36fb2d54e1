"""The training loop against optax and itself: any number of devices, any place of interruption, the same weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine_models import CONFIG, on_mesh, stacked

from alma_jax.engine import losses
from alma_jax.engine import train as engine
from alma_jax.engine.losses import Preference
from alma_jax.engine.train import Objective, Optimizer, TrainingError, fit, learning_rate
from alma_jax.llama import sharding
from alma_jax.text import packing

STEPS, ROW, ROWS = 5, 24, 16
SFT = Objective("sft")
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


def trained(mesh, steps=STEPS, optimizer=OPTIMIZER, objective=SFT, make=batches, **more):
  """(weights by name, metrics of every step)."""
  metrics = []
  model = fit(
    on_mesh(stacked(), mesh), make, steps, optimizer, objective, mesh, report=lambda _, m: metrics.append(m), **more
  )
  return by_name(model), metrics


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
  keep = lambda step, state: first.append(by_name(state[0])) if step == 1 else None
  return *trained(one_device(), save=keep), *first


# Devices


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_the_number_of_devices_changes_neither_the_weights_nor_the_curve(sizes, alone):
  saved = []
  kept = {"save": lambda step, state: saved.append(by_name(state[0])) if step == 1 else None}
  weights, metrics = trained(sharding.make_mesh(*sizes), **kept)
  wanted, curve, first = alone
  for found, expected in zip(metrics, curve):
    assert found == pytest.approx(expected, rel=1e-4)
  assert_close(weights, wanted, 1e-5)
  assert_close(saved[0], first, 1e-5)


def test_tiles_change_neither_the_weights_nor_the_curve(alone, monkeypatch):
  monkeypatch.setattr(losses, "_tile", lambda model, targets: 7)
  engine._compiled.cache_clear()
  weights, metrics = trained(sharding.make_mesh(2, 2, 2))
  engine._compiled.cache_clear()  # nobody else gets this one
  for found, expected in zip(metrics, alone[1], strict=True):
    assert found == pytest.approx(expected, rel=1e-4)
  assert_close(weights, alone[0], 1e-5)


@pytest.mark.parametrize("p", [Preference("simpo", beta=2.0), Preference("kto", nll_weight=0.2)], ids=lambda p: p.loss)
def test_the_number_of_devices_does_not_change_training_on_pairs(p):
  def pairs(step):
    count = 11 // p.sides
    batch = batches(step) | {"real": (np.arange(count) > 0).astype(np.float32)}
    return batch | ({"reference": np.full((count, p.sides), -30.0, np.float32)} if p.has_reference else {})

  runs = [
    trained(mesh, 2, objective=Objective("preference", p), make=pairs)
    for mesh in (one_device(), sharding.make_mesh(2, 2, 2))
  ]
  assert_close(runs[1][0], runs[0][0], 1e-5)
  for found, expected in zip(runs[1][1], runs[0][1], strict=True):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
  before = by_name(stacked())
  assert all(np.any(x != before[name]) for name, x in runs[0][0].items())


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (("dpo",), "no objective 'dpo'; there are 'sft', 'preference' and 'score'"),
    (("preference",), "'preference' goes with a Preference"),
    (("sft", Preference()), "'sft' goes without a Preference"),
  ],
)
def test_objectives_that_cannot_be_meant_are_refused(wrong, said):
  with pytest.raises(ValueError, match=said):
    Objective(*wrong)


def test_adam_moments_are_sharded_like_the_weights():
  mesh = sharding.make_mesh(2, 2, 2)
  seen = []

  def save(step, state):
    model, moments = state
    adam = next(s for s in jax.tree.leaves(moments, is_leaf=is_adam) if is_adam(s))
    for moment in (adam.mu, adam.nu):
      seen.append([x.sharding == w.sharding for x, w in zip(jax.tree.leaves(moment), jax.tree.leaves(model))])
    seen.append([model.blocks.q[...].sharding.spec == jax.P(None, "fsdp", "tensor", None)])
    seen.append([x.dtype == jnp.float32 for x in jax.tree.leaves((model, adam.mu, adam.nu))])

  trained(mesh, steps=1, save=save)
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
  nothing = lambda step: {name: x * (name != "weights") for name, x in batches(step).items()}
  weights, _ = trained(one_device(), steps=1, make=nothing)
  rate = learning_rate(OPTIMIZER, 0, 1)
  for name, before in by_name(stacked()).items():
    factor = 1 if "norm" in name else 1 - rate * OPTIMIZER.weight_decay
    np.testing.assert_allclose(weights[name], factor * before, rtol=1e-6, err_msg=name)


def test_learning_rate_warms_up_linearly_and_falls_along_a_cosine():
  o = dataclasses.replace(OPTIMIZER, learning_rate=5.5e-6, final_learning_rate=1.1e-6, warmup=0.1)
  rates = [learning_rate(o, step, 200) for step in range(201)]
  np.testing.assert_allclose(rates[:20], 5.5e-6 * np.arange(1, 21) / 20)
  cosine = optax.cosine_decay_schedule(5.5e-6, decay_steps=180, alpha=0.2)
  np.testing.assert_allclose(rates[20:], [cosine(i) for i in range(181)], rtol=1e-5)
  assert rates[19] == rates[20] == max(rates)
  assert rates[-1] == pytest.approx(1.1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 4), (0.1, 1), (1.0, 3)])
def test_learning_rate_of_short_trainings(warmup, steps):
  o = dataclasses.replace(OPTIMIZER, warmup=warmup)
  rates = [learning_rate(o, step, steps) for step in range(steps)]
  assert rates[-1 if warmup == 1 else 0] == pytest.approx(o.learning_rate)
  assert all(0 < rate <= o.learning_rate for rate in rates)


def test_bfloat16_forward_passes_keep_fp32_masters(alone):
  slow = dataclasses.replace(OPTIMIZER, learning_rate=1e-6, final_learning_rate=1e-6, warmup=0.0, weight_decay=0.0)
  weights, metrics = trained(one_device(), 2, slow, Objective("sft", compute_dtype="bfloat16"))
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
  compiled = engine._compiled.cache_info().currsize
  o = dataclasses.replace(OPTIMIZER, learning_rate=1e-4, final_learning_rate=0.0, warmup=0.0)
  _, metrics = trained(mesh, 2, o)
  assert engine._compiled.cache_info().currsize == compiled
  assert metrics[0]["learning_rate"] == 1e-4
  json.dumps(metrics)  # plain numbers


# Scoring


def test_sequence_logprobs_are_the_same_on_all_devices_and_leave_no_mesh_behind():
  made = [batches(0), batches(1)]
  wanted = [
    losses.sequence_logprobs(losses.batch_logprobs(stacked(), batch), batch, 11) for batch in map(jax.device_put, made)
  ]
  for mesh in (one_device(), sharding.make_mesh(2, 2, 2)):
    found = []
    for scored in engine.sequence_logprobs(on_mesh(stacked(), mesh), made, 11, Objective("score"), mesh):
      assert jax.sharding.get_abstract_mesh().empty
      found.append(scored)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
