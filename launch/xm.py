"""Send a sweep, or one run, through XManager: a work unit for each variant.

  pip install -e '.[xmanager]'              or '.[xmanager-slurm]' for --backend=slurm
  python launch/xm.py --config=configs/ablations/table7_dpo.py --workdir=/data/table7 --backend=local
    --backend=cloud --image=REGISTRY/alma_jax:latest --requirements=h100=8 --config.feedback_rounds=2
    --backend=slurm --image=REGISTRY/alma_jax:latest --executor=my_cluster:EXECUTOR

  local    xm_local: processes of this machine, all variants at once (launch/sweep.py runs a few at a time)
  cloud    xm_cloud (XManager on Google Cloud): Kubernetes jobs, one pod for each variant
  slurm    xm_slurm (xmanager-slurm): a cluster behind ssh, which pulls the image

--executor names an executor of your own, package.module:NAME, looked up in the config file's folder and the working
directory; Slurm needs one, as it holds the cluster's address, and Vertex AI is reached so from `local` with an --image:
EXECUTOR = xm_slurm.Slurm(requirements=xm_slurm.JobRequirements(cluster=..., h100=8), time=timedelta(hours=24)).

launch/Dockerfile makes the image. A config file without sweep(add) is one work unit. Variants that are finished are not
sent again, if --workdir can be read from here. XManager's own flags (--xm_gcs_path ...) work, too.
"""

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from sweep import units_of_flags  # of this folder

from alma_jax import names
from alma_jax.main import parse
from alma_jax.sweeps import Unit

with contextlib.suppress(ModuleNotFoundError):
  importlib.import_module("xmanager.xm_flags")  # defines the flags --xm_*

FLAGS = flags.FLAGS
EXECUTORS = names.Names("an executor", {})
MODULES = {"local": "xmanager.xm_local", "cloud": "xmanager.xm_cloud", "slurm": "xm_slurm"}
flags.DEFINE_enum("backend", "local", list(MODULES), "Where the variants run.")
flags.DEFINE_string("image", None, "A container image whose entry point is alma_jax.main (launch/Dockerfile).")
flags.DEFINE_string("requirements", "", "Resources of a work unit, e.g. h100=8,cpu=32.")
flags.DEFINE_string("executor", None, "An executor of your own, package.module:NAME.")


def launch(create: Callable[[str], Any], title: str, units: Sequence[Unit], packageable: Any, executor: Any) -> None:
  """Add a job for each unit to the experiment that `create(title)` makes."""
  xm = api()
  with create(title) as experiment:
    [executable] = experiment.package([packageable])
    for unit in units:
      # A list of ready texts: a dict would turn False into --noNAME and a tuple into several flags.
      experiment.add(xm.Job(executable, executor, args=list(unit.arguments), name=unit.directory.name))


def api() -> Any:
  """XManager's core module."""
  return importlib.import_module("xmanager.xm")


def backend(name: str) -> Any:
  """The module of a backend; the process ends with one line where its package is missing."""
  try:
    api()
    return importlib.import_module(MODULES[name])
  except ModuleNotFoundError as e:
    extra = "xmanager-slurm" if name == "slurm" else "xmanager"
    sys.exit(f"error: --backend={name} needs the package {extra} (no module {e.name!r}): pip install -e '.[{extra}]'")


def resources(text: str) -> Mapping[str, float]:
  """{"h100": 8.0} of "h100=8"."""
  try:
    return {name: float(amount) for name, amount in (part.split("=") for part in text.split(",") if part)}
  except ValueError:
    sys.exit(f"error: --requirements={text}: give NAME=AMOUNT,NAME=AMOUNT, such as h100=8,cpu=32")


def executor_of_flags(module: Any) -> Any:
  if FLAGS.executor:
    try:
      return names.resolve(EXECUTORS, FLAGS.executor, "--executor")
    except names.NameUnknown as e:
      sys.exit(f"error: {e}")
  if FLAGS.backend == "slurm":
    sys.exit("error: --backend=slurm needs --executor=package.module:NAME, an xm_slurm.Slurm(...) with its cluster")
  kind = module.KubernetesJobExecutor if FLAGS.backend == "cloud" else module.Local
  return kind(requirements=api().JobRequirements(resources(FLAGS.requirements)))


def packageable_of_flags(module: Any, executor: Any) -> Any:
  xm = api()
  if FLAGS.backend != "local" and not FLAGS.image:
    sys.exit(f"error: --backend={FLAGS.backend} needs --image: build launch/Dockerfile and push it")
  if FLAGS.backend == "slurm":
    return module.docker_image(image=FLAGS.image)
  if FLAGS.image:
    return xm.container(executor.Spec(), FLAGS.image)
  return xm.binary(executor.Spec(), sys.executable, args=["-m", "alma_jax.main"])


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Config values are set with --config.NAME=VALUE")
  if not (FLAGS["config"].value and FLAGS.workdir):
    sys.exit("error: --config and --workdir are needed")
  module = backend(FLAGS.backend)
  units = units_of_flags(alone=True)
  waiting = [unit for unit in units if unit.state() != "finished"]
  print(f"{len(units)} variants, {len(units) - len(waiting)} finished", flush=True)
  if waiting:
    executor = executor_of_flags(module)
    title = pathlib.Path(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]).stem
    launch(module.create_experiment, title, waiting, packageable_of_flags(module, executor), executor)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
