"""`evaluate grade`: public layouts joined strictly, graded through an endpoint, a batch file or a judge in a file."""

import collections
import http.server
import json
import pathlib
import threading

import pytest
import report_run

from alma_jax.evals import answers
from alma_jax.evals.answers import AnswersError
from alma_jax.judges import api_http, contract
from alma_jax.judges.own import OwnJudge
from alma_jax.mini.formats import JUDGE
from alma_jax.store import layout
from alma_jax.text.judge import Shot
from alma_jax.tools import command, evaluate, score


def jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def user(text):
  return ({"role": "user", "content": text},)


def completion(text):
  return {"model": "judge-2026", "choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def serve(monkeypatch):
  """Starts a server that answers with `said(the request's last message)`; `asked` counts these messages."""
  monkeypatch.setenv(api_http.KEY, "sk-secret-123456")
  started, asked = [], collections.Counter()

  def start(said):
    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        asked[text] += 1
        answer = json.dumps(completion(said(text))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

      def log_message(self, *_):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started.append(server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"api:judge@http://127.0.0.1:{server.server_port}/v1", asked

  yield start
  for server in started:
    server.shutdown()
    server.server_close()


def grade(*flags):
  return evaluate.main(["grade", *flags])


def grades(directory):
  return [json.loads(line) for line in pathlib.Path(directory, "grades.jsonl").read_text().splitlines()]


def numbers(directory):
  return json.loads(pathlib.Path(directory, "summary.json").read_text())["numbers"]


# Files


def turns(*roles, **more):
  return {"messages": [{"role": role, "content": role} for role in roles], **more}


ARENA_2025 = [{"role": "user", "content": "p"}, {"role": "assistant", "content": {"answer": "r"}}]


@pytest.mark.parametrize(
  "row, asked, said",
  [
    ({"prompt": "p", "response": "r"}, ("p",), ("r",)),
    ({"id": 3, "prompt": "p", "responses": [{"sample_id": 0, "text": "r"}]}, ("p",), ("r",)),
    (turns("user", "assistant", "user", response="r"), ("user", "user"), ("assistant", "r")),
    (turns("system", "user", "assistant"), ("system\n\nuser",), ("assistant",)),
    ({"turns": ["a", "b"], "responses": ["x", "y"]}, ("a", "b"), ("x", "y")),
    ({"instruction": "p", "output": "r", "generator": "g"}, ("p",), ("r",)),
    ({"uid": "u", "model": "m", "messages": ARENA_2025}, ("p",), ("r",)),
  ],
)
def test_a_row_of_every_layout(tmp_path, row, asked, said):
  (item,) = answers.joined(jsonl(tmp_path / "a.jsonl", [row]))
  assert (item.turns, item.answers) == (asked, said)


def test_several_responses_are_items_of_their_own(tmp_path):
  row = {"id": "p", "prompt": "?", "responses": [{"text": "a"}, {"text": "b"}]}
  found = answers.joined(jsonl(tmp_path / "a.jsonl", [row]))
  assert [(x.id, x.answers) for x in found] == [("p/0", ("a",)), ("p/1", ("b",))]


def test_fastchats_answers_find_their_questions_and_references_by_id(tmp_path):
  questions = jsonl(
    tmp_path / "q.jsonl", [{"question_id": i, "category": "math", "turns": [f"q{i}", "again"]} for i in (1, 2)]
  )
  said = jsonl(
    tmp_path / "a.jsonl", [{"question_id": i, "choices": [{"index": 0, "turns": [f"a{i}", "b"]}]} for i in (2, 1)]
  )
  right = jsonl(tmp_path / "r.jsonl", [{"question_id": 1, "choices": [{"turns": ["r", "s"]}]}])
  two, one = answers.joined(said, questions, references=right)
  assert (two.id, two.turns, two.answers, two.category, two.references) == (
    "2",
    ("q2", "again"),
    ("a2", "b"),
    "math",
    (),
  )
  assert one.references == ("r", "s")
  with pytest.raises(AnswersError, match=r"a.jsonl, line 1: the row has answers and no question; --set=FILE"):
    answers.joined(said)


def test_a_join_by_prompt_reports_what_differs(tmp_path):
  one = jsonl(tmp_path / "a.jsonl", [{"instruction": f"q{i}", "output": "x"} for i in range(6)])
  (tmp_path / "b.json").write_text(json.dumps([{"instruction": f"q{i}", "output": "y"} for i in (5, 1, 7)]))
  with pytest.raises(AnswersError, match=r"joined by prompt") as error:
    answers.joined(one, against=tmp_path / "b.json")
  assert f"only in {one}: 4, 'q0', 'q2', 'q3' ..." in str(error.value)
  assert f"only in {tmp_path / 'b.json'}: 1, 'q7'" in str(error.value)


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "the file holds no rows"),
    ("{", "line 1: not valid JSON"),
    ("3\n", "line 1: expected an object"),
    ('{"text": "?"}\n', "expected one of the fields prompt, messages"),
    ('{"prompt": "?", "response": 3}\n', "field response: expected a text, found '3'"),
    ('{"id": 1, "prompt": "?", "response": ""}\n' * 2, "line 2 has the same id as .*line 1: '1'"),
  ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, message):
  (tmp_path / "a.jsonl").write_text(text)
  with pytest.raises(AnswersError, match=message):
    answers.joined(tmp_path / "a.jsonl")


# Grading


def test_mt_bench_through_an_endpoint(serve, tmp_path, capsys):
  def said(text):
    return f"Rating: [[{8 if 'Second' in text else 5}]]"

  name, asked = serve(said)
  rows = [
    {"id": i, "category": "writing", "turns": [f"First {i}", f"Second {i}"], "responses": ["x", "y"]} for i in range(3)
  ]
  source = jsonl(tmp_path / "a.jsonl", rows)
  flags = (f"--input={source}", f"--with={name}", "--protocol=mt_bench", f"--output={tmp_path / 'g'}")
  assert grade(*flags, "--dry_run") == 0 and not (tmp_path / "g").exists()
  assert "requests  6 to send, 0 answered before" in capsys.readouterr().out and not asked
  assert grade(*flags, "--budget=4") == 1 and "budget of 4 requests is spent" in capsys.readouterr().err
  assert grade(*flags, "--budget_tokens=5") == 1 and "the budget of 5" in capsys.readouterr().err
  assert not (tmp_path / "g" / "grades.jsonl").exists()
  assert grade(*flags) == 0 and sum(asked.values()) == 6 and set(asked.values()) == {1}
  assert [line["parts"] for line in grades(tmp_path / "g")] == [{"turn_1": 5.0, "turn_2": 8.0}] * 3
  found = numbers(tmp_path / "g")
  assert {name: x["value"] for name, x in found.items()} == {"average": 6.5, "turn 1": 5, "turn 2": 8, "writing": 6.5}
  assert found["average"]["n"] == 6 and found["average"]["low"] == found["average"]["high"] == 6.5
  first = (tmp_path / "g" / "grades.jsonl").read_bytes()
  assert grade(*flags) == 0 and sum(asked.values()) == 6 and (tmp_path / "g" / "grades.jsonl").read_bytes() == first
  for path in (tmp_path / "g").rglob("*.json*"):
    assert "sk-secret" not in path.read_text()
  assert grade(*flags[:2], "--protocol=lima_1_6", flags[3]) == 1
  assert "holds grades of another judge and protocol" in capsys.readouterr().err


def test_arena_hard_against_another_models_answers(serve, tmp_path):
  # The model (whose answers say "m") always wins a little, whether it stands first or second.
  name, _ = serve(lambda text: "[[A>B]]" if text.index("m0") < text.index("b0") else "[[B>A]]")
  own = jsonl(tmp_path / "a.jsonl", [{"id": i, "prompt": f"q{i}", "response": "m0"} for i in range(4)])
  other = jsonl(tmp_path / "b.jsonl", [{"id": i, "prompt": f"q{i}", "response": "b0"} for i in (3, 2, 1, 0)])
  flags = (f"--input={own}", f"--with={name}", "--protocol=arena_hard_2025", f"--output={tmp_path / 'g'}")
  assert grade(*flags, f"--against={other}") == 0
  assert numbers(tmp_path / "g")["win rate %"] == {"value": 100, "n": 4, "low": 100, "high": 100}
  assert numbers(tmp_path / "g")["both orders agree"]["value"] == 1
  assert [line["battles"] for line in grades(tmp_path / "g")] == [[1, 1]] * 4


def test_a_comparison_needs_the_other_answers(serve, tmp_path, capsys):
  name, asked = serve(lambda text: "")
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "response": "!"}])
  flags = (f"--input={source}", f"--with={name}", f"--output={tmp_path / 'g'}")
  assert grade(*flags, "--protocol=alpaca_eval") == 1 and "give --against=FILE" in capsys.readouterr().err and not asked


