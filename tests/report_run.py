"""A run directory as the report reads it, made of random records without any model."""

import collections
import json
import math

import numpy as np

from alma_jax.report import page
from alma_jax.store import digests, runs
from alma_jax.store.records import Answer, Example, Grade, Graded, HeldOut, Judgment, Pair, Prompt, Response

NASTY = "<script>alert('x')</script> & <b>"
MOMENTS = ("nothing", "seeds", "pool", "judge", "base", "sampled", "judged", "selected", "trained", "all")
KINDS = {"best_of_n": Example, "dpo": Pair, "grpo": Graded}


def overlapping(prompts, short, equal, overlapping, met, *examples):
  names = ("prompts", "short", "equal", "overlapping", "prompts_met", "examples")
  return dict(zip(names, (prompts, short, equal, overlapping, met, examples), strict=True))


LIKE = {"removed": f"{NASTY} in a pool", "near": "eval_prompt", "kept": f"{NASTY} in the pool", "similarity": 0.8125}
QUALITY = {
  "judge": f"own {NASTY}",
  "rows": 26,
  "prompts": 25,
  "agreement": {"value": 0.75, "ci95": 0.0625, "n": 310},
  "spearman": {"value": 0.5, "ci95": 0.25, "n": 26},
  "error": {"value": 1.5, "ci95": 0.375, "n": 26},
  "calibration": [{"low": 0.0, "high": 2.0, "rows": 26, "score": 1.25, "label": 2.75}],
  "calibration_error": 1.5,
  "entropy": 1.75,
  "entropy_of_labels": 3.25,
  "deviation": 2.0,
}
RUN = {"id": "p01", "text": f"a text {NASTY} here", "prompt": f"a prompt {NASTY} there", "run": NASTY}
REPORT = {
  "contamination": {
    "demonstration": overlapping(40, 11, 0, 2, 1, RUN),
    "annotation": overlapping(40, 11, 0, 0, 0),
    "pool": overlapping(40, 11, 0, 1234, 38),
  },
  "near_duplicates": [LIKE, {"removed": "one", "near": "duplicate", "kept": "two", "similarity": 0.75}],
}


def pool_of(numbers):
  return [Prompt(f"p{i:02d}", (turn(f"{NASTY} {i}"),), "synthetic", min(i % 7, 3)) for i in numbers]


def vouched(stage, **changes):
  """Makes the manifest of a stage whose files a test has changed fit them, and changes its fields."""
  manifest = json.loads((stage / "manifest.json").read_text()) | changes
  for part in manifest["parts"]:
    part.update(digests.of_file(stage / part["name"]).fields())
  (stage / "manifest.json").write_text(json.dumps(digests.sealed(manifest)))


