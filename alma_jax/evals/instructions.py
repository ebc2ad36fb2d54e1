"""The 25 kinds of instructions that IFEval (arXiv 2311.07911) checks by rule, as functions of the response.

  asked = checked("length_constraints:number_words", {"relation": "at least", "num_words": 100}, "set.jsonl, line 3")
  asked.followed(response)

A check's keyword parameters are the instruction's arguments in the set file. Verdicts are those of the official
checker, quirks included: keywords are regular expressions and match inside words, and a text whose language cannot be
told counts as right. One rule is ours: the official checker draws a letter at random where the set asks for one outside
a to z ("#"); here that character is counted.

The language of a text is langdetect's guess (the extra `alma_jax[ifeval]`), with a fixed seed: equal texts get equal
verdicts.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from alma_jax.errors import UserError
from alma_jax.evals import sentences

Relation = Literal["less than", "at least"]
Words = Sequence[str]
Check = Callable[..., bool]

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
SEED = 0


class InstructionError(UserError):
  """An instruction of a set that is none of the 25 kinds, or has wrong arguments."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  kind: str
  arguments: Mapping[str, Any]

  def followed(self, text: str) -> bool:
    """True if a response follows the instruction; an empty one follows none."""
    return bool(text.strip()) and KINDS[self.kind](text, **self.arguments)


def checked(kind: object, arguments: Mapping[str, Any], where: str) -> Instruction:
  """The instruction, or an InstructionError that begins with `where`. Arguments that are None count as absent."""
  if not isinstance(kind, str) or kind not in KINDS:
    near = "".join(f" Did you mean {name!r}?" for name in difflib.get_close_matches(str(kind), KINDS, n=1))
    raise InstructionError(f"{where}, field instruction_id_list: unknown kind of instruction {kind!r}.{near}")
  where = f"{where}, field kwargs of {kind}"
  given = {name: value for name, value in arguments.items() if value is not None}
  wanted = list(inspect.signature(KINDS[kind]).parameters.values())[1:]
  names = [parameter.name for parameter in wanted]
  missing, unknown = [n for n in names if n not in given], [n for n in given if n not in names]
  if missing or unknown:
    found = ", ".join(given) or "none"
    raise InstructionError(f"{where}: expected {', '.join(names) or 'no arguments'}; found {found}.")
  for parameter in wanted:
    value = given[parameter.name]
    if wrong := _not_of(parameter.annotation, value):
      raise InstructionError(f"{where}: {parameter.name} must be {wrong}, found {value!r:.60}.")
  return Instruction(kind, given)


def _not_of(annotation: object, value: object) -> str | None:
  """What a parameter of this type must be, where the value is not that."""
  number = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer() and value >= 0
  if annotation is int:
    return None if number else "a whole number, at least 0"
  if annotation is str:
    return None if isinstance(value, str) and value else "a text that is not empty"
  if annotation is Relation:
    return None if value in ("less than", "at least") else "'less than' or 'at least'"
  texts = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
  return None if texts and value else "a list of texts that is not empty"


# Keywords


