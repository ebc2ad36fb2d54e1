"""Weights in and out: Hugging Face directories (config.json + safetensors) to Llama models and back.

  model = load("Llama-3.2-1B")                                         # one device, the file's dtype
  model = load("Llama-3.1-8B", make_mesh(fsdp=8), dtype=jnp.bfloat16)  # every device reads its own slices
  save("out", model, tokenizer=tok, chat_template=jinja, stop_ids=[128001, 128009], bos_id=128000)

Files are memory-mapped and copied slice by slice, so that a host holds at most one stacked weight at a time,
whatever the size of the model. `save` writes tensor by tensor; transformers and vLLM read what it writes as
it is. On several hosts every one of them calls `load` and `save`, and all of them must see the directory.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from alma_jax.llama import model as llama
from alma_jax.llama.config import ModelError, read_config, to_hf
from alma_jax.llama.sharding import TRAIN, shardings

# Our path: (their name, how many of our leading axes are inputs). Theirs are matrices (outputs, inputs); ours
# are (inputs..., outputs...) in natural shapes. 0: the same on both sides.
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

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def to_ours(x, inputs, shape):
  """Their array in our `shape`, without copying."""
  if not inputs:
    return x
  outputs = len(shape) - inputs
  return x.reshape(shape[inputs:] + shape[:inputs]).transpose(*range(outputs, len(shape)), *range(outputs))


def to_theirs(x, inputs):
  """Our array as their (outputs, inputs) matrix."""
  return x.reshape(math.prod(x.shape[:inputs]), -1).T if inputs else x


def _their_shape(shape, inputs):
  return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def load(directory, mesh=None, rules=TRAIN, dtype=None):
  """The Llama of a Hugging Face directory, stacked; `dtype` None keeps the files' (the widest if mixed).

  With a mesh the weights are placed by `rules`; without one the model lies on the default device.
  """
  directory = pathlib.Path(directory)
  c = read_config(directory)
  found = {name: x for path in _weight_files(directory) for name, x in _open(path).items()}
  abstract = jax.eval_shape(lambda: llama.init(c, 0))
  leaves, tree = _flatten(abstract)
  wanted = {path: _their_names(path, c) for path, _ in leaves}
  _check(found, leaves, wanted, c, directory)
  if dtype is None:
    dtypes = {found[name].dtype for names in wanted.values() for name in names}
    dtype = functools.reduce(jnp.promote_types, dtypes)
  places = [None] * len(leaves)
  if mesh is not None:
    places = [place.get_value() for _, place in _flatten(shardings(abstract, mesh, rules))[0]]
  weights = []
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for (path, leaf), place in zip(leaves, places):
      tensors = [found[name] for name in wanted[path]]
      weights.append(leaf.replace(_read(tensors, path, leaf.get_value().shape, place, dtype, pool)))
  return jax.tree.unflatten(tree, weights)


def _flatten(model):
  """[(path such as "blocks.q", Param)], and the tree they came from."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves], tree


def _their_names(path, c):
  name, _ = NAMES[path]
  return [name.format(layer) for layer in range(c.depth)] if _stacked(path) else [name]


def _stacked(path):
  return path.startswith("blocks.")