def make(directory, until="all", mass=0.97, method="best_of_n", graded=True):
  """A run of two feedback rounds, 12 prompts each, 5 responses a prompt, in 3 shares; cut off at a moment."""
  random, at = np.random.default_rng(0), MOMENTS.index(until)
  config = {"recipe": "alma", "feedback_rounds": 2, "eval": {"shots": 3}, "model": {"path": "<m>"}}
  with runs.Run(directory) as run:
    run.save_config(config)
    run.log("start", devices=["cpu"], hosts=1, jax="0.0")

    def stage(name, kind=None, parts=(), moment=0, counts=None, files=None, **extra):
      if at < moment:
        return
      made = run.stage(name, {"name": name})
      for i, (records, sums) in enumerate(parts):
        made.write_part(i, len(parts), records, kind, sums)
      for file, text in (files or {}).items():
        (made.dir / file).write_text(text)
      made.finish(counts=counts or {}, files=list(files or {}), **extra)

    def clusters(name, moment, labels, report=None):
      if at >= moment:
        made = run.stage(name, {"name": name})
        np.save(made.dir / "labels.npy", np.array(labels, np.int32))
        if report:
          (made.dir / "report.json").write_text(json.dumps(report))
        made.finish(files=["labels.npy"])

    def training(name, moment, counts, **extra):
      rows = "\n".join(json.dumps({"step": i + 1, "loss": 2.0 / (i + 1)}) for i in range(12))
      stage(name, moment=moment, counts={"steps": 12, **counts}, files={"metrics.jsonl": rows}, **extra)

    def evaluation(r, moment, shift):
      answers, scores = [], {"truth": [], "judge": []}
      for i in range(40):
        text, judged = "x" * (i + r), float(np.clip(random.normal(5 + shift, 2), 0, 10))
        scores["judge"].append(judged)
        scores["truth"].append(float(np.clip(judged + random.normal(), 0, 10)) if graded else None)
        answers.append(Answer(f"e{i}", (turn(f"ask {i}"),), text, i + r, i > 2))
      place = f"round_{r:02d}/eval"
      stage(place, Answer, [(answers[:20], {}), (answers[20:], {})], moment)
      row = {"round": r, "checkpoint": f"m{r}", "n": 40, "tokens": float(np.mean([x.tokens for x in answers]))}
      row["finished"] = np.mean([x.finished for x in answers])
      for name in (*(["truth"] if graded else []), "judge"):
        values = np.array(scores[name])
        grades = [Grade(x.prompt_id, v) for x, v in zip(answers, values.tolist(), strict=True)]
        judge = {"name": name, "identity": f"{name} 0123", "scale": [0.0, 10.0], "selects": name == "judge"}
        stage(f"{place}.{name}", Grade, [(grades[:20], {}), (grades[20:], {})], moment, judge=judge)
        row |= {name: values.mean(), f"{name}_ci95": 1.96 * values.std(ddof=1) / math.sqrt(40)}
      if at >= moment:
        run.progress(row)

    read = {"rows": 9, "kept": 7, "duplicate": 2}
    stage("seeds", moment=1, counts={"sft": read, "eval": {"rows": 40, "kept": 40}})
    drafts, pool = pool_of(range(30)), pool_of(range(30))
    stage("pool/drafts", Prompt, [(drafts, {"draws": 50, "usable": 42, "cut_off": 8})], 2)
    counts = {"duplicate": 8, "near_duplicate": 3, "near_eval_prompt": 1, "unique": 30}
    stage("pool/prompts", Prompt, [(pool, counts)], 2, files={"report.json": json.dumps(REPORT)})
    facts = {"sample": 29, "dimensions": 4, "variance_kept": 0.875}
    stage("pool/projection", Prompt, [([], facts)], 2)
    clustering = {"inertia": [36.0, 15.0, 12.0], "trained_on": 30, "balance": 1.25}
    clusters("pool/clusters", 2, [min(i % 7, 3) for i in range(30)], clustering)
    more = pool_of(range(30, 34))
    stage("pool_03/drafts", Prompt, [(more, {"draws": 20, "usable": 20})], MOMENTS.index("all"))
    counts = {"duplicate": 9, "equals_prompt_of_pool": 7, "unique": 4}
    later = {"contamination": REPORT["contamination"], "near_duplicates": []}
    stage("pool_03/prompts", Prompt, [(more, counts)], MOMENTS.index("all"), files={"report.json": json.dumps(later)})
    clusters("pool_03/clusters", MOMENTS.index("all"), [0, 0, 0, 3])
    training("judge", 3, {"annotations": 230, "held_out": 26, "examples": 229})
    held = {"rows": 26, "pairs": 310, "before": 0.75, "before_ci95": 0.1, "after": 0.5, "after_ci95": 0.125}
    held |= {"change": -0.25, "change_ci95": 0.0625}
    reason = f"taken: {NASTY}"
    training("judge_distilled", 3, {"examples": 1234}, held_out=held, accepted=True, reason=reason)
    stage("judge_quality", HeldOut, [([], {})], 3, quality=[QUALITY])
    for r in (0, 1):
      evaluation(r, 4, r)
    for r in (2, 3):
      prompts = pool[12 * (r - 2) : 12 * (r - 1)]
      later = MOMENTS.index("all") if r == 3 else 0
      stage(f"round_{r:02d}/prompts", Prompt, [(prompts, {"clusters_drawn": 4})], max(5, later))
      responses, judgments, chosen, skipped = responses_of(prompts, r, random, mass, method)
      stage(f"round_{r:02d}/responses", Response, responses, max(5, later))
      stage(f"round_{r:02d}/judgments", Judgment, judgments, max(6, later))
      sums = {"selected": 12 - skipped, "no_finished_response": skipped, "judge_gain_sum": 1.0, "prompts_kept": 10}
      stage(f"round_{r:02d}/trainset", KINDS[method], [(chosen, sums)], max(7, later))
      if method == "dpo":
        stage(f"round_{r:02d}/reference_sft_1", moment=max(8, later), counts={"pairs": len(chosen)})
      training(f"round_{r:02d}/policy", max(8, later), {"examples": 7 + r})
      evaluation(r, 9, r)
    if until == "all":
      run.log("end", seconds=1.0)


def responses_of(prompts, r, random, mass, method):
  """Parts of responses (two checkpoints by three shares) and judgments (three shares), what is trained on, and the
  number of prompts without it."""
  responses, judgments, chosen, skipped = collections.defaultdict(list), collections.defaultdict(list), [], 0
  for k, prompt in enumerate(prompts):
    rows = []
    for checkpoint in (0, 1):
      for sample in range(checkpoint, 5, 2):
        text = f"{NASTY} {'w' * int(random.integers(1, 40))} {sample}"
        name = "sft_1" if checkpoint == 0 else f"round_{r - 1:02d}/policy"
        responses[checkpoint * 3 + k % 3].append(Response(prompt.id, sample, name, text, (1, 2), True, -1.0))
        probs = random.dirichlet(np.ones(11))
        score = 5.0 if sample in (0, 1) and k == 4 else float(probs @ np.arange(11))
        judgment = Judgment(prompt.id, sample, score, tuple(probs), mass + 0.001 * sample)
        judgments[checkpoint * 3 + k % 3].append(judgment)
        rows.append((score, text, name))
    high, low = max(rows), min(rows)
    if k % 6 == 5:  # two prompts without a selected response
      skipped += 1
    elif method == "dpo":
      chosen.append(Pair(prompt.id, prompt.messages, high[1], low[1], high[0], low[0], r))
    elif method == "grpo":
      for sample, (score, text, name) in enumerate(rows):
        chosen.append(Graded(prompt.id, prompt.messages, sample, text, True, score, score - 5.0, r, name))
    else:
      chosen.append(Example(prompt.id, prompt.messages, high[1], r, high[2], high[0]))
  scored = [judgments[share] + judgments[3 + share] for share in range(3)]

  def rounded(rows):
    return collections.Counter(f"{int(j.score + 0.5):02d}" for j in rows)

  def sums(rows):
    return {"judged": len(rows), "score_sum": sum(j.score for j in rows), "histogram": dict(rounded(rows))}

  return [(responses[i], {}) for i in range(6)], [(rows, sums(rows)) for rows in scored], chosen, skipped


def turn(text):
  return {"role": "user", "content": text}


def written(directory):
  return page.write(directory).read_text()
