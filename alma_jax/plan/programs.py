"""The programs that the stages run, lowered from shapes alone, for devices that need not be here.

  for program in programs(machine, step, devices): ...     # Program("decode", make, beside=0): make() -> Compiled

One small function for each engine: it says how that engine is called. Shapes are those of the longest texts that the
config lets in. The Step is the quick plan's, whose rows and slots these programs have.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets, embed, lloyd, losses, points, sample, score, train
from alma_jax.engine.slots import PREFILL_ROWS
from alma_jax.engine.train import TrainingTask
from alma_jax.llama import decoder, reading, sharding
from alma_jax.llama import model as llama
from alma_jax.plan.devices import local_mesh
from alma_jax.plan.estimate import CHUNK
from alma_jax.plan.estimate_reading import rows_of_calls, tile_of
from alma_jax.plan.estimate_sampling import shapes_of
from alma_jax.plan.estimate_training import in_more_passes, training, with_options
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.work import Clustering, Reading, Sampling, Scoring, Training
from alma_jax.runtime.batches import Examples, GradedResponses, Pairs, Rated
from alma_jax.runtime.shapes import Shape

STEPS = 16  # of a decode segment; memory does not depend on it
SCORES = 11  # next tokens that a judge reads


@dataclasses.dataclass(frozen=True)
class Program:
  name: str
  make: Callable[[], Any]  # lowers and compiles: a Compiled, or the train.Plan of a step
  beside: int = 0  # bytes that are on each device beside the program's own
  part: bool = True  # of the stage's step; other programs run now and then
  live: Mapping[int, float] | None = None  # what attention finds in its rows, for `traffic.moved`: keys, by queries


def programs(machine: Machine, step: Step, devices: Sequence[Any]) -> list[Program]:
  """The programs of a stage."""
  work = step.work
  if isinstance(work, Scoring):
    return list(_logprobs(machine, step, work, devices))
  if isinstance(work, Training):
    more = _logprobs(machine, step, work, devices) if work.forward else ()
    return [Program("step", functools.partial(planned_training, machine, step, devices)), *more]
  if isinstance(work, Clustering):
    return list(_clustering(machine, work, devices))
  mesh = local_mesh(machine.topology, devices, machine.tensor)
  if isinstance(work, Sampling):
    made = _sampling(machine, work, mesh, step.slots or 1)
  elif isinstance(work, Reading):
    made = _judging(machine, work, mesh) if work.prefixes else _embedding(machine, work, mesh)
  else:
    return []
  return [dataclasses.replace(program, beside=program.beside + machine.others) for program in made]


def key(machine: Machine, step: Step) -> Any:
  """What the programs of a stage depend on: stages with equal keys run the same ones."""
  work = step.work
  if isinstance(work, Training):
    o = work.options
    rate = dict(learning_rate=1.0, final_learning_rate=0.0, warmup=0.0, schedule="constant")
    how = o.objective(machine.dtype), dataclasses.replace(o.optimizer, **rate)
    return "training", how, o.batch, step.shape, step.mesh, step.passes, bool(work.forward), type(work)
  if isinstance(work, Clustering):
    return "clustering", work.k, work.dims, min(work.rows, CHUNK * machine.topology.devices)
  if isinstance(work, Sampling):
    return "sampling", work.options.decoding, shapes_of(machine, work, step.slots or 1)
  if isinstance(work, Reading):
    return "reading", work.longest, work.longest_prefix, tile_of(machine, work), work.layers, work.logprobs
  return None


# Training


def planned_training(machine: Machine, step: Step, devices: Sequence[Any]) -> train.Plan:
  """The Plan that the run itself would make, on these devices; a TrainingError where nothing fits."""
  work, o = step.work, step.work.options  # pyright: ignore[reportAttributeAccessIssue]
  assert isinstance(work, Training) and step.shape and step.passes
  task = TrainingTask(o.optimizer, o.objective(machine.dtype), _training_mesh(machine, step, devices), steps=1)
  try:
    return train.planned(machine.c, task, batch(work, step.shape), step.passes, machine.topology.chip.memory)
  except train.TooLarge as error:
    now = with_options(work, passes=step.passes)
    more = in_more_passes(now, step.shape, task.mesh.abstract_mesh) if error.in_more_passes else None
    if more is None:
      raise
  return planned_training(machine, training(machine, more), devices)


def _training_mesh(machine: Machine, step: Step, devices: Sequence[Any]) -> Mesh:
  """The config's mesh of these devices, or the one that the step has instead (`runtime.training`)."""
  mesh = sharding.make_mesh(**dataclasses.asdict(machine.mesh), devices=devices)
  wanted = dataclasses.astuple(step.mesh) if step.mesh else mesh.devices.shape
  others = (mesh, *sharding.with_fewer_replicas(mesh, machine.c))
  found = (each for other in others for each in (other, sharding.with_whole_lanes(other, machine.c)))
  return next((each for each in found if each.devices.shape == wanted), mesh)


