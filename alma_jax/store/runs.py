"""The run directory: a directory per stage, each with a manifest of what it holds and what it was made from.

  with Run("runs/alma") as run:
    stage = run.stage("round_02/responses", fields={"config": {...}}, inputs={"prompts": prompts})
    for i in stage.mine(64):                        # the parts that are not on disk yet, this process's share
      stage.write_part(i, 64, make(i), Response, counts={"truncated": 3})
    stage.finish()
    responses = Artefact(stage, Response)           # reads records; an input of later stages

A stage with a manifest is done and never written again; a killed one goes on at its first missing part. The
fingerprint (fields, contents of the inputs, record format) is written before the first part. If it does not
match, the run stops with a RunError that names what changed; nothing is reused or overwritten.

Several processes of one run make the same calls in the same order on the same directory, which must be on a
shared file system. Process p writes the parts i with i % processes == p; process 0 alone writes everything
else and holds `.lock`, so that two starts never write to one run.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import logging
import numbers
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from alma_jax import __version__
from alma_jax.errors import RunError, writing
from alma_jax.store import digests, file_system, layout, shards, verify
from alma_jax.store.digests import Digest
from alma_jax.store.fingerprints import differences, fingerprint_of
from alma_jax.store.layout import Manifest, load_manifest, read_json
from alma_jax.store.lock import Lock, now
from alma_jax.store.records import FORMAT, VERSIONS

_logger = logging.getLogger(__name__)
PATIENCE = 60.0  # network file systems may show another process's file this much later
T = TypeVar("T")


class ChangedError(RunError):
  """A stage was made with other values than this start asks for: name -> "old -> new"."""

  def __init__(self, message: str, changed: Mapping[str, str]) -> None:
    super().__init__(message)
    self.changed = changed


class Watcher(Protocol):
  """Hears of what a run does, on process 0. It raises nothing and takes no time."""

  def there(self, name: str, manifest: Manifest) -> None: ...  # a stage that an earlier start has finished
  def begun(self, name: str) -> None: ...
  def finished(self, name: str, manifest: Manifest) -> None: ...
  def step(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...  # of a training
  def evaluated(self, row: Mapping[str, Any]) -> None: ...  # a new row of progress.csv


class Run:
  """One run directory. `barrier(name)` returns when all processes have called it; `made_with` (versions, devices)
  enters every manifest, outside the fingerprint."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    process: int = 0,
    processes: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
    made_with: Mapping[str, Any] | None = None,
  ) -> None:
    file_system.check_path(workdir)
    self.dir, self.made_with = pathlib.Path(workdir), dict(made_with or {})
    self.process, self.processes, self.barrier = process, processes, barrier
    self.watchers: list[Watcher] = []
    if self.dir.exists() and not self.dir.is_dir():
      raise RunError(f"{self.dir} is a file; --workdir must name a directory.")
    _check_format(self.dir)
    try:
      self.dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise RunError(f"cannot make the run directory {self.dir}: {e.strerror}.") from None
    self._lock = Lock(self.dir) if process == 0 else None
    if process == 0:
      shards.remove_temporaries(self.dir)
      self._check_file_system()
    digests.recall(self.dir / layout.DIGESTS)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    if self._lock:
      self._lock.release()

  def _check_file_system(self) -> None:
    try:
      file_system.check(self.dir)
    except BaseException:
      self.close()
      raise

  def check_shared(self) -> None:
    """Raise a RunError on a process that does not see the directory of process 0, which has locked it."""
    self.barrier("the run directory is locked")
    _wait_for(self.dir / layout.LOCK, self.processes)
    if not (self.dir / layout.LOCK).exists():
      raise RunError(
        f"process {self.process} does not see what process 0 has written in {self.dir}: --workdir must lie on a file"
        f" system that all hosts share. {file_system.ADVICE}"
      )

  def stage(
    self, name: str, fields: Mapping[str, Any], inputs: "Mapping[str, Input] | None" = None, suffix: str = ".parquet"
  ) -> "Stage":
    """The stage of this name; `fields`, nested or flat, are what decides its result besides the inputs."""
    contents = {
      key: load_manifest(made)["content"] if isinstance(made, str | pathlib.Path) else made.content
      for key, made in (inputs or {}).items()
    }
    if self.process == 0:
      digests.keep(self.dir / layout.DIGESTS, shards.write_sealed)
    made = Stage(self, name, fingerprint_of(fields, contents), suffix)
    for watcher in self.watchers:
      if made.done:
        watcher.there(name, made.manifest)
      else:
        watcher.begun(name)
    return made

  def log(self, event: str, **fields: Any) -> None:
    if self.process == 0:
      self.check()
      row = {"time": now(), "event": event, **fields}
      with writing(self.dir / layout.LOG), open(self.dir / layout.LOG, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        broken = file.read(1) not in (b"", b"\n")  # a full disk cut the last line
        file.write(f"{chr(10) * broken}{shards.json_text(row)}\n".encode())

  def save_config(self, config: Mapping[str, Any]) -> None:
    """Writes config.json, again if it changed: the fingerprints guard the artefacts."""
    path, there = self.dir / layout.CONFIG, None
    if self.process == 0:
      with contextlib.suppress(FileNotFoundError, RunError):  # a damaged file is written again
        there = read_json(path)
      if there != json.loads(json.dumps(config)):
        self.check()
        shards.write_json(path, config)

  def progress(self, row: Mapping[str, Any], more: bool = False) -> None:
    """Puts a row into progress.csv; it replaces the row with the same "round", or with `more` adds to it; columns are
    added."""
    if self.process != 0:
      return
    self.check()
    rows: list[Mapping[str, Any]] = []
    try:
      rows += layout.progress(self.dir)
    except RunError:
      _logger.warning("%s is damaged and is written again, a row for each evaluation", self.dir / layout.PROGRESS)
    before = [{name: value for name, value in old.items() if value} for old in rows]
    columns = list(dict.fromkeys(column for r in [*rows, row] for column in r))
    places = [i for i, old in enumerate(rows) if old.get("round") == str(row["round"])]
    if places:
      rows[places[0]] = {**rows[places[0]], **row} if more else row
    else:
      rows.append(row)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with shards.atomic(self.dir / layout.PROGRESS) as file:
      file.write(table.getvalue().encode())
    if {name: str(value) for name, value in row.items() if value not in (None, "")} not in before:
      for watcher in self.watchers:
        watcher.evaluated(row)

  def check(self) -> None:
    """Raises if another process has taken this run over."""
    if self._lock:
      self._lock.check()


class Stage:
  """One artefact: a directory of parts and files, done when its manifest is there. Made by `Run.stage`."""

  def __init__(self, run: Run, name: str, fingerprint: dict[str, Any], suffix: str = ".parquet") -> None:
    self.run, self.name, self.dir, self.fingerprint = run, name, run.dir / name, fingerprint
    self.suffix = suffix  # of the parts
    self._manifest: Manifest | None = None
    self._parts: int | None = None  # None until it is known
    self._sound: set[int] = set()  # parts that this process has written or verified
    # Listed before the fingerprint is read: another process may be writing both just now, in the opposite order.
    begun = self.dir.exists() and any(p.name != layout.FINGERPRINT for p in self.dir.glob("[!.]*"))
    path = self.dir / layout.FINGERPRINT
    if (self.dir / layout.MANIFEST).exists():
      manifest = load_manifest(self.dir)
      self._compare(manifest["fingerprint"], done=True)
      verify.check_sizes(self.dir, manifest)
      self._manifest, self._parts = manifest, len(manifest["parts"])
      self._write_fingerprint(path)  # again, if it was lost
      if run.process == 0:
        (self.dir / "seconds.json").unlink(missing_ok=True)  # killed right after writing the manifest
      return
    if path.exists() and begun:
      self._compare(layout.fingerprint_in(self.dir), done=False)
    else:
      self._write_fingerprint(path)  # nothing is made with the old one yet
    self._begin = time.monotonic() - self._spent()

  def _write_fingerprint(self, path: pathlib.Path) -> None:
    held = None
    if self.run.process == 0:
      with contextlib.suppress(FileNotFoundError, RunError):
        held = read_json(path)
      if held != self.fingerprint:
        self.run.check()
        shards.write_json(path, self.fingerprint)

  @property
  def done(self) -> bool:
    return self._manifest is not None

  @property
  def manifest(self) -> Manifest:
    if self._manifest is None:
      raise RuntimeError(f"stage {self.name} is read before it is finished")
    return self._manifest

  @property
  def content(self) -> str:
    """The digest of the fingerprint and of all parts and files."""
    return self.manifest["content"]

  @property
  def parts(self) -> int:
    return len(self.manifest["parts"])

  def part_path(self, i: int, n: int) -> pathlib.Path:
    return (self.dir / shards.part_name(i, n)).with_suffix(self.suffix)

  def missing(self, n: int) -> list[int]:
    """The indices of the parts, of n, that are not on disk or damaged; every process reads its own share for that."""
    self._count(n)
    return [] if self.done else [i for i in range(n) if self._sidecar(i, n) is None or self._damaged(i, n)]

  def mine(self, n: int) -> list[int]:
    """Of the missing parts, those that this process writes."""
    return [i for i in self.missing(n) if i % self.run.processes == self.run.process]

  def write_part(
    self, i: int, n: int, records: Sequence[T], kind: type[T], counts: Mapping[str, Any] | None = None
  ) -> None:
    """Writes part i of n; `counts` are numbers, nested as you like, that the manifest sums over the parts."""
    self.write_file(i, n, lambda path: shards.write_records(path, records, kind), len(records), counts)

  def write_file(
    self, i: int, n: int, write: Callable[[pathlib.Path], Digest], rows: int, counts: Mapping[str, Any] | None = None
  ) -> None:
    """The same for a part of any format: `write(path)` writes it and returns its digest."""
    if self.done:
      raise RuntimeError(f"write_part on stage {self.name}, which is done; check stage.done first")
    self._count(n)
    self.run.check()
    path = self.part_path(i, n)
    # A sidecar speaks for the part beside it, so the old one goes first and the new one comes last.
    path.with_suffix(".json").unlink(missing_ok=True)
    row = {**write(path).fields(), "rows": rows, "counts": counts or {}}
    self._sound.add(i)
    shards.write_sealed(path.with_suffix(".json"), row)
    self.beat()

  def beat(self) -> None:
    """Notes the time spent so far; long work that writes no parts (training) calls it at its checkpoints."""
    self.run.check()
    if self.run.process == 0 and not self.done:
      shards.write_json(self.dir / "seconds.json", {"seconds": round(time.monotonic() - self._begin, 3)})

  def finish(
    self,
    counts: Mapping[str, Any] | None = None,
    files: Sequence[str] = (),
    alarms: Callable[[dict[str, Any]], Mapping[str, str]] | None = None,
    **extra: Any,
  ) -> Manifest:
    """Writes the manifest when all processes are here; `files` names other files in the stage's directory.

    `alarms(counts)` gives sentences about what stands out in the counts of all parts together, by name.
    """
    if self.done:
      return self.manifest
    self.run.barrier(f"{self.name}: written")
    if self.run.process == 0:
      self._write_manifest(dict(counts or {}), files, alarms, extra)
    self.run.barrier(f"{self.name}: finished")
    _wait_for(self.dir / layout.MANIFEST, self.run.processes)
    self._manifest = load_manifest(self.dir)
    self._parts = self.parts
    for watcher in self.run.watchers:
      watcher.finished(self.name, self.manifest)
    return self.manifest

  def _write_manifest(
    self,
    counts: dict[str, Any],
    files: Sequence[str],
    alarms: Callable[[dict[str, Any]], Mapping[str, str]] | None,
    extra: dict[str, Any],
  ) -> None:
    self.run.check()
    parts, sums, n = [], counts, self._parts or 0
    for i in range(n):
      path = self.part_path(i, n)
      _wait_for(path.with_suffix(".json"), self.run.processes)
      row = self._sidecar(i, n)
      if row is None:
        raise RuntimeError(f"stage {self.name} is finished without {path.name}; write every part first")
      sums = _summed(sums, row["counts"])
      parts.append({"name": path.name, **{key: x for key, x in row.items() if key not in ("counts", digests.SEAL)}})
    if found := alarms and alarms(sums):
      extra = {**extra, "alarms": found}
    listed = {}
    for name in sorted(files):
      path = self.dir / name
      if not path.is_file():
        raise RuntimeError(f"stage {self.name} is finished without its file {name}")
      listed[name] = digests.of_file(path).fields()
    content = {
      "fingerprint": self.fingerprint,
      "parts": [p["digest"] for p in parts],
      "files": {name: f["digest"] for name, f in listed.items()},
    }
    manifest = {
      "stage": self.name,
      "fingerprint": self.fingerprint,
      "content": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
      "rows": sum(p["rows"] for p in parts),
      "parts": parts,
      "files": listed,
      "counts": sums,
      "seconds": round(time.monotonic() - self._begin, 3),
      "finished_at": now(),
      "made_with": self.run.made_with,
    }
    clash = sorted({*manifest, digests.SEAL} & extra.keys())
    if clash:
      raise RuntimeError(f"stage {self.name} is finished with extra fields that the manifest has: {clash}")
    shards.remove_temporaries(self.dir)
    shards.write_sealed(self.dir / layout.MANIFEST, manifest | extra)
    (self.dir / "seconds.json").unlink(missing_ok=True)

  def _sidecar(self, i: int, n: int) -> dict[str, Any] | None:
    """The facts about a part that is on disk with its size; None for a part that has to be made."""
    path = self.part_path(i, n)
    try:
      row = json.loads(path.with_suffix(".json").read_bytes())
      return row if digests.intact(row) and path.stat().st_size == row["size"] else None
    except (FileNotFoundError, ValueError, RecursionError):
      return None

  def _damaged(self, i: int, n: int) -> bool:
    """True for a part of this process that is not as its sidecar says."""
    if i % self.run.processes != self.run.process or i in self._sound:
      return False
    path, row = self.part_path(i, n), self._sidecar(i, n)
    try:
      verify.Voucher(path, Digest.of_fields(row or {}), self.dir).check()
    except verify.DamageError:
      _logger.warning("%s is damaged and is made again", path)
      return True
    self._sound.add(i)
    return False

  def _spent(self) -> float:
    """The seconds that earlier starts have noted."""
    try:
      return float(read_json(self.dir / "seconds.json")["seconds"])
    except (FileNotFoundError, RunError, TypeError, KeyError, ValueError):
      return 0.0

  def _count(self, n: int) -> None:
    """Fixes the number of parts, which belongs to the stage from its first part on."""
    if self._parts is None:
      counts = (int(p.stem.rpartition("-")[2]) for p in self.dir.glob("part-*.json"))
      self._parts = next((count for count in counts if count != n), n)
    if self._parts != n:
      self._mismatch({"number of parts": f"{self._parts} -> {n}"}, self.done)

  def _compare(self, old: dict[str, Any], done: bool) -> None:
    changed = differences(old, self.fingerprint)
    if changed:
      self._mismatch(changed, done)

  def _mismatch(self, changed: dict[str, str], done: bool) -> None:
    raise ChangedError(
      f"run directory {self.run.dir}: stage {self.name} {'was made' if done else 'is half made'}"
      " with other values than this start asks for:\n"
      + "\n".join(f"  {name}: {change}" for name, change in changed.items())
      + f"\nPut the old value back, or start in another --workdir, or delete {self.dir} to have it made again"
      " (stages made from it will then ask for the same).",
      changed,
    )


@dataclasses.dataclass(frozen=True)
class Artefact(Generic[T]):
  """A finished stage as records of one class: `Artefact(stage, Response).read()` is a list of Response."""

  stage: Stage
  kind: type[T]

  def __post_init__(self) -> None:
    _ = self.stage.manifest  # raises for a stage that is not finished

  @property
  def name(self) -> str:
    return self.stage.name

  @property
  def dir(self) -> pathlib.Path:
    return self.stage.dir

  @property
  def manifest(self) -> Manifest:
    return self.stage.manifest

  @property
  def content(self) -> str:
    return self.stage.content

  @property
  def parts(self) -> int:
    return self.stage.parts

  @property
  def sizes(self) -> list[int]:
    """The number of records in each part."""
    return [part["rows"] for part in self.manifest["parts"]]

  @property
  def paths(self) -> list[pathlib.Path]:
    """The Parquet file of each part."""
    return [self.dir / part["name"] for part in self.manifest["parts"]]

  def read(self, part: int | None = None) -> list[T]:
    """All records in order, or those of one part."""
    return shards.read_records(self.paths if part is None else self.paths[part], self.kind)

  def rows(self, indices: np.ndarray) -> list[T]:
    """The records with these indices over all parts, in their order; the files are read one by one."""
    sizes, paths = np.array(self.sizes), self.paths
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, indices, side="right")
    found: dict[int, T] = {}
    for part in np.unique(parts).tolist():
      places = np.flatnonzero(parts == part)
      within = indices[places] - ends[part] + sizes[part]
      found |= zip(places.tolist(), shards.read_rows(paths[part], within, self.kind), strict=True)
    return [found[place] for place in range(len(indices))]

  def ids(self) -> np.ndarray:
    """The id of every record's prompt as a number, uint64 [rows]."""
    return shards.read_ids(self.paths, "id" if "id" in shards.schema(self.kind).names else "prompt_id")


