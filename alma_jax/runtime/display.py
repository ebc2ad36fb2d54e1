"""What a person sees while a run works: progress bars with rate and time left, and lines above them."""

import dataclasses
import sys

import tqdm


@dataclasses.dataclass(frozen=True)
class Display:
  """Bars and lines on stderr; silent on all processes but the first."""

  speaks: bool = True

  def bar(self, description: str, total: int, unit: str, done: int = 0) -> "Bar":
    """A progress bar; `done` of the total was there before."""
    return Bar(
      total=total,
      initial=done,
      desc=f"{description:<28}",
      unit=f" {unit}",
      disable=not self.speaks,
      file=sys.stderr,
      mininterval=0.5,
      dynamic_ncols=True,
      smoothing=0.1,
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
