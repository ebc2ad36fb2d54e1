"""What the page's part on the pool shows: drafts kept and dropped, contamination, clusters and use by the rounds."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from alma_jax.report import charts, numbers, wording
from alma_jax.report.charts import ChartBar, Figure
from alma_jax.report.numbers import Facts
from alma_jax.report.wording import Table
from alma_jax.store import layout


@dataclasses.dataclass(frozen=True)
class Contamination:
  """What evaluation prompts share with what the models learn from."""

  table: Table
  prompts: int  # evaluation prompts
  short: int  # of these, with fewer words than `ngram`
  ngram: int
  examples: Table | None


@dataclasses.dataclass(frozen=True)
class Clusters:
  chart: Markup
  clusters: int
  prompts: int
  median: float
  largest: int
  single: int
  balance: float | None
  projection: Mapping[str, Any]  # its counts; {} without one
  inertia: Figure | None


@dataclasses.dataclass(frozen=True)
class PoolSection:
  chart: Markup
  added: Table | None
  near_duplicates: Table | None
  contamination: Contamination | None
  clusters: Clusters | None
  used: Table | None


def pool(facts: Facts) -> PoolSection | None:
  pools = layout.pools(facts.run)
  drafts, entered = (
    {r: m for r in pools if (m := facts.manifest(layout.pool_stage(r, artefact)))}
    for artefact in (layout.DRAFTS, layout.PROMPTS)
  )
  if not drafts:
    return None
  drawn, kept = collections.Counter(), collections.Counter()
  for sums, manifests in ((drawn, drafts), (kept, entered)):
    for m in manifests.values():
      sums.update(m["counts"])
  sizes = {r: m["rows"] for r, m in entered.items()}
  steps = {"drawn": drawn["draws"]}
  steps |= {f"− {wording.words(k)}": n for k, n in drawn.items() if k not in ("draws", "usable") and n}
  steps |= {f"− {wording.words(k)}": n for k, n in kept.items() if k != "unique" and n}
  steps |= {"in the pool": sum(sizes.values())} if sizes else {}
  most = drawn["draws"] or 1
  added = None
  if len(sizes) > 1:
    draws = {r: drafts[r]["counts"]["draws"] for r in sizes}
    rows = [
      [f"round {r}" if r else "at first", f"{draws[r]:,}", f"{n:,}", wording.share(n / max(1, draws[r]))]
      for r, n in sizes.items()
    ]
    added = Table(["", "drawn", "new in the pool", "share"], rows)
  reports = {r: numbers.stage_report(facts.run, layout.pool_stage(r, layout.PROMPTS)) or {} for r in entered}
  return PoolSection(
    charts.bars([ChartBar(step, n, f"{n:,} ({n / most:.1%})") for step, n in steps.items()]),
    added,
    _near_duplicates(reports),
    _contamination(reports, facts.config.get("prompts", {}).get("ngram", 8)),
    _clusters(facts),
    _used(facts.manifests(layout.PROMPTS), sizes),
  )


def _near_duplicates(reports: Mapping[int, dict[str, Any]]) -> Table | None:
  """Near-duplicates that were removed, the least similar first."""
  found = [example for report in reports.values() for example in report.get("near_duplicates", [])]
  found.sort(key=lambda x: x["similarity"])
  cells = [
    [wording.cut(x["removed"]), wording.cut(x["kept"]), wording.words(x["near"]), f"{x['similarity']:.3f}"]
    for x in found
  ]
  return (
    Table(["removed", "like this one, which stays", "of what kind", "similarity"], cells, text=3) if cells else None
  )


def _contamination(reports: Mapping[int, dict[str, Any]], ngram: int) -> Contamination | None:
  rows, examples, first = [], [], None
  for r, report in reports.items():
    for name, found in report.get("contamination", {}).items():
      if r and name != "pool":
        continue  # the human data is the same in every round
      first = first or found
      told = f"pool, added for round {r}" if r else name if name == "pool" else f"{name}s"
      rows.append([told, *(f"{found[key]:,}" for key in ("prompts_met", "equal", "overlapping"))])
      examples += [[told, *(wording.cut(x[key]) for key in ("prompt", "text", "run"))] for x in found["examples"]]
  if first is None:
    return None
  table = Table(["in", "evaluation prompts met", "equal texts", f"texts with {ngram} words in common"], rows)
  head = ["in", "evaluation prompt", "text", "in common"]
  return Contamination(table, first["prompts"], first["short"], ngram, Table(head, examples, 4) if examples else None)


def _clusters(facts: Facts) -> Clusters | None:
  sizes = numbers.cluster_sizes(facts.run)
  if sizes is None or not len(sizes):
    return None
  report = numbers.stage_report(facts.run, layout.pool_stage(0, layout.CLUSTERS)) or {}
  projection = facts.manifest(layout.pool_stage(0, layout.PROJECTION)) or {"counts": {}}
  inertia = None
  if report.get("inertia"):
    means = [x / max(1, report["trained_on"]) for x in report["inertia"]]
    top = charts.ticks(0, max(means))[-1]
    said = f"Mean squared distance to the centroid, iteration by iteration: {means[0]:.3f} → {means[-1]:.3f}"
    inertia = Figure(charts.curve(range(1, len(means) + 1), means, top, 2, "inertia per iteration"), said)
  return Clusters(
    charts.bars(_size_bars(sizes), 2),
    clusters=len(sizes),
    prompts=int(sizes.sum()),
    median=float(np.median(sizes)),
    largest=int(sizes.max()),
    single=int((sizes == 1).sum()),
    balance=report.get("balance"),
    projection=projection["counts"],
    inertia=inertia,
  )


def _size_bars(sizes: np.ndarray) -> list[ChartBar]:
  """How many clusters have 1, 2, 3 to 4, 5 to 8, ... prompts."""
  rows, high = [], 1
  while not rows or high // 2 < sizes.max():
    low = high // 2 + 1
    count = int(((sizes >= low) & (sizes <= high)).sum())
    name = f"{high}" if high <= 2 else f"{low:,} to {high:,}"
    rows.append(ChartBar(f"{name} prompt{'s' * (high > 1)}", count, wording.plural(count, "cluster")))
    high *= 2
  return rows


def _used(used: Mapping[int, dict[str, Any]], sizes: Mapping[int, int]) -> Table | None:
  """Round by round. `sizes` are of what came into the pool before the rounds, 0, or with one of them."""
  if not used or not sizes:
    return None
  rows, before = [], 0
  for r, m in used.items():
    there = sum(n for since, n in sizes.items() if since <= r)
    before += m["rows"]
    rows.append([f"{r}", *(f"{n:,}" for n in (there, m["rows"], m["counts"]["clusters_drawn"], there - before))])
  return Table(["round", "prompts in the pool", "prompts drawn", "from clusters", "prompts left"], rows)
