"""Every test sees eight CPU devices; compiled programs stay in .jax_cache or JAX_COMPILATION_CACHE_DIR."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
