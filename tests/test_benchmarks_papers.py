"""The arms of the other papers are configs that a run takes, and their tables say what the kept numbers say."""

import importlib
import json
import pathlib
import sys

import pytest

from alma_jax import start

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the benchmarks are no package that is installed

from benchmarks import papers
from benchmarks.papers_arms import PAPERS


@pytest.mark.parametrize("name", PAPERS)
def test_arms_are_configs(name):
  paper = PAPERS[name]
  get_config = importlib.import_module(f"configs.{name}").get_config
  for arm in paper.arms:
    start.checked_options(arm.config(get_config))
  known = {arm.name for arm in paper.arms}
  assert {place[0] for row in paper.rows for place in (row.left, row.right) if place} <= known
  assert {arm.like for arm in paper.arms} <= {"", "default"}


def test_table(tmp_path, capsys):
  scores = {0: (7.0, 8.0), 1: (7.5, 8.4), 2: (6.8, 7.9)}  # after SFT, after DPO on people's pairs
  for seed, (sft, dpo) in scores.items():
    numbers = {"score 0": sft, "score 1": dpo, "gold 2": 0.4}
    (tmp_path / f"{seed}_default.json").write_text(json.dumps({"seed": seed, "arm": "default", "numbers": numbers}))
  found = papers.load(tmp_path)
  assert papers.paired(found, ("default", "score 1"), ("default", "score 0")) == pytest.approx([1.0, 0.9, 1.1])
  assert papers.paired(found, ("default", "score 1"), ("none", "score 0")) == []
  papers.table(PAPERS["spa"], tmp_path)
  shown = capsys.readouterr().out.splitlines()
  gained = next(x for x in shown if "DPO on people's pairs - SFT" in x)
  assert "  3  +1.00 +- 0.25" in gained and gained.endswith("appears")
  agreed = next(x for x in shown if "agreement with the truth - 1/2, iteration 1" in x)
  assert "-0.100 +- 0.000" in agreed and agreed.endswith("reversed")
  assert not any("iteration 2" in x or "Table 7" in x for x in shown)
