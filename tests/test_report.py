"""The report against plain Python on the same records, and at every moment of a run's life."""

import collections
import html
import html.parser
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alma_jax.report import charts, numbers, page
from alma_jax.store import runs
from alma_jax.store.records import Evaluation, Example, Judgment, Pair, Prompt, Response
from alma_jax.tools import report as tool

NASTY = "<script>alert('x')</script> & <b>"
MOMENTS = ("nothing", "seeds", "pool", "judge", "base", "sampled", "judged", "selected", "trained", "all")
BROKEN = ("could not be made", "cannot be read")


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


def overlapping(prompts, short, equal, overlapping, met, *examples):
  names = ("prompts", "short", "equal", "overlapping", "prompts_met", "examples")
  return dict(zip(names, (prompts, short, equal, overlapping, met, examples)))


LIKE = {"removed": f"{NASTY} in a pool", "near": "eval_prompt", "kept": f"{NASTY} in the pool", "similarity": 0.8125}
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


def make(directory, until="all", mass=0.97, pairs=False, graded=True):
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

    def training(name, moment, **extra):
      rows = [json.dumps({"step": i + 1, "loss": 2.0 / (i + 1)}) for i in range(12)]
      stage(name, moment=moment, counts={"steps": 12, "examples": 7}, files={"metrics.jsonl": "\n".join(rows)}, **extra)

    def evaluation(r, moment, shift):
      records = []
      for i in range(40):
        text, judged = "x" * (i + r), float(np.clip(random.normal(5 + shift, 2), 0, 10))
        truth = float(np.clip(judged + random.normal(), 0, 10)) if graded else None
        records.append(Evaluation(f"e{i}", (turn(f"ask {i}"),), text, i + r, i > 2, judged, truth))
      stage(f"round_{r:02d}/eval", Evaluation, [(records[:20], {}), (records[20:], {})], moment)
      row = {"round": r, "checkpoint": f"m{r}", "n": 40, "tokens": float(np.mean([x.tokens for x in records]))}
      row["finished"] = np.mean([x.finished for x in records])
      for name in ("judge_score", *(["score"] if graded else [])):
        values = np.array([getattr(x, name) for x in records])
        row |= {name: values.mean(), f"{name}_ci95": 1.96 * values.std(ddof=1) / math.sqrt(40)}
      if at >= moment:
        run.progress(row)

    read = {"rows": 9, "kept": 7, "duplicate": 2}
    stage("seeds", moment=1, counts={"sft": read, "eval": {"rows": 40, "kept": 40}})
    pool = [Prompt(f"p{i:02d}", (turn(f"{NASTY} {i}"),), "synthetic", min(i % 7, 3)) for i in range(30)]
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
    training("judge", 3)
    training("judge_distilled", 3, held_out={"rows": 26, "before": 1.5, "after": 1.25}, accepted=True)
    for r in (0, 1):
      evaluation(r, 4, r)
    for r in (2, 3):
      prompts = pool[12 * (r - 2) : 12 * (r - 1)]
      later = MOMENTS.index("all") if r == 3 else 0
      stage(f"round_{r:02d}/prompts", Prompt, [(prompts, {"clusters_drawn": 4})], max(5, later))
      responses, judgments, chosen = responses_of(prompts, r, random, mass, pairs)
      stage(f"round_{r:02d}/responses", Response, responses, max(5, later))
      stage(f"round_{r:02d}/judgments", Judgment, judgments, max(6, later))
      stage(f"round_{r:02d}/trainset", Pair if pairs else Example, [(chosen, {"selected": len(chosen)})], max(7, later))
      training(f"round_{r:02d}/policy", max(8, later))
      evaluation(r, 9, r)
    if until == "all":
      run.log("end", seconds=1.0)


