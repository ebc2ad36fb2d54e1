"""Fingerprints: what decides the result of a stage, as one flat dict, and how two of them differ.

  fingerprint_of({"config": {"top_p": 0.9}}, {"prompts": x})   {"config.top_p": 0.9, "format": 3, "input.prompts": x}
  differences(old, new)                                        {"config.top_p": "0.9 -> 0.8"}

They are compared as JSON, so a tuple equals a list.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from alma_jax.store.records import FORMAT

_SHOWN = 60  # characters of a changed value in a message


def fingerprint_of(fields: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
  """The flat fields, the record format and the contents of the inputs by name."""
  flat = {**_flat(fields), "format": FORMAT, **{f"input.{name}": content for name, content in contents.items()}}
  return json.loads(json.dumps(flat, sort_keys=True))  # as it will be read back: lists for tuples


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """The names whose values differ, each with "old -> new"."""
  pairs = {name: (_shown(old, name), _shown(new, name)) for name in sorted(old.keys() | new.keys())}
  return {name: _change(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(value, Mapping) or (prefix and not value):
    return {prefix: value}
  dot = prefix and prefix + "."
  return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{dot}{key}").items()}


def _shown(fingerprint: Mapping[str, Any], name: str) -> str:
  if name not in fingerprint:
    return "(not set)"
  return json.dumps(fingerprint[name], ensure_ascii=False, sort_keys=True)


def _change(old: str, new: str) -> str:
  """Both values; of long ones what surrounds the first character that differs."""
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
  first = sum(1 for _ in same)

  def window(text: str) -> str:
    start = max(0, min(first, len(text)) - _SHOWN // 3) if len(text) > _SHOWN else 0
    end = start + _SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")

  return f"{window(old)} -> {window(new)}"