def test_a_batch_file_there_and_back_with_an_error_fails_and_keeps(tmp_path, capsys):
  source = jsonl(tmp_path / "a.jsonl", [{"id": i, "prompt": f"q{i}", "response": f"r{i}"} for i in range(3)])
  flags = (f"--input={source}", "--with=api:judge@http://127.0.0.1:9/v1", f"--output={tmp_path / 'g'}")
  batch, results = tmp_path / "batch.jsonl", tmp_path / "results.jsonl"
  assert grade(*flags, f"--batch_out={batch}") == 0 and "3 requests" in capsys.readouterr().out
  asked = [json.loads(line) for line in batch.read_text().splitlines()]
  told = [{"custom_id": x["custom_id"], "response": {"status_code": 200, "body": completion("[[6]]")}} for x in asked]
  told[1] = {"custom_id": asked[1]["custom_id"], "response": None, "error": {"code": "batch_expired"}}
  jsonl(results, told[::-1])
  assert grade(*flags, f"--batch_in={results}") == 1
  out = capsys.readouterr()
  assert (
    "2 answers, 1 errors, 0 not there" in out.out
    and "batch_expired" in out.out
    and "1 of 3 responses no score" in out.err
  )
  assert [line["score"] for line in grades(tmp_path / "g")] == [6, None, 6]
  assert grade(*flags, f"--batch_out={batch}") == 0 and len(batch.read_text().splitlines()) == 1
  jsonl(results, [told[0] | {"custom_id": "x"}])
  assert grade(*flags, f"--batch_in={results}") == 1 and "1 results of other requests" in capsys.readouterr().err


