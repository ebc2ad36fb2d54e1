"""Answers the prompts of a benchmark with a model.

  python -m alma_jax.tools.evaluate answer --model=runs/alma --set=question.jsonl --output=answers/alma

The set is a file of yours in any of the layouts of docs/benchmarks.md. --preset says how answers are decoded: mt_bench
(a temperature for each category, two turns, the second after the model's own first answer), alpaca_eval,
arena_hard_2024, arena_hard_2025, lima, ifeval or plain; not given, it is that of the set's layout. --max_new_tokens
replaces the preset's length, which must leave room for the prompts.

--output is a directory. Its answers.jsonl, which `evaluate grade` and `evaluate export` read, has a line per prompt:

  {"id", "category", "turns" or "messages", "responses", "finished", "tokens", "model", "preset", "seed"}

A killed command goes on where it stopped. An answer depends on the seed, the prompt and the turn alone.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.errors import RunError
from alma_jax.evals import sets
from alma_jax.evals.presets import PRESETS, Preset
from alma_jax.evals.sets import Question
from alma_jax.keys import key_of
from alma_jax.options import option
from alma_jax.runtime import sampling
from alma_jax.runtime.display import Bar
from alma_jax.runtime.sampling import Draft
from alma_jax.store import layout
from alma_jax.store.data import DataError
from alma_jax.text import chat
from alma_jax.tools import command, jsonl

PART = 64  # prompts in a part

PresetName = Literal["", "mt_bench", "alpaca_eval", "arena_hard_2024", "arena_hard_2025", "lima", "ifeval", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  set: str = option(doc="the prompts")
  preset: PresetName = option("", doc="how to decode; that of the set's layout if not given: " + ", ".join(PRESETS))
  max_new_tokens: int | None = option(None, least=1, doc="length limit of an answer, instead of the preset's")
  name: str = option("", doc="the model's name in files; that of --output if not given")


FLAGS = command.Flags("evaluate answer", __doc__, Options, ("rows", "input"), input="")


@dataclasses.dataclass(frozen=True)
class Asking:
  """Everything that the answers are made with."""

  options: Options
  opened: command.Opened
  preset: Preset
  room: int  # tokens that a prompt may have

  def drafts(self, asked: Sequence[tuple[Question, list[dict[str, str]]]], turn: int, bar: Bar) -> list[Draft]:
    """The model's answers to these conversations; those with one temperature are sampled together."""
    host, found = self.opened.host, {}
    by_preset: dict[float, list[int]] = {}
    for at, (question, _) in enumerate(asked):
      own = self.preset.of(question.category, question.row.get("required_temperature"))
      by_preset.setdefault(own.temperature, []).append(at)
    for temperature, places in by_preset.items():
      requests = []
      for at in places:
        question, messages = asked[at]
        ids = chat.encode_prompt(host.tokenizer, host.chat, messages)
        if len(ids) > self.room:
          raise DataError(
            f"{self.options.set}, line {question.line}: turn {turn} has {len(ids):,} tokens with what was said before;"
            f" the model's positions leave {self.room:,}: lower --max_new_tokens"
          )
        key = key_of(self.options.seed, "answer", question.key, prompt_id(question.messages), turn)
        requests.append(Request(tuple(ids), key, f"line {question.line}, turn {turn}"))
      p = self.preset
      decoding = Decoding(
        p.max_new_tokens, temperature=temperature, top_p=p.top_p, repetition_penalty=p.repetition_penalty
      )
      drawing = sampling.Options(decoding=decoding, max_prompt_tokens=max(len(r.prompt) for r in requests))
      stops = sampling.Stops(command.stop_ids(host))
      found |= zip(places, sampling.drafts(host, self.opened.checkpoint, requests, drawing, stops, bar), strict=True)
    return [found[at] for at in range(len(asked))]

  def lines(self, questions: Sequence[Question], bar: Bar) -> list[dict[str, Any]]:
    """A line for each question: its turns are asked one after another, each after the answers before it."""
    turns = [question.later[: self.preset.turns - 1] for question in questions]
    talks = [[dict(turn) for turn in question.messages] for question in questions]
    said: list[list[Draft]] = [[] for _ in questions]
    for turn in range(1, 1 + self.preset.turns):
      open_ = [i for i in range(len(questions)) if len(turns[i]) >= turn - 1]
      if turn > 1:
        for i in open_:
          talks[i] += [
            {"role": "assistant", "content": said[i][-1].text},
            {"role": "user", "content": turns[i][turn - 2]},
          ]
      if open_:
        for i, draft in zip(open_, self.drafts([(questions[i], talks[i]) for i in open_], turn, bar), strict=True):
          said[i].append(draft)
    return [self._line(*row) for row in zip(questions, turns, said, strict=True)]

  def _line(self, question: Question, later: Sequence[str], said: Sequence[Draft]) -> dict[str, Any]:
    if len(question.messages) == 1:
      asked: dict[str, Any] = {"turns": [question.prompt, *later]}
    else:
      asked = {"messages": [dict(turn) for turn in question.messages]}
    line: dict[str, Any] = {} if question.key is None else {"id": question.key}
    line |= {"category": question.category, **asked, "responses": [draft.text for draft in said]}
    line |= {"finished": [draft.finished for draft in said], "tokens": [len(draft.tokens) for draft in said]}
    return line | {"model": self.name, "preset": self.options.preset, "seed": self.options.seed}

  @property
  def name(self) -> str:
    return self.options.name or pathlib.Path(self.options.output).name


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  found = sets.read(options.set)
  options = dataclasses.replace(options, preset=options.preset or found.layout)
  directory = pathlib.Path(options.output)
  command.check_place(directory)
  if directory.is_file():
    raise RunError(f"--output: {directory} is a file; name a directory")
  output = directory / "answers.jsonl"
  opened = command.open_model(options, layout.newest_policy)
  host, preset = opened.host, PRESETS[options.preset]
  if note := found.note:
    host.display.say(note)
  if found.repeated:
    host.display.say(f"{options.set}: {len(found.repeated):,} prompts stand there twice and are asked once")
  preset = dataclasses.replace(preset, max_new_tokens=options.max_new_tokens or preset.max_new_tokens)
  room = host.config.max_positions - preset.max_new_tokens
  if room < 1:
    raise DataError(
      f"the preset {options.preset} writes up to {preset.max_new_tokens:,} tokens, and the model has"
      f" {host.config.max_positions:,} positions: give a lower --max_new_tokens"
    )
  if unasked := sum(len(question.later) >= preset.turns for question in found.questions):
    host.display.say(f"{unasked:,} prompts have more turns than the preset {options.preset} asks: {preset.turns}")
  asking = Asking(options, opened, preset, room)
  questions = found.questions
  parts_of_set = [questions[begin : begin + PART] for begin in range(0, len(questions), PART)]
  asked = [sum(1 + len(q.later[: preset.turns - 1]) for q in part) for part in parts_of_set]

  directory.mkdir(exist_ok=True)
  options = dataclasses.replace(options, input=options.set)  # its digest decides
  decides = command.decides("evaluate answer", options, opened)
  decides |= {"preset": dataclasses.asdict(preset), "seed": options.seed, "name": asking.name}
  decides["stop_ids"] = command.stop_ids(host)
  with jsonl.stage_of(output, options, decides) as stage:
    parts = jsonl.Parts(stage, asked, 1)
    with host.display.bar("answering", parts.total, "answers", done=parts.done) as bar:
      for numbers, rows in parts.missing(list(part) for part in parts_of_set):
        for number, part in zip(numbers, rows, strict=True):
          lines = asking.lines(part, bar)
          finished = sum(sum(line["finished"]) for line in lines)
          parts.write(number, lines, {"finished": finished, "tokens": sum(sum(line["tokens"]) for line in lines)})
    counts = jsonl.finish(stage, output)["counts"]
  told = f"{counts['finished'] / sum(asked):.1%} finished, {counts['tokens'] / sum(asked):.1f} tokens each"
  print(f"{output}: {len(questions):,} prompts, {sum(asked):,} answers, preset {options.preset}; {told}")
