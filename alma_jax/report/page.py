"""report.html: everything worth knowing about a run on one page that needs no network, and the table for the terminal.

  page.write("runs/mini")            makes runs/mini/report.html
  print(page.summary("runs/mini"))   the rounds as a text table

`write` works at any moment, on an empty run as on a finished one; a picture appears once its data is there. It only
reads the run's files, never fails (it warns), and gives the same page for the same files.
`python -m alma_jax.tools.report RUNDIR` makes the page at any other time, also beside a live run.
"""

import functools
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from alma_jax.errors import full_disk
from alma_jax.report import agreement, answers, choice, generated, graded, judges, numbers, pool, sections, wording
from alma_jax.store import layout, shards

HERE = pathlib.Path(__file__).parent
SECTIONS: dict[str, tuple[str, Callable[[numbers.Facts], Any]]] = {  # title and what gathers the content, in order
  "alarms": ("Alarms", lambda facts: judges.alarms(facts.stages)),
  "progress": ("Progress", sections.progress),
  "notes": ("Notes", sections.notes),
  "rounds": ("Rounds", sections.rounds),
  "choice": ("Choice of the epoch", choice.choice),
  "compared": ("Against other models", choice.compared),
  "generated": ("Generated pairs", generated.generated),
  "categories": ("Categories", generated.categories),
  "answers": ("Answers", answers.answers),
  "agreement": ("Agreement of the policy's own judgement", agreement.agreement),
  "selection": ("Selection", sections.selection),
  "length": ("Length and the judge's scores", sections.length),
  "judge": ("Judge", judges.judge),
  "pool": ("Pool", pool.pool),
  "training": ("Training", sections.training),
  "time": ("Time", sections.time),
  "examples": ("Examples", sections.examples),
  "data": ("Data read and dropped", sections.data),
  "config": ("Config", sections.config),
}
SCORED = ("progress", "rounds", "answers", "selection", "length", "examples")  # sections with the judge's scores
_logger = logging.getLogger(__name__)


class Section(NamedTuple):
  name: str  # its anchor, and its macro in page.html.j2
  title: str
  body: Markup
  judged: list[str]  # how good the judge is whose scores are in it


def write(directory: str | pathlib.Path) -> pathlib.Path | None:
  """Writes report.html and returns its path; None, with a warning, where that did not work."""
  directory, error = pathlib.Path(directory), sys.exception()
  path = directory / layout.PAGE
  try:
    text = _page(directory, error)
    with shards.atomic(path) as file:
      file.write(text.encode())
  except Exception as e:  # the run's own error must stay the one that is seen
    if error is None or full_disk(e) is None:  # a full disk is that error
      _logger.warning("no %s for %s: %s: %s", layout.PAGE, directory, type(e).__name__, e)
    return None
  return path


def write_comparison(path: pathlib.Path, title: str, sections: list[tuple[str, list[Any]]]) -> None:
  """Writes a page of titles with charts, tables and sentences below them."""
  css = Markup((HERE / "page.css").read_text(encoding="utf-8"))
  with shards.atomic(path) as file:
    file.write(wording.visible(_macros().comparison(title, sections, css)).encode())


def summary(directory: str | pathlib.Path) -> str:
  """The rounds as a text table, the time they took and where the page is."""
  directory = pathlib.Path(directory)
  rows, step = numbers.progress(directory), wording.step(numbers.config(directory))
  columns = graded.judges(rows)
  head = [f"{step:>5}", f"{'checkpoint':<16}", f"{'n':>6}", *(f"{name:>15}" for name in columns)]
  out = [" ".join([*head, " tokens", " finished"])]
  for row in rows:
    cells = [f"{row['round']:>{max(5, len(step))}}", f"{row.get('checkpoint', ''):<16}", f"{row.get('n', ''):>6}"]
    cells += [f"{wording.measured(row, name):>15}" for name in columns]
    tokens, finished = row.get("tokens"), row.get("finished")
    cells.append(f"{'' if tokens is None else f'{tokens:.1f}':>7}")
    cells.append(f"{'' if finished is None else f'{finished:.1%}':>9}")
    out.append(" ".join(cells).rstrip())
  if not rows:
    out = ["no checkpoint has been evaluated yet"]
  elif best := graded.best(directory):
    out.append(best.in_words(step))
  stages = layout.stages(directory)
  out += [f"judge: {judges.in_words(quality)}" for quality in judges.qualities(stages)]
  out += [f"alarm: {stage}: {sentence}" for stage, sentence in judges.alarms(stages)]
  seconds = sum(s.manifest.get("seconds", 0) for s in stages if s.manifest)
  page = directory / layout.PAGE
  out.append(f"all stages together {wording.duration(seconds)}" + (f"; report: {page}" if page.exists() else ""))
  return "\n".join(out)


def _page(directory: pathlib.Path, error: BaseException | None) -> str:
  facts = numbers.facts(directory, error)
  parts = [part for name in SECTIONS if (part := _section(name, facts))]
  title = f"{sections.recipe(facts)} · {directory.resolve().name}"
  return wording.visible(_macros().page(title, sections.head(facts), parts, Markup(css())))


def css() -> str:
  return (HERE / "page.css").read_text(encoding="utf-8")


def _section(name: str, facts: numbers.Facts) -> Section | None:
  """None while there is nothing to show. A section that fails says so and leaves the others alone."""
  title, gather = SECTIONS[name]
  title = title.replace("Rounds", f"{facts.step.capitalize()}s")
  try:
    content = gather(facts)
    if not content:
      return None
    told = [judges.in_words(q) for q in judges.qualities(facts.stages)] if name in SCORED else []
    return Section(name, title, getattr(_macros(), name)(content), told)
  except Exception as e:
    _logger.warning("%s: section %s: %s: %s", layout.PAGE, title, type(e).__name__, e)
    return Section(name, title, _macros().failed(f"{type(e).__name__}: {e}"), [])


@functools.cache
def _macros() -> Any:
  """The macros of page.html.j2 as functions that return Markup."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  for show in (wording.thousands, wording.share, wording.words, wording.cut, wording.duration, wording.signed):
    environment.filters[show.__name__] = show
  return environment.get_template("page.html.j2").module
