"""Every test sees eight CPU devices; compiled programs stay in .jax_cache or JAX_COMPILATION_CACHE_DIR."""

import os
import pathlib

import small_run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

# XLA runs eight CPU devices on as many threads as there are cores, at least eight. A program with two collectives that
# do not depend on each other can then block them all, each waiting in one of the two: more threads than can wait.
os.environ.setdefault("NPROC", "32")

# Most of the tests' time goes into compiling programs that run once. The digits of the default run are tested with what
# a user's compiler does (small_run.optimised).
os.environ["XLA_FLAGS"] = small_run.compiled_quickly()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from alma_jax.engine import train


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
  """Each compiled program is several mapped pieces of memory, and Linux gives a process 65,530 of them: holding those
  of all tests, a process dies in the compiler."""
  yield
  jax.clear_caches()
  train._plan.cache_clear()
