"""How the benchmarks ask a judge: the requests for an item, what an answer says, how several answers become one grade.

  protocol = of_name("mt_bench")
  asks = protocol.asks(item)                            # the requests that grade it; none where nothing has to be asked
  protocol.read(Reply("... Rating: [[7]]"))             # 7.0; None for an answer without a verdict, never a guess
  protocol.again(ask, reply)                            # a second request after an answer without a verdict, or None
  protocol.grade(asks, verdicts)                        # Grade(score, parts)

A score of a pairwise protocol is the model's share of the win: 1 won, 0 lost, 0.5 a tie. `evals.scoring` turns grades
into the benchmarks' numbers.
"""

import abc
import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from alma_jax.errors import UserError
from alma_jax.evals import prompts

Verdict = float | str | None  # a rating, a label such as "A>B", or None
Messages = tuple[dict[str, str], ...]


class ProtocolError(UserError):
  """A protocol that is not known, or an item that it cannot ask about."""


@dataclasses.dataclass(frozen=True)
class Item:
  """A question and what has answered it; for a conversation the texts of its turns."""

  id: str
  turns: tuple[str, ...]  # what the user says
  answers: tuple[str, ...]  # of the model that is graded
  baseline: tuple[str, ...] = ()  # of the model that it is compared with
  references: tuple[str, ...] = ()
  category: str = ""
  row: Mapping[str, Any] | None = None  # the fields of its row and of its question's, for judges by rule


def item_of(id: str, messages: Sequence[Mapping[str, str]], response: str) -> Item:
  """A conversation and the response to its last turn. Texts of the system are part of the user's turn that follows."""
  turns, answers, before = [], [], ""
  for message in messages:
    if message["role"] == "system":
      before += message["content"] + "\n\n"
    elif message["role"] == "user":
      turns.append(before + message["content"])
      before = ""
    else:
      answers.append(message["content"])
  return Item(id, tuple(turns), (*answers, response))


@dataclasses.dataclass(frozen=True)
class Ask:
  """One request to the judge."""

  part: str  # "turn_1", "game_2"
  messages: Messages
  decoding: Mapping[str, Any]  # fields of the request beside model and messages
  swapped: bool = False  # the graded model's answer stands first


@dataclasses.dataclass(frozen=True)
class Reply:
  """The judge's answer, with the likeliest first tokens and their log-probabilities where they were asked for."""

  text: str
  first: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Grade:
  score: float | None  # None where a verdict that it needs is missing
  parts: Mapping[str, Verdict]  # by request
  battles: tuple[float, ...] = ()  # of the model's games, one of a clear winner counted several times


@dataclasses.dataclass(frozen=True)
class Protocol(abc.ABC):
  """The fields of a protocol are its texts and its decoding; together they are its `digest`."""

  name: str
  decoding: Mapping[str, Any]
  scale: tuple[float, float]
  pairwise: ClassVar[bool] = False

  @property
  def digest(self) -> str:
    """Changes with every text and every value that decides a grade."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

  @abc.abstractmethod
  def asks(self, item: Item) -> list[Ask]: ...

  @abc.abstractmethod
  def read(self, reply: Reply) -> Verdict: ...

  @abc.abstractmethod
  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade: ...

  def again(self, ask: Ask, reply: Reply) -> Ask | None:
    return None

  def _rated(self, verdict: float | None) -> float | None:
    """A rating on the protocol's scale; one outside it is no verdict."""
    low, high = self.scale
    return verdict if verdict is not None and low <= verdict <= high else None


# One answer, rated


@dataclasses.dataclass(frozen=True)
class Rating(Protocol):
  """One request about the last answer of a conversation."""

  template: str = ""  # holds {question} and {answer}
  last_line: bool = False  # the rating stands alone on the last line; else in double brackets

  def asks(self, item: Item) -> list[Ask]:
    text = filled(self.template, question=conversation(item), answer=item.answers[-1].strip())
    return [Ask(f"turn_{len(item.turns)}", (_user(text),), self.decoding)]

  def read(self, reply: Reply) -> Verdict:
    if self.last_line:
      last = reply.text.strip().split("\n")[-1]
      found = re.fullmatch(r"[\s\"'“”*]*(\d+)[\s\"'“”*.]*", last)
    else:
      found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", reply.text)
    return self._rated(float(found[1])) if found else None

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    (ask,), (verdict,) = asks, verdicts
    return Grade(_number(verdict), {ask.part: verdict})


