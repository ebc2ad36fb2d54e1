"""A judge behind an OpenAI-compatible endpoint: "api:MODEL@URL", or "api:MODEL@URL#PROTOCOL".

  api:gpt-4o@https://api.openai.com/v1                                # ALMA's rating of 0 to 10
  api:my-judge@http://localhost:8000/v1#mt_bench                      # MT-Bench's, 1 to 10
  api:gpt-5@https://api.openai.com/v1#alma&max_tokens=null&max_completion_tokens=4000&temperature=null

What follows "#" is not part of the URL: a protocol of evals/protocols.py that rates one answer, and fields of the
request that replace the protocol's (JSON values, null leaves one out). All of it is in the identity; the key is not.

Answers are kept in $XDG_CACHE_HOME/alma_jax/judge_api (~/.cache by default), so that a killed run asks nothing twice.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alma_jax.evals import protocols
from alma_jax.evals.protocols import Ask, Grade, Item, Protocol, Reply
from alma_jax.judges.api_asking import Answers, Asking, Limits, request_id
from alma_jax.judges.api_http import Body, Endpoint
from alma_jax.judges.contract import Answered, Scale, Verdict
from alma_jax.options import ConfigError
from alma_jax.runtime.display import Bar
from alma_jax.text import judge as templates


def protocol_of(name: str) -> Protocol:
  return protocols.of_name(name, (templates.A2.instruction, templates.A2.item))


def kept_answers() -> pathlib.Path:
  """Where answers are kept, unless a command has a place of its own."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "alma_jax" / "judge_api"


# A protocol's items, asked


@dataclasses.dataclass(frozen=True)
class Graded:
  """An item's grade, with the judge's answers by request and why any of them is missing."""

  grade: Grade
  replies: Mapping[str, str]
  missing: Mapping[str, str]  # request -> why it gave no verdict


@dataclasses.dataclass(frozen=True)
class Grader:
  """A protocol at an endpoint."""

  endpoint: Endpoint
  protocol: Protocol
  last_turn: bool = False  # ask about the last answer of a conversation alone

  def asks(self, item: Item) -> list[Ask]:
    found = self.protocol.asks(item)
    return found[-1:] if self.last_turn else found

  @property
  def identity(self) -> str:
    said = {"protocol": self.protocol.digest, "last_turn": self.last_turn}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"api {self.endpoint.model} at {self.endpoint.url}, {self.protocol.name} {digest[:16]}"

  def body(self, ask: Ask) -> Body:
    """The request without its headers."""
    fields = {name: value for name, value in ask.decoding.items() if value is not None}
    return {"model": self.endpoint.model, "messages": list(ask.messages), **fields}

  def requests(self, items: Sequence[Item], answers: Answers) -> list[Body]:
    """All requests that are known: second ones only where the answer to the first is on disk."""
    found = []
    for ask in (ask for item in items for ask in self.asks(item)):
      found.append(self.body(ask))
      again = self._again(ask, answers)
      found += [self.body(again)] if again else []
    return found

  def ask(self, items: Sequence[Item], asking: Asking, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Have an answer to every request on disk; returns why, for the requests that were refused."""
    first = [ask for item in items for ask in self.asks(item)]
    refused = asking.ask([self.body(ask) for ask in first], progress)
    second = [again for ask in first if (again := self._again(ask, asking.answers))]
    return refused | asking.ask([self.body(ask) for ask in second])

  def graded(self, item: Item, answers: Answers, refused: Mapping[str, str]) -> Graded:
    """The grade from the answers on disk. What holds no verdict, or is not there, is missing."""
    asks, verdicts, replies, missing = self.asks(item), [], {}, {}
    for ask in asks:
      last = self._again(ask, answers) or ask
      reply = self._reply(last, answers)
      verdict = None if reply is None else self.protocol.read(reply)
      if reply is not None:
        replies[ask.part] = reply.text
      if verdict is None:
        why = "the answer holds no verdict" if reply is not None else "there is no answer"
        missing[ask.part] = refused.get(request_id(self.endpoint, self.body(last)), why)
      verdicts.append(verdict)
    return Graded(self.protocol.grade(asks, verdicts), replies, missing)

  def _again(self, ask: Ask, answers: Answers) -> Ask | None:
    reply = self._reply(ask, answers)
    return None if reply is None else self.protocol.again(ask, reply)

  def _reply(self, ask: Ask, answers: Answers) -> Reply | None:
    response = answers.get(self.endpoint, self.body(ask))
    return None if response is None else reply_of(response)


def reply_of(response: Mapping[str, Any]) -> Reply:
  """The text of a chat completion and the log-probabilities of its first token."""
  choice = response["choices"][0]
  try:
    tops = choice["logprobs"]["content"][0]["top_logprobs"]
    first = tuple((str(top["token"]), float(top["logprob"])) for top in tops)
  except (KeyError, IndexError, TypeError, ValueError):
    first = ()
  return Reply(choice["message"]["content"] or "", first)


# The judge of the contract


@dataclasses.dataclass(frozen=True)
class ApiJudge:
  """Rates responses one by one. One that the endpoint refuses or whose answer holds no rating has no score."""

  grader: Grader
  asking: Asking

  @property
  def identity(self) -> str:
    return self.grader.identity

  @property
  def scale(self) -> Scale:
    return self.grader.protocol.scale

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return self.shown_scores(pairs, None)

  def shown_scores(self, pairs: Sequence[Answered], bar: Bar | None) -> list[Verdict]:
    items = [protocols.item_of(str(at), messages, response) for at, (messages, response) in enumerate(pairs)]
    shown = 0

    def progress(count: int) -> None:
      nonlocal shown
      if bar is not None and shown + count <= len(pairs):
        bar.update(count)
        shown += count

    refused = self.grader.ask(items, self.asking, progress)
    if bar is not None:
      bar.update(len(pairs) - shown)  # those that were answered before
    found = [self.grader.graded(item, self.asking.answers, refused) for item in items]
    return [Verdict(x.grade.score, details={"reply": x.replies, "missing": x.missing}) for x in found]


def judge(host: Any, options: Any, argument: str) -> ApiJudge:
  """What "api:MODEL@URL#PROTOCOL" names, for a config or a flag."""
  grader = dataclasses.replace(grader_of(argument, "alma"), last_turn=True)
  if grader.protocol.pairwise:
    raise ConfigError(
      f"the protocol {grader.protocol.name!r} compares two answers; a judge of single responses takes alma, mt_bench or"
      " lima_1_6"
    )
  return ApiJudge(grader, Asking(grader.endpoint, Answers(kept_answers()), Limits()))


def grader_of(argument: str, protocol: str) -> Grader:
  """From "MODEL@URL", or "MODEL@URL#PROTOCOL&field=value"; without a protocol it is the one given here."""
  where, _, rest = argument.partition("#")
  name, *fields = rest.split("&")
  asked = protocol_of(name or protocol)
  decoding = dict(asked.decoding)
  for field in fields:
    key, equals, value = field.partition("=")
    try:
      decoding[key] = json.loads(value)
    except ValueError:
      equals = ""
    if not (key and equals) or key in ("model", "messages", "stream", "n"):
      raise ConfigError(
        f"api:{argument}: {field!r} is no field of the request with a JSON value, such as temperature=0"
      )
  return Grader(Endpoint.of(where, "api"), dataclasses.replace(asked, decoding=decoding))
