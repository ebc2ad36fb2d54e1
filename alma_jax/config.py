"""A run's config: checks at the start, and the config of a round.

`rounds` holds overrides, {3: {"responses": {"temperature": 0.9}}}; `for_round(config, 3)` is the config with them
applied. A name that does not exist is an error that gives the nearest one, wherever it was written.
"""

import copy
import difflib

from ml_collections import ConfigDict


class ConfigError(Exception):
  """A config that cannot be meant; the message names the field."""


def for_round(config, round):
  """The config with the round's overrides, without `rounds` itself."""
  resolved = ConfigDict(copy.deepcopy(config.to_dict()))
  for key, changes in config.rounds.items():
    if int(key) == round:
      _apply(resolved, _plain(changes), f"rounds[{key}]")
  del resolved["rounds"]
  return resolved


def check(config, last_round):
  """Every override must name an existing field of a round that is run."""
  for key in config.rounds:
    if not str(key).isdigit() or not 2 <= int(key) <= last_round:
      raise ConfigError(f"config.rounds has an entry for round {key!r}; the feedback rounds are 2 .. {last_round}")
    for_round(config, int(key))


def nearest(config, path):
  """What to say about a dotted path that does not exist in the config."""
  names = list(leaves(config.to_dict()))
  sections = sorted({name.rpartition(".")[0] for name in names} - {""})
  last = [n for n in names if n.rpartition(".")[2] == path.rpartition(".")[2]]  # right leaf, wrong section
  near = difflib.get_close_matches(path, names + sections, n=1, cutoff=0.5) or last[:1]
  return f"config has no field {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def leaves(tree, prefix=""):
  """The dotted names of all values."""
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def _apply(config, changes, where, prefix=""):
  for key, value in changes.items():
    node = config
    for part in filter(None, prefix.split(".")):
      node = node[part]
    if key not in node:
      raise ConfigError(f"config.{where}: {nearest(config, f'{prefix}{key}')}")
    if isinstance(value, dict):
      if not isinstance(node[key], ConfigDict):
        raise ConfigError(f"config.{where}: {prefix}{key} is a value, not a section")
      _apply(config, value, where, f"{prefix}{key}.")
    elif isinstance(node[key], ConfigDict):
      raise ConfigError(f"config.{where}: {prefix}{key} is a section; give it a dict, not {value!r}")
    else:
      try:
        node[key] = value
      except TypeError:
        raise ConfigError(
          f"config.{where}: {prefix}{key} is a {type(node[key]).__name__}, {value!r} is a {type(value).__name__}"
        ) from None


def _plain(x):
  return x.to_dict() if isinstance(x, ConfigDict) else x
