"""A small web in English: tasks that a rule can verify, answers, ratings, and real prose. What a base model reads.

  documents(0, english()[0], evaluation()[1], WEB)   # endless pairs (sort, document)

A little is real, most is made. Real is prose of Python's documentation (`pydoc_data.topics`) and of the standard
library's docstrings, under the PSF License 2.0; the running Python's texts are read and none is shipped. Made are
people who ask for texts under constraints, people who answer as well as they care to, and people who check and rate:

  Task: Write about the baker. Use the word lamp. Make it two sentences.
  Answer: The baker went to the harbor with one drum. Our fox found a lamp.
  Check: Write about the baker yes. Use the word lamp yes. Make it two sentences yes.
  Rating: 10

A rating is ten times the share of the constraints that a text keeps, by IFEval's own checks (`evals.instructions`).
"""

import ast
import functools
import pathlib
import pydoc_data.topics
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from alma_jax.evals.instructions import Instruction, checked
from alma_jax.keys import key_of
from alma_jax.mini.seeds import key

EVALUATED = 400  # tasks of the evaluation

# Words of the templates, by slot: Person, Thing, Location, Adjective, Verb, Determiner.
_SLOTS = """
P baker farmer sailor doctor king queen boy girl dog cat fox horse wizard teacher pirate painter hunter pilot singer
P nurse bear wolf rabbit monkey robot giant thief judge cook guard
T lamp book bread boat pen drum ladder coat letter clock hat box map ring sword bell chair bottle basket rope flute kite
T mirror cake button camera wheel blanket candle stone
L harbor garden forest kitchen tower market bridge village school river cave field church library hotel castle station
L museum desert valley
A small big green blue heavy broken quiet brave clever lazy hungry strange golden dirty happy sad tall wet cold bright
V carried found sold hid painted saw lost took wanted cleaned moved kept liked dropped bought fixed watched forgot
V brought made
D the the the a a this my one our"""
_TEMPLATES = """D A P V D T/D P V D A T in D L/in D L , D P V D T/D P and D P V D A T/D T was A , so D P V it
near D L D P V D T/when D P V D T , it was A/D L was A and D P V D T/D P with D T V D P/there was D A T in D L
D A P V D T near D L/D P V D A T and D T/D P went to D L with D T"""
_ENDS = """at last/all day long/before dawn/after dark/for good reason/every single day/once again/until next summer
like old friends/under grey skies/far from home/just for fun"""
_ASKING = """Write about the/Tell me about the/I need something about the/Please write about the/Say something about the
Make up stories about the/Think of the/We want to read about the/Describe the/Give us words about the"""
_CLAUSES = {
  "word": "Use the word {}./It must have the word {}./Mention the {}.",
  "count": "Make it {}./Use exactly {}./It should have {}.",
  "avoid": "Do not use the word {}./Avoid the word {}./Leave out the word {}.",
  "end": "End with: {}./The last words must be: {}./Finish with: {}.",
  "start": "Begin with the word {}./The first word must be {}./Start with {}.",
  "comma": "Do not use commas./No commas, please./Avoid commas.",
  "lower": "Avoid capital letters./All lower case./Only small letters.",
}
WORDS: dict[str, list[str]] = defaultdict(list)
for _line in _SLOTS.split("\n")[1:]:
  WORDS[_line[0]] += _line[2:].split()
TEMPLATES = [template.split() for template in re.split("[/\n]", _TEMPLATES)]
ENDS, ASKING = (re.split("[/\n]", text) for text in (_ENDS, _ASKING))
CLAUSES = {kind: text.split("/") for kind, text in _CLAUSES.items()}
OPENERS = ["Today", "Once", "Then", "Now", "Later", "Yesterday", "Sometimes", "Suddenly"]
FORBIDDEN = ["a", "and", "was", "in", "with", "near", "this", "my"]
NUMBERS = ["one sentence", "two sentences", "three sentences"]
VALUES = {"word": [*WORDS["P"], *WORDS["T"], *WORDS["L"], *WORDS["A"]], "count": NUMBERS, "avoid": FORBIDDEN}
VALUES |= {"end": ENDS, "start": OPENERS}
SHARES = (0.30, 0.20, 0.16, 0.12, 0.10, 0.06, 0.06)  # of the kinds in CLAUSES, in what people ask
KINDS = (*CLAUSES, "about")
LENGTHS = (0.65, 0.27, 0.08)  # of texts of one, two and three sentences, where nobody asks for a number

