"""Training with data in and a model directory out: epochs, memory, checkpoints, logs, export.

  model, facts = train(session, stage, init, Examples(sequences, names), options, seed)

What will not fit into the devices' memory is said before the first step. A killed training goes on from its last
checkpoint and ends with the same weights as one that was never killed; SIGTERM makes it save one at once. In the
stage's directory: metrics.jsonl (a line per step), speed.jsonl (times, tokens per second, MFU), tensorboard/ (both),
and failure.json if a loss was not finite: the examples of that step.
"""

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
import time
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from alma_jax.engine import losses
from alma_jax.engine import train as engine_train
from alma_jax.llama import config as llama_config
from alma_jax.llama import sharding, weights
from alma_jax.options import Checked, option, spread
from alma_jax.runtime.batches import Batches, Examples, Graded, Pairs
from alma_jax.runtime.host import Checkpoint
from alma_jax.store import shards
from alma_jax.text import chat


# Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  """One training stage on Examples. `batch` counts examples; a step packs them into rows of `row_length` tokens."""

  optimizer: engine_train.Optimizer = spread(engine_train.Optimizer)
  batch: int = option(least=1)
  epochs: float = option(above=0)
  row_length: int = option(least=1)  # tokens; longer examples are cut and counted
  average: Literal["tokens", "examples"] = "tokens"  # every supervised token counts alike; "examples": every example
  dropout: float = 0.0  # of what the last layer adds; it rises evenly from 0 in the first (LIMA: 0.3)
  # These change the result only by rounding and may be changed in a run that has begun:
  remat: Literal["auto", "none", "products", "full"] = option("auto", practical=True)  # from "none" to "full": less
  # memory, more time; auto: the first that fits
  passes: int = option(1, least=1, practical=True)  # through the model for a step: more of them take less memory
  checkpoint_every: int = option(200, least=1, practical=True)  # steps between checkpoints; the last two are kept
  checkpoint_keep: int = option(0, least=0, practical=True)  # one in so many steps stays for good; 0: none

  def __post_init__(self) -> None:
    super().__post_init__()
    self.objective("float32")

  def objective(self, compute_dtype: str) -> engine_train.Objective:
    """What the steps minimise."""
    return engine_train.Objective(None, self.remat, self.dropout, compute_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
  """The training of a round by SFT."""

  init_from: str = "base"  # what is trained: "base", "sft_1", ..., "latest"
  history: Literal["all", "latest"] = "all"  # on the trainsets of all rounds so far; "latest": on this round's


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptions(PolicyOptions):
  """A training stage on pairs; a step takes `batch` of them."""

  init_from: str = "sft_1"
  ref_from: str = "init"  # the reference: "init", or as init_from
  preference: losses.Preference = spread(losses.Preference)

  def objective(self, compute_dtype: str) -> engine_train.Objective:
    return dataclasses.replace(super().objective(compute_dtype), kind=self.preference)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptions(Options):
  """A training stage on all responses of a round; a step takes `batch` of them."""

  init_from: str = "latest"
  ref_from: str = "sft_1"  # what it is held near
  grpo: losses.Grpo = spread(losses.Grpo)

  def objective(self, compute_dtype: str) -> engine_train.Objective:
    return dataclasses.replace(super().objective(compute_dtype), kind=self.grpo)


# Training


def train(session, stage, init, data, options, seed):
  """Train `init` on Examples, Pairs or Graded and write `stage.dir/model`; (that directory, facts for the manifest).
  `options` is the config's training section."""
  session.free()
  passes = min(options.passes, max(1, options.batch))
  batches = Batches(data, options, seed, sharding.replicas(session.mesh) * passes)
  goal, optimizer = options.objective(session.dtype), options.optimizer
  memory = _least_of_all_hosts(session.training_bytes)
  plan = engine_train.planned(_config(session), session.mesh, optimizer, goal, batches(0), passes, memory)
  session.run.log("memory", stage=stage.name, state=plan.state, working=plan.working, there=memory, remat=plan.remat)
  if plan.bytes > memory / 10:
    session.say(
      f"{stage.name}: {plan.bytes / 1e9:.1f} of {memory / 1e9:.1f} GB on each device, {plan.state / 1e9:.1f} of them"
      f" for weights and moments; remat {plan.remat!r}"
    )
  keep = ocp.training.preservation_policies
  policies = [keep.LatestN(2), *([keep.EveryNSteps(options.checkpoint_keep)] if options.checkpoint_keep else [])]
  checkpoints = ocp.training.Checkpointer(
    (stage.dir / "checkpoints").absolute(), preservation_policy=keep.AnyPreservationPolicy(policies)
  )
  log = _Log(session, stage, batches)
  bar = session.bar(stage.name, batches.steps, "steps")

  def restore(state):
    latest = checkpoints.latest
    if latest is None:
      return None
    log.keep(latest.step)
    bar.update(latest.step)
    return _with_leaves(state, checkpoints.load(latest.step, _leaves(state))), latest.step

  def save(step, state):
    checkpoints.save_async(step, _leaves(state), force=True)  # else it would be left out while another is written
    stage.beat()

  def report(step, metrics):
    speed = log.write(step, metrics)
    bar.update(1)
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)

  def failed(step, model):
    return _failure(session, stage, model, data, batches.members(step), step, options)

  (stage.dir / "failure.json").unlink(missing_ok=True)
  with _asked_to_stop() as stop:
    try:
      with checkpoints, log, bar:
        start, reset = session.load(init, session.mesh, sharding.TRAIN, "float32"), []
        if markers := chat.special_ids(session.tokenizer, session.chat):
          start, reset = weights.reinit_untrained(start, markers)
        every, steps = options.checkpoint_every, batches.steps
        model = engine_train.fit(
          start, batches, steps, optimizer, goal, session.mesh, plan, seed, every, restore, save, report, failed, stop
        )
    except engine_train.Stopped:
      session.say(f"{stage.name}: stopped and saved; the same command goes on from here")
      raise SystemExit(143) from None
  facts = {"steps": batches.steps, "examples": batches.count, "rows": batches.counts[0]}
  facts |= {"untrained_tokens_reset": len(reset)}
  return export(session, model, stage.dir / "model"), facts


