"""Sampling with text in and text out, on this host's devices."""

import dataclasses
import functools

from alma_jax.engine import sample as engine


@dataclasses.dataclass(frozen=True)
class Draft:
  """One sampled continuation."""

  text: str  # up to a stop string, without it
  tokens: tuple  # without the stop token, but with those that a stop string is in
  finished: bool  # ended by a stop token or string
  logprobs: tuple  # of every drawn token as the model gives them; a stop token's own comes last

  @property
  def logprob(self):
    return sum(self.logprobs)


def decoding_of(options, stop_ids=()):
  """The Decoding that a section of the config describes."""
  names = [field.name for field in dataclasses.fields(engine.Decoding) if field.name in options]
  return engine.Decoding(**{"stop_ids": tuple(stop_ids)} | {name: options[name] for name in names})


def drafts(host, checkpoint, prompts, keys, stop_ids, options, bar, stop_strings=()):
  """list[Draft]: one per (prompt ids, key). `options` has max_new_tokens, max_prompt_tokens (the room for prompts, into
  which every prompt must fit) and how tokens are drawn, see `engine.choose.Decoding`."""
  decoding = decoding_of(options, stop_ids)
  requests = [engine.Request(tuple(prompt), key) for prompt, key in zip(prompts, keys)]
  model, decode = host.model(checkpoint, "unrolled"), host.tokenizer.decode
  share = len(requests) / max(1, len({r.prompt for r in requests}))
  longest, mesh, wanted = options.max_prompt_tokens, host.local_mesh, host.config.engine.slots

  def progress(finished, tokens):
    bar.update(finished)
    bar.tokens = getattr(bar, "tokens", 0) + tokens
    bar.set_postfix_str(f"{bar.tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

  sampled = engine.sample(
    model,
    requests,
    decoding,
    engine.slots_that_fit(model, decoding, longest, share, host.free_bytes, mesh, wanted),
    longest,
    mesh,
    progress=progress,
    ends=functools.partial(_end, decode, tuple(stop_strings)) if stop_strings else None,
  )
  found = []
  for s in sampled:
    text = _before(decode(s.tokens), stop_strings)
    # What continues a raw text may begin with a space; a chat's turn has none around it.
    found.append(Draft(text.strip() if host.chat else text, s.tokens, s.finished, s.logprobs))
  return found


def _before(text, stop_strings):
  """The text up to the first of the stop strings."""
  return text[: min((at for at in (text.find(stop) for stop in stop_strings) if at >= 0), default=len(text))]


def _end(decode, stop_strings, request, tokens, seen):
  """The least number of tokens whose text holds a stop string, or None. The text of the first `seen` holds none."""
  # What is new, and as much before it as a stop string may begin in. A cut inside a character shows as up to four
  # other ones, which do not count.
  start, before = seen, max(map(len, stop_strings)) + 4
  while start and len(decode(tokens[start:seen])) < before:
    start -= 1
  text = decode(tokens[start:])
  # Bytes that are no text yet can hide a stop string that stood there before them.
  if "\ufffd" not in text and not _holds(text, stop_strings):
    return None
  return next((n for n in range(seen + 1, len(tokens) + 1) if _holds(decode(tokens[:n]), stop_strings)), None)


def _holds(text, stop_strings):
  return any(stop in text for stop in stop_strings)