def responses_of(prompts, r, random, mass, pairs):
  """Parts of responses (two checkpoints by three shares) and judgments (three shares), and the chosen ones."""
  responses, judgments, chosen = collections.defaultdict(list), collections.defaultdict(list), []
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
    if k % 6 == 5:
      continue  # two prompts without a selected response
    if pairs:
      chosen.append(Pair(prompt.id, prompt.messages, high[1], low[1], high[0], low[0], r))
    else:
      chosen.append(Example(prompt.id, prompt.messages, high[1], r, high[2], high[0]))
  scored = [judgments[share] + judgments[3 + share] for share in range(3)]
  rounded = lambda rows: collections.Counter(f"{int(j.score + 0.5):02d}" for j in rows)
  sums = lambda rows: {"judged": len(rows), "score_sum": sum(j.score for j in rows), "histogram": dict(rounded(rows))}
  return [(responses[i], {}) for i in range(6)], [(rows, sums(rows)) for rows in scored], chosen


def turn(text):
  return {"role": "user", "content": text}


def written(directory):
  return page.write(directory).read_text()


class Balanced(html.parser.HTMLParser):
  """Raises when a tag is closed that is not the last one opened."""

  def __init__(self, text):
    super().__init__()
    self.open, self.seen = [], collections.Counter()
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.seen[tag] += 1
    if tag != "meta":
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


# What the numbers are


@pytest.mark.parametrize("pairs", [False, True])
def test_a_rounds_numbers_equal_a_loop_over_its_records(tmp_path, pairs):
  make(tmp_path, pairs=pairs)
  found = numbers.judged(tmp_path, 2, numbers.trainset(tmp_path, 2))
  text = {(x.prompt_id, x.sample_id): x.text for x in runs.read_stage(tmp_path / "round_02/responses", Response)}
  of = collections.defaultdict(list)
  for j in runs.read_stage(tmp_path / "round_02/judgments", Judgment):
    of[j.prompt_id].append((j.score, len(text[j.prompt_id, j.sample_id]), j.mass, j.probs))
  rows = [row for group in of.values() for row in group]
  chosen = runs.read_stage(tmp_path / "round_02/trainset", Pair if pairs else Example)
  best = {x.prompt_id: (x.chosen_score, x.chosen) if pairs else (x.score, x.response) for x in chosen}
  gains = [score - np.mean([s for s, *_ in of[i]]) for i, (score, _) in best.items()]
  ranked = [sorted((s for s, *_ in group), reverse=True) for group in of.values()]

  assert (found.n, found.total, found.prompts, found.gain.n) == (60, 60, 12, 10)
  assert found.gain.value == pytest.approx(np.mean(gains))
  assert found.gain.ci95 == pytest.approx(1.96 * np.std(gains, ddof=1) / math.sqrt(10))
  assert found.length.value == pytest.approx(np.mean([n for _, n, _, _ in rows]))
  assert found.selected_length.value == pytest.approx(np.mean([len(text) for _, text in best.values()]))
  assert found.mass.value == pytest.approx(np.mean([m for _, _, m, _ in rows]))
  assert found.entropy.value == pytest.approx(np.mean([-sum(p * math.log2(p) for p in ps) for *_, ps in rows]))
  assert found.margin.value == pytest.approx(np.mean([x[0] - x[1] for x in ranked]))
  assert found.tied == pytest.approx(np.mean([x[0] == x[1] for x in ranked]))
  assert found.correlation.value == pytest.approx(np.corrcoef([r[0] for r in rows], [r[1] for r in rows])[0, 1])
  centred = [
    (s - np.mean([g[0] for g in group]), n - np.mean([g[1] for g in group]))
    for group in of.values()
    for s, n, *_ in group
  ]
  assert found.correlation_within.value == pytest.approx(np.corrcoef(np.array(centred).T)[0, 1])


