"""Training: one sharded AdamW loop for SFT, preferences and policy gradients.

  task = TrainingTask(Optimizer(2e-5, 2e-6), Objective(), mesh, steps=180, seed=1)
  plan = planned(c, task, batches(0), passes=2, memory=80e9)      the compiled step, and what it needs on every device
  model = fit(model, batches, task, plan, Hooks(report=print))    the trained fp32 model

The step is compiled once per shape: the learning rate comes in as a number, so schedules and step counts of different
rounds share the compilation. Weights are fp32, moments fp32 or bf16, both sharded by the same rules; the forward and
backward pass run in `compute_dtype` on a copy of the weights. A step's batch holds a fixed number of examples packed
into rows, which go through the model in one or more `passes`; the loss is normalised by what the whole batch
supervises, so packing, passes and the number of devices do not change it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import losses
from alma_jax.engine.losses import Batch, Metrics
from alma_jax.engine.optimizer import Optimizer, learning_rate, transformation
from alma_jax.errors import UserError
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.llama.attention_reference import few_runs
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.sharding import BATCH
from alma_jax.options import Checked, option, refuse

Tree = TypeVar("Tree")


class TrainingError(UserError):
  """Training that cannot begin or go on; the message says why and what helps."""


class TooLarge(TrainingError):
  """A step that fits in no way; `in_more_passes`: it would take less in twice as many passes."""

  def __init__(self, message: str, in_more_passes: bool) -> None:
    super().__init__(message)
    self.in_more_passes = in_more_passes


class Stopped(Exception):
  """Training that was asked to stop and has saved its state."""


class State(NamedTuple):
  """What a checkpoint holds."""

  model: llama.Llama  # fp32
  moments: optax.OptState
  memory: losses.Memory  # of self-refinement


# What is trained


@dataclasses.dataclass(frozen=True)
class Objective(Checked):
  """What a step minimises, and how the model is run for that."""

  kind: losses.Preference | losses.Grpo | losses.Regression | None = None  # None: the NLL of SFT
  remat: Literal["auto", "none", "products", "full"] = "none"  # what is kept for the backward pass; auto: see `planned`
  dropout: float = option(0.0, least=0)  # residual dropout of the last layer; it rises evenly from 0 in the first
  compute_dtype: str = "float32"
  remembers: int = option(0, least=0)  # margins that self-refinement finds its threshold in
  few: bool | None = None  # whether rows hold few examples, see `llama.attention.causal`; `planned` says it

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.dropout < 1:
      refuse("dropout", self.dropout, "must be at least 0 and below 1")

  @property
  def refinement(self) -> losses.SelfRefinement | None:
    return self.kind if isinstance(self.kind, losses.SelfRefinement) else None

  @property
  def compares(self) -> bool:
    """True if the steps need the reference model itself beside its log-probs."""
    return self.refinement is not None and self.refinement.mix > 0

  def loss(
    self, model: llama.Llama, batch: Batch, whole: losses.Totals, reference: llama.Llama | None = None
  ) -> tuple[Array, Metrics]:
    """The loss and metrics of a batch, which is part of one with the totals `whole`."""
    how = losses.How(self.remat, self.dropout, self.few)
    if isinstance(self.kind, losses.Preference):
      return losses.preference(model, batch, self.kind, how, whole, reference)
    if isinstance(self.kind, losses.Grpo):
      return losses.grpo(model, batch, self.kind, how, whole)
    if isinstance(self.kind, losses.Regression):
      return losses.regression(model, batch, how, whole)
    return losses.sft(model, batch, how, whole)


@dataclasses.dataclass(frozen=True)
class TrainingTask:
  """A training but for its data: how weights are updated, towards what, and on which devices."""

  optimizer: Optimizer
  objective: Objective
  mesh: Mesh
  steps: int
  seed: int = 0  # of dropout


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What the caller does during `fit`, which touches no files."""

  # Shapes and shardings of the state -> a saved one and its step. Called before the given model is used, so that it may
  # drop that one, and two states are never there at once.
  restore: Callable[[State], tuple[State, int] | None] | None = None
  save: Callable[[int, State], None] | None = None  # called after `every` so many steps
  every: int = 1
  keep: Callable[[int, llama.Llama], None] | None = None  # called with the model after each of the steps in `kept`
  kept: frozenset[int] = frozenset()
  report: Callable[[int, dict[str, float]], None] | None = None  # a step late, so that the devices never wait for it
  failed: Callable[[int, llama.Llama], str] | None = None  # a loss was not finite: what to add to the message
  stop: Callable[[], bool] | None = None  # True: this host wants to end; `fit` saves and raises Stopped


