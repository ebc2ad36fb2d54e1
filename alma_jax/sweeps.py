"""The sweep of a config file: its variants expanded, checked, placed in directories of their own, and compared.

  def sweep(add):                                    # stands in the config file, next to what it varies
    for seed in range(3):
      add(seed=seed, responses=dict(n=4))            # the form of a round's overrides

  units = expand(shared, "runs/table7")
  units[0].arguments                                 # for alma_jax.main, each a ready text
  print(*table(units), sep="\\n")                     # last rounds, means over seeds, paired differences

launch/ runs the units: sweep.py on this machine or in a Slurm array, xm.py through XManager.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alma_jax import config_files
from alma_jax.options import ConfigError, leaves, nearest
from alma_jax.report import graded
from alma_jax.store import layout, statistics

Overrides = Mapping[str, Any]  # nested, as `add` takes them: {"seed": 1, "responses": {"n": 4}}
Check = Callable[[ConfigDict], object]  # raises a ConfigError


@dataclasses.dataclass(frozen=True)
class Unit:
  """One variant: what it changes, its whole config, and where it runs."""

  number: int
  overrides: Overrides
  config: ConfigDict
  arguments: tuple[str, ...]  # for alma_jax.main
  directory: pathlib.Path

  def state(self) -> str:
    """ "finished" if the directory holds a finished run of exactly this config, "begun" if it holds a run, else ""."""
    config = layout.config_in(self.directory) if self.directory.is_dir() else None
    wanted = json.loads(json.dumps(self.config.to_dict(), default=str))
    if config == wanted and layout.finished(self.directory):
      return "finished"
    return "begun" if config else ""

  def fields(self) -> dict[str, Any]:
    """The unit as JSON, for launchers that read the list."""
    return {
      "number": self.number,
      "overrides": json.loads(json.dumps(self.overrides, default=str)),
      "directory": str(self.directory),
      "arguments": list(self.arguments),
      "state": self.state(),
    }


@dataclasses.dataclass(frozen=True)
class Shared:
  """What all units share: a config file, and its values with and without those of the command line."""

  file: str
  default: ConfigDict  # what the file gives
  config: ConfigDict  # the same with --config.NAME=VALUE applied
  check: Check

  def resolved(self, overrides: Overrides) -> tuple[ConfigDict, tuple[str, ...]]:
    """The whole config of a unit and the flags that make it; ConfigError if an override is invalid."""
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
    self.check(config)
    said = [n for n in sorted(fields) if n in flat or _plain(_get(config, n)) != _plain(_get(self.default, n))]
    return config, tuple(f"--config.{name}={_plain(_get(config, name))}" for name in said)


def expand(shared: Shared, workdir: str | pathlib.Path, alone: bool = False) -> list[Unit]:
  """The units of the file's `sweep`, all of them checked; a ConfigError names the unit that is wrong. With `alone` a
  file without a sweep is a single unit, which runs in `workdir` itself."""
  units: list[Unit] = []
  sweep = _sweep_of(shared.file)
  if sweep is None and alone:
    config, said = shared.resolved({})
    arguments = (f"--config={shared.file}", f"--workdir={workdir}", *said)
    return [Unit(1, {}, config, arguments, pathlib.Path(workdir))]
  if sweep is None:
    raise ConfigError(f"{shared.file} has no function sweep(add); configs/ablations/ shows some")

  def add(**overrides: Any) -> None:
    number = len(units) + 1
    try:
      config, said = shared.resolved(overrides)
      if same := [unit.number for unit in units if unit.overrides == overrides]:
        raise ConfigError(f"it is the same as work unit {same[0]}")
    except ConfigError as e:
      raise ConfigError(f"sweep, work unit {number} ({shown(overrides)}): {e}") from None
    directory = _directory(pathlib.Path(workdir), number, overrides)
    arguments = (f"--config={shared.file}", f"--workdir={directory}", *said)
    units.append(Unit(number, overrides, config, arguments, directory))

  sweep(add)
  return units


def _directory(workdir: pathlib.Path, number: int, overrides: Overrides) -> pathlib.Path:
  """runs/t5/04_seed=0,n=4_1a2b3c. Numbers change when units are added before this one: the digest finds it again."""
  summary = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in _flat(overrides))
  digest = hashlib.sha256(json.dumps(overrides, sort_keys=True, default=str).encode()).hexdigest()[:6]
  name = f"{number:02d}_{re.sub(r'[^A-Za-z0-9.,=_]+', '-', summary)[:60]}_{digest}"
  return next(iter(sorted(workdir.glob(f"[0-9]*_{digest}"))), workdir / name)


def _sweep_of(file: str) -> Callable[[Callable[..., None]], None] | None:
  """The function `sweep` of a config file, None for one that has none."""
  spec = importlib.util.spec_from_file_location("sweep_config", file.partition(":")[0])
  assert spec and spec.loader, f"{file} is no Python file"  # the flag's parser has loaded it already
  module = importlib.util.module_from_spec(spec)
  with config_files.importable(file):
    spec.loader.exec_module(module)
  return getattr(module, "sweep", None)


# What came out


@dataclasses.dataclass(frozen=True)
class Result:
  """The last evaluated round of a finished unit, or the epoch that it chose, by one judge."""

  unit: Unit
  judge: str  # its identity, or its name in progress.csv if the run does not say
  score: float
  by_prompt: Mapping[str, float]  # {} if the answers are gone
  seconds: float  # of devices, for the whole run

  @property
  def variant(self) -> str:
    return shown({name: value for name, value in self.unit.overrides.items() if name != "seed"})

  @property
  def seed(self) -> object:
    return self.unit.overrides.get("seed")


def table(units: Sequence[Unit], states: Mapping[int, str] | None = None) -> list[str]:
  """Lines to print: the last round of every unit, means over units that differ only in the seed, and every variant's
  difference to the first. `states` says more than the directories, such as "failed (1)", by the unit's number."""
  head = f"{'':>3}  {'state':<12}{'round':>6}{'n':>6}  {'scored by':<10}{'score ± ci95':<16}{'device-s':>8}  overrides"
  lines = [head]
  results: list[Result] = []
  for unit in units:
    row, asked = _evaluated(unit.directory)
    prefix = f"{asked}/" if asked else ""
    by = next((name for name in graded.judges([row], asked) if row[prefix + name]), "-")
    value = f"{float(row[prefix + by]):.3f} ± {float(row[f'{prefix}{by}_ci95']):.3f}" if by != "-" else "-"
    state = (states or {}).get(unit.number) or unit.state()
    start = f"{unit.number:>3}  {state:<12}{row.get('round', '-'):>6}{row.get(f'{prefix}n', '-'):>6}"
    seconds = device_seconds(unit.directory)
    lines.append(f"{start}  {by:<10}{value:<16}{seconds:>8,.0f}  {shown(unit.overrides)}")
    if state == "finished" and by != "-":
      results.append(_result(unit, row, asked, by, seconds))
  return lines + _means(results) + _differences(results)


