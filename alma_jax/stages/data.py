"""The human data: the run's own checked copy of the demonstrations, annotations, preference pairs and prompts.

Everything later reads this copy, so a run can be understood, resumed and moved without the files it began with. A known
word of `names.DATA` stands for data that is made for the run's seed.

The prompts of the other evaluation sets are copied too, as far as they are named when the run begins: they are kept out
of everything that is trained on. A set that is named later changes nothing here.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import writing
from alma_jax.evals import sets as benchmarks
from alma_jax.keys import key_of
from alma_jax.options import Checked, ConfigError, fingerprint, option
from alma_jax.runtime import alarms
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow, is_tfds, load_examples
from alma_jax.store.handles import Data

HELD_OUT = "held_out"  # the prompts of other evaluation sets
LOST = {  # counts of rows that are left out
  "empty": "rows are left out: their prompt or response is empty",
  "duplicate": "rows are left out: they repeat an earlier one",
  "equals_eval_prompt": "rows are left out: their prompt is an evaluation prompt, too",
  "equals_validation_prompt": "rows are left out: their prompt is one of the validation",
  "equals_seed_prompt": "rows are left out: their prompt is that of a demonstration, an annotation or a pair",
  "identical": "pairs are left out: their two answers are equal",
}
NEEDED = {  # what the rows of each kind of file must have
  "sft": ("response",),
  "judge": ("response", "score"),
  "preferences": ("chosen", "rejected"),
  "prompts": (),
  "eval": (),
  "validation": ("response",),
}
COUNTS = ("rows", "kept", "empty", "duplicate", "odd_turns", "identical")  # of what is read


@dataclasses.dataclass(frozen=True)
class Sources(Checked):
  """Each source is a JSONL or Parquet file, "tfds:NAME:SPLIT" or a known word of names.DATA. A recipe's class has the
  fields of NEEDED that it reads; those without a default must be given."""

  @property
  def sources(self) -> dict[str, str]:
    """The sources that are given, and those that demonstrations stand in for."""
    given = {name: getattr(self, name, "") for name in NEEDED}
    return {name: source for name, source in given.items() if source or name == "eval" or name in self.held_out_of_sft}

  @property
  def held_out_of_sft(self) -> dict[str, int]:
    """How many demonstrations become the evaluation prompts or the validation where no source is given."""
    return {
      name: number
      for name, field, least in (("eval", "held_out", 1), ("validation", "validation_held_out", 0))
      if (number := getattr(self, field, least)) and not getattr(self, name, "")
    }

  def require(self, *fields: str) -> None:
    for name in fields:
      if not getattr(self, name):
        raise ConfigError(f"{name} is empty: give a JSONL or Parquet file or a TFDS name")


@dataclasses.dataclass(frozen=True)
class Options(Sources):
  """What ALMA reads."""

  sft: str = ""  # demonstrations: messages, or prompt and response
  judge: str = ""  # annotations: the same with a score 0..10, and a reason where the judge's template reasons
  eval: str = ""  # evaluation prompts; empty: hold some demonstrations out
  held_out: int = option(200, least=1)  # how many, then

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require("sft", "judge")


def build(s: Session[Any], options: Sources, sets: Sequence[str] = ()) -> Data:
  """The Data of the finished stage `seeds`; `sets` are files of more evaluation prompts."""
  contents = {name: _content(source) for name, source in options.sources.items()} | _gone(s, options)
  fields = {"config": {"data": fingerprint(options)}, "contents": contents}
  if _made(options):
    fields["config"]["seed"] = s.options.seed
  stage = s.run.stage(layout.SEEDS, fields)
  if not stage.done:
    counts, found = _write(stage.dir, options, s.options.seed, sets) if s.run.process == 0 else ({}, {})
    files = [f"{name}.jsonl" for name in (*options.sources, *([HELD_OUT] if sets else []))]
    stage.finish(counts=counts, files=files, alarms=lambda _: _alarms(found, s.options.alarms))
    alarms.say(s.display, stage)
    for name, count in stage.manifest["counts"].items():
      s.run.log("data", file=name, **count)
      s.tell(f"data.{name}", count, count.get("rows", 0), LOST)
      if odd := count.get("odd_turns", 0):
        s.display.say(f"data.{name}: {odd:,} rows are left out: their turns do not alternate, user, assistant, user")
  rows = {name: load_examples(stage.dir / f"{name}.jsonl", NEEDED[name])[0] for name in options.sources}
  digests = {file.removesuffix(".jsonl"): facts["digest"] for file, facts in stage.manifest["files"].items()}
  held_out = load_examples(stage.dir / f"{HELD_OUT}.jsonl", ())[0] if HELD_OUT in digests else []
  return Data(**{"sft": [], "judge": []} | rows, held_out=held_out, digests=digests)


def read(
  options: Sources, directory: pathlib.Path, seed: int, sets: Sequence[str] = ()
) -> tuple[dict[str, list[SeedRow]], dict[str, dict]]:
  """The rows of each source, and counts of what was read, dropped and moved. `directory` takes what is made."""
  for made in dict.fromkeys(_made(options).values()):
    with writing(directory):
      names.resolve(names.DATA, made, "data")(directory / made, seed)
  counts, rows = {}, {}
  for name, source in options.sources.items():
    if not source:
      continue
    path = directory / source / f"{name}.jsonl" if name in _made(options) else source
    rows[name], report = load_examples(path, NEEDED[name])
    counts[name] = {key: report[key] for key in COUNTS if key in report}
  for name, number in options.held_out_of_sft.items():
    ids = sorted({prompt_id(r.messages) for r in rows["sft"]}, key=functools.partial(key_of, name))
    held = set(ids[: max(1, min(number, len(ids) // (10 if name == "eval" else 4)))])
    rows[name] = [r for r in rows["sft"] if prompt_id(r.messages) in held]
    rows["sft"] = [r for r in rows["sft"] if prompt_id(r.messages) not in held]
    counts[name] = {"held_out_of_sft": len(rows[name])}
  if sets:
    rows[HELD_OUT] = [row for file in sets for row in benchmarks.read(file).rows]
    counts[HELD_OUT] = {"kept": len(rows[HELD_OUT])}
  # An evaluation prompt that is also a demonstration or an annotation would measure memory.
  asked = {prompt_id(r.messages) for name in ("eval", HELD_OUT) for r in rows.get(name, [])}
  seeds = [name for name in ("sft", "judge", "preferences") if name in rows]
  for name in seeds:
    rows[name] = _without(rows[name], asked, counts[name], "equals_eval_prompt")
  if validation := {prompt_id(r.messages) for r in rows.get("validation", [])}:
    rows["sft"] = _without(rows["sft"], validation, counts["sft"], "equals_validation_prompt")
  if "prompts" in rows:  # each once, and none that an answer of a person is there for
    answered = {prompt_id(r.messages) for name in seeds for r in rows[name]}
    clean = _without(rows["prompts"], asked, counts["prompts"], "equals_eval_prompt")
    clean = _without(clean, answered, counts["prompts"], "equals_seed_prompt")
    rows["prompts"] = list({prompt_id(r.messages): r for r in reversed(clean)}.values())[::-1]
    counts["prompts"]["duplicate"] += len(clean) - len(rows["prompts"])
  return rows, counts


def _without(rows: list[SeedRow], ids: set[str], counts: dict[str, int], why: str) -> list[SeedRow]:
  """The rows whose prompt is not among `ids`; the others are counted."""
  clean = [r for r in rows if prompt_id(r.messages) not in ids]
  counts[why] = len(rows) - len(clean)
  return clean


def _write(
  directory: pathlib.Path, options: Sources, seed: int, sets: Sequence[str]
) -> tuple[dict[str, dict], dict[str, list[SeedRow]]]:
  """Write a file for each kind of row; the counts and the rows of `read`."""
  rows, counts = read(options, directory / ".made", seed, sets)
  for name, kept in rows.items():
    with shards.atomic(directory / f"{name}.jsonl") as file:
      file.write(shards.json_lines(_plain(row, NEEDED.get(name, ())) for row in kept))
  return counts, rows


def _alarms(rows: Mapping[str, Sequence[SeedRow]], bounds: alarms.Options) -> alarms.Alarms:
  """Whether the annotations have one score, and whether the demonstrations hardly differ."""
  found = {}
  scores = {row.score for row in rows.get("judge", ())}
  if len(scores) == 1:
    found["annotations"] = (
      f"all {len(rows['judge']):,} annotations have the score {scores.pop():g}: no judge learns from"
    )
    found["annotations"] += " them what is better"
  sft = rows.get("sft", ())
  (most,) = collections.Counter(row.response for row in sft).most_common(1) or [("", 0)]
  if len(sft) > 1 and most[1] > bounds.alike * len(sft):
    found["alike"] = f"{most[1]:,} of {len(sft):,} demonstrations have one response: {most[0]!r:.60}"
  return found


def _made(options: Sources) -> dict[str, str]:
  """The sources that are known words, by name."""
  return {name: source for name, source in options.sources.items() if source in names.DATA.words}


def _plain(row: SeedRow, need: tuple[str, ...]) -> dict[str, Any]:
  about = {name: value for name in ("category", "reason") if (value := getattr(row, name))}
  return {"messages": list(row.messages)} | {key: getattr(row, key) for key in need} | about


def _gone(s: Session[Any], options: Sources) -> dict[str, str]:
  """Of files that are missing, though the run has its copy of them, the digests that they had."""
  directory = s.run.dir / layout.SEEDS
  files = {name: x for name, x in options.sources.items() if x and x not in names.DATA.words and not is_tfds(x)}
  missing = {name: x for name, x in files.items() if not pathlib.Path(x).is_file()}
  if not missing or not (directory / layout.MANIFEST).exists():
    return {}
  made = layout.load_manifest(directory)["fingerprint"]
  kept = {name: x for name, x in missing.items() if made.get(f"config.data.{name}") == x}  # else the value has changed
  for name, x in kept.items():
    s.display.say(f"data.{name}: the file {x} is missing; the run goes on with its own copy, {directory}/{name}.jsonl")
    s.run.log("data file missing", file=name, path=x)
  return {name: made[f"contents.{name}"] for name in kept}


def _content(source: str) -> str:
  path = pathlib.Path(source)
  return shards.digest(path) if source and path.is_file() else source
