"""From a config to a running recipe: options, devices, hosts, the run directory; and errors that a person can read."""

import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import pathlib
import pkgutil
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import absl.logging
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import alma_jax
from alma_jax import options as options_lib
from alma_jax import recipes
from alma_jax.errors import DiskError, UserError, Waiting, full_disk
from alma_jax.llama import sharding
from alma_jax.options import ConfigError
from alma_jax.report import page
from alma_jax.runtime import peers, room, tracking
from alma_jax.runtime.display import Display, Whole
from alma_jax.runtime.host import Host, local_mesh
from alma_jax.runtime.sampling import Options as SamplingOptions
from alma_jax.runtime.session import Session
from alma_jax.store.runs import Run

Recipe = Any  # a module of alma_jax/recipes: Options, check, checks, models, plan and run


def run(config: ConfigDict, workdir: str, foresee: Callable[[Session[Any]], Iterable[str]] | None = None) -> int:
  """Run the config's recipe; the exit status. What `foresee` says of the run is shown before it begins."""

  def work() -> None:
    recipe = recipe_of(config)
    with open_session(config, workdir) as session:
      if foresee and session.run.process == 0:
        for line in foresee(session):
          session.display.say(line)
      began = time.monotonic()
      try:
        recipe.run(session)
        session.run.log("end", seconds=round(time.monotonic() - began, 1))
      except Waiting as wait:
        session.run.log("waiting", what=str(wait))
        raise
      except BaseException as error:
        with contextlib.suppress(OSError, UserError):  # must not hide the first error
          session.run.log("failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise
      finally:
        if session.run.process == 0:
          page.write(session.run.dir)
      if session.run.process == 0:
        print(page.summary(session.run.dir))

  return status(work, MEMORY)


def status(work: Callable[[], None], memory: str, more: Callable[[UserError], str | None] | None = None) -> int:
  """The exit status of `work()`. A UserError is printed as one message, without a traceback.

  `memory` says what helps where a device has too little; `more(error)` may give a line to print after a UserError.
  """
  asked = threading.Event()

  def terminated(*_: object) -> None:
    asked.set()
    sys.exit(143)  # unwinds, so that what is written is whole and unlocked

  signal.signal(signal.SIGTERM, terminated)
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it: they stay so
    signal.signal(signal.SIGINT, _interrupted)
  sys.unraisablehook = _not_dropped
  try:
    work()
    return 0
  except Waiting as wait:
    print(wait, file=sys.stderr)
    return Waiting.status
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    if line := more and more(error):
      print(line, file=sys.stderr)
    peers.failed(error)
    return 1
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    return 130
  except Exception as error:
    if asked.is_set():  # a library made an error of its own of what unwinds
      print(f"stopped ({type(error).__name__}); the same command goes on from here", file=sys.stderr)
      return 143
    if why := full_disk(error):
      print(f"error: {why}: make room, then start the same command again; what is finished is kept", file=sys.stderr)
      peers.failed(DiskError(why))
      return 1
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
      peers.failed(error)
      raise
    print(f"error: a device is out of memory: {str(error).splitlines()[0]}\n{memory}", file=sys.stderr)
    peers.failed(UserError("a device is out of memory"))
    return 1


def _interrupted(*_: object) -> None:
  """The first Ctrl-C unwinds; a second one ends the process at once, even where no Python code runs."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # whose exit status a shell calls 130, too
  os.write(2, b"\nstopping; Ctrl-C again ends at once\n")
  raise KeyboardInterrupt


def _not_dropped(found: "sys.UnraisableHookArgs") -> None:
  """Python discards exceptions raised inside callbacks such as GC hooks. If a signal's exception was discarded there,
  send the signal again."""
  if found.exc_type in (SystemExit, KeyboardInterrupt):
    again = signal.SIGTERM if found.exc_type is SystemExit else signal.SIGINT
    if again is signal.SIGINT:
      signal.signal(signal.SIGINT, _interrupted)  # it has not unwound yet
    threading.Timer(0.1, os.kill, (os.getpid(), again)).start()
  else:
    sys.__unraisablehook__(found)


MEMORY = """In sampling, scoring and embedding: lower config.engine.slots or config.engine.rows, or share a model
among more devices with config.engine.tensor. In training: remat="full", more passes, moments="bfloat16", a lower
row_length or batch, or weights spread over more devices with config.mesh.fsdp. Finished stages are kept; start the same
command again."""


# What is checked before anything is written


def recipe_of(config: ConfigDict) -> Recipe:
  """The module of the config's recipe."""
  name, known = str(config.get("recipe")), [found.name for found in pkgutil.iter_modules(recipes.__path__)]
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"config.recipe is {name!r}; it may be {', '.join(map(repr, known))}{hint}")
  return importlib.import_module(f"alma_jax.recipes.{name}")


def checked_options(config: ConfigDict) -> dict[int, Any]:
  """The Options of all rounds, or a ConfigError; no file is read."""
  recipe = recipe_of(config)
  rounds = range(2, 2 + getattr(config, "feedback_rounds", 0))
  found = options_lib.of_rounds(config, recipe.Options, rounds)
  recipe.check(found)
  tracking.check(getattr(found[0], "track", ""))
  return found


