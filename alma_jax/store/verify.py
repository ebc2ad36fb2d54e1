"""Damage is found where data is read: the blocks that a read touches are hashed once per process.

  check(stage.dir / "labels.npy")                      all of a file, or a DamageError
  check(stage.dir / "model/model.safetensors", a, b)   the blocks of these bytes
  with opened(stage.dir / "part-00000-of-00064.parquet") as file: ...     what is read of it

What a file should be stands in the manifest of the stage whose directory it lies in. A file that no manifest vouches
for, such as a user's own, passes unread.
"""

import io
import itertools
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from alma_jax.errors import RunError
from alma_jax.store import digests, layout
from alma_jax.store.digests import Digest, Path, Stamp

_DEPTH = 3  # directories above a file where its stage's manifest may lie: stage/model/files


class DamageError(RunError):
  """A file of a finished stage is not the one that was written."""


class Voucher:
  """What a stage says of one of its files. `stage` is the directory to delete if the file is damaged."""

  def __init__(self, path: Path, digest: Digest, stage: pathlib.Path) -> None:
    self.path, self.digest, self.stage = pathlib.Path(path), digest, stage

  def check(self, begin: int = 0, end: int | None = None) -> None:
    """Raise a DamageError unless the blocks with these bytes are as they were written."""
    mark = self.found()
    end = mark.size if end is None else end
    blocks = range(begin // digests.BLOCK, max(begin // digests.BLOCK + 1, -(-end // digests.BLOCK)))
    new = [i for i in blocks if (mark, i, self.digest.blocks[i]) not in _checked]
    digests.over_blocks(new, lambda i: self._check_block(mark, i))

  def found(self) -> Stamp:
    """The file's stamp; a DamageError if it is missing or has another size."""
    try:
      mark = digests.stamp(self.path)
    except FileNotFoundError:
      raise self._damage("is missing", f"has {self.digest.size} bytes and the SHA-256 {self.digest.whole}") from None
    if mark.size != self.digest.size:
      state = f"has {mark.size} bytes instead of {self.digest.size}"
      raise self._damage(state, f"has the SHA-256 {self.digest.whole}")
    return mark

  def _check_block(self, mark: Stamp, i: int) -> None:
    key = (mark, i, self.digest.blocks[i])
    with _guard:
      mine = _locks.setdefault(key, threading.Lock())
    with mine:  # threads that read neighbours in one block hash it once
      if key in _checked:
        return
      found = digests.of_block(self.path, i)
      if found != self.digest.blocks[i]:
        where = f"between bytes {i * digests.BLOCK} and {min((i + 1) * digests.BLOCK, mark.size)}"
        raise self._damage(f"is damaged {where}: their SHA-256 is {found}", f"has {self.digest.blocks[i]} there")
      _checked.add(key)
    with _guard:
      _locks.pop(key, None)

  def _damage(self, state: str, wanted: str) -> DamageError:
    return DamageError(
      f"{self.path} {state}; the file that stage {self.stage} was finished with {wanted}. Bring that file back, or"
      f" delete {self.stage} to have the stage made again."
    )


_checked: set[tuple[Stamp, int, str]] = set()  # (file, block, digest)
_locks: dict[tuple[Stamp, int, str], threading.Lock] = {}  # of blocks that are being hashed
_guard = threading.Lock()
_manifests: dict[pathlib.Path, tuple[Stamp, Mapping[str, Digest] | None]] = {}


def voucher(path: Path) -> Voucher | None:
  """What the manifest above a file says of it, None if there is none that names it."""
  whole = pathlib.Path(os.path.abspath(path))
  for directory in itertools.islice(whole.parents, _DEPTH):
    if (named := _named_in(directory)) is not None:
      digest = named.get(whole.relative_to(directory).as_posix())
      return Voucher(path, digest, directory) if digest else None
  return None


def check(path: Path, begin: int = 0, end: int | None = None) -> None:
  """Raise a DamageError unless these bytes of a stage's file are as they were written; `end` None: to its end."""
  if found := voucher(path):
    found.check(begin, end)


def check_sizes(directory: pathlib.Path, manifest: layout.Manifest) -> None:
  """Raise a DamageError unless all files of a finished stage are there with their sizes."""
  for name, digest in _digests(manifest).items():
    Voucher(directory / name, digest, directory).found()


def opened(path: Path) -> BinaryIO:
  """The file for reading, each read verified."""
  found = voucher(path)
  if found and len(found.digest.blocks) > 1:
    found.found()
    return io.BufferedReader(_Reader(found))
  if found:
    found.check()
  return open(path, "rb")


class _Reader(io.RawIOBase):
  """A file of several blocks that are verified when they are read."""

  def __init__(self, found: Voucher) -> None:
    self._voucher, self._file = found, open(found.path, "rb", buffering=0)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = 0) -> int:
    return self._file.seek(offset, whence)

  def readinto(self, buffer: Any) -> int:
    at = self._file.tell()
    end = min(at + len(memoryview(buffer).cast("B")), self._voucher.digest.size)
    if end > at:
      self._voucher.check(at, end)
    return self._file.readinto(buffer)

  def close(self) -> None:
    self._file.close()
    super().close()


def _named_in(directory: pathlib.Path) -> Mapping[str, Digest] | None:
  """The files that the stage of this directory vouches for; None if no stage of this version was finished there."""
  path = directory / layout.MANIFEST
  try:
    mark = digests.stamp(path)
  except OSError:
    return None
  if _manifests.get(path, (None,))[0] != mark:
    _manifests[path] = mark, _digests(layout.load_manifest(directory)) if layout.is_stage(directory) else None
  return _manifests[path][1]


def _digests(manifest: layout.Manifest) -> dict[str, Digest]:
  parts = {part["name"]: Digest.of_fields(part) for part in manifest["parts"]}
  return parts | {name: Digest.of_fields(of) for name, of in manifest["files"].items()}
