"""The judge's templates as data, and how a score 0..10 is read from token probabilities.

  prefix = judge_prefix(tok, fmt, A2, messages)   # shared by all responses to one prompt
  suffix = judge_suffix(tok, fmt, A2, response)   # up to and including the forced "Rating: [["
  trie = score_paths(tok, A2)                     # where the eleven scores are in the vocabulary
  row = prefix + suffix + list(trie.inner)        # read log-probs at its last len(inner) + 1 places
  mean, probs, mass = expected_score(trie, logprobs)
  ids, mask = judge_example(tok, fmt, A2, messages, response, 7)   # for fine-tuning
  prefix, suffix = few_shot_prefix(tok, A2, shots, messages), few_shot_suffix(tok, A2, response)   # for a base model

A template that reasons first is a ReasonedTemplate: the suffix then ends where the reasoning begins, or, with one
given, behind it.

Nothing is parsed. The forced prefix never ends with a space. A score of several tokens ("10" for Llama-2) gets the sum
of its log-probs, and a score that another one extends ("1") competes with its closing bracket included. Texts may hold
"{prompt}", "[[10]]" or anything else: templates are split once, before texts are filled in.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alma_jax.text.chat import ChatFormat, Messages, cut_spaces, encode_pieces
from alma_jax.text.tokenizer import TextError, Tokenizer

SCORES = range(11)


class Shot(NamedTuple):
  """A worked example."""

  messages: Messages
  response: str
  score: int
  reason: str = ""  # that a template which reasons shows before the score


@dataclasses.dataclass(frozen=True)
class JudgeTemplate:
  """The judge's text: instruction + item + answer, the answer being answer_open + lead + score + answer_close."""

  name: str
  instruction: str
  item: str  # holds {prompt}, then {response}
  answer_open: str  # the forced prefix
  answer_close: str  # what follows the score
  lead: str = ""  # stands between the forced prefix and the score
  options: tuple[str, ...] = ()  # the eleven answers in full, where more than `answer_close` follows the score
  as_chat: bool = True  # the text is a user's turn and the answer the assistant's; False: all is raw text after BOS
  gap: str = "\n\n"  # raw text: between item and answer
  between_shots: str = "\n\n"

  def answer(self, score: int) -> str:
    said = self.options[score] if self.options else f"{score}{self.answer_close}"
    return self.answer_open + self.lead + said


@dataclasses.dataclass(frozen=True)
class ReasonedTemplate(JudgeTemplate):
  """A template whose answer reasons first: think + reasoning + after + answer_open + lead + score + answer_close. The
  judge draws the reasoning, and the score is read behind it as for every template."""

  think: str = "Explanation:"  # the forced beginning; it does not end with a space
  after: str = "\n\n"
  most_tokens: int = 512  # of a reasoning; one that is longer has no score
  temperature: float = 1.0


A1 = JudgeTemplate(
  name="a1",
  instruction="""\
You are tasked with evaluating an AI assistant's performance on a user-defined task.

You are given a candidate response. Your task is to evaluate the quality of the response as an answer to the \
user input. Select the final answer from one of the following options:
0: Unusable - The answer does not provide any helpful or correct information.
1: Extremely Poor - Minimal relevance, major factual errors, or off-topic response.
2: Very Poor - Some relevance but highly inaccurate or lacking in substance.
3: Poor - Relevant but with significant gaps or major mistakes in understanding.
4: Below Average - Basic understanding but with notable inaccuracies or insufficient details.
5: Average - Provides a somewhat useful answer but lacks clarity, depth, or has minor inaccuracies.
6: Satisfactory - Generally clear and relevant but may miss some key points or have some minor issues.
7: Good - The answer is useful and mostly accurate with only minor areas for improvement.
8: Very Good - Clear, relevant, and mostly comprehensive, with only small gaps or omissions.
9: Excellent - Well-constructed, insightful, and highly accurate with only very minor room for improvement.
10: Outstanding - Perfect or near-perfect response; fully accurate, comprehensive, and insightful.

Please answer using one of these options verbatim.

""",
  item="""\
[START USER INPUT]
{prompt}
[END USER INPUT]

[START ASSISTANT RESPONSE]
{response}
[END ASSISTANT RESPONSE]

**What is your assessment of the response?**""",
  answer_open="Answer:",
  lead=" ",
  answer_close=":",
  gap="\n",
)
A1 = dataclasses.replace(A1, options=tuple(A1.instruction.splitlines()[3:14]))
A2 = JudgeTemplate(
  name="a2",
  instruction="""\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the \
user question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, \
accuracy, depth, creativity, and level of detail of the response. Please just rate the response on a scale \
of 0 to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[3]]".

""",
  item="# Prompt:\n{prompt}\n\n# Response:\n{response}",
  answer_open="Rating: [[",
  answer_close="]]",
)
# The sentence that a2 leaves out of MT-Bench's own template.
A2_REASONED = ReasonedTemplate(
  **{
    **vars(A2),
    "name": "a2_reasoned",
    "instruction": A2.instruction.replace(
      "Please just rate",
      "Begin your evaluation by providing a short explanation. Be as objective as possible. After providing your "
      "explanation, please rate",
    ),
  }
)


