"""Training a policy: SFT on everything so far, on preference pairs, or by policy gradients on graded responses."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from alma_jax.errors import NotFinite, RunError
from alma_jax.options import fingerprint
from alma_jax.runtime import training
from alma_jax.runtime.batches import Examples, GradedResponses, Pairs, compact
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Example, Graded, Pair
from alma_jax.store.runs import Stage
from alma_jax.text import chat, packing

T = TypeVar("T", bound=training.Options)
Sequences = list[tuple[Any, Any]]  # (token ids, weights) of each


@dataclasses.dataclass(frozen=True)
class Job(Generic[T]):
  """One training: the stage's name, what is trained, how, and the seed of the data's order."""

  name: str
  init: Checkpoint
  options: T
  seed: int

  def fields(self, s: Session[Any]) -> dict[str, Any]:
    return {
      "config": fingerprint(self.options),
      "init": self.init.content,
      "seed": self.seed,
      "text": s.describe_text(),
      "dtype": s.host.dtype,
    }


def check_row_length(host: Host, options: training.Options, where: str) -> None:
  """Raise a ConfigError for rows in which no example has a target, or that are longer than the model's positions."""
  shortest = chat.encode_prompt(host.tokenizer, host.chat, [{"role": "user", "content": "a"}])
  what = "a prompt of one word and the first token of its response take"
  training.check_row_length(host, options, where, len(shortest) + 1, what)


def sft(s: Session[Any], job: Job, data: Data, trainsets: Sequence[Trainset] = ()) -> Checkpoint:
  """`job.init` fine-tuned on the demonstrations and all `trainsets`, which hold Examples."""
  fields = job.fields(s) | {"data": {"sft": data.digests["sft"]}}
  stage = s.run.stage(job.name, fields, {trainset.name: trainset for trainset in trainsets})
  if stage.done:
    return training.trained(stage)
  examples = [(f"demonstration {i}", row.messages, row.response or "") for i, row in enumerate(data.sft, start=1)]
  examples += [(x.prompt_id, x.messages, x.response) for trainset in trainsets for x in trainset.in_order(Example)]
  sequences = [compact(*chat.encode_example(s.host.tokenizer, s.host.chat, m, r)) for _, m, r in examples]
  kept, sequences, counts = _clipped(sequences, job.options.row_length)
  _tell(s, job, counts, len(examples), "examples")
  chosen = Examples(sequences, [examples[i][0] for i in kept], job.options.average)
  _, facts = training.train(s, stage, job.init, chosen, job.options, job.seed)
  return training.finish(s, stage, counts | facts, job.options)


def mixed(s: Session[Any], job: Job, human: Trainset, own: Sequence[Trainset] = ()) -> Checkpoint:
  """`job.init` fine-tuned on the examples of `human` and the model's `own`, weighed by the gamma of MixedOptions."""
  trainsets = [human, *own]
  stage = s.run.stage(job.name, job.fields(s), {trainset.name: trainset for trainset in trainsets})
  if stage.done:
    return training.trained(stage)
  by_set = [trainset.in_order(Example) for trainset in trainsets]
  examples = [x for found in by_set for x in found]
  sequences = [compact(*chat.encode_example(s.host.tokenizer, s.host.chat, x.messages, x.response)) for x in examples]
  kept, sequences, counts = _clipped(sequences, job.options.row_length)
  _tell(s, job, counts, len(examples), "examples")
  first = np.array(kept) < len(by_set[0])
  shares = None
  if isinstance(job.options, training.MixedOptions) and first.any() and not first.all():
    shares = gamma_shares(sequences, first, job.options)
  chosen = Examples(sequences, [examples[i].prompt_id for i in kept], job.options.average, shares)
  _, facts = training.train(s, stage, job.init, chosen, job.options, job.seed)
  return training.finish(
    s, stage, counts | facts | {"human": int(first.sum()), "own": int((~first).sum())}, job.options
  )


