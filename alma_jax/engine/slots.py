"""The shapes of a call of the sampler, and how many slots fit into memory.

  slots = slots_that_fit(model, decoding, Load(longest_prompt=512, samples_per_prompt=4), free=60 * 2**30)
  shapes = shapes_for(slots, room=512, samples_per_prompt=4)

Shapes follow from few coarse classes, so that calls of one kind share their compiled programs.
"""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from alma_jax.engine import buckets
from alma_jax.engine.choose import Decoding
from alma_jax.errors import UserError
from alma_jax.llama.model import Llama

TILE = 16  # slots of one prompt that read its keys together
PREFILL_ROWS = 8  # prompts prefilled per call; a single one goes alone
MOST_SLOTS = 512  # more do not decode faster: from a few hundred on, the matrix products are the limit


class SlotsError(UserError):
  """The devices have no room for what is asked; the message says what would fit."""


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The shapes of a call, per replica."""

  slots: int
  rows: int  # prompts whose keys and values are held
  room: int  # tokens per prompt
  tile: int  # slots per tile; 1: slot b has row b

  @property
  def tiles(self) -> int:
    """Enough for any distribution of the slots over the rows."""
    return self.rows + self.slots // self.tile


def shapes_for(slots: int, room: int, samples_per_prompt: float) -> Shapes:
  """Prompts linger until their longest sample ends, so more rows are held than slots / samples."""
  if samples_per_prompt < 2:
    return Shapes(slots, slots, room, 1)
  share, tile = (1, 4) if samples_per_prompt < 5 else (4, TILE) if samples_per_prompt < 32 else (8, TILE)
  return Shapes(slots, min(slots, max(8, slots // share)), room, tile)


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
) -> int:
  """How many slots each replica has room for in `free` bytes per device, at most MOST_SLOTS; `wanted` if they fit. Of
  the model only shapes and dtypes count.

  Where the free memory is unknown (None: CPUs), the answer is `wanted`, or 64.
  """
  if free is None:
    return wanted or 64
  room = buckets.rounded(load.longest_prompt)

  def needed(slots: int) -> int:
    return bytes_of(model, decoding, shapes_for(slots, room, load.samples_per_prompt), mesh)

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


def bytes_of(model: Llama, decoding: Decoding, shapes: Shapes, mesh: Mesh | AbstractMesh | None) -> int:
  """What a call holds on each device beside the weights, and what it works with. The gathered prefixes of all layers
  are there at once, because compilers make one program of the layers; TPUs lay out a quarter of them anew."""
  c, itemsize = model.c, model.embed.get_value().dtype.itemsize
  ways = 1 if mesh is None else mesh.shape["tensor"]
  cached = token_bytes(model, mesh) * (shapes.slots * decoding.max_new_tokens + shapes.rows * shapes.room)
  logits = 4 * c.vocab // (ways if c.vocab % ways == 0 else 1) * (4 * shapes.slots + shapes.rows)
  prefill = PREFILL_ROWS * shapes.room * (4 * c.width + 3 * c.ffn // ways) * itemsize
  tiles = (0 if shapes.tile == 1 else shapes.tiles) * shapes.room * token_bytes(model, mesh) * 5 // 4
  return cached + logits + max(prefill, tiles)


def token_bytes(model: Llama, mesh: Mesh | AbstractMesh | None) -> int:
  """Keys and values of one token in all layers, on each device."""
  c, ways = model.c, 1 if mesh is None else mesh.shape["tensor"]
  heads = c.kv_heads // ways if c.kv_heads % ways == 0 else c.kv_heads
  return 2 * c.depth * heads * c.head_dim * model.embed.get_value().dtype.itemsize
