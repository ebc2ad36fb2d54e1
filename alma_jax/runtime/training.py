"""Training with data in and a model directory out: epochs, memory, checkpoints, logs, export.

  directory, facts = train(s, stage, init, Examples(sequences, names), options, seed)
  checkpoint = finish(s, stage, facts, options)
  by_epoch(checkpoint)[7]                the model at the end of epoch 7, if options.keep_epochs is 1 .. 7

If the training will not fit into the devices' memory, it ends before the first step. A killed training goes on from its
last checkpoint and ends with the same weights as one that was never killed; SIGTERM makes it save one at once. In the
stage's directory: metrics.jsonl (a line per step), speed.jsonl (times, tokens per second, MFU), tensorboard/ (both),
and failure.json if a loss was not finite: the examples of that step.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alma_jax.engine import losses
from alma_jax.engine import train as engine_train
from alma_jax.engine.optimizer import Optimizer
from alma_jax.engine.train import (
  Hooks,
  Objective,
  Plan,
  State,
  Stopped,
  TooLarge,
  TrainingTask,
  abstract_state,
  fit,
  planned,
)
from alma_jax.errors import NotFinite
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.llama.config import LlamaConfig
from alma_jax.options import ConfigError, option, spread
from alma_jax.runtime import room
from alma_jax.runtime.batches import Batches, Examples, Pairs, Rated, Sizes, TrainingData
from alma_jax.runtime.checkpoints import Checkpoints
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.metrics import StepLog
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.runs import Stage
from alma_jax.text import chat
from alma_jax.text.packing import Encoded

FAILURE = "failure.json"
USEFUL = 0.85  # the least share of a step's places that hold tokens, where a mesh of the same devices can reach it


# Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Sizes):
  """One training stage on Examples. `batch` counts examples; a step packs them into rows of `row_length` tokens."""

  optimizer: Optimizer = spread(Optimizer)
  average: Literal["tokens", "examples"] = "tokens"  # every supervised token counts alike; "examples": every example
  dropout: float = 0.0  # of what the last layer adds; it rises evenly from 0 in the first (LIMA: 0.3)
  # These change the result only by rounding and may be changed in a run that has begun. remat: "none", "products",
  # "full" take less and less memory, more and more time; "auto" is the first that fits, in more passes if it must be.
  remat: Literal["auto", "none", "products", "full"] = option("auto", practical=True)
  passes: int = option(1, least=1, practical=True)  # through the model for a step: more of them take less memory
  checkpoint_every: int = option(200, least=1, practical=True)  # steps between checkpoints; the last two are kept
  checkpoint_keep: int = option(0, least=0, practical=True)  # one in so many steps stays for good; 0: none
  keep_epochs: int = option(0, least=0, later=True)  # the model of this epoch and of all later ones stays; 0: none

  def __post_init__(self) -> None:
    super().__post_init__()
    self.objective("float32")  # checks what it is made of

  def objective(self, compute_dtype: str) -> Objective:
    """What the steps minimise."""
    return Objective(None, self.remat, self.dropout, compute_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
  """The training of a round by SFT."""

  init_from: str = "base"  # what is trained: "base", "sft_1", ..., "latest"
  history: Literal["all", "latest"] = "all"  # on the trainsets of all rounds so far; "latest": on this round's


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedOptions(Options):
  """The training of a round on human examples and the model's own: gamma times the mean loss of the human ones plus
  (1 - gamma) times that of the others. The mean is by tokens or by examples, as `average` says."""

  init_from: Literal["base", "latest"] = "base"  # what is trained
  gamma: float = option(0.5, above=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptions(PolicyOptions):
  """A training stage on pairs; a step takes `batch` of them."""

  init_from: str = "sft_1"
  ref_from: str = "init"  # the reference: "init", or as init_from
  preference: losses.Preference = spread(losses.Preference)

  def objective(self, compute_dtype: str) -> Objective:
    return dataclasses.replace(super().objective(compute_dtype), kind=self.preference)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedOptions(PreferenceOptions):
  """A training stage on pairs that a model has judged itself (SPA)."""

  preference: losses.SelfRefinement = spread(losses.SelfRefinement)

  def objective(self, compute_dtype: str) -> Objective:
    return dataclasses.replace(super().objective(compute_dtype), remembers=self.preference.window * self.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoOptions(Options):
  """A training stage on all responses of a round; a step takes `batch` of them."""

  init_from: str = "latest"
  ref_from: str = "sft_1"  # what it is held near
  grpo: losses.Grpo = spread(losses.Grpo)

  def objective(self, compute_dtype: str) -> Objective:
    return dataclasses.replace(super().objective(compute_dtype), kind=self.grpo)


def check_row_length(host: Host, options: Options, where: str, least: int, what: str) -> None:
  """Raise a ConfigError unless the rows hold `least` tokens, which is what `what` says, and suit the model."""
  name, positions = f"{where}.row_length is {options.row_length:,}", host.config.max_positions
  if options.row_length < least:
    raise ConfigError(f"{name}; {what} {least:,} tokens: it must be at least that, and hold your own texts")
  if options.row_length > positions:
    raise ConfigError(f"{name}; it must be at most {positions:,}, the model's positions")


# Training


def train(
  s: Session,
  stage: Stage,
  init: Checkpoint,
  data: TrainingData,
  options: Options,
  seed: int,
  reference: Checkpoint | None = None,
) -> tuple[pathlib.Path, dict[str, int]]:
  """Train `init` on the data and write `stage.dir/model`; that directory, and facts for the manifest. `reference` is
  there if the objective compares with the model itself."""
  s.host.free()
  batches, mesh = _spread(s, data, options, seed, _passes(options))
  c, o, objective = s.host.trained_config, options, options.objective(s.host.dtype)
  if isinstance(data, Rated):
    c = dataclasses.replace(c, outputs=data.head.shape[1])
    objective = dataclasses.replace(objective, kind=losses.Regression())
  task = TrainingTask(options.optimizer, objective, mesh, batches.steps, seed)
  # All hosts must compile the same program, and stop together: the host with the least memory, or disk, decides.
  checkpoint, saved = room.checkpoint_bytes(c, o.optimizer.moments), room.model_bytes(c, s.host.save_dtype)
  kept = _kept_epochs(batches, options)
  disk = room.training_bytes(checkpoint, saved, batches.steps, o.checkpoint_every, o.checkpoint_keep)
  disk += len(kept) * saved
  memory, there = float(s.host.training_bytes), float(room.there(stage.dir))
  if jax.process_count() > 1:
    memory, there = multihost_utils.process_allgather(np.array([memory, there])).min(0).tolist()
  room.check(stage.name, stage.dir, disk, int(there), s.display)
  batches, task, plan = _planned(s, data, options, c, task, batches, memory)
  mesh = task.mesh
  _say_shapes(s, stage.name, batches, mesh)
  how = dict(remat=plan.remat, passes=plan.passes)
  s.run.log("memory", stage=stage.name, state=plan.state, working=plan.working, there=memory, **how)
  if plan.bytes > memory / 10:
    s.display.say(
      f"{stage.name}: {plan.bytes / 1e9:.1f} of {memory / 1e9:.1f} GB on each device, {plan.state / 1e9:.1f} of them"
      f" for weights and moments; remat {plan.remat!r}" + (f", {plan.passes} passes" if plan.passes > 1 else "")
    )
  checkpoints = Checkpoints(stage.dir / layout.CHECKPOINTS, options.checkpoint_keep)
  log = StepLog(s, stage, batches)
  bar = s.display.bar(stage.name, batches.steps, "steps")

  def restore(state: State) -> tuple[State, int] | None:
    step = checkpoints.latest
    if step is None:
      return None
    for x in jax.tree.leaves(start):  # the state takes the room of the model that it replaces
      x.delete()
    found = checkpoints.load(step, state)
    log.keep(step)
    bar.update(step)
    return found, step

  def save(step: int, state: State) -> None:
    checkpoints.save(step, state)
    stage.beat()

  def keep(step: int, model: llama.Llama) -> None:
    export(s.host, model, stage.dir / layout.epoch_name(kept[step]) / layout.MODEL)

  def report(step: int, metrics: Mapping[str, float]) -> None:
    speed = log.write(step, metrics)
    bar.update(1)
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)

  def failed(step: int, model: llama.Llama) -> str:
    rows = _failure(s, model, data, batches.members(step), options, mesh)
    bad = [row["id"] for row in rows if not np.isfinite(row["logprobs"]).all()]
    for row in rows:  # JSON has no NaN: the text "nan" stands for it
      row["logprobs"] = [x if np.isfinite(x) else str(x) for x in row["logprobs"]]
    if s.run.process == 0:
      shards.write_json(stage.dir / FAILURE, {"step": step + 1, "examples": rows})
    which = f"; not finite for {', '.join(map(repr, bad[:3]))}{' ...' * (len(bad) > 3)}" if bad else ""
    return f"{which}. The step's examples are in {stage.dir / FAILURE}"

  (stage.dir / FAILURE).unlink(missing_ok=True)
  with _asked_to_stop() as stop:
    try:
      with checkpoints, log, bar:
        start, reset = s.host.load(init, mesh, sharding.TRAIN, "float32"), []
        if markers := chat.special_ids(s.host.tokenizer, s.host.chat):
          start, reset = weights.reinit_untrained(start, markers)
        if isinstance(data, Rated):
          several = jax.process_count() > 1  # all hosts begin with the bits of the first one
          head = multihost_utils.broadcast_one_to_all(data.head) if several else data.head
          start = weights.with_scores(start, np.asarray(head), mesh)
        hooks = Hooks(restore, save, options.checkpoint_every, keep, frozenset(kept), report, failed, stop)
        beside = None
        if objective.compares:
          if reference is None:
            raise RuntimeError(f"{stage.name}: the loss compares with a reference model, and none is given")
          beside = s.host.load(reference, mesh, sharding.TRAIN, s.host.dtype)
        model = fit(start, batches, task, plan, hooks, beside)
    except Stopped:
      s.display.say(f"{stage.name}: stopped and saved; the same command goes on from here")
      raise SystemExit(143) from None
  facts = {"steps": batches.steps, "examples": batches.count, "rows": batches.shapes[batches.largest()[0]][0].rows}
  facts |= {"untrained_tokens_reset": len(reset)}
  if options.keep_epochs:
    facts |= {"epochs": -(-batches.steps // batches.per_epoch)}
  return export(s.host, model, stage.dir / layout.MODEL), facts


def _planned(
  s: Session, data: TrainingData, options: Options, c: LlamaConfig, task: TrainingTask, batches: Batches, memory: float
) -> tuple[Batches, TrainingTask, Plan]:
  """The Plan of the largest step, with its batches and task. With remat "auto" a step that fits in no way is taken in
  twice as many passes, as often as that takes less memory and each has an example."""
  passes = _passes(options)
  while True:
    try:
      return batches, task, planned(c, task, batches(batches.largest()[0]), passes, memory)
    except TooLarge as error:
      if options.remat != "auto" or not error.in_more_passes or 2 * passes > options.batch:
        raise
    passes *= 2
    batches, mesh = _spread(s, data, options, task.seed, passes)
    task = dataclasses.replace(task, mesh=mesh)


def _passes(options: Options) -> int:
  return min(options.passes, max(1, options.batch))


def _spread(
  s: Session, data: TrainingData, options: Options, seed: int | None, passes: int = 1
) -> tuple[Batches, Mesh]:
  """The batches, and the mesh that takes them: the run's own, or, where that has so many ways that over a sixth of the
  places would be padding, one of the same devices with fewer ways and larger tensor groups; on TPUs with shares of
  weights that are gathered (`sharding.in_whole_lanes`)."""

  def on(mesh: Mesh) -> tuple[Batches, Mesh]:
    return Batches(data, options, seed, sharding.replicas(mesh) * passes), mesh

  best, c = on(s.mesh), s.host.trained_config
  if not options.fit_rows:
    return best
  for mesh in sharding.with_fewer_replicas(s.mesh, c):
    if best[0].useful >= USEFUL:
      break
    found = on(mesh)
    if found[0].useful > 1.05 * best[0].useful:
      best = found
  return best[0], sharding.with_whole_lanes(best[1], c)


def _say_shapes(s: Session, name: str, batches: Batches, mesh: Mesh) -> None:
  """Log how many rows steps have and how full they are; say so where devices wait for rows."""
  found = sorted({of[0] for of in batches.shapes[: batches.steps]})
  rows, lengths = [of.rows for of in found], [of.length for of in found]
  useful, ways = batches.useful, sharding.replicas(mesh)
  s.run.log("shapes", stage=name, rows=rows, lengths=lengths, useful=useful, ways=ways)
  if mesh.size > 1:
    moved = ""
    if mesh.shape["tensor"] != s.mesh.shape["tensor"]:
      moved = f", in groups of {mesh.shape['tensor']} (tensor) to waste fewer places"
    if mesh.shape["data"] > s.mesh.shape["data"]:
      moved += f", data={mesh.shape['data']} and fsdp={mesh.shape['fsdp']} for shares that TPUs gather"
    s.display.say(
      f"{name}: {_range(rows)} rows of {_range(lengths)} tokens, {1 - useful:.0%} padding, over {ways} of {mesh.size}"
      f" devices{moved}"
    )


def _range(numbers: Sequence[int]) -> str:
  low, high = min(numbers), max(numbers)
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _kept_epochs(batches: Batches, options: Options) -> dict[int, int]:
  """The epochs whose models stay, by the step that ends them; the last model is the training's own."""
  first, whole = options.keep_epochs, (batches.steps - 1) // batches.per_epoch
  return {epoch * batches.per_epoch: epoch for epoch in range(first, whole + 1)} if first else {}


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
  """Yields a function that is True once SIGTERM has come. SIGTERM ends the process right after the block instead of
  inside it."""
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


