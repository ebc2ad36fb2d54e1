"""Attention: the reference against float64 formulas, each back end against the reference, and when each is chosen."""

import functools
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alma_jax.llama import (
  attention,
  attention_cpu,
  attention_decode_tpu,
  attention_nvidia,
  attention_reference,
  attention_tpu,
)
from alma_jax.llama.model import PADDED
from alma_jax.llama.sharding import make_mesh

NEVER = attention_reference.NEVER


def example(B, T, S, N, K, H, seed=0, dtype=jnp.float32):
  random = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def packed(B, T, seed=0):
  """Segments of random lengths with padding at the end."""
  random = np.random.default_rng(seed)
  segments = np.sort(random.integers(1, 4, (B, T)), axis=1)
  segments[:, T - random.integers(0, T // 4 + 1) :] = 0
  return jnp.asarray(segments, jnp.int32)


def exact(q, k, v, mask):
  """(out, log-sum-exp) in float64, query by query; mask [B, T, S]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (B, T, N, H), G = q.shape, q.shape[2] // k.shape[2]
  out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), NEVER)
  for b, t, n in np.ndindex(B, T, N):
    sees = np.flatnonzero(mask[b, t])
    if len(sees):
      scores = k[b, sees, n // G] @ q[b, t, n] / np.sqrt(H)
      lse[b, t, n] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
      out[b, t, n] = np.exp(scores - lse[b, t, n]) @ v[b, sees, n // G]
  return out, lse


def causal_mask(segments):
  segments = np.asarray(segments)
  return (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((segments.shape[1],) * 2, bool))


def over_mask(lengths, T, S):
  return np.broadcast_to((np.arange(S) < np.asarray(lengths)[:, None])[:, None], (len(lengths), T, S))


def close(got, wanted, atol):
  """Within atol of values of about one, log-sum-exps of nothing included."""
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def all_of(attend, q, k, v, seen, weights):
  (out, lse), backward = jax.vjp(lambda q, k, v: attend(q, k, v, seen), q, k, v)
  return out, lse, *backward(tuple(w.astype(x.dtype) for w, x in zip(weights, (out, lse), strict=True)))


def values_and_gradients(attend, q, k, v, seen):
  """out, log-sum-exp and the gradients of q, k and v, cotangents on both results."""
  random = np.random.default_rng(9)
  weights = tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in (q.shape, q.shape[:3]))
  return all_of(attend, q, k, v, seen, weights)


SHAPES = [(4, 4, 8), (4, 2, 16), (4, 1, 32), (8, 4, 64), (2, 1, 128)]  # N, K, H


def test_back_ends_know_the_reference_and_not_the_file_that_chooses_them():
  for back_end in (attention_cpu, attention_decode_tpu, attention_nvidia, attention_tpu, attention_reference):
    assert attention not in vars(back_end).values() and attention.chosen not in vars(back_end).values()


# ---- The reference


@pytest.mark.parametrize("heads", SHAPES)
def test_the_reference_is_attention_in_float64(heads):
  q, k, v = example(2, 12, 12, *heads)
  segments, lengths = packed(2, 12), jnp.asarray([7, 0])
  close(attention_reference.reference_causal(q, k, v, segments), exact(q, k, v, causal_mask(segments)), 3e-6)
  close(attention_reference.reference_over(q, k, v, lengths), exact(q, k, v, over_mask(lengths, 12, 12)), 3e-6)


def test_a_row_without_keys_gives_zero_and_never_and_changes_nothing_when_merged():
  q, k, v = example(2, 3, 5, 4, 2, 8)
  none = attention.over(q, k, v, jnp.zeros(2, jnp.int32))
  np.testing.assert_array_equal(none[0], 0)
  np.testing.assert_array_equal(none[1], np.float32(NEVER))
  some = attention.over(q, k, v, jnp.asarray([5, 2]))
  close(attention.merged(none, some), some, 1e-6)
  close(attention.merged(some, none), some, 1e-6)
  assert np.isfinite(attention.merged(none, none)[0]).all()


def test_merged_is_attention_over_the_union():
  q, k, v = example(2, 6, 20, 4, 2, 16)
  own, before = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]), jnp.asarray([14, 3])
  parts = (attention.causal(q, k[:, :6], v[:, :6], own), attention.over(q, k[:, 6:], v[:, 6:], before))
  mask = np.concatenate([causal_mask(own), over_mask(before, 6, 14)], axis=2)
  close(attention.merged(*parts), exact(q, k, v, mask), 3e-6)


@pytest.mark.parametrize("T", [40, 512, 600])
def test_stripes_of_queries_give_the_reference_and_its_gradients(T, monkeypatch):
  monkeypatch.setattr(attention_reference, "STRIPE", 32 if T == 40 else 256)
  q, k, v = example(2, T, T, 4, 2, 16)
  segments = packed(2, T)
  got = values_and_gradients(lambda *a: attention_reference.striped_causal(*a), q, k, v, segments)
  close(got, values_and_gradients(attention_reference.reference_causal, q, k, v, segments), 2e-5)


# ---- CPU


@pytest.mark.parametrize(("heads", "T"), list(zip(SHAPES, (5, 16, 33, 40, 20), strict=True)))
def test_causal_tiles_on_the_cpu(T, heads, monkeypatch):
  monkeypatch.setattr(attention_cpu, "STRIPE", 16)  # one to three stripes, the last one shorter
  q, k, v = example(3, T, T, *heads)
  segments = packed(3, T)
  got = values_and_gradients(lambda *a: attention_cpu.causal(*a), q, k, v, segments)
  close(got, values_and_gradients(attention_reference.reference_causal, q, k, v, segments), 2e-5)


@pytest.mark.parametrize(
  ("heads", "T", "S"),
  [(SHAPES[i], T, S) for i, T, S in ((0, 1, 5), (1, 1, 64), (2, 1, 150), (3, 1, 150), (1, 7, 33), (4, 90, 70))],
)
def test_ragged_keys_on_the_cpu(T, S, heads, monkeypatch):
  monkeypatch.setattr(attention_cpu, "COLUMNS", 64)
  q, k, v = example(5, T, S, *heads)
  lengths = jnp.asarray([0, 1, S, S // 2, S - 1])
  got = values_and_gradients(lambda *a: attention_cpu.over(*a), q, k, v, lengths)
  close(got, values_and_gradients(attention_reference.reference_over, q, k, v, lengths), 2e-5)


def test_long_rows_are_cut_into_a_bounded_number_of_stripes():
  assert attention_cpu._stripes(128) == [(0, 128)]
  assert attention_cpu._stripes(224) == [(0, 112), (112, 224)]
  assert len(attention_cpu._stripes(100_000)) == 16
  for T in (1, 127, 129, 1000, 4097):
    stripes = attention_cpu._stripes(T)
    assert [start for start, _ in stripes] == [0, *(end for _, end in stripes[:-1])] and stripes[-1][1] == T


def temporary_bytes(f, *args):
  return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_neither_tiles_nor_stripes_keep_scores_for_the_backward_pass(monkeypatch):
  monkeypatch.setattr(attention_reference, "STRIPE", 64)
  q, k, v = example(2, 1024, 1024, 4, 2, 8)
  segments = jnp.ones((2, 1024), jnp.int32)

  def gradient(attend):
    return jax.grad(lambda *qkv: attend(*qkv, segments)[0].sum(), (0, 1, 2))

  scores = 4 * 2 * 4 * 1024 * 1024
  assert temporary_bytes(gradient(attention_reference.reference_causal), q, k, v) > scores
  assert temporary_bytes(gradient(attention_cpu.causal), q, k, v) < scores / 2
  assert temporary_bytes(gradient(attention_reference.striped_causal), q, k, v) < scores / 2


@pytest.mark.parametrize(
  "attend",
  [
    attention_reference.reference_causal,
    attention_reference.striped_causal,
    attention_cpu.causal,
    attention_reference.reference_over,
  ],
)
def test_bfloat16_inputs_keep_float32_statistics(attend):
  q, k, v = example(2, 64, 64, 4, 2, 64, dtype=jnp.bfloat16)
  q = q * 3  # log-sum-exps of about 8, where bfloat16 has steps of 0.03
  causal = attend is not attention_reference.reference_over
  seen = jnp.ones((2, 64), jnp.int32) if causal else jnp.asarray([64, 20])
  out, lse = attend(q, k, v, seen)
  mask = causal_mask(seen) if causal else over_mask(seen, 64, 64)
  wanted_out, wanted_lse = exact(q, k, v, mask)
  assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(lse, wanted_lse, atol=2e-5)
  np.testing.assert_allclose(out.astype(np.float32), wanted_out, atol=2e-2)


@pytest.mark.parametrize(("T", "S"), [(1, 100), (40, 60)])
def test_bfloat16_keys_on_the_cpu_keep_float32_statistics(T, S):
  q, k, v = example(2, T, S, 4, 2, 64, dtype=jnp.bfloat16)
  lengths = jnp.asarray([S, 20])
  out, lse = attention_cpu.over(q, k, v, lengths)
  wanted_out, wanted_lse = exact(q, k, v, over_mask(lengths, T, S))
  assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(lse, wanted_lse, atol=2e-5)
  np.testing.assert_allclose(out.astype(np.float32), wanted_out, atol=1e-2)


# ---- TPU: the kernels interpreted on the CPU, and lowered for a TPU


INTERPRETED = {
  "causal": functools.partial(attention_tpu.causal, interpret=True),
  "over": functools.partial(attention_tpu.over, interpret=True),
  "few": functools.partial(attention_decode_tpu.over, interpret=True),
}


@pytest.mark.parametrize(("T", "N", "K", "H"), [(130, 4, 2, 64), (256, 2, 1, 128)])
def test_causal_splash_kernels(T, N, K, H):
  q, k, v = example(2, T, T, N, K, H)
  segments = packed(2, T)
  got = values_and_gradients(INTERPRETED["causal"], q, k, v, segments)
  close(got, values_and_gradients(attention_reference.reference_causal, q, k, v, segments), 2e-5)


@pytest.mark.parametrize(("T", "S"), [(130, 200), (128, 256)])
def test_ragged_keys_through_splash_kernels(T, S):
  q, k, v = example(3, T, S, 4, 2, 64)
  lengths = jnp.asarray([0, S, 77])
  got = values_and_gradients(INTERPRETED["over"], q, k, v, lengths)
  close(got, values_and_gradients(attention_reference.reference_over, q, k, v, lengths), 2e-5)


def lowered(f, platform, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def gradient_of_out(attend, seen):
  return jax.grad(lambda *qkv: attend(*qkv, seen)[0].astype(jnp.float32).sum(), (0, 1, 2))


@pytest.mark.parametrize("H", [64, 128])
def test_splash_kernels_lower_for_a_tpu_and_only_those_that_are_needed(H):
  q, k, v = example(2, 200, 200, 8, 2, H, dtype=jnp.bfloat16)
  segments, kernels = packed(2, 200), lambda text: sorted(re.findall(r"splash_mha_\w+", text))
  both = lowered(attention_tpu.causal, "tpu", q, k, v, segments)
  assert kernels(both) == ["splash_mha_fwd_segmented_residuals"]
  assert len(kernels(lowered(attention_tpu.over, "tpu", q, k, v, jnp.asarray([3, 200])))) == 1
  backward = lowered(gradient_of_out(attention_tpu.causal, segments), "tpu", q, k, v)
  assert [name.split("_")[2] for name in kernels(backward)] == ["dkv", "dq", "fwd"]


@pytest.mark.parametrize(
  ("T", "N", "K", "dtype"),
  [(1, 8, 2, jnp.bfloat16), (3, 8, 2, jnp.float32), (3, 4, 4, jnp.bfloat16), (2, 3, 1, jnp.bfloat16)],
)
def test_few_queries_over_the_live_blocks_of_each_row(T, N, K, dtype, monkeypatch):
  monkeypatch.setattr(attention_decode_tpu, "block", lambda S, K: 16)  # three blocks, the last one shorter
  q, k, v = example(6, T, 40, N, K, 16, dtype=dtype)
  lengths = jnp.asarray([17, 0, 40, 1, 16, 32])
  # Blocks without a live key are not read: whatever they hold changes nothing.
  dead = jnp.arange(40)[:, None, None] >= -(-lengths // 16)[:, None, None, None] * 16
  out, lse = jax.jit(INTERPRETED["few"])(q, *(jnp.where(dead, jnp.nan, x) for x in (k, v)), lengths)
  wanted = attention_reference.reference_over(*(x.astype(jnp.float32) for x in (q, k, v)), lengths)
  assert out.dtype == dtype
  close((out, lse), wanted, 2e-5 if dtype == jnp.float32 else 1e-2)
  np.testing.assert_allclose(lse, wanted[1], atol=1e-5)
  assert not np.asarray(out[1]).any() and (np.asarray(lse[1]) == NEVER).all()


def test_heads_side_by_side_are_heads():
  assert attention.disagreement(INTERPRETED["few"], "over", jnp.bfloat16, 4, 64, (3, 2, 2)) is None
  q, k, v = example(3, 2, 40, 8, 4, 64)
  given = q, k.reshape(3, 40, 2, 128), v.reshape(3, 40, 2, 128), jnp.asarray([17, 0, 40])
  np.testing.assert_array_equal(attention.over(*given)[0], attention.over(q, k, v, given[3])[0])  # taken apart


def test_no_row_has_a_key_for_the_few_queries():
  q, k, v = example(3, 2, 8, 2, 1, 8)
  out, lse = INTERPRETED["few"](q, k, v, jnp.zeros(3, jnp.int32))
  assert not np.asarray(out).any() and (np.asarray(lse) == NEVER).all()


def test_steps_are_the_live_blocks_of_all_rows_in_order():
  steps, count = attention_decode_tpu._steps(jnp.asarray([0, 3, 0, 4, 1, 0]), 2, 2)
  assert count == 8 and steps.shape == (3, 12)
  # A row without keys names the block that is there; the first row, which has none before it, block 0.
  assert steps[:, :8].tolist() == [[0, 1, 1, 2, 3, 3, 4, 5], [0, 1, 1, 1, 3, 3, 4, 4], [0, 0, 1, 1, 0, 1, 0, 0]]
  assert steps[:2].max() <= 5 and steps[2].max() <= 1  # all within the arrays


@pytest.mark.parametrize(("T", "K"), [(1, 8), (16, 1)])
def test_few_queries_lower_for_a_tpu_with_keys_as_they_lie(T, K):
  q, k, v = example(4, T, 256, 4 * K, K, 128, dtype=jnp.bfloat16)
  text = lowered(attention_decode_tpu.over, "tpu", q, k, v, jnp.asarray([0, 3, 256, 128]))
  assert text.count("tpu_custom_call") == 1 and f"tensor<4x{256 * K}x128xbf16>" in text
  assert not re.search(rf"transpose.*tensor<4x256x{K}x128xbf16>", text)


# ---- NVIDIA: lowered for CUDA


@pytest.fixture
def hopper(monkeypatch):
  """As if cuDNN 9.10 and an H100 were here, for lowering."""
  monkeypatch.setattr(attention_nvidia.cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention_nvidia.cudnn, "check_compute_capability", lambda capability: True)


def cudnn_calls(text):
  return re.findall(r"custom_call @__cudnn\$(\w+)", text)


def test_packed_rows_lower_to_cudnn_forwards_and_backwards(hopper):
  q, k, v = example(2, 256, 256, 8, 2, 64, dtype=jnp.bfloat16)
  text = lowered(gradient_of_out(attention_nvidia.causal, packed(2, 256)), "cuda", q, k, v)
  assert cudnn_calls(text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
  assert text.count("PADDING_CAUSAL") == 2 and len(re.findall(r"max_seg_per_batch\\22: 8", text)) == 2
  assert "tensor<16x8x256xf32>" in text  # the statistics: one row per run, fp32


def test_ragged_keys_lower_to_cudnn_with_the_group_as_queries(hopper):
  q, k, v = example(3, 1, 64, 8, 2, 128, dtype=jnp.bfloat16)
  text = lowered(attention_nvidia.over, "cuda", q, k, v, jnp.asarray([0, 64, 5]))
  assert cudnn_calls(text) == ["fmhaSoftmax"]
  assert re.search(r"@__cudnn.*\(tensor<3x4x2x128xbf16>, tensor<3x64x2x128xbf16>", text)


def test_cudnn_lowers_under_a_mesh_with_every_device_its_own_rows_and_heads(hopper, monkeypatch):
  monkeypatch.setattr(attention, "chosen", lambda *a: "nvidia")
  monkeypatch.setattr(attention, "_flaw", lambda *a: None)
  q, k, v = example(8, 64, 64, 4, 2, 64, dtype=jnp.bfloat16)
  with jax.set_mesh(make_mesh(2, 2, 2)):
    text = lowered(gradient_of_out(attention.causal, packed(8, 64)), "cuda", q, k, v)
  assert cudnn_calls(text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
  assert "(tensor<2x64x2x64xbf16>, tensor<2x64x2x64xbf16>" in text  # keys repeated for each of 2 heads


def fake_packed_attention(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, **_):
  """cuDNN's packed contract: starts of the runs of every row, runs of all rows numbered without gaps."""
  q, k, v, q_offsets, q_seqlen = (np.asarray(x) for x in (q, k, v, q_offsets, q_seqlen))
  out, stats = np.zeros(q.shape, np.float32), np.full((q_seqlen.size, q.shape[2], q.shape[1]), np.nan, np.float32)
  starts = q_offsets[:, :-1]  # the last offset ends the last run
  runs = [(b, s, n) for b in range(len(q)) for s, n in zip(starts[b], q_seqlen[b], strict=True) if n >= 0 and s >= 0]
  assert (q_offsets >= 0).sum() == (q_seqlen >= 0).sum() == len(runs)
  for i, (b, s, n) in enumerate(runs):
    at = slice(int(s), int(s + n))
    part = (x[b : b + 1, at] for x in (q, k, v))
    out[b, at], lse = (x[0] for x in exact(*part, causal_mask(np.ones((1, int(n))))))
    stats[i, :, : int(n)] = lse.T
  return jnp.asarray(out), jnp.asarray(stats)


def test_runs_are_handed_to_cudnn_and_their_statistics_come_back_in_place(monkeypatch):
  monkeypatch.setattr(attention_nvidia.cudnn, "dot_product_attention", fake_packed_attention)
  q, k, v = example(3, 12, 12, 4, 2, 8)
  segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0], [1] * 12, [4, 5, 5, 5, 5, 5, 4, 4, 4, 4, 0, 0]])
  segments = segments.at[2, 6:10].set(6)
  got = attention_nvidia._packed(5, q, k, v, segments)
  close(got, attention_reference.reference_causal(q, k, v, segments), 3e-6)
  # In pieces of one row and one of two key heads
  monkeypatch.setattr(attention_reference, "WORKSPACE", 5 * 12 * 2 * 9 * 4)
  assert attention_reference.packed_piece(5, q.shape, 2) == (1, 1)
  monkeypatch.setattr(
    jax.lax, "map", lambda f, xs: jax.tree.map(lambda *x: jnp.stack(x), *(f(x) for x in zip(*xs, strict=True)))
  )
  close(attention_nvidia._packed(5, q, k, v, segments), got, 0)


