"""The judge behind an endpoint, against a local server that misbehaves on purpose."""

import collections
import email.utils
import http.server
import json
import threading
import time

import pytest

from alma_jax import names
from alma_jax.errors import UserError
from alma_jax.evals import protocols
from alma_jax.evals.protocols import Item
from alma_jax.judges import api, api_asking, api_http, contract, pairwise
from alma_jax.judges.api_asking import Answers, Asking, Limits
from alma_jax.judges.api_http import ApiError, Endpoint
from alma_jax.judges.contract import Answered

KEY = "sk-test-0123456789"
FAST = Limits(concurrency=4, tries=6, first_wait=0.01, longest_wait=0.05, timeout=2.0)


def completion(text, **more):
  usage = {"prompt_tokens": 7, "completion_tokens": 3}
  choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
  return {
    "object": "chat.completion",
    "model": "judge-2026",
    "system_fingerprint": "fp_1",
    "choices": [choice],
    "usage": usage,
  }


class Server(http.server.ThreadingHTTPServer):
  """`respond(handler, body, tried)` answers; `asked` and `answered` count the requests by their texts."""

  daemon_threads = True

  def __init__(self, respond):
    super().__init__(("127.0.0.1", 0), Handler)
    self.respond, self.lock = respond, threading.Lock()
    self.asked, self.answered, self.keys = collections.Counter(), collections.Counter(), []
    self.at_once = self.most_at_once = 0

  @property
  def endpoint(self):
    return Endpoint("judge", f"http://127.0.0.1:{self.server_port}/v1")


class Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    server, text = self.server, body["messages"][-1]["content"]
    with server.lock:
      server.asked[text] += 1
      tried = server.asked[text]
      server.keys.append(self.headers.get("Authorization"))
      server.at_once += 1
      server.most_at_once = max(server.most_at_once, server.at_once)
    try:
      server.respond(self, text, tried)
    finally:
      with server.lock:
        server.at_once -= 1

  def send(self, status, value, length=None, **headers):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    if status == 200 and length is None:
      with self.server.lock:
        self.server.answered[self.server_text(value)] += 1
    self.send_response(status)
    for name, said in headers.items():
      self.send_header(name.replace("_", "-"), said)
    self.send_header("Content-Length", str(length or len(text)))
    self.end_headers()
    self.wfile.write(text)

  def server_text(self, value):
    return value["choices"][0]["message"]["content"] if isinstance(value, dict) else "nonsense"

  def log_message(self, *_):
    pass


@pytest.fixture
def serve(monkeypatch):
  monkeypatch.delenv(api_http.OPENAI_KEY, raising=False)
  monkeypatch.setenv(api_http.KEY, KEY)
  started = []

  def start(respond):
    server = Server(respond)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    started.append(server)
    return server

  yield start
  for server in started:
    server.shutdown()
    server.server_close()


def bodies(n):
  return [{"model": "judge", "messages": [{"role": "user", "content": f"q{i}"}], "max_tokens": 8} for i in range(n)]


def echo(handler, text, tried):
  handler.send(200, completion(f"{text} [[7]]"))


# The endpoint's name and the key


@pytest.mark.parametrize(
  "text, model, url",
  [
    ("gpt-4o@https://api.openai.com/v1/", "gpt-4o", "https://api.openai.com/v1"),
    ("@cf/meta/llama@http://h:8000/v1/chat/completions", "@cf/meta/llama", "http://h:8000/v1"),
  ],
)
def test_a_model_at_a_url(text, model, url):
  assert Endpoint.of(text) == Endpoint(model, url)


@pytest.mark.parametrize(
  "text, message",
  [
    ("gpt-4o", "must be MODEL@URL"),
    ("gpt-4o@api.openai.com", "must be MODEL@URL"),
    ("m@https://me:secret@host/v1", "keys come from the environment"),
    ("m@https://host/v1?api-key=secret", "keys come from the environment"),
    ("m@http://host:x/v1", "no host in the URL, or its port is no number"),
  ],
)
def test_what_is_no_endpoint_is_named_without_its_secret(text, message):
  with pytest.raises(UserError, match=message) as error:
    Endpoint.of(text)
  assert "secret" not in str(error.value)


