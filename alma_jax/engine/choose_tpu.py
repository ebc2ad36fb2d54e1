"""Choosing tokens on TPUs: logits are read once, and all passes over them are made in the fast memory (VMEM) of a core.

A step of the grid has ROWS rows with their whole vocabulary; the next rows are copied while these are computed. Weights
stay in VMEM beside the logits, with zeros behind the vocabulary up to a whole number of chunks:

  logits   [ROWS, V]        maximum -> weights [ROWS, chunks x CHUNK] and their sum
  weights                   top-k, top-p: 30 passes each find a bit of the edge; the tie rule; the inverse CDF by chunks
  out      [ROWS, 1]        token, log-probability

`engine.choose` has the contract, and says what the edge and the tie rule are. A pass costs about an operation of the
vector unit for each number of the block (three in slots of four), which is longer than the copy of the logits takes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 8
CHUNK = 1024  # columns whose sums stay in registers
AT_ONCE = 8  # chunks of a loop's step, whose loads and sums overlap
MOST = 48 * 2**20  # bytes of VMEM


def fits(V: int) -> bool:
  return _bytes(V) <= MOST


def _bytes(V: int) -> int:
  """Logits, those of the next rows, and weights; and room for what is small."""
  return 3 * 4 * ROWS * _padded(V) + 2**20


def _padded(V: int) -> int:
  step = CHUNK * min(AT_ONCE, -(-V // CHUNK))
  return -(-V // step) * step


def drawn(
  z: Array, uniform: Array, temperature: float, top_k: int, top_p: float, interpret: bool = False
) -> tuple[Array, Array]:
  """Tokens [B] that `choose` draws from fp32 logits z [B, V], and their log-probabilities [B] in the softmax of z."""
  B, V = z.shape
  width = _padded(V)
  whole, one = pl.BlockSpec((ROWS, width), lambda i: (i, 0)), pl.BlockSpec((ROWS, 1), lambda i: (i, 0))
  token, logprob = pl.pallas_call(
    functools.partial(_kernel, V=V, temperature=temperature, top_k=top_k, top_p=top_p),
    grid=(pl.cdiv(B, ROWS),),
    in_specs=[whole, one],
    out_specs=[one, one],
    out_shape=[jax.ShapeDtypeStruct((B, 1), jnp.int32), jax.ShapeDtypeStruct((B, 1), jnp.float32)],
    scratch_shapes=[pltpu.VMEM((ROWS, width), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_bytes(V) + 2**20),
    interpret=interpret,
    name="choose_token",
  )(z, uniform[:, None])
  return token[:, 0], logprob[:, 0]


def _kernel(
  z: Array, uniform: Array, token: Array, logprob: Array, w: Array, *, V: int, temperature: float, top_k: int,
  top_p: float,
) -> None:  # fmt: skip
  """A column of a result is [ROWS, 1]. What stands past the last row or column of z may be any number."""
  chunks = w.shape[1] // CHUNK
  at_once = min(AT_ONCE, chunks)
  at = lax.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 1)
  nothing = jnp.zeros((ROWS, CHUNK), jnp.float32)

  def columns(i: Array) -> Any:
    return pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)

  def logits(i: Array) -> Array:
    return jnp.where(at < V - i * CHUNK, z[:, columns(i)], -jnp.inf)

  def over_chunks(f: Callable[[Array, tuple[Array, ...]], tuple[Array, ...]], *start: Array) -> tuple[Array, ...]:
    def step(s: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
      for j in range(at_once):
        held = f(s * at_once + j, held)
      return held

    return lax.fori_loop(0, chunks // at_once, step, start)

  def total(f: Callable[[Array], Array]) -> Array:
    """[ROWS, 1]: the sum of f(chunk) [ROWS, CHUNK] over all chunks."""
    (sums,) = over_chunks(lambda i, held: (held[0] + f(i),), nothing)
    return sums.sum(axis=1, keepdims=True)

  def largest(bits: int, enough: Callable[[Array], Array]) -> Array:
    """[ROWS, 1]: the largest number of so many bits for which `enough` holds, as it does for 0 and up to there."""

    def narrow(b: Array, low: Array) -> Array:
      higher = low + jnp.left_shift(1, bits - 1 - b)
      return jnp.where(enough(higher), higher, low)

    return lax.fori_loop(0, bits, narrow, jnp.zeros((ROWS, 1), jnp.int32))

  def edge(enough: Callable[[Array], Array]) -> Array:
    """As `choose._edge`: by the bits of a float, a pass over the weights for each."""
    return _float(largest(30, lambda bits: enough(_float(bits))))

  (top,) = over_chunks(lambda i, held: (jnp.maximum(held[0], logits(i)),), jnp.full_like(nothing, -jnp.inf))
  top = top.max(axis=1, keepdims=True)

  if temperature == 0:

    def first(i: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
      x = logits(i)
      place = jnp.where(x == top, at + i * CHUNK, V - 1)
      return held[0] + jnp.exp(x - top), jnp.minimum(held[1], place)

    mass, place = over_chunks(first, nothing, jnp.full((ROWS, CHUNK), V - 1, jnp.int32))
    token[...] = place.min(axis=1, keepdims=True)
    logprob[...] = -jnp.log(mass.sum(axis=1, keepdims=True))
    return

  def weigh(i: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
    x = logits(i) - top
    weight = jnp.exp(x * (1 / temperature))
    w[:, columns(i)] = weight
    return held[0] + weight, held[1] + (weight if temperature == 1 else jnp.exp(x))

  sum_, mass = (x.sum(axis=1, keepdims=True) for x in over_chunks(weigh, nothing, nothing))

  def kept(i: Array) -> Array:
    return w[:, columns(i)]

  if 0 < top_k < V:
    floor = edge(lambda number: total(lambda i: jnp.where(kept(i) >= number, 1.0, 0.0)) >= top_k)

    def cut(i: Array) -> Array:
      w[:, columns(i)] = left = jnp.where(kept(i) >= floor, kept(i), 0.0)
      return left

    sum_ = total(cut)

  if top_p < 1:
    wanted = jnp.maximum(top_p * sum_, 1e-30)
    lowest = edge(lambda number: total(lambda i: jnp.where(kept(i) >= number, kept(i), 0.0)) >= wanted)

    def parts(i: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
      x = kept(i)
      return held[0] + jnp.where(x > lowest, x, 0.0), held[1] + jnp.where(x == lowest, 1.0, 0.0)

    above, tied = (x.sum(axis=1, keepdims=True) for x in over_chunks(parts, nothing, nothing))
    needed = jnp.maximum(jnp.ceil((wanted - above) / jnp.maximum(lowest, 1e-37)), 1.0)

    def tied_before(column: Array) -> Array:
      return total(lambda i: jnp.where((kept(i) == lowest) & (at + i * CHUNK < column), 1.0, 0.0))

    def last_needed() -> Array:  # before its column there are less than needed
      return largest(w.shape[1].bit_length(), lambda column: tied_before(column) < needed)

    # Most often one weight is at the edge, or all of them are needed.
    spare = jnp.max(tied - needed) > 0
    last = lax.cond(spare, last_needed, lambda: jnp.full((ROWS, 1), w.shape[1], jnp.int32))

    def cut_at_edge(i: Array) -> Array:
      x = kept(i)
      stays = (x > lowest) | ((x == lowest) & (at + i * CHUNK <= last))
      w[:, columns(i)] = left = jnp.where(stays, x, 0.0)
      return left

    sum_ = total(cut_at_edge)

  target = uniform[...] * sum_

  def reach(i: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
    """Takes each chunk that has weights until one reaches the target; where rounding leaves none, the last one."""
    searching, before, start, chunk, inside, raw = held
    x = kept(i)
    mass = x.sum(axis=1, keepdims=True)
    after, taken = before + mass, (searching > 0) & (mass > 0)
    searching = jnp.where(taken & (after > target), 0, searching)
    start, chunk = jnp.where(taken, before, start), jnp.where(taken, i, chunk)
    return searching, after, start, chunk, jnp.where(taken, x, inside), jnp.where(taken, z[:, columns(i)], raw)

  zero, one = jnp.zeros((ROWS, 1), jnp.int32), jnp.ones((ROWS, 1), jnp.int32)
  start = jnp.zeros((ROWS, 1), jnp.float32)
  _, _, start, chunk, inside, raw = over_chunks(reach, one, start, start, zero, nothing, nothing)

  def reached_before(column: Array) -> Array:
    return jnp.where(at < column, inside, 0.0).sum(axis=1, keepdims=True)

  # Sums of the same order grow with their terms only: the column behind the last sum below the target has a weight.
  column = largest(CHUNK.bit_length() - 1, lambda column: reached_before(column) <= target - start)
  column = jnp.minimum(column, jnp.where(inside > 0, at, -1).max(axis=1, keepdims=True))
  token[...] = jnp.clip(chunk * CHUNK + column, 0, V - 1)
  here = jnp.where(at == column, raw, 0.0).sum(axis=1, keepdims=True)
  logprob[...] = here - top - jnp.log(mass)


def _float(bits: Array) -> Array:
  return lax.bitcast_convert_type(bits, jnp.float32)
