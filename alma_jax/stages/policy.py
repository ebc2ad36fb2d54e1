"""Training a policy: SFT from the base model on everything so far, or preference training from an SFT model."""

from alma_jax.session import training
from alma_jax.store.records import Example, Pair
from alma_jax.store.runs import RunError
from alma_jax.text import chat


def sft(session, name, init, data, trainsets, options, seed):
  """Checkpoint of the finished stage `name`: `init` fine-tuned on the demonstrations and all `trainsets`, which hold
  Examples."""
  fields = _fields(session, init, options, seed) | {"data": {"sft": data.digests["sft"]}}
  stage = session.run.stage(name, fields, {stage.name: stage for stage in trainsets})
  if stage.done:
    return training.trained(stage)
  examples = [*data.sft, *(x for trainset in trainsets for x in trainset.read(Example))]
  sequences, counts = _sequences(session, [(x.messages, x.response) for x in examples], options)
  _, facts = training.train(session, stage, init, sequences, options, seed)
  return training.finish(session, stage, counts | facts)


def dpo(session, name, init, trainsets, options, seed):
  """Checkpoint of the finished stage `name`: `init` trained on the pairs of all `trainsets` with the loss of `options`,
  and with itself as the reference, if the loss has one."""
  inputs = {stage.name: stage for stage in trainsets}
  stage = session.run.stage(name, _fields(session, init, options, seed), inputs)
  if stage.done:
    return training.trained(stage)
  loss = training.preference(options)
  pairs = [pair for trainset in trainsets for pair in trainset.read(Pair)]
  if loss.sides == 3:
    sides = _mismatched(pairs)
  else:
    sides = [(pair.messages, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
  sequences, counts = _sequences(session, sides, options, loss.sides)
  reference = _reference(session, init, sequences, options, loss.sides) if loss.has_reference else None
  _, facts = training.train(session, stage, init, sequences, options, seed, "dpo", reference)
  return training.finish(session, stage, counts | facts)


def _fields(session, init, options, seed):
  return {
    "config": options.to_dict(),
    "init": init.content,
    "seed": seed,
    "text": session.describe_text(),
    "dtype": session.dtype,
  }


def _mismatched(pairs):
  """Chosen, rejected, and the chosen response to another prompt, the nearest before in the list (which goes around)."""
  sides = []
  for i, pair in enumerate(pairs):
    other = next((p for p in (pairs[i - k] for k in range(1, len(pairs))) if p.prompt_id != pair.prompt_id), None)
    if other is None:
      raise RunError(
        f"{len(pairs)} training pairs, all for one prompt: the loss 'kto' needs responses to other prompts"
      )
    sides += [(pair.messages, text) for text in (pair.chosen, pair.rejected, other.chosen)]
  return sides


def _sequences(session, conversations, options, group=1):
  """([(ids, mask)], counts): tokenised and cut to the row length; a pair's stay together or go together."""
  encoded = [chat.encode_example(session.tokenizer, session.chat, m, r) for m, r in conversations]
  cut = [len(ids) > options.row_length for ids, _ in encoded]
  encoded = [(ids[: options.row_length], mask[: options.row_length]) for ids, mask in encoded]
  kept, dropped = [], 0
  for at in range(0, len(encoded), group):
    if all(any(mask[1:]) for _, mask in encoded[at : at + group]):
      kept += encoded[at : at + group]
    else:
      dropped += 1
  if not kept:
    raise RunError(
      f"{len(conversations)} training examples, and none has a response token within {options.row_length} tokens"
      " (row_length): nothing to train on"
    )
  return kept, {"truncated": sum(cut), "dropped_without_target": dropped}


def _reference(session, init, sequences, options, sides):
  """Log-probs [pairs, sides] of the sequences under `init`, by the same code that trains, so that the loss starts at
  ln 2."""
  return training.sequence_logprobs(session, init, sequences, options).reshape(-1, sides)
