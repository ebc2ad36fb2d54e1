"""`evaluate answer`: a benchmark's prompts answered by a model, each as one greedy or seeded conversation."""

import json

import pytest

from alma_jax.evals import answers
from alma_jax.tools import evaluate, sample

ASKED = (("math", "give country of volos please"), ("writing", "what is the country of volos"))
LATER = "and give country of lima please"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  path = tmp_path_factory.mktemp("set") / "question.jsonl"
  rows = [{"question_id": 81 + i, "category": kind, "turns": [text, LATER]} for i, (kind, text) in enumerate(ASKED)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def answered(questions, output, *flags):
  call = ["answer", "--model=mini", f"--set={questions}", f"--output={output}", "--max_new_tokens=12", *flags]
  assert evaluate.main(call) == 0
  return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def greedy(tmp_path, messages):
  (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
  flags = "--n=1", "--temperature=0", "--top_p=1.0", "--max_new_tokens=12", "--slots=2"
  out = tmp_path / f"out{len(messages)}.jsonl"
  assert sample.main(["--model=mini", f"--input={tmp_path / 'in.jsonl'}", f"--output={out}", *flags]) == 0
  return json.loads(out.read_text())["responses"][0]["text"]


def test_both_turns_are_answered_each_after_the_models_own_answer(questions, tmp_path, capsys):
  math, writing = answered(questions, tmp_path / "mine", "--slots=2")
  assert math["turns"] == [ASKED[0][1], LATER] and (math["id"], math["category"], math["model"]) == (81, "math", "mine")
  assert math["preset"] == "mt_bench" and len(math["responses"]) == len(writing["responses"]) == 2
  talk = [{"role": "user", "content": ASKED[0][1]}]
  assert math["responses"][0] == greedy(tmp_path, talk)  # mathematics is answered at temperature 0
  talk += [{"role": "assistant", "content": math["responses"][0]}, {"role": "user", "content": LATER}]
  assert math["responses"][1] == greedy(tmp_path, talk)
  # The same seed gives the same answers; what grades them reads the file.
  again = answered(questions, tmp_path / "again", "--slots=2", "--name=mine")
  assert again == [math, writing]
  items = answers.joined(tmp_path / "mine" / "answers.jsonl", questions=questions)
  assert [item.answers for item in items] == [tuple(math["responses"]), tuple(writing["responses"])]


def test_a_length_without_room_for_prompts_is_an_error(questions, tmp_path, capsys):
  call = ["answer", "--model=mini", f"--set={questions}", f"--output={tmp_path / 'x'}"]
  assert evaluate.main([*call, "--preset=plain"]) == 1
  assert "the preset plain writes up to 2,048 tokens, and the model has 256 positions" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_answers_and_a_judges_test_are_written_for_the_official_tools(tmp_path, capsys):
  place = tmp_path / "mine"
  place.mkdir()
  line = {
    "id": "a1", "category": "hard", "turns": ["hello"], "responses": ["# hi"], "finished": [True], "tokens": [3],
    "model": "mine", "preset": "arena_hard_2025", "seed": 0,
  }  # fmt: skip
  (place / "answers.jsonl").write_text(json.dumps(line) + "\n")

  def exported(form, name, status=0):
    call = ["export", f"--input={place}", f"--as={form}", f"--output={tmp_path / name}"]
    assert evaluate.main(call) == status
    return (tmp_path / name).read_text() if not status else capsys.readouterr().err

  arena = json.loads(exported("arena_hard_2025", "mine.jsonl"))
  assert arena["uid"] == "a1" and arena["messages"][-1]["content"] == {"answer": "# hi"}
  assert next(iter(arena["metadata"])) == "token_len" and arena["metadata"]["header_count"]["h1"] == 1
  (alpaca,) = json.loads(exported("alpaca_eval", "model_outputs.json"))
  assert alpaca == {"instruction": "hello", "output": "# hi", "generator": "mine", "dataset": "hard"}
  assert "call it mine.jsonl" in exported("fastchat", "other.jsonl", 1)
  assert "mine/grades.jsonl is missing" in exported("rewardbench", "rb.json", 1)

  pairs = [{"prompt": "x", "chosen": "longer", "rejected": "long", "subset": "hep-cpp", "id": i} for i in range(2)]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
  call = ["judge", f"--data={tmp_path / 'pairs.jsonl'}", "--kind=rewardbench", "--with=rules:length"]
  assert evaluate.main([*call, f"--output={place}"]) == 0
  assert json.loads(exported("rewardbench", "rb.json"))["hep-cpp"] == 1.0
