"""`evaluate table` and `evaluate figure`: the paper's numbers of runs, against plain Python on the same files."""

import itertools
import json
import shutil

import numpy as np
import pytest
from report_run import QUALITY, make

from alma_jax.evals import paper, runs, scoring
from alma_jax.store import layout, statistics
from alma_jax.store.records import Response
from alma_jax.tools import evaluate

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "alma"
  make(directory)
  return directory


def jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def shown(mean, digits=3, sign=""):
  return f"{mean.value:{sign}.{digits}f} ± {mean.ci95:.{digits}f}".replace("-", "−")


def test_best_of_n_is_the_mean_over_all_choices():
  judge = np.array([[3.0, 1.0, 2.0, 2.0, 5.0], [1, 1, 1, 1, 1]])  # with ties, of which each is as likely
  extrinsic = RNG.normal(size=(2, 5))
  found = paper.best_of_n(judge, extrinsic)
  for row, n in itertools.product(range(2), range(1, 6)):
    means = []
    for chosen in itertools.combinations(range(5), n):
      best = max(judge[row][i] for i in chosen)
      means.append(np.mean([extrinsic[row][i] for i in chosen if judge[row][i] == best]))
    assert found[row, n - 1] == pytest.approx(np.mean(means), abs=1e-12)
  # 400 responses, as in the paper: the mean, the best one, and a rising curve of the oracle.
  scores = RNG.normal(size=(3, 400))
  curve = paper.best_of_n(scores, scores)
  assert curve[:, 0] == pytest.approx(scores.mean(axis=1)) and curve[:, -1] == pytest.approx(scores.max(axis=1))
  assert (np.diff(curve, axis=1) > 0).all()


def test_table_1_and_figure_2_show_the_means_of_the_rounds(run, tmp_path, capsys):
  means = {
    (r, judge): statistics.mean(list(runs.scores(run, r, "", judge).values()))
    for r in range(4)
    for judge in ("truth", "judge")
  }
  assert evaluate.main(["table", "1", f"--input={run}", f"--html={tmp_path / 't.html'}"]) == 0
  out = capsys.readouterr().out
  for judge in ("truth", "judge"):
    cells = [shown(means[r, judge]) for r in (0, 1, 3)]
    line = next(line for line in out.partition(f"graded by {judge}")[2].splitlines() if "data.eval" in line)
    assert line.split("  ")[1:] and [x.strip() for x in line.split("  ") if x.strip()] == ["data.eval", "40", *cells]
  assert "<svg" in (tmp_path / "t.html").read_text()
  graded = tmp_path / "other"
  graded.mkdir()
  summary = {"judge": "truth 0123", "numbers": {"mean": {"value": 9.25, "n": 40, "low": 9.0, "high": 9.5}}}
  (graded / "summary.json").write_text(json.dumps(summary))
  flags = ["figure", "2", f"--input={run}", "--reference=instruct=8.5", f"--reference={graded}"]
  assert evaluate.main([*flags, f"--html={tmp_path / 'f.svg'}"]) == 0
  out, picture = capsys.readouterr().out, (tmp_path / "f.svg").read_text()
  assert out.count("instruct") == 2 and out.count("9.250 ± 0.250") == 1  # the other judge's chart leaves it out
  assert all(shown(mean) in out for mean in means.values())
  assert picture.count(">instruct 8.50<") == 2 and picture.count(">other 9.25<") == 1
  assert evaluate.main(["figure", "2", f"--input={run}", "--reference=8.5"]) == 1
  assert "neither NAME=VALUE nor an output" in capsys.readouterr().err


def test_table_2_is_alpaca_evals_win_rates(tmp_path, capsys):
  rows, hard = [], {}
  for i in range(60):
    lengths, p = RNG.integers(100, 900, 2), float(RNG.random())
    rows.append({"instruction": f"q{i}", "output_1": "b" * lengths[0], "output_2": "m" * lengths[1],
                 "preference": None if i == 7 else 1 + p, "generator_2": "mine"})  # fmt: skip
    hard[f"q{i}"] = float(RNG.normal())
  path, difficulty = tmp_path / "a.json", tmp_path / "d.json"
  path.write_text(json.dumps(rows))
  difficulty.write_text(json.dumps(hard))
  gamed = [row | {"output_2": "m" * (10 + i), "preference": 1.1} for i, row in enumerate(rows)]
  (tmp_path / "g.json").write_text(json.dumps(gamed))
  call = ["table", "2", f"--input={path}", f"--difficulty={difficulty}"]
  assert evaluate.main([*call, f"--gamed={tmp_path / 'g.json'}"]) == 0
  out = capsys.readouterr().out
  compared = [
    scoring.Compared(r["preference"] - 1, len(r["output_2"]), len(r["output_1"]), hard[r["instruction"]])
    for r in rows
    if r["preference"]
  ]
  lengths = np.array([len(r["output_1"]) - len(r["output_2"]) for r in gamed])
  spread = float(lengths.std(ddof=1))
  against = [scoring.Gamed(0.1, x / spread, hard[r["instruction"]]) for x, r in zip(lengths, gamed, strict=True)]
  assert f"{scoring.length_controlled(compared, against).value:.2f} ±" in out
  raw = 100 * np.mean([x.share for x in compared])
  assert "mine   59        1" in out and f"{raw:.2f} ±" in out
  del hard["q3"]
  difficulty.write_text(json.dumps(hard))
  assert evaluate.main(call) == 1
  assert "has no difficulty of 1 of the 60 instructions" in capsys.readouterr().err


