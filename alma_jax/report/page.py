"""report.html: everything worth knowing about a run on one page that needs no network, and the table for the terminal.

`write(directory)` works at any moment, on an empty run as on a finished one; a picture appears once its data is
there. It only reads the run's files, never fails (it warns), and gives the same page for the same files.
`python -m alma_jax.tools.report RUNDIR` makes the page at any other time, also beside a live run.
"""

import collections
import html
import json
import logging
import pathlib
import sys

from alma_jax.report import charts, numbers
from alma_jax.report.style import STYLE
from alma_jax.store import shards

LENGTH_ALARM = 0.3  # |correlation| of score and length
MASS_ALARM = 0.9  # probability on the score tokens; below, the judge's template does not fit its model
FINISHED_ALARM = 0.9  # share of answers that end before the length limit
GROWTH_ALARM = 1.5  # of the answers' length since the first round
LOST = ("context_too_long", "prompts_too_long", "examples_too_long", "dropped_without_target")  # counts worth a note
SHOWN = 1500  # characters of a text in an example
_logger = logging.getLogger(__name__)


def write(directory):
  """Writes report.html and returns its path; None, with a warning, where that did not work."""
  directory, error = pathlib.Path(directory), sys.exception()
  path = directory / "report.html"
  try:
    text = _page(directory, error)
    with shards.atomic(path) as file:
      file.write(text.encode())
  except Exception as e:  # the run's own error must stay the one that is seen
    _logger.warning("no report.html for %s: %s: %s", directory, type(e).__name__, e)
    return None
  return path


def summary(directory):
  """The rounds as a text table, the time they took and where the page is."""
  directory = pathlib.Path(directory)
  columns = (("score", "score"), ("judge", "judge_score"))
  rows = numbers.progress(directory)
  columns = [(title, name) for title, name in columns if any(name in row for row in rows)]
  head = ["round", f"{'checkpoint':<16}", f"{'n':>6}", *(f"{title:>15}" for title, _ in columns)]
  out = [" ".join([*head, " tokens", " finished"])]
  for row in rows:
    cells = [f"{row['round']:>5}", f"{row.get('checkpoint', ''):<16}", f"{row.get('n', ''):>6}"]
    cells += [f"{_plain(row, name):>15}" for _, name in columns]
    tokens, finished = row.get("tokens"), row.get("finished")
    cells.append(f"{'' if tokens is None else f'{tokens:.1f}':>7}")
    cells.append(f"{'' if finished is None else f'{finished:.1%}':>9}")
    out.append(" ".join(cells).rstrip())
  if not rows:
    out = ["no checkpoint has been evaluated yet"]
  seconds = sum(s.manifest.get("seconds", 0) for s in numbers.stages(directory) if s.manifest)
  page = directory / "report.html"
  out.append(f"all stages together {_duration(seconds)}" + (f"; report: {page}" if page.exists() else ""))
  return "\n".join(out)


def _page(directory, error):
  facts = _Facts(directory, error)
  sections = [
    _section("progress", "Progress", _progress, facts),
    _section("notes", "Notes", _notes, facts),
    _section("rounds", "Rounds", _rounds, facts),
    _section("selection", "Selection", _selection, facts),
    _section("length", "Length and the judge's scores", _length, facts),
    _section("judge", "Judge", _judge, facts),
    _section("pool", "Pool", _pool, facts),
    _section("training", "Training", _training, facts),
    _section("time", "Time", _time, facts),
    _section("examples", "Examples", _examples, facts),
    _section("data", "Data read and dropped", _data, facts),
    _section("config", "Config", _config, facts),
  ]
  links = "".join(f'<a href="#{name}">{title}</a>' for name, title, body in sections if body)
  body = "".join(f'<section id="{n}"><h2>{_e(t)}</h2>{text}</section>' for n, t, text in sections if text)
  title = f"{facts.config.get('recipe', 'run')} · {directory.resolve().name}"
  return (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
    f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
    f"{_head(facts)}<nav>{links}</nav>{body}</main></body></html>\n"
  )