# The compiled step


class _Programs(NamedTuple):
  start: Callable[[llama.Llama], State]
  step: Any  # jitted (state, batch, rate, and the reference model if it is compared) -> (state, metrics)
  state: Any  # shapes and shardings of the State


@functools.cache
def _programs(c: LlamaConfig, mesh: Mesh | AbstractMesh, o: Optimizer, objective: Objective) -> _Programs:
  """The programs of an optimizer without its schedule, cached so that rounds share compilations."""
  tx: Any = transformation(o)  # optax takes every pytree, its types do not

  def fresh() -> llama.Llama:
    return llama.init(c, 0)

  def begun(model: llama.Llama) -> State:
    return State(model, tx.init(model), losses.no_margins(objective.remembers))

  abstract = jax.eval_shape(lambda: begun(fresh()))
  shardings = State(*(sharding.shardings(tree, mesh, sharding.TRAIN) for tree in abstract))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def start(model: llama.Llama) -> State:
    return begun(llama.cast(model, jnp.float32))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
  def step(
    state: State, batch: dict[str, Any], rate: Array, reference: llama.Llama | None = None
  ) -> tuple[State, Metrics]:
    model, moments, memory = state
    if objective.refinement:  # by the margins of the steps before this one
      batch = batch | {"threshold": losses.threshold(objective.refinement, memory)}
    (_, metrics), gradient = _gradient(llama.cast(model, objective.compute_dtype), batch, objective, reference)
    if objective.refinement:
      memory = losses.remembered(memory, metrics.pop("margins"), batch["real"])
      metrics = metrics | {"threshold": batch["threshold"]}
    if mesh.size > 1:  # each device needs its own part: gradients are reduce-scattered
      gradient = jax.lax.with_sharding_constraint(gradient, shardings.model)
    norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    # A gradient that is not finite changes no weight: the loop ends there, and looks at what the weights make of it.
    finite = jnp.isfinite(metrics["loss"] + norm)
    scale = jnp.minimum(1.0, o.clip / norm)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x.astype(jnp.float32) * scale, 0.0), gradient)
    updates, moments = tx.update(gradient, moments, model)
    rate = jnp.where(finite, rate, 0.0)
    model = jax.tree.map(lambda w, u: w - rate * u, model, updates)
    return State(model, moments, memory), metrics | {"gradient_norm": norm}

  placed = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), abstract, shardings)
  return _Programs(start, step, placed)


def abstract_state(c: LlamaConfig, mesh: Mesh, moments: Literal["float32", "bfloat16"]) -> State:
  """Shapes and shardings of the State that a checkpoint is restored to."""
  return _programs(c, mesh, Optimizer(1.0, 0.0, moments=moments), Objective()).state


