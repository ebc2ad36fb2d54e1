"""Preference pairs and unlabelled prompts as users' data: the loader, and the run's own copy."""

import dataclasses
import json

import pytest
from sessions import session_in

from alma_jax import options as options_lib
from alma_jax.corpus.normalise import prompt_id
from alma_jax.mini import seeds, world
from alma_jax.stages import data as human
from alma_jax.store.data import DataError, SeedRow, load_examples
from configs import alma

PAIR = ("chosen", "rejected")
ASKED = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def answered(text):
  return [ASKED, {"role": "assistant", "content": text}]


def written(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 9},
    {"messages": [ASKED], "chosen": "a", "rejected": "b"},
    {"messages": answered("a"), "chosen": "a", "rejected": "b"},  # the layout of UltraFeedback
    {"prompt": "q", "chosen": answered("a"), "rejected": answered("b")},
    {"prompt": "q", "chosen": answered("a")[1:], "rejected": "b"},
  ],
)
def test_pairs_in_every_layout(row, tmp_path):
  rows, _ = load_examples(written(tmp_path / "pairs.jsonl", row), PAIR)
  assert rows == [SeedRow((ASKED,), None, None, 1, "a", "b")]


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"chosen": "a", "rejected": "b"}, "`prompt` or `messages` is missing"),
    ({"prompt": "q", "chosen": "a"}, "`rejected` is missing or null; present: prompt, chosen"),
    ({"prompt": "q", "chosen": "a", "rejectd": "b"}, "Did you misspell 'rejectd'?"),
    ({"prompt": "q", "chosen": 7, "rejected": "b"}, "field chosen: expected a list of"),
    ({"prompt": "q", "chosen": "a", "rejected": answered("b")[:1]}, "field rejected: expected an answer, or the turns"),
    ({"prompt": "other", "chosen": "a", "rejected": answered("b")}, "found 2 turns, the last by 'assistant', that are"),
    ({"prompt": "q", "chosen": "a", "rejected": [SYSTEM, {"role": "robot", "content": "b"}]}, "field rejected[1].role"),
  ],
)
def test_mistakes_in_pairs_name_file_line_and_field(row, said, tmp_path):
  path = written(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
  with pytest.raises(DataError) as error:
    load_examples(path, PAIR)
  assert str(error.value).startswith(f"{path}, line 2") and said in str(error.value)


def test_pairs_that_say_nothing_are_counted(tmp_path):
  row = {"prompt": "q", "chosen": "a", "rejected": "b"}
  rows = [row, row | {"rejected": "a"}, row | {"chosen": " "}, row, {"prompt": "q", "chosen": "b", "rejected": "a"}]
  found, report = load_examples(written(tmp_path / "pairs.jsonl", *rows), PAIR)
  assert [(r.chosen, r.rejected) for r in found] == [("a", "b"), ("b", "a")]  # two annotators may disagree
  counted = {name: report[name] for name in ("rows", "kept", "identical", "empty", "duplicate")}
  assert counted == {"rows": 5, "kept": 2, "identical": 1, "empty": 1, "duplicate": 1}
  with pytest.raises(DataError, match="the two answers of 1 of 1 rows are equal"):
    load_examples(written(tmp_path / "same.jsonl", row | {"rejected": "a"}), PAIR)


@dataclasses.dataclass(frozen=True)
class Options(human.Sources):
  preferences: str
  prompts: str
  eval: str = ""


def read(directory, options):
  found, counts = human.read(options, directory, 0)
  return {name: [row.messages[0]["content"] for row in rows] for name, rows in found.items()}, counts


def test_prompts_are_disjoint_from_seeds_and_evaluation(tmp_path):
  pairs = [{"prompt": f"pair {i}", "chosen": "a", "rejected": "b"} for i in range(3)]
  asked = ["one", "pair 1", "ONE", "eval 0", "two", "Pair 2 "]
  options = Options(
    str(written(tmp_path / "pairs.jsonl", *pairs)),
    str(written(tmp_path / "prompts.jsonl", *({"prompt": text} for text in asked))),
    str(written(tmp_path / "eval.jsonl", {"prompt": "eval 0"}, {"prompt": "pair 0"})),
  )
  rows, counts = read(tmp_path, options)
  assert (rows["prompts"], rows["preferences"]) == (["one", "two"], ["pair 1", "pair 2"])
  prompts = counts["prompts"]
  assert (prompts["equals_eval_prompt"], prompts["equals_seed_prompt"], prompts["duplicate"]) == (1, 2, 1)
  assert counts["preferences"]["equals_eval_prompt"] == 1


def test_the_run_has_its_own_copy_of_the_miniature_worlds_pairs(tmp_path):
  config = alma.get_config("mini")
  with (s := session_in(tmp_path, config)).run:
    data = human.build(s, Options("mini", "mini", "mini"))
    again = human.build(s, Options("mini", "mini", "mini"))
  assert data == again and set(data.digests) == {"preferences", "prompts", "eval"} and not data.sft
  assert len(data.preferences) == seeds.PREFERENCES and len(data.prompts) == seeds.UNLABELLED
  worth = [[world.truth(row.messages, text, True) for text in row.answers] for row in data.preferences]
  assert sum(a > b for a, b in worth) > 0.97 * len(worth)  # the rest were cut off, which a text does not tell
  ids = [{prompt_id(row.messages) for row in rows} for rows in (data.preferences, data.prompts, data.eval)]
  assert len(set.union(*ids)) == sum(map(len, ids))
  assert json.loads((tmp_path / "seeds" / "preferences.jsonl").read_text().splitlines()[0]).keys() == {
    "messages", "chosen", "rejected",
  }  # fmt: skip


def test_what_must_be_given(tmp_path):
  build = options_lib.build
  with pytest.raises(options_lib.ConfigError, match=r"data\.judge is empty: give a JSONL or Parquet file"):
    build(human.Options, {"sft": "x.jsonl"}, "config.data")