class _Facts:
  """What several sections need, read once."""

  def __init__(self, directory, error):
    self.dir = directory
    self.config = numbers.config(directory)
    self.state = numbers.state(directory, error)
    self.stages = numbers.stages(directory)
    self.progress = numbers.progress(directory)
    self.rounds = numbers.rounds(directory)
    self.damage = []
    self.evals = self.per_round(numbers.evaluations)
    self.selected = self.per_round(numbers.trainset)
    self.judged = self.per_round(lambda d, r: numbers.judged(d, r, self.selected.get(r)))

  def per_round(self, read):
    """{round: what `read` finds}; what cannot be read becomes a note."""
    found = {}
    for r in self.rounds:
      try:
        value = read(self.dir, r)
      except Exception as e:
        self.damage.append(f"Round {r} cannot be read: {type(e).__name__}: {e}")
        continue
      if value is not None:
        found[r] = value
    return found

  def manifest(self, name):
    return next((s.manifest for s in self.stages if s.name == name), None)

  def round_manifests(self, name):
    manifests = {r: self.manifest(f"round_{r:02d}/{name}") for r in self.rounds}
    return {r: m for r, m in manifests.items() if m}


def _section(name, title, make, facts):
  """(name, title, body); a section that cannot be made says so and leaves the others alone."""
  try:
    return name, title, make(facts)
  except Exception as e:
    _logger.warning("report.html: section %s: %s: %s", title, type(e).__name__, e)
    return name, title, f'<p class="alarm">This part could not be made: {_e(type(e).__name__)}: {_e(e)}</p>'


def _head(facts):
  state, config = facts.state, facts.config
  words = {
    "finished": "finished",
    "running": "running",
    "failed": "failed",
    "stopped": "stopped before its end",
    "empty": "not begun",
  }
  reached = "" if state.round is None else f" · round {state.round}" + (f" of {state.rounds}" if state.rounds else "")
  model = config.get("model", {}).get("path", "")
  named = [config.get("recipe", "run").upper(), *([f"model {model}"] if model else [])]
  kinds = collections.Counter(state.start.get("devices", []))
  where = [f"{count} × {kind}" for kind, count in kinds.items()]
  where += [f"{state.start['hosts']} host{'s' * (state.start['hosts'] > 1)}"] if "hosts" in state.start else []
  where += [f"jax {state.start['jax']}"] if "jax" in state.start else []
  out = f"<header><h1>{_e(' · '.join(named))}</h1>"
  out += f'<p><span class="state {state.word}">{words[state.word]}</span>{reached}</p>'
  out += f'<p class="quiet">{_e(facts.dir)}' + "".join(f" · {_e(w)}" for w in where)
  out += f" · as of {_e(state.at.replace('T', ' ').replace('+00:00', ' UTC'))}" if state.at else ""
  out += "</p>"
  out += f'<pre class="alarm">{_e(state.error)}</pre>' if state.error else ""
  open_ = [s for s in facts.stages if s.manifest is None]
  doing = ", ".join(f"{s.name} ({numbers.done_so_far(s)})" for s in open_)
  out += f"<p>Not finished: {_e(doing)}</p>" if open_ else ""
  return out + "</header>"


def _progress(facts):
  shown = []
  for name, title, colour in (("score", "evaluator", 0), ("judge_score", "judge", 1)):
    points = [(row["round"], row[name], row.get(f"{name}_ci95")) for row in facts.progress if name in row]
    base = next((y for x, y, _ in points if x == 0), None)
    later = [p for p in points if p[0] > 0]
    if later:
      shown.append(charts.Line(f"{title} {later[-1][1]:.2f}", later, colour, base, f"base, {title} {base or 0:.2f}"))
  if not shown:
    return ""
  n = sorted({row.get("n", 0) for row in facts.progress})
  shots = facts.config.get("eval", {}).get("shots")
  based = ""
  if any(line.level is not None for line in shown):
    based = f" Dashed: the base model{f', {shots}-shot' if shots else ''}."
  return (
    charts.lines(shown, "round", "score")
    + f"<p class='quiet'>Mean score of the answers to {_range(n)} evaluation prompts, with 95 % intervals over the"
    f" prompts.{based} Round 1 is the initial SFT.</p>"
  )


