"""Numbers, names and tables as the page and the terminal show them.

mean(Mean(2.586, 0.21, 24), sign=True)   "+2.59 ± 0.21"
counts({"near_duplicate": 3})            "near duplicate 3"
duration(5400)                           "90 min"
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax.store.statistics import Mean

STEPS = {"alma": "round", "lima": "epoch", "isara": "round", "spa": "round"}  # what a recipe calls its rounds
FIRST = {  # what a recipe's round 1 is
  "alma": "Round 1 is the initial SFT.",
  "isara": "Round 1 is SFT on the human pairs alone.",
  "spa": "Round 1 is DPO on people's pairs.",
}
SHOWN = 1500  # characters of a text in an example
# HTML allows no control characters but tab and newline. Those of ASCII have pictures in Unicode; lone surrogates, which
# no file can hold, and the other controls do not.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
_PICTURES |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)} | {code: "\ufffd" for code in range(0xD800, 0xE000)}


@dataclasses.dataclass(frozen=True)
class Table:
  head: list[str]
  rows: list[list[str]]
  text: int = 1  # the first columns, which hold text; the others hold numbers


def in_lines(table: Table) -> list[str]:
  """The table as text for a terminal."""
  wide = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
  lines = []
  for row in (table.head, *table.rows):
    cells = [f"{x:<{w}}" if i < table.text else f"{x:>{w}}" for i, (x, w) in enumerate(zip(row, wide, strict=True))]
    lines.append(f"  {'  '.join(cells)}".rstrip())
  return lines


class Alarm(str):
  """A cell that the page marks."""

  alarm = True


def mean(m: Mean | None, sign: bool = False, digits: int = 2, n: bool = False) -> str:
  """A mean with its interval and, if `n`, what it is over; "" for None."""
  if m is None:
    return ""
  text = signed(m.value, digits) if sign else number(m.value, digits)
  text += "" if m.ci95 is None else f" ± {m.ci95:.{digits}f}"
  return text + (f" (n = {m.n:,})" if n else "")


def number(value: float, digits: int = 2) -> str:
  return signed(value, digits).removeprefix("+")


def signed(value: float, digits: int = 2) -> str:
  return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def measured(row: Mapping[str, Any], name: str) -> str:
  """A value of progress.csv with its interval."""
  if name not in row:
    return ""
  return f"{row[name]:.2f}" + (f" ± {row[f'{name}_ci95']:.2f}" if f"{name}_ci95" in row else "")


def share(x: float) -> str:
  return f"{x:.1%}"


def thousands(n: int) -> str:
  return f"{n:,}"


def counts(found: Mapping[str, float]) -> str:
  """The counts of a manifest in one line."""
  return ", ".join(f"{words(k)} {v:,.2f}" if isinstance(v, float) else f"{words(k)} {v:,}" for k, v in found.items())


def step(config: Mapping[str, Any]) -> str:
  """What the recipe of this config calls a round."""
  return STEPS.get(str(config.get("recipe")), "round")


def base(config: Mapping[str, Any]) -> str:
  """What the model of round 0 is."""
  return "SFT model" if config.get("recipe") == "spa" else "base model"


def words(name: str) -> str:
  return name.replace("_", " ")


def plural(n: int, word: str) -> str:
  return f"{n:,} {word}{'s' * (n != 1)}"


def span(values: Sequence[int]) -> str:
  """Sorted values as one number or "first to last"."""
  return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.1f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def asked(messages: Sequence[Mapping[str, str]]) -> str:
  """A conversation up to the turn that is answered."""
  return "\n\n".join(t["content"] if t["role"] == "user" else f"[{t['role']}] {t['content']}" for t in messages)


def visible(page: str) -> str:
  """The page with every character that HTML forbids replaced by one that shows it."""
  return page.translate(_PICTURES)


def cut(text: str) -> str:
  return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text) - SHOWN:,} more characters)"
