"""One token after another: a cache of keys and values, and the step that continues every slot by a token.

  cache = new_cache(model, slots=64, capacity=512)
  hidden, cache = decode(model, tokens, counts, cache, prefix, tiles)

Axes as in model.py; the model is in the unrolled layout.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from alma_jax.llama import attention
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Block, KeysValues, Llama
from alma_jax.llama.reading import Prefix
from alma_jax.llama.sharding import platform

Cache = tuple[KeysValues, ...]  # per layer, K and V buffers [slots, capacity, K / n, n H]: n heads side by side


def new_cache(model: Llama, slots: int, capacity: int, mesh: Mesh | AbstractMesh | None = None) -> Cache:
  """A cache of zeros: masked entries are multiplied, so they must never be NaN. `mesh`: where it will be, if known."""
  dtype = model.embed[...].dtype
  shape = (slots, capacity, *cache_heads(model.c, dtype, mesh))
  return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.c.depth))


def cache_heads(
  c: LlamaConfig, dtype: Any, mesh: Mesh | AbstractMesh | None = None, target: str | None = None
) -> tuple[int, int]:
  """The last two sizes of a cache on a mesh's devices, or on those of the platform `target`: the rows that heads lie in
  side by side, and the numbers of such a row."""
  ways = 1 if mesh is None or c.kv_heads % mesh.shape["tensor"] else mesh.shape["tensor"]
  n = attention.side_by_side(target or platform(mesh), dtype, c.kv_heads // ways, c.head_dim)
  return c.kv_heads // n, n * c.head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """The slots that read each prefix together, up to W of them, so that its keys are read once for them and where they
  lie. A prefix that more slots continue has several rows.

  Slots 0, 2 and 3 continue prefix p, slot 1 continues prefix q; W = 2, `-` is a place to spare:

    row   prefix   slots    live    results, rows x W      place of slots 0 1 2 3
     0      p       0 2      2            0 1                            0 4 1 2
     1      p       3 -      1            2 .
     2      q       1 -      1            4 .
  """

  slots: Array | np.ndarray  # [rows, W] the slots of each row; any slot in a place to spare
  live: Array | np.ndarray  # [rows] how many they are
  place: Array | np.ndarray  # [B] where slot b's result stands among the rows x W


def decode(
  model: Llama, tokens: Array, counts: Array, cache: Cache, prefix: Prefix, tiles: Tiles | None
) -> tuple[Array, Cache]:
  """Hidden states [B, D] after one step, and the updated cache. Unrolled layout.

  Token [B] takes place `counts` [B] of its slot's own cache and sees the slot's prefix before that. Without `tiles`
  slot b has prefix b.
  """
  c = model.c
  if tiles is None:
    before = lengths = prefix.lengths
  else:
    before = prefix.lengths[tiles.place // tiles.slots.shape[1]]
    lengths = jnp.where(tiles.live > 0, prefix.lengths, 0)
  cos_sin = llama.rope_angles(c, (before + counts)[:, None])

  def grouped(x: Array) -> Array:  # a slot per row -> a tile per row, [B, 1, ...] -> [rows, W, ...]
    return x if tiles is None else x[tiles.slots][:, :, 0]

  def single(x: Array) -> Array:  # and back
    return x if tiles is None else x.reshape(-1, 1, *x.shape[2:])[tiles.place]

  @jax.vmap  # slot by slot: indexed with [slots, counts], each device would ask all others for their slots' indices
  def put(buffer: Array, at: Array, new: Array) -> Array:
    return buffer.at[at].set(new)

  def layer(x: Array, block: Block, own: tuple[KeysValues, KeysValues]) -> tuple[Array, KeysValues]:
    (keys, values), (prefix_keys, prefix_values) = own

    def in_rows(x: Array) -> Array:  # [B, 1, K, H] as in the cache, [B, K / n, n H]
      return x[:, 0].reshape(-1, *keys.shape[2:])

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues]:
      if platform() == "tpu":  # both calls read it, and XLA would make it for each of them
        q = jax.lax.optimization_barrier(q)
      written = put(keys, counts, in_rows(k)), put(values, counts, in_rows(v))
      new = attention.over(q, *written, counts + 1)
      old = (attention.over if tiles is None else attention.over_tiles)(grouped(q), prefix_keys, prefix_values, lengths)
      return attention.merged(new, jax.tree.map(single, old))[0], written

    return llama.run_block(block, c, x, cos_sin, attend)

  own = tuple(zip(cache, prefix.kv, strict=True))
  x, cache = llama.run_layers(model, layer, llama.embedded(model, tokens[:, None]), own)
  return llama.rms_norm(x, model.norm, c.norm_eps)[:, 0], cache
