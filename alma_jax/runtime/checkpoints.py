"""The checkpoints inside a training: arrays by name, so that a tree may change its order or its wrappers.

  with Checkpoints(stage.dir / CHECKPOINTS, keep=1000) as checkpoints:    the last two stay, and every thousandth
    if checkpoints.latest:
      state = checkpoints.load(checkpoints.latest, state)
    checkpoints.save(200, state)

The names are paths in the state:  model/embed  model/blocks/q  moments/0/mu/blocks/q  moments/0/count  memory/margins
Beside each array stand sums of its bits, which are compared when it is read: Orbax does not notice a changed byte.
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from alma_jax.engine.train import State, Stopped
from alma_jax.errors import RunError, full_disk, writing

SUMS = "sums/"  # begins the names of the sums of bits
_logger = logging.getLogger(__name__)


class Checkpoints:
  def __init__(self, directory: pathlib.Path, keep: int = 0) -> None:
    """`keep`: one checkpoint in so many steps stays for good; 0: none."""
    policies = ocp.training.preservation_policies
    stay: Any = policies.AnyPreservationPolicy([policies.LatestN(2), *([policies.EveryNSteps(keep)] if keep else [])])
    self.directory = directory
    logging.getLogger("absl").addFilter(_is_news)
    with writing(directory):
      self._of = ocp.training.Checkpointer(str(directory.absolute()), preservation_policy=stay)

  def __enter__(self) -> Self:
    self._of.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    """Wait for the checkpoint that is being written. If that fails, an error that has ended the block stays the one
    that is raised."""
    try:
      with writing(self.directory):
        self._of.__exit__(*error)
    except Exception as late:
      if not isinstance(error[1], Exception) or isinstance(error[1], Stopped):
        raise
      if not isinstance(error[1], type(late)):
        _logger.warning("the last checkpoint was not written: %s", late)

  @property
  def latest(self) -> int | None:
    """The step of the newest checkpoint, None before there is one."""
    return None if self._of.latest is None else self._of.latest.step

  def save(self, step: int, state: State) -> None:
    """Write the state beside the training; a checkpoint that is being written comes first."""
    arrays = named(state)
    with writing(self.directory):
      self._of.save_async(step, arrays | sums_of_bits(arrays), force=True)

  def load(self, step: int, state: State, numbered: bool = False) -> State:
    """The checkpoint of a step, in the structure, dtypes and shardings of `state`.

    alma_jax 0.1 numbered the arrays instead of naming them ("0000", "0001", ...). Such a checkpoint is read with
    `numbered`, for exports, and refused without it.
    """
    names = named(state)
    with self._readable(step):
      written = self._of.metadata(step).metadata
    if written is None:
      raise self._damaged(step, "its metadata cannot be read")
    if "0000" in written:
      if not numbered:
        raise RunError(
          f"{self.directory / str(step)} was written by alma_jax 0.1 and cannot go on: delete {self.directory} to train"
          " this stage again from its start, or finish it with alma_jax 0.1"
        )
      names = {f"{i:04d}": leaf for i, leaf in enumerate(names.values())}
    sums = {}
    if any(name.startswith(SUMS) for name in written):
      place = _everywhere(names)
      sums = {
        f"{SUMS}{name}": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=place or leaf.sharding)
        for name, leaf in names.items()
      }
    # An export asks for no memory; Orbax reads a checkpoint whole.
    unasked = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_everywhere(names))
      for name, leaf in written.items()
      if name.removeprefix(SUMS).startswith("memory/") and name not in names | sums
    }
    with self._readable(step):
      found = self._of.load(step, names | sums | unasked)
    if sums:
      computed = sums_of_bits({name: found[name] for name in names})
      changed = [name for name in sums if np.any(np.asarray(computed[name]) != np.asarray(found[name]))]
      if changed:
        raise self._damaged(step, f"the bytes of {changed[0].removeprefix(SUMS)} have changed")
    return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in names])

  def moments(self, step: int) -> Literal["float32", "bfloat16"]:
    """The dtype of the moments: "bfloat16" if any array of the checkpoint is, else "float32"."""
    with self._readable(step):
      kept = {str(leaf.dtype) for leaf in jax.tree.leaves(self._of.metadata(step).metadata)}
    return "bfloat16" if "bfloat16" in kept else "float32"

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    """Say which checkpoint is damaged where one cannot be read. A device without memory raises another error."""
    try:
      yield
    except (ValueError, KeyError, TypeError, OSError) as error:
      why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
      raise self._damaged(step, why) from error

  def _damaged(self, step: int, why: str) -> RunError:
    return RunError(
      f"the checkpoint {self.directory / str(step)} is damaged ({why}): delete it, and the training goes on from the"
      " checkpoint before it, or from its start"
    )


def _is_news(record: logging.LogRecord) -> bool:
  """False for what Orbax logs about a full disk: a traceback for each of its threads, before it raises the error."""
  return not (record.exc_info and record.exc_info[1] and full_disk(record.exc_info[1]))


def named(state: State) -> dict[str, Any]:
  """The arrays of a state by name, in the order of its leaves."""
  paths = [
    (f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf)
    for part, tree in zip(State._fields, state, strict=False)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
  return {path.removesuffix("/value"): leaf for path, leaf in paths}  # Flax says .value where it wraps an array


def sums_of_bits(arrays: Mapping[str, Array]) -> dict[str, Array]:
  """Two sums for each array, uint32 [2]: of its bits, and of its bits times a number for each place.

  Whole numbers add up to the same on any mesh. A changed bit changes the first sum, swapped pieces the second.
  """
  return jax.jit(_all_sums, out_shardings=_everywhere(arrays))(arrays)


def _everywhere(arrays: Mapping[str, Any]) -> NamedSharding | None:
  """A copy on each device of the arrays' mesh; None where they have none."""
  shardings = (getattr(leaf, "sharding", None) for leaf in arrays.values())
  mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
  return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _all_sums(arrays: Mapping[str, Array]) -> dict[str, Array]:
  return {f"{SUMS}{name}": _sums(leaf) for name, leaf in arrays.items()}


def _sums(x: Array) -> Array:
  bits = x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.uint32(0)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  weight = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
  return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])