def test_openais_key_goes_to_openai_alone(monkeypatch):
  monkeypatch.delenv(api_http.KEY, raising=False)
  monkeypatch.setenv(api_http.OPENAI_KEY, KEY)
  assert Endpoint.of("m@https://api.openai.com/v1").key == KEY
  assert Endpoint.of("m@https://api.openai.com.evil.org/v1").key is None
  monkeypatch.setenv(api_http.KEY, "other")
  assert Endpoint.of("m@http://localhost:8000/v1").key == "other"


# Failures


def test_every_kind_of_failure_is_asked_again_and_each_answer_is_kept_once(serve, tmp_path):
  def respond(handler, text, tried):
    kind = int(text[1:]) % 8
    if tried > 1:
      return echo(handler, text, tried)
    match kind:
      case 0:
        handler.send(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
      case 1:
        handler.send(429, {"error": {"message": "slow down"}})
      case 2:
        handler.send(500, b"<html>oops</html>")
      case 3:
        handler.send(200, json.dumps(completion("cut [[1]]")).encode()[:40], length=400)  # a stream that is cut
      case 4:
        handler.send(200, b"nonsense", length=8)
      case 5:
        handler.send(200, {"choices": []}, length=15)
      case 6:
        handler.connection.close()
      case _:
        handler.send(503, b"", Retry_After=email.utils.formatdate(time.time() - 5, usegmt=True))

  server = serve(respond)
  asking = Asking(server.endpoint, Answers(tmp_path), FAST)
  counted = []
  assert asking.ask(bodies(24), counted.append) == {}
  assert sum(counted) == 24 and set(server.asked.values()) == {2} and set(server.answered.values()) == {1}
  for body in bodies(24):
    said = asking.answers.get(server.endpoint, body)["choices"][0]["message"]["content"]
    assert said == body["messages"][0]["content"] + " [[7]]"
  assert (asking.spent.requests, asking.spent.tokens) == (48, 240)
  assert dict(asking.spent.served) == {"judge-2026 fp_1": 24}
  assert set(server.keys) == {f"Bearer {KEY}"} and server.most_at_once <= 4
  kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
  assert KEY.encode() not in kept and b"cut" not in kept


def test_an_endpoint_that_asks_for_time_gets_it_from_all_threads(serve, tmp_path):
  first = []

  def respond(handler, text, tried):
    if not first:
      first.append(time.monotonic())
      return handler.send(429, {}, retry_after_ms="300")
    first.append(time.monotonic())
    echo(handler, text, tried)

  server = serve(respond)
  Asking(server.endpoint, Answers(tmp_path), Limits(concurrency=1, first_wait=0.01)).ask(bodies(3))
  assert min(first[1:]) - first[0] >= 0.29


def test_a_slow_server_meets_the_deadline(serve, tmp_path):
  def respond(handler, text, tried):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
      handler.wfile.write(b" ")
      handler.wfile.flush()
      time.sleep(0.02)

  server = serve(respond)
  began = time.monotonic()
  limits = Limits(tries=2, first_wait=0.01, timeout=0.2)
  with pytest.raises(ApiError, match=r"did not answer a request in 2 tries.*TimeoutError.*goes on from here"):
    Asking(server.endpoint, Answers(tmp_path), limits).ask(bodies(1))
  assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
  "status, said, message",
  [
    (
      401,
      {"error": {"message": f"Incorrect API key provided: {KEY}"}},
      r"does not accept the key .*ALMA_API_KEY: it is set",
    ),
    (403, {"error": {"message": "key sk-test-****6789"}}, "does not accept the key"),
    (404, {"error": {"code": "model_not_found", "message": "no"}}, "cannot serve the model 'judge'"),
    (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "cannot serve the model 'judge'"),
    (307, {}, r"sends requests on to http://evil.*keys are not sent on"),
  ],
)
def test_what_no_try_can_mend_stops_at_once_without_the_key(serve, tmp_path, status, said, message):
  server = serve(lambda handler, text, tried: handler.send(status, said, Location="http://evil.invalid/"))
  with pytest.raises(ApiError, match=message) as error:
    Asking(server.endpoint, Answers(tmp_path), Limits(concurrency=1)).ask(bodies(5))
  assert sum(server.asked.values()) == 1
  assert KEY not in str(error.value) and "6789" not in str(error.value) and not list(tmp_path.rglob("*.json"))


