"""Run the sweep of a config file: every variant in a run directory of its own, then one table of all.

  python launch/sweep.py --config=configs/ablations/table7_dpo.py --workdir=runs/table7
    --dry_run                      print the commands, run nothing
    --parallel=2                   two at a time; the GPUs in CUDA_VISIBLE_DEVICES are split between them
    --launcher=slurm               queue one `sbatch launch/slurm.sbatch` per variant; the same line later prints the table
    --config.feedback_rounds=2     a value for every variant

The sweep stands in the config file, next to what it varies, in the same form as the overrides of a round:

  def sweep(add):
    for seed in range(3):
      add(seed=seed, responses=dict(n=4))

All variants are checked against the config before the first one starts. Starting again skips what is finished and
goes on with the rest. The exit status is 1 when a variant failed.
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
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags
from ml_collections import ConfigDict

from alma_jax import config as configs
from alma_jax import main as door  # defines --config and --workdir

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
  command: list  # arguments of alma_jax.main
  directory: pathlib.Path
  state: str = ""

  def finished(self):
    """Whether the run directory holds a finished run of just this config."""
    log, config = self.directory / "log.jsonl", self.directory / "config.json"
    if not (log.exists() and config.exists()):
      return False
    lines = log.read_text().splitlines()
    ended = bool(lines) and json.loads(lines[-1])["event"] == "end"
    return ended and json.loads(config.read_text()) == json.loads(json.dumps(self.config.to_dict(), default=str))

  def result(self):
    """The last row of progress.csv, {} before there is one."""
    path = self.directory / "progress.csv"
    return [{}, *csv.DictReader(path.open())][-1] if path.exists() else {}


class Experiment:
  """Work units that run when the `with` block ends: `experiment.add(job, args)`."""

  def __init__(self, title, workdir, launcher="local", parallel=1, dry_run=False):
    self.title, self.workdir, self.launcher = title, pathlib.Path(workdir), launcher
    self.parallel, self.dry_run, self.units = parallel, dry_run, []

  def add(self, job, args):
    number = len(self.units) + 1
    try:
      config, said = job.resolved(args)
    except configs.ConfigError as e:
      raise configs.ConfigError(f"work unit {number}, {args}: {e}") from None
    summary = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in _flat(args))
    name = re.sub(r"[^A-Za-z0-9.,=_]+", "-", summary)[:60].strip("-,")
    digest = hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode()).hexdigest()[:6]
    if same := [u for u in self.units if u.overrides == args]:
      raise configs.ConfigError(f"work unit {number} is the same as {same[0].number}: {args}")
    # The digest finds the directory again when units were added before this one.
    known = sorted(self.workdir.glob(f"[0-9]*_{digest}"))
    directory = known[0] if known else self.workdir / f"{number:02d}_{name}_{digest}"
    self.units.append(
      WorkUnit(number, args, config, [f"--config={job.file}", f"--workdir={directory}", *said], directory)
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind:
      return
    waiting = []
    for unit in self.units:
      unit.state = "finished" if unit.finished() else ""
      waiting += [] if unit.state else [unit]
    print(f"{self.title}: {len(self.units)} variants, {len(self.units) - len(waiting)} finished", flush=True)
    if self.dry_run:
      for unit in self.units:
        print(f"# {unit.number} {unit.state}".strip(), shlex.join(self._line(unit)), sep="\n")
    elif self.launcher == "slurm":
      for unit in waiting:
        self._queue(unit)
    else:
      self._run(waiting)

  def _line(self, unit):
    if self.launcher == "slurm":
      log = f"--output={unit.directory}/slurm-%j.out"
      return ["sbatch", "--parsable", log, str(ROOT / "launch" / "slurm.sbatch"), *unit.command]
    return [sys.executable, "-m", "alma_jax.main", *unit.command]

  def _run(self, units):
    slots, gpus = queue.Queue(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    share = max(1, len(gpus) // self.parallel)
    for i in range(self.parallel):
      mine = ",".join(gpus[i * share : (i + 1) * share])
      slots.put({"CUDA_VISIBLE_DEVICES": mine} if self.parallel > 1 and mine else {})

    def run(unit):
      slot = slots.get()
      print(f"{unit.number}: {unit.directory}", flush=True)
      unit.directory.mkdir(parents=True, exist_ok=True)
      # One at a time shows its progress here; several would write over each other.
      with open(unit.directory / "output.txt", "a") if self.parallel > 1 else open(os.devnull) as file:
        out = file if self.parallel > 1 else None
        done = subprocess.run(self._line(unit), env=os.environ | slot, stdout=out, stderr=out)
      slots.put(slot)
      unit.state = f"failed ({done.returncode})" if done.returncode else "finished"

    pool = concurrent.futures.ThreadPoolExecutor(self.parallel)
    try:
      for future in [pool.submit(run, unit) for unit in units]:
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)  # after Ctrl-C: start no others

  def _queue(self, unit):
    ticket = unit.directory / "slurm_job"
    if ticket.exists():
      found = subprocess.run(["squeue", "-h", "-o", "%T", "-j", ticket.read_text()], capture_output=True, text=True)
      unit.state = found.stdout.strip().lower()  # pending, running; nothing for a job that is gone
    if not unit.state:
      unit.directory.mkdir(parents=True, exist_ok=True)
      sent = subprocess.run(self._line(unit), check=True, stdout=subprocess.PIPE, text=True)
      ticket.write_text(sent.stdout.strip().partition(";")[0])
      unit.state = "queued"


def create_experiment(title, workdir, **options):
  return Experiment(title, workdir, **options)


def table(units):
  """Lines: every unit's last round, then the mean over seeds of what differs in the seed alone."""
  lines, groups = [f"{'':>3}  {'state':<12}{'round':>6}  {'score':<8}{'mean ± ci95':<16}{'n':>6}  overrides"], {}
  for unit in units:
    row, shown = unit.result(), _shown(unit.overrides)
    name = next((name for name in ("score", "judge_score") if row.get(name)), "")
    value = f"{float(row[name]):.3f} ± {float(row[name + '_ci95']):.3f}" if name else "-"
    kind = name.removesuffix("_score").replace("score", "truth")
    lines.append(
      f"{unit.number:>3}  {unit.state:<12}{row.get('round', '-'):>6}  {kind:<8}{value:<16}{row.get('n', '-'):>6}  {shown}"
    )
    if name and unit.state == "finished":
      key = _shown({k: v for k, v in unit.overrides.items() if k != "seed"}), kind
      groups.setdefault(key, []).append(float(row[name]))
  if any(len(scores) > 1 for scores in groups.values()):
    from scipy import stats

    lines += ["", "mean over seeds, with the t interval of 95 %"]
    for (shown, kind), scores in groups.items():
      n, mean = len(scores), sum(scores) / len(scores)
      sd = math.sqrt(sum((x - mean) ** 2 for x in scores) / max(1, n - 1))
      ci = f"± {stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n):.3f}" if n > 1 else ""
      lines.append(f"  {kind:<8}{mean:.3f} {ci:<9}{n} seeds  {shown}")
  return lines