def test_table_3_has_the_judges_of_runs_and_tests(run, tmp_path, capsys):
  data = jsonl(
    tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "longer", "rejected": "a", "id": i} for i in range(3)]
  )
  call = ["judge", f"--data={data}", "--kind=pairs", "--with=rules:length", f"--output={tmp_path / 'length'}"]
  assert evaluate.main(call) == 0 and capsys.readouterr()
  assert evaluate.main(["table", "3", "--input", str(run), str(tmp_path / "length")]) == 0
  out = capsys.readouterr().out
  assert all(f"{QUALITY[name]['value']:.3f} ± {QUALITY[name]['ci95']:.3f}" in out for name in ("agreement", "spearman"))
  assert "310" in out and "length  all cases  1.000 ± 0.000  3  rules:length" in out


def test_table_5_compares_two_rounds_by_category(run, tmp_path, capsys):
  copy = shutil.copytree(run, tmp_path / "run")
  rows = [
    {"messages": [{"role": "user", "content": f"ask {i}"}], "category": ("odd", "even")[i % 2]} for i in range(40)
  ]
  jsonl(copy / "seeds" / "eval.jsonl", rows)
  assert evaluate.main(["table", "5", f"--input={copy}"]) == 0
  out = capsys.readouterr().out.partition("graded by truth")[2]
  first, second = (runs.scores(copy, r, "", "truth") for r in (1, 2))
  for name, chosen in (("odd", range(0, 40, 2)), ("even", range(1, 40, 2)), ("all", range(40))):
    left, right = ({f"e{i}": of[f"e{i}"] for i in chosen} for of in (first, second))
    numbers = [statistics.mean(list(left.values())), statistics.mean(list(right.values()))]
    line = next(line for line in out.splitlines() if line.strip().startswith(name))
    assert [x.strip() for x in line.split("  ") if x.strip()][-3:] == [
      *map(shown, numbers),
      shown(statistics.paired(right, left), sign="+"),
    ]
    assert ("(few)" in line) == (name != "all")
  assert evaluate.main(["table", "5", f"--input={copy}", "--rounds=1,9"]) == 1
  assert "give two of 0, 1, 2, 3" in capsys.readouterr().err


def test_figure_3_of_a_run_grades_its_responses_once(run, tmp_path, capsys):
  flags = ["figure", "3", f"--input={run}", "--with=rules:length", f"--output={tmp_path / 'g'}", "--prompts=6"]
  assert evaluate.main([*flags, f"--html={tmp_path / 'f.svg'}"]) == 0
  out = capsys.readouterr().out
  lines = [json.loads(line) for line in (tmp_path / "g" / "scores.jsonl").read_text().splitlines()]
  texts = {(x.prompt_id, x.sample_id): x.text for path in layout.parts_of(run / "round_03/responses")
           for x in runs.shards.read_records(path, Response)}  # fmt: skip
  assert len({line["id"] for line in lines}) == 6 and len(lines) == 30
  assert all(line["extrinsic"] == len(texts[line["id"], line["sample_id"]]) for line in lines)
  by = {id: list(of) for id, of in itertools.groupby(lines, lambda line: line["id"])}
  judge, extrinsic = (np.array([[line[name] for line in of] for of in by.values()]) for name in ("judge", "extrinsic"))
  curve = paper.best_of_n(judge, extrinsic)
  for n in (1, 2, 5):
    line = next(line for line in out.splitlines() if line.split()[:1] == [f"{n}"])
    assert shown(statistics.mean(curve[:, n - 1])) in line and shown(statistics.mean(extrinsic.mean(axis=1))) in line
  # The same by two files of scores.
  for name in ("judge", "extrinsic"):
    jsonl(tmp_path / f"{name}.jsonl", [line | {"score": line[name]} for line in lines])
  assert (
    evaluate.main(["figure", "3", f"--input={tmp_path / 'judge.jsonl'}", f"--extrinsic={tmp_path / 'extrinsic.jsonl'}"])
    == 0
  )
  assert capsys.readouterr().out.splitlines()[:5] == out.splitlines()[:5]
  assert evaluate.main([*flags[:3], flags[4]]) == 1 and "--with and --output are missing" in capsys.readouterr().err
