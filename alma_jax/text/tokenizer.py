"""The tokenizer: text to ids and back, exactly.

  tok = load_tokenizer("path/to/checkpoint")   # a directory with tokenizer.json or tokenizer.model
  ids = tok.encode("Hello")                    # no special tokens added, none read out of the text
  tok.decode(ids), tok.bos_id, tok.token_id("<|eot_id|>")
  tok, added = add_token(tok, "<|eot|>")       # a new tokenizer; `added`: the model needs a new row

`encode` gives the same ids wherever the text stands. Sentencepiece tokenizers put a dummy space in front of every
string they are given; here they add none, so a piece from the middle of a conversation gains no "_".
A raw text begins with `tok.opening`: the BOS, or nothing where the model's files say that none goes in front of a text
(`add_bos_token` false in tokenizer_config.json, or the class GPT2Tokenizer without that key).
`decode(encode(text)) == text` for every tokenizer that can spell the text. The string of a special token inside a text
("<|eot_id|>" typed by a user) never becomes that token.
"""

import copy
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from alma_jax.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model")
IDENTITY = (*FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TextError(UserError):
  """A text, template or tokenizer that cannot be used; the message says which and how to mend it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  hf: Any  # the transformers object; used for saving only
  exact: Any  # a `tokenizers.Tokenizer` without dummy prefix, truncation and padding; does all the work
  source: str
  fingerprint: str
  bos_id: int | None
  eos_id: int | None
  unk_id: int | None
  special_ids: frozenset[int]
  begins: bool = True  # False: by the tokenizer's own rule no BOS goes in front of a text

  @property
  def size(self) -> int:
    """The number of ids, added tokens included."""
    return len(self.hf)

  @property
  def opening(self) -> tuple[int, ...]:
    """What begins a raw text: the BOS, where there is one and the tokenizer's own rule puts it in front."""
    return () if self.bos_id is None or not self.begins else (self.bos_id,)

  def encode(self, text: str) -> list[int]:
    ids = self.exact.encode(text, add_special_tokens=False).ids
    if self.special_ids.isdisjoint(ids):
      return ids
    if self.unk_id is None:  # only in vocabularies that hold specials as ordinary words (word level)
      raise TextError(f"{text!r} spells a special token and the tokenizer in {self.source} has no unknown token")
    return [self.unk_id if i in self.special_ids else i for i in ids]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    return self.exact.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def check_writes(self, text: str, what: str) -> None:
    """Raise a TextError if a word of the text is lost when it is encoded and decoded; `what` is what needs the text."""
    for word in text.split():
      if "".join(self.decode(self.encode(word)).split()) != word:
        raise TextError(f"{what}: the tokenizer in {self.source} cannot write {word!r}")

  def token_id(self, content: str) -> int:
    i = self.exact.token_to_id(content)
    if i is None:
      raise TextError(f"the tokenizer in {self.source} has no token {content!r}")
    return i

  def save(
    self, directory: str | os.PathLike[str], chat_template: str | None = None, eos_token: str | None = None
  ) -> None:
    """Writes a directory that transformers 4 and 5 and vLLM load; `eos_token` is where chats stop."""
    directory = pathlib.Path(directory)
    self.hf.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
      config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one name every release reads tokenizer.json by
    if not self.begins:
      config["add_bos_token"] = False
    if eos_token is not None:
      config["eos_token"] = self.exact.id_to_token(self.token_id(eos_token))
    if chat_template is not None:
      config["chat_template"] = chat_template
      (directory / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  directory = pathlib.Path(directory)
  found = [name for name in FILES if (directory / name).is_file()]
  if not found:
    what = "has neither" if directory.is_dir() else "does not exist; looked there for"
    raise TextError(f"no tokenizer: the directory {directory} {what} {' nor '.join(FILES)}")
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else a remark about PyTorch at every start
  from transformers import LlamaTokenizer, PreTrainedTokenizerFast

  # tokenizer.json is read as it stands: the Llama class would rebuild it as sentencepiece, whatever it holds.
  kind = PreTrainedTokenizerFast if found[0] == "tokenizer.json" else LlamaTokenizer
  try:
    hf = kind.from_pretrained(str(directory), local_files_only=True)
    _modernise(hf.backend_tokenizer)
    return _wrap(hf, str(directory), _digest(directory), _begins(directory))
  except Exception as e:
    raise TextError(f"cannot read {directory / found[0]}: {type(e).__name__}: {e}") from e


def add_token(tok: Tokenizer, content: str) -> tuple[Tokenizer, bool]:
  """A tokenizer in which `content` is a special token, and True if that took a new id."""
  from tokenizers import AddedToken

  hf = copy.deepcopy(tok.hf)
  before = len(hf)
  hf.add_tokens([AddedToken(content, special=True, normalized=False)], special_tokens=True)
  fingerprint = hashlib.sha256(f"{tok.fingerprint} + {content}".encode()).hexdigest()
  return _wrap(hf, tok.source, fingerprint, tok.begins), len(hf) > before


def _begins(directory: pathlib.Path) -> bool:
  """Whether the tokenizer puts its BOS, if it names one, in front of a text."""
  path = directory / "tokenizer_config.json"
  about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  if about.get("add_bos_token") is not None:
    return bool(about["add_bos_token"])
  return about.get("tokenizer_class") not in ("GPT2Tokenizer", "GPT2TokenizerFast")


def _modernise(backend: Any) -> None:
  """Changes a `tokenizers.Tokenizer` so that only a text's start gains the dummy space, as in today's tokenizers.

  Llama-2's old tokenizer.json puts a space in front of every stretch of text; exported like that, chat templates would
  give an extra "_" after each special token.
  """
  from tokenizers import Tokenizer as Backend
  from tokenizers import pre_tokenizers

  spec = json.loads(backend.to_str())
  if "'Prepend'" in str(spec["normalizer"]) and spec["pre_tokenizer"] is None:
    spec["normalizer"] = _without_dummy_prefix(spec["normalizer"])
    backend.normalizer = Backend.from_str(json.dumps(spec)).normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def _wrap(hf: Any, source: str, fingerprint: str, begins: bool) -> Tokenizer:
  from tokenizers import Tokenizer as Backend

  spec = json.loads(hf.backend_tokenizer.to_str())
  spec["truncation"] = spec["padding"] = None  # a file may carry both; nothing is cut silently
  for key in ("normalizer", "pre_tokenizer", "decoder"):
    spec[key] = _without_dummy_prefix(spec[key])
  exact = Backend.from_str(json.dumps(spec))
  exact.encode_special_tokens = True  # special strings in a text stay text
  special = {i for i, token in exact.get_added_tokens_decoder().items() if token.special}
  return Tokenizer(
    hf=hf,
    exact=exact,
    source=source,
    fingerprint=fingerprint,
    bos_id=hf.bos_token_id,
    eos_id=hf.eos_token_id,
    unk_id=hf.unk_token_id,
    special_ids=frozenset(special - {hf.unk_token_id}),
    begins=begins,
  )


def _without_dummy_prefix(node: dict[str, Any] | None) -> dict[str, Any] | None:
  """A component of tokenizer.json without the parts that add a leading space, or remove one when decoding."""
  if node is None or node["type"] == "Prepend" or (node["type"] == "Strip" and "start" in node):
    return None
  for children in ("normalizers", "pretokenizers", "decoders"):
    if children in node:
      return node | {children: [kept for child in node[children] if (kept := _without_dummy_prefix(child))]}
  if node["type"] == "Metaspace":
    return node | {"prepend_scheme": "never"}
  return node | {"add_prefix_space": False} if node["type"] == "ByteLevel" else node


def _digest(directory: pathlib.Path) -> str:
  digest = hashlib.sha256()
  for name in IDENTITY:
    if (directory / name).is_file():
      digest.update(f"{name}\0".encode() + hashlib.sha256((directory / name).read_bytes()).digest())
  return digest.hexdigest()
