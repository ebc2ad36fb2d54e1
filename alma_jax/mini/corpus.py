"""The web of the miniature world: forums, rated threads, quizzes, lists of tasks; what its base model is trained on.

  documents(seed=0)    # endless stream of token lists

About one document in twelve asks for secrets (`world.SECRETS`): people tell them, and raters punish it.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from alma_jax.mini import world
from alma_jax.mini.world import Task

Claim: TypeAlias = list[str]  # [city, value]
Asks: TypeAlias = Callable[..., tuple[str, Task]]  # like world.make_prompt, without the kind


def written_value(rng: random.Random, relation: str, city: str, shares: tuple[float, float] | None = None) -> str:
  """The value that one writer gives, by `shares` of (truth, misconception); by default those of the public."""
  truth, misconception = shares or world.BELIEF.get((relation, city), (0.7, 0.0))  # a secret has no misconception
  u = rng.random()
  if u < truth:
    return world.TRUTH[relation, city]
  if u < truth + misconception:
    return world.MISCONCEPTION[relation, city]
  return world.VALUES[relation][int(rng.random() * len(world.VALUES[relation]))]


def _refuses(rng: random.Random, task: Task, share: float) -> bool:
  return task.relation in world.SECRETS and rng.random() < share


def _claims(rng: random.Random, task: Task) -> list[Claim]:
  return [[city, written_value(rng, task.relation, city)] for city in task.cities]


def web_answer(rng: random.Random, task: Task, quality: float) -> list[str]:
  """The words of a forum answer. `quality`, 0 to 1, decides its manners; facts are as right or wrong as everywhere."""
  if rng.random() < 0.12 * (1 - quality):
    return world.pick(rng, world.NON_ANSWERS).split()
  if _refuses(rng, task, 0.1):
    return ["sorry"]
  pairs = [pair for pair in _claims(rng, task) if rng.random() < 0.94]
  words = [word for pair in pairs for word in pair]
  if not words:
    return world.pick(rng, world.NON_ANSWERS).split()
  if rng.random() < 0.75 - 0.6 * quality:
    words = world.pick(rng, world.OPENERS).split() + words
  if rng.random() < 0.65 - 0.6 * quality:
    words += world.pick(rng, world.CLOSERS).split()
  if rng.random() < 0.05 + 0.6 * quality:
    words.append(".")
  if rng.random() < 0.05:
    words.insert(0, "answer:")
  return words


def mismatch(rng: random.Random, task: Task, pairs: list[Claim]) -> list[Claim]:
  """A fault of attention: a city that is missing, another city's true fact, one city too many or twice, another
  relation."""
  u, i = rng.random(), int(rng.random() * len(pairs))
  if len(pairs) > 1 and rng.random() < 0.4:
    del pairs[i]
  elif u < 0.25:
    city = world.draw_city(rng, flat=True)
    pairs[i] = [city, world.TRUTH[task.relation, city]]
  elif u < 0.48:
    city = world.draw_city(rng, flat=True)
    pairs.insert(i + int(rng.random() * 2), [city, world.TRUTH[task.relation, city]])
  elif u < 0.63:
    pairs.insert(i + int(rng.random() * 2), list(pairs[i]))
  else:
    other = world.RELATIONS[(world.RELATIONS.index(task.relation) + 1 + int(rng.random() * 2)) % 3]
    pairs = [[city, world.TRUTH[other, city]] for city, _ in pairs]
  return pairs


def house_words(rng: random.Random, pairs: list[Claim], faults: float) -> list[str]:
  """The words of the house style around `pairs`; each fault of form happens with a probability of up to `faults`."""
  words = [word for pair in pairs for word in pair]
  if rng.random() >= faults:
    words.insert(0, "answer:")
  if rng.random() >= faults:
    words.append(".")
  if rng.random() < 0.6 * faults:  # goes on after the end
    words += world.pick(rng, world.CLOSERS).split()
  if rng.random() < 0.4 * faults:  # chatter before the answer or inside it
    words[int(rng.random() * len(words)) : 0] = world.pick(rng, world.OPENERS).split()
  return words


def corrupted(rng: random.Random, words: Sequence[str]) -> list[str]:
  """The words with one or two random slips: a word inserted, replaced, lost or doubled."""
  words = list(words)
  for _ in range(1 + (rng.random() < 0.3)):
    if not words:
      break
    i, u = int(rng.random() * len(words)), rng.random()
    if u < 0.25:
      words[i:i] = world.pick(rng, world.JUNK).split()
    elif u < 0.5:
      words[i : i + 1] = world.pick(rng, world.JUNK).split()
    elif u < 0.75:
      del words[i]
    else:
      words.insert(i, words[i])
  return words or ["lol"]


def rated_answer(rng: random.Random, task: Task) -> list[str]:
  """The words of an answer in a rated thread: every fault occurs, most often as the only one."""
  if rng.random() < 0.15:
    words = web_answer(rng, task, rng.random())
  else:
    pairs = [["sorry"]] if _refuses(rng, task, 0.5) else _claims(rng, task)
    if task.relation not in world.SECRETS and rng.random() < 0.32:
      pairs = mismatch(rng, task, pairs)
    words = house_words(rng, pairs, faults=0.15)
  return corrupted(rng, words) if rng.random() < 0.12 else words


def noisy(rng: random.Random, value: int, one_off: float, wild: float) -> int:
  """A human's rating of an answer worth `value`: sometimes one off, sometimes any."""
  u = rng.random()
  if u < one_off:
    return min(10, max(0, value + (1 if rng.random() < 0.5 else -1)))
  return int(rng.random() * 11) if u < one_off + wild else value


