"""Weights in and out: Hugging Face directories (config.json + safetensors) to Llama models and back.

  model = load("Llama-3.2-1B")                                         # one device, the file's dtype
  model = load("Llama-3.1-8B", make_mesh(fsdp=8), dtype=jnp.bfloat16)  # every device reads its own slices
  save("out", model, TextSide(tokenizer=tok, chat_template=jinja, stop_ids=[128001, 128009], bos_id=128000))

Files are memory-mapped and copied slice by slice, so a host holds at most one stacked weight at a time (or a few
unrolled ones), whatever the size of the model. `load(..., check=f)` calls f(path, begin, end) before it reads these
bytes of a file. `save` writes tensor by tensor, in files that transformers and vLLM load without changes. With several
hosts, all of them call `load` and `save`, and all of them must see the directory.

Their matrices are (outputs, inputs), one per layer; ours are (inputs..., outputs...) in natural shapes, stacked:

  theirs  model.layers.0.self_attn.q_proj.weight [N * H, D]    ours  blocks.q [L, D, N, H]    inputs: D
          model.layers.1.self_attn.q_proj.weight [N * H, D]
  theirs  model.layers.0.self_attn.o_proj.weight [D, N * H]    ours  blocks.o [L, N, H, D]    inputs: N, H
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from alma_jax.errors import writing
from alma_jax.llama import model as llama
from alma_jax.llama.config import Directory, LlamaConfig, ModelError, read_config, to_hf
from alma_jax.llama.sharding import TRAIN, shardings

Shape = tuple[int, ...]

# Our path: (their name, the number of our leading axes that are inputs; 0: the same shape on both sides).
NAMES = {
  "embed": ("model.embed_tokens.weight", 0),
  "blocks.attn_norm": ("model.layers.{}.input_layernorm.weight", 0),
  "blocks.q": ("model.layers.{}.self_attn.q_proj.weight", 1),
  "blocks.k": ("model.layers.{}.self_attn.k_proj.weight", 1),
  "blocks.v": ("model.layers.{}.self_attn.v_proj.weight", 1),
  "blocks.o": ("model.layers.{}.self_attn.o_proj.weight", 2),
  "blocks.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", 0),
  "blocks.gate": ("model.layers.{}.mlp.gate_proj.weight", 1),
  "blocks.up": ("model.layers.{}.mlp.up_proj.weight", 1),
  "blocks.down": ("model.layers.{}.mlp.down_proj.weight", 1),
  "norm": ("model.norm.weight", 0),
  "head": ("lm_head.weight", 1),
}
SCORE = "score.weight"  # stands for "lm_head.weight" where the head scores texts

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def to_ours(x: np.ndarray, inputs: int, shape: Shape) -> np.ndarray:
  """Their array in our `shape`, without copying; o_proj: [D, N * H] -> [D, N, H] -> [N, H, D]."""
  if not inputs:
    return x
  outputs = len(shape) - inputs
  return x.reshape(shape[inputs:] + shape[:inputs]).transpose(*range(outputs, len(shape)), *range(outputs))


def to_theirs(x: Any, inputs: int) -> Any:
  """Our array as their (outputs, inputs) matrix."""
  return x.reshape(math.prod(x.shape[:inputs]), -1).T if inputs else x


def _their_shape(shape: Shape, inputs: int) -> Shape:
  return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def _stacked(path: str) -> bool:
  return path.startswith("blocks.")


# ---- Reading


Check = Callable[[pathlib.Path, int, int], None]  # raises unless these bytes of a file are sound


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A memory-mapped tensor of a file, or a view of it in another form."""

  x: np.ndarray
  path: pathlib.Path
  origin: int  # the address of the file's first byte
  check: Check | None

  def read(self, index: Any = ()) -> np.ndarray:
    """x[index], whose bytes are checked."""
    found = self.x[index]
    if self.check and found.size:
      begin = found.__array_interface__["data"][0] - self.origin
      last = sum((n - 1) * stride for n, stride in zip(found.shape, found.strides, strict=True))
      self.check(self.path, begin, begin + last + found.itemsize)
    return found


