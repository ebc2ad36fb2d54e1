"""UserError: a mistake that the user can mend. It is printed as one message; every other exception is a bug.

Its subclasses stand beside the code that raises them (DataError, ModelError, ...). `alma_jax.start` catches the base
class alone, so a new kind of mistake needs no list.

A full disk arrives as many exceptions: OSError with and without a path, NumPy's without a number, TensorStore's as a
text. Code that writes says where, and each of them becomes a DiskError:

  with writing(path):
    file.write(...)
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
  """Its text is the whole message: what is wrong, where, and how to mend it."""


class RunError(UserError):
  """About a run directory or an artefact in it."""


class Waiting(UserError):
  """The run waits for a person, with nothing wrong: the process ends with exit status 75 (EX_TEMPFAIL of sysexits.h),
  and the same command goes on. The text says what is to be done."""

  status = 75


def waited(steps: Iterable[Callable[[], T]]) -> list[T]:
  """What the steps give. If some of them wait for a person, the others are made all the same, so that everything that
  is to be done is said at once."""
  found, waiting = [], []
  for step in steps:
    try:
      found.append(step())
    except Waiting as wait:
      waiting.append(str(wait))
  if waiting:
    raise Waiting("\n".join(waiting))
  return found


class NotFinite(UserError):
  """A model or a judge gave NaN or infinity. `item` is the index of the first row that it gave one for."""

  def __init__(self, item: int, message: str) -> None:
    super().__init__(message)
    self.item = item


class DiskError(UserError):
  """The disk is full, or a quota is used up."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], needed: str = "") -> Iterator[None]:
  """A full disk inside the block ends in a DiskError that names the path. `needed` is a sentence that goes to its end,
  about what is written here."""
  try:
    yield
  except DiskError as error:
    if not needed:
      raise
    raise DiskError(f"{error} {needed}") from error
  except UserError:
    raise
  except Exception as error:
    if why := full_disk(error):
      free = size(free_bytes(path))
      raise DiskError(
        f"{os.fspath(path)} cannot be written: {why} ({free} free there). Make room, then start the same command again;"
        f" what is finished is kept.{' ' * bool(needed)}{needed}"
      ) from error
    raise


def full_disk(error: BaseException) -> str | None:
  """The system's words for a full disk, if the exception or one that it came from tells of one; else None."""
  before: BaseException | None = error
  while before is not None:
    text = str(before)
    for code in (errno.ENOSPC, errno.EDQUOT):
      if os.strerror(code) in text or getattr(before, "errno", None) == code:
        return os.strerror(code)
    if isinstance(before, OSError) and re.search(r"\d+ requested and \d+ written", text):  # NumPy drops the number
      return os.strerror(errno.ENOSPC)
    before = before.__cause__ or before.__context__
  return None


def free_bytes(path: str | os.PathLike[str]) -> int:
  """What the file system of a path that may not exist yet has left."""
  place = pathlib.Path(path).absolute()
  return shutil.disk_usage(next(at for at in (place, *place.parents) if at.exists())).free


def size(count: float) -> str:
  """Bytes in words: "16.1 GB"."""
  unit, word = next(((10**e, word) for e, word in ((9, "GB"), (6, "MB")) if count >= 10**e), (1000, "kB"))
  return f"{count / unit:,.1f} {word}"
