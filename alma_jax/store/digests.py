"""Digests: of files by blocks, and of JSON objects that vouch for themselves.

  found = of_file("model.safetensors")
  found.fields()                        {"digest": "9f...", "size": 16060556376, "blocks": ["1b...", ...]}
  remembered("model.safetensors")       the same, from memory if path, size, time and inode are those of the last time
  sealed({"rows": 3})                   {"rows": 3, "seal": "5d..."}; `intact` says whether the seal still fits

A file of at most one block (64 MB) has its plain SHA-256, as `sha256sum` prints it, and no field `blocks`. A larger one
has the SHA-256 of its blocks' digests as text, so that a reader can check the blocks it needs and no others;
`split -b 64M --filter=sha256sum FILE` prints them.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

BLOCK = 2**26  # bytes
SEAL = "seal"  # the field of a JSON object that holds the SHA-256 of all others
_CHUNK = 2**20
_THREADS = min(8, os.cpu_count() or 1)
Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Digest:
  """Of a file with one block or more."""

  size: int
  blocks: tuple[str, ...]

  @property
  def whole(self) -> str:
    return self.blocks[0] if len(self.blocks) == 1 else hashlib.sha256("".join(self.blocks).encode()).hexdigest()

  def fields(self) -> dict[str, Any]:
    """As it stands in a manifest."""
    several = {"blocks": list(self.blocks)} if len(self.blocks) > 1 else {}
    return {"digest": self.whole, "size": self.size, **several}

  @classmethod
  def of_fields(cls, fields: Mapping[str, Any]) -> "Digest":
    return cls(fields["size"], tuple(fields.get("blocks", [fields["digest"]])))


def of_file(path: Path) -> Digest:
  size = os.stat(path).st_size
  return Digest(size, tuple(over_blocks(range(-(-size // BLOCK) or 1), lambda i: of_block(path, i))))


def of_block(path: Path, i: int) -> str:
  """The SHA-256 of the i-th block of a file."""
  digest, left, chunk = hashlib.sha256(), BLOCK, memoryview(bytearray(_CHUNK))
  with open(path, "rb", buffering=0) as file:
    file.seek(i * BLOCK)
    while left and (n := file.readinto(chunk[: min(left, _CHUNK)])):
      digest.update(chunk[:n])
      left -= n
  return digest.hexdigest()


def over_blocks(blocks: Sequence[int], work: Callable[[int], Any]) -> list[Any]:
  """What `work` returns for each block; several at a time, since hashing and reading leave the interpreter free."""
  if len(blocks) < 2:
    return [work(i) for i in blocks]
  with ThreadPoolExecutor(min(_THREADS, len(blocks))) as pool:
    return list(pool.map(work, blocks))


class Writer(io.RawIOBase):
  """Passes bytes on to a file and hashes them on the way. For writers that never seek; it does not close the file."""

  def __init__(self, file: BinaryIO) -> None:
    self._file, self._blocks, self._hash, self._size = file, [], hashlib.sha256(), 0

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    view = memoryview(data).cast("B")
    self._file.write(view)
    for piece in self._pieces(view):
      self._hash.update(piece)
      self._size += len(piece)
      if self._size % BLOCK == 0:
        self._blocks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
    return len(view)

  def _pieces(self, view: memoryview) -> list[memoryview]:
    """The bytes cut where blocks end."""
    ends = range(BLOCK - self._size % BLOCK, len(view), BLOCK)
    begins = [0, *ends]
    return [view[a:b] for a, b in zip(begins, [*ends, len(view)], strict=True) if b > a]

  def digest(self) -> Digest:
    """Of all that was written."""
    rest = [self._hash.hexdigest()] if self._size % BLOCK or not self._size else []
    return Digest(self._size, (*self._blocks, *rest))


# Objects that vouch for themselves


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """An object of plain JSON with its seal."""
  return {**value, SEAL: seal(value)}


def intact(value: Any) -> bool:
  """True for an object whose seal fits it."""
  return isinstance(value, dict) and value.get(SEAL) == seal(value)


def seal(value: Mapping[str, Any]) -> str:
  """The SHA-256 of all fields but the seal, as JSON with sorted keys."""
  plain = {name: field for name, field in value.items() if name != SEAL}
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


# What is known of large files that nobody vouches for


class Stamp(NamedTuple):
  """What tells whether a file is the one that was read before."""

  path: str
  size: int
  mtime_ns: int
  inode: int


def stamp(path: Path) -> Stamp:
  found = os.stat(path)
  return Stamp(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ino)


_known: dict[Stamp, Digest] = {}
_kept: set[Stamp] = set()  # that the file of `keep` holds
_lock = threading.Lock()


def remembered(path: Path) -> Digest:
  """The digest of a file; one of several blocks is not read again while its stamp stays the same."""
  mark = stamp(path)
  if mark.size <= BLOCK:
    return of_file(path)
  if mark not in _known:
    _known[mark] = of_file(path)
  return _known[mark]


def recall(path: pathlib.Path) -> None:
  """Take over what an earlier process has written with `keep`; a file that is damaged or not there gives nothing."""
  try:
    held = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return
  if intact(held):
    found = {Stamp(*row["stamp"]): Digest.of_fields(row) for row in held["files"]}
    _known.update(found)
    _kept.update(found)


def keep(path: pathlib.Path, write: Callable[[pathlib.Path, Any], None]) -> None:
  """Write what is known for later processes, if there is anything new; `write(path, value)` seals it."""
  with _lock:
    if _known.keys() - _kept:
      write(path, {"files": [{"stamp": list(mark), **of.fields()} for mark, of in sorted(_known.items())]})
      _kept.update(_known)
