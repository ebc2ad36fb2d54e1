"""Run the sweep of a config file: every variant in a run directory of its own, then one table of all.

  python launch/sweep.py --config=configs/ablations/table7_dpo.py --workdir=runs/table7
    --dry_run                      print the commands, run nothing
    --parallel=2                   two at a time; the GPUs in CUDA_VISIBLE_DEVICES are split between them
    --launcher=slurm               queue launch/slurm.sbatch for each; the same line prints the table later
    --config.feedback_rounds=2     a value for every variant

The sweep stands in the config file, next to what it varies, in the same form as the overrides of a round:

  def sweep(add):
    for seed in range(3):
      add(seed=seed, responses=dict(n=4))

All variants are checked against the config before the first one starts. Starting again skips what is finished and
goes on with the rest. The exit status is 1 when a variant failed. alma_jax must be installed (pip install -e .).
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import queue
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from alma_jax import config_files, names, start
from alma_jax.main import parse  # the module defines --config and --workdir
from alma_jax.options import ConfigError, leaves, nearest
from alma_jax.report import graded
from alma_jax.store import layout, statistics

Overrides = Mapping[str, Any]  # nested, as `add` takes them: {"seed": 1, "responses": {"n": 4}}
SBATCH = pathlib.Path(__file__).with_name("slurm.sbatch")
FLAGS = flags.FLAGS
flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where the variants run.")
flags.DEFINE_integer("parallel", 1, "How many run at a time (local).", lower_bound=1)
flags.DEFINE_bool("dry_run", False, "Print the commands and run nothing.")


@dataclasses.dataclass(frozen=True)
class Job:
  """What all work units share: a config file and the values of the command line."""

  file: str
  default: ConfigDict  # what the file gives
  config: ConfigDict  # the same with --config.NAME=VALUE applied

  def resolved(self, overrides: Overrides) -> tuple[ConfigDict, tuple[str, ...]]:
    """The whole config of a work unit and the flags that make it; ConfigError if an override is invalid."""
    fields = set(leaves(self.default.to_dict()))
    config, flat = ConfigDict(self.config.to_dict()), dict(_flat(overrides, fields))
    for path, value in flat.items():
      if path not in fields:
        section = any(name.startswith(f"{path}.") for name in fields)
        raise ConfigError(f"{path} is a section; give it a dict" if section else nearest(config, path))
      parent, _, leaf = path.rpartition(".")
      node = _get(config, parent)
      try:
        node[leaf] = value
      except TypeError:
        raise ConfigError(f"{path} is a {type(node[leaf]).__name__}, not {value!r}") from None
    start.checked_options(config)
    said = [n for n in sorted(fields) if n in flat or _plain(_get(config, n)) != _plain(_get(self.default, n))]
    return config, tuple(f"--config.{name}={_plain(_get(config, name))}" for name in said)


@dataclasses.dataclass
class WorkUnit:
  """One variant: what it changes, its whole config, and where it runs."""

  number: int
  overrides: Overrides
  config: ConfigDict
  arguments: tuple[str, ...]  # for alma_jax.main
  directory: pathlib.Path
  state: str = ""

  def finished(self) -> bool:
    """True if the directory holds a finished run of exactly this config."""
    config = layout.config_in(self.directory)
    wanted = json.loads(json.dumps(self.config.to_dict(), default=str))
    return config == wanted and layout.finished(self.directory)

  def result(self) -> dict[str, str]:
    """The last row of progress.csv, {} before there is one."""
    return [{}, *layout.progress(self.directory)][-1]


class Experiment:
  """A list of work units that run when the `with` block ends: `experiment.add(job, args)`."""

  def __init__(
    self, title: str, workdir: str | pathlib.Path, launcher: str = "local", parallel: int = 1, dry_run: bool = False
  ) -> None:
    self.title, self.workdir, self.launcher = title, pathlib.Path(workdir), launcher
    self.parallel, self.dry_run = parallel, dry_run
    self.units: list[WorkUnit] = []

  def add(self, job: Job, args: Overrides) -> None:
    number = len(self.units) + 1
    try:
      config, said = job.resolved(args)
      if same := [unit.number for unit in self.units if unit.overrides == args]:
        raise ConfigError(f"it is the same as work unit {same[0]}")
    except ConfigError as e:
      raise ConfigError(f"sweep, work unit {number} ({_shown(args)}): {e}") from None
    summary = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in _flat(args))
    digest = hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode()).hexdigest()[:6]
    name = f"{number:02d}_{re.sub(r'[^A-Za-z0-9.,=_]+', '-', summary)[:60]}_{digest}"
    # Numbers change when units are added before this one; the digest still finds the directory.
    directory = next(iter(sorted(self.workdir.glob(f"[0-9]*_{digest}"))), self.workdir / name)
    arguments = (f"--config={job.file}", f"--workdir={directory}", *said)
    self.units.append(WorkUnit(number, args, config, arguments, directory))

  def __enter__(self) -> "Experiment":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if kind:
      return
    for unit in self.units:
      unit.state = "finished" if unit.finished() else ""
    waiting = [unit for unit in self.units if not unit.state]
    print(f"{self.title}: {len(self.units)} variants, {len(self.units) - len(waiting)} finished", flush=True)
    if self.dry_run:
      print(*(shlex.join(self._line(unit)) for unit in waiting), sep="\n")
    elif self.launcher == "slurm":
      for unit in waiting:
        self._queue(unit)
    else:
      self._run(waiting)

  def _line(self, unit: WorkUnit) -> list[str]:
    """The command that runs the unit."""
    if self.launcher == "slurm":
      return ["sbatch", "--parsable", f"--output={unit.directory}/slurm-%j.out", str(SBATCH), *unit.arguments]
    return [sys.executable, "-m", "alma_jax.main", *unit.arguments]

  def _run(self, units: Sequence[WorkUnit]) -> None:
    gpus = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    slots: queue.Queue[dict[str, str]] = queue.Queue()  # what a unit adds to its environment: its share of the GPUs
    for i in range(self.parallel):
      slots.put({"CUDA_VISIBLE_DEVICES": ",".join(gpus[i :: self.parallel])} if gpus else {})

    def run(unit: WorkUnit) -> None:
      slot = slots.get()
      print(f"{unit.number}: {unit.directory}", flush=True)
      unit.directory.mkdir(parents=True, exist_ok=True)
      # A single run shows its progress on the screen; several would write over each other.
      out = open(unit.directory / "output.txt", "a") if self.parallel > 1 else None
      status = subprocess.run(self._line(unit), env=os.environ | slot, stdout=out, stderr=out).returncode
      unit.state = f"failed ({status})" if status else "finished"
      slots.put(slot)

    pool = concurrent.futures.ThreadPoolExecutor(self.parallel)
    try:
      for future in [pool.submit(run, unit) for unit in units]:
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing else starts

  def _queue(self, unit: WorkUnit) -> None:
    ticket = unit.directory / "slurm_job"
    if ticket.exists():  # an earlier start queued it: ask Slurm whether the job still waits or runs
      asked = ["squeue", "--noheader", "--format=%T", "--jobs", ticket.read_text()]
      unit.state = subprocess.run(asked, capture_output=True, text=True).stdout.strip().lower()
    if not unit.state:
      unit.directory.mkdir(parents=True, exist_ok=True)
      sent = subprocess.run(self._line(unit), check=True, stdout=subprocess.PIPE, text=True)
      ticket.write_text(sent.stdout.strip().partition(";")[0])
      unit.state = "queued"


def table(units: Sequence[WorkUnit]) -> list[str]:
  """Lines to print: the last round of every unit, then means over units that differ only in the seed."""
  lines = [f"{'':>3}  {'state':<12}{'round':>6}{'n':>6}  {'scored by':<10}{'score ± ci95':<16}overrides"]
  groups: dict[tuple[str, str], list[float]] = {}  # (scored by, variant) -> a score for each seed
  for unit in units:
    row = unit.result()
    by = next((name for name in graded.judges([row]) if row[name]), "-")
    value = f"{float(row[by]):.3f} ± {float(row[f'{by}_ci95']):.3f}" if row else "-"
    start = f"{unit.number:>3}  {unit.state:<12}{row.get('round', '-'):>6}{row.get('n', '-'):>6}"
    lines.append(f"{start}  {by:<10}{value:<16}{_shown(unit.overrides)}")
    if unit.state == "finished":
      variant = _shown({k: v for k, v in unit.overrides.items() if k != "seed"})
      groups.setdefault((by, variant), []).append(float(row[by]))
  if any(len(scores) > 1 for scores in groups.values()):
    lines += ["", "Means over seeds, with the 95 % interval of Student's t:"]
    for (by, variant), scores in groups.items():
      if mean := statistics.student(scores):
        ci = "" if mean.ci95 is None else f"± {mean.ci95:.3f}"
        lines.append(f"  {by}  {mean.value:.3f} {ci:<8} n = {mean.n}  {variant}")
  return lines


def _flat(changes: Overrides, whole: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The dotted names and values of nested overrides. A dict whose name is in `whole` is one value."""
  for key, value in changes.items():
    if isinstance(value, dict) and f"{prefix}{key}" not in whole:
      yield from _flat(value, whole, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _shown(overrides: Overrides) -> str:
  return " ".join(f"{name}={value}" for name, value in _flat(overrides)) or "(unchanged)"


def _get(config: Any, path: str) -> Any:
  return functools.reduce(lambda node, key: node[key], filter(None, path.split(".")), config)


def _plain(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ConfigDict) else value


def sweep_of(file: str) -> Callable[[Callable[..., None]], None]:
  """The function `sweep` of a config file."""
  spec = importlib.util.spec_from_file_location("sweep_config", file.partition(":")[0])
  assert spec and spec.loader, f"{file} is no Python file"  # the flag's parser has loaded it already
  module = importlib.util.module_from_spec(spec)
  with config_files.importable(file):
    spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise ConfigError(f"{file} has no function sweep(add); configs/ablations/ shows some")
  return module.sweep


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  file = config_flags.get_config_filename(FLAGS["config"])
  path = pathlib.Path(file.partition(":")[0]).absolute()
  names.look_in(path.parent)
  options = dict(launcher=FLAGS.launcher, parallel=FLAGS.parallel, dry_run=FLAGS.dry_run)
  try:
    with config_files.importable(file):
      job = Job(file, cast(ConfigDict, FLAGS["config"].parser.parse(file)), FLAGS.config)
    with Experiment(path.stem, FLAGS.workdir, **options) as experiment:
      sweep_of(file)(lambda **overrides: experiment.add(job, overrides))
  except ConfigError as e:
    sys.exit(f"error: {e}")
  if not FLAGS.dry_run:
    print("", *table(experiment.units), sep="\n")
  sys.exit(int(any(unit.state.startswith("failed") for unit in experiment.units)))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
