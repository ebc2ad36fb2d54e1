"""The names in a run directory. No other module spells them.

  runs/alma/
    config.json  log.jsonl  progress.csv  report.html  .lock  .digests.json
    seeds  sft_1  sft_2  judge  judge_distilled  judge_quality        stages made once
    pool/drafts ...  pool_03/drafts ...                the pool, and the prompts added before round 3
    round_02/config.json
    round_02/prompts ...  round_02/policy
    round_02/eval  round_02/eval.judge                 answers to the evaluation prompts, and a judge's grades of them

  runs/lima/                                         its rounds are the epochs of its one training
    seeds  sft_1  sft_1/epoch_05/model ...  choice     the training, the epochs that it kept, the chosen one
    round_05/eval  round_05/loss  round_05/compare ...  what is known of the model that epoch 5 ended with

`stage_name(2, RESPONSES)` is "round_02/responses", and `run / stage_name(2, POLICY) / MODEL` the directory of that
policy's weights. Everything here can be read while the run goes on.
"""

import contextlib
import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from alma_jax.errors import RunError
from alma_jax.store import digests
from alma_jax.store.records import FORMAT, VERSIONS

# Stages made once, and the directory of the pool
SEEDS, POOL, JUDGE, DISTILLED, QUALITY = "seeds", "pool", "judge", "judge_distilled", "judge_quality"
# Stages of a pool
DRAFTS, PROMPTS, PROJECTION, EMBEDDINGS, CLUSTERS = "drafts", "prompts", "projection", "embeddings", "clusters"
# Stages of a round, which has PROMPTS too
RESPONSES, JUDGMENTS, TRAINSET, POLICY, EVALUATION = "responses", "judgments", "trainset", "policy", "eval"
NEIGHBOURS, CATEGORIES = "neighbours", "categories"  # shots of each prompt; the scores by category
FORMS = "forms"  # the folder of what people fill in
LOSS, COMPARED, AUDIT = "loss", "compare", "audit"  # of LIMA's epochs: of the validation, against others, by levels
CHOICE = "choice"  # which epoch's model a run goes on with, and why
# Judgments by a judge that selects nothing; how often the one that selects agrees with it and with people
GOLD, AGREEMENT = "gold", "agreement"
MAIN_SET = ""  # the evaluation prompts `data.eval`
TEST_SET = "test"  # where a run chooses by some of them, the others
# Files of a run
CONFIG, LOG, PROGRESS, PAGE, LOCK = "config.json", "log.jsonl", "progress.csv", "report.html", ".lock"
TRACKED = ".tracked.json"  # the run's name at a tracker
DIGESTS = ".digests.json"  # of large files outside the run, so that a later start need not read them for it
# Files of a stage
MANIFEST, FINGERPRINT, REPORT, METRICS = "manifest.json", "fingerprint.json", "report.json", "metrics.jsonl"
# Directories of a stage that trains
MODEL, CHECKPOINTS = "model", "checkpoints"

Manifest = dict[str, Any]
_ROUND = re.compile(r"round_(\d+)(/|$)")


@dataclasses.dataclass(frozen=True)
class Found:
  """A stage in a run directory; `manifest` is None until the stage is finished."""

  name: str
  dir: pathlib.Path
  manifest: Manifest | None


# Names


def round_name(round: int) -> str:
  return f"round_{round:02d}"


def stage_name(round: int, artefact: str) -> str:
  return f"{round_name(round)}/{artefact}"


def sft_name(i: int) -> str:
  """The name of the initial SFT with the i-th seed, from 1."""
  return f"sft_{i}"


def epoch_name(epoch: int) -> str:
  """The directory, in that of a training, of the model that an epoch ended with: "epoch_07"."""
  return f"epoch_{epoch:02d}"


def epoch_of(name: str) -> int | None:
  """7 for "epoch_07", None for another name."""
  number = name.removeprefix("epoch_")
  return int(number) if number != name and number.isdigit() else None


def models_in(stage: pathlib.Path) -> list[pathlib.Path]:
  """The model directories of a stage that trains: its own, and those of the epochs that it kept."""
  return [found for found in (stage / MODEL, *sorted(stage.glob(f"epoch_*/{MODEL}"))) if found.is_dir()]


def pool_name(round: int = 0) -> str:
  """The directory of the pool, or of the prompts that are added before this round."""
  return f"{POOL}_{round:02d}" if round else POOL


def pool_stage(round: int, artefact: str) -> str:
  return f"{pool_name(round)}/{artefact}"


def answers_name(chosen: str = MAIN_SET) -> str:
  """The artefact of a round that holds the answers to a set of prompts: "eval", "eval-mt_bench"."""
  return f"{EVALUATION}-{chosen}" if chosen != MAIN_SET else EVALUATION


def grades_name(answers: str, judge: str = JUDGE) -> str:
  """What holds the grades that a judge gives these answers: "round_02/eval.judge" for "round_02/eval"."""
  return f"{answers}.{judge}"


