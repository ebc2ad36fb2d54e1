"""Runs: a killed run ends like an uninterrupted one; a changed one, or two at once, are refused by name."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from alma_jax.store import lock as lock_lib
from alma_jax.store import records, runs, shards

N = 3
FIELDS = {"config": {"responses": {"temperature": 0.7, "stop": ("a", "b")}}, "text.judge_template": "ab12"}


class Crash(BaseException):
  """Stands for the process being killed: nothing catches it."""


def rows(i):
  return [records.Judgment(f"{i:016x}", k, i + k / 3, (0.5, 0.5), 1.0) for k in range(i + 1)]


def do_responses(run, name="round_02/responses", fields=FIELDS, inputs=None):
  stage = run.stage(name, fields, inputs)
  if not stage.done:
    for i in stage.mine(N):
      stage.write_part(i, N, rows(i), records.Judgment, counts={"seen": 2, "dropped": {"long": i}})
    shards.save_array(stage.dir / "weights.npy", np.arange(4))
    stage.finish(counts={"dropped": {"tied": 5}}, files=["weights.npy"], note="hello")
  return stage


def whole_run(workdir):
  with runs.Run(workdir) as run:
    run.save_config({"a": (1, 2)})
    first = do_responses(run)
    second = do_responses(run, "round_02/judgments", inputs={"responses": first})
    run.progress({"round": 2, "score": 7.5})
  return first.manifest["content"], second.manifest["content"]


def artefacts(workdir):
  """Every file that must not depend on when the run was killed, with its content; times left out."""
  found = {}
  for path in sorted(p for p in workdir.rglob("*") if p.is_file()):
    content = path.read_bytes()
    if path.name == "manifest.json":
      content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "finished_at", "seal")}
    found[path.relative_to(workdir).as_posix()] = content
  return found


def test_an_uninterrupted_stage(tmp_path):
  with runs.Run(tmp_path) as run:
    stage = do_responses(run)
  manifest = json.loads((tmp_path / "round_02/responses/manifest.json").read_text())
  assert manifest == stage.manifest
  assert manifest["counts"] == {"seen": 6, "dropped": {"long": 3, "tied": 5}}
  assert manifest["fingerprint"] == {
    "config.responses.temperature": 0.7,
    "config.responses.stop": ["a", "b"],
    "text.judge_template": "ab12",
    "format": records.FORMAT,
  }
  assert manifest["stage"] == "round_02/responses"
  assert manifest["note"] == "hello"
  assert manifest["rows"] == 6
  assert [p["rows"] for p in manifest["parts"]] == [1, 2, 3]
  for part in manifest["parts"]:
    assert part["digest"] == shards.digest(stage.dir / part["name"])
  assert manifest["files"]["weights.npy"]["digest"] == shards.digest(stage.dir / "weights.npy")
  assert runs.read_stage(stage.dir, records.Judgment) == rows(0) + rows(1) + rows(2)
  assert runs.read_stage(stage.dir, records.Judgment, 1) == rows(1)
  assert stage.parts == N and stage.content == manifest["content"]
  assert not (stage.dir / "seconds.json").exists()


def test_an_artefact_is_a_finished_stage_with_its_records(tmp_path):
  with runs.Run(tmp_path) as run:
    with pytest.raises(RuntimeError, match="stage s is read before it is finished"):
      runs.Artefact(run.stage("s", FIELDS), records.Judgment)
    found = runs.Artefact(do_responses(run), records.Judgment)
    later = run.stage("later", {}, {"one": found, "other": found.dir})
  everything = rows(0) + rows(1) + rows(2)
  assert found.read() == everything and found.read(1) == rows(1)
  assert (found.name, found.dir, found.parts, found.sizes) == (
    "round_02/responses", tmp_path / "round_02/responses", N, [1, 2, 3],
  )  # fmt: skip
  assert [path.name for path in found.paths] == [shards.part_name(i, N) for i in range(N)]
  assert found.rows(np.array([5, 0, 2, 2, 1])) == [everything[i] for i in (5, 0, 2, 2, 1)]
  assert found.rows(np.zeros(0, int)) == []
  assert found.ids().tolist() == [0, 1, 1, 2, 2, 2]
  assert found.content == found.manifest["content"]
  assert {later.fingerprint[f"input.{name}"] for name in ("one", "other")} == {found.content}


def test_a_manifest_says_what_it_was_made_with_and_its_content_does_not_depend_on_it(tmp_path):
  contents = set()
  for name, made_with in (("one", None), ("other", {"jax": "9", "devices": ["TPU v9"]})):
    with runs.Run(tmp_path / name, made_with=made_with) as run:
      manifest = do_responses(run).manifest
    assert manifest["made_with"] == (made_with or {})
    contents.add(manifest["content"])
  assert len(contents) == 1


@pytest.mark.parametrize(("made", "version"), [(1, "alma_jax 0.1;"), (99, "alma_jax of a later version;")])
def test_a_run_of_another_format_is_refused_in_one_line_and_stays(made, version, tmp_path):
  content, _ = whole_run(tmp_path)
  for path in tmp_path.rglob("fingerprint.json"):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": made}))
  before = artefacts(tmp_path)
  with pytest.raises(runs.RunError) as error:
    whole_run(tmp_path)
  text = str(error.value)
  assert version in text and str(tmp_path) in text and "--workdir" in text and len(text.splitlines()) == 1
  assert artefacts(tmp_path) == before
  assert runs.load_manifest(tmp_path / "round_02/responses")["content"] == content
  assert runs.read_stage(tmp_path / "round_02/responses", records.Judgment, 0) == rows(0)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_anywhere_ends_like_an_uninterrupted_one(moment, tmp_path, monkeypatch):
  """Every rename of the whole run is a point of death in turn, then the same command is started again."""
  contents = whole_run(tmp_path / "whole")
  expected = artefacts(tmp_path / "whole")
  replace, calls = os.replace, []

  def count(source, target):
    calls.append(target)
    replace(source, target)

  monkeypatch.setattr(os, "replace", count)
  whole_run(tmp_path / "counted")
  total = len(calls)
  assert total > 20

  for death in range(total):
    calls.clear()
    workdir = tmp_path / f"killed_{death}"

    def die(source, target):
      calls.append(target)
      if moment == "after" or len(calls) - 1 != death:
        replace(source, target)
      if len(calls) - 1 == death:
        raise Crash

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Crash):
      whole_run(workdir)
    monkeypatch.setattr(os, "replace", replace)
    assert whole_run(workdir) == contents
    assert artefacts(workdir) == expected


def test_a_run_killed_by_the_system_goes_on(tmp_path):
  """A real SIGKILL in the middle of a part: lock, temporary file and half a stage are left behind."""
  script = """
