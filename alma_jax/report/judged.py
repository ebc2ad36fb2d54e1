"""A round's responses, what the judge says of them and which of them were selected.

  found = read(run, 3)
  found.judged.gain          Mean(value=2.52, ci95=0.25, n=24)
  found.histogram.selected   [0, 0, 0, ..., 17]

Columns are read a batch of rows at a time. At most about ROWS responses of a round are kept, and always all responses
of a prompt; the n beside a number says how many these were. Sums in a manifest cover everything.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alma_jax.store import layout, shards, statistics
from alma_jax.store.statistics import Mean

ROWS = 400_000  # responses of a round that are kept, about
BATCH = 16384
SCALE = (0.0, 10.0)  # of a judge whose manifest names none
MARKS = 11  # of a histogram
Scale = tuple[float, float] | None  # lowest and highest score; None: any number


@dataclasses.dataclass(frozen=True)
class Judged:
  """The judge's scores of the responses that were read."""

  n: int  # responses read
  total: int  # responses there
  prompts: int
  scores: Mean
  gain: Mean | None  # best score trained on minus the mean score of the prompt's responses
  length: Mean  # characters
  mass: Mean | None  # None if the judge gives no probabilities
  entropy: Mean | None  # bits, of the judge's distribution over its scores
  most_entropy: float | None  # bits: the most there can be with this many scores
  margin: Mean | None  # best minus second best of a prompt
  tied: float | None  # share of prompts whose best score is not unique
  correlation: Mean | None  # of score and length, over all responses
  correlation_within: Mean | None  # the same around each prompt's means


@dataclasses.dataclass(frozen=True)
class Selected:
  """What is trained on: the whole trainset. The chosen response of a pair counts, the rejected one does not."""

  n: int
  scores: Mean | None
  length: Mean | None  # characters
  sources: dict[str, int]  # responses by the checkpoint that wrote them; {} for pairs, which do not say it
  graded: bool  # all responses of a prompt are trained on


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Counts of all responses and of the selected ones at the same marks of the scale."""

  names: list[str]
  sampled: list[int]
  selected: list[int]


@dataclasses.dataclass(frozen=True)
class Round:
  """A round with finished responses; what could not be read is None, with the reason in `damage`."""

  judged: Judged | None
  selected: Selected | None
  histogram: Histogram | None
  scale: Scale
  damage: list[str]


@dataclasses.dataclass(frozen=True)
class Shown:
  """A prompt with its selected and its lowest response."""

  messages: list[dict[str, str]]
  selected: str
  selected_score: float
  worst: str
  worst_score: float
  responses: int


class _Rows(NamedTuple):
  """The responses that were read; a group is a prompt."""

  prompts: list[str]  # [groups] ids
  levels: int  # scores that the judge gives a probability to
  group: np.ndarray  # [n]
  score: np.ndarray  # [n]
  mass: np.ndarray  # [n], nan without probabilities
  entropy: np.ndarray  # [n], nan without probabilities
  length: np.ndarray  # [n]


_COLUMNS = _Rows._fields[2:]


class _Chosen(NamedTuple):
  """A trainset's columns; a group is a prompt."""

  best: np.ndarray  # [prompts that were read] best score trained on, -inf where nothing is
  group: np.ndarray  # [n]
  score: np.ndarray  # [n]
  length: np.ndarray  # [n]
  sources: collections.Counter[str]
  graded: bool


def read(run: pathlib.Path, round: int) -> Round | None:
  """What can be read of a round, None before its responses are judged."""
  manifest = layout.manifest_of(run, layout.stage_name(round, layout.JUDGMENTS))
  if manifest is None:
    return None
  scale, damage = scale_of(manifest), []
  rows = chosen = judged = selected = None
  try:
    rows = _rows(run, round, manifest["rows"])
  except Exception as e:  # a lost file costs what is read from it
    damage.append(f"{type(e).__name__}: {e}")
  try:
    chosen = _chosen(run, round, rows.prompts if rows else [])
  except Exception as e:
    damage.append(f"{type(e).__name__}: {e}")
  if rows and len(rows.group):
    judged = _judged(rows, chosen, manifest["rows"])
  if chosen:
    scores, lengths = (statistics.clustered(x, chosen.group) for x in (chosen.score, chosen.length))
    selected = Selected(len(chosen.group), scores, lengths, dict(chosen.sources), chosen.graded)
  return Round(judged, selected, _histogram(manifest, scale, rows, chosen), scale, damage)