def _failure(
  s: Session, model: llama.Llama, data: TrainingData, members: np.ndarray, options: Options, mesh: Mesh
) -> list[dict[str, Any]]:
  """The examples of a step whose loss was not finite, the likeliest culprits first. A model that scores texts has no
  log-probs."""
  if isinstance(data, Rated):
    return [{"id": data.names[i], "logprobs": [], "tokens": data.lengths(i), "score": data.scores[i]} for i in members]
  sides = [data.sides[i] if isinstance(data, Pairs) else (data.sequences[i],) for i in members]
  sequences = [sequence for pair in sides for sequence in pair]
  batches = Batches(Examples(sequences, range(len(sequences))), options, None, sharding.replicas(mesh))
  logprobs = _sequence_logprobs(s, model, batches, mesh)
  rows = [
    {"id": data.names[i], "logprobs": [float(x) for x in found], "tokens": [len(ids) for ids, _ in pair]}
    for i, found, pair in zip(members, logprobs.reshape(len(members), -1), sides, strict=True)
  ]
  return sorted(rows, key=lambda row: (bool(np.isfinite(row["logprobs"]).all()), min(row["logprobs"])))


def export(host: Host, model: llama.Llama, directory: pathlib.Path) -> pathlib.Path:
  """Write the model directory, which transformers and vLLM load without changes."""
  text = weights.TextSide(
    tokenizer=host.tokenizer,
    chat_template=chat.jinja(host.chat),
    eos_token=None if host.chat.stop == chat.EOS else host.chat.stop,
    stop_ids=chat.stop_ids(host.tokenizer, host.chat),
    bos_id=host.tokenizer.bos_id,
    pad_id=host.pad_id,
  )
  weights.save(directory, model, text, host.save_dtype)
  return directory


