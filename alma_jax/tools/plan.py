"""What a run needs, before it is paid for: memory, hours, disk and price on a machine that need not be there.

  python -m alma_jax.tools.plan --config=configs/alma.py:8b --topology=h100:8 --model=llama3_8b
  python -m alma_jax.tools.plan --config=configs/alma.py:8b --topology=v5p:4x4x4 --model=llama3_8b --price=4.2
  python -m alma_jax.tools.plan --config=... --topology=v6e:2x4 --run=runs/alma_8b --json=plan.json
  python -m alma_jax.tools.plan --config=... --topology=v6e:2x4 --stages=policy,responses     compiles these alone
  python -m alma_jax.tools.plan --config=... --topology=h100:8 --quick                        compiles nothing

Plans every recipe (configs/lima.py:65b, isara.py:7b, spa.py:7b) and needs no accelerator and no weights. Topologies:
v5e, v6e and v5p slices, h100:8, h100:8x2 (8 GPUs on each of 2 hosts), cpu. --model replaces config.model.path: a
directory with config.json, or a name such as llama3_8b or mistral_7b.
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
from alma_jax.plan import compiled, devices, meshes, recipes, shapes, table, topology
from alma_jax.plan.estimate import estimate
from alma_jax.plan.machine import Machine
from alma_jax.plan.work import Work
from alma_jax.runtime.display import Display
from alma_jax.tools import command

TOO_LARGE = 3  # the exit status where something does not fit
FILE = "not_given.jsonl"
NOT_GIVEN: dict[str, dict[str, Any]] = {  # what stands in a config for what is not given, by recipe
  "alma": {"data.sft": FILE, "data.judge": FILE},
  "lima": {"data.sft": FILE, "data.judge": FILE, "eval.sets": (f"test={FILE}", f"safety={FILE}")},
  "isara": {"data.sft": FILE, "eval.judges": ("not_given=rules:length",)},
  "spa": {"data.preferences": FILE, "data.prompts": FILE, "data.sft": FILE},
}


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
  demonstrations: int | None = option(None, least=1, doc="rows of data.sft (as the recipe's paper)")
  annotations: int | None = option(None, least=1, doc=f"rows of data.judge ({recipes.ANNOTATIONS})")
  preferences: int | None = option(None, least=1, doc=f"rows of data.preferences ({recipes.PREFERENCES})")
  eval_prompts: int | None = option(None, least=1, doc="rows of data.eval (data.held_out)")


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
  _stand_ins(config, overrides)
  by_round = start.checked_options(config)
  o = by_round[0]
  run = pathlib.Path(options.run) if options.run else None
  given = {field.name: getattr(options, field.name) for field in dataclasses.fields(assumed.Given)}
  found = assumed.assumptions(assumed.Given(**given), run, recipes.defaults(by_round))
  c = shapes.shape(options.model or o.model.path)
  start.check_lengths(by_round, c.max_positions)
  where = topology.parse(options.topology)
  if run and where.chip.platform == "cpu" and (share := assumed.cpu_share(run, c, where.chip.flops)):
    found = dataclasses.replace(found, mfu=share, where=found.where | {"mfu": f"measured in {run}"})
  machine = Machine(where, c, o.mesh, o.engine, o.model, found)
  works = list(recipes.works(by_round, found, c.width))
  steps = [estimate(machine, task) for task in _chosen(works, options.stages)]
  return table.Plan(machine, steps, list(recipes.not_counted(by_round)))


def _stand_ins(config: Any, overrides: Sequence[str]) -> None:
  """Names for data that a run needs and a plan does not read: how much they hold is assumed. What an override sets
  empty stays so."""
  recipe = start.recipe_of(config).__name__.rpartition(".")[2]
  if recipe not in recipes.WORKS:
    raise ConfigError(f"config.recipe is {recipe!r}, which is not planned; that are {', '.join(recipes.WORKS)}")
  fields = dict(NOT_GIVEN[recipe])
  if recipe == "spa" and config.get("sft_model"):
    fields |= {"data.eval": FILE}
    del fields["data.sft"]
  if recipe == "lima" and config.get("choice", {}).get("prompts"):
    del fields["eval.sets"]  # the rest of data.eval is the set "test"
  for name, value in fields.items():
    section, _, field = name.partition(".")
    given = any(x.startswith(f"--config.{name}=") for x in overrides)
    if not given and field in config.get(section, ()) and not config[section][field]:
      config[section][field] = value


def _compiled(plan: table.Plan) -> table.Plan:
  """The plan with the compilers' figures; a bar shows how far they are."""
  machine, began, worked = plan.machine, time.monotonic(), time.process_time()
  with devices.described(machine.topology) as there:
    total = compiled.count(machine, plan.steps, there)
    with Display().bar(f"compiling for {machine.topology.name}", total, "programs") as bar:

      def hear(name: str) -> None:
        bar.set_postfix_str(name, refresh=False)
        bar.update(1)

      steps = compiled.compiled(machine, plan.steps, there, hear)
  took = f"{time.monotonic() - began:.0f} s, {time.process_time() - worked:.0f} s of a core"
  how = f"{devices.compilers(machine.topology)}, low effort; {total} programs in {took}"
  if any(compiled.in_line(machine, step) for step in steps):
    how += f"; those of sampling with {' and '.join(map(str, compiled.DEPTHS))} layers, in a line to {machine.c.depth}"
  return dataclasses.replace(plan, steps=steps, compilers=how)


def _chosen(works: list[Work], kinds: str | None) -> list[Work]:
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
    except (SyntaxError, ImportError) as error:
      raise _unreadable(path, error) from None
    except (AttributeError, KeyError) as error:
      whole = flags.FlagValues()
      named = config_flags.DEFINE_config_file("config", None, flag_values=whole, sys_argv=argv[:2])
      try:
        whole(argv[:2])
      except (AttributeError, KeyError):  # without an override, too
        raise _unreadable(path, error) from None
      known = set(leaves(named.value.to_dict()))
      unknown = [name for name in (x[len("--config.") :].partition("=")[0] for x in overrides) if name not in known]
      if not unknown:
        raise
      raise ConfigError(f"--config.{unknown[0]}: {nearest(named.value, unknown[0])}") from None
    except (flags.Error, ValueError) as error:
      raise ConfigError(f"the config cannot be read: {str(error).strip().splitlines()[-1]}") from None
  names.look_in(os.path.dirname(os.path.abspath(path)))
  return found


def _unreadable(path: str, error: Exception) -> ConfigError:
  return ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}")


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
