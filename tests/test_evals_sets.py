"""Prompt sets in every public layout; files for the official tools, read again by the rules of their readers."""

import json
import re

import pytest

from alma_jax.evals import export, presets, sets
from alma_jax.evals.export import ExportError, ModelAnswers, ScoredPair
from alma_jax.evals.instructions import InstructionError
from alma_jax.evals.sets import JoinError, Question
from alma_jax.store.data import DataError

# Two rows of every layout, with texts of our own, and what they are read as: key, prompt, later turns, category.
LAYOUTS = {
  "mt_bench": (
    [{"question_id": 81, "category": "writing", "turns": ["Praise a lamp.", "Shorter."]},
     {"question_id": 82, "category": "math", "turns": ["2 + 2?", "Times 3?"], "reference": ["4", "12"]}],
    [(81, "Praise a lamp.", ("Shorter.",), "writing"), (82, "2 + 2?", ("Times 3?",), "math")],
  ),
  "alpaca_eval": (
    [{"instruction": "Name a tree.", "output": "Oak", "generator": "base", "dataset": "koala"},
     {"instruction": "Name a bird."}],
    [(None, "Name a tree.", (), "koala"), (None, "Name a bird.", (), None)],
  ),
  "arena_hard_2024": (
    [{"question_id": "a1", "category": "arena-hard-v0.1", "cluster": "Gardens", "turns": [{"content": "Plan beds."}]},
     {"question_id": "a2", "cluster": "Code", "turns": [{"content": "Sort it."}]}],
    [("a1", "Plan beds.", (), "Gardens"), ("a2", "Sort it.", (), "Code")],
  ),
  "arena_hard_2025": (
    [{"uid": "b1", "category": "hard_prompt", "subcategory": "math", "prompt": "Prove it."},
     {"uid": "b2", "category": "creative_writing", "prompt": "Sing."}],
    [("b1", "Prove it.", (), "hard_prompt"), ("b2", "Sing.", (), "creative_writing")],
  ),
  "lima": (
    [{"conversations": ["How are nets mended?"], "source": "own"},
     {"conversations": ["Hi.", "Hello.", "Why is tea hot?", "It is boiled."]}],
    [(None, "How are nets mended?", (), "own"), (None, "Why is tea hot?", (), None)],
  ),
  "ifeval": (
    [{"key": 1, "prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
     {"key": 2, "prompt": "Say bye.", "instruction_id_list": ["startend:quotation"], "kwargs": [{"letter": None}]}],
    [(1, "Say hi.", (), None), (2, "Say bye.", (), None)],
  ),
  "plain": (
    [{"id": "x", "prompt": "One?", "category": "numbers", "reference": "1"},
     {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]}],
    [("x", "One?", (), "numbers"), (None, "Two?", (), None)],
  ),
}  # fmt: skip


def written(tmp_path, rows, name="set.jsonl"):
  path = tmp_path / name
  text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_told_by_its_fields_and_read_into_items(tmp_path, layout):
  rows, expected = LAYOUTS[layout]
  found = sets.read(written(tmp_path, rows, "set.json" if layout == "alpaca_eval" else "set.jsonl"))
  assert found.layout == layout and len(found.sha256) == 64
  assert [(x.key, x.prompt, x.later, x.category) for x in found.questions] == expected
  assert [x.row for x in found.questions] == rows and [x.line for x in found.questions] == [1, 2]
  assert (str(sets.SIZES[layout][0]) in found.note) if layout in sets.SIZES else not found.note


