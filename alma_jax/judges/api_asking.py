"""Many requests to an endpoint: several at a time, sent again after failures, each answer kept on disk at once.

  asking = Asking(endpoint, Answers(directory), Limits(concurrency=8, requests=1000))
  asking.ask(bodies)                             # {request id: response}; what is on disk is not sent
  asking.answers.write_batch(bodies, endpoint, "batch.jsonl")     # the same requests as an OpenAI batch file
  asking.answers.read_batch("results.jsonl", bodies, endpoint)    # its results, in any order, into the same place

An answer is named by the SHA-256 of the URL and the whole body. A killed command asks only what it has no answer to.
Failures are never kept.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alma_jax.errors import RunError
from alma_jax.judges.api_http import Answered, ApiError, Body, Endpoint, Later, Refused, post, problem
from alma_jax.options import ConfigError
from alma_jax.store import shards


class BudgetSpent(RunError):
  """The next request would exceed the budget."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How an endpoint is asked. None of it changes an answer."""

  concurrency: int = 8  # requests at a time
  tries: int = 8  # of one request
  first_wait: float = 1.0  # seconds before the second try, doubled after each one
  longest_wait: float = 60.0
  timeout: float = 300.0  # seconds for one answer
  grace: float = 5.0  # seconds that a stopped command waits for answers under way
  requests: int | None = None  # budget of one start: requests sent, repeated ones included
  tokens: int | None = None  # budget of one start: tokens in and out, as the endpoint counts them


