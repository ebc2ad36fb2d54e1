"""Chat formats as data, and conversations as ids with a mask.

  tok, added = prepare(tok, LLAMA3)             # adds the format's tokens, checks that all can be written
  ids = encode_prompt(tok, LLAMA3, messages)    # ends with the header after which the assistant speaks
  ids, mask = encode_example(tok, LLAMA3, messages, response)  # mask: assistant turns with their stop tokens
  stop_ids(tok, LLAMA3); jinja(LLAMA3)          # for the sampler; for exported checkpoints

There is exactly one BOS (`suited` names the exceptions), and contents are stripped. Special tokens are put in by id,
never read from a content. The text between two special tokens is tokenised as one string, except that an assistant's
turn always starts a new one: so the prompt's ids are a literal prefix of the example's, and `apply_chat_template` with
`jinja(fmt)` gives the same ids.
A header's trailing spaces are tokenised with the content that follows, since models have not seen a lone space token:

  <bos>User: Hello⏎⏎Assistant:| Hi!<eos>       # PLAIN: the prompt ends at the bar, the loss lies behind it

LLAMA2 differs from Meta's form on purpose: it has one BOS in all, and a turn ends with the added "<|eot|>" without a
space before it instead of " </s>", since EOS also ends documents. A prompt without history has exactly Meta's ids.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alma_jax.text.tokenizer import TextError, Tokenizer, add_token

Messages = Sequence[Mapping[str, str]]  # a conversation: {"role", "content"} for each turn
Piece = tuple[str, bool]  # a text, and True if it is markup of the format, in which special tokens are recognised
BOS, EOS = "{bos}", "{eos}"  # in a format's strings: the tokenizer's own tokens


@dataclasses.dataclass(frozen=True)
class Turn:
  before: str
  after: str


@dataclasses.dataclass(frozen=True)
class ChatFormat:
  """The strings around the turns of a conversation."""

  name: str
  system: Turn | None
  user: Turn
  header: str  # stands before an assistant's content, and ends a prompt
  stop: str  # the one token that ends every assistant turn
  after_stop: str = ""  # follows it before the next turn, without loss; nothing follows the last turn
  default_system: str = ""  # the content of the system turn of a conversation that has none
  begin: str = BOS
  user_after_system: str | None = None  # replaces `user.before` after a system turn
  extra_stops: tuple[str, ...] = ()  # further tokens at which sampling stops
  specials: tuple[str, ...] = ()  # the special tokens in the strings above, besides BOS and EOS
  add_tokens: tuple[str, ...] = ()  # those of `specials` that a base tokenizer lacks


def _llama3_header(role: str) -> str:
  return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


LLAMA3 = ChatFormat(
  name="llama3",
  system=Turn(_llama3_header("system"), "<|eot_id|>"),
  user=Turn(_llama3_header("user"), "<|eot_id|>"),
  header=_llama3_header("assistant"),
  stop="<|eot_id|>",
  extra_stops=(EOS,),
  specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
LLAMA2 = ChatFormat(
  name="llama2",
  system=Turn(" [INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
  user=Turn(" [INST] ", " [/INST]"),
  user_after_system="",
  header=" ",
  stop="<|eot|>",
  extra_stops=(EOS,),
  specials=("<|eot|>",),
  add_tokens=("<|eot|>",),
)
# LIMA's: a new token, which is not the one that ends documents, ends every utterance of the user and of the assistant
LIMA = ChatFormat(
  name="lima",
  system=None,
  user=Turn(" ", "<|eot|>"),
  header=" ",
  stop="<|eot|>",
  extra_stops=(EOS,),
  specials=("<|eot|>",),
  add_tokens=("<|eot|>",),
)
# Qwen's, SmolLM's and many others': no BOS, and a line break behind the token that ends a turn
CHATML = ChatFormat(
  name="chatml",
  system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
  user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
  header="<|im_start|>assistant\n",
  stop="<|im_end|>",
  after_stop="\n",
  begin="",
  specials=("<|im_start|>", "<|im_end|>"),
  add_tokens=("<|im_start|>", "<|im_end|>"),
)
PLAIN = ChatFormat(name="plain", system=Turn("", "\n\n"), user=Turn("User: ", "\n\n"), header="Assistant: ", stop=EOS)


def suited(tok: Tokenizer, fmt: ChatFormat) -> ChatFormat:
  """The format, without its BOS if the tokenizer names none, or if its own rule puts none in front of a text. A format
  with special tokens that a tokenizer must bring along is a model's own: there the BOS belongs to the format."""
  own = set(fmt.specials) - set(fmt.add_tokens)
  keep = bool(own) or (tok.bos_id is not None and (tok.begins or bool(fmt.specials)))
  return fmt if keep else dataclasses.replace(fmt, begin=fmt.begin.removeprefix(BOS))


