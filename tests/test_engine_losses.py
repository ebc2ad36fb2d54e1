"""The log-prob core and the losses against float64 formulas; packed equals padded; tiles equal the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import CONFIG, logprobs, on_mesh, stacked

from alma_jax.engine import losses
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.text import packing

ROW = 24


def make_examples(lengths, fractional=False, seed=0):
  rng = np.random.default_rng(seed)
  examples = []
  for n in lengths:
    mask = (np.arange(n) >= n // 3).astype(np.float32)
    if fractional:
      mask = mask * rng.choice([0.0, 0.25, 0.7, 1.0], n).astype(np.float32)
    examples.append((rng.integers(1, CONFIG.vocab, n).tolist(), mask))
  return examples


def packed(examples, n_rows=8):
  return packing.rows(examples, packing.pack([len(ids) for ids, _ in examples], ROW), ROW, n_rows, pad_id=0)


def padded(examples, n_rows=8):
  return packing.rows(examples, [[i] for i in range(len(examples))], ROW, n_rows, pad_id=0)


def nll(example):
  """(weighted NLL, weight) of an example in float64, by a forward pass of it alone."""
  ids, mask = example
  p = logprobs(stacked(), ids, ROW)
  return -sum(mask[t + 1] * p[t, ids[t + 1]] for t in range(len(ids) - 1)), float(np.sum(mask[1:]))


@jax.jit
def sft_and_gradient(model, batch):
  (loss, metrics), gradient = jax.value_and_grad(losses.sft, has_aux=True)(model, batch)
  return loss, metrics, gradient


@jax.jit
def dpo_and_gradient(model, batch):
  loss = lambda model: losses.dpo(model, batch, beta=0.1)
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model)
  return value, metrics, gradient


def assert_close(a, b):
  """Equal but for fp32 rounding; the gradients' entries are about 0.1."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), *map(jax.device_get, (a, b)))


# The core


def token_logprobs_and_gradient(model, hidden, targets, weights):
  def total(model, hidden):
    out = losses.token_logprobs(model, hidden, targets)
    return (weights * out).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(model, hidden)
  return out, gradients


