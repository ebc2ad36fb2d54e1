"""What a plan reckons with: the Machine that a run would have, and the Step that a stage's Work becomes on it.

  machine = Machine(topology, c, mesh, engine, model, assumptions)
  machine.tensor, machine.replicas, machine.model_bytes

Devices are those of the topology, and need not be there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Llama
from alma_jax.plan.assumptions import Assumptions
from alma_jax.plan.hlo import Collective
from alma_jax.plan.topology import Topology
from alma_jax.plan.work import Work
from alma_jax.runtime.host import EngineOptions, ModelOptions, models_that_stay, tensor_for
from alma_jax.runtime.session import MeshOptions
from alma_jax.runtime.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Step:
  """What a stage needs. A field is None where the stage has no such thing."""

  work: Work
  fits: bool = True
  peak: float = 0.0  # bytes on each device
  usable: float = 0.0  # of which there are so many; the allocator wastes some in sampling
  remat: str | None = None
  passes: int | None = None
  slots: int | None = None
  shape: Shape | None = None  # rows x row length of the largest step of a training
  mesh: MeshOptions | None = None  # of a training: the config's, or one with larger tensor groups
  flops: float = 0.0  # useful ones of the whole stage
  traffic: float = 0.0  # bytes of memory of a step and device; 0: not what decides
  collective: float = 0.0  # bytes of a step and device
  seconds: float = 0.0  # of a step
  hours: float = 0.0
  host: float = 0.0  # bytes of each host
  disk: float = 0.0  # bytes that stay
  beside: float = 0.0  # bytes that are on disk while it runs
  helps: str = ""
  compiled: bool = False  # its memory and collectives are a compiler's figures
  collectives: tuple[Collective, ...] = ()
  refused: str = ""  # by the compiler, in its words

  @property
  def places(self) -> int | None:
    return self.shape and self.shape.places


@dataclasses.dataclass(frozen=True)
class Machine:
  topology: Topology
  c: LlamaConfig
  mesh: MeshOptions
  engine: EngineOptions
  model: ModelOptions
  assumptions: Assumptions

  @property
  def platform(self) -> str:
    return self.topology.chip.platform

  @property
  def dtype(self) -> str:
    if self.model.dtype != "auto":
      return self.model.dtype
    return "float32" if self.platform == "cpu" else "bfloat16"

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.dtype).itemsize

  @property
  def peak(self) -> float:
    """Products a second, for fp32 on accelerators an eighth: several passes of their matrix units."""
    slow = self.dtype == "float32" and self.platform != "cpu"
    return self.topology.chip.flops / (8 if slow else 1)

  @property
  def training_mesh(self) -> AbstractMesh:
    return sharding.abstract_mesh(self.topology.devices, **dataclasses.asdict(self.mesh))

  @functools.cached_property
  def tensor(self) -> int:
    """The devices that share a copy of the model in sampling and reading."""
    return self.engine.tensor or tensor_for(self.c, self.dtype, self.topology.local, self.topology.chip.memory)

  @property
  def replicas(self) -> int:
    """Copies of the model on all devices in sampling and reading."""
    return self.topology.devices // self.tensor

  @property
  def model_bytes(self) -> int:
    """A model's weights on each device in sampling and reading."""
    return self.c.parameters * self.itemsize // self.tensor

  @property
  def held(self) -> int:
    """The weights that are on each device in sampling."""
    return self.model_bytes * models_that_stay(self.model_bytes, self.topology.chip.memory)

  @property
  def others(self) -> int:
    """Of those weights the ones beside the model at work."""
    return self.held - self.model_bytes

  @property
  def local_mesh(self) -> AbstractMesh:
    return sharding.abstract_mesh(self.topology.local, tensor=self.tensor)

  @property
  def shape(self) -> Llama:
    return _shape(self.c, self.dtype)

  @property
  def layers(self) -> int:
    """The weights that every token goes through, without embedding and head."""
    return self.c.parameters - self.c.vocab * self.c.width * (1 if self.c.tied else 2)

  @property
  def head(self) -> int:
    return self.c.vocab * self.c.width


@functools.cache
def _shape(c: LlamaConfig, dtype: str) -> Llama:
  return jax.eval_shape(lambda: llama.cast(llama.init(c, 0), dtype))