def _rounds(facts):
  if not facts.progress:
    return ""
  main = "score" if any("score" in row for row in facts.progress) else "judge_score"
  present = [key for key in ("score", "judge_score") if any(key in row for row in facts.progress)]
  titles = {"score": "evaluator", "judge_score": "judge"}
  head = ["round", "checkpoint", "n", *(titles[k] for k in present), "− base", "− round before"]
  graded = "score" in present and "judge_score" in present
  head += ["judge ~ evaluator", "tokens", "characters", "finished"] if graded else ["tokens", "characters", "finished"]
  rows, before = [], None
  for row in facts.progress:
    r = row["round"]
    own, base = facts.evals.get(r), facts.evals.get(0)
    previous, before = before, own if r > 0 else before
    cells = [f"{r}", _e(row.get("checkpoint", "")), f"{row.get('n', '')}"]
    cells += [_e(_plain(row, name)) for name in present]
    cells.append(_mean(numbers.paired(own, base, main) if own and base and r > 0 else None, sign=True))
    cells.append(_mean(numbers.paired(own, previous, main) if own and previous else None, sign=True))
    if graded:
      cells.append(_mean(numbers.agreement(own) if own else None))
    cells.append(f"{row['tokens']:.1f}" if "tokens" in row else "")
    cells.append(f"{own['characters'].mean():.1f}" if own and len(own["characters"]) else "")
    cells.append(_share(row["finished"]) if "finished" in row else "")
    rows.append(cells)
  return (
    _table(head, rows, left=2)
    + "<p class='quiet'>Scores are means ± 95 % intervals over the n prompts. Differences (− base, − round before) are"
    f" of the {titles[main]}'s score, prompt by prompt: compare rounds by these, not by whether the intervals overlap."
    + (" judge ~ evaluator: correlation of the two scores over the prompts." if graded else "")
    + " Tokens and characters: mean length of an answer.</p>"
  )


def _selection(facts):
  manifests, sets = facts.round_manifests("judgments"), facts.round_manifests("trainset")
  if not manifests:
    return ""
  out = ""
  sampled = {r: m["counts"].get("histogram", {}) for r, m in manifests.items()}
  sampled = {r: [h.get(f"{s:02d}", 0) for s in range(11)] for r, h in sampled.items() if h}
  selected = {r: numbers.histogram([s for s, *_ in rows.values()]) for r, rows in facts.selected.items()}
  both = {r: (h, [int(x) for x in selected.get(r, [0] * 11)]) for r, h in sampled.items()}
  if both:
    top = max(count / max(1, sum(h)) for pair in both.values() for h in pair for count in h)
    figures = []
    for r, (h, s) in both.items():
      n, picked = manifests[r]["counts"].get("judged", sum(h)), facts.selected.get(r) or {}
      means = f"mean {manifests[r]['counts'].get('score_sum', 0) / max(1, n):.2f}"
      means += f" → {sum(x for x, *_ in picked.values()) / len(picked):.2f}" if picked else ""
      said = f"Round {r}: {n:,} responses, {len(picked):,} selected; {means}"
      figures.append(f"<figure>{charts.histogram(h, s, top)}<figcaption>{said}</figcaption></figure>")
    out += "<h3>Judge's scores: <span class='s6'>■ all responses</span>, <span class='s0'>■ the selected</span></h3>"
    out += f'<div class="grid">{"".join(figures)}</div>'
  head = ["round", "prompts", "responses", "selected", "not selected"]
  head += ["gain of selection", "best − second", "best tied"]
  rows = []
  for r, m in manifests.items():
    j, counts = facts.judged.get(r), dict(sets[r]["counts"]) if r in sets else {}
    counts.pop("judge_gain", None)
    kept = counts.pop("selected", None)
    prompts = facts.manifest(f"round_{r:02d}/prompts")
    rows.append(
      [
        f"{r}",
        f"{prompts['rows']:,}" if prompts else "",
        f"{m['rows']:,}",
        "" if kept is None else f"{kept:,}",
        _e(_reasons(counts)),
        _mean(j.gain if j else None, sign=True, n=True),
        _mean(j.margin if j else None),
        "" if j is None or j.tied is None else _share(j.tied),
      ]
    )
  out += _table(head, rows)
  out += "<p class='quiet'>Gain: judge's score of the selected response minus the mean over its prompt's responses. A"
  out += " best response is tied where another one to the prompt has the same score, as equal texts do.</p>"
  sources = {}
  for r, rows in facts.selected.items():
    counts = collections.Counter(_checkpoint(source) for _, source, _ in rows.values() if source)
    if counts:
      sources[r] = counts
  if sources:
    names = sorted({name for counts in sources.values() for name in counts}, key=lambda n: (n == _LATEST, n))
    bars = [(f"round {r}", counts, f"n = {sum(counts.values()):,}") for r, counts in sources.items()]
    out += "<h3>Which checkpoint wrote the selected responses</h3>" + charts.stacked(bars, names)
  return out


