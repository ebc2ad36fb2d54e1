"""Models on this host's devices, with the tokenizer and chat format that a model is asked in.

  host = Host(ModelOptions(path="models/llama", chat="llama3"), EngineOptions(), local_mesh)
  checkpoint = Checkpoint("policy", host.directory, content_of(host.directory))
  model = host.model(checkpoint, "unrolled")

Everything here lives on `local_mesh`, this host's devices, so that no host waits for another inside a stage.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh

from alma_jax import names
from alma_jax.engine import score
from alma_jax.errors import NotFinite
from alma_jax.llama import config as llama_config
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.options import Checked, ConfigError, option
from alma_jax.runtime.display import Display
from alma_jax.store import digests, verify
from alma_jax.text import chat, tokenizer

T = TypeVar("T")

# Sequences, and their tokens, that the devices of a copy of the model should have room for: every step of decoding
# reads all weights, and with fewer sequences that is most of what it reads.
SEQUENCES, LONG = 96, 2048


@dataclasses.dataclass(frozen=True)
class ModelOptions(Checked):
  path: str = ""  # a Hugging Face directory, or a known word of names.MODELS
  chat: str = option("llama3", names=names.CHAT_FORMATS)
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of forward passes: bfloat16, on CPUs float32
  save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of every trained checkpoint's weights
  # Where a chat format adds tokens, the vocabulary grows to a multiple of this, which a mesh's `tensor` axis divides
  vocab_multiple: int = option(1, least=1)


@dataclasses.dataclass(frozen=True)
class EngineOptions(Checked):
  # devices that share one copy of the model in sampling and scoring; 0: as few as have room for many sequences
  tensor: int = option(0, least=0)
  slots: int = option(0, least=0)  # sequences that decode together, per copy; 0: as many as fit
  rows: int = option(32, least=1)  # rows per scoring or embedding call, per copy


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model directory in Hugging Face format, and the digest of its content."""

  name: str
  directory: pathlib.Path
  content: str

  def gave(self, error: NotFinite, name: str) -> NotFinite:
    """The error of what this model gave for an item of this name."""
    return NotFinite(
      error.item,
      f"{name}, model {self.name}: {error}. The weights in {self.directory} are not finite, or too large for the"
      " computation's dtype. If a training wrote them, look at its loss (metrics.jsonl in the stage's directory); else"
      " copy the model anew",
    )


def model_directory(path: str) -> pathlib.Path:
  """The directory of a model that a config or flag names."""
  if path in names.MODELS.words:
    return names.resolve(names.MODELS, path, "model.path")
  return pathlib.Path(path).expanduser()


def fitting_chats(tok: tokenizer.Tokenizer) -> list[str]:
  """The known chat formats that a tokenizer can write, those first that add no token to it. One that belongs to a model
  of the package is named only where all others would add tokens: it fits any tokenizer, and no other model has seen it.
  """
  fitting: list[tuple[bool, int, str]] = []
  for word in names.CHAT_FORMATS.words:
    with contextlib.suppress(tokenizer.TextError):
      added = chat.prepare(tok, chat.of(tok, names.resolve(names.CHAT_FORMATS, word, "chat")))[1]
      fitting.append((word in names.MODELS.words, len(added), word))
  others = [found for found in sorted(fitting) if not found[0]]
  if not any(added == 0 for _, added, _ in others) and len(others) < len(fitting):
    others = [found for found in fitting if found[0]]
  return [word for *_, word in others]