def scale_of(manifest: dict[str, Any]) -> Scale:
  """The judge's lowest and highest score, from the manifest of judgments."""
  scale = manifest.get("judge", {}).get("scale", SCALE)
  return None if scale is None else (float(scale[0]), float(scale[1]))


def examples(run: pathlib.Path, round: int, count: int = 3) -> list[Shown]:
  """The first prompts of a round's trainset among those of its first share."""
  shares = _shares(run, round)
  parts = layout.parts_of(run / layout.stage_name(round, layout.TRAINSET))
  if not shares or not parts:
    return []
  judgments, responses = shares[0]
  there = {x for batch in batches([judgments], ["prompt_id"]) for x in batch.column(0).unique().to_pylist()}
  chosen = _best_rows(parts, there, count)
  # The lowest score of each prompt with its row in the share: (score, row)
  lowest: dict[str, tuple[float, int]] = {}
  responses_to, start = collections.Counter(), 0
  for batch in batches([judgments], ["prompt_id", "score"]):
    at = np.flatnonzero(np.isin(batch.column("prompt_id").to_numpy(zero_copy_only=False), list(chosen)))
    found = batch.take(pa.array(at))
    for prompt, score, row in zip(found[0].to_pylist(), found[1].to_pylist(), (start + at).tolist(), strict=True):
      responses_to[prompt] += 1
      lowest[prompt] = min(lowest.get(prompt, (math.inf, 0)), (score, row))
    start += len(batch)
  texts = _texts(responses, {row for _, row in lowest.values()})
  return [
    Shown(messages, text, score, texts[lowest[prompt][1]], lowest[prompt][0], responses_to[prompt])
    for prompt, (messages, text, score) in chosen.items()
  ]


