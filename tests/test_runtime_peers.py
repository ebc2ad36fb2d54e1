"""Two processes, one of which dies: the other ends in time, and its last line names the host."""

import signal
import socket
import subprocess
import sys
import time

import pytest
import small_run

WORK = """
import os, sys, time
import jax
from jax.experimental import multihost_utils
from alma_jax.runtime import peers
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=peers.heartbeat())
peers.watch()
multihost_utils.sync_global_devices("both are here")
print("ready", flush=True)
try:
  while True:
    multihost_utils.sync_global_devices("step")
    time.sleep(0.2)
except BaseException as error:
  peers.failed(error)
"""
TIMEOUT = 5


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_is_the_last_line_of_the_other(victim):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", WORK, address, str(i)], cwd=small_run.ROOT, text=True,
      env=small_run.environment(ALMA_PEER_TIMEOUT=str(TIMEOUT), JAX_NUM_CPU_DEVICES="1"),
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    for process in processes:
      while (line := process.stdout.readline()) and "ready" not in line:
        pass
      assert line
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    output = processes[1 - victim].communicate(timeout=TIMEOUT + 40)[0]
    assert time.monotonic() - began < TIMEOUT + 15
  finally:
    for process in processes:
      process.kill()
  assert processes[1 - victim].returncode not in (0, None)
  last = output.splitlines()[-1]
  assert last.startswith(f"error: process {victim} of 2 (host {socket.gethostname()}) has "), output[-3000:]
  assert ("sign of life" in last) == (victim == 1)
