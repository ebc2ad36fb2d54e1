"""Training: one sharded AdamW loop for SFT, preferences and policy gradients.

  plan = planned(c, mesh, optimizer, objective, batch, passes, memory)   compiled, with what it needs on every device
  model = fit(model, batches, steps, optimizer, objective, mesh, plan)   the trained fp32 model

The step is compiled once per shape: the learning rate comes in as a number, so schedules and step counts of different
rounds share the compilation. Weights are fp32, moments fp32 or bf16, both sharded by the same rules; the forward and
backward pass run in `compute_dtype` on a copy of the weights. A step's batch holds a fixed number of examples packed
into rows, which go through the model in one or more `passes`; the loss is normalised by what the whole batch
supervises, so packing, passes and the number of devices do not change it.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils

from alma_jax.engine import losses
from alma_jax.errors import UserError
from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.llama.sharding import BATCH
from alma_jax.options import Checked, ConfigError, option, refuse

P = jax.sharding.PartitionSpec


class TrainingError(UserError):
  """Training that cannot begin or go on; the message says why and what helps."""


class Stopped(Exception):
  """Training that was asked to stop and has saved where it is."""


SCHEDULES = {  # the share of the way from the peak to the final rate after a share `done` of the steps
  "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
  "linear": lambda done: done,
  "constant": lambda done: 0.0,
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
  """AdamW with a clipped gradient and a schedule."""

  learning_rate: float = option(above=0)  # the peak
  final_learning_rate: float = option(least=0)  # the schedule ends here
  warmup: float = option(0.0, least=0, most=1)  # fraction of all steps
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # of everything but norms
  clip: float = 1.0  # of the global gradient norm; float("inf"): no clipping
  schedule: Literal["cosine", "linear", "constant"] = "cosine"  # from the peak down to the final rate
  moments: Literal["float32", "bfloat16"] = "float32"  # bfloat16: 4 bytes less for each weight

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.final_learning_rate > self.learning_rate:
      allowed = f"must lie between 0 and learning_rate, {self.learning_rate}"
      refuse("final_learning_rate", self.final_learning_rate, allowed)
    if not self.clip > 0:
      refuse("clip", self.clip, "must be above 0 (float('inf'): no clipping)")
    if self.moments == "bfloat16" and self.beta2 > 0.99:
      raise ConfigError(
        f"moments is 'bfloat16' with beta2={self.beta2}: bfloat16 has 8 bits, in which a change of"
        f" {1 - self.beta2:.2g} of a moment is lost, so that it would never fall; set beta2 to at most 0.99 or moments"
        " to 'float32'"
      )


@dataclasses.dataclass(frozen=True)
class Objective(Checked):
  """What a step minimises, and how the model is run for that."""

  kind: losses.Preference | losses.Grpo | None = None  # None: the NLL of SFT
  remat: Literal["auto", "none", "products", "full"] = "none"  # what is kept for the backward pass; auto: see `planned`
  dropout: float = option(0.0, least=0)  # residual dropout of the last layer; it rises evenly from 0 in the first
  compute_dtype: str = "float32"

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.dropout < 1:
      refuse("dropout", self.dropout, "must be at least 0 and below 1")

  def loss(
    self, model: llama.Llama, batch: losses.Batch, how: losses.How, whole: losses.Totals
  ) -> tuple[Array, losses.Metrics]:
    """(loss, metrics) of a batch, which is part of one with the totals `whole`."""
    if isinstance(self.kind, losses.Preference):
      return losses.preference(model, batch, self.kind, how, whole)
    if isinstance(self.kind, losses.Grpo):
      return losses.grpo(model, batch, self.kind, how, whole)
    return losses.sft(model, batch, how, whole)


def learning_rate(o, step, steps):
  """Linear warm-up, then the schedule from the peak to the final rate; `step` counts from 0."""
  warm = round(o.warmup * steps)
  if step < warm:
    return o.learning_rate * (step + 1) / warm
  done = (step - warm) / max(1, steps - warm)
  return o.learning_rate + (o.final_learning_rate - o.learning_rate) * SCHEDULES[o.schedule](done)


def transformation(o):
  """AdamW without clipping and learning rate; norms are not decayed."""
  decayed = lambda tree: jax.tree.map(
    lambda v: v.get_metadata()["axes"] != ("norm",), tree, is_leaf=lambda v: hasattr(v, "get_metadata")
  )
  return optax.chain(
    _kept_in(o.moments, optax.scale_by_adam(o.beta1, o.beta2, o.eps)),
    optax.add_decayed_weights(o.weight_decay, mask=decayed),
  )


def _kept_in(dtype, tx):
  """`tx` whose state is kept in another dtype between updates, which are fp32."""
  if dtype == "float32":
    return tx
  cast = lambda tree, to: jax.tree.map(lambda x: x.astype(to) if x.dtype != jnp.int32 else x, tree)

  def update(updates, state, params=None):
    updates, state = tx.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)


@functools.cache
def _programs(c, mesh, o, objective):
  """(start, step, abstract state) for one architecture, mesh, optimizer (without its schedule) and objective; cached,
  so that rounds share compilations."""
  tx = transformation(o)
  fresh = lambda: llama.init(c, 0)
  abstract = jax.eval_shape(fresh), jax.eval_shape(lambda: tx.init(fresh()))
  shardings = tuple(sharding.shardings(tree, mesh, sharding.TRAIN) for tree in abstract)
  how = losses.How(objective.remat, objective.dropout)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def start(model):
    model = llama.cast(model, jnp.float32)
    return model, tx.init(model)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
  def step(state, batch, rate):
    model, moments = state
    (_, metrics), gradient = _gradient(llama.cast(model, objective.compute_dtype), batch, objective, how)
    norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    # Weights stay as they are where a gradient is not finite: the loop ends there, and looks at what they make of it.
    finite = jnp.isfinite(metrics["loss"] + norm)
    scale = jnp.minimum(1.0, o.clip / norm)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x.astype(jnp.float32) * scale, 0.0), gradient)
    updates, moments = tx.update(gradient, moments, model)
    rate = jnp.where(finite, rate, 0.0)
    model = jax.tree.map(lambda w, u: w - rate * u, model, updates)
    return (model, moments), metrics | {"gradient_norm": norm}

  placed = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), abstract, shardings)
  return start, step, placed


def abstract_state(c, mesh, moments):
  """Shapes and shardings of (model, moments), as a checkpoint of them is restored."""
  return _programs(c, mesh, Optimizer(1.0, 0.0, 0.0, 0.9, 0.95, 1e-8, 0.0, 1.0, moments=moments), Objective())[2]


def _gradient(model, batch, objective, how):
  """((loss, metrics), gradient) of a batch whose arrays by rows lead with the passes."""
  rows, other = _by_rows(batch), batch.get("other")
  constants = {name: x for name, x in batch.items() if name not in rows and name != "other"}
  whole = losses.totals(batch)
  if other is not None:  # a KTO batch's sequences for the divergence: a forward pass and no more
    pairs = batch["real"].shape[0]
    sums = lambda part: losses.sequence_logprobs(losses.batch_logprobs(model, part), part, pairs)
    summed = jax.lax.map(sums, other).sum(axis=0)
    constants["kl"] = losses.divergence(summed, batch["reference"][:, 2], batch["real"])
  passes = batch["tokens"].shape[0]

  def one(i, part):
    if "key" in constants:
      part = part | {"key": jnp.stack([constants["key"][0], constants["key"][1] * passes + i.astype(jnp.uint32)])}
    value = lambda model: objective.loss(model, constants | part, how, whole)
    return jax.value_and_grad(value, has_aux=True)(model)

  if passes == 1:
    return one(jnp.uint32(0), jax.tree.map(lambda x: x[0], rows))
  add = lambda total, x: jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, x)
  shapes = jax.eval_shape(one, jnp.uint32(0), jax.tree.map(lambda x: x[0], rows))
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  return jax.lax.scan(lambda total, x: (add(total, one(*x)), None), nothing, (jnp.arange(passes), rows))[0]


def _by_rows(batch):
  return {name: x for name, x in batch.items() if getattr(x, "ndim", 0) == 3}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step, how it was compiled, and what it needs on each device, in bytes."""

  step: object
  remat: str
  passes: int
  state: int  # weights, moments and batch
  working: int  # gradients, activations, the copy that computes

  @property
  def bytes(self):
    return self.state + self.working


