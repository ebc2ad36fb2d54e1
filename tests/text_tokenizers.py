"""Tiny tokenizers of the three kinds the text tests need, made by code in a temporary directory."""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from alma_jax.text.tokenizer import load_tokenizer

# Llama-3's published splitting rule.
LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
]
WORDS = [
  "Q:",
  "A:",
  "\n",
  "rate",
  "prompt:",
  "response:",
  "rating:",
  "score:",
  "[[",
  "]]",
  "country",
  "food",
  ":",
  "lyon",
]
WORDS += ["oslo", "france", "norway", "answer:", ".", "?", "{prompt}", *map(str, range(11))]


@functools.cache
def _scratch():
  directory = tempfile.mkdtemp(prefix="text_tokenizers_")
  atexit.register(shutil.rmtree, directory, ignore_errors=True)
  return pathlib.Path(directory)


@functools.cache
def byte_bpe_dir(ten_is_one_token=True):
  """Llama-3 in small: byte-level BPE, the same splitting rule, post-processor and special tokens."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

  t = Tokenizer(models.BPE(ignore_merges=True))
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  t.decoder = decoders.ByteLevel()
  text = "Hello there user: assistant, system?\n\nRating: [[7]] What is the answer!\n\nAnswer: good. "
  text += "10 [[10]] " * 9 if ten_is_one_token else ""
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  t.train_from_iterator([text] * 5, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
  t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in LLAMA3_SPECIALS])
  bos = LLAMA3_SPECIALS[0]
  t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
  t.enable_truncation(8)  # some published files carry one
  about = {"bos_token": bos, "eos_token": LLAMA3_SPECIALS[1]}
  return _written(t, f"byte_bpe_{ten_is_one_token}", about)


@functools.cache
def word_dir():
  """Whole words split at spaces, as in the mini world; the specials are ordinary words of its vocabulary."""
  from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

  specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
  t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + WORDS)}, unk_token="<unk>"))
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\n|\[\[|\]\]|[.?]"), "isolated"), pre_tokenizers.Split(" ", "removed")]
  )
  t.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
  t.add_special_tokens(specials)
  about = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
  return _written(t, "word", about)


@functools.cache
def sentencepiece_dir():
  """Llama-2 in small: tokenizer.model alone, with dummy prefix, byte fallback and split digits."""
  import sentencepiece

  directory = _scratch() / "sentencepiece"
  directory.mkdir()
  corpus = _scratch() / "corpus.txt"
  lines = ["Rating: [[7]] the quick fox [INST] hello [/INST] Sure 0 1 2 3 4 5 6 7 8 9 10 <<SYS>> be kind <</SYS>>"]
  lines += ["Answer: what is the answer? Hello there, how are you? Fine, thanks. 12:30 [[3]] [[10]]"]
  corpus.write_text("\n".join(lines * 20))
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(directory / "tokenizer"),
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    minloglevel=2,
  )
  (directory / "tokenizer.vocab").unlink()
  return directory


@functools.cache
def old_llama2_dir():
  """The same as the tokenizer.json that Llama-2 was published with: its normalizer prepends the space."""
  spec = json.loads(load_tokenizer(sentencepiece_dir()).hf.backend_tokenizer.to_str())
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
  spec["normalizer"] = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace],
  }
  spec["pre_tokenizer"] = None
  directory = _scratch() / "old_llama2"
  directory.mkdir()
  (directory / "tokenizer.json").write_text(json.dumps(spec))
  about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  (directory / "tokenizer_config.json").write_text(json.dumps(about))
  return directory


@functools.cache
def byte_bpe(ten_is_one_token=True):
  return load_tokenizer(byte_bpe_dir(ten_is_one_token))


@functools.cache
def word():
  return load_tokenizer(word_dir())


@functools.cache
def sentencepieces():
  return load_tokenizer(sentencepiece_dir())


@functools.cache
def old_llama2():
  return load_tokenizer(old_llama2_dir())


def _written(backend, name, about):
  directory = _scratch() / name
  directory.mkdir()
  backend.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps(about | {"tokenizer_class": "PreTrainedTokenizerFast"}))
  return directory
