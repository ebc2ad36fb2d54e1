"""Attention behind one contract, with back ends per platform: `causal` and `over` give `(out, log_sum_exp)`.

  causal(q, k, v, segments)   every place looks at the earlier ones of its own segment and at itself; T = S
  over(q, k, v, lengths)      every query of row b looks at the first lengths[b] keys; lengths[b] may be 0
                              (`rows`: which row of k and v each row of q looks at)
  merged(a, b)                attention over the union of what two calls looked at

q is [B, T, N, H]; k and v are [B, S, K, H] (grouped queries: G = N / K heads share a key/value head). Scores, softmax
and the log-sum-exp [B, T, N] are fp32 whatever the inputs are, so that two parts can be merged exactly. All of it can
be differentiated.

`reference_causal` and `reference_over` say the same in plain XLA; every back end is tested against them, and those of
accelerators once more on the device before their first use. `chosen` picks the back end while a call is traced; there
is nothing to configure. A back end needs whole arrays on its device: under a mesh (jax.set_mesh) each device computes
its own rows and heads; where arrays may be spread in a way that cannot be seen, the reference is used.
"""

import concurrent.futures
import functools
import importlib
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alma_jax.llama.sharding import BATCH

NEVER = -1e30  # a score, or a log-sum-exp, of nothing: finite, so that no NaN arises
STRIPE = 256  # queries per stripe where [T, T] scores would be large
CACHE = 4 * 2**20  # bytes of scores (of keys and values when decoding) that plain XLA handles well on a CPU, measured


def causal(q, k, v, segments):
  """Attention within packed rows. Segments [B, T] number the packed examples; padding is a segment of its own."""
  return _computed("causal", q, k, v, segments)


def over(q, k, v, lengths, rows=None):
  """Attention over the first keys of each row; where a row has none, out is 0 and the log-sum-exp `NEVER`.

  With `rows` [B], row b looks at k[rows[b]] and v[rows[b]], which lie whole on its device.
  """
  if rows is None:
    return _computed("over", q, k, v, lengths)
  if jax.default_backend() == "cpu":
    return _back_end("cpu").over_rows(q, k, v, lengths, rows)
  return _computed("over", q, k[rows], v[rows], lengths)


def merged(a, b):
  """(out, log_sum_exp) over the keys of both parts, which share no key."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  lse = jnp.logaddexp(lse_a, lse_b)
  weigh = lambda out, part: out.astype(jnp.float32) * jnp.exp(part - lse)[..., None]
  return (weigh(out_a, lse_a) + weigh(out_b, lse_b)).astype(out_a.dtype), lse


def chosen(call, platform, dtype, q, k):
  """The back end for `call` ("causal" or "over") on a platform as jax.default_backend() names it: "cpu", "nvidia" or
  "tpu" (the files attention_*.py), or None for plain XLA. `q` and `k` are shapes."""
  (B, T, N, H), (_, S, K, _) = q, k
  if platform == "cpu":
    decodes = call == "over" and T == 1
    return "cpu" if 4 * (2 * B * S * K * H if decodes else B * N * T * S) >= CACHE else None
  if platform == "gpu":
    return "nvidia" if dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128 and S >= 32 else None
  if platform == "tpu":
    return "tpu" if dtype == jnp.bfloat16 and H % 64 == 0 and T >= 128 and S >= 128 else None
  return None


def _computed(call, q, k, v, seen):
  name = chosen(call, jax.default_backend(), q.dtype, q.shape, k.shape)
  if name:
    axes = _spread_axes(q.shape[0], k.shape[2])
    flaw = "arrays may be spread over devices without a mesh that says how" if axes is None else None
    if name != "cpu":
      flaw = flaw or _flaw(name, call, jnp.dtype(q.dtype), q.shape[2] // k.shape[2], q.shape[3])
      _warn(name, call, flaw)
    if flaw is None:
      return _on_each_device(getattr(_back_end(name), call), axes)(q, k, v, seen)
  return plain(call)(q, k, v, seen)


def _back_end(name):
  return importlib.import_module(f"alma_jax.llama.attention_{name}")  # late: they import this module


def _spread_axes(batch, kv_heads):
  """The axes of the mesh in force that rows and heads are spread over: () if every array is whole here, None if that
  cannot be known or does not come out even."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return () if jax.local_device_count() == 1 else None
  axes = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in mesh.manual_axes)
  ways = math.prod(mesh.shape[a] for a in axes if a in BATCH)
  if set(axes) - {*BATCH, "tensor"} or batch % ways or ("tensor" in axes and kv_heads % mesh.shape["tensor"]):
    return None
  return axes


def _on_each_device(attend, axes):
  """`attend` for arrays whose rows and heads are spread over these mesh axes."""
  if not axes:
    return attend
  rows, heads = tuple(a for a in BATCH if a in axes) or None, "tensor" if "tensor" in axes else None
  whole = P(rows, None, heads, None)
  specs, results = (whole, whole, whole, P(rows)), (whole, P(rows, None, heads))
  return jax.shard_map(attend, in_specs=specs, out_specs=results, axis_names=set(axes), check_vma=False)