import os, signal, sys
sys.path[:0] = sys.argv[2:4]
import test_store_runs as t
from alma_jax.store import shards
replace = os.replace
def die(source, target):
  if str(target).endswith("part-00001-of-00003.parquet"):
    os.kill(os.getpid(), signal.SIGKILL)
  replace(source, target)
os.replace = die
t.whole_run(sys.argv[1])
"""
  here = os.path.dirname(os.path.abspath(__file__))
  command = [sys.executable, "-c", script, str(tmp_path / "killed"), here, os.path.dirname(here)]
  killed = subprocess.run(command, capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  left = [p.name for p in (tmp_path / "killed").rglob(".*")]
  assert ".lock" in left
  assert any(name.endswith(".tmp") for name in left)
  assert whole_run(tmp_path / "killed") == whole_run(tmp_path / "whole")
  assert artefacts(tmp_path / "killed") == artefacts(tmp_path / "whole")


def test_only_missing_parts_are_written_again(tmp_path):
  with runs.Run(tmp_path) as run:
    stage = run.stage("s", FIELDS)
    for i in range(N):
      stage.write_part(i, N, rows(i), records.Judgment)
    before = stage.part_path(0, N).stat()
    stage.part_path(1, N).with_suffix(".json").unlink()  # killed between part and sidecar
    stage.part_path(2, N).write_bytes(b"cut short")
  with runs.Run(tmp_path) as run:
    stage = run.stage("s", FIELDS)
    assert stage.missing(N) == [1, 2]
    with pytest.raises(RuntimeError, match=r"without part-00001-of-00003.parquet"):
      stage.finish()
    assert not stage.done
    for i in stage.mine(N):
      stage.write_part(i, N, rows(i), records.Judgment)
    stage.finish()
    after = stage.part_path(0, N).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_part_never_keeps_the_sidecar_of_an_earlier_one(tmp_path, monkeypatch):
  def part(score):
    return [records.Judgment("0" * 16, 0, score, (), 1.0)]

  with runs.Run(tmp_path) as run:
    stage = run.stage("s", FIELDS)
    stage.write_part(0, 1, part(1.0), records.Judgment)
    size, replace = stage.part_path(0, 1).stat().st_size, os.replace

    def die(source, target):
      if str(target).endswith(".json"):
        raise Crash
      replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Crash):
      stage.write_part(0, 1, part(2.0), records.Judgment)
    assert stage.part_path(0, 1).stat().st_size == size  # so the size alone would not tell
    assert stage.missing(1) == [0]


def test_a_done_stage_is_left_alone(tmp_path):
  whole_run(tmp_path)
  stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "progress.csv"}
  whole_run(tmp_path)
  assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
  with runs.Run(tmp_path) as run:
    stage = do_responses(run)
    with pytest.raises(RuntimeError, match="is done"):
      stage.write_part(0, N, rows(0), records.Judgment)


def refused(workdir, fields, inputs=None, parts=N):
  with runs.Run(workdir) as run, pytest.raises(runs.RunError) as error:
    run.stage("round_02/responses", fields, inputs).missing(parts)
  return str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_a_change_is_named_and_nothing_is_touched(finished, tmp_path):
  with runs.Run(tmp_path) as run:
    if finished:
      do_responses(run)
    else:
      run.stage("round_02/responses", FIELDS).write_part(0, N, rows(0), records.Judgment)
  before = artefacts(tmp_path)

  changed = json.loads(json.dumps(FIELDS))
  changed["config"]["responses"]["temperature"] = 1.0
  text = refused(tmp_path, changed)
  assert "config.responses.temperature: 0.7 -> 1.0" in text
  assert "stage round_02/responses" in text
  assert str(tmp_path) in text
  assert "--workdir" in text
  assert f"delete {tmp_path / 'round_02' / 'responses'}" in text
  assert "text.judge_template" not in text

  assert "seed: (not set) -> 3" in refused(tmp_path, FIELDS | {"seed": 3})
  assert "limit: (not set) -> null" in refused(tmp_path, FIELDS | {"limit": None})
  gone = refused(tmp_path, {"config": FIELDS["config"]})
  assert 'text.judge_template: "ab12" -> (not set)' in gone
  assert "number of parts: 3 -> 4" in refused(tmp_path, FIELDS, parts=4)
  assert artefacts(tmp_path) == before


def test_long_values_are_cut_to_where_they_differ(tmp_path):
  old, new = ({"template": "x" * 500 + word + "y" * 500} for word in ("old", "new"))
  with runs.Run(tmp_path) as run:
    run.stage("round_02/responses", old).write_part(0, N, rows(0), records.Judgment)
  line = next(line for line in refused(tmp_path, new).splitlines() if "template" in line)
  assert "xold" in line
  assert "xnew" in line
  assert len(line) < 160


def test_a_change_of_an_input_is_named_and_an_equal_input_is_not(tmp_path):
  with runs.Run(tmp_path) as run:
    one = do_responses(run, "one")
    same = do_responses(run, "elsewhere")
    other = do_responses(run, "other", FIELDS | {"seed": 3})
    assert one.manifest["content"] == same.manifest["content"] != other.manifest["content"]
    do_responses(run, inputs={"prompts": one})
    assert do_responses(run, inputs={"prompts": tmp_path / "elsewhere"}).done
  assert "input.prompts: " in refused(tmp_path, FIELDS, {"prompts": tmp_path / "other"})
  with pytest.raises(runs.RunError, match="holds no finished stage"):
    runs.load_manifest(tmp_path / "nowhere")


def test_the_content_depends_on_parts_and_files_and_not_on_time(tmp_path):
  def content(name, part, value):
    with runs.Run(tmp_path / name) as run:
      stage = run.stage("s", FIELDS)
      stage.write_part(0, 1, rows(part), records.Judgment)
      shards.save_array(stage.dir / "x.npy", np.array([value]))
      return stage.finish(files=["x.npy"])["content"]

  assert content("a", 0, 0) == content("b", 0, 0)
  assert len({content("c", 0, 0), content("d", 1, 0), content("e", 0, 1)}) == 3


def test_before_any_work_a_changed_config_is_simply_taken(tmp_path):
  with runs.Run(tmp_path) as run:
    run.stage("s", {"batch": 64})
    run.stage("s", {"batch": 32})
    stage = do_responses(run, "s", {"batch": 32})
  assert stage.manifest["fingerprint"]["batch"] == 32


def test_lost_or_changed_files_of_a_done_stage_are_named(tmp_path):
  whole_run(tmp_path)
  directory = tmp_path / "round_02" / "responses"
  with open(directory / "weights.npy", "ab") as file:
    file.write(b"more")
  text = refused(tmp_path, FIELDS)
  assert "weights.npy has 164 bytes instead of 160" in text
  (directory / "part-00001-of-00003.parquet").unlink()
  assert "part-00001-of-00003.parquet is missing" in refused(tmp_path, FIELDS)
  (directory / "manifest.json").write_text("{")
  assert "manifest.json is damaged" in refused(tmp_path, FIELDS)


def test_a_registered_file_must_exist_and_counts_must_add_up(tmp_path):
  with runs.Run(tmp_path) as run:
    stage = run.stage("s", FIELDS)
    with pytest.raises(RuntimeError, match=r"without its file model.safetensors"):
      stage.finish(files=["model.safetensors"])
    for i in range(2):
      stage.write_part(i, 2, rows(i), records.Judgment, counts={"n": np.int64(2), "x": np.float32(0.5), "why": "w"})
    with pytest.raises(RuntimeError, match="'why' is 'w'"):
      stage.finish()
    for i in range(2):
      stage.write_part(i, 2, rows(i), records.Judgment, counts={"n": np.int64(2), "x": np.float32(0.5)})
    with pytest.raises(RuntimeError, match="seconds"):
      stage.finish(seconds=3)
    assert stage.finish(counts={"n": np.int64(1)})["counts"] == {"n": 5, "x": 1.0}


def test_seconds_add_up_over_restarts(tmp_path):
  spent = 0.0
  for _ in range(2):
    with runs.Run(tmp_path) as run:
      stage = run.stage("s", FIELDS)
      begin = time.monotonic()
      time.sleep(0.2)
      spent += time.monotonic() - begin
      stage.beat()
    time.sleep(0.3)  # not running
  with runs.Run(tmp_path) as run:
    seconds = run.stage("s", FIELDS).finish()["seconds"]
  assert spent - 0.01 <= seconds < spent + 0.3


def test_hosts_share_the_parts_and_host_0_writes_the_manifest(tmp_path):
  """Three threads stand for three processes, each with its own Run on the shared directory."""
  alone = tmp_path / "alone"
  with runs.Run(alone) as run:
    expected = do_responses(run).manifest["content"]
  barrier, names, results, wrote = threading.Barrier(3), [], {}, {}

  def host(h):
    def wait(name):
      names.append((h, name))
      barrier.wait(timeout=20)

    with runs.Run(tmp_path / "shared", process=h, processes=3, barrier=wait) as run:
      stage = run.stage("round_02/responses", FIELDS)
      wrote[h] = stage.mine(N)
      if h == 0:
        shards.save_array(stage.dir / "weights.npy", np.arange(4))
      for i in wrote[h]:
        counts = {"seen": 2, "dropped": {"long": i}}
        stage.write_part(i, N, rows(i), records.Judgment, counts)
      run.log("done", host=h)
      run.progress({"round": h})
      run.save_config({"host": h})
      results[h] = stage.finish({"dropped": {"tied": 5}}, ["weights.npy"], note="hello")["content"]

  threads = [threading.Thread(target=host, args=(h,)) for h in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert wrote == {0: [0], 1: [1], 2: [2]}
  assert results == {h: expected for h in range(3)}
  assert sorted(set(n for _, n in names)) == ["round_02/responses: finished", "round_02/responses: written"]
  assert len((tmp_path / "shared/log.jsonl").read_text().splitlines()) == 1
  assert json.loads((tmp_path / "shared/config.json").read_text()) == {"host": 0}
  assert (tmp_path / "shared/progress.csv").read_text() == "round\n0\n"


def test_another_number_of_hosts_takes_over_the_missing_parts(tmp_path):
  with runs.Run(tmp_path) as run:
    run.stage("s", FIELDS).write_part(1, 5, rows(1), records.Judgment)
  shares = [runs.Run(tmp_path, process=h, processes=3).stage("s", FIELDS).mine(5) for h in (1, 2)]
  assert shares == [[4], [2]]
  with runs.Run(tmp_path, processes=3) as run:
    assert run.stage("s", FIELDS).mine(5) == [0, 3]


def test_progress_replaces_rounds_and_joins_columns(tmp_path):
  with runs.Run(tmp_path) as run:
    run.progress({"round": 2, "score": 7.25, "note": "a,b"})
    run.progress({"round": 3, "score": None})
    run.progress({"round": 2, "score": 7.5, "length": 120})
  assert (tmp_path / "progress.csv").read_text() == "round,score,note,length\n2,7.5,,120\n3,,,\n"


def test_log_and_config(tmp_path):
  with runs.Run(tmp_path) as run:
    run.log("start", what="a\nb", path=tmp_path)
    run.log("end", score=np.float32(0.5))
    run.save_config({"a": (1, 2)})
    stamp = (tmp_path / "config.json").stat().st_mtime_ns
    run.save_config({"a": [1, 2]})
    assert (tmp_path / "config.json").stat().st_mtime_ns == stamp
    run.save_config({"a": [1, 3]})
  events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  assert [(e["event"], e.get("what")) for e in events] == [("start", "a\nb"), ("end", None)]
  assert json.loads((tmp_path / "config.json").read_text()) == {"a": [1, 3]}


def test_workdir_must_be_a_directory_one_can_write(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(runs.RunError, match="is a file"):
    runs.Run(tmp_path / "file")
  with pytest.raises(runs.RunError, match="cannot make the run directory"):
    runs.Run(tmp_path / "file" / "below")


def put_lock(workdir, **changes):
  workdir.mkdir(exist_ok=True)
  with runs.Run(workdir):
    lock = json.loads((workdir / ".lock").read_text())
  assert not (workdir / ".lock").exists()
  (workdir / ".lock").write_text(json.dumps(lock | changes))
  return workdir / ".lock"


def test_a_live_process_keeps_its_directory(tmp_path):
  with runs.Run(tmp_path):
    text = rf"another process \(pid {os.getpid()}\) is using this run directory"
    with pytest.raises(runs.RunError, match=text):
      runs.Run(tmp_path)
    runs.Run(tmp_path, process=1, processes=2)  # other processes of one run take no lock
  runs.Run(tmp_path).close()


def test_the_lock_of_a_dead_process_is_taken_over_silently(tmp_path, caplog):
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  put_lock(tmp_path, pid=dead.pid)
  with runs.Run(tmp_path) as run:
    run.log("mine")
  put_lock(tmp_path, process="0")  # our pid, but of a process that started at another time
  runs.Run(tmp_path).close()
  assert caplog.messages == []


def test_a_process_that_ends_without_closing_leaves_no_lock(tmp_path):
  script = """