def _gradient(
  model: llama.Llama, batch: dict[str, Any], objective: Objective, reference: llama.Llama | None = None
) -> Any:
  """The ((loss, metrics), gradient) of a batch whose arrays by rows lead with the passes.

  With 8 rows of 512 tokens in 2 passes, and 4 pairs:

    tokens, weights, ...   [2, 4, 512]   one part for each pass
    reference, real        [4, 2], [4]   each pass sees them whole
    other                  a batch of its own, for KTO: a forward pass and no more
  """
  rows, other = _by_rows(batch), batch.get("other")
  constants = {name: x for name, x in batch.items() if name not in rows and name != "other"}
  whole = losses.totals(batch)
  if other is not None:
    pairs = batch["real"].shape[0]

    def sums(part: Batch) -> Array:
      logprobs = losses.batch_logprobs(model, part, losses.How(few=objective.few))
      return losses.sequence_logprobs(logprobs, part, pairs)

    summed = jax.lax.map(sums, other).sum(axis=0)  # a sequence is in one pass and counts 0 in the others
    constants["kl"] = losses.divergence(summed, batch["reference"][:, 2], batch["real"])
  passes = batch["tokens"].shape[0]

  def one(i: Array, part: dict[str, Any]) -> Any:
    if "key" in constants:  # (seed, step) -> (seed, number of the pass in the whole training)
      part = part | {"key": jnp.stack([constants["key"][0], constants["key"][1] * passes + i.astype(jnp.uint32)])}

    def value(model: llama.Llama) -> tuple[Array, Metrics]:
      return objective.loss(model, constants | part, whole, reference)

    return jax.value_and_grad(value, has_aux=True)(model)

  if passes == 1:
    return one(jnp.uint32(0), jax.tree.map(lambda x: x[0], rows))

  def add(total: Tree, x: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, x)

  # Losses are sums over the whole batch's totals, so the passes' losses, metrics and gradients add up, in fp32.
  shapes = jax.eval_shape(one, jnp.uint32(0), jax.tree.map(lambda x: x[0], rows))
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  return jax.lax.scan(lambda total, x: (add(total, one(*x)), None), nothing, (jnp.arange(passes), rows))[0]


