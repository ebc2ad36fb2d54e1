"""Run the sweep of a config file: every variant in a run directory of its own, then one table of all.

  python launch/sweep.py --config=configs/ablations/table7_dpo.py --workdir=runs/table7
    --parallel=2                   two at a time; the GPUs (of CUDA_VISIBLE_DEVICES, or all) are split between them
    --config.feedback_rounds=2     a value for every variant
    --print=commands               a line for each variant that is not finished, to run anywhere; runs nothing
    --print=json                   the same as a list: number, overrides, directory, arguments, state
    --print=table                  the table of what is there
    --print=array | sbatch         one Slurm array of all of them, at most --parallel at a time; sbatch's own options
                                   (--nodes, --gpus-per-node) win over those of launch/slurm.sbatch

The sweep stands in the config file as a function sweep(add); alma_jax/sweeps.py explains it, and configs/ablations has
examples. All variants are checked against the config before the first one starts. Starting again skips what is finished
and goes on with the rest. The exit status is 1 when a variant failed. alma_jax must be installed (pip install -e .).
launch/xm.py sends the same variants through XManager.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import cast

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from alma_jax import config_files, names, start, sweeps
from alma_jax.main import parse  # the module defines --config and --workdir
from alma_jax.options import ConfigError
from alma_jax.sweeps import Unit

SBATCH = pathlib.Path(__file__).with_name("slurm.sbatch")
FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_integer("parallel", 1, "How many run at a time.", lower_bound=1)
  flags.DEFINE_enum("print", None, ["commands", "array", "json", "table"], "Print this and run nothing.")


def units_of_flags(alone: bool = False) -> list[Unit]:
  """The units of --config and --workdir, all checked; the process ends with one line where they are wrong. `alone`: a
  file without a sweep is one unit."""
  file = config_flags.get_config_filename(FLAGS["config"])
  names.look_in(pathlib.Path(file.partition(":")[0]).absolute().parent)
  try:
    with config_files.importable(file):
      default = cast(ConfigDict, FLAGS["config"].parser.parse(file))
    return sweeps.expand(sweeps.Shared(file, default, FLAGS.config, start.checked_options), FLAGS.workdir, alone)
  except ConfigError as e:
    sys.exit(f"error: {e}")


def line(unit: Unit) -> list[str]:
  """The command that runs the unit."""
  return [sys.executable, "-m", "alma_jax.main", *unit.arguments]


def array(units: Sequence[Unit], parallel: int) -> str:
  """launch/slurm.sbatch as an array with a task for each unit. sbatch keeps the text, so that a task which starts days
  later has the arguments of today."""
  head, mark, body = SBATCH.read_text().partition("set -euo pipefail\n")
  first, _, rest = head.partition("\n#SBATCH")
  tasks = ",".join(str(unit.number) for unit in units)
  cases = "".join(f"  {unit.number}) set -- {shlex.join(unit.arguments)} ;;\n" for unit in units)
  head = f"{first}\n#SBATCH --array={tasks}%{parallel}\n#SBATCH{rest}".replace("slurm-%j.out", "slurm-%A_%a.out")
  return f"{head}{mark}case $SLURM_ARRAY_TASK_ID in\n{cases}esac\n{body}"


def shares(parallel: int) -> list[dict[str, str]]:
  """What the units at each of the places add to their environment: a share of the GPUs."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return [{}] * parallel
  if (found := os.environ.get("CUDA_VISIBLE_DEVICES")) is None and parallel > 1:
    ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
      found = ",".join(subprocess.run(ask, capture_output=True, text=True, timeout=30).stdout.split())
    except (OSError, subprocess.SubprocessError):
      found = ""
  gpus = [x for x in (found or "").split(",") if x]
  if gpus and len(gpus) < parallel:
    sys.exit(f"error: --parallel={parallel}: there are {len(gpus)} GPUs ({found}) and each variant needs one")
  return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::parallel])} if gpus else {} for i in range(parallel)]


def run_here(units: Sequence[Unit], parallel: int) -> dict[int, str]:
  """Run the units, `parallel` at a time; how each of them ended, by its number."""
  places: queue.Queue[dict[str, str]] = queue.Queue()
  for share in shares(parallel):
    places.put(share)
  ended: dict[int, str] = {}

  def run(unit: Unit) -> None:
    place = places.get()
    print(f"{unit.number}: {unit.directory}", flush=True)
    unit.directory.mkdir(parents=True, exist_ok=True)
    # A single run shows its progress on the screen; several would write over each other.
    out = open(unit.directory / "output.txt", "a") if parallel > 1 else None
    try:
      status = subprocess.run(line(unit), env=os.environ | place, stdout=out, stderr=out).returncode
      ended[unit.number] = f"failed ({status})" if status else "finished"
    finally:
      places.put(place)
      if out:
        out.close()

  pool = concurrent.futures.ThreadPoolExecutor(parallel)
  try:
    for future in [pool.submit(run, unit) for unit in units]:
      future.result()
  finally:
    pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing else starts
  return ended


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  units = units_of_flags()
  waiting = [unit for unit in units if unit.state() != "finished"]
  if FLAGS.print == "json":
    print(json.dumps([unit.fields() for unit in units], indent=1))
  elif FLAGS.print == "table":
    print(*sweeps.table(units), sep="\n")
  elif FLAGS.print == "array" and not waiting:
    sys.exit(f"error: all {len(units)} variants are finished; --print=table shows them")
  elif FLAGS.print == "array":
    print(array(waiting, FLAGS.parallel), end="")
  elif FLAGS.print == "commands":
    print(*(shlex.join(line(unit)) for unit in waiting), sep="\n")
  if FLAGS.print:
    return
  title = config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]
  print(f"{pathlib.Path(title).stem}: {len(units)} variants, {len(units) - len(waiting)} finished", flush=True)
  ended = run_here(waiting, FLAGS.parallel)
  print("", *sweeps.table(units, ended), sep="\n")
  sys.exit(int(any(state.startswith("failed") for state in ended.values())))


if __name__ == "__main__":
  define_flags()
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
