"""What sampling and scoring need, with or without a run directory: a model's tokenizer and chat format, models on this
host's devices, progress bars.

  host = Host(config, local_mesh)  # config.model: path, chat, dtype; config.engine: slots, rows
  checkpoint = Checkpoint("policy", host.directory, content_of(host.directory))
  model = host.model(checkpoint, "unrolled")

`Session` adds what a run has. Everything here lives on `local_mesh`, this host's devices, so that no host waits for
another inside a stage.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import sys

import jax
import tqdm

from alma_jax.llama import config as llama_config
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.text import chat, tokenizer

MINI_CHECKPOINT = pathlib.Path(__file__).parent.parent / "mini" / "checkpoint"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model directory in Hugging Face format and the digest of what is in it."""

  name: str
  directory: pathlib.Path
  content: str


def model_directory(path):
  """The directory that `path` names; "mini" is the base model that comes with the package."""
  return MINI_CHECKPOINT if str(path) == "mini" else pathlib.Path(path).expanduser()


class Host:
  def __init__(self, config, local_mesh, speaks=True):
    """`speaks`: whether this process shows bars and lines."""
    self.config, self.local_mesh, self._speaks = config, local_mesh, speaks
    self.directory = model_directory(config.model.path)
    llama_config.read_config(self.directory)  # the clearest error first
    self.chat, self.tokenizer = None, tokenizer.load_tokenizer(self.directory)
    if config.model.chat:  # else plain text alone is read and written
      self.chat = chat.format_by_name(config.model.chat)
      self.tokenizer, _ = chat.prepare(self.tokenizer, self.chat)
    self._held = {}

  @functools.cached_property
  def dtype(self):
    name = self.config.model.dtype
    return name if name != "auto" else ("float32" if jax.default_backend() == "cpu" else "bfloat16")

  def model(self, checkpoint, layout):
    """The checkpoint on this host's devices, "stacked" or "unrolled". The last ones asked for stay there, as many as
    `models_kept`, so that switching between them reads no file."""
    key = (checkpoint.content, layout)
    if key in self._held:
      self._held[key] = self._held.pop(key)  # the latest goes last
      return self._held[key]
    while len(self._held) >= max(1, self.models_kept):
      self._held.pop(next(iter(self._held)))
    model = self.load(checkpoint, self.local_mesh, sharding.DECODE, self.dtype)
    self._held[key] = jax.jit(llama.unrolled)(model) if layout == "unrolled" else model
    return self._held[key]

  @functools.cached_property
  def model_bytes(self):
    """Of one model's weights, on each device."""
    c = llama_config.read_config(self.directory)
    return c.parameters * jax.numpy.dtype(self.dtype).itemsize // self.local_mesh.shape["tensor"]

  @functools.cached_property
  def device_bytes(self):
    """The memory of the smallest of this host's devices; None where the device does not tell (CPUs)."""
    stats = [device.memory_stats() for device in self.local_mesh.local_devices]
    return min(s["bytes_limit"] for s in stats) if all(s and "bytes_limit" in s for s in stats) else None

  @property
  def models_kept(self):
    """Three, the checkpoints that a round samples from, where they leave most of the memory for sequences."""
    return 3 if 3 * self.model_bytes <= 0.4 * (self.device_bytes or _host_bytes()) else 1

  @property
  def training_bytes(self):
    """What training may fill on each device; devices that do not tell (CPUs) share the host's memory."""
    return self.device_bytes or _host_bytes() // jax.local_device_count()

  @property
  def free_bytes(self):
    """What sampling may fill on each device, beside the models; None where the device does not tell."""
    if self.device_bytes is None:
      return None
    return int(0.9 * self.device_bytes) - self.models_kept * self.model_bytes  # the allocator wastes some

  def load(self, checkpoint, mesh, rules, dtype):
    """The weights as they are on disk, with rows for the tokens that the chat format added to the tokenizer."""
    model = weights.load(checkpoint.directory, mesh, rules, dtype)
    if self.tokenizer.size > model.c.vocab:
      model = weights.resize(model, self.tokenizer.size, mesh, rules)
    return model

  def free(self):
    """Forget the loaded model, before training takes the memory."""
    self._held.clear()

  @property
  def local_ways(self):
    """Over how many groups of this host's devices a batch is spread."""
    return sharding.replicas(self.local_mesh)

  def bar(self, description, total, unit, done=0):
    """A progress bar with rate and time left, from the first host only; `done` of the total was there before."""
    return tqdm.tqdm(
      total=total,
      initial=done,
      desc=f"{description:<28}",
      unit=f" {unit}",
      disable=not self._speaks,
      file=sys.stderr,
      mininterval=0.5,
      dynamic_ncols=True,
      smoothing=0.1,
    )

  def say(self, text):
    """A line above the progress bars, from the first host only."""
    if self._speaks:
      tqdm.tqdm.write(text, file=sys.stderr)


def _host_bytes():
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def content_of(directory):
  """A digest of a model directory: all of every small file, size and both ends of every large one."""
  digest = hashlib.sha256()
  for path in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as file:
      if size <= 2**26:
        digest.update(file.read())
      else:
        digest.update(file.read(2**20))
        file.seek(-(2**20), 2)
        digest.update(file.read())
  return digest.hexdigest()
