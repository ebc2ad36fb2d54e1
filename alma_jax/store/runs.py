"""The run directory: a directory per stage, each with a manifest of what it holds and what it was made from.

  with Run("runs/alma", config) as run:
    stage = run.stage("round_02/responses", fields={"config": {...}}, inputs={"prompts": prompts})
    if not stage.done:
      for i in stage.mine(64):                        # the parts that are not on disk yet, this process's share
        stage.write_part(i, 64, make(i), Response, counts={"truncated": 3})
      stage.finish()
    responses = stage.read(Response)

A stage with a manifest is done and never written again; one that was killed goes on at its first missing
part. The fingerprint (fields, contents of the inputs, record format) is written before the first part. When
it does not match, the run stops with a RunError that names what changed; nothing is reused or overwritten.

Several processes of one run make the same calls in the same order on the same directory, which must be on a
shared file system. Process p writes the parts i with i % processes == p; process 0 alone writes everything
else and holds `.lock`, so that two starts never write to one run.
"""

import csv
import datetime
import hashlib
import io
import itertools
import json
import numbers
import pathlib
import time

import numpy as np

from alma_jax.errors import RunError
from alma_jax.store import layout, shards
from alma_jax.store import records as records_lib
from alma_jax.store.layout import load_manifest, read_json
from alma_jax.store.lock import Lock

PATIENCE = 60.0  # network file systems may show another process's file this much later
_SHOWN = 60  # characters of a changed value in a message


