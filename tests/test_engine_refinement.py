"""Self-refinement (SPA) against numbers from its formulas, plain DPO, float64, and itself after an interruption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import CONFIG, log_softmax, logprobs, on_mesh, stacked
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import crossentropy, losses
from alma_jax.engine import train as engine
from alma_jax.engine.losses import Preference, ScoredPairs, SelfRefinement, preference_of
from alma_jax.engine.optimizer import Optimizer
from alma_jax.engine.train import Hooks, Objective, TrainingTask
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.options import ConfigError
from alma_jax.text import packing

# Log-probs of chosen and rejected, and the reference's. h = 1.5, -0.5, -1.75; beta h = 0.15, -0.05, -0.175.
GOLDEN = np.array([[-10, -12], [-20.5, -19], [-33.25, -40]])
REFERENCE = np.array([[-11, -11.5], [-21, -20], [-30, -38.5]])
MARGINS = np.array([0.15, -0.05, -0.175])


def scored(logprobs, smoothing):
  return ScoredPairs(logprobs, jnp.ones((3, 2)), jnp.asarray(REFERENCE), jnp.ones(3), smoothing=smoothing)


def test_losses_and_gradients_of_known_log_probs():
  p = SelfRefinement()
  smoothing = p.smoothing * (MARGINS <= 0.05)  # tau 0.05: z = 1, 0, 0
  for i, wanted in enumerate([0.620957, 0.713460, 0.766970]):
    one = scored(GOLDEN, smoothing)._replace(real=np.eye(3)[i])
    assert float(preference_of(p, one)[0]) == pytest.approx(wanted, abs=1e-6)
  loss, slope = jax.value_and_grad(lambda x: preference_of(p, scored(x, smoothing))[0])(jnp.asarray(GOLDEN))
  assert float(loss) == pytest.approx(0.700462, abs=1e-6)
  e, right = smoothing, 1 / (1 + np.exp(-MARGINS))
  wanted = (e * right - (1 - e) * (1 - right)) * 0.1 / 3  # of the chosen response's log-prob
  np.testing.assert_allclose(slope, np.stack([wanted, -wanted], 1), atol=1e-8)


def test_without_smoothing_it_is_dpo_to_the_bit():
  def found(p, smoothing):
    return jax.jit(jax.value_and_grad(lambda x: preference_of(p, scored(x, smoothing))[0]))(jnp.asarray(GOLDEN))

  ours, plain = found(SelfRefinement(), jnp.zeros(3)), found(Preference(), 0.0)
  assert float(ours[0]) == float(plain[0])
  np.testing.assert_array_equal(ours[1], plain[1])


@pytest.mark.parametrize(("values", "tau"), [(49, 0.0), (50, 5.5), (51, 6.5), (103, 58.5)])
def test_the_threshold_is_a_low_quantile_of_the_last_margins(values, tau):
  p, memory = SelfRefinement(window=25), losses.no_margins(50)
  step = jax.jit(losses.remembered)
  order = np.random.default_rng(0).permutation(np.arange(1, 50))
  margins = np.concatenate([[0], order, np.arange(50, 103)]).astype(np.float32)[:values]  # the oldest is the lowest
  for at in range(0, values, 3):  # in steps of up to three, among what is not real
    of = margins[at : at + 3]
    around = (1, 3 - len(of))
    memory = step(memory, np.pad(of, around, constant_values=-99.0), np.pad(np.ones_like(of), around))
  assert int(memory["seen"]) == values and float(losses.threshold(p, memory)) == tau


def test_every_pair_is_believed_in_the_first_steps():
  p = SelfRefinement(smoothing=0.3, believing=0.2)
  assert [p.smoothing_at(step, 10) for step in range(4)] == [0, 0, 0.3, 0.3]
  assert [p.smoothing_at(step, 3) for step in range(3)] == [0, 0.3, 0.3]


@pytest.mark.parametrize(
  ("wrong", "said"),
  [(dict(loss="ipo"), "must be 'dpo'"), (dict(smoothing=0.5), "below 0.5"), (dict(window=0), "least")],
)
def test_invalid_refinements_are_refused(wrong, said):
  with pytest.raises(ConfigError, match=said):
    SelfRefinement(**wrong)


# Of a model

ROW, ROWS, COUNT = 24, 8, 5


def pairs(step):
  """A batch of five pairs, the third of which is not real, and the pairs."""
  rng = np.random.default_rng(step)

  def side(text, n):
    return (text + rng.integers(1, CONFIG.vocab, n).tolist(), np.arange(len(text) + n) >= len(text))

  texts = [rng.integers(1, CONFIG.vocab, n).tolist() for n in rng.integers(2, 12, COUNT)]
  made = [(side(text, 5), side(text, 8)) for text in texts]
  packed = packing.pack([packing.forked_length(*pair) for pair in made], 2 * ROW)
  found = packing.forked_rows(made, packed, 2 * ROW, ROWS, pad_id=0) | {"real": np.float32([1, 1, 0, 1, 1])}
  found["reference"] = (rng.normal(size=(COUNT, 2)) - [20, 35]).astype(np.float32)
  return found, made


def batches(step):
  return pairs(step)[0]


def mixed(pair, mix):
  """float64: the log-prob of each side under the logits (1 + mix) l - mix l'."""
  found = []
  for ids, mask in pair:
    ours, theirs = (logprobs(stacked(seed), ids, ROW) for seed in (0, 1))
    p = log_softmax((1 + mix) * ours - mix * theirs)
    found.append(sum(p[t, ids[t + 1]] for t in range(len(ids) - 1) if mask[t + 1]))
  return found


