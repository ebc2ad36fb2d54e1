"""What annotators are shown: samples of a base model, with their ground truth, written beside its weights.

  write("alma_jax/mini/checkpoint")     # the end of `python -m alma_jax.mini.pretrain`

Prompts ask evenly about the relations, so that a judge learns of the rare kinds, too. As in the paper (3.3.1), the
samples are the models' own. Four models are fine-tuned from the base, each on 96
demonstrations of its own. Every prompt is answered by one of them and, in turn, by another one or by the base, which
continues three examples; all at temperature 1. A run's seed draws its annotations from here (`seeds.make`).
"""

import gzip
import importlib
import json
import os
import pathlib
import random
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from alma_jax import config_files, start
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.keys import key_of
from alma_jax.mini import seeds, world
from alma_jax.mini.world import Chatter
from alma_jax.runtime import sampling
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.sampling import Draft
from alma_jax.runtime.session import Session
from alma_jax.stages import evaluation, policy
from alma_jax.store.data import SeedRow, load_examples
from alma_jax.store.handles import Data

PROMPTS, MODELS, SHOTS = 4998, 4, 3
SAMPLING = sampling.Options(decoding=Decoding(max_new_tokens=16, temperature=1.0), max_prompt_tokens=160)


class Writer(NamedTuple):
  """A model that answers prompts; a base model continues `shots`."""

  checkpoint: Checkpoint
  shots: list[SeedRow]


def write(base: str | os.PathLike[str], seed: int, chatter: Chatter = "dense") -> pathlib.Path:
  """Writes the annotated samples of the base model in this directory; `seed` is that of its pretraining."""
  rng, taken = random.Random(f"annotated {seed}"), seeds.evaluated(chatter)
  each, asked = PROMPTS // len(world.RELATIONS), []
  for kind in world.RELATIONS:
    asked += [prompt for prompt, _ in seeds.fresh_prompts(rng, each, taken, kind=kind, chatter=chatter)]
  rng.shuffle(asked)
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory)
    shown = [demonstrations(folder / f"{i}", rng, taken, chatter) for i in range(MODELS)]
    with start.open_session(_config(base, folder), folder / "run") as session:
      writers = [_tuned(session, i, rows) for i, rows in enumerate(shown, start=1)]
      found = samples(session, writers, asked)
  path = pathlib.Path(base) / seeds.ANNOTATIONS
  with open(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
    for prompt, answers in zip(asked, found, strict=True):
      worth = [(x.text, world.score(prompt, x.text, x.finished)) for x in answers]
      file.write((json.dumps({"prompt": prompt, "samples": worth}, allow_nan=False) + "\n").encode())
  return path


def demonstrations(folder: pathlib.Path, rng: random.Random, taken: set[str], chatter: Chatter) -> list[SeedRow]:
  rows = seeds.demonstrations(rng, seeds.SFT, taken, chatter=chatter)
  return load_examples(seeds.write(folder, {"sft": rows})["sft"], ("response",))[0]


def samples(session: Session[Any], writers: Sequence[Writer], asked: Sequence[str]) -> list[list[Draft]]:
  """Two answers to every prompt: of one fine-tuned model, and of the next one or, every other time, of the base."""
  found: list[list[Draft]] = [[] for _ in asked]
  of: dict[int, list[int]] = {
    w: [] for w in range(len(writers) + 1)
  }  # writer -> numbers of prompts; the last: the base
  for i in range(len(asked)):
    first = i % len(writers)
    second = len(writers) if i // len(writers) % 2 else (first + 1) % len(writers)
    for w in (first, second):
      of[w].append(i)
  for w, numbers in of.items():
    base = w == len(writers)
    writer = Writer(session.base, writers[0].shots[:SHOTS]) if base else Writer(writers[w].checkpoint, [])
    asker = evaluation.Asker(session, session.options.eval.template(), writer.shots)
    requests = [Request(asker.ids(_row(asked[i])), key_of("annotated", w, i)) for i in numbers]
    with session.display.bar(f"annotated {w}", len(requests), "samples") as bar:
      drawn = sampling.drafts(session.host, writer.checkpoint, requests, SAMPLING, asker.stops, bar)
    for i, draft in zip(numbers, drawn, strict=True):
      found[i].append(draft)
  return found


def _row(prompt: str) -> SeedRow:
  return SeedRow(({"role": "user", "content": prompt},), response=None, score=None, line=0)


def _config(base: str | os.PathLike[str], folder: pathlib.Path) -> Any:
  """The miniature run's config with this base model. Its data are read by no stage: this makes them."""
  name = config_files.found("configs/alma.py:mini")
  with config_files.importable(name):
    config = importlib.import_module("configs.alma").get_config("mini")
  config.model.path, config.data.sft, config.data.judge = str(base), *[str(folder / "0" / "sft.jsonl")] * 2
  return config


def _tuned(session: Session[Any], number: int, rows: list[SeedRow]) -> Writer:
  data = Data(sft=rows, judge=[], eval=[], digests={"sft": str(number)})
  job = policy.Job(f"sft_{number}", session.base, session.options.sft, number)
  return Writer(policy.sft(session, job, data), rows)
