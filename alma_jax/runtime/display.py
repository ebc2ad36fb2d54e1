"""What a person sees while a run works: progress bars with rate and time left, and lines above them.

In a terminal a bar is redrawn twice a second. Where stderr is a file or a pipe, it is a line of text instead: one after
30 seconds, then one whenever a tenth of the time so far has passed (at least every ten minutes), and one at the end.
TQDM_DISABLE=1 leaves the bars out.
"""

import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm

from alma_jax.store import layout

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


class Whole:
  """A Watcher of a run: one line above the bars with its stages and the time left.

    run: 12 of 45 stages, 0:41:10 so far, about 1:52:00 left

  A stage's time is its size times the seconds per size of the last one of its kind; `planned` holds the sizes. Kinds
  that no stage has measured yet are counted apart. In a log file the line comes at most every 30 seconds.
  """

  def __init__(
    self, planned: Mapping[str, float], display: Display, clock: Callable[[], float] = time.monotonic
  ) -> None:
    self.sizes, self.display, self.clock = dict(planned), display, clock
    self.seconds: dict[str, float] = {}  # of the stages that are finished, earlier starts included
    self.rates: dict[str, float] = {}  # of a kind: seconds per size
    self.running: dict[str, float] = {}  # when each began
    self.said: float | None = None
    off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false") or not display.speaks
    self.off, self.top = off, None
    if not off and sys.stderr.isatty():  # the first bar keeps the place above all later ones
      self.top = tqdm.tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True)

  def there(self, name: str, manifest: Mapping[str, Any]) -> None:
    self._count(name, manifest)

  def begun(self, name: str) -> None:
    self.sizes.setdefault(name, 1.0)
    self.running.setdefault(name, self.clock())
    self._show()

  def finished(self, name: str, manifest: Mapping[str, Any]) -> None:
    self.running.pop(name, None)
    self._count(name, manifest)
    self._show()

  def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
    if self.top is not None:
      self._show()

  def evaluated(self, row: Mapping[str, Any]) -> None:
    pass

  def close(self) -> None:
    if self.top is not None:
      self.top.close()

  def text(self) -> str:
    """The line."""
    left, unknown = 0.0, 0
    for name, size in self.sizes.items():
      rate = self.rates.get(layout.kind_of(name))
      if name in self.seconds:
        continue
      if rate is None:
        unknown += 1
      else:
        spent = self.clock() - self.running[name] if name in self.running else 0.0
        left += max(0.0, size * rate - spent)
    head = f"run: {len(self.seconds)} of {len(self.sizes)} stages, {_clock(sum(self.seconds.values()))} so far"
    if len(self.seconds) == len(self.sizes):
      return head
    also = f"{unknown} stage{'s' * (unknown != 1)} whose kind is not measured yet"
    if not self.rates or unknown == len(self.sizes) - len(self.seconds):
      return f"{head}, {also} left"
    return f"{head}, about {_clock(left)} left" + (f" and {also}" if unknown else "")

  def _count(self, name: str, manifest: Mapping[str, Any]) -> None:
    size = self.sizes.setdefault(name, 1.0)
    self.seconds[name] = float(manifest.get("seconds", 0.0))
    self.rates[layout.kind_of(name)] = self.seconds[name] / max(size, 1e-9)

  def _show(self) -> None:
    if self.off:
      return
    if self.top is not None:
      self.top.set_description_str(self.text())
      return
    now = self.clock()
    if self.seconds and (self.said is None or now - self.said >= SOON):
      self.said = now
      self.display.say(self.text())


def _clock(seconds: float) -> str:
  """1:23:45"""
  return str(datetime.timedelta(seconds=round(seconds)))


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