class _Leaf(NamedTuple):
  path: str  # ours, such as "blocks.q"
  param: nnx.Variable
  names: list[str]  # of its tensors: one per layer, or one


def load(
  directory: Directory,
  mesh: Mesh | None = None,
  rules: Mapping[str, str] = TRAIN,
  dtype: DTypeLike | None = None,
  head: Collection[str] | None = None,
  check: Check | None = None,
  unrolled: bool = False,
) -> llama.Llama:
  """The Llama of a Hugging Face directory, stacked or `unrolled`; `dtype` None keeps the files' dtype (the widest if
  mixed).

  With a mesh the weights are placed by `rules`; without one the model lies on the default device. `head` as in `files`:
  such a model gives hidden states, and its logits mean nothing.
  """
  abstract, found, wanted, tree = files(directory, head, check)
  if dtype is None:
    dtype = functools.reduce(jnp.promote_types, {found[name].x.dtype for leaf in wanted for name in leaf.names})
  if unrolled:
    abstract = jax.eval_shape(llama.unrolled, abstract)
    leaves, tree = _flatten(abstract)
    wanted = [_of_one_layer(path, param) for path, param in leaves]

  # Each weight goes straight to its place, so no device holds it in both layouts: the layers of a stacked weight are
  # read at once, or several of the smaller unrolled ones.
  places = [None] * len(wanted)
  if mesh is not None:
    places = [place.get_value() for _, place in _flatten(shardings(abstract, mesh, rules))[0]]
  with ThreadPoolExecutor() as pool:

    def weight(leaf: _Leaf, place: NamedSharding | None) -> Any:
      path, param, names = leaf
      shape, inputs = param.get_value().shape, NAMES[path][1]
      ours = shape[1:] if _stacked(path) and not unrolled else shape
      views = [dataclasses.replace(found[name], x=to_ours(found[name].x, inputs, ours)) for name in names]
      return param.replace(_read(views, shape, place, dtype, pool))

    weights = list((pool.map if unrolled else map)(weight, wanted, places))
  return jax.tree.unflatten(tree, weights)


def _of_one_layer(path: str, param: nnx.Variable) -> _Leaf:
  """The leaf "blocks.3.q" of an unrolled model, by the path that a stacked one has."""
  if not _stacked(path):
    return _Leaf(path, param, [NAMES[path][0]])
  blocks, layer, name = path.split(".")
  ours = f"{blocks}.{name}"
  return _Leaf(ours, param, [NAMES[ours][0].format(layer)])


class Files(NamedTuple):
  """The model that a directory describes, still without numbers, and where its numbers are."""

  abstract: llama.Llama
  tensors: dict[str, _Stored]  # of all files, memory-mapped, by their name
  wanted: list[_Leaf]  # the leaves of `abstract`
  tree: Any


def files(directory: Directory, head: Collection[str] | None = None, check: Check | None = None) -> Files:
  """A directory that holds exactly the weights that its config describes, else a ModelError. Reads headers only.

  `head` names the tensors of another head, which stands in the place of the output head: see llama/heads.py.
  """
  directory = pathlib.Path(directory)
  c = read_config(directory)
  found = {name: x for path in _weight_files(directory) for name, x in _open(path, check).items()}
  if head is not None:
    c = dataclasses.replace(c, tied=True)  # no output head
  elif c.tied and NAMES["embed"][0] not in found and NAMES["head"][0] in found:
    found[NAMES["embed"][0]] = found.pop(NAMES["head"][0])  # safetensors' save_model keeps one name of a shared tensor
  abstract = _shapes(c)
  leaves, tree = _flatten(abstract)
  wanted = []
  for path, param in leaves:
    name = NAMES[path][0]
    wanted.append(_Leaf(path, param, [name.format(layer) for layer in range(c.depth)] if _stacked(path) else [name]))
  _check(found, wanted, c, directory, head or ())
  return Files(abstract, found, wanted, tree)