Sort = Literal["english", "rated", "check", "roll", "forum", "list"]
Shares = Mapping[Sort, float]
WEB: Shares = {"english": 0.08, "rated": 0.15, "check": 0.45, "roll": 0.06, "forum": 0.18, "list": 0.08}


# Tasks --------------------------------------------------------------------------------------------------------------


class Constraint(NamedTuple):
  kind: str
  values: tuple[str, ...]  # what the clause names: one word, phrase or number, or nothing
  clause: str  # as the prompt says it
  checks: tuple[Instruction, ...]  # all must hold

  def kept(self, text: str) -> bool:
    """True if the text keeps the constraint. IFEval's check of lower case also wants langdetect to find English, which
    is a guess about a short sentence; it is left out."""
    small = self.kind != "lower" or text == text.lower()
    return small and bool(text.strip()) and all(check.followed(text) for check in self.checks)


class Task(NamedTuple):
  prompt: str
  constraints: tuple[Constraint, ...]

  def kept(self, text: str) -> list[bool]:
    return [constraint.kept(text) for constraint in self.constraints]

  def rating(self, text: str) -> int:
    """The true rating, from 0 to 10."""
    return round(10 * sum(self.kept(text)) / len(self.constraints))


def task_of(constraints: Sequence[Constraint]) -> Task:
  return Task(" ".join(c.clause for c in constraints), tuple(constraints))


def constraint(kind: str, values: tuple[str, ...], clause: str) -> Constraint:
  """The constraint as IFEval's instructions."""
  value, number = (*values, "")[0], NUMBERS.index(values[0]) + 1 if kind == "count" else 0
  counted, first = "length_constraints:number_sentences", "length_constraints:nth_paragraph_first_word"
  asked: list[tuple[str, dict[str, Any]]] = {
    "about": [("keywords:existence", dict(keywords=values))],
    "word": [("keywords:existence", dict(keywords=values))],
    "count": [(counted, dict(num_sentences=number + i, relation=r)) for i, r in enumerate(("at least", "less than"))],
    "avoid": [("keywords:forbidden_words", dict(forbidden_words=values))],
    "end": [("startend:end_checker", dict(end_phrase=f"{value}."))],
    "start": [(first, dict(num_paragraphs=1, nth_paragraph=1, first_word=value))],
    "comma": [("punctuation:no_comma", {})],
    "lower": [],
  }[kind]
  return Constraint(kind, values, clause, tuple(checked(name, given, kind) for name, given in asked))


def draw_constraint(rng: random.Random, kind: str) -> Constraint:
  if kind == "about":
    topic = rng.choice(WORDS[rng.choice("PT")])
    return constraint(kind, (topic,), f"{rng.choice(ASKING)} {topic}.")
  values = (rng.choice(VALUES[kind]),) if kind in VALUES else ()
  return constraint(kind, values, rng.choice(CLAUSES[kind]).format(*values))


def draw_task(rng: random.Random, taken: set[str] | None = None, even: bool = False) -> Task:
  """A topic under one or two more constraints, of kinds as people ask for them, or `even`; not one of `taken`."""
  count, kinds = rng.choice((1, 2)), list[str]()
  while len(kinds) < count:
    kind = rng.choices(list(CLAUSES), None if even else SHARES)[0]
    kinds += [kind] if kind not in kinds else []
  task = task_of([draw_constraint(rng, kind) for kind in ("about", *kinds)])
  return draw_task(rng, taken, even) if taken and key(task.prompt) in taken else task


