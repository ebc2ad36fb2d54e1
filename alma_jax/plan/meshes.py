"""Which mesh a topology's training should have: data x fsdp x tensor, by peak memory and by what a step sends.

  for line in lines(plan, quick=False): print(line)

All meshes are compared by analytic bounds, as they are given. Without `quick` the few that seem best are compiled, at
the compiler's default effort, as a run has it: a compiler may choose otherwise than the bounds assume, whole weights
all-reduced instead of gathered, which only its program shows.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

from alma_jax.errors import UserError
from alma_jax.llama import sharding
from alma_jax.plan import compiled, devices, hlo
from alma_jax.plan.estimate_training import training
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.programs import Program, planned_training
from alma_jax.plan.table import GB, Plan
from alma_jax.plan.topology import GIB
from alma_jax.plan.work import Scoring, Training, Work
from alma_jax.runtime.session import MeshOptions

COMPILED = 3  # meshes that are compiled, the configured one beside them


@dataclasses.dataclass(frozen=True)
class Mesh:
  options: MeshOptions
  step: Step  # of the largest training
  made: compiled.Made | None = None

  @property
  def name(self) -> str:
    return f"{self.options.data} x {self.options.fsdp} x {self.options.tensor}"

  @property
  def fits(self) -> bool:
    return self.step.fits if self.made is None else not self.made.refused and self.made.peak <= self.step.usable

  @property
  def peak(self) -> float:
    return self.made.peak if self.made else self.step.peak

  @property
  def sent(self) -> float:
    return hlo.sent(self.made.collectives) if self.made else self.step.collective


def lines(plan: Plan, quick: bool) -> Iterator[str]:
  """The comparison as text, a mesh a line, and the best."""
  machine = plan.machine
  trainings = [step for step in plan.steps if _trains(step.work)]
  if not trainings:
    raise UserError("--meshes compares trainings, and --stages names none")
  largest = max(trainings, key=lambda step: (step.places or 0, step.peak))
  work, usable = largest.work, machine.topology.chip.memory / GIB
  assert isinstance(work, Training)
  found = candidates(machine, work)
  mesh = machine.training_mesh
  given = MeshOptions(*(mesh.shape[axis] for axis in sharding.AXES))
  yield f"{machine.topology.name}, {work.stage}: {usable:.2f} GiB usable on each device; * is the config's mesh"
  yield ""
  yield _row("data x fsdp x tensor", "peak GiB", "GB sent", "remat, rows x tokens")
  yield "by analytic bounds:"
  yield from (_line(each, given) for each in found)
  if not quick:
    effort = f"{devices.compilers(machine.topology)}, default effort"
    yield f"compiled ({effort}):"
    made = []
    with devices.described(machine.topology, devices.DEFAULT) as there:
      for each in _chosen(found, given):
        began = time.monotonic()
        own, step = dataclasses.replace(machine, mesh=each.options), each.step
        program = Program("step", functools.partial(planned_training, own, step, there))
        made.append(dataclasses.replace(each, made=compiled.made_of(program, work.stage, machine.platform)))
        yield f"{_line(made[-1], given)}  ({time.monotonic() - began:.0f} s)"
        if (of := made[-1].made) and not of.refused:
          yield f"    {hlo.summary(of.collectives)}"
    found = made
  yield ""
  fitting = [each for each in found if each.fits]
  if not fitting:
    yield "no mesh fits; alma plan without --meshes says what would help"
    return
  best = min(fitting, key=lambda each: (each.sent, each.peak))
  o = best.options
  yield (
    f"the best: {best.name} (--config.mesh.data={o.data} --config.mesh.fsdp={o.fsdp} --config.mesh.tensor={o.tensor}),"
    f" {best.peak / GIB:.1f} GiB, {best.sent / GB:.3g} GB sent by each device in a step"
  )


def _trains(work: Work) -> bool:
  return isinstance(work, Training) and not isinstance(work, Scoring)


def candidates(machine: Machine, work: Training) -> list[Mesh]:
  """Every mesh of the topology's devices, those that fit and send least first; `tensor` stays inside a host's devices,
  and no larger than the heads of keys."""
  devices, found = machine.topology.devices, []
  for tensor in (1, 2, 4, 8):
    if devices % tensor or machine.c.kv_heads % tensor:
      continue
    for data in (n for n in range(1, devices // tensor + 1) if devices // tensor % n == 0):
      options = MeshOptions(data, devices // tensor // data, tensor)
      found.append(Mesh(options, training(dataclasses.replace(machine, mesh=options), work, as_is=True)))
  return sorted(found, key=lambda mesh: (not mesh.fits, mesh.sent, mesh.peak))


def _chosen(found: list[Mesh], given: MeshOptions) -> list[Mesh]:
  """Those that are compiled: the config's, and the best by analytic bounds."""
  best = [each for each in found[:COMPILED] if each.options != given]
  return [*(each for each in found if each.options == given), *best]


def _line(mesh: Mesh, given: MeshOptions) -> str:
  name = f"{mesh.name} *" if mesh.options == given else mesh.name
  if mesh.made and mesh.made.refused:
    return f"{_row(name)}  does not compile: {mesh.made.refused}"
  fits, shape = "" if mesh.fits else "  DOES NOT FIT", mesh.step.shape
  how = f"{mesh.step.remat}, {shape.rows:,} x {shape.length:,}" if shape else ""
  return _row(name, f"{mesh.peak / GIB:.1f}", f"{mesh.sent / GB:.3g}", how + fits)


def _row(name: str, peak: str = "", sent: str = "", how: str = "") -> str:
  return f"  {name:<20}  {peak:>8}  {sent:>7}  {how}".rstrip()