import sys
sys.path.insert(0, sys.argv[2])
from alma_jax.store import runs
run = runs.Run(sys.argv[1])
1 / 0
"""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  ended = subprocess.run([sys.executable, "-c", script, str(tmp_path), root], capture_output=True, text=True)
  assert "ZeroDivisionError" in ended.stderr
  assert list(tmp_path.iterdir()) == []


def test_an_old_lock_of_another_machine_is_taken_over_with_a_warning(tmp_path, caplog):
  lock = put_lock(tmp_path, host="elsewhere", pid=7)
  os.utime(lock, (time.time() - 601,) * 2)
  runs.Run(tmp_path).close()
  assert "pid 7 on elsewhere" in caplog.text


def test_a_fresh_lock_of_another_machine_is_watched(tmp_path, monkeypatch, caplog):
  """A preempted job restarts by itself; one that still runs elsewhere touches its lock and keeps it."""
  monkeypatch.setattr(lock_lib, "SILENCE", 0.5)
  put_lock(tmp_path, host="elsewhere", pid=7)
  runs.Run(tmp_path).close()
  assert "no sign of life" in caplog.text

  lock = put_lock(tmp_path, host="elsewhere", pid=7)
  timer = threading.Timer(0.15, lambda: os.utime(lock, (time.time() + 5,) * 2))
  timer.start()
  with pytest.raises(runs.RunError, match=r"pid 7 on elsewhere(.|\n)*remove .*\.lock"):
    runs.Run(tmp_path)
  timer.join()


def test_the_holder_shows_life(tmp_path, monkeypatch):
  monkeypatch.setattr(lock_lib, "BEAT", 0.05)
  with runs.Run(tmp_path):
    os.utime(tmp_path / ".lock", (1, 1))
    end = time.monotonic() + 5
    while (tmp_path / ".lock").stat().st_mtime < 100 and time.monotonic() < end:
      time.sleep(0.02)
    assert (tmp_path / ".lock").stat().st_mtime > time.time() - 60


def test_a_process_that_lost_its_directory_stops_writing(tmp_path):
  with runs.Run(tmp_path) as run:
    stage = run.stage("s", FIELDS)
    put = json.loads((tmp_path / ".lock").read_text()) | {"host": "elsewhere"}
    (tmp_path / ".lock").write_text(json.dumps(put))
    for call in [
      lambda: stage.write_part(0, N, rows(0), records.Judgment),
      lambda: stage.finish(),
      lambda: run.log("x"),
      lambda: run.progress({"round": 2}),
    ]:
      with pytest.raises(runs.RunError, match="taken over"):
        call()
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["fingerprint.json"]
  assert (tmp_path / ".lock").exists()  # it is not ours to remove