def categories_name(round: int, judge: str, chosen: str = MAIN_SET) -> str:
  """The scores by category that a judge gives a round's answers to a set: "round_02/categories-mt_bench.truth"."""
  return stage_name(round, f"{CATEGORIES}-{chosen}.{judge}" if chosen != MAIN_SET else f"{CATEGORIES}.{judge}")


def parent_of(name: str) -> str:
  """The directory of a stage's pool or round: "pool_03" for "pool_03/drafts", "" for "judge"."""
  return name.rpartition("/")[0]


def beside(name: str, artefact: str) -> str:
  """Another stage of the same pool or round: "pool_03/prompts" for ("pool_03/drafts", PROMPTS)."""
  return f"{parent_of(name)}/{artefact}"


def round_of(name: str) -> int | None:
  """The round of a stage: 2 for "round_02/responses" and for "round_02", None for "sft_1" and "pool_03/drafts"."""
  match = _ROUND.match(name)
  return int(match[1]) if match else None


def kind_of(name: str) -> str:
  """What a stage makes, without its round or number: "policy" for "round_03/policy", "sft" for "sft_1"."""
  return name.rpartition("/")[2].rstrip("0123456789").rstrip("_")


# What a run directory holds


def rounds(run: pathlib.Path) -> list[int]:
  """The numbers of the rounds that have a directory."""
  return _numbers(run, "round")


def pools(run: pathlib.Path) -> dict[int, str]:
  """The pool directories by the round they were added before: {0: "pool", 3: "pool_03"}."""
  return {round: pool_name(round) for round in (0, *_numbers(run, POOL))}


def graders(run: pathlib.Path, round: int, chosen: str = MAIN_SET) -> list[str]:
  """The judges whose grades of a round's answers to this set are finished."""
  found = run.glob(f"{grades_name(stage_name(round, answers_name(chosen)), '*')}/{MANIFEST}")
  return sorted(path.parent.name.rpartition(".")[2] for path in found)


def sets_of(run: pathlib.Path, round: int) -> list[str]:
  """The sets of prompts whose answers of a round are finished; that of data.eval, MAIN_SET, is the first."""
  found = (run / round_name(round)).glob(f"{EVALUATION}*/{MANIFEST}")
  names = (path.parent.name for path in found if "." not in path.parent.name)
  return sorted(name.removeprefix(EVALUATION).removeprefix("-") for name in names)


def policy_of(run: pathlib.Path, round: int) -> pathlib.Path:
  """Where the model lies that a round's evaluation is of: the round's policy, or the first initial SFT model where the
  round has none (round 1 of ALMA, round 0 of SPA). Where rounds are epochs of one training, it is the model that the
  epoch ended with."""
  first, own = run / sft_name(1), run / stage_name(round, POLICY)
  if any(first.glob("epoch_*")):
    kept = first / epoch_name(round)
    return kept if kept.is_dir() else first
  return first if round < 2 and not own.exists() else own


def stages(run: pathlib.Path) -> list[Found]:
  """Every stage, the finished ones first in the order they ended."""
  found = []
  for path in fingerprints(run):
    name = path.parent.relative_to(run).as_posix()
    found.append(Found(name, path.parent, manifest_of(run, name)))
  return sorted(found, key=lambda s: (s.manifest is None, (s.manifest or {}).get("finished_at", ""), s.name))


def fingerprints(run: pathlib.Path) -> list[pathlib.Path]:
  """The fingerprint files of all stages, finished or begun."""
  return [*run.glob(f"*/{FINGERPRINT}"), *run.glob(f"*/*/{FINGERPRINT}")]


def manifest_of(run: pathlib.Path, name: str) -> Manifest | None:
  """The manifest of a stage, None until it is finished."""
  return load_manifest(run / name) if (run / name / MANIFEST).exists() else None


def load_manifest(directory: str | pathlib.Path) -> Manifest:
  """The manifest of a finished stage; a RunError if there is none or if it is not as it was written."""
  path = pathlib.Path(directory) / MANIFEST
  if not path.exists():
    raise RunError(f"{directory} holds no finished stage: there is no {MANIFEST} in it.")
  found = read_json(path, _again(directory))
  if digests.intact(found):
    return found
  if version := older(found):
    raise RunError(
      f"{path} was written by alma_jax {version}, and only that version reads this stage (its {MODEL}, if it has one,"
      " is a Hugging Face directory that any version reads)."
    )
  raise RunError(
    f"{path} is damaged or was edited: its field {digests.SEAL!r} should be the SHA-256 of all other fields,"
    f" {digests.seal(found) if isinstance(found, dict) else 'of an object'}; {_again(directory)}."
  )


def _again(directory: str | pathlib.Path) -> str:
  return f"bring the file back as it was, or delete {directory} to have the stage made again"


def older(manifest: Any) -> str | None:
  """The version of alma_jax that wrote a manifest of an older format, None for one of this format."""
  fingerprint = manifest.get("fingerprint") if isinstance(manifest, dict) else None
  made = fingerprint.get("format") if isinstance(fingerprint, dict) else None
  return VERSIONS.get(made) if isinstance(made, int) and made < FORMAT else None


