"""Embeddings of prompts: the base model's hidden states, averaged over the prompt's tokens without BOS, or the last.

  states = embeddings(model, rows, batch)                                     # fp32 [rows, D]
  p, kept = projection(states_of_a_sample, dims=1024)                         # kept: the share of the variance
  points = embeddings(model, rows, batch, kind=Embedding(projection=p))       # [rows, dims] of length 1

BOS is left out because Llama parks huge activations on the first token, which would own every distance. Hidden states
have a large common mean and few loud dimensions: a projection centres, scales and, where there are more dimensions than
asked for, keeps the principal ones. It runs on the device, so that nothing as wide as the model is stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alma_jax.engine import buckets
from alma_jax.errors import NotFinite
from alma_jax.llama import model as llama
from alma_jax.llama.model import Llama
from alma_jax.llama.sharding import REPLICA, WHOLE, per_replica, replicas


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
  """x -> (x - mean) @ matrix, made of length 1; fp32 [D] and [D, dims]."""

  mean: np.ndarray
  matrix: np.ndarray


@dataclasses.dataclass(frozen=True)
class Embedding:
  """How a row becomes a vector."""

  layers: int | None = None  # the states after so many; None: after all
  pooling: str = "mean"  # "last": the last token's state
  projection: Projection | None = None


STATES = Embedding()


@functools.partial(jax.jit, static_argnames=("mesh", "layers", "pooling"))
def _pooled(
  model: Llama, projection: Projection | None, tokens: Array, lengths: Array, mesh: Mesh | None,
  layers: int | None, pooling: str,
) -> Array:  # fmt: skip
  """fp32 [B, D or dims] of tokens [B, T]."""

  def pooled(model: Llama, projection: Projection | None, tokens: Array, lengths: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inside = positions < lengths[:, None]
    model, segments = llama.first_layers(model, layers), inside.astype(jnp.int32)
    hidden = llama.hidden_states(model, tokens, positions, segments, training=llama.TrainingPass(few=llama.PADDED))
    hidden = hidden.astype(jnp.float32)
    counted = inside & (positions > 0 if pooling == "mean" else positions == lengths[:, None] - 1)
    x = jnp.where(counted[..., None], hidden, 0.0).sum(axis=1) / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
    if projection is None:
      return x
    x = jnp.matmul(x - projection.mean, projection.matrix, precision="highest")
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

  specs = WHOLE, WHOLE, REPLICA, REPLICA
  return per_replica(pooled, mesh, specs, REPLICA)(model, projection, tokens, lengths)


def embeddings(
  model: Llama, rows: Sequence[Sequence[int]], batch: int, mesh: Mesh | None = None,
  progress: Callable[[int], object] | None = None, kind: Embedding = STATES, fit: bool = False,
) -> np.ndarray:  # fmt: skip
  """fp32 [rows, D], or [rows, dims] with a projection, of rows of token ids that begin with BOS, in their order.

  They run in length buckets of up to `batch` rows for each replica of the model; `progress(rows)` hears what is done.
  `fit`: a few rows come in sizes that fit them, which depend on the number of devices (see buckets.batches).
  NotFinite, with the row's index, if a number of an embedding is not finite.
  """
  width = model.c.width if kind.projection is None else kind.projection.matrix.shape[1]
  out = np.zeros((len(rows), width), np.float32)

  def put(indices: list[int], found: Array) -> None:
    out[indices] = np.asarray(found)[: len(indices)]
    wrong = np.flatnonzero(~np.isfinite(out[indices]).all(axis=1))
    if len(wrong):
      raise NotFinite(indices[wrong[0]], "its embedding is not finite")
    if progress:
      progress(len(indices))

  waiting, width_of = None, buckets.coarse if buckets.little(model.c.parameters, rows) else buckets.rounded
  for take, tokens, lengths in buckets.batches(rows, batch * replicas(mesh), replicas(mesh), fit=fit, width=width_of):
    how = dict(mesh=mesh, layers=kind.layers, pooling=kind.pooling)
    found = _pooled(model, kind.projection, tokens, lengths, **how)
    if waiting:  # the device works on the next batch meanwhile
      put(*waiting)
    waiting = take, found
  if waiting:
    put(*waiting)
  return out


def layout(mesh: Mesh) -> str:
  """The layout of the model that is quicker on these devices: on CPUs a scan copies every layer's weights for every
  batch; elsewhere it compiles sooner."""
  return "unrolled" if mesh.devices.flat[0].platform == "cpu" else "stacked"


def floored(deviation: np.ndarray) -> np.ndarray:
  """Deviations with a floor, so that dead dimensions stay small where they are divided by theirs."""
  return np.maximum(deviation, 1e-3 * np.median(deviation) + 1e-12)


def projection(x: np.ndarray, dims: int) -> tuple[Projection, float]:
  """The Projection that fits these states [n, D], and the share of the scaled variance that it keeps."""
  x = np.asarray(x, np.float64)
  mean, deviation = x.mean(axis=0), x.std(axis=0)
  scale = 1 / floored(deviation)
  matrix, kept = np.diag(scale), 1.0
  if dims < x.shape[1]:
    x = (x - mean) * scale
    variance, axes = np.linalg.eigh(x.T @ x / len(x))
    axes = axes[:, ::-1][:, :dims]  # the largest variance first
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dims)])  # eigenvectors have no sign of their own
    matrix, kept = scale[:, None] * axes, float(variance[::-1][:dims].sum() / max(variance.sum(), 1e-300))
  return Projection(mean.astype(np.float32), matrix.astype(np.float32)), kept


class SomeRows(Protocol):
  """An array [rows, dimensions], in memory or on disk."""

  @property
  def shape(self) -> Any: ...

  @property
  def dtype(self) -> Any: ...

  def __len__(self) -> int: ...

  def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of several arrays as if they were one: `shape`, `dtype`, and `[a:b]`, which alone reads anything."""

  arrays: tuple[SomeRows, ...]
  whitening: np.ndarray | None = None  # [2, dimensions]: rows are centred by the first and divided by the second
  unit: bool = False  # rows have length 1

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """Where each array ends; there may be thousands."""
    return np.cumsum([len(array) for array in self.arrays])

  def __len__(self) -> int:
    return int(self.ends[-1])

  @property
  def shape(self) -> tuple[int, int]:
    return len(self), self.arrays[0].shape[1]

  @functools.cached_property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float16 if self.halves and not self.unit else np.float32)

  @functools.cached_property
  def halves(self) -> bool:
    """Whether the arrays have 16 bits."""
    return all(array.dtype == np.float16 for array in self.arrays)

  def __getitem__(self, rows: slice) -> np.ndarray:
    begin, end, _ = rows.indices(len(self))
    first, last = np.searchsorted(self.ends, (begin, end), side="right")
    found = [np.empty((0, self.shape[1]), self.dtype)]
    for array, at in zip(self.arrays[first : last + 1], self.ends[first : last + 1], strict=True):
      found.append(array[max(0, begin - at + len(array)) : max(0, end - at + len(array))])
    x = np.concatenate(found, dtype=self.dtype, casting="same_kind")
    if self.whitening is not None:
      x = (x - self.whitening[0]) / self.whitening[1]
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12)) if self.unit else x
