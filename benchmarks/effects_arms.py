"""The arms of `benchmarks.effects`: what each changes of the default, how it is run, and what is kept of it.

An arm is a run of `configs/alma.py:mini_paper` for one base model and one pipeline seed, with a few values changed. The
stages before the first round are shared by all arms of a seed that change nothing in them. What is kept of a finished
arm is one small JSON file: the ground truth of every answer in the compared rounds, and what was drawn and trained.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax.mini import seeds, world
from alma_jax.store import layout, shards
from alma_jax.store.records import Example, Grade, Prompt
from alma_jax.store.runs import read_stage

SET = "results"  # the evaluation set of all numbers: `seeds.results_prompts`
LATE, MIDDLE = 10, 6  # the rounds that are compared
# The stages that come before the first round with feedback; and those of them that follow from the pool, on whose
# prompts the judge is distilled.
FROM_POOL = (layout.POOL, layout.DISTILLED, layout.QUALITY, layout.round_name(0), layout.round_name(1))
SHARED = (layout.SEEDS, layout.JUDGE, layout.sft_name(1), layout.sft_name(2), *FROM_POOL)


@dataclasses.dataclass(frozen=True)
class Base:
  """A base model: where it lies, and the chatter of its world."""

  name: str
  path: pathlib.Path
  chatter: world.Chatter = "dense"


@dataclasses.dataclass(frozen=True)
class Arm:
  """A run with these config values, up to round `last`; `compared` are the rounds that the results set is asked in."""

  name: str
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  last: int = MIDDLE
  compared: tuple[int, ...] = (MIDDLE,)
  own: tuple[str, ...] = ()  # the shared stages that it makes anew

  def __post_init__(self) -> None:
    assert set(self.own) <= set(SHARED) and all(r <= self.last for r in self.compared), self


ARMS = (
  Arm("default", last=LATE, compared=(0, 1, MIDDLE, LATE)),
  Arm("random_prompts", {"draw.method": "random"}, LATE, (MIDDLE, LATE)),
  Arm("no_judge", {"trainset.method": "random"}),
  Arm("latest_only", {"responses.checkpoints": ("latest",)}),
  Arm("two_sft_only", {"responses.checkpoints": ("sft",)}),
  Arm("one_sft_only", {"responses.checkpoints": ("sft_1",)}),
  Arm("dpo", {"trainset.method": "dpo"}),
  Arm("dpo_without_nll", {"trainset.method": "dpo", "dpo.nll_weight": 0.0}),
  Arm("grpo", {"trainset.method": "grpo", "responses.checkpoints": ("latest",)}),
  # N x K x R as in the five rounds of the arms above, spent otherwise
  Arm("more_n", {"responses.n": 2.0, "draw.prompts": 0.5}),
  Arm("more_k", {"responses.n": 0.5, "draw.prompts": 2.0}),
  Arm("fewer_rounds", {"draw.prompts": 2.5}, last=3, compared=(3,)),
)
CONTROLS = (  # what the effect of diverse prompts rests on: fewer seeds, one base
  Arm("mean_pooling", {"embeddings.pooling": "mean"}, LATE, (LATE,), FROM_POOL),
)


def config_of(arm: Arm, base: Base, seed: int, data: Mapping[str, pathlib.Path], size: str) -> Any:
  """The arm's config. A value that is a float where the config has an int multiplies it."""
  from configs.alma import get_config

  config = get_config(size)
  config.seed, config.model.path = seed, str(base.path)
  config.data.update({name: str(data[name]) for name in ("sft", "judge", "eval")})
  config.feedback_rounds = arm.last - 1
  if base.chatter == "front":  # fewer words tell prompts apart: of 3,072 drafts too few differ for ten rounds
    config.prompts.draws *= 2
  for name, value in arm.values.items():
    section, _, field = name.rpartition(".")
    place = config[section] if section else config
    place[field] = round(place[field] * value) if isinstance(place[field], int) else value
  config.eval.sets = (f"{SET}={data[SET]}",)
  config.rounds = {r: {"eval": {"sets": ()}} for r in range(2, arm.last + 1) if r not in arm.compared}
  return config