@pytest.mark.parametrize("tile", [1, 4, 5])  # steps of time; 5 does not divide the 12 steps
def test_tiled_token_logprobs_equal_dense_ones_in_value_and_gradient(tile, monkeypatch):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(3, 12, CONFIG.width)).astype(np.float32)
  targets, weights = rng.integers(0, CONFIG.vocab, (3, 12)), rng.normal(size=(3, 12)).astype(np.float32)
  dense = token_logprobs_and_gradient(stacked(), hidden, targets, weights)
  z = hidden.astype(np.float64) @ np.asarray(stacked().head[...], np.float64)
  wanted = np.take_along_axis(z, targets[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
  np.testing.assert_allclose(dense[0], wanted, atol=1e-5)

  monkeypatch.setattr(losses, "TILE_BYTES", 4 * CONFIG.vocab * 3 * tile)
  monkeypatch.setattr(llama, "logits", watched(llama.logits, seen := []))
  tiled = token_logprobs_and_gradient(stacked(), hidden, targets, weights)
  assert {shape[:2] for shape in seen} == {(3, tile)}  # the whole was never made
  assert_close(tiled, dense)


def watched(logits, seen):
  def wrapper(model, hidden):
    seen.append(hidden.shape)
    return logits(model, hidden)

  return wrapper


def test_tiles_leave_every_device_its_own_rows(monkeypatch):
  mesh = sharding.make_mesh(data=8)
  rows = sharding.batch_sharding(mesh)
  model = on_mesh(stacked(), mesh)
  rng = np.random.default_rng(1)
  hidden = rng.normal(size=(8, 12, CONFIG.width)).astype(np.float32)
  targets = rng.integers(0, CONFIG.vocab, (8, 12))
  wanted = losses.token_logprobs(stacked(), hidden, targets)
  monkeypatch.setattr(losses, "TILE_BYTES", 4 * CONFIG.vocab * 3)  # on each device 3 steps of its one row
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(lambda *x: losses.token_logprobs(*x))
      .lower(model, jax.device_put(hidden, rows), jax.device_put(targets, rows))
      .compile()
    )
    found = compiled(model, jax.device_put(hidden, rows), jax.device_put(targets, rows))
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert "all-gather" not in compiled.as_text()


# SFT


@pytest.mark.parametrize("fractional", [False, True])
def test_sft_equals_the_formula_in_float64(fractional):
  examples = make_examples([24, 9, 5, 17, 3, 11], fractional)
  total, tokens = np.sum([nll(example) for example in examples], axis=0)
  loss, metrics, _ = sft_and_gradient(stacked(), packed(examples))
  assert float(loss) == pytest.approx(total / tokens, rel=1e-5)
  assert float(metrics["target_tokens"]) == pytest.approx(tokens)


@pytest.mark.parametrize("fractional", [False, True])
def test_packed_equals_padded(fractional):
  examples = make_examples([24, 9, 5, 17, 3, 11], fractional)
  assert len(packing.pack([len(ids) for ids, _ in examples], ROW)) == 3
  assert_close(sft_and_gradient(stacked(), packed(examples)), sft_and_gradient(stacked(), padded(examples)))


def test_rematerialised_equals_not():
  batch = packed(make_examples([24, 9, 5]))
  again = jax.jit(jax.value_and_grad(lambda m: losses.sft(m, batch, remat=True)[0]))(stacked())
  loss, _, gradient = sft_and_gradient(stacked(), batch)
  assert_close(again, (loss, gradient))


def test_a_batch_that_supervises_nothing_costs_nothing():
  batch = packed([(ids, np.zeros(len(ids))) for ids, _ in make_examples([9, 5])])
  loss, _, gradient = sft_and_gradient(stacked(), batch)
  assert float(loss) == 0
  assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(gradient)))


def test_padding_tokens_and_unsupervised_targets_play_no_part():
  batch = packed(make_examples([24, 9, 5]))
  other = dict(batch)
  other["targets"] = np.where(batch["weights"] > 0, batch["targets"], 7)
  other["tokens"] = np.where(batch["segments"] > 0, batch["tokens"], 9)
  assert_close(sft_and_gradient(stacked(), other), sft_and_gradient(stacked(), batch))


# Preferences

GOLDEN = np.array([[-10, -12], [-20.5, -19], [-33.25, -40]])  # log-probs of chosen and rejected
REFERENCE = np.array([[-11, -11.5], [-21, -20], [-30, -38.5]])
WANTED = np.array([0.620957, 0.718460, 0.784470])  # -log sigmoid(0.1 h), h = 1.5, -0.5, -1.75


def test_dpo_of_known_log_probs():
  for pair in range(3):
    loss, metrics = losses.dpo_of(GOLDEN[pair : pair + 1], REFERENCE[pair : pair + 1], jnp.ones(1), 0.1)
    assert float(loss) == pytest.approx(WANTED[pair], abs=2e-6)
    assert float(metrics["margin"]) == pytest.approx(0.1 * [1.5, -0.5, -1.75][pair], abs=1e-6)
  loss, metrics = losses.dpo_of(GOLDEN, REFERENCE, jnp.ones(3), 0.1)
  assert float(loss) == pytest.approx(0.707962, abs=2e-6)
  assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
  assert float(metrics["chosen_logprob"]) == pytest.approx(-63.75 / 3)
  assert float(metrics["rejected_logprob"]) == pytest.approx(-71 / 3)


