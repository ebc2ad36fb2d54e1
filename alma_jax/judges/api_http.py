"""One request to an OpenAI-compatible endpoint, and what its answer means: an answer, a refusal, or ask again later.

  endpoint = Endpoint.of("gpt-4o@https://api.openai.com/v1")
  post(endpoint, body, timeout=300.0)            # Answered | Refused | Later; an ApiError where no request can succeed

The key comes from the environment: ALMA_API_KEY for every endpoint, else OPENAI_API_KEY for api.openai.com alone. It is
sent to the endpoint's host and nowhere else (redirects are not followed), and is cut out of every message.
"""

import contextlib
import dataclasses
import datetime
import email.message
import email.utils
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import IO, Any

from alma_jax.errors import RunError
from alma_jax.options import ConfigError

KEY, OPENAI_KEY, OPENAI_HOST = "ALMA_API_KEY", "OPENAI_API_KEY", "api.openai.com"
MOST_BYTES = 2**26  # of an answer
Body = Mapping[str, Any]


class ApiError(RunError):
  """An endpoint that cannot be used: no request to it can succeed, or it did not answer for too long."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A model behind a URL such as https://api.openai.com/v1."""

  model: str
  url: str

  @classmethod
  def of(cls, text: str, field: str = "api") -> "Endpoint":
    """From "MODEL@URL"; the model's name may hold "@", too."""
    found = re.fullmatch(r"(.+)@(https?://\S+)", text)
    if not found:
      raise ConfigError(f"{field} is {text!r}; it must be MODEL@URL, such as gpt-4o@https://api.openai.com/v1")
    model, url = found[1], found[2].rstrip("/").removesuffix("/chat/completions")
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password or parts.query:
      raise ConfigError(
        f"{field} holds a user, a password or a query in its URL; keys come from the environment: {KEY}"
      )
    try:
      host, _ = parts.hostname, parts.port
    except ValueError:
      host = None
    if not host:
      raise ConfigError(f"{field} is {text!r}: there is no host in the URL, or its port is no number")
    return cls(model, url)

  @property
  def path(self) -> str:
    """What a line of a batch file calls the endpoint."""
    return f"{urllib.parse.urlsplit(self.url).path}/chat/completions"

  @property
  def key(self) -> str | None:
    if key := os.environ.get(KEY, "").strip():
      return key
    own = urllib.parse.urlsplit(self.url).hostname == OPENAI_HOST
    return (os.environ.get(OPENAI_KEY, "").strip() or None) if own else None


@dataclasses.dataclass(frozen=True)
class Answered:
  """What the endpoint sent: an object with choices."""

  response: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Refused:
  """The endpoint does not answer this request, now or later; it may answer others."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Later:
  """The request may succeed if it is sent again."""

  reason: str
  wait: float | None = None  # seconds that the endpoint asks for
  nonsense: bool = False  # it answered, with something that is no chat completion


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *_: Any, **__: Any) -> None:
    return None


_OPENER = urllib.request.build_opener(_NoRedirect)  # proxies are those of the environment


def post(endpoint: Endpoint, body: Body, timeout: float) -> Answered | Refused | Later:
  """Send one request and read its answer, for `timeout` seconds at most."""
  deadline = time.monotonic() + timeout
  headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "alma_jax"}
  if endpoint.key:
    headers["Authorization"] = f"Bearer {endpoint.key}"
  text = json.dumps(body, ensure_ascii=False).encode()
  request = urllib.request.Request(f"{endpoint.url}/chat/completions", text, headers, method="POST")
  try:
    with _OPENER.open(request, timeout=timeout) as answer:
      return _understood(_read(answer, deadline))
  except urllib.error.HTTPError as error:
    with error:
      return _failed(endpoint, error, deadline)
  except (OSError, http.client.HTTPException, ValueError) as error:
    # URLError is an OSError, a timeout too; a stream that is cut is an IncompleteRead.
    return Later(_said(endpoint, f"{type(error).__name__}: {error}"))


def _read(answer: IO[bytes], deadline: float) -> bytes:
  """The whole answer. A server that sends a byte now and then meets the deadline, too."""
  read = getattr(answer, "read1", answer.read)
  found = b""
  while part := read(2**16):
    found += part
    if time.monotonic() > deadline:
      raise TimeoutError("the answer took too long")
    if len(found) > MOST_BYTES:
      raise ValueError(f"the answer is longer than {MOST_BYTES:,} bytes")
  return found


def _understood(text: bytes) -> Answered | Later:
  """An answer with status 200. What is cut or no chat completion is asked for again."""
  with contextlib.suppress(ValueError, RecursionError):
    response = json.loads(text)
    if problem(response) is None:
      return Answered(response)
  return Later(f"the answer is no chat completion: {text[:80]!r}", nonsense=True)


def problem(response: Any) -> str | None:
  """Why an object is not the chat completion that a judge's answer stands in; None if it is one."""
  if not isinstance(response, dict):
    return "it is no object"
  choices = response.get("choices")
  if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
    return "it has no choices"
  message = choices[0].get("message")
  if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
    return "its first choice has no message with a text"
  return None


def _failed(endpoint: Endpoint, error: urllib.error.HTTPError, deadline: float) -> Refused | Later:
  """What a status other than 200 means."""
  said = ""
  with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
    said = _read(error, deadline).decode(errors="replace")
  code, status = _code(said), error.code
  reason = _said(endpoint, f"status {status}: {' '.join(said.split())[:200]}")
  if status in (401, 403):
    known = "it is set" if endpoint.key else "no key is set"
    raise ApiError(f"{endpoint.url} does not accept the key ({KEY}: {known}); {reason}")
  if status in (402, 404, 405, 410) or code in ("insufficient_quota", "model_not_found", "billing_hard_limit_reached"):
    raise ApiError(f"{endpoint.url} cannot serve the model {endpoint.model!r}; {reason}")
  if 300 <= status < 400:
    where = _said(endpoint, error.headers.get("Location", "?"))
    raise ApiError(f"{endpoint.url} sends requests on to {where}; name that URL if you trust it (keys are not sent on)")
  if status in (408, 409, 425, 429) or status >= 500:
    return Later(reason, _retry_after(error.headers))
  return Refused(reason)


def _code(said: str) -> str:
  with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
    return str(json.loads(said)["error"]["code"])
  return ""


def _retry_after(headers: email.message.Message) -> float | None:
  """Seconds, from `retry-after-ms` or `Retry-After`, which is a number or a date."""
  with contextlib.suppress(TypeError, ValueError):
    return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
  text = headers.get("Retry-After", "")
  with contextlib.suppress(TypeError, ValueError):
    return max(0.0, float(text))
  with contextlib.suppress(TypeError, ValueError):
    at = email.utils.parsedate_to_datetime(text)
    return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())
  return None


def _said(endpoint: Endpoint, text: str) -> str:
  """The text without the key, whole or in part as some endpoints repeat it (sk-ab***yz)."""
  if key := endpoint.key:
    text = text.replace(key, "(key)")
  return re.sub(r"\bsk-[\w*-]{4,}", "(key)", text)