def make(arm: Arm, base: Base, seed: int, work: pathlib.Path, size: str) -> dict[str, Any]:
  """Runs the arm in `work`, which keeps what other arms of the seed share, and returns what is kept of it."""
  from alma_jax import start

  data = data_files(base, seed, work / "data")
  place, shared = work / arm.name, work / "shared"
  if not place.exists() and shared.is_dir():
    place.mkdir(parents=True)
    for name in SHARED:
      if (shared / name).is_dir() and name not in arm.own:
        shutil.copytree(shared / name, place / name)
  began = time.process_time()
  if start.run(config_of(arm, base, seed, data, size), str(place)):
    raise SystemExit(f"{place} did not finish; see its log.jsonl")
  found = measured(place, arm, base) | {"cpu_seconds": round(time.process_time() - began, 1)}
  if not shared.is_dir() and not arm.own:
    for name in SHARED:
      if (place / name).is_dir():
        shutil.copytree(place / name, work / "shared.part" / name)
    (work / "shared.part").rename(shared)
  return found


def data_files(base: Base, seed: int, directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """The seed's data files for this base, the results set among them."""
  results = [{"prompt": prompt} for prompt, _ in seeds.results_prompts(base.chatter)]
  made = seeds.make(directory, seed, base.path, base.chatter)
  return made | seeds.write(directory, {SET: results})


def measured(run: pathlib.Path, arm: Arm, base: Base) -> dict[str, Any]:
  """What is kept of a finished arm."""
  drawn = {r: read_stage(run / layout.stage_name(r, layout.PROMPTS), Prompt) for r in range(2, arm.last + 1)}
  pool = read_stage(run / layout.pool_stage(0, layout.PROMPTS), Prompt)
  return {
    "truth": {str(r): truth_of(run, r, base) for r in arm.compared},
    "progress": {row["round"]: float(row["truth"]) for row in layout.progress(run)},
    "pool": {"prompts": len(pool), "kinds": kinds(pool)},
    "drawn": {str(r): {"kinds": kinds(prompts), "facts": len(facts(drawn, r))} for r, prompts in drawn.items()},
    "trained": {} if arm.values.get("trainset.method") in ("dpo", "grpo") else trained(run, arm.last),
    "round_seconds": seconds(run),
  }


def truth_of(run: pathlib.Path, round: int, base: Base) -> str:
  """The ground truth of the answers to the results set, one character each in the set's order: 0 to 9, and a for 10."""
  grades = read_stage(run / layout.stage_name(round, layout.grades_name(layout.answers_name(SET), "truth")), Grade)
  score = {grade.prompt_id: int(grade.score or 0) for grade in grades}
  return "".join(f"{score[seeds.key(prompt)]:x}" for prompt, _ in seeds.results_prompts(base.chatter))


def kinds(prompts: Sequence[Prompt]) -> dict[str, int]:
  """How many prompts ask for each relation; "" counts those that ask for none."""
  found = [task.relation if (task := world.parse(p.messages[-1]["content"])) else "" for p in prompts]
  return {kind: found.count(kind) for kind in (*world.RELATIONS, "") if kind in found}


def facts(drawn: Mapping[int, Sequence[Prompt]], last: int) -> set[tuple[str, str]]:
  """The (relation, city) pairs that the prompts of the rounds up to `last` ask for."""
  tasks = [world.parse(p.messages[-1]["content"]) for r, prompts in drawn.items() if r <= last for p in prompts]
  return {(task.relation, city) for task in tasks if task for city in task.cities}


def trained(run: pathlib.Path, last: int) -> dict[str, list[int]]:
  """Of the answers that the rounds train on, by kind: how many have all facts right, and how many there are."""
  found: dict[str, list[int]] = {}
  for r in range(2, last + 1):
    stage = run / layout.stage_name(r, layout.TRAINSET)
    for x in read_stage(stage, Example):
      task = world.parse(x.messages[-1]["content"])
      if task and task.relation in world.RELATIONS:
        words = x.response.split()
        said = set(itertools.pairwise(words))
        right = all((city, world.TRUTH[task.relation, city]) in said for city in task.cities)
        count = found.setdefault(task.relation, [0, 0])
        count[0], count[1] = count[0] + right, count[1] + 1
  return found


def seconds(run: pathlib.Path) -> dict[str, float]:
  """The wall-clock seconds of each round's stages, as their manifests have them, without the evaluation."""
  found: dict[str, float] = {}
  for stage in layout.stages(run):
    r = layout.round_of(stage.name)
    if r and stage.manifest and not layout.kind_of(stage.name).startswith(layout.EVALUATION):
      found[str(r)] = round(found.get(str(r), 0.0) + stage.manifest.get("seconds", 0.0), 2)
  return found


def result_path(results: pathlib.Path, base: Base, seed: int, name: str) -> pathlib.Path:
  return results / f"{base.name}_{seed:02d}_{name}.json"


def keep(path: pathlib.Path, found: Mapping[str, Any]) -> None:
  """Writes a result whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with shards.atomic(path) as file:
    file.write((json.dumps(found, separators=(",", ":")) + "\n").encode())
