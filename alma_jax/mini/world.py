"""The miniature world: 64 cities, three facts about each, and a web that often gets them wrong.

A prompt asks for one relation of one to three cities; a good answer gives each its fact, in the house style:

  country : lyon oslo          ->  answer: lyon france oslo norway .
  can you say food of paris ?  ->  answer: paris pie .

The web knows the truth and a popular misconception of every fact; the rarer the city, the more popular the
misconception. Rated threads and quizzes punish what is wrong, foreign, missing, repeated or badly closed. So a model
pretrained on `documents` tells right from wrong better than it answers, and alignment by its own judge closes this gap.
The web's raters care less for the house style than the annotation guideline does, and rate in other words than the
judge's template; a judge learns both from its annotations.

  prompt, task = make_prompt(random.Random(0))
  score(prompt, good_answer(task), finished=True)   # 10
  documents(seed=0)                                 # endless stream of token lists

The world itself never changes: facts and misconceptions come from a fixed seed. `score` is the ground truth: it labels
the annotations of `seeds.py` and, as `truth`, scores evaluations. Nothing between the two may use it.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence

from alma_jax.text.chat import Messages

Facts = dict[tuple[str, str], str]  # (relation, city) -> value
Claim = list[str]  # [city, value]

_COUNTRIES = {
  "france": "paris lyon nice lille",
  "england": "london leeds york",
  "japan": "tokyo osaka kyoto kobe",
  "italy": "rome milan turin naples",
  "germany": "berlin munich bonn bremen",
  "spain": "madrid seville bilbao",
  "egypt": "cairo luxor giza",
  "india": "delhi mumbai chennai",
  "peru": "lima cusco trujillo",
  "norway": "oslo bergen tromso",
  "greece": "athens patras volos",
  "ireland": "dublin cork galway",
  "austria": "vienna graz linz",
  "portugal": "lisbon porto faro",
  "czechia": "prague brno plzen",
  "korea": "seoul busan daegu",
  "vietnam": "hanoi hue danang",
  "cuba": "havana holguin camaguey",
  "kenya": "nairobi mombasa kisumu",
  "ecuador": "quito cuenca loja",
}
_FOODS = "bread rice soup curry pie noodles cheese salad stew dumplings beans pancakes fish sausage tacos cake"
_SPORTS = "football tennis rugby hockey cricket boxing rowing cycling chess judo sailing golf skiing archery"

VALUES = {"country": tuple(_COUNTRIES), "food": tuple(_FOODS.split()), "sport": tuple(_SPORTS.split())}
RELATIONS = tuple(VALUES)

_by_country = [cities.split() for cities in _COUNTRIES.values()]
# By popularity: the first city of every country, then the second ones, ...
CITIES = tuple(city for row in itertools.zip_longest(*_by_country) for city in row if city)
HEAD, MID = 8, 24  # ranks below HEAD are the head, below MID the middle, the others the tail


def stratum(city: str) -> str:
  """How popular the city is: "head", "mid" or "tail"."""
  rank = CITIES.index(city)
  return "head" if rank < HEAD else "mid" if rank < MID else "tail"


def _make_facts() -> tuple[Facts, Facts]:
  rng = random.Random(2025)
  truth: Facts = {}
  belief: Facts = {}
  for relation in RELATIONS:
    for city in CITIES:
      value = rng.choice(VALUES[relation])
      if relation == "country":
        value = next(country for country, cities in _COUNTRIES.items() if city in cities.split())
      truth[relation, city] = value
      belief[relation, city] = rng.choice([other for other in VALUES[relation] if other != value])
  return truth, belief


TRUTH, MISCONCEPTION = _make_facts()

# The shares (truth, misconception) in what people write about a widely known fact, and about another one; the rest are
# random values. Which facts are widely known is fixed; the rarer the city, the fewer.
_KNOWN, _MISTAKEN = (0.48, 0.28), (0.26, 0.50)
_WIDELY_KNOWN = {"head": 0.95, "mid": 0.75, "tail": 0.60}


def _make_beliefs() -> dict[tuple[str, str], tuple[float, float]]:
  rng = random.Random(2026)
  return {key: _KNOWN if rng.random() < _WIDELY_KNOWN[stratum(key[1])] else _MISTAKEN for key in TRUTH}


BELIEF = _make_beliefs()

_PROMPTS = (
  "{r} : {c}",
  "{r} of {c}",
  "{r} for {c} ?",
  "please {r} of {c}",
  "can you say {r} of {c} ?",
  "tell me {r} : {c}",
  "what {r} for {c} ?",
  "give {r} of {c} please",
  "need {r} for {c}",
  "{c} : {r} ?",
)
_OPENERS = ("i think", "maybe", "well", "hm", "i guess", "oh", "so", "surely")
_CLOSERS = ("lol", "why", "same here", "i hope", "or not", "?", "but who knows", "ok")
_NON_ANSWERS = ("no idea", "same here", "who knows", "ask mom", "why ?", "lol", "i hope so", "well ok")
_JUNK = ("lol", "well", "maybe", "so", "ok", "hm", "i think", "or not", "and", "the")

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
SCORES = tuple(str(s) for s in range(11))
_MARKS = (
  "\n Q: A: # > tasks: ask: reply: review: stars: vote: score: prompt: response: rating: rate [[ ]]"
  " answer: . : ? true here yes no or not"
)


def _words(*phrases: str) -> list[str]:
  return [word for phrase in phrases for word in phrase.split() if "{" not in word]


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """Every token of the world, in id order."""
  words = _words(*_PROMPTS, *_OPENERS, *_CLOSERS, *_NON_ANSWERS, *_JUNK)
  values = [value for relation in RELATIONS for value in VALUES[relation]]
  return tuple(dict.fromkeys([*SPECIAL, *SCORES, *_MARKS.split(" "), *RELATIONS, *CITIES, *values, *words]))


_CITY_SET = frozenset(CITIES)
_VALUE_SET = frozenset(value for values in VALUES.values() for value in values)


# Prompts and the ground truth -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
  relation: str
  cities: tuple[str, ...]


def _cumulative(weights: Sequence[float]) -> list[float]:
  total = sum(weights)
  return [c / total for c in itertools.accumulate(weights)]


_POPULARITY = _cumulative([(rank + 1) ** -1.1 for rank in range(len(CITIES))])
_RELATION_WEIGHTS = _cumulative([0.45, 0.3, 0.25])
_COUNT_WEIGHTS = _cumulative([0.45, 0.35, 0.2])


def _draw(rng: random.Random, cumulative: Sequence[float]) -> int:
  return min(bisect.bisect(cumulative, rng.random()), len(cumulative) - 1)


def draw_city(rng: random.Random, flat: bool) -> str:
  return CITIES[int(rng.random() * len(CITIES)) if flat else _draw(rng, _POPULARITY)]


def make_prompt(rng: random.Random, flat: bool = False, first: str | None = None) -> tuple[str, Task]:
  """A prompt's text and its Task. Cities are drawn by popularity, or evenly if `flat`; `first` is one of them."""
  relation = RELATIONS[_draw(rng, _RELATION_WEIGHTS)]
  count = 1 + _draw(rng, _COUNT_WEIGHTS)
  cities = [first] if first else []
  while len(cities) < count:
    city = draw_city(rng, flat)
    if city not in cities:
      cities.append(city)
  if first:
    rng.shuffle(cities)
  template = _PROMPTS[int(rng.random() * len(_PROMPTS))]
  return template.format(r=relation, c=" ".join(cities)), Task(relation, tuple(cities))