def test_noise_is_looked_for_in_extrapolated_log_probs():
  p, (batch, sides) = SelfRefinement(mix=0.5, smoothing=0.3), pairs(0)
  sums = np.array([mixed(pair, 0.5) for pair in sides])
  margins = 0.1 * ((sums - batch["reference"]) @ [1, -1])
  tau, real = float(np.median(margins)), batch["real"]
  batch |= {"threshold": np.float32(tau), "smoothing": np.float32(0.3)}
  loss, metrics = jax.jit(lambda *x: losses.preference(*x[:2], p, compared=x[2]))(stacked(), batch, stacked(1))
  np.testing.assert_allclose(metrics["margins"], margins * real, atol=1e-4)
  assert float(metrics["doubted"]) == pytest.approx((real * (margins <= tau)).sum() / 4)
  plain = np.array([mixed(pair, 0.0) for pair in sides])
  h, e = 0.1 * ((plain - batch["reference"]) @ [1, -1]), 0.3 * (margins <= tau)
  values = (1 - e) * np.log1p(np.exp(-h)) + e * np.log1p(np.exp(h))
  assert float(loss) == pytest.approx((values * real).sum() / 4, rel=1e-5)


@pytest.mark.parametrize("tile", [0, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_mixed_log_probs_equal_those_in_float64_and_have_no_gradient(tile, tied, monkeypatch):
  monkeypatch.setattr(crossentropy, "_tile", lambda model, targets: tile)
  made, seen = crossentropy._logits, []
  monkeypatch.setattr(crossentropy, "_logits", lambda *x: seen.append(x[2].shape) or made(*x))
  rng, c = np.random.default_rng(0), dataclasses.replace(CONFIG, tied=tied)
  models = tuple(jax.jit(llama.init, static_argnums=(0, 1))(c, seed) for seed in (0, 1))
  hidden = tuple(jnp.asarray(3 * rng.normal(size=(4, 6, c.width)), jnp.float32) for _ in models)
  targets, where = jnp.asarray(rng.integers(0, c.vocab, (4, 6))), jnp.asarray(rng.random((4, 6)) < 0.6)
  z = [
    np.asarray(x, np.float64) @ np.asarray(m.embed[...].T if tied else m.head[...])
    for x, m in zip(hidden, models, strict=True)
  ]
  wanted = np.take_along_axis(log_softmax(1.25 * z[0] - 0.25 * z[1]), np.asarray(targets)[..., None], -1)[..., 0]

  def total(hidden, models):
    found = crossentropy.mixed_logprobs(models, hidden, 0.25, targets, where)
    return found.sum(), found

  slopes, found = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, models)
  np.testing.assert_allclose(found, wanted * np.asarray(where), rtol=2e-5, atol=2e-5)
  assert not any(np.any(x) for x in jax.tree.leaves(slopes))
  assert {places for places, _ in seen} == ({3} if tile else set())  # two models' logits in the room of one's


def test_mixed_log_probs_are_the_same_on_every_mesh(monkeypatch):
  monkeypatch.setattr(crossentropy, "_tile", lambda model, targets: 6)
  rng, models = np.random.default_rng(1), (stacked(0), stacked(1))
  hidden = tuple(np.float32(rng.normal(size=(8, 6, CONFIG.width))) for _ in models)
  targets, where = rng.integers(0, CONFIG.vocab, (8, 6)), rng.random((8, 6)) < 0.6
  mixed_logprobs = jax.jit(lambda *x: crossentropy.mixed_logprobs(*x[:2], 0.5, *x[2:]))
  wanted = mixed_logprobs(models, hidden, targets, where)
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    rows = [engine.global_array(x, mesh) for x in (targets, where)]
    states = tuple(jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))) for x in hidden)
    found = mixed_logprobs(tuple(on_mesh(model, mesh) for model in models), states, *rows)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def trained(objective, mesh=None, steps=4, passes=1, **hooks):
  """(weights by name, metrics of every step, memory after every step)."""
  mesh = mesh or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  optimizer = Optimizer(learning_rate=1e-2, final_learning_rate=1e-3, eps=1e-3, weight_decay=0.0)
  task, metrics = TrainingTask(optimizer, objective, mesh, steps), []
  plan = engine.planned(CONFIG, task, batches(0), passes)
  reference = on_mesh(stacked(1), mesh) if objective.compares else None
  start = on_mesh(jax.tree.map(jnp.copy, stacked()), mesh)
  found = engine.fit(start, batches, task, plan, Hooks(report=lambda _, m: metrics.append(m), **hooks), reference)
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(found))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, metrics


