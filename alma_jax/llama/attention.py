"""Attention behind one contract with a back end per platform: `causal` and `over` give `(out, log_sum_exp)`.

  causal(q, k, v, segments)   each place looks at itself and at the earlier places of its segment; T = S
  over(q, k, v, lengths)      each query of row b looks at the first lengths[b] keys; lengths[b] may be 0
                              (`over_tiles`: the same for a sampler's tiles)
  merged(a, b)                attention over the union of the keys of two results

q is [B, T, N, H]; k and v are [B, S, K, H] (grouped queries: G = N / K heads share a key/value head). For `over` they
may have n heads side by side, [B, S, K / n, n H], as a cache on TPUs has them (`side_by_side`). Scores, softmax and the
log-sum-exp [B, T, N] are fp32 for inputs of every dtype, so that two parts can be merged exactly. Everything
but `over_tiles` can be differentiated.

`llama.attention_reference` says the same in plain XLA. The tests compare every back end with it, and each back end of
an accelerator is compared once more on the device before its first use. `chosen` picks the back end while a call is
traced; there is nothing to configure. A back end needs whole arrays on its device: under a mesh (jax.set_mesh) each
device computes its own rows and heads; where arrays may be spread in an unknown way, the reference is used.
"""

import functools
import importlib
import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alma_jax.llama.attention_reference import (
  Attend,
  Attended,
  apart,
  reference_causal,
  reference_over,
  striped_causal,
)
from alma_jax.llama.sharding import BATCH, platform
from alma_jax.llama.trial import flaw_on

CACHE = 4 * 2**20  # bytes of scores (of keys and values when decoding) that plain XLA handles well on a CPU, measured

LANES = 128  # numbers in a row of a TPU's tiles

Call = Literal["causal", "over"]
Shape = tuple[int, ...]


def causal(q: Array, k: Array, v: Array, segments: Array, few: bool | int | None = None) -> Attended:
  """Attention within packed rows. Segments [B, T] number the packed examples; padding is a segment of its own.

  `few`: whether every row has at most `attention_reference.few_runs(T)` runs of one segment, or a number that no row
  exceeds; None: not known here, so that back ends which depend on it must find out on the device.
  """
  return _computed("causal", q, k, v, segments, few)


def over(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """Attention over the first keys of each row; where a row has none, out is 0 and the log-sum-exp is `NEVER`."""
  return _computed("over", q, k, v, lengths)


def over_tiles(q: Array, k: Array, v: Array, lengths: Array) -> Attended:
  """`over` without a gradient, for few queries in each row and rows of which many may have no keys."""
  if platform() == "cpu":
    return _back_end("cpu").over_tiles(q, k, v, lengths)
  return _computed("over", q, k, v, lengths)


def side_by_side(platform: str, dtype: DTypeLike, K: int, H: int) -> int:
  """How many heads of keys a cache has side by side, of K heads of H numbers on each device. On TPUs as many as fill a
  row of tiles: narrower rows are filled up with zeros, or laid out anew for each use."""
  n = max(1, LANES // H)
  return n if platform == "tpu" and dtype == jnp.bfloat16 and H % 64 == 0 and K % n == 0 else 1


def merged(a: Attended, b: Attended) -> Attended:
  """Attention over the keys of both parts, which share no key: each out counts by its share of exp(log_sum_exp)."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  lse = jnp.logaddexp(lse_a, lse_b)

  def weighed(out: Array, part: Array) -> Array:
    return out.astype(jnp.float32) * jnp.exp(part - lse)[..., None]

  return (weighed(out_a, lse_a) + weighed(out_b, lse_b)).astype(out_a.dtype), lse


def chosen(call: Call, platform: str, dtype: DTypeLike, q: Shape, k: Shape) -> str | None:
  """The back end for `call` on a platform in JAX's words: "cpu", "nvidia", "tpu" or "decode_tpu" (the files
  attention_*.py), or None for plain XLA. `q` and `k` are the shapes that a device holds."""
  (B, T, N, H), (_, S, K, wide) = q, k
  if platform == "cpu":
    decodes = call == "over" and T == 1
    return "cpu" if 4 * (2 * B * S * K * H if decodes else B * N * T * S) >= CACHE else None
  if platform == "gpu":
    return "nvidia" if dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128 and S >= 32 else None
  if platform == "tpu" and dtype == jnp.bfloat16 and H % 64 == 0 and S >= 128:
    if T >= 128:
      return "tpu"
    # Heads that fill whole tiles: [S, K, H] lies as [S * K, H] does. The queries and their sums stay in VMEM.
    few = wide % LANES == 0 and (K in (1, 2, 4) or K % 8 == 0) and T * N <= 1024
    return "decode_tpu" if call == "over" and few else None
  return None


def _computed(call: Call, q: Array, k: Array, v: Array, seen: Array, few: bool | int | None = None) -> Attended:
  """The call through the chosen back end if it can be used here, else in plain XLA; `seen`: segments or lengths."""
  target, axes, (B, T, N, H), (_, S, K, wide) = platform(), _spread_axes(q.shape[0], k.shape[2]), q.shape, k.shape
  ways = jax.sharding.get_abstract_mesh().shape["tensor"] if target == "tpu" and axes and "tensor" in axes else 1
  name = chosen(call, target, q.dtype, (B, T, N // ways, H), (B, S, K // ways, wide))
  if name != "decode_tpu":
    k, v = apart(k, H), apart(v, H)
  if name:
    flaw = "arrays may be spread over devices without a mesh that says how" if axes is None else None
    if name != "cpu":
      sizes = (T, K // ways, wide // H) if name == "decode_tpu" else None
      flaw = flaw or _flaw(name, target, call, jnp.dtype(q.dtype), N // K, H, sizes)
      _warn(name, call, flaw)
    if axes is not None and flaw is None:
      attend = getattr(_back_end(name), call)
      if name == "nvidia" and call == "causal":
        attend = functools.partial(attend, few=few)
      return _on_each_device(attend, axes)(q, k, v, seen)
  if call == "over":
    return reference_over(q, apart(k, H), apart(v, H), seen)
  return (striped_causal if q.shape[1] > 1024 else reference_causal)(q, k, v, seen)


def _back_end(name: str) -> Any:
  """The module, imported at its first use: each needs kernels of its platform, and a failure must reach `_flaw`."""
  return importlib.import_module(f"alma_jax.llama.attention_{name}")


def _spread_axes(batch: int, kv_heads: int) -> tuple[str, ...] | None:
  """The axes of the mesh in force that rows and heads may be spread over, those of size 1 included: () if every array
  is whole on its device, None if the spread is unknown or uneven."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return () if jax.local_device_count() == 1 else None
  axes = tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)
  ways = math.prod(mesh.shape[a] for a in axes if a in BATCH)
  if set(axes) - {*BATCH, "tensor"} or batch % ways or ("tensor" in axes and kv_heads % mesh.shape["tensor"]):
    return None
  return axes if mesh.size > 1 else ()


