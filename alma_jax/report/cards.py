"""README.md of what is pushed to the Hugging Face hub: where a model or a data set comes from, by a run's manifests.

Every number carries its n and its interval, and every score the identity of the judge that gave it.
"""

import json
import pathlib
from typing import Any

from alma_jax.report import judges, wording
from alma_jax.store import layout
from alma_jax.store.layout import Manifest


def model(stage: pathlib.Path, run: pathlib.Path, name: str) -> str:
  """The model card of a finished training of the run."""
  manifest, config = layout.load_manifest(stage), layout.config_in(run) or {}
  round = layout.round_of(manifest["stage"])
  base = pathlib.Path(str(config.get("model", {}).get("path", ""))).name
  head = ["library_name: transformers", "pipeline_tag: text-generation", f"base_model: {base}", "tags: [alma_jax]"]
  counts = manifest["counts"]
  said = ", ".join(f"{counts[key]:,} {key}" for key in ("steps", "examples") if key in counts)
  lines = [
    *_front(head),
    f"# {name}",
    "",
    f"Trained by [alma_jax](https://arxiv.org/abs/2412.04305)'s recipe `{config.get('recipe')}`: stage"
    f" `{manifest['stage']}` of a run from the base model `{base}` ({said}).",
    "",
    *_data(run, round),
    *_scores(run, round if round is not None else 1),
    *_quality(run),
    *_made(manifest, run),
  ]
  return "\n".join(lines) + "\n"


def dataset(stage: pathlib.Path, run: pathlib.Path, name: str) -> str:
  """The card of a stage of records, such as a round's trainset or the pool's prompts."""
  manifest, config = layout.load_manifest(stage), layout.config_in(run) or {}
  head = ["configs:", "- config_name: default", "  data_files: data/*.parquet", "tags: [alma_jax, synthetic]"]
  lines = [
    *_front(head),
    f"# {name}",
    "",
    f"{manifest['rows']:,} rows of the stage `{manifest['stage']}` of a run of alma_jax's recipe"
    f" `{config.get('recipe')}`.",
    "What a field means stands in `alma_jax/store/records.py`.",
    "",
    "## Counts",
    "",
    *(f"- {wording.words(key)}: {_number(value)}" for key, value in sorted(_flat(manifest["counts"]).items())),
    "",
    *_data(run, layout.round_of(manifest["stage"])),
    *_quality(run),
    *_made(manifest, run),
  ]
  return "\n".join(lines) + "\n"


def _front(lines: list[str]) -> list[str]:
  return ["---", *lines, "---", ""]


def _data(run: pathlib.Path, round: int | None) -> list[str]:
  """The human data that was kept, the pool, and what the rounds so far gave."""
  lines = ["## Data", ""]
  if seeds := layout.manifest_of(run, layout.SEEDS):
    words = {"sft": "human demonstrations", "judge": "human annotations", "eval": "evaluation prompts"}
    for name, counts in seeds["counts"].items():
      if isinstance(counts, dict) and "kept" in counts:
        lines.append(f"- {words.get(name, name)}: {counts['kept']:,} of {counts['rows']:,} rows")
  for pool in layout.pools(run).values():
    if found := layout.manifest_of(run, f"{pool}/{layout.PROMPTS}"):
      lines.append(f"- synthetic prompts (`{pool}`): {found['rows']:,}")
  for r in layout.rounds(run):
    found = layout.manifest_of(run, layout.stage_name(r, layout.TRAINSET))
    if found and (round is None or r <= round):
      lines.append(f"- training examples of round {r}: {found['rows']:,}")
  return [*lines, ""] if len(lines) > 2 else []


def _scores(run: pathlib.Path, round: int) -> list[str]:
  """What each judge gave this model's answers."""
  rows = [row for row in layout.progress(run) if row.get("round") == str(round)]
  lines = []
  for row in rows:
    for column in row:
      name = column.removesuffix("_ci95")
      if column != name and row.get(name):
        judge = row.get(f"{name}_by") or name.rpartition("/")[2]
        asked = name.rpartition("/")[0] or "the evaluation prompts"
        n = row.get(f"{name}_n") or row.get("n", "")
        lines.append(f"| {asked} | {judge} | {float(row[name]):.2f} ± {float(row[column]):.2f} | {n} |")
  head = ["## Scores", "", "With 95 % intervals.", "", "| asked | graded by | mean | n |", "|---|---|---|---|"]
  return [*head, *lines, ""] if lines else ["## Scores", "", "This model has not been graded.", ""]


def _quality(run: pathlib.Path) -> list[str]:
  found = [f"- {judges.in_words(quality)}" for quality in judges.qualities(layout.stages(run))]
  return ["## The judge of the rounds", "", *found, ""] if found else []


def _made(manifest: Manifest, run: pathlib.Path) -> list[str]:
  """The command, the versions and the config."""
  made = manifest.get("made_with", {})
  starts = [row for row in layout.json_lines(run / layout.LOG) if row.get("event") == "start"]
  command = next((row["command"] for row in reversed(starts) if row.get("command")), None)
  said = ", ".join(f"{key} {value}" for key, value in made.items() if key != "devices" and value)
  config = json.dumps(layout.config_in(run) or {}, indent=1)
  return [
    "## How it was made",
    "",
    *(["```", command, "```", ""] if command else []),
    f"With {said}, on {', '.join(made.get('devices', []))}; finished {manifest.get('finished_at', '')}. The config:",
    "",
    "```json",
    config,
    "```",
  ]


def _flat(counts: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(counts, dict):
    return {prefix: counts}
  return {
    name: x for key, item in counts.items() for name, x in _flat(item, f"{prefix}.{key}" if prefix else key).items()
  }


def _number(value: Any) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)
