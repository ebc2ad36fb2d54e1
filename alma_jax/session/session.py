"""What every stage has at hand: the run directory, the meshes, the tokenizer and chat format, models on devices.

One `Session` per process. Training uses `mesh`, which spans all hosts; sampling, scoring and embedding use
`local_mesh`, which spans this host's devices only, so that no host waits for another inside a stage.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import tqdm

from alma_jax import config as configs
from alma_jax.llama import config as llama_config
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.store import shards
from alma_jax.text import chat, tokenizer

MINI_CHECKPOINT = pathlib.Path(__file__).parent.parent / "mini" / "checkpoint"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model directory in Hugging Face format and the digest of what is in it."""

  name: str
  directory: pathlib.Path
  content: str


class Session:
  def __init__(self, run, config, mesh, local_mesh):
    configs.check(config, 1 + config.feedback_rounds)
    self.run, self.config, self.mesh, self.local_mesh = run, config, mesh, local_mesh
    if not config.model.path:
      raise configs.ConfigError("config.model.path is empty: give the directory of a base model in Hugging Face format")
    directory = MINI_CHECKPOINT if config.model.path == "mini" else pathlib.Path(config.model.path).expanduser()
    llama_config.read_config(directory)  # the clearest error first
    self.chat = chat.format_by_name(config.model.chat)
    self.tokenizer, _ = chat.prepare(tokenizer.load_tokenizer(directory), self.chat)
    self.base = Checkpoint("base", directory, _content(directory))
    self._held = {}

  def feedback_rounds(self):
    """2, 3, ...: round 1 is the initial SFT."""
    return range(2, 2 + self.config.feedback_rounds)

  def config_for(self, round):
    """The config with the round's overrides; also written to the run directory."""
    resolved = configs.for_round(self.config, round)
    if self.run.host == 0:
      directory = self.run.dir / f"round_{round:02d}"
      directory.mkdir(exist_ok=True)
      shards.write_json(directory / "config.json", json.loads(json.dumps(resolved.to_dict(), default=str)))
    return resolved

  @functools.cached_property
  def dtype(self):
    name = self.config.model.dtype
    return name if name != "auto" else ("float32" if jax.default_backend() == "cpu" else "bfloat16")

  def describe_text(self):
    """The part of every fingerprint that says how text becomes tokens."""
    return {"tokenizer": self.tokenizer.fingerprint, "chat": dataclasses.asdict(self.chat)}

  def model(self, checkpoint, layout):
    """The checkpoint on this host's devices, "stacked" or "unrolled"; the last one asked for stays loaded."""
    key = (checkpoint.content, layout)
    if key not in self._held:
      self._held.clear()  # one model at a time on the devices
      model = self.load(checkpoint, self.local_mesh, sharding.DECODE, self.dtype)
      self._held[key] = jax.jit(llama.unrolled)(model) if layout == "unrolled" else model
    return self._held[key]

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
    return self.local_mesh.shape["data"] * self.local_mesh.shape["fsdp"]

  def place(self, x):
    """A host array with its leading axis spread over this host's devices."""
    return jax.device_put(x, sharding.batch_sharding(self.local_mesh))

  def bar(self, description, total, unit):
    """A progress bar with rate and time left, on the first host only."""
    return tqdm.tqdm(
      total=total,
      desc=f"{description:<28}",
      unit=f" {unit}",
      disable=self.run.host != 0,
      file=sys.stderr,
      mininterval=0.5,
      dynamic_ncols=True,
      smoothing=0.1,
    )

  def say(self, text):
    """A line above the progress bars, from the first host only."""
    if self.run.host == 0:
      tqdm.tqdm.write(text, file=sys.stderr)


def key_of(*words):
  """Two 32-bit words that follow from the given words alone, e.g. (seed, round, stage, prompt id, sample id): the
  source of everything random, so that a sample or a draw is the same on every host and after every restart."""
  digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
  return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_numbers(*words):
  """A NumPy generator that follows from the words alone."""
  return np.random.default_rng(key_of(*words))


def _content(directory):
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
