"""What each part of the page shows, gathered from the run's numbers; page.html.j2 has a macro of the same name for it.

A function returns None while its part has nothing to show. The pool's part is in `pool`.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from alma_jax.report import charts, graded, judged, numbers, wording
from alma_jax.report.charts import ChartBar, Figure, Line, Point, Shares
from alma_jax.report.graded import Grader
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Alarm, Table
from alma_jax.store import layout, statistics

LENGTH_ALARM = 0.3  # |correlation| of score and length
MASS_ALARM = 0.9  # probability on the score tokens; below, the judge's template does not fit its model
FINISHED_ALARM = 0.9  # share of answers that end before the length limit
GROWTH_ALARM = 1.5  # of the answers' length since the first round
LOST = ("context_too_long", "prompts_too_long", "examples_too_long", "dropped_without_target")  # counts worth a note
LATEST = "policy of the round before"
STATES = {
  "finished": "finished",
  "running": "running",
  "failed": "failed",
  "waiting": "waiting for a person",
  "stopped": "stopped before its end",
  "empty": "not begun",
}


@dataclasses.dataclass(frozen=True)
class HeadSection:
  title: str
  word: str  # the state's CSS class
  state: str
  reached: str
  where: list[str]
  error: str
  doing: list[str]


def head(facts: Facts) -> HeadSection:
  state, start = facts.state, facts.state.start
  reached = (
    "" if state.round is None else f"{facts.step} {state.round}" + (f" of {state.rounds}" if state.rounds else "")
  )
  model = facts.config.get("model", {}).get("path", "")
  named = [recipe(facts).upper(), *([f"model {model}"] if model else [])]
  where = [str(facts.run)]
  where += [f"{count} × {kind}" for kind, count in collections.Counter(start.get("devices", [])).items()]
  where += [wording.plural(start["hosts"], "host")] if "hosts" in start else []
  where += [f"jax {start['jax']}"] if "jax" in start else []
  where += [f"as of {state.at.replace('T', ' ').replace('+00:00', ' UTC')}"] if state.at else []
  doing = [f"{s.name} ({numbers.done_so_far(s)})" for s in facts.stages if s.manifest is None]
  return HeadSection(" · ".join(named), state.word, STATES[state.word], reached, where, state.error, doing)


def recipe(facts: Facts) -> str:
  return facts.config.get("recipe", "run")


@dataclasses.dataclass(frozen=True)
class Progress:
  charts: list[Markup]  # judges with one scale share one
  prompts: str
  base: str  # what round 0 is, if it is shown
  shots: int | None
  first: str  # what round 1 is


def progress(facts: Facts) -> Progress | None:
  shown: dict[str, list[Line]] = collections.defaultdict(list)
  zero = wording.base(facts.config)
  for colour, name in enumerate(graded.judges(facts.progress)):
    points = [Point(row["round"], row[name], row.get(f"{name}_ci95")) for row in facts.progress if name in row]
    base = next((p for p in points if p.x == 0), None)
    later = [p for p in points if p.x > 0]
    if later:
      grader = graded.grader(facts.run, name)
      scale = str(grader.scale if grader and grader.scale else name)
      said = f"{zero.removesuffix(' model')}, {name} {_with_interval(base)}" if base else ""
      shown[scale].append(Line(f"{name} {later[-1].y:.2f}", later, colour, base, said))
  if not shown:
    return None
  n = sorted({row["n"] for row in facts.progress if "n" in row})
  has_base = any(line.level is not None for lines in shown.values() for line in lines)
  shots = facts.config.get("eval", {}).get("shots")
  drawn = [charts.lines(lines, facts.step, "score") for lines in shown.values()]
  first = wording.FIRST.get(str(facts.config.get("recipe")), "")
  return Progress(drawn, wording.span(n) if n else "the", zero if has_base else "", shots, first)


def _with_interval(point: Point) -> str:
  return f"{point.y:.2f}" + ("" if point.ci95 is None else f" ± {point.ci95:.2f}")


@dataclasses.dataclass(frozen=True)
class Note:
  section: str | None  # what the linked words point to
  linked: str
  text: str


def notes(facts: Facts) -> list[Note]:
  """What to look at first; empty when nothing stands out."""
  found = [Note(None, "", text) for text in dict.fromkeys(facts.damage)]
  rounds = {r: x.judged for r, x in facts.rounds.items() if x.judged}
  mass = {r: f"{j.mass.value:.2f}" for r, j in rounds.items() if j.mass and j.mass.value < MASS_ALARM}
  length = {r: wording.signed(value) for r, j in rounds.items() if (value := length_alarm(j))}
  gain = {r: wording.signed(j.gain.value) for r, j in rounds.items() if j.gain and j.gain.value <= 0}
  cut = {row["round"]: f"{row['finished']:.0%}" for row in facts.progress if row.get("finished", 1.0) < FINISHED_ALARM}
  for values, section, said in (
    (mass, "length", "Little mass on the score tokens; the judge's template may not fit its model"),
    (length, "length", "The judge's scores correlate with length"),
    (gain, "selection", "Selection gains nothing by the judge's own scores"),
    (cut, "rounds", "Many evaluation answers hit the length limit; share that finished"),
  ):
    if values:
      found.append(Note(section, said, ": " + ", ".join(f"{facts.step} {r} {x}" for r, x in values.items()) + "."))
  tokens = [(row["round"], row["tokens"]) for row in facts.progress if row["round"] > 0 and row.get("tokens")]
  if tokens and tokens[-1][1] > GROWTH_ALARM * tokens[0][1]:
    (first, short), (last, long) = tokens[0], tokens[-1]
    text = f": {short:.1f} tokens in {facts.step} {first}, {long:.1f} in {facts.step} {last}."
    found.append(Note("length", "Answers grow", text))
  distilled = facts.manifest(layout.DISTILLED)
  if distilled and distilled.get("accepted") is False:
    text = f": {distilled.get('reason', 'it agrees less with the held-out annotations')}."
    found.append(Note("judge", "The distilled judge is not used", text))
  for stage in facts.stages:
    counts = (stage.manifest or {}).get("counts", {})
    lost = {name: counts[name] for name in LOST if counts.get(name)}
    if "steps" in counts and counts.get("truncated"):  # of training examples; a sampled one is no loss
      lost["truncated"] = counts["truncated"]
    if lost:
      found.append(Note("data", stage.name, f": {wording.counts(lost)}."))
  return found


def length_alarm(found: judged.Judged) -> float | None:
  """The larger of the two correlations with length where it is beyond the limit."""
  values = [m.value for m in (found.correlation, found.correlation_within) if m and abs(m.value) > LENGTH_ALARM]
  return max(values, key=abs, default=None)


@dataclasses.dataclass(frozen=True)
class Rounds:
  table: Table
  compared: str  # whose score the differences are of
  agreement: str  # "judge ~ truth"; empty if one judge alone graded
  graders: list[Grader]
  best: str
  others: Table | None  # the means on the other sets of prompts
  step: str
  base: str


def rounds(facts: Facts) -> Rounds | None:
  if not facts.progress:
    return None
  present = graded.judges(facts.progress)
  main = present[0] if present else layout.JUDGE
  agreement = f"{present[-1]} ~ {main}" if len(present) > 1 else ""
  head = [
    facts.step,
    "checkpoint",
    "n",
    *present,
    f"− {wording.base(facts.config).removesuffix(' model')}",
    f"− {facts.step} before",
  ]
  head += [*([agreement] if agreement else []), "tokens", "characters", "finished"]
  rows, before = [], None
  for row in facts.progress:
    r = row["round"]
    own, base = facts.answers.get(r), facts.answers.get(0)
    previous, before = before, own if r > 0 else before
    cells = [f"{r}", str(row.get("checkpoint", "")), f"{row.get('n', '')}"]
    cells += [wording.measured(row, name) for name in present]
    for other in (base if r > 0 else None, previous):
      cells.append(wording.mean(graded.difference(own, other, main) if own and other else None, sign=True))
    if agreement:
      cells.append(wording.mean(graded.agreement(own, present[-1], main) if own else None))
    cells.append(f"{row['tokens']:.1f}" if "tokens" in row else "")
    cells.append(f"{own.characters.mean():.1f}" if own and len(own.characters) else "")
    cells.append(wording.share(row["finished"]) if "finished" in row else "")
    rows.append(cells)
  graders = [found for name in present if (found := graded.grader(facts.run, name))]
  best = graded.best(facts.run)
  return Rounds(
    Table(head, rows, text=2),
    main,
    agreement,
    graders,
    best.in_words(facts.step) if best else "",
    _others(facts),
    facts.step,
    wording.base(facts.config).removesuffix(" model"),
  )


def _others(facts: Facts) -> Table | None:
  """The mean scores on the other sets of prompts, None where there is no other set."""
  sets = graded.sets(facts.progress)
  names = list(dict.fromkeys(name for chosen in sets for name in graded.judges(facts.progress, chosen)))
  rows = [
    [chosen, f"{row['round']}", f"{row[f'{chosen}/n']}", *(wording.measured(row, f"{chosen}/{name}") for name in names)]
    for chosen in sets
    for row in facts.progress
    if f"{chosen}/n" in row
  ]
  return Table(["set", facts.step, "n", *names], rows, text=1) if rows else None


@dataclasses.dataclass(frozen=True)
class SelectionSection:
  figures: list[Figure]
  table: Table
  graded: bool  # all responses of a prompt are trained on
  sources: Markup | None


def selection(facts: Facts) -> SelectionSection | None:
  manifests, sets = facts.manifests(layout.JUDGMENTS), facts.manifests(layout.TRAINSET)
  if not manifests:
    return None
  shown = {r: h for r, x in facts.rounds.items() if (h := x.histogram)}
  distributions = [counts for h in shown.values() for counts in (h.sampled, h.selected)]
  top = max((count / max(1, sum(counts)) for counts in distributions for count in counts), default=1.0)
  figures = []
  for r, h in shown.items():
    found, counts = facts.rounds[r], manifests[r]["counts"]
    mean = counts["score_sum"] / max(1, counts["judged"])
    said = f"{facts.step.capitalize()} {r}: {manifests[r]['rows']:,} responses"
    if found.selected:
      said += f", {found.selected.n:,} {'trained on' if found.selected.graded else 'selected'}"
    said += f"; mean {wording.number(mean, _digits(found))}"
    if found.selected and found.selected.scores:
      said += f" → {wording.number(found.selected.scores.value, _digits(found))}"
    figures.append(Figure(charts.histogram(h.names, h.sampled, h.selected, top or 1.0), said))
  head = [facts.step, "prompts", "responses", "prompts selected", "not selected"]
  head += ["gain of selection", "best − second", "best tied"]
  rows = []
  for r, m in manifests.items():
    found, counts = facts.rounds[r], dict(sets[r]["counts"]) if r in sets else {}
    for name in ("judge_gain", "judge_gain_sum", "prompts_kept"):  # other facts than why a prompt is left out
      counts.pop(name, None)
    kept, prompts = counts.pop("selected", None), facts.manifest(layout.stage_name(r, layout.PROMPTS))
    j, digits = found.judged, _digits(found)
    cells = [f"{r}", f"{prompts['rows']:,}" if prompts else "", f"{m['rows']:,}"]
    cells += ["" if kept is None else f"{kept:,}", wording.counts(counts)]
    cells.append(wording.mean(j.gain if j else None, sign=True, digits=digits, n=True))
    cells.append(wording.mean(j.margin if j else None, digits=digits))
    rows.append([*cells, "" if j is None or j.tied is None else wording.share(j.tied)])
  graded = any(x.selected.graded for x in facts.rounds.values() if x.selected)
  return SelectionSection(figures, Table(head, rows), graded, _sources(facts))


def _sources(facts: Facts) -> Markup | None:
  """Which checkpoints wrote the selected responses, round by round."""
  found = {}
  for r, x in facts.rounds.items():
    counts = collections.Counter()
    for source, n in (x.selected.sources if x.selected else {}).items():
      counts[source if layout.round_of(source) is None else LATEST] += n
    if counts:
      found[r] = counts
  if not found:
    return None
  names = sorted({name for counts in found.values() for name in counts} - {LATEST})
  names += [LATEST] if any(LATEST in counts for counts in found.values()) else []
  return charts.stacked([Shares(f"{facts.step} {r}", c, f"n = {sum(c.values()):,}") for r, c in found.items()], names)


def _digits(found: judged.Round) -> int:
  """Digits of a score after the point: more on a narrow scale."""
  return 3 if found.scale and found.scale[1] - found.scale[0] <= 2 else 2


@dataclasses.dataclass(frozen=True)
class Length:
  chart: Markup
  table: Table | None
  limit: float
  least_mass: float | None  # None if no judge gives probabilities
  most_entropy: float


def length(facts: Facts) -> Length | None:
  rounds = {r: x.judged for r, x in facts.rounds.items() if x.judged}
  if not rounds and not facts.answers:
    return None
  drawn = []
  for name, colour, means in (
    ("sampled", 6, {r: j.length for r, j in rounds.items()}),
    ("selected", 0, {r: x.length for r in rounds if (x := facts.rounds[r].selected)}),
    ("answers, evaluation", 2, {r: statistics.mean(x.characters) for r, x in facts.answers.items()}),
  ):
    drawn.append(Line(name, [Point(r, m.value, m.ci95) for r, m in means.items() if m], colour))
  chart = charts.lines(drawn, facts.step, "characters", low=0)
  if not rounds:
    return Length(chart, None, LENGTH_ALARM, None, 0.0)
  has_mass = any(j.mass for j in rounds.values())
  head = [facts.step, "n", "score ~ length", "the same within prompts"]
  head += ["mass on the scores", "entropy, bits"] if has_mass else []
  rows = []
  for r, j in rounds.items():
    cells = [f"{r}", f"{j.n:,}" + (f" of {j.total:,}" if j.n < j.total else "")]
    for m in (j.correlation, j.correlation_within):
      cells.append((Alarm if m and abs(m.value) > LENGTH_ALARM else str)(wording.mean(m)))
    if has_mass:
      cells.append((Alarm if j.mass and j.mass.value < MASS_ALARM else str)(wording.mean(j.mass, digits=3)))
      cells.append(wording.mean(j.entropy))
    rows.append(cells)
  most = max((j.most_entropy or 0.0 for j in rounds.values()), default=0.0)
  return Length(chart, Table(head, rows), LENGTH_ALARM, MASS_ALARM if has_mass else None, most)


def training(facts: Facts) -> list[Figure]:
  """A figure of every training's loss; the stages made once come first."""
  found = [(s, curve) for s in facts.stages if (curve := numbers.losses(s))]
  found.sort(key=lambda x: layout.round_of(x[0].name) is not None)
  tops = collections.defaultdict(float)
  for stage, curve in found:
    kind = layout.kind_of(stage.name)
    tops[kind] = max(tops[kind], *curve.losses)
  figures = []
  for stage, curve in found:
    counts, kind = (stage.manifest or {}).get("counts", {}), layout.kind_of(stage.name)
    said = f"{stage.name}: {curve.last.value:.3f} at the end (mean of {curve.last.n} steps)"
    said += "; not finished" if stage.manifest is None else ""
    said += f"; {counts['examples']:,} examples" if counts.get("examples") else ""
    colour = 1 if stage.name in (layout.JUDGE, layout.DISTILLED) else 0
    figures.append(Figure(charts.curve(curve.steps, curve.losses, tops[kind] or 1.0, colour), said))
  return figures


