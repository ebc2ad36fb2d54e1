"""Options: what may be set, declared once and checked before anything runs.

A stage, a judge or a call of the engine has one frozen dataclass: its fields are what may be set, its types, bounds and
`__post_init__` what is allowed, its comments the documentation.

  @dataclasses.dataclass(frozen=True)
  class Options(Checked):
    n: int = option(200, least=1)                            # responses per prompt
    method: Literal["diverse", "random"] = "diverse"
    template: str = option("a2", names=names.JUDGE_TEMPLATES)  # a known word or "package.module:NAME"
    decoding: Decoding = spread(Decoding)                    # its fields stand in the same section of the config
    passes: int = option(1, least=1, practical=True)         # changes a result only by rounding
  keep: bool = option(False, later=True)                   # newer than some runs, which go on as long as it is False

`build(Options, config.responses, "config.responses")` makes them from a section of a config file, and
`fingerprint(options)` is what decides a result. `for_round` applies a config's per-round overrides, such as
{3: {"responses": {"temperature": 0.9}}}. Every mistake is a ConfigError of one line: field, value, what is allowed, the
nearest name.
"""

import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from alma_jax import names as known_names
from alma_jax.errors import UserError

if typing.TYPE_CHECKING:  # the engine's Options need no config files
  from ml_collections import ConfigDict

T = TypeVar("T")


LABEL = re.compile(r"[a-z][a-z0-9_]*")


class ConfigError(UserError):
  """An invalid config value; the message names the field and what is allowed."""


# Declaring


def option(
  default: Any = dataclasses.MISSING,
  *,
  least: float | None = None,
  most: float | None = None,
  above: float | None = None,
  below: float | None = None,
  infinite: bool = False,
  names: known_names.Names | None = None,
  practical: bool = False,
  later: bool = False,
  doc: str | None = None,
) -> Any:
  """A field with bounds, with the table of its known words, or one that changes a result only by rounding; `infinite`:
  it may be float("inf"); `later`: it joined Options that runs have already been made with, so its default is left out
  of fingerprints; `doc` is the help of its flag, where it is one."""
  allowed = {"least": least, "most": most, "above": above, "below": below, "infinite": infinite}
  allowed |= {"names": names, "practical": practical, "later": later, "doc": doc}
  return dataclasses.field(default=default, metadata=allowed)


def spread(kind: type[T]) -> T:
  """A field that holds another dataclass, whose fields stand in the same section of the config."""
  # dataclasses.field is typed as the value of its field; without a default it is the Field itself.
  return dataclasses.field(metadata={"spread": kind})  # pyright: ignore[reportReturnType]


class Checked:
  """Checks types and bounds when Options are made. A class with more to check calls `super().__post_init__()`."""

  def __post_init__(self) -> None:
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
      _check(field, hints[field.name], getattr(self, field.name))


