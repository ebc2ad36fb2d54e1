"""The numbers of a run, read from its directory at any moment of its life: what is not there yet is None or empty.

Only manifests, progress.csv, metrics.jsonl, log.jsonl and the columns that are needed are read, a batch of rows at a
time, so a round of ten million responses fits into little memory. Of such a round a part is read, `ROWS` at most and
always all responses of a prompt; the n beside a number says how many that were. Sums that stand in a manifest cover
everything.
"""

import csv
import dataclasses
import json
import math
import pathlib
import time

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alma_jax.store import lock as lock_file

ROWS = 400_000  # responses of a round that are read, about
BATCH = 16384


@dataclasses.dataclass(frozen=True)
class Mean:
  value: float
  ci95: float | None  # half width; None where it cannot be known
  n: int


@dataclasses.dataclass(frozen=True)
class Stage:
  name: str
  dir: pathlib.Path
  manifest: dict | None  # None: not finished


@dataclasses.dataclass(frozen=True)
class State:
  word: str  # finished, running, failed, stopped, empty
  error: str  # of a failed run
  round: int | None  # the last one that was evaluated
  rounds: int | None  # the last one that the config asks for
  start: dict  # the log's last "start"
  at: str  # time of the last event


@dataclasses.dataclass(frozen=True)
class Judged:
  """A round's responses and what the judge says of them; see `judged`."""

  n: int  # responses read
  total: int  # responses there
  prompts: int
  gain: Mean | None  # judge's score of the selected minus the mean of the prompt's responses
  length: Mean  # characters
  selected_length: Mean | None
  mass: Mean
  entropy: Mean  # bits, of the judge's distribution over the scores
  margin: Mean | None  # best minus second best of a prompt
  tied: float | None  # share of prompts whose best score is not unique
  correlation: Mean | None  # of score and length, over all responses
  correlation_within: Mean | None  # the same around each prompt's means


@dataclasses.dataclass(frozen=True)
class Shown:
  """A prompt with its selected and its lowest response."""

  messages: list
  selected: str
  selected_score: float
  worst: str
  worst_score: float
  responses: int


def mean(values):
  values = np.asarray(values, np.float64)
  if not len(values):
    return None
  ci95 = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
  return Mean(float(values.mean()), None if ci95 is None else float(ci95), len(values))


