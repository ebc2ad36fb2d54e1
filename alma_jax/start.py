"""From a config to a running recipe: devices, hosts, the run directory; and errors that a person can read."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

import absl.logging
import jax
from jax.experimental import multihost_utils

from alma_jax.errors import UserError
from alma_jax.llama import sharding
from alma_jax.report import page
from alma_jax.runtime.session import Session
from alma_jax.store.runs import Run


def run(recipe, config, workdir):
  """Run the recipe; the exit status."""

  def work():
    with open_session(config, workdir) as session:
      began = time.monotonic()
      try:
        recipe.run(session)
        session.run.log("end", seconds=round(time.monotonic() - began, 1))
      except BaseException as error:
        session.run.log("failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise
      finally:
        if session.run.process == 0:
          page.write(session.run.dir)
      if session.run.process == 0:
        print(page.summary(session.run.dir))

  return status(work, MEMORY)


def status(work, memory, more=None):
  """The exit status of `work()`. What the user can mend is printed as one message without a traceback: `memory` says
  what helps where a device has too little, `more(error)` gives a line to print after another error, or None."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that what is written is whole and unlocked
  sys.unraisablehook = _not_dropped
  try:
    work()
    return 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    if line := more and more(error):
      print(line, file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    return 130
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(f"error: a device is out of memory: {str(error).splitlines()[0]}\n{memory}", file=sys.stderr)
    return 1


def _not_dropped(found):
  """Inside a callback, of the garbage collector say, Python drops what a SIGTERM raised: then it comes once more."""
  if found.exc_type is SystemExit:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
  else:
    sys.__unraisablehook__(found)


MEMORY = """In sampling, scoring and embedding: lower config.engine.slots or config.engine.rows, or share a model
among more devices with config.engine.tensor. In training: remat="full", more passes, moments="bfloat16", a lower
row_length or batch, or weights spread over more devices with config.mesh.fsdp. Finished stages are kept; start the same
command again."""


@contextlib.contextmanager
def open_session(config, workdir):
  """A Session on the run directory, with all hosts joined; its log says what it ran on."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  join_hosts()
  cache_compilations()
  with Run(workdir, config, jax.process_index(), jax.process_count(), barrier) as run_directory:
    run_directory.save_config(json.loads(json.dumps(config.to_dict(), default=str)))
    run_directory.log(
      "start", devices=[d.device_kind for d in jax.devices()], hosts=jax.process_count(), jax=jax.__version__
    )
    yield Session(run_directory, config, *meshes(config))


def join_hosts():
  """One program over all hosts when the launcher started several: Slurm, TPU pods and GKE are recognised by JAX
  itself, other launchers set the three JAX_* variables (launch/local.sh does)."""
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  address, count, index = (os.environ.get(name) for name in names)
  if address and count and index:
    jax.distributed.initialize(address, int(count), int(index))
  elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
    # JAX gives each Slurm task one GPU; a task that is alone on its node takes all of them.
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    jax.distributed.initialize(local_device_ids=list(range(gpus)) if alone and gpus else None)
  elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
    jax.distributed.initialize()


def cache_compilations():
  """Compiled programs are kept between starts, where the user has not said where in a directory of our own. Not those
  of several processes on CPUs: read back, XLA's CPU programs have lost the order of collectives that do not depend on
  each other, and two processes then wait for ever, each in another one."""
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if jax.config.jax_compilation_cache_dir is None:
    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "alma_jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def barrier(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def meshes(config):
  """(training mesh over all devices, mesh of this host's devices)."""
  return (
    sharding.make_mesh(**config.mesh),
    sharding.make_mesh(data=-1, tensor=config.engine.tensor, devices=jax.local_devices()),
  )