_LATEST = "policy of the round before"


def _checkpoint(source):
  return _LATEST if source.startswith("round_") else source


def _length(facts):
  if not facts.judged and not facts.evals:
    return ""
  drawn = []
  for name, colour, points in (
    ("sampled", 6, {r: j.length for r, j in facts.judged.items()}),
    ("selected", 0, {r: j.selected_length for r, j in facts.judged.items()}),
    ("answers, evaluation", 2, {r: numbers.mean(e["characters"]) for r, e in facts.evals.items()}),
  ):
    drawn.append(charts.Line(name, [(r, m.value, m.ci95) for r, m in points.items() if m], colour))
  out = charts.lines(drawn, "round", "characters", low=0)
  out += "<p class='quiet'>Mean length of a response, with 95 % intervals over prompts.</p>"
  if not facts.judged:
    return out
  head = ["round", "n", "score ~ length", "the same within prompts", "mass on the scores", "entropy, bits"]
  rows = []
  for r, j in facts.judged.items():
    n = f"{j.n:,}" + (f" of {j.total:,}" if j.n < j.total else "")
    correlations = [
      _alarmed(_mean(m), m and abs(m.value) > LENGTH_ALARM) for m in (j.correlation, j.correlation_within)
    ]
    mass = _alarmed(_mean(j.mass, digits=3), j.mass.value < MASS_ALARM)
    rows.append([f"{r}", n, *correlations, mass, _mean(j.entropy)])
  out += _table(head, rows)
  return out + (
    "<p class='quiet'>score ~ length: correlation of the judge's score with the number of characters, over all sampled"
    f" responses and around each prompt's means; beyond ± {LENGTH_ALARM} it is marked. Mass: the probability that the"
    f" judge gives to the eleven scores together; below {MASS_ALARM} its prompt template does not fit the model."
    " Entropy of its distribution over them: 0 to 3.46 bits. Intervals take the responses to a prompt together.</p>"
  )