def alma(instruction: str, item: str) -> Rating:
  """ALMA's 0 to 10 without explanation (A.2), from the texts of a judge template with {prompt} and {response}."""
  template = (instruction + item).replace("{prompt}", "{question}", 1).replace("{response}", "{answer}", 1)
  return Rating("alma", {"temperature": 0, "max_tokens": 64}, (0.0, 10.0), template)


@dataclasses.dataclass(frozen=True)
class MtBench(Protocol):
  """FastChat's single-answer grading: a request per turn, with references for math, reasoning and coding.

  A rating outside 1 to 10, such as a year in brackets, is no verdict; FastChat takes it as it is.
  """

  texts: tuple[str, ...] = (
    prompts.MT_BENCH_SYSTEM,
    prompts.MT_BENCH,
    prompts.MT_BENCH_REFERENCE,
    prompts.MT_BENCH_SECOND_SYSTEM,
    prompts.MT_BENCH_SECOND,
    prompts.MT_BENCH_SECOND_REFERENCE_SYSTEM,
    prompts.MT_BENCH_SECOND_REFERENCE,
  )

  def asks(self, item: Item) -> list[Ask]:
    if len(item.turns) > 2:
      raise ProtocolError(f"mt_bench asks about one or two turns; {item.id} has {len(item.turns)}")
    needs = item.category in NEEDS_REFERENCE
    if needs and len(item.references) < len(item.answers):
      raise ProtocolError(
        f"mt_bench: {item.id} is of the category {item.category!r}, which is graded with a reference for each of its"
        f" {len(item.answers)} answers; it has {len(item.references)} (--references=FILE)"
      )
    return [self._ask(item, turn, needs) for turn in range(len(item.answers))]

  def _ask(self, item: Item, turn: int, needs: bool) -> Ask:
    system, plain, referenced, second_system, second, second_referenced_system, second_referenced = self.texts
    if turn == 1:
      system, plain, referenced = second_referenced_system if needs else second_system, second, second_referenced
    said = {"question": item.turns[0], "answer": item.answers[0]}
    for name, texts in (("question", item.turns), ("answer", item.answers), ("ref_answer", item.references)):
      said |= {f"{name}_{at}": text for at, text in enumerate(texts, 1)}
    text = filled(referenced if needs else plain, **said)
    return Ask(f"turn_{turn + 1}", ({"role": "system", "content": system}, _user(text)), self.decoding)

  def read(self, reply: Reply) -> Verdict:
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply.text) or re.search(r"\[(\d+\.?\d*)\]", reply.text)
    return self._rated(float(found[1])) if found else None

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    """The mean of the item's turns that have a rating."""
    parts = {ask.part: verdict for ask, verdict in zip(asks, verdicts, strict=True)}
    known = [float(verdict) for verdict in verdicts if verdict is not None]
    return Grade(math.fsum(known) / len(known) if known else None, parts)


NEEDS_REFERENCE = ("math", "reasoning", "coding")

# Two answers, compared


