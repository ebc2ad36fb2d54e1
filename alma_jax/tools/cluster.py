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

On GPUs and TPUs vectors of 16 bits (and the embeddings of prompts) are compared many times faster than those of 32.
With --spherical all vectors and centroids have length 1: what counts is the angle. With fewer different rows than --k
some clusters are empty, and the report counts them. The same command goes on where a killed one stopped, and the files
then have the bytes of one that was never killed (on the same devices and with the same --rows, else the last digits
differ). Of a finished one it shows the report again.
"""

import dataclasses
import glob
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alma_jax.engine import embed, kmeans
from alma_jax.errors import NotFinite, RunError
from alma_jax.keys import key_of, random_numbers
from alma_jax.options import ConfigError, fingerprint, option, spread
from alma_jax.runtime import clustering
from alma_jax.runtime.display import Display
from alma_jax.stages import clusters
from alma_jax.store import data, layout, shards
from alma_jax.store.data import DataError
from alma_jax.store.runs import Stage
from alma_jax.tools import command, jsonl

PART = 16384  # prompts in a file of embeddings
ASSIGNMENTS, CENTROIDS = "assignments.parquet", "centroids.npy"
WHITENING = "whitening.npy"  # [2, dimensions] beside the embeddings: what centres and what scales
ROW_GROUP = 65536
SHOWN = 3  # largest clusters and random ones in the report, and prompts of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  model: str = option("", doc="of prompts: as for alma_jax.tools.sample, but no run as a whole")
  input: str = option(doc="JSONL, .npy, a directory of .npy files or a pattern")
  output: str = option(doc="a directory, which is made")
  settings: clusters.Options = spread(clusters.Options)
  raw: bool = option(False, doc="of prompts: no chat format, but the prompt's text after the BOS token")
  max_tokens: int = option(2048, least=1, doc="of prompts: longer ones are cut")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.vectors and self.model:
      raise ConfigError(f"model embeds prompts, and --input={self.input} means vectors: leave --model out")
    if not self.vectors and not self.model:
      raise ConfigError(f"input={self.input} holds prompts: give --model, which embeds them (vectors are .npy files)")

  @property
  def vectors(self) -> bool:
    """True if the input holds vectors."""
    return pathlib.Path(self.input).is_dir() or self.input.endswith(".npy") or any(mark in self.input for mark in "*?[")


FLAGS = command.Flags("cluster", __doc__, Options, ("slots",), iterations=20)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  output = pathlib.Path(options.output)
  _check_output(output)
  job = Vectors(options) if options.vectors else Prompts(options)
  rows = None if (output / layout.FINGERPRINT).exists() else job.survey()  # all mistakes before anything is written
  fields = job.decides() | {"seed": options.seed} | fingerprint(options.settings)
  kept = f" (--input={output / 'embeddings'} has the same vectors)" if (output / "embeddings").exists() else ""
  with command.run_of(output, output, options, f"give another --output{kept}, or delete {output}") as held:
    stage = held.stage(".", fields)
    there = stage.done
    if not there:
      _make(options, stage, job, job.survey() if rows is None else rows)
  print(_told(output, ", all there before" if there else ""))


def _make(options: Options, stage: Stage, job: "Vectors | Prompts", facts: dict[str, int]) -> None:
  """Write all files of the output."""
  points, k = job.points(stage, facts["rows"]), options.settings.k
  settings = kmeans.Settings(**dataclasses.asdict(options.settings))
  try:
    mesh = kmeans.mesh_for(k, points.shape[1], jax.local_devices())
    found = clustering.fitted(stage, points, settings, key_of(options.seed, "k-means"), mesh, job.display)
  except ValueError as error:
    if not str(error).startswith("k-means: "):  # else a message for users
      raise
    raise DataError(str(error)) from None
  distances = clustering.distances(points, found)
  examples = [] if options.vectors else _examples(options, found.labels, distances)
  _write_assignments(options, stage, found.labels, distances, examples)
  shards.save_array(stage.dir / CENTROIDS, found.centroids)
  sizes = np.bincount(found.labels, minlength=k)
  counts = {"smallest": int(sizes.min()), "median": float(np.median(sizes))}
  counts |= {name: found.report[name] for name in ("largest", "singletons", "empty")}
  report = {**facts, "dimensions": points.shape[1], "k": k, "sizes": counts, "k-means": found.report}
  shards.write_json(stage.dir / layout.REPORT, report | {"examples": examples})
  (stage.dir / clustering.ITERATION).unlink(missing_ok=True)
  stage.finish(files=[ASSIGNMENTS, CENTROIDS, layout.REPORT])


def _check_output(output: pathlib.Path) -> None:
  command.check_place(output)
  if output.exists() and not output.is_dir():
    raise RunError(f"--output: {output} is a file; name a directory")
  if output.exists() and not (output / layout.FINGERPRINT).exists() and any(output.glob("[!.]*")):
    raise RunError(f"--output: {output} holds other files; name a new directory")


def _check_k(options: Options, display: Display, rows: int) -> None:
  k = options.settings.k
  if k > rows:
    raise DataError(f"--k={k}: {options.input} has only {rows:,} rows, and every cluster needs one")
  if rows < clustering.FEW * k:
    few = f"{rows / k:.1f} rows per cluster; below {clustering.FEW}, centroids follow single rows: lower --k"
    display.say(f"warning: {few}")


# Vectors


class Vectors:
  """The points of --input where it names .npy files."""

  def __init__(self, options: Options) -> None:
    """A DataError names the file that holds no vectors or does not fit the others."""
    self.options, self.display, self.files = options, Display(), _files(options.input)
    self.arrays, first = {path: _array(path) for path in self.files}, self.files[0]
    width = self.arrays[first].shape[1]
    for path, array in self.arrays.items():
      if array.shape[1] != width:
        raise DataError(f"{path}: rows of {array.shape[1]} numbers; those of {first} have {width}")
    beside = [path for path in self.files if path.name == WHITENING and len(self.files) > 1]
    whitening = [np.array(self.arrays.pop(path)) for path in beside]
    if len(whitening) > 1:
      raise DataError(f"--input: {options.input} means the embeddings of several outputs, which are not scaled alike")
    if not sum(map(len, self.arrays.values())):
      raise DataError(f"--input: {options.input}: there are no rows")
    unit = bool(whitening) or options.settings.spherical
    self.rows = embed.Rows(tuple(self.arrays.values()), *whitening, unit=unit)

  def decides(self) -> dict[str, Any]:
    """What decides the points."""
    digests = [(path.name, shards.digest(path)) for path in self.files]
    return {"tool": "cluster", "input": command.short_digest(digests)}

  def survey(self) -> dict[str, int]:
    """How many rows there are."""
    _check_k(self.options, self.display, len(self.rows))
    return {"rows": len(self.rows)}

  def points(self, stage: Stage, rows: int) -> embed.Rows:
    """All rows, which are finite."""
    del stage
    with self.display.bar("reading", rows, "rows") as bar:
      for path, array in self.arrays.items():
        for block in clustering.blocks(*array.shape):
          fine = np.isfinite(array[block]).all(axis=1)
          if not fine.all():
            raise DataError(f"{path}, row {block.start + int(fine.argmin())} (from 0): a value that is not finite")
          bar.update(block.stop - block.start)
    return self.rows


def _files(name: str) -> list[pathlib.Path]:
  """The .npy files that --input means, in order."""
  path = pathlib.Path(name)
  if path.is_file():  # whatever is in its name
    return [path]
  files = sorted(path.glob("*.npy")) if path.is_dir() else sorted(map(pathlib.Path, glob.glob(name)))
  if (path / layout.FINGERPRINT).exists() and not (path / layout.MANIFEST).exists():
    raise RunError(f"--input: {path} is half made; the command that makes it goes on from there")
  if not files:
    raise DataError(f"--input: {f'there is no .npy file in {name}' if path.is_dir() else f'{name}: no such file'}")
  return files


def _array(path: pathlib.Path) -> np.ndarray:
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise DataError(f"{path}: no .npy file of numbers ({error})") from None
  if array.ndim != 2 or not array.shape[1]:
    raise DataError(f"{path}: an array of shape {array.shape}; expected [rows, dimensions]")
  if array.dtype not in (np.float16, np.float32, np.float64):
    raise DataError(f"{path}: values of type {array.dtype}; expected float16, float32 or float64")
  return array


# Prompts


class Prompts:
  """The points that --model makes of the prompts of --input."""

  def __init__(self, options: Options) -> None:
    self.options, self.opened = options, command.open_model(options, _base_of, raw=options.raw)
    self.host = self.opened.host
    self.display = self.host.display
    self.longest = min(options.max_tokens, self.host.config.max_positions)

  def decides(self) -> dict[str, Any]:
    """What decides the points."""
    next(jsonl.read(self.options.input), None)  # the clearest error first
    return command.decides("cluster", self.options, self.opened) | {"max_tokens": self.options.max_tokens}

  def survey(self) -> dict[str, int]:
    """How many rows there are, and how many are too long; all is checked before the first one is embedded."""
    rows = cut = 0
    for row in jsonl.prompts(self.options.input, self.host):
      rows, cut = rows + 1, cut + (len(row.ids) > self.longest)
    if not rows:
      raise DataError(f"{self.options.input}: the file holds no rows")
    _check_k(self.options, self.display, rows)
    return {"rows": rows, "cut": cut}

  def points(self, stage: Stage, rows: int) -> embed.Rows:
    """The embeddings, which are on disk part by part, whitened when they are read."""
    host, made = self.host, stage.run.stage("embeddings", self.decides())
    files = [f"rows-{part:05d}.npy" for part in range(-(-rows // PART))]
    missing = {part for part, name in enumerate(files) if not (made.dir / name).exists()}
    if missing:
      self.display.say(f"{host.directory}: chat format {command.chat_name(host)}; {rows:,} prompts")
      done = rows - sum(min(PART, rows - part * PART) for part in missing)
      with self.display.bar("embedding", rows, "prompts", done=done) as bar:
        for part, some in enumerate(jsonl.chunks(jsonl.prompts(self.options.input, host), PART)):
          if part in missing:
            ids = [row.ids[: self.longest] for row in some]
            try:
              found = clustering.embedded(host, self.opened.checkpoint, ids, embed.STATES, bar.update, fit=True)
            except NotFinite as error:
              where = f"{self.options.input}, line {some[error.item].line}"
              raise self.opened.checkpoint.gave(error, where) from None
            shards.save_array(made.dir / files[part], self._halved(some, found))
            made.beat()
    host.free()
    arrays = tuple(_array(made.dir / name) for name in files)
    if not made.done:
      shards.save_array(made.dir / WHITENING, clustering.whitening(embed.Rows(arrays)))
      made.finish(files=[*files, WHITENING])
    return embed.Rows(arrays, np.array(_array(made.dir / WHITENING)), unit=True)

  def _halved(self, rows: Sequence[jsonl.Asked], found: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
      half = found.astype(np.float16)
    fine = np.isfinite(half).all(axis=1)
    if not fine.all():
      raise DataError(
        f"{self.options.input}, line {rows[int(fine.argmin())].line}: the model's hidden states are not finite, or too"
        " large for 16 bits"
      )
    return half


def _base_of(run: pathlib.Path) -> pathlib.Path:
  model = (layout.config_in(run) or {})["model"]
  raise RunError(
    f"{run} is a run, and prompts are embedded with the base model it started from: give --model={model['path']}"
    f" --chat={model['chat']}; or give one of its stages, such as {run / layout.sft_name(1)}"
  )


# Results


def _examples(options: Options, labels: np.ndarray, distances: np.ndarray) -> list[dict[str, Any]]:
  """The largest clusters and some random ones, each with its most central rows."""
  sizes = np.bincount(labels, minlength=options.settings.k)
  largest = np.argsort(-sizes, kind="stable")[:SHOWN]
  others = np.setdiff1d(np.flatnonzero(sizes), largest)
  random = random_numbers(options.seed, "examples").permutation(others)[:SHOWN]
  examples = []
  for kind, chosen in (("largest", largest), ("random", random)):
    for cluster in chosen.tolist():
      rows = np.flatnonzero(labels == cluster)
      rows = rows[np.unique(distances[rows], return_index=True)[1][:SHOWN]]  # one of those that are alike
      examples.append({"why": kind, "cluster": cluster, "size": int(sizes[cluster]), "rows": rows.tolist()})
  return examples


def _write_assignments(
  options: Options, stage: Stage, labels: np.ndarray, distances: np.ndarray, examples: list[dict[str, Any]]
) -> None:
  """Write assignments.parquet; on the way, which passes over the prompts, the examples get theirs."""
  texts = None if options.vectors else _texts(options.input)
  prompts = {row: "" for example in examples for row in example["rows"]}
  columns = [("row", pa.int64()), ("id", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())]
  shape = pa.schema([column for column in columns if texts or column[0] != "id"])
  with (
    shards.atomic(stage.dir / ASSIGNMENTS) as file,
    pq.ParquetWriter(file, shape, compression="zstd", compression_level=3) as writer,
  ):
    for begin in range(0, len(labels), ROW_GROUP):
      end = min(begin + ROW_GROUP, len(labels))
      table: dict[str, Any] = {"row": np.arange(begin, end), "cluster": labels[begin:end]}
      table["distance"] = distances[begin:end]
      if texts:
        read = list(itertools.islice(texts, end - begin))
        table["id"] = [str(given) for given, _ in read]
        prompts |= {row: read[row - begin][1] for row in prompts if begin <= row < end}
      writer.write_table(pa.table(table, schema=shape))
  for example in examples:
    example["prompts"] = [prompts[row] for row in example["rows"]]


def _texts(path: str) -> Iterator[tuple[str | int, str]]:
  """Of every prompt its id and what the user said last."""
  for line, item in jsonl.read(path):
    where = f"{path}, line {line}"
    messages = data.row_of(item, (), line, where).messages
    yield jsonl.id_of(item, messages, where), messages[-1]["content"]


def _told(output: pathlib.Path, there: str) -> str:
  """What the report says, in a few lines."""
  report = layout.read_json(output / layout.REPORT)
  sizes, first, last = report["sizes"], report["k-means"]["inertia"][0], report["k-means"]["inertia_final"]
  lines = [
    f"{output}: {report['rows']:,} rows of {report['dimensions']:,} numbers in {report['k']:,} clusters{there}",
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
