"""The arithmetic of ALMA's tables and figures: best-of-n without re-sampling, and AlpacaEval's annotations.

best_of_n(judge, extrinsic)        [prompts, N]: the expected extrinsic score of the best of n = 1 .. N by the judge
alpaca_eval("annotations.json", "difficulty.json", ["concise.json", "verbose.json"])      win rates, raw and LC
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alma_jax.errors import UserError
from alma_jax.evals import scoring
from alma_jax.evals.scoring import Compared, Gamed, LengthControlled, WinRate


class PaperError(UserError):
  """A file that a table or figure cannot be made of."""


def best_of_n(judge: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
  """[prompts, N]: for each prompt and n, the mean of `extrinsic` [prompts, N] at the response that `judge` [prompts, N]
  puts first, over all choices of n of the N responses. Among equal scores of the judge each is as likely.

  With the responses in ascending order, the k-th is the best one of C(k - 1, n - 1) of the C(N, n) choices.
  """
  total = judge.shape[1]
  places = np.arange(1, total + 1)
  log_factorial = np.concatenate([[0.0], np.cumsum(np.log(places))])

  def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return log_factorial[n] - log_factorial[k] - log_factorial[np.maximum(n - k, 0)]

  n, k = places[:, None], places[None, :]
  with np.errstate(over="ignore"):
    weights = np.where(k >= n, np.exp(log_choose(k - 1, n - 1) - log_choose(np.full_like(n, total), n)), 0.0)
  order = np.argsort(judge, axis=1, kind="stable")
  ranked = np.take_along_axis(extrinsic.astype(np.float64), order, axis=1)
  scores = np.take_along_axis(judge, order, axis=1)
  for row, of in zip(ranked, scores, strict=True):  # equal scores share their mean
    codes = np.cumsum(np.concatenate([[0], np.diff(of) != 0]))
    row[:] = (np.bincount(codes, row) / np.bincount(codes))[codes]
  return ranked @ weights.T


@dataclasses.dataclass(frozen=True)
class AlpacaEval:
  """One model's annotations against the baseline."""

  name: str
  raw: WinRate
  controlled: LengthControlled
  characters: float  # of an answer on average


def alpaca_eval(path: str, difficulty: str, gamed: Sequence[str] = ()) -> AlpacaEval:
  """The win rates of a file of AlpacaEval's annotations.

  Its rows have `instruction`, `output_1` (the baseline's), `output_2` (the model's) and `preference`, 1 to 2.
  `difficulty` gives each instruction's; `gamed` are annotations of baselines that were told to be brief or long.
  """
  hard = _difficulties(difficulty)
  rows = list(_annotations(path))
  asked = {str(row["instruction"]) for row in rows}
  if lost := sorted(asked - hard.keys()):
    raise PaperError(
      f"{difficulty} has no difficulty of {len(lost):,} of the {len(asked):,} instructions of {path}, the first"
      f" {lost[0]!r:.80}: the texts must be equal"
    )
  known = [row for row in rows if row["preference"] is not None]
  compared = [
    Compared(row["preference"] - 1, len(row["output_2"]), len(row["output_1"]), hard[str(row["instruction"])])
    for row in known
  ]
  against = [x for file in gamed for x in _gamed(file, hard)]
  name = str(rows[0].get("generator_2") or rows[0].get("generator") or pathlib.Path(path).stem)
  raw = scoring.win_rate([None if row["preference"] is None else row["preference"] - 1 for row in rows])
  characters = float(np.mean([len(row["output_2"]) for row in rows]))
  return AlpacaEval(name, raw, scoring.length_controlled(compared, against), characters)


def _gamed(path: str, hard: Mapping[str, float]) -> list[Gamed]:
  rows = [row for row in _annotations(path) if row["preference"] is not None and str(row["instruction"]) in hard]
  lengths = np.array([len(row["output_1"]) - len(row["output_2"]) for row in rows], np.float64)
  if len(rows) < 2 or lengths.std(ddof=1) == 0:
    raise PaperError(f"{path}: too few rows, or all of one length, for a baseline that was told to be brief or long")
  lengths = lengths / lengths.std(ddof=1)
  return [
    Gamed(row["preference"] - 1, float(length), hard[str(row["instruction"])])
    for row, length in zip(rows, lengths, strict=True)
  ]


def _annotations(path: str) -> Iterator[dict[str, Any]]:
  """The rows, whose `preference` is None where the annotator gave none."""
  for at, row in enumerate(_json(path), 1):
    for field in ("instruction", "output_1", "output_2"):
      if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise PaperError(f"{path}, row {at}: expected AlpacaEval's annotations, with a text in the field {field}")
    value = row.get("preference")
    value = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    if value is not None and not 1 <= value <= 2:  # AlpacaEval writes 0 for a draw
      if value:
        raise PaperError(f"{path}, row {at}, field preference: expected 1 to 2 (or 0, a draw), found {value:g}")
      value = 1.5
    yield {**row, "preference": value}


def _difficulties(path: str) -> dict[str, float]:
  """From {"instruction": difficulty, ...} or rows of `instruction` and `difficulty`."""
  held = _json(path)
  pairs = held.items() if isinstance(held, dict) else ((row.get("instruction"), row.get("difficulty")) for row in held)
  found = {}
  for instruction, value in pairs:
    if not isinstance(instruction, str) or isinstance(value, bool) or not isinstance(value, int | float):
      raise PaperError(f"{path}: expected a number for each instruction, found {value!r:.40} for {instruction!r:.60}")
    found[instruction] = float(value)
  return found


def _json(path: str) -> Any:
  """A JSON value, or the list of a JSONL file's lines."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    try:
      return json.loads(text)
    except ValueError:
      return [json.loads(line) for line in text.splitlines() if line.strip()]
  except (OSError, ValueError) as error:
    raise PaperError(f"cannot read {path}: {error}") from None
