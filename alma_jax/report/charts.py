"""Small SVG charts as markup, without a script; the page's style sheet gives the colours (light and dark).

  bars([Bar("drawn", 1536, "1,536 (100.0%)"), Bar("in the pool", 1081, "1,081 (70.4%)")])

A chart is a pure function from numbers to `<svg>`. Colours are the classes s0 .. s6; each mark shows its value in full
under the mouse (<title>).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape


class Point(NamedTuple):
  x: int
  y: float
  ci95: float | None  # half width of the interval


@dataclasses.dataclass(frozen=True)
class Line:
  name: str
  points: list[Point]
  colour: int
  level: Point | None = None  # a dashed horizontal line, with a band as wide as the interval
  level_name: str = ""


class Shares(NamedTuple):
  label: str
  counts: Mapping[str, int]
  remark: str


class ChartBar(NamedTuple):
  label: str
  value: float
  remark: str


class Figure(NamedTuple):
  chart: Markup
  caption: str


class _Label(NamedTuple):
  y: float
  said: str
  colour: int
  kind: str


def lines(drawn: Sequence[Line], x_label: str, y_label: str, low: float | None = None, log: bool = False) -> Markup:
  """Points with intervals over whole numbers (rounds), each line named at its right end. `log`: a logarithmic x axis,
  from 1 on; of more than 12 points those at 1, 2, 5, 10, 20, .. alone are marked."""
  drawn = [line for line in drawn if line.points or line.level]
  edges = [y + sign * (ci or 0) for line in drawn for _, y, ci in line.points for sign in (-1, 1)]
  levels = [line.level for line in drawn if line.level]
  edges += [y + sign * (ci or 0) for _, y, ci in levels for sign in (-1, 1)] + ([] if low is None else [low])
  ys, xs = ticks(min(edges), max(edges)), sorted({x for line in drawn for x, _, _ in line.points})
  width, height, left, right, top, bottom = 780, 310, 46, 190, 26, 40
  step = (width - left - right) / max(1, xs[-1] - xs[0])

  def x_at(x: float) -> float:
    if log:
      return left + 12 + math.log(x / xs[0]) / max(1e-9, math.log(xs[-1] / xs[0])) * (width - left - right - 24)
    return left + 12 + (x - xs[0]) * (step - 24 / max(1, xs[-1] - xs[0]))

  def y_at(y: float) -> float:
    return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - top)

  out = [_text(left - 34, 14, y_label, "quiet")]
  for y in ys:
    out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
    out.append(_text(left - 8, y_at(y) + 4, tick(y, ys), "quiet end"))
  many = log and len(xs) > 12
  marked = [x for x in xs if (f"{x}"[0] in "125" and not int(f"{x}"[1:] or 0)) or x == xs[-1]] if many else xs
  for x in marked[:: -(-len(marked) // 20)]:
    out.append(_text(x_at(x), height - bottom + 18, f"{x}", "quiet mid"))
  out.append(_text((left + width - right) / 2, height - 6, x_label, "quiet mid"))
  labels = []
  for line in drawn:
    out.append(f'<g class="s{line.colour}">')
    if line.level:
      y, half = y_at(line.level.y), line.level.ci95
      if half:
        upper, lower = y_at(line.level.y + half), y_at(line.level.y - half)
        place = f'x="{left}" width="{width - right - left}" y="{upper:.1f}" height="{lower - upper:.1f}"'
        out.append(f'<rect class="band" {place}/>')
      out.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
      labels.append(_Label(y, line.level_name, line.colour, "quiet"))
    if not line.points:
      out.append("</g>")
      continue
    path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _ in line.points)
    out.append(f'<polyline class="line" points="{path}"/>')
    for x, y, ci in line.points:
      if x not in marked:
        continue
      said = f"{line.name}, {x_label} {x}: {y:.2f}" + (f" ± {ci:.2f}" if ci else "")
      out.append(f"<g><title>{escape(said)}</title>")
      if ci:
        out.append(f'<path class="whisker" d="M{x_at(x):.1f} {y_at(y - ci):.1f}V{y_at(y + ci):.1f}"/>')
      out.append(f'<circle class="dot" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/></g>')
    out.append("</g>")
    labels.append(_Label(y_at(line.points[-1].y), line.name, line.colour, "name"))
  for y, name, colour, kind in _apart(labels, 15):
    out.append(f'<g class="s{colour}">{_text(width - right + 8, y + 4, name, kind)}</g>')
  return _svg(width, height, f"{y_label} over {x_label}", out)


def histogram(names: Sequence[str], sampled: Sequence[int], selected: Sequence[int], top: float) -> Markup:
  """Two distributions over the same marks as shares; `top` is the upper end of the axis."""
  width, height, left, bottom = 230, 120, 30, 18
  room, slot = height - bottom - 8, (width - left - 4) / len(names)
  out = [_text(left - 5, 14, f"{top:.0%}", "quiet end"), _text(left - 5, height - bottom, "0", "quiet end")]
  totals = [max(1, sum(counts)) for counts in (sampled, selected)]
  every = 2 if max(map(len, names)) < 4 else 5  # longer names need more room
  for i, name in enumerate(names):
    x = left + i * slot
    for kind, counts, total, at, of in (
      ("fill s6", sampled, totals[0], 0.08, "of all responses"),
      ("fill s0", selected, totals[1], 0.5, "of the selected"),
    ):
      if counts[i]:
        tall = counts[i] / total / top * room
        said = escape(f"score {name}: {counts[i] / total:.1%} {of} ({counts[i]} of {total})")
        place = f'x="{x + at * slot:.1f}" y="{height - bottom - tall:.1f}" width="{0.42 * slot:.1f}"'
        out.append(f'<rect class="{kind}" {place} height="{tall:.1f}"><title>{said}</title></rect>')
    if i % every == 0:
      out.append(_text(x + slot / 2, height - 4, name, "quiet mid"))
  out.append(_axis(left, width - 4, height - bottom))
  return _svg(width, height, "distribution of scores", out)


def stacked(rows: Sequence[Shares], names: Sequence[str]) -> Markup:
  """Horizontal bars of shares."""
  width, left, right, line = 780, 80, 90, 26
  height, out = line * len(rows) + 26, []
  x = left
  for i, name in enumerate(names):
    out.append(f'<rect class="fill s{i % 6}" x="{x}" y="4" width="11" height="11" rx="2"/>')
    out.append(_text(x + 16, 14, name, "quiet"))
    x += 16 + 7.2 * len(name) + 22
  for i, (label, counts, remark) in enumerate(rows):
    y, at, total = 26 + i * line, left, max(1, sum(counts.values()))
    out.append(_text(left - 8, y + 14, label, "quiet end"))
    for j, name in enumerate(names):
      share = counts.get(name, 0) / total
      wide = share * (width - left - right)
      if wide > 0:
        said = escape(f"{label}, {name}: {counts[name]} of {total} ({share:.0%})")
        out.append(f'<rect class="fill s{j % 6}" x="{at:.1f}" y="{y}" width="{max(0.5, wide - 1.5):.1f}" height="19">')
        out.append(f"<title>{said}</title></rect>")
      if wide > 40:
        out.append(_text(at + wide / 2, y + 14, f"{share:.0%}", "inside mid"))
      at += wide
    out.append(_text(width - right + 6, y + 14, remark, "quiet"))
  return _svg(width, height, "shares", out)


def bars(rows: Sequence[ChartBar], colour: int = 0) -> Markup:
  """Horizontal bars."""
  width, left, right, line = 780, 210, 210, 22
  most, out = max((value for _, value, _ in rows), default=0) or 1, []
  for i, (label, value, remark) in enumerate(rows):
    y, wide = i * line + 2, value / most * (width - left - right)
    out.append(_text(left - 8, y + 13, label, "quiet end"))
    out.append(f'<rect class="fill s{colour}" x="{left}" y="{y}" width="{max(1, wide):.1f}" height="16" rx="1"/>')
    out.append(_text(left + max(1, wide) + 7, y + 13, remark, "quiet"))
  return _svg(width, line * len(rows) + 4, "bars", out)


def curve(
  xs: Sequence[float], ys: Sequence[float], top: float, colour: int = 0, label: str = "loss per step"
) -> Markup:
  """A small line from zero to `top`, without names."""
  width, height, left, bottom = 230, 110, 34, 18

  def x_at(x: float) -> float:
    return left + 3 + (x - xs[0]) / max(1e-9, xs[-1] - xs[0]) * (width - left - 9)

  def y_at(y: float) -> float:
    return height - bottom - min(1.0, y / top) * (height - bottom - 8)

  path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y))
  out = [_text(left - 5, 14, f"{top:.2g}", "quiet end"), _text(left - 5, height - bottom, "0", "quiet end")]
  out += [_axis(left, width - 4, height - bottom), _text(x_at(xs[0]), height - 4, f"{xs[0]:.0f}", "quiet")]
  out += [_text(width - 6, height - 4, f"{xs[-1]:.0f}", "quiet end")]
  out.append(f'<g class="s{colour}"><polyline class="line" points="{path}"/></g>')
  return _svg(width, height, label, out)


def ticks(low: float, high: float) -> list[float]:
  """About seven round numbers that enclose low .. high."""
  if high - low < 1e-9:
    low, high = low - 0.5, high + 0.5
  raw = (high - low) / 7
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw - 1e-12)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def tick(value: float, all_ticks: Sequence[float]) -> str:
  step = all_ticks[1] - all_ticks[0]
  return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9)) + (f'{step:e}'.startswith('2.5'))}f}"


def _apart(labels: Sequence[_Label], least: float) -> list[_Label]:
  """The labels from the top, moved down or up until no label covers another."""
  labels = sorted(labels)
  ys = [y for y, *_ in labels]
  for _ in range(40):
    for i in range(len(ys) - 1):
      if (short := least - (ys[i + 1] - ys[i])) > 0:
        ys[i], ys[i + 1] = ys[i] - short / 2, ys[i + 1] + short / 2
  return [label._replace(y=y) for y, label in zip(ys, labels, strict=True)]


def _axis(x1: float, x2: float, y: float) -> str:
  return f'<line class="axis" x1="{x1}" x2="{x2}" y1="{y + 0.5}" y2="{y + 0.5}"/>'


def _text(x: float, y: float, said: str, kind: str) -> str:
  return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(said)}</text>'


def _svg(width: int, height: int, label: str, pieces: Sequence[str]) -> Markup:
  box = f'viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(label)}"'
  return Markup(f"<svg {box}>{''.join(pieces)}</svg>")
