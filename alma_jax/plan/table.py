"""A plan as a table that a person reads, and as JSON.

  print("\n".join(lines(plan)))
  write(path, plan)           {"topology", "hbm_gib", "stages": [...], "device_hours", "disk_gb"}

In the table the rounds of a kind of stage are one row; in JSON every stage stands alone. Memory is in GiB, disk in GB.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from alma_jax.errors import writing
from alma_jax.plan import hlo
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.topology import GIB
from alma_jax.store import layout

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
  machine: Machine
  steps: list[Step]
  missing: list[str] = dataclasses.field(default_factory=list)  # work that is not in it
  compilers: str = ""  # what compiled its programs, and how long that took; "": a quick plan

  @property
  def fits(self) -> bool:
    return all(step.fits for step in self.steps) and self.host <= self.host_memory

  @property
  def hours(self) -> float:
    return sum(step.hours for step in self.steps)

  @property
  def device_hours(self) -> float:
    return self.hours * self.machine.topology.devices

  @property
  def disk(self) -> float:
    """The most bytes that are on disk: everything that stays, and one training's checkpoints."""
    return sum(step.disk for step in self.steps) + max((step.beside for step in self.steps), default=0.0)

  @property
  def host(self) -> float:
    """Bytes that a host needs at the same time."""
    return max((step.host for step in self.steps), default=0.0)

  @property
  def host_memory(self) -> float:
    return self.machine.topology.chip.host_memory * self.machine.topology.local


def as_json(plan: Plan) -> dict[str, Any]:
  topology = plan.machine.topology
  return {
    "topology": topology.name,
    "hbm_gib": topology.chip.memory / GIB,
    "stages": [
      {
        "stage": step.work.stage,
        "fits": step.fits,
        "peak_gib": round(step.peak / GIB, 3),
        "remat": step.remat,
        "passes": step.passes,
        "slots": step.slots,
        "step_seconds": _digits(step.seconds) if step.fits else None,
        "hours": _digits(step.hours) if step.fits else None,
        "disk_gb": _digits(step.disk / GB),
      }
      for step in plan.steps
    ],
    "device_hours": _digits(plan.device_hours),
    "disk_gb": _digits(plan.disk / GB),
  }


def write(path: pathlib.Path, plan: Plan) -> None:
  with writing(path):
    path.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")


def _digits(x: float) -> float:
  return float(f"{x:.6g}")


# The table

HEAD = "stage", "rows", "tokens", "FLOPs", "step", "peak", "moved", "sent", "s/step", "hours", "device-h", "disk GB"


def lines(plan: Plan, price: float | None = None) -> Iterator[str]:
  """The plan as text, an item a line."""
  m, topology, chip = plan.machine, plan.machine.topology, plan.machine.topology.chip
  hosts = f"{topology.hosts} host{'s' * (topology.hosts > 1)}"
  yield (
    f"{topology.name}: {topology.devices} x {chip.name} on {hosts}; each {chip.memory / GIB:.2f} GiB,"
    f" {chip.flops / 1e12:,.3g} TFLOP/s, {chip.bandwidth / GB:,.0f} GB/s ({chip.source})"
  )
  yield f"model: {m.c.parameters / 1e9:,.3g}B weights, {m.c.depth} layers; forward passes in {m.dtype}"
  yield "assumed:"
  for line in m.assumptions.lines():
    yield f"  {line}"
  yield ""
  rows = [HEAD, *(_row(plan, name, steps) for name, steps in _grouped(plan.steps).items())]
  widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
  for row in rows:
    left = ("stage", "step")  # their columns' text begins at the left
    cells = zip(HEAD, row, widths, strict=True)
    yield "  ".join(cell.ljust(w) if name in left else cell.rjust(w) for name, cell, w in cells).rstrip()
  yield ""
  yield "step: remat/passes and rows x tokens of the largest training step; slots of a copy of the model in sampling."
  yield "peak: GiB on each device, with the longest texts that the config lets in."
  yield "moved: GB from and to its memory in a step. sent: GB of collectives in a step."
  yield ""
  least = "" if plan.fits else "without what does not fit, "
  total = f"in all, {least}{plan.hours:,.4g} hours, {plan.device_hours:,.4g} device-hours"
  yield total + (f", {plan.device_hours * price:,.0f} USD at {price:g} a device-hour" if price is not None else "")
  yield (
    f"disk: {plan.disk / GB:,.4g} GB at most, a training's checkpoints among them; each host needs"
    f" {plan.host / GIB:,.3g} of {plan.host_memory / GIB:,.4g} GiB of its memory"
  )
  if plan.compilers:
    yield f"Memory and what is sent are the compilers' figures ({plan.compilers}); hours are projected by roofline."
    yield from _sent(plan)
  else:
    yield "A quick plan: memory by analytic bounds, hours projected by roofline. Nothing was compiled or measured."
  for what in plan.missing:
    yield f"not counted: {what}"
  yield f"everything fits on {topology.name}" if plan.fits else ""
  yield from _failures(plan)


