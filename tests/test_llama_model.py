"""The Llama's numbers: against transformers (recorded and live), and against itself in its other forms."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_llama_fixtures import KINDS, hf_logits, hf_model, tokens_for

from alma_jax.llama import model as llama
from alma_jax.llama.attention import attention
from alma_jax.llama.config import from_hf
from alma_jax.llama.weights import NAMES, load, to_theirs

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "llama"


@jax.jit
def all_logits(model, tokens, positions, segments):
  return llama.logits(model, llama.hidden_states(model, tokens, positions, segments))


def row_logits(model, tokens):
  """Logits of whole, unpacked rows."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return all_logits(model, tokens, positions, np.ones_like(tokens))


def expected(kind):
  with np.load(FIXTURES / kind / "expected.npz") as f:
    return f["tokens"], f["logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_recorded_from_transformers(kind):
  tokens, logits = expected(kind)
  np.testing.assert_allclose(row_logits(load(FIXTURES / kind), tokens), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama3", "llama31", "llama32"])
def test_decoding_with_cache_equals_the_full_forward(kind):
  tokens, _ = expected(kind)
  model = load(FIXTURES / kind)
  full = np.asarray(row_logits(model, tokens))
  T = tokens.shape[1]
  lengths, capacity = np.array([T // 2, T // 4]), T + 3
  fast = jax.jit(llama.unrolled)(model)
  prompt = np.where(np.arange(T // 2) < lengths[:, None], tokens[:, : T // 2], 7)  # 7: padding, must not be seen
  hidden, kept = jax.jit(llama.prefill)(fast, prompt, (np.arange(T // 2) < lengths[:, None]).astype(int))
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(llama.logits(model, hidden)[row, :length], full[row, :length], atol=2e-5)
  # Beyond a row's length the cache holds what prefill made of padding: decode overwrites it before it looks.
  cache = jax.tree.map(
    lambda empty, filled: empty.at[:, : T // 2].set(filled), llama.new_cache(fast, 2, capacity), kept
  )
  step = jax.jit(llama.decode, donate_argnums=3)
  for i in range(T // 2):
    at = lengths + i
    hidden, cache = step(fast, tokens[[0, 1], at], at, cache)
    np.testing.assert_allclose(llama.logits(model, hidden), full[[0, 1], at], atol=2e-5)


def test_packed_segments_equal_separate_rows():
  tokens, _ = expected("llama31")
  model = load(FIXTURES / "llama31")
  T = tokens.shape[1]
  a, b = tokens[0, :-5], tokens[1, : T // 3]
  pad = np.zeros(4, int)
  packed = np.concatenate([a, b, pad])[None]
  positions = np.concatenate([np.arange(len(a)), np.arange(len(b)), pad])[None]
  segments = np.repeat([1, 2, 0], [len(a), len(b), len(pad)])[None]
  together = np.asarray(all_logits(model, packed, positions, segments))[0]
  alone = np.asarray(row_logits(model, tokens))
  np.testing.assert_allclose(together[: len(a)], alone[0, : len(a)], atol=2e-5)
  np.testing.assert_allclose(together[len(a) : len(a) + len(b)], alone[1, : len(b)], atol=2e-5)
  assert np.isfinite(together).all()


def test_the_unrolled_layout_gives_the_logits_of_the_stacked_one():
  tokens, logits = expected("llama31")
  model = jax.jit(llama.unrolled)(load(FIXTURES / "llama31"))
  assert len(model.blocks) == 2
  np.testing.assert_allclose(row_logits(model, tokens), logits, atol=1e-4, rtol=0)


def test_bfloat16_weights_compute_in_bfloat16_and_give_fp32_logits():
  tokens, logits = expected("llama3")
  model = llama.cast(load(FIXTURES / "llama3"), jnp.bfloat16)
  ours = row_logits(model, tokens)
  assert ours.dtype == jnp.float32
  assert llama.new_cache(model, 1, 4)[0][0].dtype == jnp.bfloat16
  error = np.abs(np.asarray(ours) - logits)
  assert error.mean() < 0.02
  assert error.max() > 1e-4  # else it was not computed in bfloat16


def test_attention_and_its_log_sum_exp_equal_a_float64_formula():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 7, 2, 8)), rng.normal(size=(2, 7, 2, 8))
  mask = rng.random((2, 5, 7)) < 0.5
  mask[:, :, 0] = True
  mask[1, 2] = False  # a query that may look nowhere
  out, lse = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
  k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)  # heads 0, 1 share the first key/value head
  scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8), -np.inf)
  with np.errstate(divide="ignore", invalid="ignore"):
    total = np.exp(scores).sum(-1, keepdims=True)
    wanted = np.einsum("bnts,bsnh->btnh", np.exp(scores) / total, v)
  seen = mask.any(-1)
  np.testing.assert_allclose(out[seen], wanted[seen], atol=1e-5)
  np.testing.assert_allclose(np.exp(lse[seen]), total[..., 0].transpose(0, 2, 1)[seen], rtol=1e-5)
  assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", ["llama31", "llama32", "wide_heads"])
def test_live_logits_equal_transformers_at_another_size(kind, tmp_path):
  pytest.importorskip("torch")
  head_dim = 24 if kind == "wide_heads" else 16
  hf = hf_model(kind, seed=5, hidden_size=64, intermediate_size=80, head_dim=head_dim)
  hf.save_pretrained(tmp_path)
  tokens = tokens_for(kind, seed=6)
  np.testing.assert_allclose(row_logits(load(tmp_path), tokens), hf_logits(hf, tokens), atol=1e-4, rtol=0)


def test_live_gradients_equal_transformers():
  torch = pytest.importorskip("torch")
  tokens, _ = expected("llama32")
  model = load(FIXTURES / "llama32")

  def loss(model):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = llama.hidden_states(model, tokens, positions, np.ones_like(tokens), remat=True)
    out = llama.logits(model, hidden)[:, :-1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), tokens[:, 1:, None], axis=-1))

  grads = jax.jit(jax.grad(loss))(model)
  hf = hf_model("llama32")
  hf(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
  theirs = dict(hf.named_parameters())
  for path, (name, inputs) in NAMES.items():
    if path == "head":  # tied: the embedding's gradient holds both
      continue
    for layer in range(2) if "{}" in name else (None,):
      ours = getattr(grads, path)[...] if layer is None else getattr(grads.blocks, path[7:])[layer]
      wanted = theirs[name.format(layer)].grad.numpy()
      np.testing.assert_allclose(to_theirs(ours, inputs), wanted, atol=1e-5, err_msg=name.format(layer))


def test_live_rope_frequencies_of_released_models_equal_transformers():
  pytest.importorskip("torch")
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  rope = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  hf = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
  wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
  np.testing.assert_allclose(llama.rope_frequencies(from_hf(hf.to_dict())), wanted.numpy(), rtol=2e-6)
