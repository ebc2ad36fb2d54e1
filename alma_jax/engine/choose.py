"""Choosing the next token: from logits and one uniform number per row to a token, exactly.

The logits pass, in transformers' order, a repetition penalty, a minimum length, temperature, top-k and top-p; the token
is then read off the cumulative distribution. No sort, no noise as wide as the vocabulary: the k-th largest weight and
the edge of the nucleus are found by bisection on the bits of a float, and the inverse CDF looks at block sums first.
On TPUs the kernel `engine.choose_tpu` does all of it in one reading of the logits. On GPUs plain XLA does it, and the
edge alone takes ten readings: what finds more bits in one would be limited by arithmetic.

    token, logprob = choose(logits, uniform, Decoding(max_new_tokens=64, temperature=0.7, top_p=0.9))
"""

import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from alma_jax.errors import UserError
from alma_jax.llama.sharding import platform
from alma_jax.llama.trial import flaw_on

Draw = Callable[[Array, Array], tuple[Array, Array]]  # logits [B, V], uniform [B] -> tokens [B], log-probabilities [B]


class DecodingError(UserError):
  """An invalid sampling option; the message names it and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How tokens are drawn. The meanings are those of transformers' `generate`."""

  max_new_tokens: int
  stop_ids: tuple[int, ...] = ()
  temperature: float = 1.0  # 0: greedy
  top_k: int = 0  # 0: all tokens
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  penalize_prompt: bool = True  # tokens of the prompt count as said, too
  min_new_tokens: int = 0  # no stop token before that

  def __post_init__(self) -> None:
    """Check the ranges: a value outside would be sampled from silently."""
    ranges = dict(
      max_new_tokens=(self.max_new_tokens >= 1, "at least 1"),
      temperature=(self.temperature >= 0, "0 (greedy) or more"),
      top_k=(self.top_k >= 0, "0 (all tokens) or more"),
      top_p=(0 <= self.top_p <= 1, "from 0 (only the likeliest) to 1 (all)"),
      repetition_penalty=(self.repetition_penalty > 0, "above 0; 1 is none"),
      min_new_tokens=(0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
    )
    for name, (fits, wanted) in ranges.items():
      if not fits:
        raise DecodingError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

  @property
  def remembers(self) -> bool:
    """True if the tokens said so far matter."""
    return self.repetition_penalty != 1


def choose(
  logits: Array, uniform: Array, decoding: Decoding, said: Array | None = None, count: Array | None = None,
  sharpness: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
  """Tokens [B] and their log-probabilities [B] in the model's own distribution, from fp32 logits [B, V].

  `said` [B, V] marks the tokens that the penalty applies to, `count` [B] is how many have been drawn. `sharpness` [B]
  (see `sharpness_of`) stands in for a temperature above 0, so that one program in plain XLA serves several.
  """
  if sharpness is None and (draw := _kernel_for(logits, decoding)) is not None:
    z = _ruled(logits, decoding, said, count)
    token, logprob = draw(z, uniform)
    if z is logits:
      return token, logprob
  elif decoding.temperature == 0:
    token = _argmax(_ruled(logits, decoding, said, count))
  else:
    token = inverse_cdf(weights(logits, decoding, said, count, sharpness), uniform)
  # Written out, so that XLA makes these exponentials once with those of `weights` where they are the same.
  top = logits.max(axis=-1, keepdims=True)
  mass = jnp.exp(logits - top).sum(axis=-1)
  return token, (jnp.take_along_axis(logits, token[:, None], axis=1) - top)[:, 0] - jnp.log(mass)


def sharpness_of(temperature: float) -> np.float32:
  """1 / temperature, what logits are multiplied by, as XLA does where it knows the temperature; finite, because 0 times
  infinity is no number."""
  return np.float32(1) / np.maximum(np.float32(temperature), np.float32(1e-37))


def weights(
  logits: Array, decoding: Decoding, said: Array | None = None, count: Array | None = None,
  sharpness: Array | None = None,
) -> Array:  # fmt: skip
  """fp32 [B, V] in proportion to the probabilities that are drawn from; the largest of a row is 1.

  Weights 1, .5, .5, .3, .2 (sum 2.5) by the steps below:

    top_k = 3    the edge is the largest number that three weights reach, .5; below it: 1, .5, .5, 0, 0
    top_p = .7   of the sum 2, wanted are 1.4; the edge is the largest number whose weights reach that, .5. The weights
                 above it have 1 and are short by .4, so ceil(.4 / .5) = 1 of the two at the edge stays: 1, .5, 0, 0, 0
  """
  z = _ruled(logits, decoding, said, count)
  z = z - z.max(axis=-1, keepdims=True)
  w = jnp.exp(z / decoding.temperature if sharpness is None else z * sharpness[:, None])
  if 0 < decoding.top_k < w.shape[-1]:
    edge = _edge(w, lambda kept: kept.sum(axis=-1, keepdims=True) >= decoding.top_k)
    w = jnp.where(w >= edge, w, 0.0)  # all that tie for the last place stay, as in transformers
  if decoding.top_p < 1:
    wanted = jnp.maximum(decoding.top_p * w.sum(axis=-1, keepdims=True), 1e-30)  # the first one always stays
    edge = _edge(w, lambda kept: jnp.where(kept, w, 0.0).sum(axis=-1, keepdims=True) >= wanted)
    # Of those that tie at the edge, the first few that are needed.
    short = wanted - jnp.where(w > edge, w, 0.0).sum(axis=-1, keepdims=True)
    needed = jnp.maximum(jnp.ceil(short / jnp.maximum(edge, 1e-37)), 1.0)
    tied = w == edge

    def first() -> Array:
      return jnp.where((w > edge) | (tied & (jnp.cumsum(tied, axis=-1) <= needed)), w, 0.0)

    # Most often one weight is at the edge, or all of them are needed: where passes are dear, none is counted then.
    if platform() == "cpu":
      w = first()
    else:
      all_needed = (tied.sum(axis=-1, keepdims=True) <= needed).all()
      w = jax.lax.cond(all_needed, lambda: jnp.where(w >= edge, w, 0.0), first)
  return w


def _ruled(logits: Array, decoding: Decoding, said: Array | None, count: Array | None) -> Array:
  """Logits [B, V] after the rules that do not depend on the temperature: repetition penalty and minimum length."""
  z = logits
  if decoding.remembers:
    penalty = decoding.repetition_penalty
    assert said is not None
    z = jnp.where(said, jnp.where(z < 0, z * penalty, z / penalty), z)
  if decoding.min_new_tokens and decoding.stop_ids:
    assert count is not None
    stop = jnp.zeros(z.shape[-1], bool).at[jnp.asarray(decoding.stop_ids)].set(True, mode="drop")
    z = jnp.where((count[:, None] < decoding.min_new_tokens) & stop, -jnp.inf, z)
  return z


def _edge(w: Array, enough: Callable[[Array], Array]) -> Array:
  """[B, 1]: the largest number e for which enough(w >= e) holds. It must hold for all weights, e = 0.

  Non-negative floats are ordered as their bits are, and 1.0 is 0x3f800000, so that 30 bits decide, from the highest on.
  On CPUs each pass over the weights finds a bit: it is set while the weights at or above the number with it are enough.
  Elsewhere a pass takes as long as memory needs, and finds three bits, because it tries the seven numbers at once.
  """
  bits = 1 if platform() == "cpu" else 3

  def narrow(i: Array, low: Array) -> Array:
    shift = 30 - bits * (1 + i)
    tried = [jax.lax.bitcast_convert_type(low + (d << shift), jnp.float32) for d in range(1, 1 << bits)]
    return low + (_digit([enough(w >= number) for number in tried]) << shift)

  low = jax.lax.fori_loop(0, 30 // bits, narrow, jnp.zeros((w.shape[0], 1), jnp.int32))
  return jax.lax.bitcast_convert_type(low, jnp.float32)


def _digit(reached: list[Array]) -> Array:
  """The largest d for which reached[d - 1] holds, else 0, by bisection: sums of floats are not quite monotonic."""

  def found(low: int, step: int) -> Array | int:
    if not step:
      return low
    return jnp.where(reached[low + step - 1], found(low + step, step // 2), found(low, step // 2))

  return jnp.asarray(found(0, (len(reached) + 1) // 2))


def _blocks(x: Array, filler: float) -> Array:
  """[B, V] as [B, n, size], n about as large as the size. The size divides V where it can: padding is a copy."""
  V = x.shape[-1]
  size, divides = 1 << ((V.bit_length() + 1) // 2), V & -V  # V & -V is the largest power of two that divides V
  size = divides if size // 4 <= divides < size else size
  return jnp.pad(x, ((0, 0), (0, -V % size)), constant_values=filler).reshape(x.shape[0], -1, size)


def inverse_cdf(w: Array, uniform: Array) -> Array:
  """[B]: the first token whose cumulative weight is above uniform x total. One row, V = 8, uniform = 0.6:

  weights    1 0 | 2 1 | 0 3 | 1 0     in blocks of 2
  mass        1  |  3  |  3  |  1
  reach       1  |  4  |  7  |  8      target = 0.6 x 8 = 4.8, first reached in block 2; 4 stands before the block
  inside                 0 3           reach inside 0 3, the target 4.8 - 4 = 0.8 is first reached at 1: token 5
  """
  blocks = _blocks(w, 0.0)
  mass = blocks.sum(axis=-1)
  reach = jnp.cumsum(mass, axis=-1)
  target = uniform * reach[:, -1]
  block = _first_above(reach, target, mass > 0)[:, None]
  inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  before = jnp.take_along_axis(reach - mass, block, axis=1)[:, 0]
  return block[:, 0] * blocks.shape[-1] + _first_above(jnp.cumsum(inside, axis=-1), target - before, inside > 0)


def _first_above(reach: Array, target: Array, possible: Array) -> Array:
  """[B]: the first possible place whose reach [B, n] is above the target [B].

  A parallel sum is not quite monotonic and differences round: `possible` excludes what has no weight, and where
  rounding leaves no place at all, the last possible one is taken.
  """
  at = jnp.arange(reach.shape[-1])
  first = jnp.where(possible & (reach > target[:, None]), at, at.size).min(axis=-1)
  return jnp.where(first < at.size, first, jnp.where(possible, at, 0).max(axis=-1))


def _argmax(z: Array) -> Array:
  """[B]: the lowest index of the largest. In blocks and by a smallest index: many times faster than argmax on CPUs."""

  def first(x: Array) -> Array:
    size = x.shape[-1]
    return jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(size), size).min(axis=-1)

  blocks = _blocks(z, -jnp.inf)
  block = first(blocks.max(axis=-1))[:, None]
  return block[:, 0] * blocks.shape[-1] + first(jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0])


# ---- The kernel for TPUs, and its check before first use


def reads_once(decoding: Decoding, V: int, target: str) -> bool:
  """Whether logits of V tokens are read once on a platform: it has a kernel, which no device here shows to be wrong."""
  return target == "tpu" and _flaw(V, decoding.temperature, decoding.top_k, decoding.top_p) is None


def _kernel_for(logits: Array, decoding: Decoding) -> Draw | None:
  """What draws from such logits in one reading of them, without the rules of `_ruled`; None: plain XLA must do it."""
  if platform() != "tpu" or logits.dtype != jnp.float32:
    return None
  axes, options = _spread_axes(), (decoding.temperature, decoding.top_k, decoding.top_p)
  wrong = _flaw(logits.shape[1], *options)
  if axes is None:
    wrong = "logits may be spread over devices without a mesh that says how"
  _warn(wrong)
  if axes is None or wrong is not None:
    return None
  draw = functools.partial(_kernel().drawn, **dict(zip(("temperature", "top_k", "top_p"), options, strict=True)))
  return _on_each_device(draw, axes, len(logits))


def _kernel() -> Any:
  """Imported at its first use: it needs what JAX has for TPUs only, and a failure must reach `_flaw`."""
  return importlib.import_module("alma_jax.engine.choose_tpu")


def _spread_axes() -> tuple[str, ...] | None:
  """The axes of the mesh in force that logits may be spread over, by rows or by tokens; None if that is unknown."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return () if jax.local_device_count() == 1 else None
  return () if mesh.size == 1 else tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def _on_each_device(draw: Draw, axes: tuple[str, ...], rows: int) -> Draw:
  """`draw` with whole rows on each device: its own share of them, or all of them where they cannot be shared evenly.

  Logits that a tensor group holds by tokens are exchanged for that, each device's share of its rows once.
  """
  if not axes:
    return draw
  sizes = jax.sharding.get_abstract_mesh().shape
  own = P(axes) if rows % math.prod(sizes[a] for a in axes) == 0 else P()
  return jax.shard_map(draw, in_specs=(own, own), out_specs=(own, own), axis_names=set(axes), check_vma=False)


@functools.cache
def _flaw(V: int, temperature: float, top_k: int, top_p: float) -> str | None:
  """Why the kernel cannot be used; None if it draws as the definition says, or if no TPU is here."""
  if not _kernel().fits(V):
    return f"a vocabulary of {V:,} tokens does not fit in a core's memory"
  return flaw_on("tpu", lambda: disagreement(_kernel().drawn, V, temperature, top_k, top_p))


def disagreement(
  draw: Callable[..., tuple[Array, Array]], V: int, temperature: float, top_k: int, top_p: float
) -> str | None:
  """How a kernel differs from the definition, which is computed here in fp64 by sorting, on rows of every kind."""
  z, uniform = _hard_rows(V)
  options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
  token, logprob = jax.device_get(jax.jit(functools.partial(draw, **options))(z, uniform))
  for row, (x, u, t) in enumerate(zip(z.astype(np.float64), uniform.astype(np.float64), token, strict=True)):
    if not 0 <= t < V:
      return f"row {row} has the token {t}"
    wanted = x[t] - x.max() - np.log(np.exp(x - x.max()).sum())
    if not abs(logprob[row] - wanted) < 1e-3:
      return f"the log-probability of row {row} is {logprob[row]:.6g}, not {wanted:.6g}"
    w = _kept(x, temperature, top_k, top_p)
    reach = np.cumsum(w) / w.sum()
    # Sums that are rounded may move the edge of the nucleus by a token, and the places of all by its share.
    if not (x[t] > -np.inf and reach[t] - w[t] / w.sum() - 1e-3 <= u <= reach[t] + 1e-3):
      return f"row {row} has the token {t}, whose part of the distribution does not hold {u:.6g}"
  return None


def _hard_rows(V: int) -> tuple[np.ndarray, np.ndarray]:
  """Logits [12, V] and uniform numbers: smooth rows, and those with ties, no difference, impossible and sure tokens."""
  random = np.random.default_rng(0)
  z = random.normal(size=(12, V)) * np.linspace(0.5, 5, 12)[:, None]
  z[0], z[1], z[2] = 0.7, np.where(np.arange(V) == V // 2, 3.0, -np.inf), np.round(z[2])
  z[3, random.random(V) < 0.5] = -np.inf
  z[4, V - 1], z[5] = 60.0, np.arange(V) % 3 == 1
  uniform = random.random(12)
  uniform[-2:] = 0, 1 - 2.0**-24
  return z.astype(np.float32), uniform.astype(np.float32)


def _kept(x: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
  """fp64 [V]: the weights of a row, zeros for what top-k and top-p leave out. Greedy keeps the first of the largest."""
  if temperature == 0:
    return np.eye(1, len(x), int(x.argmax()))[0]
  w = np.exp((x - x.max()) / temperature)
  if 0 < top_k < len(w):
    w[w < np.sort(w)[-top_k]] = 0
  if top_p < 1:
    order = np.argsort(-w, kind="stable")  # of equal weights the lowest index comes first
    before = np.cumsum(w[order]) - w[order]
    w[order[1:][before[1:] >= top_p * w.sum()]] = 0
  return w


@functools.cache
def _warn(wrong: str | None) -> None:
  if wrong:
    warnings.warn(f"tokens are chosen in plain XLA, which reads logits many times more: {wrong}", stacklevel=2)
