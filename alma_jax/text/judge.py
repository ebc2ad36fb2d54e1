"""The judge's templates as data, and how a score 0..10 is read from token probabilities.

  prefix = judge_prefix(tok, fmt, A2, messages)   # shared by all responses to one prompt
  suffix = judge_suffix(tok, fmt, A2, response)   # up to and including the forced "Rating: [["
  trie = score_paths(tok, A2)                     # where the eleven scores are in the vocabulary
  row = prefix + suffix + list(trie.inner)        # read log-probs at its last len(inner) + 1 places
  score, probs, mass = expected_score(trie, logprobs)
  ids, mask = judge_example(tok, fmt, A2, messages, response, 7)   # for fine-tuning
  prefix, suffix = few_shot_prefix(tok, A2, shots, messages), few_shot_suffix(tok, A2, response)   # for a base model

What to expect: nothing is parsed. The forced prefix never ends with a space. A score of several tokens ("10"
for Llama-2) is scored by the sum of its log-probs, and a score that another one extends ("1") competes with
the closing bracket included. Tokenizers that would need more than one chain of forced tokens are refused.
Texts may hold "{prompt}", "[[10]]" or anything else: templates are split once, and never searched again.
"""

import dataclasses
import functools
import operator

import numpy as np

from alma_jax.text.chat import cut_spaces, encode_pieces
from alma_jax.text.tokenizer import TextError

SCORES = range(11)


@dataclasses.dataclass(frozen=True)
class JudgeTemplate:
  name: str
  instruction: str
  item: str  # holds {prompt}, then {response}
  answer_open: str  # the forced prefix
  answer_close: str  # what follows the score
  lead: str = ""  # what stands between the forced prefix and the score
  options: tuple = ()  # the eleven answers in full, where more follows the score than `answer_close`
  as_chat: bool = True  # the text is a user's turn and the answer the assistant's; else raw text after BOS
  gap: str = "\n\n"  # raw text: between item and answer
  between_shots: str = "\n\n"

  def answer(self, score):
    """What the judge says, in full."""
    said = self.options[score] if self.options else f"{score}{self.answer_close}"
    return self.answer_open + self.lead + said


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
MINI_JUDGE = JudgeTemplate(
  name="mini",
  instruction="",
  item="rate prompt: {prompt} response: {response}",
  answer_open="rating: [[",
  answer_close=" ]]",
  lead=" ",
  as_chat=False,
  gap=" ",
  between_shots=" \n ",
)


def judge_prefix(tok, fmt, template, messages):
  """Ids up to where the response begins."""
  before, between, _ = _split(template)
  between, _ = cut_spaces(between)
  text = template.instruction + before + conversation_text(messages) + between
  opening = [(fmt.begin, True), (fmt.user.before if template.as_chat else "", True)]
  return encode_pieces(tok, fmt, [*opening, (text, False)])


def judge_suffix(tok, fmt, template, response):
  """Ids from the response up to and including the forced prefix of the answer."""
  head, answer_lead = _response_part(tok, fmt, template, response)
  return head + tok.encode(answer_lead + template.answer_open)


def judge_example(tok, fmt, template, messages, response, score, score_only=False):
  """(ids, mask) to fine-tune on: loss on the answer and its stop token, or on the score's tokens only."""
  score = _checked(score)
  head, answer_lead = _response_part(tok, fmt, template, response)
  head = judge_prefix(tok, fmt, template, messages) + head
  answer = tok.encode(answer_lead + template.answer(score)) + encode_pieces(tok, fmt, [(fmt.stop, True)])
  mask = [True] * len(answer)
  if score_only:
    start = len(tok.encode(answer_lead + template.answer_open))
    stop = start + len(score_paths(tok, template).paths[score])
    mask = [start <= i < stop for i in range(len(answer))]
  return head + answer, [False] * len(head) + mask


def few_shot_prefix(tok, template, shots, messages):
  """Ids of raw text for a base model, up to where the response begins: instruction, worked examples, the prompt.

  `shots` are (messages, response, score).
  """
  before, between, after = _split(template)
  between, space = cut_spaces(between)
  text = template.instruction
  for shown, said, score in shots:
    text += before + conversation_text(shown) + between + space + said.strip() + after + template.gap
    text += template.answer(_checked(score)) + template.between_shots
  ids = [] if tok.bos_id is None else [tok.bos_id]
  return ids + tok.encode(text + before + conversation_text(messages) + between)