def correlation(x, y, groups):
  """Pearson's r; the interval allows for responses to one prompt being alike (linearised, clustered by `groups`)."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
    return None
  x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
  r = float(np.mean(x * y))
  influence = np.bincount(groups, x * y - r / 2 * (x**2 + y**2))
  clusters = len(np.unique(groups))
  spread = math.sqrt(np.sum(influence**2) * clusters / max(1, clusters - 1)) / len(x)
  return Mean(r, 1.96 * spread if clusters > 1 else None, len(x))


def stages(directory):
  """Every stage, finished ones first in the order they ended."""
  found = []
  for path in [*directory.glob("*/fingerprint.json"), *directory.glob("*/*/fingerprint.json")]:
    found.append(Stage(str(path.parent.relative_to(directory)), path.parent, _json(path.parent / "manifest.json")))
  return sorted(found, key=lambda s: (s.manifest is None, (s.manifest or {}).get("finished_at", ""), s.name))


def manifest(directory, name):
  return _json(directory / name / "manifest.json")


def config(directory):
  return _json(directory / "config.json") or {}


def rounds(directory):
  """The numbers of the round_RR directories."""
  names = (path.name.removeprefix("round_") for path in directory.glob("round_*") if path.is_dir())
  return sorted(int(name) for name in names if name.isdigit())


def progress(directory):
  """Rows of progress.csv with numbers for what is one; cells without a value are left out."""
  path = directory / "progress.csv"
  if not path.exists():
    return []
  with open(path, newline="", encoding="utf-8") as file:
    rows = [{key: _number(value) for key, value in row.items() if key and value} for row in csv.DictReader(file)]
  finite = lambda value: isinstance(value, str) or math.isfinite(value)
  rows = [{key: value for key, value in row.items() if finite(value)} for row in rows]
  return sorted((row for row in rows if isinstance(row.get("round"), int)), key=lambda row: row["round"])


def state(directory, error=None):
  """`error` is what is just now ending the run, if somebody knows."""
  log = _json_lines(directory / "log.jsonl")
  turns = [row for row in log if row.get("event") in ("start", "end", "failed")]
  last = turns[-1] if turns else {}
  wanted = config(directory).get("feedback_rounds")
  done = [r for r in rounds(directory) if manifest(directory, f"round_{r:02d}/eval")]
  reached, target = max(done, default=None), wanted + 1 if isinstance(wanted, int) else None
  finished = target is not None and reached is not None and reached >= target
  if error is not None:
    word = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
  elif last.get("event") in ("end", "failed"):
    word = {"end": "finished", "failed": "failed"}[last["event"]]
  elif finished:
    word = "finished"
  elif _is_held(directory / ".lock"):
    word = "running"
  else:
    word = "stopped" if turns else "empty"
  text = str(last.get("error", "")) if word == "failed" else ""
  if error is not None and word == "failed":
    text = f"{type(error).__name__}: {error}"
  start = next((row for row in reversed(log) if row.get("event") == "start"), {})
  times = [row["time"] for row in log if "time" in row]
  times += [s.manifest["finished_at"] for s in stages(directory) if s.manifest]
  return State(word, text, reached, target, start, max(times, default=""))


def evaluations(directory, r):
  """Columns of a finished round_RR/eval as arrays (score holds nan where nobody graded), or None."""
  parts = _parts(directory / f"round_{r:02d}/eval")
  if parts is None:
    return None
  ids, columns = [], {"judge_score": [], "score": [], "characters": []}
  for batch in _batches(parts, ["prompt_id", "judge_score", "score", "response"]):
    ids += batch.column("prompt_id").to_pylist()
    columns["judge_score"].append(_floats(batch.column("judge_score")))
    columns["score"].append(_floats(batch.column("score")))
    columns["characters"].append(_floats(pc.utf8_length(batch.column("response"))))
  return {"prompt_id": ids} | {name: np.concatenate(arrays or [np.zeros(0)]) for name, arrays in columns.items()}


def paired(these, those, column):
  """Mean difference over the prompts that both evaluations hold."""
  left, right = (
    {i: v for i, v in zip(e["prompt_id"], e[column]) if math.isfinite(v)} if e else {} for e in (these, those)
  )
  return mean([left[i] - right[i] for i in left if i in right])


def agreement(evaluation):
  """Correlation of the judge's and the evaluator's scores over the prompts, where there is an evaluator."""
  graded = np.isfinite(evaluation["score"])
  return correlation(evaluation["judge_score"][graded], evaluation["score"][graded], np.arange(graded.sum()))


def trainset(directory, r):
  """{prompt id: (judge's score, source or None, characters)} of the selected responses, or None."""
  parts = _parts(directory / f"round_{r:02d}/trainset")
  if parts is None:
    return None
  selected = {}
  for path in parts:
    score, text = _trainset_columns(path)
    columns = ["prompt_id", score, text, *(["source"] if score == "score" else [])]
    for batch in _batches([path], columns):
      sources = batch.column("source").to_pylist() if "source" in columns else [None] * len(batch)
      lengths = pc.utf8_length(batch.column(text)).to_pylist()
      rows = zip(batch.column("prompt_id").to_pylist(), batch.column(score).to_pylist(), sources, lengths)
      selected |= {i: tuple(row) for i, *row in rows}
  return selected


def histogram(scores):
  """Counts per rounded score 0..10, rounded as the manifests' histograms are."""
  scores = np.asarray(scores, np.float64)
  return np.bincount(np.clip(np.floor(scores + 0.5), 0, 10).astype(int), minlength=11)


def judged(directory, r, selected):
  """The Judged of a round whose responses are all scored, or None. `selected` is what `trainset` returned."""
  shares = _shares(directory, r)
  if shares is None:
    return None
  total = manifest(directory, f"round_{r:02d}/judgments")["rows"]
  count = max(1, min(len(shares), ROWS * len(shares) // max(1, total)))
  columns, ids = [], []
  for at in np.linspace(0, len(shares), count, endpoint=False).astype(int):
    names, numbers = _judged_share(*shares[at])
    codes = {name: len(ids) + i for i, name in enumerate(dict.fromkeys(names))}
    ids += codes
    columns.append({"group": np.array([codes[name] for name in names], int)} | numbers)
  of = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
  if not len(of["group"]):
    return None
  group, score, length = of["group"], of["score"], of["length"]
  sizes = np.bincount(group)
  mean_score, mean_length = np.bincount(group, score) / sizes, np.bincount(group, length) / sizes
  taken = [(i, selected[name]) for i, name in enumerate(ids) if name in selected] if selected else []
  margin = _margins(group, score)
  return Judged(
    n=len(group),
    total=total,
    prompts=len(ids),
    gain=mean([row[0] - mean_score[i] for i, row in taken]),
    length=_clustered(length, group),
    selected_length=mean([row[2] for _, row in taken]),
    mass=_clustered(of["mass"], group),
    entropy=_clustered(of["entropy"], group),
    margin=mean(margin),
    tied=float(np.mean(margin < 1e-9)) if len(margin) else None,
    correlation=correlation(score, length, group),
    correlation_within=correlation(score - mean_score[group], length - mean_length[group], group),
  )


def examples(directory, r, count=3):
  """[Shown] of a round's first prompts."""
  shares, parts = _shares(directory, r), _parts(directory / f"round_{r:02d}/trainset")
  if not shares or not parts:
    return []
  judgments, responses = shares[0]
  rows = [row for batch in _batches([judgments], ["prompt_id", "score"]) for row in zip(*batch.to_pydict().values())]
  wanted = {}
  for at, (prompt, score) in enumerate(rows):
    wanted.setdefault(prompt, []).append((score, at))
  chosen = _selected_rows(parts, wanted, count)
  low = {prompt: min(wanted[prompt]) for prompt in chosen}
  texts = _texts(responses, {at for _, at in low.values()})
  return [
    Shown(messages, text, score, texts[low[prompt][1]], low[prompt][0], len(wanted[prompt]))
    for prompt, (messages, text, score) in chosen.items()
  ]


def pools(directory):
  """{0: "pool", 3: "pool_03", ...}: the pool and, by the round that began with it, what was added."""
  names = sorted(path.name for path in directory.glob("pool_*") if path.name.removeprefix("pool_").isdigit())
  return {0: "pool"} | {int(name.removeprefix("pool_")): name for name in names}


def report(directory, name):
  """What the finished stage's report.json says, or None."""
  return _json(directory / name / "report.json") if manifest(directory, name) else None


def cluster_sizes(directory):
  """The number of prompts in each cluster, of the pool and of what was added to it, or None."""
  stages = [path.parent for path in sorted(directory.glob("pool*/clusters/manifest.json"))]
  if not stages:
    return None
  sizes = np.zeros(0, int)
  for stage in stages:
    found = np.bincount(np.load(stage / "labels.npy", mmap_mode="r", allow_pickle=False))
    sizes = np.pad(sizes, (0, max(0, len(found) - len(sizes))))
    sizes[: len(found)] += found
  return sizes[sizes > 0]


def losses(stage, points=150):
  """(steps, losses, both means over consecutive steps, and the Mean loss of the last steps) of a training, or None."""
  rows = [row for row in _json_lines(stage.dir / "metrics.jsonl") if "loss" in row and "step" in row]
  if not rows:
    return None
  step, loss = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows], np.float64)
  pieces = np.array_split(np.arange(len(rows)), min(points, len(rows)))
  tail = loss[-max(5, len(loss) // 10) :]
  return [float(step[p].mean()) for p in pieces], [float(loss[p].mean()) for p in pieces], mean(tail)


def done_so_far(stage):
  """What an unfinished stage has on disk, in words."""
  parts = sorted(path.stem for path in stage.dir.glob("part-*.json"))
  if parts:
    return f"{len(parts)} of {int(parts[0].rpartition('-')[2])} parts"
  steps = _json_lines(stage.dir / "metrics.jsonl")
  return f"{steps[-1].get('step', len(steps))} steps" if steps else "begun"


def _shares(directory, r):
  """[(judgments part, [response parts])] with the same rows in the same order, or None before both are finished."""
  judgments, responses = (_parts(directory / f"round_{r:02d}" / name) for name in ("judgments", "responses"))
  if not judgments or not responses:
    return None
  return [(part, responses[i :: len(judgments)]) for i, part in enumerate(judgments)]


def _judged_share(judgments, responses):
  """(prompt ids, arrays) of one share."""
  keys, score, mass, entropy = [], [], [], []
  for batch in _batches([judgments], ["prompt_id", "sample_id", "score", "probs", "mass"]):
    keys += zip(batch.column("prompt_id").to_pylist(), batch.column("sample_id").to_pylist())
    score.append(_floats(batch.column("score")))
    mass.append(_floats(batch.column("mass")))
    probs = np.asarray(batch.column("probs").flatten(), np.float64).reshape(len(batch), -1)
    entropy.append(-np.sum(probs * np.log2(np.maximum(probs, 1e-30)), axis=1))
  others, length = [], []
  for batch in _batches(responses, ["prompt_id", "sample_id", "text"]):
    others += zip(batch.column("prompt_id").to_pylist(), batch.column("sample_id").to_pylist())
    length.append(_floats(pc.utf8_length(batch.column("text"))))
  if keys != others:
    raise ValueError(f"{judgments} does not hold the judgments of {', '.join(map(str, responses))} in their order")
  whole = lambda arrays: np.concatenate(arrays or [np.zeros(0)])
  arrays = {"score": whole(score), "mass": whole(mass), "entropy": whole(entropy), "length": whole(length)}
  return [prompt for prompt, _ in keys], arrays


def _margins(group, score):
  """Best minus second best score of every group of two or more."""
  order = np.lexsort((-score, group))
  group, score = group[order], score[order]
  first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
  first = first[np.r_[group, -1][first + 1] == group[first]]
  return score[first] - score[first + 1]


def _clustered(values, groups):
  """Mean over all values; the interval takes the values of a group together."""
  sums, sizes = np.bincount(groups, values), np.bincount(groups)
  centre, clusters = float(values.mean()), len(sizes)
  if clusters < 2:
    return Mean(centre, None, len(values))
  spread = math.sqrt(np.sum((sums - centre * sizes) ** 2) * clusters / (clusters - 1)) / len(values)
  return Mean(centre, 1.96 * spread, len(values))


def _selected_rows(parts, wanted, count):
  """{prompt id: (messages, selected text, score)} of the first `count` trainset rows whose prompt is wanted."""
  chosen = {}
  for path in parts:
    score, text = _trainset_columns(path)
    for batch in _batches([path], ["prompt_id", "messages", text, score]):
      for i, prompt in enumerate(batch.column("prompt_id").to_pylist()):
        if prompt in wanted:
          chosen[prompt] = tuple(batch.column(name)[i].as_py() for name in ("messages", text, score))
        if len(chosen) == count:
          return chosen
  return chosen


def _texts(parts, rows):
  """{row: text} for row numbers counted over all parts."""
  found, start = {}, 0
  for batch in _batches(parts, ["text"]):
    found |= {at: batch.column("text")[at - start].as_py() for at in rows if start <= at < start + len(batch)}
    start += len(batch)
    if len(found) == len(rows):
      break
  return found


def _trainset_columns(path):
  with pq.ParquetFile(path) as file:
    return ("chosen_score", "chosen") if "chosen" in file.schema_arrow.names else ("score", "response")


def _batches(paths, columns):
  for path in paths:
    with pq.ParquetFile(path) as file:
      yield from file.iter_batches(BATCH, columns=columns)


def _parts(stage):
  """The Parquet parts of a finished stage, or None."""
  found = _json(stage / "manifest.json")
  return None if found is None else [stage / part["name"] for part in found["parts"]]


def _floats(column):
  return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def _json(path):
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _json_lines(path):
  """The rows of a file that somebody may be writing: a broken line is left out."""
  rows = []
  if path.exists():
    with open(path, encoding="utf-8") as file:
      for line in file:
        try:
          rows.append(json.loads(line))
        except json.JSONDecodeError:
          continue
  return rows


def _number(text):
  try:
    return int(text)
  except ValueError:
    try:
      return float(text)
    except ValueError:
      return text


def _is_held(lock):
  """Whether somebody keeps touching the run's lock."""
  try:
    return time.time() - lock.stat().st_mtime < lock_file.SILENCE
  except FileNotFoundError:
    return False
