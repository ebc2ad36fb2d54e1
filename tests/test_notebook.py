"""The blocks of docs/notebook.md, run from top to bottom as one script, on a run made of random records."""

import importlib.util
import pathlib
import re

import numpy as np
import report_run

from alma_jax.report import graded

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "notebook.md"


def test_the_guide_runs_as_it_stands(tmp_path):
  run = tmp_path / "run"
  report_run.make(run)
  blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
  script = "\n".join(blocks).replace('RUN = "runs/mini"', f"RUN = {str(run)!r}")
  if importlib.util.find_spec("pandas") is None:
    script = script.replace(".to_pandas()", "")
  found = {}
  exec(compile(script, str(GUIDE), "exec"), found)
  assert len(found["rounds"]) == 4 and found["config"]["recipe"] == "alma" and found["done"]["judge"]
  assert len(found["scores"]) == found["done"]["round_02/judgments"]["rows"]
  assert found["gain"] == graded.difference(graded.read(run, 3), graded.read(run, 1), "truth")
  assert len(found["answers"]) == 2 and all(isinstance(answer, str) and answer for answer in found["answers"])
  assert all(0 <= verdict.score <= 10 and np.isclose(sum(verdict.probs), 1) for verdict in found["verdicts"])
  assert found["sizes"].sum() == len(found["texts"]) > 4
