"""Token choice against exact distributions and transformers' logits processors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import assert_drawn_from, exact, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.engine import choose as choose_
from alma_jax.engine import choose_tpu
from alma_jax.engine.choose import Decoding, DecodingError, choose, disagreement, inverse_cdf, weights


def choice(logits, uniform, decoding):
  return jax.jit(choose, static_argnums=2)(logits, uniform, decoding)[0]


def chosen_fractions(logits, temperature, top_p, n=20_000):
  """What part of an even grid of uniform numbers chooses each token."""
  grid = ((np.arange(n) + 0.5) / n).astype(np.float32)
  rows = np.broadcast_to(logits, (n, len(logits))).astype(np.float32)
  found = choice(rows, grid, Decoding(1, temperature=temperature, top_p=top_p))
  return np.bincount(np.asarray(found), minlength=len(logits)) / n


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.7, 0.95, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
  logits = np.random.default_rng(4).normal(size=33) * 2
  p = exact(logits, 0.8, top_p)
  np.testing.assert_allclose(chosen_fractions(logits, 0.8, top_p), p, atol=2e-4)
  everything = exact(logits, 0.8, 1.0)
  kept = everything[p > 0]
  assert kept.sum() >= top_p - 1e-12
  assert len(kept) == 1 or kept.sum() - kept.min() < top_p


def test_passes_that_find_several_bits_keep_what_single_bits_do(monkeypatch):
  logits = np.random.default_rng(5).normal(size=(8, 300)) * np.repeat([[0.5], [6.0]], 4, axis=0)
  logits[2], logits[3], logits[4, 1:] = np.round(logits[2]), 0, -np.inf
  with jax.disable_jit():  # such a program takes long to compile for CPUs
    for decoding in (Decoding(1, temperature=0.8, top_p=0.9), Decoding(1, top_k=9, top_p=0.5)):
      kept = {}
      for platform in ("cpu", "tpu"):
        monkeypatch.setattr(choose_, "platform", lambda platform=platform: platform)
        kept[platform] = np.asarray(weights(logits.astype(np.float32), decoding))
      np.testing.assert_array_equal(kept["cpu"], kept["tpu"])
      assert len(set((kept["cpu"] > 0).sum(axis=-1).tolist())) > 2


def test_top_p_cuts_ties_by_index():
  np.testing.assert_allclose(chosen_fractions(np.array([0.0, 1, 1, 1, 1]), 1.0, 0.4), [0, 0.5, 0.5, 0, 0], atol=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_live_top_p_equals_transformers(top_p):
  torch = pytest.importorskip("torch")
  from transformers.generation.logits_process import TopPLogitsWarper

  logits = np.random.default_rng(6).normal(size=50) * 2
  theirs = TopPLogitsWarper(top_p)(None, torch.tensor(logits[None])).softmax(-1)[0].numpy()
  np.testing.assert_allclose(chosen_fractions(logits, 1.0, top_p), theirs, atol=2e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_token_of_probability_0_is_never_drawn(top_p):
  # A parallel cumulative sum is not monotonic, and moves where nothing is added: each such place is tried.
  rng = np.random.default_rng(0)
  vocab, n = 5000, 96
  logits = (3 * rng.normal(size=vocab)).astype(np.float32)
  logits[rng.random(vocab) < 0.5] = -np.inf
  logits[[0, -1]] = -np.inf
  p = np.asarray(jax.nn.softmax(logits))
  cdf = np.asarray(jax.jit(lambda x: jax.numpy.cumsum(x, axis=-1))(np.broadcast_to(p, (n, vocab))))[0]
  moves = np.diff(cdf)
  traps = np.flatnonzero(((moves != 0) & (p[1:] == 0)) | (moves < 0))
  assert len(traps) > 10
  numbers = np.concatenate([cdf[traps], cdf[traps + 1], np.nextafter(cdf[traps], np.float32(0))])
  numbers = np.concatenate([numbers[numbers < 1], [0.0, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-23]]).astype(np.float32)
  for start in range(0, len(numbers), n):
    some = np.resize(numbers[start : start + n], n)
    drawn = np.asarray(choice(np.broadcast_to(logits, (n, vocab)), some, Decoding(1, top_p=top_p)))
    assert (p[drawn] > 0).all()


@pytest.mark.parametrize("logits", [[-np.inf, 0.0, -np.inf], [-np.inf, 0.0, 0.0, -np.inf, -np.inf]])
def test_the_ends_of_the_unit_interval_reach_the_ends_of_the_possible_tokens(logits):
  rows = np.array([logits, logits], np.float32)
  possible = np.flatnonzero(rows[0] > -np.inf)
  for top_p in (1.0, 0.99):
    drawn = choice(rows, np.array([0.0, 1 - 2.0**-24], np.float32), Decoding(1, top_p=top_p))
    assert drawn.tolist() == [possible[0], possible[-1]]


def test_greedy_takes_the_lowest_index_of_a_tie():
  assert choice(np.array([[0.0, 2.0, 2.0]], np.float32), np.array([0.9]), Decoding(1, temperature=0.0)).tolist() == [1]


@pytest.mark.parametrize("vocab", [7, 64, 1000, 4096])
def test_greedy_is_numpys_argmax(vocab):
  logits = np.random.default_rng(vocab).integers(0, 40, (50, vocab)).astype(np.float32)  # full of ties
  drawn = choice(logits, np.zeros(50, np.float32), Decoding(1, temperature=0.0))
  np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


@given(st.integers(0, 2**32 - 1), st.integers(2, 700), st.integers(1, 800), st.floats(0.2, 3.0))
@settings(max_examples=25, deadline=None)
def test_top_k_keeps_the_k_largest_and_their_ties(seed, vocab, k, temperature):
  logits = np.round(np.random.default_rng(seed).normal(size=(3, vocab)) * 2, 1).astype(np.float32)
  kept = np.asarray(weights(logits, Decoding(1, temperature=temperature, top_k=k))) > 0
  edge = np.sort(logits, axis=-1)[:, -min(k, vocab)]
  np.testing.assert_array_equal(kept, logits >= edge[:, None])


# In transformers' order: the penalty, the least length, temperature, top-k, top-p.
MIXTURES = [
  dict(repetition_penalty=1.3),
  dict(repetition_penalty=0.7, temperature=0.5),
  dict(min_new_tokens=4, temperature=1.5),
  dict(top_k=1),
  dict(top_k=9, temperature=0.6),
  dict(top_k=12, top_p=0.7),
  dict(temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.2, min_new_tokens=4),
]


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_live_distribution_of_the_next_token_equals_transformers(mixture):
  torch = pytest.importorskip("torch")
  from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

  rng, rows, vocab = np.random.default_rng(7), 6, 61
  logits = (2 * rng.normal(size=(rows, vocab))).astype(np.float32)
  said = rng.integers(0, vocab, (rows, 9))
  decoding = Decoding(**{"max_new_tokens": 8, "stop_ids": (3, 60)} | mixture)
  # generate's own list of processors, after a prompt of 6 tokens and 3 more
  sizes = dict(vocab_size=vocab, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
  hf = LlamaForCausalLM(LlamaConfig(**sizes))
  config = GenerationConfig(**{"do_sample": True, "top_k": 0, "eos_token_id": [3, 60], "max_new_tokens": 8} | mixture)
  hf._prepare_special_tokens(config, device=torch.device("cpu"))
  processors = hf._get_logits_processor(config, input_ids_seq_length=6, encoder_input_ids=None)
  theirs = processors(torch.tensor(said), torch.tensor(logits)).softmax(-1).numpy()

  mark = np.zeros((rows, vocab), bool)
  mark[np.arange(rows)[:, None], said] = True
  w = np.asarray(weights(logits, decoding, mark, np.full(rows, 3)))
  np.testing.assert_allclose(w / w.sum(axis=-1, keepdims=True), theirs, atol=1e-5)
  if "min_new_tokens" in mixture:
    assert not w[:, [3, 60]].any()
    assert np.asarray(weights(logits, decoding, mark, np.full(rows, 4)))[:, [3, 60]].any()


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_draws_follow_the_weights(mixture):
  rng, n, vocab = np.random.default_rng(8), 30_000, 150
  logits, mark = (2 * rng.normal(size=vocab)).astype(np.float32), rng.random(vocab) < 0.3
  decoding = Decoding(**{"max_new_tokens": 8, "stop_ids": (3, 60)} | mixture)
  rows = [np.broadcast_to(x, (n, *np.shape(x))) for x in (logits, mark, 3)]
  token, logprob = jax.jit(choose, static_argnums=2)(rows[0], rng.random(n).astype(np.float32), decoding, *rows[1:])
  w = np.asarray(weights(logits[None], decoding, mark[None], np.array([3])), np.float64)[0]
  if np.count_nonzero(w) > 1:
    assert_drawn_from(w / w.sum(), np.asarray(token))
  raw = log_softmax(logits.astype(np.float64))  # whatever was ruled out or warped
  np.testing.assert_allclose(logprob, raw[np.asarray(token)], atol=1e-5)


@pytest.mark.parametrize(
  "wrong",
  [dict(max_new_tokens=0), dict(temperature=-0.1), dict(top_k=-1), dict(top_p=1.1), dict(min_new_tokens=9)],
  ids=str,
)
def test_values_outside_their_range_are_named(wrong):
  with pytest.raises(DecodingError, match=next(iter(wrong))):
    Decoding(**{"max_new_tokens": 8} | wrong)


# ---- The kernel for TPUs, in its interpreter on a CPU


@pytest.mark.parametrize(
  "vocab, options",
  [(61, dict(temperature=0.0)), (1300, dict(top_p=0.9)), (1300, dict(temperature=0.7, top_k=40, top_p=0.7))],
  ids=str,
)
def test_the_kernel_draws_what_the_definition_draws(vocab, options):
  decoding = Decoding(1, **options)
  z, uniform = choose_._hard_rows(vocab)  # ties, equal, impossible and sure tokens; 12 rows: one step and a half
  values = dict(temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
  drawn = jax.jit(functools.partial(choose_tpu.drawn, **values, interpret=True))(z, uniform)
  wanted = jax.jit(choose, static_argnums=2)(z, uniform, decoding)
  np.testing.assert_array_equal(drawn[0], wanted[0])
  np.testing.assert_allclose(drawn[1], wanted[1], atol=1e-5)
  assert disagreement(lambda z, uniform, **_: drawn, vocab, **values) is None


def test_a_kernel_that_draws_something_else_is_found():
  options = dict(temperature=0.7, top_k=40, top_p=0.7)

  def plain(z, uniform, **changed):
    return choose(z, uniform, Decoding(1, **(options | changed)))

  def check(**changed):
    return disagreement(lambda z, uniform, **_: plain(z, uniform, **changed), 300, **options)

  assert check() is None
  for changed in (dict(temperature=1.0), dict(top_k=0), dict(top_p=0.9), dict(temperature=0.0)):
    assert "whose part of the distribution does not hold" in check(**changed), changed
  off = disagreement(lambda z, uniform, **_: (plain(z, uniform)[0], plain(z, uniform)[1] + 0.01), 300, **options)
  assert off.startswith("the log-probability of row 0 is")


def test_other_platforms_and_large_vocabularies_need_no_kernel(monkeypatch):
  logits, uniform = jnp.zeros((8, 300)), jnp.zeros(8)

  def plain(logits, uniform):
    token = inverse_cdf(weights(logits, decoding), uniform)
    top = logits.max(axis=-1, keepdims=True)
    mass = jnp.exp(logits - top).sum(axis=-1)
    return token, (jnp.take_along_axis(logits, token[:, None], axis=1) - top)[:, 0] - jnp.log(mass)

  decoding = Decoding(1, temperature=0.8, top_p=0.9)
  # CPUs run the program that they ran before there was a kernel.
  found, wanted = (jax.make_jaxpr(f)(logits, uniform) for f in (functools.partial(choose, decoding=decoding), plain))
  assert str(found) == str(wanted)
  for platform in ("cpu", "gpu"):
    monkeypatch.setattr(choose_, "platform", lambda platform=platform: platform)
    assert choose_._kernel_for(logits, decoding) is None
  monkeypatch.setattr(choose_, "platform", lambda: "tpu")
  monkeypatch.setattr(choose_, "_spread_axes", lambda: ())
  assert choose_._kernel_for(logits, decoding) is not None
  choose_._warn.cache_clear()
  with pytest.warns(UserWarning, match="plain XLA.*a vocabulary of 1,000,000 tokens does not fit"):
    assert choose_._kernel_for(jax.ShapeDtypeStruct((8, 10**6), jnp.float32), decoding) is None


def test_the_rules_are_applied_before_the_kernel(monkeypatch):
  logits, uniform = choose_._hard_rows(61)
  said, count = np.arange(61) % 2 == 0, np.arange(12) % 6
  decoding = Decoding(8, (3, 60), temperature=0.0, repetition_penalty=1.3, min_new_tokens=4)
  given = logits, uniform, decoding, np.broadcast_to(said, logits.shape), count
  wanted = choose(*given)
  greedy = functools.partial(choose_tpu.drawn, temperature=0.0, top_k=0, top_p=1.0, interpret=True)
  monkeypatch.setattr(choose_, "_kernel_for", lambda *a: greedy)
  found = choose(*given)
  np.testing.assert_array_equal(found[0], wanted[0])
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)  # in the model's own distribution
  assert (np.asarray(found[0]) != logits.argmax(axis=-1)).any()
