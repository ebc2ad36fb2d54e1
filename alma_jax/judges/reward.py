"""Reward models: a head on the hidden state of a conversation's last token.

  judge.kind = "reward:models/Skywork-Reward-Llama-3.1-8B"
  eval.judges = ("reward:models/beaver-dam-7b,score=-max,chat=my_formats:BEAVER",)

The directory has its own tokenizer and its own chat template, which are used whatever the policy has. After it may
stand, with commas between them:

  score=NAME   which value is the score: a label's name or number, `max` or `mean` over all labels, each also with a
               minus sign (harm as a score is -max). A model with one value needs none; ArmoRM's default is its gated
               score, and NAME one of its objectives. A model with several labels needs one
  chat=NAME    a chat format, a known word or "package.module:NAME", instead of the directory's own template
  times=X      multiplies the score, for display

The score is the model's raw output. It is read at the last token that is no padding: where the config's pad token is
also what closes a turn, that is the token before, as in transformers. All responses to a prompt share its keys and
values. ArmoRM's gate reads the prompt alone and is computed once for all responses to it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alma_jax.engine import score
from alma_jax.judges import argument as arguments
from alma_jax.judges.contract import Answered, Verdict
from alma_jax.llama import heads, sharding
from alma_jax.llama.config import read_config, read_hf
from alma_jax.llama.model import Llama
from alma_jax.options import ConfigError
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Host, content_of, model_directory
from alma_jax.store import verify
from alma_jax.text import published
from alma_jax.text.chat import ChatFormat, Messages
from alma_jax.text.tokenizer import TextError, load_tokenizer

GATE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"  # ArmoRM's gate reads the first token of its last
OVER_ALL = {"max": np.max, "mean": np.mean}
Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which of a model's values is the score."""

  text: str = ""  # as the user wrote it
  column: int | None = None  # of the values; None: a word of OVER_ALL, or ArmoRM's gated score
  over_all: str = ""
  factor: float = 1.0

  def of(self, values: np.ndarray) -> np.ndarray:
    """[n] of the values [n, labels]."""
    return self.factor * (
      values[:, self.column] if self.column is not None else OVER_ALL[self.over_all](values, axis=1)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RewardJudge:
  """A reward model and how it is asked."""

  host: Host
  directory: pathlib.Path
  head: heads.Head
  written: published.Written
  choice: Choice
  pad: int | None  # the config's padding token
  positions: int  # the length limit of a conversation

  @property
  def scale(self) -> None:
    return None

  @functools.cached_property
  def content(self) -> str:
    return content_of(self.directory)

  @property
  def identity(self) -> str:
    text = [self.written.prompt([{"role": "user", "content": "?"}]), self.written.response("!")]
    decides = [self.content, text, self.pad, dataclasses.asdict(self.choice)]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return " ".join(filter(None, ("reward", self.directory.name, self.choice.text, digest[:16])))

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.shown_scores(pairs, None)

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar | None) -> list[Verdict]:
    """One Verdict for each pair. Equal pairs are scored once, and each conversation's prefix is computed once."""
    prompts: dict[str, _Prompt] = {}
    rows, prompt_of = [], []
    for messages, response in pairs:
      key = json.dumps(messages, sort_keys=True)
      if key not in prompts:
        prompts[key] = self._prompt(messages, len(prompts))
      rows.append(self._row(prompts[key], response))
      prompt_of.append(prompts[key].number)
    gate_rows = [(p.shared, p.repeated[:1]) for p in prompts.values()] if isinstance(self.head, heads.Armo) else []
    hidden = self._states(rows, gate_rows, bar)
    values = self.head.values(hidden[: len(rows)])
    if isinstance(self.head, heads.Armo):
      return self._gated(self.head, values, self.head.gates(hidden[len(rows) :])[prompt_of])
    chosen = self.choice.of(values)
    if values.shape[1] == 1:
      return [Verdict(float(x)) for x in chosen]
    return [Verdict(float(x), details=self._named(row)) for x, row in zip(chosen, values, strict=True)]

  def _gated(self, head: heads.Armo, values: np.ndarray, gates: np.ndarray) -> list[Verdict]:
    raw = head.scores(values, gates)
    gated = self.choice.column is None and not self.choice.over_all
    chosen = self.choice.factor * raw if gated else self.choice.of(values)
    return [
      Verdict(float(x), details={"score": float(its), "rewards": self._named(row), "gates": self._named(gate)})
      for x, its, row, gate in zip(chosen, raw, values, gates, strict=True)
    ]

  def _named(self, values: np.ndarray) -> dict[str, float]:
    return {label: float(x) for label, x in zip(self.head.labels, values, strict=True)}

  def _states(self, rows: list[tuple[Ids, Ids]], gate_rows: list[tuple[Ids, Ids]], bar: Bar | None) -> np.ndarray:
    """The hidden states that the head reads: of the responses, then of the prompts."""
    left = len(rows)

    def advance(done: int, tokens: int) -> None:
      nonlocal left
      step = min(left, done)  # the prompts' rows are no responses
      left -= step
      if bar is not None:
        bar.advance(step, tokens)

    def load() -> Llama:
      mesh, dtype = self.host.local_mesh, self.host.dtype
      return heads.trunk(self.directory, self.head, mesh, sharding.DECODE, dtype, verify.check)

    model = self.host.held((self.content, "below a head"), load)
    return score.last_states(model, rows + gate_rows, self.host.reading(progress=advance))

  def _prompt(self, messages: Messages, number: int) -> "_Prompt":
    """The ids up to the response: up to where the gate reads, or all but the last, is shared by the responses."""
    ids = tuple(self.written.prompt(messages))
    at = len(ids) - 1
    if isinstance(self.head, heads.Armo):
      pattern = tuple(self.written.markup(GATE))
      places = [i for i in range(len(ids) - len(pattern) + 1) if ids[i : i + len(pattern)] == pattern]
      if not places:
        raise TextError(f"{self.directory}: a prompt does not end with {GATE!r}, where the gate of ArmoRM reads")
      at = places[-1]
    return _Prompt(number, ids[:at], ids[at:])

  def _row(self, prompt: "_Prompt", response: str) -> tuple[Ids, Ids]:
    suffix = (*prompt.repeated, *self.written.response(response))
    length = len(prompt.shared) + len(suffix)
    if length > self.positions:
      raise ConfigError(
        f"a prompt and its response are {length} tokens for the reward model {self.directory}, which has"
        f" {self.positions} positions: lower max_prompt_tokens or max_new_tokens, or shorten them"
      )
    while len(suffix) > 1 and suffix[-1] == self.pad:
      suffix = suffix[:-1]
    return prompt.shared, suffix


