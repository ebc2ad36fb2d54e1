"""A chat format found in a tokenizer's own chat template, by rendering it: `config.model.chat = "template"`.

  fmt = found(tok)      # a ChatFormat with exactly the ids of the template, or a TextError that says why there is none

A few short conversations are rendered with contents that cannot be missed. What stands between two contents is split
into the turns' strings by comparing renderings:

  <|im_start|>user⏎ U <|im_end|>⏎<|im_start|>assistant⏎ A <|im_end|>⏎<|im_start|>user⏎ U ...
  `opening`          `middle`                           `between`                       `middle`
                     = user.after + header              = stop + after_stop + user.before

The format is then checked against the template, text and ids, on conversations with and without a system turn. A
template that writes something else for some turns (thinking, tools, the date) is refused.
"""

import datetime
from typing import Any, NoReturn

from alma_jax.text import chat
from alma_jax.text.chat import BOS, EOS, ChatFormat, Turn
from alma_jax.text.tokenizer import TextError, Tokenizer

SYSTEM, USER, SAID, MORE = "Asystemtext", "Btheuser", "Canassistant", "Dtheuseragain"
CHECKED = (
  [("user", "Hello there?")],
  [("user", "Hello there?"), ("assistant", "Yes."), ("user", "12 x 3\n\nis ...")],
  [("system", "Be kind."), ("user", "Hello")],
  [("system", "Be kind."), ("user", "a"), ("assistant", "b\nc"), ("user", "d"), ("assistant", "e"), ("user", "f")],
)


def found(tok: Tokenizer) -> ChatFormat:
  """The format of the tokenizer's chat template."""
  if not getattr(tok.hf, "chat_template", None):
    raise TextError(f"the tokenizer in {tok.source} has no chat template")
  try:
    fmt = _read(tok)
  except TextError:
    raise
  except ValueError:  # a content that does not stand in the text once
    _refuse(tok, "it does not write every turn's content once")
  except Exception as error:  # what a template raises
    _refuse(tok, f"it does not write a user's and an assistant's turn ({type(error).__name__}: {error})")
  _check(tok, fmt)
  return fmt


def _read(tok: Tokenizer) -> ChatFormat:
  first = _render(tok, ("user", USER))
  opening, user_after = first.split(USER)
  _, asked = _render(tok, ("user", USER), ask=True).split(USER)
  answered = (("user", USER), ("assistant", SAID))
  middle, tail = _render(tok, *answered).split(USER)[-1].split(SAID)
  between = _render(tok, *answered, ("user", MORE)).split(SAID)[-1].split(MORE)[0]
  if not middle.startswith(user_after) or chat.cut_spaces(middle)[0] != chat.cut_spaces(asked)[0]:
    _refuse(tok, f"behind a user's text stands {user_after!r}, {asked!r} in a prompt, {middle!r} before an answer")
  if not between.startswith(tail):
    _refuse(tok, f"an answer ends with {tail!r} where it is the last turn and goes on with {between!r} where it is not")
  before = between.removeprefix(tail)
  stop, after_stop = _stop(tok, tail)
  start, default = opening.removesuffix(before), ""
  try:
    head, rest = _render(tok, ("system", SYSTEM), ("user", USER)).removesuffix(USER + user_after).split(SYSTEM)
  except Exception:  # what a template raises where it knows no system turn, or a system text that stands elsewhere
    system, after_system = None, None
  else:
    alike = rest.endswith(before)
    after_system = None if alike else ""
    rest = rest.removesuffix(before) if alike else rest
    common = _common(tok, start, head)
    if start != common:  # a system turn stands there in any case
      default = start.removeprefix(head).removesuffix(rest)
      if start != head + default + rest:
        _refuse(tok, f"a conversation begins with {start!r} or with the system turn {head!r} ... {rest!r}")
    system, start = Turn(head.removeprefix(common), rest), common
  eos = _named(tok, "eos_token")
  strings = (start, before, user_after, middle, stop, after_stop, *((system.before, system.after) if system else ()))
  return ChatFormat(
    name="template",
    system=system,
    user=Turn(before, user_after),
    header=middle.removeprefix(user_after),
    stop=stop,
    after_stop=after_stop,
    default_system=default,
    begin=start.replace(bos, BOS) if (bos := _named(tok, "bos_token")) else start,
    user_after_system=after_system,
    extra_stops=(EOS,) if eos and eos != stop else (),
    specials=tuple(token for token in _specials(tok) if any(token in text for text in strings)),
  )


def _stop(tok: Tokenizer, tail: str) -> tuple[str, str]:
  """The token that ends an answer, and what follows it."""
  for token in sorted(_specials(tok), key=len, reverse=True):
    if tail.startswith(token):
      return token, tail.removeprefix(token)
  _refuse(tok, f"an answer ends with {tail!r}, which does not begin with a special token")


def _common(tok: Tokenizer, start: str, head: str) -> str:
  """What begins a conversation with a system turn and one without: all of `start`, or its BOS alone."""
  bos = _named(tok, "bos_token") or ""
  if head.startswith(start):
    return start
  return bos if bos and start.startswith(bos) and head.startswith(bos) else ""


def _check(tok: Tokenizer, fmt: ChatFormat) -> None:
  """Raise a TextError unless format and template give the same ids."""
  prepared, _ = chat.prepare(tok, fmt)
  today = datetime.date.today()
  for shape in ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y"):
    if today.strftime(shape) in fmt.begin + fmt.default_system:
      _refuse(tok, "it writes today's date, so that no two days have the same prompts")
  for turns in CHECKED:
    if turns[0][0] == "system" and fmt.system is None:
      continue
    messages = [{"role": role, "content": content} for role, content in turns]
    theirs = _ids(tok, messages, True)
    ours = chat.encode_prompt(prepared, fmt, messages)
    answered = [*messages, {"role": "assistant", "content": "Fine."}]
    whole = chat.encode_example(prepared, fmt, messages, "Fine.")[0]
    whole += chat.encode_pieces(tok, fmt, [(fmt.after_stop, True)])
    for mine, other in ((ours, theirs), (whole, _ids(tok, answered, False))):
      if mine != other:
        mine, other = (tok.exact.decode(ids, skip_special_tokens=False) for ids in (mine, other))
        _refuse(tok, f"its turns are not alike: it gives {other!r}, and turns as in the first rendering give {mine!r}")


def _render(tok: Tokenizer, *turns: tuple[str, str], ask: bool = False) -> str:
  messages = [{"role": role, "content": content} for role, content in turns]
  return tok.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def _ids(tok: Tokenizer, messages: list[dict[str, str]], ask: bool) -> list[int]:
  text = tok.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
  return list(tok.hf(text, add_special_tokens=False)["input_ids"])


def _specials(tok: Tokenizer) -> list[str]:
  return sorted({tok.exact.id_to_token(i) for i in tok.special_ids})


def _named(tok: Tokenizer, what: str) -> str | None:
  token: Any = getattr(tok.hf, what)
  return token and str(token)


def _refuse(tok: Tokenizer, why: str) -> NoReturn:
  raise TextError(
    f"the chat template of the tokenizer in {tok.source} cannot be read as turns: {why}. Write a ChatFormat of your own"
    " (docs/your_own_chat_format.md)"
  )
