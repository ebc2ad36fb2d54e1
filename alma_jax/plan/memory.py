"""Bytes on each device, without compiling: the engine's own bounds, and what XLA was seen to keep beside them.

  training_bytes(c, mesh, "tpu", optimizer, objective, places=40 * 2048, passes=1)
  reading_bytes(c, tensor=1, itemsize=2, rows=32, width=512, before=256)

The engine's `least_bytes` counts weights, moments and what layers keep. What comes on top was fitted to the compilers'
figures for Llama-3-8B (jax 0.10.2): tests/test_plan.py holds the table, which the estimates meet within 15 %.
"""

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from alma_jax.engine import buckets, train
from alma_jax.engine.crossentropy import TILE_BYTES
from alma_jax.engine.optimizer import Optimizer
from alma_jax.engine.train import Objective
from alma_jax.llama.config import LlamaConfig

SHARDED = 1.64  # times the weights that compute: their copy, and gradients that are not yet reduced
# bytes of each number of the embedding: gathered tables and their gradients
VOCABULARY = {"tpu": 3.1, "gpu": 7.2, "cpu": 7.2}
FP32 = 2.25  # times what "none" keeps, because XLA keeps much of it in fp32


def training_bytes(
  c: LlamaConfig, mesh: AbstractMesh, platform: str, o: Optimizer, objective: Objective, places: int, passes: int
) -> int:
  """What a step over `places` of rows in so many passes takes on each device at its peak."""
  itemsize, own = jnp.dtype(objective.compute_dtype).itemsize, places // passes // mesh.size
  tensor, ways = mesh.shape["tensor"], mesh.shape["fsdp"] * mesh.shape["tensor"]
  state = train.least_bytes(c, mesh, o, objective, 0)
  kept = train.least_bytes(c, mesh, o, objective, places // passes) - state
  layer = own * train.kept_numbers(c, "none") * itemsize  # made again for one layer at a time
  copies = SHARDED * itemsize * c.parameters / ways
  added = 4 * c.parameters / ways if passes > 1 else 0  # the sum of the passes' gradients
  tile = min(TILE_BYTES[platform], 2 * 4 * c.vocab * own)  # logits, and what follows from them
  vocabulary = VOCABULARY[platform] * c.vocab * c.width / tensor
  return int(state + kept * (FP32 if objective.remat == "none" else 1) + layer + copies + added + tile + vocabulary)


def scoring_bytes(c: LlamaConfig, mesh: AbstractMesh, platform: str, itemsize: int, places: int) -> int:
  """What log-probs of texts by the code that trains take: fp32 weights, the copy that computes, embedding and head in
  whole rows, the activations of a layer, and a tile of logits."""
  own, ways = places // mesh.size, mesh.shape["fsdp"] * mesh.shape["tensor"]
  tables = 2 * itemsize * c.vocab * c.width // mesh.shape["tensor"]
  layer = own * train.kept_numbers(c, "none") * itemsize
  return (4 + itemsize) * c.parameters // ways + tables + layer + min(TILE_BYTES[platform], 2 * 4 * c.vocab * own)


def reading_bytes(c: LlamaConfig, tensor: int, itemsize: int, rows: int, width: int, before: int = 0) -> int:
  """What forward passes over rows of this width work with on each device, beside the weights; `before`: places of the
  prefix that they follow, whose keys the engine holds for a wave of calls and copies for each of them."""
  heads = c.kv_heads // tensor if c.kv_heads % tensor == 0 else c.kv_heads
  held = rows * (max(buckets.ROOM, before) + before) if before else 0
  keys = 2 * c.depth * heads * c.head_dim * itemsize * held
  return rows * width * (4 * c.width + 3 * c.ffn // tensor) * itemsize + keys
