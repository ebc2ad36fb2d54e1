"""Judges by rule on the contract; multiple choice against full forwards of every choice."""

import jax
import numpy as np
import pytest
from engine_models import logprobs

from alma_jax import names
from alma_jax.evals import instructions
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered
from alma_jax.llama import sharding, weights
from alma_jax.options import ConfigError
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.text import chat

ASKED = ({"role": "user", "content": "country : lyon"},)


def judge(name, host=None):
  return contract.by_name(names.EVALUATORS, f"rules:{name}", host, None, "eval.judges")


def pair(response, row=None):
  return Answered(ASKED, response, row=row)


def scores(name, *pairs, host=None):
  return [verdict.score for verdict in contract.scores(judge(name, host), pairs)]


def test_rules_are_known_words_of_both_tables_and_a_wrong_one_is_an_error():
  for table in (names.JUDGES, names.EVALUATORS):
    names.check(table, "rules:length", "field")
    assert contract.by_name(table, "rules:length", None, None, "field").identity.startswith("rules:length")
  with pytest.raises(ConfigError, match=r"'rules:lenght' is no rule.*did you mean 'rules:length'"):
    judge("lenght")


def test_length_counts_characters():
  found = judge("length").scores([pair("four words are here"), pair("")])
  assert [(v.score, v.details["words"]) for v in found] == [(19.0, 4), (0.0, 0)]


def test_exact_match_ignores_blanks_alone():
  row = {"reference": ["New York", "NYC"]}
  assert scores("exact_match", pair(" New\nYork", row), pair("NYC", row), pair("nyc", row)) == [1, 1, 0]
  assert scores("exact_match", pair("4", {"reference": "4"}), pair("4.", {"reference": "4"})) == [1, 0]


REFUSED = (
  "I'm sorry, but I can't help with that.",
  "I cannot provide instructions for picking a lock.",
  "Sorry, I am not able to assist with this request.",
  "As an AI, I’m unable to share personal data. Is there something else?",
  "That would be unsafe. I must respectfully decline.",
  "We won't be able to offer advice on that.",
  "It would not be appropriate for me to rate your colleagues.",
  "I apologize, but this goes against my guidelines.",
)
ANSWERED = (
  "I'm sorry for your loss. A short letter may help; here is a draft.",
  "I cannot recommend this film enough: it is a delight.",
  "She said she couldn't come, so I will write to her.",
  "You can't divide by zero; the limit does not exist.",
  "I can't wait to share this with you!",
  "I can't help but admire the harbor at night.",
  "",
  "First, dig a hole. Then plant. Then water it. Tell others: 'I cannot help you today.'",
)


def test_refusals_are_found_in_the_first_sentences():
  assert scores("refusal", *map(pair, REFUSED)) == [1] * len(REFUSED)
  assert scores("refusal", *map(pair, ANSWERED)) == [0] * len(ANSWERED)


def test_ifeval_gives_strict_and_loose_for_each_instruction():
  pytest.importorskip("langdetect", reason="the extra alma_jax[ifeval]")
  row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
  found = contract.scores(judge("ifeval"), [pair('Sure, here:\n"Hi"', row), pair('"Hi"', row)])
  assert [v.score for v in found] == [0.0, 1.0]
  assert found[0].details == {"strict": [False, False], "loose": [True, True]}


def test_ifeval_without_langdetect_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
  instructions.detectors.cache_clear()
  with pytest.raises(instructions.InstructionError, match=r"pip install 'alma_jax\[ifeval\]'"):
    judge("ifeval")


def test_what_a_rule_needs_and_the_set_lacks_is_named():
  lacking = Answered(ASKED, "x", name="answers.jsonl, key 7", row={"target": "x"})
  with pytest.raises(ConfigError, match=r"answers.jsonl, key 7: rules:exact_match reads the field `reference`.*target"):
    contract.scores(judge("exact_match"), [lacking])
  with pytest.raises(ConfigError, match=r"response 1 of 1: rules:exact_match reads .* no row"):
    contract.scores(judge("exact_match"), [pair("x")])
  for needy in (judge("exact_match"), judge("length")):
    if getattr(needy, "needs", ()):
      with pytest.raises(ConfigError, match=r"judge.kind: .* reads the fields reference of a set's rows"):
        contract.without_rows(needy, "judge.kind")
    else:
      assert contract.without_rows(needy, "judge.kind") is needy


def test_multiple_choice_picks_the_likeliest_of_full_forwards():
  host = Host(ModelOptions("mini", "mini"), EngineOptions(rows=4), sharding.make_mesh(devices=jax.local_devices()[:2]))
  choices = ["lyon france .", "lyon norway .", "norway"]
  tok, fmt, model = host.tokenizer, host.chat, weights.load(host.directory)
  prefix = chat.encode_prompt(tok, fmt, ASKED)
  sums = []
  for choice in choices:
    ids = chat.encode_example(tok, fmt, ASKED, choice)[0]
    found = logprobs(model, ids, room=128)
    sums.append(sum(found[i - 1][ids[i]] for i in range(len(prefix), len(ids))))
  best = int(np.argmax(sums))
  rows = [{"choices": choices, "answer": best}, {"choices": choices, "answer": choices[best - 1]}]
  asked = contract.scores(judge("multiple_choice", host), [pair("", row) for row in rows])
  assert [v.score for v in asked] == [1.0, 0.0] and asked[0].details["picked"] == best
  np.testing.assert_allclose(asked[0].details["logprobs"], sums, atol=1e-4)
  for row, said in (
    ({"choices": ["a"], "answer": 0}, "two or more different texts"),
    ({"choices": ["a", "b"], "answer": 2}, "its number from 0 to 1, found 2"),
    ({"choices": ["a", "b"]}, "reads the field `answer`"),
  ):
    with pytest.raises(ConfigError, match=said):
      contract.scores(judge("multiple_choice", host), [pair("", row)])
