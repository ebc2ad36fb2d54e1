"""Makes report.html for a run directory, also beside a live run, and prints the table of its rounds.

python -m alma_jax.tools.report runs/mini
"""

import pathlib
import sys
from collections.abc import Sequence

from alma_jax.errors import UserError
from alma_jax.report import page
from alma_jax.store import layout


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
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


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