def _by_rows(batch: dict[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in batch.items() if getattr(x, "ndim", 0) == 3}


# Plans

_Shapes = tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of each array of a batch


class Kind(NamedTuple):
  """What batches have in common that go through one compiled step."""

  shapes: _Shapes
  few: bool | None  # whether all rows hold few examples; None where no kernel of the devices wants to know


def kind_of(batch: Batch, mesh: Mesh) -> Kind:
  """The Kind of a host batch."""
  arrays = dict(_flat(batch))
  few = None
  if mesh.devices.flat[0].platform == "gpu":
    segments = [x for name, x in arrays.items() if name.rpartition("/")[2] in ("segments", "order_segments")]
    few = all(((x[:, 1:] != x[:, :-1]).sum(axis=1) < few_runs(x.shape[1])).all() for x in segments)
  return Kind(tuple(sorted((name, x.shape, x.dtype.str) for name, x in arrays.items())), few)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step, how it was compiled, and the bytes it needs on each device."""

  step: Callable[..., tuple[State, Metrics]]
  remat: str
  passes: int
  state: int  # weights, moments and batch
  working: int  # gradients, activations, the copy that computes
  kind: "Kind"  # of the batches that it takes

  @property
  def bytes(self) -> int:
    return self.state + self.working


@dataclasses.dataclass(frozen=True)
class _Refused:
  """A step that the compiler of the devices refuses because it finds no room for it."""

  remat: str
  passes: int
  says: str  # the compiler


def planned(c: LlamaConfig, task: TrainingTask, batch: Batch, passes: int = 1, memory: float | None = None) -> Plan:
  """The Plan for batches like this one.

  With remat "auto" it is the quickest that fits into `memory` bytes a device (None: the quickest that the compiler
  takes). What cannot fit is not compiled, except for the leanest. If none fits, the TooLarge says what would help.
  """
  ways = tuple(llama.REMAT) if task.objective.remat == "auto" else (task.objective.remat,)
  kind, tried = kind_of(batch, task.mesh), []
  for remat in ways:
    objective = dataclasses.replace(task.objective, remat=remat, few=kind.few)
    how = c, task.mesh, _unscheduled(task.optimizer), objective
    if memory is not None and remat != ways[-1] and least_bytes(*how, batch["tokens"].size // passes) > memory:
      continue
    plan = _plan(*how, kind, passes)
    if isinstance(plan, Plan) and (memory is None or plan.bytes <= memory):
      return plan
    tried.append(plan)
  # Of steps that the compiler refused, the last one is the leanest.
  leanest = min(reversed(tried), key=lambda plan: plan.bytes if isinstance(plan, Plan) else math.inf)
  raise _too_large(leanest, memory or 0, task, batch["tokens"].shape)


def least_bytes(c: LlamaConfig, mesh: Mesh | AbstractMesh, o: Optimizer, objective: Objective, places: int) -> int:
  """Bytes that a step over so many places takes on each device at the least: weights, moments, and what the layers keep
  for the backward pass. XLA keeps more, in fp32, and needs room for gradients and logits. The objective's remat is not
  "auto"."""
  state = 0
  for x in jax.tree.leaves(_programs(c, mesh, _unscheduled(o), objective).state):
    state += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  kept = kept_numbers(c, objective.remat) * jnp.dtype(objective.compute_dtype).itemsize
  return state + c.depth * places * kept // mesh.size


def kept_numbers(c: LlamaConfig, remat: str) -> int:
  """How many numbers a layer keeps of each place for the backward pass.

  full       the layer's input
  products   that, q, k, v, gate, up, and the stream between attention and the feed-forward part
  none       that, both norms' results, attention's out, and silu(gate) * up
  """
  D, Q, K, F = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.ffn
  return {"full": D, "products": 2 * D + Q + 2 * K + 2 * F, "none": 4 * D + 2 * Q + 2 * K + 3 * F}[remat]


def _too_large(plan: Plan | _Refused, memory: float, task: TrainingTask, shape: tuple[int, int]) -> TooLarge:
  def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

  mesh, helps = task.mesh, []
  if task.objective.remat not in ("auto", "full"):
    helps.append("remat='full' (or 'auto')")
  large = isinstance(plan, _Refused) or plan.working > 0.3 * plan.bytes
  in_more_passes = large and plan.passes < shape[0] // sharding.replicas(mesh)
  if in_more_passes:
    helps.append(f"more passes (passes={2 * plan.passes})")
  if task.optimizer.moments != "bfloat16":
    helps.append("moments='bfloat16'")
  if mesh.size < 2 or mesh.shape["data"] > 1:
    helps.append("more devices along config.mesh.fsdp")
  if isinstance(plan, _Refused):
    found = f"training does not fit on each device (the compiler: {plan.says})"
  else:
    found = (
      f"training needs {gb(plan.bytes)} on each device and {gb(memory)} are there: {gb(plan.state)} for weights,"
      f" moments and batch, {gb(plan.working)} for gradients, activations and copies"
    )
  return TooLarge(
    f"{found}, with remat={plan.remat!r} and {shape[0]} rows of {shape[1]} tokens in {plan.passes}"
    f" pass{'es' * (plan.passes > 1)} over {sharding.replicas(mesh)} groups of devices. What helps:"
    f" {'; '.join([*helps, 'a smaller batch or row_length'])}",
    in_more_passes,
  )


def _flat(batch: Batch, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The arrays by name: "tokens", "other/tokens"."""
  for name, x in batch.items():
    if isinstance(x, Mapping):
      yield from _flat(x, f"{prefix}{name}/")
    else:
      yield f"{prefix}{name}", x


def _unscheduled(o: Optimizer) -> Optimizer:
  """The part of an optimizer that is compiled; its rate comes in as a number."""
  return dataclasses.replace(o, learning_rate=1.0, final_learning_rate=0.0, warmup=0.0, schedule="constant")


@functools.cache
def _plan(c: LlamaConfig, mesh: Mesh, o: Optimizer, objective: Objective, kind: Kind, passes: int) -> Plan | _Refused:
  programs = _programs(c, mesh, o, objective)
  batch: dict[str, Any] = {}
  for name, shape, dtype in kind.shapes:
    *groups, leaf = name.split("/")
    node = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, batch)
    node[leaf] = np.broadcast_to(np.zeros((), dtype), shape)

  def abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_spread(x.shape, mesh))

  batch = jax.tree.map(abstract, _in_passes(batch, passes))
  if objective.dropout:
    batch["key"] = abstract(np.zeros(2, np.uint32))
  if objective.refinement:
    batch["smoothing"] = abstract(np.float32(0))
  frozen = []
  if objective.compares:
    dtype = jnp.dtype(objective.compute_dtype)
    frozen = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), programs.state.model)]
  with jax.set_mesh(mesh):
    lowered = programs.step.lower(programs.state, batch, abstract(np.float32(0)), *frozen)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return _Refused(objective.remat, passes, str(e).strip().splitlines()[0][:300])
  state, working = _state_and_working(compiled.memory_analysis(), mesh.devices.flat[0].platform)
  return Plan(compiled, objective.remat, passes, state, working, kind)


