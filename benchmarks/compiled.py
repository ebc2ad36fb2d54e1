r"""Every program of a run, compiled for machines that are not here: what each takes and sends, and what is refused.

  python -m benchmarks.compiled --output=compiled.jsonl                            the whole matrix: hours
  python -m benchmarks.compiled --output=compiled.jsonl --only=llama3_8b@v6e:2x4   one machine
  python -m benchmarks.compiled --output=small.jsonl --only=llama3_8b@v6e:2x4 --depth=2 --stages=dpo,pool/clusters
  python -m benchmarks.compiled --output=decode.jsonl --only=llama3_8b@v6e:2x4 --depth=4 --slots=256 \
    --stages=round_02/responses
  python -m benchmarks.compiled --output=small.jsonl --against-quick                  what quick plans say of them

TPUs' compiler comes with 'alma_jax[plan]', that of GPUs with 'alma_jax[gpu]'; neither needs a device. The programs are
those of configs/alma.py at full depth, or of a model cut to --depth layers, on the config's mesh. Every program is a
line of the output as soon as it is compiled, and the same versions do not compile it again, nor for another stage that
runs it: start the same command to go on. At the end all lines are printed as a table, with the seconds of a core that
each program took. --effort=default asks for the compilers' default effort, as a run has it, instead of the lowest.
--against-quick compiles nothing: it prints, for every stage in the output, the most memory that a program takes beside
what the quick plan says, whole and without weights and optimizer state, which are known to the byte.

What to expect: peaks below what is usable, nothing sent in sampling and reading where a device holds the model, and
weights that are gathered, not all-reduced. A decode loop's row also says what its step takes from and to a device's
memory, as plan/traffic.py counts it, with responses of the plan's mean length and every row of prompts full. At low
effort a training step takes a TPU's compiler half a minute to two CPU minutes.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from alma_jax.engine.train import least_bytes
from alma_jax.llama import sharding
from alma_jax.plan import compiled, devices, estimate, estimate_training, hlo, programs, shapes, topology
from alma_jax.plan.machine import Machine, Step
from alma_jax.plan.work import Clustering, Training, Work
from alma_jax.tools import plan

GIB = 2**30
MATRIX = [
  *(f"llama3_8b@{word}" for word in ("v5e:4x4", "v6e:2x4", "v6e:8x8", "v5p:2x2x2", "h100:8")),
  *(f"llama3_70b@{word}" for word in ("v5p:4x4x4", "h100:8x8")),
  *(f"llama32_1b@{word}" for word in ("v5e:2x2", "h100:1")),
]
# One stage for each kind of program, and the other losses
STAGES = (
  "sft_1", "round_02/policy", "round_02/responses", "round_02/judgments", "pool/embeddings", "pool/clusters",
)  # fmt: skip
METHODS = ("dpo", "grpo")
Row = dict[str, Any]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", required=True, type=pathlib.Path, help="JSON lines, one a program")
  parser.add_argument("--only", default=",".join(MATRIX), help="model@topology, several with commas")
  parser.add_argument("--stages", default=",".join((*STAGES, *METHODS)), help="stages, dpo, grpo")
  parser.add_argument("--depth", type=int, default=0, help="layers; 0: all")
  parser.add_argument("--slots", type=int, default=0, help="of sampling; 0: as many as fit")
  parser.add_argument("--effort", choices=("low", "default"), default="low")
  parser.add_argument("--against-quick", action="store_true", help="compare what is there with quick plans")
  options = parser.parse_args()
  if options.against_quick:
    for line in _against_quick(_rows(options.output)):
      print(line)
    return
  began, worked = time.monotonic(), time.process_time()
  done = {_key(row): row for row in _rows(options.output)}
  for cell in options.only.split(","):
    for row in _cell(cell, options, done):
      with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
      done[_key(row)] = row
      print(_line(row), flush=True)
  took = f"{time.monotonic() - began:.0f} s on {os.cpu_count()} cores, {time.process_time() - worked:.0f} s of one"
  print(f"\n{len(done)} programs; this start took {took}\n")
  print("| model | machine | program | peak GiB | usable | sent in a step | CPU s |\n|---|---|---|---|---|---|---|")
  for row in done.values():
    print(_line(row))


def _cell(cell: str, options: argparse.Namespace, done: dict[Any, Row]) -> Iterator[Row]:
  """A line for each program of this model on this machine that is not done."""
  model, _, word = cell.partition("@")
  size = "70b" if model == "llama3_70b" else "8b"
  effort = devices.LOW if options.effort == "low" else devices.DEFAULT
  with devices.described(topology.parse(word), effort) as there:
    compilers = devices.compilers(topology.parse(word))
    for name in options.stages.split(","):
      machine, work = _work(model, word, size, name, options)
      fixed = dict(
        model=model, topology=word, depth=machine.c.depth, effort=options.effort, compilers=compilers, stage=name,
        slots=options.slots or None,
      )  # fmt: skip
      if any(row["stage"] == name and _key(row)[:-1] == _key(fixed)[:-1] and row["last"] for row in done.values()):
        continue
      step = estimate.estimate(machine, work)
      found = programs.programs(machine, step, there)
      like = hashlib.sha256(repr(programs.key(machine, step)).encode()).hexdigest()[:12]
      for at, program in enumerate(found):
        own = fixed | dict(program=program.name, like=like)
        if _key(own) in done:
          continue
        if twin := next((row for row in done.values() if _same(row, own)), None):
          yield twin | dict(stage=name, seconds=0.0)
          continue
        worked = time.process_time()
        made = compiled.made_of(program, name, machine.platform)
        yield own | dict(
          last=at == len(found) - 1,
          peak=made.peak,
          remat=made.remat,
          passes=made.passes,
          usable=machine.topology.chip.memory,
          sent=hlo.sent(made.collectives),
          moved=made.moved,
          collectives=hlo.summary(made.collectives),
          largest=[dataclasses.asdict(c) for c in made.collectives[:5]],
          refused=made.refused,
          seconds=round(time.process_time() - worked, 1),
          date=datetime.date.today().isoformat(),
        )


def _work(model: str, word: str, size: str, name: str, options: argparse.Namespace) -> tuple[Machine, Work]:
  """A stage of the config on this machine; `dpo` and `grpo` are its policies by that method."""
  machine, work = _planned(model, size, name, options.slots)
  depth = options.depth or machine.c.depth
  c = dataclasses.replace(machine.c, depth=depth)
  return dataclasses.replace(machine, topology=topology.parse(word), c=c), work


@functools.cache
def _planned(model: str, size: str, name: str, slots: int) -> tuple[Machine, Work]:
  """The stage, whose work no machine changes, and some machine."""
  given = [f"--config=configs/alma.py:{size}", f"--model={model}", "--topology=h100:8x8"]
  overrides = []
  if name in METHODS:
    overrides = [f"--config.trainset.method={name}"]
    overrides += ["--config.responses.checkpoints=('latest',)"] if name == "grpo" else []
  overrides += [f"--config.engine.slots={slots}"] if slots else []
  stage = "round_02/policy" if name in METHODS else name
  made = plan.made(plan.FLAGS.values([*given, f"--stages={stage}"]), overrides)
  return made.machine, made.steps[0].work


@dataclasses.dataclass(frozen=True)
class Compared:
  """The largest program of a stage, and the quick plan's Step for the same remat and passes."""

  row: Row
  step: Step
  held: int  # bytes that both have, weights and optimizer state: they are known