def _judge(facts):
  tuned, distilled = facts.manifest("judge"), facts.manifest("judge_distilled")
  out = ""
  if tuned:
    c = tuned["counts"]
    out += f"<p>Fine-tuned on {c.get('annotations', 0):,} annotations in {c.get('steps', 0):,} steps;"
    out += f" {c.get('held_out', 0):,} more were held out.</p>"
  held = (distilled or {}).get("held_out")
  if held:
    change = held["after"] - held["before"]
    pairs = (("fine-tuned", held["before"]), ("distilled", held["after"]))
    rows = [(name, value, f"{value:.3f}") for name, value in pairs]
    accepted = distilled.get("accepted")
    verdict = "accepted: the rounds use it" if accepted else "not accepted: the rounds use the fine-tuned one"
    out += "<h3>Pairs of held-out annotations in the right order</h3>" + charts.bars(rows, 1)
    out += f"<p>The distilled judge ({distilled['counts'].get('pairs', 0):,} pairs) is <strong>{verdict}</strong>"
    out += f" ({_signed(change, 3)}, n = {held['rows']}).</p>"
  elif facts.config.get("judge", {}).get("kind") == "few_shot":
    out += "<p>The base model with three examples; nothing is trained.</p>"
  return out


def _pool(facts):
  pools = numbers.pools(facts.dir)
  drafts, entered = ({r: facts.manifest(f"{name}/{of}") for r, name in pools.items()} for of in ("drafts", "prompts"))
  if not any(drafts.values()):
    return ""
  drawn, kept = collections.Counter(), collections.Counter()
  for sums, manifests in ((drawn, drafts), (kept, entered)):
    for m in filter(None, manifests.values()):
      sums.update(m["counts"])
  rows = [("drawn", drawn["draws"])]
  rows += [(f"− {_words(k)}", v) for k, v in drawn.items() if k not in ("draws", "usable") and v]
  rows += [(f"− {_words(k)}", v) for k, v in kept.items() if k != "unique" and v]
  sizes = {r: m["rows"] for r, m in entered.items() if m}
  rows += [("in the pool", sum(sizes.values()))] if sizes else []
  most = rows[0][1] or 1
  out = charts.bars([(k, v, f"{v:,} ({v / most:.1%})") for k, v in rows])
  if len(sizes) > 1:
    out += "<h3>Prompts that were added</h3>"
    draws = {r: drafts[r]["counts"]["draws"] for r in sizes}
    name = lambda r: f"round {r}" if r else "at first"
    cells = [[name(r), f"{draws[r]:,}", f"{n:,}", _share(n / max(1, draws[r]))] for r, n in sizes.items()]
    out += _table(["", "drawn", "new in the pool", "share"], cells)
  reports = {r: found for r, name in pools.items() if (found := numbers.report(facts.dir, f"{name}/prompts"))}
  out += _near_duplicates(reports) + _contamination(reports, facts.config)
  out += _clusters(facts) + _used(facts.round_manifests("prompts"), sizes)
  return out


def _near_duplicates(reports):
  found = [example for report in reports.values() for example in report.get("near_duplicates", [])]
  if not found:
    return ""
  cells = [
    [_cut(x["removed"]), _cut(x["kept"]), _e(_words(x["near"])), f"{x['similarity']:.3f}"]
    for x in sorted(found, key=lambda x: x["similarity"])
  ]
  table = _table(["removed", "like this one, which stays", "of what kind", "similarity"], cells, left=3)
  return f"<details><summary>Near-duplicates: {len(found)} of them, the least similar first</summary>{table}</details>"


def _contamination(reports, config):
  """What evaluation prompts share with what the models learn from."""
  rows, examples = [], []
  for r, report in reports.items():
    for name, found in report.get("contamination", {}).items():
      if r and name != "pool":
        continue  # the human data is the same
      told = f"pool, added for round {r}" if r else name if name == "pool" else f"{name}s"
      rows.append([_e(told), *(f"{found[key]:,}" for key in ("prompts_met", "equal", "overlapping"))])
      examples += [(told, example) for example in found["examples"]]
  if not rows:
    return ""
  n = config.get("prompts", {}).get("ngram", 8)
  first = next(iter(next(iter(reports.values()))["contamination"].values()))
  out = "<h3>Evaluation prompts that occur elsewhere</h3>"
  out += _table(["in", "evaluation prompts met", "equal texts", f"texts with {n} words in common"], rows)
  out += f"<p class='quiet'>Of {first['prompts']:,} evaluation prompts {first['short']:,} have fewer than {n} words:"
  out += " these are found only where a text equals them. Equal prompts never enter the pool.</p>"
  if examples:
    cells = [[_e(told), _cut(x["prompt"]), _cut(x["text"]), _cut(x["run"])] for told, x in examples]
    out += "<details><summary>Examples</summary>"
    out += _table(["in", "evaluation prompt", "text", "in common"], cells, left=4) + "</details>"
  return out