def sequence_logprobs(session, checkpoint, sequences, options):
  """fp32 [sequences]: summed log-probs of the supervised tokens under a checkpoint, e.g. as a reference."""
  model = session.load(checkpoint, session.mesh, sharding.TRAIN, "float32")
  return _sequence_logprobs(session, model, sequences, options)


def _sequence_logprobs(session, model, sequences, options):
  batches = _in_order(session, sequences, options)
  out = np.zeros(len(sequences), np.float32)
  made = map(batches, range(batches.steps))
  scored = engine_train.sequence_logprobs(model, made, options.batch, session.dtype, session.mesh)
  for step, logprobs in enumerate(scored):
    members = batches.members(step)
    out[members] = logprobs[: len(members)]
  return out


def token_logprobs(session, checkpoint, sequences, options):
  """[fp32 log-probs of the supervised tokens of a sequence, 0 for the others] under a checkpoint; that of token t + 1
  stands at t."""
  model = session.load(checkpoint, session.mesh, sharding.TRAIN, "float32")
  batches = _in_order(session, sequences, options)
  out = [np.zeros(len(ids) - 1, np.float32) for ids, _ in sequences]
  made = [batches(step) for step in range(batches.steps)]
  for step, logprobs in enumerate(engine_train.token_logprobs(model, made, session.dtype, session.mesh)):
    example, members = made[step]["example"], batches.members(step)
    by_example = np.argsort(example, axis=None, kind="stable")[(example < 0).sum() :]  # padding comes first
    parts = np.split(logprobs.ravel()[by_example], np.cumsum([len(sequences[i][0]) for i in members])[:-1])
    for i, part in zip(members, parts):
      out[i] = part[:-1]
  return out


def _in_order(session, sequences, options):
  return Batches(Examples(sequences, range(len(sequences))), options, seed=None, unit=sharding.replicas(session.mesh))


def export(session, model, directory):
  """Write the model directory that transformers and vLLM load as it is."""
  weights.save(
    directory,
    model,
    tokenizer=session.tokenizer,
    chat_template=chat.jinja(session.chat),
    eos_token=None if session.chat.stop == chat.EOS else session.chat.stop,
    stop_ids=chat.stop_ids(session.tokenizer, session.chat),
    bos_id=session.tokenizer.bos_id,
    pad_id=None,
    dtype=session.config.model.save_dtype,
  )
  return directory


def finish(session, stage, counts, options, **extra):
  """Close a training stage: register the model's files, then drop the checkpoints that are not to stay."""
  names = [str(p.relative_to(stage.dir)) for p in sorted((stage.dir / "model").rglob("*")) if p.is_file()]
  stage.finish(counts=counts, files=[*names, "metrics.jsonl"], **extra)
  if session.run.process == 0:
    stays = lambda name: options.checkpoint_keep and name.isdigit() and int(name) % options.checkpoint_keep == 0
    for path in (stage.dir / "checkpoints").glob("*"):
      if not stays(path.name):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
      (stage.dir / "checkpoints").rmdir()  # if it is empty
  return trained(stage)


def trained(stage):
  """The Checkpoint of a finished training stage; its name is the stage's."""
  return Checkpoint(stage.name, stage.dir / "model", stage.manifest["content"])


