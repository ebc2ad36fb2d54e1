"""The implicit reward of a policy: log p - log p_ref of a response under two checkpoints, the direct preference
judgement of SPA (2406.04412).

  judge.kind = "implicit:runs/spa/round_02/policy/model,runs/spa/sft_1/model"
  eval.judges = ("implicit:models/tuned,models/base,per=token",)

Both directories hold a model in Hugging Face format. The text is that of the first one's tokenizer and chat template,
or of the chat format that chat=NAME names; the second one's tokenizer must give its tokens the same ids. Counted are
the tokens that the policy draws: the response and, if it finished, the stop token. per=token divides by their number,
for sums favour long or short responses.
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
from alma_jax.llama import sharding, weights
from alma_jax.llama.config import read_config
from alma_jax.llama.model import Llama
from alma_jax.options import ConfigError
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host, content_of, model_directory
from alma_jax.store import verify
from alma_jax.text import published
from alma_jax.text.tokenizer import TextError, Tokenizer, load_tokenizer

PER = ("sequence", "token")


@dataclasses.dataclass(frozen=True, eq=False)
class ImplicitJudge:
  """Two checkpoints of one tokenizer; without a reference the score is log p."""

  host: Host
  policy: Checkpoint
  reference: Checkpoint | None
  written: published.Written
  vocab: int  # tokens in the text's tokenizer
  per: str  # a word of PER

  @property
  def scale(self) -> None:
    return None

  @property
  def identity(self) -> str:
    text = [self.written.prompt([{"role": "user", "content": "?"}]), self.written.response("!")]
    name, content = (self.reference.name, self.reference.content) if self.reference else ("nothing", "")
    digest = hashlib.sha256(json.dumps([self.policy.content, content, text]).encode()).hexdigest()
    return f"implicit {self.policy.name} against {name} per {self.per} {digest[:16]}"

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.shown_scores(pairs, None)

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar | None) -> list[Verdict]:
    """One Verdict for each pair; `details` have both log-probs and the number of tokens."""
    prompts: dict[str, tuple[int, ...]] = {}
    rows = []
    for pair in pairs:
      messages, response = pair
      key = json.dumps(messages, sort_keys=True)
      if key not in prompts:
        prompts[key] = tuple(self.written.prompt(messages))
      rows.append((prompts[key], tuple(self.written.drawn(response, pair.finished))))
    for checkpoint in filter(None, (self.policy, self.reference)):
      _check_room(checkpoint, max((len(prompt) + len(suffix) for prompt, suffix in rows), default=0))
    ours = self._logprobs(self.policy, rows, None if self.reference else bar)
    theirs = self._logprobs(self.reference, rows, bar) if self.reference else np.zeros_like(ours)
    counts = np.array([len(suffix) for _, suffix in rows])
    found = (ours - theirs) / (np.maximum(1, counts) if self.per == "token" else 1)
    return [
      Verdict(float(x), details={"logprob": float(a), "reference": float(b), "tokens": int(n)})
      for x, a, b, n in zip(found, ours, theirs, counts, strict=True)
    ]

  def _logprobs(self, checkpoint: Checkpoint, rows: list[Any], bar: Bar | None) -> np.ndarray:
    advance = None if bar is None else bar.advance
    model = self.host.held((checkpoint.content, f"{self.vocab} tokens"), functools.partial(self._load, checkpoint))
    return score.sequence_logprobs(model, rows, self.host.reading(progress=advance))

  def _load(self, checkpoint: Checkpoint) -> Llama:
    """The weights, with rows for the tokens that the text has and this checkpoint does not."""
    mesh, rules = self.host.local_mesh, sharding.DECODE
    model = weights.load(checkpoint.directory, mesh, rules, self.host.dtype, check=verify.check)
    return weights.resize(model, self.vocab, mesh, rules) if self.vocab > model.c.vocab else model


def _check_room(checkpoint: Checkpoint, length: int) -> None:
  positions = read_config(checkpoint.directory).max_positions
  if length > positions:
    raise ConfigError(
      f"a prompt and its response are {length} tokens for {checkpoint.directory}, which has {positions} positions:"
      " lower max_prompt_tokens or max_new_tokens, or shorten them"
    )


def named(host: Host, options: Any, argument: str) -> ImplicitJudge:
  """The judge 'implicit:DIR,REF'; no weight is read."""
  said = arguments.parsed("implicit", argument, ("DIR", "REF"), ("per", "chat"))
  per = said.named.get("per", PER[0])
  if per not in PER:
    raise ConfigError(f"'implicit:...,per={per}': per may be {' or '.join(PER)}")
  ours, theirs = map(model_directory, said.places)
  for directory in (ours, theirs):
    weights.files(directory)
  tokenizer = load_tokenizer(ours)
  check_same_tokens(tokenizer, ours, theirs, f"'implicit:{argument}'")
  return ImplicitJudge(
    host=host,
    policy=Checkpoint(said.places[0], ours, content_of(ours)),
    reference=Checkpoint(said.places[1], theirs, content_of(theirs)),
    written=published.written_by(tokenizer, said.chat()),
    vocab=tokenizer.size,
    per=per,
  )


def of_checkpoints(host: Host, policy: Checkpoint, reference: Checkpoint | None, per: str) -> ImplicitJudge:
  """The judge of a run's own checkpoints, in the run's chat format."""
  written = published.written_by(host.tokenizer, host.chat)
  return ImplicitJudge(host, policy, reference, written, host.tokenizer.size, per)


def check_same_tokens(tokenizer: Tokenizer, ours: pathlib.Path, theirs: pathlib.Path, where: str) -> None:
  """Raise a TextError for a model in `theirs` whose tokens have other ids than the tokenizer of `ours`."""
  known = tokenizer.exact.get_vocab()
  differ = [token for token, i in load_tokenizer(theirs).exact.get_vocab().items() if known.get(token) != i]
  if differ:
    raise TextError(
      f"{where}: {len(differ):,} tokens of {theirs} have other ids in {ours}, the first is {differ[0]!r}: the two"
      " checkpoints must have one tokenizer"
    )