def request_id(endpoint: Endpoint, body: Body) -> str:
  """40 hex digits that stand for the whole request; they name it in the cache and in batch files."""
  text = json.dumps({"url": endpoint.url, "body": body}, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclasses.dataclass(frozen=True)
class Answers:
  """The answers on disk: a JSON file each, with the request beside it."""

  directory: pathlib.Path

  def get(self, endpoint: Endpoint, body: Body) -> dict[str, Any] | None:
    """The kept answer to this very request; a file that is damaged or holds another request is no answer."""
    try:
      held = json.loads(self._path(request_id(endpoint, body)).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
      return None
    same = isinstance(held, dict) and held.get("request") == json.loads(json.dumps(body))
    return held["response"] if same and problem(held.get("response")) is None else None

  def put(self, endpoint: Endpoint, body: Body, response: Mapping[str, Any]) -> None:
    held = {"url": endpoint.url, "request": body, "response": response}
    shards.write_json(self._path(request_id(endpoint, body)), held)

  def _path(self, id: str) -> pathlib.Path:
    return self.directory / id[:2] / f"{id}.json"

  def unanswered(self, endpoint: Endpoint, bodies: Iterable[Body]) -> dict[str, Body]:
    """The requests without an answer on disk, each once."""
    once = {request_id(endpoint, body): body for body in bodies}
    return {id: body for id, body in once.items() if self.get(endpoint, body) is None}

  # Batch files

  def write_batch(self, bodies: Iterable[Body], endpoint: Endpoint, path: str | os.PathLike[str]) -> int:
    """Write the unanswered requests as an OpenAI batch file (vLLM's run_batch reads the same); returns their number."""
    missing = self.unanswered(endpoint, bodies)
    with shards.atomic(path) as file:
      for id, body in missing.items():
        line = {"custom_id": id, "method": "POST", "url": endpoint.path, "body": body}
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
    return len(missing)

  def read_batch(self, path: str | os.PathLike[str], bodies: Iterable[Body], endpoint: Endpoint) -> "BatchRead":
    """Keep the answers of a batch's result file. Its lines may come in any order; errors are no answers."""
    asked = {request_id(endpoint, body): body for body in bodies}
    kept, failed, strange = set(), {}, []
    for number, item in _lines(path):
      id = item.get("custom_id")
      if id not in asked:
        strange.append(str(id))
        continue
      response = item.get("response")
      response = response if isinstance(response, dict) else {}
      body, status = response.get("body"), response.get("status_code", 200)
      why = problem(body)
      if item.get("error") or status != 200 or why or not isinstance(body, dict):
        said = item.get("error") or (body.get("error") if isinstance(body, dict) else None) or why or f"status {status}"
        failed[id] = f"{path}, line {number}: {json.dumps(said, ensure_ascii=False)[:200]}"
      else:
        self.put(endpoint, asked[id], body)
        kept.add(id)
    absent = [id for id in asked if id not in kept and id not in failed and self.get(endpoint, asked[id]) is None]
    return BatchRead(len(kept), {id: why for id, why in failed.items() if id not in kept}, absent, strange)


@dataclasses.dataclass(frozen=True)
class BatchRead:
  kept: int
  failed: dict[str, str]  # request id -> why
  absent: list[str]  # asked for, in no line and not on disk
  strange: list[str]  # lines whose custom_id no request has


def _lines(path: str | os.PathLike[str]) -> Iterable[tuple[int, dict[str, Any]]]:
  try:
    with open(path, encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          item = json.loads(line)
        except ValueError as error:
          raise ConfigError(f"{path}, line {number}: not valid JSON ({error}); fetch the results again") from None
        if not isinstance(item, dict):
          raise ConfigError(f"{path}, line {number}: expected an object with custom_id and response")
        yield number, item
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"cannot read {path}: {error}") from None


# Live


@dataclasses.dataclass
class Spent:
  """What one start has used. `served` counts the answers by the model and fingerprint that the endpoint names."""

  requests: int = 0
  tokens_in: int = 0
  tokens_out: int = 0
  served: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  @property
  def tokens(self) -> int:
    return self.tokens_in + self.tokens_out


class Asking:
  """Asks an endpoint and keeps its answers."""

  def __init__(self, endpoint: Endpoint, answers: Answers, limits: Limits = Limits()) -> None:
    self.endpoint, self.answers, self.limits = endpoint, answers, limits
    self.spent, self._lock = Spent(), threading.Lock()
    self._not_before, self._reserved = 0.0, 0  # monotonic seconds; tokens of the requests that are under way

  def ask(self, bodies: Sequence[Body], progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Have an answer to every request on disk; returns why, for the requests that the endpoint refused.

    Raises an ApiError if the endpoint is unusable, and BudgetSpent; the answers that came before are kept.
    """
    missing = self.answers.unanswered(self.endpoint, bodies)
    if not missing:
      return {}
    waiting: queue.SimpleQueue[tuple[str, Body]] = queue.SimpleQueue()
    for item in missing.items():
      waiting.put(item)
    done: queue.SimpleQueue[tuple[str, Answered | Refused | Exception]] = queue.SimpleQueue()
    stop = threading.Event()
    many = min(self.limits.concurrency, len(missing))
    threads = [threading.Thread(target=self._work, args=(waiting, done, stop), daemon=True) for _ in range(many)]
    for thread in threads:
      thread.start()
    refused: dict[str, str] = {}
    try:
      for _ in range(len(missing)):
        id, outcome = done.get()
        if isinstance(outcome, Exception):
          raise outcome
        if isinstance(outcome, Refused):
          refused[id] = outcome.reason
        if progress:
          progress(1)
    finally:
      stop.set()
      end = time.monotonic() + self.limits.grace  # answers that are under way are paid for
      for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return refused

  def _work(self, waiting: queue.SimpleQueue, done: queue.SimpleQueue, stop: threading.Event) -> None:
    """One of the threads: takes requests until there are no more."""
    while not stop.is_set():
      try:
        id, body = waiting.get_nowait()
      except queue.Empty:
        return
      try:
        done.put((id, self._answered(body, stop)))
      except Exception as error:  # also a bug: the main thread raises it
        done.put((id, error))
        stop.set()

  def _answered(self, body: Body, stop: threading.Event) -> Answered | Refused:
    """The answer to one request, which is on disk when this returns."""
    how, last = self.limits, Later("never sent")
    for tried in range(how.tries):
      self._wait(stop)
      if stop.is_set():
        raise ApiError("stopped")  # read by nobody: the main thread has gone on
      reserved = self._reserve(body)
      try:
        last = post(self.endpoint, body, how.timeout)
      finally:
        with self._lock:
          self._reserved -= reserved
      if isinstance(last, Answered):
        self.answers.put(self.endpoint, body, last.response)
        self._note(last.response)
        return last
      if isinstance(last, Refused):
        return last
      if tried + 1 < how.tries:
        self._pause(last, tried, stop)
    if last.nonsense:
      return Refused(f"{how.tries} times: {last.reason}")
    raise ApiError(
      f"{self.endpoint.url} did not answer a request in {how.tries} tries; the last one: {last.reason}. The answers"
      " that came are kept: the same command goes on from here"
    )

  def _pause(self, last: Later, tried: int, stop: threading.Event) -> None:
    """Wait before the next try: what the endpoint asks for, else twice as long as before, with jitter."""
    most = min(self.limits.longest_wait, self.limits.first_wait * 2**tried)
    delay = most * random.uniform(0.5, 1.0)
    if last.wait is not None:
      delay = last.wait + delay * 0.1
      with self._lock:  # the endpoint means all of us
        self._not_before = max(self._not_before, time.monotonic() + last.wait)
    stop.wait(delay)

  def _wait(self, stop: threading.Event) -> None:
    with self._lock:
      delay = self._not_before - time.monotonic()
    if delay > 0:
      stop.wait(delay)

  def _reserve(self, body: Body) -> int:
    """Count one request and return the tokens that it may use; raise if it would exceed the budget."""
    how, spent, most = self.limits, self.spent, tokens_in(body) + most_out(body)
    with self._lock:
      if how.requests is not None and spent.requests >= how.requests:
        raise BudgetSpent(
          f"the budget of {how.requests:,} requests is spent; the answers that came are kept. The same command with a"
          " new budget goes on from here"
        )
      if how.tokens is not None and spent.tokens + self._reserved + most > how.tokens:
        raise BudgetSpent(
          f"{spent.tokens:,} tokens are used, and the next request may exceed the budget of {how.tokens:,}; the answers"
          " that came are kept. The same command with a new budget goes on from here"
        )
      spent.requests += 1
      self._reserved += most
    return most

  def _note(self, response: Mapping[str, Any]) -> None:
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    with self._lock:
      self.spent.tokens_in += _whole(usage.get("prompt_tokens"))
      self.spent.tokens_out += _whole(usage.get("completion_tokens"))
      self.spent.served[served_by(response)] += 1


def served_by(response: Mapping[str, Any]) -> str:
  """The model and the fingerprint that the endpoint says it has used."""
  return " ".join(str(response[name]) for name in ("model", "system_fingerprint") if response.get(name)) or "unnamed"


def _whole(value: Any) -> int:
  return value if isinstance(value, int) and not isinstance(value, bool) else 0


# What it will cost


def tokens_in(body: Body) -> int:
  """An estimate: a token is about four bytes of UTF-8, and every message has four more around it."""
  return sum(len(message["content"].encode()) // 4 + 4 for message in body["messages"])


def most_out(body: Body) -> int:
  return int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)


@dataclasses.dataclass(frozen=True)
class Estimate:
  requests: int  # to send
  answered: int  # on disk
  tokens_in: int  # estimated
  most_out: int

  def lines(self, price: "Price | None" = None) -> list[str]:
    said = [
      f"requests  {self.requests:,} to send, {self.answered:,} answered before",
      f"tokens    about {self.tokens_in:,} in (estimated: bytes / 4), at most {self.most_out:,} out (length limits)",
    ]
    if price:
      into, out = self.tokens_in * price.input / 1e6, self.most_out * price.output / 1e6
      said.append(
        f"money     about {into:.2f} in + at most {out:.2f} out = at most {into + out:.2f}, in the prices' unit"
      )
    return said


def estimate(endpoint: Endpoint, answers: Answers, bodies: Sequence[Body]) -> Estimate:
  missing = answers.unanswered(endpoint, bodies)
  there = len({request_id(endpoint, body) for body in bodies}) - len(missing)
  into, out = sum(map(tokens_in, missing.values())), sum(map(most_out, missing.values()))
  return Estimate(len(missing), there, into, out)


@dataclasses.dataclass(frozen=True)
class Price:
  """Of a million tokens."""

  input: float
  output: float


def price_of(path: str | os.PathLike[str], model: str) -> Price:
  """From the user's file: {"gpt-4o": {"input": 2.5, "output": 10.0}, ...}."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    return Price(float(found[model]["input"]), float(found[model]["output"]))
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
  except (ValueError, KeyError, TypeError):
    like = '{"' + model + '": {"input": 2.5, "output": 10.0}}'
    raise ConfigError(
      f"{path} has no price of the model {model!r}; it should hold {like}, of a million tokens"
    ) from None
