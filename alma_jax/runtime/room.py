"""The disk that trained models and their checkpoints take, compared with what is there before hours are spent.

Checkpoints are compressed, by a few percent for weights that look like noise: what is counted here is the most that
they take. A training that needs much more than there is ends before its first step.
"""

import pathlib

import jax.numpy as jnp

from alma_jax.errors import DiskError, free_bytes, size
from alma_jax.llama.config import LlamaConfig
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Host
from alma_jax.store import layout

AT_ONCE = 3  # checkpoints on disk: the two that stay, and one that is being written
LEAST = 0.8  # of what is counted, for certain: fp32 numbers that look like noise compress to no less


def model_bytes(c: LlamaConfig, dtype: str) -> int:
  """A saved model."""
  return c.parameters * jnp.dtype(dtype).itemsize


def checkpoint_bytes(c: LlamaConfig, moments: str = "float32") -> int:
  """A checkpoint: fp32 weights and both moments."""
  return c.parameters * (4 + 2 * jnp.dtype(moments).itemsize)


def training_bytes(checkpoint: int, model: int, steps: int, every: int, keep: int) -> int:
  """The most that a training has on disk at once: checkpoints, and the model beside the last two of them."""
  written = max(0, (steps - 1) // every)
  for_good = (steps - 1) // keep if keep else 0
  return max(min(written, AT_ONCE) * checkpoint, min(written, AT_ONCE - 1) * checkpoint + model) + for_good * checkpoint


def there(directory: pathlib.Path) -> int:
  """The bytes that a stage may fill: what is free, and what an earlier start of it has filled."""
  # A file may go away while we look: an old checkpoint, or a temporary name.
  sizes = [path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file()]
  return free_bytes(directory) + sum(sizes)


def check(name: str, directory: pathlib.Path, needed: int, there: int, display: Display) -> None:
  """Raise a DiskError if a training cannot fit; say so if it may not."""
  if needed <= there:
    return
  lack = (
    f"{name}: its model and checkpoints take up to {size(needed)} in {directory}, and {size(there)} are there for them"
  )
  if LEAST * needed > there:
    raise DiskError(
      f"{lack}. Make room, or have fewer checkpoints written (a higher checkpoint_every, checkpoint_keep=0), then start"
      " the same command again; what is finished is kept."
    )
  display.say(f"{lack}; if they do not compress well, the disk will be full before the end")


# The whole run


def run_bytes(host: Host, models: int) -> int:
  """So many trained models, and one training's checkpoints."""
  c = host.trained_config
  return models * model_bytes(c, host.save_dtype) + AT_ONCE * checkpoint_bytes(c)


def foresee(run: pathlib.Path, host: Host, models: int) -> None:
  """Say so if the models that a run of so many has still to make may not fit."""
  done = sum(len(layout.models_in(found.dir)) for found in layout.stages(run) if found.manifest)
  needed, free = run_bytes(host, models - done), free_bytes(run)
  if done < models and needed > free:
    host.display.say(
      f"{run}: the {models - done} models to come, with checkpoints, take up to {size(needed)}, and {size(free)} are"
      " free; every training is checked before its first step"
    )