def gamma_shares(sequences: Sequences, human: np.ndarray, options: training.MixedOptions) -> np.ndarray:
  """Weights [sequences] with which the mean loss of all is gamma times that of the `human` ones plus (1 - gamma) times
  that of the others. Their own mean is 1 by what `average` counts, so the size of a step stays what it was.

  Two human examples of 5 tokens each and one of 30 at gamma 1/2: 40 / 10 / 2 = 2 for each of the first, 2/3 for the
  last, as (2 * 10 + 2/3 * 30) / 40 = 1.
  """
  alike = options.average == "examples"
  sizes = np.array([1.0 if alike else np.sum(mask[1:] != 0) for _, mask in sequences])
  total = sizes.sum()
  of = options.gamma * total / sizes[human].sum(), (1 - options.gamma) * total / sizes[~human].sum()
  return np.where(human, *of)


def dpo(
  s: Session[Any], job: Job[training.PreferenceOptions], reference: Checkpoint, trainsets: Sequence[Trainset]
) -> Checkpoint:
  """`job.init` trained on the pairs of all `trainsets`, against `reference` if the loss has one."""
  loss = job.options.preference
  compared = trainsets if loss.has_reference else []
  references = [_reference(s, reference, trainset, job.options) for trainset in compared]
  inputs = {stage.name: stage for stage in (*trainsets, *references)}
  stage = s.run.stage(job.name, job.fields(s), inputs)
  if stage.done:
    return training.trained(stage)
  sides, names, counts, logprobs = [], [], {}, []
  for i, trainset in enumerate(trainsets):
    found = _pairs(s, trainset, job.options)
    sides, names = sides + found.sides, names + found.prompts
    counts = {k: counts.get(k, 0) + n for k, n in found.counts.items()}
    if references:
      logprobs.append(_stored(references[i], len(found.sides), loss.sides))
  _tell(s, job, counts, len(sides) + counts.get("dropped_without_target", 0), "pairs")
  pairs = Pairs(
    sides=[tuple(of[:2]) for of in sides],
    names=names,
    reference=np.concatenate(logprobs) if logprobs else None,
    others=[of[2] for of in sides] if loss.sides == 3 else None,
  )
  _, facts = training.train(s, stage, job.init, pairs, job.options, job.seed, reference)
  return training.finish(s, stage, counts | facts, job.options)


def grpo(s: Session[Any], job: Job[training.GrpoOptions], reference: Checkpoint, trainset: Trainset) -> Checkpoint:
  """`job.init`, which wrote the graded responses of `trainset`, after policy gradients held near `reference`."""
  fields = job.fields(s) | {"reference": reference.content}
  stage = s.run.stage(job.name, fields, {trainset.name: trainset})
  if stage.done:
    return training.trained(stage)
  rows = trainset.in_order(Graded)
  sequences = []
  for row in rows:
    ids, mask = chat.encode_example(s.host.tokenizer, s.host.chat, row.messages, row.response, last_only=True)
    cut = len(ids) if row.finished else len(ids) - 1  # a response that was cut off did not choose the stop token
    sequences.append(compact(ids[:cut], mask[:cut]))
  kept, sequences, counts = _clipped(sequences, job.options.row_length)
  _tell(s, job, counts, len(rows), "responses")
  names = [f"{rows[i].prompt_id}/{rows[i].sample_id}" for i in kept]

  def logprobs(model: Checkpoint) -> list[np.ndarray]:
    try:
      return training.token_logprobs(s, model, sequences, job.options)
    except NotFinite as error:
      raise model.gave(error, f"response {names[error.item]}") from None

  old = logprobs(job.init)
  same = reference.content == job.init.content
  advantages = np.array([rows[i].advantage for i in kept])
  graded = GradedResponses(sequences, names, advantages, old, old if same else logprobs(reference))
  _, facts = training.train(s, stage, job.init, graded, job.options, job.seed)
  return training.finish(s, stage, counts | facts, job.options)


def _tell(s: Session[Any], job: Job, counts: Mapping[str, int], total: int, items: str) -> None:
  room = f"{job.options.row_length:,} tokens (row_length)"
  lost = {"truncated": f"{items} have a text that is cut to {room}"}
  lost["dropped_without_target"] = f"{items} are dropped: no token of the response lies within {room}"
  s.tell(job.name, counts, total, lost)


