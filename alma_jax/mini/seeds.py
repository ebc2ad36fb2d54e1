"""The human data of the miniature world, as ordinary JSONL files.

  paths = make("inputs", seed=0)

  sft.jsonl         96 rows   prompt, response          written with care, yet not flawless
  judge.jsonl      256 rows   prompt, response, score   128 prompts x 2 answers of every quality
  eval.jsonl       576 rows   prompt                    nine per city; the same for every seed
  judge_test.jsonl 600 rows   prompt, chosen, rejected  on evaluation prompts; the same for every seed
  preferences.jsonl 96 rows   prompt, chosen, rejected  prompts of their own; chosen is better by the ground truth
  prompts.jsonl    768 rows   prompt                    unlabelled prompts of their own

The scores of judge.jsonl are the ground truth with human noise: 30 % are one too high or too low. No evaluation prompt
occurs in sft.jsonl or judge.jsonl, and no prompt twice within the two.
"""

import json
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any

from alma_jax.corpus.normalise import prompt_id
from alma_jax.mini import corpus, world
from alma_jax.mini.world import Task

SFT, ANNOTATED, EVAL_PER_CITY, TEST_PAIRS = 96, 128, 9, 600
PREFERENCES, UNLABELLED = 96, 768

# (truth, misconception) shares of the demonstrations
_CARE = {"head": (0.90, 0.05), "mid": (0.78, 0.12), "tail": (0.66, 0.20)}
_LONGEST = 14  # words; a longer answer is cut off

# The writers of answers to judge: (share, truth, misconception, faults of form, faults of attention).
_WRITERS = (
  (0.25, 0.95, 0.03, 0.08, 0.05),
  (0.35, 0.60, 0.25, 0.15, 0.15),
  (0.25, 0.35, 0.45, 0.15, 0.25),
  (0.15, 0.50, 0.30, 0.40, 0.30),
)


def _key(prompt: str) -> str:
  return prompt_id([{"role": "user", "content": prompt}])


def _fresh_prompts(rng: random.Random, count: int, taken: set[str]) -> list[tuple[str, Task]]:
  """`count` prompts with their Tasks whose ids are not in `taken`; the ids are added to it."""
  found = []
  while len(found) < count:
    prompt, task = world.make_prompt(rng)
    if _key(prompt) not in taken:
      taken.add(_key(prompt))
      found.append((prompt, task))
  return found


def eval_prompts() -> list[tuple[str, Task]]:
  """The world's evaluation prompts with their Tasks: every city is asked about equally often."""
  rng, taken, found = random.Random("eval"), set[str](), []
  for city in world.CITIES:
    count = 0
    while count < EVAL_PER_CITY:
      prompt, task = world.make_prompt(rng, flat=True, first=city)
      if _key(prompt) not in taken:
        taken.add(_key(prompt))
        found.append((prompt, task))
        count += 1
  return found


def _careful(rng: random.Random, task: Task) -> str:
  pairs = [[c, corpus.written_value(rng, task.relation, c, _CARE[world.stratum(c)])] for c in task.cities]
  return " ".join(corpus.house_words(rng, pairs, faults=0.10))


def _answer(rng: random.Random, task: Task) -> tuple[str, bool]:
  """The text of one of the writers, and False if it was cut off."""
  _, truth, misconception, form, attention = rng.choices(_WRITERS, [w[0] for w in _WRITERS])[0]
  if rng.random() < 0.08:
    words = corpus.web_answer(rng, task, rng.random())
  else:
    pairs = [[c, corpus.written_value(rng, task.relation, c, (truth, misconception))] for c in task.cities]
    if rng.random() < attention:
      pairs = corpus.mismatch(rng, task, pairs)
    words = corpus.house_words(rng, pairs, form)
  if rng.random() < 0.10:
    words = corpus.corrupted(rng, words)
  if rng.random() < 0.04:  # rambles on until it is cut off
    while len(words) <= _LONGEST:
      city = world.draw_city(rng, flat=True)
      words = [*words, *corpus.web_answer(rng, Task(task.relation, (city,)), 0.3)]
  return " ".join(words[:_LONGEST]), len(words) <= _LONGEST


def _judged(rng: random.Random, prompt: str, task: Task) -> tuple[str, int]:
  """An answer's text and its ground truth."""
  text, finished = _answer(rng, task)
  return text, world.score(prompt, text, finished)


def _test_pairs(prompts: Sequence[tuple[str, Task]]) -> list[dict[str, str]]:
  rng, rows = random.Random("judge_test"), []
  while len(rows) < TEST_PAIRS:
    prompt, task = rng.choice(prompts)
    (a, score_a), (b, score_b) = _judged(rng, prompt, task), _judged(rng, prompt, task)
    if score_a != score_b:
      chosen, rejected = (a, b) if score_a > score_b else (b, a)
      rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
  return rows


def _preferences(seed: int, taken: set[str]) -> dict[str, list[dict[str, Any]]]:
  """Preference pairs, and prompts without an answer; none of their prompts is in `taken`."""
  rng, pairs = random.Random(f"preferences {seed}"), []
  for prompt, task in _fresh_prompts(rng, PREFERENCES, taken):
    (a, low), (b, high) = _judged(rng, prompt, task), _judged(rng, prompt, task)
    while low == high:
      b, high = _judged(rng, prompt, task)
    chosen, rejected = (a, b) if low > high else (b, a)
    pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
  asked = [{"prompt": prompt} for prompt, _ in _fresh_prompts(rng, UNLABELLED, taken)]
  return {"preferences": pairs, "prompts": asked}


def make(directory: str | os.PathLike[str], seed: int) -> dict[str, pathlib.Path]:
  """Writes the files; returns their paths by name: sft, judge, eval, judge_test, preferences and prompts."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  evals = eval_prompts()
  rng, taken = random.Random(f"seeds {seed}"), {_key(prompt) for prompt, _ in evals}
  sft = [{"prompt": prompt, "response": _careful(rng, task)} for prompt, task in _fresh_prompts(rng, SFT, taken)]
  judge = []
  for prompt, task in _fresh_prompts(rng, ANNOTATED, taken):
    for text, value in (_judged(rng, prompt, task), _judged(rng, prompt, task)):
      label = corpus.noisy(rng, value, one_off=0.3, wild=0.0)
      judge.append({"prompt": prompt, "response": text, "score": label})
  files: dict[str, list[dict[str, Any]]] = {
    "sft": sft,
    "judge": judge,
    "eval": [{"prompt": prompt} for prompt, _ in evals],
    "judge_test": _test_pairs(evals),
    **_preferences(seed, taken),
  }
  paths = {name: directory / f"{name}.jsonl" for name in files}
  for name, rows in files.items():
    paths[name].write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
  return paths
