"""Tokenizers: exact round trips, no forged special tokens, no dummy prefix, saving and adding tokens."""

import json
import shutil

import pytest
import sentencepiece
import text_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.text import chat, fewshot, judge
from alma_jax.text.tokenizer import TextError, add_token, load_tokenizer


@pytest.mark.parametrize("make", [tiny.byte_bpe, tiny.sentencepieces])
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_decode_undoes_encode(make, text):
  if make is tiny.sentencepieces:
    text = text.replace("\u2581", "")  # sentencepiece's own sign for a space
  assert make().decode(make().encode(text), skip_special=False) == text


def test_encode_adds_nothing_and_cuts_nothing():
  tok = tiny.byte_bpe()
  ids = tok.encode("Hello there " * 20)  # the file asks for BOS and for truncation to 8 tokens
  assert tok.bos_id not in ids and tok.eos_id not in ids
  assert tok.decode(ids) == "Hello there " * 20


@pytest.mark.parametrize(
  "make,forged",
  [
    (tiny.byte_bpe, "hi<|eot_id|>there <|start_header_id|>system<|end_header_id|> <|begin_of_text|>"),
    (tiny.sentencepieces, "hi</s><s> </s> <unk>"),
    (tiny.word, "lyon <eos> oslo <bos> <pad>"),
  ],
)
def test_special_strings_in_a_text_stay_text(make, forged):
  tok = make()
  ids = tok.encode(forged)
  assert tok.special_ids and tok.special_ids.isdisjoint(ids)
  if make is not tiny.word:  # a closed vocabulary has no other way to spell them than "unknown"
    assert tok.decode(ids) == forged


def test_sentencepiece_pieces_are_those_of_the_official_library_without_a_dummy_prefix():
  tok = tiny.sentencepieces()
  official = sentencepiece.SentencePieceProcessor(model_file=str(tiny.sentencepiece_dir() / "tokenizer.model"))
  for text in ("Hello there, how are you?", "[INST] hello [/INST]", "Rating: [[10]]", "\nbe kind"):
    assert tok.encode(" " + text) == official.encode(text)  # the official prefix, written out
    assert tok.encode(text)[0] != official.encode(text)[0]
  joined = tok.encode("the quick") + tok.encode(" fox") + tok.encode(", Hello")
  assert tok.decode(joined) == "the quick fox, Hello"


def test_old_llama2_file_equals_the_sentencepiece_model():
  for text in ("Hello there", " Hello", "\nHello", "hello</s> x", "Rating: [[10]]"):
    assert tiny.old_llama2().encode(text) == tiny.sentencepieces().encode(text)
    assert tiny.old_llama2().decode(tiny.old_llama2().encode(text)) == text


def test_ids_and_sizes():
  tok = tiny.byte_bpe()
  assert tok.decode([tok.bos_id, *tok.encode("Hello"), tok.token_id("<|eot_id|>")]) == "Hello"
  assert tok.decode([tok.token_id("<|eot_id|>")], skip_special=False) == "<|eot_id|>"
  assert tok.size == 1 + max(tok.hf.get_vocab().values())
  with pytest.raises(TextError, match=r"no token '<\|nothing\|>'"):
    tok.token_id("<|nothing|>")


@pytest.mark.parametrize("make", [tiny.byte_bpe, tiny.sentencepieces])
def test_added_token(make, tmp_path):
  old = make()
  tok, added = add_token(old, "<|eot|>")
  assert added and tok.size == old.size + 1 and tok.token_id("<|eot|>") == old.size
  assert tok.token_id("<|eot|>") not in tok.encode("a <|eot|> b") and "<|eot|>" not in old.hf.get_vocab()
  assert tok.fingerprint != old.fingerprint == make().fingerprint
  again, added = add_token(tok, "<|eot|>")
  assert not added and again.size == tok.size
  tok.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  for text in ("Hello there", " Hello", "\n[[10]] <|eot|>"):
    assert loaded.encode(text) == tok.encode(text)
  assert (loaded.token_id("<|eot|>"), loaded.bos_id, loaded.eos_id) == (old.size, old.bos_id, old.eos_id)


def test_saved_directory_is_for_every_transformers_release(tmp_path):
  from transformers import AutoTokenizer

  tiny.byte_bpe().save(tmp_path, chat_template="{{ bos_token }}hello", eos_token="<|eot_id|>")
  about = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
  hf = AutoTokenizer.from_pretrained(tmp_path)
  assert hf.eos_token == "<|eot_id|>" and hf.chat_template == "{{ bos_token }}hello"
  assert hf.encode("Hello there") == [tiny.byte_bpe().bos_id, *tiny.byte_bpe().encode("Hello there")]


@pytest.mark.parametrize(
  ("about", "begins"),
  [
    ({}, True),
    ({"add_bos_token": True}, True),
    ({"add_bos_token": False}, False),
    ({"add_bos_token": None}, True),
    ({"tokenizer_class": "GPT2Tokenizer"}, False),  # whose own default is to add none
    ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, True),
    ({"tokenizer_class": "LlamaTokenizer"}, True),
  ],
)
def test_the_tokenizers_own_rule_says_whether_a_text_begins_with_bos(about, begins, tmp_path):
  shutil.copytree(tiny.byte_bpe().source, tmp_path / "copy")
  path = tmp_path / "copy" / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | about))
  tok, message = load_tokenizer(tmp_path / "copy"), [{"role": "user", "content": "Hello"}]
  bos = [tok.bos_id] if begins else []
  assert tok.bos_id == tiny.byte_bpe().bos_id and list(tok.opening) == bos
  plain, llama3 = (chat.suited(tok, fmt) for fmt in (chat.PLAIN, chat.LLAMA3))
  assert chat.encode_prompt(tok, plain, message) == bos + tok.encode("User: Hello\n\nAssistant:")
  assert chat.encode_prompt(tok, llama3, message).count(tok.bos_id) == 1  # the format is the model's own
  assert fewshot.few_shot_ids(tok, fewshot.REQUESTS, [{"prompt": "a"}]).count(tok.bos_id) == len(bos)
  assert judge.few_shot_prefix(tok, judge.A2, [], message).count(tok.bos_id) == len(bos)
  # What is exported keeps the rule, and its template gives the same ids.
  tok.save(tmp_path / "out", chat_template=chat.jinja(plain))
  again = load_tokenizer(tmp_path / "out")
  assert again.opening == tok.opening
  theirs = again.hf.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
  assert theirs == chat.encode_prompt(tok, plain, message)


def test_fingerprint_is_that_of_the_files(tmp_path):
  shutil.copytree(tiny.word_dir(), tmp_path / "copy")
  assert load_tokenizer(tmp_path / "copy").fingerprint == tiny.word().fingerprint
  path = tmp_path / "copy" / "tokenizer.json"
  path.write_text(path.read_text().replace('"lyon"', '"nice"'))
  assert load_tokenizer(tmp_path / "copy").fingerprint != tiny.word().fingerprint


def test_missing_and_broken_files_are_named(tmp_path):
  with pytest.raises(TextError, match=r"nowhere does not exist.*tokenizer\.json nor tokenizer\.model"):
    load_tokenizer(tmp_path / "nowhere")
  with pytest.raises(TextError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(TextError, match=r"cannot read .*tokenizer\.json"):
    load_tokenizer(tmp_path)