@pytest.mark.parametrize(
  ("B", "T", "N", "K", "H", "wanted"),
  [
    (8, 2048, 32, 8, 128, (1, 8)),  # 8B on one GPU: 17 GB in one call, which is what refused the step
    (4, 4096, 32, 8, 128, (1, 4)),
    (2, 8192, 32, 8, 128, (1, 2)),
    (8, 2048, 32, 8, 64, (2, 8)),
    (6, 512, 8, 8, 64, (6, 8)),
    (3, 1 << 20, 8, 2, 128, (1, 1)),
  ],
)
def test_packed_rows_go_in_pieces_that_leave_room(B, T, N, K, H, wanted):
  runs = attention_reference.few_runs(T)
  rows, heads = attention_reference.packed_piece(runs, (B, T, N, H), K)
  assert (rows, heads) == wanted
  size = attention_reference.packed_workspace(runs, rows * T, N // K * heads, H)
  assert (size <= attention_reference.WORKSPACE) == (T < 1 << 20)


def test_pieces_lower_to_one_call_each_way_and_no_gradient_of_the_reference(hopper, monkeypatch):
  monkeypatch.setattr(attention_reference, "WORKSPACE", 8 * 256 * 4 * 65 * 4)
  q, k, v = example(2, 256, 256, 8, 2, 64, dtype=jnp.bfloat16)
  text = lowered(gradient_of_out(functools.partial(attention_nvidia.causal, few=True), packed(2, 256)), "cuda", q, k, v)
  assert cudnn_calls(text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
  piece = "tensor<1x256x4x64xbf16>"
  assert len(re.findall(rf"@__cudnn.*\({piece}, {piece}, {piece}, .*tensor<8x4x256xf32>", text)) == 2
  assert "stablehlo.exponential" not in text


def test_rows_of_one_text_each_go_in_one_call(hopper, monkeypatch):
  monkeypatch.setattr(attention_reference, "WORKSPACE", 8 * 256 * 4 * 65 * 4)
  q, k, v = example(2, 256, 256, 8, 2, 64, dtype=jnp.bfloat16)
  few = functools.partial(attention_nvidia.causal, few=PADDED)
  text = lowered(few, "cuda", q, k, v, np.ones((2, 256), np.int32))
  assert re.findall(r"max_seg_per_batch\\22: (\d+)", text) == ["2"] and "while" not in text
  assert len(re.findall(r"@__cudnn.*\(tensor<2x256x8x64xbf16>", text)) == 1


def test_a_batch_with_too_many_runs_goes_in_stripes(monkeypatch):
  monkeypatch.setattr(attention_nvidia, "_packed", lambda runs, q, k, v, s: (q * jnp.nan, jnp.nan * q[..., 0]))
  q, k, v = example(2, 64, 64, 4, 2, 8)
  few, many = jnp.ones((2, 64), jnp.int32), jnp.ones((2, 64), jnp.int32).at[1].set(jnp.arange(64) // 16)
  assert np.isnan(attention_nvidia.causal(q, k, v, few)[0]).all()
  close(attention_nvidia.causal(q, k, v, many), attention_reference.reference_causal(q, k, v, many), 3e-6)


def test_the_gradient_of_a_log_sum_exp_costs_nothing_where_it_is_not_used():
  q, k, v = example(2, 8, 8, 4, 2, 8)
  segments = packed(2, 8)

  def lse_of(q, k, v):
    return attention_reference.reference_causal(q, k, v, segments)[1]

  def gradient(weight):
    def loss(q, k, v):
      lse = attention_reference.with_gradient_of(lse_of, jnp.zeros((2, 8, 4)), q, k, v)
      return (q * 1.0).sum() + (lse.sum() if weight else 0.0)

    return jax.grad(loss)

  assert "exp" in str(jax.make_jaxpr(gradient(True))(q, k, v))
  assert "exp" not in str(jax.make_jaxpr(gradient(False))(q, k, v))
  wanted = 1 + jax.grad(lambda q: lse_of(q, k, v).sum())(q)
  np.testing.assert_allclose(gradient(True)(q, k, v), wanted, atol=1e-6)


# ---- The choice


BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.parametrize(
  ("call", "platform", "dtype", "B", "T", "S", "H", "wanted"),
  [
    ("causal", "cpu", F32, 32, 224, 224, 32, "cpu"),
    ("causal", "cpu", BF16, 32, 64, 64, 8, "cpu"),
    ("causal", "cpu", F32, 64, 32, 32, 32, None),  # these scores stay in the cache anyway
    ("over", "cpu", F32, 64, 1, 256, 32, "cpu"),
    ("over", "cpu", F32, 16, 1, 64, 16, None),
    ("over", "cpu", F32, 2, 16, 512, 32, None),
    ("over", "cpu", F32, 2, 1024, 160, 32, "cpu"),
    ("causal", "gpu", BF16, 4, 2048, 2048, 128, "nvidia"),
    ("causal", "gpu", F16, 4, 2048, 2048, 64, "nvidia"),
    ("causal", "gpu", F32, 4, 2048, 2048, 128, None),
    ("causal", "gpu", BF16, 4, 2048, 2048, 256, None),
    ("causal", "gpu", BF16, 4, 2048, 2048, 20, None),
    ("over", "gpu", BF16, 256, 1, 768, 128, "nvidia"),
    ("over", "gpu", BF16, 256, 1, 16, 128, None),
    ("causal", "tpu", BF16, 4, 2048, 2048, 128, "tpu"),
    ("causal", "tpu", F32, 4, 2048, 2048, 128, None),
    ("causal", "tpu", BF16, 4, 2048, 2048, 96, None),
    ("over", "tpu", BF16, 4, 256, 512, 128, "tpu"),
    ("over", "tpu", BF16, 256, 1, 512, 128, "decode_tpu"),
    ("over", "tpu", BF16, 48, 16, 512, 128, "decode_tpu"),
    ("over", "tpu", BF16, 256, 1, 64, 128, None),
    ("over", "tpu", BF16, 256, 1, 512, 64, None),
    ("over", "tpu", F32, 256, 1, 512, 128, None),
    ("causal", "METAL", BF16, 4, 2048, 2048, 128, None),
  ],
)
def test_who_is_chosen(call, platform, dtype, B, T, S, H, wanted):
  assert attention.chosen(call, platform, dtype, (B, T, 8, H), (B, S, 4, H)) == wanted


def test_narrow_heads_lie_side_by_side_on_tpus():
  assert attention.chosen("over", "tpu", BF16, (256, 1, 8, 64), (256, 512, 2, 128)) == "decode_tpu"
  wanted = {("tpu", BF16, 4, 64): 2, ("tpu", BF16, 4, 128): 1, ("tpu", F32, 4, 64): 1, ("tpu", BF16, 3, 64): 1}
  wanted |= {("cpu", BF16, 4, 64): 1, ("gpu", BF16, 4, 64): 1, ("tpu", BF16, 4, 16): 1}
  assert {given: attention.side_by_side(*given) for given in wanted} == wanted


@pytest.fixture
def served(monkeypatch):
  """A back end for an accelerator that is the reference, off by a factor, and counts its traces."""
  back_end = types.SimpleNamespace(factor=1.0, traces=0)

  def causal(q, k, v, segments):
    back_end.traces += 1
    out, lse = attention_reference.reference_causal(q, k, v, segments)
    return out * back_end.factor, lse

  back_end.causal = causal
  monkeypatch.setattr(attention, "chosen", lambda *a: "served")
  monkeypatch.setattr(attention, "_back_end", lambda name: back_end)
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  attention._flaw.cache_clear()
  attention._warn.cache_clear()
  yield back_end
  attention._flaw.cache_clear()
  attention._warn.cache_clear()


def test_a_back_end_is_checked_on_the_device_once_while_its_caller_is_traced(served):
  q, k, v = example(2, 8, 8, 4, 2, 8)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    f = jax.jit(lambda *a: attention.causal(*a))
    close(f(q, k, v, packed(2, 8)), attention_reference.reference_causal(q, k, v, packed(2, 8)), 1e-6)
    assert served.traces == 2  # the check and the call
    f(q[:1], k[:1], v[:1], packed(1, 8))
    assert served.traces == 3


@pytest.mark.parametrize("fault", ["wrong", "broken", "missing"])
def test_a_back_end_with_a_fault_is_not_used_and_the_warning_says_why_once(fault, served, monkeypatch):
  if fault == "wrong":
    served.factor = 1.05
  if fault == "broken":
    served.causal = lambda *a: exec("raise NotImplementedError('Packed layout requires Hopper')")
  if fault == "missing":
    monkeypatch.setattr(attention, "_back_end", lambda name: exec("import jax._src.no_such_thing"))
  q, k, v = example(2, 8, 8, 4, 2, 8)
  says = {"wrong": "out differs from the reference by 0", "broken": "NotImplementedError: Packed", "missing": "no_such"}
  with pytest.warns(UserWarning, match=says[fault]) as seen:
    for _ in range(3):
      got = jax.jit(lambda *a: attention.causal(*a))(q, k, v, packed(2, 8))
  assert len(seen) == 1 and "slower than the served back end" in str(seen[0].message)
  close(got, attention_reference.reference_causal(q, k, v, packed(2, 8)), 1e-6)


def test_the_check_of_few_queries_has_their_shapes():
  assert attention.disagreement(INTERPRETED["few"], "over", jnp.bfloat16, 2, 16, (1, 2, 1)) is None
  wrong = attention.disagreement(
    lambda q, k, v, n: attention_reference.reference_over(q, k, v, jnp.minimum(n, 128)),
    "over", jnp.bfloat16, 2, 16, (1, 2, 1),
  )  # fmt: skip
  assert wrong is not None and wrong.startswith("its out differs")


@pytest.mark.parametrize(("call", "G"), [("causal", 2), ("over", 1)])
def test_the_check_accepts_what_is_right_and_names_what_is_not(call, G):
  reference = {"causal": attention_reference.reference_causal, "over": attention_reference.reference_over}[call]
  right = INTERPRETED[call]
  assert attention.disagreement(right, call, jnp.bfloat16, G, 64) is None

  def rounded(*args):
    out, lse = reference(*args)
    return out, jnp.where(lse > 0, lse.astype(jnp.bfloat16).astype(jnp.float32), lse)

  def without_gradient(q, k, v, seen):
    return reference(q, jax.lax.stop_gradient(k), v, seen)

  assert "log-sum-exp" in attention.disagreement(rounded, call, jnp.bfloat16, G, 64)
  assert "gradient of k" in attention.disagreement(without_gradient, call, jnp.bfloat16, G, 64)


# ---- Several devices


@pytest.fixture
def tiled(monkeypatch):
  """Tiles for small examples too."""
  monkeypatch.setattr(attention, "CACHE", 0)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (4, 1, 2)])
def test_tiles_under_a_mesh_are_each_devices_own_rows_and_heads(sizes, tiled):
  mesh, (q, k, v), segments = make_mesh(*sizes), example(8, 48, 48, 4, 2, 8), packed(8, 48)
  wanted = values_and_gradients(attention_reference.reference_causal, q, k, v, segments)
  with jax.set_mesh(mesh):

    def spread(x, *spec):
      return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    rows = (spread(x, ("data", "fsdp"), None, "tensor" if sizes[2] > 1 else None) for x in (q, k, v))
    args = (*rows, spread(segments, ("data", "fsdp")))
    step = jax.jit(gradient_of_out_and_lse)
    text = step.lower(*args).compile().as_text()
    got = step(*args)
  close(got, wanted, 2e-5)
  assert "while" in text and "all-gather" not in text and "all-reduce" not in text and "all-to-all" not in text


def gradient_of_out_and_lse(q, k, v, segments):
  return values_and_gradients(lambda *a: attention.causal(*a), q, k, v, segments)


def test_tiles_inside_shard_map_are_used_over_the_mesh_axes_that_are_left(tiled):
  mesh, (q, k, v) = make_mesh(4, 1, 2), example(8, 40, 40, 4, 2, 8)
  lengths = jnp.arange(8) * 5
  rows = jax.P(("data", "fsdp"))
  f = jax.shard_map(
    attention.over, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"data", "fsdp"}, check_vma=False
  )
  assert "while" in jax.jit(f).lower(q, k, v, lengths).as_text()
  close(jax.jit(f)(q, k, v, lengths), attention_reference.reference_over(q, k, v, lengths), 3e-6)


