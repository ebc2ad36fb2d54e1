"""Files of records and arrays. A file appears when it is whole; equal content gives equal bytes.

`write_records(path, records, Response)` writes a Parquet file whose columns are the fields of the dataclass
and returns the file's Digest; `read_records(paths, Response)` gives back records equal to those written, with
tuples for sequences. `save_array` and `load_array` do the same for `.npy`, loaded as a memory map. Every file
is written under a hidden temporary name in its own directory and renamed when complete: readers, and the next
start after a crash, never see half a file. Files are hashed while they are written, and what a reader touches
of a finished stage's file is verified (store/verify.py).
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alma_jax.errors import RunError, writing
from alma_jax.store import digests, verify
from alma_jax.store.digests import Digest, Path
from alma_jax.store.records import Turns

T = TypeVar("T")  # a record class
ROW_GROUP = 16384  # rows; about 16 MB of text
_TURN = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])
_COLUMN = {
  str: pa.string(),
  bool: pa.bool_(),
  int: pa.int64(),
  # Doubles: a record read back must equal the one written, or a resumed run could go on with other numbers.
  float: pa.float64(),
  tuple[int, ...]: pa.list_(pa.field("element", pa.int32(), False)),
  tuple[float, ...]: pa.list_(pa.field("element", pa.float64(), False)),
  Turns: pa.list_(pa.field("element", _TURN, False)),
}
_OPTIONAL = {kind | None: column for kind, column in _COLUMN.items()}


def schema(kind: type[Any]) -> pa.Schema:
  """The Arrow schema of a record class. Fields of type float and those annotated with None may be null."""
  columns, fields = _COLUMN | _OPTIONAL, dataclasses.fields(kind)
  return pa.schema([pa.field(f.name, columns[f.type], f.type is float or f.type in _OPTIONAL) for f in fields])


def part_name(i: int, n: int) -> str:
  return f"part-{i:05d}-of-{n:05d}.parquet"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
  """A binary file that appears under `path` only when the block ends without an error."""
  path = pathlib.Path(path)
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic(path) as file:
      yield file
    _sync_directory(path.parent)


@contextlib.contextmanager
def _atomic(path: pathlib.Path) -> Iterator[BinaryIO]:
  handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp makes private files; runs are often shared in a group
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def remove_temporaries(directory: Path) -> None:
  """Deletes what a killed process left behind; call it only while no other process writes there."""
  for path in pathlib.Path(directory).glob(".*.tmp"):
    if path.is_dir():  # of a check of the file system
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def digest(path: Path) -> str:
  """The digest of a file of the user's, as hex; a large file that has not changed is not read again."""
  return digests.remembered(path).whole


def write_json(path: Path, value: Any) -> None:
  text = json_text(value, indent=2)
  with atomic(path) as file:
    file.write(f"{text}\n".encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
  """Writes an object with a seal of its other fields; `digests.intact` tells whether it still fits."""
  write_json(path, digests.sealed(json.loads(json_text(value))))


def json_text(value: Any, indent: int | None = None) -> str:
  """The value as JSON that every reader takes: a NaN or an infinity, which JSON lacks, is a RunError that names it."""
  try:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain)
  except ValueError:
    where, number = next(_not_finite(value, ""))
    raise RunError(f"{where or 'the value'} is {number}, which cannot be written as JSON: it must be finite") from None


def json_lines(rows: Iterable[Any]) -> bytes:
  """JSONL: a line for each value."""
  return "".join(json_text(row) + "\n" for row in rows).encode()


