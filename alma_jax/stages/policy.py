"""Training a policy: SFT on everything so far, on preference pairs, or by policy gradients on graded responses."""

import numpy as np

from alma_jax.errors import RunError
from alma_jax.runtime import training
from alma_jax.runtime.batches import Examples, Graded, Pairs
from alma_jax.store import records, shards
from alma_jax.store.records import Example, Pair
from alma_jax.text import chat, packing


def sft(session, name, init, data, trainsets, options, seed):
  """Checkpoint of the finished stage `name`: `init` fine-tuned on the demonstrations and all `trainsets`, which hold
  Examples."""
  fields = _fields(session, init, options, seed) | {"data": {"sft": data.digests["sft"]}}
  stage = session.run.stage(name, fields, {stage.name: stage for stage in trainsets})
  if stage.done:
    return training.trained(stage)
  examples = [(f"demonstration {i}", row.messages, row.response) for i, row in enumerate(data.sft, start=1)]
  examples += [(x.prompt_id, x.messages, x.response) for trainset in trainsets for x in trainset.read(Example)]
  sequences = [chat.encode_example(session.tokenizer, session.chat, m, r) for _, m, r in examples]
  kept, sequences, counts = _clipped(sequences, options)
  chosen = Examples(sequences, [examples[i][0] for i in kept], options.average)
  _, facts = training.train(session, stage, init, chosen, options, seed)
  return training.finish(session, stage, counts | facts, options)


def dpo(session, name, init, reference, trainsets, options, seed):
  """Checkpoint of the finished stage `name`: `init` trained on the pairs of all `trainsets` with the loss of `options`,
  and with `reference` as the reference, if the loss has one."""
  loss = training.preference(options)
  compared = trainsets if loss.has_reference else []
  references = [_reference(session, reference, trainset, options) for trainset in compared]
  inputs = {stage.name: stage for stage in (*trainsets, *references)}
  stage = session.run.stage(name, _fields(session, init, options, seed), inputs)
  if stage.done:
    return training.trained(stage)
  sides, names, counts = [], [], {}
  logprobs = []
  for i, trainset in enumerate(trainsets):
    found, ids, more = _pairs(session, trainset, options)
    sides, names, counts = sides + found, names + ids, {k: counts.get(k, 0) + n for k, n in more.items()}
    if references:
      logprobs.append(_stored(references[i], len(found), loss.sides))
  pairs = Pairs(
    sides=[tuple(of[:2]) for of in sides],
    names=names,
    reference=np.concatenate(logprobs) if logprobs else None,
    others=[of[2] for of in sides] if loss.sides == 3 else None,
  )
  _, facts = training.train(session, stage, init, pairs, options, seed)
  return training.finish(session, stage, counts | facts, options)


def grpo(session, name, init, reference, trainset, options, seed):
  """Checkpoint of the finished stage `name`: `init`, which wrote the graded responses of `trainset`, after policy
  gradients on them, held near `reference`."""
  fields = _fields(session, init, options, seed) | {"reference": reference.content}
  stage = session.run.stage(name, fields, {trainset.name: trainset})
  if stage.done:
    return training.trained(stage)
  rows = trainset.read(records.Graded)
  sequences = []
  for row in rows:
    ids, mask = chat.encode_example(session.tokenizer, session.chat, row.messages, row.response, last_only=True)
    cut = len(ids) if row.finished else len(ids) - 1  # it never said that it was at the end
    sequences.append((ids[:cut], mask[:cut]))
  kept, sequences, counts = _clipped(sequences, options)
  old = training.token_logprobs(session, init, sequences, options)
  same = reference.content == init.content
  graded = Graded(
    sequences,
    [f"{rows[i].prompt_id}/{rows[i].sample_id}" for i in kept],
    np.array([rows[i].advantage for i in kept]),
    old,
    old if same else training.token_logprobs(session, reference, sequences, options),
  )
  _, facts = training.train(session, stage, init, graded, options, seed)
  return training.finish(session, stage, counts | facts, options)


def _fields(session, init, options, seed):
  return {
    "config": training.fingerprint(options),
    "init": init.content,
    "seed": seed,
    "text": session.describe_text(),
    "dtype": session.dtype,
  }


def _clipped(sequences, options, group=1):
  """(which groups are kept, their sequences cut to the row length, counts)."""
  clipped, counts = packing.clip(sequences, options.row_length, group)
  if not any(x is not None for x in clipped):
    raise RunError(
      f"{len(sequences)} training examples, and none has a response token within {options.row_length} tokens"
      " (row_length): nothing to train on"
    )
  kept = [i for i, of in enumerate(clipped) if of is not None]
  return kept, [x for i in kept for x in clipped[i]], counts


def _pairs(session, trainset, options):
  """([(chosen, rejected, ...)] as tokens, their prompts' ids, counts) of a trainset, with as many sides as the loss
  of `options` has."""
  pairs = trainset.read(Pair)
  count = training.preference(options).sides
  texts = [(pair.chosen, pair.rejected) for pair in pairs]
  if count == 3:
    texts = [(*of, other) for of, other in zip(texts, _mismatched(pairs))]
  sequences = [
    chat.encode_example(session.tokenizer, session.chat, pair.messages, text, last_only=True)
    for pair, of in zip(pairs, texts)
    for text in of
  ]
  kept, sequences, counts = _clipped(sequences, options, count)
  sides = [tuple(sequences[at : at + count]) for at in range(0, len(sequences), count)]
  return sides, [pairs[i].prompt_id for i in kept], counts


def _mismatched(pairs):
  """For every pair the chosen response to another prompt, the nearest before in the list (which goes around)."""
  others = []
  for i, pair in enumerate(pairs):
    other = next((p for p in (pairs[i - k] for k in range(1, len(pairs))) if p.prompt_id != pair.prompt_id), None)
    if other is None:
      raise RunError(
        f"{len(pairs)} training pairs, all for one prompt: the loss 'kto' needs responses to other prompts"
      )
    others.append(other.chosen)
  return others


def _reference(session, reference, trainset, options):
  """The finished stage `.../reference_NAME` beside a trainset: the log-probs of its pairs under the reference, computed
  once for all rounds that train on it."""
  name = f"{trainset.name.rpartition('/')[0]}/reference_{reference.name.replace('/', '_')}".lstrip("/")
  fields = {
    "reference": reference.content,
    "config": {"row_length": options.row_length, "sides": training.preference(options).sides},
    "text": session.describe_text(),
    "dtype": session.dtype,
  }
  stage = session.run.stage(name, fields, {trainset.name: trainset})
  if stage.done:
    return stage
  sides, _, _ = _pairs(session, trainset, options)
  # By the same code that trains, so that the loss starts at ln 2.
  logprobs = training.sequence_logprobs(session, reference, [x for of in sides for x in of], options)
  if session.run.process == 0:
    shards.save_array(stage.dir / "logprobs.npy", logprobs.reshape(len(sides), -1))
  stage.finish(counts={"pairs": len(sides)}, files=["logprobs.npy"])
  return stage


def _stored(stage, pairs, sides):
  logprobs = np.array(shards.load_array(stage.dir / "logprobs.npy"))
  finite = int(np.isfinite(logprobs).sum())
  if logprobs.shape != (pairs, sides) or finite < logprobs.size:
    raise RunError(
      f"{stage.dir / 'logprobs.npy'} is not complete: it has the shape {logprobs.shape} and {finite} finite values, and"
      f" there are {pairs} pairs of {sides} sequences; remove {stage.dir} and start again"
    )
  return logprobs
