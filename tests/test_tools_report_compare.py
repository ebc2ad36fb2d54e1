"""`alma report --compare`: paired differences by judges that are the same, the configs' differences, one page."""

import json

import numpy as np
import pytest
import report_run

from alma_jax.report import graded
from alma_jax.store import statistics
from alma_jax.tools import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs of the same prompts; the second one's truth is what the judge of the first one said, and n is another."""
  root = tmp_path_factory.mktemp("compare")
  for name in ("a", "b"):
    report_run.make(root / name)
  config = json.loads((root / "b" / "config.json").read_text())
  (root / "b" / "config.json").write_text(json.dumps(config | {"feedback_rounds": 3}))
  for part in sorted((root / "b" / "round_02" / "eval.truth").glob("*.parquet")):
    other = root / "b" / "round_02" / "eval.judge" / part.name
    part.write_bytes(other.read_bytes())
  stage = root / "b" / "round_02" / "eval.truth"
  report_run.vouched(stage)
  judge = json.loads((root / "b" / "round_02" / "eval.judge" / "manifest.json").read_text())["judge"]
  for path in (root / "b").glob("round_*/eval.judge"):
    report_run.vouched(path, judge=judge | {"identity": "another own judge"})
  return root


def test_two_runs_are_compared_prompt_by_prompt(runs, capsys):
  output = runs / "page.html"
  assert report.main(["--compare", str(runs / "a"), str(runs / "b"), f"--output={output}"]) == 0
  said = capsys.readouterr().out
  a, b = (graded.read(runs / name, 2) for name in ("a", "b"))
  difference = statistics.paired(
    dict(zip(b.prompts, b.scores["truth"].tolist(), strict=True)),
    dict(zip(a.prompts, a.scores["truth"].tolist(), strict=True)),
  )
  assert difference.value != 0 and f"{difference.value:+.3f} ± {difference.ci95:.3f}" in said
  assert "judge: each run has its own" in said and "own judge" in said
  assert "feedback_rounds: 2 -> 3" in said
  page = output.read_text()
  assert page.count("<svg") == len(graded.judges([{"truth_ci95": 1, "judge_ci95": 1}]))  # a chart for each judge
  assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "feedback_rounds" in page
  assert f"{difference.value:+.2f}" in page.replace("−", "-")
  assert np.isfinite(difference.ci95)


def test_mistakes_are_one_line(runs, capsys):
  assert report.main(["--compare", str(runs / "a")]) == 2
  assert report.main(["--compare", str(runs / "a"), str(runs / "a")]) == 1
  assert report.main(["--compare", str(runs / "a"), str(runs / "nowhere")]) == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 3 and "are one run" in lines[1] and "is no run directory" in lines[2]