def _clusters(facts):
  sizes = numbers.cluster_sizes(facts.dir)
  if sizes is None or not len(sizes):
    return ""
  out = "<h3>Sizes of the clusters</h3>" + charts.bars(_size_bars(sizes), 2)
  out += f"<p class='quiet'>{len(sizes):,} clusters of {int(sizes.sum()):,} prompts: median {_median(sizes):g}, largest"
  out += f" {int(sizes.max()):,}, of one prompt {int((sizes == 1).sum()):,}."
  report, projection = numbers.report(facts.dir, "pool/clusters") or {}, facts.manifest("pool/projection")
  if "balance" in report:
    out += f" Balance {report['balance']:.2f}: a prompt's cluster is that many times as large as the mean one."
  if projection and "variance_kept" in projection["counts"]:
    c = projection["counts"]
    out += f" Points have {c['dimensions']:,} dimensions with {_share(c['variance_kept'])} of the variance, as seen in"
    out += f" {c['sample']:,} prompts."
  out += "</p>"
  inertia = report.get("inertia")
  if inertia:
    means = [x / max(1, report["trained_on"]) for x in inertia]
    top = charts.ticks(0, max(means))[-1]
    curve = charts.curve([*range(1, len(means) + 1)], means, top, 2, "inertia per iteration")
    said = f"Mean squared distance to the centroid, iteration by iteration: {means[0]:.3f} → {means[-1]:.3f}"
    out += f"<div class='grid'><figure>{curve}<figcaption>{said}</figcaption></figure></div>"
  return out


def _used(used, sizes):
  """Round by round; `sizes` are of what came into the pool before the rounds, 0, or with one of them."""
  if not used or not sizes:
    return ""
  rows, before = [], 0
  for r, m in used.items():
    there = sum(n for since, n in sizes.items() if since <= r)
    before += m["rows"]
    clusters = m["counts"].get("clusters_drawn", 0)
    rows.append([f"{r}", f"{there:,}", f"{m['rows']:,}", f"{clusters:,}", f"{there - before:,}"])
  head = ["round", "prompts in the pool", "prompts drawn", "from clusters", "prompts left"]
  return "<h3>Used</h3>" + _table(head, rows)


def _size_bars(sizes):
  """Rows of a bar chart: how many clusters have 1, 2, 3-4, 5-8, ... prompts."""
  rows, high = [], 1
  while True:
    low = high // 2 + 1
    count = int(((sizes >= low) & (sizes <= high)).sum())
    name = f"{high}" if high <= 2 else f"{low:,} to {high:,}"
    rows.append((f"{name} prompt{'s' * (high > 1)}", count, f"{count:,} clusters"))
    if high >= sizes.max():
      return rows
    high *= 2


def _training(facts):
  found = [(s, curve) for s in facts.stages if (curve := numbers.losses(s))]
  found.sort(key=lambda x: x[0].name.startswith("round_"))  # stages made once come first
  tops = collections.defaultdict(float)
  for stage, (_, ys, _) in found:
    tops[_kind(stage.name)] = max(tops[_kind(stage.name)], *ys)
  figures = []
  for stage, (xs, ys, last) in found:
    examples = (stage.manifest or {}).get("counts", {}).get("examples")
    said = f"{_e(stage.name)}: {last.value:.3f} at the end (mean of {last.n} steps)"
    said += f"; {examples:,} examples" if examples else "; not finished" if stage.manifest is None else ""
    figure = charts.curve(xs, ys, tops[_kind(stage.name)] or 1.0, 1 if stage.name.startswith("judge") else 0)
    figures.append(f"<figure>{figure}<figcaption>{said}</figcaption></figure>")
  if not figures:
    return ""
  return f"<p class='quiet'>Loss per step.</p><div class='grid'>{''.join(figures)}</div>"


