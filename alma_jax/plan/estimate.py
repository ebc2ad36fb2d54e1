"""Time and memory of each stage's Work on a Topology, by roofline: nothing is compiled and no weights are read.

  machine = Machine(topology, c, mesh, engine, model, assumptions)
  step = estimate(machine, work)       # a Step: fits, peak, seconds, hours, and what would help where it does not fit

A step of training is one update, of sampling one token of every slot, of reading one call, of k-means one iteration.
Time is the longest of arithmetic, memory traffic and collectives, each at its share of the peak (plan/assumptions.py);
what a tensor group exchanges in sampling and reading is waited for.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from alma_jax.engine import buckets, points
from alma_jax.engine.choose import Decoding, reads_once
from alma_jax.engine.score import reading_bytes, rows_that_fit
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
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.llama.attention_decode_tpu import block
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Llama
from alma_jax.plan import assumptions as shares
from alma_jax.plan import topology as topologies
from alma_jax.plan.assumptions import Assumptions
from alma_jax.plan.hlo import Collective
from alma_jax.plan.memory import scoring_bytes, training_bytes
from alma_jax.plan.topology import Topology
from alma_jax.plan.work import Clustering, Reading, Sampling, Scoring, Training, Work, epochs_kept, steps
from alma_jax.runtime import metrics, room
from alma_jax.runtime import shapes as rows_of
from alma_jax.runtime.batches import ROWS
from alma_jax.runtime.host import EngineOptions, ModelOptions, models_that_stay, sampling_bytes, tensor_for
from alma_jax.runtime.session import MeshOptions
from alma_jax.runtime.shapes import Shape
from alma_jax.runtime.training import USEFUL

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
K_MEANS_BLOCK = {"gpu": 16384, "tpu": 2048}  # points that a centroid meets each time it is read; see engine/nearest.py
K_MEANS_SCORE = 12  # bytes of memory traffic for each score where they go through memory
REMAT = {"none": 1.0, "products": 1.0, "full": 4 / 3}  # times a step's arithmetic
DRAWN = 3200  # rows whose lengths are drawn, of a stage that reads texts
STEPS, LONG = 16, 60  # steps whose lengths are drawn; trainings of so many steps may have more programs
CHUNK = 2**17  # points of a chunk on each device
COPIES = 2.5  # of the centroids on each device: themselves, their sums, and themselves in half precision


@dataclasses.dataclass(frozen=True)
class Step:
  """What a stage needs. A field is None where the stage has no such thing."""

  work: Work
  fits: bool = True
  peak: float = 0.0  # bytes on each device
  usable: float = 0.0  # of which there are so many; the allocator wastes some in sampling
  remat: str | None = None
  passes: int | None = None
  slots: int | None = None
  shape: Shape | None = None  # rows x row length of the largest step of a training
  mesh: MeshOptions | None = None  # of a training: the config's, or one with larger tensor groups
  flops: float = 0.0  # useful ones of the whole stage
  traffic: float = 0.0  # bytes of memory of a step and device; 0: not what decides
  collective: float = 0.0  # bytes of a step and device
  seconds: float = 0.0  # of a step
  hours: float = 0.0
  host: float = 0.0  # bytes of each host
  disk: float = 0.0  # bytes that stay
  beside: float = 0.0  # bytes that are on disk while it runs
  helps: str = ""
  compiled: bool = False  # its memory and collectives are a compiler's figures
  collectives: tuple[Collective, ...] = ()
  refused: str = ""  # by the compiler, in its words

  @property
  def places(self) -> int | None:
    return self.shape and self.shape.places


@dataclasses.dataclass(frozen=True)
class Machine:
  topology: Topology
  c: LlamaConfig
  mesh: MeshOptions
  engine: EngineOptions
  model: ModelOptions
  assumptions: Assumptions

  @property
  def platform(self) -> str:
    return self.topology.chip.platform

  @property
  def dtype(self) -> str:
    if self.model.dtype != "auto":
      return self.model.dtype
    return "float32" if self.platform == "cpu" else "bfloat16"

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.dtype).itemsize

  @property
  def peak(self) -> float:
    """Products a second, for fp32 on accelerators an eighth: several passes of their matrix units."""
    slow = self.dtype == "float32" and self.platform != "cpu"
    return self.topology.chip.flops / (8 if slow else 1)

  @property
  def training_mesh(self) -> AbstractMesh:
    return sharding.abstract_mesh(self.topology.devices, **dataclasses.asdict(self.mesh))

  @functools.cached_property
  def tensor(self) -> int:
    """The devices that share a copy of the model in sampling and reading."""
    return self.engine.tensor or tensor_for(self.c, self.dtype, self.topology.local, self.topology.chip.memory)

  @property
  def replicas(self) -> int:
    """Copies of the model on all devices in sampling and reading."""
    return self.topology.devices // self.tensor

  @property
  def model_bytes(self) -> int:
    """A model's weights on each device in sampling and reading."""
    return self.c.parameters * self.itemsize // self.tensor

  @property
  def held(self) -> int:
    """The weights that are on each device in sampling."""
    return self.model_bytes * models_that_stay(self.model_bytes, self.topology.chip.memory)

  @property
  def others(self) -> int:
    """Of those weights the ones beside the model at work."""
    return self.held - self.model_bytes

  @property
  def local_mesh(self) -> AbstractMesh:
    return sharding.abstract_mesh(self.topology.local, tensor=self.tensor)

  @property
  def shape(self) -> Llama:
    return _shape(self.c, self.dtype)

  @property
  def layers(self) -> int:
    """The weights that every token goes through, without embedding and head."""
    return self.c.parameters - self.c.vocab * self.c.width * (1 if self.c.tied else 2)

  @property
  def head(self) -> int:
    return self.c.vocab * self.c.width


