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
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import queue
import re
import shlex
import statistics
import subprocess
import sys

from absl import app, flags
from ml_collections import ConfigDict

from alma_jax import main as door  # defines --config and --workdir
from alma_jax import options as configs

SBATCH = pathlib.Path(__file__).with_name("slurm.sbatch")
FLAGS = flags.FLAGS
flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where the variants run.")
flags.DEFINE_integer("parallel", 1, "How many run at a time (local).", lower_bound=1)
flags.DEFINE_bool("dry_run", False, "Print the commands and run nothing.")


@dataclasses.dataclass(frozen=True)
class Job:
  """What all work units run: alma_jax.main with a config file and the values of the command line."""

  file: str
  default: ConfigDict  # of the file
  config: ConfigDict  # with --config.NAME=VALUE

  def resolved(self, overrides):
    """A work unit's whole config and its flags; ConfigError when an override cannot be meant."""
    names = set(configs.leaves(self.default.to_dict()))
    config, flat = ConfigDict(self.config.to_dict()), dict(_flat(overrides, names))
    for path, value in flat.items():
      if path not in names:
        section = any(name.startswith(f"{path}.") for name in names)
        raise configs.ConfigError(f"{path} is a section; give it a dict" if section else configs.nearest(config, path))
      parent, _, leaf = path.rpartition(".")
      node = _get(config, parent)
      try:
        node[leaf] = value
      except TypeError:
        raise configs.ConfigError(f"{path} is a {type(node[leaf]).__name__}, not {value!r}") from None
    configs.check(config, 1 + config.feedback_rounds)
    said = [n for n in sorted(names) if n in flat or _plain(_get(config, n)) != _plain(_get(self.default, n))]
    return config, tuple(f"--config.{name}={_plain(_get(config, name))}" for name in said)


@dataclasses.dataclass
class WorkUnit:
  number: int
  overrides: dict
  config: ConfigDict
  arguments: tuple  # of alma_jax.main
  directory: pathlib.Path
  state: str = ""

  def finished(self):
    """Whether the run directory holds a finished run of just this config."""
    log, config = self.directory / "log.jsonl", self.directory / "config.json"
    if not (log.exists() and config.exists()) or json.loads(log.read_text().splitlines()[-1])["event"] != "end":
      return False
    return json.loads(config.read_text()) == json.loads(json.dumps(self.config.to_dict(), default=str))

  def result(self):
    """The last row of progress.csv, {} before there is one."""
    path = self.directory / "progress.csv"
    return [{}, *csv.DictReader(path.open())][-1] if path.exists() else {}


class Experiment:
  """Work units, which run when the `with` block ends: `experiment.add(job, args)`."""

  def __init__(self, title, workdir, launcher="local", parallel=1, dry_run=False):
    self.title, self.workdir, self.launcher = title, pathlib.Path(workdir), launcher
    self.parallel, self.dry_run, self.units = parallel, dry_run, []

  def add(self, job, args):
    number = len(self.units) + 1
    try:
      config, said = job.resolved(args)
      if same := [unit.number for unit in self.units if unit.overrides == args]:
        raise configs.ConfigError(f"it is the same as work unit {same[0]}")
    except configs.ConfigError as e:
      raise configs.ConfigError(f"sweep, work unit {number} ({_shown(args)}): {e}") from None
    summary = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in _flat(args))
    digest = hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode()).hexdigest()[:6]
    name = f"{number:02d}_{re.sub(r'[^A-Za-z0-9.,=_]+', '-', summary)[:60]}_{digest}"
    # The digest finds the directory again when units were added before this one.
    directory = next(iter(sorted(self.workdir.glob(f"[0-9]*_{digest}"))), self.workdir / name)
    arguments = (f"--config={job.file}", f"--workdir={directory}", *said)
    self.units.append(WorkUnit(number, args, config, arguments, directory))

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
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

  def _line(self, unit):
    if self.launcher == "slurm":
      return ["sbatch", "--parsable", f"--output={unit.directory}/slurm-%j.out", str(SBATCH), *unit.arguments]
    return [sys.executable, "-m", "alma_jax.main", *unit.arguments]

  def _run(self, units):
    slots, gpus = queue.Queue(), [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    for i in range(self.parallel):
      slots.put({"CUDA_VISIBLE_DEVICES": ",".join(gpus[i :: self.parallel])} if gpus else {})

    def run(unit):
      slot = slots.get()
      print(f"{unit.number}: {unit.directory}", flush=True)
      unit.directory.mkdir(parents=True, exist_ok=True)
      # One at a time shows its progress here; several would write over each other.
      out = open(unit.directory / "output.txt", "a") if self.parallel > 1 else None
      status = subprocess.run(self._line(unit), env=os.environ | slot, stdout=out, stderr=out).returncode
      unit.state = f"failed ({status})" if status else "finished"
      slots.put(slot)

    pool = concurrent.futures.ThreadPoolExecutor(self.parallel)
    try:
      for future in [pool.submit(run, unit) for unit in units]:
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)  # after Ctrl-C: start no others

  def _queue(self, unit):
    ticket = unit.directory / "slurm_job"
    if ticket.exists():  # still there from an earlier start?
      asked = ["squeue", "--noheader", "--format=%T", "--jobs", ticket.read_text()]
      unit.state = subprocess.run(asked, capture_output=True, text=True).stdout.strip().lower()
    if not unit.state:
      unit.directory.mkdir(parents=True, exist_ok=True)
      sent = subprocess.run(self._line(unit), check=True, stdout=subprocess.PIPE, text=True)
      ticket.write_text(sent.stdout.strip().partition(";")[0])
      unit.state = "queued"