def _kind(name):
  """sft_1 -> sft, round_03/policy -> policy."""
  return name.rpartition("/")[2].rstrip("0123456789").rstrip("_")


def _time(facts):
  spent = collections.defaultdict(list)
  for stage in facts.stages:
    if stage.manifest:
      once, _, name = stage.name.rpartition("/")
      spent[f"rounds: {name}" if once.startswith("round_") else stage.name].append(stage.manifest.get("seconds", 0))
  if not spent:
    return ""
  total = sum(map(sum, spent.values()))
  rows = []
  for name, seconds in spent.items():
    said = f"{_duration(sum(seconds))} ({sum(seconds) / max(total, 1e-9):.0%})"
    rows.append((name, sum(seconds), said + (f", {len(seconds)} times" if len(seconds) > 1 else "")))
  return charts.bars(rows, 3) + f"<p>All finished stages together: {_duration(total)}.</p>"


def _examples(facts):
  out = ""
  for r, found in ((r, numbers.examples(facts.dir, r)) for r in facts.rounds):
    if not found:
      continue
    body = ""
    for x in found:
      asked = "\n\n".join(t["content"] if t["role"] == "user" else f"[{t['role']}] {t['content']}" for t in x.messages)
      body += f"<article><pre class='asked'>{_cut(asked)}</pre>"
      body += f"<p class='quiet'>selected of {x.responses} responses, judge {x.selected_score:.2f}</p>"
      body += f"<pre>{_cut(x.selected)}</pre>"
      body += f"<p class='quiet'>lowest, judge {x.worst_score:.2f}</p><pre>{_cut(x.worst)}</pre></article>"
    out += f"<details><summary>Round {r}: {len(found)} prompts, selected and lowest response</summary>{body}</details>"
  return out


def _data(facts):
  out, seeds = "", facts.manifest("seeds")
  files = {k: v for k, v in (seeds or {}).get("counts", {}).items() if isinstance(v, dict)}
  if files:
    names = list(dict.fromkeys(name for counts in files.values() for name in counts))
    cell = lambda counts, name: f"{counts[name]:,}" if name in counts else ""
    rows = [[_e(file), *(cell(counts, name) for name in names)] for file, counts in files.items()]
    out += _table(["file", *map(_words, names)], rows)
  rows = []
  for stage in facts.stages:
    if stage.manifest:
      m = stage.manifest
      counts = {k: v for k, v in m["counts"].items() if not isinstance(v, dict)}
      rows.append([_e(stage.name), f"{m['rows']:,}", _e(_reasons(counts)), _duration(m.get("seconds", 0))])
  if rows:
    out += "<details><summary>Every finished stage</summary>"
    out += _table(["stage", "records", "counts", "time"], rows) + "</details>"
  return out


def _config(facts):
  if not facts.config:
    return ""
  text = _e(json.dumps(facts.config, indent=2, ensure_ascii=False))
  return f"<details><summary>config.json</summary><pre>{text}</pre></details>"