def planned(c, mesh, optimizer, objective, batch, passes=1, memory=None):
  """The Plan for batches like this one. With remat "auto": the quickest way that fits into `memory` bytes a device, or
  simply the quickest if that is None. What does not fit is a TrainingError that says what would help."""
  shapes = tuple(sorted((name, x.shape, x.dtype.str) for name, x in _flat(batch)))
  tried = []
  for remat in llama.REMAT if objective.remat == "auto" else (objective.remat,):
    plan = _plan(c, mesh, _unscheduled(optimizer), dataclasses.replace(objective, remat=remat), shapes, passes)
    if memory is None or plan.bytes <= memory:
      return plan
    tried.append(plan)
  plan = min(tried, key=lambda plan: plan.bytes)
  raise TrainingError(_too_large(plan, memory, mesh, batch["tokens"].shape, optimizer, objective))


def _too_large(plan, memory, mesh, shape, optimizer, objective):
  gb = lambda x: f"{x / 1e9:.1f} GB"
  helps = []
  if objective.remat != "auto" and objective.remat != "full":
    helps.append("remat='full' (or 'auto')")
  if plan.working > 0.3 * plan.bytes and plan.passes < shape[0] // sharding.replicas(mesh):
    helps.append(f"more passes (passes={2 * plan.passes})")
  if optimizer.moments != "bfloat16":
    helps.append("moments='bfloat16'")
  if mesh.size < 2 or mesh.shape["data"] > 1:
    helps.append("more devices along config.mesh.fsdp")
  return (
    f"training needs {gb(plan.bytes)} on each device and {gb(memory)} are there: {gb(plan.state)} for weights, moments"
    f" and batch, {gb(plan.working)} for gradients, activations and copies, with remat={plan.remat!r} and"
    f" {shape[0]} rows of {shape[1]} tokens in {plan.passes} pass{'es' * (plan.passes > 1)} over"
    f" {sharding.replicas(mesh)} groups of devices. What helps: {'; '.join([*helps, 'a smaller batch or row_length'])}"
  )


