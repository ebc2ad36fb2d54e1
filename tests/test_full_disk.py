"""Full disks, on a small tmpfs: one line that names the path from every writer, and the same bytes after room is made.

Where a tmpfs cannot be mounted (it takes root), the tests that need one are skipped.
"""

import errno
import os
import pathlib
import subprocess
import types

import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import CONFIG

from alma_jax import errors, start
from alma_jax.corpus import search
from alma_jax.engine.train import Stopped
from alma_jax.errors import DiskError, RunError
from alma_jax.llama import model as llama
from alma_jax.llama import weights
from alma_jax.runtime import checkpoints as checkpoints_of
from alma_jax.runtime import metrics, room
from alma_jax.runtime.display import Display
from alma_jax.store import layout, records, shards
from alma_jax.store.runs import Run

NOISE = np.random.default_rng(0).standard_normal(2**16).astype(np.float32)  # 262 kB that no compression makes small


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
  place = tmp_path_factory.mktemp("disk")
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
  yield place
  subprocess.run(["umount", place], check=True)


class Filled:
  """The disk with no room but `left` bytes, until `make_room`."""

  def __init__(self, disk, left):
    self.filler = disk / "filler"
    with open(self.filler, "wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(4096))
      except OSError as error:
        assert error.errno == errno.ENOSPC
      file.truncate(max(0, os.path.getsize(self.filler) - left))

  def make_room(self):
    self.filler.unlink(missing_ok=True)


def record(i):
  return records.Response("0" * 16, i, "sft_1", NOISE[i * 64 : i * 64 + 64].tobytes().hex(), (i,), True, -1.0)


def board(path):
  """A training's log until the disk is full; 9 steps where it is not."""
  batches = types.SimpleNamespace(lengths=lambda step: [3])
  c = types.SimpleNamespace(parameters=1, tied=True, depth=1, heads=1, head_dim=1, vocab=1, width=1)
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind="cpu")]), size=1)
  s = types.SimpleNamespace(
    run=types.SimpleNamespace(process=0, watchers=[]), mesh=mesh, host=types.SimpleNamespace(trained_config=c)
  )
  path.mkdir(exist_ok=True)
  with metrics.StepLog(s, types.SimpleNamespace(dir=path, name="sft_1"), batches) as log:
    for step in range(9):
      log.write(step, {f"metric {i}": 1.0 for i in range(200)})
  return path / "metrics.jsonl"


def checkpoint(path):
  with checkpoints_of.Checkpoints(path) as kept:
    kept.save(1, {"noise": jnp.asarray(NOISE), "more": jnp.asarray(NOISE[::-1].copy())})
  return path / "1" / "commit_success.txt"


def model(path):
  weights.save(path, llama.init(CONFIG, 0), weights.TextSide(bos_id=0))
  return path / "model.safetensors"