def described(fmt: ChatFormat) -> dict[str, Any]:
  """The format in a fingerprint. Fields that joined later are left out where they are empty, as they were before."""
  fields = dataclasses.asdict(fmt)
  return {name: x for name, x in fields.items() if x or name not in ("after_stop", "default_system")}


def of(tok: Tokenizer, named: ChatFormat | Callable[[Tokenizer], ChatFormat]) -> ChatFormat:
  """The chat format that a name stands for: itself, or what its function makes of the tokenizer."""
  return named if isinstance(named, ChatFormat) else named(tok)


def prepare(tok: Tokenizer, fmt: ChatFormat) -> tuple[Tokenizer, tuple[str, ...]]:
  """A tokenizer that can write the format, and the tokens that were added to it; a TextError if it cannot."""
  fmt = suited(tok, fmt)
  added: list[str] = []
  for content in fmt.add_tokens:
    tok, new = add_token(tok, content)
    added += [content] if new else []
  turns = [turn for turn in (fmt.system, fmt.user) if turn]
  texts = [fmt.begin, fmt.header, fmt.stop, fmt.after_stop, fmt.user_after_system or "", *fmt.extra_stops]
  for part in {part for text in texts + [s for t in turns for s in (t.before, t.after)] for part in _parts(fmt, text)}:
    if part in _specials(fmt):
      i = _special_id(tok, part)
      if i not in tok.special_ids:
        raise TextError(
          f"token {i} ({part}) of the tokenizer in {tok.source} is not marked special: texts can forge it"
        )
    elif tok.decode(tok.encode(part)).strip(" ") != part.strip(" "):
      raise TextError(f"the tokenizer in {tok.source} cannot write {part!r}, which chat format {fmt.name!r} needs")
  return tok, tuple(added)


def stop_ids(tok: Tokenizer, fmt: ChatFormat) -> tuple[int, ...]:
  """Ids at which sampling stops, the turn's own stop token first."""
  return tuple(dict.fromkeys(_special_id(tok, content) for content in (fmt.stop, *fmt.extra_stops)))


def special_ids(tok: Tokenizer, fmt: ChatFormat) -> tuple[int, ...]:
  """Ids of the format's own special tokens, which a base model may never have seen in training."""
  return tuple(tok.token_id(content) for content in fmt.specials)


def encode_prompt(tok: Tokenizer, fmt: ChatFormat, messages: Messages) -> list[int]:
  if not messages or messages[-1]["role"] != "user":
    raise TextError("a prompt must end with a user's turn")
  segments = _segments(fmt, [*messages, {"role": "assistant", "content": ""}])
  return [i for pieces, _ in segments[:-1] for i in encode_pieces(tok, fmt, pieces)]


def encode_example(
  tok: Tokenizer, fmt: ChatFormat, messages: Messages, response: str, last_only: bool = False
) -> tuple[list[int], list[bool]]:
  """The ids and a mask: True on every assistant turn and its stop token, or on the last one's only."""
  ids: list[int] = []
  mask: list[bool] = []
  segments = _segments(fmt, [*messages, {"role": "assistant", "content": response}])
  for n, (pieces, supervised) in enumerate(segments):
    part = encode_pieces(tok, fmt, pieces)
    ids += part
    mask += [supervised and (not last_only or n == len(segments) - 1)] * len(part)
  return ids, mask


def encode_response(tok: Tokenizer, fmt: ChatFormat, response: str) -> list[int]:
  """What `encode_example` has behind the prompt: the response and its stop token."""
  return encode_pieces(tok, fmt, _segments(fmt, [{"role": "assistant", "content": response}])[-1][0])


def encode_pieces(tok: Tokenizer, fmt: ChatFormat, pieces: Iterable[Piece]) -> list[int]:
  """The ids of the pieces: special tokens of the markup by id, the text between them as one string."""
  ids: list[int] = []
  text = ""
  for piece, is_markup in pieces:
    for part in _parts(fmt, piece) if is_markup else (piece,):
      if not (is_markup and part in _specials(fmt)):
        text += part
        continue
      ids += tok.encode(text) if text else []
      ids.append(_special_id(tok, part))
      text = ""
  return ids + (tok.encode(text) if text else [])


