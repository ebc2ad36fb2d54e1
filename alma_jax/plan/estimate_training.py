"""Time and memory of trainings and of log-probs by the code that trains, by roofline.

  step = training(machine, work)

Rows, mesh, remat and passes are those that a run would choose.
"""

import dataclasses
import functools
import math

from jax.sharding import AbstractMesh

from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.plan import assumptions as shares
from alma_jax.plan.assumptions import drawn_lengths
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.memory import scoring_bytes, training_bytes
from alma_jax.plan.work import Scoring, Training, epochs_kept, steps
from alma_jax.runtime import metrics, room
from alma_jax.runtime import shapes as rows_of
from alma_jax.runtime.batches import ROWS
from alma_jax.runtime.session import MeshOptions
from alma_jax.runtime.shapes import Shape
from alma_jax.runtime.training import USEFUL

REMAT = {"none": 1.0, "products": 1.0, "full": 4 / 3}  # times a step's arithmetic
STEPS, LONG = 16, 60  # steps whose lengths are drawn; trainings of so many steps may have more programs


def with_options(work: Training, **fields: object) -> Training:
  return dataclasses.replace(work, options=dataclasses.replace(work.options, **fields))


@dataclasses.dataclass(frozen=True)
class Fitted:
  """How a training's data lie on the devices."""

  mesh: MeshOptions
  shape: Shape  # of the largest step
  places: float  # of a mean step

  @property
  def abstract(self) -> AbstractMesh:
    o = self.mesh
    return sharding.abstract_mesh(o.data * o.fsdp * o.tensor, o.data, o.fsdp, o.tensor)


def _fitted(machine: Machine, work: Training, as_is: bool = False) -> Fitted:
  """Rows and mesh as a run chooses them (runtime/training.py): on the config's mesh, or, where that leaves over a sixth
  of the places empty and not `as_is`, on one with larger tensor groups; on TPUs in shares that they gather."""
  o, topology = work.options, machine.topology
  sizes = tuple(machine.training_mesh.shape[axis] for axis in sharding.AXES)
  most = topology.devices if machine.platform == "tpu" else topology.local
  meshes = [sizes, *([] if as_is or not o.fit_rows else sharding.with_larger_groups(sizes, machine.c, most))]
  passes = 1 if isinstance(work, Scoring) else min(o.passes, o.batch)
  best: tuple[float, Fitted] | None = None
  for data, fsdp, tensor in meshes:
    if best and best[0] >= USEFUL:
      break
    shape, places, filled = _shapes_of(work, data * fsdp * passes)
    if best is None or filled / places > 1.05 * best[0]:
      best = filled / places, Fitted(MeshOptions(data, fsdp, tensor), shape, places)
  assert best is not None
  if as_is or not o.fit_rows:
    return best[1]
  sizes = sharding.in_whole_lanes(dataclasses.astuple(best[1].mesh), machine.c, machine.platform)
  return dataclasses.replace(best[1], mesh=MeshOptions(*sizes))


def _shapes_of(work: Training, unit: int) -> tuple[Shape, float, float]:
  o = work.options
  sizes = o.batch, work.sides * o.row_length, unit if o.fit_rows else -math.lcm(ROWS, unit)
  return _simulated(min(work.examples, STEPS * o.batch), min(steps(work), LONG), work.length, *sizes)


