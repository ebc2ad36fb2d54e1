"""Scores against unpadded full forwards and transformers, whatever the batch, the sharing and the devices."""

import collections
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_tokenizers
from engine_models import CONFIG, logprobs, on_mesh, stacked
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.engine import buckets, score
from alma_jax.engine.score import Setup, next_logprobs, sequence_logprobs, token_logprobs
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.text import chat, judge

COLUMNS = [5, 2, 90, 17]


def ids(rng, n):
  return tuple(rng.integers(1, CONFIG.vocab, n).tolist())


def some_rows(seed=0):
  """(rows, what most of their prefixes begin with): prefixes of many rows and of one, lengths on both sides of a
  width's end, a row that is there three times, a prefix of nothing."""
  rng = np.random.default_rng(seed)
  common = ids(rng, 70)
  prefixes = [common + ids(rng, 4), common[:64] + ids(rng, 9), common]
  rows = [(prefix, ids(rng, n)) for prefix in prefixes for n in (2, 16, 17, 9, 5, 6, 7, 8)]
  rows += [(prefix, ids(rng, n)) for prefix in [common[:5] + ids(rng, 2)] for n in (2, 17)]
  rows += [(common + ids(rng, 1), ids(rng, 5)), ((), ids(rng, 12)), rows[1], rows[1]]
  return [rows[i] for i in rng.permutation(len(rows))], common


@pytest.fixture(scope="module")
def rows():
  return some_rows()[0]


@pytest.fixture(scope="module")
def read(rows):
  return next_logprobs(stacked(), rows, COLUMNS, 2, Setup(8))


def test_reads_equal_full_forwards_of_each_row_alone(rows, read):
  assert read.shape == (len(rows), 2, len(COLUMNS))
  for (prefix, suffix), found in zip(rows, read, strict=True):
    np.testing.assert_allclose(found, logprobs(stacked(), prefix + suffix, room=112)[-2:][:, COLUMNS], atol=1e-5)


def test_company_order_and_padding_change_nothing(rows, read):
  order = np.random.default_rng(1).permutation(len(rows))
  permuted = next_logprobs(stacked(), [rows[i] for i in order], COLUMNS, 2, Setup(32))
  np.testing.assert_allclose(permuted, read[order], atol=1e-6, rtol=1e-6)
  alone = next_logprobs(stacked(), rows[:1], COLUMNS, 2, Setup(8))[0]
  np.testing.assert_allclose(alone, read[0], atol=1e-6, rtol=1e-6)


def test_what_all_prefixes_share_changes_no_score(rows, read):
  found = next_logprobs(stacked(), rows, COLUMNS, 2, Setup(8, some_rows()[1]))
  np.testing.assert_allclose(found, read, atol=1e-5)


def test_every_prefix_and_every_equal_row_is_computed_once(rows):
  heard = []
  next_logprobs(stacked(), rows, COLUMNS, 2, Setup(8, progress=lambda *done: heard.append(done)))
  once = [*dict(rows), *(suffix for _, suffix in set(rows))]
  assert np.sum(heard, axis=0).tolist() == [len(rows), sum(map(len, once))]
  common, heard = some_rows()[1], []
  next_logprobs(stacked(), rows, COLUMNS, 2, Setup(8, common, progress=lambda *done: heard.append(done)))
  sharing = sum(prefix[:64] == common[:64] for prefix in dict(rows))
  assert sum(tokens for _, tokens in heard) == sum(map(len, once)) - 64 * (sharing - 1)


def test_more_reads_than_a_suffix_has_tokens_are_refused():
  with pytest.raises(ValueError, match="row 1: 3 places are to be read of a suffix of 2"):
    next_logprobs(stacked(), [((4,), (1, 2, 3)), ((4,), (1, 2))], COLUMNS, 3, Setup(8))


def programs():
  return sum(f._cache_size() for f in (score._read, score._score, score._prefixes))


def test_eight_devices_read_what_one_does_and_a_second_call_compiles_nothing(rows, read):
  mesh = sharding.make_mesh(data=4, tensor=2)
  model = on_mesh(stacked(), mesh, sharding.DECODE)
  np.testing.assert_allclose(next_logprobs(model, rows, COLUMNS, 2, Setup(4, mesh=mesh)), read, atol=1e-5)
  compiled = programs()
  others, _ = some_rows(seed=1)
  found = next_logprobs(model, others, COLUMNS, 2, Setup(4, mesh=mesh))
  assert programs() == compiled and compiled > 0
  np.testing.assert_allclose(found[0], next_logprobs(stacked(), others[:1], COLUMNS, 2, Setup(8))[0], atol=1e-5)


