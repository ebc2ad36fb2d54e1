"""Every number of the report against plain Python on the same manifests and Parquet files."""

import collections
import html.parser
import json
import math
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_run import KINDS, make, vouched, written

from alma_jax.report import graded, judged
from alma_jax.store import runs, statistics
from alma_jax.store.records import Grade, Judgment, Response

METHODS = ("best_of_n", "dpo", "grpo")
AXES = (
  "score over round",
  "% ahead over round",
  "characters over round",
  "distribution of scores",
  "loss per step",
  "inertia per iteration",
)


@pytest.fixture(scope="module", autouse=True)
def without_syncing():
  """Waiting for the disk would be most of the tests' time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda handle: None)
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "whole"
  make(directory)
  return directory


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "copy")


# Every number that is shown


class Shown(html.parser.HTMLParser):
  """The texts of a page by section: sentences, cells, and what the charts say, without the numbers at their axes."""

  TEXTS = ("p", "h1", "h3", "li", "summary", "figcaption", "td", "th", "title", "text", "pre")

  def __init__(self, text):
    super().__init__()
    self.found, self.section, self.chart, self.text = collections.defaultdict(list), "head", "", None
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    of = dict(attributes)
    self.section = of["id"] if tag == "section" else self.section
    self.chart = of["aria-label"] if tag == "svg" else self.chart
    axis = self.chart in AXES and of.get("class") in ("quiet mid", "quiet end")
    if tag in self.TEXTS:
      self.text = None if axis else ""

  def handle_endtag(self, tag):
    if tag in self.TEXTS and self.text:
      self.found[self.section].append(" ".join(self.text.split()))
    self.text = None if tag in self.TEXTS else self.text

  def handle_data(self, data):
    if self.text is not None:
      self.text += data


def rows_of(run, name):
  """The rows of a stage's Parquet files as dicts."""
  manifest = json.loads((run / name / "manifest.json").read_text())
  return [row for part in manifest["parts"] for row in pq.read_table(run / name / part["name"]).to_pylist()]


def manifests(run):
  """{stage: manifest}, in the order in which the stages ended."""
  found = [json.loads(path.read_text()) for path in run.glob("**/manifest.json")]
  return {m["stage"]: m for m in sorted(found, key=lambda m: (m["finished_at"], m["stage"]))}


