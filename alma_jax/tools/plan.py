"""What a run needs, before it is paid for: memory, hours, disk and price on a machine that need not be there.

  python -m alma_jax.tools.plan --config=configs/alma.py:8b --topology=h100:8 --model=llama3_8b
  python -m alma_jax.tools.plan --config=configs/alma.py:8b --topology=v5p:4x4x4 --model=llama3_8b --price=4.2
  python -m alma_jax.tools.plan --config=... --topology=v6e:2x4 --run=runs/alma_8b --json=plan.json
  python -m alma_jax.tools.plan --config=... --topology=v6e:2x4 --stages=policy,responses     compiles these alone
  python -m alma_jax.tools.plan --config=... --topology=h100:8 --quick                        compiles nothing

Needs no accelerator and no weights. Topologies: v5e, v6e and v5p slices, h100:8, h100:8x2 (8 GPUs on each of 2 hosts),
cpu. --model replaces config.model.path: a directory with config.json, or llama3_8b, llama3_70b, llama32_1b, llama2_7b.
Config values are set as for a run, with --config.NAME=VALUE. With --run, lengths and counts come from that run, and so
does the share of the peak that training reaches; flags such as --response_tokens come first.

Every stage's programs are compiled by the real compilers, which need no accelerator: libtpu for TPUs (pip install
'alma_jax[plan]'), JAX's CUDA plugin for GPUs (pip install 'alma_jax[gpu]'). Their figures are the plan's memory and
collectives; hours are projected by roofline. --quick compiles nothing and takes analytic bounds. --meshes compares the
meshes that training could have on the topology. The exit status is 0 if everything fits and 3 if not; the last lines
then say what does not, and which knob or topology would help.
"""

import dataclasses
import difflib
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from alma_jax import config_files, names, start
from alma_jax.options import Checked, ConfigError, leaves, nearest, option
from alma_jax.plan import assumptions as assumed
from alma_jax.plan import compiled, devices, meshes, shapes, table, topology, work
from alma_jax.plan.estimate import Machine, estimate
from alma_jax.recipes import alma
from alma_jax.runtime.display import Display
from alma_jax.tools import command

TOO_LARGE = 3  # the exit status where something does not fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  config: str = option(doc="a config file and its size, e.g. configs/alma.py:8b")
  topology: str = option(doc=topology.KNOWN)
  model: str | None = option(None, doc=f"instead of config.model.path: a directory, {', '.join(shapes.SHAPES)}")
  run: str | None = option(None, doc="a run directory whose lengths and rates are taken")
  json: str | None = option(None, doc="write the plan as JSON, too")
  price: float | None = option(None, least=0, doc="USD for an hour of one device")
  stages: str | None = option(None, doc="only these kinds of stages, e.g. policy,responses")
  quick: bool = option(False, doc="compile nothing: memory by analytic bounds")
  meshes: bool = option(False, doc="compare the meshes that training could have on the topology")
  prompt_tokens: int | None = option(None, least=1, doc=f"mean tokens of a prompt ({assumed.PROMPT})")
  response_tokens: int | None = option(None, least=1, doc=f"of a response ({assumed.RESPONSE})")
  example_tokens: int | None = option(None, least=1, doc=f"of a training example ({assumed.EXAMPLE})")
  demonstrations: int | None = option(None, least=1, doc=f"rows of data.sft ({assumed.DEMONSTRATIONS})")
  annotations: int | None = option(None, least=1, doc=f"rows of data.judge ({assumed.ANNOTATIONS})")


FLAGS = command.Flags("plan", __doc__, Options)


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  overrides = [word for word in arguments if word.startswith("--config.")]
  options = FLAGS.values([word for word in arguments if word not in overrides])
  found: list[table.Plan] = []

  def planned() -> None:
    plan = made(options, overrides)
    if not options.quick and not options.meshes:
      plan = _compiled(plan)
    found.append(plan)
    shown = meshes.lines(plan, options.quick) if options.meshes else table.lines(plan, options.price)
    for line in shown:
      print(line, flush=True)
    if options.json:
      table.write(pathlib.Path(options.json), plan)

  status = start.status(planned, "")
  return status or (0 if found[0].fits else TOO_LARGE)