def test_little_work_runs_in_one_shape_and_much_in_several(monkeypatch, rows, read):
  """Prefixes and suffixes of all lengths: one program each; the scores are those of any other shapes."""
  shapes, prefixes, reading = [set(), set()], score._prefixes, score._read
  monkeypatch.setattr(score, "_prefixes", lambda *x, mesh: shapes[0].add(x[1].shape) or prefixes(*x, mesh=mesh))
  monkeypatch.setattr(
    score, "_read", lambda *x, **to: shapes[1].add((x[1].kv[0].shape, x[2].shape)) or reading(*x, **to)
  )
  some = [row for row in rows if len(row[0]) <= 32 and len(row[1]) <= 32]
  found = next_logprobs(stacked(), some, COLUMNS, 2, Setup(8))
  assert shapes[0] == {(8, 32)} and len(shapes[1]) == 1
  monkeypatch.setattr(buckets, "LITTLE", 0)
  again = next_logprobs(stacked(), rows, COLUMNS, 2, Setup(8))
  assert len(shapes[0]) > 1 and len(shapes[1]) > 1
  np.testing.assert_allclose(again, read, atol=1e-5)
  np.testing.assert_allclose(found, [x for x, row in zip(again, rows, strict=True) if row in some], atol=1e-5)


def test_fewer_rows_run_where_memory_is_short_and_read_the_same(monkeypatch, rows, read):
  c, seen, prefixes, reading = CONFIG, [], score._prefixes, score._read
  monkeypatch.setattr(score, "_prefixes", lambda *x, mesh: seen.append(len(x[1])) or prefixes(*x, mesh=mesh))
  monkeypatch.setattr(score, "_read", lambda *x, **to: seen.append(len(x[2])) or reading(*x, **to))
  monkeypatch.setattr(buckets, "LITTLE", 0)
  few = [i for i, (prefix, suffix) in enumerate(rows) if len(prefix) > 64 and len(suffix) <= 16]
  some = [rows[i] for i in few]
  free = score.reading_bytes(c, 1, 4, 4, 16, 96)
  np.testing.assert_allclose(next_logprobs(stacked(), some, COLUMNS, 2, Setup(16, free=free)), read[few], atol=1e-5)
  assert max(seen) == 4  # rows of calls, and the prefixes of a wave
  sizes = [score.rows_that_fit(c, 1, 4, 48, 16, 96, wide, free) for wide in (1, 4, 16)]
  assert sizes == [3, 12, 48] and score.rows_that_fit(c, 1, 4, 48, 16, 96, 1, None) == 48


def test_devices_ask_one_another_for_nothing(monkeypatch, rows, read):
  mesh = sharding.make_mesh(data=8)
  model = on_mesh(stacked(), mesh, sharding.DECODE)
  texts = {}

  def spied(name):
    function = getattr(score, name)

    def call(*arguments, **static):
      if name not in texts:
        texts[name] = function.lower(*arguments, **static).compile().as_text()
      return function(*arguments, **static)

    monkeypatch.setattr(score, name, call)

  for name in ("_read", "_prefixes"):
    spied(name)
  few = [i for i, (prefix, suffix) in enumerate(rows) if len(prefix) > 64 and len(suffix) <= 16]
  found = next_logprobs(model, [rows[i] for i in few], COLUMNS, 2, Setup(4, some_rows()[1], mesh))
  np.testing.assert_allclose(found, read[few], atol=1e-5)
  assert len(texts) == 2
  for text in texts.values():
    assert not re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", text)