def batches(paths: Iterable[pathlib.Path], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
  for path in paths:
    with shards.parquet(path) as file:
      yield from file.iter_batches(BATCH, columns=list(columns))


def floats(column: pa.Array) -> np.ndarray:
  """float64 [rows], nan for null."""
  return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def characters(column: pa.Array) -> np.ndarray:
  """float64 [rows]: the number of characters of each text."""
  return floats(pc.call_function("utf8_length", [column]))


# The numbers of a round


def _judged(rows: _Rows, chosen: _Chosen | None, total: int) -> Judged:
  group, score, length = rows.group, rows.score, rows.length
  sizes = np.bincount(group)
  mean_score, mean_length = np.bincount(group, score) / sizes, np.bincount(group, length) / sizes
  gains = chosen.best - mean_score if chosen else np.zeros(0)
  scores, lengths = statistics.clustered(score, group), statistics.clustered(length, group)
  assert scores and lengths
  margin = _margins(group, score)
  known = np.isfinite(rows.mass)
  told = np.isfinite(rows.entropy)
  return Judged(
    n=len(group),
    total=total,
    prompts=len(rows.prompts),
    scores=scores,
    gain=statistics.mean(gains[np.isfinite(gains)]),
    length=lengths,
    mass=statistics.clustered(rows.mass[known], group[known]),
    entropy=statistics.clustered(rows.entropy[told], group[told]),
    most_entropy=math.log2(rows.levels) if rows.levels else None,
    margin=statistics.mean(margin),
    tied=float(np.mean(margin < 1e-9)) if len(margin) else None,
    correlation=statistics.correlation(score, length, group),
    correlation_within=statistics.correlation(score - mean_score[group], length - mean_length[group], group),
  )


def _margins(group: np.ndarray, score: np.ndarray) -> np.ndarray:
  """Best minus second best score of every group of two or more."""
  order = np.lexsort((-score, group))
  group, score = group[order], score[order]
  first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
  first = first[np.r_[group, -1][first + 1] == group[first]]
  return score[first] - score[first + 1]


def _histogram(manifest: dict[str, Any], scale: Scale, rows: _Rows | None, chosen: _Chosen | None) -> Histogram | None:
  """Counts at eleven evenly spaced marks from the lowest score to the highest, each score at the nearest one. Where the
  scale has ends, the manifest counts all responses; else those that were read give the ends and the counts."""
  counts = manifest["counts"].get("histogram")
  if scale and counts:
    low, high, sampled = *scale, [counts.get(f"{mark:02d}", 0) for mark in range(MARKS)]
  elif rows and len(rows.score):
    low, high = scale or (float(rows.score.min()), float(rows.score.max()))
    sampled = _at_marks(rows.score, low, high)
  else:
    return None
  names = [f"{mark:.3g}" for mark in np.linspace(low, high, MARKS)]
  return Histogram(names, sampled, _at_marks(chosen.score if chosen else np.zeros(0), low, high))


def _at_marks(scores: np.ndarray, low: float, high: float) -> list[int]:
  width = (high - low) / (MARKS - 1) or 1.0
  marks = np.clip(np.floor((scores - low) / width + 0.5), 0, MARKS - 1)
  return np.bincount(marks.astype(int), minlength=MARKS).tolist()


# Columns


def _shares(run: pathlib.Path, round: int) -> list[tuple[pathlib.Path, list[pathlib.Path]]] | None:
  """[(part of the judgments, parts of the responses)] with the same rows in the same order, None before both are
  finished."""
  names = (layout.JUDGMENTS, layout.RESPONSES)
  judgments, responses = (layout.parts_of(run / layout.stage_name(round, name)) for name in names)
  if not judgments or not responses:
    return None
  return [(part, responses[i :: len(judgments)]) for i, part in enumerate(judgments)]


def _rows(run: pathlib.Path, round: int, total: int) -> _Rows | None:
  """About ROWS rows of a round: evenly chosen shares, and of a share that is too large evenly chosen prompts."""
  shares = _shares(run, round)
  if shares is None:
    return None
  count = max(1, min(len(shares), ROWS * len(shares) // max(1, total)))
  found: list[_Rows] = []
  before = 0
  for at in np.linspace(0, len(shares), count, endpoint=False).astype(int):
    share = _share(*shares[at], most=ROWS // count)
    found.append(share._replace(group=share.group + before))
    before += len(share.prompts)
  columns = {name: np.concatenate([getattr(x, name) for x in found]) for name in _COLUMNS}
  return _Rows([prompt for x in found for prompt in x.prompts], max(x.levels for x in found), **columns)


def _share(judgments: pathlib.Path, responses: list[pathlib.Path], most: int) -> _Rows:
  """Every n-th prompt of one share, such that about `most` rows are kept; ValueError if the orders differ."""
  with shards.parquet(judgments) as file:
    step = max(1, round(file.metadata.num_rows / most))
  codes: dict[str, int] = {}
  columns = {name: [np.zeros(0)] for name in _COLUMNS}
  levels, orders = 0, (hashlib.sha256(), hashlib.sha256())  # of (prompt, sample), row by row
  for batch in batches([judgments], ["prompt_id", "sample_id", "score", "probs", "mass"]):
    code = _codes(batch.column("prompt_id"), codes)
    orders[0].update(np.stack([code, batch.column("sample_id").to_numpy()], axis=1).tobytes())
    kept = code % step == 0
    entropy, most_probs = _entropy(batch.column("probs"))
    levels = max(levels, most_probs)
    columns["group"].append(code[kept] // step)
    columns["score"].append(floats(batch.column("score"))[kept])
    columns["mass"].append(floats(batch.column("mass"))[kept])
    columns["entropy"].append(entropy[kept])
  for batch in batches(responses, ["prompt_id", "sample_id", "text"]):
    code = _codes(batch.column("prompt_id"), codes)
    orders[1].update(np.stack([code, batch.column("sample_id").to_numpy()], axis=1).tobytes())
    columns["length"].append(characters(batch.column("text"))[code % step == 0])
  if orders[0].digest() != orders[1].digest():
    raise ValueError(f"{judgments} does not hold the judgments of {', '.join(map(str, responses))} in their order")
  arrays = {name: np.concatenate(column) for name, column in columns.items()}
  return _Rows(list(codes)[::step], levels, **arrays | {"group": arrays["group"].astype(np.int64)})


def _codes(column: pa.Array, codes: dict[str, int]) -> np.ndarray:
  """int64 [rows]: the number of each text, counted from its first appearance; `codes` gets the new ones."""
  encoded = column.dictionary_encode()
  numbers = [codes.setdefault(name, len(codes)) for name in encoded.dictionary.to_pylist()]
  return np.array(numbers, np.int64)[encoded.indices.to_numpy()]


def _entropy(probs: pa.Array) -> tuple[np.ndarray, int]:
  """Bits of each row's distribution, [rows], nan where there is none; and the most probabilities of a row."""
  sizes = np.nan_to_num(floats(pc.call_function("list_value_length", [probs]))).astype(int)
  p = np.asarray(probs.flatten(), np.float64)
  bits = np.bincount(np.repeat(np.arange(len(sizes)), sizes), -p * np.log2(np.maximum(p, 1e-30)), len(sizes))
  return np.where(sizes > 0, bits, np.nan), int(sizes.max(initial=0))


def _chosen(run: pathlib.Path, round: int, prompts: Sequence[str]) -> _Chosen | None:
  """The round's trainset, None until it is finished; `prompts` are those whose best score is wanted."""
  parts = layout.parts_of(run / layout.stage_name(round, layout.TRAINSET))
  if parts is None:
    return None
  places, best = {prompt: i for i, prompt in enumerate(prompts)}, np.full(len(prompts), -np.inf)
  columns = {name: [np.zeros(0)] for name in ("group", "score", "length")}
  sources, graded, last, groups = collections.Counter(), False, "", 0
  for path in parts:
    score, text, present = _trainset_columns(path)
    graded = graded or "advantage" in present
    for batch in batches([path], ["prompt_id", score, text, *(["source"] if "source" in present else [])]):
      scores, ids = floats(batch.column(score)), batch.column("prompt_id").to_pylist()
      # The rows of a prompt follow each other: a group begins where the id changes.
      group = groups + np.cumsum([new != old for old, new in itertools.pairwise([last, *ids])])
      last, groups = [last, *ids][-1], int([groups, *group][-1])
      at = np.array([places.get(prompt, -1) for prompt in ids], np.int64)
      np.maximum.at(best, at[at >= 0], scores[at >= 0])
      columns["group"].append(group)
      columns["score"].append(scores)
      columns["length"].append(characters(batch.column(text)))
      if "source" in present:
        sources.update(source for source in batch.column("source").to_pylist() if source)
  arrays = {name: np.concatenate(column) for name, column in columns.items()}
  return _Chosen(best=best, sources=sources, graded=graded, **arrays)


def _trainset_columns(path: pathlib.Path) -> tuple[str, str, list[str]]:
  """The names of the columns with the score and the text to train on; and those of all columns."""
  with shards.parquet(path) as file:
    present = file.schema_arrow.names
  return ("chosen_score", "chosen", present) if "chosen" in present else ("score", "response", present)


class _Best(NamedTuple):
  messages: list[dict[str, str]]
  text: str
  score: float


def _best_rows(parts: Sequence[pathlib.Path], wanted: set[str], count: int) -> dict[str, _Best]:
  """The best row of the first `count` of the wanted prompts; the rows of a prompt follow each other."""
  chosen: dict[str, _Best] = {}
  for path in parts:
    score, text, _ = _trainset_columns(path)
    for batch in batches([path], ["prompt_id", "messages", text, score]):
      scores = batch.column(score).to_pylist()
      for i, prompt in enumerate(batch.column("prompt_id").to_pylist()):
        if prompt not in wanted or (prompt in chosen and scores[i] <= chosen[prompt].score):
          continue
        if prompt not in chosen and len(chosen) == count:
          return chosen
        chosen[prompt] = _Best(batch.column("messages")[i].as_py(), batch.column(text)[i].as_py(), scores[i])
  return chosen


def _texts(parts: Sequence[pathlib.Path], rows: set[int]) -> dict[int, str]:
  """The texts at these rows, counted over all parts."""
  found, start = {}, 0
  for batch in batches(parts, ["text"]):
    found |= {row: batch.column("text")[row - start].as_py() for row in rows if start <= row < start + len(batch)}
    start += len(batch)
    if len(found) == len(rows):
      break
  return found
