"""Our own judge: the probabilities of the scores 0 .. 10 after a forced prefix, read from one forward pass."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.engine import score
from alma_jax.errors import NotFinite
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Scale, Verdict
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.text import judge as templates
from alma_jax.text.chat import Messages

Mode = Literal["expected", "integer"]
Shot = tuple[Messages, str, int]  # a worked example: the conversation, the response, its score
Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class OwnJudge:
  """A model and how it is asked."""

  host: Host
  checkpoint: Checkpoint
  template: templates.JudgeTemplate
  mode: Mode = "expected"  # the probability-weighted mean of 0..10; "integer": the likeliest score
  shots: tuple[Shot, ...] = ()  # for a base model; without any it is fine-tuned to the template

  @property
  def identity(self) -> str:
    decides: dict[str, Any] = {
      "checkpoint": self.checkpoint.content,
      "template": dataclasses.asdict(self.template),
      "mode": self.mode,
      "shots": [list(shot) for shot in self.shots],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"own {self.template.name} {self.mode} {digest[:16]}"

  @property
  def scale(self) -> Scale:
    return (0.0, 10.0)

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.shown_scores(pairs, None)

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar | None) -> list[Verdict]:
    """One Verdict for each pair. Equal pairs are scored once, and each conversation's prefix is computed once."""
    host = self.host
    trie = templates.score_paths(host.tokenizer, self.template)
    # Log-probs are read in the scores' columns alone; `narrow` numbers them from 0.
    columns = sorted({i for path in trie.paths for i in path})
    narrow = dataclasses.replace(trie, paths=tuple(tuple(columns.index(i) for i in path) for path in trie.paths))
    prefix_of, suffix_of = self._encoders()
    prefixes, rows = {}, []
    for messages, response in pairs:
      asked = templates.conversation_text(messages)
      if asked not in prefixes:
        prefixes[asked] = tuple(prefix_of(messages))
      rows.append((prefixes[asked], (*suffix_of(response), *trie.inner)))
    self._tell_too_long([len(prefix) + len(suffix) for prefix, suffix in rows])
    advance = None if bar is None else bar.advance
    setup = score.Setup(host.engine.rows, _opening(prefix_of), host.local_mesh, advance)
    model = host.model(self.checkpoint, "stacked")
    try:
      logprobs = score.next_logprobs(model, rows, columns, len(trie.inner) + 1, setup)
    except NotFinite as error:
      raise self.checkpoint.gave(error, f"{contract.name_of(pairs, error.item)}, judged") from None
    return [_verdict(narrow, x, self.mode) for x in logprobs]

  def _tell_too_long(self, lengths: Sequence[int]) -> None:
    """Print how many of the texts are longer than the model's positions, if any are."""
    positions = self.host.config.max_positions
    if over := sum(length > positions for length in lengths):
      self.host.display.say(
        f"{self.identity}: {over:,} of {len(lengths):,} texts are longer than the model's {positions:,} positions"
        f" (prompt, response and template; the longest has {max(lengths):,} tokens): their scores mean little"
      )

  def _encoders(self) -> tuple[Callable[[Messages], Ids], Callable[[str], Ids]]:
    """Two functions: messages to ids up to where the response begins, and a response to ids up to the score."""
    tok, template, shots = self.host.tokenizer, self.template, self.shots
    if shots:
      return (
        lambda messages: templates.few_shot_prefix(tok, template, shots, messages),
        lambda response: templates.few_shot_suffix(tok, template, response),
      )
    fmt = self.host.chat
    return (
      lambda messages: templates.judge_prefix(tok, fmt, template, messages),
      lambda response: templates.judge_suffix(tok, fmt, template, response),
    )


def _opening(prefix_of: Callable[[Messages], Ids]) -> tuple[int, ...]:
  """The ids that all prefixes begin with: what those of two different prompts share."""
  one, other = (prefix_of([{"role": "user", "content": prompt}]) for prompt in ("0", "1"))
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
  return tuple(a for a, _ in same)


def _verdict(trie: templates.ScoreTrie, logprobs: np.ndarray, mode: Mode) -> Verdict:
  mean, probs, mass = templates.expected_score(trie, logprobs)
  return Verdict(float(np.argmax(probs)) if mode == "integer" else mean, tuple(float(p) for p in probs), mass)