def test_a_refused_request_is_named_and_the_others_go_on(serve, tmp_path):
  def respond(handler, text, tried):
    if text == "q1":
      return handler.send(400, {"error": {"code": "content_filter", "message": "no"}})
    if text == "q2":
      return handler.send(200, b"{}", length=2)
    echo(handler, text, tried)

  server = serve(respond)
  refused = Asking(server.endpoint, Answers(tmp_path), FAST).ask(bodies(4))
  of = {api_asking.request_id(server.endpoint, body): i for i, body in enumerate(bodies(4))}
  assert {of[id] for id in refused} == {1, 2}
  assert "status 400" in refused[list(of)[1]] and "6 times: the answer is no chat completion" in refused[list(of)[2]]
  assert server.asked == {"q0": 1, "q1": 1, "q2": 6, "q3": 1}


# Resume and budget


def test_a_killed_start_is_resumed_without_asking_anything_twice(serve, tmp_path):
  broken = [True]

  def respond(handler, text, tried):
    if broken[0] and text == "q5":
      return handler.send(401, {})
    echo(handler, text, tried)

  server = serve(respond)
  with pytest.raises(ApiError):
    Asking(server.endpoint, Answers(tmp_path), Limits(concurrency=1)).ask(bodies(9))
  assert sum(server.answered.values()) == 5
  (damaged,) = [p for p in tmp_path.rglob("*.json") if "q0 [[7]]" in p.read_text()]
  damaged.write_text(damaged.read_text()[:-30])
  broken[0] = False
  asking = Asking(server.endpoint, Answers(tmp_path), FAST)
  assert asking.ask([*bodies(9), *bodies(9)]) == {}
  assert server.asked == {f"q{i}": 2 if i in (0, 5) else 1 for i in range(9)}  # q0's answer was damaged
  assert asking.ask(bodies(9)) == {} and asking.spent.requests == 5
  other = [body | {"temperature": 1} for body in bodies(2)]
  assert len(asking.answers.unanswered(server.endpoint, other)) == 2  # every field of a request counts


def test_a_budget_of_requests_and_tokens_stops_and_keeps(serve, tmp_path):
  server = serve(echo)
  answers = Answers(tmp_path)
  with pytest.raises(api_asking.BudgetSpent, match="budget of 3 requests is spent"):
    Asking(server.endpoint, answers, Limits(requests=3)).ask(bodies(8))
  assert sum(server.asked.values()) == 3
  assert len(answers.unanswered(server.endpoint, bodies(8))) == 5  # what was under way is kept
  # A request may use 4 + 8 tokens and uses 10: after two of them a third could exceed 30.
  with pytest.raises(api_asking.BudgetSpent, match=r"20 tokens are used.* the budget of 30"):
    Asking(server.endpoint, answers, Limits(concurrency=1, tokens=30)).ask(bodies(8))
  assert sum(server.asked.values()) == 5
  assert Asking(server.endpoint, answers, Limits(requests=3)).ask(bodies(8)) == {}