def told(values, digits=2, sign="", groups=None):
  """Mean and interval as the page writes them; the values of a group count together."""
  values = np.array(values, float)
  groups = range(len(values)) if groups is None else groups
  mean, sums = values.mean(), collections.defaultdict(float)
  for group, value in zip(groups, values, strict=True):
    sums[group] += value - mean
  spread = math.sqrt(sum(x * x for x in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)
  return f"{mean:{sign}.{digits}f} ± {1.96 * spread:.{digits}f}".replace("-", "−")


def correlated(x, y, groups):
  m = statistics.correlation(x, y, np.unique(groups, return_inverse=True)[1])
  return f"{m.value:.2f} ± {m.ci95:.2f}".replace("-", "−")


def mentioned(counts):
  return ", ".join(
    f"{k.replace('_', ' ')} {v:,.2f}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v:,}"
    for k, v in counts.items()
  )


def shares(counts, of, total):
  return [f"score {s}: {n / total:.1%} of {of} ({n} of {total})" for s, n in collections.Counter(counts).items()]


def evaluated(run, r):
  """prompt id -> the answer's row, with the score by each judge."""
  found = {row["prompt_id"]: row for row in rows_of(run, f"round_{r:02d}/eval")}
  for name in ("truth", "judge"):
    for row in rows_of(run, f"round_{r:02d}/eval.{name}"):
      found[row["prompt_id"]][name] = row["score"]
  return found


def told_of_progress(run):
  out = ["score", "round"]
  for title in ("truth", "judge"):
    scores = {r: [row[title] for row in evaluated(run, r).values()] for r in range(4)}
    name = f"{title} {np.mean(scores[3]):.2f}"
    out += [name, f"base, {title} {told(scores[0])}"]
    out += [f"{name}, round {r}: {told(scores[r])}" for r in (1, 2, 3)]
  out.remove("round")
  return [
    *out,
    "Mean score of the answers to 40 evaluation prompts, with 95 % intervals over the prompts."
    " Dashed, with its interval: the base model, 3-shot. Round 1 is the initial SFT.",
  ]


def told_of_rounds(run):
  out = ["round", "checkpoint", "n", "truth", "judge", "− base", "− round before", "judge ~ truth"]
  out += ["tokens", "characters", "finished"]
  answers = {r: evaluated(run, r) for r in range(4)}
  for r, rows in answers.items():
    values = {name: [row[name] for row in rows.values()] for name in ("truth", "judge", "tokens", "finished")}
    out += [f"{r}", f"m{r}", "40", told(values["truth"]), told(values["judge"])]
    if r:
      out.append(told([row["truth"] - answers[0][i]["truth"] for i, row in rows.items()], sign="+"))
    if r > 1:
      out.append(told([row["truth"] - answers[r - 1][i]["truth"] for i, row in rows.items()], sign="+"))
    out.append(correlated(values["judge"], values["truth"], list(rows)))
    characters = np.mean([len(row["response"]) for row in rows.values()])
    out += [f"{np.mean(values['tokens']):.1f}", f"{characters:.1f}", f"{np.mean(values['finished']):.1%}"]
  out += ["truth: truth 0123", "judge, which selects the training data: judge 0123"]
  truth = {r: [row["truth"] for row in rows.values()] for r, rows in answers.items()}
  best = max((1, 2, 3), key=lambda r: np.mean(truth[r]))
  words = f"Best round by truth, which selects nothing: {best} ({told(truth[best])}, n = 40)"
  if best == 3:
    return [*out, f"{words}, the last one."]
  ahead = np.array(truth[best]) - np.array(truth[3])
  differs = "differs from" if ahead.mean() > 1.96 * ahead.std(ddof=1) / math.sqrt(40) else "cannot be told from"
  return [*out, f"{words}; it {differs} the last, 3: {told(ahead, sign='+')}."]


def told_of_answers(run):
  answers = {r: evaluated(run, r) for r in range(4)}
  out = ["% ahead", "as often as not", "judge", "round", "n", "ahead", "won / tied / lost"]
  for name in ("truth", "judge"):
    signs = {r: [np.sign(row[name] - answers[1][id][name]) for id, row in answers[r].items()] for r in (2, 3)}
    ahead = {r: [50 * (sign + 1) for sign in signs[r]] for r in signs}
    line = f"{name} {np.mean(ahead[3]):.0f} %"
    out.append(line)
    for r in (2, 3):
      won, tied, lost = (signs[r].count(sign) for sign in (1, 0, -1))
      shown = told(ahead[r], digits=1).replace(" ±", " % ±")
      out += [name, f"{r}", "40", shown, f"{won} / {tied} / {lost}", f"{line}, round {r}: {told(ahead[r])}"]
  changes = {id: row["truth"] - answers[1][id]["truth"] for id, row in answers[3].items()}
  why = {id: "at random" for id in sorted(changes)[:4]}
  for word, pick in (("lost", min), ("gained", max)):
    id = pick(changes, key=changes.get)
    why[id] = f"{word} most from round 1 to round 3 by truth, {changes[id]:+.2f}".replace("-", "−")
  for id, said in why.items():
    out += [f"ask {id[1:]} ({said})", f"ask {id[1:]}"]
    for r, rows in answers.items():
      out.append(f"round {r}: truth {rows[id]['truth']:.2f}, judge {rows[id]['judge']:.2f}")
      out += [rows[id]["response"]] if rows[id]["response"] else []
  return [
    *out,
    "On how many prompts of data.eval a judge scores the answer above that of round 1, with 95 % intervals over the"
    " prompts; equal scores are a tie, which counts half.",
  ]


def told_of_selection(run, method):
  out = ["round", "prompts", "responses", "prompts selected", "not selected", "gain of selection", "best − second"]
  out += ["best tied", "Judge's scores: ■ all responses, ■ the selected"]
  out += ["Which checkpoint wrote the selected responses"] if method != "dpo" else []
  for r in (2, 3):
    scores = collections.defaultdict(list)
    for row in rows_of(run, f"round_{r:02d}/judgments"):
      scores[row["prompt_id"]].append(row["score"])
    all_scores = [score for group in scores.values() for score in group]
    chosen = rows_of(run, f"round_{r:02d}/trainset")
    selected = [row["chosen_score" if method == "dpo" else "score"] for row in chosen]
    best = {}
    for row, score in zip(chosen, selected, strict=True):
      best[row["prompt_id"]] = max(score, best.get(row["prompt_id"], -1.0))
    ranked = [sorted(group, reverse=True) for group in scores.values()]
    gains = [score - np.mean(scores[i]) for i, score in best.items()]
    what = "trained on" if method == "grpo" else "selected"
    out.append(
      f"Round {r}: 60 responses, {len(chosen)} {what}; mean {np.mean(all_scores):.2f} → {np.mean(selected):.2f}"
    )
    out += shares([int(x + 0.5) for x in all_scores], "all responses", 60)
    out += shares([int(x + 0.5) for x in selected], "the selected", len(chosen))
    out += [f"{r}", "12", "60", "10", "no finished response 2", f"{told(gains, sign='+')} (n = 10)"]
    out += [told([x[0] - x[1] for x in ranked]), f"{np.mean([x[0] == x[1] for x in ranked]):.1%}"]
    if method != "dpo":
      sources = collections.Counter(row["source"] for row in chosen)
      out += [f"round {r}", f"n = {len(chosen)}"]
      for source, name in (("sft_1", "sft_1"), (f"round_{r - 1:02d}/policy", "policy of the round before")):
        n, share = sources[source], sources[source] / len(chosen)
        out += [f"round {r}, {name}: {n} of {len(chosen)} ({share:.0%})"] if n else []
        out += [f"{share:.0%}"] if share * 610 > 40 else []
  out += ["sft_1", "policy of the round before"] if method != "dpo" else []
  graded = " Where all responses to a prompt are trained on, the best of them counts." if method == "grpo" else ""
  return [
    *out,
    "Gain: judge's score of the selected response minus the mean over its prompt's responses." + graded
    + " A best response is tied where another one to the prompt has the same score, as equal texts do.",
  ]  # fmt: skip


def told_of_length(run, method):
  out = ["characters", "sampled", "selected", "answers, evaluation", "round", "n", "score ~ length"]
  out += ["the same within prompts", "mass on the scores", "entropy, bits"]
  for r in range(4):
    lengths = [len(row["response"]) for row in rows_of(run, f"round_{r:02d}/eval")]
    out.append(f"answers, evaluation, round {r}: {told(lengths)}")
  for r in (2, 3):
    text = {(x["prompt_id"], x["sample_id"]): x["text"] for x in rows_of(run, f"round_{r:02d}/responses")}
    rows = rows_of(run, f"round_{r:02d}/judgments")
    prompts, scores = [x["prompt_id"] for x in rows], np.array([x["score"] for x in rows])
    lengths = np.array([len(text[x["prompt_id"], x["sample_id"]]) for x in rows])
    chosen = rows_of(run, f"round_{r:02d}/trainset")
    selected = [len(x["chosen" if method == "dpo" else "response"]) for x in chosen]
    out.append(f"sampled, round {r}: {told(lengths, groups=prompts)}")
    out.append(f"selected, round {r}: {told(selected, groups=[x['prompt_id'] for x in chosen])}")
    centred = []
    for values in (scores, lengths):
      means = {p: np.mean([v for v, q in zip(values, prompts, strict=True) if q == p]) for p in prompts}
      centred.append([v - means[p] for v, p in zip(values, prompts, strict=True)])
    entropy = [-sum(p * math.log2(p) for p in x["probs"]) for x in rows]
    out += [f"{r}", "60", correlated(scores, lengths, prompts), correlated(*centred, prompts)]
    out += [told([x["mass"] for x in rows], 3, groups=prompts), told(entropy, groups=prompts)]
  return [
    *out,
    "Mean length of a response, with 95 % intervals over prompts.",
    "score ~ length: correlation of the judge's score with the number of characters, over all sampled responses and"
    " around each prompt's means; beyond ± 0.3 it is marked. Mass: the probability that the judge gives to its scores"
    " together; below 0.9 its prompt template does not fit the model. Entropy of its distribution over them: 0 to 3.46"
    " bits. Intervals take the responses to a prompt together.",
  ]


def told_of_judge(run):
  tuned, distilled = manifests(run)["judge"]["counts"], manifests(run)["judge_distilled"]
  held, n = distilled["held_out"], distilled["counts"]["examples"]
  change = f"{held['after'] - held['before']:+.3f}".replace("-", "−")
  return [
    f"Fine-tuned on {tuned['annotations']} annotations in {tuned['steps']} steps;"
    f" {tuned['held_out']} more were held out.",
    "Pairs of held-out annotations in the right order",
    *("fine-tuned", f"{held['before']:.3f} ± {held['before_ci95']:.3f}"),
    *("distilled", f"{held['after']:.3f} ± {held['after_ci95']:.3f}"),
    f"The distilled judge ({n:,} examples of its own scores) is accepted: the rounds use it"
    f" ({change} ± {held['change_ci95']:.3f}, n = {held['rows']} annotations, {held['pairs']} pairs)."
    f" {distilled['reason']}.",
    *told_of_quality(run),
  ]


def quality(run):
  """The sentence about the judge under everything that shows its scores."""
  (q,) = manifests(run)["judge_quality"]["quality"]
  agreement, error, rank = ({**q[name]} for name in ("agreement", "error", "spearman"))
  return (
    f"orders {agreement['value']:.3f} ± {agreement['ci95']:.3f} of {agreement['n']} held-out pairs as the annotators"
    f" did, mean error {error['value']:.2f} ± {error['ci95']:.2f} of 10, Spearman {rank['value']:.2f} ±"
    f" {rank['ci95']:.2f} (n = {q['rows']} annotations; {q['judge']})."
  )


def told_of_quality(run):
  (q,) = manifests(run)["judge_quality"]["quality"]
  out = ["Measured on held-out annotations", f"The judge of the rounds {quality(run)}"]
  out += ["the judge's score", "annotations", "its mean", "the annotators' mean"]
  for b in q["calibration"]:
    out += [f"{b['low']:g} to {b['high']:g}", f"{b['rows']}", f"{b['score']:.2f}", f"{b['label']:.2f}"]
  entropy = f"{q['entropy']:.2f} bits on average; the annotations' scores together {q['entropy_of_labels']:.2f}"
  return [
    *out,
    f"Calibration: the two means lie {q['calibration_error']:.2f} apart, averaged over the annotations. Entropy of the"
    f" judge's distributions: {entropy}.",
  ]


def told_of_training(run):
  out = ["Loss per step."]
  for name, manifest in manifests(run).items():
    path = run / name / "metrics.jsonl"
    if path.exists():
      loss = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
      n = manifest["counts"]["examples"]
      out += ["1", f"{name}: {np.mean(loss[-5:]):.3f} at the end (mean of 5 steps); {n:,} examples"]
  return out


def told_of_time(run):
  spent, out = collections.defaultdict(list), []
  for name, manifest in manifests(run).items():
    round, _, stage = name.rpartition("/")
    spent[f"rounds: {stage}" if round.startswith("round_") else name].append(manifest["seconds"])
  total = sum(map(sum, spent.values()))
  for name, seconds in spent.items():
    times = f", {len(seconds)} times" if len(seconds) > 1 else ""
    out += [name, f"{sum(seconds):.1f} s ({sum(seconds) / total:.0%}){times}"]
  return [*out, f"All finished stages together: {total:.1f} s."]


def told_of_examples(run, method):
  out, word = [], "best" if method == "grpo" else "selected"
  for r in (2, 3):
    share, of = {}, collections.defaultdict(list)
    for part in (0, 3):  # two checkpoints wrote the responses of the first share
      path = run / f"round_{r:02d}/responses/part-{part:05d}-of-00006.parquet"
      share |= {(x["prompt_id"], x["sample_id"]): x["text"] for x in pq.read_table(path).to_pylist()}
    for row in rows_of(run, f"round_{r:02d}/judgments"):
      if (row["prompt_id"], row["sample_id"]) in share:
        of[row["prompt_id"]].append((row["score"], share[row["prompt_id"], row["sample_id"]]))
    best = {}
    for x in rows_of(run, f"round_{r:02d}/trainset"):
      score, text = (x["chosen_score"], x["chosen"]) if method == "dpo" else (x["score"], x["response"])
      if x["prompt_id"] in of:
        best[x["prompt_id"]] = max(best.get(x["prompt_id"], (-1.0, "", "")), (score, text, x["messages"][0]["content"]))
    out.append(f"Round {r}: 3 prompts, {word} and lowest response")
    for prompt, (score, text, asked) in list(best.items())[:3]:
      low, worst = min(of[prompt])
      out += [
        asked,
        f"{word} of {len(of[prompt])} responses, judge {score:.2f}",
        text,
        f"lowest, judge {low:.2f}",
        worst,
      ]
  return [" ".join(text.split()) for text in out]


def told_of_data(run):
  found, out = manifests(run), ["file", "rows", "kept", "duplicate", "stage", "records", "counts", "time"]
  for file, counts in found["seeds"]["counts"].items():
    out += [file, *(f"{counts[name]}" for name in ("rows", "kept", "duplicate") if name in counts)]
  for name, manifest in found.items():
    counts = {k: v for k, v in manifest["counts"].items() if not isinstance(v, dict)}
    out += [name, f"{manifest['rows']}", mentioned(counts), f"{manifest['seconds']:.1f} s"]
  return [text for text in [*out, "Every finished stage"] if text]


def told_of_pool(run):
  found = manifests(run)
  counts = collections.Counter()
  for name in ("pool", "pool_03"):
    counts.update(found[f"{name}/drafts"]["counts"])
    counts.update(found[f"{name}/prompts"]["counts"])
  draws, usable, unique = (counts.pop(name) for name in ("draws", "usable", "unique"))
  assert (usable, unique) == (draws - counts["cut_off"], 34)
  steps = {"drawn": draws} | {f"− {k.replace('_', ' ')}": n for k, n in counts.items()} | {"in the pool": unique}
  out = [text for name, n in steps.items() for text in (name, f"{n} ({n / draws:.1%})")]
  out += ["Prompts that were added", "drawn", "new in the pool", "share"]
  out += ["at first", "50", "30", "60.0%", "round 3", "20", "4", "20.0%"]
  sizes = np.bincount(np.concatenate([np.load(run / f"{name}/clusters/labels.npy") for name in ("pool", "pool_03")]))
  out.append("Sizes of the clusters")
  for low, high, name in (
    (1, 1, "1 prompt"),
    (2, 2, "2 prompts"),
    (3, 4, "3 to 4 prompts"),
    (5, 8, "5 to 8 prompts"),
    (9, 16, "9 to 16 prompts"),
    (17, 32, "17 to 32 prompts"),
  ):
    n = int(((sizes >= low) & (sizes <= high)).sum())
    if low <= sizes.max():
      out += [name, f"{n} cluster{'s' * (n != 1)}"]
  report, points = json.loads((run / "pool/clusters/report.json").read_text()), found["pool/projection"]["counts"]
  inertia = [x / report["trained_on"] for x in report["inertia"]]
  out += [
    f"{len(sizes)} clusters of {sizes.sum()} prompts: median {np.median(sizes):g}, largest {sizes.max()}, of one prompt"
    f" {(sizes == 1).sum()}. Balance {report['balance']:.2f}: a prompt's cluster is that many times as large as the"
    f" mean one. Points have {points['dimensions']} dimensions with {points['variance_kept']:.1%} of the variance, as"
    f" seen in {points['sample']} prompts.",
    "1",
    f"Mean squared distance to the centroid, iteration by iteration: {inertia[0]:.3f} → {inertia[-1]:.3f}",
    *("Used", "round", "prompts in the pool", "prompts drawn", "from clusters", "prompts left"),
  ]
  drawn = 0
  for r, there in ((2, 30), (3, 34)):
    m = found[f"round_{r:02d}/prompts"]
    drawn += m["rows"]
    out += [f"{r}", f"{there}", f"{m['rows']}", f"{m['counts']['clusters_drawn']}", f"{there - drawn}"]
  reports = {name: json.loads((run / name / "prompts/report.json").read_text()) for name in ("pool", "pool_03")}
  near = sorted(reports["pool"]["near_duplicates"], key=lambda x: x["similarity"])
  out += [f"Near-duplicates: {len(near)} of them, the least similar first", "removed", "like this one, which stays"]
  out += ["of what kind", "similarity"]
  out += [
    text for x in near for text in (x["removed"], x["kept"], x["near"].replace("_", " "), f"{x['similarity']:.3f}")
  ]
  met = reports["pool"]["contamination"]
  named = {"demonstrations": met["demonstration"], "annotations": met["annotation"], "pool": met["pool"]}
  named["pool, added for round 3"] = reports["pool_03"]["contamination"]["pool"]
  out += ["Evaluation prompts that occur elsewhere", "Examples", "evaluation prompts met", "equal texts"]
  out += ["texts with 8 words in common", "evaluation prompt", "text", "in common", "in", "in"]
  for name, x in named.items():
    out += [name, f"{x['prompts_met']:,}", f"{x['equal']:,}", f"{x['overlapping']:,}"]
    out += [text for example in x["examples"] for text in (name, example["prompt"], example["text"], example["run"])]
  return [
    *out,
    f"Of {met['pool']['prompts']} evaluation prompts {met['pool']['short']} have fewer than 8 words: these are found"
    " only where a text equals them. Equal prompts never enter the pool.",
  ]


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_the_page_is_that_of_the_files(tmp_path, method):
  make(tmp_path, method=method)
  shown = Shown(written(tmp_path)).found
  expected = {
    "progress": told_of_progress(tmp_path),
    "rounds": [*told_of_rounds(tmp_path), ROUNDS],
    "answers": told_of_answers(tmp_path),
    "selection": told_of_selection(tmp_path, method),
    "length": told_of_length(tmp_path, method),
    "judge": told_of_judge(tmp_path),
    "pool": told_of_pool(tmp_path),
    "training": told_of_training(tmp_path),
    "time": told_of_time(tmp_path),
    "examples": told_of_examples(tmp_path, method),
    "data": told_of_data(tmp_path),
    "config": ["config.json", " ".join((tmp_path / "config.json").read_text().split())],
  }
  log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  at = log[-1]["time"].replace("T", " ").replace("+00:00", " UTC")
  head = [f"alma · {tmp_path.name}", "ALMA · model <m>", "finished · round 3 of 3"]
  expected["head"] = [*head, f"{tmp_path} · 1 × cpu · 1 host · jax 0.0 · as of {at}"]
  assert shown.keys() == expected.keys()
  for section in ("progress", "rounds", "answers", "selection", "length", "examples"):
    expected[section].append(f"The run's judge {quality(tmp_path)}")
  for section, texts in expected.items():
    assert sorted(shown[section]) == sorted(texts), section


ROUNDS = (
  "Scores are means ± 95 % intervals over the n prompts. Differences (− base, − round before) are of the truth's"
  " score, prompt by prompt: compare rounds by these, not by whether the intervals overlap. judge ~ truth:"
  " correlation of the two scores over the prompts. Tokens and characters: mean length of an answer."
)


# The numbers of a round


@pytest.mark.parametrize("method", METHODS)
def test_a_rounds_numbers_equal_a_loop_over_its_records(tmp_path, method):
  make(tmp_path, method=method)
  found = judged.read(tmp_path, 2)
  text = {(x.prompt_id, x.sample_id): x.text for x in runs.read_stage(tmp_path / "round_02/responses", Response)}
  of = collections.defaultdict(list)
  for j in runs.read_stage(tmp_path / "round_02/judgments", Judgment):
    of[j.prompt_id].append((j.score, len(text[j.prompt_id, j.sample_id]), j.mass, j.probs))
  rows = [row for group in of.values() for row in group]
  chosen = runs.read_stage(tmp_path / "round_02/trainset", KINDS[method])
  texts = [
    (x.prompt_id, x.chosen_score, x.chosen) if method == "dpo" else (x.prompt_id, x.score, x.response) for x in chosen
  ]
  best = {i: max(score for j, score, _ in texts if j == i) for i, _, _ in texts}
  gains = [score - np.mean([s for s, *_ in of[i]]) for i, score in best.items()]
  ranked = [sorted((s for s, *_ in group), reverse=True) for group in of.values()]

  j = found.judged
  assert (j.n, j.total, j.prompts, j.gain.n, found.selected.n) == (60, 60, 12, 10, len(chosen))
  assert j.scores.value == pytest.approx(np.mean([s for s, *_ in rows]))
  assert j.gain.value == pytest.approx(np.mean(gains))
  assert j.gain.ci95 == pytest.approx(1.96 * np.std(gains, ddof=1) / math.sqrt(10))
  assert j.length.value == pytest.approx(np.mean([n for _, n, _, _ in rows]))
  assert found.selected.length.value == pytest.approx(np.mean([len(text) for *_, text in texts]))
  assert found.selected.scores.value == pytest.approx(np.mean([score for _, score, _ in texts]))
  assert found.selected.graded == (method == "grpo")
  assert j.mass.value == pytest.approx(np.mean([m for _, _, m, _ in rows]))
  assert j.entropy.value == pytest.approx(np.mean([-sum(p * math.log2(p) for p in ps) for *_, ps in rows]))
  assert j.most_entropy == pytest.approx(math.log2(11))
  assert j.margin.value == pytest.approx(np.mean([x[0] - x[1] for x in ranked]))
  assert j.tied == pytest.approx(np.mean([x[0] == x[1] for x in ranked]))
  assert j.correlation.value == pytest.approx(np.corrcoef([r[0] for r in rows], [r[1] for r in rows])[0, 1])
  centred = [
    (s - np.mean([g[0] for g in group]), n - np.mean([g[1] for g in group]))
    for group in of.values()
    for s, n, *_ in group
  ]
  assert j.correlation_within.value == pytest.approx(np.corrcoef(np.array(centred).T)[0, 1])


def test_differences_of_rounds_are_taken_prompt_by_prompt(finished):
  scores = {}
  for r in (0, 3):
    records = runs.read_stage(finished / f"round_{r:02d}/eval.truth", Grade)
    scores[r] = {x.prompt_id: x.score for x in records}
  differences = [scores[3][i] - scores[0][i] for i in scores[0]]
  found = graded.difference(graded.read(finished, 3), graded.read(finished, 0), "truth")
  assert found.n == 40
  assert found.value == pytest.approx(np.mean(differences))
  assert found.ci95 == pytest.approx(1.96 * np.std(differences, ddof=1) / math.sqrt(40))
  assert f"{found.value:+.2f} ± {found.ci95:.2f}" in written(finished)


def test_a_large_round_is_read_in_whole_shares(finished, monkeypatch):
  monkeypatch.setattr(judged, "ROWS", 25)
  found = judged.read(finished, 2)
  assert (found.judged.n, found.judged.total, found.judged.prompts) == (20, 60, 4)
  assert found.selected.n == sum(found.histogram.selected) == 10  # the trainset is counted whole
  assert '<td class="n">20 of 60</td>' in written(finished)


def test_of_a_large_share_whole_prompts_are_kept(finished, monkeypatch):
  monkeypatch.setattr(judged, "ROWS", 10)  # half of a share
  monkeypatch.setattr(judged, "BATCH", 7)  # prompts go over the ends of batches
  found = judged.read(finished, 2).judged
  text = {(x.prompt_id, x.sample_id): x.text for x in runs.read_stage(finished / "round_02/responses", Response)}
  share = runs.read_stage(finished / "round_02/judgments", Judgment, part=0)
  kept = list(dict.fromkeys(j.prompt_id for j in share))[::2]
  of = [(j.score, len(text[j.prompt_id, j.sample_id])) for j in share if j.prompt_id in kept]
  assert (found.n, found.prompts) == (10, 2)
  assert (found.scores.value, found.length.value) == pytest.approx(tuple(np.mean(of, axis=0)))


def test_responses_in_another_order_than_their_judgments_are_refused(copy):
  # Two parts of equal prompts and sizes change places: without a check, scores and lengths would be mixed up.
  parts = sorted((copy / "round_02/responses").glob("*.parquet"))
  text = parts[0].read_bytes()
  parts[0].write_bytes(parts[3].read_bytes())
  parts[3].write_bytes(text)
  vouched(copy / "round_02/responses")
  found = judged.read(copy, 2)
  assert found.judged is None and "in their order" in found.damage[0]
  assert "Round 2 cannot be read" in written(copy)


# Judges of other kinds


def with_scores(run, scale, change, probs=True):
  """Changes the judgments of round 2 to those of a judge with another scale, perhaps without probabilities."""
  directory = run / "round_02/judgments"
  manifest = json.loads((directory / "manifest.json").read_text())
  for part in manifest["parts"]:
    table = pq.read_table(directory / part["name"])
    columns = {name: table.column(name) for name in table.column_names}
    columns["score"] = pa.array([change(x) for x in columns["score"].to_pylist()])
    if not probs:
      columns["probs"] = pa.array([None] * len(table), pa.list_(pa.float64()))
      columns["mass"] = pa.array([None] * len(table), pa.float64())
    pq.write_table(pa.table(columns), directory / part["name"])
  if scale is None:
    del manifest["counts"]["histogram"]
  manifest["counts"]["score_sum"] = change(manifest["counts"]["score_sum"] / 60) * 60  # the change is linear
  vouched(directory, counts=manifest["counts"], judge={"identity": "other", "scale": scale})
  for part in json.loads((run / "round_02/trainset/manifest.json").read_text())["parts"]:
    table = pq.read_table(run / "round_02/trainset" / part["name"])
    at, scores = table.column_names.index("score"), [change(x) for x in table.column("score").to_pylist()]
    pq.write_table(table.set_column(at, "score", pa.array(scores)), run / "round_02/trainset" / part["name"])
  vouched(run / "round_02/trainset")


def test_a_scale_from_0_to_1_has_its_own_marks(copy):
  before = judged.read(copy, 2)
  with_scores(copy, [0.0, 1.0], lambda x: x / 10)
  found, text = judged.read(copy, 2), written(copy)
  assert found.histogram.names == ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]
  assert (found.histogram.sampled, found.histogram.selected) == (before.histogram.sampled, before.histogram.selected)
  assert found.judged.margin.value == pytest.approx(before.judged.margin.value / 10)
  assert f"mean {before.judged.scores.value / 10:.3f} → {before.selected.scores.value / 10:.3f}" in text  # more digits
  assert f"{before.judged.gain.value / 10:+.3f} ± {before.judged.gain.ci95 / 10:.3f} (n = 10)" in text


