"""Draws the pictures of the README.

  python docs/pictures.py                     docs/loop.svg
  python docs/pictures.py --run=runs/mini     and docs/report.png, a screenshot of that run's report

The screenshot is taken by chromium, which must be on the PATH.
"""

import argparse
import itertools
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
INK, QUIET, LINE, BLUE, FILL = "#1c2126", "#667079", "#98a2ab", "#0b69b0", "#eef5fb"
WIDTH, HEIGHT = 960, 372
SCREEN = 1000, 1100  # of the screenshot: the report down to the table of rounds


class Box(NamedTuple):
  x: int
  y: int
  title: str
  lines: tuple[str, ...]
  width: int = 140
  height: int = 78

  @property
  def right(self) -> int:
    return self.x + self.width

  @property
  def middle(self) -> int:
    return self.x + self.width // 2

  def drawn(self, fill: str) -> str:
    texts = [f'<text x="{self.middle}" y="{self.y + 24}" font-weight="600" fill="{INK}">{self.title}</text>']
    for i, line in enumerate(self.lines):
      texts.append(f'<text x="{self.middle}" y="{self.y + 44 + 16 * i}" font-size="12" fill="{QUIET}">{line}</text>')
    frame = f'x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}"'
    return f'<rect {frame} rx="8" fill="{fill}" stroke="{LINE}"/>' + "".join(texts)


GIVEN = (  # by you
  Box(20, 40, "base model", ("a pretrained Llama",)),
  Box(180, 40, "demonstrations", ("about 5,000 prompts", "with an answer")),
  Box(340, 40, "annotations", ("about 4,000 answers", "with a score")),
)
ONCE = (  # made once
  Box(500, 40, "pool", ("the base model's own", "prompts, clustered")),
  Box(660, 40, "initial SFT", ("base model trained on", "the demonstrations")),
  Box(800 + 20, 40, "judge", ("trained on", "the annotations"), 120),
)
LOOP = (  # made every round
  Box(20, 220, "prompts", ("one from each of", "K clusters")),
  Box(180, 220, "responses", ("N to each prompt, by", "SFT and newest policy")),
  Box(340, 220, "judgments", ("the judge's score,", "0 to 10")),
  Box(500, 220, "trainset", ("the best response", "to each prompt")),
  Box(660, 220, "policy", ("base model trained on", "all rounds so far")),
  Box(820, 220, "evaluation", ("held-out", "prompts"), 120),
)


def loop() -> str:
  """The method as an SVG picture: what is given, what is made once, and the loop."""
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="14" text-anchor="middle"'
    ' font-family="system-ui,-apple-system,Segoe UI,sans-serif">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>',
    f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0 L8 4 L0 8 z" fill="{BLUE}"/></marker></defs>',
    heading(20, 26, "You give"),
    heading(500, 26, "Made once, from these alone"),
    heading(20, 336, "Every round"),
    *(box.drawn("#fff") for box in GIVEN),
    *(box.drawn("#f5f7f8") for box in ONCE),
    *(box.drawn(FILL) for box in LOOP),
    arrow("M480 79 H498"),
    *(arrow(f"M{left.right} 259 H{right.x - 2}") for left, right in itertools.pairwise(LOOP)),
  ]
  pool, sft, judge = ONCE
  prompts, responses, judgments, _, policy, _ = LOOP
  # Down from what is made once to the stage of the loop that uses it, each at its own height.
  for source, target, height in ((pool, prompts, 142), (sft, responses, 160), (judge, judgments, 178)):
    x = source.middle
    parts.append(arrow(f"M{x} {source.y + source.height} V{height} H{target.middle} V{target.y - 2}"))
  below = policy.y + policy.height
  parts.append(arrow(f"M{policy.middle} {below} V{below + 34} H{responses.middle} V{below + 2}"))
  words = "next round: the new policy writes responses too"
  parts.append(f'<text x="{(policy.middle + responses.middle) // 2}" y="{below + 54}" fill="{BLUE}">{words}</text>')
  return "\n".join([*parts, "</svg>\n"])


def heading(x: int, y: int, text: str) -> str:
  return f'<text x="{x}" y="{y}" text-anchor="start" font-size="13" fill="{BLUE}">{text}</text>'


def arrow(path: str) -> str:
  return f'<path d="{path}" fill="none" stroke="{BLUE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def screenshot(page: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the top of a run's report.html as a PNG file."""
  with tempfile.TemporaryDirectory() as profile:
    command = [
      "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
      "--window-size={},{}".format(*SCREEN), f"--screenshot={out}", page.absolute().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode or not out.exists():
    sys.exit(f"chromium failed: {done.stderr}")


def main() -> None:
  flags = argparse.ArgumentParser(description="Draw the pictures of the README.")
  flags.add_argument("--run", type=pathlib.Path, help="a finished run directory, for docs/report.png")
  run = flags.parse_args().run
  (HERE / "loop.svg").write_text(loop())
  if run:
    screenshot(run / "report.html", HERE / "report.png")


if __name__ == "__main__":
  main()