@functools.cache
def _shape(c: LlamaConfig, dtype: str) -> Llama:
  return jax.eval_shape(lambda: llama.cast(llama.init(c, 0), dtype))


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
    found = _sampling(machine, work) if isinstance(work, Sampling) else _reading(machine, work)
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


def with_options(work: Training, **fields: object) -> Training:
  return dataclasses.replace(work, options=dataclasses.replace(work.options, **fields))


# Training


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
  drawn = _drawn(examples, length, width)
  parts = [drawn[at : at + batch].tolist() for at in range(0, examples, batch)]
  many = parts * max(1, steps // len(parts))  # how many programs pay depends on the number of steps
  found = rows_of.fitted(many, width, unit) if unit > 0 else rows_of.fixed(parts, width, -unit)
  largest = max(found, key=_places)
  return largest, sum(map(_places, found)) / len(found), float(drawn.sum()) / len(parts)


def _drawn(count: int, length: float, most: int, seed: int = 0) -> np.ndarray:
  """Lengths of so many texts, of this mean and at most so long."""
  z = np.random.default_rng(seed).normal(size=count)
  found = length * np.exp(shares.LENGTHS[0] * z - shares.LENGTHS[0] ** 2 / 2)
  return np.clip(np.rint(found), 1, most).astype(int)


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
  remat="full" what goes forward again, all but the last product; in tensor groups the weights of one direction.

  Along tensor, the streams after attention and after the feed-forward part are summed, and their gradients on the way
  back; with remat="full" the first one again; and the gradient of the head's input."""
  data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
  c, i, tpu = machine.c, machine.itemsize, machine.platform == "tpu"
  layers, tables = i * machine.layers / tensor, i * (1 if c.tied else 2) * machine.head / tensor
  last = i * c.depth * c.ffn * c.width / tensor
  whole = layers - last if remat == "full" else layers if tensor > 1 else 0
  ringed = (3 if compares else 2) * layers - whole
  there, back = (fsdp + 1 if tpu and fsdp > least else fsdp - 1 for least in (4, 2))
  gathered = (whole + 2 * tables + (tables if compares else 0)) * (fsdp - 1)
  along_fsdp = (gathered + ringed * there + layers * back) * passes / fsdp
  along_data = 2 * (layers + tables) / fsdp * (data - 1) / data
  sums = (5 if remat == "full" else 4) * c.depth + 1
  along_tensor = sums * places / (data * fsdp) * c.width * i * 2 * (tensor - 1) / tensor
  return along_fsdp + along_data + along_tensor


# Sampling


def _sampling(machine: Machine, work: Sampling) -> Step:
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
  sent, link = _shared(machine, slots, logits=True), _link(machine)
  seconds = max(traffic / (chip.bandwidth * shares.DECODING[0]), flops / (machine.peak * shares.PRODUCTS[0]))
  seconds += sent / link
  decode = work.tokens / (slots * machine.replicas * shares.SLOTS[0]) * seconds
  tokens = work.prompts * work.prompt_tokens
  prefill = _forward(machine, tokens, work.prompt_tokens)
  rate = machine.peak * machine.topology.devices * shares.PRODUCTS[0]
  filling = prefill / rate + _shared(machine, tokens / machine.replicas) / link
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


def _shared(machine: Machine, tokens: float, layers: int = 0, logits: bool = False) -> float:
  """Bytes that a device sends to its tensor group for so many of the group's tokens: the rows of the embedding and two
  results of each layer are summed over the group. `logits`: they are exchanged, too, each device choosing for its share
  of the slots by the kernel, and elsewhere for all of them."""
  c, tensor = machine.c, machine.tensor
  summed = 2 * (2 * (layers or c.depth) + 1) * c.width * machine.itemsize
  chosen = 4 * c.vocab / (tensor if machine.platform == "tpu" else 1) if logits else 0
  return tokens * (summed + chosen) * (tensor - 1) / tensor


def _link(machine: Machine) -> float:
  """Bytes a second that `_shared` is sent at."""
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
  heads = llama.cache_heads(machine.c, machine.shape.embed.get_value().dtype, machine.local_mesh, machine.platform)[0]
  heads = heads // machine.tensor if machine.c.kv_heads % machine.tensor == 0 else heads
  return (min(S, live + block(S, heads) / 2) if machine.platform == "tpu" else live), 0


def _forward(machine: Machine, tokens: float, context: float, layers: float = 0) -> float:
  """The arithmetic of a forward pass without the head; a token has half of its text behind it."""
  c, share = machine.c, layers / machine.c.depth if layers else 1.0
  return tokens * share * (2 * machine.layers + 2 * c.depth * c.heads * c.head_dim * context)


# Judging and embedding


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
  lengths = _drawn(prefixes * each or DRAWN, length, longest)
  if not prefixes:
    return float(lengths.sum()) / sum(map(buckets.rounded, lengths.tolist()))
  texts = [[buckets.Suffix((0,) * n, []) for n in some] for some in lengths.reshape(prefixes, each).tolist()]
  heads = [(i, *(0,) * n) for i, n in enumerate(_drawn(prefixes, before, longest, seed=1))]
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


def _reading(machine: Machine, work: Reading) -> Step:
  c, chip, tensor = machine.c, machine.topology.chip, machine.tensor
  rows, width, longest = rows_of_calls(machine, work), work.tokens / max(1, work.rows), buckets.rounded(work.longest)
  before = buckets.rounded(work.longest_prefix) if work.prefixes else 0
  shared, target = tile_of(machine, work), machine.platform
  working = reading_bytes(c, tensor, machine.itemsize, rows, longest, before, shared, target)
  peak = machine.held + working
  useful, before = filled(machine, work), work.prefixes * work.prefix_tokens
  # Of the last layer prefixes take keys and values alone, and so do rows of which single places are read.
  part = c.depth - 1 + 2 * c.width * c.kv_heads * c.head_dim * c.depth / machine.layers
  layers = part if work.prefixes and not work.logprobs else work.layers
  flops = _forward(machine, work.tokens, width + 2 * work.prefix_tokens, layers) + _forward(
    machine, before, work.prefix_tokens, part
  )
  flops += 2 * machine.head * work.tokens if work.logprobs else 0
  sent = _shared(machine, (work.tokens + before) / machine.replicas / useful, work.layers)
  calls = work.rows / (rows * machine.replicas)
  rate = machine.peak * machine.topology.devices * shares.PRODUCTS[0]
  arithmetic = flops / useful / rate
  reads = calls * machine.model_bytes / (chip.bandwidth * shares.DECODING[0])
  seconds = work.models * (max(arithmetic, reads) + sent / _link(machine))
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