@functools.cache
def _shapes(c: LlamaConfig) -> llama.Llama:
  """A model of shapes without numbers; tracing it once serves all of a run's checkpoints."""
  return jax.eval_shape(lambda: llama.init(c, 0))


def _flatten(model: Any) -> tuple[list[tuple[str, nnx.Variable]], Any]:
  """[(path such as "blocks.q", Param)], and the tree they came from."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves], tree


def _read(
  views: Sequence[_Stored], shape: Shape, place: NamedSharding | None, dtype: DTypeLike, pool: ThreadPoolExecutor
) -> Array:
  """One final array of this shape from views of the files, a view per layer or just one; each device reads its slice.

  A device that holds the third quarter of blocks.q [32, 4096, 32, 128] along D asks for index (:, 2048:3072, :, :). Its
  slab [32, 1024, 32, 128] is filled layer by layer, from views[0][2048:3072], views[1][2048:3072], ...
  """
  stacked, seen = len(shape) > views[0].x.ndim, {}  # replicas share one slab

  def slab(index: Any) -> np.ndarray:  # a slice per axis
    key = tuple((s.start, s.stop) for s in index)
    if key not in seen:
      layers, rest = (views[index[0]], index[1:]) if stacked else (views, index)
      out = np.empty((len(layers), *layers[0].x[rest].shape), dtype)

      def fill(i: int) -> None:
        out[i] = layers[i].read(rest)

      list(pool.map(fill, range(len(layers))) if stacked else map(fill, range(len(layers))))
      seen[key] = out if stacked else out[0]
    return seen[key]

  if place is None:
    return jnp.asarray(slab((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, place, slab, dtype=dtype)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  if (directory / "model.safetensors").is_file():
    return [directory / "model.safetensors"]
  index = directory / "model.safetensors.index.json"
  if index.is_file():
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
      raise ModelError(
        f"{index}: {len(missing)} of the {len(names)} files that it names are not here ({_few(missing)});"
        " copy or download them again"
      )
    return [directory / name for name in names]
  others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".safetensors"))
  mend = "; a model directory holds model.safetensors, or several files and model.safetensors.index.json"
  if any(name.endswith(".bin") for name in others):
    mend = (
      "; where torch is installed, AutoModelForCausalLM.from_pretrained(old, torch_dtype='auto')"
      ".save_pretrained(new) converts them"
    )
  elif any(name.endswith((".pth", ".pt")) for name in others):
    mend = "; Meta's own format is converted by transformers' convert_llama_weights_to_hf.py"
  here = f", only {_few(others)}" if others else ""
  raise ModelError(f"{directory}: no model.safetensors and no index of several{here}{mend}")


def _open(path: pathlib.Path, check: Check | None) -> dict[str, _Stored]:
  """Memory-mapped tensors by their name, of one file: 8 bytes with the header's length, the header (JSON), raw data."""
  size = path.stat().st_size
  broken = ModelError(
    f"{path}: cut short or not a safetensors file ({size} bytes): an unfinished download or a git-lfs"
    " pointer; fetch it again"
  )
  with open(path, "rb") as f:
    if check:
      check(path, 0, min(size, 8))
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise broken
    if check:
      check(path, 8, 8 + length)
    try:
      header = json.loads(f.read(length))
    except ValueError:
      raise broken from None
  header.pop("__metadata__", None)
  whole = np.memmap(path, np.uint8, mode="r")
  data, origin = whole[8 + length :], whole.__array_interface__["data"][0]
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise ModelError(f"{path}: {name} has type {entry['dtype']}; supported: {', '.join(_DTYPES)}")
    begin, end = entry["data_offsets"]
    if end > len(data):
      raise broken
    x = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    tensors[name] = _Stored(x, path, origin, check)
  return tensors


