"""Conversations as the ids that a published model was trained on: by its own chat template, or a format of ours.

  written = written_by(load_tokenizer("models/Skywork-Reward-Llama-3.1-8B"), None)   # its chat template
  ids = written.prompt(messages) + written.response("Fine, thanks.")      # what apply_chat_template gives

A Jinja template is asked with marks in the place of texts; the texts are then put between the pieces of markup and are
encoded by `chat.encode_pieces`. So texts cannot forge special tokens, which `apply_chat_template` would let them do,
and all responses to a prompt share its ids. Contents are stripped. Templates that write the day's date get DATE, since
the same conversation must always get the same score.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from alma_jax.text import chat
from alma_jax.text.chat import ChatFormat, Messages, Piece
from alma_jax.text.tokenizer import TextError, Tokenizer

DATE = "26 Jul 2024"  # Llama-3's own default
_PROBE = [{"role": "user", "content": "How many are 12 and 30?"}]
_PROBES = [_PROBE, [*_PROBE, {"role": "assistant", "content": "42."}, {"role": "user", "content": "Are you sure?"}]]


@dataclasses.dataclass(frozen=True)
class Written:
  """How a model's conversations become ids."""

  name: str
  prompt: Callable[[Messages], list[int]]  # up to where the response begins
  response: Callable[[str], list[int]]  # the response, and what closes its turn
  markup: Callable[[str], list[int]]  # a text of the template's own, in which special tokens are recognised
  special: frozenset[int]

  def drawn(self, response: str, finished: bool) -> list[int]:
    """The tokens that a model draws when it writes the response, with the stop token if it finished."""
    ids = self.response(response)
    stop = next((at for at, i in enumerate(ids) if i in self.special), None)  # texts hold no special tokens
    if stop is None:
      raise TextError(f"{self.name} closes a response without a special token, so that none tells where it ends")
    return ids[: stop + finished]


def written_by(tok: Tokenizer, fmt: ChatFormat | None) -> Written:
  """By the format, or without one by the chat template that came with the tokenizer."""
  if fmt is not None:
    tok, added = chat.prepare(tok, fmt)
    if added:
      raise TextError(f"the tokenizer in {tok.source} lacks {', '.join(added)}, which chat format {fmt.name!r} needs")
    return Written(
      fmt.name,
      lambda messages: chat.encode_prompt(tok, fmt, messages),
      lambda text: chat.encode_response(tok, fmt, text),
      lambda text: chat.encode_pieces(tok, fmt, [(text, True)]),
      tok.special_ids,
    )
  if not tok.hf.chat_template:
    raise TextError(
      f"{tok.source} holds no chat template, so the text that the model reads is not known: name a format"
    )
  template = _Template(tok)
  template.check()
  name = f"the chat template in {tok.source}"
  return Written(name, template.prompt, template.response, template.markup, tok.special_ids)


class _Template:
  """A tokenizer's chat template as pieces of markup around texts."""

  def __init__(self, tok: Tokenizer) -> None:
    self.tok = tok
    special = tuple(tok.exact.id_to_token(i) for i in sorted(tok.special_ids))
    self.fmt = ChatFormat("published", None, chat.Turn("", ""), "", "", "", specials=special)

  def prompt(self, messages: Messages) -> list[int]:
    return chat.encode_pieces(self.tok, self.fmt, self._split(messages)[0])

  def response(self, text: str) -> list[int]:
    """The same behind every prompt, which `check` makes sure of."""
    _, space, closing = self._split(_PROBE)
    return chat.encode_pieces(self.tok, self.fmt, [(space + text.strip(), False), (closing, True)])

  def markup(self, text: str) -> list[int]:
    return chat.encode_pieces(self.tok, self.fmt, [(text, True)])

  def check(self) -> None:
    """Raise a TextError unless the ids are those of apply_chat_template."""
    for messages in _PROBES:
      turns = [*messages, {"role": "assistant", "content": "Fine."}]
      ids = self.prompt(messages) + self.response("Fine.")
      theirs = self.tok.hf.encode(self._rendered(turns), add_special_tokens=False)
      if ids != theirs:
        raise TextError(
          f"{self.tok.source}: its chat template does not become the same ids when texts and markup are encoded apart"
          f" ({ids} and {theirs}): name a chat format instead"
        )

  def _split(self, messages: Messages) -> tuple[list[Piece], str, str]:
    """The pieces up to the response, the space that it begins with, and what closes it."""
    texts = [turn["content"].strip() for turn in messages]
    marked = [{"role": turn["role"], "content": _mark(i)} for i, turn in enumerate(messages)]
    rendered = self._rendered([*marked, {"role": "assistant", "content": _mark(len(texts))}])
    parts = re.split("\ue000(\\d+)\ue001", rendered)  # markup, number, markup, ..., number, markup
    if [int(n) for n in parts[1::2]] != list(range(len(texts) + 1)):
      raise TextError(f"{self.tok.source}: its chat template leaves out, repeats or moves turns of {messages}")
    header, space = chat.cut_spaces(parts[-3])
    pieces: list[Piece] = []
    for markup, text in zip(parts[:-3:2], texts, strict=True):
      pieces += [(markup, True), (text, False)]
    return [*pieces, (header, True)], space, parts[-1]

  def _rendered(self, turns: Sequence[dict[str, str]]) -> str:
    hf: Any = self.tok.hf
    try:
      return hf.apply_chat_template(turns, tokenize=False, date_string=DATE)
    except Exception as error:  # the template's own refusals and its bugs
      raise TextError(f"{self.tok.source}: its chat template fails ({type(error).__name__}: {error})") from None


def _mark(i: int) -> str:
  """What stands for text i: characters for private use, which no template writes."""
  return f"\ue000{i}\ue001"