@functools.cache
def _simulated(
  examples: int, steps: int, length: float, batch: int, width: int, unit: int
) -> tuple[Shape, float, float]:
  """The largest shape of an epoch's first steps, and the mean numbers of places and of tokens in a step, for lengths
  that are drawn; a negative unit is that of rows which do not fit themselves."""
  drawn = drawn_lengths(examples, length, width)
  parts = [drawn[at : at + batch].tolist() for at in range(0, examples, batch)]
  many = parts * max(1, steps // len(parts))  # how many programs pay depends on the number of steps
  found = rows_of.fitted(many, width, unit) if unit > 0 else rows_of.fixed(parts, width, -unit)
  largest = max(found, key=_places)
  return largest, sum(map(_places, found)) / len(found), float(drawn.sum()) / len(parts)


def _places(shape: Shape) -> int:
  return shape.places


def in_more_passes(work: Training, shape: Shape, mesh: AbstractMesh) -> Training | None:
  """The training in twice as many passes, which remat "auto" goes on to where a step of this shape does not fit."""
  o, passes = work.options, 2 * min(work.options.passes, work.options.batch)
  rows = shape.rows // (mesh.shape["data"] * mesh.shape["fsdp"])  # of each way in all passes
  return with_options(work, passes=passes) if o.remat == "auto" and passes <= min(o.batch, rows) else None


def training(machine: Machine, work: Training, as_is: bool = False) -> Step:
  """The first remat that fits, with "auto" in more passes if it must be, as a run finds them (runtime/training.py);
  `as_is`: on the machine's mesh, whatever it wastes."""
  fit = _fitted(machine, work, as_is)
  if isinstance(work, Scoring):
    return _scoring(machine, work, fit)
  c, o, mesh, chip = machine.c, work.options, fit.abstract, machine.topology.chip
  passes, places = min(o.passes, o.batch), fit.shape.places
  ways = tuple(llama.REMAT) if o.remat == "auto" else (o.remat,)
  peak, remat, objective = math.inf, ways[-1], o.objective(machine.dtype)
  for remat in ways:
    objective = dataclasses.replace(objective, remat=remat)
    peak = training_bytes(c, mesh, machine.platform, o.optimizer, objective, places, passes)
    if peak <= chip.memory:
      break
  if peak > chip.memory and (more := in_more_passes(work, fit.shape, mesh)):
    found = training(machine, more, as_is)
    if found.fits:
      return dataclasses.replace(found, work=work)
  length = min(work.length, work.sides * o.row_length)
  n, useful = steps(work), metrics.operations(c, [round(length)])
  # Padding and the end of a row cost what tokens do; a reference model goes forward beside.
  executed = useful * fit.places / length * (REMAT[remat] + (1 / 3 if objective.compares else 0))
  collective = _exchanged(machine, mesh, places, passes, remat, objective.compares)
  peak_rate, mfu = machine.peak * machine.topology.devices, machine.assumptions.mfu
  rate = peak_rate * machine.assumptions.training
  arithmetic = useful * min(o.batch, work.examples) / (peak_rate * mfu) if mfu else executed / rate
  seconds = max(arithmetic, collective / (machine.topology.link * shares.LINKS[0]))
  total = n * seconds + work.forward * work.examples * useful / 3 / rate
  checkpoint = room.checkpoint_bytes(c, o.optimizer.moments)
  saved = room.model_bytes(c, machine.model.save_dtype)
  return Step(
    work,
    fits=peak <= chip.memory,
    peak=peak,
    usable=chip.memory,
    remat=remat,
    passes=passes,
    shape=fit.shape,
    mesh=fit.mesh,
    flops=useful * work.examples * (o.epochs + work.forward / 3),
    collective=collective,
    seconds=seconds,
    hours=total / 3600,
    host=checkpoint / machine.topology.hosts + saved,
    disk=saved * (1 + epochs_kept(work)),
    beside=room.training_bytes(checkpoint, saved, n, o.checkpoint_every, o.checkpoint_keep) - saved,
  )


def _scoring(machine: Machine, work: Scoring, fit: Fitted) -> Step:
  """Forward passes of the code that trains, over all data once."""
  c, chip, mesh = machine.c, machine.topology.chip, fit.abstract
  peak = scoring_bytes(c, mesh, machine.platform, machine.itemsize, fit.shape.places)
  length = min(work.length, work.sides * work.options.row_length)
  useful = metrics.operations(c, [round(length)]) / 3
  collective = _exchanged(machine, mesh, fit.shape.places, 1) / 3
  rate = machine.peak * machine.topology.devices * machine.assumptions.training
  seconds = max(useful * fit.places / length / rate, collective / (machine.topology.link * shares.LINKS[0]))
  return Step(
    work,
    fits=peak <= chip.memory,
    peak=peak,
    usable=chip.memory,
    shape=fit.shape,
    mesh=fit.mesh,
    flops=useful * work.examples,
    collective=collective,
    seconds=seconds,
    hours=steps(work) * seconds / 3600,
    host=room.model_bytes(c, machine.model.save_dtype),
    disk=work.disk,
  )


def _exchanged(
  machine: Machine, mesh: AbstractMesh, places: int, passes: int, remat: str = "none", compares: bool = False
) -> float:
  """Bytes that a step sends from each device: along fsdp the layers' weights are gathered forward and backward, and
  embedding and head (one table where they are tied) once each; their gradients are reduced to shares, along fsdp and
  once more along data. A reference model is gathered once.

  TPUs multiply a share of a layer's weights while the next ones come from both sides, which sends fsdp + 1 shares where
  a gather sends fsdp - 1; up to four devices do that with gradients alone. What they gather after all: with
  remat="full" what goes forward again, all but the last product; in tensor groups the weights of one direction; with
  several replicas along data everything.

  Along tensor, the streams after attention and after the feed-forward part are summed, and their gradients on the way
  back; with remat="full" the first one again; and the gradient of the head's input."""
  data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
  c, i, rings = machine.c, machine.itemsize, machine.platform == "tpu" and data == 1
  layers, tables = i * machine.layers / tensor, i * (1 if c.tied else 2) * machine.head / tensor
  last = i * c.depth * c.ffn * c.width / tensor
  whole = layers - last if remat == "full" else layers if tensor > 1 else 0
  ringed = (3 if compares else 2) * layers - whole
  there, back = (fsdp + 1 if rings and fsdp > least else fsdp - 1 for least in (4, 2))
  gathered = (whole + 2 * tables + (tables if compares else 0)) * (fsdp - 1)
  along_fsdp = (gathered + ringed * there + layers * back) * passes / fsdp
  along_data = 2 * (layers + tables) / fsdp * (data - 1) / data
  sums = (5 if remat == "full" else 4) * c.depth + 1
  along_tensor = sums * places / (data * fsdp) * c.width * i * 2 * (tensor - 1) / tensor
  return along_fsdp + along_data + along_tensor