def _flat(batch, prefix=""):
  for name, x in batch.items():
    if isinstance(x, dict):
      yield from _flat(x, f"{prefix}{name}/")
    else:
      yield f"{prefix}{name}", x


def _unscheduled(o):
  """What of an optimizer is compiled; its rate comes in as a number."""
  return dataclasses.replace(o, learning_rate=1.0, final_learning_rate=0.0, warmup=0.0, schedule="constant")


@functools.cache
def _plan(c, mesh, o, objective, shapes, passes):
  _, step, state = _programs(c, mesh, o, objective)
  batch = {}
  for name, shape, dtype in shapes:
    *groups, leaf = name.split("/")
    node = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, batch)
    node[leaf] = np.broadcast_to(np.zeros((), dtype), shape)
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_spread(x.shape, mesh))
  batch = jax.tree.map(abstract, _in_passes(batch, passes))
  if objective.dropout:
    batch["key"] = abstract(np.zeros(2, np.uint32))
  with jax.set_mesh(mesh):
    compiled = step.lower(state, batch, abstract(np.float32(0))).compile()
  found = compiled.memory_analysis()
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return Plan(compiled, objective.remat, passes, kept, found.temp_size_in_bytes)


def _in_passes(batch, passes):
  """The batch with its arrays by rows, which are shaped like its tokens, as [passes, rows of a pass, T]."""
  rows, places = batch["tokens"].shape

  def split(x):
    if isinstance(x, dict):
      return _in_passes(x, passes)
    return x.reshape(passes, rows // passes, places) if x.shape == (rows, places) else x

  return {name: split(x) for name, x in batch.items()}


def fit(
  model,
  batches,
  steps,
  optimizer,
  objective,
  mesh,
  plan=None,
  seed=0,
  every=1,
  restore=None,
  save=None,
  report=None,
  failed=None,
  stop=lambda: False,
):
  """The trained fp32 model; the given one is used up. `batches(step) -> dict of host arrays` (the whole global batch on
  every host), rows a multiple of the mesh's batch ways times the passes.

  The caller's, for the loop touches no files: `restore(state like this) -> (state, step) or None`; `save(step, state)`
  after `every` so many steps; `report(step, metrics)`, a step late, so that the devices never wait for it;
  `failed(step, model) -> text` when a loss was not finite; `stop()`, whether this host wants to end: once all have
  heard of it the state is saved and Stopped raised.
  """
  start, _, _ = _programs(model.c, mesh, _unscheduled(optimizer), objective)
  c, late = model.c, None

  def settle():
    """Look at the metrics of the last step."""
    step, rate, metrics = late
    metrics = {name: float(x) for name, x in metrics.items()}
    metrics["learning_rate"] = rate
    if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
      more = failed(step, state[0]) if failed else ""
      raise TrainingError(
        f"step {step + 1} of {steps}: the loss is {metrics['loss']} and the gradient norm {metrics['gradient_norm']};"
        f" lower the learning rate or look at the batch's data{more}"
      )
    if report:
      report(step, metrics)

  with jax.set_mesh(mesh):
    state, first = start(model), 0
    if restore and (found := restore(state)):
      state, first = found
    for step in range(first, steps):
      batch = batches(step)
      plan = plan or planned(c, mesh, optimizer, objective, batch)
      batch = jax.tree.map(lambda x: global_array(x, mesh), _in_passes(batch, plan.passes))
      if objective.dropout:
        batch["key"] = global_array(np.array([seed, step], np.uint32), mesh)
      rate = learning_rate(optimizer, step, steps)
      state, metrics = plan.step(state, batch, global_array(np.float32(rate), mesh))
      if late is not None:
        settle()
      late = step, rate, metrics
      stopping = _agreed(stop(), step, metrics)
      if step + 1 < steps and save and (stopping or (step + 1) % every == 0):
        settle()
        late = None
        save(step + 1, state)
        if stopping:
          raise Stopped
    if late:
      settle()
  return state[0]


def _agreed(flag, step, metrics):
  """Whether any host says so; several hosts ask each other at every eighth step, when it has been made: on CPUs two
  programs whose collectives run at once may wait for each other for ever."""
  if jax.process_count() == 1:
    return flag
  if step % 8 != 7:
    return False
  jax.block_until_ready(metrics)
  return bool(multihost_utils.process_allgather(np.int32(flag)).max())


@functools.cache
def _scorer(what, compute_dtype, mesh):
  whole = jax.NamedSharding(mesh, P())  # every host reads the result

  @functools.partial(jax.jit, out_shardings=whole)
  def score(model, batch):
    logprobs = losses.batch_logprobs(llama.cast(model, compute_dtype), batch)
    return losses.sequence_logprobs(logprobs, batch, what) if what else logprobs

  return score


def sequence_logprobs(model, batches, sequences, compute_dtype, mesh):
  """Yields the summed log-probs [sequences] of each packed host batch, by the code that trains."""
  return _scored(model, batches, sequences, compute_dtype, mesh)


def token_logprobs(model, batches, compute_dtype, mesh):
  """Yields the log-probs [rows, T] of each packed host batch's targets, by the code that trains."""
  return _scored(model, batches, None, compute_dtype, mesh)


def _scored(model, batches, what, compute_dtype, mesh):
  for batch in batches:
    with jax.set_mesh(mesh):  # not around the yield: the mesh would stay in force for whoever called
      batch = {name: global_array(x, mesh) for name, x in batch.items()}
      scored = np.asarray(_scorer(what, compute_dtype, mesh)(model, batch))
    yield scored


def global_array(x, mesh):
  """A host array on the mesh: rows over the batch axes, vectors and numbers on every device."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, _spread(x.shape, mesh), lambda index: x[index])


def _spread(shape, mesh):
  """Rows lead in two dimensions, and come second, after the passes, in three."""
  rows = {2: 0, 3: 1}.get(len(shape))
  if rows is None or shape[rows] % sharding.replicas(mesh):
    return jax.NamedSharding(mesh, P())
  return jax.NamedSharding(mesh, P(*[None] * rows, BATCH))


PEAKS = {  # bf16 operations per second of a device, by a part of its name; the first that fits counts
  "H100": 989e12,
  "H200": 989e12,
  "A100": 312e12,
  "B200": 2250e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
}


def peak(device):
  """The device's bf16 operations per second from its data sheet; None if it is not known."""
  return next((flops for name, flops in PEAKS.items() if name in device.device_kind), None)


def operations(c, lengths):
  """What a training step on sequences of these lengths computes, as MFU counts it: 6 per weight and token (embedding
  rows apart, the head at every place) and causal attention; nothing that is computed twice."""
  lengths = np.asarray(lengths, np.float64)
  weights = c.parameters - (0 if c.tied else c.vocab * c.width)
  return float(6 * weights * lengths.sum() + 6 * c.depth * c.heads * c.head_dim * (lengths**2).sum())