def _flat(changes, leaves=(), prefix=""):
  """(dotted name, value) of nested overrides; a dict that is a value, such as `rounds`, stays one."""
  for key, value in changes.items():
    if isinstance(value, dict) and f"{prefix}{key}" not in leaves:
      yield from _flat(value, leaves, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _shown(overrides):
  return " ".join(f"{k}={v}" for k, v in _flat(overrides)) or "(as it is)"


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
    raise configs.ConfigError(f"{file} has no function sweep(add); see configs/ablations for examples")
  return module.sweep


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  flag = FLAGS["config"]
  try:
    job = Job(flag.config_filename, flag.parser.parse(flag.config_filename), FLAGS.config)
    title = pathlib.Path(job.file.partition(":")[0]).stem
    options = dict(launcher=FLAGS.launcher, parallel=FLAGS.parallel, dry_run=FLAGS.dry_run)
    with create_experiment(title, FLAGS.workdir, **options) as experiment:
      sweep_of(job.file)(lambda **overrides: experiment.add(job, overrides))
  except configs.ConfigError as e:
    sys.exit(f"error: {e}")
  if not FLAGS.dry_run:
    print("", *table(experiment.units), sep="\n")
  sys.exit(any(unit.state.startswith("failed") for unit in experiment.units))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=door.parse)