def test_token_logprobs_equal_full_forwards(rows):
  rows = [row for row in rows if row[0]]
  wanted = [
    logprobs(stacked(), prefix + suffix, room=112)[len(prefix) - 1 : -1][np.arange(len(suffix)), list(suffix)]
    for prefix, suffix in rows
  ]
  for ours, theirs in zip(token_logprobs(stacked(), rows, Setup(8, some_rows()[1])), wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  mesh = sharding.make_mesh(data=4, tensor=2)
  found = token_logprobs(on_mesh(stacked(), mesh, sharding.DECODE), rows[:4], Setup(2, mesh=mesh))
  for ours, theirs in zip(found, wanted[:4], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_weights_leave_the_logits_of_a_read_in_fp32():
  model = llama.cast(stacked(), jnp.bfloat16)
  hidden = jax.random.normal(jax.random.key(0), (3, 2, CONFIG.width))
  wanted = np.float64(hidden) @ np.float64(model.head[...])

  def error(z):
    return np.abs(np.float64(z) - wanted).max()

  assert error(llama.logits(model, hidden.astype(jnp.bfloat16))) > 1e-3
  assert error(score._exact_logits(model, hidden)) < 1e-4
  found = next_logprobs(model, [((1, 2), (3, 4))], np.arange(CONFIG.vocab), 1, Setup(2))
  assert found.dtype == np.float32 and np.exp(found).sum() == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def peer(request, tmp_path_factory):
  """(tokenizer, chat format, our model, ids -> log-softmax [T, V] from transformers on that row alone)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  make, fmt = {
    "llama2": (text_tokenizers.sentencepieces, chat.LLAMA2),
    "llama3": (text_tokenizers.byte_bpe, chat.LLAMA3),
  }[request.param]
  tok, _ = chat.prepare(make(), fmt)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=tok.size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=1024,
  )  # fmt: skip
  hf = transformers.LlamaForCausalLM(config).eval()
  directory = tmp_path_factory.mktemp(request.param)
  hf.save_pretrained(directory)

  @torch.inference_mode()
  def theirs(ids):
    return hf(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1).numpy()

  return tok, fmt, weights.load(directory), theirs


def test_judging_equals_transformers_on_every_answer_in_full(peer):
  tok, fmt, model, theirs = peer
  trie = judge.score_paths(tok, judge.A2)
  assert len(trie.inner) == (1 if fmt is chat.LLAMA2 else 0)  # "10" is two tokens there
  asked = [({"role": "user", "content": text},) for text in ("Hello?", "What is the answer?")]
  texts = [(m, text) for m in asked for text in ("Fine, thanks.", "the quick fox", "")]
  rows = [(judge.judge_prefix(tok, fmt, judge.A2, m), judge.judge_suffix(tok, fmt, judge.A2, x)) for m, x in texts]
  forced = [(prefix, (*suffix, *trie.inner)) for prefix, suffix in rows]
  found = next_logprobs(model, forced, np.arange(tok.size), len(trie.inner) + 1, Setup(4))
  for (prefix, suffix), read in zip(rows, found, strict=True):
    said = np.zeros(11)
    for n, path in enumerate(trie.paths):
      p = theirs([*prefix, *suffix, *path])
      said[n] = np.exp(sum(p[len(prefix) + len(suffix) - 1 + i, token] for i, token in enumerate(path)))
    mean, probs, mass = judge.expected_score(trie, read)
    np.testing.assert_allclose(probs, said / said.sum(), atol=1e-5)
    assert mass == pytest.approx(said.sum(), rel=1e-4)
    assert mean == pytest.approx(said @ np.arange(11) / said.sum(), abs=1e-4)


def test_sequence_logprobs_equal_transformers(peer):
  tok, fmt, model, theirs = peer
  rows = []
  for text in ("Hello?", "how are you?"):
    prompt = [{"role": "user", "content": text}]
    ids = chat.encode_prompt(tok, fmt, prompt)
    for said in ("Fine, thanks.", "the answer", ""):
      rows.append((ids, chat.encode_example(tok, fmt, prompt, said)[0][len(ids) :]))
  wanted = []
  for prefix, suffix in rows:
    wanted.append(theirs([*prefix, *suffix])[len(prefix) - 1 : -1][np.arange(len(suffix)), suffix])
  for ours, alone in zip(token_logprobs(model, rows, Setup(4)), wanted, strict=True):
    np.testing.assert_allclose(ours, alone, atol=2e-5)
  np.testing.assert_allclose(sequence_logprobs(model, rows, Setup(4)), [x.sum() for x in wanted], atol=1e-4)


sizes = st.dictionaries(st.integers(0, 40), st.lists(st.integers(1, 90), min_size=1, max_size=30), min_size=1)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 12), st.sampled_from([0, 64]), st.booleans())
def test_waves_hold_every_row_once_on_the_replica_of_its_prefix(lengths, replicas, rows, before, fixed):
  grouped = {
    (name,) * (1 + name): [buckets.Suffix((0,) * n, [(name, i)]) for i, n in enumerate(found)]
    for name, found in lengths.items()
  }
  seen, held = [], collections.Counter()
  with mock.patch.object(buckets, "ROOM", 100):
    waves = list(buckets.waves(grouped, replicas, rows, before, fixed))
  for wave in waves:
    P = len(wave.prefixes) // replicas
    most = max(rows, rows * 100 // (before + buckets.rounded(max(len(prefix or ()) for prefix in wave.prefixes))))
    assert P * replicas == len(wave.prefixes) and most >= P
    assert rows == P if fixed else P in (1, 4, most, *(rows * 2**i for i in range(7)))
    held.update(wave.prefixes)
    for call in wave.calls:
      W = replicas * rows // len(call.prefixes)
      assert len(call.rows) == replicas * rows
      for at, row in enumerate(call.rows):
        if row:
          prefix = wave.prefixes[at // rows * P + call.prefixes[at // W]]
          assert row in grouped[prefix]
          seen += row.indices
  assert sorted(seen) == sorted((name, i) for name, found in lengths.items() for i in range(len(found)))
  assert replicas > 1 or all(held[prefix] == 1 for prefix in grouped)


def test_widths_are_few_and_waste_little():
  widths = [buckets.rounded(n) for n in range(1, 4097)]
  assert all(n <= width < max(n + 16, 1.5 * n) for n, width in enumerate(widths, 1))
  assert all(width < 1.125 * n + 8 for n, width in enumerate(widths, 1) if n > 448)
  assert {2**i for i in range(4, 13)} <= set(widths) and len(set(widths)) <= 36
  assert [buckets.coarse(n) for n in (1, 32, 33, 128, 129)] == [32, 32, 128, 128, 512]