def device_seconds(run: pathlib.Path) -> float:
  """The seconds of all stages of a run, finished at any start, times the devices that it last ran on."""
  starts = [row for row in layout.json_lines(run / layout.LOG) if row.get("event") == "start"]
  devices = len(starts[-1].get("devices", ())) if starts else 0
  return max(1, devices) * sum(s.manifest.get("seconds", 0.0) for s in layout.stages(run) if s.manifest)


def _evaluated(run: pathlib.Path) -> tuple[dict[str, str], str]:
  """The row of the last round, or of the epoch that the run chose, and the set of prompts that counts."""
  rows, chosen = layout.progress(run), layout.chosen_epoch(run)
  row = [{}, *(row for row in rows if chosen is None or row["round"] == str(chosen))][-1]
  return row, layout.TEST_SET if chosen is not None and row.get(f"{layout.TEST_SET}/n") else layout.MAIN_SET


def _result(unit: Unit, row: Mapping[str, str], asked: str, by: str, seconds: float) -> Result:
  grader, found = graded.grader(unit.directory, by), graded.read(unit.directory, int(row["round"]), asked)
  score = float(row[f"{asked}/{by}" if asked else by])
  scores = dict(zip(found.prompts, found.scores[by].tolist(), strict=True)) if found and by in found.scores else {}
  return Result(unit, grader.identity if grader else by, score, scores, seconds)