def test_a_judge_in_a_users_file(tmp_path, monkeypatch):
  (tmp_path / "graders.py").write_text(
    "from alma_jax.judges.contract import Verdict\n"
    "class Long:\n"
    "  identity, scale = 'long', None\n"
    "  def __init__(self, host, options): pass\n"
    "  def scores(self, pairs): return [Verdict(float(len(text))) for _, text in pairs]\n"
  )
  monkeypatch.chdir(tmp_path)
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "response": "x" * n} for n in (1, 5)])
  assert grade(f"--input={source}", "--with=graders:Long", "--output=g") == 0
  assert [line["score"] for line in grades("g")] == [1, 5] and numbers("g")["mean"]["value"] == 3


def test_questions_are_read_in_every_layout_of_sets(tmp_path):
  questions = jsonl(tmp_path / "q.jsonl", [{"conversations": ["hello", "hi!"], "source": "wiki"}])
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "response": "hey"}])
  (item,) = answers.joined(source, questions=questions)
  assert (item.turns, item.answers, item.category, item.references) == (("hello",), ("hey",), "wiki", ("hi!",))
  questions = jsonl(tmp_path / "h.jsonl", [{"question_id": "a", "cluster": "code", "turns": [{"content": "hello"}]}])
  source = jsonl(tmp_path / "b.jsonl", [{"question_id": "a", "choices": [{"turns": [{"content": "hey"}]}]}])
  (item,) = answers.joined(source, questions=questions)
  assert (item.id, item.turns, item.answers, item.category) == ("a", ("hello",), ("hey",), "code")


def test_a_rule_reads_the_row_of_the_question(tmp_path):
  kinds = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
  questions = jsonl(tmp_path / "q.jsonl", [{"key": 7 + i, "prompt": f"q{i}", **kinds} for i in range(2)])
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "response": x} for i, x in ((1, "one, two"), (0, "one"))])
  assert grade(f"--input={source}", f"--set={questions}", "--with=rules:ifeval", f"--output={tmp_path / 'g'}") == 0
  found = [(x["key"], x["score"], x["strict"], x["loose"]) for x in grades(tmp_path / "g")]
  assert found == [(8, 0, [False], [False]), (7, 1, [True], [True])]


def test_the_packages_own_judge_gives_the_scores_of_the_scorer(tmp_path):
  rows = [{"prompt": "country : lyon", "response": r} for r in ("answer: lyon france .", "norway", "rome")]
  source = jsonl(tmp_path / "a.jsonl", rows)
  assert grade(f"--input={source}", "--with=own:mini", "--rows=4", f"--output={tmp_path / 'g'}") == 0
  out = tmp_path / "scores.jsonl"
  assert score.main([f"--input={source}", "--model=mini", "--rows=4", f"--output={out}"]) == 0
  scored = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(x["score"], x["mass"]) for x in grades(tmp_path / "g")] == [(x["score"], x["mass"]) for x in scored]


