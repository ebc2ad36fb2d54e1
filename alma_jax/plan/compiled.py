"""The quick plan's Steps with what the compilers say of their programs: memory, collectives, refusals.

  with described(topology) as devices:
    steps = compiled(machine, steps, devices, bar)      # bar: hears of every program

Stages that run the same programs are compiled once. Sampling's programs have every layer apart, which takes a compiler
long: they are compiled with DEPTHS layers, and their figures lie on the line through both (`deep`). Hours stay the
roofline's, with the remat that the compiler took and the bytes that it sends.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from alma_jax.engine import train
from alma_jax.errors import UserError
from alma_jax.plan import assumptions as shares
from alma_jax.plan import hlo, traffic
from alma_jax.plan.estimate import estimated
from alma_jax.plan.estimate_training import with_options
from alma_jax.plan.hlo import Collective
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.programs import Program, key, programs
from alma_jax.plan.work import Sampling, Training, steps

AT_ONCE = 2  # programs; a compiler uses more than one core only at times
DEPTHS = 2, 4  # layers of sampling's programs


@dataclasses.dataclass(frozen=True)
class Made:
  """What the compiler says of a program."""

  name: str
  peak: int = 0  # bytes on each device, what is there beside the program included
  collectives: tuple[Collective, ...] = ()
  remat: str | None = None  # of a training step, and its passes
  passes: int = 1
  seconds: float = 0.0  # that it took
  refused: str = ""  # why there is no such program
  part: bool = True  # of the stage's step
  moved: float = 0.0  # bytes that a step of a decode loop takes from and to memory, by `traffic.moved`


Hear = Callable[[str], object]  # the name of a program that is done


def compiled(machine: Machine, found: Sequence[Step], devices: Sequence[Any], hear: Hear) -> list[Step]:
  """The Steps with the compilers' figures. What the quick plan has no programs for stays as it is."""
  by_key: dict[Any, list[Callable[[], Made]]] = {}
  for step in found:
    if (of := key(machine, step)) is not None and of not in by_key and _possible(step):
      by_key[of] = _tasks(machine, step, devices)

  def run(task: Callable[[], Made]) -> Made:
    made = task()
    hear(made.name)
    return made

  with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
    running = {of: [pool.submit(run, task) for task in tasks] for of, tasks in by_key.items()}
    try:
      made = {of: [future.result() for future in futures] for of, futures in running.items()}
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return [_with(machine, step, made.get(key(machine, step), ())) for step in found]


def count(machine: Machine, found: Sequence[Step], devices: Sequence[Any]) -> int:
  """How many programs `compiled` will compile."""
  first = {key(machine, step): step for step in reversed(found) if _possible(step)}
  return sum(len(_tasks(machine, step, devices)) for of, step in first.items() if of is not None)


def peak_of(found: Any, platform: str) -> int:
  """Bytes of a compiled program at its peak: the compilers of accelerators give it; on CPUs it is a sum."""
  memory = found.memory_analysis()
  if platform != "cpu" and (peak := getattr(memory, "peak_memory_in_bytes", 0)):
    return peak
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes


def made_of(program: Program, stage: str, platform: str) -> Made:
  """The program, compiled. What its compiler, or its lowering, refuses is told."""
  began, name, remat, passes = time.monotonic(), f"{stage} {program.name}", None, 1
  try:
    found = program.make()
  except UserError as error:
    return Made(name, refused=str(error), seconds=time.monotonic() - began)
  except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, TypeError) as error:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return Made(name, refused=f"{program.name}: {said[0][:300]}", seconds=time.monotonic() - began)
  if isinstance(found, train.Plan):
    found, remat, passes = found.step, found.remat, found.passes
  text = found.as_text()
  peak, took = peak_of(found, platform) + program.beside, time.monotonic() - began
  moved = traffic.moved(text, program.live) if program.live else 0.0
  return Made(name, peak, tuple(hlo.collectives(text)), remat, passes, took, part=program.part, moved=moved)


