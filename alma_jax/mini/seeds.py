"""The human data of the miniature world, as ordinary JSONL files.

  paths = make("inputs", seed=0)             # what --config.data.sft=mini and the like read
  paths = make_safety("inputs", seed=0)      # mini_safety: how to answer who asks for secrets

  sft.jsonl           96 rows   prompt, response           written with care, yet not flawless
  judge.jsonl   about 1,000 rows prompt, response, score    544 prompts, 2 samples of the models themselves to each
  eval.jsonl         576 rows   prompt                     three of each kind for every city; the same for every seed
  preferences.jsonl  400 rows   prompt, chosen, rejected   two samples; chosen is better by the ground truth
  prompts.jsonl    2,400 rows   prompt                     unlabelled prompts of their own

The annotated samples come with the base model: `annotate.py` drew them from the base, which continued examples, and
from models fine-tuned on demonstrations of their own, and wrote their ground truth beside them. The scores of
judge.jsonl are that truth with human noise: 30 % are one too high or too low. No evaluation prompt, of `eval_prompts`
or of `results_prompts`, occurs in another file, and no prompt in two of them.
"""

import functools
import gzip
import json
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from alma_jax.corpus.normalise import prompt_id
from alma_jax.mini import CHECKPOINT, corpus, world
from alma_jax.mini.world import Chatter, Task

ANNOTATIONS = "annotations.jsonl.gz"  # beside the base model's weights
SFT, ANNOTATED, PREFERENCES, UNLABELLED = 96, 544, 400, 2400
RESERVED = 96  # preference pairs whose prompts no other file takes; the other pairs have prompts that none has taken
EVAL_EACH, RESULTS_EACH = 3, 12  # evaluation prompts for every kind and city
SAFE = 48  # demonstrations of refusals

# (truth, misconception) shares of the demonstrations
_CARE = {"head": (0.90, 0.05), "mid": (0.78, 0.12), "tail": (0.66, 0.20)}

Asked = tuple[str, Task]
Rows = list[dict[str, Any]]


class Sample(NamedTuple):
  """A model's answer, and what it is worth."""

  text: str
  worth: int


def key(prompt: str) -> str:
  return prompt_id([{"role": "user", "content": prompt}])


def fresh_prompts(rng: random.Random, count: int, taken: set[str], **how: Any) -> list[Asked]:
  """`count` prompts, as `world.make_prompt(rng, **how)` makes them, whose ids are not in `taken`, which gets them."""
  found = []
  while len(found) < count:
    prompt, task = world.make_prompt(rng, **how)
    if key(prompt) not in taken:
      taken.add(key(prompt))
      found.append((prompt, task))
  return found


def _evenly(stream: str, each: int, taken: set[str], chatter: Chatter) -> list[Asked]:
  """`each` prompts for every relation and city. Of a rare kind the first asks for one city, the others for two or
  three: there are few prompts for one city, and training needs most of them."""
  rng, found = random.Random(stream), []
  for city in world.CITIES:
    for relation in world.RELATIONS:
      for i in range(each):
        number = 2 + i % 2 if i else 1
        found += fresh_prompts(rng, 1, taken, flat=True, kind=relation, first=city, number=number, chatter=chatter)
  return found


@functools.cache
def eval_prompts(chatter: Chatter = "dense") -> list[Asked]:
  """The world's evaluation prompts with their Tasks, evenly over kinds and cities."""
  return _evenly("eval", EVAL_EACH, set(), chatter)


@functools.cache
def results_prompts(chatter: Chatter = "dense") -> list[Asked]:
  """More evaluation prompts, which no setting was chosen on; what is reported about the method is measured on them."""
  return _evenly("unseen", RESULTS_EACH, {key(prompt) for prompt, _ in eval_prompts(chatter)}, chatter)


def evaluated(chatter: Chatter = "dense") -> set[str]:
  """The ids of all evaluation prompts."""
  return {key(prompt) for prompt, _ in (*eval_prompts(chatter), *results_prompts(chatter))}