def refuse(name: str, value: object, allowed: str, words: Iterable[str] = ()) -> NoReturn:
  """Raise the ConfigError of a field: its value, what is allowed, and the nearest of `words`."""
  near = difflib.get_close_matches(value, list(words), n=1, cutoff=0.4) if isinstance(value, str) else []
  raise ConfigError(f"{name} is {value!r}; it {allowed}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def _check(field: dataclasses.Field, hint: Any, value: Any) -> None:
  if dataclasses.is_dataclass(value):
    return
  name, allowed = field.name, field.metadata
  if not _is_a(value, hint):
    words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if words:
      refuse(name, value, f"may be {_listed(words)}", words)
    refuse(name, value, f"must be {_in_words(hint)}")
  if value is None:
    return
  for number in value if isinstance(value, tuple) else (value,):
    if isinstance(number, int | float):
      _check_number(name, number, value, allowed)
  if table := allowed.get("names"):
    known_names.check(table, value, name)


def _check_number(name: str, number: float, value: object, allowed: Mapping[str, Any]) -> None:
  """Refuse `value` if the number, which is it or one of its items, is outside the bounds."""
  if math.isnan(number) or (math.isinf(number) and not allowed.get("infinite")):
    refuse(name, value, "must be a finite number")
  least, most, above, below = (allowed.get(bound) for bound in ("least", "most", "above", "below"))
  if least is not None and not number >= least:
    refuse(name, value, f"must be at least {least:g}")
  if above is not None and not number > above:
    refuse(name, value, f"must be above {above:g}")
  if most is not None and not number <= most:
    refuse(name, value, f"must be at most {most:g}")
  if below is not None and not number < below:
    refuse(name, value, f"must be below {below:g}")


def _is_a(value: Any, hint: Any) -> bool:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Literal:
    return value in arguments
  if origin in (typing.Union, types.UnionType):
    return any(_is_a(value, one) for one in arguments)
  if origin is tuple:
    kinds = (arguments[0],) * len(value) if isinstance(value, tuple) and arguments[1:] == (...,) else arguments
    return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
  if hint is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return hint is Any or isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(_in_words, arguments))
  if origin is tuple:
    return f"a tuple, each item {_in_words(arguments[0])}"
  words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}
  return words.get(hint, str(getattr(hint, "__name__", hint)))


def _listed(words: Iterable[object]) -> str:
  return ", ".join(map(repr, words))


def labelled(field: str, entries: Sequence[str]) -> dict[str, str]:
  """name -> what it names: {"armo": "reward:/models/armo"} for "armo=reward:/models/armo" and "reward:/models/armo"."""
  found: dict[str, str] = {}
  for entry in entries:
    name, equals, what = entry.partition("=")
    if not equals:
      last = re.split(r"[:/]", entry.rstrip("/"))[-1]
      name, what = re.sub(r"\W", "_", last.removesuffix(".jsonl").removesuffix(".parquet").lower()), entry
    if not LABEL.fullmatch(name) or not what:
      raise ConfigError(f"{field} holds {entry!r}; write it as NAME=WHAT, NAME of a-z, 0-9 and _")
    if name in found:
      raise ConfigError(f"{field} names {name!r} twice; write NAME=WHAT with another NAME for one of them")
    found[name] = what
  return found


# From a config's section to Options, and from Options to what decides a result