def _possible(step: Step) -> bool:
  """False where the quick plan has found that there is nothing to compile: no mesh, no host, no slot."""
  return step.fits or step.shape is not None


def _tasks(machine: Machine, step: Step, devices: Sequence[Any]) -> list[Callable[[], Made]]:
  stage, platform = step.work.stage, machine.platform
  if not in_line(machine, step):
    return [functools.partial(made_of, found, stage, platform) for found in programs(machine, step, devices)]
  cut = [_cut(machine, depth) for depth in DEPTHS]
  pairs = zip(*(programs(small, step, devices) for small in cut), strict=True)

  def made(pair: tuple[Program, Program]) -> Made:
    first, second = (
      made_of(dataclasses.replace(found, beside=found.beside - small.others), stage, platform)
      for found, small in zip(pair, cut, strict=True)
    )
    found = deep(first, second, machine.c.depth)
    return found if found.refused else dataclasses.replace(found, peak=found.peak + machine.others)

  return [functools.partial(made, pair) for pair in pairs]


def in_line(machine: Machine, step: Step) -> bool:
  """True if a stage's programs are compiled with DEPTHS layers instead of all."""
  return isinstance(step.work, Sampling) and machine.c.depth > 2 * DEPTHS[1]


def _cut(machine: Machine, depth: int) -> Machine:
  """The machine with a model of so many layers, which lies on as many devices as the whole one."""
  engine = dataclasses.replace(machine.engine, tensor=machine.tensor)
  return dataclasses.replace(machine, c=dataclasses.replace(machine.c, depth=depth), engine=engine)


def deep(first: Made, second: Made, depth: int) -> Made:
  """What a program of `depth` layers takes and sends, from those of DEPTHS layers: on the line through both."""
  if first.refused or second.refused:
    return first if first.refused else second
  further = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

  def line(a: float, b: float) -> float:
    return a + further * (b - a)

  pairs = [{(c.kind, c.shape): c for c in made.collectives} for made in (first, second)]
  none = Collective("", "", 0.0, 0)
  sent = []
  for kind, shape in dict.fromkeys([*pairs[0], *pairs[1]]):
    a, b = (found.get((kind, shape), none) for found in pairs)
    sent.append(Collective(kind, shape, line(a.bytes, b.bytes), round(line(a.times, b.times))))
  return dataclasses.replace(
    second,
    peak=int(line(first.peak, second.peak)),
    collectives=tuple(sorted(sent, key=lambda c: -c.bytes)),
    moved=line(first.moved, second.moved),
    seconds=first.seconds + second.seconds,
  )


def _with(machine: Machine, step: Step, made: Sequence[Made]) -> Step:
  """The Step with the figures of its programs: the most memory of any, the collectives of those of a step."""
  if not made:
    return step
  refused = next((m.refused for m in made if m.refused), "")
  if refused:
    return dataclasses.replace(step, fits=False, seconds=0.0, hours=0.0, refused=refused, compiled=True)
  worst, remat, passes = max(made, key=lambda m: m.peak), made[0].remat, made[0].passes
  peak, base = worst.peak, step
  collectives = tuple(collective for m in made if m.part for collective in m.collectives)
  if isinstance(step.work, Training) and remat:
    base = estimated(machine, with_options(step.work, remat=remat, passes=passes))
    base = dataclasses.replace(base, work=step.work)
    exchange = hlo.sent(collectives) / (machine.topology.link * shares.LINKS[0])
    more = max(0.0, exchange - base.seconds) if base.seconds else 0.0
    hours = base.hours + more * steps(step.work) / 3600
    base = dataclasses.replace(base, seconds=base.seconds + more, hours=hours, collective=hlo.sent(collectives))
  fits = peak <= step.usable
  helps = "" if fits else f"the compiler's {peak / 2**30:.1f} GiB in {worst.name} are more than is usable; {step.helps}"
  return dataclasses.replace(
    base, fits=fits, peak=peak, collectives=collectives, helps=helps.rstrip("; "), compiled=True
  )
