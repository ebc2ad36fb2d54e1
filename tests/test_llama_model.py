"""The Llama's numbers: against transformers (recorded and live), and against itself in its other forms."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_llama_fixtures import KINDS, hf_logits, hf_model, tokens_for

from alma_jax.llama import decoder, reading
from alma_jax.llama import model as llama
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
def test_decoding_after_a_prefix_equals_the_full_forward(kind):
  tokens, _ = expected(kind)
  model = load(FIXTURES / kind)
  full = np.asarray(row_logits(model, tokens))
  T = tokens.shape[1]
  lengths = np.array([T // 2, T // 4])
  fast = jax.jit(llama.unrolled)(model)
  prompt = np.where(np.arange(T // 2) < lengths[:, None], tokens[:, : T // 2], 7)  # 7: padding, must not be seen
  hidden, kept = jax.jit(reading.prefill)(fast, prompt, lengths)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(llama.logits(model, hidden)[row, :length], full[row, :length], atol=2e-5)
  # Beyond a row's length the prefix holds what prefill made of padding.
  prefix, cache = reading.Prefix(kept, lengths), decoder.new_cache(fast, 2, T // 2)
  step = jax.jit(decoder.decode, donate_argnums=3)
  for i in range(T // 2):
    at = lengths + i
    hidden, cache = step(fast, tokens[[0, 1], at], np.array([i, i]), cache, prefix, None)
    np.testing.assert_allclose(llama.logits(model, hidden), full[[0, 1], at], atol=2e-5)


def test_slots_of_one_prefix_decode_from_its_tile_as_from_a_prefix_of_their_own():
  tokens, _ = expected("llama31")
  fast = jax.jit(llama.unrolled)(load(FIXTURES / "llama31"))
  lengths, owner = np.array([9, 14]), np.array([1, 0, 1, 1])  # slots 0, 2 and 3 continue prompt 1
  _, kv = jax.jit(reading.prefill)(fast, tokens[:, :16], lengths)
  own = reading.Prefix(jax.tree.map(lambda x: x[owner], kv), lengths[owner])
  # Rows of two slots: 0 and 2 | nothing | 3 and a place to spare | 1 and a place to spare.
  slots, rows = np.array([[0, 2], [0, 0], [3, 0], [1, 1]]), np.array([1, 0, 1, 0])
  tiles = decoder.Tiles(slots, np.array([2, 0, 1, 1]), np.array([0, 6, 1, 4]))
  shared = reading.Prefix(jax.tree.map(lambda x: x[rows], kv), lengths[rows])
  step, a, b = jax.jit(decoder.decode), decoder.new_cache(fast, 4, 3), decoder.new_cache(fast, 4, 3)
  for i in range(3):
    drawn, counts = np.array([3, 4, 5, 6]) + i, np.full(4, i)
    alone, a = step(fast, drawn, counts, a, own, None)
    tiled, b = step(fast, drawn, counts, b, shared, tiles)
    np.testing.assert_allclose(tiled, alone, atol=2e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a, b)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_prefill_after_a_shared_prefix_equals_the_full_forward(layout):
  tokens, _ = expected("llama31")
  model = load(FIXTURES / "llama31")
  T, shared = tokens.shape[1], np.array([7, 10])
  model = model if layout == "stacked" else jax.jit(llama.unrolled)(model)
  _, kv = jax.jit(reading.prefill)(model, tokens[:, :12], shared)
  owner, lengths = np.array([0, 0, 1, 1]), np.array([3, 8, 8, 1])  # rows 0 and 1 continue prompt 0
  rows = np.stack([np.roll(tokens[o], -shared[o])[:8] for o in owner])
  rows[1, 2:] = rows[3, 2:]  # another continuation than row 0's
  hidden, _ = jax.jit(reading.prefill)(model, rows, lengths, reading.Prefix(kv, shared))
  for row, o, n, x in zip(rows, owner, lengths, llama.logits(model, hidden), strict=True):
    whole = np.concatenate([tokens[o, : shared[o]], row[:n]])
    np.testing.assert_allclose(x[:n], row_logits(model, whole[None])[0, shared[o] :], atol=2e-5)
  assert T >= 18


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
  assert decoder.new_cache(model, 1, 4)[0][0].dtype == jnp.bfloat16
  error = np.abs(np.asarray(ours) - logits)
  assert error.mean() < 0.02
  assert error.max() > 1e-4  # else it was not computed in bfloat16


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
    hidden = llama.hidden_states(model, tokens, positions, np.ones_like(tokens), training=llama.TrainingPass("full"))
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
