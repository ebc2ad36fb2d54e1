"""Our own judge: the probabilities of the scores 0 .. 10 after a forced prefix, read from one forward pass.

  mode "expected"   their mean
  mode "integer"    the likeliest score
  mode "sampled"    the mean of `samples` draws from them; a draw that falls on no score is unreadable and left out

With a template that reasons first, `samples` reasonings are drawn, the distribution is read behind each, and the mode
is that of the mean of these distributions ("sampled": one draw behind each). A reasoning that does not come to the
score within the template's length is unreadable and left out. A verdict's details count the draws and the unreadable
ones; with nothing but unreadable ones it has no score.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.engine import score
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.errors import NotFinite
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Scale, Verdict
from alma_jax.keys import key_of, random_numbers
from alma_jax.runtime import sampling
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.text import chat
from alma_jax.text import judge as templates
from alma_jax.text.chat import Messages
from alma_jax.text.judge import ExpectedScore, ReasonedTemplate, Shot

Mode = Literal["expected", "integer", "sampled"]
Ids = Sequence[int]
Row = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of the conversation, and those from the response on


@dataclasses.dataclass(frozen=True)
class OwnJudge:
  """A model and how it is asked."""

  host: Host
  checkpoint: Checkpoint
  template: templates.JudgeTemplate
  mode: Mode = "expected"
  shots: tuple[Shot, ...] = ()  # for a base model; without any it is fine-tuned to the template
  samples: int = 8
  seed: int = 0  # of what is drawn

  @property
  def draws(self) -> bool:
    """True if the score is the mean of samples."""
    return self.mode == "sampled" or isinstance(self.template, ReasonedTemplate)

  @property
  def identity(self) -> str:
    decides: dict[str, Any] = {
      "checkpoint": self.checkpoint.content,
      "template": dataclasses.asdict(self.template),
      "mode": self.mode,
      "shots": [[*shot[:3], *filter(None, shot[3:])] for shot in self.shots],
    }
    if self.draws:
      decides |= {"samples": self.samples, "seed": self.seed}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    of = f" of {self.samples}" if self.draws else ""
    return f"own {self.template.name} {self.mode}{of} {digest[:16]}"

  @property
  def scale(self) -> Scale:
    return (0.0, 10.0)

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.shown_scores(pairs, None)

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar | None) -> list[Verdict]:
    """One Verdict for each pair. Equal pairs are scored once, and each conversation's prefix is computed once."""
    if isinstance(self.template, ReasonedTemplate):
      found = self._after_reasoning(pairs, self.template)
      if bar is not None:
        bar.update(len(pairs))
      return found
    read = self._read(self._rows([(messages, response, None) for messages, response in pairs]), pairs, bar)
    return [self._verdict(found, pair) for found, pair in zip(read, pairs, strict=True)]

  def tokens(self, messages: Messages, response: str) -> int:
    """How many tokens a response takes with its conversation, the template, and a reasoning where there is one."""
    prefix_of, suffix_of = self._encoders()
    inner = templates.score_paths(self.host.tokenizer, self.template).inner
    return len(prefix_of(messages)) + len(suffix_of(response, None)) + len(inner) + self._behind

  @property
  def _behind(self) -> int:
    """The most tokens that a reasoning and the answer behind it take."""
    if not isinstance(self.template, ReasonedTemplate):
      return 0
    return self.template.most_tokens + len(self.host.tokenizer.encode(self.template.after + self.template.answer(10)))

  def _verdict(self, read: ExpectedScore, pair: Answered) -> Verdict:
    probs = tuple(float(p) for p in read.probs)
    if self.mode != "sampled":
      return Verdict(float(np.argmax(read.probs)) if self.mode == "integer" else read.mean, probs, read.mass)
    uniform = random_numbers(*self._words(pair, "scores")).random(self.samples)
    return _of_draws(_draws(read, uniform), probs, read.mass, {})

  def _words(self, pair: Answered, what: object) -> tuple[object, ...]:
    """What decides a draw: the texts, so that equal pairs get equal scores."""
    messages, response = pair
    text = json.dumps([templates.conversation_text(messages), response])
    return self.seed, "judge", hashlib.sha256(text.encode()).hexdigest(), what

  def _rows(self, asked: Sequence[tuple[Messages, str, str | None]]) -> list[Row]:
    """The ids of each conversation with a response, and a reasoning where there is one."""
    prefix_of, suffix_of = self._encoders()
    prefixes, rows = {}, []
    for messages, response, reason in asked:
      said = templates.conversation_text(messages)
      if said not in prefixes:
        prefixes[said] = tuple(prefix_of(messages))
      rows.append((prefixes[said], tuple(suffix_of(response, reason))))
    return rows

  def _read(self, rows: Sequence[Row], pairs: Sequence[Answered], bar: Bar | None) -> list[ExpectedScore]:
    """The scores' distribution behind each row; `pairs` name the rows."""
    host = self.host
    trie = templates.score_paths(host.tokenizer, self.template)
    # Log-probs are read in the scores' columns alone; `narrow` numbers them from 0.
    columns = sorted({i for path in trie.paths for i in path})
    narrow = dataclasses.replace(trie, paths=tuple(tuple(columns.index(i) for i in path) for path in trie.paths))
    rows = [(prefix, (*suffix, *trie.inner)) for prefix, suffix in rows]
    self._tell_too_long([len(prefix) + len(suffix) for prefix, suffix in rows])
    advance = None if bar is None else bar.advance
    setup = host.reading(_opening(self._encoders()[0]), advance)
    model = host.model(self.checkpoint, "stacked")
    try:
      logprobs = score.next_logprobs(model, rows, columns, len(trie.inner) + 1, setup)
    except NotFinite as error:
      raise self.checkpoint.gave(error, f"{contract.name_of(pairs, error.item)}, judged") from None
    return [templates.expected_score(narrow, x) for x in logprobs]

  def _after_reasoning(self, pairs: Sequence[Answered], template: ReasonedTemplate) -> list[Verdict]:
    """A verdict from the distributions behind several reasonings for each pair."""
    n = self.samples
    rows = self._rows([(messages, response, None) for messages, response in pairs])
    lengths = [len(prefix) + len(suffix) + self._behind for prefix, suffix in rows]
    self._tell_too_long(lengths)  # a text that leaves no room for a reasoning has unreadable ones only
    fit = [i for i, length in enumerate(lengths) if length <= self.host.config.max_positions]
    first: dict[Row, int] = {}  # equal texts are reasoned about once
    for i in fit:
      first.setdefault(rows[i], i)
    requests = [
      Request((*rows[i][0], *rows[i][1]), key_of(*self._words(pairs[i], k)), f"{contract.name_of(pairs, i)}, judged")
      for i in first.values()
      for k in range(n)
    ]
    drafts = iter(self._reasonings(requests, template))
    reasons = {row: [next(drafts) for _ in range(n)] for row in first}
    asked = [(i, reason) for row, i in first.items() for reason in reasons[row] if reason is not None]
    behind = self._rows([(*pairs[i], reason) for i, reason in asked])
    read = iter(self._read(behind, [pairs[i] for i, _ in asked], None) if asked else ())
    verdicts = {}
    for row, i in first.items():
      found = [None if reason is None else next(read) for reason in reasons[row]]
      verdicts[row] = self._of_reasonings(found, reasons[row], pairs[i])
    none = Verdict(
      None, details={"draws": n, "unreadable": n, "why": f"no room for {template.most_tokens} tokens more"}
    )
    return [verdicts.get(row, none) for row in rows]

  def _reasonings(self, requests: Sequence[Request], template: ReasonedTemplate) -> list[str | None]:
    """The reasoning that each request draws; None where it does not come to the score."""
    if not requests:
      return []
    host, tok = self.host, self.host.tokenizer
    eos = () if tok.eos_id is None else (tok.eos_id,)
    stops = sampling.Stops(eos if self.shots else chat.stop_ids(tok, host.chat), (template.answer_open,))
    longest = 64  # in coarse steps: each is a program of its own
    while longest < max(len(r.prompt) for r in requests):
      longest *= 2
    decoding = Decoding(template.most_tokens, temperature=template.temperature)
    options = sampling.Options(decoding=decoding, max_prompt_tokens=longest)
    with Bar(total=len(requests), disable=True) as bar:
      drafts = sampling.drafts(host, self.checkpoint, requests, options, stops, bar)
    return [draft.text if template.answer_open in tok.decode(draft.tokens) else None for draft in drafts]

  def _of_reasonings(
    self, read: Sequence[ExpectedScore | None], reasons: Sequence[str | None], pair: Answered
  ) -> Verdict:
    known, more = [x for x in read if x is not None], {"reasons": list(reasons)}
    if not known:
      return _of_draws([None] * len(read), None, None, more)
    probs = np.mean([x.probs for x in known], axis=0)
    mass = float(np.mean([x.mass for x in known]))
    drawn = [None if x is None else x.mean for x in read]
    if self.mode == "sampled":
      uniform = random_numbers(*self._words(pair, "scores")).random(len(read))
      drawn = [None if x is None else _draws(x, u)[0] for x, u in zip(read, uniform[:, None], strict=True)]
    verdict = _of_draws(drawn, tuple(float(p) for p in probs), mass, more)
    return dataclasses.replace(verdict, score=float(np.argmax(probs))) if self.mode == "integer" else verdict

  def _tell_too_long(self, lengths: Sequence[int]) -> None:
    """Print how many of the texts are longer than the model's positions, if any are."""
    positions = self.host.config.max_positions
    if over := sum(length > positions for length in lengths):
      self.host.display.say(
        f"{self.identity}: {over:,} of {len(lengths):,} texts are longer than the model's {positions:,} positions"
        f" (prompt, response and template; the longest has {max(lengths):,} tokens): their scores mean little"
      )

  def _encoders(self) -> tuple[Callable[[Messages], Ids], Callable[[str, str | None], Ids]]:
    """Two functions: messages to ids up to where the response begins, and a response, with the reasoning about it or
    None, to ids up to the score or up to the reasoning."""
    tok, template, shots = self.host.tokenizer, self.template, self.shots
    if shots:
      return (
        lambda messages: templates.few_shot_prefix(tok, template, shots, messages),
        lambda response, reason: templates.few_shot_suffix(tok, template, response, reason),
      )
    fmt = self.host.chat
    return (
      lambda messages: templates.judge_prefix(tok, fmt, template, messages),
      lambda response, reason: templates.judge_suffix(tok, fmt, template, response, reason),
    )


def _opening(prefix_of: Callable[[Messages], Ids]) -> tuple[int, ...]:
  """The ids that all prefixes begin with: what those of two different prompts share."""
  one, other = (prefix_of([{"role": "user", "content": prompt}]) for prompt in ("0", "1"))
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
  return tuple(a for a, _ in same)


def _draws(read: ExpectedScore, uniform: np.ndarray) -> list[float | None]:
  """The scores at these places of the raw probabilities' sum, by inverse CDF; None beyond the mass of all scores."""
  reached = np.cumsum(read.probs * min(1.0, read.mass))
  return [float(at) if at < len(reached) else None for at in np.searchsorted(reached, uniform, side="right")]


def _of_draws(
  drawn: Sequence[float | None], probs: tuple[float, ...] | None, mass: float | None, more: dict[str, Any]
) -> Verdict:
  known = [x for x in drawn if x is not None]
  details = {"draws": len(drawn), "unreadable": len(drawn) - len(known), "scores": list(drawn), **more}
  return Verdict(float(np.mean(known)) if known else None, probs, mass, details)