# ---- Plain XLA


def reference_causal(q, k, v, segments):
  T = segments.shape[1]
  return _reference(q, k, v, (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool)))


def reference_over(q, k, v, lengths):
  return _reference(q, k, v, (jnp.arange(k.shape[1]) < lengths[:, None])[:, None])


def striped_causal(q, k, v, segments):
  """`reference_causal` a stripe of queries at a time, forwards and backwards: there are no scores [B, N, T, T]."""
  B, T = segments.shape
  count = -(-T // STRIPE)
  short = count * STRIPE - T
  place = jnp.arange(T)

  @jax.checkpoint
  def stripe(x):
    q, own, start = x
    mask = (own[:, :, None] == segments[:, None]) & (place <= start + jnp.arange(STRIPE)[:, None])
    return _reference(q, k, v, mask)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, count, STRIPE, *x.shape[2:]), 1, 0)

  parts = jax.lax.map(stripe, (split(q), split(segments), STRIPE * jnp.arange(count)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], parts)


def plain(call):
  """What computes a call without a back end."""
  if call == "over":
    return reference_over
  return lambda q, k, v, segments: (striped_causal if q.shape[1] > 1024 else reference_causal)(q, k, v, segments)


def _reference(q, k, v, mask):
  """mask: boolean [B, 1 or T, S], true where a query may look."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  # One batched matrix product over B x K with the G query heads folded into the rows: on CPUs several times faster than
  # the five-dimensional einsum, elsewhere the same.
  q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  scores = jnp.einsum("bkth,bskh->bkts", q, k, preferred_element_type=jnp.float32) * H**-0.5
  seen = jnp.broadcast_to(mask[:, None, None], (B, 1, G, T, S)).reshape(B, 1, G * T, S)
  scores = jnp.where(seen, scores, NEVER)
  top = jnp.maximum(scores.max(axis=-1, keepdims=True), 0.5 * NEVER)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), NEVER)
  weights = (weights / jnp.maximum(total, 1e-37)).astype(v.dtype)
  out = jnp.einsum("bkts,bskh->bkth", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

  def unfold(x):
    return x.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

  return unfold(out), unfold(lse)[..., 0]


# ---- What back ends share


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_gradient_of(function, value, *inputs):
  """`value`, which a kernel computed, with the gradient of `function(*inputs)`, which equals it; nothing is computed
  for parts of the value that no gradient comes from."""
  return value


def _forward(function, value, *inputs):
  return jax.tree.map(lambda x: x.value, (value, inputs))


def _backward(function, inputs, cotangents):
  zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
  if all(zero(x) for x in jax.tree.leaves(cotangents, is_leaf=zero)):
    return (None,) * (1 + len(inputs))
  given = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if zero(x) else x, cotangents, is_leaf=zero)
  return None, *jax.vjp(function, *inputs)[1](given)


with_gradient_of.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.cache
def _flaw(name, call, dtype, G, H):
  """Why a back end cannot be used on this device, None if it agrees with the reference."""
  with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # a caller may be tracing: this has to run now
    try:
      return elsewhere.submit(disagreement, getattr(_back_end(name), call), call, dtype, G, H).result()
    except Exception as e:  # private APIs and drivers fail in their own ways; attention must not
      return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"


def disagreement(attend, call, dtype, G, H):
  """What of out, log-sum-exp and gradients of `attend` is not the reference's on a small example, None if nothing."""
  B, T, K = 2, 200, 2
  random = np.random.default_rng(0)
  q, k, v, d_out = (random.normal(size=(B, T, n, H)) for n in (K * G, K, K, K * G))
  q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 1, 0]], (70, 1, 109, 20), axis=1)
  seen = jnp.asarray(segments if call == "causal" else (0, 131), jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def all_of(attend, q, k, v):
    (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, seen), q, k, v)
    return out, lse, *pull((jnp.asarray(d_out, out.dtype), jnp.zeros_like(lse)))

  reference = {"causal": reference_causal, "over": reference_over}[call]
  got, wanted = jax.device_get((all_of(attend, q, k, v), all_of(reference, q, k, v)))
  # Inputs of the same rounding: log-sum-exps agree to fp32 or so, the rest to a few roundings of its dtype.
  allowed = {"out": 0.02, "log-sum-exp": 1e-3, "gradient of q": 0.03, "gradient of k": 0.03, "gradient of v": 0.03}
  for (what, bound), x, y in zip(allowed.items(), got, wanted):
    off = np.abs(x.astype(np.float32) - y.astype(np.float32)).max()
    if not off <= bound * (1 if what == "log-sum-exp" else np.abs(y.astype(np.float32)).max()):
      return f"its {what} differs from the reference by {off:.2g}"
  return None


@functools.cache
def _warn(name, call, flaw):
  if flaw:
    message = f"attention ({call}) goes through plain XLA, which is slower than the {name} back end: {flaw}"
    warnings.warn(message, stacklevel=2)
