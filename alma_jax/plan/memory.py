"""Bytes on each device, without compiling: what lies there at the fullest moments of a program.

  training_bytes(c, mesh, "tpu", optimizer, objective, places=40 * 2048, passes=1)

A step is fullest at one of two moments. What they hold beside weights and moments, with i bytes a number:

  the loss       the copy that computes, what the layers keep, the head in whole (i V D), its gradient in fp32 (4 V D),
                 a tile of logits
  a layer, back  the copy and its gradients, what the layers keep, what is made again inside one layer (with all kept:
                 its gradients alone), and its weights in whole. On GPUs that is those at work, the next ones, and their
                 gradient, and what cuDNN's attention takes to work with. On TPUs weights come in shares but for two of
                 the feed-forward ones, and the head's fp32 gradient waits for the layers before it is reduced, with a
                 tied table beside it

`python -m benchmarks.compiled --against-quick` compares them with the compilers' figures: docs/speed.md has its table.
"""

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from alma_jax.engine import crossentropy, train
from alma_jax.engine.losses import Preference
from alma_jax.engine.optimizer import Optimizer
from alma_jax.engine.score import forward_bytes
from alma_jax.engine.train import Objective
from alma_jax.llama.attention_reference import WORKSPACE, few_runs, packed_workspace
from alma_jax.llama.config import LlamaConfig

RUNS = few_runs(2048)  # of one segment in a row
FORKED = 6  # times q that a GPU's attention over rows of pairs has beside, in the two orders and in pieces
WHOLE = 3  # times a layer's weights that are there in whole where fsdp spreads them, on GPUs
GATHERED = 2  # of its feed-forward weights on TPUs


def training_bytes(
  c: LlamaConfig, mesh: AbstractMesh, platform: str, o: Optimizer, objective: Objective, places: int, passes: int
) -> int:
  """What a step over `places` of rows in so many passes takes on each device at its peak."""
  i, tensor, fsdp = jnp.dtype(objective.compute_dtype).itemsize, mesh.shape["tensor"], mesh.shape["fsdp"]
  ways, own = fsdp * tensor, places // passes // (mesh.shape["data"] * fsdp)
  state = train.least_bytes(c, mesh, o, objective, 0)
  state += 4 * c.parameters // ways if passes > 1 else 0  # the sum of the passes' gradients
  state += i * c.parameters // ways + i * own * c.width if objective.compares else 0  # the reference, and its states
  copy = i * c.parameters // ways if i < 4 else 0
  attention = platform, isinstance(objective.kind, Preference)
  kept = own * c.depth * layer_bytes(c, objective.remat, i, tensor, *attention)
  table = c.vocab * c.width // tensor
  loss = 4 * table + (i * table if fsdp > 1 else 0) + logits_bytes(c, tensor, platform, own, i)
  # With all kept, nothing of a layer is made again: there are the gradients of gate, up and stream.
  if objective.remat == "none":
    inside = (2 * c.width + 2 * c.ffn // tensor) * i
  else:
    inside = inside_bytes(c, i, tensor, *attention, mesh.size)
  layer = own * inside
  whole = WHOLE * i * layer_weights(c) // tensor if fsdp > 1 else 0
  if platform == "tpu":
    whole = GATHERED * i * c.width * c.ffn // tensor if fsdp > 1 else 0
    layer += (4 + (i if c.tied else 0)) * table
  if platform == "gpu":
    heads, both = c.heads // tensor, isinstance(objective.kind, Preference)
    whole_batch, out = packed_workspace(RUNS, own, heads, c.head_dim), i * own * heads * c.head_dim
    layer += min(int(WORKSPACE), whole_batch) + (FORKED * out if both else 0)
    if whole_batch > WORKSPACE and objective.remat == "none":  # what is computed in pieces is kept twice
      kept += c.depth * (1 + both) * out
  return int(state + copy + kept + max(loss, i * c.parameters // ways + layer + whole))


def layer_bytes(c: LlamaConfig, remat: str, i: int, tensor: int, platform: str = "tpu", forked: bool = False) -> int:
  """What a layer keeps of each place for the backward pass. `tensor` divides heads and feed-forward numbers, but not
  the stream. `forked`: rows of pairs, over which attention runs twice.

    full       the layer's input
    products   that, q, k, v, gate, up, and the stream between attention and the feed-forward part
    none       of both norms the input and the normalised numbers in fp32, and the result; what attention keeps; gate,
               its sigmoid and that from 1, silu, up, and their product

  Attention keeps q, k, v and out in its kernel's layout, and out once more where layouts differ or two outs are joined.
  On GPUs k and v have all heads, and statistics stand for each run that a row may have.
  """
  D, Q, K, F = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.ffn
  if remat == "full":
    return D * i
  if remat == "products":
    return 2 * D * i + (Q + 2 * K + 2 * F) * i // tensor
  attention = (4 * Q * i + 4 * RUNS * c.heads) if platform == "gpu" else (2 * Q + 2 * K) * i
  attention = (2 if forked else 1) * attention + (Q * i if forked or platform != "gpu" else 0)
  return 2 * D * (8 + i) + (attention + 6 * F * i) // tensor


def inside_bytes(c: LlamaConfig, i: int, tensor: int, platform: str, forked: bool, devices: int) -> int:
  """What is there of each place while one layer goes backward, which is less than the layer would keep: norms are made
  anew where they are used. Four times the stream (the layer's input, its gradient, and both after attention); gate, up,
  and the gradients of both, on GPUs that exchange weights their product, too; and what attention has. On GPUs a second
  attention follows the first; on TPUs it has queries, keys and values of its own, and three outs are joined."""
  Q, K = c.heads * c.head_dim, c.kv_heads * c.head_dim
  if platform == "gpu":
    return 4 * c.width * i + ((4 * Q + (4 + (devices > 1)) * c.ffn) * i + 4 * RUNS * c.heads) // tensor
  attention = (7 * Q + 4 * K) if forked else 2 * Q + 2 * K
  return 4 * c.width * i + (4 * c.ffn + attention) * i // tensor


def layer_weights(c: LlamaConfig) -> int:
  """The numbers of a layer's weights."""
  return (c.parameters - c.vocab * c.width * (1 if c.tied else 2)) // c.depth


def logits_bytes(c: LlamaConfig, tensor: int, platform: str, places: int, i: int = 0) -> int:
  """A tile of fp32 logits; on GPUs, whose products read their operands from memory, its gradient of i bytes beside."""
  vocab = c.vocab // tensor
  beside = i if platform == "gpu" else 0
  return (4 + beside) * vocab * (crossentropy.tile_of(places, vocab, platform) or places)


def scoring_bytes(c: LlamaConfig, mesh: AbstractMesh, platform: str, i: int, places: int) -> int:
  """What log-probs of texts by the code that trains take: fp32 weights, the copy that computes, and either the head in
  whole with a tile of logits or a layer's numbers with its weights in whole."""
  tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
  own, ways = places // (mesh.shape["data"] * fsdp), fsdp * tensor
  head = i * c.vocab * c.width // tensor if fsdp > 1 else 0
  layer = forward_bytes(c, tensor, i, platform) * own + (2 * i * layer_weights(c) // tensor if fsdp > 1 else 0)
  loss = head + logits_bytes(c, tensor, platform, own) + own * c.width * i
  return (4 + (i if i < 4 else 0)) * c.parameters // ways + max(loss, layer)
