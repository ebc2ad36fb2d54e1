"""Sampling against full forwards and exact distributions; the same tokens whatever shares the batch."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from engine_models import CONFIG, assert_drawn_from, exact, logprobs, on_mesh, stacked, unrolled
from fixtures.make_llama_fixtures import hf_model

from alma_jax.engine import buckets, sample
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Limits, Request, SamplingHooks
from alma_jax.engine.slots import (
  MOST_SLOTS,
  PREFILL_ROWS,
  Load,
  SlotsError,
  bytes_of,
  shapes_at_hand,
  shapes_for,
  slots_that_fit,
)
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "llama"
NEW = 12
ROOM = 32 + NEW
GREEDY = Decoding(max_new_tokens=NEW, stop_ids=(), temperature=0.0)
WARM = Decoding(max_new_tokens=NEW, stop_ids=(3, 5, 11), temperature=1.2, top_p=0.9)


def make_requests(n, distinct, seed=0):
  rng = np.random.default_rng(seed)
  prompts = [tuple(rng.integers(1, CONFIG.vocab, rng.integers(1, 30)).tolist()) for _ in range(distinct)]
  return [Request(prompts[i % distinct], (i, 1000 + i)) for i in range(n)]


def run(requests, decoding, slots=4, model=None, mesh=None, **hooks):
  return sample.sample(model or unrolled(), requests, decoding, Limits(slots, 32), mesh, SamplingHooks(**hooks))


def tokens_of(results):
  return [(r.tokens, r.finished) for r in results]


def brute_force_greedy(prompt):
  ids = list(prompt)
  for _ in range(NEW):
    ids.append(int(logprobs(stacked(), ids, ROOM)[-1].argmax()))
  return tuple(ids[len(prompt) :])


def brute_force_logprobs(prompt, tokens):
  p = logprobs(stacked(), [*prompt, *tokens], ROOM)
  return [p[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def greedy():
  return run(make_requests(6, 6), GREEDY)


@pytest.fixture(scope="module")
def warm():
  return run(make_requests(24, 20), WARM)


# Against full forwards


def test_greedy_tokens_equal_a_loop_of_full_forwards(greedy):
  for request, result in zip(make_requests(6, 6), greedy, strict=True):
    assert result.tokens == brute_force_greedy(request.prompt)
    assert not result.finished


def test_logprobs_are_those_of_a_full_forward_whatever_the_temperature_with_the_stop_token(warm):
  assert 3 < sum(r.finished for r in warm) < 24
  for request, result in zip(make_requests(24, 20), warm, strict=True):
    n = len(result.tokens)
    assert n == NEW or result.finished
    wanted = brute_force_logprobs(request.prompt, result.tokens)
    np.testing.assert_allclose(result.logprobs[:n], wanted, atol=1e-4)
    if result.finished:  # which of the stop tokens ended it is not told
      ends = [brute_force_logprobs(request.prompt, (*result.tokens, stop))[-1] for stop in WARM.stop_ids]
      assert np.abs(np.array(ends) - result.logprobs[n]).min() < 1e-4
    assert len(result.logprobs) == n + result.finished
    assert not set(result.tokens) & set(WARM.stop_ids)


def test_sampling_ends_at_any_stop_token_which_is_not_among_the_tokens(greedy):
  a, b, c = (result.tokens for result in greedy[:3])
  stops = (a[-1], next(token for token in b if token not in a), c[2], 10**6)
  assert not set(stops) & set(a[:-1])  # so that the first one ends in the last place that it has
  results = run(make_requests(6, 6), dataclasses.replace(GREEDY, stop_ids=stops))
  for free, stopped in zip(greedy, results, strict=True):
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
  results = sample.sample(unrolled(), requests, WARM, Limits(32, longest_prompt=60))
  assert tokens_of(results) == tokens_of(warm)
  for result, other in zip(results, warm, strict=True):
    np.testing.assert_allclose(result.logprobs, other.logprobs, atol=1e-5)


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
def test_eight_devices_sample_what_one_does(tensor, warm):
  mesh = sharding.make_mesh(data=-1, tensor=tensor)
  model = on_mesh(unrolled(), mesh, sharding.DECODE)
  results = run(make_requests(24, 20), WARM, slots=2, model=model, mesh=mesh)
  assert tokens_of(results) == tokens_of(warm)


def test_every_device_holds_its_own_part_of_the_cache_from_the_start(monkeypatch):
  mesh, fill, seen = sharding.make_mesh(data=4, tensor=2), sample._fill, []

  def watched(model, state, *rest, **more):
    seen.extend(shard.data.shape for shard in state["cache"][0][0].addressable_shards)
    return fill(model, state, *rest, **more)

  monkeypatch.setattr(sample, "_fill", watched)
  run(make_requests(16, 16), WARM, 4, on_mesh(unrolled(), mesh, sharding.DECODE), mesh=mesh)
  assert seen == [(4, NEW, CONFIG.kv_heads // 2, CONFIG.head_dim)] * 8


# What is shared


def many_samples(n, prompts, length=(1, 30), seed=0, head=()):
  rng = np.random.default_rng(seed)
  tails = [tuple(rng.integers(1, CONFIG.vocab, rng.integers(*length)).tolist()) for _ in range(prompts)]
  return [Request((*head, *tail), (i, j)) for i, tail in enumerate(tails) for j in range(n)]


@pytest.mark.parametrize("n", [3, 9, 40])
def test_samples_that_share_their_prompts_keys_are_those_that_do_not(n):
  requests = many_samples(n, 5)
  assert shapes_for(24, 32, n).tile == (4 if n == 3 else 16)
  shared = run(requests, WARM, slots=24)
  alone = [run([r], WARM, slots=1)[0] for r in requests[:: 3 * n // 2]]
  assert tokens_of(shared[:: 3 * n // 2]) == tokens_of(alone)
  order = np.random.default_rng(2).permutation(len(requests))
  assert tokens_of(run([requests[i] for i in order], WARM, slots=7)) == tokens_of([shared[i] for i in order])
  assert len({r.tokens for r in shared}) > len(shared) / 2


def test_a_head_that_prompts_share_is_computed_once_and_changes_nothing(monkeypatch):
  rng, seen, head = np.random.default_rng(3), [], sample._head
  start = tuple(rng.integers(1, CONFIG.vocab, 40).tolist())
  requests = many_samples(1, 24, length=(5, 20), head=start)
  monkeypatch.setattr(
    sample, "_head", lambda model, tokens, *rest, **more: seen.append(1) or head(model, tokens, *rest, **more)
  )
  together = sample.sample(unrolled(), requests, WARM, Limits(8, 64))
  assert len(seen) == 1
  apart = [sample.sample(unrolled(), [r], WARM, Limits(8, 64))[0] for r in requests]
  assert len(seen) == 1  # one prompt alone shares nothing
  assert tokens_of(together) == tokens_of(apart)
  for a, b in zip(together, apart, strict=True):
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_share_prompts_and_heads_as_one_does(tensor):
  mesh = sharding.make_mesh(data=-1, tensor=tensor)
  head = tuple(np.random.default_rng(3).integers(1, CONFIG.vocab, 40).tolist())
  requests = [*many_samples(9, 11), *many_samples(2, 12, head=head, seed=1)]
  penal = dataclasses.replace(WARM, repetition_penalty=1.2)
  wanted = sample.sample(unrolled(), requests, penal, Limits(16, 80))
  found = sample.sample(on_mesh(unrolled(), mesh, sharding.DECODE), requests, penal, Limits(4, 80), mesh)
  assert tokens_of(found) == tokens_of(wanted)


# When it is over


def test_ends_cuts_a_request_where_it_says_whatever_the_segments():
  requests, asked = many_samples(6, 3), {}

  def ends(request, tokens, seen):
    asked.setdefault(request, []).append((seen, len(tokens)))
    cut = 2 + request.key[1] % 5 if request.key[1] else 10**6
    return cut if len(tokens) >= cut else None

  free = run(requests, dataclasses.replace(WARM, stop_ids=()))
  cut = run(requests, dataclasses.replace(WARM, stop_ids=()), ends=ends)
  for request, a, b in zip(requests, free, cut, strict=True):
    n = 2 + request.key[1] % 5 if request.key[1] else NEW
    assert (b.tokens, b.finished) == (a.tokens[:n], request.key[1] > 0)
    assert b.logprobs == pytest.approx(a.logprobs[:n], abs=1e-5)
    # Told once of every token, in order.
    assert [seen for seen, _ in asked[request]] == [0, *(n for _, n in asked[request])][:-1]
  # A stop token that came first counts; `ends` also hears of those that one ended.
  stopped = run(requests, WARM)
  both = run(requests, WARM, ends=lambda request, tokens, seen: 3 if len(tokens) >= 3 else None)
  for a, b in zip(stopped, both, strict=True):
    assert b.tokens == a.tokens[:3] and b.finished


def test_no_stop_token_before_the_least_length(greedy):
  stops = tuple({t for result in greedy for t in result.tokens[:2]})
  results = run(make_requests(6, 6), dataclasses.replace(GREEDY, stop_ids=stops, min_new_tokens=5))
  assert all(len(r.tokens) >= 5 for r in results)
  assert not any(set(r.tokens[:5]) & set(stops) for r in results)


def test_a_prompt_without_tokens_is_refused():
  with pytest.raises(ValueError, match="no tokens"):
    run([Request((), (0, 0))], GREEDY)


# Against transformers


@pytest.mark.parametrize(
  ("kind", "penalty"), [("llama2", 1.0), ("llama3", 1.0), ("llama31", 1.0), ("llama32", 1.0), ("llama32", 1.3)]
)
def test_live_greedy_tokens_equal_transformers_generate(kind, penalty):
  torch = pytest.importorskip("torch")
  from transformers import RepetitionPenaltyLogitsProcessor

  hf = hf_model(kind)
  model = jax.jit(llama.unrolled)(weights.load(FIXTURES / kind))
  rng = np.random.default_rng(9)
  prompts = [tuple(rng.integers(3, model.c.vocab, n).tolist()) for n in (3, 11, 7)]
  decoding = Decoding(NEW, (), temperature=0.0, repetition_penalty=penalty)
  ours = sample.sample(model, [Request(p, (0, 0)) for p in prompts], decoding, Limits(2))
  options = dict(max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0)
  for prompt, result in zip(prompts, ours, strict=True):
    theirs = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    assert result.tokens == tuple(theirs[0, len(prompt) :].tolist())
  if penalty != 1:
    unpunished = dataclasses.replace(decoding, penalize_prompt=False)
    free = sample.sample(model, [Request(p, (0, 0)) for p in prompts], unpunished, Limits(2))
    assert tokens_of(free) != tokens_of(ours)
    options["logits_processor"] = [RepetitionPenaltyLogitsProcessor(penalty, len(prompts[0]))]
    theirs = hf.generate(torch.tensor([prompts[0]]), **(options | {"repetition_penalty": 1.0}))
    assert free[0].tokens == tuple(theirs[0, len(prompts[0]) :].tolist())


# What it costs


def compiled_sizes():
  return [f._cache_size() for f in (sample._empty, sample._head, sample._fill, sample._start, sample._segment)]


@pytest.mark.parametrize("devices", [1, 8])
def test_other_prompts_temperatures_and_another_checkpoint_compile_nothing(devices):
  mesh = sharding.make_mesh(data=4, tensor=2) if devices == 8 else None

  def run_on_mesh(seed, prompts, temperature):
    model = unrolled(seed=seed) if mesh is None else on_mesh(unrolled(seed=seed), mesh, sharding.DECODE)
    decoding = dataclasses.replace(WARM, temperature=temperature)
    sample.sample(model, many_samples(9, prompts, length=(17, 30), seed=seed), decoding, Limits(4, 32), mesh)

  run_on_mesh(0, 9, 1.2)
  sizes = compiled_sizes()
  run_on_mesh(1, 14, 0.7)  # little work: temperatures share programs, too
  assert compiled_sizes() == sizes


@pytest.mark.parametrize(("little", "slots", "count"), [(0, 13, 2), (buckets.LITTLE, 11, 1)], ids=["much", "little"])
def test_on_a_mesh_of_one_device_every_shape_of_prefill_compiles_once(little, slots, count, monkeypatch, caplog):
  monkeypatch.setattr(buckets, "LITTLE", little)
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
  model, fill, shapes = on_mesh(unrolled(), one, sharding.DECODE), sample._fill, set()
  monkeypatch.setattr(sample, "_fill", lambda *x, mesh: shapes.add(x[3].shape) or fill(*x, mesh=mesh))
  requests = many_samples(1, 30, length=(17, 30))
  with jax.log_compiles():
    found = sample.sample(model, requests, WARM, Limits(slots, 21), one)
  assert sum("Compiling jit(_fill)" in line for line in caplog.messages) == len(shapes) == count
  assert found == sample.sample(unrolled(), requests, WARM, Limits(slots, 21))
  monkeypatch.setattr(buckets, "LITTLE", 0)
  assert tokens_of(found) == tokens_of(sample.sample(unrolled(), requests, WARM, Limits(13, 21)))


def test_a_segment_updates_the_cache_where_it_is():
  # Deep, so that what one layer works with is small beside the whole cache.
  c = dataclasses.replace(CONFIG, depth=8)
  model, decoding = jax.jit(lambda: llama.unrolled(llama.init(c, 0)))(), Decoding(max_new_tokens=1024)
  for samples in (1, 40):  # with prefixes of their own, and in tiles
    call = sample._Sampler(model, many_samples(samples, 2), decoding, shapes_for(16, 32, samples), None)
    call.refill()
    tiles = None if call.shapes.tile == 1 else call.tiles()
    compiled = sample._segment.lower(model, call.state, tiles, decoding=decoding, steps=4, mesh=None).compile()
    memory = compiled.memory_analysis()
    cache = 2 * c.depth * 16 * 1024 * c.kv_heads * c.head_dim * 4
    assert memory.alias_size_in_bytes > cache  # donated
    assert memory.temp_size_in_bytes < cache / 4


def test_shapes_follow_the_requests_up_to_what_is_allowed():
  few = shapes_at_hand([16] * 12, 12, slots=64, room=1024, ways=1)
  assert (few.slots, few.rows, few.room, few.tile) == (16, 16, 16, 1)
  many = shapes_at_hand([700, 30], 400, slots=100, room=900, ways=2)
  assert (many.slots, many.room, many.tile) == (100, 900, 16)
  assert many.rows == 2 + 100 // 16  # enough for any share of the slots in the two prompts
  assert shapes_at_hand([40], 6, slots=64, room=1024, ways=8).slots == 1
  # Powers of two, so that calls of like size share their programs.
  assert len({shapes_at_hand([n], n, slots=64, room=1024, ways=1).slots for n in range(33, 65)}) == 1


def test_slots_are_counted_from_the_memory_that_is_free():
  def fit(free, wanted=0):
    return slots_that_fit(unrolled(), WARM, Load(64, 8), free, None, wanted)

  assert fit(None) == 64 and fit(None, wanted=7) == 7
  assert fit(2**40) == MOST_SLOTS
  half = fit(2**22)
  assert 8 <= half < MOST_SLOTS
  assert fit(2**22, wanted=half) == half
  with pytest.raises(SlotsError, match=rf"engine.slots is 500.*\b{half} would fit"):
    fit(2**22, wanted=500)
  with pytest.raises(SlotsError, match=r"not one sequence fits: prompts of 64 and answers of 12.*engine\.tensor"):
    fit(1000)


@pytest.mark.parametrize("slots, samples", [(8, 1), (8, 3), (64, 9), (64, 100)])
def test_a_call_holds_no_more_than_is_counted(slots, samples):
  model, shapes = unrolled(), shapes_for(slots, 32, samples)
  state = jax.eval_shape(lambda: sample._empty(model, shapes, WARM, None))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert held <= bytes_of(model, WARM, shapes, None)


def test_progress_hears_of_every_request_and_token(warm):
  heard = []
  run(make_requests(24, 20), WARM, progress=lambda requests, tokens: heard.append((requests, tokens)))
  assert tuple(np.sum(heard, axis=0)) == (24, sum(len(r.tokens) + r.finished for r in warm))


def test_no_requests_give_no_results():
  assert run([], WARM) == []


# Distributions


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