def _read(tensors, path, shape, place, dtype, pool):
  """One final array from their tensors (one for each layer, or just one), every device's slice by itself."""
  inputs, stacked = NAMES[path][1], _stacked(path)
  views = [to_ours(x, inputs, shape[1:] if stacked else shape) for x in tensors]
  seen = {}  # replicas share one slice

  def slab(index):
    key = tuple((s.start, s.stop) for s in index)
    if key not in seen:
      layers, rest = (views[index[0]], index[1:]) if stacked else (views, index)
      out = np.empty((len(layers), *layers[0][rest].shape), dtype)
      list(pool.map(lambda i: out.__setitem__(i, layers[i][rest]), range(len(layers))))
      seen[key] = out if stacked else out[0]
    return seen[key]

  if place is None:
    return jnp.asarray(slab((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, place, slab, dtype=dtype)


def _weight_files(directory):
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


def _open(path):
  """{their name: memory-mapped array} of one file: 8 bytes of length, a JSON header, raw data."""
  size = path.stat().st_size
  broken = ModelError(
    f"{path}: cut short or not a safetensors file ({size} bytes): an unfinished download or a git-lfs"
    " pointer; fetch it again"
  )
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
      raise broken
    try:
      header = json.loads(f.read(length))
    except ValueError:
      raise broken from None
  header.pop("__metadata__", None)
  data = np.memmap(path, np.uint8, mode="r")[8 + length :]
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise ModelError(f"{path}: {name} has type {entry['dtype']}; supported: {', '.join(_DTYPES)}")
    begin, end = entry["data_offsets"]
    if end > len(data):
      raise broken
    tensors[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
  return tensors


def _check(found, leaves, wanted, c, directory):
  """Raises ModelError unless `found` is exactly the weights that the config describes."""
  names = {name for group in wanted.values() for name in group}
  missing = [name for group in wanted.values() for name in group if name not in found]
  if missing:
    raise ModelError(f"{directory}: {len(missing)} of {len(names)} tensors are missing: {_few(missing)}")
  spare = [name for name in found if name not in names and not name.endswith("rotary_emb.inv_freq")]
  if c.tied and "lm_head.weight" in spare:
    if not np.array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
      raise ModelError(
        f"{directory}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding;"
        " set it to false"
      )
    spare.remove("lm_head.weight")
  if spare:
    raise ModelError(f"{directory}: {len(spare)} tensors that this Llama does not have: {_few(spare)}")
  for path, leaf in leaves:
    shape = leaf.get_value().shape
    shape = _their_shape(shape[1:] if _stacked(path) else shape, NAMES[path][1])
    for name in wanted[path]:
      if found[name].shape != shape:
        raise ModelError(f"{directory}: {name} has shape {found[name].shape}, config.json asks for {shape}")


def _few(names, limit=3):
  return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def save(
  directory,
  model,
  tokenizer=None,
  chat_template=None,
  eos_token=None,
  stop_ids=(),
  bos_id=None,
  pad_id=None,
  dtype=None,
  max_shard_bytes=5e9,
  extra_config=None,
):
  """Writes `model` (stacked, on any mesh) as a Hugging Face directory; an older export there is replaced.

  All is written beside and then renamed: the directory is whole or not there.
  """
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").is_file():
    raise ModelError(f"{directory}: is there already and holds no model; give a new directory")
  dtype = np.dtype(dtype or model.embed[...].dtype)
  if dtype not in _CODES:
    raise ModelError(f"{directory}: cannot write {dtype} weights; give dtype float32, bfloat16 or float16")
  new = directory.with_name(f".{directory.name}.new")
  writer = jax.process_index() == 0
  if writer:
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
  _write_weights(new if writer else None, _their_tensors(model, dtype), dtype, max_shard_bytes)
  if writer:
    # Explicit nulls in config.json: transformers would fill a missing id with that of Llama-2.
    ids = {"bos_token_id": bos_id, "eos_token_id": list(stop_ids) or None, "pad_token_id": pad_id}
    kind = {"torch_dtype": dtype.name}  # the spelling that every release of transformers reads
    _write_json(new / "config.json", to_hf(model.c) | ids | kind | (extra_config or {}))
    _write_json(new / "generation_config.json", {key: x for key, x in ids.items() if x is not None})
    if tokenizer is not None:
      tokenizer.save(new, eos_token=eos_token)
    if chat_template is not None:
      _write_chat_template(new, chat_template)
    _replace(directory, new)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"save {directory}")


def _their_tensors(model, dtype):
  """[(their name, their shape, function that brings their array to the host)], bottom to top."""

  def one(path, layer=None):
    name, inputs = NAMES[path]
    owner, skip = (model, 0) if layer is None else (model.blocks, 1)
    x = getattr(owner, path.removeprefix("blocks."))[...]
    fetch = lambda: _on_host(_one_of_theirs(x, layer, inputs, dtype))
    return name.format(layer), _their_shape(x.shape[skip:], inputs), fetch

  in_block = [path for path in NAMES if _stacked(path)]
  layers = [one(path, layer) for layer in range(model.c.depth) for path in in_block]
  return [one("embed"), *layers, one("norm"), *([] if model.c.tied else [one("head")])]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _one_of_theirs(x, layer, inputs, dtype):
  """Their form of our x, or of one of its layers; made on the devices: accelerators transpose faster than NumPy."""
  return to_theirs(x if layer is None else x[layer], inputs).astype(dtype)


def _on_host(x):
  """NumPy array of x, wherever its shards lie; on several hosts all must ask."""
  return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _write_weights(directory, tensors, dtype, max_shard_bytes):
  """One safetensors file, or several and an index; a host without `directory` only takes part."""
  sizes = [math.prod(shape) * dtype.itemsize for _, shape, _ in tensors]
  shards, room = [[]], max_shard_bytes
  for tensor, size in zip(tensors, sizes):
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room -= size
  n = len(shards)
  files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
  for file, shard in zip(files, shards):
    with open(directory / file if directory else os.devnull, "wb") as f:
      _write_file(f, shard, dtype)
  if directory and n > 1:
    where = {name: file for file, shard in zip(files, shards) for name, *_ in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_file(f, tensors, dtype):
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape, _ in tensors:
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  f.write(len(text).to_bytes(8, "little") + text)
  for _, _, fetch in tensors:
    f.write(np.ascontiguousarray(fetch()).view(np.uint8))


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2) + "\n")


def _write_chat_template(directory, chat_template):
  """Into both homes: tokenizer_config.json (every release reads it), chat_template.jinja (newer ones do)."""
  (directory / "chat_template.jinja").write_text(chat_template)
  path = directory / "tokenizer_config.json"
  if path.is_file():
    _write_json(path, json.loads(path.read_text()) | {"chat_template": chat_template})


def _replace(directory, new):
  """Renames `new` to `directory`; what was there goes only afterwards."""
  old = directory.with_name(f".{directory.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if directory.exists():
    directory.rename(old)
  new.rename(directory)
  shutil.rmtree(old, ignore_errors=True)


def resize(model, vocab, mesh=None, rules=TRAIN):
  """The model with room for `vocab` tokens; rows of new ones are the mean of the rows that are there."""
  if vocab < model.c.vocab:
    raise ModelError(f"a vocabulary of {model.c.vocab} tokens cannot shrink to {vocab}")

  def grown(param, axis):
    x = param[...]
    mean = jnp.mean(x.astype(jnp.float32), axis, keepdims=True).astype(x.dtype)
    return param.replace(jnp.concatenate([x, jnp.repeat(mean, vocab - x.shape[axis], axis)], axis))

  def change(model):
    new = nnx.clone(model)
    new.c = dataclasses.replace(model.c, vocab=vocab)
    new.embed = grown(model.embed, 0)
    if not model.c.tied:
      new.head = grown(model.head, 1)
    return new

  places = None if mesh is None else shardings(jax.eval_shape(change, model), mesh, rules)
  return jax.jit(change, out_shardings=places)(model)


def reinit_untrained(model, token_ids):
  """(model, ids that were reset): rows of `token_ids` that were never trained become the mean of the others.

  Base models ship such rows for reserved tokens (Llama-3: the chat markers); they are nearly zero, or copies
  of another row. Embedding and head are judged each by itself; give the special tokens of your chat format.
  """
  ids = jnp.array(sorted(set(token_ids)), jnp.int32)
  new, reset = nnx.clone(model), np.zeros(len(ids), bool)
  for name, axis in (("embed", 0),) if model.c.tied else (("embed", 0), ("head", 1)):
    param = getattr(model, name)
    fix = jax.jit(functools.partial(_reset_rows, axis=axis), out_shardings=(param[...].sharding, None))
    rows, untrained = fix(param[...], ids)
    setattr(new, name, param.replace(rows))
    reset |= _on_host(untrained)
  return new, [int(i) for i, hit in zip(ids, reset) if hit]


def _reset_rows(x, ids, axis):
  rows = jnp.moveaxis(x, axis, 0)
  norm = jnp.linalg.norm(rows.astype(jnp.float32), axis=1)
  empty = norm < 1e-3 * jnp.median(norm)
  copies = jax.lax.map(lambda i: jnp.sum(jnp.all(rows == rows[i], axis=1)) > 1, ids)
  untrained = empty[ids] | copies
  hit = jnp.zeros(len(rows), bool).at[ids].set(untrained)
  trained = ~(hit | empty)[:, None]
  mean = jnp.sum(jnp.where(trained, rows.astype(jnp.float32), 0), axis=0) / jnp.sum(trained)
  return jnp.moveaxis(jnp.where(hit[:, None], mean.astype(x.dtype), rows), 0, axis), untrained
