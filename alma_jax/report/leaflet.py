"""Tables and charts of a command as one file: HTML, SVG or PNG, as the file's name ends.

  save(path, "Table 1", [Block("data.eval, graded by truth", charts=[charts.lines(...)], table=Table(...))])

A PNG is a picture of the SVG, taken by a browser that is on the PATH; an SVG holds the charts alone.
"""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from alma_jax.errors import UserError
from alma_jax.report import page
from alma_jax.report.wording import Table
from alma_jax.store import shards

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
KINDS = (".html", ".svg", ".png")
GAP = 30  # above each chart of a picture, for its title
WIDTH = 780


class PictureError(UserError):
  """A picture that cannot be made here."""


@dataclasses.dataclass(frozen=True)
class Block:
  title: str
  charts: Sequence[Markup] = ()
  table: Table | None = None
  note: str = ""

  def parts(self) -> list[Any]:
    return [*self.charts, *([self.table] if self.table else []), *([self.note] if self.note else [])]


def check(path: pathlib.Path) -> None:
  """Raise unless the file's name says a kind that can be made here."""
  if path.suffix not in KINDS:
    raise PictureError(f"{path}: the name must end with {', '.join(KINDS[:-1])} or {KINDS[-1]}")
  if path.suffix == ".png" and not _browser():
    raise PictureError(
      f"{path}: a PNG is taken by a browser, and none of {', '.join(BROWSERS)} is on the PATH; write .svg"
    )
  if not path.absolute().parent.is_dir():
    raise PictureError(f"{path}: there is no directory {path.parent}; make it first")


def save(path: pathlib.Path, title: str, blocks: Sequence[Block]) -> None:
  check(path)
  if path.suffix == ".html":
    page.write_comparison(path, title, [(block.title, block.parts()) for block in blocks])
    return
  drawn, height = svg(blocks)
  if path.suffix == ".svg":
    with shards.atomic(path) as file:
      file.write(drawn.encode())
    return
  with tempfile.TemporaryDirectory() as folder:
    source, picture = pathlib.Path(folder, "charts.svg"), pathlib.Path(folder, "charts.png")
    source.write_text(drawn, encoding="utf-8")
    call = [_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={picture}"]
    size = [f"--window-size={WIDTH},{height}", "--force-device-scale-factor=2", source.as_uri()]
    done = subprocess.run([*map(str, call), *size], capture_output=True, text=True, check=False)
    if not picture.is_file():
      raise PictureError(f"{path}: {call[0]} took no picture ({done.stderr.strip()[-300:]}); write .svg or .html")
    with shards.atomic(path) as file:
      file.write(picture.read_bytes())


def svg(blocks: Sequence[Block]) -> tuple[str, int]:
  """The charts of all blocks one below the other as a file of its own, and its height."""
  pieces, top = [], 0
  for block in blocks:
    for i, chart in enumerate(block.charts):
      wide, tall = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', chart)[0])
      title = f'<text x="8" y="{top + 18}" font-weight="600">{escape(block.title)}</text>' if i == 0 else ""
      placed = str(chart).replace("<svg ", f'<svg x="0" y="{top + GAP}" width="{wide:g}" height="{tall:g}" ', 1)
      pieces.append(f"{title}{placed}")
      top += GAP + round(tall)
  style = f"svg {{ font: 12px system-ui, sans-serif; background: #fff }} {_light(page.css())}"
  size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
  white = f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>'
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{white}{"".join(pieces)}</svg>\n', top


def _light(css: str) -> str:
  """The rules for charts with the light colours put in for their names: a picture has one look."""
  colours = dict(re.findall(r"(--\w+): (#\w+)", css.partition("@media")[0]))
  rules = css.partition("/* charts */")[2].partition("/* tables")[0]
  return re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], rules).replace("width: 100%; height: auto;", "")


def _browser() -> str | None:
  return next((found for name in BROWSERS if (found := shutil.which(name))), None)
