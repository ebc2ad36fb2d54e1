"""Models side by side: paired differences, Holm's p, and what may not be compared."""

import csv
import json

import numpy as np
import pytest
from report_run import make

from alma_jax.evals.comparison import Group, Scores, rows
from alma_jax.report import graded
from alma_jax.store import statistics
from alma_jax.tools import evaluate

RNG = np.random.default_rng(0)
BASE = {f"q{i}": float(x) for i, x in enumerate(RNG.normal(5, 2, 60))}
BETTER = {q: x + 0.5 + float(e) for (q, x), e in zip(BASE.items(), RNG.normal(0, 0.5, 60), strict=True)}
OTHER = {q: x + float(e) for (q, x), e in zip(list(BASE.items())[10:], RNG.normal(0, 2, 50), strict=True)}


def test_differences_are_paired_over_common_questions():
  stats = pytest.importorskip("scipy.stats")
  base, better, other = rows(
    [Group("s", "j", [Scores("base", BASE), Scores("better", BETTER), Scores("other", OTHER)])]
  )
  assert base.difference is None and base.mean.n == 60
  assert better.difference.value == pytest.approx(np.mean([BETTER[q] - BASE[q] for q in BASE]))
  assert other.difference.n == 50
  for row, scores in ((better, BETTER), (other, OTHER)):
    of = [scores[q] for q in scores], [BASE[q] for q in scores]
    assert row.p == pytest.approx(stats.ttest_rel(*of).pvalue, abs=1e-9)
    spread = np.std(np.subtract(*of), ddof=1)
    assert row.detectable == pytest.approx(statistics.detectable(spread, len(scores)))
  assert better.adjusted == pytest.approx(2 * better.p) and other.adjusted == pytest.approx(other.p)


def test_categories_and_the_model_compared_with():
  categories = {q: "odd" if int(q[1:]) % 2 else "even" for q in BASE}
  group = Group("s", "j", [Scores("base", BASE, categories), Scores("better", BETTER, categories)])
  found = rows([group], against="better", by_category=True)
  assert [(row.category, row.name) for row in found] == [
    (category, name) for category in ("", "even", "odd") for name in ("base", "better")
  ]
  assert found[0].difference.value < 0 and found[1].difference is None and found[2].mean.n == 30
  with pytest.raises(Exception, match="no 'nobody' to compare with; there are base, better"):
    rows([group], against="nobody")


def grades(directory, scores, judge="a judge"):
  directory.mkdir()
  lines = ({"id": q, "category": "c", "score": x} for q, x in scores.items())
  (directory / "grades.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (directory / "summary.json").write_text(json.dumps({"judge": judge, "protocol": "rating"}))
  return str(directory)


def test_the_command_compares_one_judges_grades_alone(tmp_path, capsys):
  places = [grades(tmp_path / "base", BASE), grades(tmp_path / "better", BETTER | {"q3": None})]
  assert evaluate.main(["compare", "--input", *places, f"--output={tmp_path / 'out.csv'}"]) == 0
  shown = capsys.readouterr().out
  assert "answers, graded by a judge, rating" in shown and "detectable" in shown
  table = list(csv.DictReader(open(tmp_path / "out.csv")))
  assert [row["n"] for row in table] == ["60", "59"] and table[1]["common"] == "59"
  assert f"{float(table[1]['difference']):+.3f}" in shown
  assert evaluate.main(["compare", "--input", *places, grades(tmp_path / "strange", OTHER, "another")]) == 1
  assert "cannot be compared: judge 'a judge' and 'another'" in capsys.readouterr().err


def test_the_command_compares_the_rounds_of_a_run(tmp_path, capsys):
  make(tmp_path / "run")
  assert evaluate.main(["compare", f"--input={tmp_path / 'run'}", "--against=round 1"]) == 0
  shown = capsys.readouterr().out
  assert "data.eval, graded by truth: truth 0123" in shown and "data.eval, graded by judge: judge 0123" in shown
  found = graded.difference(graded.read(tmp_path / "run", 3), graded.read(tmp_path / "run", 1), "truth")
  assert f"{found.value:+.3f} ± {found.ci95:.3f}" in shown
