"""Alarms: what looks degenerate though nothing failed. An alarm decides no result.

  stage.finish(alarms=lambda counts: alarms.cut_off(s.options.alarms, counts["truncated"], counts["samples"]))
  alarms.say(s.display, stage)

The sums of all parts decide, so no stage holds more than a part. An alarm is a name and a sentence: on the screen when
its stage is finished, in the stage's manifest, at the top of the report and at the end of the run.
"""

import dataclasses
import math

from alma_jax.options import Checked, option
from alma_jax.runtime.display import Display
from alma_jax.store.runs import Stage

Alarms = dict[str, str]  # name -> sentence
TEN = 10.0  # the width of the annotators' scale


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  """The bounds beyond which a stage raises an alarm."""

  spread: float = option(0.1, least=0, practical=True)  # least standard deviation of a judge's scores, of 0 .. 10
  entropy: float = option(0.95, least=0, practical=True)  # most entropy of a judge, as a share of the annotations' own
  length: float = option(0.6, least=0, most=1, practical=True)  # most |Spearman| of a judge's scores and the lengths
  cut_off: float = option(0.95, least=0, most=1, practical=True)  # most answers that hit the length limit, as a share
  selected: float = option(0.5, least=0, most=1, practical=True)  # least prompts that a trainset keeps, as a share
  alike: float = option(0.9, least=0, most=1, practical=True)  # most demonstrations with one response, as a share


def say(display: Display, stage: Stage) -> None:
  """Print the alarms of a stage that is just finished."""
  for sentence in stage.manifest.get("alarms", {}).values():
    display.say(f"alarm: {stage.name}: {sentence}")


def spread(o: Options, deviation: float, scale: tuple[float, float] | None) -> Alarms:
  """Whether a judge's scores hardly differ. The bound is for ten points; a judge's own scale stretches it."""
  bound = o.spread * ((scale[1] - scale[0]) / TEN if scale else 1.0)
  if deviation >= bound:
    return {}
  said = f"the judge's scores have a standard deviation of {deviation:.3g}, less than {bound:g}: it hardly tells"
  return {"spread": f"{said} responses apart"}


def entropy(o: Options, judge: float, annotations: float) -> Alarms:
  """Whether a judge answers every question with the distribution that all annotations have together."""
  if judge < o.entropy * annotations or not annotations:
    return {}
  return {
    "entropy": f"the judge's distributions have {judge:.2f} bits on average, those of the annotations' scores together"
    f" {annotations:.2f}: it may have learned which scores are frequent, and not what they are for"
  }


def length(o: Options, spearman: float | None) -> Alarms:
  if spearman is None or abs(spearman) <= o.length:
    return {}
  return {
    "length": f"Spearman's correlation of the judge's scores with the lengths is {spearman:+.2f}, beyond +-{o.length:g}"
  }


def cut_off(o: Options, cut: int, total: int) -> Alarms:
  if not total or cut <= o.cut_off * total:
    return {}
  return {
    "cut_off": f"{cut:,} of {total:,} answers ({cut / total:.1%}) were cut off at the length limit, which is more than"
    f" {o.cut_off:.0%}: raise max_new_tokens, or look whether the model has learned to stop"
  }


def selected(o: Options, kept: int, prompts: int) -> Alarms:
  if not prompts or kept >= o.selected * prompts:
    return {}
  return {
    "selected": f"{kept:,} of {prompts:,} prompts ({kept / prompts:.0%}) gave training data, which is less than"
    f" {o.selected:.0%}; the manifest's counts say why the others did not"
  }


def deviation(n: int, total: float, squares: float) -> float:
  """The standard deviation of n numbers from their sum and that of their squares."""
  return math.sqrt(max(0.0, squares / n - (total / n) ** 2)) if n else 0.0
