"""Small SVG charts as text: no dependency, no script, colours by the page's style sheet (light and dark).

A chart is a pure function from numbers to `<svg>`. Colours are the classes s0 .. s6; whatever carries a value shows it
in full under the mouse (<title>).
"""

import dataclasses
import html
import math


@dataclasses.dataclass(frozen=True)
class Line:
  name: str
  points: list  # (x, y, half width of the interval or None)
  colour: int
  level: float | None = None  # a dashed horizontal line
  level_name: str = ""


def lines(drawn, x_label, y_label, low=None, high=None):
  """Points with intervals over whole numbers (rounds), each line named at its right end."""
  drawn = [line for line in drawn if line.points]
  edges = [y + sign * (ci or 0) for line in drawn for _, y, ci in line.points for sign in (-1, 1)]
  edges += [line.level for line in drawn if line.level is not None] + [v for v in (low, high) if v is not None]
  ys, xs = ticks(min(edges), max(edges)), sorted({x for line in drawn for x, _, _ in line.points})
  width, height, left, right, top, bottom = 780, 310, 46, 190, 26, 40
  step = (width - left - right) / max(1, xs[-1] - xs[0])
  x_at = lambda x: left + 12 + (x - xs[0]) * (step - 24 / max(1, xs[-1] - xs[0]))
  y_at = lambda y: height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - top)
  out = [_text(left - 34, 14, y_label, "quiet")]
  for y in ys:
    out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
    out.append(_text(left - 8, y_at(y) + 4, tick(y, ys), "quiet end"))
  for x in xs[:: -(-len(xs) // 20)]:
    out.append(_text(x_at(x), height - bottom + 18, f"{x}", "quiet mid"))
  out.append(_text((left + width - right) / 2, height - 6, x_label, "quiet mid"))
  labels = []
  for line in drawn:
    out.append(f'<g class="s{line.colour}">')
    if line.level is not None:
      y = y_at(line.level)
      out.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
      labels.append((y, line.level_name, line.colour, "quiet"))
    path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _ in line.points)
    out.append(f'<polyline class="line" points="{path}"/>')
    for x, y, ci in line.points:
      said = f"{line.name}, {x_label} {x}: {y:.2f}" + (f" ± {ci:.2f}" if ci else "")
      out.append(f"<g><title>{html.escape(said)}</title>")
      if ci:
        out.append(f'<path class="whisker" d="M{x_at(x):.1f} {y_at(y - ci):.1f}V{y_at(y + ci):.1f}"/>')
      out.append(f'<circle class="dot" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/></g>')
    out.append("</g>")
    labels.append((y_at(line.points[-1][1]), line.name, line.colour, "name"))
  for y, name, colour, kind in _apart(labels, 15):
    out.append(f'<g class="s{colour}">{_text(width - right + 8, y + 4, name, kind)}</g>')
  return _svg(width, height, f"{y_label} over {x_label}", out)


def histogram(sampled, selected, top):
  """Two distributions over the scores 0 .. 10 as shares; `top` is the upper end of the axis."""
  width, height, left, bottom = 230, 120, 30, 18
  room, slot = height - bottom - 8, (width - left - 4) / 11
  bar = lambda x, w, share, kind, said: (
    f'<rect class="{kind}" x="{x:.1f}" y="{height - bottom - share / top * room:.1f}" width="{w:.1f}"'
    f' height="{share / top * room:.1f}"><title>{html.escape(said)}</title></rect>'
  )
  out = [_text(left - 5, 14, f"{top:.0%}", "quiet end"), _text(left - 5, height - bottom, "0", "quiet end")]
  sums = [max(1, sum(counts)) for counts in (sampled, selected)]
  for score in range(11):
    x = left + score * slot
    for kind, counts, total, at, said in (
      ("fill s6", sampled, sums[0], 0.08, "of all responses"),
      ("fill s0", selected, sums[1], 0.5, "of the selected"),
    ):
      if counts[score]:
        share = counts[score] / total
        said = f"score {score}: {share:.1%} {said} ({counts[score]} of {total})"
        out.append(bar(x + at * slot, 0.42 * slot, share, kind, said))
    if score % 2 == 0:
      out.append(_text(x + slot / 2, height - 4, f"{score}", "quiet mid"))
  out.append(_axis(left, width - 4, height - bottom))
  return _svg(width, height, "distribution of scores", out)


def stacked(rows, names):
  """Horizontal bars of shares: rows are (label, {name: count}, remark)."""
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
        said = html.escape(f"{label}, {name}: {counts[name]} of {total} ({share:.0%})")
        out.append(f'<rect class="fill s{j % 6}" x="{at:.1f}" y="{y}" width="{max(0.5, wide - 1.5):.1f}" height="19">')
        out.append(f"<title>{said}</title></rect>")
      if wide > 40:
        out.append(_text(at + wide / 2, y + 14, f"{share:.0%}", "inside mid"))
      at += wide
    out.append(_text(width - right + 6, y + 14, remark, "quiet"))
  return _svg(width, height, "shares", out)


def bars(rows, colour=0):
  """Horizontal bars: rows are (label, value, remark)."""
  width, left, right, line = 780, 210, 210, 22
  most, out = max((value for _, value, _ in rows), default=0) or 1, []
  for i, (label, value, remark) in enumerate(rows):
    y, wide = i * line + 2, value / most * (width - left - right)
    out.append(_text(left - 8, y + 13, label, "quiet end"))
    out.append(f'<rect class="fill s{colour}" x="{left}" y="{y}" width="{max(1, wide):.1f}" height="16" rx="1"/>')
    out.append(_text(left + max(1, wide) + 7, y + 13, remark, "quiet"))
  return _svg(width, line * len(rows) + 4, "bars", out)


def curve(xs, ys, top, colour=0, label="loss per step"):
  """A small line from zero to `top`, without names."""
  width, height, left, bottom = 230, 110, 34, 18
  x_at = lambda x: left + 3 + (x - xs[0]) / max(1e-9, xs[-1] - xs[0]) * (width - left - 9)
  y_at = lambda y: height - bottom - min(1.0, y / top) * (height - bottom - 8)
  path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(xs, ys) if math.isfinite(y))
  out = [_text(left - 5, 14, f"{top:.2g}", "quiet end"), _text(left - 5, height - bottom, "0", "quiet end")]
  out += [_axis(left, width - 4, height - bottom), _text(x_at(xs[0]), height - 4, f"{xs[0]:.0f}", "quiet")]
  out += [_text(width - 6, height - 4, f"{xs[-1]:.0f}", "quiet end")]
  out.append(f'<g class="s{colour}"><polyline class="line" points="{path}"/></g>')
  return _svg(width, height, label, out)


def ticks(low, high, about=7):
  """Round numbers that enclose low .. high."""
  if high - low < 1e-9:
    low, high = low - 0.5, high + 0.5
  raw = (high - low) / about
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw - 1e-12)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def tick(value, all_ticks):
  step = all_ticks[1] - all_ticks[0]
  return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9)) + (f'{step:e}'.startswith('2.5'))}f}"


def _apart(labels, least):
  """The labels, moved down or up so that none covers another; sorted from the top."""
  labels = sorted(labels)
  ys = [y for y, *_ in labels]
  for _ in range(40):
    for i in range(len(ys) - 1):
      if (short := least - (ys[i + 1] - ys[i])) > 0:
        ys[i], ys[i + 1] = ys[i] - short / 2, ys[i + 1] + short / 2
  return [(y, *rest) for y, (_, *rest) in zip(ys, labels)]


def _axis(x1, x2, y):
  return f'<line class="axis" x1="{x1}" x2="{x2}" y1="{y + 0.5}" y2="{y + 0.5}"/>'


def _text(x, y, said, kind):
  return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(str(said))}</text>'


def _svg(width, height, label, pieces):
  return (
    f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{html.escape(label)}">'
    f"{''.join(pieces)}</svg>"
  )
