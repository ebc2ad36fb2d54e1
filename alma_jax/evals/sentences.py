"""Sentences and words of an English text as IFEval counts them.

  split("Ask Dr. Lee. He knows.")              # ["Ask Dr. Lee.", "He knows."]
  capital_words("NASA DIDN'T say")             # ["NASA", "DID", "N'T"]

The official checker counts sentences with NLTK's Punkt model (Kiss and Strunk, 2006), which learnt from newspapers. Its
rules are followed here with short lists instead of its 20,000 words; so "e.g." and "etc." end sentences, as they do
there, and "a.m." and "Dr." do not.
"""

import itertools
import re

ENDS = ".?!"
# A mark directly behind an end lets a sentence end there; a letter or digit ("3.5", "alma.py") does not.
_MARKS = "\\)\";}\\]*:@'({\\[‘’“”«»?!"
# A word begins with none of these; behind it stands a blank, a mark, a run of hyphens or periods, or a last comma.
_TOKEN = re.compile(
  rf"-{{2,}}|\.{{2,}}|(?![(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|[{_MARKS}]|-{{2,}}|\.{{2,}}|,(?:$|\s|[{_MARKS}]|--|\.\.))|\S"
)
_MARK = re.compile(f"[{_MARKS}]")
_RUN = re.compile(r"\S+")
_CLOSING = re.compile(r"[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)  # belongs to the sentence before it
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.?")


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


ABBREVIATIONS = _words(
  """mr mrs ms dr prof st jr sr gen col lt maj adm sen rep reps messrs inc ltd co corp bros cos cie jan feb aug sep sept
  oct nov dec tues wed fri vs a.m p.m u.s u.k u.n u.s.a u.s.s.r ph.d m.b.a d.c l.a n.y n.j n.c s.c n.d n.h n.m a.d a.s
  a.g ave ft mg yr ct ala ariz calif colo conn fla ga ill kan ky mich minn nev okla ore pa tenn va vt wash wis w.va s.a
  n.v s.p.a ok sw c d e f g h k l m n p r s t v w j.b j.c j.j j.k j.p j.r m.j r.a r.h r.j r.k r.t t.j w.c w.r w.w a.a
  a.c a.h a.t s.s h.m g.d"""
)
# Words that open a sentence even behind an abbreviation or an ellipsis, where they are capitalised.
STARTERS = _words(
  """according although among both but despite even he however i if in indeed instead it many meanwhile moreover most
  nevertheless nonetheless nor sales separately similarly since so some the there these they this though thus under when
  while yet"""
)
OPENERS = _words(
  """absolutely always anything ask asking assuming available aware because begin believe beyond briefly cause certainly
  check choose choosing complex concerned conclusion consider considering content course create creating currently dear
  deep define depending describe develop different difficult discover discuss does draw early eating encourage enjoy
  enough establish ever examples excellent explain explore exploring fact feeling finally follow furthermore
  grab happy hands healthy her here highly hold imagine implement important improve include increased inside install
  instructions introducing invest knowledge learn lies list listen looking make making moreover nothing okay onto
  opening otherwise overall perhaps person play please prepare pretty problem provide put question questions quickly
  reduced reflect regular relevant remember replace replacing reply right search seeing select serve simple simply
  slowly smile someone sometimes sorry sounds speak spread standing start starting step stress suddenly surely talk
  testing text thank thanks therefore think thinking thought through throughout tips together true truth try trying
  turn turning ultimately understand unfortunately unlike until upon using very virtual visiting waiting wear whatever
  whenever wherever whether which whichever whoever whose without wondering working writing yes your yourself"""
)
# Further words that are common in lower case: behind "Plan B." they open a sentence, and a name ("J. Bach") does not.
COMMON = _words(
  """a after all an and another any are as at be been before by can could did do each every everyone few first for from
  get give go had has have his how its just keep last let like look may maybe more much my need never new next no not
  now of often oh on once one only or other our out over people see she should take tell that their then to too two up
  use was we well were what where who why will with would you"""
)

NUMBERED = _words("international leisure review who")  # words that a number's period does not part from it


def split(text: str) -> list[str]:
  """The sentences of a text."""
  # Where sentences end and the next ones begin.
  runs = list(_RUN.finditer(text))
  cuts, start = [], 0
  for run, after in itertools.zip_longest(runs, runs[1:]):
    end = _last_end(run.group(), after is not None)
    if end is None:
      continue
    at_end = end + 1 == len(run.group())
    follows = after.group() if at_end and after else run.group()[end + 1]
    opens_line = len(run.group()) == 2 and not text[text.rfind("\n", 0, run.start()) + 1 : run.start()].strip()
    tokens = _TOKEN.findall(run.group()[: end + 1] + (" " if at_end else "") + follows)
    if any(_ends(token, following, opens_line) for token, following in itertools.pairwise(tokens)):
      cuts.append((start, run.start() + end + 1))
      start = after.start() if at_end and after else run.start() + end + 1
  cuts.append((start, len(text.rstrip())))
  # Closing quotes and brackets move to the sentence before them.
  found, moved = [], 0
  for (start, end), following in itertools.zip_longest(cuts, cuts[1:]):
    start += moved
    closing = following and _CLOSING.match(text[following[0] : following[1]])
    if following and closing:
      found.append(text[start : following[0] + len(closing.group().rstrip())])
      moved = closing.end()
    else:
      moved = 0
      if text[start:end]:
        found.append(text[start:end])
  return found


def _last_end(run: str, more: bool) -> int | None:
  """The place in a run of non-blanks of the last period, question or exclamation mark where a sentence may end."""
  for i in range(len(run) - 1, -1, -1):
    if run[i] in ENDS and (_MARK.match(run, i + 1) if i + 1 < len(run) else more):
      return i
  return None


def _ends(token: str, after: str, opens_line: bool) -> bool:
  """True if a sentence ends between two tokens. `opens_line`: the first one may be the letter of an outline, "A."."""
  if token in ENDS:
    return True
  upper, lower = after[0].isupper(), after[0].islower()
  word = after.lower().rstrip(".")
  if token.startswith(".."):
    return upper and (word in STARTERS or word in OPENERS)
  if not token.endswith(".") or token.endswith(".."):
    return False
  stem = token[:-1].lower()
  abbreviation = stem in ABBREVIATIONS or stem.rpartition("-")[2] in ABBREVIATIONS
  initial = len(token) == 2 and token[0].isalpha()
  if abbreviation and not initial:
    return upper and (word in STARTERS or word in OPENERS)
  number = _NUMBER.fullmatch(token)
  if (initial or number) and (lower or after in (*ENDS, ",", ";", ":")):
    return False
  if number and word in NUMBERED:
    return False
  if initial and upper and not (opens_line or word in STARTERS or word in OPENERS or word in COMMON):
    return False
  return not abbreviation


# Words

_APART = re.compile(r"[«“‘„»”’`\";@#$%&?!*\[\](){}<>]|--|\.{2,}|''|[:,](?!\d)")  # each is a token of its own
_QUOTE_BEFORE = re.compile(r"'(?!re|ve|ll|m|t|s|d|n)(\w)\b", re.IGNORECASE)  # 'a' but not 'Tis
_QUOTE_BEHIND = re.compile(r"([^'])' ")
_CONTRACTION = re.compile(r"([^' ])('[sSmMdD]|'|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ")
_TWO_WORDS = re.compile(
  r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim|lem)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(wan)(na)(?=\s)|\b(more)('n)\b"
  r"|(?<= )('t)(is|was)\b",
  re.IGNORECASE,
)


def capital_words(text: str) -> list[str]:
  """The words without a small letter, in the tokens of the Penn Treebank: "CAN'T" is CA and N'T."""
  text = _APART.sub(r" \g<0> ", f" {text} ")
  text = _QUOTE_BEHIND.sub(r"\1 ' ", _QUOTE_BEFORE.sub(r"' \1", text))
  text = _CONTRACTION.sub(r"\1 \2 ", text)
  text = _TWO_WORDS.sub(lambda match: " ".join(part for part in match.groups() if part), text)
  return [word for word in text.split() if word.isupper()]
