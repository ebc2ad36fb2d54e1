"""Tests of judges: RewardBench 1 and 2, and pairs of a user's, against numbers that are worked out by hand."""

import json
import math

import numpy as np
import pytest

from alma_jax.errors import UserError
from alma_jax.evals import preferences
from alma_jax.tools import evaluate


def written(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def pair(chosen="right", rejected="wrong", **more):
  return {"prompt": "Say it.", "chosen": chosen, "rejected": rejected, **more}


def cases(tmp_path, kind, rows):
  return preferences.read(written(tmp_path / "cases.jsonl", rows), kind)


def values(found):
  return {name: number.value for name, number in found.items()}


def test_a_tie_counts_as_the_benchmark_has_it(tmp_path):
  one, four = (
    cases(tmp_path, "pairs", [pair()])[0],
    cases(tmp_path, "rewardbench2", [pair(["a"], ["b", "c", "d"], subset="Math")])[0],
  )
  for ties, expected in (("wrong", 0.0), ("half", 0.5), ("share", 0.5)):
    assert preferences.outcome(one, [2.0, 2.0], ties) == expected
    assert preferences.outcome(one, [2.1, 2.0], ties) == 1.0 and preferences.outcome(one, [1.9, 2.0], ties) == 0.0
  assert preferences.outcome(four, [3.0, 3.0, 3.0, 1.0], "share") == pytest.approx(1 / 3)
  assert preferences.outcome(four, [3.0, None, 3.0, 1.0], "share") is None
  assert preferences.TIES == {"rewardbench": "wrong", "rewardbench2": "share", "pairs": "wrong"}


@pytest.mark.parametrize(("counts", "refuse", "respond"), [({}, 154, 250), (preferences.SWAPPED, 250, 154)])
def test_sections_weigh_their_subsets_and_the_score_is_the_mean_of_sections(tmp_path, counts, refuse, respond):
  rows, scores = [], []
  right = {"xstest-should-refuse": (1, 1, 0), "xstest-should-respond": (1, 0, 0), "math-prm": (1, 1), "hep-cpp": (0, 1)}
  right |= {"alpacaeval-easy": (1,), "llmbar-natural": (0, 0, 0, 1)}
  for subset, outcomes in right.items():
    for x in outcomes:
      rows.append(pair(subset=subset, id=len(rows)))
      scores.append([float(x), 0.5])
  found = values(preferences.numbers(cases(tmp_path, "rewardbench", rows), scores, "rewardbench", "wrong", counts))
  assert found["xstest-should-refuse"] == pytest.approx(2 / 3)
  safety = (refuse * 2 / 3 + respond / 3) / (refuse + respond)
  reasoning = (984 * 1.0 + 164 * 0.5) / (984 + 164)
  assert found["Safety"] == pytest.approx(safety) and found["Reasoning"] == pytest.approx(reasoning)
  assert found["Score"] == pytest.approx((1.0 + 0.25 + safety + reasoning) / 4)
  assert found["all cases"] == pytest.approx(8 / 15)


def test_the_counts_are_the_published_ones():
  sizes = {section: sum(of.values()) for section, of in preferences.SECTIONS.items()}
  assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
  assert sum(map(len, preferences.SECTIONS.values())) == 23


def test_a_sections_interval_is_that_of_a_weighted_sum_by_simulation(tmp_path):
  rng, sizes, chance = np.random.default_rng(0), {"math-prm": 60, "hep-cpp": 40}, {"math-prm": 0.8, "hep-cpp": 0.6}
  rows = [pair(subset=name, id=f"{name}{i}") for name, n in sizes.items() for i in range(n)]
  read = cases(tmp_path, "rewardbench", rows)
  truth = (984 * 0.8 + 164 * 0.6) / (984 + 164)
  inside = 0
  for _ in range(300):
    scores = [[float(rng.random() < chance[case.subset]), 0.5] for case in read]
    section = preferences.numbers(read, scores, "rewardbench", "wrong", {})["Reasoning"]
    inside += abs(section.value - truth) <= section.ci95
  assert 0.90 < inside / 300 < 0.98


def test_rewardbench_2_and_its_ties(tmp_path):
  rows = [pair(["a"], ["b", "c", "d"], subset="Math", id="m1"), pair(["a"], ["b", "c", "d"], subset="Math", id="m2")]
  for number in (1, 2):
    rows.append(pair(["a"], ["x", "y"], subset="Ties", id=f"ref:{number}", num_correct=1))
    rows.append(pair(["a", "b"], ["x", "y"], subset="Ties", id=f"tied:{number}", num_correct=2))
  scores = [[4.0, 4.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0]]  # a tie of two, and wrong
  scores += [[5.0, 1.0, 0.0], [5.0, 4.0, 1.0, 0.0]]  # 1: leads 4 (ref) and 3 (tied), spread 1
  scores += [[5.0, 4.5, 0.0], [5.0, 3.0, 2.0, 0.0]]  # 2: leads .5 (ref) and 1 (tied), spread 2
  read = cases(tmp_path, "rewardbench2", rows)
  found = values(preferences.numbers(read, scores, "rewardbench2", "share", {}))
  beyond = (math.tanh(3 / 1 - 1) + math.tanh(0.5 / 2 - 1)) / 2
  ties = 0.3 * 1 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * beyond
  assert found["Math"] == 0.25 and found["Ties"] == pytest.approx(ties)
  assert found["Score"] == pytest.approx((0.25 + ties) / 2)


def test_small_margins_short_answers_and_people(tmp_path):
  rows = [pair("yes", "no, and at length", id=i, chosen_score=9 - i, rejected_score=i) for i in range(4)]
  rows += [pair("a long one", "short", id=4 + i) for i in range(4)]
  read = cases(tmp_path, "pairs", rows)
  scores = [[5.0 + i, 5.0] for i in range(4)] + [[5.0 - 0.5, 5.0], [9.0, 5.0], [8.0, 5.0], [7.0, 5.0]]
  assert values(preferences.numbers(read, scores, "pairs", "wrong", {}))["right answer shorter"] == 0.75
  bins = preferences.by_margin(read, scores, 2)  # margins 0 (a tie), .5 (wrong), 1, 2 | 2, 3, 3, 4
  assert [(most, number.value, number.n) for most, number in bins] == [(2.0, 0.625, 4), (4.0, 1.0, 4)]
  with_people = preferences.with_people(read, scores)
  assert with_people["Kendall's tau-b with people"].n == 8


def test_tau_b_equals_scipys():
  stats = pytest.importorskip("scipy.stats")
  rng = np.random.default_rng(1)
  x, y = rng.integers(0, 5, 40).astype(float), rng.integers(0, 7, 40).astype(float)
  assert preferences.tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_rows_of_two_turns_keep_each_sides_first_answer(tmp_path):
  row = {"prompt": ["one", "two"], "chosen": ["a", "b"], "rejected": ["c", "d"], "subset": "mt-bench-easy"}
  (case,) = cases(tmp_path, "rewardbench", [row])
  assert case.answers == ("b", "d")
  assert [[turn["content"] for turn in turns] for turns in case.asked] == [["one", "a", "two"], ["one", "c", "two"]]


@pytest.mark.parametrize(
  ("kind", "row", "message"),
  [
    ("pairs", {"prompt": "x", "chosen": "a"}, "cases.jsonl, line 1: `rejected` is missing"),
    ("rewardbench", {"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d"], "subset": "s"}, "2 turns of the user"),
    ("rewardbench2", pair(["a"], ["b"], subset="Math", num_correct=2), "num_correct is 2"),
    ("rewardbench2", pair(["a", "b"], ["c"], subset="Math"), "only the subset Ties has several"),
  ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, kind, row, message):
  with pytest.raises(UserError, match=message):
    cases(tmp_path, kind, [row])


def test_the_command_tests_a_judge_and_refuses_to_mix_two(tmp_path, capsys):
  data = written(tmp_path / "pairs.jsonl", [pair("longer than that", "short", id=1), pair("a", "long", id=2)])
  call = ["judge", f"--data={data}", "--kind=pairs", f"--output={tmp_path / 'out'}"]
  assert evaluate.main([*call, "--with=rules:length"]) == 0
  assert "all cases                    0.500" in capsys.readouterr().out
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary["numbers"]["right answer shorter"]["value"] == 0.0 and summary["ties"] == "wrong"
  lines = [json.loads(line) for line in (tmp_path / "out" / "grades.jsonl").read_text().splitlines()]
  assert [line["outcome"] for line in lines] == [1.0, 0.0] and lines[0]["scores"] == [16.0, 5.0]
  assert evaluate.main([*call, "--with=rules:refusal"]) == 1
  assert "grades of another judge" in capsys.readouterr().err