def check_lengths(by_round: Mapping[int, Any], positions: int) -> None:
  """Raise a ConfigError where a prompt with its response may be longer than the model's positions."""
  for round, options in by_round.items():
    where = f"in round {round}: config" if round else "config"
    for name, found in _sampling_options(options, where):
      if found.longest > positions:
        raise ConfigError(
          f"{name}: max_prompt_tokens + max_new_tokens is {found.max_prompt_tokens} +"
          f" {found.decoding.max_new_tokens} = {found.longest}; it must be at most {positions}, the model's positions"
        )


def _sampling_options(options: Any, where: str) -> Iterator[tuple[str, SamplingOptions]]:
  if isinstance(options, SamplingOptions):
    yield where, options
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    if dataclasses.is_dataclass(value):
      yield from _sampling_options(value, where if "spread" in field.metadata else f"{where}.{field.name}")


# The session


@contextlib.contextmanager
def open_session(config: ConfigDict, workdir: str | pathlib.Path) -> Iterator[Session[Any]]:
  """A Session on the run directory, with all hosts joined; its log says what it ran on."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  by_round = checked_options(config)
  join_hosts()
  cache_compilations()
  options = by_round[0]
  mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))
  host = host_of(options)
  check_lengths(by_round, host.config.max_positions)
  for step in recipe_of(config).checks(host, by_round):
    step()
  run = Run(workdir, jax.process_index(), jax.process_count(), barrier, made_with())
  with contextlib.ExitStack() as stack:
    run_directory = stack.enter_context(run)
    run_directory.check_shared()
    run_directory.save_config(json.loads(json.dumps(config.to_dict(), default=str)))
    run_directory.log(
      "start",
      devices=[d.device_kind for d in jax.devices()],
      hosts=jax.process_count(),
      jax=jax.__version__,
      command=shlex.join(sys.argv),
    )
    if jax.process_index() == 0:
      stages = getattr(recipe_of(config), "stages", None)  # a recipe may say what it will do
      whole = Whole(stages(by_round) if stages else {}, host.display)
      run_directory.watchers.append(whole)
      stack.callback(whole.close)
    tracker: Any = getattr(options, "track", "")
    if tracker and jax.process_index() == 0:
      told = tracking.Tracker(tracker, run_directory.dir, tracking.plain(config.to_dict()), host.display.say)
      run_directory.watchers.append(told)
      stack.callback(told.close)
    room.foresee(run_directory.dir, host, recipe_of(config).models(by_round))
    yield Session(run_directory, host, mesh, by_round, config)


def host_of(options: Any) -> Host:
  """This host's devices with the model that the Options of a run name."""
  return Host(
    options.model, options.engine, local_mesh(options.model, options.engine), Display(speaks=jax.process_index() == 0)
  )


def made_with() -> dict[str, Any]:
  """The versions and devices that every manifest names; `commit` is None for an installed package."""
  checkout, commit = pathlib.Path(alma_jax.__file__).parents[1], None
  if (checkout / ".git").exists():
    describe = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git here, or another user's checkout
      commit = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  return {
    "alma_jax": alma_jax.__version__,
    "commit": commit,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "devices": sorted({device.device_kind for device in jax.devices()}),
  }


def join_hosts() -> None:
  """Join all hosts into one program where the launcher started several."""
  if (how := hosts_of(os.environ)) is not None:
    jax.distributed.initialize(**how, heartbeat_timeout_seconds=peers.heartbeat())
    peers.watch()


def hosts_of(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """What jax.distributed.initialize is to be told, None for a program of one process.

  | launcher                                       | what it sets                                                 |
  |------------------------------------------------|--------------------------------------------------------------|
  | local.sh tpu_pod.sh gke.yaml sky.yaml TrainJob | JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   |
  | srun (slurm.sbatch, xmanager-slurm)            | SLURM_STEP_NUM_TASKS and others, which JAX reads             |
  | GKE with TPUs (gke_tpu.yaml, gcluster)         | TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, and for       |
  |                                                | several slices MEGASCALE_NUM_SLICES, which JAX reads         |
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  said = {name: environment[name] for name in names if environment.get(name)}
  if len(said) == 3:
    address, count, index = (said[name] for name in names)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise ConfigError(f"JAX_PROCESS_ID is {index!r} and JAX_NUM_PROCESSES {count!r}; they must be 0 .. n-1 and n")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
  if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
    # JAX gives each Slurm task one GPU; a task that is alone on its node takes all of them.
    alone = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return {"local_device_ids": list(range(gpus)) if alone and gpus else None}
  workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
  if len(workers.split(",")) > 1 or int(environment.get("MEGASCALE_NUM_SLICES") or "1") > 1:
    return {}
  if said:  # each process would take itself for the whole run
    missing = " and ".join(name for name in names if name not in said)
    raise ConfigError(f"{' and '.join(said)} is set and {missing} is not: set all three on every host, or none")
  return None


def cache_compilations() -> None:
  """Keep compiled programs between starts, in a directory of our own unless the user names one; those that took 0.2
  seconds or more unless the user says how many.

  Several processes on CPUs keep none: a program that is read back has lost the order of collectives that do not depend
  on each other, and two processes can then wait for ever, each in another one.
  """
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "alma_jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(directory))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def barrier(name: str) -> None:
  """Wait until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