def finish(s: Session, stage: Stage, counts: Mapping[str, Any], options: Options, **extra: Any) -> Checkpoint:
  """Close a training stage: register the model's files, then drop the checkpoints that are not to stay."""
  models = layout.models_in(stage.dir)
  names = [str(p.relative_to(stage.dir)) for model in models for p in sorted(model.rglob("*")) if p.is_file()]
  stage.finish(counts=counts, files=[*names, layout.METRICS], **extra)
  if s.run.process == 0:
    keep, directory = options.checkpoint_keep, stage.dir / layout.CHECKPOINTS
    for path in directory.glob("*"):
      if not (keep and path.name.isdigit() and int(path.name) % keep == 0):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
      directory.rmdir()  # if it is empty
  return trained(stage)


def trained(stage: Stage) -> Checkpoint:
  """The Checkpoint of a finished training stage; its name is the stage's."""
  return Checkpoint(stage.name, stage.dir / layout.MODEL, stage.content)


def by_epoch(last: Checkpoint) -> dict[int, Checkpoint]:
  """The models that a finished training with `keep_epochs` kept, by epoch; that of the last one is its own."""
  stage, found = last.directory.parent, {}
  for model in layout.models_in(stage):
    epoch = layout.epoch_of(model.parent.name)
    if epoch is not None:
      found[epoch] = Checkpoint(f"{last.name}/{model.parent.name}", model, f"{last.content} epoch {epoch}")
  epochs = layout.load_manifest(stage)["counts"]["epochs"]
  return found | {epochs: dataclasses.replace(last, name=f"{last.name}/{layout.epoch_name(epochs)}")}