def _check(
  found: Mapping[str, _Stored],
  wanted: Sequence[_Leaf],
  c: LlamaConfig,
  directory: pathlib.Path,
  head: Collection[str] = (),
) -> None:
  """Raise a ModelError unless `found` is exactly the weights that the config describes, and those of the `head`."""
  names = dict.fromkeys([*(name for leaf in wanted for name in leaf.names), *head])
  missing = [name for name in names if name not in found]
  if missing:
    raise ModelError(f"{directory}: {len(missing)} of {len(names)} tensors are missing: {_few(missing)}")
  spare = [name for name in found if name not in names and not name.endswith("rotary_emb.inv_freq")]
  if c.tied and "lm_head.weight" in spare:
    if not np.array_equal(found["lm_head.weight"].read(), found["model.embed_tokens.weight"].read()):
      raise ModelError(
        f"{directory}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding;"
        " set it to false"
      )
    spare.remove("lm_head.weight")
  if spare:
    raise ModelError(f"{directory}: {len(spare)} tensors that this Llama does not have: {_few(spare)}")
  for path, param, group in wanted:
    shape = param.get_value().shape
    shape = _their_shape(shape[1:] if _stacked(path) else shape, NAMES[path][1])
    for name in group:
      if found[name].x.shape != shape:
        raise ModelError(f"{directory}: {name} has shape {found[name].x.shape}, config.json asks for {shape}")


def _few(names: Sequence[str], limit: int = 3) -> str:
  return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- Writing


class SavesItself(Protocol):
  def save(self, directory: pathlib.Path, *, eos_token: str | None) -> object: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSide:
  """What a model directory holds besides weights: how text becomes ids, and where generation stops."""

  tokenizer: SavesItself | None = None
  chat_template: str | None = None  # Jinja
  eos_token: str | None = None  # the token where chats stop; None: the tokenizer's own
  stop_ids: Sequence[int] = ()
  bos_id: int | None = None
  pad_id: int | None = None


def save(
  directory: Directory,
  model: llama.Llama,
  text: TextSide = TextSide(),
  dtype: DTypeLike | None = None,
  max_shard_bytes: float = 5e9,
) -> None:
  """Write `model` (stacked, on any mesh) as a Hugging Face directory; an older export there is replaced.

  Everything is written beside it and then renamed, so the directory is either whole or absent.
  """
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").is_file():
    raise ModelError(f"{directory}: is there already and holds no model; give a new directory")
  dtype = np.dtype(dtype or model.embed[...].dtype)
  if dtype not in _CODES:
    raise ModelError(f"{directory}: cannot write {dtype} weights; give dtype float32, bfloat16 or float16")
  new = directory.with_name(f".{directory.name}.new")
  writer = jax.process_index() == 0
  try:
    with writing(directory):
      if writer:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
      _write(new if writer else None, model, text, dtype, max_shard_bytes)
  except Exception:
    if writer:  # the disk may be full: half a model takes no room
      shutil.rmtree(new, ignore_errors=True)
    raise
  if writer:
    _replace(directory, new)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"save {directory}")


def _write(
  new: pathlib.Path | None, model: llama.Llama, text: TextSide, dtype: np.dtype, max_shard_bytes: float
) -> None:
  """Write all files of the directory; a host without one only helps to fetch the weights."""
  _write_weights(new, _their_tensors(model, dtype), dtype, max_shard_bytes)
  if new:
    # Missing ids are written as nulls in config.json: transformers would fill a missing key with Llama-2's id.
    ids = {"bos_token_id": text.bos_id, "eos_token_id": list(text.stop_ids) or None, "pad_token_id": text.pad_id}
    kind = {"torch_dtype": dtype.name}  # the spelling that every release of transformers reads
    _write_json(new / "config.json", to_hf(model.c) | ids | kind)
    _write_json(new / "generation_config.json", {key: x for key, x in ids.items() if x is not None})
    if text.tokenizer is not None:
      text.tokenizer.save(new, eos_token=text.eos_token)
    if text.chat_template is not None:
      _write_chat_template(new, text.chat_template)


