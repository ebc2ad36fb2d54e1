"""The log-prob core and the losses against float64 formulas; packed equals padded; tiles equal the whole."""

import dataclasses
import math
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import CONFIG, logprobs, on_mesh, stacked
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import crossentropy, losses
from alma_jax.engine.losses import Preference, ScoredPairs, preference_of
from alma_jax.engine.optimizer import Optimizer
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.options import ConfigError
from alma_jax.runtime import training
from alma_jax.runtime.batches import Batches, Examples
from alma_jax.runtime.shapes import fitted
from alma_jax.stages import policy
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
  def loss(model):
    return losses.preference(model, batch, Preference())

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model)
  return value, metrics, gradient


def assert_close(a, b):
  """Equal but for fp32 rounding; the gradients' entries are about 0.1."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), *map(jax.device_get, (a, b)))


# The core


def core_case(rows=6, time=12, tied=False, dtype=jnp.float32):
  """(model, hidden, targets, weights) with a third of the places supervised, and most of them in a few rows."""
  rng = np.random.default_rng(0)
  c = dataclasses.replace(CONFIG, tied=tied)
  model = llama.cast(jax.jit(llama.init, static_argnums=(0, 1))(c, 0), dtype)
  weights = rng.uniform(0.2, 1, (rows, time)) * (rng.random((rows, time)) < np.linspace(0, 0.7, rows)[:, None])
  hidden = jnp.asarray(3 * rng.normal(size=(rows, time, c.width)), dtype)
  return model, hidden, rng.integers(0, c.vocab, (rows, time)), weights.astype(np.float32)


def exact(model, hidden, targets, weights):
  """In float64: log-probs, and the gradients of their weighted sum for the head and the hidden states."""
  head = np.asarray(model.embed[...].T if model.c.tied else model.head[...], np.float64)
  x = np.asarray(hidden, np.float64)
  z = x @ head
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dz = (np.eye(head.shape[1])[targets] - p) * weights[..., None]
  dw = np.einsum("btd,btv->dv", x, dz)
  logprobs = np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
  return logprobs, dw.T if model.c.tied else dw, dz @ head.T


def per_token(model, hidden, targets, weights):
  out = crossentropy.token_logprobs(model, hidden, targets, weights > 0)
  return (weights * out).sum(), out


def summed(model, hidden, targets, weights):
  return crossentropy.weighted_logprobs(model, hidden, targets, weights), None


def with_gradients(loss, model, hidden, targets, weights):
  """(weighted sum, log-probs or None, gradient of the head, of the hidden states)."""
  f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (total, out), (of_model, dx) = f(model, hidden, targets, weights)
  return total, out, (of_model.embed if model.c.tied else of_model.head)[...], dx


def tiles_of(monkeypatch, places):
  """Tiles of so many places; the returned list fills with the shapes of all logits that are made by tiles."""
  monkeypatch.setattr(crossentropy, "_tile", lambda model, targets: places)
  logits, seen = crossentropy._logits, []
  monkeypatch.setattr(crossentropy, "_logits", lambda *x: seen.append(x[2].shape) or logits(*x))
  return seen


@pytest.mark.parametrize("loss", [per_token, summed])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tile", [0, 1, 5, 24, 72])  # 0: all at once; 5 does not divide the 72 places
def test_log_probs_and_gradients_equal_those_in_float64(loss, tied, tile, monkeypatch):
  model, *case = core_case(tied=tied)
  weights = case[-1]
  logprobs, dw, dx = exact(model, *case)
  seen = tiles_of(monkeypatch, tile)
  total, out, of_head, of_hidden = with_gradients(loss, model, *case)
  assert {shape[0] for shape in seen} == ({tile} if tile else set())  # the whole was never made
  assert float(total) == pytest.approx((weights * logprobs).sum(), rel=1e-6)
  assert float(jax.jit(loss)(model, *case)[0]) == pytest.approx(float(total), rel=1e-6)  # without a gradient
  if out is not None:
    np.testing.assert_allclose(out, np.where(weights > 0, logprobs, 0), atol=1e-5)
  np.testing.assert_allclose(of_head, dw, atol=1e-5)
  np.testing.assert_allclose(of_hidden, dx, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 5])
def test_bfloat16_inputs_are_read_exactly(tile, monkeypatch):
  model, *case = core_case(dtype=jnp.bfloat16)
  tiles_of(monkeypatch, tile)
  logprobs, dw, dx = exact(model, *case)
  weights = case[-1]
  for loss in (per_token, summed):
    total, out, of_head, of_hidden = with_gradients(loss, model, *case)
    if out is not None:
      np.testing.assert_allclose(out, np.where(weights > 0, logprobs, 0), atol=1e-4)
    assert float(total) == pytest.approx((weights * logprobs).sum(), abs=1e-4)
    for found, wanted in ((of_head, dw), (of_hidden, dx)):
      assert found.dtype == jnp.bfloat16
      np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=0.01 * np.abs(wanted).max())


def test_only_tiles_with_something_supervised_are_made(monkeypatch):
  model, hidden, targets, weights = core_case()
  tiles_of(monkeypatch, 5)
  made = []

  def counted(logits):
    def wrapper(*x):
      jax.debug.callback(lambda: made.append(1))
      return logits(*x)

    return wrapper

  monkeypatch.setattr(crossentropy, "_logits", counted(crossentropy._logits))
  supervised = int((weights > 0).sum())
  assert 5 < supervised < 40
  for loss, passes in ((per_token, 2), (summed, 1)):
    made.clear()
    jax.block_until_ready(with_gradients(loss, model, hidden, targets, weights))
    jax.effects_barrier()
    assert len(made) == passes * math.ceil(supervised / 5)
  made.clear()
  jax.block_until_ready(with_gradients(summed, model, hidden, targets, 0 * weights))
  jax.effects_barrier()
  assert not made


def test_what_is_not_asked_for_does_not_matter(monkeypatch):
  model, hidden, targets, weights = core_case()
  odd = jnp.where((weights > 0)[..., None], hidden, jnp.nan)
  for tile in (5, 24):
    tiles_of(monkeypatch, tile)
    for loss in (per_token, summed):
      found = with_gradients(loss, model, odd, targets, weights)
      assert_close(found, with_gradients(loss, model, hidden, targets, weights))


@pytest.mark.parametrize("tile", [0, 5])
def test_the_order_of_rows_does_not_matter(tile, monkeypatch):
  model, *case = core_case()
  tiles_of(monkeypatch, tile)
  order = np.random.default_rng(3).permutation(6)
  for loss in (per_token, summed):
    total, out, dw, dx = with_gradients(loss, model, *case)
    found = with_gradients(loss, model, *(x[order] for x in case))
    assert_close(found, (total, None if out is None else out[order], dw, dx[order]))


@pytest.mark.parametrize("sizes", [(2, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
def test_the_number_of_devices_does_not_matter(sizes, monkeypatch):
  model, *case = core_case(rows=8)
  tiles_of(monkeypatch, 5)
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  rows = NamedSharding(mesh, P(sharding.BATCH))
  for loss in (per_token, summed):
    wanted = with_gradients(loss, model, *case)
    with jax.set_mesh(mesh):
      found = with_gradients(loss, on_mesh(model, mesh), *(jax.device_put(x, rows) for x in case))
    assert_close(found, wanted)


def test_rows_that_the_devices_do_not_divide(monkeypatch):
  model, *case = core_case(rows=6)
  tiles_of(monkeypatch, 5)
  mesh = sharding.make_mesh(2, 2, 2)
  for loss in (per_token, summed):
    wanted = with_gradients(loss, model, *case)
    with jax.set_mesh(mesh):
      assert_close(with_gradients(loss, on_mesh(model, mesh), *case), wanted)


@pytest.mark.parametrize("loss", [per_token, summed])
def test_every_device_takes_its_own_rows_and_its_own_part_of_the_vocabulary(loss, monkeypatch):
  model, *case = core_case(rows=8, time=40)
  tiles_of(monkeypatch, 5)
  mesh = sharding.make_mesh(data=4, tensor=2)
  rows = NamedSharding(mesh, P(sharding.BATCH))
  with jax.set_mesh(mesh):
    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    text = f.lower(on_mesh(model, mesh), *(jax.device_put(x, rows) for x in case)).compile().as_text()
  assert "all-gather" not in text
  assert f"f32[5,{CONFIG.vocab // 2}]" in text and f"f32[5,{CONFIG.vocab}]" not in text


def test_large_logits_are_never_made_at_once(monkeypatch):
  vocab, width, rows, time = 32_000, 64, 8, 512
  c = dataclasses.replace(CONFIG, vocab=vocab, width=width, head_dim=16, ffn=64)
  model = jax.eval_shape(lambda: llama.init(c, 0))
  shape = jax.ShapeDtypeStruct
  case = shape((rows, time, width), jnp.float32), shape((rows, time), jnp.int32), shape((rows, time), jnp.float32)
  assert crossentropy._tile(model, case[1]) == 512

  def temporaries(loss):
    f = jax.jit(
      jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1), has_aux=True)
    )  # not one that is compiled already
    return f.lower(model, *case).compile().memory_analysis().temp_size_in_bytes

  tiled = [temporaries(loss) for loss in (per_token, summed)]
  monkeypatch.setattr(crossentropy, "DENSE_BYTES", math.inf)
  whole = 4 * rows * time * vocab
  assert max(tiled) < whole / 3 < whole < temporaries(per_token) / 2


def test_small_logits_are_made_at_once_and_tiles_follow_the_devices():
  model, _, targets, _ = core_case()
  assert crossentropy._tile(model, targets) == 0

  def large(vocab):
    return dataclasses.replace(model.c, vocab=vocab)

  def of(vocab, shape):
    return crossentropy._tile(type("Model", (), {"c": large(vocab)}), np.zeros(shape))

  tile = crossentropy.TILE_BYTES["cpu"] // 4 // 2**17
  assert of(2**17, (64, 256)) == tile
  assert of(2**17, (1, 40)) == 40
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    assert of(2**17, (64, 256)) == 2 * tile  # each has half of the vocabulary
    assert of(2**12, (8, 2048)) == 2 * 2048 // 8


# SFT


@pytest.mark.parametrize("fractional", [False, True])
def test_sft_equals_the_formula_in_float64(fractional):
  examples = make_examples([24, 9, 5, 17, 3, 11], fractional)
  total, tokens = np.sum([nll(example) for example in examples], axis=0)
  loss, metrics, _ = sft_and_gradient(stacked(), packed(examples))
  assert float(loss) == pytest.approx(total / tokens, rel=1e-5)
  assert float(metrics["target_tokens"]) == sum(np.count_nonzero(mask[1:]) for _, mask in examples)


@pytest.mark.parametrize("fractional", [False, True])
def test_packed_equals_padded(fractional):
  examples = make_examples([24, 9, 5, 17, 3, 11], fractional)
  assert len(packing.pack([len(ids) for ids, _ in examples], ROW)) == 3
  assert_close(sft_and_gradient(stacked(), packed(examples)), sft_and_gradient(stacked(), padded(examples)))


def test_loss_and_gradient_are_the_same_in_rows_of_any_number_and_length():
  examples = make_examples([24, 9, 5, 17, 3, 11])
  lengths = [len(ids) for ids, _ in examples]
  loss, _, gradient = sft_and_gradient(stacked(), packed(examples))
  shapes = [fitted([lengths], 40, unit)[0] for unit in (1, 5)]
  assert shapes[0].rows < 3 < shapes[1].rows and shapes[0].length > ROW
  for rows, length in shapes:
    batch = packing.rows(examples, packing.pack(lengths, length), length, rows, pad_id=0)
    found, _, of = sft_and_gradient(stacked(), batch)
    assert_close((found, of), (loss, gradient))


@pytest.mark.parametrize("remat", ["products", "full"])
def test_rematerialised_equals_not(remat):
  batch = packed(make_examples([24, 9, 5]))
  again = jax.jit(jax.value_and_grad(lambda m: losses.sft(m, batch, losses.How(remat))[0]))(stacked())
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
LENGTHS = np.array([[5, 8], [8, 6], [13, 21]])
# Per example, computed in float64 from the published formulas. h = 1.5, -0.5, -1.75.
KINDS = {
  "dpo": (Preference(), [0.620957, 0.718460, 0.784470]),
  "cdpo": (Preference("cdpo", label_smoothing=0.1), [0.635957, 0.713460, 0.766970]),
  "rdpo": (Preference("rdpo", label_smoothing=0.1), [0.602207, 0.724710, 0.806345]),
  "ipo_sum": (Preference("ipo_sum"), [12.25, 30.25, 45.5625]),
  "ipo": (Preference("ipo"), [22.443906, 26.052517, 26.817602]),
  "dpo_norm": (Preference("dpo_norm", beta=5.0), [0.238345, 0.987096, 1.236081]),
  "simpo": (Preference("simpo", beta=2.0, gamma_beta_ratio=0.5), [2.126928, 0.594396, 2.400874]),
  "hinge": (Preference("hinge"), [0.85, 1.05, 1.175]),
}


def of_pairs(p, logprobs=GOLDEN, lengths=LENGTHS, reference=REFERENCE, real=None, kl=None):
  reference = reference if p.has_reference else None  # nothing may look at it
  real = np.ones(len(logprobs)) if real is None else real
  return preference_of(p, ScoredPairs(logprobs, lengths, reference, real, kl))


@pytest.mark.parametrize("name", KINDS)
def test_losses_of_known_log_probs(name):
  p, wanted = KINDS[name]
  for i in range(3):
    loss, _ = of_pairs(p, GOLDEN[i : i + 1], LENGTHS[i : i + 1], REFERENCE[i : i + 1])
    assert float(loss) == pytest.approx(wanted[i], rel=2e-6, abs=2e-6)
  loss, metrics = of_pairs(p)
  assert float(loss) == float(metrics["loss"]) == pytest.approx(np.mean(wanted), rel=2e-6, abs=2e-6)
  loss, metrics = of_pairs(dataclasses.replace(p, nll_weight=1.5))
  nll = (10 / 5 + 20.5 / 8 + 33.25 / 13) / 3
  assert float(metrics["nll"]) == pytest.approx(nll)
  assert float(loss) == pytest.approx(np.mean(wanted) + 1.5 * nll, rel=2e-6)


def test_kto_of_known_log_probs():
  z = 0.3
  chosen, rejected = [0.482507, 0.495000, 0.587830], [0.480011, 0.517493, 0.455121]
  others = np.array([0.5, -0.4, 0.8, 9.0]) - 25  # log-probs of responses to other prompts; their mean ratio is z
  real = np.array([1.0, 1, 1, 0])
  assert float(losses.divergence(others, np.full(4, -25.0), real)) == pytest.approx(z)
  assert float(losses.divergence(others - 5, np.full(4, -25.0), real)) == 0  # a divergence is not negative
  assert not np.any(jax.grad(losses.divergence)(others, np.full(4, -25.0), real))  # it is a constant
  loss, metrics = of_pairs(Preference("kto"), kl=z)
  assert float(metrics["kl"]) == pytest.approx(z)
  assert float(loss) == pytest.approx(np.mean([chosen, rejected]), abs=1e-6)
  gradient = jax.grad(lambda x: of_pairs(Preference("kto"), x, kl=z)[0])(jnp.asarray(GOLDEN))
  right = 1 / (1 + np.exp(-0.1 * (GOLDEN - REFERENCE) + 0.1 * z))
  np.testing.assert_allclose(gradient, right * (1 - right) * 0.1 / 6 * [-1, 1], atol=1e-8)


def test_metrics_of_known_log_probs():
  _, metrics = of_pairs(Preference())
  assert float(metrics["margin"]) == pytest.approx(0.1 * -0.75 / 3)
  assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
  assert float(metrics["chosen_logprob"]) == pytest.approx(-63.75 / 3)
  assert float(metrics["rejected_logprob"]) == pytest.approx(-71 / 3)
  assert float(metrics["chosen_length"]) == pytest.approx(26 / 3)
  assert float(metrics["rejected_length"]) == pytest.approx(35 / 3)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_the_losses_are_slopes(name):
  p, x = KINDS[name][0], jnp.asarray(GOLDEN)
  gradient = np.asarray(jax.grad(lambda x: of_pairs(p, x)[0])(x), np.float64)
  with jax.enable_x64(True):

    def value(x):
      return float(of_pairs(p, jnp.asarray(x), LENGTHS.astype(float), jnp.asarray(REFERENCE))[0])

    for i in np.ndindex(GOLDEN.shape):
      step = np.zeros(GOLDEN.shape)
      step[i] = 1e-5
      slope = (value(GOLDEN + step) - value(GOLDEN - step)) / 2e-5
      assert gradient[i] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo", "dpo_norm"])
def test_losses_start_at_ln_2_where_the_reference_is_the_policy(name):
  assert float(of_pairs(KINDS[name][0], reference=GOLDEN)[0]) == pytest.approx(np.log(2), abs=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_pairs_that_fill_the_batch_up_do_not_count(name):
  p = dataclasses.replace(KINDS[name][0], nll_weight=0.5)

  def filled(x, value):
    return np.concatenate([x, np.full((2, 2), value)])

  loss, metrics = of_pairs(
    p, filled(GOLDEN, 55.0), filled(LENGTHS, 0), filled(REFERENCE, 3), np.array([1.0, 1, 1, 0, 0])
  )
  alone, wanted = of_pairs(p)
  assert float(loss) == pytest.approx(float(alone))
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in wanted.items()})


def test_dpo_stays_finite_for_huge_margins():
  value, slope = jax.value_and_grad(lambda x: of_pairs(Preference(), x, jnp.ones((2, 2)), jnp.zeros((2, 2)))[0])(
    jnp.array([[0.0, -1e5], [-1e5, 0.0]])
  )
  assert float(value) == pytest.approx(1e4 / 2)
  np.testing.assert_allclose(slope, [[0, 0], [-0.05, 0.05]], atol=1e-6)


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (dict(loss="dop"), "loss is 'dop'; it may be 'dpo', 'cdpo', .*did you mean 'dpo'"),
    (dict(label_smoothing=0.1), r"label_smoothing is 0.1, but the loss 'dpo' has none.*\(cdpo, rdpo, simpo\)"),
    (dict(loss="ipo", gamma_beta_ratio=0.5), r"gamma_beta_ratio is 0.5, but the loss 'ipo' has none.*\(simpo\)"),
    (dict(loss="rdpo", label_smoothing=0.5), "label_smoothing is 0.5; .*below 0.5"),
    (dict(loss="cdpo"), "label_smoothing is 0, with which the loss 'cdpo' is 'dpo'"),
    (dict(beta=0.0), "beta is 0.0"),
    (dict(nll_weight=-1.0), "nll_weight is -1.0"),
  ],
)
def test_invalid_losses_are_refused(wrong, said):
  with pytest.raises(ConfigError, match=said):
    Preference(**wrong)


def test_the_words_of_the_config_are_the_losses():
  assert typing.get_args(typing.get_type_hints(Preference)["loss"]) == tuple(losses.PREFERENCES)
  assert set(losses.PREFERENCES) == {*KINDS, "kto"}


def pairs_batch(lengths, reference=None, real=None, make=packed):
  examples = make_examples(lengths)
  batch = make(examples)
  count = len(lengths) // 2
  if reference is not None:
    batch["reference"] = np.asarray(reference, np.float32)
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


@pytest.mark.parametrize(
  "p", [KINDS["ipo"][0], KINDS["simpo"][0], Preference("kto", nll_weight=0.5)], ids=lambda p: p.loss
)
def test_losses_of_a_model_equal_those_of_its_log_probs_and_lengths(p):
  batch, examples = pairs_batch([24, 9, 5, 17, 3, 11])
  reference = np.random.default_rng(2).normal(size=(3, 2)) * 5 - 20
  sums, counts = np.array([nll(example) for example in examples]).T.reshape(2, 3, 2)
  kl = 0.7 if p.loss == "kto" else None
  wanted, _ = of_pairs(p, -sums, counts, reference, kl=kl)
  batch |= {"reference": reference.astype(np.float32)} if p.has_reference else {}
  batch |= {} if kl is None else {"kl": np.float32(kl)}
  loss = jax.jit(lambda model: losses.preference(model, batch, p)[0])(stacked())
  assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


# Forks: the text of a pair packed once


def make_pairs(shapes, seed=4):
  """[(chosen, rejected)] with texts and continuations of these lengths."""
  rng = np.random.default_rng(seed)
  pairs = []
  for text, *ends in shapes:
    start = rng.integers(1, CONFIG.vocab, text).tolist()
    masks = [np.arange(text + n) >= text for n in ends]
    pairs.append(
      tuple((start + rng.integers(1, CONFIG.vocab, n).tolist(), m) for n, m in zip(ends, masks, strict=True))
    )
  return pairs


def forked(pairs, length, n_rows=8):
  sizes = [packing.forked_length(*pair) for pair in pairs]
  return packing.forked_rows(pairs, packing.pack(sizes, length), length, n_rows, pad_id=0)


def test_texts_packed_once_give_the_log_probs_and_gradients_of_pairs_in_full():
  pairs = make_pairs([(9, 5, 8), (14, 10, 3), (2, 6, 6), (1, 4, 5), (11, 7, 7)])
  made = forked(pairs, 2 * ROW)
  sides = [side for pair in pairs for side in pair]
  assert (made["example"] >= 0).sum() == sum(len(ids) for ids, _ in sides) - (8 + 13 + 1 + 0 + 10)
  weigh = 0.02 * np.random.default_rng(0).normal(size=10)

  @jax.jit
  def weighted(model, batch):
    def total(model):
      found = losses.sequence_logprobs(losses.batch_logprobs(model, batch), batch, 10)
      return (weigh * found).sum(), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(model)
    return found, gradient

  found = weighted(stacked(), made)
  np.testing.assert_allclose(found[0], [-nll(side)[0] for side in sides], rtol=1e-5)
  assert_close(found, weighted(stacked(), packed(sides)))


def test_a_second_continuation_does_not_see_the_first_nor_the_first_the_second():
  pairs = make_pairs([(9, 5, 8), (6, 4, 4)])
  made = forked(pairs, 2 * ROW)
  token = jax.jit(losses.batch_logprobs)
  before = np.asarray(token(stacked(), made))
  for side in (0, 1):
    other = np.where((made["example"] == side) & (made["positions"] >= 9), 7, made["tokens"])
    after = np.asarray(token(stacked(), made | {"tokens": other}))
    changed = np.abs(after - before) > 1e-7
    assert changed.any() and set(made["example"][changed]) == {side}


# Policy gradients


def test_advantages_are_deviations_from_the_group():
  np.testing.assert_allclose(losses.advantages([1.0, 2.0, 6.0]), (np.array([1, 2, 6]) - 3) / (np.sqrt(7) + 1e-4))
  assert not losses.advantages([4.0, 4.0, 4.0]).any() and not losses.advantages([4.0]).any()


def test_grpo_of_known_log_probs():
  g = losses.Grpo(clip_ratio=0.2, kl=0.1)
  logprobs, old, reference = np.array([-1.0, -2.0, -0.5, -3.0]), np.array([-1.0, -2.5, -0.1, -3.3]), np.full(4, -1.5)
  advantage = np.array([1.0, 1.0, -2.0, -1.0])
  ratio = np.exp(logprobs - old)
  gain = [min(r * a, np.clip(r, 0.8, 1.2) * a) for r, a in zip(ratio, advantage, strict=True)]
  apart = reference - logprobs
  kl = np.exp(apart) - apart - 1
  loss, metrics = losses.grpo_of(g, logprobs, old, reference, advantage)
  assert float(loss) == pytest.approx(0.1 * kl.mean() - np.mean(gain), rel=1e-5)
  assert float(metrics["kl"]) == pytest.approx(kl.mean(), rel=1e-5)
  assert float(metrics["clipped"]) == 0.5  # risen too far with an advantage, fallen too far without
  gradient = jax.grad(lambda x: losses.grpo_of(losses.Grpo(kl=0.0), x, old, reference, advantage)[0])(logprobs)
  np.testing.assert_allclose(gradient, -np.array([1, 0, 0, -1]) * ratio / 4 * [1, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(("wrong", "said"), [(dict(clip_ratio=0.0), "clip_ratio is 0.0"), (dict(kl=-1.0), "kl is -1")])
def test_invalid_policy_gradients_are_refused(wrong, said):
  with pytest.raises(ConfigError, match=said):
    losses.Grpo(**wrong)


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


# The formulas again, where TRL is installed (0.24 still has them as a function of log-probs)

TRL = {  # name -> (TRL's loss_type, whether it wants log-probs per token, arguments)
  "dpo": ("sigmoid", False, {}),
  "cdpo": ("sigmoid", False, {"label_smoothing": 0.1}),
  "rdpo": ("robust", False, {"label_smoothing": 0.1}),
  "ipo": ("ipo", True, {}),
  "hinge": ("hinge", False, {}),
}


@pytest.mark.parametrize("name", TRL)
def test_live_losses_equal_those_of_trl(name):
  torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
  formula = getattr(trl.DPOTrainer, "dpo_loss", None)
  if formula is None:
    pytest.skip(f"trl {trl.__version__} has no dpo_loss; 0.24 has")
  kind, per_token, arguments = TRL[name]
  rng = np.random.default_rng(7)
  logprobs, reference = rng.normal(-30, 8, (2, 64, 2))
  lengths = rng.integers(3, 40, (64, 2))
  device = types.SimpleNamespace(device=torch.device("cpu"))
  fixed = dict(accelerator=device, reference_free=False, f_divergence_type="reverse_kl", beta=0.1)
  trainer = types.SimpleNamespace(**fixed, **({"label_smoothing": 0.0} | arguments))
  scale = lengths if per_token else 1
  columns = [torch.tensor(x[:, side]) for x in (logprobs / scale, reference / scale) for side in (0, 1)]
  wanted, chosen, rejected = formula(trainer, *columns, kind, {})
  with jax.enable_x64(True):
    pairs = ScoredPairs(*(jnp.asarray(x, jnp.float64) for x in (logprobs, lengths, reference, np.ones(64))))
    loss, metrics = preference_of(KINDS[name][0], pairs)
  assert float(loss) == pytest.approx(float(wanted.mean()), rel=1e-6)
  assert float(metrics["margin"]) == pytest.approx(float((chosen - rejected).mean()), rel=1e-6)


# Weights by example


@pytest.mark.parametrize("average", ["tokens", "examples"])
def test_gamma_weighs_the_mean_losses_of_two_sets(average):
  gamma, human = 0.3, np.array([True] * 3 + [False] * 4)
  examples = make_examples([9, 20, 6, 24, 12, 15, 7])
  o = training.MixedOptions(
    optimizer=Optimizer(1e-3, 0.0), batch=7, epochs=1, row_length=ROW, average=average, gamma=gamma
  )
  shares = policy.gamma_shares(examples, human, o)
  assert np.average(
    shares, weights=[1 if average == "examples" else m[1:].sum() for _, m in examples]
  ) == pytest.approx(1)
  batch = Batches(Examples(examples, range(7), average, shares), o, None, 8)(0)
  found = float(sft_and_gradient(stacked(), {k: jnp.asarray(v) for k, v in batch.items()})[0])
  of = np.array([nll(example) for example in examples])  # float64
  if average == "examples":
    of /= of[:, 1:]
  means = [of[half, 0].sum() / of[half, 1].sum() for half in (human, ~human)]
  assert found == pytest.approx(gamma * means[0] + (1 - gamma) * means[1], rel=1e-5)
  assert abs(found - of[:, 0].sum() / of[:, 1].sum()) > 1e-3  # which is the loss without weights