def test_intervals_know_that_rows_of_a_group_are_alike():
  random = np.random.default_rng(1)
  x = random.normal(size=4000)
  y = 0.6 * x + 0.8 * random.normal(size=4000)
  one = np.arange(4000)
  single = numbers.correlation(x, y, one)
  assert single.ci95 == pytest.approx(1.96 * (1 - single.value**2) / math.sqrt(4000), rel=0.06)  # the textbook's
  again = numbers.correlation(np.repeat(x, 5), np.repeat(y, 5), np.repeat(one, 5))
  assert (again.value, again.ci95) == pytest.approx((single.value, single.ci95))  # copies add no knowledge
  repeated = numbers._clustered(np.repeat(x, 5), np.repeat(one, 5))
  assert (repeated.value, repeated.ci95) == pytest.approx((x.mean(), numbers.mean(x).ci95))
  assert numbers.correlation(np.ones(9), np.arange(9), np.arange(9)) is None


def test_differences_of_rounds_are_taken_prompt_by_prompt(finished):
  scores = {}
  for r in (0, 3):
    records = runs.read_stage(finished / f"round_{r:02d}/eval", Evaluation)
    scores[r] = {x.prompt_id: x.score for x in records}
  differences = [scores[3][i] - scores[0][i] for i in scores[0]]
  found = numbers.paired(numbers.evaluations(finished, 3), numbers.evaluations(finished, 0), "score")
  assert found.n == 40
  assert found.value == pytest.approx(np.mean(differences))
  assert found.ci95 == pytest.approx(1.96 * np.std(differences, ddof=1) / math.sqrt(40))
  assert f"{found.value:+.2f} ± {found.ci95:.2f}" in written(finished)


def test_a_large_round_is_read_in_whole_shares(finished, monkeypatch):
  monkeypatch.setattr(numbers, "ROWS", 25)
  found = numbers.judged(finished, 2, None)
  assert (found.n, found.total, found.prompts) == (20, 60, 4)
  assert '<td class="n">20 of 60</td>' in written(finished)


def test_responses_in_another_order_than_their_judgments_are_refused(copy):
  # Two parts of equal prompts and sizes change places: without a check, scores and lengths would be mixed up.
  parts = sorted((copy / "round_02/responses").glob("*.parquet"))
  text = parts[0].read_bytes()
  parts[0].write_bytes(parts[3].read_bytes())
  parts[3].write_bytes(text)
  with pytest.raises(ValueError, match="in their order"):
    numbers.judged(copy, 2, None)
  assert "Round 2 cannot be read" in written(copy)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_data(low, width):
  found = charts.ticks(low, low + width)
  steps = np.diff(found)
  slack = 1e-6 * (1 + abs(low) + width)
  assert found[0] <= low + slack and found[-1] >= low + width - slack
  assert 2 <= len(found) <= 11 and np.allclose(steps, steps[0])


# What the page says


def test_the_page_shows_the_runs_numbers(finished):
  text = written(finished)
  for row in numbers.progress(finished):
    assert f"{row['score']:.2f} ± {row['score_ci95']:.2f}" in text
    assert f"{row['judge_score']:.2f} ± {row['judge_score_ci95']:.2f}" in text
  counts = runs.load_manifest(finished / "round_02/judgments")["counts"]["histogram"]
  for score, count in counts.items():
    assert f"score {int(score)}: {count / 60:.1%} of all responses ({count} of 60)" in text
  chosen = runs.read_stage(finished / "round_02/trainset", Example)
  for score, count in collections.Counter(int(x.score + 0.5) for x in chosen).items():
    assert f"score {score}: {count / 10:.1%} of the selected ({count} of 10)" in text
  sources = collections.Counter(x.source for x in chosen)
  assert f"round 2, sft_1: {sources['sft_1']} of 10" in text
  assert f"round 2, policy of the round before: {sources['round_01/policy']} of 10" in text
  labels = [min(i % 7, 3) for i in range(30)] + [0, 0, 0, 3]
  assert sorted(collections.Counter(labels).values()) == sorted(numbers.cluster_sizes(finished))
  assert "accepted: the rounds use it" in text and "−0.250, n = 26" in text
  assert "round 3 of 3" in text and ">finished</span>" in text


