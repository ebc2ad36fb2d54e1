"""What a run would do and what is wrong with it, before it is paid for: `alma run --check --config=...`.

Reads the config, the human data, the tokenizer, the templates, the model's header and the free disk. Writes nothing to
the run directory and reads no weights. The exit status is 0 if nothing is wrong, else 1.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging
import jax
from ml_collections import ConfigDict

from alma_jax import start
from alma_jax.errors import UserError, free_bytes
from alma_jax.llama import sharding
from alma_jax.runtime import room
from alma_jax.runtime.host import Host
from alma_jax.stages import data as human
from alma_jax.store import layout


def run(config: ConfigDict, workdir: str | None) -> int:
  """Print what the run would do and what is wrong; the exit status."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  problems: list[str] = []

  def tried(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
      return step(*arguments)
    except UserError as error:
      problems.append(str(error))
      return None

  by_round = tried(start.checked_options, config)
  if by_round:
    options, recipe = by_round[0], start.recipe_of(config)
    host = tried(start.host_of, options)
    data = tried(_data, options)
    tried(sharding.make_mesh, options.mesh.data, options.mesh.fsdp, options.mesh.tensor)
    if host:
      tried(start.check_lengths, by_round, host.config.max_positions)
      for step in recipe.checks(host, by_round):
        tried(step)
    for line in (*_lines(host, data), *recipe.plan(by_round)):
      print(line)
    if host and workdir:
      needed, free = room.run_bytes(host, recipe.models(by_round)), free_bytes(workdir)
      print(f"disk      {needed / 1e9:,.1f} GB for models and checkpoints; {free / 1e9:,.1f} GB are free")
      if needed > free:
        problems.append(
          f"{workdir}: the file system has {free / 1e9:,.1f} GB free and the run's models and checkpoints take"
          f" {needed / 1e9:,.1f} GB: free some, or choose another --workdir"
        )
      if found := _finished(pathlib.Path(workdir)):
        print(f"there     {found}")
  for problem in problems:
    print(f"error: {problem}", file=sys.stderr)
  print(
    f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "nothing is wrong; start it without --check"
  )
  return 1 if problems else 0


def _data(options: Any) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as directory:
    rows, counts = human.read(options.data, pathlib.Path(directory), options.seed)
  return {name: {**counts.get(name, {}), "used": len(found)} for name, found in rows.items()}


def _lines(host: Host | None, data: dict[str, Any] | None) -> Iterator[str]:
  devices = jax.devices()
  yield f"devices   {len(devices)} x {devices[0].device_kind}, {jax.process_count()} host(s)"
  if host:
    c = host.config
    yield (
      f"model     {host.directory}: {c.parameters:,} weights, {c.depth} layers, vocabulary {host.tokenizer.size:,},"
      f" {c.max_positions:,} positions; chat format {host.chat.name}, forward passes in {host.dtype}"
    )
  for name, counts in (data or {}).items():
    facts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items() if value)
    yield f"data      {name}: {facts}"


def _finished(workdir: pathlib.Path) -> str | None:
  """What a run directory holds already."""
  found = layout.stages(workdir) if workdir.is_dir() else []
  done = sum(stage.manifest is not None for stage in found)
  return f"{workdir}: {done} stages are finished, {len(found) - done} begun; they are kept" if found else None
