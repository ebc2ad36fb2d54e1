"""Talks to a model in the terminal.

  python -m alma_jax.tools.chat --model=runs/mini
  python -m alma_jax.tools.chat --model=runs/mini/round_03/policy --judge=reward:models/ArmoRM-Llama3-8B-v0.1

What you write is a turn of the conversation, and the model's answer appears as it is drawn. A line that ends with a
backslash goes on in the next one; a turn that begins with a slash is written with two. The commands:

  /judge            the score of the last answer
  /best N           N answers to the last turn with their scores; the best one stays in the conversation
  /again            another answer to the last turn
  /undo             forget the last turn and its answer
  /reset            begin a new conversation, with the same system turn
  /system TEXT      begin a new conversation with this system turn; without TEXT with none
  /temperature X    how answers are drawn; as well /top_p X, /top_k N, /repetition_penalty X, /max_new_tokens N, /seed N
  /show             the settings and the conversation
  /save FILE        add the conversation to a JSONL file, which alma_jax.tools.score reads
  /help, /quit      Ctrl-D quits, too; Ctrl-C ends an answer that is being written

--judge is the judge as for `evaluate grade --with`: own:RUN, reward:DIR, implicit:DIR,REF, api:MODEL@URL or
package.module:NAME. Without it, it is the judge of the run that --model names or lies in. It is loaded when it is first
asked for.

An answer depends on the seed, the conversation and how many answers to it there were before, so that a conversation can
be repeated. Lines may come from a pipe; the first mistake then ends the command with status 1.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.errors import UserError
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge, Verdict
from alma_jax.keys import key_of
from alma_jax.options import option, spread
from alma_jax.runtime import sampling
from alma_jax.store import layout
from alma_jax.text import chat
from alma_jax.tools import command

LEAST_ROOM = 512  # prompt tokens that programs are compiled for at first; twice as many whenever a prompt is longer
N = TypeVar("N", int, float)
SHOWN = 300  # characters of each of the answers that /best shows


class ChatError(UserError):
  """A line that cannot be followed; the conversation stays as it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  judge: str = option("", doc="the judge of /judge and /best: own:DIR, " + ", ".join(names.EVALUATORS.words))
  own: command.OwnOptions = spread(command.OwnOptions)
  system: str = option("", doc="a system turn to begin with")
  decoding: Decoding = spread(Decoding)

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.judge:
      command.check_judge(self.judge, self.own, "judge")