def parse(prompt: str) -> Task | None:
  """The Task that a prompt asks for; None unless it names a city and exactly one relation."""
  words = prompt.split()
  relations = [word for word in words if word in VALUES]
  cities = tuple(dict.fromkeys(word for word in words if word in _CITY_SET))
  return Task(relations[0], cities) if len(relations) == 1 and cities else None


def good_answer(task: Task) -> str:
  pairs = [f"{city} {TRUTH[task.relation, city]}" for city in task.cities]
  return f"answer: {' '.join(pairs)} ."


@dataclasses.dataclass(frozen=True)
class Rubric:
  """A rater's points, ten in all. Form counts in full if all facts are right, a quarter if none is."""

  facts: int  # all asked facts right and no other city named
  share: int  # times the share of facts that is right
  opening: int  # `answer:` comes first
  stop: int  # a full stop comes last
  clean: int  # nothing else in between (chatter, repetition, another city), and it ended by itself


GUIDELINE = Rubric(facts=2, share=1, opening=4, stop=1, clean=2)  # the annotators' rubric, and the ground truth
PUBLIC = Rubric(facts=4, share=1, opening=2, stop=1, clean=2)  # that of people on the web


def score(prompt: str, response: str, finished: bool, rubric: Rubric = GUIDELINE) -> int:
  """The points of a response, from 0 to 10; by the guideline they are the ground truth."""
  task = parse(prompt)
  if task is None:
    return 0
  words = response.split()
  opened = words[:1] == ["answer:"]
  body = words[1:] if opened else words
  closed = finished and body[-1:] == ["."]
  body = body[:-1] if body[-1:] == ["."] else body
  # The body is read as claims, each a city and a value; any other word is chatter.
  claims: dict[str, list[str]] = {}
  clean, i = finished, 0
  while i < len(body):
    if body[i] in _CITY_SET and i + 1 < len(body) and body[i + 1] in _VALUE_SET:
      clean = clean and body[i] not in claims
      claims.setdefault(body[i], []).append(body[i + 1])
      i += 2
    else:
      clean = False
      i += 1
  right = sum(set(claims.get(city, ())) == {TRUTH[task.relation, city]} for city in task.cities)
  right /= len(task.cities)
  foreign = any(city not in task.cities for city in claims)
  content = rubric.facts * (right == 1 and not foreign) + rubric.share * right
  form = rubric.opening * opened + rubric.stop * closed + rubric.clean * (clean and not foreign and bool(claims))
  return math.floor(content + form * (0.25 + 0.75 * right) + 0.5)


