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
from alma_jax.judges.own import OwnJudge, _draws, _opening
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
    np.testing.assert_allclose(verdict.probs, probs, atol=1e-5)
    assert verdict.mass == pytest.approx(mass, abs=1e-5)
    # A mean of scores up to 10 is as near as ten times the probabilities are, and exactly that of its own ones.
    assert verdict.score == pytest.approx(mean, abs=1e-4)
    assert verdict.score == pytest.approx(np.dot(np.arange(11), verdict.probs), abs=1e-5)
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
  assert tok.decode(opening).endswith("score: 1 \n prompt:")
  assert all(tuple(prefix_of(messages)[: len(opening)]) == opening for messages, _ in PAIRS)


def judge_of(host, template=TEMPLATE, **more):
  return OwnJudge(host, Checkpoint("base", host.directory, "base"), template, **more)


def test_draws_have_the_exact_distribution_and_unreadable_ones_are_counted():
  # 40,000 evenly spaced uniform numbers meet each score exactly as often as its raw probability says.
  probs, mass = np.array([0.5, 0.25, 0.0, 0.125, 0.125, 0, 0, 0, 0, 0, 0]), 0.8
  read = text.ExpectedScore(0.0, probs, mass)
  drawn = _draws(read, (np.arange(40_000) + 0.5) / 40_000)
  assert [drawn.count(score) for score in range(5)] == [16_000, 8_000, 0, 4_000, 4_000]
  assert drawn.count(None) == 8_000 and _draws(text.ExpectedScore(0.0, probs, 1.0000001), np.array([0.9999999])) == [
    4.0
  ]


def test_the_mean_of_many_samples_is_the_expected_score_of_what_can_be_read(host, monkeypatch):
  read = text.expected_score  # the base model gives the scores hardly any mass
  monkeypatch.setattr(text, "expected_score", lambda *of: read(*of)._replace(mass=0.9))
  pairs = [Answered(*pair) for pair in PAIRS]
  exact, n = judge_of(host, shots=SHOTS).scores(pairs), 20_000
  judge = judge_of(host, mode="sampled", samples=n, shots=SHOTS)
  found = scores(judge, pairs, missing=True)
  for one, verdict in zip(exact, found, strict=True):
    held = verdict.details
    deviation = np.sqrt(np.array(one.probs) @ (np.arange(11) - one.score) ** 2)
    assert held["draws"] == n == len(held["scores"]) and held["unreadable"] == held["scores"].count(None)
    assert abs(held["unreadable"] / n - (1 - one.mass)) < 5 * np.sqrt(max(one.mass * (1 - one.mass), 1e-9) / n)
    assert abs(verdict.score - one.score) < 5 * deviation / np.sqrt(n - held["unreadable"]) + 1e-6
    assert verdict.score == pytest.approx(np.mean([x for x in held["scores"] if x is not None]))
  assert found[0] == found[3] and found == judge.scores(pairs)
  few = dataclasses.replace(judge, samples=3)
  other = [dataclasses.replace(few, seed=seed) for seed in (0, 1)]
  assert other[0].scores(pairs) != other[1].scores(pairs) and other[0].identity != other[1].identity
  # What draws nothing is the same judge whatever it would draw.
  assert judge_of(host, samples=3, seed=5).identity == judge_of(host).identity


def test_a_score_is_read_behind_each_reasoning_that_comes_to_it(host):
  base = vars(TEMPLATE) | {"name": "because", "answer_open": ".", "answer_close": " ."}
  template = text.ReasonedTemplate(**base, think="answer:", after=" ", most_tokens=6)
  judge, pairs = judge_of(host, template, samples=5, shots=tuple((*shot, "of lyon") for shot in SHOTS)), PAIRS[:3]
  found = scores(judge, [Answered(*pair) for pair in pairs], missing=True)
  model, trie = weights.load(host.directory), text.score_paths(host.tokenizer, template)
  readable = 0
  for (messages, response), verdict in zip(pairs, found, strict=True):
    held, means = verdict.details, []
    assert held["draws"] == len(held["reasons"]) == 5 and held["unreadable"] == held["reasons"].count(None)
    for reason, score in zip(held["reasons"], held["scores"], strict=True):
      if reason is None:
        assert score is None
        continue
      ids = text.few_shot_prefix(host.tokenizer, template, judge.shots, messages)
      ids += text.few_shot_suffix(host.tokenizer, template, response, reason)
      assert host.tokenizer.decode(ids).split()[-2 - len(reason.split()) :] == f"answer: {reason} .".split()
      means.append(text.expected_score(trie, logprobs(model, ids, room=128)[len(ids) - 1 : len(ids)]).mean)
      assert score == pytest.approx(means[-1], abs=1e-5)
    readable += len(means)
    assert verdict.score == (pytest.approx(np.mean(means), abs=1e-5) if means else None)
  assert 0 < readable < 15 and "answer: of lyon . 9" in host.tokenizer.decode(ids)