@dataclasses.dataclass(frozen=True)
class _Prompt:
  """The ids of a conversation up to the response."""

  number: int
  shared: Ids
  repeated: Ids  # before every response


def named(host: Host, options: Any, argument: str) -> RewardJudge:
  """The judge 'reward:DIR'; its files' headers are checked, and no weight is read."""
  said = arguments.parsed("reward", argument, ("DIR",), ("score", "chat", "times"))
  directory = model_directory(said.places[0])
  head = heads.read(directory, verify.check)
  return _of(host, directory, head, said.chat(), _choice(said, head))


def trained(host: Host, directory: pathlib.Path) -> RewardJudge:
  """The judge of a directory that holds a head with one value, trained in the host's chat format."""
  return _of(host, directory, heads.read(directory, verify.check), host.chat, Choice(column=0))


def _of(host: Host, directory: pathlib.Path, head: heads.Head, fmt: ChatFormat | None, choice: Choice) -> RewardJudge:
  return RewardJudge(
    host=host,
    directory=directory,
    head=head,
    written=published.written_by(load_tokenizer(directory), fmt),
    choice=choice,
    pad=read_hf(directory).get("pad_token_id"),
    positions=read_config(directory).max_positions,
  )


def _choice(said: arguments.Argument, head: heads.Head) -> Choice:
  """The Choice that score= and times= make, or the only one there is."""
  text, labels = said.named.get("score"), head.labels
  try:
    factor = float(said.named.get("times", 1))
  except ValueError:
    raise ConfigError(f"'reward:...,times={said.named['times']}': times must be a number") from None
  known = f"a label ({', '.join(labels)}), its number, or {' or '.join(OVER_ALL)}, also with a minus sign"
  if text is None:
    if isinstance(head, heads.Scalar) and len(labels) > 1:
      raise ConfigError(
        f"'reward:{said.places[0]}' has {len(labels)} values: say which is the score, score=NAME: {known}"
      )
    return Choice("", 0 if isinstance(head, heads.Scalar) else None, "", factor)
  sign, name = (-1.0, text[1:]) if text.startswith("-") and text not in labels else (1.0, text)
  if name in labels:
    return Choice(text, labels.index(name), "", sign * factor)
  if name.isdecimal() and int(name) < len(labels):
    return Choice(text, int(name), "", sign * factor)
  if name in OVER_ALL:
    return Choice(text, None, name, sign * factor)
  raise ConfigError(f"'reward:...,score={text}': score may be {known}")