def create_experiment(title, workdir, **options):
  return Experiment(title, workdir, **options)


def table(units):
  """Lines: every unit's last round, then means over the units that differ in the seed alone."""
  lines, groups = [f"{'':>3}  {'state':<12}{'round':>6}{'n':>6}  {'scored by':<10}{'score ± ci95':<16}overrides"], {}
  for unit in units:
    row = unit.result()
    by, name = ("truth", "score") if row.get("score") else ("judge", "judge_score")
    value = f"{float(row[name]):.3f} ± {float(row[f'{name}_ci95']):.3f}" if row else "-"
    start = f"{unit.number:>3}  {unit.state:<12}{row.get('round', '-'):>6}{row.get('n', '-'):>6}"
    lines.append(f"{start}  {by if row else '-':<10}{value:<16}{_shown(unit.overrides)}")
    if unit.state == "finished":
      variant = _shown({k: v for k, v in unit.overrides.items() if k != "seed"})
      groups.setdefault((by, variant), []).append(float(row[name]))
  if any(len(scores) > 1 for scores in groups.values()):
    from scipy import stats

    lines += ["", "Means over seeds, with the 95 % interval of Student's t:"]
    for (by, variant), scores in groups.items():
      n, ci = len(scores), ""
      if n > 1:
        ci = f"± {stats.t.ppf(0.975, n - 1) * statistics.stdev(scores) / math.sqrt(n):.3f}"
      lines.append(f"  {by}  {statistics.mean(scores):.3f} {ci:<8} n = {n}  {variant}")
  return lines


def _flat(changes, leaves=(), prefix=""):
  """(dotted name, value) of nested overrides; a dict that is a value, such as `rounds`, stays one."""
  for key, value in changes.items():
    if isinstance(value, dict) and f"{prefix}{key}" not in leaves:
      yield from _flat(value, leaves, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _shown(overrides):
  return " ".join(f"{name}={value}" for name, value in _flat(overrides)) or "(as it is)"


def _get(config, path):
  return functools.reduce(lambda node, key: node[key], filter(None, path.split(".")), config)


def _plain(value):
  return value.to_dict() if isinstance(value, ConfigDict) else value


def sweep_of(file):
  """The config file's function `sweep`."""
  spec = importlib.util.spec_from_file_location("sweep_config", file.partition(":")[0])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise configs.ConfigError(f"{file} has no function sweep(add); configs/ablations/ shows some")
  return module.sweep


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  file = FLAGS["config"].config_filename
  title = pathlib.Path(file.partition(":")[0]).stem
  options = dict(launcher=FLAGS.launcher, parallel=FLAGS.parallel, dry_run=FLAGS.dry_run)
  try:
    job = Job(file, FLAGS["config"].parser.parse(file), FLAGS.config)
    with create_experiment(title, FLAGS.workdir, **options) as experiment:
      sweep_of(file)(lambda **overrides: experiment.add(job, overrides))
  except configs.ConfigError as e:
    sys.exit(f"error: {e}")
  if not FLAGS.dry_run:
    print("", *table(experiment.units), sep="\n")
  sys.exit(int(any(unit.state.startswith("failed") for unit in experiment.units)))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=door.parse)
