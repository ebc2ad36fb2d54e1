"""Models side by side: paired differences, Holm's p, and what may not be compared."""

import csv
import json
import time
import xml.etree.ElementTree

import numpy as np
import pytest
from report_run import make

from alma_jax.evals.comparison import Group, Scores, rows
from alma_jax.report import graded, leaflet
from alma_jax.store import layout, runs, statistics
from alma_jax.store.records import Answer, Grade
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


def test_wins_are_counted_question_by_question_and_ties_count_half():
  base = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "other": 9.0}
  left = {"a": 2.0, "b": 2.0, "c": 1.0, "d": 5.0, "lost": 1.0}
  (_, row) = rows([Group("s", "j", [Scores("base", base), Scores("left", left)])])
  assert (row.wins.won, row.wins.tied, row.wins.lost) == (2, 1, 1)
  shares = [1, 0.5, 0, 1]
  assert row.wins.share.value == np.mean(shares) and row.wins.share.n == 4
  assert row.wins.share.ci95 == pytest.approx(1.96 * np.std(shares, ddof=1) / 2)
  assert statistics.wins(left, {"a": float("nan")}) is None


def test_a_comparison_is_written_as_tables_and_charts(tmp_path, capsys, monkeypatch):
  make(tmp_path / "run")
  call = ["compare", f"--input={tmp_path / 'run'}", "--against=round 1"]
  assert evaluate.main([*call, f"--html={tmp_path / 'c.html'}", f"--output={tmp_path / 'c.csv'}"]) == 0
  assert evaluate.main([*call, f"--html={tmp_path / 'c.svg'}"]) == 0
  table = list(csv.DictReader(open(tmp_path / "c.csv")))
  page, picture = (tmp_path / "c.html").read_text(), xml.etree.ElementTree.parse(tmp_path / "c.svg").getroot()
  for row in table:
    assert f'<td>{row["model"]}</td><td class="n">{row["n"]}</td><td class="n">{float(row["mean"]):.3f}</td>' in page
  assert page.count("<svg") == 2 == len(picture.findall("{*}svg"))
  assert "var(" not in (tmp_path / "c.svg").read_text()
  assert evaluate.main([*call, f"--html={tmp_path / 'c.pdf'}"]) == 1
  assert "must end with .html, .svg or .png" in capsys.readouterr().err
  monkeypatch.setattr(leaflet, "BROWSERS", ("no_such_browser",))
  assert evaluate.main([*call, f"--html={tmp_path / 'c.png'}"]) == 1
  assert "none of no_such_browser is on the PATH; write .svg" in capsys.readouterr().err


@pytest.mark.slow  # python -m pytest -m slow tests/test_evals_comparison.py
def test_a_run_of_five_sets_eleven_rounds_and_three_judges_is_compared_in_twenty_seconds(tmp_path):
  n = 805
  with runs.Run(tmp_path / "run") as run:
    run.save_config({"recipe": "alma"})
    for r in range(1, 12):
      for chosen in ("", "a", "b", "c", "d"):
        place = layout.stage_name(r, layout.answers_name(chosen))
        answers = [
          Answer(f"{i:016x}", ({"role": "user", "content": f"ask {i}"},), "x" * 400, 100, True) for i in range(n)
        ]
        stage = run.stage(place, {"name": place})
        stage.write_part(0, 1, answers, Answer)
        stage.finish()
        for judge in ("judge", "truth", "armo"):
          name = layout.grades_name(place, judge)
          graded_, scores = run.stage(name, {"name": name}), RNG.normal(5 + r / 10, 2, n)
          graded_.write_part(0, 1, [Grade(x.prompt_id, float(s)) for x, s in zip(answers, scores, strict=True)], Grade)
          graded_.finish(judge={"name": judge, "identity": judge, "scale": None, "selects": False})
  begun = time.process_time()
  assert evaluate.main(["compare", f"--input={tmp_path / 'run'}", f"--html={tmp_path / 'c.html'}"]) == 0
  seconds = time.process_time() - begun
  print(f"{seconds:.2f} s of CPU")  # shown by pytest -s
  assert seconds < 20


def test_the_command_compares_the_rounds_of_a_run(tmp_path, capsys):
  make(tmp_path / "run")
  assert evaluate.main(["compare", f"--input={tmp_path / 'run'}", "--against=round 1"]) == 0
  shown = capsys.readouterr().out
  assert "data.eval, graded by truth: truth 0123" in shown and "data.eval, graded by judge: judge 0123" in shown
  found = graded.difference(graded.read(tmp_path / "run", 3), graded.read(tmp_path / "run", 1), "truth")
  assert f"{found.value:+.3f} ± {found.ci95:.3f}" in shown
