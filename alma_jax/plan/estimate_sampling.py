"""Time and memory of sampling, by roofline: what a step of decoding reads, chooses and exchanges.

  step = sampling(machine, work)
  decoding_bytes(machine, work, shapes, new=350)      # from and to a device's memory, for one token of all slots

Slots and shapes are those of the engine's own planner.
"""

from alma_jax.engine import buckets
from alma_jax.engine.choose import Decoding, reads_once
from alma_jax.engine.slots import (
  Load,
  Shapes,
  SlotsError,
  bytes_of,
  reads_what_is_live,
  shapes_for,
  slots_that_fit,
  token_bytes,
)
from alma_jax.llama import decoder
from alma_jax.llama.attention_decode_tpu import block
from alma_jax.plan import assumptions as shares
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.work import Sampling
from alma_jax.runtime import room
from alma_jax.runtime.host import sampling_bytes

NEAR = 0.9  # of a slot's mean length is what its token at work has behind it: lognormal lengths
SCORES = 4  # times fp32 attention scores do, where they are not kept on the chip
# How many times fp32 logits go through memory in plain XLA, the head's writing included, and what top-k and top-p add:
# `traffic.moved` of a loop of the head and `choose`, compiled for 256 slots and 128,256 tokens (jax 0.10.2)
CHOOSING = {
  "gpu": {"greedy": 4.1, "temperature": 4.1, "top_k": 12.6, "top_p": 15.8},
  "tpu": {"greedy": 7.0, "temperature": 8.1, "top_k": 14.0, "top_p": 17.8},
  "cpu": {"greedy": 7.1, "temperature": 11.2, "top_k": 93.9, "top_p": 103.5},
}
CHOOSING_ONCE = 2, 4  # where a kernel reads them once; a tensor group exchanges them first, written and read
ACTIVATIONS = 44, 2  # times all heads' queries of a layer do and the feed-forward's inner numbers do, on TPUs
RULES = 4  # more: ruled logits are written for the kernel and read, and the others read for the log-probability


def sampling(machine: Machine, work: Sampling) -> Step:
  chip, o = machine.topology.chip, work.options
  load, mesh = Load(o.max_prompt_tokens, work.samples_per_prompt), machine.local_mesh
  # A CPU does not tell what is free, so that there the engine takes 64 slots or what the config says.
  given = None if machine.platform == "cpu" else sampling_bytes(chip.memory) - machine.held
  try:
    slots = slots_that_fit(machine.shape, o.decoding, load, given, mesh, machine.engine.slots, machine.platform)
  except SlotsError:
    slots = 0
  shapes = shapes_of(machine, work, max(1, slots))
  peak = machine.held + bytes_of(machine.shape, o.decoding, shapes, mesh, machine.platform)
  if not slots:
    return Step(work, fits=False, peak=peak, usable=sampling_bytes(chip.memory), slots=0, disk=work.disk)
  slots, new = shapes.slots, work.tokens / max(1, work.rows)
  traffic = decoding_bytes(machine, work, shapes, new)
  flops = 2 * (machine.layers + machine.head) * slots / machine.tensor
  sent, link = shared(machine, slots, logits=True), group_link(machine)
  seconds = max(traffic / (chip.bandwidth * shares.DECODING[0]), flops / (machine.peak * shares.PRODUCTS[0]))
  seconds += sent / link
  decode = work.tokens / (slots * machine.replicas * shares.SLOTS[0]) * seconds
  tokens = work.prompts * work.prompt_tokens
  prefill = forward(machine, tokens, work.prompt_tokens)
  rate = machine.peak * machine.topology.devices * shares.PRODUCTS[0]
  filling = prefill / rate + shared(machine, tokens / machine.replicas) / link
  return Step(
    work,
    fits=peak <= sampling_bytes(chip.memory),
    peak=peak,
    usable=sampling_bytes(chip.memory),
    slots=slots,
    flops=prefill + 2 * (machine.layers + machine.head) * work.tokens,
    traffic=traffic,
    collective=sent,
    seconds=seconds,
    hours=(decode + filling) / 3600,
    host=room.model_bytes(machine.c, machine.model.save_dtype),
    disk=work.disk,
  )