def few_shot_suffix(tok, template, response):
  """Ids from the response up to and including the forced prefix of the answer."""
  _, between, after = _split(template)
  _, space = cut_spaces(between)
  gap, answer_lead = cut_spaces(template.gap)
  return tok.encode(space + response.strip() + after + gap) + tok.encode(answer_lead + template.answer_open)


def conversation_text(messages):
  """One user turn is its text; anything longer is written out with the speakers' names."""
  if len(messages) == 1 and messages[0]["role"] == "user":
    return messages[0]["content"].strip()
  return "\n".join(f"{m['role'].capitalize()}: {m['content'].strip()}" for m in messages)


@dataclasses.dataclass(frozen=True)
class ScoreTrie:
  paths: tuple  # for each score the ids that follow the forced prefix (with the closer's first where needed)
  inner: tuple  # forced extra ids: path p is read at places 0..len(p)-1, and p[:-1] are the first ids of `inner`


@functools.lru_cache(maxsize=8)
def score_paths(tok, template):
  """ScoreTrie of the template's eleven answers in this tokenizer."""
  found = {_candidate_paths(tok, template, space) for space in ("", " ")}
  if len(found) > 1:
    raise TextError(
      f"judge template {template.name!r}: its scores become other tokens after a space; reword the answer"
    )
  paths = found.pop()
  nodes = sorted({path[:n] for path in paths for n in range(1, len(path))}, key=len)
  inner = nodes[-1] if nodes else ()
  if nodes != [inner[: n + 1] for n in range(len(inner))]:
    raise TextError(
      f"judge template {template.name!r}: the scores 0..10 need several chains of tokens {nodes} in the "
      f"tokenizer in {tok.source}; use another answer_open or lead"
    )
  return ScoreTrie(paths, inner)


def expected_score(trie, logprobs):
  """(mean score, probs [11], raw mass) from log-probs [len(inner)+1, V]; the reference, in float64."""
  logprobs = np.asarray(logprobs, np.float64)
  total = np.array([sum(logprobs[n, i] for n, i in enumerate(path)) for path in trie.paths])
  probs = np.exp(total - total.max())
  probs /= probs.sum()
  return float(probs @ np.arange(len(probs))), probs, float(np.exp(total).sum())


def _candidate_paths(tok, template, space):
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
  extended = [any(q[: len(p)] == p for m, q in enumerate(paths) if m != n) for n, p in enumerate(paths)]
  paths = [(*p, closer) if more else p for p, closer, more in zip(paths, closers, extended)]
  if any(q[: len(p)] == p for n, p in enumerate(paths) for m, q in enumerate(paths) if m != n):
    raise TextError(
      f"judge template {template.name!r}: the tokenizer in {tok.source} cannot tell the scores apart: {paths}"
    )
  return tuple(paths)


def _response_part(tok, fmt, template, response):
  """(ids from the response up to where the answer begins, the space the answer begins with)."""
  _, between, after = _split(template)
  _, space = cut_spaces(between)
  ending = [(fmt.user.after, True), (fmt.header, True)] if template.as_chat else [(template.gap, False)]
  last, answer_lead = cut_spaces(ending[-1][0])
  pieces = [(space + response.strip() + after, False), *ending[:-1], (last, ending[-1][1])]
  return encode_pieces(tok, fmt, pieces), answer_lead


@functools.cache
def _split(template):
  """(before the prompt, between prompt and response, after the response)."""
  before, found, rest = template.item.partition("{prompt}")
  between, also, after = rest.partition("{response}")
  if not (found and also):
    raise TextError(f"judge template {template.name!r}: item must hold {{prompt}} and then {{response}}")
  if not template.answer_open or template.answer_open[-1].isspace():
    raise TextError(f"judge template {template.name!r}: answer_open must not be empty or end with a space; use lead")
  return before, between, after


def _checked(score):
  try:
    score = operator.index(score)
  except TypeError:
    score = -1 if score != int(score) else int(score)
  if score not in SCORES:
    raise TextError(f"a judge's score must be a whole number from 0 to {SCORES[-1]}")
  return score
