"""Attention in plain XLA: what every back end must equal, and what they share.

  reference_causal, reference_over   the contract of `llama.attention` in its plainest form
  striped_causal                     reference_causal without scores [B, N, T, T]
  packed_piece                       how much at a time the fused kernels of GPUs get
  with_gradient_of                   a kernel's result with the gradient of the reference

Back ends import this file and never `llama.attention`, which chooses among them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

NEVER = -1e30  # the score of a masked key, and the log-sum-exp over no keys: finite, so that no NaN arises
STRIPE = 256  # queries per stripe where [T, T] scores would be large
WORKSPACE = 2.2e9  # bytes that the backward pass of a GPU's fused kernel may take, a row of 2,048 of 8B's

Attended = tuple[Array, Array]  # out [B, T, N, H] in v's dtype; log-sum-exp [B, T, N] in fp32
Attend = Callable[[Array, Array, Array, Array], Attended]  # q, k, v, and segments [B, T] or lengths [B]


def few_runs(T: int) -> int:
  """How many runs of one segment a row may have for the fused kernels of GPUs: each costs statistics [N, T]."""
  return max(2, min(T // 32, 64))


def packed_piece(runs: int, q: tuple[int, ...], kv_heads: int) -> tuple[int, int]:
  """How many rows and key/value heads of q [B, T, N, H] the fused kernels of GPUs get at a time, whose backward pass
  takes `packed_workspace` for them: as many as `WORKSPACE` allows, and all heads before a second row.

    runs 64, 8 rows of 2,048, 32 heads of 128 and 8 of keys     one row, all heads: 2.1 GB, not 17
    the same with rows of 8,192                                 one row, 2 of keys (8 heads)
  """
  B, T, N, H = q

  def fits(rows: int, heads: int) -> bool:
    return packed_workspace(runs, rows * T, N // kv_heads * heads, H) <= WORKSPACE

  for rows, heads in [(n, kv_heads) for n in range(B, 0, -1)] + [(1, n) for n in range(kv_heads, 0, -1)]:
    if B % rows == 0 and kv_heads % heads == 0 and fits(rows, heads):
      return rows, heads
  return 1, 1


def packed_workspace(runs: int, places: int, heads: int, head_dim: int) -> int:
  """Bytes that cuDNN's backward pass over packed rows takes beside its results: dq in fp32, and a sum for each of its
  rows, for as many runs of a whole row's length as there may be."""
  return 4 * runs * places * heads * (head_dim + 1)


def reference_causal(q: Array, k: Array, v: Array, segments: Array) -> Attended:
  """Each place looks at itself and at the earlier places of its segment.

  segments 1 1 1 2 2 0          keys  1 1 1 2 2 0
                       queries  1     x
                                1     x x
                                1     x x x
                                2           x
                                2           x x
                                0               x      padding, a segment like the others
  """
  T = segments.shape[1]
  return _reference(q, k, v, (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool)))


def reference_over(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """Each query of row b looks at the first lengths[b] keys of its row."""
  return _reference(q, k, v, (jnp.arange(k.shape[1]) < lengths[:, None])[:, None])


def apart(x: Array, H: int) -> Array:
  """[B, S, K, H]: keys or values of heads that may lie side by side, [B, S, K / n, n H]."""
  return x if x.shape[3] == H else x.reshape(*x.shape[:2], -1, H)


def striped_causal(q: Array, k: Array, v: Array, segments: Array) -> Attended:
  """`reference_causal`, STRIPE queries at a time: scores [B, N, STRIPE, T] live for one stripe, in both directions."""
  B, T = segments.shape
  count = -(-T // STRIPE)
  short = count * STRIPE - T
  place = jnp.arange(T)

  @jax.checkpoint  # the backward pass computes a stripe's scores again
  def stripe(x: tuple[Array, Array, Array]) -> Attended:
    q, own, start = x
    mask = (own[:, :, None] == segments[:, None]) & (place <= start + jnp.arange(STRIPE)[:, None])
    return _reference(q, k, v, mask)

  def split(x: Array) -> Array:  # [B, T, ...] -> [stripes, B, STRIPE, ...]
    x = jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, count, STRIPE, *x.shape[2:]), 1, 0)

  parts = jax.lax.map(stripe, (split(q), split(segments), STRIPE * jnp.arange(count)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], parts)


def _reference(q: Array, k: Array, v: Array, mask: Array) -> Attended:
  """Attention where `mask`, boolean [B, 1 or T, S], is true."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K

  # Fold the G query heads that share a key head into the rows of one matrix, so that scores are a batched product over
  # B x K: on CPUs several times faster than the five-dimensional einsum, elsewhere as fast. With N = 4, K = 2, T = 2:
  #   rows of key head 0: (head 0, t 0) (head 0, t 1) (head 1, t 0) (head 1, t 1); key head 1 has heads 2 and 3
  q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  scores = jnp.einsum("bkth,bskh->bkts", q, k, preferred_element_type=jnp.float32) * H**-0.5
  seen = jnp.broadcast_to(mask[:, None, None], (B, 1, G, T, S)).reshape(B, 1, G * T, S)
  scores = jnp.where(seen, scores, NEVER)

  # A softmax that keeps its log-sum-exp. A row without keys has scores NEVER alone: `top` stops at NEVER / 2, so all
  # its weights are exp(NEVER / 2) = 0, and its out is 0.
  top = jnp.maximum(scores.max(axis=-1, keepdims=True), 0.5 * NEVER)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), NEVER)
  weights = (weights / jnp.maximum(total, 1e-37)).astype(v.dtype)
  out = jnp.einsum("bkts,bskh->bkth", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

  def unfold(x: Array) -> Array:  # [B, K, G * T, ...] -> [B, T, N, ...]
    return x.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

  return unfold(out), unfold(lse)[..., 0]


# ---- A kernel's value, the reference's gradient

Value = TypeVar("Value")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_of(function: Callable[..., Any], value: Any, *inputs: Array) -> Any:
  return value


def _forward(function: Callable[..., Any], value: Any, *inputs: Any) -> tuple[Any, Any]:
  return jax.tree.map(lambda x: x.value, (value, inputs))


def _backward(function: Callable[..., Any], inputs: tuple[Array, ...], cotangents: Any) -> tuple[Any, ...]:
  def is_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)

  if all(map(is_zero, jax.tree.leaves(cotangents, is_leaf=is_zero))):
    return (None,) * (1 + len(inputs))
  given = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_zero(x) else x, cotangents, is_leaf=is_zero)
  return None, *jax.vjp(function, *inputs)[1](given)


_with_gradient_of.defvjp(_forward, _backward, symbolic_zeros=True)


def with_gradient_of(function: Callable[..., Value], value: Value, *inputs: Array) -> Value:
  """`value`, computed by a kernel, with the gradient of `function(*inputs)`, which equals it.

  The backward pass runs `function` only if a gradient arrives.
  """
  return _with_gradient_of(function, value, *inputs)  # pyright: ignore[reportReturnType]  # custom_vjp hides the type