def test_the_estimate_counts_what_is_not_answered_and_its_price(serve, tmp_path):
  server, answers = serve(echo), Answers(tmp_path / "kept")
  Asking(server.endpoint, answers, FAST).ask(bodies(2))
  found = api_asking.estimate(server.endpoint, answers, bodies(10))
  assert found == api_asking.Estimate(8, 2, 8 * (0 + 4), 8 * 8)
  prices = tmp_path / "prices.json"
  prices.write_text('{"judge": {"input": 1e6, "output": 2e6}}')
  assert "about 32.00 in + at most 128.00 out = at most 160.00" in found.lines(api_asking.price_of(prices, "judge"))[-1]
  with pytest.raises(UserError, match="has no price of the model 'gpt-4o'"):
    api_asking.price_of(prices, "gpt-4o")


# Batch files


def test_a_batch_file_is_written_and_its_results_are_read_in_any_order_with_errors(tmp_path):
  endpoint, answers = Endpoint("judge", "https://api.openai.com/v1"), Answers(tmp_path / "kept")
  batch, results = tmp_path / "batch.jsonl", tmp_path / "results.jsonl"
  assert answers.write_batch([*bodies(6), bodies(6)[0]], endpoint, batch) == 6
  lines = [json.loads(line) for line in batch.read_text().splitlines()]
  assert [sorted(line) for line in lines] == [["body", "custom_id", "method", "url"]] * 6
  assert lines[0]["url"] == "/v1/chat/completions" and lines[0]["body"] == bodies(1)[0] and KEY not in batch.read_text()

  def result(line, status=200, body=None, error=None):
    text = line["body"]["messages"][0]["content"]
    body = completion(f"{text} [[4]]") if body is None else body
    return {
      "id": "b",
      "custom_id": line["custom_id"],
      "response": {"status_code": status, "body": body},
      "error": error,
    }

  told = [
    result(lines[4]),
    result(lines[2], 500, {"error": {"message": "broken"}}),
    result(lines[0]),
    {"custom_id": lines[3]["custom_id"], "response": None, "error": {"code": "batch_expired"}},
    {"custom_id": "other", "response": {"status_code": 200, "body": completion("?")}},
    result(lines[1]),
  ]
  results.write_text("\n".join(map(json.dumps, told)) + "\n\n")
  read = answers.read_batch(results, bodies(6), endpoint)
  assert read.kept == 3 and read.strange == ["other"] and read.absent == [lines[5]["custom_id"]]
  assert {lines[i]["custom_id"] for i in (2, 3)} == set(read.failed)
  assert "broken" in read.failed[lines[2]["custom_id"]] and "line 4: " in read.failed[lines[3]["custom_id"]]
  assert answers.get(endpoint, bodies(6)[4])["choices"][0]["message"]["content"] == "q4 [[4]]"
  assert answers.write_batch(bodies(6), endpoint, batch) == 3
  results.write_text("{broken\n")
  with pytest.raises(UserError, match="line 1: not valid JSON"):
    answers.read_batch(results, bodies(6), endpoint)


# The judge


def test_the_judge_of_a_config_rates_and_leaves_missing_what_cannot_be_read(serve, tmp_path, monkeypatch):
  def respond(handler, text, tried):
    rating = text.rpartition("# Response:\n")[2]
    handler.send(200, completion(f"Rating: [[{rating}]]"))

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  server = serve(respond)
  name = f"api:{server.endpoint.model}@{server.endpoint.url}"
  judge = contract.by_name(names.EVALUATORS, name, None, None, "eval.evaluator")
  names.check(names.JUDGES, name, "judge.kind")
  assert judge.scale == (0, 10) and server.endpoint.url in judge.identity and "alma" in judge.identity
  pairs = [Answered([{"role": "user", "content": "Rate!"}], text) for text in ("3", "ten", "10", "3", "99")]
  found = contract.scores(judge, pairs, missing=True)
  assert [v.score for v in found] == [3, None, 10, 3, None]
  assert found[1].details == {
    "reply": {"turn_1": "Rating: [[ten]]"},
    "missing": {"turn_1": "the answer holds no verdict"},
  }
  with pytest.raises(contract.MissingScores, match="2 of 5 responses"):
    contract.scores(judge, pairs)
  again = contract.by_name(names.JUDGES, name, None, None, "judge.kind")
  assert again.identity == judge.identity and contract.scores(again, pairs[:1])[0].number == 3
  assert set(server.asked.values()) == {1} and len(server.asked) == 4


