"""What a run directory asks of its file system, and what is said where it is not given."""

import errno
import os
import pathlib

import pytest

from alma_jax.errors import RunError
from alma_jax.store import file_system
from alma_jax.store.runs import Run


def test_a_bucket_is_no_run_directory(tmp_path):
  with pytest.raises(RunError, match="an address and no directory"):
    Run("gs://bucket/run")
  assert not pathlib.Path("gs:").exists()


@pytest.mark.parametrize("broken", ["replace", "exclusive", "append", "folder"])
def test_a_file_system_that_cannot_hold_a_run_is_named(tmp_path, monkeypatch, broken):
  """As mounted buckets do: no rename, locks that two hold, no appending, directories that do not move."""

  def refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

  real, real_open = os.open, open
  if broken == "replace":
    monkeypatch.setattr(os, "replace", refuse)
  elif broken == "exclusive":
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **how: real(path, flags & ~os.O_EXCL, *rest, **how))
  elif broken == "append":
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **how: real_open(path, mode.replace("a", "w"), **how))
  else:
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
  said = {"replace": "replace a file by a rename", "exclusive": "O_EXCL", "append": "append", "folder": "a directory"}
  with pytest.raises(RunError, match="the file system there cannot") as error:
    file_system.check(tmp_path)
  assert said[broken] in str(error.value) and "NFS" in str(error.value)
  monkeypatch.undo()
  assert not list(tmp_path.iterdir())


def test_what_a_killed_check_leaves_is_removed_at_the_next_start(tmp_path):
  (tmp_path / ".check.x.tmp" / "folder").mkdir(parents=True)
  with Run(tmp_path):
    assert not list(tmp_path.glob(".check*"))


def test_a_host_that_does_not_see_the_run_directory_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr("alma_jax.store.runs.PATIENCE", 0.0)
  with Run(tmp_path / "shared", 0, 2), Run(tmp_path / "shared", 1, 2) as second:
    second.check_shared()
    with pytest.raises(RunError, match="process 1 does not see"):
      Run(tmp_path / "elsewhere", 1, 2).check_shared()