def test_references_and_earlier_turns_are_kept(tmp_path):
  def read(layout):
    return sets.read(written(tmp_path, LAYOUTS[layout][0]), layout).questions

  assert [x.references for x in read("mt_bench")] == [(), ("4", "12")]
  assert [x.references for x in read("plain")] == [("1",), ()]
  _, lima = read("lima")
  assert lima.references == ("It is boiled.",)
  assert [m["role"] for m in lima.messages] == ["user", "assistant", "user"]
  assert read("plain")[1].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
  "rows, said",
  [
    ([{"question_id": 1, "turns": ["a", ""]}], r"line 1, field turns\[1\]: it is empty"),
    ([{"question_id": 1, "turns": []}], "line 1, field turns: expected a list"),
    ([{"question_id": True, "turns": ["a"]}], "line 1, field question_id: expected a whole number or a text"),
    ([{"question_id": 1, "turns": ["a"]}] * 2, "line 2: the key 1 stands in line 1, too"),
    ([{"question_id": "q", "turns": [{"text": "a"}]}], r"line 1, field turns\[0\]: expected .*content"),
    ([{"uid": "u", "prompt": 3}], "line 1, field prompt: expected a string, found a number"),
    ([{"instruction": "a", "input": "b"}], "line 1, field input"),
    ([{"promt": "a"}], "line 1: .*Did you misspell 'promt'"),
    ([{"prompt": "a"}, {"prompt": " "}], "line 2: a turn of the prompt is empty"),
    (["a"], "line 1: expected an object"),
  ],
)
def test_errors_name_file_line_and_field(tmp_path, rows, said):
  with pytest.raises(DataError, match=rf"set.jsonl, {said}"):
    sets.read(written(tmp_path, rows))


def test_an_instruction_that_is_wrong_is_found_when_the_set_is_read(tmp_path):
  row = LAYOUTS["ifeval"][0][0] | {"instruction_id_list": ["punctuation:no_coma"]}
  with pytest.raises(InstructionError, match=r"line 1, .*Did you mean 'punctuation:no_comma'"):
    sets.read(written(tmp_path, [row]))


def test_prompts_without_keys_that_repeat_are_asked_once_and_listed(tmp_path):
  found = sets.read(written(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]))
  assert [x.prompt for x in found.questions] == ["a", "b"] and found.repeated == (3,)


def test_joins_are_strict_and_list_what_does_not_fit():
  questions = [Question(key, ({"role": "user", "content": f"prompt {key}"},)) for key in (1, 2)]
  questions.append(Question(None, ({"role": "user", "content": "no key"},)))
  assert sets.joined(questions, [("no key", "c"), (2, "b"), (1, "a")], "x.jsonl") == ["a", "b", "c"]
  with pytest.raises(JoinError, match=r"1 not answered: 'no key'; 1 not in the set: 3; 1 answered twice: 1"):
    sets.joined(questions, [(1, "a"), (1, "a"), (2, "b"), (3, "d")], "x.jsonl")


def test_presets_follow_category_and_row():
  bench = presets.PRESETS["mt_bench"]
  assert [bench.of(c).temperature for c in ("writing", "math", "stem", "gardening", None)] == [0.7, 0, 0.1, 0.7, 0.7]
  assert bench.of("math", 0.3).temperature == 0.3 and bench.of("math").max_new_tokens == 1024 and bench.turns == 2
  lima = presets.PRESETS["lima"].of(None)
  assert (lima.temperature, lima.top_p, lima.repetition_penalty) == (0.7, 0.9, 1.2)
  assert presets.PRESETS.keys() == sets.LAYOUTS.keys()


# Exports

TWO = ["A *fine* lamp.\nIt shines.", "Lamp!"]
MARKED = "# Plan\n## Beds\n1. dig\n - sow\n* wait\n**bold** and __bold__\n```py\n# no\n- no **no**\n```\n"


def answers(tmp_path, layout, responses, model="tuned"):
  questions = sets.read(written(tmp_path, LAYOUTS[layout][0]), layout).questions
  found = [ModelAnswers(x, tuple(r), model, tuple(map(len, r))) for x, r in zip(questions, responses, strict=True)]
  stem = export.file_name("fastchat" if layout == "mt_bench" else layout, model)
  return found, tmp_path / stem


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_alpaca_eval_merges_the_outputs_on_instruction(tmp_path):
  found, path = answers(tmp_path, "alpaca_eval", [["An oak é."], ["A wren."]])
  path.write_text(export.text(export.rows("alpaca_eval", found), "alpaca_eval"))
  outputs = {row["instruction"]: row for row in json.loads(path.read_text())}
  assert path.name == "model_outputs.json"
  assert outputs["Name a tree."] == {
    "instruction": "Name a tree.", "output": "An oak é.", "generator": "tuned", "dataset": "koala"
  }  # fmt: skip
  assert outputs["Name a bird."] == {"instruction": "Name a bird.", "output": "A wren.", "generator": "tuned"}


