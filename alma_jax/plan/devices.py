"""Devices that are not here, for which the real compilers compile all the same.

  with described(topology) as devices:      # as many as the topology has; nothing can run on them
    mesh = sharding.make_mesh(fsdp=-1, data=1, devices=devices)
    ...lower(...).compile()

The TPU compiler comes with libtpu, which needs no TPU; the one for NVIDIA GPUs with JAX's CUDA plugin and a description
of the GPU, without a GPU or a driver. Compilation is at low effort (`_effort`), which costs TPUs a few percent of
memory and saves most of the time.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from alma_jax.errors import UserError
from alma_jax.llama import sharding
from alma_jax.llama.attention_reference import packed_workspace
from alma_jax.plan.topology import Topology

LOW, DEFAULT = -1.0, 0.0  # efforts of the compilers, in JAX's numbers; from jax 0.11 on it has words
CACHE = "jax_enable_compilation_cache"
EFFORTS = "jax_exec_time_optimization_effort", "jax_memory_fitting_effort"
LEVELS = "jax_optimization_level", "jax_memory_fitting_level"

# For libtpu where no TPU is: a cloud's metadata is not asked, nor missed aloud, and several may compile at a time.
ABSENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v6e-8",  # any will do: topologies are asked for by name
}

# What XLA asks of an H100 SXM, as it prints it for a live one (openxla/xla, xla/backends/gpu/target_config).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64  pcie_bandwidth: 34359738368  ecc_enabled: true
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CUDNN = 91000  # its version in that description


class CompilerError(UserError):
  """The compiler for a topology is not installed, or does not know it; the message says what helps."""


@contextlib.contextmanager
def described(topology: Topology, effort: float = LOW) -> Iterator[Sequence[Any]]:
  """Yields the devices of the topology, for which programs can be lowered and compiled inside the block."""
  with contextlib.ExitStack() as stack:
    # What is compiled for absent devices can be written to a cache of compilations, but not read again.
    values = _effort(effort, topology.chip.platform) | {CACHE: False}
    stack.callback(compilation_cache.reset_cache)
    for name, value in values.items():
      stack.callback(jax.config.update, name, getattr(jax.config, name))
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the switch once
    if topology.chip.platform == "gpu":
      stack.enter_context(_hopper())
    yield _devices(topology)


def compilers(topology: Topology) -> str:
  """The versions of what compiles for the topology."""
  names = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}.get(
    topology.chip.platform, ("jaxlib",)
  )
  found = [f"{name} {version}" for name in names if (version := _version(name))]
  return ", ".join([f"jax {jax.__version__}", *found])


def local_mesh(topology: Topology, devices: Sequence[Any], tensor: int) -> Mesh:
  """The mesh of one host, which sampling and reading run on. TPUs' compiler wants its devices numbered from 0, as in a
  slice of one host, and no part of a larger slice."""
  alone = devices[0].platform == "tpu" and topology.hosts > 1
  own = _devices(topology.host) if alone else devices[: topology.local]
  return sharding.make_mesh(data=-1, tensor=tensor, devices=own)


def _effort(effort: float, platform: str) -> dict[str, Any]:
  """JAX's settings for this effort of its compilers, by name. The level that is low for TPUs is high for GPUs: it has
  their collectives pipelined, which ends jax 0.11.2 and 0.12.0 in the midst of a training step for several GPUs."""
  if hasattr(jax.config, EFFORTS[0]):
    return dict.fromkeys(EFFORTS, effort)
  return dict.fromkeys(LEVELS, "O1") if effort < DEFAULT and platform != "gpu" else {}


def _version(package: str) -> str | None:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return None


def _libtpu_of_jax() -> str:
  """What the version of libtpu that goes with this jax begins with, such as "0.0.42."; "" if jax does not say."""
  wanted = re.search(r"libtpu==([\d.]+)\*", " ".join(importlib.metadata.requires("jax") or ()))
  return wanted[1] if wanted else ""


def _devices(topology: Topology) -> Sequence[Any]:
  platform, (kind, _, shape) = topology.chip.platform, topology.name.partition(":")
  if platform == "cpu":
    return jax.devices("cpu")[:1]
  if platform == "gpu":
    needs, extra, how = "jax_cuda12_plugin", "gpu", {}
    hosts, local = topology.hosts, topology.local
    how = dict(platform="cuda", topology_name="", topology=f"1x{hosts}x{local}", target_config=H100)
  else:
    needs, extra = "libtpu", "plan"
    if topology.devices < 4:  # libtpu describes whole hosts
      shape = "2x2x1" if kind == "v5p" else "2x2"
    how = dict(platform="tpu", topology_name=f"{kind}:{shape}")
    for name, value in ABSENT.items():
      os.environ.setdefault(name, value)
  if not any(map(importlib.util.find_spec, (needs, needs.replace("12", "13")))):
    raise CompilerError(
      f"the compiler for {topology.name} comes with {needs}, which is not installed: pip install 'alma_jax[{extra}]';"
      " --quick plans without compiling"
    )
  if needs == "libtpu" and not (_version(needs) or "").startswith(of_jax := _libtpu_of_jax()):
    raise CompilerError(
      f"{compilers(topology)}: this jax wants libtpu {of_jax}*, and another one refuses its kernels: pip install -U"
      f" 'alma_jax[{extra}]'; --quick plans without compiling"
    )
  try:
    return topologies.get_topology_desc(**how).devices[: topology.devices]
  except Exception as error:  # plugins fail in their own ways
    said = str(error).strip().splitlines() or [type(error).__name__]
    raise CompilerError(
      f"the compiler does not describe {topology.name}: {said[0][:300]} ({compilers(topology)}); --quick plans without"
      " compiling"
    ) from None


class _WithWorkspace:
  """JAX's module `mlir` for cuDNN's attention. How much the backward pass over packed rows takes beside its results is
  asked of cuDNN on a real device alone; here it is a result of that size."""

  def __init__(self, mlir: Any) -> None:
    self._mlir = mlir

  def __getattr__(self, name: str) -> Any:
    return getattr(self._mlir, name)

  def custom_call(self, name: str, *args: Any, **options: Any) -> Any:
    config = re.search(r'"?max_seg_per_batch"?\s*:\s*(\d+)', str(options.get("backend_config")))
    if name.endswith("Backward") and config and int(config[1]) > 1:
      ir, (B, N, T, H) = self._mlir.ir, options["result_types"][0].shape
      size = packed_workspace(int(config[1]), B * T, N, H)
      *results, none = options["result_types"]
      options["result_types"] = [*results, ir.RankedTensorType.get((size,), none.element_type)]
    return self._mlir.custom_call(name, *args, **options)


@contextlib.contextmanager
def _hopper() -> Iterator[None]:
  """cuDNN's attention asks the GPU at hand what it can: inside the block an H100 answers."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  def capable(capability: Any) -> bool:
    return float(capability) <= 9.0

  def equal(capability: Any) -> bool:
    return str(capability) == "9.0"

  def version(*_: Any) -> int:
    return CUDNN

  answers = {
    "check_compute_capability": capable, "is_cuda_compute_capability_equal": equal, "check_cudnn_version": version,
    "mlir": _WithWorkspace(cudnn.mlir),  # pyright: ignore[reportPrivateImportUsage]
  }  # fmt: skip
  before = {name: getattr(cudnn, name) for name in answers if hasattr(cudnn, name)}
  for name in before:
    setattr(cudnn, name, answers[name])
  try:
    yield
  finally:
    for name, answer in before.items():
      setattr(cudnn, name, answer)