def test_the_pool_and_what_was_added_are_counted_together(finished):
  text = written(finished)
  for name, value in {
    "drawn": 70, "− cut off": 8, "− duplicate": 17, "− near duplicate": 3, "− near eval prompt": 1,
    "− equals prompt of pool": 7, "in the pool": 34,
  }.items():  # fmt: skip
    assert re.search(f">{name}</text><rect [^>]*/><text[^>]*>{value} \\({value / 70:.1%}\\)<", text), name
  for row in (["at first", 50, 30, "60.0%"], ["round 3", 20, 4, "20.0%"]):
    assert cells(row) in text
  # rounds 2 and 3 draw twelve each
  assert cells([2, 30, 12, 4, 18]) in text and cells([3, 34, 12, 4, 10]) in text
  for said in ("Balance 1.25", "4 dimensions with 87.5% of the variance", "in 29 prompts", "1.200 → 0.400"):
    assert said in text
  assert text.count('aria-label="inertia per iteration"') == 1


def cells(row, left=1):
  return "".join(f"<td>{x}</td>" if i < left else f'<td class="n">{x}</td>' for i, x in enumerate(row))


def test_near_duplicates_and_what_evaluation_prompts_share_are_shown_with_examples(finished):
  text = written(finished)
  removed, kept = (html.escape(LIKE[name]) for name in ("removed", "kept"))
  assert cells([removed, kept, "eval prompt", "0.812"], left=3) in text
  assert text.index("<td>one</td><td>two</td><td>duplicate</td>") < text.index(f"<td>{removed}</td>")  # least similar
  for row in (["demonstrations", 1, 0, 2], ["annotations", 0, 0, 0], ["pool", 38, 0, "1,234"]):
    assert text.count(cells(row)) == 1  # once: the human data does not change
  assert cells(["pool, added for round 3", 38, 0, "1,234"]) in text
  assert "Of 40 evaluation prompts 11 have fewer than 8 words" in text
  prompt, found = (html.escape(RUN[name]) for name in ("prompt", "text"))
  assert text.count(cells(["demonstrations", prompt, found, html.escape(NASTY)], left=4)) == 1


def test_a_pool_of_which_less_is_known_has_its_section(copy):
  for path in copy.glob("pool*/*/report.json"):
    path.unlink()
  shutil.rmtree(copy / "pool/projection")
  text = written(copy)
  assert not any(phrase in text for phrase in BROKEN)
  assert "Near-duplicates" not in text and "Evaluation prompts that occur" not in text and "in the pool</text>" in text


def test_the_page_is_whole_quiet_and_alone(finished):
  text = written(finished)
  tags = Balanced(text).seen
  assert not any(phrase in text for phrase in BROKEN)
  assert tags["section"] == 11 and '<section id="notes">' not in text  # nothing stands out
  assert tags["script"] == tags["link"] == tags["img"] == 0
  assert "http" not in text and "url(" not in text and "@import" not in text


def test_texts_are_escaped(finished):
  text = written(finished)
  assert html.escape(NASTY) in text
  assert "<script" not in text and "<m>" not in text and html.escape("<m>") in text


def test_the_same_files_give_the_same_page(finished):
  assert written(finished) == written(finished)


@pytest.mark.parametrize("until", MOMENTS)
def test_every_moment_has_its_page(tmp_path, until):
  make(tmp_path, until)
  text, at = written(tmp_path), MOMENTS.index(until)
  Balanced(text)
  assert not any(phrase in text for phrase in BROKEN)
  first = {"pool": 2, "judge": 3, "training": 3, "progress": 4, "rounds": 4, "selection": 6, "examples": 7}
  assert {name for name in first if f'<section id="{name}">' in text} == {name for name in first if at >= first[name]}


def test_a_directory_without_anything_has_a_page(tmp_path):
  assert "not begun" in written(tmp_path)