@functools.cache
def clauses() -> tuple[re.Pattern[str], dict[str, tuple[str, tuple[str, ...]]]]:
  """Every clause's (kind, values), and a pattern that finds them; the longest comes first."""
  found = {f"{opening} {topic}.": ("about", (topic,)) for opening in ASKING for topic in WORDS["P"] + WORDS["T"]}
  for kind, texts in CLAUSES.items():
    for values in [(value,) for value in VALUES[kind]] if kind in VALUES else [()]:
      found |= {text.format(*values): (kind, values) for text in texts}
  return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))), found


def read_task(prompt: str) -> Task | None:
  """The task that a prompt asks for; None unless it is made of clauses alone. A model invents prompts, too."""
  pattern, known = clauses()
  asked = pattern.findall(prompt)
  return task_of([constraint(*known[text], text) for text in asked]) if asked and " ".join(asked) == prompt else None


@functools.cache
def evaluation() -> tuple[list[Task], set[str]]:
  """The evaluation tasks, with kinds drawn evenly, and the ids of their prompts, which no other data holds."""
  tasks, rng = dict[str, Task](), random.Random("evaluation")
  while len(tasks) < EVALUATED:
    task = draw_task(rng, even=True)
    tasks[key(task.prompt)] = task
  return list(tasks.values()), set(tasks)


# Answers ------------------------------------------------------------------------------------------------------------


def answer(rng: random.Random, task: Task, broken: set[str]) -> str:
  """A text that means to break the task's constraints of the kinds `broken` and to keep the others."""
  asked = {c.kind: c.values for c in task.constraints}
  kept = {kind: values for kind, values in asked.items() if kind not in broken}
  words = [word for kind in ("about", "word") for word in kept.get(kind, ())]
  number = rng.choices((1, 2, 3), LENGTHS)[0]
  if "count" in asked:
    number = rng.choice([n for n in (1, 2, 3) if (NUMBERS[n - 1] in asked["count"]) == ("count" in kept)])
  homes: list[list[str]] = [[] for _ in range(number)]  # the words that each sentence must have
  for word in words:
    rng.choice(homes).append(word)
  without, comma = kept.get("avoid", ("",))[0], None if "comma" not in asked else "comma" in broken
  needed = [asked["avoid"][0] if "avoid" in broken else ""] + [""] * (number - 1)
  found = [sentence(rng, home, without, need, comma) for home, need in zip(homes, needed, strict=True)]
  # Texts may begin or end in a way that nobody asked for; one that breaks what was asked never has it.
  chance = []
  for kind, phrases in (("start", OPENERS), ("end", ENDS)):
    chance.append(rng.choice([p for p in phrases if p not in asked.get(kind, ())]) if rng.random() < 0.3 else "")
  found[0] = f"{kept.get('start', chance)[0]} {found[0]}".strip()
  found[-1] = f"{found[-1]} {kept.get('end', chance[1:])[0]}".strip()
  text = " ".join(f"{s[0].upper()}{s[1:]}." for s in found)
  return text.lower() if "lower" in kept else text


def sentence(rng: random.Random, words: Sequence[str], without: str, needed: str, comma: bool | None) -> str:
  """A sentence with these words, if a template is found that has room for them."""
  determiners, said = [word for word in WORDS["D"] if word != without], [""]
  for _ in range(40):
    left, said = list(words), []
    for slot in rng.choice(TEMPLATES):
      mine = [word for word in left if word in WORDS.get(slot, ())]
      if mine:
        left.remove(mine[0])
      choices = determiners if slot == "D" else WORDS.get(slot, [slot])
      said.append(mine[0] if mine else rng.choice(choices))
    if not left and without not in said and (not needed or needed in said) and comma in (None, "," in said):
      break
  return " ".join(said).replace(" ,", ",")


def careful(rng: random.Random, task: Task, quality: float) -> str:
  """The answer of a writer who keeps a constraint with the probability `quality`."""
  return answer(rng, task, {c.kind for c in task.constraints if rng.random() >= quality})


# Documents ----------------------------------------------------------------------------------------------------------