def batch(work: Training, shape: Shape) -> dict[str, Any]:
  """A batch of the shapes that such a step has."""
  o, kind = work.options, work.options.objective("float32").kind
  one, names = (np.zeros(4, np.int32), np.array([0, 1, 1, 1], bool)), [0]
  if isinstance(kind, losses.Preference):
    reference = np.zeros((1, kind.sides)) if kind.has_reference else None
    data: Any = Pairs([(one, one)], names, reference, [one] if kind.sides > 2 else None)
  elif isinstance(kind, losses.Grpo):
    data = GradedResponses([one], names, np.zeros(1), [np.zeros(3)], [np.zeros(3)])
  elif isinstance(kind, losses.Regression):
    data = Rated([one], names, np.zeros(1), np.zeros((1, 1)))
  else:
    data = Examples([one], names)
  return data.rows(np.arange(1), (shape, Shape(shape.rows, shape.length // work.sides)), o.batch)


def _logprobs(machine: Machine, step: Step, work: Training, devices: Sequence[Any]) -> Iterator[Program]:
  """By the code that trains."""
  mesh, shape = _training_mesh(machine, step, devices), step.shape
  assert shape is not None

  def make() -> Any:
    rows, width = shape
    names = ("tokens", "targets", "segments", "positions", "example")
    given = {name: _array(mesh, rows, width) for name in names}
    given["weights"] = _array(mesh, rows, width, dtype=jnp.float32)
    with jax.set_mesh(mesh):
      scorer: Any = train._scorer(work.options.batch, machine.dtype, mesh, True if machine.platform == "gpu" else None)
      return scorer.lower(_weights(machine, mesh, sharding.TRAIN, "float32"), given).compile()

  yield Program("log-probs", make, part=isinstance(work, Scoring))


# Sampling


def _sampling(machine: Machine, work: Sampling, mesh: Mesh, slots: int) -> Iterator[Program]:
  shapes, ways = shapes_of(machine, work, slots), sharding.replicas(mesh)
  decoding = dataclasses.replace(work.options.decoding, stop_ids=(1, 2))
  model = _weights(machine, mesh, sharding.DECODE, unrolled=True)
  with _alone(mesh):
    empty = jax.eval_shape(lambda model: sample._empty(model, shapes, decoding, mesh), model)
  state = _placed(empty, sample._placed(empty, machine.c, mesh))
  R, slot_rows = PREFILL_ROWS, _array(mesh, ways * shapes.slots)

  def prefill() -> Any:
    rows = _array(mesh, ways * R)
    tokens = _array(mesh, ways * R, shapes.room)
    with _alone(mesh):
      return sample._fill.lower(model, state, None, tokens, rows, rows, mesh=mesh).compile()

  def refill() -> Any:
    keys = _array(mesh, ways * shapes.slots, 2, dtype=jnp.uint32)
    said = _array(mesh, ways * shapes.rows, shapes.room) if decoding.remembers else None
    with _alone(mesh):
      return sample._start.lower(state, slot_rows, keys, said, decoding=decoding, mesh=mesh).compile()

  def decode() -> Any:
    tiles = None
    if shapes.tile > 1:
      slots, live = _array(mesh, ways * shapes.rows, shapes.tile), _array(mesh, ways * shapes.rows)
      tiles = decoder.Tiles(slots, live, slot_rows)  # pyright: ignore[reportArgumentType]
    with _alone(mesh):
      return sample._segment.lower(model, state, tiles, decoding=decoding, steps=STEPS, mesh=mesh).compile()

  yield Program("prefill", prefill, part=False)
  yield Program("refill", refill, machine.model_bytes, part=False)
  new = work.tokens / max(1, work.rows)
  # Prompts as long as they may be; where a slot reads a row of its own, both calls have one query.
  live = {1: new, shapes.tile: float(shapes.room)} if shapes.tile > 1 else {1: (new + shapes.room) / 2}
  yield Program("decode", decode, live=live)


# Judging and embedding


def _judging(machine: Machine, work: Reading, mesh: Mesh) -> Iterator[Program]:
  """Prefixes of a wave, and a call whose rows follow them."""
  c, rows, ways = machine.c, rows_of_calls(machine, work), sharding.replicas(mesh)
  before, longest = buckets.rounded(work.longest_prefix), buckets.rounded(work.longest)
  wide = tile_of(machine, work)
  held = buckets.held(rows, before)
  model = _weights(machine, mesh, sharding.DECODE)
  heads = "tensor" if c.kv_heads % mesh.shape["tensor"] == 0 else None
  spec = P(None, sharding.BATCH, None, heads)

  def prefixes() -> Any:
    with _alone(mesh):
      tokens = _array(mesh, ways * held, before)
      return score._prefixes.lower(model, tokens, _array(mesh, ways * held), None, mesh=mesh).compile()

  def read() -> Any:
    n = ways * rows // wide
    shape = c.depth, ways * held, before, c.kv_heads, c.head_dim
    kv = _array(mesh, *shape, dtype=jnp.dtype(machine.dtype), spec=spec)
    prefix = reading.Prefix((kv, kv), _array(mesh, ways * held), _array(mesh, n))
    tokens, lengths = _array(mesh, ways * rows, longest), _array(mesh, ways * rows)
    columns = _array(mesh, SCORES, spec=sharding.WHOLE)
    with _alone(mesh):
      if work.logprobs:
        return score._score.lower(model, prefix, tokens, lengths, mesh=mesh).compile()
      return score._read.lower(model, prefix, tokens, lengths, columns, reads=1, mesh=mesh).compile()

  yield Program("prefixes", prefixes, _head_bytes(machine), part=False)
  yield Program("read", read)


def _embedding(machine: Machine, work: Reading, mesh: Mesh) -> Iterator[Program]:
  def pooled() -> Any:
    rows, width = sharding.replicas(mesh) * machine.engine.rows, buckets.rounded(work.longest)
    tokens, lengths = _array(mesh, rows, width), _array(mesh, rows)
    model = _weights(machine, mesh, sharding.DECODE, unrolled=embed.layout(mesh) == "unrolled")
    how: Any = dict(mesh=mesh, layers=work.layers or None, pooling="mean")
    with _alone(mesh):
      return embed._pooled.lower(model, None, tokens, lengths, **how).compile()

  yield Program("embed", pooled, _head_bytes(machine))


def _head_bytes(machine: Machine) -> int:
  """The head's bytes on each device, which lie beside a program that reads no logits: JAX leaves them out of it."""
  return 0 if machine.c.tied else machine.head * machine.itemsize // machine.tensor


# K-means


def _clustering(machine: Machine, work: Clustering, devices: Sequence[Any]) -> Iterator[Program]:
  """A chunk of points is there twice: the next one is read while one is used."""
  along = points.ways_of_centroids(work.k, work.dims, len(devices), machine.topology.chip.memory)
  if along is None:
    return
  mesh, n = points.mesh_of(len(devices) // along, along, devices), work.rows
  source: Any = types.SimpleNamespace(shape=(n, work.dims), dtype=np.dtype(np.float16))
  data = points.Points(source, mesh, min(n, CHUNK * len(devices) // along), work.k, False)
  tile, K = data.tiled(work.k)
  found = lloyd.programs_for(mesh, (data.tile, tile), False)

  def array(*shape: int, spec: P = sharding.WHOLE, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return _array(mesh, *shape, dtype=dtype, spec=spec)

  ways, own, fp32 = mesh.shape["data"], P("data", "k"), jnp.float32
  c = array(K, work.dims, spec=P("k"), dtype=fp32)
  sums = (
    array(ways, K, work.dims, spec=own, dtype=fp32), array(ways, K, spec=own), array(ways, K, spec=own, dtype=fp32),
  )  # fmt: skip
  x = array(data.rows, work.dims, spec=P("data"), dtype=data.dtype), array(data.rows, spec=P("data"), dtype=fp32)
  makes: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "accumulate": (found.accumulate, (*sums, *x, c, array(), array())),
    "move": (found.move, (*sums, c)),
    "assign": (found.assign, (*x, c, array(), array())),
  }
  chunk = data.rows // ways * work.dims * data.dtype.itemsize
  for name, (program, args) in makes.items():

    def make(program: Any = program, args: tuple[Any, ...] = args) -> Any:
      return program.lower(*args).compile()

    yield Program(name, make, chunk if name != "move" else 2 * chunk, part=name != "assign")


# Shapes and places


def _alone(mesh: Mesh) -> Any:
  """A mesh of one device is in force, so that what is traced knows its platform: the engine gives it none."""
  return jax.set_mesh(mesh) if mesh.size == 1 else contextlib.nullcontext()


def _array(mesh: Mesh, *shape: int, dtype: Any = jnp.int32, spec: P = sharding.REPLICA) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _placed(tree: Any, places: Any) -> Any:
  return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, places)


def _weights(
  machine: Machine, mesh: Mesh, rules: dict[str, str], dtype: str | None = None, unrolled: bool = False
) -> Any:
  """Shapes and places of a model."""
  tree = jax.eval_shape(lambda model: llama.cast(model, dtype or machine.dtype), machine.shape)
  tree = jax.eval_shape(llama.unrolled, tree) if unrolled else tree
  return _placed(tree, sharding.shardings(tree, mesh, rules))