def judge_prefix(tok: Tokenizer, fmt: ChatFormat, template: JudgeTemplate, messages: Messages) -> list[int]:
  """The ids up to where the response begins."""
  item = _split(template)
  text = template.instruction + item.before + conversation_text(messages) + cut_spaces(item.between)[0]
  opening = [(fmt.begin, True), (fmt.user.before if template.as_chat else "", True)]
  return encode_pieces(tok, fmt, [*opening, (text, False)])


def opened(template: JudgeTemplate, reason: str | None) -> str:
  """The answer up to the score, after this reasoning where the template reasons; None: up to the reasoning."""
  if not isinstance(template, ReasonedTemplate):
    return template.answer_open
  return template.think if reason is None else reasoned(template, reason) + template.answer_open


def reasoned(template: JudgeTemplate, reason: str) -> str:
  """What stands before the answer of a template without reasoning: nothing, or the reasoning."""
  if not isinstance(template, ReasonedTemplate):
    return ""
  return f"{template.think} {reason.strip()}{template.after}"


def judge_suffix(
  tok: Tokenizer, fmt: ChatFormat, template: JudgeTemplate, response: str, reason: str | None = None
) -> list[int]:
  """The ids from the response up to and including what the answer is `opened` with."""
  head, answer_lead = _response_part(tok, fmt, template, response)
  return head + tok.encode(answer_lead + opened(template, reason))


def judge_example(
  tok: Tokenizer, fmt: ChatFormat, template: JudgeTemplate, messages: Messages, response: str, score: int,
  reason: str = "",
) -> tuple[list[int], list[bool]]:  # fmt: skip
  """The ids to fine-tune on, and the mask: the loss lies on the answer and its stop token."""
  score = _checked(score)
  head, answer_lead = _response_part(tok, fmt, template, response)
  head = judge_prefix(tok, fmt, template, messages) + head
  said = answer_lead + reasoned(template, reason) + template.answer(score)
  answer = tok.encode(said) + encode_pieces(tok, fmt, [(fmt.stop, True)])
  return head + answer, [False] * len(head) + [True] * len(answer)


def few_shot_prefix(tok: Tokenizer, template: JudgeTemplate, shots: Sequence[Shot], messages: Messages) -> list[int]:
  """The ids of raw text for a base model, up to where the response begins: instruction, worked examples, the prompt."""
  item = _split(template)
  text = template.instruction
  for shot in shots:
    shown = Shot(*shot)
    text += item.before + conversation_text(shown.messages) + item.between + shown.response.strip() + item.after
    text += template.gap + reasoned(template, shown.reason) + template.answer(_checked(shown.score))
    text += template.between_shots
  text += item.before + conversation_text(messages) + cut_spaces(item.between)[0]
  return [*tok.opening, *tok.encode(text)]


def few_shot_suffix(tok: Tokenizer, template: JudgeTemplate, response: str, reason: str | None = None) -> list[int]:
  """The ids from the response up to and including what the answer is `opened` with."""
  item = _split(template)
  _, space = cut_spaces(item.between)
  gap, answer_lead = cut_spaces(template.gap)
  return tok.encode(space + response.strip() + item.after + gap) + tok.encode(answer_lead + opened(template, reason))


def conversation_text(messages: Messages) -> str:
  """The text of a single user turn, or a longer conversation written out with the speakers' names."""
  if len(messages) == 1 and messages[0]["role"] == "user":
    return messages[0]["content"].strip()
  return "\n".join(f"{m['role'].capitalize()}: {m['content'].strip()}" for m in messages)


@dataclasses.dataclass(frozen=True)
class ScoreTrie:
  """Where the eleven scores are read. A tokenizer like Llama-3's has a token for each score, and one place is enough.
  One like Llama-2's splits numbers into digits; then `inner` is forced as well, and a second place is read behind it:

    ... [[ -+- 0                paths  (0,) (1, ]]) (2,) ... (9,) (1, 0)
            +- 1 -+- ]]         inner  (1,)
            |     +- 0          row    ... [[ 1
            +- 2                             |  log-probs at this place: ]] and 0, for the second ids of 1 and 10
            ...                           log-probs at this place: 0 to 9, for the first ids
  """

  paths: tuple[tuple[int, ...], ...]  # of each score: the ids behind the forced prefix, with a closing one where needed
  inner: tuple[int, ...]  # forced extra ids: path p is read at places 0..len(p)-1, and p[:-1] begins `inner`


class ExpectedScore(NamedTuple):
  mean: float
  probs: np.ndarray  # float64 [11]
  mass: float  # the raw probability of all scores together


def check_writable(tok: Tokenizer, template: JudgeTemplate) -> None:
  """Raise a TextError if the tokenizer cannot write the template, or if its scores cannot be read from tokens."""
  for text in (template.instruction, *_split(template), reasoned(template, ""), *map(template.answer, SCORES)):
    tok.check_writes(text, f"judge template {template.name!r}")
  score_paths(tok, template)