WRITERS = {
  "records": lambda path: shards.write_records(path, [record(i) for i in range(999)], records.Response),
  "array": lambda path: shards.save_array(path, NOISE),
  "json": lambda path: shards.write_json(path, NOISE[:9999].tolist()),
  "search": lambda path: search.save(path, NOISE),
  "training's log": board,
  "checkpoint": checkpoint,
  "model": model,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_with_the_path_and_then_the_bytes_are_the_same(
  name, disk, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(checkpoints_of, "named", dict)
  write, path = WRITERS[name], disk / name
  filled = Filled(disk, 16384)
  assert start.status(lambda: write(path) and None, "") == 1
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 1, lines[:9]
  assert lines[0].startswith(f"error: {path}") and "No space left on device" in lines[0] and "Make room" in lines[0]
  assert name == "training's log" or not path.is_file()
  filled.make_room()
  here, elsewhere = (write(at) or at for at in (path, tmp_path / name))
  if isinstance(here, pathlib.Path) and name != "checkpoint":
    here, elsewhere = here.read_bytes(), elsewhere.read_bytes()
    assert here == elsewhere
  subprocess.run(["rm", "-rf", path], check=True)


def test_a_run_directory_on_a_full_disk_is_left_without_a_lock(disk, capsys):
  with Run(disk / "run") as run:
    run.log("start", first=1)
    filled = Filled(disk, 0)
    with open(run.dir / layout.LOG, "ab", buffering=0) as file:
      file.write(b'{"event": "cut' + b"x" * 4096)  # as much of a line as there is room for
    with pytest.raises(DiskError, match=r"log\.jsonl cannot be written: No space left"):
      run.log("x" * 5000)
  filled = Filled(disk, 0)  # the lock's own room, too
  with pytest.raises(RunError, match=r"cannot write in the run directory .*: No space left on device"):
    Run(run.dir)
  assert not (run.dir / layout.LOCK).exists()
  filled.make_room()
  with Run(run.dir) as run:
    run.log("start", second=2)
  assert [row for row in layout.json_lines(run.dir / layout.LOG) if "second" in row]


def test_the_first_error_stays_when_the_disk_is_full_too(disk, monkeypatch):
  monkeypatch.setattr(checkpoints_of, "named", dict)
  for error, seen in ((ValueError("first"), ValueError), (Stopped(), DiskError)):
    filled = Filled(disk, 65536)
    with pytest.raises(seen), checkpoints_of.Checkpoints(disk / "some") as kept:
      kept.save(1, {"noise": jnp.asarray(NOISE)})
      raise error
    filled.make_room()
    subprocess.run(["rm", "-rf", disk / "some"], check=True)


def test_exceptions_of_full_disks_are_recognised():
  quota = ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {os.strerror(errno.EDQUOT)} [os_error_code='122']")
  chained = RuntimeError("closed")
  chained.__context__ = OSError(errno.ENOSPC, "full")
  for error in (quota, chained, OSError("8192 requested and 12 written")):
    assert errors.full_disk(error)
  for error in (OSError(errno.EIO, "input"), ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError("2 written")):
    assert errors.full_disk(error) is None
  whole = pytest.raises(DiskError, match=r"^/nowhere/x cannot be written: .*kept\. A model takes 1 GB\.$")
  with whole, errors.writing("/nowhere", "A model takes 1 GB."), errors.writing("/nowhere/x"):
    raise quota


# What is foreseen


def test_the_most_that_a_training_has_on_disk():
  def of(steps, every, keep=0):
    return room.training_bytes(100, 7, steps, every, keep)

  assert of(10, 10) == 7  # no checkpoint: the model follows the last step
  assert of(11, 10) == 107 and of(21, 10) == 207
  assert of(31, 10) == of(1000, 10) == 300  # a third one is written beside the two that stay
  assert of(1000, 10, 500) == 400
  assert room.model_bytes(CONFIG, "bfloat16") == 2 * CONFIG.parameters
  assert room.checkpoint_bytes(CONFIG) == 12 * CONFIG.parameters == 3 / 2 * room.checkpoint_bytes(CONFIG, "bfloat16")


def test_too_little_room_is_an_error_and_perhaps_too_little_a_line(tmp_path, capsys):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "checkpoints" / "state").write_bytes(NOISE.tobytes())
  assert room.there(tmp_path) >= errors.free_bytes(tmp_path) + NOISE.nbytes - 2**22  # others write here, too
  with pytest.raises(DiskError, match=r"sft_1: its model and checkpoints take up to 1\.0 GB in .*, and 799\.0 MB are"):
    room.check("sft_1", tmp_path, 10**9, 799 * 10**6, Display())
  room.check("sft_1", tmp_path, 10**9, 801 * 10**6, Display())
  assert "the disk will be full" in capsys.readouterr().err
  room.check("sft_1", tmp_path, 10**9, 10**9, Display())
  assert capsys.readouterr().err == ""


def test_a_run_says_that_its_models_do_not_fit(tmp_path, monkeypatch, capsys):
  host = types.SimpleNamespace(trained_config=CONFIG, save_dtype="float32", display=Display())
  stage = tmp_path / "sft_1"
  (stage / layout.MODEL).mkdir(parents=True)
  for name in (layout.FINGERPRINT, layout.MANIFEST):
    shards.write_sealed(stage / name, {})
  monkeypatch.setattr(room, "free_bytes", lambda path: 4 * CONFIG.parameters + 36 * CONFIG.parameters)
  room.foresee(tmp_path, host, 2)
  assert capsys.readouterr().err == ""
  room.foresee(tmp_path, host, 3)
  assert "the 2 models to come" in capsys.readouterr().err