def shapes_of(machine: Machine, work: Sampling, slots: int) -> Shapes:
  """The shapes of a call on each replica, where so many slots fit: no more than its requests, unless the config names
  how many, and room for the longest prompt."""
  of_call, prompts = -(-work.rows // work.calls), -(-work.prompts // work.calls)
  if not machine.engine.slots:
    own = -(-of_call // (machine.topology.local // machine.tensor))
    slots = min(slots, 1 << (max(1, own) - 1).bit_length())
  return shapes_for(slots, buckets.rounded(work.options.max_prompt_tokens), work.samples_per_prompt, prompts)


def decoding_bytes(machine: Machine, work: Sampling, shapes: Shapes, new: float) -> float:
  """The bytes that one token of all slots takes from and to a device's memory, as the programs are today: kernels read
  the places that hold a token, on TPUs in blocks; plain XLA reads every place of a slot and of a prefix."""
  c, o, tensor = machine.c, work.options, machine.tensor
  keys, longest = token_bytes(machine.shape, machine.local_mesh), o.decoding.max_new_tokens
  weights = (machine.layers + machine.head) * machine.itemsize / tensor
  own, own_scores = _looked_at(machine, 1, longest, NEAR * new)
  prefix, prefix_scores = _looked_at(machine, shapes.tile, shapes.room, work.prompt_tokens)
  read = keys * (shapes.slots * own + shapes.rows * prefix)
  scores = shapes.slots * own_scores + shapes.rows * shapes.tile * prefix_scores
  scores *= SCORES * 4 * c.heads / tensor * c.depth
  logits = _passes(o.decoding, machine) * 4 * c.vocab * shapes.slots / tensor
  wide = (ACTIVATIONS[0] * c.heads * c.head_dim + ACTIVATIONS[1] * c.ffn) / tensor if machine.platform == "tpu" else 0
  return weights + read + scores + logits + c.depth * shapes.slots * wide * machine.itemsize


def shared(machine: Machine, tokens: float, layers: int = 0, logits: bool = False) -> float:
  """Bytes that a device sends to its tensor group for so many of the group's tokens: the rows of the embedding and two
  results of each layer are summed over the group. `logits`: they are exchanged, too, each device choosing for its share
  of the slots by the kernel, and elsewhere for all of them."""
  c, tensor = machine.c, machine.tensor
  summed = 2 * (2 * (layers or c.depth) + 1) * c.width * machine.itemsize
  chosen = 4 * c.vocab / (tensor if machine.platform == "tpu" else 1) if logits else 0
  return tokens * (summed + chosen) * (tensor - 1) / tensor


def group_link(machine: Machine) -> float:
  """Bytes a second that `shared` is sent at."""
  return machine.topology.link_in_groups(machine.tensor) * shares.LINKS[0]


def _passes(decoding: Decoding, machine: Machine) -> float:
  """How many times a step's logits go through memory."""
  if reads_once(decoding, machine.c.vocab, machine.platform):
    ruled = decoding.remembers or decoding.min_new_tokens > 0
    return CHOOSING_ONCE[machine.tensor > 1] + (RULES if ruled else 0)
  counts = CHOOSING[machine.platform]
  if decoding.temperature == 0:
    return counts["greedy"]
  filters = {"top_k": 0 < decoding.top_k < machine.c.vocab, "top_p": decoding.top_p < 1}
  return counts["temperature"] + sum(counts[name] for name, used in filters.items() if used)


def _looked_at(machine: Machine, T: int, S: int, live: float) -> tuple[float, float]:
  """Of a row of S keys, so many of which are live: how many T queries read, and how many scores go through memory."""
  if not reads_what_is_live(machine.shape, T, S, machine.local_mesh, machine.platform):
    return S, S
  heads = decoder.cache_heads(machine.c, machine.shape.embed.get_value().dtype, machine.local_mesh, machine.platform)[0]
  heads = heads // machine.tensor if machine.c.kv_heads % machine.tensor == 0 else heads
  return (min(S, live + block(S, heads) / 2) if machine.platform == "tpu" else live), 0


def forward(machine: Machine, tokens: float, context: float, layers: float = 0) -> float:
  """The arithmetic of a forward pass without the head; a token has half of its text behind it."""
  c, share = machine.c, layers / machine.c.depth if layers else 1.0
  return tokens * share * (2 * machine.layers + 2 * c.depth * c.heads * c.head_dim * context)
