"""Stop strings against the shortest text that holds one, wherever tokens and segments end."""

import pytest
import text_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alma_jax.runtime import sampling

TOKENIZERS = {
  "bytes": text_tokenizers.byte_bpe(),
  "pieces": text_tokenizers.sentencepieces(),
  "words": text_tokenizers.word(),
}


def shortest(decode, stops, tokens):
  return next((n for n in range(1, len(tokens) + 1) if any(stop in decode(tokens[:n]) for stop in stops)), None)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_request_is_over_at_its_first_stop_string_whatever_the_segments(kind, data):
  tok = TOKENIZERS[kind]
  text = data.draw(st.text(st.sampled_from("ab é漢🙂\n#Q:"), max_size=40))
  # Spelt by the tokenizer, or byte by byte and piece by piece as a model may.
  spelt = tuple(tok.encode(text))
  tokens = data.draw(st.one_of(st.just(spelt), st.lists(st.sampled_from(sorted({*spelt, *range(3, 40)})), max_size=40)))
  stops = tuple(
    data.draw(st.lists(st.sampled_from(["#", "\n#", "Q:", "é", "漢🙂", " a", "ab é"]), min_size=1, max_size=3))
  )
  wanted, seen, found = shortest(tok.decode, stops, tuple(tokens)), 0, None
  while seen < len(tokens) and found is None:
    upto = min(len(tokens), seen + data.draw(st.integers(1, 9)))
    found = sampling._end(tok.decode, stops, 0, tuple(tokens[:upto]), seen)
    seen = upto
  assert found == wanted


@given(st.text("ab#\n", max_size=20), st.lists(st.sampled_from(["#", "a\n", "##"]), max_size=2))
@example("ab##", ["##", "#"])
def test_text_ends_where_its_first_stop_string_begins(text, stops):
  kept = sampling._before(text, stops)
  assert text.startswith(kept) and not any(stop in kept for stop in stops)
  assert kept == text or any(text[len(kept) :].startswith(stop) for stop in stops)
