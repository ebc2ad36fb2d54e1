"""The machines that a run can be planned for: chips by their data sheets, and what a word such as "v6e:2x4" means.

  topology = parse("h100:8x2")      # 8 GPUs on each of 2 hosts
  topology.devices, topology.hosts, topology.local      16, 2, 8
  larger(topology)                  # the next ones of its kind: h100:8x4, h100:8x8, ...

What is usable of a TPU's memory is what its compiler allows; of an H100 what is left beside the driver.
"""

import dataclasses
import os
import re
from collections.abc import Iterator

from alma_jax.errors import UserError
from alma_jax.runtime.host import host_bytes

GIB = 2**30


class TopologyError(UserError):
  """A topology that is not known; the message says which are."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device. Rates are per second, from the data sheet named in `source`."""

  name: str
  platform: str  # in JAX's words
  memory: int  # usable bytes
  flops: float  # bf16 matrix products; of a CPU fp32, assumed
  bandwidth: float  # bytes from and to its memory
  link: float  # bytes to other chips of the slice or host
  network: float  # bytes to chips of other hosts; a TPU slice's own links reach them
  per_host: int
  host_memory: int  # bytes for each chip
  source: str


CHIPS = {
  "v5e": Chip(
    "TPU v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 200e9, 200e9, 4, 64 * GIB, "cloud.google.com/tpu/docs/v5e"
  ),
  "v6e": Chip(
    "TPU v6e", "tpu", int(31.25 * GIB), 918e12, 1.64e12, 400e9, 400e9, 4, 192 * GIB, "cloud.google.com/tpu/docs/v6e"
  ),
  "v5p": Chip(
    "TPU v5p", "tpu", int(95.74 * GIB), 459e12, 2.77e12, 600e9, 600e9, 4, 112 * 10**9, "cloud.google.com/tpu/docs/v5p"
  ),
  "h100": Chip(
    "H100", "gpu", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9, 8, 256 * 10**9, "data sheets of H100 SXM and DGX H100"
  ),
}
# The shapes of slices in their order, the smallest first; 8 chips of v5e and v6e have one host where they are bought so
SLICES = {
  "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
  "h100": ("1", "2", "4", "8", "8x2", "8x4", "8x8", "8x16", "8x32"),
}
ONE_HOST = {"v5e:2x4": 8, "v6e:2x4": 8}
CORE_FLOPS, CORE_BANDWIDTH = 80e9, 10e9  # of one core of a server CPU in fp32: assumed
KNOWN = "v5e:4x4, v6e:2x4, v5p:4x4x4 (any slice), h100:8, h100:8x2 (8 GPUs on each of 2 hosts), cpu"


@dataclasses.dataclass(frozen=True)
class Topology:
  name: str
  chip: Chip
  devices: int
  hosts: int

  @property
  def local(self) -> int:
    """The devices of one host."""
    return self.devices // self.hosts

  @property
  def host(self) -> "Topology":
    """One of its hosts."""
    kind = self.name.partition(":")[0]
    every = (parse(f"{kind}:{shape}") for shape in SLICES.get(kind, ()))
    return self if self.hosts == 1 else next(one for one in every if one.devices == self.local)

  @property
  def link(self) -> float:
    """Bytes a second that a collective over all devices moves to each of them, by the data sheet. Between hosts of GPUs
    every byte goes once, over the networks of all GPUs of a host, and inside them over their own links."""
    return self.chip.link if self.hosts == 1 else min(self.chip.link, self.local * self.chip.network)

  def link_in_groups(self, ways: int) -> float:
    """Bytes a second that a device sends to the others of its group of `ways` on one host. GPUs have a switch; a TPU
    reaches one neighbour by one of the two links of each dimension, and in a ring of more it uses two of them."""
    if self.chip.platform != "tpu":
      return self.chip.link
    dimensions = self.name.count("x") + 1
    return self.chip.link / (2 * dimensions) * (1 if ways == 2 else 2)


def parse(word: str) -> Topology:
  """The Topology of a word as KNOWN shows them."""
  kind, _, shape = word.partition(":")
  if word == "cpu":
    cores = os.cpu_count() or 1
    chip = Chip(
      "CPU", "cpu", host_bytes(), cores * CORE_FLOPS, cores * CORE_BANDWIDTH, cores * CORE_BANDWIDTH,
      cores * CORE_BANDWIDTH, 1, host_bytes(),
      f"{cores} cores of {CORE_FLOPS / 1e9:g} GFLOP/s and {CORE_BANDWIDTH / 1e9:g} GB/s, assumed",
    )  # fmt: skip
    return Topology(word, chip, 1, 1)
  if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise TopologyError(f"--topology={word} is not known; it may be {KNOWN}")
  sizes, chip = [int(size) for size in shape.split("x")], CHIPS[kind]
  if chip.platform == "gpu":
    if len(sizes) > 2 or sizes[0] > chip.per_host:
      raise TopologyError(f"--topology={word}: write GPUs of a host x hosts, such as h100:8x2; a host has at most 8")
    hosts = sizes[1] if len(sizes) > 1 else 1
    return Topology(word, chip, sizes[0] * hosts, hosts)
  dimensions = 3 if kind == "v5p" else 2
  if len(sizes) != dimensions:
    example = SLICES[kind][4]
    raise TopologyError(f"--topology={word}: a {kind} slice has {dimensions} dimensions, such as {kind}:{example}")
  devices = 1
  for size in sizes:
    devices *= size
  local = min(ONE_HOST.get(word, chip.per_host), devices)
  if devices % local:
    raise TopologyError(f"--topology={word}: {devices} chips do not fill hosts of {local}")
  return Topology(word, chip, devices, devices // local)


def larger(topology: Topology) -> Iterator[Topology]:
  """The topologies of the same kind with more devices, the smallest first."""
  kind = topology.name.partition(":")[0]
  for shape in SLICES.get(kind, ()):
    found = parse(f"{kind}:{shape}")
    if found.devices > topology.devices:
      yield found
