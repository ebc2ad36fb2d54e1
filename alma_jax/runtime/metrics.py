"""The log of a training's steps: metrics.jsonl, speed.jsonl and TensorBoard, and how fast the devices could be.

with StepLog(s, stage, batches) as log:
  log.keep(200)                           # after a restart from the checkpoint of step 200
  rate = log.write(200, {"loss": 1.3})    # tokens per second of the step
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from alma_jax.llama.config import LlamaConfig
from alma_jax.runtime.batches import Batches
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.runs import Stage

SPEED, BOARD = "speed.jsonl", "tensorboard"


class StepLog:
  """metrics.jsonl, a line per step; a restart drops the lines after its checkpoint. Times go to speed.jsonl, so that
  the metrics are the same for the same training; TensorBoard has both."""

  def __init__(self, s: Session, stage: Stage, batches: Batches) -> None:
    self.path, self.active, self.first = stage.dir / layout.METRICS, s.run.process == 0, True
    self.batches, self.began, self.c = batches, 0.0, s.host.trained_config
    self.peak = (peak(s.mesh.devices.flat[0]) or 0) * s.mesh.size
    self.board: Any = None

  def __enter__(self) -> Self:
    self.began = time.monotonic()
    return self

  def __exit__(self, *_: object) -> None:
    if self.board:
      self.board.close()

  def keep(self, steps: int) -> None:
    """Drop the lines after these steps."""
    if self.active:
      for path in (self.path, self.path.with_name(SPEED)):
        lines = path.read_text().splitlines()[:steps] if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines))
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
      import tensorboardX  # which imports torch, where there is one

      directory = str(self.path.with_name(BOARD))
      self.board = tensorboardX.SummaryWriter(directory, purge_step=step + 1, write_to_disk=True)
    for path, values in ((self.path, metrics), (self.path.with_name(SPEED), speed)):
      rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
      with open(path, "w" if self.first else "a") as file:
        file.write(shards.json_text({"step": step + 1} | rounded) + "\n")
      for name, value in values.items():
        self.board.add_scalar(name, value, step + 1)
    self.first = False


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
