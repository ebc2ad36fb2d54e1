"""Scoring: log-probabilities of what may follow a text and of what did follow it, without generating anything.

A row is (prefix, suffix), two tuples of token ids. Rows of one prefix share its keys and values, which are computed
once, and equal rows are scored once. The model is in the stacked layout.

  logprobs = next_logprobs(model, rows, columns, reads=1, setup=Setup(batch=32))  # a judge: of some next tokens
  logprobs = token_logprobs(model, rows, Setup(batch=32))                         # a reference: of the suffixes' tokens
  hidden = last_states(model, rows, Setup(batch=32))                              # a reward model: what its head reads

What to expect: what a row is scored with does not change its numbers (in fp32 up to 1e-6). `batch` rows run at a time,
and at most batch * buckets.ROOM tokens of prefixes are held as keys and values, or one longer prefix for each row.
Fewer rows run at a time where `free` bytes would not hold that. Under a mesh every group of `tensor` devices is a
replica that runs rows of its own and holds their prefixes; replicas exchange nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets, crossentropy
from alma_jax.errors import NotFinite
from alma_jax.llama import attention, reading
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Llama
from alma_jax.llama.sharding import BATCH, REPLICA, WHOLE, per_replica, platform, replicas

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Setup:
  """How rows are run, which changes results only by rounding."""

  batch: int  # rows per call, on each replica
  common: Ids = ()  # what most prefixes begin with; it is computed once for all
  mesh: Mesh | None = None
  progress: Callable[[int, int], object] | None = None  # hears (rows, equal ones included; tokens computed for them)
  free: int | None = None  # bytes on each device beside the models; None: not known, so that `batch` rows run


def next_logprobs(
  model: Llama, rows: Sequence[tuple[Ids, Ids]], columns: Sequence[int], reads: int, setup: Setup
) -> np.ndarray:
  """fp32 [rows, reads, columns]: log p(token) for the given token ids after each of the last `reads` tokens of every
  suffix, which are at least as many. NotFinite, with the row's index, if one is not finite."""
  short = next((i for i, (_, suffix) in enumerate(rows) if len(suffix) < reads), None)
  if short is not None:
    raise ValueError(f"row {short}: {reads} places are to be read of a suffix of {len(rows[short][1])}")
  ids = np.asarray(columns, np.int32)
  out = np.zeros((len(rows), reads, len(ids)), np.float32)

  def program(prefix: reading.Prefix, tokens: np.ndarray, lengths: np.ndarray, mesh: Mesh | None) -> Array:
    return _read(model, prefix, tokens, lengths, ids, reads=reads, mesh=mesh)

  for indices, found in _results(model, rows, program, reads, setup):
    out[indices] = _finite(found, indices[0])
  return out


def last_states(model: Llama, rows: Sequence[tuple[Ids, Ids]], setup: Setup) -> np.ndarray:
  """fp32 [rows, D]: the final-norm hidden state at the last token of every row. No suffix is empty."""
  out = np.zeros((len(rows), model.c.width), np.float32)
  for indices, found in _results(model, rows, functools.partial(_last, model), 1, setup):
    out[indices] = found
  return out


def token_logprobs(model: Llama, rows: Sequence[tuple[Ids, Ids]], setup: Setup) -> list[np.ndarray]:
  """fp32 arrays: log p of every token of each row's suffix. No prefix is empty: it begins with BOS."""
  # The last token of the prefix is where the first one of the suffix is read.
  rows = [(tuple(prefix[:-1]), (*prefix[-1:], *suffix)) for prefix, suffix in rows]
  out = [np.zeros(0, np.float32)] * len(rows)
  for indices, found in _results(model, rows, functools.partial(_score, model), 1, setup):
    for i in indices:
      out[i] = _finite(found[: len(rows[i][1]) - 1], i)
  return out


def _finite(logprobs: np.ndarray, row: int) -> np.ndarray:
  if not np.isfinite(logprobs).all():
    raise NotFinite(row, f"a log-prob is {logprobs[~np.isfinite(logprobs)][0]}")
  return logprobs


def sequence_logprobs(model: Llama, rows: Sequence[tuple[Ids, Ids]], setup: Setup) -> np.ndarray:
  """float64 [rows]: log p of each row's suffix after its prefix."""
  return np.array([x.sum(dtype=np.float64) for x in token_logprobs(model, rows, setup)])


# What fits


