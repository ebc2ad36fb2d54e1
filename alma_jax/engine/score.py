"""Scoring: log-probabilities of what may follow a text and of what did follow it, without generating anything.

A row is (prefix, suffix), two tuples of token ids. Rows of one prefix share its keys and values, which are computed
once, and equal rows are scored once. The model is in the stacked layout.

  logprobs = next_logprobs(model, rows, columns, reads=1, batch=32)  # a judge: of some tokens after every suffix
  logprobs = token_logprobs(model, rows, batch=32)                   # a reference: of every token of the suffixes

What to expect: what a row is scored with does not change its numbers (in fp32 up to 1e-6). `batch` rows run at a time,
and at most batch * buckets.ROOM tokens of prefixes are held as keys and values. Under a mesh every group of `tensor`
devices is a replica that runs `batch` rows of its own and holds their prefixes; replicas exchange nothing.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets, crossentropy
from alma_jax.llama import model as llama
from alma_jax.llama.sharding import BATCH, WHOLE, per_replica, replicas
from alma_jax.llama.sharding import REPLICA as ROWS


def next_logprobs(model, rows, columns, reads, batch, common=(), mesh=None, progress=None):
  """fp32 [rows, reads, columns]: log p(token) for the given token ids after each of the last `reads` tokens of every
  suffix, which are at least as many.

  `common`: ids that most prefixes begin with; they are computed once for all. `progress(rows, tokens)` hears what is
  done: the rows, equal ones included, and the tokens that were computed for them.
  """
  short = next((i for i, (_, suffix) in enumerate(rows) if len(suffix) < reads), None)
  if short is not None:
    raise ValueError(f"row {short}: {reads} places are to be read of a suffix of {len(rows[short][1])}")
  columns = np.asarray(columns, np.int32)
  out = np.zeros((len(rows), reads, len(columns)), np.float32)
  run = lambda *arrays, mesh: _read(model, *arrays, columns, reads=reads, mesh=mesh)
  for indices, found in _results(model, rows, run, batch, reads, common, mesh, progress):
    out[indices] = found
  return out


def token_logprobs(model, rows, batch, common=(), mesh=None, progress=None):
  """A list of fp32 arrays: log p of every token of each row's suffix. No prefix is empty: it begins with BOS."""
  # The last token of the prefix is where the first one of the suffix is read.
  rows = [(tuple(prefix[:-1]), (*prefix[-1:], *suffix)) for prefix, suffix in rows]
  out = [None] * len(rows)
  for indices, found in _results(model, rows, functools.partial(_score, model), batch, 1, common, mesh, progress):
    for i in indices:
      out[i] = found[: len(rows[i][1]) - 1]
  return out


def sequence_logprobs(model, rows, batch, common=(), mesh=None, progress=None):
  """float64 [rows]: log p of each row's suffix after its prefix."""
  return np.array([x.sum(dtype=np.float64) for x in token_logprobs(model, rows, batch, common, mesh, progress)])


# What runs on devices: rows lead all arrays, but in keys and values the layers do

PREFIX = llama.Prefix(P(None, BATCH), ROWS)


@functools.partial(jax.jit, static_argnames="mesh")
def _prefixes(model, tokens, lengths, common, mesh):
  """The Prefix of right-padded rows; `common` is that of the one row which they all continue, or None."""

  def prefixes(model, tokens, lengths, common):
    kv = llama.keys_values(model, tokens, lengths, common)
    if common is None:
      return llama.Prefix(kv, lengths)

    def joined(first, rest):  # all places of `first` are real, so there is no gap
      return jnp.concatenate([jnp.broadcast_to(first, (*rest.shape[:2], *first.shape[2:])), rest], axis=2)

    return llama.Prefix(jax.tree.map(joined, common.kv, kv), lengths + common.lengths)

  specs = WHOLE, ROWS, ROWS, common and PREFIX
  return per_replica(prefixes, mesh, specs, PREFIX)(model, tokens, lengths, common)


@functools.partial(jax.jit, static_argnames="mesh")
def _chosen(prefix, places, mesh):
  """The Prefix of the rows at these places."""

  def chosen(prefix, places):
    return llama.Prefix(jax.tree.map(lambda x: x[:, places], prefix.kv), prefix.lengths[places])

  return per_replica(chosen, mesh, (PREFIX, ROWS), PREFIX)(prefix, places)