def _notes(facts):
  """What to look at first; empty when nothing stands out."""
  notes = [_e(text) for text in dict.fromkeys(facts.damage)]
  mass = {r: f"{j.mass.value:.2f}" for r, j in facts.judged.items() if j.mass.value < MASS_ALARM}
  length = {r: _signed(value) for r, j in facts.judged.items() if (value := _length_alarm(j))}
  gain = {r: _signed(j.gain.value) for r, j in facts.judged.items() if j.gain and j.gain.value <= 0}
  cut = {row["round"]: f"{row['finished']:.0%}" for row in facts.progress if row.get("finished", 1.0) < FINISHED_ALARM}
  for found, section, said in (
    (mass, "length", "Little mass on the score tokens; the judge's template may not fit its model"),
    (length, "length", "The judge's scores correlate with length"),
    (gain, "selection", "Selection gains nothing by the judge's own scores"),
    (cut, "rounds", "Many evaluation answers hit the length limit; share that finished"),
  ):
    if found:
      where = ", ".join(f"round {r} {value}" for r, value in found.items())
      notes.append(f'<a href="#{section}">{said}</a>: {where}.')
  tokens = [(row["round"], row["tokens"]) for row in facts.progress if row["round"] > 0 and row.get("tokens")]
  if tokens and tokens[-1][1] > GROWTH_ALARM * tokens[0][1]:
    (first, short), (last, long) = tokens[0], tokens[-1]
    notes.append(
      f'<a href="#length">Answers grow</a>: {short:.1f} tokens in round {first}, {long:.1f} in round {last}.'
    )
  distilled = facts.manifest("judge_distilled")
  if distilled and distilled.get("accepted") is False:
    notes.append('<a href="#judge">The distilled judge is not used</a>: it agrees less with the held-out annotations.')
  for stage in facts.stages:
    counts = (stage.manifest or {}).get("counts", {})
    lost = {name: counts[name] for name in LOST if counts.get(name)}
    if "steps" in counts and counts.get("truncated"):  # of training examples; a sampled one is no loss
      lost["truncated"] = counts["truncated"]
    if lost:
      notes.append(f'<a href="#data">{_e(stage.name)}</a>: {_e(_reasons(lost))}.')
  return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>" if notes else ""


def _length_alarm(judged):
  """The larger of the two correlations with length where it is beyond the limit, or None."""
  values = [m.value for m in (judged.correlation, judged.correlation_within) if m and abs(m.value) > LENGTH_ALARM]
  return max(values, key=abs, default=None)


def _table(head, rows, left=1):
  """Cells are HTML; the first `left` columns are text, the others numbers."""
  kind = lambda i: "" if i < left else ' class="n"'
  top = "".join(f"<th{kind(i)}>{_e(title)}</th>" for i, title in enumerate(head))
  body = "".join("<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows)
  return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _mean(m, sign=False, digits=2, n=False):
  if m is None:
    return ""
  text = _signed(m.value, digits) if sign else _minus(f"{m.value:.{digits}f}")
  text += "" if m.ci95 is None else f" ± {m.ci95:.{digits}f}"
  return text + (f" (n = {m.n:,})" if n else "")


def _signed(value, digits=2):
  return _minus(f"{round(value, digits) + 0.0:+.{digits}f}")  # + 0.0: no minus before a zero


def _minus(text):
  return text.replace("-", "−")


def _plain(row, name):
  """A value of progress.csv with its interval."""
  if name not in row:
    return ""
  return f"{row[name]:.2f}" + (f" ± {row[f'{name}_ci95']:.2f}" if f"{name}_ci95" in row else "")


def _alarmed(cell, alarm):
  return f'<strong class="alarm">{cell}</strong>' if alarm and cell else cell


def _share(x):
  return f"{x:.1%}"


def _reasons(counts):
  return ", ".join(f"{_words(k)} {v:,.2f}" if isinstance(v, float) else f"{_words(k)} {v:,}" for k, v in counts.items())


def _words(name):
  return name.replace("_", " ")


def _range(values):
  return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _median(sizes):
  ordered, half = sorted(int(s) for s in sizes), len(sizes) // 2
  return ordered[half] if len(sizes) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _duration(seconds):
  if seconds < 120:
    return f"{seconds:.1f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cut(text):
  return _e(text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text) - SHOWN:,} more characters)")


def _e(text):
  return html.escape(str(text))