def forward_bytes(c: LlamaConfig, tensor: int, itemsize: int, target: str | None = None) -> int:
  """What a layer without a backward pass has of each place at most: gate and up, and the stream beside them. On TPUs it
  may be its input, and the queries in fp32 as they are turned: they and their two halves, in rows of tiles each.
  `target`: the devices' platform, in JAX's words; None: that of JAX's default."""
  inner = (2 * c.width + 2 * c.ffn // tensor) * itemsize
  turning = c.width * itemsize + 3 * 4 * attention.LANES * c.heads // tensor
  return max(inner, turning) if (target or platform()) == "tpu" else inner


def reading_bytes(
  c: LlamaConfig, tensor: int, itemsize: int, rows: int, width: int, before: int = 0, wide: int = 1,
  target: str | None = None,
) -> int:  # fmt: skip
  """What forward passes over rows of this width work with on each device, beside the weights. `before`: places of the
  prefixes that they follow. Their keys and values are made for a wave of calls and held meanwhile; each call copies
  those of one layer for every `wide` rows."""
  layer = forward_bytes(c, tensor, itemsize, target)
  if not before:
    return rows * width * layer
  heads = c.kv_heads // tensor if c.kv_heads % tensor == 0 else c.kv_heads
  held, keys = buckets.held(rows, before) * before, 2 * heads * c.head_dim * itemsize
  return held * c.depth * keys + max(held * layer, rows * width * layer + rows // wide * before * keys)


def rows_that_fit(
  c: LlamaConfig, tensor: int, itemsize: int, rows: int, width: int, before: int, wide: int, free: int | None,
  target: str | None = None,
) -> int:  # fmt: skip
  """`rows` halved until `free` bytes hold what they take, down to the `wide` rows that share a prefix."""

  def takes(rows: int) -> int:
    return reading_bytes(c, tensor, itemsize, rows, width, before, wide, target)

  while free is not None and rows % (2 * wide) == 0 and takes(rows) > free:
    rows //= 2
  return rows


# What runs on devices: rows lead all arrays, but in keys and values the layers do

PREFIX = reading.Prefix(P(None, BATCH), REPLICA)
CONTINUED = dataclasses.replace(PREFIX, places=REPLICA)


@functools.partial(jax.jit, static_argnames="mesh")
def _prefixes(
  model: Llama, tokens: Array, lengths: Array, common: reading.Prefix | None, mesh: Mesh | None
) -> reading.Prefix:
  """The Prefix of right-padded rows; `common` is that of the one row which they all continue, or None."""

  def prefixes(model: Llama, tokens: Array, lengths: Array, common: reading.Prefix | None) -> reading.Prefix:
    kv = reading.keys_values(model, tokens, lengths, common)
    return reading.Prefix(kv, lengths if common is None else lengths + common.lengths)

  specs = WHOLE, REPLICA, REPLICA, common and PREFIX
  return per_replica(prefixes, mesh, specs, PREFIX)(model, tokens, lengths, common)


@functools.partial(jax.jit, static_argnames=("reads", "mesh"))
def _read(
  model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array, columns: Array, reads: int, mesh: Mesh | None
) -> Array:
  """fp32 [B, reads, columns]: log p of the columns after the last places of every row."""

  def read(model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array, columns: Array) -> Array:
    places = lengths[:, None] - reads + jnp.arange(reads)
    z = _exact_logits(model, reading.read(model, tokens, lengths, places, prefix))
    return z[..., columns] - jax.nn.logsumexp(z, axis=-1, keepdims=True)

  specs = WHOLE, CONTINUED, REPLICA, REPLICA, WHOLE
  return per_replica(read, mesh, specs, REPLICA)(model, prefix, tokens, lengths, columns)


@functools.partial(jax.jit, static_argnames="mesh")
def _last(model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array, mesh: Mesh | None) -> Array:
  """fp32 [B, D]: the hidden states at the last places of all rows."""

  def last(model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array) -> Array:
    return reading.read(model, tokens, lengths, lengths[:, None] - 1, prefix)[:, 0]

  return per_replica(last, mesh, (WHOLE, CONTINUED, REPLICA, REPLICA), REPLICA)(model, prefix, tokens, lengths)


def _exact_logits(model: Llama, hidden: Array) -> Array:
  """fp32 logits of fp32 hidden states, whatever dtype the weights have: what rounding to it leaves goes through the
  head as well. The head itself is never copied to fp32."""
  dtype = model.embed[...].dtype
  rounded = hidden.astype(dtype)
  if dtype == jnp.float32:
    return llama.logits(model, rounded)
  rest = (hidden - rounded.astype(jnp.float32)).astype(dtype)
  return llama.logits(model, jnp.stack([rounded, rest], axis=1)).sum(axis=1)


@functools.partial(jax.jit, static_argnames="mesh")
def _score(model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array, mesh: Mesh | None) -> Array:
  """fp32 [B, T]: log p of the token after every place; the last place of a row has no such token."""

  def score(model: Llama, prefix: reading.Prefix, tokens: Array, lengths: Array) -> Array:
    hidden, _ = reading.prefill(model, tokens, lengths, prefix)
    return crossentropy.token_logprobs(model, hidden, jnp.roll(tokens, -1, axis=1))

  return per_replica(score, mesh, (WHOLE, CONTINUED, REPLICA, REPLICA), REPLICA)(model, prefix, tokens, lengths)


# On the host


def _results(
  model: Llama, rows: Sequence[tuple[Ids, Ids]], program: Callable[..., Array], least: int, setup: Setup
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields (indices of equal rows, their result): row b of `program(prefix, tokens [B, T], lengths, mesh)`."""
  mesh = None if setup.mesh is None or setup.mesh.size == 1 else setup.mesh
  waiting = None
  for work in itertools.chain(_calls(model, rows, least, setup, mesh), [None]):
    # The devices run the next call while the host reads the last one.
    started = work and (work.rows, program(*work.arrays, mesh=mesh), work.tokens)
    del work  # a wave's prefixes go before the next wave's are computed
    if waiting:
      found, tokens = np.asarray(waiting[1]), waiting[2]
      members = [(b, row.indices) for b, row in enumerate(waiting[0]) if row]
      for b, indices in members:
        yield indices, found[b]
      if setup.progress:
        setup.progress(sum(len(indices) for _, indices in members), tokens)
    waiting = started


class _Work(NamedTuple):
  rows: list[buckets.Suffix | None]  # [B]
  arrays: tuple[reading.Prefix, np.ndarray, np.ndarray]  # those held and each tile's place, tokens [B, T], lengths [B]
  tokens: int  # that were computed since the last call


def _calls(
  model: Llama, rows: Sequence[tuple[Ids, Ids]], least: int, setup: Setup, mesh: Mesh | None
) -> Iterator[_Work]:
  """Yields the calls that score all rows, with keys and values of two kinds (see buckets.waves):

  shared   [1]    the opening's, once for all waves whose prefixes begin with it
  held     [P]    those of a wave's prefixes, the opening included; the n tiles of a call name their `places` there
  """
  ways, coarse = replicas(mesh), buckets.little(model.c.parameters, itertools.chain.from_iterable(rows))

  itemsize, tensor = model.embed[...].dtype.itemsize, 1 if mesh is None else mesh.shape["tensor"]

  def fitting(rows: int, width: int, before: int, wide: int) -> int:
    return rows_that_fit(model.c, tensor, itemsize, rows, width, before, wide, setup.free, platform(mesh))

  def width(rows: Sequence[Ids | None]) -> int:
    return (buckets.coarse if coarse else buckets.rounded)(max(len(row) for row in rows if row is not None))

  for opening, grouped in _grouped(rows, setup.common).items():
    shared, tokens = None, len(opening)
    if opening:
      shared = _prefixes(model, *buckets.padded([opening] * ways, len(opening)), None, mesh=mesh)
    for wave in buckets.waves(grouped, ways, setup.batch, len(opening), coarse, fitting):
      held = _prefixes(model, *buckets.padded(wave.prefixes, width(wave.prefixes)), shared, mesh=mesh)
      tokens += sum(len(prefix) for prefix in wave.prefixes if prefix)
      for call in wave.calls:
        suffixes = [row and row.ids for row in call.rows]
        arrays = buckets.padded(suffixes, width(suffixes), least)
        tokens += sum(len(suffix) for suffix in suffixes if suffix)
        yield _Work(call.rows, (dataclasses.replace(held, places=call.prefixes), *arrays), tokens)
        tokens = 0
      del held  # before the next wave's are computed


def _grouped(
  rows: Sequence[tuple[Ids, Ids]], common: Ids
) -> dict[tuple[int, ...], dict[tuple[int, ...], list[buckets.Suffix]]]:
  """Rows by prefix: {opening: {rest of the prefix: [Suffix]}}. The opening is `common` cut to a multiple of
  buckets.STEP, or () for prefixes that do not begin with it."""
  common = tuple(common[: len(common) // buckets.STEP * buckets.STEP])
  found = {}
  for i, (prefix, suffix) in enumerate(rows):
    opening = common if tuple(prefix[: len(common)]) == common else ()
    equal = found.setdefault(opening, {}).setdefault(tuple(prefix[len(opening) :]), {})
    equal.setdefault(tuple(suffix), []).append(i)
  return {
    opening: {rest: [buckets.Suffix(*item) for item in equal.items()] for rest, equal in prefixes.items()}
    for opening, prefixes in found.items()
  }