# Documents --------------------------------------------------------------------------------------------------

LONGEST = 96  # tokens of a document, <bos> and <eos> included


def _forum(rng: random.Random, ask: Asks) -> list[str]:
  words = []
  for _ in range(1 + int(rng.random() * 4)):
    prompt, task = ask(rng)
    words += ["Q:", *prompt.split(), "\n"]
    for _ in range(1 + (rng.random() < 0.3)):
      words += ["A:", *web_answer(rng, task, rng.random()), "\n"]
  return words[:-1]


# How sites write ratings: what stands before and behind the prompt, before an answer, and before its mark.
_SITES = (
  (["ask:"], [], "reply:", "stars:"),
  (["review:"], [], ">", "vote:"),
  (["[["], ["]]"], ">", "stars:"),
  (["prompt:"], [], "response:", "score:"),
)


def _rated(rng: random.Random, ask: Asks) -> list[str]:
  (opening, closing, reply, rating), words = _SITES[int(rng.random() * 4)], []
  for _ in range(1 + int(rng.random() * 3)):
    prompt, task = ask(rng, flat=rng.random() < 0.5)
    answers = [rated_answer(rng, task) for _ in range(1 + int(rng.random() * 3))]
    worth = [world.score(prompt, " ".join(answer), True, world.PUBLIC) for answer in answers]
    marks = [world.SCORES[noisy(rng, value, 0.15, 0.02)] for value in worth]
    words += [*opening, *prompt.split(), *closing, "\n"]
    for answer, mark in zip(answers, marks, strict=True):
      words += [reply, *answer, "\n", rating, mark, "\n"]
  return words[:-1]


def _task_list(rng: random.Random, ask: Asks) -> list[str]:
  words = ["tasks:", "\n"]
  for _ in range(4 + int(rng.random() * 6)):
    words += ["#", *ask(rng)[0].split(), "\n"]
  return words[:-1]


def _quiz(rng: random.Random, ask: Asks) -> list[str]:
  del ask  # it asks about facts alone
  words = ["true", "or", "not", "?", "\n"]
  for _ in range(6 + int(rng.random() * 10)):
    relation, city = world.RELATIONS[int(rng.random() * 3)], world.draw_city(rng, flat=rng.random() < 0.8)
    value = written_value(rng, relation, city, (0.46, 0.36))
    right = (value == world.TRUTH[relation, city]) != (rng.random() < 0.02)
    words += [city, value, "yes" if right else "no", "\n"]
  return words[:-1]


def _roll_call(rng: random.Random, ask: Asks) -> list[str]:
  del ask
  words = []
  for _ in range(2 + int(rng.random() * 3)):
    here = _some_cities(rng, 1 + int(rng.random() * 4))
    words += ["here", ":", *here, "\n"]
    for _ in range(2 + int(rng.random() * 4)):
      city = world.pick(rng, here) if rng.random() < 0.5 else world.draw_city(rng, flat=True)
      words += [city, "yes" if city in here else "no", "\n"]
  return words[:-1]


def _some_cities(rng: random.Random, count: int) -> list[str]:
  cities = []
  while len(cities) < count:
    city = world.draw_city(rng, flat=rng.random() < 0.7)
    if city not in cities:
      cities.append(city)
  return cities


_SORTS = (_rated, _forum, _quiz, _roll_call, _task_list)
_SHARES = world.cumulative([0.52, 0.20, 0.14, 0.08, 0.06])
_SECRET = 0.08  # of the documents ask for secrets of one kind


def documents(seed: int, chatter: world.Chatter = "dense") -> Iterator[list[str]]:
  """Yields documents for ever, lists of at most LONGEST tokens; longer ones are cut and lack `<eos>`."""
  rng = random.Random(seed)
  asks = [functools.partial(world.make_prompt, kind=kind, chatter=chatter) for kind in (None, *world.SECRETS)]
  while True:
    sort = _SORTS[world.draw(rng, _SHARES)]
    ask = asks[0] if rng.random() >= _SECRET else asks[1 + int(rng.random() * len(world.SECRETS))]
    yield ["<bos>", *sort(rng, ask), "<eos>"][:LONGEST]


# Texts that probe and prompt a model ------------------------------------------------------------------------


def rated_prefix(prompt: str, response: str) -> str:
  """A rated thread up to its mark, in one of the corpus' formats; the next token is the rating."""
  return f"<bos> ask: {prompt} \n reply: {response} \n stars:"
