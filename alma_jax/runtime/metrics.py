"""The log of a training's steps: metrics.jsonl, speed.jsonl and TensorBoard, and how fast the devices could be.

with StepLog(s, stage, batches) as log:
  log.keep(200)                           # after a restart from the checkpoint of step 200
  rate = log.write(200, {"loss": 1.3})    # tokens per second of the step
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from alma_jax.errors import RunError, UserError, writing
from alma_jax.llama.config import LlamaConfig
from alma_jax.runtime.batches import Batches
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.runs import Stage

SPEED, BOARD = "speed.jsonl", "tensorboard"
FLUSH = 30.0  # seconds until TensorBoard sees a step


class StepLog:
  """metrics.jsonl, a line per step; a restart drops the lines after its checkpoint. Times go to speed.jsonl, so that
  the metrics are the same for the same training; TensorBoard has both."""

  def __init__(self, s: Session, stage: Stage, batches: Batches) -> None:
    self.path, self.active, self.first = stage.dir / layout.METRICS, s.run.process == 0, True
    self.batches, self.began, self.c = batches, 0.0, s.host.trained_config
    self.peak = (peak(s.mesh.devices.flat[0]) or 0) * s.mesh.size
    self.board: Any = None
    self.name, self.watchers = stage.name, s.run.watchers

  def __enter__(self) -> Self:
    self.began = time.monotonic()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self.board:
      try:
        self.board.close()
      except (OSError, UserError):
        if kind is None:  # else the error that has ended the training is raised
          raise

  def keep(self, steps: int) -> None:
    """Drop the lines after these steps."""
    if self.active:
      for path in (self.path, self.path.with_name(SPEED)):
        lines = _lines(path)[:steps] if path.exists() else []
        with shards.atomic(path) as file:
          file.write("".join(line + "\n" for line in lines).encode())
    self.first = False

  def write(self, step: int, metrics: Mapping[str, float]) -> float:
    """Tokens per second of the step, which has just ended."""
    lengths, now = self.batches.lengths(step), time.monotonic()
    seconds = max(now - self.began, 1e-9)
    self.began = now
    speed = {"seconds": seconds, "tokens": sum(lengths), "tokens_per_second": sum(lengths) / seconds}
    if self.peak:
      speed["mfu"] = operations(self.c, lengths) / seconds / self.peak
    if self.active:
      self._append(step, metrics, speed)
    return speed["tokens_per_second"]

  def _append(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
    if self.board is None:
      self.board = _Board(self.path.with_name(BOARD), step + 1)
    for path, values in ((self.path, metrics), (self.path.with_name(SPEED), speed)):
      rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
      with writing(path), open(path, "w" if self.first else "a") as file:
        file.write(shards.json_text({"step": step + 1} | rounded) + "\n")
    self.board.add(step + 1, {**metrics, **speed})
    for watcher in self.watchers:
      watcher.step(self.name, step + 1, {**metrics, **speed})
    self.first = False


class _Board:
  """An event file of TensorBoard. tensorboardX's own SummaryWriter writes in a thread: a full disk ends the thread, and
  the next steps then wait for it for ever."""

  def __init__(self, directory: pathlib.Path, step: int) -> None:
    """Events of an earlier start from this step on are hidden."""
    from tensorboardX import event_file_writer, summary  # which imports torch, where there is one
    from tensorboardX.proto import event_pb2

    made: Any = event_pb2  # protobuf makes its classes when it is imported
    self.directory, self.flushed = directory, time.monotonic()
    self._event, self._scalar = made.Event, summary.scalar
    with writing(directory):
      directory.mkdir(parents=True, exist_ok=True)
      self._file = event_file_writer.EventsWriter(str(directory / "events"))
      start = made.SessionLog(status=made.SessionLog.START)
      self._file.write_event(self._event(step=step, wall_time=time.time(), session_log=start))

  def add(self, step: int, values: Mapping[str, float]) -> None:
    with writing(self.directory):
      for name, value in values.items():
        of = {"step": step, "wall_time": time.time(), "summary": self._scalar(name, value)}
        self._file.write_event(self._event(**of))
      if time.monotonic() - self.flushed > FLUSH:
        self._file.flush()
        self.flushed = time.monotonic()

  def close(self) -> None:
    with writing(self.directory):
      self._file.close()


# bf16 operations per second of a device, by a part of its name; the first that fits counts
PEAKS = {
  "H100": 989e12,
  "H200": 989e12,
  "A100": 312e12,
  "B200": 2250e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
}


def peak(device: Any) -> float | None:
  """The device's bf16 operations per second from its data sheet; None if it is not known."""
  return next((flops for name, flops in PEAKS.items() if name in device.device_kind), None)


def operations(c: LlamaConfig, lengths: Sequence[int]) -> float:
  """Operations of a training step on sequences of these lengths, as MFU counts them: 6 per weight and token (embedding
  rows apart, the head at every place) and causal attention, each computed once."""
  n = np.asarray(lengths, np.float64)
  weights = c.parameters - (0 if c.tied else c.vocab * c.width)
  return float(6 * weights * n.sum() + 6 * c.depth * c.heads * c.head_dim * (n**2).sum())


def _lines(path: pathlib.Path) -> list[str]:
  """The lines of a log whose training was stopped; the last one may be cut."""
  lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
  for at, line in enumerate(lines):
    try:
      json.loads(line)
    except ValueError:
      if at < len(lines) - 1:
        raise RunError(f"{path}, line {at + 1} is damaged: delete {path.parent} to train again") from None
      return lines[:-1]
  return lines
