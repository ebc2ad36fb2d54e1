"""The numbers of a run, read from its directory at any moment of its life: what is missing yet is None or empty.

  state(run).word                                "running"
  progress(run)[-1]["judge"]                     8.14

The numbers of a round's responses are in `judged`, those of its evaluation in `graded`.
"""

import dataclasses
import math
import pathlib
import time
from typing import Any

import numpy as np

from alma_jax.errors import Waiting
from alma_jax.report import graded, judged, wording
from alma_jax.store import layout, shards, statistics, verify
from alma_jax.store import lock as lock_file
from alma_jax.store.statistics import Mean


@dataclasses.dataclass(frozen=True)
class State:
  word: str  # finished, running, waiting, failed, stopped, empty
  error: str  # of a failed run; what a waiting one waits for
  round: int | None  # the last one that was evaluated
  rounds: int | None  # the last one that the config asks for
  start: dict[str, Any]  # the log's last "start"
  at: str  # time of the last event


@dataclasses.dataclass(frozen=True)
class Losses:
  """The loss of a training, as means over consecutive steps."""

  steps: list[float]
  losses: list[float]
  last: Mean  # over the last tenth of the steps


@dataclasses.dataclass(frozen=True)
class Facts:
  """What several parts of the page show, read once."""

  run: pathlib.Path
  config: dict[str, Any]
  state: State
  stages: list[layout.Found]
  progress: list[dict[str, Any]]
  answers: dict[int, graded.Answers]  # by round
  rounds: dict[int, judged.Round]
  damage: list[str]  # what could not be read

  @property
  def step(self) -> str:
    """What the run's recipe calls a round."""
    return wording.step(self.config)

  def manifest(self, name: str) -> dict[str, Any] | None:
    return next((s.manifest for s in self.stages if s.name == name), None)

  def manifests(self, artefact: str) -> dict[int, dict[str, Any]]:
    """The manifests of this artefact by round, as far as the rounds have finished it."""
    found = {r: self.manifest(layout.stage_name(r, artefact)) for r in layout.rounds(self.run)}
    return {r: m for r, m in found.items() if m}


def facts(run: pathlib.Path, error: BaseException | None = None) -> Facts:
  """`error` is what is ending the run just now."""
  stages = layout.stages(run)
  evaluated, rounds, damage = {}, {}, []
  for r in layout.rounds(run):
    for read, found in ((graded.read, evaluated), (judged.read, rounds)):
      try:
        if (value := read(run, r)) is not None:
          found[r] = value
      except Exception as e:  # what is lost of a round leaves the rest of the page
        damage.append(f"Round {r} cannot be read: {type(e).__name__}: {e}")
  damage += [f"Round {r} cannot be read: {text}" for r, found in rounds.items() for text in found.damage]
  return Facts(run, config(run), state(run, stages, error), stages, progress(run), evaluated, rounds, damage)


def state(run: pathlib.Path, stages: list[layout.Found], error: BaseException | None = None) -> State:
  """How far the run is. `error` is what is ending it just now."""
  log = layout.json_lines(run / layout.LOG)
  turns = [row for row in log if row.get("event") in ("start", "end", "failed", "waiting")]
  last = turns[-1] if turns else {}
  wanted = config(run).get("feedback_rounds")
  evaluated = [s.name for s in stages if s.manifest and layout.kind_of(s.name) == layout.grades_name(layout.EVALUATION)]
  reached = max((r for name in evaluated if (r := layout.round_of(name)) is not None), default=None)
  target = wanted + 1 if isinstance(wanted, int) else None
  if error is not None:
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    word = "waiting" if isinstance(error, Waiting) else "stopped" if stopped else "failed"
  elif last.get("event") in ("end", "failed", "waiting"):
    word = "finished" if last["event"] == "end" else str(last["event"])
  elif target is not None and reached is not None and reached >= target:
    word = "finished"
  elif _is_held(run / layout.LOCK):
    word = "running"
  else:
    word = "stopped" if turns else "empty"
  text = str(last.get("error", "")) if word == "failed" else str(last.get("what", "")) if word == "waiting" else ""
  if error is not None and word in ("failed", "waiting"):
    text = f"{type(error).__name__}: {error}" if word == "failed" else str(error)
  start = next((row for row in reversed(log) if row.get("event") == "start"), {})
  times = [row["time"] for row in log if "time" in row]
  times += [s.manifest["finished_at"] for s in stages if s.manifest]
  return State(word, text, reached, target, start, max(times, default=""))


def config(run: pathlib.Path) -> dict[str, Any]:
  return layout.config_in(run) or {}


def progress(run: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of progress.csv by round, with numbers as numbers; a cell without a finite value is left out."""
  rows = [{key: _number(text) for key, text in row.items() if key and text} for row in layout.progress(run)]
  rows = [{k: v for k, v in row.items() if isinstance(v, str) or math.isfinite(v)} for row in rows]
  return sorted((row for row in rows if isinstance(row.get("round"), int)), key=_round_of_row)


def stage_report(run: pathlib.Path, name: str) -> dict[str, Any] | None:
  """The report.json of a finished stage."""
  path = run / name / layout.REPORT
  if not (layout.manifest_of(run, name) and path.exists()):
    return None
  verify.check(path)
  return layout.read_json(path)


def cluster_sizes(run: pathlib.Path) -> np.ndarray | None:
  """[clusters] The number of prompts in each cluster that has any, of the pool and of what was added to it."""
  names = [layout.pool_stage(round, layout.CLUSTERS) for round in layout.pools(run)]
  stages = [run / name for name in names if layout.manifest_of(run, name)]
  if not stages:
    return None
  sizes = np.zeros(0, int)
  for stage in stages:
    found = np.bincount(shards.load_array(stage / "labels.npy"))
    sizes = np.pad(sizes, (0, max(0, len(found) - len(sizes))))
    sizes[: len(found)] += found
  return sizes[sizes > 0]


def losses(stage: layout.Found, points: int = 150) -> Losses | None:
  verify.check(stage.dir / layout.METRICS)
  rows = [row for row in layout.json_lines(stage.dir / layout.METRICS) if "loss" in row and "step" in row]
  if not rows:
    return None
  step, loss = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows], np.float64)
  pieces = np.array_split(np.arange(len(rows)), min(points, len(rows)))
  last = statistics.mean(loss[-max(5, len(loss) // 10) :])
  assert last
  return Losses([float(step[p].mean()) for p in pieces], [float(loss[p].mean()) for p in pieces], last)


def done_so_far(stage: layout.Found) -> str:
  """What an unfinished stage has on disk, in words."""
  parts = sorted(path.stem for path in stage.dir.glob("part-*.json"))
  if parts:
    return f"{len(parts)} of {int(parts[0].rpartition('-')[2])} parts"
  steps = layout.json_lines(stage.dir / layout.METRICS)
  return f"{steps[-1].get('step', len(steps))} steps" if steps else "begun"


def _number(text: str) -> int | float | str:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return text


def _round_of_row(row: dict[str, Any]) -> int:
  return row["round"]


def _is_held(lock: pathlib.Path) -> bool:
  """True if a process keeps touching the run's lock."""
  try:
    return time.time() - lock.stat().st_mtime < lock_file.SILENCE
  except FileNotFoundError:
    return False