Input = Stage | Artefact[Any] | str | pathlib.Path  # a finished stage or its directory


def read_stage(directory: str | pathlib.Path, kind: type[T], part: int | None = None) -> list[T]:
  """Records of a finished stage: all parts in order, or one part."""
  names = [p["name"] for p in load_manifest(directory)["parts"]]
  names = names if part is None else [names[part]]
  return shards.read_records([pathlib.Path(directory) / name for name in names], kind)


def _check_format(run: pathlib.Path) -> None:
  """Raises for a run directory that holds records of another format: no change of a value would mend that."""
  made = layout.format_of(run)
  if made != FORMAT:
    raise RunError(
      f"the run directory {run} was made by alma_jax {VERSIONS.get(made, 'of a later version')}; only that version can"
      f" continue it (this is {__version__}). Install it, or start in another --workdir."
    )


def _summed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
  """The sum of two nested dicts of numbers; what stands in one of them only is kept."""
  both = dict(a)
  for key, value in b.items():
    if key not in both:
      both[key] = value
    elif isinstance(value, dict) and isinstance(both[key], dict):
      both[key] = _summed(both[key], value)
    elif isinstance(value, numbers.Real) and isinstance(both[key], numbers.Real):
      both[key] += value
    else:
      raise RuntimeError(f"counts must be numbers or nested dicts of numbers; {key!r} is {value!r}")
  return both


def _wait_for(path: pathlib.Path, processes: int) -> None:
  end = time.monotonic() + PATIENCE
  while processes > 1 and not path.exists() and time.monotonic() < end:
    time.sleep(0.2)
