"""Whether a directory can hold a run: its file system must rename, lock and append as a local disk does."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from alma_jax.errors import RunError, full_disk

ADVICE = (
  "A run directory needs a local disk or a shared file system such as NFS, Lustre, GPFS, CephFS, Filestore or EFS. A"
  " mounted bucket (gcsfuse, s3fs, mountpoint-s3, blobfuse) does not do: copy the finished run there instead."
)


def check_path(directory: str | os.PathLike[str]) -> None:
  """Raise a RunError for the address of a bucket, which would become a folder of that name here."""
  if "://" in str(directory):
    raise RunError(f"--workdir is {os.fspath(directory)!r}, an address and no directory. {ADVICE}")


def check(directory: pathlib.Path) -> None:
  """Raise a RunError that names what the file system of this directory cannot do; some ten small operations.

  Runs rely on: a file made with O_EXCL is made once (the lock), a rename replaces a file and moves a directory that
  holds files (parts, manifests, models), what is appended stands behind the rest (logs), times can be set (signs of
  life).
  """
  place = pathlib.Path(tempfile.mkdtemp(prefix=".check.", suffix=".tmp", dir=directory))
  what = "make a file"
  try:
    one, two, folder = place / "one", place / "two", place / "folder"
    one.write_bytes(b"new")
    two.write_bytes(b"old")
    what = "refuse to make a file twice (O_EXCL), which locks need"
    with contextlib.suppress(FileExistsError):
      os.close(os.open(one, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
      raise _WrongError("the second file was made")
    what = "replace a file by a rename"
    os.replace(one, two)
    if two.read_bytes() != b"new" or one.exists():
      raise _WrongError("the old one is still there")
    what = "append to a file"
    with open(two, "ab") as file:
      file.write(b"er")
    if two.read_bytes() != b"newer":
      raise _WrongError("the text is not at its end")
    what = "rename a directory"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    folder.rename(place / "moved")
    if (place / "moved" / "file").read_bytes() != b"x" or folder.exists():
      raise _WrongError("its file has not moved")
    what = "set the time of a file"
    os.utime(two)
  except (OSError, _WrongError) as e:
    if full_disk(e):
      raise
    why = e.strerror if isinstance(e, OSError) else e
    raise RunError(f"{directory}: the file system there cannot {what} ({why}). {ADVICE}") from None
  finally:
    shutil.rmtree(place, ignore_errors=True)


class _WrongError(Exception):
  """An operation that gave no error and did something else."""
