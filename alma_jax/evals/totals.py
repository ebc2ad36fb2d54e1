"""The numbers of graded answers, from the lines of grades.jsonl: each with its n and a 95 % interval over questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alma_jax.errors import UserError
from alma_jax.evals import protocols, scoring
from alma_jax.store import statistics


def numbers_of(protocol: str, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """name -> value, n and 95 % interval over questions."""
  if protocol == "mt_bench":
    return _mt_bench(lines)
  if protocol.startswith("arena_hard"):
    held = [line["battles"] for line in lines]
    found = scoring.arena_hard(held)
    sums = np.array([(sum(x), len(x)) for x in held if x], np.float64)
    interval = statistics.bootstrap(sums, lambda x: float(100 * x[:, 0].sum() / x[:, 1].sum()))
    ci = {"low": interval.low, "high": interval.high}
    return {"win rate %": {"value": found.value, "n": found.questions, **ci}} | _consistency(lines)
  scores = [line["score"] for line in lines]
  if protocol in ("alpaca_eval", "lima_pairwise"):
    found = scoring.win_rate(scores)
    half = None if found.standard_error is None else statistics.Z95 * found.standard_error
    both = {
      "win rate %": _number(found.value, half, found.n),
      "discrete win rate %": _number(found.discrete, None, found.n),
    }
    return both | (_consistency(lines) if protocol == "lima_pairwise" else {})
  return {"mean": _mean([score for score in scores if score is not None])}


def _mt_bench(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  rated = [
    scoring.Rated(line["id"], int(part.rpartition("_")[2]), line["category"], rating)
    for line in lines
    for part, rating in line["parts"].items()
  ]
  known = [x for x in rated if x.rating is not None]
  found, out = scoring.mt_bench(rated), {}

  def clustered(kept: Sequence[scoring.Rated], value: float) -> dict[str, Any]:
    mean = statistics.clustered([x.rating or 0.0 for x in kept], np.array([str(x.question) for x in kept]))
    return _number(value, mean.ci95 if mean else None, len(kept))

  out["average"] = clustered(known, found.average)
  for turn, value in found.turns.items():
    out[f"turn {turn}"] = clustered([x for x in known if x.turn == turn], value)
  for category, value in found.categories.items():
    if category:
      out[category] = clustered([x for x in known if x.category == category], value)
  return out


def _consistency(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """How often both orders name the same winner; the model stands second in game_1."""
  first = {"A": 1.0, "B": 0.0, "C": 0.5} | {label: share for label, (share, _) in protocols.LABELS.items()}
  both = [(line["parts"].get("game_1"), line["parts"].get("game_2")) for line in lines]
  shares = [(None if a is None else 1 - first[a], None if b is None else first[b]) for a, b in both]
  same, n = scoring.consistent(shares), sum(a is not None and b is not None for a, b in shares)
  return {} if same is None else {"both orders agree": _number(same, None, n)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
  mean = statistics.mean(values)
  if mean is None:
    raise UserError("no answer has a score")
  return _number(mean.value, mean.ci95, mean.n)


def _number(value: float, half: float | None, n: int) -> dict[str, Any]:
  ends = {} if half is None else {"low": value - half, "high": value + half}
  return {"value": value, "n": n, **ends}