def test_a_judge_without_ends_and_probabilities_has_a_page(copy):
  with_scores(copy, None, lambda x: 3 * x - 20, probs=False)
  found, text = judged.read(copy, 2), written(copy)
  scores = [row["score"] for row in rows_of(copy, "round_02/judgments")]
  assert found.scale is None and found.judged.mass is None and found.judged.entropy is None
  assert found.histogram.names[0] == f"{min(scores):.3g}" and found.histogram.names[-1] == f"{max(scores):.3g}"
  width = (max(scores) - min(scores)) / 10
  marks = collections.Counter(int((score - min(scores)) / width + 0.5) for score in scores)
  assert found.histogram.sampled == [marks[mark] for mark in range(11)] and sum(found.histogram.selected) == 10
  assert f"mean {np.mean(scores):.2f} → ".replace("-", "−") in text
  assert not any(phrase in text for phrase in ("could not be made", "cannot be read", "Little mass", "nan"))
  assert "mass on the scores" in text  # of round 3
  shutil.rmtree(copy / "round_03")
  assert "mass on the scores" not in written(copy)


def test_scores_without_probabilities_beside_others_are_left_out_of_the_mass(copy):
  path = next((copy / "round_02/judgments").glob("part-00001-*.parquet"))
  table = pq.read_table(path)
  columns = {name: table.column(name).to_pylist() for name in table.column_names}
  gone = range(0, len(table), 2)
  for name in ("probs", "mass"):
    columns[name] = [None if i in gone else x for i, x in enumerate(columns[name])]
  shape = pa.schema([(f.name, f.type) for f in table.schema])
  pq.write_table(pa.table(columns, schema=shape), path)
  vouched(path.parent)
  found = judged.read(copy, 2).judged
  rows = [row for row in rows_of(copy, "round_02/judgments") if row["mass"] is not None]
  assert found.n == 60 and found.mass.n == found.entropy.n == len(rows) == 50
  assert found.mass.value == pytest.approx(np.mean([row["mass"] for row in rows]))
  assert found.entropy.value == pytest.approx(np.mean([-sum(p * math.log2(p) for p in row["probs"]) for row in rows]))
