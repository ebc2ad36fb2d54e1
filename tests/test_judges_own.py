"""Verdicts of the miniature judge, text in and scores out, against a full forward of every text on its own."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from engine_models import logprobs

from alma_jax import names
from alma_jax.errors import NotFinite
from alma_jax.judges.contract import Answered, Verdict, scores
from alma_jax.judges.own import OwnJudge, _opening
from alma_jax.llama import sharding, weights
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, EngineOptions, Host, ModelOptions
from alma_jax.text import judge as text

TEMPLATE = names.resolve(names.JUDGE_TEMPLATES, "mini", "template")


def asked(prompt):
  return ({"role": "user", "content": prompt},)


PAIRS = [
  (asked(prompt), response)
  for prompt in ("country : lyon", "food : oslo", "country : oslo")
  for response in ("lyon france .", "norway", "", "lyon france .")
] + [(asked("country : lyon"), "norway")]
SHOTS = tuple((asked(f"country : {city}"), f"{city} {land} .", score) for city, land, score in
              (("lyon", "france", 9), ("oslo", "norway", 8), ("oslo", "france", 1)))  # fmt: skip


@pytest.fixture(scope="module")
def host():
  mesh = sharding.make_mesh(devices=jax.local_devices()[:2])
  return Host(ModelOptions("mini", "mini"), EngineOptions(rows=4), mesh)


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["tuned", "few-shot"])
def test_verdicts_equal_full_forwards_in_the_order_of_the_pairs(host, shots):
  tok, template = host.tokenizer, TEMPLATE
  judge = OwnJudge(host, Checkpoint("base", host.directory, "base"), template, "expected", shots)
  model, trie = weights.load(host.directory), text.score_paths(tok, template)
  pairs = [Answered(*pair) for pair in PAIRS]
  with Bar(total=len(PAIRS), disable=True) as bar:
    found = scores(judge, pairs, bar)
  likeliest = dataclasses.replace(judge, mode="integer").scores(pairs)
  assert len(found) == len(likeliest) == len(PAIRS)
  for (messages, response), verdict, integer in zip(PAIRS, found, likeliest, strict=True):
    if shots:
      ids = text.few_shot_prefix(tok, template, shots, messages) + text.few_shot_suffix(tok, template, response)
    else:
      ids = text.judge_prefix(tok, host.chat, template, messages)
      ids += text.judge_suffix(tok, host.chat, template, response)
    mean, probs, mass = text.expected_score(trie, logprobs(model, ids, room=128)[len(ids) - 1 : len(ids)])
    assert verdict.score == pytest.approx(mean, abs=1e-5) and verdict.mass == pytest.approx(mass, abs=1e-5)
    np.testing.assert_allclose(verdict.probs, probs, atol=1e-5)
    assert integer.score == np.argmax(probs) and integer.probs == verdict.probs
  assert found[0] == found[3] and found[1] == found[-1]


def test_texts_beyond_the_models_positions_are_said(host, capsys):
  judge = OwnJudge(host, Checkpoint("base", host.directory, "base"), TEMPLATE)
  judge._tell_too_long([256, 3])
  assert capsys.readouterr().err == ""
  judge._tell_too_long([256, 257, 300])
  said = capsys.readouterr().err
  assert "2 of 3 texts are longer than the model's 256 positions" in said and "the longest has 300 tokens" in said


@pytest.mark.parametrize(
  ("verdict", "said"),
  [
    (Verdict(float("nan")), "the score nan"),
    (Verdict(float("inf")), "the score inf"),
    (Verdict(1.0, mass=float("nan")), "the mass nan"),
    (Verdict(1.0, (0.5, float("nan"))), r"the probabilities \(0.5, nan\)"),
  ],
)
@pytest.mark.parametrize("scale", [None, (0.0, 10.0)])
def test_a_verdict_that_is_not_finite_stops_whoever_judged_and_names_the_response(verdict, said, scale):
  judge = types.SimpleNamespace(identity="words", scale=scale, scores=lambda pairs: [Verdict(3.0), verdict])
  pairs = [Answered(asked("a"), "b", name=f"prompt {name}, sample 2") for name in ("f00", "f01")]
  with pytest.raises(NotFinite, match=f"^prompt f01, sample 2: the judge 'words' gave {said}"):
    scores(judge, pairs)


def test_worked_examples_are_what_all_prefixes_begin_with(host):
  tok, template = host.tokenizer, TEMPLATE

  def prefix_of(messages):
    return text.few_shot_prefix(tok, template, SHOTS, messages)

  opening = _opening(prefix_of)
  assert tok.decode(opening).endswith("rate prompt:")
  assert all(tuple(prefix_of(messages)[: len(opening)]) == opening for messages, _ in PAIRS)
