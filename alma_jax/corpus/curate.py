"""Which questions and answers of a site's dump make demonstrations like LIMA's (its section 2.1), and a sample of them.

  found = Curated(Rules(), count=400, seed=0)
  for question in dump:
    found.add(question)
  found.sampled()                [Demonstration]; found.counts: {"score": 812, "first_person": 97, "kept": 1200, ...}

The best answer to a question is taken if its score is high enough, if it is neither short nor long, and if it neither
speaks in the first person nor points at other answers. Sources (exchanges) share the sample by their sizes to the power
1/T, so that large ones do not fill it; within a source the questions with the highest scores come first. At most the
sample's size is held of each source.
"""

import collections
import dataclasses
import heapq
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.corpus.plain import plain, prose
from alma_jax.keys import Key, key_of

FIRST_PERSON = re.compile(r"\b(I|I['’](m|ve|d|ll)|[Mm]y|[Mm]yself)\b")
REFERENCE = re.compile(
  r"\b(as (mentioned|noted|stated|others?( have)? said)|stack ?(exchange|overflow)"
  r"|(other|another|previous|above|accepted) (answers?|repl(y|ies)|posts?|comments?)"
  r"|(see|cf\.?) (the )?(answer|comment)s?|upvoted?|downvoted?|the OP)\b|(^|\s)@\w+",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Answer:
  body: str  # HTML
  score: float


@dataclasses.dataclass(frozen=True)
class Question:
  source: str  # the exchange
  group: str  # of exchanges: groups share the sample evenly
  title: str
  body: str  # HTML
  score: float
  answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Demonstration:
  prompt: str
  response: str
  source: str
  group: str
  score: float  # of the question
  answer_score: float


@dataclasses.dataclass(frozen=True)
class Rules:
  least_score: float = 10.0  # of the answer
  least_characters: int = 1200
  most_characters: int = 4096
  first_person: bool = True  # leave out answers that speak in the first person
  references: bool = True  # leave out answers that point at other answers or at the site
  prompt: Literal["either", "title", "body"] = "either"  # "either": one of the two at random
  temperature: float = 3.0  # of sources; 1: by their sizes


_Ranked = tuple[float, Key, Demonstration]  # score, and what decides among equal ones


class Curated:
  def __init__(self, rules: Rules, count: int, seed: int = 0) -> None:
    self.rules, self.count, self.seed = rules, count, seed
    self.counts: collections.Counter[str] = collections.Counter()
    self.sizes: collections.Counter[tuple[str, str]] = collections.Counter()  # (group, source) -> questions that fit
    self._prompts: set[int] = set()
    # (group, source) -> a heap of its best questions, the worst first
    self._best: dict[tuple[str, str], list[_Ranked]] = collections.defaultdict(list)

  def add(self, question: Question) -> str:
    """Take the question, or say why not."""
    self.counts["questions"] += 1
    found = self._checked(question)
    why = found if isinstance(found, str) else "kept"
    self.counts[why] += 1
    if isinstance(found, Demonstration):
      of, tie = (found.group, found.source), key_of(self.seed, "curate", found.prompt)
      self.sizes[of] += 1
      heap, row = self._best[of], (found.score, tie, found)
      if len(heap) < self.count:
        heapq.heappush(heap, row)
      elif row[:2] > heap[0][:2]:
        heapq.heapreplace(heap, row)
    return why

  def sampled(self) -> list[Demonstration]:
    """The sample, by group, source and score."""
    groups = sorted({group for group, _ in self.sizes})
    by_group = dict(zip(groups, _evenly(self.count, [self._there(group) for group in groups]), strict=True))
    found = []
    for group in groups:
      sources = sorted(of for of in self.sizes if of[0] == group)
      shares = quotas([self.sizes[of] for of in sources], by_group[group], self.rules.temperature)
      for of, share in zip(sources, shares, strict=True):
        found += [row[2] for row in sorted(self._best[of], key=_rank)[:share]]
    return found

  def _there(self, group: str) -> int:
    return sum(size for (of, _), size in self.sizes.items() if of == group)

  def _checked(self, question: Question) -> Demonstration | str:
    """The demonstration, or the reason why there is none."""
    rules = self.rules
    if not question.answers:
      return "no_answer"
    best = max(question.answers, key=_score)
    if best.score < rules.least_score:
      return "score"
    text = plain(best.body)
    if len(text) < rules.least_characters:
      return "short"
    if len(text) > rules.most_characters:
      return "long"
    words = prose(text)
    if rules.first_person and FIRST_PERSON.search(words):
      return "first_person"
    if rules.references and REFERENCE.search(words):
      return "reference"
    title, body = plain(question.title), plain(question.body)
    by_title = bool(key_of(self.seed, "prompt", title)[0] & 1) if rules.prompt == "either" else rules.prompt == "title"
    prompt = (title or body) if by_title else (body or title)
    if not prompt:
      return "empty_prompt"
    id = int(prompt_id([{"role": "user", "content": prompt}]), 16)
    if id in self._prompts:
      return "duplicate"
    self._prompts.add(id)
    return Demonstration(prompt, text, question.source, question.group, question.score, best.score)


def quotas(sizes: list[int], count: int, temperature: float) -> list[int]:
  """How many of `count` each source gives: in proportion to size^(1/T), no more than it has.

  sizes 1000, 100, 1, count 12, T 3      powers 10, 4.6, 1: 7.7, 3.6, 0.8      8, 3, 1
  """
  room, found = np.array(sizes, int), np.zeros(len(sizes), int)
  weight = np.array(sizes, np.float64) ** (1 / temperature)
  left, free = min(count, int(room.sum())), np.ones(len(sizes), bool)
  while left:
    wanted = np.where(free, left * weight / weight[free].sum(), 0.0)
    full = free & (wanted >= room)
    if full.any():  # these give all that they have, and the others share what is left
      found[full] = room[full]
      left, free = left - int(room[full].sum()), free & ~full
      continue
    found[free] = np.floor(wanted[free]).astype(int)
    more = left - int(found[free].sum())
    order = np.argsort(np.where(free, np.floor(wanted) - wanted, 1.0), kind="stable")  # the largest remainders first
    found[order[:more]] += 1
    break
  return found.tolist()


def _evenly(count: int, there: list[int]) -> list[int]:
  """The sample's parts of groups: equal, as far as each of them has so many."""
  return quotas(there, count, float("inf")) if there else []


def _rank(row: _Ranked) -> tuple[float, int, int]:
  return (-row[0], -row[1][0], -row[1][1])


def _score(answer: Answer) -> float:
  return answer.score


def question_of(row: Mapping[str, object]) -> Question:
  """From the fields of a checked row."""
  answers = tuple(Answer(str(of["body"]), float(of["score"])) for of in row["answers"])  # pyright: ignore
  texts = {name: str(row.get(name) or "") for name in ("source", "group", "title", "body")}
  return Question(**texts, score=float(row.get("score") or 0), answers=answers)  # pyright: ignore