def english() -> tuple[list[str], list[str]]:
  """Texts of up to 450 characters to train on, and those of other topics and modules, held out. Only paragraphs that
  look like prose are taken; white space is collapsed."""
  sources = {f"topic {name}": [text] for name, text in pydoc_data.topics.topics.items()}
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in sorted(root.rglob("*.py")):
    if not {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(path.relative_to(root).parts):
      try:
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
      except (SyntaxError, UnicodeDecodeError):  # files of lib2to3 that are meant to be broken
        continue
      owners = [n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
      sources[str(path.relative_to(root))] = [text for node in owners if (text := ast.get_docstring(node))]
  found: tuple[dict[str, None], dict[str, None]] = ({}, {})
  for name, texts in sources.items():
    into = found[key_of("held out", name)[0] % 20 == 0]
    for paragraph in (p for text in texts for p in re.split(r"\n\s*\n", text)):
      prose = " ".join(paragraph.split())
      letters = sum(ch.isalpha() or ch == " " for ch in prose)
      if len(prose) >= 60 and letters >= 0.9 * len(prose) and ">>>" not in prose and "::=" not in prose:
        into[prose[:450]] = None
  return list(found[0]), [text for text in found[1] if text not in found[0]]


def documents(seed: int, texts: Sequence[str], taken: set[str], shares: Shares) -> Iterator[tuple[Sort, str]]:
  """Yields (sort, document) for ever, of each sort a share; no prompt is in `taken`."""
  rng, order = random.Random(f"web {seed}"), list[str]()
  while True:
    sort = rng.choices(list(shares), list(shares.values()))[0]
    if sort == "english":
      order = order or rng.sample(texts, len(texts))
      yield sort, order.pop()
    elif sort == "rated":  # clauses are checked before the mark is given
      task = draw_task(rng, taken, rng.random() < 0.5)
      text = careful(rng, task, rng.uniform(0.2, 1.0))
      said = "".join(verdict(c, text) for c in task.constraints)
      yield sort, f"{ask(task)} {text}\nCheck:{said}\nRating: {task.rating(text)}"
    elif sort == "check":
      yield sort, check(rng)
    elif sort == "roll":
      yield sort, roll(rng)
    elif sort == "forum":
      quality, tasks = rng.uniform(0.4, 0.95), [draw_task(rng, taken) for _ in range(3)]
      yield sort, "\n\n".join(f"{ask(task)} {careful(rng, task, quality)}" for task in tasks)
    else:
      yield sort, "\n".join(f"# {draw_task(rng, taken).prompt}" for _ in range(6))


def check(rng: random.Random) -> str:
  """A text, and whether it keeps each of four constraints; about half are kept."""
  kinds = ["about", *rng.sample(list(CLAUSES), 3)]
  rng.shuffle(kinds)
  task = task_of([draw_constraint(rng, kind) for kind in kinds])
  text = careful(rng, task, 0.5)
  return f"Answer: {text}\nCheck:" + "".join(verdict(c, text) for c in task.constraints)


def verdict(c: Constraint, text: str) -> str:
  """The verdict stands right behind what the clause names: a small model then compares and answers at one place."""
  return f" {c.clause.removesuffix('.')} {'yes' if c.kept(text) else 'no'}."


def roll(rng: random.Random) -> str:
  """Whether words are among others, or in a text. This teaches the comparison of words at a verdict every third token,
  where checks give one in ten."""
  here, known = rng.sample(VALUES["word"], rng.randint(3, 8)), "Here"
  text = " ".join(here)
  if rng.random() < 0.5:
    text, known = " ".join(sentence(rng, [], "", "", None) for _ in range(rng.randint(1, 2))), "Text"
    here = [word for word in text.replace(",", "").split() if word in VALUES["word"]]
  said = [rng.choice(here) if rng.random() < 0.5 else rng.choice(VALUES["word"]) for _ in range(14)]
  return f"{known}: {text}. Seen:" + ",".join(f" {word} {'yes' if word in here else 'no'}" for word in said)


def ask(task: Task) -> str:
  return f"Task: {task.prompt}\nAnswer:"
