"""LIMA, ISARA and SPA whole, on a few rows of the miniature world. What they train and sample has one form, so that one
process compiles each program once for all three.

  python tests/tiny_recipes.py WORKDIR DATA     one of the processes that the environment names (start.hosts_of)
"""

import json
import pathlib
import sys

import jax

from alma_jax import start
from alma_jax.llama import sharding
from alma_jax.mini import seeds
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Host
from alma_jax.runtime.session import Session
from alma_jax.store.runs import Run
from configs import isara, lima, spa
from configs.common import preferences, training

ROWS = {"sft": 40, "preferences": 20, "prompts": 24, "eval": 8}
ALIKE = dict(fit_rows=False, batch=16, row_length=64, weight_decay=0.0, beta2=0.98)
SAMPLED = dict(temperature=0.7, top_p=0.9, repetition_penalty=1.2, max_new_tokens=12, max_prompt_tokens=64)


def write_data(directory):
  """Every so many rows of each file of the miniature world, as ordinary JSONL files."""
  seeds.make(directory, 0)
  for name, count in ROWS.items():
    file = directory / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:: len(lines) // count - 1][:count]))  # kinds of prompts alternate
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  texts = [f"answer: {word} ." for word in ("lyon france", "rice", "chess")]
  for name, more in (("others", {"response": texts[0]}), ("choices", {"choices": texts, "answer": 1})):
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))


def configs(data):
  """The config of each recipe by its name."""
  found = {"lima": lima.get_config("mini"), "isara": isara.get_config("mini"), "spa": spa.get_config("mini")}
  for c in found.values():
    c.shards = 3
    c.engine.update(dict(slots=16, rows=16))
    c.sft = training(1e-3, 1e-4, epochs=2, dropout=0.1, **ALIKE)
    for name in ROWS.keys() & c.data.keys():
      c.data[name] = str(data / f"{name}.jsonl")
    c.eval.update(SAMPLED)
  c = found["lima"]
  c.sft.keep_epochs = 1
  c.data.update(dict(judge="", validation_held_out=8))
  c.choice.update(dict(first=1, last=2, prompts=4))
  c.compare.update(dict(against=(f"others={data / 'others.jsonl'}",), judges=("truth=mini",)))
  c.audit.prompts = 3
  c = found["isara"]
  c.data.pairs, c.alpha, c.feedback_rounds = 16, 0.0, 1
  c.categories.update(dict(seeds=("country",), judge="truth", harmful="below", bound=5.0))
  c.eval.update(dict(judges=("truth=mini", "mc=rules:multiple_choice"), sets=(f"choices={data / 'choices.jsonl'}",)))
  c.prompts.update(SAMPLED | dict(draws=48, shots=(2, 2)))
  c.neighbours.shots = c.eval.shots = 2
  c.responses.update(SAMPLED)
  c.policy = training(1e-3, 1e-4, epochs=2, dropout=0.1, **ALIKE)
  c.policy.update(dict(init_from="base", gamma=0.3))
  c = found["spa"]
  c.dpo = preferences(3e-4, 0.0, epochs=1, **ALIKE)
  c.policy.update(ALIKE | dict(batch=8, window=1))
  c.seeds.held_out, c.split.parts, c.feedback_rounds = 4, (12,), 1
  c.responses.update(SAMPLED | dict(n=2))
  return found


def session(directory, config):
  """Training on two devices, of one process or of two; sampling on one device of each process."""
  by_round = start.checked_options(config)
  run = Run(directory, jax.process_index(), jax.process_count(), start.barrier)
  local = sharding.make_mesh(1, 1, 1, jax.local_devices()[:1])
  host = Host(by_round[0].model, by_round[0].engine, local, Display(speaks=False))
  devices = [device for device in jax.devices() if device.id < 2 or jax.process_count() > 1]
  return Session(run, host, sharding.make_mesh(1, 2, 1, devices), by_round, config)


def run_all(workdir, data):
  for name, config in configs(data).items():
    with (s := session(workdir / name, config)).run:
      start.recipe_of(config).run(s)


if __name__ == "__main__":
  start.join_hosts()
  start.cache_compilations()
  run_all(*map(pathlib.Path, sys.argv[1:]))