def _sent(plan: Plan) -> Iterator[str]:
  """The collectives of every kind of stage, in one step of each device."""
  said: dict[str, list[Step]] = {}
  for step in plan.steps:
    if step.collectives:
      said.setdefault(hlo.summary(step.collectives), []).append(step)
  for summary, steps in said.items():
    yield f"sent in a step of {', '.join(_grouped(steps))}: {summary}"


def _failures(plan: Plan) -> Iterator[str]:
  """What does not fit and what would help, stages that the same thing helps together."""
  by_help: dict[str, list[Step]] = {}
  by_words: dict[str, list[Step]] = {}
  for step in plan.steps:
    if step.refused:
      by_words.setdefault(step.refused, []).append(step)
    elif not step.fits:
      by_help.setdefault(step.helps or "no knob and no known topology does", []).append(step)
  for words, steps in by_words.items():
    yield f"does not compile: {', '.join(_grouped(steps))}: {words}"
  for helps, steps in by_help.items():
    worst = max(steps, key=lambda step: step.peak)
    much = f" (up to {worst.peak / GIB:,.1f} of {worst.usable / GIB:.1f} usable GiB)" if worst.peak else ""
    yield f"does not fit: {', '.join(_grouped(steps))}{much}. What helps: {helps}"
  if plan.host > plan.host_memory:
    yield (
      f"does not fit: {plan.host / GIB:,.0f} GiB in a host's memory of {plan.host_memory / GIB:,.0f} GiB. What helps:"
      " more hosts, which share a training's checkpoints"
    )


def _grouped(steps: list[Step]) -> dict[str, list[Step]]:
  """The feedback rounds of a kind of stage together: {"rounds 2 .. 11 policy": ...}."""
  kinds: dict[str, list[Step]] = {}
  for step in steps:
    round = layout.round_of(step.work.stage)
    feedback = round is not None and round > 1
    kinds.setdefault(f"/{step.work.stage.rpartition('/')[2]}" if feedback else step.work.stage, []).append(step)
  return {_named(kind, found): found for kind, found in kinds.items()}


def _named(kind: str, steps: list[Step]) -> str:
  if not kind.startswith("/"):
    return kind
  rounds = sorted({layout.round_of(step.work.stage) or 0 for step in steps})
  span = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}..{rounds[-1]}"
  return f"{span} {kind[1:]}"


def _row(plan: Plan, name: str, steps: list[Step]) -> tuple[str, ...]:
  worst, devices = max(steps, key=lambda step: (not step.fits, step.peak)), plan.machine.topology.devices
  hours = sum(step.hours for step in steps)
  how = ""
  if worst.shape:
    remat = f"{worst.remat}/{worst.passes}, " if worst.remat else ""
    groups = f", tensor {worst.mesh.tensor}" if worst.mesh and worst.mesh.tensor > 1 else ""
    how = f"{remat}{worst.shape.rows:,} x {worst.shape.length:,}{groups}"
  elif worst.slots is not None:
    how = f"{worst.slots} slots"
  return (
    name,
    _short(sum(step.work.rows for step in steps)),
    _short(sum(step.work.tokens for step in steps)),
    f"{sum(step.flops for step in steps):.2g}" if worst.flops else "",
    how if worst.fits else f"{how} {'REFUSED' if worst.refused else 'DOES NOT FIT'}".strip(),
    f"{worst.peak / GIB:.1f}" if worst.peak else "",
    f"{worst.traffic / GB:.3g}" if worst.traffic else "",
    f"{worst.collective / GB:.3g}" if worst.collective else "",
    f"{worst.seconds:.3g}" if worst.seconds else "",
    f"{hours:.3g}" if worst.seconds else "",
    f"{hours * devices:,.3g}" if worst.seconds else "",
    f"{sum(step.disk for step in steps) / GB:,.3g}",
  )


def _short(x: float) -> str:
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if x >= size:
      return f"{x / size:.3g}{unit}"
  return f"{x:.0f}" if x else ""
