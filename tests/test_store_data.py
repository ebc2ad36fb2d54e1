"""Users' data: every shape that is promised is read, and every mistake is named with file, line and field."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alma_jax.store import data

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
GOOD = {"prompt": "Hi", "response": "Hello", "score": 7}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path


def mistake(path, need=("response", "score")):
  with pytest.raises(data.DataError) as error:
    data.load_examples(path, need)
  return str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_all_containers_and_both_shapes_give_the_same_rows(suffix, tmp_path):
  flat = [{"prompt": f"p{i}", "response": f"r{i} \u2028 \U0001f600", "score": i / 2} for i in range(4)]
  chats = [
    {
      "messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}],
      "score": r["score"],
    }
    for r in flat
  ]
  for name, rows in [("flat", flat), ("chats", chats)]:
    path = tmp_path / f"{name}.{suffix}"
    if suffix == "parquet":
      pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "json":
      path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
      path.write_text("\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    found, report = data.load_examples(path, need=("response", "score"))
    step = 2 if suffix == "jsonl" else 1  # every other line is empty there
    assert found == [
      data.SeedRow(({"role": "user", "content": r["prompt"]},), r["response"], r["score"], 1 + i * step)
      for i, r in enumerate(flat)
    ]
    assert report == {
      "rows": 4,
      "kept": 4,
      "empty": 0,
      "duplicate": 0,
      "odd_turns": 0,
      "examples": {"empty": [], "duplicate": [], "odd_turns": []},
      "ignored_fields": [],
    }


@pytest.mark.parametrize(
  "row",
  [
    {"messages": [SYSTEM, USER, REPLY]},
    {"messages": [SYSTEM, USER], "response": "Hello"},
    {"messages": [SYSTEM, USER, REPLY], "response": "Hello", "prompt": "not used"},
  ],
)
def test_the_answer_of_a_conversation(row, tmp_path):
  rows, _ = data.load_examples(write(tmp_path / "a.jsonl", [row]))
  assert rows == [data.SeedRow((SYSTEM, USER), "Hello", None, 1)]


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "Hi"},
    {"prompt": "Hi", "response": 5},
    {"messages": [USER]},
    {"messages": [USER, REPLY], "response": ""},
  ],
)
def test_prompts_alone(row, tmp_path):
  rows, _ = data.load_examples(write(tmp_path / "a.jsonl", [row]), need=())
  assert rows == [data.SeedRow((USER,), None, None, 1)]


def test_the_turn_before_the_last_answer_is_the_prompt(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"messages": [USER, REPLY, {"role": "user", "content": "More"}, REPLY]}])
  rows, _ = data.load_examples(path)
  assert [m["content"] for m in rows[0].messages] == ["Hi", "Hello", "More"]


def test_empty_rows_and_exact_duplicates_are_counted(tmp_path):
  rows = [
    GOOD,
    {"prompt": " \n", "response": "x", "score": 1},
    GOOD | {"id": 3},
    GOOD | {"score": 8},  # a second annotator
    {"prompt": "x", "response": "", "score": 1},
    {"messages": [{"role": "user", "content": ""}, REPLY], "score": 1},
    {"messages": [USER, REPLY], "score": 7.0},
    *[GOOD] * 20,
  ]
  path = write(tmp_path / "a.jsonl", rows)
  found, report = data.load_examples(path, need=("response", "score"))
  assert [(r.line, r.score) for r in found] == [(1, 7.0), (4, 8.0)]
  assert report["rows"] == 27
  assert report["kept"] + report["empty"] + report["duplicate"] == 27
  assert report["examples"]["empty"] == [2, 5, 6]
  assert report["examples"]["duplicate"] == [3, 7, 8, 9, 10, 11, 12, 13, 14, 15]
  assert report["ignored_fields"] == ["id"]
  found, _ = data.load_examples(path)  # without scores both annotators say the same
  assert [r.line for r in found] == [1]


def test_dialogues_whose_turns_do_not_alternate_are_left_out_and_counted(tmp_path):
  odd = [[USER, USER, REPLY], [REPLY, USER, REPLY], [SYSTEM, REPLY, USER, REPLY], [USER, REPLY, REPLY, USER, REPLY]]
  even = [[USER, REPLY], [SYSTEM, USER, REPLY], [USER, REPLY, USER, REPLY]]
  path = write(tmp_path / "a.jsonl", [{"messages": list(turns)} for turns in (*odd, *even)])
  for need in (("response",), ()):
    rows, report = data.load_examples(path, need)
    assert [len(row.messages) for row in rows] == [1, 2, 3] and [row.line for row in rows] == [5, 6, 7]
    assert report["odd_turns"] == 4 and report["examples"]["odd_turns"] == [1, 2, 3, 4] and report["kept"] == 3
  write(path, [{"messages": odd[0]}])
  assert "the turns of 1 of 1 rows do not alternate" in mistake(path, ())
  with pytest.raises(data.DataError, match=r"line 3, field messages: the turns must alternate.*found user, user"):
    data.check_turns((USER, USER), "a.jsonl, line 3")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_row_that_is_no_conversation_by_its_size_is_named(suffix, tmp_path, monkeypatch):
  monkeypatch.setattr(data, "LONGEST", 2_000_000)
  path, rows = tmp_path / f"a.{suffix}", [GOOD, {"prompt": "x" * 3_000_000, "response": "y", "score": 1}]
  if suffix == "parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  else:
    path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
  what = {"jsonl": "line", "json": "item", "parquet": "row"}[suffix]
  assert f"{path}, {what} 2: a row of 3.0 MB; a row is one conversation, of at most 2 MB" in mistake(path)
  monkeypatch.setattr(data, "LONGEST", 4_000_000)
  assert len(data.load_examples(path)[0]) == 2


@pytest.mark.parametrize(
  ("row", "words"),
  [
    (
      {"messages": [{"role": "User", "content": "x"}]},
      ["messages[0].role", "unknown role 'User'", "one of system"],
    ),
    ({"messages": [{"role": "asistant", "content": "x"}]}, ["Did you mean 'assistant'?"]),
    (
      {"messages": [USER, {"role": "assistant", "content": 5}]},
      ["messages[1].content", "a string", "a number"],
    ),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, ["messages[1].content", "null"]),
    ({"messages": [USER, {"role": "assistant"}]}, ["messages[1]", "`content` is missing", "present: role"]),
    ({"messages": [USER, "x"]}, ["messages[1]", "found a string"]),
    ({"messages": [USER]}, ["field messages", "last turn must be the assistant's"]),
    ({"messages": [REPLY]}, ["field messages", "a user's turn before the answer, found none"]),
    ({"messages": [USER, REPLY, REPLY]}, ["a user's turn before the answer, found role 'assistant'"]),
    ({"messages": [USER, SYSTEM, REPLY]}, ["messages[1].role", "only as the first"]),
    ({"messages": []}, ["field messages", "expected a list"]),
    ({"messages": {"role": ["user", "assistant"], "content": ["Hi"]}}, ["field messages", "2 roles and 1 contents"]),
    ({"messages": {"role": "user", "content": "Hi"}}, ["field messages", "an object whose role is no list"]),
    ({"messages": {"role": ["user"], "content": None}}, ["field messages", "an object whose content is no list"]),
    ({"messages": "Hi"}, ["field messages", "expected a list", "found a string"]),
    (
      {"messages": [USER, REPLY], "response": "Other"},
      ["`messages` end with one answer and `response` is another"],
    ),
    ({"prompt": ["Hi"], "response": "x"}, ["field prompt", "expected a string, found a list"]),
    ({"prompt": "Hi", "response": {"a": 1}}, ["field response", "found an object"]),
    ({"prompt": "Hi", "response": "\ud83d"}, ["field response", "not valid Unicode"]),
    (
      {"prompt": "Hi", "reponse": "x"},
      ["`response` is missing", "present: prompt, reponse", "misspell 'reponse'?"],
    ),
    ({"promt": "Hi"}, ["`prompt` or `messages` is missing", "present: promt", "misspell 'promt'?"]),
    ({}, ["`prompt` or `messages` is missing", "present: none"]),
    (GOOD | {"score": 11}, ["field score", "0 to 10", "11"]),
    (GOOD | {"score": -0.5}, ["field score", "0 to 10", "-0.5"]),
    (GOOD | {"score": "7"}, ["field score", "a string: '7'"]),
    (GOOD | {"score": True}, ["field score", "a boolean"]),
    (GOOD | {"score": float("nan")}, ["field score", "nan"]),
    (GOOD | {"score": 10**400}, ["field score", "0 to 10"]),
    ({"prompt": "Hi", "response": "x"}, ["`score` is missing", "present: prompt, response"]),
    (["Hi"], ["expected an object", "found a list"]),
    (3, ["expected an object", "found a number"]),
  ],
)
def test_mistakes_in_rows_are_named(row, words, tmp_path):
  text = mistake(write(tmp_path / "a.jsonl", [GOOD, row]))
  assert text.startswith(f"{tmp_path / 'a.jsonl'}, line 2")
  for word in words:
    assert word in text


def test_mistakes_in_files_are_named(tmp_path):
  path = tmp_path / "seeds.jsonl"
  path.write_text('{"prompt": "Hi", "response": "x", "score": 1}\n{"prompt": "Hi",\n')
  assert f"{path}, line 2, column" in mistake(path)
  assert "not valid JSON" in mistake(path)
  path.write_text('{"prompt": ' + "1" * 5000 + "}")
  assert "line 1: cannot be read" in mistake(path)
  path.write_text("[" * 100_000)
  assert "cannot be read" in mistake(path) or "not valid JSON" in mistake(path)
  path.write_bytes(b'{"prompt": "Hi"}\n{"prompt": "\xff"}\n')
  assert "line 2: not UTF-8" in mistake(path)
  path.write_text(" \n")
  assert "the file is empty" in mistake(path)
  path.write_text("[]")
  assert "holds no rows" in mistake(path)
  path.write_text('[{"prompt": "Hi", "response": "x"},\n {"prompt": 3}]')
  assert "item 2, field prompt" in mistake(path, ())
  write(path, [{"prompt": " "}])
  assert "all 1 rows have an empty prompt" in mistake(path, ())

  assert "Near names there: seeds.jsonl" in mistake(tmp_path / "seed.jsonl")
  assert "no directory" in mistake(tmp_path / "nowhere" / "seed.jsonl")
  assert "expected a .jsonl, .json or .parquet" in mistake(tmp_path)
  (tmp_path / "a.csv").write_text("prompt,response\n")
  assert "expected a .jsonl, .json or .parquet" in mistake(tmp_path / "a.csv")


def test_mistakes_in_parquet_are_named(tmp_path):
  path = tmp_path / "a.parquet"
  path.write_bytes(b"no parquet")
  assert "cannot be read as Parquet" in mistake(path)
  pq.write_table(pa.table({"promt": ["Hi"], "response": ["x"]}), path)
  assert f"{path}: `prompt` or `messages` is missing" in mistake(path)
  assert "present: promt, response. Did you misspell 'promt'?" in mistake(path)
  pq.write_table(pa.table({"prompt": ["Hi", "Ho"], "response": ["x", None]}), path)
  assert f"{path}, row 2: `response` is missing or null" in mistake(path, ("response",))
  pq.write_table(pa.table({"prompt": ["Hi"], "response": ["x"], "score": [10.5]}), path)
  assert f"{path}, row 1, field score" in mistake(path)
  pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
  assert "holds no rows" in mistake(path, ())


def test_our_own_trainsets_can_be_read_as_seeds(tmp_path):
  from alma_jax.store import records, shards

  example = records.Example("0" * 16, (SYSTEM, USER), "Hello", 2, "round_02", 8.5)
  shards.write_records(tmp_path / "part.parquet", [example], records.Example)
  rows, report = data.load_examples(tmp_path / "part.parquet", need=("response", "score"))
  assert rows == [data.SeedRow((SYSTEM, USER), "Hello", 8.5, 1)]
  assert report["ignored_fields"] == ["prompt_id", "round", "source"]


@pytest.fixture(scope="module")
def tfds_home(tmp_path_factory):
  """Two data sets written by TFDS itself, as ArrayRecord and without TensorFlow."""
  tfds = pytest.importorskip("tensorflow_datasets")
  pytest.importorskip("array_record")
  home = tmp_path_factory.mktemp("tfds")
  text = tfds.features.Text()

  class FlatSeeds(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = home
    features = tfds.features.FeaturesDict({"prompt": text, "response": text, "score": tfds.features.Scalar(np.float32)})

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, _):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(3):
        yield i, {"prompt": f"p{i} \u00e9", "response": f"r{i}", "score": i}

  class ChatSeeds(FlatSeeds):
    features = tfds.features.FeaturesDict({"messages": tfds.features.Sequence({"role": text, "content": text})})

    def _generate_examples(self):
      yield 0, {"messages": [SYSTEM, USER, REPLY]}

  for builder in (FlatSeeds, ChatSeeds):
    builder(data_dir=home, file_format="array_record").download_and_prepare()
  return home


@pytest.fixture
def tfds_at_home(tfds_home, monkeypatch):
  """The data directory is normally set with TFDS_DATA_DIR, which TFDS reads only once, at its import."""
  import tensorflow_datasets as tfds

  data_source = tfds.data_source
  monkeypatch.setattr(
    tfds, "data_source", lambda name, **args: data_source(name, data_dir=tfds_home, download=False, **args)
  )


def test_tfds_data_sets_are_read(tfds_at_home):
  rows, _ = data.load_examples("tfds:flat_seeds:train", need=("response", "score"))
  assert sorted((r.messages[0]["content"], r.response, r.score) for r in rows) == [
    (f"p{i} \u00e9", f"r{i}", float(i)) for i in range(3)
  ]
  assert [r.line for r in rows] == [1, 2, 3]
  rows, _ = data.load_examples("tfds:flat_seeds:1.0.0:train[:2]")
  assert len(rows) == 2
  rows, _ = data.load_examples("tfds:chat_seeds:train")
  assert rows == [data.SeedRow((SYSTEM, USER), "Hello", None, 1)]


def test_tfds_mistakes_are_named(tfds_at_home):
  text = mistake("tfds:no_such_seeds:train")
  assert "'no_such_seeds'" in text
  assert "tfds build" in text
  assert len(text) < 500
  assert "Unknown split 'test'" in mistake("tfds:flat_seeds:test")
  assert "expected tfds:NAME[/CONFIG]:SPLIT" in mistake("tfds:flat_seeds")
  assert "tfds:chat_seeds:train, row 1: `score` is missing" in mistake("tfds:chat_seeds:train")


def test_tfds_is_not_imported_without_need():
  import subprocess
  import sys

  code = "import sys; import alma_jax.store.data; sys.exit(any('tensorflow' in m for m in sys.modules))"
  assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