@dataclasses.dataclass(frozen=True)
class Time:
  chart: Markup
  total: float


def time(facts: Facts) -> Time | None:
  spent = collections.defaultdict(list)
  for stage in facts.stages:
    if stage.manifest:
      in_round = layout.round_of(stage.name) is not None
      name = f"{facts.step}s: {stage.name.rpartition('/')[2]}" if in_round else stage.name
      spent[name].append(stage.manifest.get("seconds", 0))
  if not spent:
    return None
  total, rows = sum(map(sum, spent.values())), []
  for name, seconds in spent.items():
    said = f"{wording.duration(sum(seconds))} ({sum(seconds) / max(total, 1e-9):.0%})"
    rows.append(ChartBar(name, sum(seconds), said + (f", {len(seconds)} times" if len(seconds) > 1 else "")))
  return Time(charts.bars(rows, 3), total)


@dataclasses.dataclass(frozen=True)
class ShownExample:
  asked: str
  shown: judged.Shown


@dataclasses.dataclass(frozen=True)
class ExamplesSection:
  title: str
  graded: bool
  examples: list[ShownExample]


def examples(facts: Facts) -> list[ExamplesSection]:
  out = []
  for r, x in facts.rounds.items():
    found = [ShownExample(wording.asked(shown.messages), shown) for shown in judged.examples(facts.run, r)]
    if found:
      out.append(ExamplesSection(f"{facts.step.capitalize()} {r}", x.selected is not None and x.selected.graded, found))
  return out


@dataclasses.dataclass(frozen=True)
class DataSection:
  files: Table | None
  stages: Table | None


def data(facts: Facts) -> DataSection | None:
  counts = (facts.manifest(layout.SEEDS) or {}).get("counts", {})
  files = {name: found for name, found in counts.items() if isinstance(found, dict)}
  read = None
  if files:
    names = list(dict.fromkeys(name for found in files.values() for name in found))
    rows = [[file, *(f"{found[name]:,}" if name in found else "" for name in names)] for file, found in files.items()]
    read = Table(["file", *map(wording.words, names)], rows)
  finished = [_stage_row(s.name, s.manifest) for s in facts.stages if s.manifest]
  stages = Table(["stage", "records", "counts", "time"], finished) if finished else None
  return DataSection(read, stages) if read or stages else None


def _stage_row(name: str, manifest: Mapping[str, Any]) -> list[str]:
  counts = {k: v for k, v in manifest["counts"].items() if not isinstance(v, dict)}
  return [name, f"{manifest['rows']:,}", wording.counts(counts), wording.duration(manifest.get("seconds", 0))]


def config(facts: Facts) -> str | None:
  return json.dumps(facts.config, indent=2, ensure_ascii=False) if facts.config else None