def test_all_rounds_of_a_run_are_graded_and_a_killed_command_goes_on(tmp_path, monkeypatch, capsys):
  report_run.make(tmp_path / "run")
  place, asked, real = tmp_path / "g", [], contract.scores
  monkeypatch.setattr(evaluate, "PART", 16)  # 40 answers in three parts

  def killed(judge, pairs, *rest, **more):
    asked.append(pairs[0].name)
    if len(asked) == 5:  # in the second round's second part
      raise KeyboardInterrupt
    return real(judge, pairs, *rest, **more)

  monkeypatch.setattr(evaluate.contract, "scores", killed)
  flags = (f"--input={tmp_path / 'run'}", "--with=rules:length", f"--output={place}")
  assert grade(*flags) == 130
  assert grade(*flags) == 0 and len(asked) == len(set(asked)) + 1  # what was under way is asked again, nothing else
  rounds = sorted(path.name for path in (place / "eval").iterdir())
  assert rounds == [f"round_{r:02d}" for r in layout.rounds(tmp_path / "run")]
  for r in layout.rounds(tmp_path / "run"):
    found = grades(place / "eval" / f"round_{r:02d}")
    assert [x["score"] for x in found] == [i + r for i in range(40)] and found[3]["id"] == "e3"
  capsys.readouterr()
  assert evaluate.main(["compare", f"--input={place}"]) == 0
  assert "eval, graded by rules:length" in (shown := capsys.readouterr().out) and "+1.000 ± 0.000" in shown
  # Pairwise against a round; another judge in the same place is refused.
  api = ("--with=api:m@http://127.0.0.1:9/v1", "--protocol=arena_hard_2025", f"--output={tmp_path / 'p'}", "--dry_run")
  assert grade(flags[0], *api, "--against=round_01") == 0
  games = 2 * 40 * (len(rounds) - 1)
  assert f"{games:,} to send, 0 answered before" in capsys.readouterr().out
  assert grade(flags[0], *api, "--against=round_09") == 1 and "there are round 0, round 1" in capsys.readouterr().err
  assert grade(flags[0], "--with=rules:refusal", flags[2]) == 1
  assert "holds grades of another judge" in capsys.readouterr().err


def test_a_base_model_judges_after_the_examples_of_a_file(tmp_path, capsys):
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": "country : lyon", "response": r} for r in ("lyon france .", "rome")])
  rows = [{"prompt": f"country : {x}", "response": f"{x} france .", "score": n} for x, n in (("oslo", 2), ("lyon", 9))]
  shots = jsonl(tmp_path / "shots.jsonl", rows)
  asked = ("--rows=4", f"--shots={shots}")
  assert grade(f"--input={source}", "--with=own:mini", *asked, f"--output={tmp_path / 'g'}") == 0
  host = command.open_model(score.FLAGS.values(["--model=mini", "--input=x", "--output=x", "--rows=4"]), str).host
  judge = OwnJudge(
    host, host.base, JUDGE, shots=tuple(Shot(user(r["prompt"]), r["response"], r["score"]) for r in rows)
  )
  exact = [v.score for v in judge.scores([(user("country : lyon"), r) for r in ("lyon france .", "rome")])]
  assert [x["score"] for x in grades(tmp_path / "g")] == pytest.approx(exact, abs=1e-5)
  assert json.loads((tmp_path / "g" / "summary.json").read_text())["judge"] == judge.identity
  jsonl(shots, [rows[0] | {"score": 2.5}])
  assert grade(f"--input={source}", "--with=own:mini", *asked, f"--output={tmp_path / 'h'}") == 1
  assert "shots.jsonl, line 1: an example's score is a whole number from 0 to 10" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--with=api:x",), "must be MODEL@URL"),
    (("--with=api:",), "the text after the colon is missing"),
    (
      ("--with=rules:length", "--mode=sampled"),
      "mode is 'sampled'; it is for a judge own:DIR, and with is 'rules:length'",
    ),
    (("--with=graders:Nobody",), "with is 'graders:Nobody'"),
    (("--with=api:m@http://h", "--protocol=mtbench"), "did you mean 'mt_bench'"),
    (("--with=api:m@http://h", "--batch_in=x", "--batch_out=y"), "two commands"),
  ],
)
def test_a_wrong_flag_is_named(tmp_path, capsys, flags, message):
  source = jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "response": "!"}])
  try:
    status = grade(f"--input={source}", f"--output={tmp_path / 'g'}", *flags)
  except SystemExit as error:
    status = error.code
  assert status in (1, 2) and message in capsys.readouterr().err