def cut_spaces(text: str) -> tuple[str, str]:
  """The text without its trailing spaces, and the spaces: a cut in the ids never falls behind a space."""
  kept = text.rstrip(" ")
  return kept, text[len(kept) :]


def _segments(fmt: ChatFormat, messages: Messages) -> list[tuple[list[Piece], bool]]:
  """The pieces of each segment, and True if it is supervised: in turns the text up to an assistant's header and the
  assistant's turn."""
  header, space = cut_spaces(fmt.header)
  segments: list[tuple[list[Piece], bool]] = []
  pieces: list[Piece] = [(fmt.begin, True)]
  previous = None
  if fmt.system and fmt.default_system and messages[0]["role"] == "user":
    pieces += [(fmt.system.before, True), (fmt.default_system, False), (fmt.system.after, True)]
  for n, message in enumerate(messages):
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
      raise TextError(f"message {n}: need role system, user or assistant and a text, got {role!r}, {type(content)}")
    content = content.strip()
    if role == "assistant":
      segments.append(([*pieces, (header, True)], False))
      segments.append(([(space + content if content else "", False), (fmt.stop, True)], True))
      pieces = [(fmt.after_stop, True)]
    elif role == "user":
      before = fmt.user.before if fmt.user_after_system is None or previous != "system" else fmt.user_after_system
      pieces += [(before, True), (content, False), (fmt.user.after, True)]
    elif fmt.system is None or n > 0:
      why = f"chat format {fmt.name!r} has no system turn" if fmt.system is None else "system must come first"
      raise TextError(f"message {n}: {why}")
    else:
      pieces += [(fmt.system.before, True), (content, False), (fmt.system.after, True)]
    previous = role
  return segments


@functools.cache
def _specials(fmt: ChatFormat) -> frozenset[str]:
  return frozenset((*fmt.specials, BOS, EOS))


@functools.cache
def _parts(fmt: ChatFormat, text: str) -> tuple[str, ...]:
  """A format's string, split at its special tokens."""
  pattern = "|".join(re.escape(s) for s in sorted(_specials(fmt)))
  return tuple(part for part in re.split(f"({pattern})", text) if part)


def _special_id(tok: Tokenizer, content: str) -> int:
  if content not in (BOS, EOS):
    return tok.token_id(content)
  i = tok.bos_id if content == BOS else tok.eos_id
  if i is None:
    raise TextError(f"the tokenizer in {tok.source} names no {content[1:-1]}_token; set it in tokenizer_config.json")
  return i


def jinja(fmt: ChatFormat) -> str:
  """The format as a chat template for exported checkpoints, which gives the same ids as the functions above."""

  def out(text: str) -> str:
    names = {BOS: "bos_token", EOS: "eos_token"}
    parts = [names.get(part) or json.dumps(part) for part in _parts(fmt, text)]
    return "{{ " + " ~ ".join(parts) + " }}" if parts else ""

  def fail(why: str) -> str:
    return "{{ raise_exception(" + json.dumps(why) + ") }}"

  header, space = cut_spaces(fmt.header)
  user = out(fmt.user.before)
  if fmt.user_after_system is not None:
    other = "{% if loop.previtem is defined and loop.previtem['role'] == 'system' %}" + out(fmt.user_after_system)
    user = f"{other}{{% else %}}{user}{{% endif %}}"
  system = (
    f"{out(fmt.system.before)}{{{{ text }}}}{out(fmt.system.after)}" if fmt.system else fail("no system turn here")
  )
  default = ""
  if fmt.system and fmt.default_system:
    turn = f"{out(fmt.system.before)}{{{{ {json.dumps(fmt.default_system)} }}}}{out(fmt.system.after)}"
    default = "{% if messages and messages[0]['role'] == 'user' %}" + turn + "{% endif %}"
  return "".join(
    [
      out(fmt.begin),
      default,
      "{% for message in messages %}{% set text = message['content'] | trim %}",
      "{% if message['role'] == 'system' %}{% if not loop.first %}" + fail("system must come first") + "{% endif %}",
      system,
      "{% elif message['role'] == 'user' %}" + user + "{{ text }}" + out(fmt.user.after),
      "{% elif message['role'] == 'assistant' %}" + out(header),
      "{% if text %}" + out(space) + "{{ text }}{% endif %}" + out(fmt.stop) + out(fmt.after_stop),
      "{% else %}" + fail("unknown role") + "{% endif %}{% endfor %}",
      "{% if add_generation_prompt %}" + out(header) + "{% endif %}",
    ]
  )
