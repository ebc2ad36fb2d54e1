"""Writes a model of a run as a Hugging Face directory that transformers and vLLM load.

  python -m alma_jax.tools.export --stage=runs/alma --best --output=models/alma                      the best round's
  python -m alma_jax.tools.export --stage=runs/alma/round_05/policy --step=400 --output=models/round_05_400

  python -m alma_jax.tools.export --stage=runs/alma/round_05/policy --hub=me/alma-8b --output=models/alma
  python -m alma_jax.tools.export --stage=runs/alma/round_05/trainset --hub=me/alma-d5 --output=d5 --dry_run=true

With --hub a finished stage is pushed to the Hugging Face hub: a model, or a data set (a trainset, the pool's prompts),
with a card made from the run's manifests. --dry_run leaves it in --output.

The best round is the one that a judge which selects nothing puts first: see eval.judges; --by names another such judge.
Of a run of LIMA it is the epoch that was chosen.

Trainings keep one checkpoint in `checkpoint_keep` steps (config.policy.checkpoint_keep=100, say); without --step the
command lists those that are there. A finished stage's own model needs no export: it is STAGE/model. The run's config
says which tokenizer, chat format and precision the model gets. Any number of devices will do.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence

import jax

from alma_jax.errors import RunError
from alma_jax.llama import sharding
from alma_jax.options import Checked, build, fields_of, option
from alma_jax.report import graded
from alma_jax.runtime import training
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.store import layout
from alma_jax.tools import command, export_hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  stage: str = option(doc="a training of a run, finished or not; with --best a run")
  best: bool = option(False, doc="the model of the best round, by a judge that selects nothing")
  by: str = option("", doc="that judge's name in eval.judges; the first one if not given")
  step: int | None = option(None, least=1, doc="which checkpoint; none: list them")
  output: str = option("", doc="a new directory")
  hub: str = option("", doc="push the finished stage there, NAME or ACCOUNT/NAME, with a card")
  private: bool = option(True, doc="the repository on the hub is private, if it is made now")
  dry_run: bool = option(False, doc="write what --hub would push to --output, and push nothing")


FLAGS = command.Flags("export", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  stage, output = pathlib.Path(options.stage).expanduser(), pathlib.Path(options.output).expanduser()
  if options.hub:
    export_to_hub(stage, output, options)
    return
  if options.best:
    export_best(stage, output, options.by)
    return
  checkpoints = stage / layout.CHECKPOINTS
  found = sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())
  if not found:
    raise RunError(
      f"{stage} has no checkpoints: a finished training keeps those that its config's checkpoint_keep asks for, a"
      " running one the last two"
    )
  listed = ", ".join(f"{step:,}" for step in found)
  if options.step is None:
    print(f"{stage}: checkpoints after steps {listed}")
    return
  if options.step not in found:
    raise RunError(f"{stage} has no checkpoint after step {options.step:,}; there are {listed}")
  _check_output(output)
  config = layout.config_of(stage)["model"]
  known = {name: value for name, value in config.items() if name in fields_of(ModelOptions)}  # of any version
  host = Host(build(ModelOptions, known, "config.model"), EngineOptions(), sharding.make_mesh())
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
  training.export(host, training.checkpoint_model(host, checkpoints, options.step, mesh), output)
  print(f"{output}: {stage.name} of {stage.parent} after step {options.step:,}, {host.save_dtype}")


def export_to_hub(stage: pathlib.Path, output: pathlib.Path, options: Options) -> None:
  """Write a stage's model or records with a card, and push them."""
  if options.best:
    best = graded.best(stage, options.by or None)
    if best is None:
      raise RunError(f"{stage}: no judge that selects nothing has graded a trained round: give the stage itself")
    stage = layout.policy_of(stage, best.round)
  if options.step is not None:
    raise RunError("--hub pushes finished stages; export a --step to a directory and push that with `hf upload`")
  _check_output(output)
  kind = export_hub.prepare(stage, options.hub, output)
  print(f"{output}: {kind} of {stage}, with its card")
  if not options.dry_run:
    print(export_hub.push(output, options.hub, kind, options.private))


def export_best(run: pathlib.Path, output: pathlib.Path, by: str) -> None:
  """Copy the model of the run's best round, or of the epoch that it chose."""
  if not by and (chosen := layout.chosen_epoch(run)) is not None:
    _check_output(output)
    model = layout.policy_of(run, chosen) / layout.MODEL
    shutil.copytree(model, output, dirs_exist_ok=True)
    print(f"{output}: {model}, which the run chose")
    return
  best = graded.best(run, by or None)
  if best is None:
    named = f"{by!r}, or that judge selects" if by else "eval.judges; the run's own judge selects and cannot tell"
    raise RunError(f"{run}: no trained round was graded by a judge of {named}: name one and start the run again")
  _check_output(output)
  model = layout.policy_of(run, best.round) / layout.MODEL
  if not model.is_dir():
    raise RunError(f"{model} is missing: the model of the best round, {best.round}, was deleted")
  shutil.copytree(model, output, dirs_exist_ok=True)
  print(f"{output}: {model}\n{best.in_words()}")


def _check_output(output: pathlib.Path) -> None:
  if output == pathlib.Path() or (output.exists() and any(output.iterdir())):
    raise RunError(f"--output: {'give a new directory' if output == pathlib.Path() else f'{output} is not empty'}")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