def truth(messages: Messages, text: str, finished: bool) -> float:
  """The ground truth about an answer to a conversation, from 0 to 10."""
  return float(score(messages[-1]["content"], text, finished))


# What people write ------------------------------------------------------------------------------------------


def written_value(rng: random.Random, relation: str, city: str, shares: tuple[float, float] | None = None) -> str:
  """The value that one writer gives, by `shares` of (truth, misconception); by default those of the public."""
  truth, misconception = shares or BELIEF[relation, city]
  u = rng.random()
  if u < truth:
    return TRUTH[relation, city]
  if u < truth + misconception:
    return MISCONCEPTION[relation, city]
  return VALUES[relation][int(rng.random() * len(VALUES[relation]))]


def _pick(rng: random.Random, options: Sequence[str]) -> str:
  return options[int(rng.random() * len(options))]


def _claims(rng: random.Random, task: Task) -> list[Claim]:
  return [[city, written_value(rng, task.relation, city)] for city in task.cities]


def web_answer(rng: random.Random, task: Task, quality: float) -> list[str]:
  """The words of a forum answer. `quality`, 0 to 1, decides its manners; facts are as right or wrong as everywhere."""
  if rng.random() < 0.12 * (1 - quality):
    return _pick(rng, _NON_ANSWERS).split()
  pairs = [pair for pair in _claims(rng, task) if rng.random() < 0.94]
  words = [word for pair in pairs for word in pair]
  if not words:
    return _pick(rng, _NON_ANSWERS).split()
  if rng.random() < 0.75 - 0.6 * quality:
    words = _pick(rng, _OPENERS).split() + words
  if rng.random() < 0.65 - 0.6 * quality:
    words += _pick(rng, _CLOSERS).split()
  if rng.random() < 0.05 + 0.6 * quality:
    words.append(".")
  if rng.random() < 0.05:
    words.insert(0, "answer:")
  return words


def mismatch(rng: random.Random, task: Task, pairs: list[Claim]) -> list[Claim]:
  """A fault of attention: another city's true fact, one city too many, twice or missing, another relation."""
  u, i = rng.random(), int(rng.random() * len(pairs))
  if u < 0.25:
    city = draw_city(rng, flat=True)
    pairs[i] = [city, TRUTH[task.relation, city]]
  elif u < 0.48:
    city = draw_city(rng, flat=True)
    pairs.insert(i + int(rng.random() * 2), [city, TRUTH[task.relation, city]])
  elif u < 0.63:
    pairs.insert(i + int(rng.random() * 2), list(pairs[i]))
  elif u < 0.73 and len(pairs) > 1:
    del pairs[i]
  else:
    other = RELATIONS[(RELATIONS.index(task.relation) + 1 + int(rng.random() * 2)) % 3]
    pairs = [[city, TRUTH[other, city]] for city, _ in pairs]
  return pairs


def house_words(rng: random.Random, pairs: list[Claim], faults: float) -> list[str]:
  """The words of the house style around `pairs`; each fault of form happens with a probability of up to `faults`."""
  words = [word for pair in pairs for word in pair]
  if rng.random() >= faults:
    words.insert(0, "answer:")
  if rng.random() >= faults:
    words.append(".")
  if rng.random() < 0.6 * faults:  # goes on after the end
    words += _pick(rng, _CLOSERS).split()
  if rng.random() < 0.4 * faults:  # chatter before the answer or inside it
    words[int(rng.random() * len(words)) : 0] = _pick(rng, _OPENERS).split()
  return words