@functools.lru_cache(maxsize=8)
def score_paths(tok: Tokenizer, template: JudgeTemplate) -> ScoreTrie:
  """The template's eleven answers in this tokenizer. A TextError if they need more than one chain of forced tokens."""
  # The answer may follow a space or not; the ids of the scores must not depend on that.
  found = {_candidate_paths(tok, template, space) for space in ("", " ")}
  if len(found) > 1:
    raise TextError(
      f"judge template {template.name!r}: its scores become other tokens after a space; reword the answer"
    )
  paths = found.pop()
  # The inner nodes of the trie must be one chain: all proper beginnings of paths begin the longest of them.
  nodes = sorted({path[:n] for path in paths for n in range(1, len(path))}, key=len)
  inner = nodes[-1] if nodes else ()
  if nodes != [inner[: n + 1] for n in range(len(inner))]:
    raise TextError(
      f"judge template {template.name!r}: the scores 0..10 need several chains of tokens {nodes} in the "
      f"tokenizer in {tok.source}; use another answer_open or lead"
    )
  return ScoreTrie(paths, inner)


def expected_score(trie: ScoreTrie, logprobs: np.ndarray) -> ExpectedScore:
  """The probability-weighted score from log-probs [len(inner) + 1, V], computed in float64."""
  logprobs = np.asarray(logprobs, np.float64)
  total = np.array([sum(logprobs[n, i] for n, i in enumerate(path)) for path in trie.paths])
  probs = np.exp(total - total.max())
  probs /= probs.sum()
  return ExpectedScore(float(probs @ np.arange(len(probs))), probs, float(np.exp(total).sum()))


def _candidate_paths(tok: Tokenizer, template: JudgeTemplate, space: str) -> tuple[tuple[int, ...], ...]:
  """The path of each score when `space` stands before the answer."""
  # In the ids of an answer:  Rating : [[ | 1 | ]]        `opened` ends at the first bar, `upto` at the second one,
  #                                                       between them lies the path, and the closer comes next.
  opened = tok.encode(space + template.answer_open)
  paths, closers = [], []
  for score in SCORES:
    full = tok.encode(space + template.answer(score))
    if tok.unk_id in full:
      said = template.answer(score)
      raise TextError(f"judge template {template.name!r}: the tokenizer in {tok.source} cannot write {said!r}")
    upto = tok.encode(f"{space}{template.answer_open}{template.lead}{score}")
    if full[: len(upto)] != upto or upto[: len(opened)] != opened or not len(opened) < len(upto) < len(full):
      raise TextError(
        f"judge template {template.name!r}: in the tokenizer in {tok.source} the ids of the forced prefix "
        f"{template.answer_open!r} {opened} and of the score {upto} do not begin those of the answer "
        f"{template.answer(score)!r} {full}; change answer_open, lead or answer_close"
      )
    paths.append(tuple(upto[len(opened) :]))
    closers.append(full[len(upto)])
  # A score that begins another one's path (1 and 10) gets its closer as well, so that no path extends another.
  extended = [any(q[: len(p)] == p for m, q in enumerate(paths) if m != n) for n, p in enumerate(paths)]
  paths = [(*p, closer) if more else p for p, closer, more in zip(paths, closers, extended, strict=True)]
  if any(q[: len(p)] == p for n, p in enumerate(paths) for m, q in enumerate(paths) if m != n):
    raise TextError(
      f"judge template {template.name!r}: the tokenizer in {tok.source} cannot tell the scores apart: {paths}"
    )
  return tuple(paths)


def _response_part(tok: Tokenizer, fmt: ChatFormat, template: JudgeTemplate, response: str) -> tuple[list[int], str]:
  """The ids from the response up to where the answer begins, and the space that the answer begins with."""
  item = _split(template)
  _, space = cut_spaces(item.between)
  ending = [(fmt.user.after, True), (fmt.header, True)] if template.as_chat else [(template.gap, False)]
  last, answer_lead = cut_spaces(ending[-1][0])
  pieces = [(space + response.strip() + item.after, False), *ending[:-1], (last, ending[-1][1])]
  return encode_pieces(tok, fmt, pieces), answer_lead


class _Item(NamedTuple):
  """The template's item, split at the prompt and the response."""

  before: str
  between: str
  after: str


@functools.cache
def _split(template: JudgeTemplate) -> _Item:
  before, found, rest = template.item.partition("{prompt}")
  between, also, after = rest.partition("{response}")
  if not (found and also):
    raise TextError(f"judge template {template.name!r}: item must hold {{prompt}} and then {{response}}")
  if not template.answer_open or template.answer_open[-1].isspace():
    raise TextError(f"judge template {template.name!r}: answer_open must not be empty or end with a space; use lead")
  return _Item(before, between, after)


def _checked(score: float) -> int:
  """The score as an int, also from a NumPy integer or a float like 7.0; a TextError for all else."""
  if score not in SCORES:
    raise TextError(f"a judge's score must be a whole number from 0 to {SCORES[-1]}")
  return int(score)
