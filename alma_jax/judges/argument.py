"""What stands behind a judge's word: 'reward:DIR,score=NAME' has the argument 'DIR,score=NAME'."""

import dataclasses
import difflib
from collections.abc import Sequence

from alma_jax import names
from alma_jax.options import ConfigError
from alma_jax.text.chat import ChatFormat


@dataclasses.dataclass(frozen=True)
class Argument:
  """The parts between the commas."""

  word: str  # the judge's
  places: tuple[str, ...]  # parts without a name
  named: dict[str, str]

  def chat(self) -> ChatFormat | None:
    """The chat format that chat=NAME names."""
    name = self.named.get("chat")
    found = None if name is None else names.resolve(names.CHAT_FORMATS, name, f"chat in {self.word}:...")
    if found is not None and not isinstance(found, ChatFormat):
      raise ConfigError(
        f"chat={name} in {self.word}:... is no chat format; without chat= the directory's template is used"
      )
    return found


def parsed(word: str, text: str, places: Sequence[str], known: Sequence[str]) -> Argument:
  """The parts of `text`: one for each of `places`, and then `name=value` with known names."""
  parts = text.split(",")
  unnamed, rest = parts[: len(places)], parts[len(places) :]
  if len(unnamed) < len(places) or not all(unnamed):
    raise ConfigError(f"'{word}:{text}' must be '{word}:{','.join(places)}', and may go on with {_few(known)}")
  named = {}
  for part in rest:
    name, equals, value = part.partition("=")
    if name not in known or not equals or not value or name in named:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f" (did you mean {near[0]!r}?)" if near and near[0] != name else ""
      raise ConfigError(f"'{word}:{text}': {part!r} must be one of {_few(known)}, each at most once{hint}")
    named[name] = value
  return Argument(word, tuple(unnamed), named)


def _few(known: Sequence[str]) -> str:
  return ", ".join(f"{name}=..." for name in known)
