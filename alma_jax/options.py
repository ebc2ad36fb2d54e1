"""A run's config: checks at the start, and the config of a round.

`rounds` holds overrides, {3: {"responses": {"temperature": 0.9}}}; `for_round(config, 3)` is the config with them
applied. A name that does not exist is an error that gives the nearest one, wherever it was written.
"""

import copy
import difflib

from ml_collections import ConfigDict

from alma_jax.errors import UserError


class ConfigError(UserError):
  """A config that cannot be meant; the message names the field."""


def for_round(config, round):
  """The config with the round's overrides, without `rounds` itself."""
  resolved = ConfigDict(copy.deepcopy(config.to_dict()))
  for key, changes in config.rounds.items():
    if str(key) == str(round):
      _apply(resolved, _plain(changes), f"rounds[{key}]")
  del resolved["rounds"]
  return resolved


# Values that are words: what each may be.
WORDS = {
  "model.chat": ("llama3", "llama2", "plain", "mini"),
  "model.dtype": ("auto", "float32", "bfloat16"),
  "model.save_dtype": ("float32", "bfloat16", "float16"),
  "draw.method": ("diverse", "random", "proportional"),
  "draw.coverage": ("round", "fresh"),
  "embeddings.pooling": ("mean", "last"),
  "clusters.method": ("flat", "two_level"),
  "judge.kind": ("finetuned", "few_shot"),
  "judge.mode": ("expected", "integer"),
  "judge.template": ("a1", "a2", "mini"),
  "judge.distil.target": ("two_hot", "rounded"),
  "trainset.method": ("best_of_n", "dpo", "random", "grpo"),
  "policy.history": ("all", "latest"),
  "dpo.history": ("all", "latest"),
  "dpo.loss": ("dpo", "cdpo", "rdpo", "ipo", "ipo_sum", "dpo_norm", "simpo", "hinge", "kto"),
  "eval.evaluator": ("mini", "none"),
}


def check(config, last_round):
  """Words must be known ones, and every override must name an existing field of a round that is run."""
  _check_words(for_round(config, 0), "config")
  for key in config.rounds:
    if not str(key).isdigit() or not 2 <= int(key) <= last_round:
      raise ConfigError(f"config.rounds has an entry for round {key!r}; the feedback rounds are 2 .. {last_round}")
    _check_words(for_round(config, int(key)), f"config in round {key}")


def _check_words(config, where):
  values = dict(_items(config.to_dict()))
  for name, words in WORDS.items():
    if name in values and values[name] not in words:
      raise ConfigError(f"{where}: {name} is {values[name]!r}; it may be {', '.join(map(repr, words))}")
  models = ("sft", "latest", *(f"sft_{i + 1}" for i in range(len(values.get("sft_seeds", ())))))
  chosen = values.get("responses.checkpoints", ("sft",))
  if isinstance(chosen, str) or not chosen or not set(chosen) <= set(models):
    raise ConfigError(
      f"{where}: responses.checkpoints is {chosen!r}; give a tuple of {', '.join(map(repr, models))},"
      " on the command line as \"('sft','latest')\""
    )
  own = (values.get("grpo.init_from"),)
  if values.get("trainset.method") == "grpo" and tuple(chosen) != own:
    raise ConfigError(
      f"{where}: trainset.method is 'grpo', which learns from a model's own responses: set responses.checkpoints to"
      f" {own!r}, as grpo.init_from is"
    )
  starts = ("base", *models[1:])
  for name in ("policy.init_from", "dpo.init_from", "grpo.init_from", "dpo.ref_from", "grpo.ref_from"):
    words = ("init", *starts) if name == "dpo.ref_from" else starts
    if name in values and values[name] not in words:
      raise ConfigError(f"{where}: {name} is {values[name]!r}; it may be {', '.join(map(repr, words))}")


def nearest(config, path):
  """What to say about a dotted path that does not exist in the config."""
  names = list(leaves(config.to_dict()))
  sections = sorted({name.rpartition(".")[0] for name in names} - {""})
  last = [n for n in names if n.rpartition(".")[2] == path.rpartition(".")[2]]  # right leaf, wrong section
  near = difflib.get_close_matches(path, names + sections, n=3, cutoff=0.5) or last[:1]
  near.sort(key=lambda name: sorted(name) != sorted(path))  # letters in another order come before other letters
  return f"config has no field {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def leaves(tree):
  """The dotted names of all values."""
  return (name for name, _ in _items(tree))


def _items(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      yield from _items(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


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
          f"config.{where}: {prefix}{key} is of type {type(node[key]).__name__}, {value!r} is not"
        ) from None


def _plain(x):
  return x.to_dict() if isinstance(x, ConfigDict) else x