@dataclasses.dataclass(frozen=True)
class AlpacaEval(Protocol):
  """AlpacaEval 2.0: the log-probabilities of m and M as the only token; one game, its order drawn from the question.

  Two equal answers are a tie that no judge is asked about. `parts` hold the official `preference`, from 1 for the
  baseline to 2 for the model.
  """

  system: str = prompts.ALPACA_EVAL_SYSTEM
  template: str = prompts.ALPACA_EVAL

  pairwise = True

  def asks(self, item: Item) -> list[Ask]:
    question, answer, baseline = _single(self, item)
    if answer == baseline:
      return []
    swapped = random.Random(f"is_switched_outputs{question}0").choices([False, True], k=1)[0]
    one, other = (answer, baseline) if swapped else (baseline, answer)
    text = filled(self.template, instruction=question, output_1=one, output_2=other)
    return [Ask("game_1", ({"role": "system", "content": self.system}, _user(text)), self.decoding, swapped)]

  def read(self, reply: Reply) -> Verdict:
    """1 if the first answer wins for sure, 2 if the second one does."""
    known = {token: logprob for token, logprob in reply.first if token in ("m", "M")}
    if not known:
      return None
    first, second = (math.exp(known.get(token, -math.inf) - max(known.values())) for token in ("m", "M"))
    return 2 - first / (first + second)

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    if not asks:
      return Grade(0.5, {"preference": 1.5})
    (ask,), (verdict,) = asks, verdicts
    preference = _number(verdict)
    if preference is not None and ask.swapped:
      preference = 3 - preference
    return Grade(None if preference is None else preference - 1, {"preference": preference})


@dataclasses.dataclass(frozen=True)
class TwoGames(Protocol):
  """Both orders: the baseline stands first in game_1, the model in game_2."""

  system: str = ""
  template: str = ""

  pairwise = True

  def asks(self, item: Item) -> list[Ask]:
    question, answer, baseline = _single(self, item)
    system = self.system_for(item)
    before = ({"role": "system", "content": system},) if system else ()
    games = []
    for part, swapped in (("game_1", False), ("game_2", True)):
      one, other = (answer, baseline) if swapped else (baseline, answer)
      text = filled(self.template, question=question, answer_a=one, answer_b=other)
      games.append(Ask(part, (*before, _user(text)), self.decoding, swapped))
    return games

  def system_for(self, item: Item) -> str:
    return self.system


@dataclasses.dataclass(frozen=True)
class LimaPairwise(TwoGames):
  """LIMA's comparison with ties. The model wins if it wins more games than it loses."""

  def read(self, reply: Reply) -> Verdict:
    found = re.findall(r"\[\[([ABC])\]\]", reply.text)
    return found[0] if len(set(found)) == 1 else None

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    parts = {ask.part: verdict for ask, verdict in zip(asks, verdicts, strict=True)}
    if None in verdicts:
      return Grade(None, parts)
    shares = tuple(
      0.5 if verdict == "C" else float((verdict == "A") == ask.swapped)
      for ask, verdict in zip(asks, verdicts, strict=True)
    )
    return Grade(0.5 + 0.5 * ((sum(shares) > 1) - (sum(shares) < 1)), parts, shares)


# Who wins, the one that stands first or second: for each label the first one's share, and how often it counts.
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
MIRRORED = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<<A": "A>>B", "B<A": "A>B"}


@dataclasses.dataclass(frozen=True)
class ArenaHard2024(TwoGames):
  """Arena-Hard v0.1: each game counts for itself, a clear win three times; one repeated request without a verdict."""

  continuation: str = prompts.ARENA_HARD_AGAIN

  def read(self, reply: Reply) -> Verdict:
    found = {label for label in re.findall(r"\[\[([AB<>=]+)\]\]", reply.text)}
    label = found.pop() if len(found) == 1 else None
    return label if label in LABELS else None

  def again(self, ask: Ask, reply: Reply) -> Ask | None:
    if re.search(r"\[\[([AB<>=]+)\]\]", reply.text) or len(ask.messages) > 2:
      return None
    more = ({"role": "assistant", "content": reply.text}, _user(self.continuation))
    return dataclasses.replace(ask, messages=(*ask.messages, *more))

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    parts = {ask.part: verdict for ask, verdict in zip(asks, verdicts, strict=True)}
    battles = _battles(asks, verdicts)
    return Grade(math.fsum(battles) / len(battles) if battles else None, parts, battles)


