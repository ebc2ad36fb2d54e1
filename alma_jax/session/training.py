"""Training with examples in and a model directory out: epochs, batches, checkpoints, export.

A step takes `batch` examples from a permutation that follows from (seed, epoch), packs them best-fit into rows, and
fills up to the same number of rows at every step, so that the step compiles once. A killed training goes on from its
last checkpoint and ends with the same weights as one that was never killed.
"""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from alma_jax.engine import losses
from alma_jax.engine import train as engine
from alma_jax.llama import sharding, weights
from alma_jax.session.workbench import Checkpoint
from alma_jax.text import chat, packing

ROWS = 4  # the number of rows is rounded up to this, so that rounds of like size share a compilation


def train(session, stage, init, examples, options, seed, objective="sft", reference=None):
  """Train `init` on `examples` and write `stage.dir/model`; returns its Checkpoint.

  examples: list of (token ids, weights); for "dpo" the list holds the sides of every pair, chosen and rejected first,
  and `reference` [pairs, sides] the reference's log-probs, if the loss has one. `options` is the config's training
  section.
  """
  session.free()
  goal = engine.Objective(
    kind="preference" if objective == "dpo" else objective,
    preference=preference(options) if objective == "dpo" else None,
    remat=options.remat,
    compute_dtype=session.dtype,
  )
  group = goal.preference.sides if goal.preference else 1
  count = len(examples) // group
  per_epoch = math.ceil(count / options.batch)
  steps = max(1, math.ceil(round(options.epochs * per_epoch, 6)))  # 2.2 * 25 is 55.00000000000001
  packed = _Batches(examples, group, options, seed, per_epoch, _ways(session), reference)
  optimizer = engine.Optimizer(
    learning_rate=options.learning_rate,
    final_learning_rate=options.final_learning_rate,
    warmup=options.warmup,
    beta1=options.beta1,
    beta2=options.beta2,
    eps=options.eps,
    weight_decay=options.weight_decay,
    clip=options.clip,
  )
  checkpoints = ocp.training.Checkpointer(
    (stage.dir / "checkpoints").absolute(),
    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(options.checkpoint_every),
    preservation_policy=ocp.training.preservation_policies.LatestN(2),
  )
  log = _Log(session, stage)
  bar = session.bar(stage.name, steps, "steps")

  def restore(state):
    latest = checkpoints.latest
    if latest is None:
      return None
    # Plain leaves on disk: the tree then does not depend on how Flax wraps a weight.
    leaves = checkpoints.load(latest.step, _leaves(state))
    log.keep(latest.step)
    bar.update(latest.step)
    return _with_leaves(state, leaves), latest.step

  def save(step, state):
    if step < steps and step % options.checkpoint_every == 0:
      checkpoints.save_async(step, _leaves(state))
      stage.beat()

  def report(step, metrics):
    log.write(step, metrics)
    bar.update(1)
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)

  with checkpoints, bar:
    start, reset = session.load(init, session.mesh, sharding.TRAIN, "float32"), []
    if markers := chat.special_ids(session.tokenizer, session.chat):
      start, reset = weights.reinit_untrained(start, markers)
    model = engine.fit(start, packed, steps, optimizer, goal, session.mesh, restore, save, report)
  facts = {"steps": steps, "examples": count, "rows": packed.rows, "untrained_tokens_reset": len(reset)}
  return export(session, stage, model), facts


def preference(options):
  """The loss that a training section on pairs asks for."""
  fields = (field.name for field in dataclasses.fields(losses.Preference))
  return losses.Preference(**{name: options[name] for name in fields if name in options})


def sequence_logprobs(session, checkpoint, sequences, options):
  """fp32 [sequences]: summed log-probs of the supervised tokens under a checkpoint, e.g. as a reference."""
  batches = _Batches(
    sequences, 1, options, seed=None, per_epoch=math.ceil(len(sequences) / options.batch), ways=_ways(session)
  )
  out = np.zeros(len(sequences), np.float32)
  model = session.load(checkpoint, session.mesh, sharding.TRAIN, "float32")
  goal = engine.Objective(kind="score", compute_dtype=session.dtype)
  steps = range(batches.per_epoch)
  scored = engine.sequence_logprobs(model, map(batches, steps), options.batch, goal, session.mesh)
  for step, logprobs in zip(steps, scored):
    members = batches.members(step)
    out[members] = logprobs[: len(members)]
  return out


