"""Clusters prompts, or any vectors, with k-means.

  python -m alma_jax.tools.cluster --model=mini --input=prompts.jsonl --k=1000 --output=clusters
  python -m alma_jax.tools.cluster --input=embeddings.npy --k=1000 --iterations=20 --output=clusters

The input is JSONL, whose rows have `messages` or `prompt` and perhaps an `id` as for alma_jax.tools.sample, or vectors:
a 2-D .npy of floats, a directory of such files, or a pattern like "shards/*.npy", in the order of their names. They are
mapped into memory and clustered as they are. Prompts are embedded with --model, a base model for preference: the mean
of the last hidden states over all tokens but the first, centred and scaled in every dimension, with length 1. In the
directory --output there are then

  assignments.parquet   row (from 0), id (of prompts, as text), cluster, distance to the cluster's centroid
  centroids.npy         [k, dimensions], 32 bits
  report.json           sizes, inertia after every iteration, and the most central prompts of some clusters
  embeddings/           of prompts: 16 bits, before they are centred and scaled; --input may name this directory, and
                        clusters the same as before, with another --k perhaps

With --spherical all vectors and centroids have length 1: what counts is the angle. The same command goes on where a
killed one stopped, and the files then have the bytes of one that was never killed (on the same devices and with the
same --rows, else the last digits differ). Of a finished one it shows the report again.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine import embed, kmeans
from alma_jax.errors import RunError
from alma_jax.keys import key_of, random_numbers
from alma_jax.llama.config import read_config
from alma_jax.store import data, shards
from alma_jax.store.data import DataError
from alma_jax.tools import command, jsonl, sample

FORMAT = 1  # goes up when the files of an output change meaning
PART = 16384  # prompts in a file of embeddings
WHITENING = "whitening.npy"  # [2, dimensions] beside them: what centres and what scales
BLOCK = 2**24  # numbers that are read at a time
ROW_GROUP = 65536
EVERY = 60.0  # seconds between two checkpoints of k-means
FEW = 39  # rows per cluster; with fewer, centroids follow single rows
SHOWN = 3  # largest clusters and random ones in the report, and prompts of each


def main(arguments):
  """The exit status."""
  flags = _flags().values(arguments)
  flags.vectors = _is_vectors(flags.input)
  if flags.vectors and flags.model:
    _flags().error(f"--model embeds prompts, and --input={flags.input} means vectors: leave --model out")
  if not flags.vectors and not flags.model:
    _flags().error(f"--input={flags.input} holds prompts: give --model, which embeds them (vectors are .npy files)")
  return command.status(lambda: run(flags))


def _flags():
  flags = command.Flags("alma_jax.tools.cluster", __doc__)
  flags.usage = "python -m alma_jax.tools.cluster --input=FILE --k=K --output=DIR [--model=DIR] [--flag=value ...]"
  add = flags.add_argument
  add("--input", required=True, metavar="FILE", help="JSONL, .npy, a directory of .npy files or a pattern")
  add("--output", required=True, metavar="DIR", help="a directory, which is made")
  add("--k", required=True, type=command.COUNT, help="clusters")
  add("--iterations", type=command.COUNT, default=20, help="at most; fewer where nothing changes any more (20)")
  add("--spherical", action="store_true", help="vectors and centroids of length 1")
  add("--seed", type=command.NATURAL, default=0, help="another seed, other centroids to begin with (0)")
  model = "of prompts: a Hugging Face directory, a finished stage of a run, or mini: the model in this package"
  add("--model", metavar="DIR", help=model)
  add("--chat", type=command.CHAT, help="of prompts: chat format, where the model's files do not tell")
  add("--raw", action="store_true", help="of prompts: no chat format, but the prompt's text after the BOS token")
  add("--max_tokens", type=command.COUNT, default=2048, help="of prompts: longer ones are cut (2048)")
  add("--rows", type=command.COUNT, default=32, help="of prompts: per call, per copy of the model (32)")
  add("--tensor", type=command.COUNT, default=1, help="of prompts: devices that share one copy of the model (1)")
  return flags


def run(flags):
  output = pathlib.Path(flags.output)
  _, host, checkpoint = (None, None, None) if flags.vectors else command.opened(flags, _base_of, raw=flags.raw)
  fields, names = _decides(flags, host, checkpoint)
  _agree(output, fields, names)
  if (output / "report.json").exists():
    return print(_told(flags, ", all there before"))
  vectors = _vectors(flags) if flags.vectors else None
  facts = {"rows": len(vectors)} if flags.vectors else _survey(flags, host)
  _check_k(flags, facts["rows"])
  with _held(output, fields, names):
    if flags.vectors:
      _check_finite(flags, vectors)
    else:
      vectors = _embedded(flags, host, checkpoint, facts["rows"])
    found = _fitted(flags, vectors)
    distances = _distances(vectors, found)
    examples = [] if flags.vectors else _examples(flags, found.labels, distances)
    _write_assignments(flags, found.labels, distances, examples)
    shards.save_array(output / "centroids.npy", found.centroids)
    facts |= {"dimensions": vectors.shape[1], "k": flags.k, "sizes": _sizes(found.labels, flags.k)}
    shards.write_json(output / "report.json", facts | {"k-means": found.report, "examples": examples})
    (output / "iteration.npz").unlink(missing_ok=True)
  print(_told(flags))


# What decides the output, and who writes it


def _base_of(run):
  model = command.json_of(run / "config.json")["model"]
  raise RunError(
    f"{run} is a run, and prompts are embedded with the base model it started from: give --model={model['path']}"
    f" --chat={model['chat']}; or give one of its stages, such as {run / 'sft_1'}"
  )


def _decides(flags, host, checkpoint):
  """(what decides the output, what to call those that are digests)."""
  if flags.vectors:
    digests = [(path.name, shards.digest(path)) for path in _files(flags.input)]
    fields, names = {"tool": "cluster", "input": jsonl.short_digest(digests)}, {"input": flags.input}
  else:
    next(jsonl.read(flags.input), None)  # the clearest error first
    fields, names = command.decides("cluster", flags, host, checkpoint)
    fields["max_tokens"] = flags.max_tokens
  chosen = {name: getattr(flags, name) for name in ("k", "iterations", "spherical", "seed")}
  return fields | chosen | {"format": FORMAT}, names


def _agree(output, fields, names):
  """Raises unless the output is new or was begun with the same fields."""
  if output.exists() and not output.is_dir():
    raise RunError(f"--output: {output} is a file; name a directory")
  if not output.exists() and not output.parent.is_dir():
    raise RunError(f"--output: there is no directory {output.parent}; make it first")
  path = output / "settings.json"
  if not path.exists():
    if output.exists() and any(not p.name.startswith(".") for p in output.iterdir()):
      raise RunError(f"--output: {output} holds other files; name a new directory")
    return
  try:
    old = json.loads(path.read_text(encoding="utf-8"))
    was, called = old["fields"], old["names"]
  except (ValueError, KeyError):
    raise RunError(f"{path} is damaged: give another --output, or delete {output}") from None
  shown = lambda of, calls, key: f"{calls[key]} ({of.get(key)})" if key in calls else json.dumps(of.get(key))
  changed = [
    f"  {key}: {shown(was, called, key)} -> {shown(fields, names, key)}"
    for key in sorted(was.keys() | fields.keys())
    if was.get(key) != fields.get(key)
  ]
  if changed:
    kept = f" (--input={output / 'embeddings'} has the same vectors)" if (output / "embeddings").exists() else ""
    raise RunError(
      f"{output} was made with other values than this start asks for:\n" + "\n".join(changed) + "\n"
      f"Put the old value back, or give another --output{kept}, or delete {output} to have it made again."
    )


@contextlib.contextmanager
def _held(output, fields, names):
  """The output directory with its settings, for this process alone."""
  try:
    output.mkdir(exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
  except OSError as e:
    raise RunError(f"--output: cannot make {output}: {e.strerror}") from None
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise RunError(f"{output}: another process is writing there; wait for it or give another --output") from None
    except OSError:
      pass  # a file system without locks
    for directory in (output, output / "embeddings"):
      shards.remove_temporaries(directory)
    if not (output / "settings.json").exists():
      shards.write_json(output / "settings.json", {"fields": fields, "names": names})
    yield
  finally:
    os.close(handle)


def _check_k(flags, rows):
  if flags.k > rows:
    raise DataError(f"--k={flags.k}: {flags.input} has only {rows:,} rows, and every cluster needs one")
  if rows < FEW * flags.k:
    few = f"warning: {rows / flags.k:.1f} rows per cluster; below {FEW}, centroids follow single rows: lower --k"
    tqdm.tqdm.write(few, file=sys.stderr)


def _bar(description, total, unit, done=0):
  return tqdm.tqdm(
    total=total, initial=done, desc=f"{description:<28}", unit=f" {unit}", file=sys.stderr, mininterval=0.5,
    dynamic_ncols=True, smoothing=0.1,
  )  # fmt: skip


# Vectors


def _blocks(vectors):
  """The first and last row (exclusive) of one block after the other."""
  step = max(1, BLOCK // vectors.shape[1])
  return [(begin, min(begin + step, len(vectors))) for begin in range(0, len(vectors), step)]


def _is_vectors(name):
  return pathlib.Path(name).is_dir() or name.endswith(".npy") or any(mark in name for mark in "*?[")


def _files(name):
  """The .npy files that --input means, in order."""
  path = pathlib.Path(name)
  if path.is_file():  # whatever is in its name
    return [path]
  files = sorted(path.glob("*.npy")) if path.is_dir() else sorted(map(pathlib.Path, glob.glob(name)))
  if not files:
    raise DataError(f"--input: {f'there is no .npy file in {name}' if path.is_dir() else f'{name}: no such file'}")
  made = command.json_of(path.parent / "settings.json").get("fields", {}).get("tool") == "cluster"
  if made and path.is_dir() and path / WHITENING not in files:
    raise RunError(f"--input: {path} is half made; the command that makes it goes on from there")
  return files


def _vectors(flags):
  """The embed.Rows of --input; a DataError names the file that is none or does not fit the others."""
  files = _files(flags.input)
  arrays = {path: _array(path) for path in files}
  width = arrays[files[0]].shape[1]
  for path, array in arrays.items():
    if array.shape[1] != width:
      raise DataError(f"{path}: rows of {array.shape[1]} numbers; those of {files[0]} have {width}")
  whitening = [np.array(arrays.pop(path)) for path in files if path.name == WHITENING and len(files) > 1]
  if len(whitening) > 1:
    raise DataError(f"--input: {flags.input} means the embeddings of several outputs, which are not scaled alike")
  if not sum(map(len, arrays.values())):
    raise DataError(f"--input: {flags.input}: there are no rows")
  return embed.Rows(tuple(arrays.values()), *(whitening or [None]), unit=bool(whitening) or flags.spherical)


def _array(path):
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise DataError(f"{path}: no .npy file of numbers ({error})") from None
  if array.ndim != 2 or not array.shape[1]:
    raise DataError(f"{path}: an array of shape {array.shape}; expected [rows, dimensions]")
  if array.dtype not in (np.float16, np.float32, np.float64):
    raise DataError(f"{path}: values of type {array.dtype}; expected float16, float32 or float64")
  return array


def _check_finite(flags, vectors):
  paths = [path for path in _files(flags.input) if path.name != WHITENING]
  with _bar("reading", len(vectors), "rows") as bar:
    for path, array in zip(paths, vectors.arrays):
      for begin, end in _blocks(array):
        fine = np.isfinite(array[begin:end]).all(axis=1)
        if not fine.all():
          raise DataError(f"{path}, row {begin + int(fine.argmin())} (from 0): a value that is not finite")
        bar.update(end - begin)


# Prompts


def _survey(flags, host):
  """How many rows the input holds and how many are too long; all is checked before the first one is embedded."""
  rows = cut = 0
  for row in sample.asked(flags, host):
    rows, cut = rows + 1, cut + (len(row.ids) > _longest(flags, host))
  if not rows:
    raise DataError(f"{flags.input}: the file holds no rows")
  return {"rows": rows, "cut": cut}


def _longest(flags, host):
  return min(flags.max_tokens, read_config(host.directory).max_positions)


def _embedded(flags, host, checkpoint, total):
  """The embed.Rows of the input's prompts, whose embeddings are on disk part by part."""
  directory = pathlib.Path(flags.output) / "embeddings"
  paths = [directory / f"rows-{part:05d}.npy" for part in range(-(-total // PART))]
  missing = [part for part, path in enumerate(paths) if not path.exists()]
  if missing:
    model = host.model(checkpoint, embed.layout())
    done = total - sum(min(PART, total - part * PART) for part in missing)
    host.say(f"{host.directory}: chat format {host.chat.name if host.chat else 'none'}; {total:,} prompts")
    with host.bar("embedding", total, "prompts", done=done) as bar:
      for part, rows in enumerate(jsonl.chunks(sample.asked(flags, host), PART)):
        if part in missing:
          ids = [row.ids[: _longest(flags, host)] for row in rows]
          found = embed.embeddings(model, ids, flags.rows, host.local_mesh, bar.update)
          shards.save_array(paths[part], _halved(flags, rows, found))
    del model
  host.free()
  vectors = embed.Rows(tuple(map(_array, paths)))
  if not (directory / WHITENING).exists():
    shards.save_array(directory / WHITENING, _whitening(vectors))
  return embed.Rows(vectors.arrays, np.array(_array(directory / WHITENING)), unit=True)


def _halved(flags, rows, found):
  with np.errstate(over="ignore"):
    half = found.astype(np.float16)
  fine = np.isfinite(half).all(axis=1)
  if not fine.all():
    raise DataError(
      f"{flags.input}, line {rows[int(fine.argmin())].line}: the model's hidden states are not finite, or too large for"
      " 16 bits"
    )
  return half


def _whitening(vectors):
  """The mean and the deviation of every dimension, the latter with the floor that `embed.projection` has."""
  total, squares = np.zeros((2, vectors.shape[1]))
  for begin, end in _blocks(vectors):
    total += vectors[begin:end].sum(axis=0, dtype=np.float64)
  mean = total / len(vectors)
  for begin, end in _blocks(vectors):
    squares += ((vectors[begin:end] - mean) ** 2).sum(axis=0)
  deviation = np.sqrt(squares / len(vectors))
  return np.stack([mean, np.maximum(deviation, 1e-3 * np.median(deviation) + 1e-12)]).astype(np.float32)


# Clusters


def _fitted(flags, vectors):
  """The Clustering; what a killed start has saved of it counts."""
  path, saved = pathlib.Path(flags.output) / "iteration.npz", None
  if path.exists():
    with np.load(path, allow_pickle=False) as file:
      saved = int(file["step"]), {name: file[name] for name in file.files if name != "step"}
  last = time.monotonic()

  def save(step, arrays):
    nonlocal last
    if time.monotonic() - last >= EVERY:
      with shards.atomic(path) as file:
        np.savez(file, step=step, **arrays)
      last = time.monotonic()

  with _bar("k-means", flags.iterations, "iterations", done=saved[0] if saved else 0) as bar:
    mesh = kmeans.mesh_for(flags.k, vectors.shape[1], jax.local_devices())
    settings = kmeans.Settings(flags.k, flags.iterations, spherical=flags.spherical)
    key, hooks = key_of(flags.seed, "k-means"), kmeans.FitHooks(bar.update, save, lambda: saved)
    return kmeans.fit(vectors, settings, key, mesh, hooks=hooks)


def _distances(vectors, found):
  """Of every row to its centroid, fp32."""
  distances = np.empty(len(vectors), np.float32)
  for begin, end in _blocks(vectors):
    apart = vectors[begin:end] - found.centroids[found.labels[begin:end]]
    distances[begin:end] = np.linalg.norm(apart, axis=1)
  return distances


def _sizes(labels, k):
  sizes = np.bincount(labels, minlength=k)
  return {
    "smallest": int(sizes.min()),
    "median": float(np.median(sizes)),
    "largest": int(sizes.max()),
    "singletons": int((sizes == 1).sum()),
    "empty": int((sizes == 0).sum()),
  }


def _examples(flags, labels, distances):
  """The largest clusters and some random ones, each with its most central rows."""
  sizes = np.bincount(labels, minlength=flags.k)
  largest = np.argsort(-sizes, kind="stable")[:SHOWN]
  others = np.setdiff1d(np.flatnonzero(sizes), largest)
  random = random_numbers(flags.seed, "examples").permutation(others)[:SHOWN]
  examples = []
  for kind, clusters in (("largest", largest), ("random", random)):
    for cluster in clusters.tolist():
      rows = np.flatnonzero(labels == cluster)
      rows = rows[np.unique(distances[rows], return_index=True)[1][:SHOWN]]  # one of those that are alike
      examples.append({"why": kind, "cluster": cluster, "size": int(sizes[cluster]), "rows": rows.tolist()})
  return examples


def _write_assignments(flags, labels, distances, examples):
  """assignments.parquet; on the way, which passes over the prompts, the examples get theirs."""
  rows = _rows(flags)
  prompts = {row: None for example in examples for row in example["rows"]}
  columns = [("row", pa.int64()), ("id", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())]
  shape = pa.schema([column for column in columns if not (flags.vectors and column[0] == "id")])
  with (
    shards.atomic(pathlib.Path(flags.output) / "assignments.parquet") as file,
    pq.ParquetWriter(file, shape, compression="zstd", compression_level=3) as writer,
  ):
    for begin in range(0, len(labels), ROW_GROUP):
      end = min(begin + ROW_GROUP, len(labels))
      table = {"row": np.arange(begin, end), "cluster": labels[begin:end], "distance": distances[begin:end]}
      if not flags.vectors:
        read = list(itertools.islice(rows, end - begin))
        table["id"] = [str(given) for given, _ in read]
        prompts |= {row: read[row - begin][1] for row in prompts if begin <= row < end}
      writer.write_table(pa.table(table, schema=shape))
  for example in examples:
    example["prompts"] = [prompts[row] for row in example["rows"]]


def _rows(flags):
  """(id, what the user said last) of every prompt."""
  for line, item in jsonl.read(flags.input):
    where = f"{flags.input}, line {line}"
    messages = data.row_of(item, (), line, where).messages
    given = jsonl.id_of(item, where)
    yield prompt_id(messages) if given is None else given, messages[-1]["content"]


def _told(flags, there=""):
  """What the report says, in a few lines."""
  report = command.json_of(pathlib.Path(flags.output) / "report.json")
  sizes, first, last = report["sizes"], report["k-means"]["inertia"][0], report["k-means"]["inertia_final"]
  lines = [
    f"{flags.output}: {report['rows']:,} rows of {report['dimensions']:,} numbers in {report['k']:,} clusters{there}",
    f"  sizes: smallest {sizes['smallest']:,}, median {sizes['median']:,g}, largest {sizes['largest']:,};"
    f" {sizes['singletons']:,} singletons, {sizes['empty']:,} empty",
    f"  inertia: {first:.6g} at first, {last:.6g} after {len(report['k-means']['inertia'])} iterations",
  ]
  if report.get("cut"):
    lines.append(f"  {report['cut']:,} prompts are longer than --max_tokens and were cut")
  for example in report["examples"]:
    lines.append(f"  cluster {example['cluster']} ({example['why']}), {example['size']:,} rows, such as")
    for prompt in example["prompts"]:
      text = " ".join(prompt.split())
      lines.append(f"    {text[:100]}{'...' if len(text) > 100 else ''}")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