class _Tensor(NamedTuple):
  name: str  # theirs, as is the shape
  shape: Shape
  fetch: Callable[[], np.ndarray]  # brings it to the host


def _their_tensors(model: llama.Llama, dtype: np.dtype) -> list[_Tensor]:
  """The tensors of a model in their form, bottom to top."""

  def one(path: str, layer: int | None = None) -> _Tensor:
    name, inputs = NAMES[path]
    name = SCORE if path == "head" and model.c.outputs else name
    owner, skip = (model, 0) if layer is None else (model.blocks, 1)
    x = getattr(owner, path.removeprefix("blocks."))[...]
    shape = _their_shape(x.shape[skip:], inputs)
    return _Tensor(name.format(layer), shape, lambda: _on_host(_one_of_theirs(x, layer, inputs, dtype)))

  in_block = [path for path in NAMES if _stacked(path)]
  layers = [one(path, layer) for layer in range(model.c.depth) for path in in_block]
  return [one("embed"), *layers, one("norm"), *([] if model.head is None else [one("head")])]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _one_of_theirs(x: Array, layer: int | None, inputs: int, dtype: np.dtype) -> Array:
  """Their form of our x, or of one of its layers; made on the devices: accelerators transpose faster than NumPy."""
  return to_theirs(x if layer is None else x[layer], inputs).astype(dtype)