def test_half_a_stage_is_named_with_its_progress(copy):
  (copy / "round_03/responses/manifest.json").unlink()
  (copy / "round_03/responses/part-00004-of-00006.json").unlink()
  shutil.rmtree(copy / "round_03/judgments")
  with open(copy / "round_03/policy/metrics.jsonl", "a") as file:
    file.write('\n{"step": 13, "lo')  # being written
  (copy / "round_03/policy/manifest.json").unlink()
  text = written(copy)
  assert "round_03/responses (5 of 6 parts)" in text and "round_03/policy (12 steps)" in text
  assert not any(phrase in text for phrase in BROKEN)


def test_a_lost_file_costs_its_round_only(copy):
  next((copy / "round_03/responses").glob("*.parquet")).unlink()
  text = written(copy)
  Balanced(text)
  assert "Round 3 cannot be read" in text and "Round 2: 60 responses" in text


def test_what_needs_attention_is_noted(tmp_path, finished):
  make(tmp_path, mass=0.5)
  assert "Little mass on the score tokens" in written(tmp_path)
  assert "Little mass on the score tokens" not in written(finished)
  with runs.Run(tmp_path) as run:
    run.progress({"round": 3, "n": 40, "score": 1.0, "finished": 0.5, "tokens": 99.0})
  text = written(tmp_path)
  assert "round 3 50%" in text and "Answers grow" in text


def test_scores_that_follow_length_are_noted():
  of = lambda r: numbers.Mean(r, 0.1, 9)
  make_judged = lambda a, b: numbers.Judged(9, 9, 3, None, of(1), None, of(1), of(1), None, None, a, b)
  assert page._length_alarm(make_judged(of(0.29), of(-0.31))) == -0.31
  assert page._length_alarm(make_judged(of(0.29), None)) is None


# Beside the run


def test_the_runs_own_error_is_shown_and_stays(tmp_path):
  make(tmp_path, "sampled")
  with pytest.raises(ValueError, match="no room"):
    try:
      raise ValueError("no room for <tokens>")
    finally:
      page.write(tmp_path)
  text = (tmp_path / "report.html").read_text()
  assert "ValueError: no room for &lt;tokens&gt;" in text and ">failed</span>" in text
  assert ">stopped before its end</span>" in written(tmp_path)  # later, nobody knows the error


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="mine"):
    try:
      raise ValueError("mine")
    finally:
      assert page.write(tmp_path / "file") is None
  assert "no report.html" in caplog.text


def test_a_live_run_is_running(tmp_path):
  make(tmp_path, "base")
  with runs.Run(tmp_path):
    assert ">running</span>" in written(tmp_path)
  assert ">stopped before its end</span>" in written(tmp_path)


def test_summary_is_the_table_of_rounds(finished):
  page.write(finished)
  lines = page.summary(finished).splitlines()
  assert lines[0].split() == ["round", "checkpoint", "n", "score", "judge", "tokens", "finished"]
  for line, row in zip(lines[1:], numbers.progress(finished), strict=False):
    assert line.split()[:2] == [str(row["round"]), f"m{row['round']}"]
    assert f"{row['score']:.2f} ± {row['score_ci95']:.2f}" in line
  assert len(lines) == 6 and lines[-1].endswith(str(finished / "report.html"))


def test_summary_without_an_evaluator_and_without_anything(tmp_path):
  make(tmp_path / "run", graded=False)
  text = page.summary(tmp_path / "run")
  assert text.splitlines()[0].split() == ["round", "checkpoint", "n", "judge", "tokens", "finished"]
  assert "report:" not in text
  assert not any(phrase in written(tmp_path / "run") for phrase in BROKEN)
  (tmp_path / "run/progress.csv").write_text("round,checkpoint\n0,base\n")
  assert page.summary(tmp_path / "run").splitlines()[1].split() == ["0", "base"]
  assert "no checkpoint has been evaluated" in page.summary(tmp_path)


def test_the_tool_makes_the_page(copy, tmp_path, capsys):
  assert tool.main([str(copy)]) == 0
  assert (copy / "report.html").exists() and "m3" in capsys.readouterr().out
  assert tool.main([str(tmp_path / "nowhere")]) == 1
  assert "does not exist" in capsys.readouterr().err
  assert tool.main([]) == 2
