"""Sampling against full forwards and exact distributions; the same tokens whatever shares the batch."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from engine_models import CONFIG, log_softmax, logprobs, on_mesh, stacked, unrolled

from alma_jax.engine import sample as engine
from alma_jax.engine.sample import PREFILL_ROWS, Decoding, Request, choose, sample
from alma_jax.llama import sharding

NEW = 12
ROOM = 32 + NEW
GREEDY = Decoding(max_new_tokens=NEW, stop_ids=(), temperature=0.0)
WARM = Decoding(max_new_tokens=NEW, stop_ids=(3, 5, 11), temperature=1.2, top_p=0.9)


def make_requests(n, distinct, seed=0):
  rng = np.random.default_rng(seed)
  prompts = [tuple(rng.integers(1, CONFIG.vocab, rng.integers(1, 30)).tolist()) for _ in range(distinct)]
  return [Request(prompts[i % distinct], (i, 1000 + i)) for i in range(n)]


def run(requests, decoding, slots=4, model=None, **more):
  return sample(model or unrolled(), requests, decoding, slots, longest_prompt=32, **more)


def tokens_of(results):
  return [(r.tokens, r.finished) for r in results]


def brute_force_greedy(prompt):
  ids = list(prompt)
  for _ in range(NEW):
    ids.append(int(logprobs(stacked(), ids, ROOM)[-1].argmax()))
  return tuple(ids[len(prompt) :])


def brute_force_logprob(prompt, tokens):
  p = logprobs(stacked(), [*prompt, *tokens], ROOM)
  return sum(p[len(prompt) - 1 + i, token] for i, token in enumerate(tokens))


@pytest.fixture(scope="module")
def greedy():
  return run(make_requests(6, 6), GREEDY)


@pytest.fixture(scope="module")
def warm():
  return run(make_requests(24, 20), WARM)


# Against full forwards


def test_greedy_tokens_equal_a_loop_of_full_forwards(greedy):
  for request, result in zip(make_requests(6, 6), greedy):
    assert result.tokens == brute_force_greedy(request.prompt)
    assert not result.finished


def test_logprob_is_that_of_a_full_forward_at_temperature_1_with_the_stop_token(warm):
  assert 3 < sum(r.finished for r in warm) < 24
  for request, result in zip(make_requests(24, 20), warm):
    if not result.finished:
      assert len(result.tokens) == NEW
      assert result.logprob == pytest.approx(brute_force_logprob(request.prompt, result.tokens), abs=1e-4)
    else:  # which of the stop tokens ended it is not told
      ends = [brute_force_logprob(request.prompt, (*result.tokens, stop)) for stop in WARM.stop_ids]
      assert min(abs(result.logprob - end) for end in ends) < 1e-4
    assert not set(result.tokens) & set(WARM.stop_ids)


def test_sampling_ends_at_any_stop_token_which_is_not_among_the_tokens(greedy):
  a, b, c = (result.tokens for result in greedy[:3])
  stops = (a[-1], next(token for token in b if token not in a), c[2], 10**6)
  assert not set(stops) & set(a[:-1])  # so that the first one ends in the last place that it has
  results = run(make_requests(6, 6), dataclasses.replace(GREEDY, stop_ids=stops))
  for free, stopped in zip(greedy, results):
    at = next((i for i, token in enumerate(free.tokens) if token in stops), None)
    assert stopped.finished == (at is not None)
    assert stopped.tokens == free.tokens[:at]
  assert results[0].finished and len(results[0].tokens) == NEW - 1
  assert results[1].finished and len(results[2].tokens) <= 2


def test_max_new_tokens_is_honoured(greedy):
  results = run(make_requests(6, 6), dataclasses.replace(GREEDY, max_new_tokens=9))
  assert [r.tokens for r in results] == [r.tokens[:9] for r in greedy]
  assert not any(r.finished for r in results)


# Whatever shares the batch


def test_slots_and_room_for_prompts_do_not_change_the_tokens(warm):
  requests = make_requests(24, 20)
  # With 32 slots all 20 distinct prompts start together: more than are prefilled in one call.
  assert PREFILL_ROWS < 20 == len({r.prompt for r in requests})
  results = sample(unrolled(), requests, WARM, slots=32, longest_prompt=60)
  assert tokens_of(results) == tokens_of(warm)
  np.testing.assert_allclose([r.logprob for r in results], [r.logprob for r in warm], atol=1e-4)


def test_order_and_company_do_not_change_a_requests_tokens(warm):
  requests = make_requests(24, 20)
  order = np.random.default_rng(1).permutation(24)
  permuted = run([requests[i] for i in order], WARM)
  assert tokens_of(permuted) == tokens_of([warm[i] for i in order])
  others = make_requests(9, 3, seed=5)
  mixed = run([*others, requests[8], *others[:2], requests[21]], WARM)
  assert tokens_of([mixed[9], mixed[12]]) == tokens_of([warm[8], warm[21]])


def test_keys_alone_tell_samples_of_one_prompt_apart():
  prompt = (1, 2, 3)
  results = run([Request(prompt, key) for key in [(1, 1), (1, 2), (2, 1), (1, 1)]], WARM)
  assert results[0] == results[3]
  assert len({r.tokens for r in results}) == 3


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_sample_what_one_does_and_compile_once(tensor, warm):
  mesh = sharding.make_mesh(data=-1, tensor=tensor)
  model = on_mesh(unrolled(), mesh, sharding.DECODE)
  spread = sharding.batch_sharding(mesh)
  place = lambda x: jax.device_put(x, spread)
  results = run(make_requests(24, 20), WARM, slots=16, model=model, place=place)
  assert tokens_of(results) == tokens_of(warm)
  sizes = compiled_sizes()
  assert tokens_of(run(make_requests(30, 7, seed=2), WARM, 16, model, place=place))
  assert compiled_sizes() == sizes


def test_every_device_holds_its_own_part_of_the_cache_from_the_start(monkeypatch):
  mesh, fill, seen = sharding.make_mesh(data=4, tensor=2), engine._fill, []

  def watched(model, state, *rest):
    seen.extend(shard.data.shape for shard in state["cache"][0][0].addressable_shards)
    return fill(model, state, *rest)

  monkeypatch.setattr(engine, "_fill", watched)
  place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
  run(make_requests(1, 1), WARM, 16, on_mesh(unrolled(), mesh, sharding.DECODE), place=place)
  assert seen == [(16 // 4, ROOM, CONFIG.kv_heads // 2, CONFIG.head_dim)] * 8


def compiled_sizes():
  return [f._cache_size() for f in (engine._empty, engine._fill, engine._segment)]


def test_a_second_call_compiles_nothing(warm):
  sizes = compiled_sizes()
  run(make_requests(40, 9, seed=3), WARM)  # other prompts, another number of requests
  assert compiled_sizes() == sizes


def test_progress_hears_of_every_request_and_token(warm):
  heard = []
  run(make_requests(24, 20), WARM, progress=lambda requests, tokens: heard.append((requests, tokens)))
  assert tuple(np.sum(heard, axis=0)) == (24, sum(len(r.tokens) + r.finished for r in warm))


def test_no_requests_give_no_results():
  assert run([], WARM) == []


# Distributions


def exact(logits, temperature, top_p):
  """float64 probabilities after temperature and top-p, as transformers' TopPLogitsWarper keeps tokens: in ascending
  order, those go whose cumulative probability is at most 1 - top_p; the likeliest always stays."""
  p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
  order = np.argsort(p, kind="stable")
  gone = np.cumsum(p[order]) <= 1 - top_p
  gone[-1] = False
  p[order[gone]] = 0
  return p / p.sum()


def assert_drawn_from(p, tokens):
  """Chi-square; rare tokens are taken together."""
  drawn, wanted = np.bincount(tokens, minlength=len(p)), len(tokens) * p
  assert drawn[p == 0].sum() == 0
  common = wanted >= 5
  drawn, wanted = (np.append(x[common], x[~common].sum()) for x in (drawn, wanted))
  drawn, wanted = drawn[wanted > 0], wanted[wanted > 0]
  assert len(wanted) > 2
  assert scipy.stats.chisquare(drawn, wanted).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_follow_the_exact_distribution_the_second_whatever_the_first(top_p):
  n, prompt = 4096, (7, 8, 9, 10)
  decoding = Decoding(max_new_tokens=2, stop_ids=(), temperature=0.8, top_p=top_p)
  results = run([Request(prompt, (i, i % 3)) for i in range(n)], decoding, slots=1024)
  first, second = np.array([r.tokens for r in results]).T
  assert_drawn_from(exact(logprobs(stacked(), prompt, ROOM)[-1], 0.8, top_p), first)
  likely = np.bincount(first).argmax()
  after = logprobs(stacked(), [*prompt, likely], ROOM)[-1]
  assert_drawn_from(exact(after, 0.8, top_p), second[first == likely])


def chosen_fractions(logits, temperature, top_p, n=20_000):
  """What part of an even grid of uniform numbers chooses each token."""
  grid = ((np.arange(n) + 0.5) / n).astype(np.float32)
  rows = np.broadcast_to(logits, (n, len(logits))).astype(np.float32)
  found = jax.jit(choose, static_argnums=2)(rows, grid, Decoding(1, (), temperature, top_p))
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
  draw = jax.jit(choose, static_argnums=2)
  for start in range(0, len(numbers), n):
    some = np.resize(numbers[start : start + n], n)
    drawn = np.asarray(draw(np.broadcast_to(logits, (n, vocab)), some, Decoding(1, (), 1.0, top_p)))
    assert (p[drawn] > 0).all()


@pytest.mark.parametrize("logits", [[-np.inf, 0.0, -np.inf], [-np.inf, 0.0, 0.0, -np.inf, -np.inf]])
def test_the_ends_of_the_unit_interval_reach_the_ends_of_the_possible_tokens(logits):
  rows = np.array([logits, logits], np.float32)
  possible = np.flatnonzero(rows[0] > -np.inf)
  for top_p in (1.0, 0.99):
    drawn = choose(rows, np.array([0.0, 1 - 2.0**-24], np.float32), Decoding(1, (), 1.0, top_p))
    assert drawn.tolist() == [possible[0], possible[-1]]


def test_greedy_takes_the_lowest_index_of_a_tie():
  assert choose(np.array([[0.0, 2.0, 2.0]], np.float32), np.array([0.9]), GREEDY).tolist() == [1]
