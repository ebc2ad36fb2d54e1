"""ChatML, and formats found in a tokenizer's own chat template: ids equal to the template's, token for token."""

import dataclasses
import functools
import json

import pytest
import text_tokenizers as tiny
import transformers

from alma_jax.errors import UserError
from alma_jax.text import chat, chat_template
from alma_jax.text.tokenizer import TextError, load_tokenizer

CHATML = (
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
TEMPLATES = {
  "chatml": "{% for message in messages %}" + CHATML,
  # SmolLM2's and Qwen2.5's: a system turn of their own where there is none
  "smollm": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  + DEFAULT
  + "{% endif %}"
  + CHATML,
  "mistral": "{{ bos_token }}{% for m in messages %}"
  "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
  "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
  "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
  "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
BOS = {"mistral": "<|im_start|>"}  # these tokenizers have no BOS but where a template needs one
DIALOGUE = [
  {"role": "user", "content": "Hello there, how are you?"},
  {"role": "assistant", "content": "Fine.\n\n- 10!"},
  {"role": "user", "content": "12:30 \n what?"},
]
SYSTEM = {"role": "system", "content": "be kind"}


@functools.cache
def qwen_dir(template, bos=None):
  """Qwen's tokenizer in small: byte-level BPE without a BOS, EOS ends documents, ChatML's tokens are special."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

  t = Tokenizer(models.BPE())
  splits = [pre_tokenizers.Split(Regex(tiny.LLAMA3_SPLIT), "isolated")]
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  t.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  text = "Hello there user assistant system\nYou are a helpful assistant\n"
  t.train_from_iterator([text] * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
  specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
  about = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
  about |= {"chat_template": template} if template else {}
  about |= {"bos_token": bos} if bos else {}
  directory = tiny._scratch() / f"qwen_{abs(hash((template, bos)))}"
  directory.mkdir(exist_ok=True)
  t.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps(about))
  return directory


def theirs(directory, messages, ask):
  hf = transformers.AutoTokenizer.from_pretrained(directory)
  return hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=ask, return_dict=False)


def same_ids(directory, tok, fmt, messages):
  """Prompt and whole conversation, whose end the template writes one `after_stop` further."""
  assert chat.encode_prompt(tok, fmt, messages) == theirs(directory, messages, True)
  whole = [*messages, {"role": "assistant", "content": "Good."}]
  after = chat.encode_pieces(tok, fmt, [(fmt.after_stop, True)])
  ids, mask = chat.encode_example(tok, fmt, messages, "Good.")
  assert ids + after == theirs(directory, whole, False)
  assert mask[-1] and ids[-1] == tok.token_id(fmt.stop)
  return ids, mask


def test_chatml_is_the_models_own_template_over_several_turns():
  directory = qwen_dir(TEMPLATES["chatml"])
  tok, added = chat.prepare(load_tokenizer(directory), chat.CHATML)
  assert added == () and tok.bos_id is None
  for messages in (DIALOGUE[:1], DIALOGUE, [SYSTEM, *DIALOGUE]):
    ids, mask = same_ids(directory, tok, chat.CHATML, messages)
  stop = tok.token_id("<|im_end|>")
  learnt = [i for i, m in zip(ids, mask, strict=True) if m]
  assert (
    learnt.count(stop) == 2 and tok.decode(learnt) == "Fine.\n\n- 10!Good."
  )  # no line break behind a stop is learnt
  assert tok.token_id("<|im_start|>") not in learnt


def test_chatml_exports_the_same_template(tmp_path):
  tok, _ = chat.prepare(load_tokenizer(qwen_dir(TEMPLATES["chatml"])), chat.CHATML)
  tok.save(tmp_path, chat_template=chat.jinja(chat.CHATML), eos_token=chat.CHATML.stop)
  for ask, messages in ((True, DIALOGUE), (False, [SYSTEM, *DIALOGUE, {"role": "assistant", "content": "x"}])):
    assert theirs(tmp_path, messages, ask) == theirs(qwen_dir(TEMPLATES["chatml"]), messages, ask)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_is_found_in_the_template(name, tmp_path):
  directory = qwen_dir(TEMPLATES[name], BOS.get(name))
  tok = load_tokenizer(directory)
  fmt = chat_template.found(tok)
  tok, added = chat.prepare(tok, fmt)
  assert added == ()
  systems = [[]] if fmt.system is None else [[], [SYSTEM]]
  assert (fmt.system is None) == (name == "mistral")
  for before in systems:
    for messages in (DIALOGUE[:1], DIALOGUE):
      same_ids(directory, tok, fmt, [*before, *messages])
  assert fmt.default_system == ("You are a helpful assistant" if name == "smollm" else "")
  assert fmt.stop == ("<|im_end|>" if name in ("chatml", "smollm") else "<|endoftext|>")
  tok.save(tmp_path, chat_template=chat.jinja(fmt))  # an export's template
  for before in systems:
    assert theirs(tmp_path, [*before, *DIALOGUE], True) == theirs(directory, [*before, *DIALOGUE], True)


def test_what_is_found_in_a_chatml_template_is_chatml():
  fmt = chat_template.found(load_tokenizer(qwen_dir(TEMPLATES["chatml"])))
  strings = ("system", "user", "header", "stop", "after_stop", "begin", "default_system", "user_after_system")
  assert all(getattr(fmt, name) == getattr(chat.CHATML, name) for name in strings)
  assert set(fmt.specials) == set(chat.CHATML.specials) and fmt.extra_stops == (chat.EOS,)


THINKING = TEMPLATES["chatml"].replace(
  "+ message['content'] +",
  "+ ('<think>' if message['role'] == 'assistant' and loop.last else '') + message['content'] +",
)
NO_STOP = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
NO_STOP += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"


@pytest.mark.parametrize(
  "template, why",
  [
    (None, "has no chat template"),
    (NO_STOP, "does not begin with a special token"),
    (THINKING, "cannot be read as turns"),
    ("{{ strftime_now('%d %b %Y') }}\n" + TEMPLATES["chatml"], "today's date"),
  ],
)
def test_templates_without_a_format_are_refused_with_the_reason(template, why):
  with pytest.raises(TextError, match=why):
    chat_template.found(load_tokenizer(qwen_dir(template)))


def test_a_tokenizer_without_bos_gets_none_and_a_models_own_format_still_needs_its_bos():
  tok = load_tokenizer(qwen_dir(TEMPLATES["chatml"]))
  for fmt in (chat.PLAIN, chat.LIMA):
    prepared, _ = chat.prepare(tok, fmt)
    ids = chat.encode_prompt(prepared, chat.suited(prepared, fmt), DIALOGUE[:1])
    assert prepared.decode(ids).strip().startswith(("User: Hello", "Hello"))
  own = dataclasses.replace(chat.CHATML, begin=chat.BOS, add_tokens=())
  with pytest.raises(UserError, match="names no bos_token"):
    chat.prepare(tok, own)


def test_new_fields_leave_the_fingerprints_of_older_formats():
  assert set(chat.described(chat.LLAMA3)) == {
    "name", "system", "user", "header", "stop", "begin", "user_after_system", "extra_stops", "specials", "add_tokens",
  }  # fmt: skip
  assert chat.described(chat.CHATML)["after_stop"] == "\n"