def _means(results: Sequence[Result]) -> list[str]:
  groups: dict[tuple[str, str], list[Result]] = {}
  for result in results:
    groups.setdefault((result.judge, result.variant), []).append(result)
  lines = []
  for (judge, variant), found in groups.items():
    mean = statistics.student([result.score for result in found])
    if mean and mean.n > 1:
      seconds = sum(result.seconds for result in found) / mean.n
      lines.append(f"  {judge}  {mean.value:.3f} ± {mean.ci95:.3f}  n = {mean.n}  {seconds:,.0f} device-s  {variant}")
  return ["", "Means over seeds, with the 95 % interval of Student's t:", *lines] if lines else []


def _differences(results: Sequence[Result]) -> list[str]:
  """Every variant minus the first, over the prompts and the seeds that both have, by one and the same judge."""
  variants: dict[str, dict[object, Result]] = {}
  for result in results:
    variants.setdefault(result.variant, {})[result.seed] = result
  if len(variants) < 2:
    return []
  (first, base), *others = variants.items()
  lines = ["", f"Paired differences to: {first}"]
  p_values = {}
  for variant, found in others:
    seeds = [s for s in found if s in base and found[s].judge == base[s].judge]
    if not seeds:
      common = [s for s in found if s in base]
      why = "each has a judge of its own" if common else "no seed in common"
      lines.append(f"  not compared ({why})  {variant}")
      continue
    by_seed = [_by_prompt(found[s], base[s]) for s in seeds]
    means = np.array([values.mean() if len(values) else np.nan for values, _ in by_seed])
    if np.isnan(means).any():  # the answers of a run are gone: its mean is still in progress.csv
      means = np.array([found[s].score - base[s].score for s in seeds])
    over_seeds = statistics.student(means)
    values, prompts = (np.concatenate(column) for column in zip(*by_seed, strict=True))
    over_prompts = statistics.clustered(values, prompts)
    parts = [f"{over_seeds.value if over_seeds else 0.0:+.3f}"]
    if over_prompts and over_prompts.ci95 is not None:
      parts.append(f"± {over_prompts.ci95:.3f} over {len(set(prompts))} prompts")
    if over_seeds and over_seeds.ci95 is not None:
      parts.append(f"± {over_seeds.ci95:.3f} over {over_seeds.n} seeds")
    sample = means if len(means) > 1 else values
    if len(sample) > 1:
      p_values[len(lines)] = statistics.p_value(sample)
    lines.append(f"  {' '.join(parts)}  {variant}")
  for at, p in zip(p_values, statistics.holm(list(p_values.values())), strict=True):
    lines[at] += f"  (p {p:.3f})"
  if p_values:
    lines.append("  p: of a difference of 0, over seeds if there are several, adjusted by Holm for all variants")
  return lines


def _by_prompt(these: Result, those: Result) -> tuple[np.ndarray, np.ndarray]:
  """The differences of the prompts that both have scores of, and those prompts' ids."""
  found = {p: x - those.by_prompt[p] for p, x in these.by_prompt.items() if p in those.by_prompt}
  found = {prompt: x for prompt, x in found.items() if np.isfinite(x)}
  return np.array(list(found.values()), np.float64), np.array(list(found), dtype=str)


# Overrides


def shown(overrides: Overrides) -> str:
  """Overrides in words: "seed=1 responses.n=4"."""
  return " ".join(f"{name}={value}" for name, value in _flat(overrides)) or "(unchanged)"


def _flat(changes: Overrides, whole: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The dotted names and values of nested overrides. A dict whose name is in `whole` is one value."""
  for key, value in changes.items():
    if isinstance(value, dict) and f"{prefix}{key}" not in whole:
      yield from _flat(value, whole, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _get(config: Any, path: str) -> Any:
  return functools.reduce(lambda node, key: node[key], filter(None, path.split(".")), config)


def _plain(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ConfigDict) else value