@functools.partial(jax.jit, static_argnames=("reads", "mesh"))
def _read(model, prefix, tokens, lengths, columns, reads, mesh):
  def read(model, prefix, tokens, lengths, columns):
    places = lengths[:, None] - reads + jnp.arange(reads)
    z = _exact_logits(model, llama.read(model, tokens, lengths, places, prefix))
    return z[..., columns] - jax.nn.logsumexp(z, axis=-1, keepdims=True)

  specs = WHOLE, PREFIX, ROWS, ROWS, WHOLE
  return per_replica(read, mesh, specs, ROWS)(model, prefix, tokens, lengths, columns)


def _exact_logits(model, hidden):
  """fp32 logits of fp32 hidden states, whatever the weights are: what rounding to their dtype leaves goes through the
  head as well. The head itself is never copied to fp32."""
  dtype = model.embed[...].dtype
  rounded = hidden.astype(dtype)
  if dtype == jnp.float32:
    return llama.logits(model, rounded)
  rest = (hidden - rounded.astype(jnp.float32)).astype(dtype)
  return llama.logits(model, jnp.stack([rounded, rest], axis=1)).sum(axis=1)


@functools.partial(jax.jit, static_argnames="mesh")
def _score(model, prefix, tokens, lengths, mesh):
  def score(model, prefix, tokens, lengths):
    hidden, _ = llama.prefill(model, tokens, lengths, prefix)
    return crossentropy.token_logprobs(model, hidden, jnp.roll(tokens, -1, axis=1))

  return per_replica(score, mesh, (WHOLE, PREFIX, ROWS, ROWS), ROWS)(model, prefix, tokens, lengths)


# On the host


def _results(model, rows, run, batch, least, common, mesh, progress):
  """Yields (indices of equal rows, their result): row b of what `run(prefix, tokens [B, T], lengths, mesh)` gives."""
  mesh = None if mesh is None or mesh.size == 1 else mesh
  calls = _calls(model, rows, batch, least, common, mesh)
  started = ((call, run(*arrays, mesh=mesh), tokens) for call, arrays, tokens in calls)
  # The devices run the next call while the host reads the last one.
  for (call, found, tokens), _ in itertools.pairwise(itertools.chain(started, [None])):
    found = np.asarray(found)
    members = [(b, row.indices) for b, row in enumerate(call.rows) if row]
    for b, indices in members:
      yield indices, found[b]
    if progress:
      progress(sum(len(indices) for _, indices in members), tokens)


def _calls(model, rows, batch, least, common, mesh):
  """Yields (Call, the arrays it runs on, how many tokens were computed since the last one)."""
  ways = replicas(mesh)
  for opening, grouped in _grouped(rows, common).items():
    shared, tokens = None, len(opening)
    if opening:
      shared = _prefixes(model, *buckets.padded([opening] * ways, len(opening)), None, mesh=mesh)
    for wave in buckets.waves(grouped, ways, batch, len(opening)):
      held = _prefixes(model, *buckets.padded(wave.prefixes, _width(wave.prefixes)), shared, mesh=mesh)
      tokens += sum(len(prefix) for prefix in wave.prefixes if prefix)
      for call in wave.calls:
        suffixes = [row and row.suffix for row in call.rows]
        arrays = buckets.padded(suffixes, _width(suffixes), least)
        tokens += sum(len(suffix) for suffix in suffixes if suffix)
        yield call, (_chosen(held, call.prefixes, mesh=mesh), *arrays), tokens
        tokens = 0
      del held  # before the next wave's are computed


def _width(rows):
  return buckets.rounded(max(len(row) for row in rows if row is not None))


def _grouped(rows, common):
  """{what prefixes begin with: {the rest of a prefix: Rows}}: of `common` a whole number of steps, or nothing."""
  common = tuple(common[: len(common) // buckets.STEP * buckets.STEP])
  found = {}
  for i, (prefix, suffix) in enumerate(rows):
    opening = common if tuple(prefix[: len(common)]) == common else ()
    equal = found.setdefault(opening, {}).setdefault(tuple(prefix[len(opening) :]), {})
    equal.setdefault(tuple(suffix), []).append(i)
  return {
    opening: {rest: [buckets.Row(*item) for item in equal.items()] for rest, equal in prefixes.items()}
    for opening, prefixes in found.items()
  }