def test_protocol_and_fields_stand_behind_the_url():
  url = "m@http://h/v1"
  grader = api.grader_of(f'{url}#mt_bench&max_tokens=null&reasoning_effort="low"', "alma")
  (ask,) = grader.asks(Item("1", ("?",), ("!",)))
  body = grader.body(ask)
  assert body["reasoning_effort"] == "low" and "max_tokens" not in body and body["temperature"] == 0
  assert grader.identity != api.grader_of(f"{url}#mt_bench", "alma").identity
  two = protocols.item_of("1", [*({"role": r, "content": r} for r in ("system", "user", "assistant", "user"))], "!")
  assert two.turns == ("system\n\nuser", "user") and two.answers == ("assistant", "!")
  (ask,) = api.judge(None, None, f"{url}#mt_bench").grader.asks(two)
  assert ask.part == "turn_2"


@pytest.mark.parametrize(
  "argument, message",
  [
    ("m@http://h/v1#arena_hard_2024", "'arena_hard_2024' compares two answers; a judge of single responses takes alma"),
    ("m@http://h/v1#mtbench", "there is no protocol 'mtbench'"),
    ("m@http://h/v1#alma&temperature", "'temperature' is no field of the request with a JSON value"),
    ("m@http://h/v1#alma&model=1", "'model=1' is no field"),
  ],
)
def test_a_wrong_argument_is_named(argument, message):
  with pytest.raises(UserError, match=message):
    api.judge(None, None, argument)


def test_arena_hards_first_edition_asks_once_more_and_no_more(serve, tmp_path):
  def respond(handler, text, tried):
    more = text.startswith("continue your judgment")
    handler.send(200, completion("[[A>>B]]" if more else "Let me think."))

  server = serve(respond)
  grader = api.grader_of(f"m@{server.endpoint.url}", "arena_hard_2024")
  asking = Asking(grader.endpoint, Answers(tmp_path), FAST)
  item = Item("1", ("?",), ("model",), ("baseline",))
  for _ in range(2):
    refused = grader.ask([item], asking)
    found = grader.graded(item, asking.answers, refused)
    assert found.grade.battles == (0.0, 0.0, 0.0, 1.0, 1.0, 1.0) and not found.missing
    assert asking.spent.requests == 4 and len(grader.requests([item], asking.answers)) == 4


def test_two_answers_are_compared_in_both_orders_and_a_share_of_the_win_comes_back(serve, tmp_path, monkeypatch):
  def respond(handler, text, tried):
    good, poor = text.find("GOOD"), text.find("POOR")
    handler.send(200, completion("[[C]]" if min(good, poor) < 0 else "[[A]]" if good < poor else "[[B]]"))

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  server = serve(respond)
  named = f"api:judge@{server.endpoint.url}#lima_pairwise"
  judge = pairwise.made(None, None, named, 0.0, "compare.judges")
  asked = ({"role": "user", "content": "q"},)
  of = {word: Answered(asked, word) for word in ("GOOD", "POOR", "same")}
  contests = [pairwise.Contest(of[a], of[b]) for a, b in (("GOOD", "POOR"), ("POOR", "GOOD"), ("same", "same"))]
  assert judge.shares(contests) == [1.0, 0.0, 0.5]
  assert pairwise.compares(named) and not pairwise.compares("api:judge@http://x/v1#lima_1_6")
  assert (
    sum(server.answered.values()) == 6 - 1 - 2
  )  # both orders of one pair are those of the other; of equal ones, too
  assert judge.shares(contests) == [1.0, 0.0, 0.5] and sum(server.answered.values()) == 3  # nothing is asked twice
