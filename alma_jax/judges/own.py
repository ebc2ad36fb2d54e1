"""Judging with text in and scores out, on this host's devices."""

import dataclasses
import itertools

import numpy as np

from alma_jax.engine import score as engine
from alma_jax.runtime.host import Checkpoint
from alma_jax.text import judge as text


@dataclasses.dataclass(frozen=True)
class Judge:
  """A model and how it is asked. `shots`: worked examples (messages, response, score) for a base model; empty: it is
  fine-tuned to the template."""

  checkpoint: Checkpoint
  template: text.JudgeTemplate
  mode: str  # "expected": probability-weighted mean of 0..10; "integer": the likeliest score
  shots: tuple = ()

  @property
  def identity(self):
    """What decides its scores, for fingerprints."""
    return {
      "checkpoint": self.checkpoint.content,
      "template": dataclasses.asdict(self.template),
      "mode": self.mode,
      "shots": [list(shot) for shot in self.shots],
    }


@dataclasses.dataclass(frozen=True)
class Verdict:
  score: float
  probs: tuple
  mass: float


TEMPLATES = {t.name: t for t in (text.A1, text.A2, text.MINI_JUDGE)}


def template_by_name(name):
  if name not in TEMPLATES:
    raise text.TextError(f"there is no judge template {name!r}; there are {', '.join(TEMPLATES)}")
  return TEMPLATES[name]


def verdicts(host, judge, pairs, bar=None):
  """list[Verdict] for (messages, response text) pairs. Equal pairs are scored once, and what stands before the
  responses is computed once per conversation."""
  trie = text.score_paths(host.tokenizer, judge.template)
  columns = sorted({i for path in trie.paths for i in path})
  narrow = dataclasses.replace(trie, paths=tuple(tuple(columns.index(i) for i in path) for path in trie.paths))
  prefix_of, suffix_of = _encoders(host, judge)
  prefixes, rows = {}, []
  for messages, response in pairs:
    asked = text.conversation_text(messages)
    if asked not in prefixes:
      prefixes[asked] = tuple(prefix_of(messages))
    rows.append((prefixes[asked], (*suffix_of(response), *trie.inner)))
  logprobs = engine.next_logprobs(
    host.model(judge.checkpoint, "stacked"),
    rows,
    columns,
    reads=len(trie.inner) + 1,
    batch=host.config.engine.rows,
    common=_opening(prefix_of),
    mesh=host.local_mesh,
    progress=None if bar is None else _progress(bar),
  )
  return [_verdict(narrow, x, judge.mode) for x in logprobs]


def _encoders(host, judge):
  """(messages -> ids up to where the response begins, response -> ids up to the score)."""
  tok, fmt, template, shots = host.tokenizer, host.chat, judge.template, judge.shots
  if shots:
    return lambda m: text.few_shot_prefix(tok, template, shots, m), lambda r: text.few_shot_suffix(tok, template, r)
  return lambda m: text.judge_prefix(tok, fmt, template, m), lambda r: text.judge_suffix(tok, fmt, template, r)


def _opening(prefix_of):
  """The ids with which all prefixes begin: those that two different prompts share."""
  one, other = (prefix_of([{"role": "user", "content": prompt}]) for prompt in ("0", "1"))
  return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _progress(bar):
  def progress(rows, tokens):
    bar.update(rows)
    bar.tokens = getattr(bar, "tokens", 0) + tokens
    bar.set_postfix_str(f"{bar.tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

  return progress


def _verdict(trie, logprobs, mode):
  score, probs, mass = text.expected_score(trie, logprobs)
  if mode == "integer":
    score = float(np.argmax(probs))
  return Verdict(score, tuple(float(p) for p in probs), mass)
