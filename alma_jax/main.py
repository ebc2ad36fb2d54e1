"""The door: read the config, hand over to the recipe. The script `alma` comes in here, too.

  python -m alma_jax.main --config=configs/alma.py:mini --workdir=runs/mini
  python -m alma_jax.main --config=... --check          says what the run would do and what is wrong; writes nothing

  alma run --config=configs/alma.py:mini --workdir=runs/mini
  alma sample | score | chat | cluster | curate | evaluate | export | plan | report    as python -m alma_jax.tools.plan

The same command on every host makes one run of them (see launch/). Starting it again goes on where it stopped.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from alma_jax import config_files

TOOLS = ("sample", "score", "chat", "cluster", "curate", "evaluate", "export", "plan", "report")

_CONFIG = config_flags.DEFINE_config_file("config", None, "File and size, e.g. configs/alma.py:mini.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: made at the first start, continued later.")
_CHECK = flags.DEFINE_bool("check", False, "Say what the run would do and what is wrong; write nothing.")


def parse(argv: Sequence[str]) -> list[str]:
  """absl's flag parsing, with the nearest name for a config field that does not exist."""
  with config_files.loading(argv) as found:
    try:
      rest = flags.FLAGS(found)
      _CONFIG.value  # noqa: B018  # the file is loaded here, while it can import its `configs`
      return rest
    except flags.Error as error:
      sys.exit(f"error: {_in_one_line(error)}")
    except (AttributeError, KeyError) as error:
      from alma_jax import options

      file = next((arg.partition("=")[2] for arg in found if arg.startswith("--config=")), None)
      value = file and flags.FLAGS["config"].parser.parse(file)
      for path in (match[1] for arg in found if (match := re.match(r"--config\.([^=]+)", arg))):
        if value and path not in options.leaves(value.to_dict()):
          sys.exit(f"error: --config.{path}: {options.nearest(value, path)}")
      sys.exit(f"error: the config cannot be read: {error}")


def _in_one_line(error: flags.Error) -> str:
  """What to say of a flag that cannot be read. A config file's own ValueError, such as one for an unknown size, is said
  without its traceback; the traceback of any other mistake in the file is kept."""
  if isinstance(error, flags.UnrecognizedFlagError):
    known = [name for name in flags.FLAGS if "." not in name]
    word = error.flagname.partition(".")[0]
    near = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"there is no flag --{error.flagname}" + (f"; did you mean --{near[0]}?" if near else "")
  if flags.FLAGS["config"].value is None and "must have a value" in str(error):
    return "--config is missing: give a config file, such as configs/alma.py:mini"
  lines = str(error).strip().splitlines()
  head, _, said = lines[-1].partition("ValueError: ")
  return said if said and not head and "Traceback" in str(error) else str(error)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  named: Any = flags.FLAGS["config"]
  file = named.config_filename.partition(":")[0]
  if not os.path.isfile(file):
    sys.exit(f"error: --config names {file}, which does not exist here ({os.getcwd()})")
  from alma_jax import names, start  # jax and the rest only after the flags are known to be right

  names.look_in(os.path.dirname(os.path.abspath(file)))
  if _CHECK.value:
    from alma_jax import check

    sys.exit(check.run(_CONFIG.value, _WORKDIR.value))
  if not _WORKDIR.value:
    sys.exit("error: --workdir is missing: give the run directory, which is made at the first start")
  sys.exit(start.run(_CONFIG.value, _WORKDIR.value, _foreseen))


def _foreseen(session: Any) -> Sequence[str]:
  """What the run will take, on devices whose peak rates are known."""
  if session.mesh.devices.flat[0].platform == "cpu":
    return ()
  from alma_jax.plan import ahead

  return list(ahead.lines(session))


def run(argv: Sequence[str]) -> None:
  """The main job with these arguments; `argv[0]` is the program's name."""
  flags.mark_flag_as_required("config")
  app.run(main, argv=list(argv), flags_parser=parse)


def command() -> None:
  """The script `alma`: the first word says what to do."""
  what, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
  if what == "run":
    run([f"{sys.argv[0]} run", *arguments])
  if what in TOOLS:
    sys.exit(importlib.import_module(f"alma_jax.tools.{what}").main(arguments))
  known = ("run", *TOOLS)
  if what not in ("-h", "--help", "help"):
    near = difflib.get_close_matches(what, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    sys.exit(f"error: alma has no command {what!r}{hint} There are {', '.join(known)}; alma COMMAND --help says more")
  print(f"alma {' | '.join(known)} ...\n\n{(__doc__ or '').strip()}")


if __name__ == "__main__":
  run(sys.argv)