def test_fastchat_reads_two_turns_by_question_and_file_name(tmp_path):
  found, path = answers(tmp_path, "mt_bench", [TWO, ["4", "12"]])
  path.write_text(export.text(export.rows("fastchat", found, 1.5), "fastchat"))
  by_question = {line["question_id"]: line for line in lines(path)}
  assert path.stem == "tuned" and by_question.keys() == {81, 82}
  assert by_question[81]["choices"][0]["turns"] == TWO and by_question[82]["choices"][0]["turns"][1] == "12"
  assert by_question[81].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
  assert len({line["answer_id"] for line in lines(path)}) == 2 and by_question[81]["tstamp"] == 1.5


def test_arena_hard_2024_reads_content_and_token_len(tmp_path):
  found, path = answers(tmp_path, "arena_hard_2024", [["Beds."], ["sorted(x)"]])
  path.write_text(export.text(export.rows("arena_hard_2024", found), "arena_hard_2024"))
  read = {line["question_id"]: line["choices"][0]["turns"][0] for line in lines(path)}
  assert read == {"a1": {"content": "Beds.", "token_len": 5}, "a2": {"content": "sorted(x)", "token_len": 9}}


def test_arena_hard_2025_reads_the_answer_and_the_metadata_in_their_order(tmp_path):
  found, path = answers(tmp_path, "arena_hard_2025", [[MARKED], ["La."]])
  path.write_text(export.text(export.rows("arena_hard_2025", found), "arena_hard_2025"))
  first, second = lines(path)
  assert (path.stem, first["model"], first["uid"]) == ("tuned", "tuned", "b1")
  assert first["messages"][0] == {"role": "user", "content": "Prove it."}
  assert first["messages"][-1]["content"]["answer"] == MARKED and second["messages"][-1]["content"]["answer"] == "La."
  assert list(first["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
  assert first["metadata"]["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
  assert first["metadata"]["list_count"] == {"ordered": 1, "unordered": 2}
  assert first["metadata"]["bold_count"] == {"**": 1, "__": 1} and second["metadata"]["token_len"] == 3


def test_ifeval_joins_on_the_exact_prompt(tmp_path):
  found, path = answers(tmp_path, "ifeval", [["Hi"], ['"Bye"']])
  path.write_text(export.text(export.rows("ifeval", found), "ifeval"))
  assert {line["prompt"]: line["response"] for line in lines(path)} == {"Say hi.": "Hi", "Say bye.": '"Bye"'}


def test_answers_that_a_file_has_no_place_for_are_errors(tmp_path):
  two, _ = answers(tmp_path, "mt_bench", [TWO, TWO])
  plain, _ = answers(tmp_path, "plain", [["1"], ["2"]])
  other = [two[0], ModelAnswers(two[1].question, ("x", "y"), "other", (1, 1))]
  bare = [ModelAnswers(two[0].question, ("x", "y"), "tuned")]
  for form, given, said in (
    ("alpaca_eval", two, "has 2 answers; this file holds one"),
    ("fastchat", plain, "line 2 of the set has no key"),
    ("fastchat", other, "one model, found other, tuned"),
    ("arena_hard_2024", bare, "the answers have none"),
    ("fastchats", two, "known are alpaca_eval, fastchat"),
  ):
    with pytest.raises(ExportError, match=said):
      export.rows(form, given)
  with pytest.raises(ExportError, match=re.escape("'org/model'")):
    export.file_name("fastchat", "org/model")


def test_rewardbench_results_by_subset_with_ties_wrong():
  pairs = [ScoredPair(1, "hep-go", 2.0, 1.0), ScoredPair(2, "hep-go", 1.0, 1.0), ScoredPair(3, "math-prm", 0.0, -1.0)]
  assert export.rewardbench(pairs, "armo", "Seq. Classifier", "llama3") == {
    "model": "armo", "model_type": "Seq. Classifier", "chat_template": "llama3", "hep-go": 0.5, "math-prm": 1.0
  }  # fmt: skip
  scores = export.rewardbench_scores(pairs, "armo", "Seq. Classifier")
  assert scores["results"] == [1, 0, 1] and scores["scores_rejected"] == [1.0, 1.0, -1.0]
