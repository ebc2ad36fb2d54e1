"""The shapes of a call of the sampler, and how many slots fit into memory.

  slots = slots_that_fit(model, decoding, Load(longest_prompt=512, samples_per_prompt=4), free=60 * 2**30)
  shapes = shapes_for(slots, room=512, samples_per_prompt=4)                    # the most that a call may take
  shapes = shapes_at_hand([16] * 12, samples=48, slots=slots, room=512, ways=1)   # what one takes

Shapes follow from few coarse classes, so that calls of one kind share their compiled programs.
"""

import dataclasses
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from alma_jax.engine import buckets
from alma_jax.engine.choose import Decoding, reads_once
from alma_jax.errors import UserError
from alma_jax.llama.attention import chosen
from alma_jax.llama.decoder import cache_heads
from alma_jax.llama.model import Llama
from alma_jax.llama.sharding import platform

TILE = 16  # slots of one prompt that read its keys together
PREFILL_ROWS = 8  # prompts prefilled per call; a single one goes alone
MOST_SLOTS = 512  # more do not decode faster: from a few hundred on, the matrix products are the limit


class SlotsError(UserError):
  """The devices have no room for what is asked; the message says what would fit."""


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The shapes of a call, per replica."""

  slots: int
  rows: int  # of the keys and values of prompts; a prompt has one row for each `tile` of its slots
  room: int  # tokens per row
  tile: int  # slots that read a row; 1: slot b reads row b


def shapes_for(slots: int, room: int, samples_per_prompt: float, prompts: int | None = None) -> Shapes:
  """Prompts linger until their longest sample ends, so more of them are held than slots / samples; `prompts`: how many
  there are. Rows are enough for any distribution of the slots over the prompts that are held."""
  if samples_per_prompt < 2:
    return Shapes(slots, slots, room, 1)
  share, tile = (1, 4) if samples_per_prompt < 5 else (4, TILE) if samples_per_prompt < 32 else (8, TILE)
  held = min(slots, max(8, slots // share), _power(prompts or slots))
  return Shapes(slots, held + slots // tile, room, tile)


def shapes_at_hand(prompts: Sequence[int], samples: int, slots: int, room: int, ways: int) -> Shapes:
  """The shapes for so many samples in all of distinct prompts of these lengths, on `ways` replicas: at most `slots` and
  `room`, and no more than the least powers of two that serve, so that few programs are compiled.

  Under 64 slots and 1,024 tokens, 12 prompts of 16 tokens have 16 slots and 16 tokens; 60 of 700 have what is allowed.
  """
  slots, room = min(slots, _power(-(-samples // ways))), min(room, buckets.rounded(_power(max(prompts))))
  return shapes_for(slots, room, samples / len(prompts), len(prompts))


def _power(count: int) -> int:
  """The least power of two that is not below the count."""
  return 1 << (max(1, count) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Load:
  """What a call is asked for, as far as its memory depends on it."""

  longest_prompt: int  # tokens
  samples_per_prompt: float


def slots_that_fit(
  model: Llama,
  decoding: Decoding,
  load: Load,
  free: int | None,
  mesh: Mesh | AbstractMesh | None = None,
  wanted: int = 0,
  target: str | None = None,
) -> int:
  """How many slots each replica has room for in `free` bytes per device, at most MOST_SLOTS; `wanted` if they fit. Of
  the model only shapes and dtypes count. `target`: the devices' platform, in JAX's words; None: that of JAX's default.

  Where the free memory is unknown (None: CPUs), the answer is `wanted`, or 64.
  """
  if free is None:
    return wanted or 64
  room = buckets.rounded(load.longest_prompt)

  def needed(slots: int) -> int:
    return bytes_of(model, decoding, shapes_for(slots, room, load.samples_per_prompt), mesh, target)

  if wanted and needed(wanted) <= free:
    return wanted
  fits = next((n for n in [*range(MOST_SLOTS, 0, -8), 4, 2, 1] if needed(n) <= free), 0)
  if fits and not wanted:
    return fits
  texts = f"prompts of {load.longest_prompt} and answers of {decoding.max_new_tokens} tokens"
  if fits:
    raise SlotsError(
      f"engine.slots is {wanted}: with {texts} they need {_gib(needed(wanted))} on each device, and {_gib(free)} are"
      f" free beside the weights. {fits} would fit; 0 takes as many as fit"
    )
  most = decoding.max_new_tokens + room + (free - needed(1)) // token_bytes(model, mesh)
  raise SlotsError(
    f"not one sequence fits: {texts} need {_gib(needed(1))} on each device, and {_gib(free)} are free beside the"
    f" weights. About {max(0, most):,} tokens in all would fit: lower max_prompt_tokens or max_new_tokens, or raise"
    " engine.tensor (devices that share one copy of the model)"
  )


def _gib(size: int) -> str:
  return f"{size / 2**30:.1f} GiB"


def bytes_of(
  model: Llama, decoding: Decoding, shapes: Shapes, mesh: Mesh | AbstractMesh | None, target: str | None = None
) -> int:
  """What a call holds on each device beside the weights, and what it works with. TPUs lay out anew, for a segment, the
  weights of queries, keys and values, and the prompts' keys where their attention is plain XLA's. GPUs in tensor groups
  exchange numbers while they compute, for which the compiler puts off writing the keys of a prefill, of all layers."""
  c, itemsize = model.c, model.embed.get_value().dtype.itemsize
  ways = 1 if mesh is None else mesh.shape["tensor"]
  cached = token_bytes(model, mesh) * (shapes.slots * decoding.max_new_tokens + shapes.rows * shapes.room)
  logits = 4 * c.vocab // (ways if c.vocab % ways == 0 else 1)
  prefill = PREFILL_ROWS * shapes.room * (4 * c.width + 3 * c.ffn // ways) * itemsize
  target = target or platform()
  if target == "gpu" and ways > 1:
    prefill += PREFILL_ROWS * shapes.room * token_bytes(model, mesh)
  working, turned = max(prefill, 3 * logits * shapes.slots), 0
  if target == "tpu":
    share = ways if c.kv_heads % ways == 0 else 1
    turned = c.depth * c.width * (2 * c.kv_heads + c.heads) // share * c.head_dim * itemsize
    if not reads_what_is_live(model, shapes.tile, shapes.room, mesh, "tpu"):
      turned += shapes.rows * shapes.room * token_bytes(model, mesh)
    if not reads_once(decoding, c.vocab, "tpu"):
      working = max(prefill, 5 * logits * shapes.slots)  # top-p in plain XLA works with more copies there
  return cached + logits * (shapes.slots + shapes.rows) + working + turned


def reads_what_is_live(model: Llama, T: int, S: int, mesh: Mesh | AbstractMesh | None, target: str) -> bool:
  """Whether attention over rows of S keys, T queries in each, has a kernel that skips the places without a token."""
  c, ways = model.c, 1 if mesh is None else mesh.shape["tensor"]
  share, dtype = ways if c.kv_heads % ways == 0 else 1, model.embed.get_value().dtype
  rows, wide = cache_heads(c, dtype, mesh, target)
  q, k = (1, T, c.heads // share, c.head_dim), (1, S, rows // share, wide)
  return chosen("over", target, dtype, q, k) in ("decode_tpu", "nvidia")


def token_bytes(model: Llama, mesh: Mesh | AbstractMesh | None) -> int:
  """Keys and values of one token in all layers, on each device."""
  c, ways = model.c, 1 if mesh is None else mesh.shape["tensor"]
  heads = c.kv_heads // ways if c.kv_heads % ways == 0 else c.kv_heads
  return 2 * c.depth * heads * c.head_dim * model.embed.get_value().dtype.itemsize