def build(kind: type[T], values: "Mapping[str, Any] | ConfigDict", where: str) -> T:
  """The Options of a section; `where` is the section's name, for errors."""
  section: Mapping[str, Any] = _plain(values)
  unknown = sorted(section.keys() - set(fields_of(kind)))
  if unknown:
    near = difflib.get_close_matches(unknown[0], list(fields_of(kind)), n=1, cutoff=0.5)
    raise ConfigError(f"{where} has no field {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
  hints, given = typing.get_type_hints(kind), {}
  for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
    hint = hints[field.name]
    if part := field.metadata.get("spread"):
      own = {name: value for name, value in section.items() if name in fields_of(part)}
      given[field.name] = build(part, own, where)
    elif field.name not in section:
      if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        raise ConfigError(f"{where}.{field.name} is missing")
    elif dataclasses.is_dataclass(hint):
      if not isinstance(section[field.name], Mapping):
        raise ConfigError(f"{where}.{field.name} is a section; give it a dict, not {section[field.name]!r}")
      given[field.name] = build(hint, section[field.name], f"{where}.{field.name}")  # pyright: ignore[reportArgumentType]
    else:
      value = section[field.name]
      given[field.name] = tuple(value) if isinstance(value, list) else value
  try:
    return kind(**given)
  except (ValueError, UserError) as error:
    raise ConfigError(f"{where}.{error}") from None


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
  """The fields that a section of the config may have, by name."""
  found = {}
  for field in dataclasses.fields(kind):
    found |= fields_of(field.metadata["spread"]) if "spread" in field.metadata else {field.name: field}
  return found


def fingerprint(options: Any, without: Sequence[str] = ()) -> dict[str, Any]:
  """The values that decide a result: all but the practical ones, the defaults of later ones and those in `without`."""
  found = {}
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    if field.metadata.get("practical") or field.name in without:
      continue
    if field.metadata.get("later") and value == field.default:
      continue
    if "spread" in field.metadata:
      found |= fingerprint(value, without)
    else:
      found[field.name] = fingerprint(value) if dataclasses.is_dataclass(value) else value
  return found


# Rounds


def of_rounds(config: "ConfigDict", kind: type[T], rounds: Iterable[int]) -> dict[int, T]:
  """The Options of the whole run, under 0, and of each of the feedback rounds."""
  rounds, where = list(rounds), "config"
  overridden: Any = config.get("rounds", {})
  for key, changes in overridden.items():
    if not isinstance(_plain(changes), Mapping):
      raise ConfigError(f"config.rounds[{key}] is {changes!r}; give it a dict of sections and fields")
    if not str(key).isdigit() or int(key) not in rounds:
      span = f"the feedback rounds are {rounds[0]} .. {rounds[-1]}" if rounds else "this run has no feedback rounds"
      wrong = f"config.rounds has an entry for round {key!r}; {span}"
      try:  # the names in it are checked all the same
        _apply(type(config)(copy.deepcopy(config.to_dict())), _plain(changes), f"rounds[{key}]")
      except ConfigError as error:
        wrong = f"{wrong}. Also: {error}"
      raise ConfigError(wrong)
  found = {0: build(kind, for_round(config, 0), where)}
  for round in rounds:
    resolved = for_round(config, round)
    try:
      found[round] = build(kind, resolved, where)
    except ConfigError as error:  # the whole run's values are right: an override is not
      raise ConfigError(f"in round {round}: {error}") from None
  return found


def for_round(config: "ConfigDict", round: int) -> "ConfigDict":
  """The config with the round's overrides, without `rounds` itself."""
  resolved = type(config)(copy.deepcopy(config.to_dict()))
  overrides: Any = config.get("rounds", {})
  for key, changes in overrides.items():
    if str(key) == str(round):
      _apply(resolved, _plain(changes), f"rounds[{key}]")
  if "rounds" in resolved:
    del resolved["rounds"]
  return resolved


def nearest(config: "ConfigDict", path: str) -> str:
  """What to say about a dotted path that the config does not have."""
  known = list(leaves(config.to_dict()))
  sections = sorted({name.rpartition(".")[0] for name in known} - {""})
  last = [n for n in known if n.rpartition(".")[2] == path.rpartition(".")[2]]  # right leaf, wrong section
  near = difflib.get_close_matches(path, known + sections, n=3, cutoff=0.5) or last[:1]
  near.sort(key=lambda name: sorted(name) != sorted(path))  # letters in another order come before other letters
  return f"config has no field {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
  """The dotted names of all values."""
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def _apply(config: "ConfigDict", changes: Mapping[str, Any], where: str, prefix: str = "") -> None:
  for key, value in changes.items():
    node: Any = config
    for part in filter(None, prefix.split(".")):
      node = node[part]
    if key not in node:
      raise ConfigError(f"config.{where}: {nearest(config, f'{prefix}{key}')}")
    if isinstance(value, dict):
      if not isinstance(node[key], type(config)):
        raise ConfigError(f"config.{where}: {prefix}{key} is a value, not a section")
      _apply(config, value, where, f"{prefix}{key}.")
    elif isinstance(node[key], type(config)):
      raise ConfigError(f"config.{where}: {prefix}{key} is a section; give it a dict, not {value!r}")
    else:
      try:
        node[key] = value
      except TypeError:
        raise ConfigError(
          f"config.{where}: {prefix}{key} is of type {type(node[key]).__name__}, {value!r} is not"
        ) from None


def _plain(x: Any) -> Any:
  """A section of a config as a dict; anything else as it is."""
  return x.to_dict() if hasattr(x, "to_dict") else x
