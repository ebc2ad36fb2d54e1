"""Responses: N samples per prompt from several checkpoints, in equal shares.

Parts come checkpoint by checkpoint, so that each model is loaded once; a part holds one checkpoint's samples for one
share of the prompts. A prompt's remainder of N goes to a checkpoint that rotates with the prompt's id.
"""

from alma_jax.keys import key_of
from alma_jax.runtime.sampling import drafts
from alma_jax.store.records import Prompt, Response
from alma_jax.text import chat


def build(session, round, prompts, checkpoints, c):
  """The finished stage `round_RR/responses`."""
  r = c.responses
  decides = {key: value for key, value in r.to_dict().items() if key != "checkpoints"}  # the models themselves do
  fields = {
    "config": {"seed": c.seed, "responses": decides, "shards": c.shards, "dtype": session.dtype},
    "round": round,
    "text": session.describe_text(),
    "checkpoints": {checkpoint.name: checkpoint.content for checkpoint in checkpoints},
  }
  stage = session.run.stage(f"round_{round:02d}/responses", fields, {"prompts": prompts})
  if stage.done:
    return stage
  asked = prompts.read(Prompt)
  parts = len(checkpoints) * c.shards
  missing = stage.mine(parts)
  total = sum(
    len(_samples(p, i // c.shards, len(checkpoints), r.n)) for i in missing for p in asked[i % c.shards :: c.shards]
  )
  stops = chat.stop_ids(session.tokenizer, session.chat)
  with session.bar(stage.name, total, "samples") as bar:
    for part in missing:
      which, share = divmod(part, c.shards)
      rows, keys, samples, too_long = [], [], [], 0
      for prompt in asked[share :: c.shards]:
        ids = tuple(chat.encode_prompt(session.tokenizer, session.chat, prompt.messages))
        if len(ids) > r.max_prompt_tokens:
          too_long += 1
          continue
        for sample in _samples(prompt, which, len(checkpoints), r.n):
          rows.append(ids)
          keys.append(key_of(c.seed, round, "responses", prompt.id, sample))
          samples.append((prompt.id, sample))
      name = checkpoints[which].name
      written = drafts(session, checkpoints[which], rows, keys, stops, r, bar)
      records = [
        Response(prompt, sample, name, d.text, d.tokens, d.finished, d.logprob)
        for (prompt, sample), d in zip(samples, written)
      ]
      counts = {
        "samples": len(records),
        "truncated": sum(not d.finished for d in written),
        "tokens": sum(len(d.tokens) for d in written),
        "prompts_too_long": too_long,
      }
      stage.write_part(part, parts, records, Response, counts)
  stage.finish()
  return stage


def _samples(prompt, which, checkpoints, n):
  """The sample ids that checkpoint `which` writes for this prompt: equal shares, the remainder rotating."""
  offset = int(prompt.id, 16) % checkpoints
  return range((which - offset) % checkpoints, n, checkpoints)
