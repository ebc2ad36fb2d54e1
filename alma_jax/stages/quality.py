"""How good the run's judge is: its scores of annotations that it never saw, against the annotators' own.

Measured for every judge, whether it was fine-tuned, distilled, shown examples, or written by the user. The stage's
records are the scores; its manifest has the numbers, which the report shows wherever it shows the judge's scores.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge, Scale
from alma_jax.runtime import alarms
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import HeldOut
from alma_jax.store.statistics import Mean

LABELS = (0.0, 10.0)  # the annotators' scale
BINS = 5  # of the calibration


@dataclasses.dataclass(frozen=True)
class Bin:
  """The held-out annotations whose score by the judge lies in one part of the scale."""

  low: float
  high: float
  rows: int
  score: float  # the mean of the judge's scores, on the annotators' scale
  label: float  # the mean of the annotators' scores


@dataclasses.dataclass(frozen=True)
class Quality:
  """A judge against held-out annotations. `error` and `calibration` are on the annotators' scale; a judge without the
  ends of a scale has none."""

  judge: str  # identity
  rows: int
  prompts: int
  agreement: Mean | None  # share of pairs in the annotators' order
  spearman: Mean | None
  error: Mean | None  # mean absolute error
  calibration: list[Bin]
  calibration_error: float | None  # |mean score - mean label| of a bin, averaged over the rows
  entropy: float | None  # bits of the judge's distributions on average, None for a judge without them
  entropy_of_labels: float  # bits of the distribution of all annotations' scores
  deviation: float  # standard deviation of the judge's scores


def build(s: Session[Any], judge: Judge, data: Data, rows: Sequence[SeedRow]) -> None:
  """Stage `judge_quality`: the judge's scores of the held-out annotations `rows`, and what follows from them."""
  asked = [[list(row.messages), row.response, row.score] for row in rows]
  fields = {
    "judge": judge.identity,
    "held_out": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    "annotations": data.digests["judge"],
    "text": s.describe_text(),
    "dtype": s.host.dtype,
  }
  stage = s.run.stage(layout.QUALITY, fields)
  if stage.done:
    return
  for part in stage.mine(1):
    pairs = [
      Answered(row.messages, row.response or "", name=f"annotation of prompt {prompt_id(row.messages)}") for row in rows
    ]
    found = contract.scores(judge, pairs)
    records = [
      HeldOut(prompt_id(row.messages), row.score or 0.0, verdict.number, verdict.probs)
      for row, verdict in zip(rows, found, strict=True)
    ]
    stage.write_part(part, 1, records, HeldOut)
  told: list[dict[str, Any]] = []
  raised: alarms.Alarms = {}
  if s.run.process == 0:
    measured = of(judge.identity, judge.scale, shards.read_records(stage.part_path(0, 1), HeldOut), data.judge)
    told = [dataclasses.asdict(measured)]
    raised = _alarms(measured, judge.scale, s.options.alarms)
  stage.finish(alarms=lambda _: raised, quality=told)
  alarms.say(s.display, stage)
  for quality in stage.manifest["quality"]:
    s.display.say(in_words(quality))


def of(identity: str, scale: Scale | None, records: Sequence[HeldOut], annotations: Sequence[SeedRow]) -> Quality:
  """The Quality of a judge with these scores; `annotations` are all that the run has."""
  scores, labels = (np.array([getattr(r, name) for r in records], np.float64) for name in ("score", "label"))
  prompts = np.array([r.prompt_id for r in records], dtype=str)
  entropies = [_bits(r.probs) for r in records if r.probs is not None]
  error, bins = None, []
  if scale:
    low, high = LABELS
    placed = low + (scores - scale[0]) * (high - low) / (scale[1] - scale[0])
    error, bins = statistics.clustered(np.abs(placed - labels), prompts), _calibration(placed, labels)
  counts = collections.Counter(round(row.score or 0.0) for row in annotations)
  return Quality(
    judge=identity,
    rows=len(records),
    prompts=len(set(prompts.tolist())),
    agreement=statistics.ordered(scores, labels, prompts),
    spearman=statistics.spearman(scores, labels, prompts),
    error=error,
    calibration=bins,
    calibration_error=sum(b.rows * abs(b.score - b.label) for b in bins) / len(records) if bins else None,
    entropy=float(np.mean(entropies)) if entropies else None,
    entropy_of_labels=_bits([n / counts.total() for n in counts.values()]),
    deviation=float(scores.std()) if len(scores) else 0.0,
  )


def in_words(quality: dict[str, Any]) -> str:
  """One line about a Quality as the manifest holds it."""
  agreement, error = quality["agreement"], quality["error"]
  if agreement is None:
    return f"judge: {quality['rows']} held-out annotations, no two of which differ in score: nothing to measure it by"
  said = f"judge: orders {agreement['value']:.3f}"
  said += "" if agreement["ci95"] is None else f" +- {agreement['ci95']:.3f}"
  said += f" of {agreement['n']:,} held-out pairs as the annotators did"
  said += f", mean error {error['value']:.2f} of 10" if error else ""
  return said + f" ({quality['rows']:,} annotations)"


def _calibration(scores: np.ndarray, labels: np.ndarray) -> list[Bin]:
  """The bins that have rows, from the lowest."""
  edges = np.linspace(*LABELS, BINS + 1)
  at = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, BINS - 1)
  return [
    Bin(float(edges[i]), float(edges[i + 1]), int(here.sum()), float(scores[here].mean()), float(labels[here].mean()))
    for i in range(BINS)
    if (here := at == i).any()
  ]


def _bits(probs: Iterable[float]) -> float:
  """The entropy of a distribution."""
  p = np.array([x for x in probs if x > 0])
  return float(-(p * np.log2(p)).sum())


def _alarms(quality: Quality, scale: Scale | None, bounds: alarms.Options) -> alarms.Alarms:
  found = alarms.spread(bounds, quality.deviation, scale) if quality.rows else {}
  if quality.entropy is not None:
    found |= alarms.entropy(bounds, quality.entropy, quality.entropy_of_labels)
  return found
