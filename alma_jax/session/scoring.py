"""Judging with text in and scores out, on this host's devices."""

import dataclasses

import numpy as np

from alma_jax.engine import score as engine
from alma_jax.session.session import Checkpoint
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


def verdicts(session, judge, pairs, bar=None):
  """list[Verdict] for (messages, response text) pairs; equal pairs are scored once."""
  trie = text.score_paths(session.tokenizer, judge.template)
  rows = [_row(session, judge, messages, response, trie) for messages, response in pairs]
  unique = sorted(set(rows))
  columns = sorted({i for path in trie.paths for i in path})
  narrow = dataclasses.replace(trie, paths=tuple(tuple(columns.index(i) for i in path) for path in trie.paths))
  if bar is not None and len(unique) < len(rows):
    bar.update(len(rows) - len(unique))
  logprobs = engine.next_logprobs(
    session.model(judge.checkpoint, "stacked"),
    unique,
    columns,
    reads=len(trie.inner) + 1,
    batch=session.config.engine.rows * session.local_ways,
    place=session.place,
    progress=bar and bar.update,
  )
  found = {row: _verdict(narrow, x, judge.mode) for row, x in zip(unique, logprobs)}
  return [found[row] for row in rows]


def _row(session, judge, messages, response, trie):
  tok, fmt, template = session.tokenizer, session.chat, judge.template
  if judge.shots:
    ids = text.few_shot(tok, template, judge.shots, messages, response)
  else:
    prefix = text.judge_prefix(tok, fmt, template, messages)
    ids = [*prefix, *text.judge_suffix(tok, fmt, template, response)]
  return (*ids, *trie.inner)


def _verdict(trie, logprobs, mode):
  score, probs, mass = text.expected_score(trie, logprobs)
  if mode == "integer":
    score = float(np.argmax(probs))
  return Verdict(score, tuple(float(p) for p in probs), mass)
