"""Trackers: what they are told, that a restart goes on with the same run, and that none of them can stop a training."""

import json
import pathlib
import sqlite3
import time

import pytest

from alma_jax.options import ConfigError
from alma_jax.runtime import tracking
from alma_jax.store import layout
from alma_jax.store.runs import Run


class Fake:
  """A service that writes down what it is told; it fails as often as `failures` says."""

  def __init__(self, directory, name, config):
    if Fake.failures:
      Fake.failures -= 1
      raise ConnectionError("no route\nto host")
    Fake.opened.append((name, dict(config)))

  def log(self, values):
    if "bad/loss" in values:
      raise ValueError("a broken value")
    Fake.logged.append(values)

  def table(self, name, columns, rows):
    Fake.tables[name] = (columns, rows)

  def finish(self):
    Fake.finished += 1


@pytest.fixture
def fake(monkeypatch):
  Fake.failures, Fake.opened, Fake.logged, Fake.tables, Fake.finished = 0, [], [], {}, 0
  monkeypatch.setitem(tracking.SERVICES, "trackio", Fake)
  monkeypatch.setattr(tracking, "PAUSE", 0.01)
  return Fake


def follow(directory, said, begin=0):
  """A run with a stage, two steps of a training and an evaluation, as stages and recipes tell a Run."""
  with Run(directory) as run:
    tracker = tracking.Tracker("trackio", run.dir, {"seed": 0}, said.append)
    run.watchers.append(tracker)
    stage = run.stage("round_02/policy", {"x": 1})
    for step in (begin + 1, begin + 2):
      for watcher in run.watchers:
        watcher.step("round_02/policy", step, {"loss": 1.0 / step})
    stage.finish()
    run.progress({"round": 2, "checkpoint": "m", "truth": 7.5, "truth_ci95": 0.25})
    tracker.close()


def test_everything_is_told_and_a_restart_goes_on_with_the_same_run(fake, tmp_path):
  said = []
  follow(tmp_path / "run", said)
  assert fake.logged[:2] == [
    {"round_02.policy/step": 1, "round_02.policy/loss": 1.0},
    {"round_02.policy/step": 2, "round_02.policy/loss": 0.5},
  ]
  assert fake.logged[2]["stages/done"] == 1 and fake.logged[2]["stages/round_02.policy"] >= 0
  assert fake.logged[3] == {"eval/round": 2, "eval/truth": 7.5, "eval/truth_ci95": 0.25}
  columns = ["round", "checkpoint", "truth", "truth_ci95"]
  assert fake.tables == {"rounds": (columns, [["2", "m", "7.5", "0.25"]])}
  follow(tmp_path / "run", said, begin=2)  # the stage is there and the row is the same: neither is told again
  (first, config), (second, _) = fake.opened
  assert first == second and first.startswith("run-") and config == {"seed": 0}
  assert [values for values in fake.logged[4:]] == [
    {"round_02.policy/step": 3, "round_02.policy/loss": 1 / 3},
    {"round_02.policy/step": 4, "round_02.policy/loss": 0.25},
  ]
  assert fake.finished == 2 and not said


def test_a_service_that_is_down_is_a_line_and_gets_everything_later(fake, tmp_path):
  said = []
  fake.failures = 3
  follow(tmp_path / "run", said)
  assert said == ["trackio takes nothing (ConnectionError: no route); the run goes on without it"]
  assert len(fake.logged) == 4


def test_a_service_that_never_answers_does_not_stop_the_run(fake, tmp_path, monkeypatch):
  monkeypatch.setattr(tracking, "FAREWELL", 0.05)
  monkeypatch.setattr(tracking, "WAITING", 3)
  fake.failures, said, begin = 10**9, [], time.monotonic()
  follow(tmp_path / "run", said)
  assert time.monotonic() - begin < 5 and len(said) == 2
  assert said[1].startswith("trackio: ") and said[1].endswith(
    "entries were not taken; the run's own files hold them all"
  )


def test_a_value_that_is_refused_leaves_the_others(fake, tmp_path):
  said = []
  tracker = tracking.Tracker("trackio", tmp_path, {}, said.append)
  for stage in ("bad", "good"):
    tracker.step(stage, 1, {"loss": 2.0})
  tracker.close()
  assert fake.logged == [{"good/step": 1, "good/loss": 2.0}] and "ValueError: a broken value" in said[0]


def test_a_missing_package_is_an_error_at_the_start(monkeypatch):
  monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
  tracking.check("")
  with pytest.raises(ConfigError, match=r"config.track is 'wandb' .* pip install 'alma_jax\[wandb\]'"):
    tracking.check("wandb")


def test_no_tracker_enters_a_fingerprint():
  from alma_jax import options
  from alma_jax.recipes import alma

  field = next(field for field in alma.dataclasses.fields(alma.Options) if field.name == "track")
  assert field.default == "" and field.metadata["practical"] and options.fields_of(alma.Options)["track"]


def test_trackio_keeps_one_run_over_a_restart(tmp_path, monkeypatch):
  """With trackio itself, in its local store (pip install -e '.[trackio]')."""
  trackio_utils = pytest.importorskip("trackio.utils", reason="needs the extra [trackio]")
  import trackio.sqlite_storage as storage

  for module in (trackio_utils, storage):
    monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
  said = []
  follow(tmp_path / "run", said)
  follow(tmp_path / "run", said, begin=2)
  assert not said
  [database] = (tmp_path / "store").glob("alma_jax*.db")
  with sqlite3.connect(database) as rows:
    found = rows.execute("select run_name, metrics from metrics order by id").fetchall()
  assert {name for name, _ in found} == {tracking.name_of(tmp_path / "run")}
  values = [json.loads(text) for _, text in found]
  assert [v["round_02.policy/loss"] for v in values if "round_02.policy/loss" in v] == [1.0, 0.5, 1 / 3, 0.25]
  assert [v["eval/truth"] for v in values if "eval/truth" in v] == [7.5]


def test_wandb_gets_the_calls_that_it_documents(tmp_path, monkeypatch):
  """A stand-in for the package: one run by its id, resumed; every training counts its own steps."""
  calls = []

  class Made:
    def __getattr__(self, name):
      return lambda *given, **how: calls.append((name, given, how)) or Made()

  monkeypatch.setitem(__import__("sys").modules, "wandb", Made())
  service = tracking.Wandb(pathlib.Path("run"), "run-12", {"seed": 0})
  service.log({"sft_1/step": 1, "sft_1/loss": 2.0})
  service.log({"eval/round": 2, "eval/truth": 7.0})
  service.table("rounds", ["round"], [["2"]])
  [(_, _, how), *rest] = calls
  assert (how["id"], how["resume"], how["project"]) == ("run-12", "allow", "alma_jax")
  assert ("define_metric", ("sft_1/*",), {"step_metric": "sft_1/step"}) in rest
  assert ("define_metric", ("eval/*",), {"step_metric": "eval/round"}) in rest
  assert ("Table", (), {"columns": ["round"], "data": [["2"]]}) in rest and layout.TRACKED not in str(calls)
