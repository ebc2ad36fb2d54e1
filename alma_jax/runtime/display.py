"""What a person sees while a run works: progress bars with rate and time left, and lines above them.

In a terminal a bar is redrawn twice a second. Where stderr is a file or a pipe, it is a line of text instead: one after
30 seconds, then one whenever a tenth of the time so far has passed (at least every ten minutes), and one at the end.
TQDM_DISABLE=1 leaves the bars out.
"""

import dataclasses
import os
import sys
from typing import Any

import tqdm

SOON, LATE = 30.0, 600.0  # seconds between two lines of a bar, at first and at most
LINE = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


@dataclasses.dataclass(frozen=True)
class Display:
  """Bars and lines on stderr; silent on all processes but the first."""

  speaks: bool = True

  def bar(self, description: str, total: int, unit: str, done: int = 0) -> "Bar":
    """A progress bar; `done` of the total was there before."""
    off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    kind, how = (Bar, {"mininterval": 0.5, "dynamic_ncols": True}) if sys.stderr.isatty() else (Lines, {})
    return kind(
      total=total,
      initial=done,
      desc=f"{description:<28}",
      unit=f" {unit}",
      disable=off or not self.speaks,
      smoothing=0.1,
      **how,
    )

  def say(self, text: str) -> None:
    """Print a line above the progress bars."""
    if self.speaks:
      tqdm.tqdm.write(text, file=sys.stderr)


class Bar(tqdm.tqdm):
  """A bar that also shows tokens per second."""

  tokens = 0

  def advance(self, items: int, tokens: int) -> None:
    self.tokens += tokens
    self.update(items)
    self.set_postfix_str(f"{self.tokens / max(self.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)


class Lines(Bar):
  """A bar for a log file: a line of text now and then, and one at the end."""

  def __init__(self, **how: Any) -> None:
    # A delay keeps tqdm from showing the bar at its start.
    super().__init__(file=_Whole(), mininterval=SOON, miniters=1, delay=SOON, bar_format=LINE, **how)

  def display(self, *what: Any, **where: Any) -> bool | None:
    self.mininterval = min(LATE, max(SOON, self.format_dict["elapsed"] / 10))
    return super().display(*what, **where)

  def close(self) -> None:
    if not self.disable and self.last_print_t < self.start_t + self.delay:
      self.refresh()  # tqdm leaves out a bar that was never shown
    super().close()


class _Whole:
  """stderr without tqdm's carriage returns: what it writes becomes whole lines."""

  def write(self, text: str) -> None:
    if line := text.strip():
      sys.stderr.write(line + "\n")

  def flush(self) -> None:
    sys.stderr.flush()
