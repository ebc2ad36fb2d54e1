"""The pictures of `benchmarks.effects`, from the committed results alone: docs/effects_*.svg."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alma_jax.report import charts, leaflet
from alma_jax.report.charts import ChartBar, Line, Point
from alma_jax.report.leaflet import Block
from alma_jax.store import statistics
from benchmarks.effects_tables import Found, load

ARMS = {"default": "diverse prompts", "random_prompts": "random prompts"}


def save(results: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
  """Draws what there are results for."""
  found = load(results)
  drawn = {"rounds": rounds(found), "coverage": coverage(found), "samples": samples(found), "judges": judges(found)}
  written = []
  for name, block in drawn.items():
    if block is not None:
      path = folder / f"effects_{name}.svg"
      leaflet.save(path, block.title, [block])
      written.append(path)
  return written


def rounds(found: Found) -> Block | None:
  """Figure 2, and Table 4 over the rounds."""
  lines = _lines(found, _progress)
  title = "Ground truth by round, mean over seeds"
  return Block(title, [charts.lines(lines, "round", "ground truth, 0 to 10")]) if lines else None


def coverage(found: Found) -> Block | None:
  """The mechanism of Table 4."""
  lines = _lines(found, _facts)
  title = "Facts that the prompts of the rounds so far ask for, of 192"
  return Block(title, [charts.lines(lines, "round", "facts", low=0.0)]) if lines else None


def samples(found: Found) -> Block | None:
  """Figure 3."""
  told = [arms["judges"] for arms in found.values() if "judges" in arms]
  if not told:
    return None
  ways = [name for name in told[0] if name.startswith("best_of_n")]
  lines = []
  for colour, how in enumerate(ways):
    points = [_point(int(n), [t[how]["distilled"][n][0] for t in told]) for n in told[0][how]["distilled"]]
    lines.append(Line(how.partition(", ")[2].replace("_", "-"), points, colour))
  chart = charts.lines(lines, "samples to a prompt, N", "ground truth of the choice", log=True)
  return Block("The judge's choice among N samples", [chart])


def judges(found: Found) -> Block | None:
  """Table 3."""
  told = [arms["judges"]["judges"] for arms in found.values() if "judges" in arms]
  if not told:
    return None
  bars = []
  for name in told[0]:
    mean = statistics.student([t[name]["half"] for t in told])
    assert mean is not None
    bars.append(ChartBar(name, mean.value, f"{mean.value:.3f}" + (f" ± {mean.ci95:.3f}" if mean.ci95 else "")))
  return Block("Pairs of answers in the right order; a tie counts half", [charts.bars(bars)])


def _lines(found: Found, values: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> list[Line]:
  """A line over the rounds for each arm, of the seeds that have both."""
  both = [arms for arms in found.values() if set(ARMS) <= arms.keys()]
  if not both:
    return []
  lines: list[Line] = []
  for colour, (arm, name) in enumerate(ARMS.items()):
    told = [values(arms[arm]) for arms in both]
    lines.append(Line(name, [_point(int(r), [t[r] for t in told]) for r in told[0]], colour))
  return lines


def _progress(arm: Mapping[str, Any]) -> Mapping[str, float]:
  return arm["progress"]


def _facts(arm: Mapping[str, Any]) -> Mapping[str, float]:
  return {r: drawn["facts"] for r, drawn in arm["drawn"].items()}


def _point(x: int, values: Sequence[float]) -> Point:
  mean = statistics.student(values)
  assert mean is not None
  return Point(x, mean.value, mean.ci95)