def _on_each_device(attend: Attend, axes: tuple[str, ...]) -> Attend:
  """`attend` for arrays whose rows and heads are spread over these mesh axes: each device works on its own part.

  TPU kernels are lowered only where every axis of the mesh is manual, so that axes of size 1 count too. The specs of q,
  k and v name them all: the transpose of shard_map sums gradients over each manual axis that no spec names.
  """
  if not axes:
    return attend
  rows, heads = tuple(a for a in BATCH if a in axes) or None, "tensor" if "tensor" in axes else None
  whole = P(rows, None, heads, None)
  specs, results = (whole, whole, whole, P(rows)), (whole, P(rows, None, heads))
  return jax.shard_map(attend, in_specs=specs, out_specs=results, axis_names=set(axes), check_vma=False)


# ---- The check before first use


@functools.cache
def _flaw(
  name: str, target: str, call: Call, dtype: DTypeLike, G: int, H: int, sizes: Shape | None = None
) -> str | None:
  """Why a back end cannot be used on the devices of the platform `target`; None if it agrees with the reference, or if
  no such device is here."""
  return flaw_on(target, lambda: disagreement(getattr(_back_end(name), call), call, dtype, G, H, sizes))


def disagreement(
  attend: Attend, call: Call, dtype: DTypeLike, G: int, H: int, sizes: Shape | None = None
) -> str | None:
  """The first of out, log-sum-exp and gradients in which `attend` differs from the reference on a small example.

  `sizes`: its queries T, the rows K that heads of keys lie in and how many lie in one, for a back end that depends on
  them. G queries share a row.
  """
  (T, K, side), S = sizes or (200, 2, 1), 200
  lengths = (0, 131) if sizes is None else (0, 131, 128, 1, S)
  B = len(lengths)
  random = np.random.default_rng(0)
  queries, keys = (T, K * G), (S, K * side)
  q, k, v, d_out = (random.normal(size=(B, *x, H)) for x in (queries, keys, keys, queries))
  q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 1, 0]], (70, 1, 109, 20), axis=1)
  seen = jnp.asarray(segments if call == "causal" else lengths, jnp.int32)

  reference = reference_causal if call == "causal" else reference_over

  @functools.partial(jax.jit, static_argnums=0)
  def everything(attend: Attend, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    rows = (B, S, K, side * H) if attend is not reference else k.shape
    (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k.reshape(rows), v.reshape(rows), seen), q, k, v)
    return out, lse, *pull((jnp.asarray(d_out, out.dtype), jnp.zeros_like(lse)))

  got, wanted = jax.device_get((everything(attend, q, k, v), everything(reference, q, k, v)))
  # Both sides round the same inputs: log-sum-exps agree nearly to fp32, the rest to a few roundings of the dtype.
  allowed = {"out": 0.02, "log-sum-exp": 1e-3, "gradient of q": 0.03, "gradient of k": 0.03, "gradient of v": 0.03}
  for (what, bound), x, y in zip(allowed.items(), got, wanted, strict=True):
    off = np.abs(x.astype(np.float32) - y.astype(np.float32)).max()
    if not off <= bound * (1 if what == "log-sum-exp" else np.abs(y.astype(np.float32)).max()):
      return f"its {what} differs from the reference by {off:.2g}"
  return None


@functools.cache
def _warn(name: str, call: Call, flaw: str | None) -> None:
  if flaw:
    message = f"attention ({call}) goes through plain XLA, which is slower than the {name} back end: {flaw}"
    warnings.warn(message, stacklevel=2)
