"""The miniature world's demonstrations for LIMA's ablations."""

import json

import numpy as np
import pytest

from alma_jax.mini import seeds, variants


def rows(directory, name):
  return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name, count", [("filtered", 48), ("unfiltered", 48), ("quantity", 192)])
def test_quality_and_quantity_are_what_they_say(name, count, tmp_path):
  getattr(variants, name)(tmp_path, 3)
  made = rows(tmp_path, "sft")
  assert len(made) == count
  every = np.array([row["score"] for row in rows(tmp_path, "judge")])
  scores = np.array([row["score"] for row in made])
  if name == "filtered":
    assert scores.mean() > every.mean() + every.std() / 2 and len({row["prompt"] for row in made}) == 48
  else:
    assert abs(scores.mean() - every.mean()) < every.std() / 2


def test_dialogues_hold_the_same_demonstrations_in_fewer_rows(tmp_path):
  variants.dialogue(tmp_path / "a", 3)
  plain = rows(tmp_path / "b", "sft") if seeds.make(tmp_path / "b", 3) else []
  chains = [row["messages"] for row in rows(tmp_path / "a", "sft")]
  said = [turn["content"] for chain in chains for turn in chain]
  assert said == [text for row in plain for text in (row["prompt"], row["response"])]
  assert [len(chain) for chain in chains] == [4] * 12 + [2] * (len(plain) - 24)
  asked = rows(tmp_path / "a", "eval")
  assert [row["messages"][-1]["content"] for row in asked] == [row["prompt"] for row in rows(tmp_path / "b", "eval")]
  assert {len(row["messages"]) for row in asked} == {3}
