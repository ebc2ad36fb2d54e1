"""Words: the hashes are those of the words that `split` gives, for every script, wherever texts and blocks end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.corpus import words

TEXT = st.text(st.sampled_from("ab \n\té漢字กาかa𠀀🙂") | st.characters(), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, max_size=12), st.integers(1, 40))
def test_equal_hashes_are_equal_words(texts, codes):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(words, "_CODES", codes)
    found, offsets = words.hashes(texts)
  expected = [words.split(text) for text in texts]
  assert offsets.tolist() == [0, *itertools.accumulate(map(len, expected))]
  pairs = list(zip(itertools.chain(*expected), found.tolist(), strict=True))
  assert len(set(pairs)) == len({word for word, _ in pairs}) == len({value for _, value in pairs})


def test_words_of_scripts():
  split = {
    "a man  a\nplan": ["a", "man", "a", "plan"],
    "c# is 6*7": ["c#", "is", "6*7"],
    "写一首 haiku吗": ["写", "一", "首", "haiku", "吗"],
    "สวัสดี": list("สวัสดี"),
    "한국어 문장": ["한국어", "문장"],
    " \t\n": [],
  }
  assert {text: words.split(text) for text in split} == split


def test_half_of_a_pair_of_surrogates_is_a_character():
  found, offsets = words.hashes(["a \ud800", "\ud800 b", "a"])
  assert offsets.tolist() == [0, 2, 4, 5] and found[1] == found[2] and found[0] == found[4] and len(set(found)) == 3