def export(session, stage, model):
  """Write the model directory that transformers and vLLM load as it is."""
  weights.save(
    stage.dir / "model",
    model,
    tokenizer=session.tokenizer,
    chat_template=chat.jinja(session.chat),
    eos_token=None if session.chat.stop == chat.EOS else session.chat.stop,
    stop_ids=chat.stop_ids(session.tokenizer, session.chat),
    bos_id=session.tokenizer.bos_id,
    pad_id=None,
    dtype=session.config.model.save_dtype,
  )
  return stage.dir / "model"


def finish(session, stage, counts, **extra):
  """Close a training stage: register the model's files, then drop the intermediate checkpoints."""
  names = [str(p.relative_to(stage.dir)) for p in sorted((stage.dir / "model").rglob("*")) if p.is_file()]
  stage.finish(counts=counts, files=[*names, "metrics.jsonl"], **extra)
  if session.run.host == 0:
    shutil.rmtree(stage.dir / "checkpoints", ignore_errors=True)
  return trained(stage)


def trained(stage):
  """The Checkpoint of a finished training stage; its name is the stage's."""
  return Checkpoint(stage.name, stage.dir / "model", stage.manifest["content"])


def _ways(session):
  return session.mesh.shape["data"] * session.mesh.shape["fsdp"]


class _Batches:
  """step -> the step's packed batch, a function of (examples, options, seed, step) alone; no seed: in order, once."""

  def __init__(self, examples, group, options, seed, per_epoch, ways, reference=None):
    self.examples, self.group, self.options, self.seed = examples, group, options, seed
    self.per_epoch, self.reference = per_epoch, reference
    self.count = len(examples) // group
    self._order = (None, None)
    epochs = math.ceil(options.epochs) if seed is not None else 1
    needed = max(len(self._pack(self.members(step))) for step in range(epochs * per_epoch))
    unit = math.lcm(ROWS, ways)
    self.rows = -(-needed // unit) * unit

  def members(self, step):
    epoch, at = divmod(step, self.per_epoch)
    if self._order[0] != epoch:
      order = np.arange(self.count)
      self._order = (
        epoch,
        order if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(order),
      )
    return self._order[1][at * self.options.batch : (at + 1) * self.options.batch]

  def _sequences(self, members):
    return [self.examples[self.group * i + j] for i in members for j in range(self.group)]

  def _pack(self, members):
    return packing.pack([len(ids) for ids, _ in self._sequences(members)], self.options.row_length)

  def __call__(self, step):
    members = self.members(step)
    batch = packing.rows(self._sequences(members), self._pack(members), self.options.row_length, self.rows, pad_id=0)
    if self.reference is not None:
      batch["reference"] = np.zeros((self.options.batch, self.group), np.float32)
      batch["reference"][: len(members)] = self.reference[members]
    if self.group > 1:
      batch["real"] = (np.arange(self.options.batch) < len(members)).astype(np.float32)
    return batch


class _Log:
  """metrics.jsonl: a line per step; a restart drops the lines after its checkpoint."""

  def __init__(self, session, stage):
    self.path, self.active, self.first = stage.dir / "metrics.jsonl", session.run.host == 0, True

  def keep(self, steps):
    if self.active and self.path.exists():
      lines = self.path.read_text().splitlines()[:steps]
      self.path.write_text("".join(line + "\n" for line in lines))
    self.first = False

  def write(self, step, metrics):
    if self.active:
      with open(self.path, "w" if self.first else "a") as file:
        file.write(json.dumps({"step": step + 1} | {k: float(f"{v:.6g}") for k, v in metrics.items()}) + "\n")
    self.first = False


def _leaves(state):
  return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _with_leaves(state, leaves):
  return jax.tree.unflatten(jax.tree.structure(state), [leaves[k] for k in sorted(leaves)])
