"""Writes a training's intermediate checkpoint as a Hugging Face directory, which transformers and vLLM load as it is.

  python -m alma_jax.tools.export --stage=runs/alma/round_05/policy --step=400 --output=models/round_05_400

Trainings keep one checkpoint in `checkpoint_keep` steps (config.policy.checkpoint_keep=100, say); without --step the
command lists those that are there. A finished stage's own model needs no export: it is STAGE/model. The run's config
says which tokenizer, chat format and precision the model gets. Any number of devices will do.
"""

import pathlib
import sys

import jax
from ml_collections import ConfigDict

from alma_jax.errors import RunError
from alma_jax.llama import sharding
from alma_jax.runtime import training
from alma_jax.runtime.host import Host
from alma_jax.tools import command


def main(arguments):
  """The exit status."""
  flags = command.Flags("alma_jax.tools.export", __doc__, "--stage=DIR --step=NUMBER --output=DIR")
  flags.add_argument("--stage", required=True, metavar="DIR", help="a training of a run, finished or not")
  flags.add_argument("--step", type=command.COUNT, help="which checkpoint; none: list them")
  flags.add_argument("--output", metavar="DIR", help="a new directory")
  flags = flags.values(arguments)
  return command.status(lambda: run(flags))


def run(flags):
  stage = pathlib.Path(flags.stage).expanduser()
  found = sorted(int(path.name) for path in (stage / "checkpoints").glob("*") if path.name.isdigit())
  if not found:
    raise RunError(
      f"{stage} has no checkpoints: a finished training keeps those that its config's checkpoint_keep asks for, a"
      " running one the last two"
    )
  listed = ", ".join(f"{step:,}" for step in found)
  if flags.step is None:
    print(f"{stage}: checkpoints after steps {listed}")
    return
  if flags.step not in found:
    raise RunError(f"{stage} has no checkpoint after step {flags.step:,}; there are {listed}")
  output = pathlib.Path(flags.output or "").expanduser()
  if not flags.output or (output.exists() and any(output.iterdir())):
    raise RunError(f"--output: {'give a new directory' if not flags.output else f'{output} is not empty'}")
  config = command.run_of(stage)
  host = Host(ConfigDict({"model": config["model"], "engine": {}}), sharding.make_mesh())
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
  training.export(host, training.checkpoint_model(host, stage / "checkpoints", flags.step, mesh), output)
  print(f"{output}: {stage.name} of {stage.parent} after step {flags.step:,}, {host.config.model.save_dtype}")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
