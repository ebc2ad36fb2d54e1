"""Prompts for the base model, which continues patterns: lists and worked examples.

  few_shot_ids(tok, REQUESTS, shots)           # a list of prompts; the model writes the next one (prompt synthesis)
  few_shot_ids(tok, DIALOGUE, shots, prompt)   # prompts with responses; the model answers the last (its 3-shot score)

Both end an item at `stop`, where sampling stops, too.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from alma_jax.text.chat import Messages
from alma_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class FewShot:
  name: str
  header: str
  shot: str  # {prompt} and, for dialogues, {response}
  ask: str  # opens the item that the model writes; may hold {prompt}
  stop: str


REQUESTS = FewShot(
  "requests",
  "Here is a list of requests that people sent to an AI assistant. They differ in topic, length and style.\n\n",
  "### Request\n{prompt}\n\n",
  "### Request\n",
  "###",
)
DIALOGUE = FewShot(
  "dialogue",
  "Below are requests to a helpful AI assistant and its answers.\n\n",
  "### Request\n{prompt}\n\n### Answer\n{response}\n\n",
  "### Request\n{prompt}\n\n### Answer\n",
  "###",
)
QUESTIONS = FewShot("questions", "", "Question: {prompt}\n\n", "Question: ", "Question:")
ANSWERS = FewShot(
  "answers", "", "Question: {prompt}\nAnswer: {response}\n\n", "Question: {prompt}\nAnswer: ", "Question:"
)  # these two hold no instruction


def few_shot_ids(
  tok: Tokenizer, template: FewShot, shots: Sequence[Mapping[str, str]], prompt: str | None = None
) -> tuple[int, ...]:
  """BOS and the text: header, the shots (`prompt` and perhaps `response` of each), the opening of the next item."""
  ask = template.ask if prompt is None else template.ask.replace("{prompt}", prompt)
  text = template.header + "".join(_filled(template.shot, shot) for shot in shots) + ask
  # A trailing space would be a token of its own, which no text continues naturally.
  return (*tok.opening, *tok.encode(text.rstrip(" ")))


def check_writable(tok: Tokenizer, template: FewShot) -> None:
  """Raise a TextError if the tokenizer cannot write the template's own text."""
  for text in (template.header, template.shot, template.ask, template.stop):
    for part in re.split(r"\{prompt\}|\{response\}", text):
      tok.check_writes(part, f"few-shot template {template.name!r}")


def _filled(text: str, shot: Mapping[str, str]) -> str:
  # In one pass, so a prompt that holds "{response}" is left alone.
  parts = text.split("{prompt}")
  return shot["prompt"].join(part.replace("{response}", shot.get("response", "")) for part in parts)


def first_user_turn(messages: Messages) -> str:
  return next(m["content"] for m in messages if m["role"] == "user")


def last_user_turn(messages: Messages) -> str:
  return next(m["content"] for m in reversed(messages) if m["role"] == "user")
