"""The checkpoints inside a training: arrays by name, so that a tree may change its order or its wrappers.

  with Checkpoints(stage.dir / CHECKPOINTS, keep=1000) as checkpoints:    the last two stay, and every thousandth
    if checkpoints.latest:
      state = checkpoints.load(checkpoints.latest, state)
    checkpoints.save(200, state)

The names are paths in the state:  model/embed  model/blocks/q  moments/0/mu/blocks/q  moments/0/count
"""

import logging
import pathlib
from typing import Any, Literal, Self

import jax
from orbax.checkpoint import v1 as ocp

from alma_jax.engine.train import State, Stopped
from alma_jax.errors import RunError, full_disk, writing

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
    with writing(self.directory):
      self._of.save_async(step, named(state), force=True)

  def load(self, step: int, state: State, numbered: bool = False) -> State:
    """The checkpoint of a step, in the structure, dtypes and shardings of `state`.

    alma_jax 0.1 numbered the arrays instead of naming them ("0000", "0001", ...). Such a checkpoint is read with
    `numbered`, for exports, and refused without it.
    """
    names = named(state)
    if "0000" in self._of.metadata(step).metadata:
      if not numbered:
        raise RunError(
          f"{self.directory / str(step)} was written by alma_jax 0.1 and cannot go on: delete {self.directory} to train"
          " this stage again from its start, or finish it with alma_jax 0.1"
        )
      names = {f"{i:04d}": leaf for i, leaf in enumerate(names.values())}
    found = self._of.load(step, names)
    return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in names])

  def moments(self, step: int) -> Literal["float32", "bfloat16"]:
    """The dtype of the moments: "bfloat16" if any array of the checkpoint is, else "float32"."""
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(self._of.metadata(step).metadata)}
    return "bfloat16" if "bfloat16" in kept else "float32"


def _is_news(record: logging.LogRecord) -> bool:
  """False for what Orbax logs about a full disk: a traceback for each of its threads, before it raises the error."""
  return not (record.exc_info and record.exc_info[1] and full_disk(record.exc_info[1]))


def named(state: State) -> dict[str, Any]:
  """The arrays of a state by name, in the order of its leaves."""
  paths = jax.tree_util.tree_leaves_with_path({"model": state[0], "moments": state[1]})
  # Flax says .value where it wraps an array.
  return {jax.tree_util.keystr(p, simple=True, separator="/").removesuffix("/value"): leaf for p, leaf in paths}
