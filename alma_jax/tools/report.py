"""Makes report.html for a run directory, also beside a live run, and prints the table of its rounds.

  python -m alma_jax.tools.report runs/mini
  python -m alma_jax.tools.report --compare runs/a runs/b [--output=FILE.html]

The second form writes one page about two runs: both progressions, the paired differences of each round by every judge
that graded both, and the config values that differ.
"""

import pathlib
import sys
from collections.abc import Sequence

from alma_jax.errors import UserError
from alma_jax.report import page
from alma_jax.store import layout
from alma_jax.tools import report_compare


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  if "--compare" in arguments:
    return _compare([word for word in arguments if word != "--compare"])
  if len(arguments) != 1 or arguments[0].startswith("-"):
    print((__doc__ or "").strip(), file=sys.stderr)
    return 0 if list(arguments) in (["-h"], ["--help"]) else 2
  directory = pathlib.Path(arguments[0])
  if not (directory / layout.CONFIG).exists():
    what = f"is no run directory: there is no {layout.CONFIG} in it" if directory.is_dir() else "does not exist"
    print(f"error: {directory} {what}.", file=sys.stderr)
    return 1
  made = page.write(directory)
  try:
    print(page.summary(directory))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0 if made else 1


def _compare(arguments: Sequence[str]) -> int:
  runs = [pathlib.Path(word) for word in arguments if not word.startswith("-")]
  flags = [word for word in arguments if word.startswith("-")]
  if len(runs) != 2 or any(not flag.startswith("--output=") for flag in flags):
    print("error: give two run directories: alma report --compare runs/a runs/b [--output=FILE.html]", file=sys.stderr)
    return 2
  output = flags[-1].partition("=")[2] if flags else f"compare_{runs[0].resolve().name}_{runs[1].resolve().name}.html"
  try:
    print(*report_compare.write(runs[0], runs[1], pathlib.Path(output)), sep="\n")
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