FLAGS = command.Flags(
  "chat", __doc__, Options, ("input", "output", "rows", "stop_ids", "min_new_tokens", "penalize_prompt"),
  input="", output="", temperature=0.8, top_p=0.95, max_new_tokens=1024, slots=16,
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options, chosen = FLAGS.values(arguments), FLAGS.given(arguments)
  return command.status(lambda: run(options, fits="max_new_tokens" not in chosen))


def run(options: Options, fits: bool = False) -> None:
  """`fits`: no length was asked for, and that of the options gives way to half of the model's positions."""
  opened = command.open_model(options, layout.newest_policy)
  host, decoding = opened.host, options.decoding
  if fits:
    half = max(1, host.config.max_positions // 2)
    decoding = dataclasses.replace(decoding, max_new_tokens=min(decoding.max_new_tokens, half))
  talk = Talk(options, opened, decoding)
  talk.system(options.system)
  host.display.say(f"{host.directory}: chat format {command.chat_name(host)}; /help lists the commands")
  terminal = sys.stdin.isatty()
  if terminal:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the process
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  # lines can be edited and recalled
  for line in _lines(terminal):
    try:
      if not talk.follow(line):
        break
    except UserError as error:
      if not terminal:
        raise
      print(f"error: {error}")


def _lines(terminal: bool) -> Iterator[str]:
  """The user's lines; one that ends with a backslash is joined with the next."""
  while True:
    held = []
    try:
      while True:
        line = input(("... " if held else "> ") if terminal else "")
        held.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
          break
    except EOFError:
      if any(held):  # of a pipe whose last line ends with a backslash
        yield "\n".join(held)
      return
    except KeyboardInterrupt:
      print()
      continue
    if text := "\n".join(held).strip():
      yield text


class Talk:
  """A conversation, and what the next answer is made with."""

  def __init__(self, options: Options, opened: command.Opened, decoding: Decoding) -> None:
    self.options, self.opened, self.decoding, self.seed = options, opened, decoding, options.seed
    self.messages: list[dict[str, str]] = []
    self.finished = True  # the last answer ended with a stop token
    self.tries: dict[str, int] = {}  # answers that were drawn so far, by the conversation they answer

  def follow(self, line: str) -> bool:
    """Do what a line says; False if it ends the conversation."""
    if not line.startswith("/") or line.startswith("//"):
      self.turn(line.removeprefix("/") if line.startswith("//") else line)
      return True
    name, _, argument = line[1:].partition(" ")
    if name in ("quit", "exit", "q"):
      return False
    if name in SETTINGS:
      self.set(name, SETTINGS[name], argument.strip())
    elif name in COMMANDS:
      COMMANDS[name](self, argument.strip())
    else:
      near = difflib.get_close_matches(name, [*COMMANDS, *SETTINGS, "quit"], n=1)
      hint = f"; did you mean /{near[0]}?" if near else ""
      raise ChatError(f"there is no command /{name}{hint} (/help lists them; // begins a turn with a slash)")
    return True

  # Answers

  def turn(self, text: str) -> None:
    """The user says `text`, and the model answers."""
    self.answer([*self.messages, {"role": "user", "content": text}])

  def again(self, argument: str = "") -> None:
    self.answer(self.asked())

  def answer(self, asked: list[dict[str, str]]) -> None:
    """The model's answer to a conversation, which is kept with it."""
    (request,) = self.requests(asked, 1)
    pieces: list[str] = []

    def show(piece: str) -> None:
      pieces.append(piece)
      print(piece, end="", flush=True)

    host, stop_ids = self.opened.host, command.stop_ids(self.opened.host)
    try:
      drawing = self.drawing(len(request.prompt))
      draft = sampling.streamed(host, self.opened.checkpoint, request, drawing, stop_ids, show)
      text, finished = draft.text, draft.finished
    except KeyboardInterrupt:
      text, finished = "".join(pieces), False
      if not text:
        print("(no answer)")
        return
    print("" if finished else " ... (cut off)")
    self.keep(asked, text, finished)

  def best(self, argument: str) -> None:
    """N answers to the last turn with their scores, of which the best one is kept."""
    n, asked = _number(argument, int, "/best N"), self.asked()
    if n < 1:
      raise ChatError(f"/best {n}: ask for one answer or more")
    host, judge = self.opened.host, self.judge
    requests = self.requests(asked, n)
    with host.display.bar("sampling", n, "answers") as bar:
      stops = sampling.Stops(command.stop_ids(host))
      drafts = sampling.drafts(
        host, self.opened.checkpoint, requests, self.drawing(len(requests[0].prompt)), stops, bar
      )
    pairs = [Answered(asked, draft.text, draft.finished, f"answer {i}") for i, draft in enumerate(drafts, 1)]
    verdicts = contract.scores(judge, pairs, missing=True)
    known = [(v.score, i) for i, v in enumerate(verdicts) if v.score is not None]
    if not known:
      raise ChatError(f"{judge.identity} gave none of the {n} answers a score that can be read")
    order = [i for _, i in sorted(known, key=_by_score)]
    for i in [*reversed(order), *(i for i in range(n) if i not in order)]:  # the best one stands nearest to the prompt
      text = drafts[i].text
      print(f"[{_score(verdicts[i])}] {text[:SHOWN]}{' ...' * (len(text) > SHOWN)}")
    scores = np.array([score for score, _ in known])
    print(f"best of {n}: {scores.max():.3f}; mean {scores.mean():.3f}, lowest {scores.min():.3f}, by {judge.identity}")
    self.keep(asked, drafts[order[0]].text, drafts[order[0]].finished)

  def requests(self, asked: list[dict[str, str]], n: int) -> list[Request]:
    host, room = self.opened.host, self.opened.host.config.max_positions - self.decoding.max_new_tokens
    ids = tuple(chat.encode_prompt(host.tokenizer, host.chat, asked))
    if len(ids) > room:
      raise ChatError(
        f"the conversation has {len(ids):,} tokens; the model's {host.config.max_positions:,} positions less"
        f" /max_new_tokens {self.decoding.max_new_tokens:,} leave {room:,}: lower it, or begin anew with /reset"
      )
    id = prompt_id(asked)
    begin = self.tries.get(id, 0)
    self.tries[id] = begin + n
    return [Request(ids, key_of(self.seed, "chat", id, begin + i), f"answer {begin + i + 1}") for i in range(n)]

  def drawing(self, tokens: int) -> sampling.Options:
    """Room for the prompt in coarse steps: conversations grow, and each step is a program of its own."""
    room, most = LEAST_ROOM, self.opened.host.config.max_positions - self.decoding.max_new_tokens
    while room < tokens:
      room *= 2
    return sampling.Options(decoding=self.decoding, max_prompt_tokens=min(room, most))

  def asked(self) -> list[dict[str, str]]:
    """The conversation up to the last turn of the user."""
    if not self.messages or self.messages[-1]["role"] != "assistant":
      raise ChatError("there is no answer yet: write something first")
    return self.messages[:-1]

  def keep(self, asked: list[dict[str, str]], text: str, finished: bool) -> None:
    self.messages, self.finished = [*asked, {"role": "assistant", "content": text}], finished

  # The judge

  @functools.cached_property
  def judge(self) -> Judge:
    judge = self.options.judge or f"own:{_run_of(self.options.model)}"
    return command.opened_judge(dataclasses.replace(self.options, model=""), judge, self.options.own)[1]

  def judged(self, argument: str = "") -> None:
    """Print the score of the last answer."""
    asked, judge = self.asked(), self.judge
    (verdict,) = contract.scores(
      judge, [Answered(asked, self.messages[-1]["content"], self.finished, "the last answer")], missing=True
    )
    scale = "" if judge.scale is None else f" of {judge.scale[0]:g} .. {judge.scale[1]:g}"
    mass = "" if verdict.mass is None else f", mass {verdict.mass:.3f}"
    print(f"[{_score(verdict)}]{scale}{mass}, by {judge.identity}")
    if verdict.probs and len(verdict.probs) == 11:
      print("  " + "  ".join(f"{score}: {p:.2f}" for score, p in enumerate(verdict.probs) if p >= 0.005))
    if verdict.details:
      print(f"  {json.dumps(dict(verdict.details), default=str)}")

  # The conversation and the settings

  def undo(self, argument: str = "") -> None:
    self.messages = self.asked()[:-1]

  def reset(self, argument: str = "") -> None:
    self.messages = [turn for turn in self.messages[:1] if turn["role"] == "system"]

  def system(self, text: str) -> None:
    messages = [{"role": "system", "content": text}] if text else []
    asked = [*messages, {"role": "user", "content": "a"}]
    chat.encode_prompt(self.opened.host.tokenizer, self.opened.host.chat, asked)  # an error where there is no such turn
    self.messages = messages

  def set(self, name: str, kind: type[int] | type[float], argument: str) -> None:
    value = _number(argument, kind, f"/{name} {'N' if kind is int else 'X'}")
    found = dataclasses.replace(self.decoding, **{name: value})  # a DecodingError names what is allowed
    if found.max_new_tokens >= (positions := self.opened.host.config.max_positions):
      raise ChatError(f"/{name} {value}: the model has {positions:,} positions in all")
    self.decoding = found

  def set_seed(self, argument: str) -> None:
    self.seed = _number(argument, int, "/seed N")

  def show(self, argument: str = "") -> None:
    d = self.decoding
    print(f"model {self.options.model}; judge {self.options.judge or 'of its run'}; seed {self.seed}")
    said = (f"{name} {getattr(d, name):g}" for name in ("temperature", "top_p", "top_k", "repetition_penalty"))
    print(f"{', '.join(said)}, max_new_tokens {d.max_new_tokens}")
    for turn in self.messages:
      print(f"{turn['role']}: {turn['content']}")

  def save(self, argument: str) -> None:
    self.asked()
    if not argument:
      raise ChatError("/save FILE: name the file")
    try:
      with open(pathlib.Path(argument).expanduser(), "a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
      raise ChatError(f"cannot write {argument}: {error.strerror}") from None
    print(f"{argument}: {len(self.messages)} turns added")

  def help(self, argument: str = "") -> None:
    print((__doc__ or "").partition("The commands:\n\n")[2].partition("\n\n")[0])


COMMANDS: Mapping[str, Callable[[Talk, str], object]] = {
  "judge": Talk.judged, "best": Talk.best, "again": Talk.again, "undo": Talk.undo, "reset": Talk.reset,
  "system": Talk.system, "seed": Talk.set_seed, "show": Talk.show, "save": Talk.save, "help": Talk.help,
}  # fmt: skip
SETTINGS: Mapping[str, type[int] | type[float]] = {
  "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "max_new_tokens": int,
}  # fmt: skip


def _run_of(model: str) -> pathlib.Path:
  """The run that a model is or lies in."""
  place = pathlib.Path(model).expanduser().absolute()
  for folder in (place, *place.parents):
    config = layout.config_in(folder)
    if config and not layout.is_round(config):
      return folder
  raise ChatError(f"{model} is no run and lies in none, so it has no judge of its own: start again with --judge")


def _number(argument: str, kind: type[N], usage: str) -> N:
  with contextlib.suppress(ValueError):
    if np.isfinite(value := kind(argument)):
      return value
  raise ChatError(f"{usage}: {argument!r} is no {'whole number' if kind is int else 'number'}")


def _by_score(item: tuple[float, int]) -> tuple[float, int]:
  return -item[0], item[1]


def _score(verdict: Verdict) -> str:
  return "no score" if verdict.score is None else f"{verdict.score:.3f}"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
