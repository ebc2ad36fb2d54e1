"""`.lock`: one process at a time writes in a run directory."""

import atexit
import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

from alma_jax.errors import RunError
from alma_jax.store import layout

BEAT = 15.0  # seconds between two signs of life of the lock's holder
SILENCE = 120.0  # how long a lock from another machine is watched before it counts as abandoned
ABANDONED = 600.0  # a lock from another machine this old is abandoned without watching
UNREADABLE = 5.0  # how long a lock without a holder's name may be one that is being written
_logger = logging.getLogger(__name__)


class LockedError(RunError):
  """Another process writes in the run directory."""


class Lock:
  """The file `.lock`: it names the process that writes in this run directory. A thread touches it, which shows other
  machines that the process lives."""

  def __init__(self, directory: pathlib.Path) -> None:
    self.path = directory / layout.LOCK
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "process": _process_mark(os.getpid())}
    self.text = json.dumps(mine | {"since": now()}, allow_nan=False)
    while not self._create():
      self._settle_with_holder()
    self._stop = threading.Event()
    threading.Thread(target=self._keep_alive, daemon=True).start()
    atexit.register(self.release)

  def check(self) -> None:
    if self._read() != self.text:
      raise RunError(f"another process has taken over the run directory {self.path.parent}; this one stops.")

  def release(self) -> None:
    atexit.unregister(self.release)
    # A forked child inherits the object, not the right to the lock.
    if not self._stop.is_set() and json.loads(self.text)["pid"] == os.getpid():
      self._stop.set()
      if self._read() == self.text:
        self.path.unlink(missing_ok=True)

  def _create(self) -> bool:
    try:
      handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      return False
    except OSError as e:
      raise RunError(f"cannot write in the run directory {self.path.parent}: {e.strerror}.") from None
    try:
      with os.fdopen(handle, "w") as file:
        file.write(self.text)
    except OSError as e:  # a full disk, for example
      self.path.unlink(missing_ok=True)
      raise RunError(f"cannot write in the run directory {self.path.parent}: {e.strerror}.") from None
    return True

  def _read(self) -> str | None:
    try:
      return self.path.read_text(errors="replace")
    except FileNotFoundError:
      return None

  def _settle_with_holder(self) -> None:
    """Removes the lock of a holder that is gone; raises RunError for one that lives."""
    text = self._read()
    if text is None:
      return
    holder = _holder(text)
    if holder is None:  # being written just now, or by a process that was killed at it
      end = time.monotonic() + UNREADABLE
      while self._read() == text and time.monotonic() < end:
        time.sleep(min(0.1, UNREADABLE / 10))
      if self._read() == text:
        _logger.warning("%s is damaged and names no process; it is made again", self.path)
        self._remove(text)
      return
    where = f"{self.path.parent} (pid {holder['pid']} on {holder['host']})"
    if holder["host"] == socket.gethostname():
      if not _is_alive(holder["pid"]) or _process_mark(holder["pid"]) != holder["process"]:
        return self._remove(text)
      raise LockedError(
        f"another process (pid {holder['pid']}) is using this run directory: {self.path.parent}.\n"
        "Wait for it, stop it, or start in another --workdir."
      )
    if self._shows_life():
      raise LockedError(
        f"another process is using this run directory: {where}.\n"
        f"Wait for it or start in another --workdir. If you know that it is gone, remove {self.path}."
      )
    _logger.warning("taking over the run directory %s: its last holder has shown no sign of life", where)
    self._remove(text)

  def _remove(self, text: str) -> None:
    if self._read() == text:  # not one that a third process has just written
      self.path.unlink(missing_ok=True)

  def _shows_life(self) -> bool:
    """True if a holder on another machine touches the lock while we watch it. Its time stamps are compared with each
    other, since clocks differ; only very old ones are compared with our clock, to spare the wait."""
    first = self._stamp()
    if first is None or time.time() - first > ABANDONED:
      return False
    _logger.warning("%s belongs to another machine; watching it for up to %.0f s", self.path, SILENCE)
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
      time.sleep(min(1.0, SILENCE / 10))
      last = self._stamp()
      if last != first:
        return last is not None  # None: the holder has just released it
    return False

  def _stamp(self) -> float | None:
    try:
      return self.path.stat().st_mtime
    except FileNotFoundError:
      return None

  def _keep_alive(self) -> None:
    while not self._stop.wait(BEAT):
      with contextlib.suppress(OSError):
        if self._read() == self.text:
          os.utime(self.path)


def _holder(text: str) -> dict[str, Any] | None:
  """The process that a lock names; None for a damaged lock."""
  try:
    holder = json.loads(text)
  except ValueError:
    return None
  named = isinstance(holder, dict) and {"pid", "host", "process"} <= holder.keys() and isinstance(holder["pid"], int)
  return holder if named else None


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # another user's
  return True


def _process_mark(pid: int) -> str | None:
  """The start time of a process, which tells it from a later one with the same pid; None without /proc."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  return stat.rpartition(")")[2].split()[19]


def now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