def checkpoint_model(host, directory, step, mesh):
  """The fp32 model of a checkpoint that a training left in `directory`, on any mesh."""
  with ocp.training.Checkpointer(directory.absolute()) as checkpoints:
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(checkpoints.metadata(step).metadata)}
    abstract = engine_train.abstract_state(_config(host), mesh, "bfloat16" if "bfloat16" in kept else "float32")
    return _with_leaves(abstract, checkpoints.load(step, _leaves(abstract)))[0]


def _config(session):
  """The architecture that is trained: the base model's, with rows for the tokens that the chat format added."""
  c = llama_config.read_config(session.directory)
  return dataclasses.replace(c, vocab=max(c.vocab, session.tokenizer.size))


def _least_of_all_hosts(size):
  """All hosts must compile the same program."""
  return int(multihost_utils.process_allgather(np.float64(size)).min()) if jax.process_count() > 1 else size


@contextlib.contextmanager
def _asked_to_stop():
  """Yields whether SIGTERM has come, which does not end the process inside, but right after."""
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)
  if asked.is_set():
    signal.raise_signal(signal.SIGTERM)


def _failure(session, stage, model, data, members, step, options):
  """Write the examples of a step whose loss was not finite, the likeliest culprits first; what to say about it."""
  sides = [data.sides[i] for i in members] if isinstance(data, Pairs) else [(data.sequences[i],) for i in members]
  logprobs = _sequence_logprobs(session, model, [sequence for pair in sides for sequence in pair], options)
  rows = [
    {"id": data.names[i], "logprobs": [float(x) for x in of], "tokens": [len(ids) for ids, _ in pair]}
    for i, of, pair in zip(members, logprobs.reshape(len(members), -1), sides)
  ]
  rows.sort(key=lambda row: (np.isfinite(row["logprobs"]).all(), min(row["logprobs"])))
  if session.run.process == 0:
    shards.write_json(stage.dir / "failure.json", {"step": step + 1, "examples": rows})
  bad = [row["id"] for row in rows if not np.isfinite(row["logprobs"]).all()]
  which = f"; not finite for {', '.join(map(repr, bad[:3]))}{' ...' * (len(bad) > 3)}" if bad else ""
  return f"{which}. The step's examples are in {stage.dir / 'failure.json'}"


class _Log:
  """metrics.jsonl, a line per step; a restart drops the lines after its checkpoint. Times go to speed.jsonl, so that
  the metrics are the same for the same training; TensorBoard has both."""

  def __init__(self, session, stage, batches):
    self.path, self.active, self.first = stage.dir / "metrics.jsonl", session.run.process == 0, True
    self.batches, self.began, self.steps = batches, None, 0
    self.c, device = _config(session), session.mesh.devices.flat[0]
    self.peak = (engine_train.peak(device) or 0) * session.mesh.size
    self.board = None

  def __enter__(self):
    self.began = time.monotonic()
    return self

  def __exit__(self, *_):
    if self.board:
      self.board.close()

  def keep(self, steps):
    self.steps = steps
    if self.active:
      for path in (self.path, self.path.with_name("speed.jsonl")):
        lines = path.read_text().splitlines()[:steps] if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines))
    self.first = False

  def write(self, step, metrics):
    """Tokens per second of the step."""
    lengths, now = self.batches.lengths(step), time.monotonic()
    seconds = max(now - self.began, 1e-9)
    self.began = now
    speed = {"seconds": seconds, "tokens": sum(lengths), "tokens_per_second": sum(lengths) / seconds}
    if self.peak:
      speed["mfu"] = engine_train.operations(self.c, lengths) / seconds / self.peak
    if self.active:
      self._append(step, metrics, speed)
    return speed["tokens_per_second"]

  def _append(self, step, metrics, speed):
    if self.board is None:
      import tensorboardX  # which imports torch, where there is one

      directory = str(self.path.with_name("tensorboard"))
      self.board = tensorboardX.SummaryWriter(directory, purge_step=step + 1, write_to_disk=True)
    rounded = lambda values: {k: float(f"{v:.6g}") for k, v in values.items()}
    for path, values in ((self.path, metrics), (self.path.with_name("speed.jsonl"), speed)):
      with open(path, "w" if self.first else "a") as file:
        file.write(json.dumps({"step": step + 1} | rounded(values)) + "\n")
      for name, value in values.items():
        self.board.add_scalar(name, value, step + 1)
    self.first = False


# Plain leaves on disk: the tree then does not depend on how Flax wraps a weight.


def _leaves(state):
  return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _with_leaves(state, leaves):
  return jax.tree.unflatten(jax.tree.structure(state), [leaves[k] for k in sorted(leaves)])
