"""The known words: what a config or a flag may say instead of "package.module:NAME".

  resolve(CHAT_FORMATS, "llama3", "model.chat")            # alma_jax.text.chat:LLAMA3
  resolve(JUDGES, "my_judges:Polite", "judge.kind")        # NAME of a module of the user's
  resolve(JUDGES, "reward:models/armo", "judge.kind")      # the word "reward:DIR" with its argument

A module is looked up in the config file's folder, then in the working directory, then among the installed ones.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from alma_jax.errors import UserError


class NameUnknown(UserError):
  """A word that is not known, or a module or NAME that cannot be found."""


@dataclasses.dataclass(frozen=True)
class Names:
  """One kind of choice: what it is called, and its known words -> "package.module:NAME".

  A word with a colon takes an argument: the key "reward:DIR" stands for every text that begins with "reward:". NAME is
  then called with one keyword more, `argument`, which is the text after that colon. Such a word hides a module of the
  user's that has its name.
  """

  what: str
  words: Mapping[str, str]


CHAT_FORMATS = Names(
  "a chat format",
  {
    "llama3": "alma_jax.text.chat:LLAMA3",
    "llama2": "alma_jax.text.chat:LLAMA2",
    "lima": "alma_jax.text.chat:LIMA",
    "chatml": "alma_jax.text.chat:CHATML",
    "plain": "alma_jax.text.chat:PLAIN",
    "template": "alma_jax.text.chat_template:found",  # from the tokenizer's own chat template
    "mini": "alma_jax.mini.formats:CHAT",
  },
)
LISTS = Names(
  "a few-shot list",
  {
    "requests": "alma_jax.text.fewshot:REQUESTS",
    "questions": "alma_jax.text.fewshot:QUESTIONS",
    "mini": "alma_jax.mini.formats:LIST",
  },
)
DIALOGUES = Names(
  "a few-shot dialogue",
  {
    "dialogue": "alma_jax.text.fewshot:DIALOGUE",
    "answers": "alma_jax.text.fewshot:ANSWERS",
    "mini": "alma_jax.mini.formats:DIALOGUE",
  },
)
JUDGE_TEMPLATES = Names(
  "a judge template",
  {
    "a1": "alma_jax.text.judge:A1",
    "a2": "alma_jax.text.judge:A2",
    "a2_reasoned": "alma_jax.text.judge:A2_REASONED",
    "mini": "alma_jax.mini.formats:JUDGE",
  },
)
GRADERS: Mapping[str, str] = {  # judges that work as a run's judge, as an evaluator and from the command line
  "reward:DIR": "alma_jax.judges.reward:named",
  "implicit:DIR,REF": "alma_jax.judges.implicit:named",
  "rules:NAME": "alma_jax.judges.rules:rule",
  "api:MODEL@URL": "alma_jax.judges.api:judge",
}
JUDGES = Names("a judge", {"finetuned": "", "few_shot": "", "regression": "", **GRADERS})  # "": by stages/judge.py
EVALUATORS = Names("an evaluator", {"mini": "alma_jax.mini.truth:Truth", **GRADERS})
MODELS = Names("a model", {"mini": "alma_jax.mini:CHECKPOINT"})  # -> a directory
CATEGORIES = Names(  # called with a row, which has `messages` and perhaps more fields
  "a function that gives a row's category", {"field": "", "mini": "alma_jax.mini.truth:category"}
)
DATA = Names(  # called with (directory, seed)
  "data",
  {
    "mini": "alma_jax.mini.seeds:make",
    "mini_safety": "alma_jax.mini.seeds:make_safety",
    **{f"mini_{of}": f"alma_jax.mini.variants:{of}" for of in ("filtered", "unfiltered", "quantity", "dialogue")},
  },
)

_folders: list[str] = []  # where modules are looked up first


def look_in(folder: str | pathlib.Path) -> None:
  """Look modules up in this folder first, e.g. that of the config file."""
  if str(folder) not in _folders:
    _folders.append(str(folder))


def check(table: Names, name: object, field: str) -> None:
  """Raise unless `name` is a known word, with its argument, or names something that can be imported."""
  if _known(table, name, field) is None:
    resolve(table, name, field)


def resolve(table: Names, name: object, field: str) -> Any:
  """What a known word or "package.module:NAME" stands for; `field` is the config's or flag's name, for errors."""
  known = _known(table, name, field)
  path = known.path if known else str(name)
  module, colon, attribute = path.partition(":")
  if not (colon and module and attribute):
    near = difflib.get_close_matches(str(name), list(table.words), n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    words = ", ".join(map(repr, table.words))
    raise NameUnknown(f"{field} is {name!r}; it may be {words} or '{table.what} of yours as package.module:NAME'{hint}")
  try:
    with _found_first():
      found = getattr(importlib.import_module(module), attribute)
  except ModuleNotFoundError as error:
    if error.name is None or not module.startswith(error.name):
      raise  # the module is there and imports another one that is not
    where = ", ".join([*_folders, str(pathlib.Path.cwd())])
    raise NameUnknown(
      f"{field} is {name!r}: there is no module {module!r} in {where} or among the installed ones"
    ) from None
  except AttributeError:
    raise NameUnknown(f"{field} is {name!r}: the module {module!r} has no {attribute!r}") from None
  return functools.partial(found, argument=known.argument) if known and known.argument else found


class _Known(NamedTuple):
  path: str
  argument: str  # "" for a word that takes none


def _known(table: Names, name: object, field: str) -> _Known | None:
  """What a known word stands for; None for another text."""
  opening, colon, argument = str(name).partition(":")
  for word, path in table.words.items():
    if word.partition(":")[:2] != (opening, colon):
      continue
    if colon and not argument.strip():
      raise NameUnknown(f"{field} is {name!r}; the text after the colon is missing: {word!r}")
    return _Known(path, argument)
  return None


def source_of(table: Names, name: str) -> str | None:
  """The SHA-256 of the file that a user's NAME stands in, for fingerprints; None for a known word."""
  if _known(table, name, table.what) is not None:
    return None
  with _found_first():
    file = importlib.import_module(name.partition(":")[0]).__file__
  return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() if file else None


@contextlib.contextmanager
def _found_first() -> Iterator[None]:
  added = [*_folders, str(pathlib.Path.cwd())]
  sys.path[:0] = added
  try:
    yield
  finally:
    for folder in added:
      sys.path.remove(folder)
