"""The door: read the config, hand over to the recipe.

  python -m alma_jax.main --config=configs/alma.py:mini --workdir=runs/mini

The same command on every host makes one run of them (see launch/). Starting it again goes on where it stopped.
"""

import importlib
import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "File and size, e.g. configs/alma.py:mini.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: made at the first start, continued later.")


def parse(argv):
  """absl's flag parsing, with the nearest name for a config field that does not exist."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    from alma_jax import options as configs

    file = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), None)
    value = file and flags.FLAGS["config"].parser.parse(file)
    for path in (match[1] for arg in argv if (match := re.match(r"--config\.([^=]+)", arg))):
      if value and path not in configs.leaves(value.to_dict()):
        sys.exit(f"error: --config.{path}: {configs.nearest(value, path)}")
    sys.exit(f"error: the config cannot be read: {error}")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  file = flags.FLAGS["config"].config_filename.partition(":")[0]
  if not os.path.isfile(file):
    sys.exit(f"error: --config names {file}, which does not exist here ({os.getcwd()})")
  from alma_jax import start  # jax and the rest only after the flags are known to be right

  recipe = importlib.import_module(f"alma_jax.recipes.{_CONFIG.value.recipe}")
  sys.exit(start.run(recipe, _CONFIG.value, _WORKDIR.value))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