def _on_host(x: Array) -> np.ndarray:
  """x as a NumPy array, wherever its shards lie; with several hosts, all of them must ask."""
  return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _write_weights(
  directory: pathlib.Path | None, tensors: Sequence[_Tensor], dtype: np.dtype, max_shard_bytes: float
) -> None:
  """Write one safetensors file, or several and an index; a host without `directory` only helps to fetch."""
  sizes = [math.prod(tensor.shape) * dtype.itemsize for tensor in tensors]
  shards, room = [[]], max_shard_bytes
  for tensor, size in zip(tensors, sizes, strict=True):
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room -= size
  n = len(shards)
  files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
  for file, shard in zip(files, shards, strict=True):
    with open(directory / file if directory else os.devnull, "wb") as f:
      _write_file(f, shard, dtype)
  if directory and n > 1:
    where = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_file(f: IO[bytes], tensors: Sequence[_Tensor], dtype: np.dtype) -> None:
  """Write a safetensors file (see `_open`); spaces make the header a multiple of 8 bytes."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor in tensors:
    begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
    header[tensor.name] = {"dtype": _CODES[dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
  text = json.dumps(header, allow_nan=False).encode()
  text += b" " * (-len(text) % 8)
  f.write(len(text).to_bytes(8, "little") + text)
  for tensor in tensors:
    f.write(np.ascontiguousarray(tensor.fetch()).view(np.uint8).data)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_chat_template(directory: pathlib.Path, chat_template: str) -> None:
  """Write it to both homes: tokenizer_config.json (every release reads it), chat_template.jinja (newer ones do)."""
  (directory / "chat_template.jinja").write_text(chat_template)
  path = directory / "tokenizer_config.json"
  if path.is_file():
    _write_json(path, json.loads(path.read_text()) | {"chat_template": chat_template})


def _replace(directory: pathlib.Path, new: pathlib.Path) -> None:
  """Rename `new` to `directory`, and only then delete what was there."""
  old = directory.with_name(f".{directory.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if directory.exists():
    directory.rename(old)
  new.rename(directory)
  shutil.rmtree(old, ignore_errors=True)


# ---- Other tokens


def resize(model: llama.Llama, vocab: int, mesh: Mesh | None = None, rules: Mapping[str, str] = TRAIN) -> llama.Llama:
  """The model with room for `vocab` tokens; the row of a new token is the mean of the old rows."""
  if vocab < model.c.vocab:
    raise ModelError(f"a vocabulary of {model.c.vocab} tokens cannot shrink to {vocab}")

  def larger(param: nnx.Variable, axis: int) -> Any:
    x = param[...]
    mean = jnp.mean(x.astype(jnp.float32), axis, keepdims=True).astype(x.dtype)
    return param.replace(jnp.concatenate([x, jnp.repeat(mean, vocab - x.shape[axis], axis)], axis))

  def grown(param: nnx.Variable, axis: int) -> Any:
    change = functools.partial(larger, axis=axis)
    place = None if mesh is None else shardings(jax.eval_shape(change, param), mesh, rules)
    return jax.jit(change, out_shardings=place)(param)

  new = nnx.clone(model)  # which shares all other weights
  new.c = dataclasses.replace(model.c, vocab=vocab)
  new.embed = grown(model.embed, 0)
  if model.head is not None:
    new.head = grown(model.head, 1)
  return new


def with_scores(
  model: llama.Llama, head: np.ndarray, mesh: Mesh | None = None, rules: Mapping[str, str] = TRAIN
) -> llama.Llama:
  """The model with the head [D, outputs] that scores texts instead of its output head."""

  def change(model: llama.Llama, head: Array) -> llama.Llama:
    new = nnx.clone(model)
    new.c = dataclasses.replace(model.c, outputs=head.shape[1])
    new.head = nnx.data(nnx.Param(head.astype(model.embed[...].dtype), axes=("embed", "vocab")))
    return new

  places = None if mesh is None else shardings(jax.eval_shape(change, model, head), mesh, rules)
  return jax.jit(change, out_shardings=places)(model, head)


def reinit_untrained(model: llama.Llama, token_ids: Iterable[int]) -> tuple[llama.Llama, list[int]]:
  """The model with the untrained rows among `token_ids` set to the mean of the trained rows, and the ids of those rows.

  Base models ship untrained rows for reserved tokens (Llama-3: the chat markers); they are nearly zero, or copies of
  another row. Embedding and head are judged each by itself. Give the special tokens of your chat format.
  """
  ids = jnp.array(sorted(set(token_ids)), jnp.int32)
  new, reset = nnx.clone(model), np.zeros(len(ids), bool)
  for name, axis in (("embed", 0),) if model.c.tied else (("embed", 0), ("head", 1)):
    param = getattr(model, name)
    fix = jax.jit(functools.partial(_reset_rows, axis=axis), out_shardings=(param[...].sharding, None))
    rows, untrained = fix(param[...], ids)
    setattr(new, name, param.replace(rows))
    reset |= _on_host(untrained)
  return new, [int(i) for i, hit in zip(ids, reset, strict=True) if hit]


def _reset_rows(x: Array, ids: Array, axis: int) -> tuple[Array, Array]:
  """x with the untrained of the rows `ids` (they lie along `axis`) reset, and which of the ids were untrained, bool."""
  rows = jnp.moveaxis(x, axis, 0)
  norm = jnp.linalg.norm(rows.astype(jnp.float32), axis=1)
  empty = norm < 1e-3 * jnp.median(norm)
  copies = jax.lax.map(lambda i: jnp.sum(jnp.all(rows == rows[i], axis=1)) > 1, ids)
  untrained = empty[ids] | copies
  hit = jnp.zeros(len(rows), bool).at[ids].set(untrained)
  trained = ~(hit | empty)[:, None]
  mean = jnp.sum(jnp.where(trained, rows.astype(jnp.float32), 0), axis=0) / jnp.sum(trained)
  return jnp.moveaxis(jnp.where(hit[:, None], mean.astype(x.dtype), rows), 0, axis), untrained
