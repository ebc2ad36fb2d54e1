"""Contamination: exactly the overlaps that comparing every text with every prompt finds."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.corpus import contamination, words
from alma_jax.corpus.contamination import Index, shared, summary

PROSE = st.lists(st.sampled_from(["a", "b", "cc", "漢字"]), max_size=9).map(" ".join)


def brute_force(sets, n, ids, texts):
  """{(id, set): (prompts that are equal, others that share a run, first shared run)}"""

  def runs(text):
    return [tuple(words.split(text)[i : i + n]) for i in range(len(words.split(text)) - n + 1)]

  found = {}
  for id, text in zip(ids, texts, strict=True):
    for name, prompts in sets.items():
      equal = tuple(i for i, prompt in enumerate(prompts) if prompt == text)
      sharing = tuple(i for i, p in enumerate(prompts) if i not in equal and set(runs(p)) & set(runs(text)))
      known = {run for prompt in prompts for run in runs(prompt)}
      first = next((run for run in runs(text) if run in known), tuple(words.split(text)))
      if equal or sharing:
        found[id, name] = equal, sharing, " ".join(first)
  return found


@settings(deadline=None, max_examples=50)
@given(st.lists(PROSE, max_size=6), st.lists(PROSE, max_size=3), st.lists(PROSE, max_size=8), st.integers(1, 4))
def test_all_overlaps_and_no_other(first, second, texts, n):
  sets, ids = {"first": first, "second": second}, [str(i) for i in range(len(texts))]
  found = shared(Index(sets, n), ids, texts)
  assert {(x.id, x.name): (x.equal, x.sharing, x.run) for x in found} == brute_force(sets, n, ids, texts)
  assert all(x.text == texts[int(x.id)] for x in found)


def test_runs_of_one_hash_are_still_compared(monkeypatch):
  draw = random.Random(0)

  def prose(n):
    return [" ".join(draw.choices("abc", k=draw.randint(0, 12))) for _ in range(n)]

  sets, texts = {"eval": prose(20)}, prose(60)
  right = shared(Index(sets, 5), texts, texts)
  hashes = words.hashes
  monkeypatch.setattr(words, "hashes", lambda texts: (np.zeros_like(hashes(texts)[0]), hashes(texts)[1]))
  assert shared(Index(sets, 5), texts, texts) == right and 5 < len(right) < 60


def test_parts_and_summary(monkeypatch):
  monkeypatch.setattr(contamination, "_TEXTS", 3)
  sets = {
    "chat": ["tell me how to bake a very good apple pie today", "hi there", "one two three four five six seven eight"],
    "none": ["nothing of this kind is ever asked by anyone at all"],
  }
  texts = [
    "please tell me how to bake a very good apple cake",  # eight words of the first
    "how to bake a very good apple",  # seven: too few
    "hi there",  # equal, and shorter than a run
    "oh hi there my friend how are you doing now",  # holds a short prompt, which counts only whole
    "one two three four five six seven eight",
    "count one two three four five six seven eight nine",
    "tell me how to bake a very good one two three four five six seven eight",
  ]
  ids = [f"{i:016x}" for i in range(len(texts))]
  index = Index(sets)
  found = shared(index, ids, texts)
  assert found == [x for i in range(len(texts)) for x in shared(index, ids[i : i + 1], texts[i : i + 1])]
  counts = summary(index, found[::-1], examples=2)
  assert json.loads(json.dumps(counts)) == {
    "chat": {
      "prompts": 3,
      "short": 1,
      "equal": 2,
      "overlapping": 3,
      "prompts_met": 3,
      "examples": [
        {"id": ids[0], "text": texts[0], "prompt": sets["chat"][0], "run": "tell me how to bake a very good"},
        {"id": ids[2], "text": "hi there", "prompt": "hi there", "run": "hi there"},
      ],
    },
    "none": {"prompts": 1, "short": 0, "equal": 0, "overlapping": 0, "prompts_met": 0, "examples": []},
  }
  assert found[-1].sharing == (0, 2) and found[-1].run == "tell me how to bake a very good"


def test_what_cannot_be_right_is_named():
  with pytest.raises(ValueError, match="n=0"):
    Index({}, 0)
  with pytest.raises(ValueError, match="1 ids for 2 texts"):
    shared(Index({"a": ["x"]}), ["1"], ["x", "y"])
  assert shared(Index({}), ["1"], ["x"]) == []