def _plain(value: Any) -> Any:
  """What JSON writes for a number of NumPy or a path."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f"{type(value).__name__} is no type of JSON: {value!r}")


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
  """Yields the numbers that are not finite, with their places: ("counts.loss[3]", nan)."""
  value = value.item() if isinstance(value, np.generic) else value
  if isinstance(value, float) and not math.isfinite(value):
    yield where, value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _not_finite(key, where)
      yield from _not_finite(item, f"{where}.{key}" if where else str(key))
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      yield from _not_finite(item, f"{where}[{i}]")


def write_records(path: Path, records: Sequence[T], kind: type[T]) -> Digest:
  """Writes dataclasses of class `kind` as one Parquet file."""
  shape = schema(kind)
  columns = [pa.array([getattr(r, field.name) for r in records], type=field.type) for field in shape]
  for field, column in zip(shape, columns, strict=True):
    if column.null_count and not field.nullable:  # Parquet would turn a missing list into an empty one
      raise ValueError(f"a {kind.__name__} record has None in its field {field.name}")
  table = pa.Table.from_arrays(columns, schema=shape)
  with atomic(path) as file:
    hashed = digests.Writer(file)
    pq.write_table(table, hashed, row_group_size=ROW_GROUP, compression="zstd", compression_level=3)
  return hashed.digest()


def read_records(paths: Path | Sequence[Path], kind: type[T]) -> list[T]:
  """The records of one file or of several in the order given."""
  paths = [paths] if isinstance(paths, str | os.PathLike) else paths
  return [record for path in paths for record in _read_one(path, kind)]


def read_rows(path: Path, rows: Sequence[int] | np.ndarray, kind: type[T]) -> list[T]:
  """The records at these rows of one file, in their order; only the row groups that have some are read."""
  with parquet(path) as file:
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    wanted = np.asarray(rows, np.int64)
    groups = np.searchsorted(ends, wanted, side="right")
    found: dict[int, T] = {}
    for group in np.unique(groups).tolist():
      begin = int(ends[group - 1]) if group else 0
      here = np.unique(wanted[groups == group])
      table = file.read_row_group(group).take(pa.array(here - begin))
      found |= zip(here.tolist(), _records(path, table, kind), strict=True)
  return [found[row] for row in wanted.tolist()]


def read_ids(paths: Sequence[Path], column: str = "id") -> np.ndarray:
  """The ids of the prompts in these files, 16 hex digits each, as numbers: uint64 [n]."""
  found = [np.zeros(0, np.uint64)]
  for path in paths:
    with parquet(path) as file:
      found.append(id_numbers(file.read(columns=[column]).column(column).to_pylist()))
  return np.concatenate(found)


def id_numbers(ids: Sequence[str]) -> np.ndarray:
  return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
  """The Parquet file for reading. (read_table would turn a directory named a=b into a column.)"""
  with verify.opened(path) as file, pq.ParquetFile(file) as table:
    yield table


def save_array(path: Path, array: Any) -> Digest:
  """Writes one `.npy`."""
  with atomic(path) as file:
    hashed = digests.Writer(file)
    np.save(hashed, np.asarray(array), allow_pickle=False)
  return hashed.digest()


def load_array(path: Path) -> np.ndarray:
  """The array of an `.npy`, all of it verified, as a memory map."""
  verify.check(path)
  return np.load(path, mmap_mode="r", allow_pickle=False)


class ArrayRows:
  """The rows of an `.npy` on disk: `shape`, `dtype`, and `[a:b]`, which verifies and maps those rows."""

  def __init__(self, path: Path) -> None:
    self._voucher = verify.voucher(path)
    if self._voucher:
      self._voucher.check(0, 1)  # the header lies in the first block
    self._array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    self.shape, self.dtype, self.ndim = self._array.shape, self._array.dtype, self._array.ndim

  def __len__(self) -> int:
    return len(self._array)

  def __getitem__(self, rows: slice) -> np.ndarray:
    found = self._array[rows]
    if self._voucher and found.size:
      begin, end, _ = rows.indices(len(self))
      data = self._voucher.digest.size - self._array.nbytes  # where the rows begin
      row = self._array.nbytes // len(self)
      self._voucher.check(data + begin * row, data + end * row)
    return found


def _read_one(path: Path, kind: type[T]) -> list[T]:
  with parquet(path) as file:
    return _records(path, file.read(), kind)


def _records(path: Path, table: pa.Table, kind: type[T]) -> list[T]:
  wanted = schema(kind)
  if table.schema.names != wanted.names:
    raise ValueError(f"{path} holds no {kind.__name__} records: its columns are {', '.join(table.schema.names)}")
  columns = []
  for field in wanted:
    values = table.column(field.name).to_pylist()
    lists = pa.types.is_list(field.type)
    columns.append([v if v is None else tuple(v) for v in values] if lists else values)
  return [kind(*row) for row in zip(*columns, strict=True)]


def _sync_directory(path: pathlib.Path) -> None:
  """Makes a rename durable; file systems that cannot (some network ones) are left alone."""
  with contextlib.suppress(OSError):
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def _current_umask() -> int:
  value = os.umask(0)
  os.umask(value)
  return value


_UMASK = _current_umask()