@dataclasses.dataclass(frozen=True)
class ArenaHard2025(TwoGames):
  """Arena-Hard of 2025: the last label counts, and a question is left out if one of its games has none."""

  creative_system: str = prompts.ARENA_HARD_CREATIVE_SYSTEM

  def system_for(self, item: Item) -> str:
    return self.creative_system if item.category == "creative_writing" else self.system

  def read(self, reply: Reply) -> Verdict:
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
      if found := re.findall(pattern, reply.text.upper()):
        label = MIRRORED.get(found[-1], found[-1])
        return label if label in LABELS else None
    return None

  def grade(self, asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> Grade:
    parts = {ask.part: verdict for ask, verdict in zip(asks, verdicts, strict=True)}
    battles = () if None in verdicts else _battles(asks, verdicts)
    return Grade(math.fsum(battles) / len(battles) if battles else None, parts, battles)


def _battles(asks: Sequence[Ask], verdicts: Sequence[Verdict]) -> tuple[float, ...]:
  """The model's share in every game that has a label, as often as the game counts."""
  found: list[float] = []
  for ask, verdict in zip(asks, verdicts, strict=True):
    if verdict is not None:
      share, times = LABELS[str(verdict)]
      found += [share if ask.swapped else 1 - share] * times
  return tuple(found)


# What they share


def filled(template: str, **texts: str) -> str:
  """The template with its {names} replaced in one pass: a text that holds "{answer}" stays as it is."""
  return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)


def conversation(item: Item) -> str:
  """The question, or a longer conversation up to the last answer with the speakers' names."""
  if len(item.turns) == 1:
    return item.turns[0].strip()
  said = []
  for at, turn in enumerate(item.turns):
    said.append(f"User: {turn.strip()}")
    if at < len(item.turns) - 1:
      said.append(f"Assistant: {item.answers[at].strip()}")
  return "\n".join(said)


def _user(text: str) -> dict[str, str]:
  return {"role": "user", "content": text}


def _number(verdict: Verdict) -> float | None:
  return None if verdict is None else float(verdict)


def _single(protocol: Protocol, item: Item) -> tuple[str, str, str]:
  """The question of a single turn, the model's answer and the baseline's."""
  if not len(item.turns) == len(item.answers) == len(item.baseline) == 1:
    raise ProtocolError(
      f"{protocol.name} compares two answers to one question; {item.id} has {len(item.turns)} turns,"
      f" {len(item.answers)} answers and {len(item.baseline)} of the model that it is compared with (--against=FILE)"
    )
  return item.turns[0], item.answers[0], item.baseline[0]


_SHARE = (0.0, 1.0)
_ALL: tuple[Protocol, ...] = (
  MtBench("mt_bench", {"temperature": 0, "max_tokens": 2048}, (1.0, 10.0)),
  Rating("lima_1_6", {"temperature": 0, "max_tokens": 1024}, (1.0, 6.0), prompts.LIMA_RATING, last_line=True),
  LimaPairwise("lima_pairwise", {"temperature": 0, "max_tokens": 1024}, _SHARE, "", prompts.LIMA_PAIRWISE),
  AlpacaEval("alpaca_eval", {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}, _SHARE),
  ArenaHard2024(
    "arena_hard_2024", {"temperature": 0, "max_tokens": 4096}, _SHARE, prompts.ARENA_HARD_SYSTEM, prompts.ARENA_HARD
  ),
  ArenaHard2025(
    "arena_hard_2025", {"temperature": 0, "max_tokens": 16000}, _SHARE, prompts.ARENA_HARD_SYSTEM, prompts.ARENA_HARD
  ),
)
NAMES = ("alma", *(protocol.name for protocol in _ALL))


def of_name(name: str, alma_template: tuple[str, str]) -> Protocol:
  """The protocol of this name; `alma_template` is ALMA's (instruction, item), which stands in text/judge.py."""
  if name == "alma":
    return alma(*alma_template)
  found = next((protocol for protocol in _ALL if protocol.name == name), None)
  if found is None:
    raise ProtocolError(f"there is no protocol {name!r}; there are {', '.join(NAMES)}")
  return found