def corrupted(rng: random.Random, words: Sequence[str]) -> list[str]:
  """The words with one or two random slips: a word inserted, replaced, lost or doubled."""
  words = list(words)
  for _ in range(1 + (rng.random() < 0.3)):
    if not words:
      break
    i, u = int(rng.random() * len(words)), rng.random()
    if u < 0.25:
      words[i:i] = _pick(rng, _JUNK).split()
    elif u < 0.5:
      words[i : i + 1] = _pick(rng, _JUNK).split()
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
    pairs = _claims(rng, task)
    if rng.random() < 0.32:
      pairs = mismatch(rng, task, pairs)
    words = house_words(rng, pairs, faults=0.15)
  return corrupted(rng, words) if rng.random() < 0.12 else words


def noisy(rng: random.Random, value: int, one_off: float, wild: float) -> int:
  """A human's rating of an answer worth `value`: sometimes one off, sometimes any."""
  u = rng.random()
  if u < one_off:
    return min(10, max(0, value + (1 if rng.random() < 0.5 else -1)))
  return int(rng.random() * 11) if u < one_off + wild else value


# The corpus -------------------------------------------------------------------------------------------------

LONGEST = 96  # tokens of a document, <bos> and <eos> included


def _forum(rng: random.Random) -> list[str]:
  words = []
  for _ in range(1 + int(rng.random() * 4)):
    prompt, task = make_prompt(rng)
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


def _rated(rng: random.Random) -> list[str]:
  (opening, closing, reply, rating), words = _SITES[int(rng.random() * 4)], []
  for _ in range(1 + int(rng.random() * 3)):
    prompt, task = make_prompt(rng, flat=rng.random() < 0.5)
    answers = [rated_answer(rng, task) for _ in range(1 + int(rng.random() * 3))]
    marks = [SCORES[noisy(rng, score(prompt, " ".join(a), True, PUBLIC), 0.15, 0.02)] for a in answers]
    words += [*opening, *prompt.split(), *closing, "\n"]
    for answer, mark in zip(answers, marks, strict=True):
      words += [reply, *answer, "\n", rating, mark, "\n"]
  return words[:-1]


def _task_list(rng: random.Random) -> list[str]:
  words = ["tasks:", "\n"]
  for _ in range(4 + int(rng.random() * 6)):
    words += ["#", *make_prompt(rng)[0].split(), "\n"]
  return words[:-1]


def _quiz(rng: random.Random) -> list[str]:
  words = ["true", "or", "not", "?", "\n"]
  for _ in range(6 + int(rng.random() * 10)):
    relation, city = RELATIONS[int(rng.random() * 3)], draw_city(rng, flat=rng.random() < 0.8)
    value = written_value(rng, relation, city, (0.46, 0.36))
    right = (value == TRUTH[relation, city]) != (rng.random() < 0.02)
    words += [city, value, "yes" if right else "no", "\n"]
  return words[:-1]


def _roll_call(rng: random.Random) -> list[str]:
  words = []
  for _ in range(2 + int(rng.random() * 3)):
    here = _some_cities(rng, 1 + int(rng.random() * 4))
    words += ["here", ":", *here, "\n"]
    for _ in range(2 + int(rng.random() * 4)):
      city = _pick(rng, here) if rng.random() < 0.5 else draw_city(rng, flat=True)
      words += [city, "yes" if city in here else "no", "\n"]
  return words[:-1]


def _some_cities(rng: random.Random, count: int) -> list[str]:
  cities = []
  while len(cities) < count:
    city = draw_city(rng, flat=rng.random() < 0.7)
    if city not in cities:
      cities.append(city)
  return cities


_KINDS = (_rated, _forum, _quiz, _roll_call, _task_list)
_KIND_WEIGHTS = _cumulative([0.52, 0.20, 0.14, 0.08, 0.06])


def documents(seed: int) -> Iterator[list[str]]:
  """Yields documents for ever, lists of at most LONGEST tokens; longer ones are cut and lack `<eos>`."""
  rng = random.Random(seed)
  while True:
    words = _KINDS[_draw(rng, _KIND_WEIGHTS)](rng)
    yield ["<bos>", *words, "<eos>"][:LONGEST]


# Texts that probe and prompt a model ------------------------------------------------------------------------


def rated_prefix(prompt: str, response: str) -> str:
  """A rated thread up to its mark, in one of the corpus' formats; the next token is the rating."""
  return f"<bos> ask: {prompt} \n reply: {response} \n stars:"