def format_of(run: pathlib.Path) -> int:
  """The record format of a run directory; FORMAT for one without stages."""
  for path in fingerprints(run):
    with contextlib.suppress(RunError):  # a damaged one is named where its stage is opened
      return fingerprint_in(path.parent)["format"]
  return FORMAT


def fingerprint_in(directory: pathlib.Path) -> dict[str, Any]:
  """The fingerprint of a stage that is finished or begun."""
  path, mend = directory / FINGERPRINT, f"delete {directory} to have the stage made again"
  found = read_json(path, mend)
  if not isinstance(found, dict) or not isinstance(found.get("format"), int):
    raise RunError(f"{path} is damaged: it holds no field 'format'; {mend}.")
  return found


def is_stage(directory: pathlib.Path) -> bool:
  """True for the directory of a finished stage of this version, False for one with another program's manifest.json."""
  try:
    found = json.loads((directory / MANIFEST).read_bytes())
  except (OSError, ValueError):
    found = None
  named = isinstance(found, dict) and {"fingerprint", digests.SEAL} <= found.keys()
  return (named or (directory / FINGERPRINT).exists()) and older(found) is None


def parts_of(directory: pathlib.Path) -> list[pathlib.Path] | None:
  """The Parquet files of a finished stage in their order, None until it is finished."""
  if not (directory / MANIFEST).exists():
    return None
  return [directory / part["name"] for part in load_manifest(directory)["parts"]]


def chosen_epoch(run: pathlib.Path) -> int | None:
  """The epoch that a run has chosen, None for a run that chooses none or has not yet."""
  made = manifest_of(run, CHOICE)
  return made["epoch"] if made else None


def newest_policy(run: pathlib.Path) -> pathlib.Path:
  """The checkpoint that the run chose, else the finished policy of the last round, else the first initial SFT model."""
  if (chosen := chosen_epoch(run)) is not None:
    return policy_of(run, chosen)
  names = [sft_name(1), *(stage_name(round, POLICY) for round in rounds(run))]
  done = [name for name in names if (run / name / MANIFEST).exists()]
  if not done:
    raise RunError(
      f"{run}: the run has no finished policy yet; wait for its stage {sft_name(1)}, or give another --model"
    )
  return run / done[-1]


def judge_of(run: pathlib.Path) -> pathlib.Path:
  """The distilled judge if it was accepted, else the fine-tuned one."""
  if not (run / JUDGE / MANIFEST).exists():
    raise RunError(f"{run}: the run has no finished judge; wait for its stage {JUDGE}, or give another --model")
  distilled = manifest_of(run, DISTILLED)
  return run / (DISTILLED if distilled and distilled["accepted"] else JUDGE)


def config_in(directory: pathlib.Path) -> dict[str, Any] | None:
  """The config if this is the directory of a run or of a round, else None: a model's config.json is another thing."""
  path = directory / CONFIG
  config = read_json(path) if path.is_file() else None
  return config if isinstance(config, dict) and "recipe" in config else None


def config_of(path: pathlib.Path) -> dict[str, Any]:
  """The config of the run or round that this directory is or lies in: that of its round for a round's stage."""
  places = (path.absolute(), *path.absolute().parents)
  config = next((found for place in places if (found := config_in(place)) is not None), None)
  if config is None:
    raise RunError(f"{path}: no {CONFIG} of a run lies above this stage; give its model directory itself")
  return config


def is_round(config: Mapping[str, Any]) -> bool:
  """True for the config of one round: the overrides per round are resolved in it."""
  return "rounds" not in config


def finished(run: pathlib.Path) -> bool:
  """True if the last event in the log is the end of the run."""
  rows = json_lines(run / LOG)
  return bool(rows) and rows[-1].get("event") == "end"


def progress(run: pathlib.Path) -> list[dict[str, str]]:
  """The rows of progress.csv as text, [] before there are any."""
  path = run / PROGRESS
  if not path.exists():
    return []
  try:
    with open(path, newline="", encoding="utf-8") as file:
      rows = list(csv.DictReader(file))
  except (ValueError, csv.Error) as e:
    raise RunError(f"{path} is damaged ({e}); delete it, and the next start of the run writes it again.") from None
  if any("round" not in row or None in row or None in row.values() for row in rows):
    raise RunError(f"{path} is damaged (no table); delete it, and the next start of the run writes it again.")
  return rows


def read_json(path: pathlib.Path, mend: str = "restore or delete it") -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as e:
    why = f"line {e.lineno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else e
    raise RunError(f"{path} is damaged ({why}); {mend}.") from None


def json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a JSONL file that may be written just now: a broken line is left out."""
  rows = []
  if path.exists():
    with open(path, encoding="utf-8", errors="replace") as file:
      for line in file:
        try:
          rows.append(json.loads(line))
        except ValueError:
          continue
  return [row for row in rows if isinstance(row, dict)]


def _numbers(run: pathlib.Path, kind: str) -> list[int]:
  names = (path.name.removeprefix(f"{kind}_") for path in run.glob(f"{kind}_*") if path.is_dir())
  return sorted(int(name) for name in names if name.isdigit())