def checkpoint_model(host: Host, directory: pathlib.Path, step: int, mesh: Mesh) -> llama.Llama:
  """The fp32 model of a checkpoint that a training left in `directory`, on any mesh."""
  with Checkpoints(directory) as checkpoints:
    abstract = abstract_state(host.trained_config, mesh, checkpoints.moments(step))
    return checkpoints.load(step, abstract, numbered=True)[0]


# Log-probs under a checkpoint, e.g. as a reference, by the code that trains


def sequence_logprobs(s: Session, checkpoint: Checkpoint, sequences: Sequence[Encoded], options: Options) -> np.ndarray:
  """fp32 [sequences]: summed log-probs of the supervised tokens. NotFinite, with the index, if one is not."""
  batches, mesh = _spread(s, Examples(sequences, range(len(sequences))), options, None)
  model = s.host.load(checkpoint, mesh, sharding.TRAIN, "float32")
  found = _sequence_logprobs(s, model, batches, mesh)
  wrong = np.flatnonzero(~np.isfinite(found))
  if len(wrong):
    raise NotFinite(int(wrong[0]), f"its log-prob is {found[wrong[0]]}")
  return found


def _sequence_logprobs(s: Session, model: llama.Llama, batches: Batches, mesh: Mesh) -> np.ndarray:
  """fp32: the log-probs of the Examples in the batches."""
  out = np.zeros(batches.count, np.float32)
  made = map(batches, range(batches.steps))
  scored = engine_train.sequence_logprobs(model, made, batches.batch, s.host.dtype, mesh)
  for step, logprobs in enumerate(scored):
    members = batches.members(step)
    out[members] = logprobs[: len(members)]
  return out


