"""Responses: N samples per prompt from several checkpoints, in equal shares.

Parts come checkpoint by checkpoint, so that each model is loaded once; a part holds one checkpoint's samples for one
share of the prompts. A prompt's remainder of N goes to a checkpoint that rotates with the prompt's id.
"""

from collections.abc import Sequence
from typing import Any

from alma_jax.engine.sample import Request
from alma_jax.keys import key_of
from alma_jax.options import fingerprint
from alma_jax.runtime import alarms, sampling
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.records import Prompt, Response
from alma_jax.store.runs import Artefact
from alma_jax.text import chat


def build(
  s: Session[Any], asked: Artefact[Prompt], writers: Sequence[Checkpoint], options: sampling.ManyOptions
) -> Artefact[Response]:
  """The round's `responses` to the prompts `asked`."""
  seed, shares = s.options.seed, s.options.shards
  fields = {
    "config": {"seed": seed, "responses": fingerprint(options), "shards": shares, "dtype": s.host.dtype},
    "round": s.round,
    "text": s.describe_text(),
    "checkpoints": {writer.name: writer.content for writer in writers},
  }
  stage = s.stage(layout.RESPONSES, fields, {"prompts": asked})
  if stage.done:
    return Artefact(stage, Response)
  prompts, parts = asked.read(), len(writers) * shares
  missing = stage.mine(parts)
  total = sum(
    len(_samples(prompt, part // shares, len(writers), options.n))
    for part in missing
    for prompt in prompts[part % shares :: shares]
  )
  stops = sampling.Stops(chat.stop_ids(s.host.tokenizer, s.host.chat))
  with s.display.bar(stage.name, total, "samples") as bar:
    for part in missing:
      which, share = divmod(part, shares)
      requests, samples, too_long = [], [], 0
      for prompt in prompts[share::shares]:
        ids = tuple(chat.encode_prompt(s.host.tokenizer, s.host.chat, prompt.messages))
        if len(ids) > options.max_prompt_tokens:
          too_long += 1
          continue
        for sample in _samples(prompt, which, len(writers), options.n):
          key, name = key_of(seed, s.round, "responses", prompt.id, sample), f"prompt {prompt.id}, sample {sample}"
          requests.append(Request(ids, key, name))
          samples.append((prompt.id, sample))
      written = sampling.drafts(s.host, writers[which], requests, options, stops, bar)
      records = [
        Response(prompt, sample, writers[which].name, d.text, d.tokens, d.finished, d.logprob)
        for (prompt, sample), d in zip(samples, written, strict=True)
      ]
      counts = {
        "samples": len(records),
        "truncated": sum(not d.finished for d in written),
        "tokens": sum(len(d.tokens) for d in written),
        "prompts_too_long": too_long,
      }
      stage.write_part(part, parts, records, Response, counts)
  bounds = s.options.alarms
  stage.finish(alarms=lambda counts: alarms.cut_off(bounds, counts.get("truncated", 0), counts.get("samples", 0)))
  alarms.say(s.display, stage)
  counts, room = stage.manifest["counts"], options.decoding.max_new_tokens
  s.tell(stage.name, counts, counts["samples"], {"truncated": f"responses are cut off at {room:,} tokens"})
  left_out = f"prompts are left out: they are longer than {options.max_prompt_tokens:,} tokens (max_prompt_tokens)"
  s.tell(stage.name, counts, len(prompts) * len(writers), {"prompts_too_long": left_out})  # counted once per writer
  return Artefact(stage, Response)


def _samples(prompt: Prompt, which: int, writers: int, n: int) -> range:
  """The sample ids that writer `which` gives for this prompt: equal shares, the remainder rotating."""
  offset = int(prompt.id, 16) % writers
  return range((which - offset) % writers, n, writers)