class Host:
  """The devices of one host, and the models that are on them."""

  def __init__(
    self,
    options: ModelOptions,
    engine: EngineOptions,
    local_mesh: jax.sharding.Mesh,
    display: Display = Display(),
    raw: bool = False,
  ) -> None:
    """With `raw` there is no chat format: plain text alone is read and written."""
    if not options.path:
      raise ConfigError("config.model.path is empty: give the directory of a base model in Hugging Face format")
    self.options, self.engine, self.local_mesh, self.display = options, engine, local_mesh, display
    self.directory = model_directory(options.path)
    _verify_text(self.directory)
    self.config = llama_config.read_config(self.directory)  # its errors are clearer than the tokenizer's
    self.tokenizer = tokenizer.load_tokenizer(self.directory)
    self._chat = None
    if not raw:
      named = names.resolve(names.CHAT_FORMATS, options.chat, "model.chat")
      try:
        fmt = chat.of(self.tokenizer, named)
        self.tokenizer, _ = chat.prepare(self.tokenizer, fmt)
        self._chat = chat.suited(self.tokenizer, fmt)
      except tokenizer.TextError as error:
        fitting = " or ".join(map(repr, fitting_chats(self.tokenizer))) or "none of the known ones"
        raise tokenizer.TextError(
          f"chat format {options.chat!r}: {error}. This tokenizer can write {fitting}; give one of these or one of your"
          " own, as package.module:NAME (model.chat, of a command --chat)"
        ) from None
    self._held: dict[tuple[str, str], Any] = {}

  @property
  def raw(self) -> bool:
    return self._chat is None

  @property
  def chat(self) -> chat.ChatFormat:
    """The chat format; a raw host has none."""
    if self._chat is None:
      raise RuntimeError("a raw host has no chat format")
    return self._chat

  @property
  def save_dtype(self) -> str:
    return self.options.save_dtype

  @functools.cached_property
  def dtype(self) -> str:
    """Of forward passes on these devices."""
    return dtype_on(self.local_mesh.devices.flat[0].platform, self.options)

  @functools.cached_property
  def pad_id(self) -> int | None:
    """The token that the model's config.json names for padding, else its tokenizer's; None where neither names one."""
    named = json.loads((self.directory / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
    if isinstance(named, int) and 0 <= named < self.tokenizer.size:
      return named
    return self.tokenizer.hf.pad_token_id

  @functools.cached_property
  def base(self) -> Checkpoint:
    """The model that the options name."""
    return Checkpoint("base", self.directory, content_of(self.directory))

  @functools.cached_property
  def trained_config(self) -> llama_config.LlamaConfig:
    """The architecture that is trained: the base model's, with rows for the tokens that the chat format added."""
    return dataclasses.replace(self.config, vocab=self.vocab)

  @property
  def vocab(self) -> int:
    """The rows of a trained model's embedding. Rows beyond the tokenizer's ids, the mean of the others at first, are
    never a target, so training makes their tokens unlikely."""
    size, multiple = self.tokenizer.size, self.options.vocab_multiple
    return self.config.vocab if size <= self.config.vocab else -(-size // multiple) * multiple

  def model(self, checkpoint: Checkpoint, layout: str) -> llama.Llama:
    """The checkpoint on this host's devices, "stacked" or "unrolled".

    The last `models_kept` of them stay there, so that switching between them reads no file.
    """

    def made() -> llama.Llama:
      return self.load(checkpoint, self.local_mesh, sharding.DECODE, self.dtype, layout == "unrolled")

    return self.held((checkpoint.content, layout), made)

  def held(self, key: tuple[str, str], load: Callable[[], T]) -> T:
    """What `load` put on this host's devices under this key: now, or earlier if it is one of the last `models_kept`."""
    if key in self._held:
      self._held[key] = self._held.pop(key)  # the latest goes last
      return self._held[key]
    while len(self._held) >= max(1, self.models_kept):
      self._held.pop(next(iter(self._held)))
    self._held[key] = load()
    return self._held[key]

  def load(
    self,
    checkpoint: Checkpoint,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, str],
    dtype: str,
    unrolled: bool = False,
  ) -> llama.Llama:
    """The weights from disk, with rows for the tokens that the chat format added to the tokenizer."""
    model = weights.load(checkpoint.directory, mesh, rules, dtype, check=verify.check, unrolled=unrolled)
    if self.tokenizer.size > model.c.vocab:
      model = weights.resize(model, self.vocab, mesh, rules)
    return model

  def free(self) -> None:
    """Forget the loaded models, before training takes the memory."""
    self._held.clear()

  @functools.cached_property
  def model_bytes(self) -> int:
    """The bytes of one model's weights on each device."""
    return self.config.parameters * jax.numpy.dtype(self.dtype).itemsize // self.local_mesh.shape["tensor"]

  @functools.cached_property
  def device_bytes(self) -> int | None:
    """The memory of the smallest of this host's devices; None where the device does not tell (CPUs)."""
    return memory_of(self.local_mesh.local_devices)

  @property
  def models_kept(self) -> int:
    """Three, the checkpoints that a round samples from, where they leave most of the memory for sequences."""
    return models_that_stay(self.model_bytes, self.device_bytes or host_bytes())

  @property
  def training_bytes(self) -> int:
    """What training may fill on each device; devices that do not tell (CPUs) share the host's memory."""
    return self.device_bytes or host_bytes() // jax.local_device_count()

  @property
  def free_bytes(self) -> int | None:
    """What sampling may fill on each device, beside the models; None where the device does not tell."""
    if self.device_bytes is None:
      return None
    return sampling_bytes(self.device_bytes) - self.models_kept * self.model_bytes

  def reading(self, common: Sequence[int] = (), progress: Callable[[int, int], object] | None = None) -> score.Setup:
    """How rows are scored on this host's devices; most of their prefixes begin with `common`."""
    return score.Setup(self.engine.rows, common, self.local_mesh, progress, self.free_bytes)

  @property
  def local_ways(self) -> int:
    """The number of groups of this host's devices that a batch is spread over."""
    return sharding.replicas(self.local_mesh)


def local_mesh(options: ModelOptions, engine: EngineOptions, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of one host's devices (default: this one's), whose `tensor` axis has the devices of a copy of the model.

  A ConfigError where the host cannot be divided so, or has no room for one copy.
  """
  devices = jax.local_devices() if devices is None else devices
  tensor, memory = engine.tensor or 1, memory_of(devices)
  if memory is not None and options.path:
    c = llama_config.read_config(model_directory(options.path))
    size = c.parameters * jax.numpy.dtype(dtype_on(devices[0].platform, options)).itemsize
    tensor = engine.tensor or tensor_for(c, dtype_on(devices[0].platform, options), len(devices), memory)
    usable, gib = sampling_bytes(memory), 2**30
    if size // tensor > usable:
      mend = "raise engine.tensor, or 0 chooses" if size <= len(devices) * usable else "no copy fits this host"
      raise ConfigError(
        f"a copy of {options.path} takes {size / tensor / gib:.1f} GiB on each of {tensor} devices (engine.tensor is"
        f" {engine.tensor}), and {usable / gib:.1f} are usable: {mend}. Sampling and judging need a copy on every host;"
        " `alma plan` names machines that have room"
      )
  if len(devices) % tensor:
    raise ConfigError(
      f"engine.tensor is {tensor} and this host has {len(devices)} devices, which it must divide: a copy of the model"
      " lies on devices of one host; 0 chooses"
    )
  return sharding.make_mesh(data=-1, tensor=tensor, devices=devices)


def tensor_for(c: llama_config.LlamaConfig, dtype: str, devices: int, memory: int) -> int:
  """As few of a host's devices as have room for a copy of the model and for SEQUENCES beside it; all of them where none
  do. Heads of keys and values are divided evenly. Llama-3-8B in bf16:

    devices that share a copy          1     2     4
    sequences, TPU v6e (28 GiB)       52   165          2 are taken
               TPU v5e (14 GiB)        -    53   166    4
               H100 (71 GiB)         224                1
  """
  size = jax.numpy.dtype(dtype).itemsize
  wanted = c.parameters * size + SEQUENCES * LONG * 2 * c.depth * c.kv_heads * c.head_dim * size
  ways = [n for n in range(1, devices + 1) if devices % n == 0 and c.kv_heads % n == 0]
  return next((n for n in ways if wanted <= n * sampling_bytes(memory)), ways[-1])


def dtype_on(platform: str, options: ModelOptions) -> str:
  """The dtype of forward passes on devices of this platform."""
  if options.dtype != "auto":
    return options.dtype
  return "float32" if platform == "cpu" else "bfloat16"


def memory_of(devices: Sequence[Any]) -> int | None:
  """The memory of the smallest of these devices; None where one does not tell (CPUs)."""
  stats = [device.memory_stats() for device in devices]
  return min(s["bytes_limit"] for s in stats) if all(s and "bytes_limit" in s for s in stats) else None


def models_that_stay(model_bytes: int, memory: int) -> int:
  """How many models stay on devices of so much memory."""
  return 3 if 3 * model_bytes <= 0.4 * memory else 1


def sampling_bytes(memory: int) -> int:
  """What models and sequences may fill of a device's memory: the allocator wastes some."""
  return int(0.9 * memory)


def host_bytes() -> int:
  """This host's memory."""
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def content_of(directory: pathlib.Path) -> str:
  """A digest of every byte of a model directory: of its .json, .safetensors and .model files.

  A large file is not read for it while its path, size, time and inode are those that were read before: in this process,
  or by an earlier start of the run, which keeps its digest. A file of a finished stage has that of the stage's manifest
  and is verified where it is read.
  """
  digest = hashlib.sha256()
  for path in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
    named = verify.voucher(path)
    found = named.digest if named else digests.remembered(path)
    digest.update(f"{path.name} {found.size} {found.whole}\n".encode())
  return digest.hexdigest()


def _verify_text(directory: pathlib.Path) -> None:
  """Raise a DamageError for a damaged config or tokenizer of a finished stage; weights are verified while they load."""
  for path in directory.glob("*"):
    if path.is_file() and path.suffix != ".safetensors":
      verify.check(path)