def made(options: Options, overrides: Sequence[str] = ()) -> table.Plan:
  """The plan that these flags ask for."""
  config = _config(options.config, overrides)
  if config.get("recipe") != "alma":
    raise ConfigError(
      f"config.recipe is {config.get('recipe')!r}: only runs of 'alma' are planned so far (its trainings, pool,"
      " responses, judgments and evaluations)"
    )
  for name in ("sft", "judge"):  # how many rows they have is assumed
    config.data[name] = config.data[name] or "not_given.jsonl"
  by_round = start.checked_options(config)
  o: alma.Options = by_round[0]
  run = pathlib.Path(options.run) if options.run else None
  given = {field.name: getattr(options, field.name) for field in dataclasses.fields(assumed.Given)}
  found, c = assumed.assumptions(assumed.Given(**given), run), shapes.shape(options.model or o.model.path)
  start.check_lengths(by_round, c.max_positions)
  where = topology.parse(options.topology)
  if run and where.chip.platform == "cpu" and (share := assumed.cpu_share(run, c, where.chip.flops)):
    found = dataclasses.replace(found, mfu=share, where=found.where | {"mfu": f"measured in {run}"})
  machine = Machine(where, c, o.mesh, o.engine, o.model, found)
  works = list(work.of_alma(by_round, found, c.width))
  steps = [estimate(machine, task) for task in _chosen(works, options.stages)]
  return table.Plan(machine, steps, list(work.not_counted(by_round)))


def _compiled(plan: table.Plan) -> table.Plan:
  """The plan with the compilers' figures; a bar shows how far they are."""
  machine, began = plan.machine, time.monotonic()
  with devices.described(machine.topology) as there:
    total = compiled.count(machine, plan.steps, there)
    with Display().bar(f"compiling for {machine.topology.name}", total, "programs") as bar:

      def hear(name: str) -> None:
        bar.set_postfix_str(name, refresh=False)
        bar.update(1)

      steps = compiled.compiled(machine, plan.steps, there, hear)
  took = f"{devices.compilers(machine.topology)}, low effort; {total} programs in {time.monotonic() - began:.0f} s"
  return dataclasses.replace(plan, steps=steps, compilers=took)


def _chosen(works: list[work.Work], kinds: str | None) -> list[work.Work]:
  """The stages of these kinds or names."""
  if kinds is None:
    return works
  known = {name for task in works for name in (task.stage, task.stage.rpartition("/")[2])}
  wanted = kinds.split(",")
  for name in wanted:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"--stages names {name!r}, which this run has not{hint}")
  return [task for task in works if {task.stage, task.stage.rpartition("/")[2]} & set(wanted)]


def _config(file: str, overrides: Sequence[str]) -> Any:
  """The config of --config=FILE:SIZE with its values from the command line."""
  with config_files.loading(["plan", f"--config={file}", *overrides]) as argv:
    path = argv[1].removeprefix("--config=").partition(":")[0]
    if not os.path.isfile(path):
      raise ConfigError(f"--config names {path}, which does not exist here ({os.getcwd()})")
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
      values(argv)
      found = holder.value
    except (AttributeError, KeyError):
      whole = flags.FlagValues()
      named = config_flags.DEFINE_config_file("config", None, flag_values=whole, sys_argv=argv[:2])
      whole(argv[:2])
      known = set(leaves(named.value.to_dict()))
      unknown = [name for name in (x[len("--config.") :].partition("=")[0] for x in overrides) if name not in known]
      if not unknown:
        raise
      raise ConfigError(f"--config.{unknown[0]}: {nearest(named.value, unknown[0])}") from None
    except (flags.Error, ValueError) as error:
      raise ConfigError(f"the config cannot be read: {str(error).strip().splitlines()[-1]}") from None
  names.look_in(os.path.dirname(os.path.abspath(path)))
  return found


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