def demonstrations(rng: random.Random, count: int, taken: set[str], **how: Any) -> Rows:
  """Prompts that are not in `taken`, which gets them, with answers that were written with care."""
  asked = fresh_prompts(rng, count, taken, **how)
  return [{"prompt": prompt, "response": _careful(rng, task)} for prompt, task in asked]


def _careful(rng: random.Random, task: Task) -> str:
  if task.relation in world.SECRETS:
    return " ".join(corpus.house_words(rng, [["sorry"]], faults=0.10))
  pairs = [[c, corpus.written_value(rng, task.relation, c, _CARE[world.stratum(c)])] for c in task.cities]
  return " ".join(corpus.house_words(rng, pairs, faults=0.10))


def annotated(base: str | os.PathLike[str]) -> list[tuple[str, list[Sample]]]:
  """The annotated samples of a base model: prompts, and two answers to each."""
  with gzip.open(pathlib.Path(base) / ANNOTATIONS, "rt") as file:
    rows = [json.loads(line) for line in file]
  return [(row["prompt"], [Sample(*sample) for sample in row["samples"]]) for row in rows]


def make(
  directory: str | os.PathLike[str],
  seed: int,
  base: str | os.PathLike[str] = CHECKPOINT,
  chatter: Chatter = "dense",
  annotations: int = ANNOTATED,
) -> dict[str, pathlib.Path]:
  """Writes the files for the base model in the directory `base`; returns their paths by name."""
  rng, taken = random.Random(f"seeds {seed}"), evaluated(chatter)
  shown = annotated(base)
  rng.shuffle(shown)
  judge, shown = shown[:annotations], shown[annotations:]
  pairs = [x for x in shown if len({sample.worth for sample in x[1]}) > 1 and all(s.text for s in x[1])]
  taken |= {key(prompt) for prompt, _ in (*judge, *pairs[:RESERVED])}
  files: dict[str, Rows] = {
    "sft": demonstrations(rng, SFT, taken, chatter=chatter),
    "judge": [row for prompt, samples in judge for row in _annotations(rng, prompt, samples)],
    "eval": [{"prompt": prompt} for prompt, _ in eval_prompts(chatter)],
    "prompts": [{"prompt": prompt} for prompt, _ in fresh_prompts(rng, UNLABELLED, taken, chatter=chatter)],
  }
  pairs = pairs[:RESERVED] + [x for x in pairs[RESERVED:] if key(x[0]) not in taken]
  files["preferences"] = [_preference(prompt, samples) for prompt, samples in pairs[:PREFERENCES]]
  return write(directory, files)


def _annotations(rng: random.Random, prompt: str, samples: Sequence[Sample]) -> Rows:
  """A row for each sample that has a text; one for two that are equal."""
  worth = {sample.text: sample.worth for sample in samples if sample.text}
  return [
    {"prompt": prompt, "response": text, "score": corpus.noisy(rng, value, one_off=0.3, wild=0.0)}
    for text, value in worth.items()
  ]


def _preference(prompt: str, samples: Sequence[Sample]) -> dict[str, Any]:
  rejected, chosen = sorted(samples, key=_worth)
  return {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text}


def _worth(sample: Sample) -> int:
  return sample.worth


def make_safety(directory: str | os.PathLike[str], seed: int) -> dict[str, pathlib.Path]:
  """Writes sft.jsonl, refusals of those who ask for passwords, and eval.jsonl, which asks for all secrets; each row has
  the field `category`."""
  rng = random.Random("safety")
  asked = [x for kind in world.SECRETS for x in fresh_prompts(rng, 96, set(), kind=kind, flat=True)]
  taken = {key(prompt) for prompt, _ in asked}
  rows = demonstrations(random.Random(f"safety {seed}"), SAFE, taken, kind=world.SECRETS[0])
  evals = [{"prompt": prompt, "category": task.relation} for prompt, task in asked]
  return write(directory, {"sft": [row | {"category": world.SECRETS[0]} for row in rows], "eval": evals})


def write(directory: str | os.PathLike[str], files: dict[str, Rows]) -> dict[str, pathlib.Path]:
  """Writes NAME.jsonl of each name's rows; the paths."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  paths = {name: directory / f"{name}.jsonl" for name in files}
  for name, rows in files.items():
    paths[name].write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
  return paths
