"""Other demonstrations of the miniature world, for LIMA's ablations of quality, quantity and dialogues.

  filtered     48 rows   the annotated answers with the highest scores, one to a prompt
  unfiltered   48 rows   annotated answers at random, one to a prompt
  quantity    192 rows   annotated answers at random, two to some prompts: four times as many
  dialogue     84 rows   the demonstrations, 24 of them as 12 dialogues of two turns; evaluation prompts after one turn

Each is a function of (directory, seed) that writes sft.jsonl, and `dialogue` eval.jsonl, too, as a word of names.DATA.
"""

import json
import os
import pathlib
import random
from typing import Any

from alma_jax.mini import seeds

FEW, MANY, CHAINS = 48, 192, 12
Row = dict[str, Any]
Directory = str | os.PathLike[str]


def filtered(directory: Directory, seed: int) -> None:
  ranked = sorted(_annotated(directory, seed), key=_score, reverse=True)
  _write(directory, "sft", _one_each(ranked)[:FEW])


def unfiltered(directory: Directory, seed: int) -> None:
  _write(directory, "sft", _one_each(_annotated(directory, seed))[:FEW])


def quantity(directory: Directory, seed: int) -> None:
  _write(directory, "sft", _annotated(directory, seed)[:MANY])


def dialogue(directory: Directory, seed: int) -> None:
  made = _rows(seeds.make(directory, seed)["sft"])
  turns = [[_turn("user", row["prompt"]), _turn("assistant", row["response"])] for row in made]
  chains = [turns[i] + turns[i + 1] for i in range(0, 2 * CHAINS, 2)]
  _write(directory, "sft", [{"messages": of} for of in (*chains, *turns[2 * CHAINS :])])
  asked = _rows(pathlib.Path(directory) / "eval.jsonl")
  history = turns[2 * CHAINS :]
  _write(
    directory,
    "eval",
    [{"messages": [*history[i % len(history)], _turn("user", row["prompt"])]} for i, row in enumerate(asked)],
  )


def _annotated(directory: Directory, seed: int) -> list[Row]:
  """The annotated answers in a random order."""
  rows = _rows(seeds.make(directory, seed)["judge"])
  random.Random(f"variants {seed}").shuffle(rows)
  return rows


def _one_each(rows: list[Row]) -> list[Row]:
  """The first answer to each prompt."""
  return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]


def _score(row: Row) -> float:
  return row["score"]


def _turn(role: str, text: str) -> dict[str, str]:
  return {"role": role, "content": text}


def _rows(path: pathlib.Path) -> list[Row]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _write(directory: Directory, name: str, rows: list[Row]) -> None:
  path = pathlib.Path(directory) / f"{name}.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