def token_logprobs(
  s: Session, checkpoint: Checkpoint, sequences: Sequence[Encoded], options: Options
) -> list[np.ndarray]:
  """fp32 log-probs of each sequence's supervised tokens, 0 for the others; that of token t + 1 stands at t. NotFinite,
  with the sequence's index, if one is not."""
  batches, mesh = _spread(s, Examples(sequences, range(len(sequences))), options, None)
  model = s.host.load(checkpoint, mesh, sharding.TRAIN, "float32")
  out = [np.zeros(len(ids) - 1, np.float32) for ids, _ in sequences]
  made = [batches(step) for step in range(batches.steps)]
  for step, logprobs in enumerate(engine_train.token_logprobs(model, made, s.host.dtype, mesh)):
    example, members = made[step]["example"], batches.members(step)
    # Places sorted by example, each example's in their order; padding (-1) comes first and is cut off.
    by_example = np.argsort(example, axis=None, kind="stable")[(example < 0).sum() :]
    parts = np.split(logprobs.ravel()[by_example], np.cumsum([len(sequences[i][0]) for i in members])[:-1])
    for i, part in zip(members, parts, strict=True):
      out[i] = part[:-1]
      if not np.isfinite(out[i]).all():
        raise NotFinite(int(i), "the log-prob of a token is not finite")
  return out