class Run:
  """One run directory. `barrier(name)` returns when all processes have called it."""

  def __init__(self, workdir, config=None, process=0, processes=1, barrier=lambda name: None):
    self.dir, self.config = pathlib.Path(workdir), config
    self.process, self.processes, self.barrier = process, processes, barrier
    if self.dir.exists() and not self.dir.is_dir():
      raise RunError(f"{self.dir} is a file; --workdir must name a directory.")
    try:
      self.dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise RunError(f"cannot make the run directory {self.dir}: {e.strerror}.") from None
    self._lock = Lock(self.dir) if process == 0 else None
    if process == 0:
      shards.remove_temporaries(self.dir)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    if self._lock:
      self._lock.release()

  def stage(self, name, fields, inputs=None):
    """`fields`: what decides the result, nested or flat; `inputs`: name -> done Stage or its directory."""
    return Stage(self, name, _fingerprint(fields, inputs or {}))

  def log(self, event, **fields):
    if self.process == 0:
      self.check()
      row = {"time": _now(), "event": event, **fields}
      with open(self.dir / layout.LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

  def save_config(self, config):
    """Writes config.json, again when it changed: the fingerprints guard the artefacts."""
    path = self.dir / layout.CONFIG
    if self.process == 0 and not (path.exists() and read_json(path) == json.loads(json.dumps(config))):
      self.check()
      shards.write_json(path, config)

  def progress(self, row):
    """Puts a row into progress.csv; it replaces the row with the same "round", new columns are added."""
    if self.process != 0:
      return
    self.check()
    path, rows = self.dir / layout.PROGRESS, layout.progress(self.dir)
    columns = list(dict.fromkeys(column for r in [*rows, row] for column in r))
    places = [i for i, old in enumerate(rows) if old.get("round") == str(row["round"])]
    if places:
      rows[places[0]] = row
    else:
      rows.append(row)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with shards.atomic(path) as file:
      file.write(table.getvalue().encode())

  def check(self):
    """Raises when another process has taken this run over."""
    if self._lock:
      self._lock.check()


class Stage:
  """One artefact: a directory of parts and files, done when its manifest is there. Made by `Run.stage`."""

  def __init__(self, run, name, fingerprint):
    self.run, self.name, self.dir = run, name, run.dir / name
    self.fingerprint, self.manifest, self.parts = fingerprint, None, None
    # Listed before the fingerprint is read: another process may be writing both just now, in the opposite order.
    begun = self.dir.exists() and any(p.name != layout.FINGERPRINT for p in self.dir.glob("[!.]*"))
    path = self.dir / layout.FINGERPRINT
    if (self.dir / layout.MANIFEST).exists():
      manifest = load_manifest(self.dir)
      self._compare(manifest["fingerprint"], done=True)
      _check_files(self.dir, manifest)
      self.manifest, self.parts = manifest, len(manifest["parts"])
      if run.process == 0:
        (self.dir / "seconds.json").unlink(missing_ok=True)  # killed right after writing the manifest
      return
    if path.exists() and begun:
      self._compare(read_json(path), done=False)
    elif run.process == 0 and not (path.exists() and read_json(path) == fingerprint):
      run.check()
      shards.write_json(path, fingerprint)
    self._begin = time.monotonic() - self._seconds_before()

  @property
  def done(self):
    return self.manifest is not None

  def part_path(self, i, n):
    return self.dir / shards.part_name(i, n)

  def missing(self, n):
    """The indices of the parts, of n, that are not on disk."""
    self._count(n)
    return [] if self.done else [i for i in range(n) if self._sidecar(i) is None]

  def mine(self, n):
    """Of the missing parts, those that this process writes."""
    return [i for i in self.missing(n) if i % self.run.processes == self.run.process]

  def write_part(self, i, n, records, kind, counts=None):
    """Writes part i of n; `counts` are numbers, nested as you like, that the manifest sums over the parts."""
    if self.done:
      raise RuntimeError(f"write_part on stage {self.name}, which is done; check stage.done first")
    self._count(n)
    self.run.check()
    path = self.part_path(i, n)
    # A sidecar speaks for the part beside it, so the old one goes first and the new one comes last.
    path.with_suffix(".json").unlink(missing_ok=True)
    digest = shards.write_records(path, records, kind)
    row = {"digest": digest, "size": path.stat().st_size, "rows": len(records), "counts": counts or {}}
    shards.write_json(path.with_suffix(".json"), row)
    self.beat()

  def beat(self):
    """Notes the time spent so far; long work that writes no parts (training) calls it at its checkpoints."""
    self.run.check()
    if self.run.process == 0 and not self.done:
      shards.write_json(self.dir / "seconds.json", {"seconds": round(time.monotonic() - self._begin, 3)})

  def finish(self, counts=None, files=(), **extra):
    """Writes the manifest when all processes are here; `files` names other files in the stage's directory."""
    if self.done:
      return self.manifest
    self.run.barrier(f"{self.name}: written")
    if self.run.process == 0:
      self._write_manifest(counts or {}, files, extra)
    self.run.barrier(f"{self.name}: finished")
    _wait_for(self.dir / layout.MANIFEST, self.run.processes)
    self.manifest = load_manifest(self.dir)
    self.parts = len(self.manifest["parts"])
    return self.manifest

  def read(self, kind, part=None):
    """All records in order, or those of one part."""
    if not self.done:
      raise RuntimeError(f"stage {self.name} is read before it is finished")
    return read_stage(self.dir, kind, part)

  def _write_manifest(self, counts, files, extra):
    self.run.check()
    parts, sums = [], counts
    for i in range(self.parts or 0):
      path = self.part_path(i, self.parts)
      _wait_for(path.with_suffix(".json"), self.run.processes)
      row = self._sidecar(i)
      if row is None:
        raise RuntimeError(f"stage {self.name} is finished without {path.name}; write every part first")
      sums = _summed(sums, row.pop("counts"))
      parts.append({"name": path.name, **row})
    listed = {}
    for name in sorted(files):
      path = self.dir / name
      if not path.is_file():
        raise RuntimeError(f"stage {self.name} is finished without its file {name}")
      listed[name] = {"digest": shards.digest(path), "size": path.stat().st_size}
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
      "finished_at": _now(),
    }
    clash = sorted(manifest.keys() & extra.keys())
    if clash:
      raise RuntimeError(f"stage {self.name} is finished with extra fields that the manifest has: {clash}")
    shards.remove_temporaries(self.dir)
    shards.write_json(self.dir / layout.MANIFEST, manifest | extra)
    (self.dir / "seconds.json").unlink(missing_ok=True)

  def _sidecar(self, i):
    """The facts about a part that is on disk as it was written; None for a part that has to be made."""
    path = self.part_path(i, self.parts)
    try:
      row = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
      return row if path.stat().st_size == row["size"] else None
    except (FileNotFoundError, json.JSONDecodeError):
      return None

  def _count(self, n):
    """Fixes the number of parts, which belongs to the stage from its first part on."""
    if self.parts is None:
      names = (p.stem.rpartition("-")[2] for p in self.dir.glob("part-*.json"))
      self.parts = next((int(count) for count in names if int(count) != n), n)
    if self.parts != n:
      self._mismatch({"number of parts": (str(self.parts), str(n))}, self.done)

  def _compare(self, old, done):
    pairs = {key: (_shown(old, key), _shown(self.fingerprint, key)) for key in sorted(old | self.fingerprint)}
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if changed:
      self._mismatch(changed, done)

  def _mismatch(self, changed, done):
    lines = [f"  {key}: {_change(*pair)}" for key, pair in changed.items()]
    raise RunError(
      f"run directory {self.run.dir}: stage {self.name} {'was made' if done else 'is half made'}"
      " with other values than this start asks for:\n"
      + "\n".join(lines)
      + f"\nPut the old value back, or start in another --workdir, or delete {self.dir} to have it made again"
      " (stages made from it will then ask for the same)."
    )

  def _seconds_before(self):
    path = self.dir / "seconds.json"
    return read_json(path)["seconds"] if path.exists() else 0.0


