"""Responses: N samples per prompt from several checkpoints, in equal shares.

Parts come checkpoint by checkpoint, so that each model is loaded once; a part holds one checkpoint's samples for one
share of the prompts. A prompt's remainder of N goes to a checkpoint that rotates with the prompt's id.


With `Shots` a prompt is answered after pairs of its own, in a few-shot template and not in the chat format. Where they
take more tokens than there is room for, the first ones, which are the furthest, are left out and counted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax.engine.sample import Request
from alma_jax.keys import key_of
from alma_jax.options import fingerprint
from alma_jax.runtime import alarms, sampling
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Example, Neighbours, Prompt, Response
from alma_jax.store.runs import Artefact
from alma_jax.text import chat, fewshot
from alma_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Shots:
  """The pairs that stand before each prompt."""

  template: fewshot.FewShot
  chosen: Artefact[Neighbours]  # a part for each share of the prompts
  pool: Sequence[Trainset]  # what `chosen` counts through

  def of(self, share: int) -> dict[str, list[dict[str, str]]]:
    """The pairs as they are shown, by the id of the prompt."""
    pairs = [x for pairs in self.pool for x in pairs.in_order(Example)]
    shown = [{"prompt": fewshot.last_user_turn(x.messages), "response": x.response} for x in pairs]
    return {found.prompt_id: [shown[i] for i in found.shots] for found in self.chosen.read(share)}


def build(
  s: Session[Any],
  asked: Artefact[Prompt],
  writers: Sequence[Checkpoint],
  options: sampling.ManyOptions,
  shots: Shots | None = None,
) -> Artefact[Response]:
  """The round's `responses` to the prompts `asked`."""
  seed, shares = s.options.seed, s.options.shards
  fields: dict[str, Any] = {
    "config": {"seed": seed, "responses": fingerprint(options), "shards": shares, "dtype": s.host.dtype},
    "round": s.round,
    "text": s.describe_text(),
    "checkpoints": {writer.name: writer.content for writer in writers},
  }
  inputs: dict[str, Artefact[Any]] = {"prompts": asked}
  if shots:
    fields["text"] = fields["text"] | {"few_shot": dataclasses.asdict(shots.template)}
    inputs |= {"shots": shots.chosen}
  stage = s.stage(layout.RESPONSES, fields, inputs)
  if stage.done:
    return Artefact(stage, Response)
  prompts, parts = asked.read(), len(writers) * shares
  missing = stage.mine(parts)
  total = sum(
    len(_samples(prompt, part // shares, len(writers), options.n))
    for part in missing
    for prompt in prompts[part % shares :: shares]
  )
  stops = sampling.Stops(chat.stop_ids(s.host.tokenizer, s.host.chat), (shots.template.stop,) if shots else ())
  with s.display.bar(stage.name, total, "samples") as bar:
    for part in missing:
      which, share = divmod(part, shares)
      requests, samples, too_long, left_out = [], [], 0, 0
      shown = shots.of(share) if shots else {}
      for prompt in prompts[share::shares]:
        if shots:
          ids, fewer = _after(s.host.tokenizer, shots.template, shown[prompt.id], prompt, options.max_prompt_tokens)
          left_out += fewer
        else:
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
      stage.write_part(part, parts, records, Response, counts | ({"shots_left_out": left_out} if shots else {}))
  bounds = s.options.alarms
  stage.finish(alarms=lambda counts: alarms.cut_off(bounds, counts.get("truncated", 0), counts.get("samples", 0)))
  alarms.say(s.display, stage)
  counts, room = stage.manifest["counts"], options.decoding.max_new_tokens
  s.tell(stage.name, counts, counts["samples"], {"truncated": f"responses are cut off at {room:,} tokens"})
  left_out = f"prompts are left out: they are longer than {options.max_prompt_tokens:,} tokens (max_prompt_tokens)"
  s.tell(stage.name, counts, len(prompts) * len(writers), {"prompts_too_long": left_out})  # counted once per writer
  return Artefact(stage, Response)


def _after(
  tok: Tokenizer, template: fewshot.FewShot, shown: Sequence[Mapping[str, str]], prompt: Prompt, room: int
) -> tuple[tuple[int, ...], int]:
  """The ids of the prompt after the last of the pairs `shown` that find room, and how many do not."""
  asked, first = fewshot.last_user_turn(prompt.messages), 0
  while len(ids := fewshot.few_shot_ids(tok, template, shown[first:], asked)) > room and first < len(shown):
    first += 1
  return ids, first


def _samples(prompt: Prompt, which: int, writers: int, n: int) -> range:
  """The sample ids that writer `which` gives for this prompt: equal shares, the remainder rotating."""
  offset = int(prompt.id, 16) % writers
  return range((which - offset) % writers, n, writers)
