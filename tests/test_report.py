"""The report's page at every moment of a run's life. What it counts and averages: test_report_numbers."""

import collections
import html
import html.parser
import json
import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from report_run import LIKE, MOMENTS, NASTY, RUN, make, vouched, written

from alma_jax import start
from alma_jax.errors import Waiting
from alma_jax.report import charts, judged, numbers, page, sections
from alma_jax.store import runs
from alma_jax.store.records import Example
from alma_jax.store.statistics import Mean
from alma_jax.tools import report as tool

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


# What the page says


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_data(low, width):
  found = charts.ticks(low, low + width)
  steps = np.diff(found)
  slack = 1e-6 * (1 + abs(low) + width)
  assert found[0] <= low + slack and found[-1] >= low + width - slack
  assert 2 <= len(found) <= 11 and np.allclose(steps, steps[0])


def test_the_page_shows_the_runs_numbers(finished):
  text = written(finished)
  for row in numbers.progress(finished):
    assert f"{row['truth']:.2f} ± {row['truth_ci95']:.2f}" in text
    assert f"{row['judge']:.2f} ± {row['judge_ci95']:.2f}" in text
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
  assert "accepted: the rounds use it" in text and "−0.250 ± 0.062, n = 26 annotations, 310 pairs" in text
  assert "0.750 ± 0.100" in text and "0.500 ± 0.125" in text
  base = numbers.progress(finished)[0]
  for name in ("truth", "judge"):
    assert f"base, {name} {base[name]:.2f} ± {base[f'{name}_ci95']:.2f}" in text
  judged_by = "orders 0.750 ± 0.062 of 310 held-out pairs as the annotators did, mean error 1.50 ± 0.38 of 10, Spearman"
  assert text.count(f"The run's judge {judged_by} 0.50 ± 0.25 (n = 26 annotations; own ") == 6
  assert f"The judge of the rounds {judged_by}" in text and "the two means lie 1.50 apart" in text
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
  removed, kept = (escape(LIKE[name]) for name in ("removed", "kept"))
  assert cells([removed, kept, "eval prompt", "0.812"], left=3) in text
  assert text.index("<td>one</td><td>two</td><td>duplicate</td>") < text.index(f"<td>{removed}</td>")  # least similar
  for row in (["demonstrations", 1, 0, 2], ["annotations", 0, 0, 0], ["pool", 38, 0, "1,234"]):
    assert text.count(cells(row)) == 1  # once: the human data does not change
  assert cells(["pool, added for round 3", 38, 0, "1,234"]) in text
  assert "Of 40 evaluation prompts 11 have fewer than 8 words" in text
  prompt, found = (escape(RUN[name]) for name in ("prompt", "text"))
  assert text.count(cells(["demonstrations", prompt, found, escape(NASTY)], left=4)) == 1


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
  assert tags["section"] == 12 and '<section id="notes">' not in text  # nothing stands out
  assert tags["script"] == tags["link"] == tags["img"] == 0
  assert "http" not in text and "url(" not in text and "@import" not in text


def test_texts_are_escaped(finished):
  text = written(finished)
  assert escape(NASTY) in text
  assert "<script" not in text and "<m>" not in text and escape("<m>") in text


def test_characters_that_html_forbids_are_shown(copy):
  said = "tab\t \x00 \x1b[31m \r\n \x7f \x85 \ud800"
  (copy / "config.json").write_text(json.dumps({"recipe": "alma", "model": {"path": said}}))
  text = written(copy)
  assert "tab\t \u2400 \u241b[31m \u240d\n \u2421 \\x85 \ufffd" in text
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


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
    run.progress({"round": 3, "n": 40, "truth": 1.0, "truth_ci95": 0.1, "finished": 0.5, "tokens": 99.0})
  text = written(tmp_path)
  assert "round 3 50%" in text and "Answers grow" in text


def test_alarms_come_first_and_end_the_summary(copy):
  vouched(copy / "round_02/trainset", alarms={"selected": f"few {NASTY}"})
  text = written(copy)
  assert text.index('<section id="alarms">') < text.index('<section id="progress">')
  assert f'<strong class="alarm">round_02/trainset</strong>: few {escape(NASTY)}' in text
  assert f"alarm: round_02/trainset: few {NASTY}" in page.summary(copy).splitlines()


def test_scores_that_follow_length_are_noted():
  def of(value):
    return Mean(value, 0.1, 9)

  def alarm(over_all, within):
    found = judged.Judged(9, 9, 3, of(1), None, of(1), None, None, None, None, None, over_all, within)
    return sections.length_alarm(found)

  assert alarm(of(0.29), of(-0.31)) == -0.31
  assert alarm(of(0.29), None) is None


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
  assert lines[0].split() == ["round", "checkpoint", "n", "truth", "judge", "tokens", "finished"]
  for line, row in zip(lines[1:], numbers.progress(finished), strict=False):
    assert line.split()[:2] == [str(row["round"]), f"m{row['round']}"]
    assert f"{row['truth']:.2f} ± {row['truth_ci95']:.2f}" in line
  assert lines[5].startswith("best round by truth")
  assert lines[6].startswith("judge: orders 0.750 ± 0.062 of 310 held-out pairs as the annotators did")
  assert len(lines) == 8 and lines[-1].endswith(str(finished / "report.html"))


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


def test_a_run_that_waits_says_for_what_and_a_recipe_calls_its_rounds_by_its_own_word(copy, capsys):
  (copy / "config.json").write_text(json.dumps({"recipe": "lima", "model": {"path": "m"}}))
  text = written(copy)
  assert "LIMA" in text and "<h2>Epochs</h2>" in text and "− epoch before" in text and "initial SFT" not in text
  assert page.summary(copy).startswith("epoch checkpoint")

  def work():
    raise Waiting("fill every row of choose.csv")

  assert start.status(work, "") == 75
  assert capsys.readouterr().err == "fill every row of choose.csv\n"
  with open(copy / "log.jsonl", "a") as file:
    file.write(json.dumps({"event": "waiting", "what": "fill every row of choose.csv"}) + "\n")
  text = written(copy)
  assert "waiting for a person" in text and "fill every row of choose.csv" in text
