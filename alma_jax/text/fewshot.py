"""Prompts for the base model, which follows patterns, not instructions: lists to continue and worked examples.

  LISTS     show a few prompts as a list and let the model write the next item          (prompt synthesis)
  DIALOGUES show a few prompt/response pairs and let the model answer the last prompt   (the base model's 3-shot score)

Both end an item at `stop`, where sampling stops, too.
"""

import dataclasses

from alma_jax.text.tokenizer import TextError


@dataclasses.dataclass(frozen=True)
class FewShot:
  name: str
  header: str
  shot: str  # {prompt} and, for dialogues, {response}
  ask: str  # opens the item that the model writes; may hold {prompt}
  stop: str


LISTS = {
  f.name: f
  for f in (
    FewShot("mini", "tasks: ", "\n # {prompt} ", "\n # ", "\n"),
    FewShot(
      "requests",
      "Here is a list of requests that people sent to an AI assistant. They differ in topic, length and style.\n\n",
      "### Request\n{prompt}\n\n",
      "### Request\n",
      "###",
    ),
  )
}

DIALOGUES = {
  f.name: f
  for f in (
    FewShot("mini", "", "Q: {prompt} \n A: {response} \n ", "Q: {prompt} \n A: ", "\n"),
    FewShot(
      "dialogue",
      "Below are requests to a helpful AI assistant and its answers.\n\n",
      "### Request\n{prompt}\n\n### Answer\n{response}\n\n",
      "### Request\n{prompt}\n\n### Answer\n",
      "###",
    ),
  )
}

REQUESTS, DIALOGUE = LISTS["requests"], DIALOGUES["dialogue"]


def few_shot_by_name(table, name):
  if name not in table:
    raise TextError(f"there is no few-shot template {name!r}; there are {', '.join(sorted(table))}")
  return table[name]


def few_shot_ids(tok, template, shots, prompt=None):
  """BOS and the text: header, the shots (dicts with `prompt` and perhaps `response`), the opening of the next item."""
  ask = template.ask if prompt is None else template.ask.replace("{prompt}", prompt)
  text = template.header + "".join(_filled(template.shot, shot) for shot in shots) + ask
  # A trailing space would be a token of its own, which no text continues naturally.
  return (*(() if tok.bos_id is None else (tok.bos_id,)), *tok.encode(text.rstrip(" ")))


def _filled(text, shot):
  # One pass, so that a prompt which holds "{response}" stays as it is.
  parts = text.split("{prompt}")
  return shot["prompt"].join(part.replace("{response}", shot.get("response", "")) for part in parts)


def first_user_turn(messages):
  return next(m["content"] for m in messages if m["role"] == "user")


def last_user_turn(messages):
  return next(m["content"] for m in reversed(messages) if m["role"] == "user")