def existence(text: str, keywords: Words) -> bool:
  return all(_pattern(word).search(text) for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
  return _compared(len(_pattern(keyword.strip()).findall(text)), relation, frequency)


def forbidden_words(text: str, forbidden_words: Words) -> bool:
  return not any(_pattern(word, r"\b").search(text) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
  return _compared(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


# Language and case


def response_language(text: str, language: str) -> bool:
  return language_of(text) in (language, None)


def english_capital(text: str) -> bool:
  return text.isupper() and language_of(text) in ("en", None)


def english_lowercase(text: str) -> bool:
  return text.islower() and language_of(text) in ("en", None)


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
  return _compared(len(sentences.capital_words(text)), capital_relation, capital_frequency)


# Length


def number_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
  return _compared(len(sentences.split(text)), relation, num_sentences)


def number_words(text: str, num_words: int, relation: Relation) -> bool:
  return _compared(len(re.findall(r"\w+", text)), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
  """Paragraphs stand between ***; only the first and the last may be empty."""
  parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
  return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
  """Paragraphs stand between empty lines; empty ones are not counted, but they have a number."""
  paragraphs = text.split("\n\n")
  count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
  if count != num_paragraphs or not 1 <= nth_paragraph <= count or not (nth := paragraphs[nth_paragraph - 1].split()):
    return False
  return re.split("[.,?!'\"]", nth[0].lstrip("'").lstrip('"'), maxsplit=1)[0].lower() == first_word.lower()


# Content and format


def number_placeholders(text: str, num_placeholders: int) -> bool:
  return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
  marker = postscript_marker.strip()
  known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
  return bool(re.search(known.get(marker) or marker.lower(), text.lower()))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
  stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
  return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
  return any(answer in text for answer in CONSTRAINED)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
  """*One* and **two** stars count; what has two counts for both where one star alone is found in it, too."""
  found = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
  return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
  return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) >= num_sections


def json_format(text: str) -> bool:
  text = text.strip()
  for fence in ("```json", "```Json", "```JSON", "```"):
    text = text.removeprefix(fence)
  try:
    json.loads(text.removesuffix("```").strip())
  except (ValueError, RecursionError):
    return False
  return True


def title(text: str) -> bool:
  return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


# Combinations, beginning, end, punctuation


def two_responses(text: str) -> bool:
  """Two different texts between ******; only the first and the last part may be empty."""
  parts = [part.strip() for part in text.split("******")]
  told = [part for part in parts if part]
  return all(parts[1:-1]) and len(told) == 2 and told[0] != told[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(text: str) -> bool:
  return "," not in text


KINDS: dict[str, Check] = {
  f"{group}:{check.__name__}": check
  for group, checks in {
    "keywords": (existence, frequency, forbidden_words, letter_frequency),
    "language": (response_language,),
    "length_constraints": (number_sentences, number_paragraphs, number_words, nth_paragraph_first_word),
    "detectable_content": (number_placeholders, postscript),
    "detectable_format": (
      number_bullet_lists,
      constrained_response,
      number_highlighted_sections,
      multiple_sections,
      json_format,
      title,
    ),
    "combination": (two_responses, repeat_prompt),
    "startend": (end_checker, quotation),
    "change_case": (capital_word_frequency, english_capital, english_lowercase),
    "punctuation": (no_comma,),
  }.items()
  for check in checks
}


def _compared(count: int, relation: Relation, threshold: int) -> bool:
  return count < threshold if relation == "less than" else count >= threshold


def _pattern(word: str, edge: str = "") -> re.Pattern[str]:
  """The keyword as a regular expression; one that is none ("C++") is taken as it is written."""
  try:
    return re.compile(f"{edge}{word}{edge}", re.IGNORECASE)
  except re.error:
    return re.compile(f"{edge}{re.escape(word)}{edge}", re.IGNORECASE)


# Languages


@functools.lru_cache(maxsize=4096)
def language_of(text: str) -> str | None:
  """langdetect's word for the language of a text; None where it has no features, as a text of capitals alone."""
  from langdetect import LangDetectException

  detector = detectors().create()
  detector.append(text)
  try:
    return detector.detect()
  except LangDetectException:
    return None


@functools.cache
def detectors() -> Any:
  """langdetect's factory, with our seed and no global state; an InstructionError where it is not installed."""
  try:
    from langdetect import detector_factory
  except ImportError:
    raise InstructionError(
      "IFEval's checks of languages need langdetect: pip install 'alma_jax[ifeval]' (or pip install langdetect)"
    ) from None
  factory = detector_factory.DetectorFactory()
  factory.load_profile(detector_factory.PROFILES_DIRECTORY)
  factory.set_seed(SEED)
  return factory