def _clipped(sequences: Sequences, row_length: int, group: int = 1) -> tuple[list[int], Sequences, dict[str, int]]:
  """Which groups are kept, their sequences cut to the row length, and counts of what was dropped."""
  clipped, counts = packing.clip(sequences, row_length, group)
  if not any(x is not None for x in clipped):
    raise RunError(
      f"{len(sequences)} training examples, and none has a response token within {row_length} tokens"
      " (row_length): nothing to train on"
    )
  kept = [i for i, of in enumerate(clipped) if of is not None]
  return kept, [x for of in clipped if of is not None for x in of], counts


@dataclasses.dataclass(frozen=True)
class _EncodedPairs:
  sides: list[tuple[Any, ...]]  # chosen, rejected and perhaps a third sequence, as (ids, weights)
  prompts: list[str]  # their prompts' ids
  counts: dict[str, int]


def _pairs(s: Session[Any], trainset: Trainset, options: training.PreferenceOptions) -> _EncodedPairs:
  """The pairs of a trainset as tokens, with as many sides as the loss has."""
  pairs = trainset.in_order(Pair)
  count = options.preference.sides
  texts = [(pair.chosen, pair.rejected) for pair in pairs]
  if count == 3:
    texts = [(*of, other) for of, other in zip(texts, _mismatched(pairs), strict=True)]
  sequences = [
    compact(*chat.encode_example(s.host.tokenizer, s.host.chat, pair.messages, text, last_only=True))
    for pair, of in zip(pairs, texts, strict=True)
    for text in of
  ]
  kept, sequences, counts = _clipped(sequences, options.row_length, count)
  sides = [tuple(sequences[at : at + count]) for at in range(0, len(sequences), count)]
  return _EncodedPairs(sides, [pairs[i].prompt_id for i in kept], counts)


def _mismatched(pairs: Sequence[Pair]) -> list[str]:
  """For every pair the chosen response to another prompt: the nearest before it in the list, which goes around."""
  others = []
  for i, pair in enumerate(pairs):
    other = next((p for p in (pairs[i - k] for k in range(1, len(pairs))) if p.prompt_id != pair.prompt_id), None)
    if other is None:
      raise RunError(
        f"{len(pairs)} training pairs, all for one prompt: the loss 'kto' needs responses to other prompts"
      )
    others.append(other.chosen)
  return others


def _reference(
  s: Session[Any], reference: Checkpoint, trainset: Trainset, options: training.PreferenceOptions
) -> Stage:
  """Stage `reference_NAME` beside a trainset: the log-probs of its pairs under the reference.

  They are computed once for all rounds that train on the trainset.
  """
  name = layout.beside(trainset.name, f"reference_{reference.name.replace('/', '_')}")
  fields = {
    "reference": reference.content,
    "config": {"row_length": options.row_length, "sides": options.preference.sides},
    "text": s.describe_text(),
    "dtype": s.host.dtype,
  }
  stage = s.run.stage(name, fields, {trainset.name: trainset})
  if stage.done:
    return stage
  found = _pairs(s, trainset, options)
  sides = found.sides
  try:  # by the same code that trains, so that the loss starts at ln 2
    logprobs = training.sequence_logprobs(s, reference, [x for of in sides for x in of], options)
  except NotFinite as error:
    raise reference.gave(error, f"a pair of prompt {found.prompts[error.item // len(sides[0])]}") from None
  if s.run.process == 0:
    shards.save_array(stage.dir / "logprobs.npy", logprobs.reshape(len(sides), -1))
  stage.finish(counts={"pairs": len(sides)}, files=["logprobs.npy"])
  return stage


def _stored(stage: Stage, pairs: int, sides: int) -> np.ndarray:
  logprobs = np.array(shards.load_array(stage.dir / "logprobs.npy"))
  finite = int(np.isfinite(logprobs).sum())
  if logprobs.shape != (pairs, sides) or finite < logprobs.size:
    raise RunError(
      f"{stage.dir / 'logprobs.npy'} is not complete: it has the shape {logprobs.shape} and {finite} finite values, and"
      f" there are {pairs} pairs of {sides} sequences; remove {stage.dir} and start again"
    )
  return logprobs
