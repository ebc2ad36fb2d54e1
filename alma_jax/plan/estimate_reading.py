"""Time and memory of judging, embedding and log-probs of texts, by roofline.

  step = reading(machine, work)

Rows of a call, and the places of it that hold tokens, are those of the engine's own buckets.
"""

import functools

from alma_jax.engine import buckets
from alma_jax.engine.score import reading_bytes, rows_that_fit
from alma_jax.plan import assumptions as shares
from alma_jax.plan.assumptions import drawn_lengths
from alma_jax.plan.estimate_sampling import forward, group_link, shared
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.work import Reading
from alma_jax.runtime import room
from alma_jax.runtime.host import sampling_bytes

DRAWN = 3200  # rows whose lengths are drawn, of a stage that reads texts


def tile_of(machine: Machine, work: Reading) -> int:
  """How many rows of a call share a copy of their prefix's keys."""
  return buckets.TILE if machine.engine.rows % buckets.TILE == 0 and work.rows >= buckets.TILE * work.prefixes else 1


def filled(machine: Machine, work: Reading) -> float:
  """The share of the places of a stage's calls that hold tokens, in buckets of lengths that are drawn."""
  each = max(1, round(work.rows / max(1, work.prefixes)))
  prefixes = min(-(-work.prefixes // machine.replicas), -(-DRAWN // each))
  sizes = work.tokens / max(1, work.rows), buckets.rounded(work.longest)
  return _filled(prefixes, each, machine.engine.rows, *sizes, work.prefix_tokens)


@functools.cache
def _filled(prefixes: int, each: int, rows: int, length: float, longest: int, before: float) -> float:
  """`each` rows of this mean length behind each of the prefixes, on one replica; without prefixes many rows."""
  lengths = drawn_lengths(prefixes * each or DRAWN, length, longest)
  if not prefixes:
    return float(lengths.sum()) / sum(map(buckets.rounded, lengths.tolist()))
  texts = [[buckets.Suffix((0,) * n, []) for n in some] for some in lengths.reshape(prefixes, each).tolist()]
  heads = [(i, *(0,) * n) for i, n in enumerate(drawn_lengths(prefixes, before, longest, seed=1))]
  calls = [call.rows for wave in buckets.waves(dict(zip(heads, texts, strict=True)), 1, rows) for call in wave.calls]
  widths = [buckets.rounded(max(len(row.ids) for row in found if row)) for found in calls]
  return float(lengths.sum()) / (rows * sum(widths))


def rows_of_calls(machine: Machine, work: Reading) -> int:
  """The rows of a call on each replica, as the engine chooses them for the longest texts."""
  rows, wide, memory = machine.engine.rows, tile_of(machine, work), machine.topology.chip.memory
  if not work.prefixes:
    return rows
  free = None if machine.platform == "cpu" else sampling_bytes(memory) - machine.held
  sizes = buckets.rounded(work.longest), buckets.rounded(work.longest_prefix)
  return rows_that_fit(machine.c, machine.tensor, machine.itemsize, rows, *sizes, wide, free, machine.platform)


def reading(machine: Machine, work: Reading) -> Step:
  c, chip, tensor = machine.c, machine.topology.chip, machine.tensor
  rows, width, longest = rows_of_calls(machine, work), work.tokens / max(1, work.rows), buckets.rounded(work.longest)
  before = buckets.rounded(work.longest_prefix) if work.prefixes else 0
  wide, target = tile_of(machine, work), machine.platform
  working = reading_bytes(c, tensor, machine.itemsize, rows, longest, before, wide, target)
  peak = machine.held + working
  useful, opening = filled(machine, work), work.prefixes * work.prefix_tokens
  # Of the last layer prefixes take keys and values alone, and so do rows of which single places are read.
  part = c.depth - 1 + 2 * c.width * c.kv_heads * c.head_dim * c.depth / machine.layers
  layers = part if work.prefixes and not work.logprobs else work.layers
  flops = forward(machine, work.tokens, width + 2 * work.prefix_tokens, layers)
  flops += forward(machine, opening, work.prefix_tokens, part)
  flops += 2 * machine.head * work.tokens if work.logprobs else 0
  sent = shared(machine, (work.tokens + opening) / machine.replicas / useful, work.layers)
  calls = work.rows / (rows * machine.replicas)
  rate = machine.peak * machine.topology.devices * shares.PRODUCTS[0]
  arithmetic = flops / useful / rate
  reads = calls * machine.model_bytes / (chip.bandwidth * shares.DECODING[0])
  seconds = work.models * (max(arithmetic, reads) + sent / group_link(machine))
  return Step(
    work,
    fits=peak <= sampling_bytes(chip.memory),
    peak=peak,
    usable=sampling_bytes(chip.memory),
    flops=work.models * flops,
    traffic=machine.model_bytes,
    collective=sent / max(1.0, calls),
    seconds=seconds / max(1.0, work.models * calls),
    hours=seconds / 3600,
    host=room.model_bytes(c, machine.model.save_dtype),
    disk=work.disk,
  )
