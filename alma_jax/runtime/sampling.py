"""Sampling with text in and text out, on this host's devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from alma_jax.engine import sample
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Limits, Request, SamplingHooks
from alma_jax.engine.slots import Load, slots_that_fit
from alma_jax.errors import NotFinite
from alma_jax.options import Checked, option, spread
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  """How responses are drawn. Prompts longer than `max_prompt_tokens` are left out and counted."""

  decoding: Decoding = spread(Decoding)
  max_prompt_tokens: int = option(least=1)

  @property
  def longest(self) -> int:
    """The tokens of the longest prompt with the longest response."""
    return self.max_prompt_tokens + self.decoding.max_new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyOptions(Options):
  """Several responses to each prompt."""

  n: int = option(least=1)  # N per prompt, over all checkpoints


@dataclasses.dataclass(frozen=True)
class Stops:
  """What ends a response: one of these tokens, or one of these strings."""

  ids: tuple[int, ...]
  strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Draft:
  """One sampled continuation."""

  text: str  # up to a stop string, without it
  tokens: tuple[int, ...]  # without the stop token, but with those that a stop string is in
  finished: bool  # ended by a stop token or string
  logprobs: tuple[float, ...]  # of every drawn token as the model gives them; a stop token's own comes last

  @property
  def logprob(self) -> float:
    return sum(self.logprobs)


def drafts(
  host: Host, checkpoint: Checkpoint, requests: Sequence[Request], options: Options, stops: Stops, bar: Bar
) -> list[Draft]:
  """One Draft for each request. `options.max_prompt_tokens` is the room for prompts: each of them must fit."""
  decoding = dataclasses.replace(options.decoding, stop_ids=tuple(stops.ids))
  model, decode = host.model(checkpoint, "unrolled"), host.tokenizer.decode
  share = len(requests) / max(1, len({r.prompt for r in requests}))
  longest, mesh = options.max_prompt_tokens, host.local_mesh
  slots = slots_that_fit(model, decoding, Load(longest, share), host.free_bytes, mesh, wanted=host.engine.slots)
  ends = functools.partial(_end, decode, stops.strings) if stops.strings else None
  hooks = SamplingHooks(bar.advance, ends)
  try:
    sampled = sample.sample(model, requests, decoding, Limits(slots, longest), mesh, hooks)
  except NotFinite as error:
    raise checkpoint.gave(error, requests[error.item].name or f"request {error.item + 1}") from None
  found = []
  for s in sampled:
    text = _before(decode(s.tokens), stops.strings)
    # What continues a raw text may begin with a space; a chat's turn has none around it.
    found.append(Draft(text if host.raw else text.strip(), s.tokens, s.finished, s.logprobs))
  return found


def _before(text: str, stop_strings: Sequence[str]) -> str:
  """The text up to the first of the stop strings."""
  return text[: min((at for at in (text.find(stop) for stop in stop_strings) if at >= 0), default=len(text))]


def _end(
  decode: Callable[[Sequence[int]], str], strings: Sequence[str], request: Request, tokens: Sequence[int], seen: int
) -> int | None:
  """The least number of tokens whose text holds a stop string, or None. The text of the first `seen` holds none."""
  # Decode the new tokens, and as many before them as a stop string may begin in. A cut inside a character shows as up
  # to four replacement characters, which do not count.
  start, before = seen, max(map(len, strings)) + 4
  while start and len(decode(tokens[start:seen])) < before:
    start -= 1
  text = decode(tokens[start:])
  # Bytes that are no text yet can hide a stop string that stood there before them.
  if "\ufffd" not in text and not _holds(text, strings):
    return None
  return next((n for n in range(seen + 1, len(tokens) + 1) if _holds(decode(tokens[:n]), strings)), None)


def _holds(text: str, strings: Sequence[str]) -> bool:
  return any(stop in text for stop in strings)