def test_where_arrays_may_be_spread_unseen_the_reference_is_used(tiled):
  q, k, v = example(4, 48, 48, 4, 2, 8)
  segments = packed(4, 48)

  def text():
    return jax.jit(lambda *a: attention.causal(*a)).lower(q, k, v, segments).as_text()

  assert jax.local_device_count() == 8 and "while" not in text()  # no mesh in force
  with jax.set_mesh(make_mesh(2, 2, 2)):
    assert "while" in text()
  with jax.set_mesh(make_mesh(8, 1, 1)):
    assert "while" not in text()  # four rows over eight devices
  with jax.set_mesh(make_mesh(1, 1, 8)):
    assert "while" not in text()  # two key/value heads over eight devices
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    assert "while" in text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_of_which_some_have_no_keys(dtype):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((6, 5, 8, 16), (6, 40, 2, 16), (6, 40, 2, 16)))
  lengths = np.array([40, 7, 1, 0, 13, 0])
  out, lse = jax.jit(attention.over_tiles)(q, k, v, lengths)
  wanted, wanted_lse = attention_reference.reference_over(*(x.astype(jnp.float32) for x in (q, k, v)), lengths)
  assert out.dtype == dtype and lse.dtype == jnp.float32
  np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=1e-5 if dtype == jnp.float32 else 1e-2)
  np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
  assert not np.asarray(out[3]).any() and (np.asarray(lse[3]) == attention_reference.NEVER).all()
