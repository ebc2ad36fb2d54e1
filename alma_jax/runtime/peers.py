"""The other processes of a run. When one of them dies, this one ends with a line that names its host.

  jax.distributed.initialize(..., heartbeat_timeout_seconds=peers.heartbeat())
  peers.watch()

Every process counts up a number at the coordination service, which lives in process 0. Where the number of another one
has not changed for ALMA_PEER_TIMEOUT seconds (60), this process says so and ends with status 1: in training and
clustering it would wait for the dead one for ever. If process 0 itself dies, JAX aborts the others at once with a dump
of C++ frames; a small process that outlives the abort then writes the last line.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from jax._src import distributed

from alma_jax.errors import UserError

BEATS, LEFT, HOSTS = "alma/beats", "alma/left", "alma/hosts"
GRACE = 15  # seconds after the timeout until JAX itself ends a process
TALK = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CoordinationService")  # of errors between hosts

# Reads until the process ends, by an abort perhaps, and then speaks if process 0 cannot be reached.
WITNESS = """
import socket, sys
text = sys.stdin.read()
host, port, line = (text.split("\\n") + [""] * 3)[:3]
if not text.endswith("end\\n"):
  try:
    socket.create_connection((host, int(port)), timeout=5).close()
  except OSError:
    print(line, file=sys.stderr, flush=True)
"""


def timeout() -> float:
  """Seconds of silence after which another process counts as dead."""
  text = os.environ.get("ALMA_PEER_TIMEOUT", "60")
  if not text.isdigit() or int(text) < 5:
    raise UserError(f"ALMA_PEER_TIMEOUT is {text!r}; it must be a whole number of seconds, at least 5")
  return float(text)


def heartbeat() -> int:
  """JAX's own timeout: it is the fallback."""
  return int(timeout()) + GRACE


class _Watch:
  """The thread of this process that counts, and looks at the others' counts."""

  def __init__(self) -> None:
    state: Any = distributed.global_state
    self.client, self.index, self.count = state.client, state.process_id, state.num_processes
    self.timeout = timeout()
    self.every = min(5.0, self.timeout / 6)
    self.client.key_value_set(f"{HOSTS}/{self.index}", socket.gethostname())
    hosts = (self.client.blocking_key_value_get(f"{HOSTS}/{i}", 300_000) for i in range(self.count))
    self.names = [f"process {i} of {self.count} (host {host})" for i, host in enumerate(hosts)]
    self.witness = self._witness(state.coordinator_address) if self.index else None
    atexit.register(self.close)
    threading.Thread(target=self._run, daemon=True).start()

  def _witness(self, address: str) -> "subprocess.Popen[str]":
    host, _, port = address.rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", WITNESS]
    found = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert found.stdin
    found.stdin.write(f"{host.strip('[]')}\n{port}\n{self._line(0, 'has ended')}\n")
    found.stdin.flush()
    return found

  def close(self) -> None:
    """This process ends by itself: the witness has nothing to say."""
    if self.witness and self.witness.stdin and not self.witness.stdin.closed:
      self.witness.stdin.write("end\n")
      self.witness.stdin.close()

  def _line(self, i: int, what: str) -> str:
    return f"error: {self.names[i]} {what}; its own output says why. Start the same command again on all hosts."

  def _run(self) -> None:
    seen, beat, last = {}, 0, time.monotonic()
    while True:
      time.sleep(self.every)
      beat += 1
      try:
        self.client.key_value_set(f"{BEATS}/{self.index}", str(beat), True)
        beats, left = self._told(BEATS), self._told(LEFT)
      except Exception:  # process 0 has ended, or all end just now: JAX will say so
        continue
      now = time.monotonic()
      if now - last > 3 * self.every:
        seen = {}  # this process itself was stopped: the others' silence means nothing
      last = now
      for i in range(self.count):
        if i not in seen or seen[i][0] != beats.get(i):
          seen[i] = beats.get(i), now
      for i, why in left.items():
        if i != self.index:
          self.end(self._line(i, f"has ended: {why}"))
      for i, (_, since) in seen.items():
        if i != self.index and now - since > self.timeout:
          self.end(self._line(i, f"has given no sign of life for {now - since:.0f} s"))

  def _told(self, what: str) -> dict[int, str]:
    """What each process has written under this name."""
    return {int(key.rpartition("/")[2]): value for key, value in self.client.key_value_dir_get(what)}

  def end(self, line: str) -> NoReturn:
    """End this process, whatever its main thread waits for."""
    print(line, file=sys.stderr, flush=True)
    if self.index == 0:
      time.sleep(2 * self.every)  # the others find out by themselves while the service is there
    self.close()
    os._exit(1)


_watch: _Watch | None = None


def watch() -> None:
  """Watch the other processes from now on; to be called after jax.distributed.initialize."""
  global _watch
  _watch = _Watch()


def failed(error: BaseException) -> None:
  """End this process after an error, if the run has others: they are told, and none waits for another at the exit."""
  if _watch is None:
    return
  if not isinstance(error, UserError) and any(word in str(error) for word in TALK):
    time.sleep(_watch.timeout + 3 * _watch.every)  # the thread ends this process once it knows who has died
  if not isinstance(error, UserError):
    traceback.print_exception(error)
  why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
  try:
    _watch.client.key_value_set(f"{LEFT}/{_watch.index}", why, True)
  except Exception:
    traceback.print_exc()
  if _watch.index == 0:
    time.sleep(2 * _watch.every)
  _watch.close()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
