"""Time and memory of each stage's Work on a Topology, by roofline: nothing is compiled and no weights are read.

  step = estimate(machine, work)       # a Step: fits, peak, seconds, hours, and what would help where it does not fit

A step of training is one update, of sampling one token of every slot, of reading one call, of k-means one iteration.
Time is the longest of arithmetic, memory traffic and collectives, each at its share of the peak (plan/assumptions.py);
what a tensor group exchanges in sampling and reading is waited for.
"""

import dataclasses
from collections.abc import Iterator

from alma_jax.engine import points
from alma_jax.llama import sharding
from alma_jax.plan import assumptions as shares
from alma_jax.plan import topology as topologies
from alma_jax.plan.estimate_reading import reading
from alma_jax.plan.estimate_sampling import sampling
from alma_jax.plan.estimate_training import training, with_options
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.topology import Topology
from alma_jax.plan.work import Clustering, Reading, Sampling, Scoring, Training, Work
from alma_jax.runtime import room
from alma_jax.runtime.host import sampling_bytes
from alma_jax.runtime.session import MeshOptions

K_MEANS_BLOCK = {"gpu": 16384, "tpu": 2048}  # points that a centroid meets each time it is read; see engine/nearest.py
K_MEANS_SCORE = 12  # bytes of memory traffic for each score where they go through memory
CHUNK = 2**17  # points of a chunk on each device
COPIES = 2.5  # of the centroids on each device: themselves, their sums, and themselves in half precision


def estimate(machine: Machine, work: Work) -> Step:
  """The Step of a stage; where it does not fit, `helps` names the first change that would make it."""
  step = estimated(machine, work)
  if step.fits:
    return step
  found = next((what for what, other, task in _changes(machine, work) if estimated(other, task).fits), "")
  said = [step.helps] if step.helps else []
  return dataclasses.replace(step, seconds=0.0, hours=0.0, helps="; ".join([*said, found] if found else said))


def estimated(machine: Machine, work: Work) -> Step:
  """The Step of a stage, without what would help."""
  if isinstance(work, Training):
    try:
      return training(machine, work)
    except sharding.MeshError as error:
      disk = room.model_bytes(machine.c, machine.model.save_dtype)
      return Step(work, fits=False, usable=machine.topology.chip.memory, disk=disk, helps=str(error))
  if isinstance(work, Clustering):
    return _clustering(machine, work)
  if isinstance(work, Sampling | Reading):
    topology, tensor = machine.topology, machine.tensor
    if topology.local % tensor:
      why = f"engine.tensor is {tensor} and a host of {topology.name} has {topology.local} devices"
      usable = sampling_bytes(topology.chip.memory)
      return Step(work, fits=False, peak=machine.model_bytes, usable=usable, disk=work.disk, helps=why)
    found = sampling(machine, work) if isinstance(work, Sampling) else reading(machine, work)
    if topology.hosts > 1 and machine.c.parameters * machine.itemsize > topology.local * found.usable:
      why = f"no host of {topology.name} ({topology.local} devices) has room for a copy of the model"
      return dataclasses.replace(found, helps=why)
    return found
  return Step(work, disk=work.disk)


def _changes(machine: Machine, work: Work) -> Iterator[tuple[str, Machine, Work]]:
  """Changes that may make a stage fit, the cheapest first: knobs, then topologies."""
  if isinstance(work, Training):
    yield from _knobs(machine, work)
    if machine.mesh != (whole := dataclasses.replace(machine.mesh, data=1, fsdp=-1)):
      yield "config.mesh.fsdp=-1, config.mesh.data=1", dataclasses.replace(machine, mesh=whole), work
    if machine.mesh != (plain := MeshOptions()):
      yield "config.mesh.fsdp=-1, the others 1", dataclasses.replace(machine, mesh=plain), work
  if isinstance(work, Reading) and machine.engine.rows > 1:
    engine = dataclasses.replace(machine.engine, rows=max(1, machine.engine.rows // 4))
    yield f"config.engine.rows={engine.rows}", dataclasses.replace(machine, engine=engine), work
  if isinstance(work, Sampling | Reading):
    for tensor in (1, 2, 4, 8):
      fits = tensor != machine.tensor and machine.topology.local % tensor == 0
      if fits and tensor <= machine.c.kv_heads:
        engine = dataclasses.replace(machine.engine, tensor=tensor)
        yield f"config.engine.tensor={tensor}", dataclasses.replace(machine, engine=engine), work
  if isinstance(work, Sampling) and machine.engine.slots:
    engine = dataclasses.replace(machine.engine, slots=0)
    yield "config.engine.slots=0 (what fits)", dataclasses.replace(machine, engine=engine), work
  for other in (*topologies.larger(machine.topology), *_other_kinds(machine.topology)):
    yield f"--topology={other.name}", dataclasses.replace(machine, topology=other), work


def _knobs(machine: Machine, work: Training) -> Iterator[tuple[str, Machine, Work]]:
  """Changes of a training that take less memory."""
  if isinstance(work, Scoring):
    return
  section, o = f"config.{work.section}", work.options
  if o.remat != "auto":
    yield f"{section}.remat='auto'", machine, with_options(work, remat="auto")
  half = dataclasses.replace(o.optimizer, moments="bfloat16")
  yield f"{section}.moments='bfloat16'", machine, with_options(work, optimizer=half, remat="auto")


def _other_kinds(topology: Topology) -> Iterator[Topology]:
  """Every topology of chips with more memory."""
  for kind, chip in topologies.CHIPS.items():
    if chip.memory > topology.chip.memory:
      for shape in topologies.SLICES[kind]:
        yield topologies.parse(f"{kind}:{shape}")


# K-means


def _clustering(machine: Machine, work: Clustering) -> Step:
  """Scores of all points in half precision and all centroids."""
  devices, chip = machine.topology.devices, machine.topology.chip
  pairs = work.rows * work.k / devices
  block = K_MEANS_BLOCK.get(machine.platform)
  traffic, flops = pairs * (2 * work.dims / block if block else K_MEANS_SCORE), 2 * pairs * work.dims
  seconds = max(traffic / (chip.bandwidth * shares.DECODING[0]), flops / (chip.flops * shares.PRODUCTS[0]))
  along = points.ways_of_centroids(work.k, work.dims, devices, chip.memory)
  peak = COPIES * 4 * work.k * work.dims / (along or devices)
  peak += 2 * 2 * min(work.rows / devices, CHUNK) * work.dims  # a chunk is read while one is used
  return Step(
    work,
    fits=along is not None,
    peak=peak,
    usable=chip.memory,
    flops=flops * devices * work.passes,
    traffic=traffic,
    seconds=seconds,
    hours=work.passes * seconds / 3600,
    host=8.0 * work.k * work.dims + 8 * work.rows,
    disk=work.disk,
  )