REFINED = Objective(SelfRefinement(mix=0.5, smoothing=0.3, window=2, believing=0.0), remembers=8)


@pytest.fixture(scope="module")
def refined():
  """Weights, metrics, and the state after every step."""
  states = {}
  return *trained(REFINED, save=lambda step, state: states.update({step: jax.tree.map(np.array, state)})), states


def test_a_training_that_goes_on_keeps_its_window(refined):
  weights, metrics, states = refined
  assert [float(m["threshold"]) == 0 for m in metrics] == [True, True, False, False]  # eight margins are two steps'
  assert states[2].memory["seen"] == 8 and "margins" not in metrics[0]
  kept = np.sort(states[2].memory["margins"])
  assert metrics[2]["threshold"] == pytest.approx((kept[0] + kept[1]) / 2, abs=1e-7)  # 0.1 of 8: the first two

  def restore(state):
    return jax.tree.map(lambda host, old: jax.device_put(host, old.sharding), states[2], state), 2

  again, rest = trained(REFINED, restore=restore)
  assert rest == metrics[2:]
  for name, x in again.items():
    np.testing.assert_array_equal(x, weights[name], err_msg=name)


def test_neither_devices_nor_passes_change_self_refinement(refined):
  weights, metrics, _ = refined
  found, curve = trained(REFINED, sharding.make_mesh(1, 2, 1, jax.devices()[:2]), passes=2)
  for a, b in zip(curve, metrics, strict=True):
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
  for name, x in found.items():
    np.testing.assert_allclose(x, weights[name], atol=1e-5, err_msg=name)