def test_pairs_that_fill_the_batch_up_do_not_count():
  filled = lambda x: np.concatenate([x, np.full((2, 2), 55.0)])
  loss, metrics = losses.dpo_of(filled(GOLDEN), filled(REFERENCE) - 100, np.array([1.0, 1, 1, 0, 0]), 0.1)
  alone, wanted = losses.dpo_of(GOLDEN, REFERENCE - 100, np.ones(3), 0.1)
  assert float(loss) == pytest.approx(float(alone))
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in wanted.items()})


def test_dpo_stays_finite_for_huge_margins():
  value, slope = jax.value_and_grad(lambda x: losses.dpo_of(x, jnp.zeros((2, 2)), jnp.ones(2), 0.1)[0])(
    jnp.array([[0.0, -1e5], [-1e5, 0.0]])
  )
  assert float(value) == pytest.approx(1e4 / 2)
  np.testing.assert_allclose(slope, [[0, 0], [-0.05, 0.05]], atol=1e-6)


def pairs_batch(lengths, reference=None, real=None, make=packed):
  examples = make_examples(lengths)
  batch = make(examples)
  count = len(lengths) // 2
  batch["reference"] = np.zeros((count, 2), np.float32) if reference is None else np.asarray(reference, np.float32)
  batch["real"] = np.ones(count, np.float32) if real is None else np.asarray(real, np.float32)
  return batch, examples


def test_dpo_of_a_model_equals_the_formula_in_float64():
  lengths = [24, 9, 5, 17, 3, 11]
  reference = np.random.default_rng(2).normal(size=(3, 2)) * 5 - 20
  batch, examples = pairs_batch(lengths, reference)
  sums = np.array([-nll(example)[0] for example in examples]).reshape(3, 2)
  h = (sums[:, 0] - sums[:, 1]) - (reference[:, 0] - reference[:, 1])
  loss, metrics, _ = dpo_and_gradient(stacked(), batch)
  assert float(loss) == pytest.approx(np.log1p(np.exp(-0.1 * h)).mean(), rel=1e-5)
  assert float(metrics["margin"]) == pytest.approx(0.1 * h.mean(), abs=1e-5)
  assert float(metrics["chosen_logprob"]) == pytest.approx(sums[:, 0].mean(), rel=1e-5)
  assert float(metrics["target_tokens"]) == pytest.approx(sum(nll(example)[1] for example in examples))


def test_dpo_starts_at_ln_2_when_the_reference_is_the_policy():
  batch, _ = pairs_batch([24, 9, 5, 17, 3, 11])
  scores = losses.sequence_logprobs(losses.batch_logprobs(stacked(), batch), batch, 6)
  batch["reference"] = np.asarray(scores).reshape(3, 2)
  loss, metrics, _ = dpo_and_gradient(stacked(), batch)
  assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
  assert float(metrics["margin"]) == pytest.approx(0, abs=1e-5)


def test_dpo_packed_equals_padded_and_unreal_pairs_have_no_gradient():
  lengths, reference = [24, 9, 5, 17, 3, 11], [[-30, -20], [-5, -25], [0, 0]]
  real = [1, 1, 0]
  batch, _ = pairs_batch(lengths, reference, real)
  found = dpo_and_gradient(stacked(), batch)
  assert_close(found, dpo_and_gradient(stacked(), pairs_batch(lengths, reference, real, padded)[0]))
  # The third pair's tokens may be anything, as long as nobody counts them.
  third = (batch["example"] == 4) | (batch["example"] == 5)
  other = batch | {"tokens": np.where(third, 3, batch["tokens"]), "targets": np.where(third, 3, batch["targets"])}
  assert_close(dpo_and_gradient(stacked(), other)[2], found[2])


def test_sequence_log_probs_are_sums_by_sequence_and_ignore_padding():
  batch, examples = pairs_batch([24, 9, 5, 17, 3, 11])
  token = losses.batch_logprobs(stacked(), batch)
  found = losses.sequence_logprobs(token, batch, 8)  # two more than there are
  np.testing.assert_allclose(found[:6], [-nll(example)[0] for example in examples], rtol=1e-5)
  assert not np.any(found[6:])