def _state_and_working(found: Any, platform: str) -> tuple[int, int]:
  """Bytes of a compiled step: its arguments and new results, and what it takes beside them.

  The compilers of accelerators give their peak, which is less than the sum: donated state is reused late in the step.
  On CPUs the peak leaves out arguments.
  """
  state = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  peak = 0 if platform == "cpu" else getattr(found, "peak_memory_in_bytes", 0)
  return state, max(0, peak - state) if peak else found.temp_size_in_bytes


def _in_passes(batch: Batch, passes: int) -> dict[str, Any]:
  """The batch with its arrays by rows, which are shaped like its tokens, as [passes, rows of a pass, T]."""
  rows, places = batch["tokens"].shape

  def split(x: Any) -> Any:
    if isinstance(x, Mapping):
      return _in_passes(x, passes)
    return x.reshape(passes, rows // passes, places) if x.shape == (rows, places) else x

  return {name: split(x) for name, x in batch.items()}


# The loop


def fit(
  model: llama.Llama,
  batches: Callable[[int], Batch],
  task: TrainingTask,
  plan: Plan | None = None,
  hooks: Hooks = Hooks(),
  reference: llama.Llama | None = None,
) -> llama.Llama:
  """The trained fp32 model; the given one is used up.

  `batches(step)` is the whole global batch on every host; the mesh's batch ways times the passes divide its rows. A
  batch of another kind than the plan's is planned for when it comes, with the plan's remat and passes.
  `reference`, in the dtype of forward passes, is there if the objective compares.
  """
  c, mesh, late = model.c, task.mesh, None
  plans = {plan.kind: plan} if plan else {}
  frozen = [reference] if task.objective.compares else []

  def settle(step: int, rate: float, found: Metrics) -> None:
    """Look at the metrics of a step that has been made."""
    metrics = {name: float(x) for name, x in jax.device_get(found).items()}  # one transfer
    metrics["learning_rate"] = rate
    wrong = [name for name, x in metrics.items() if not math.isfinite(x)]
    if wrong:
      more = hooks.failed(step, state.model) if hooks.failed else ""
      others = "".join(f", {name} {metrics[name]}" for name in wrong if name not in ("loss", "gradient_norm"))
      raise TrainingError(
        f"step {step + 1} of {task.steps}: the loss is {metrics['loss']} and the gradient norm"
        f" {metrics['gradient_norm']}{others}; lower the learning rate or look at the batch's data{more}"
      )
    if hooks.report:
      hooks.report(step, metrics)

  with jax.set_mesh(mesh):
    programs = _programs(c, mesh, _unscheduled(task.optimizer), task.objective)
    restored = hooks.restore(programs.state) if hooks.restore else None
    state, first = restored or (programs.start(model), 0)
    del model
    for step in range(first, task.steps):
      batch = batches(step)
      kind = kind_of(batch, mesh)
      if kind not in plans:
        plans[kind] = planned(c, task if plan is None else _as_planned(task, plan), batch, plan.passes if plan else 1)
      plan = plans[kind]
      batch = jax.tree.map(lambda x: global_array(x, mesh), _in_passes(batch, plan.passes))
      if task.objective.dropout:
        batch["key"] = global_array(np.array([task.seed, step], np.uint32), mesh)
      if refinement := task.objective.refinement:
        batch["smoothing"] = global_array(np.float32(refinement.smoothing_at(step, task.steps)), mesh)
      rate = learning_rate(task.optimizer, step, task.steps)
      state, metrics = plan.step(state, batch, global_array(np.float32(rate), mesh), *frozen)
      # While the devices make this step, the host looks at the last one; before a save it waits for this one too.
      if late is not None:
        settle(*late)
      late = step, rate, metrics
      stopping = _agreed(hooks.stop is not None and hooks.stop(), step, metrics)
      keeping = hooks.keep is not None and step + 1 in hooks.kept
      saving = step + 1 < task.steps and hooks.save is not None and (stopping or (step + 1) % hooks.every == 0)
      if keeping or saving:
        settle(*late)
        late = None
      if keeping and hooks.keep:  # before the save: a training that goes on from there does not pass this step again
        hooks.keep(step + 1, state.model)
      if saving and hooks.save:
        hooks.save(step + 1, state)
        if stopping:
          raise Stopped
    if late:
      settle(*late)
  return state.model


def _as_planned(task: TrainingTask, plan: Plan) -> TrainingTask:
  return dataclasses.replace(task, objective=dataclasses.replace(task.objective, remat=plan.remat))


def _agreed(flag: bool, step: int, metrics: Metrics) -> bool:
  """True if any host says so. Several hosts ask each other at every eighth step, when it has been made: on CPUs two
  programs whose collectives run at once may wait for each other for ever."""
  if jax.process_count() == 1:
    return flag
  if step % 8 != 7:
    return False
  jax.block_until_ready(metrics)
  return bool(multihost_utils.process_allgather(np.int32(flag)).max())


# Scoring, by the code that trains


@functools.cache
def _scorer(
  sequences: int | None, compute_dtype: str, mesh: Mesh, few: bool | None
) -> Callable[[llama.Llama, Batch], Array]:
  whole = NamedSharding(mesh, P())  # every host reads the result

  @functools.partial(jax.jit, out_shardings=whole)
  def score(model: llama.Llama, batch: Batch) -> Array:
    logprobs = losses.batch_logprobs(llama.cast(model, compute_dtype), batch, losses.How(few=few))
    return losses.sequence_logprobs(logprobs, batch, sequences) if sequences else logprobs

  return score


def sequence_logprobs(
  model: llama.Llama, batches: Iterable[Batch], sequences: int, compute_dtype: str, mesh: Mesh
) -> Iterator[np.ndarray]:
  """Yields the summed log-probs [sequences] of each packed host batch."""
  return _scored(model, batches, sequences, compute_dtype, mesh)


def token_logprobs(
  model: llama.Llama, batches: Iterable[Batch], compute_dtype: str, mesh: Mesh
) -> Iterator[np.ndarray]:
  """Yields the log-probs [rows, T] of each packed host batch's targets."""
  return _scored(model, batches, None, compute_dtype, mesh)


def _scored(
  model: llama.Llama, batches: Iterable[Batch], sequences: int | None, compute_dtype: str, mesh: Mesh
) -> Iterator[np.ndarray]:
  for batch in batches:
    with jax.set_mesh(mesh):  # left before the yield, or the mesh would stay in force for the caller
      placed = {name: global_array(x, mesh) for name, x in batch.items()}
      scored = np.asarray(_scorer(sequences, compute_dtype, mesh, kind_of(batch, mesh).few)(model, placed))
    yield scored


def global_array(x: Any, mesh: Mesh) -> Array:
  """A host array on the mesh: rows over the batch axes, vectors and numbers on every device."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, _spread(x.shape, mesh), lambda index: x[index])


def _spread(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """Rows lead in two dimensions, and come second, after the passes, in three."""
  rows = {2: 0, 3: 1}.get(len(shape))
  if rows is None or shape[rows] % sharding.replicas(mesh):
    return NamedSharding(mesh, P())
  return NamedSharding(mesh, P(*[None] * rows, BATCH))
