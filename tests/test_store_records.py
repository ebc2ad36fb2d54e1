"""Identity of prompts: what counts as the same request and what does not."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alma_jax.corpus.normalise import normalised, prompt_id


def user(text):
  return ({"role": "user", "content": text},)


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("Name three rivers.", "name  three\n rivers"),
    ("\uff28\uff45llo", "hello"),  # full-width letters
    ("Stra\u00dfe?", "STRASSE"),
    ("caf\u00e9", "cafe\u0301"),
    ("don\u2019t\u00a0stop", "don't stop"),
  ],
)
def test_the_same_request_typed_twice_is_one_prompt(one, other):
  assert normalised(one) == normalised(other)
  assert prompt_id(user(one)) == prompt_id(user(other))


@pytest.mark.parametrize(
  ("one", "other"),
  [("name three rivers", "name four rivers"), ("!!!", "???"), ("ab c", "a bc"), ("2 + 2", "2 = 2")],
)
def test_other_requests_are_other_prompts(one, other):
  assert prompt_id(user(one)) != prompt_id(user(other))


def test_roles_and_turns_belong_to_the_identity():
  flat = prompt_id(user("a b"))
  assert flat != prompt_id(({"role": "system", "content": "a b"},))
  assert flat != prompt_id(user("a") + user("b"))


def test_prompt_id_is_blake2b_of_the_normalised_conversation():
  messages = ({"role": "system", "content": "Be brief!"}, {"role": "user", "content": "Name  THREE rivers."})
  expected = hashlib.blake2b(b"system: be brief\nuser: name three rivers", digest_size=8).hexdigest()
  assert prompt_id(messages) == expected
  assert len(expected) == 16


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=30))
def test_normalised_is_settled_after_one_pass(text):
  once = normalised(text)
  assert normalised(once) == once
  assert once == " ".join(once.split())
