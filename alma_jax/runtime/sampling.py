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
  decoding, decode = dataclasses.replace(options.decoding, stop_ids=tuple(stops.ids)), host.tokenizer.decode
  share = len(requests) / max(1, len({r.prompt for r in requests}))
  limits = _limits(host, checkpoint, decoding, Load(options.max_prompt_tokens, share), host.engine.slots)
  ends = functools.partial(_end, decode, stops.strings) if stops.strings else None
  sampled = _sampled(host, checkpoint, requests, decoding, limits, SamplingHooks(bar.advance, ends))
  return [_draft(host, s, _before(decode(s.tokens), stops.strings)) for s in sampled]


def streamed(
  host: Host,
  checkpoint: Checkpoint,
  request: Request,
  options: Options,
  stop_ids: tuple[int, ...],
  show: Callable[[str], object],
) -> Draft:
  """The Draft of one request. `show` hears its text in pieces, as it is drawn."""
  decoding, decode = dataclasses.replace(options.decoding, stop_ids=stop_ids), host.tokenizer.decode
  limits = _limits(host, checkpoint, decoding, Load(options.max_prompt_tokens, 1), 1)
  shown = ""

  def hear(request: Request, tokens: tuple[int, ...], seen: int) -> None:
    nonlocal shown
    # A character of several tokens is whole with the last of them, and white space may turn out to end the text.
    text = decode(tokens).rstrip("\ufffd")
    text = text if host.raw else text.strip()
    if text.startswith(shown):
      show(text[len(shown) :])
      shown = text

  limits = dataclasses.replace(limits, steps=1)
  (sampled,) = _sampled(host, checkpoint, [request], decoding, limits, SamplingHooks(ends=hear))
  found = _draft(host, sampled, decode(sampled.tokens))
  # A tokenizer that reads what was shown otherwise with what follows: the text once more, as it is.
  show(found.text[len(shown) :] if found.text.startswith(shown) else f"\n{found.text}")
  return found


def _limits(host: Host, checkpoint: Checkpoint, decoding: Decoding, load: Load, wanted: int) -> Limits:
  """As many slots as fit; so many as the config names (`wanted`), however few requests a host or a call has."""
  model = host.model(checkpoint, "unrolled")
  slots = slots_that_fit(model, decoding, load, host.free_bytes, host.local_mesh, wanted=wanted)
  return Limits(slots, load.longest_prompt, fixed=wanted > 0)


def _sampled(
  host: Host,
  checkpoint: Checkpoint,
  requests: Sequence[Request],
  decoding: Decoding,
  limits: Limits,
  hooks: SamplingHooks,
) -> list[sample.Sampled]:
  try:
    return sample.sample(host.model(checkpoint, "unrolled"), requests, decoding, limits, host.local_mesh, hooks)
  except NotFinite as error:
    raise checkpoint.gave(error, requests[error.item].name or f"request {error.item + 1}") from None


def _draft(host: Host, sampled: sample.Sampled, text: str) -> Draft:
  # What continues a raw text may begin with a space; a chat's turn has none around it.
  return Draft(text if host.raw else text.strip(), sampled.tokens, sampled.finished, sampled.logprobs)


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
