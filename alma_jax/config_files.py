"""Where a config file is found, and what it may import while it is loaded.

  with config_files.loading(sys.argv) as argv:  # --config=configs/alma.py:mini, from any directory
    app.parse_flags_with_usage(argv)

A path that does not exist in the working directory is looked up beside the package: in the top of a checkout, in
`alma_jax/shipped` of a wheel. While a file is loaded, `from configs.common import ...` reads the `configs/` that holds
the file, so a copy of that folder can stand anywhere; a file outside of any `configs/` reads that of its own folder, of
the working directory, or the shipped one.
"""

import contextlib
import os
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Sequence

PACKAGE = pathlib.Path(__file__).parent
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent  # the folder that holds configs/


def found(config: str) -> str:
  """The value of --config, PATH or PATH:SIZE, with the shipped file's whole path if PATH exists there alone."""
  path, colon, size = config.partition(":")
  shipped = SHIPPED / path
  return config if os.path.isfile(path) or not shipped.is_file() else f"{shipped}{colon}{size}"


@contextlib.contextmanager
def importable(config: str) -> Iterator[None]:
  """Lets the file of `config` (PATH or PATH:SIZE) import its `configs`; afterwards all imports are as before."""
  path, modules = list(sys.path), _modules()
  file = pathlib.Path(config.partition(":")[0]).absolute()
  own = [str(folder.parent) for folder in file.parents if folder.name == "configs"][:1]
  sys.path[:] = [*own, *path, str(file.parent), os.getcwd(), str(SHIPPED)]
  for name in modules:
    del sys.modules[name]
  try:
    yield
  finally:
    sys.path[:] = path
    for name in _modules():
      del sys.modules[name]
    sys.modules.update(modules)


@contextlib.contextmanager
def loading(argv: Sequence[str]) -> Iterator[list[str]]:
  """The command line with --config as `found` gives it; inside, that file can be loaded."""
  argv, config = list(argv), None
  for at, word in enumerate(argv):
    if match := re.fullmatch(r"(--?config)=(.+)", word):
      config = found(match[2])
      argv[at] = f"{match[1]}={config}"
    elif re.fullmatch(r"--?config", word) and at + 1 < len(argv):
      config = argv[at + 1] = found(argv[at + 1])
  with importable(config) if config else contextlib.nullcontext():
    yield argv


def _modules() -> dict[str, types.ModuleType]:
  return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
