"""Training: one sharded AdamW loop for SFT and for preferences.

The step is compiled once per shape: the learning rate comes in as a number, so schedules and step counts of different
rounds share the compilation. Weights and moments are fp32 and sharded by the same rules; the forward pass runs in
`compute_dtype`. A step's batch holds a fixed number of examples packed into rows; the loss is normalised by what the
whole batch supervises, so packing and the number of devices do not change it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alma_jax.engine import losses
from alma_jax.llama import model as llama
from alma_jax.llama import sharding


class TrainingError(Exception):
  """Training that cannot go on; the message says at which step and why."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float
  final_learning_rate: float  # cosine from the peak down to this
  warmup: float  # fraction of all steps
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip: float  # global norm of the gradient


@dataclasses.dataclass(frozen=True)
class Objective:
  kind: str  # "sft", "preference", or "score": log-probs alone
  preference: losses.Preference | None = None
  remat: bool = False
  compute_dtype: str = "float32"

  def __post_init__(self):
    if self.kind not in ("sft", "preference", "score"):
      raise ValueError(f"there is no objective {self.kind!r}; there are 'sft', 'preference' and 'score'")
    if (self.kind == "preference") != (self.preference is not None):
      raise ValueError(
        f"the objective {self.kind!r} goes {'with' if self.preference is None else 'without'} a Preference"
      )


def learning_rate(o, step, steps):
  """Linear warm-up, then cosine to the final rate; `step` counts from 0."""
  warm = round(o.warmup * steps)
  if step < warm:
    return o.learning_rate * (step + 1) / warm
  done = (step - warm) / max(1, steps - warm)
  return o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))


def transformation(o):
  """AdamW without the learning rate; norms are not decayed."""
  decayed = lambda tree: jax.tree.map(
    lambda v: v.get_metadata()["axes"] != ("norm",), tree, is_leaf=lambda v: hasattr(v, "get_metadata")
  )
  return optax.chain(
    optax.clip_by_global_norm(o.clip),
    optax.scale_by_adam(o.beta1, o.beta2, o.eps),
    optax.add_decayed_weights(o.weight_decay, mask=decayed),
  )


@functools.cache
def _compiled(c, mesh, o, objective):
  """(start, step) for one architecture, mesh, optimizer (without its schedule) and objective; cached, so that rounds
  share compilations."""
  tx = transformation(o)
  model_shardings = sharding.shardings(jax.eval_shape(lambda: llama.init(c, 0)), mesh, sharding.TRAIN)
  abstract = jax.eval_shape(lambda: tx.init(llama.init(c, 0)))
  state_shardings = (model_shardings, sharding.shardings(abstract, mesh, sharding.TRAIN))

  @functools.partial(jax.jit, out_shardings=state_shardings)
  def start(model):
    model = llama.cast(model, jnp.float32)
    return model, tx.init(model)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
  def step(state, batch, rate):
    model, moments = state

    def loss(model):
      model = llama.cast(model, objective.compute_dtype)
      if objective.kind == "preference":
        return losses.preference(model, batch, objective.preference, objective.remat)
      return losses.sft(model, batch, objective.remat)

    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    updates, moments = tx.update(gradient, moments, model)
    model = jax.tree.map(lambda w, u: w - rate * u, model, updates)
    return (model, moments), metrics

  return start, step


def fit(model, batches, steps, optimizer, objective, mesh, restore=None, save=None, report=None):
  """The trained fp32 model. `batches(step) -> dict of host arrays` (whole global batch on every host), rows a multiple
  of the mesh's batch ways. `restore(abstract state) -> (state, step) or None`, `save(step, state)` after each step and
  `report(step, metrics)` are the caller's: the loop touches no files."""
  with jax.set_mesh(mesh):
    unscheduled = dataclasses.replace(optimizer, learning_rate=0.0, final_learning_rate=0.0, warmup=0.0)
    start, train_step = _compiled(model.c, mesh, unscheduled, objective)
    state, first = start(model), 0
    if restore and (found := restore(state)):
      state, first = found
    for step in range(first, steps):
      batch = {name: global_array(x, mesh) for name, x in batches(step).items()}
      rate = learning_rate(optimizer, step, steps)
      state, metrics = train_step(state, batch, jnp.float32(rate))
      metrics = {name: float(x) for name, x in metrics.items()} | {"learning_rate": rate}
      if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
        raise TrainingError(
          f"step {step + 1} of {steps}: the loss is {metrics['loss']} and the gradient norm {metrics['gradient_norm']};"
          " lower the learning rate or look at the batch's data"
        )
      if report:
        report(step, metrics)
      if save:
        save(step + 1, state)
  return state[0]


@functools.cache
def _scorer(sequences, objective, mesh):
  whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())  # every host reads the result

  @functools.partial(jax.jit, out_shardings=whole)
  def score(model, batch):
    logprobs = losses.batch_logprobs(llama.cast(model, objective.compute_dtype), batch)
    return losses.sequence_logprobs(logprobs, batch, sequences)

  return score


def sequence_logprobs(model, batches, sequences, objective, mesh):
  """Yields the summed log-probs [sequences] of each packed host batch, by the code that trains."""
  for batch in batches:
    with jax.set_mesh(mesh):  # not around the yield: the mesh would stay in force for whoever called
      batch = {name: global_array(x, mesh) for name, x in batch.items()}
      scored = np.asarray(_scorer(sequences, objective, mesh)(model, batch))
    yield scored


def global_array(x, mesh):
  """A host array on the mesh: rows of two-dimensional arrays over the batch axes, the rest on every device."""
  x = np.asarray(x)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  spread = sharding.batch_sharding(mesh) if x.ndim > 1 and x.shape[0] % ways == 0 else whole
  return jax.make_array_from_callback(x.shape, spread, lambda index: x[index])