def read_stage(directory, kind, part=None):
  """Records of a finished stage: all parts in order, or one part."""
  names = [p["name"] for p in load_manifest(directory)["parts"]]
  names = names if part is None else [names[part]]
  return shards.read_records([pathlib.Path(directory) / name for name in names], kind)


def _fingerprint(fields, inputs):
  flat = {**_flat(fields), "format": records_lib.FORMAT}
  for name, stage in inputs.items():
    flat[f"input.{name}"] = (stage.manifest if isinstance(stage, Stage) else load_manifest(stage))["content"]
  return json.loads(json.dumps(flat, sort_keys=True))  # as it will be read back: lists for tuples


def _flat(value, prefix=""):
  if not isinstance(value, dict) or (prefix and not value):
    return {prefix: value}
  dot = prefix and prefix + "."
  return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{dot}{key}").items()}


def _summed(a, b):
  """The sum of two nested dicts of numbers; what stands in one of them only is kept as it is."""
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


def _check_files(directory, manifest):
  sizes = [(p["name"], p["size"]) for p in manifest["parts"]]
  for name, size in sizes + [(name, f["size"]) for name, f in manifest["files"].items()]:
    path = directory / name
    found = path.stat().st_size if path.exists() else None
    if found != size:
      state = "is missing" if found is None else f"has {found} bytes instead of {size}"
      raise RunError(
        f"{path} {state}, though the stage was finished with it.\n"
        f"Bring the file back, or delete {directory} to have the stage made again."
      )


def _shown(fingerprint, key):
  if key not in fingerprint:
    return "(not set)"
  return json.dumps(fingerprint[key], ensure_ascii=False, sort_keys=True)


def _change(old, new):
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new))
  first = sum(1 for _ in same)
  return f"{_window(old, first)} -> {_window(new, first)}"


def _window(text, first):
  """A long text is cut to what surrounds the first character that differs."""
  start = max(0, min(first, len(text)) - _SHOWN // 3) if len(text) > _SHOWN else 0
  end = start + _SHOWN
  return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def _wait_for(path, processes):
  end = time.monotonic() + PATIENCE
  while processes > 1 and not path.exists() and time.monotonic() < end:
    time.sleep(0.2)


def _now():
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def rows_of(stage, kind, rows):
  """The records at these rows of a finished stage, in their order; its files are read one by one."""
  sizes = np.array([part["rows"] for part in stage.manifest["parts"]])
  ends = np.cumsum(sizes)
  parts = np.searchsorted(ends, rows, side="right")
  found = [None] * len(rows)
  for part in np.unique(parts).tolist():
    at = np.flatnonzero(parts == part)
    path = stage.part_path(part, stage.parts)
    for place, record in zip(at, shards.read_rows(path, rows[at] - ends[part] + sizes[part], kind)):
      found[place] = record
  return found
