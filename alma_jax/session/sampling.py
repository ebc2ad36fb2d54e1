"""Sampling with text in and text out, on this host's devices."""

import dataclasses

from alma_jax.engine import sample as engine


@dataclasses.dataclass(frozen=True)
class Draft:
  """One sampled continuation."""

  text: str
  tokens: tuple
  finished: bool
  logprob: float


def drafts(session, checkpoint, prompts, keys, stop_ids, options, bar):
  """list[Draft]: one per (prompt ids, key). `options` has temperature, top_p, max_new_tokens and max_prompt_tokens,
  the room for prompts, which every prompt must fit."""
  decoding = engine.Decoding(
    max_new_tokens=options.max_new_tokens,
    stop_ids=tuple(stop_ids),
    temperature=float(options.temperature),
    top_p=float(options.top_p),
  )
  requests = [engine.Request(tuple(prompt), key) for prompt, key in zip(prompts, keys)]

  def progress(finished, tokens):
    bar.update(finished)
    bar.tokens = getattr(bar, "tokens", 0) + tokens
    bar.set_postfix_str(f"{bar.tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

  sampled = engine.sample(
    session.model(checkpoint, "unrolled"),
    requests,
    decoding,
    slots=session.config.engine.slots * session.local_ways,
    longest_prompt=options.max_prompt_tokens,
    place=session.place,
    progress=progress,
  )
  decode = session.tokenizer.decode
  return [Draft(decode(s.tokens).strip(), s.tokens, s.finished, s.logprob) for s in sampled]