def compared(rows: Iterable[Row]) -> Iterator[Compared]:
  stages: dict[tuple[Any, ...], Row] = {}
  for row in rows:
    if not row["refused"]:
      of = _key(row)[:-1]
      worst = max(row, stages.get(of, row), key=_peak)
      how = stages.get(of, row) if not row.get("remat") else row  # that of the step, whatever program is the largest
      stages[of] = worst | {name: how.get(name) for name in ("remat", "passes")}
  for row in stages.values():
    size, cut = "70b" if row["model"] == "llama3_70b" else "8b", dict(depth=row["depth"], slots=row.get("slots") or 0)
    machine, work = _work(row["model"], row["topology"], size, row["stage"], argparse.Namespace(**cut))
    if isinstance(work, Training) and row["remat"]:
      work = estimate_training.with_options(work, remat=row["remat"], passes=row["passes"])
    step = estimate.estimate(machine, work)
    held = 0 if isinstance(work, Clustering) else machine.held
    if isinstance(work, Training) and step.mesh:
      mesh = sharding.abstract_mesh(machine.topology.devices, **dataclasses.asdict(step.mesh))
      objective = dataclasses.replace(work.options.objective(machine.dtype), remat="full")
      held = least_bytes(machine.c, mesh, work.options.optimizer, objective, 0)
    yield Compared(row, step, held)


def _against_quick(rows: Iterable[Row]) -> Iterator[str]:
  """A table of what `compared` says."""
  yield "| model | machine | stage | compiled GiB | quick | | beside the weights | quick | | sent GB | quick | |"
  yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
  for each in compared(rows):
    row, step, held = each.row, each.step, each.held
    how = f"{step.slots} slots" if step.slots else ""
    if step.remat and step.shape:
      how = f"{step.remat}, {step.shape.rows} x {step.shape.length}"
    stage = f"{row['stage']} ({row['program']}) {how}".rstrip()
    cells = [f"{row['model']}, {row['depth']} layers", row["topology"], stage]
    pairs = [(row["peak"] / GIB, step.peak / GIB), ((row["peak"] - held) / GIB, (step.peak - held) / GIB)]
    pairs += [(row["sent"] / 1e9, step.collective / 1e9)] if isinstance(step.work, Training) and step.collective else []
    for made, quick in pairs:
      cells += [f"{made:.2f}", f"{quick:.2f}", f"{quick / made - 1:+.0%}" if made else ""]
    cells += [""] * (12 - len(cells))
    yield f"| {' | '.join(cells)} |"


def _peak(row: Row) -> int:
  return row["peak"]


def _key(row: Row) -> tuple[Any, ...]:
  names = ("model", "topology", "depth", "slots", "effort", "compilers", "stage", "program")
  return tuple(row.get(name) for name in names)


def _same(row: Row, own: Row) -> bool:
  """True if a row is of the same program, of whatever stage."""
  return row.get("like") == own["like"] and _key(row | dict(stage=own["stage"])) == _key(own)


def _rows(path: pathlib.Path) -> Iterator[Row]:
  """The lines that are there; one that a killed start left unfinished is made again."""
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    try:
      yield json.loads(line)
    except ValueError:
      continue


def _line(row: Row) -> str:
  cut = f" ({row['depth']} layers)" if row["depth"] != shapes.shape(row["model"]).depth else ""
  what = row["refused"] or row["collectives"]
  if moved := row.get("moved"):
    what += f"; {moved / 1e9:.4g} GB from and to memory"
  peak = "does not compile" if row["refused"] else f"{row['peak'] / GIB:.2f}"
  return (
    f"| {row['model']}{cut} | {row['topology']} | {row['stage']} {row['program']} | {peak} |"
    f" {row['usable'] / GIB:.2f} | {what} | {row['seconds']:.0f} |"
  )


if __name__ == "__main__":
  main()
