"""What `benchmarks.effects` measures of a seed's judges: pairs in the right order, and their choice among N samples.

Both are taken on samples of the seed's two initial SFT models (and, for pairs, of the base with three examples), which
are drawn anew to prompts of the results set; the run directory of the arm `default` gives the models.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from alma_jax import start
from alma_jax.engine.sample import Request
from alma_jax.judges.contract import Answered, Judge
from alma_jax.keys import key_of
from alma_jax.mini import world
from alma_jax.runtime import sampling
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.stages import data as human
from alma_jax.stages import evaluation, judge, policy
from alma_jax.store import layout
from alma_jax.store.data import SeedRow, load_examples
from alma_jax.store.handles import Data
from benchmarks import effects_arms
from benchmarks.effects_arms import SET, Base

MOST = 128  # samples to a prompt for the choice among N
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PAIRS_EACH, CHOICE_EACH = 2, 12  # one of so many results prompts


@dataclasses.dataclass(frozen=True)
class Graded:
  """An answer with its ground truth."""

  text: str
  truth: float
  finished: bool


@dataclasses.dataclass(frozen=True)
class Asked:
  """A prompt and its answers."""

  row: SeedRow
  answers: list[Graded]


def measured(base: Base, seed: int, work: pathlib.Path, size: str) -> dict[str, Any]:
  """Of each judge the pairs in the right order; of the run's judge the choice among N, for two ways to sample."""
  data_paths = effects_arms.data_files(base, seed, work / "data")
  default = effects_arms.ARMS[0]
  config = effects_arms.config_of(default, base, seed, data_paths, size)
  began = time.process_time()
  with start.open_session(config, work / default.name) as session:
    o = session.options
    data = human.build(session, o.data, [str(data_paths[SET])])
    jobs = [policy.Job(layout.sft_name(i), session.base, o.sft, s) for i, s in enumerate(o.sft_seeds, start=1)]
    sft = [policy.sft(session, job, data) for job in jobs]
    judges = judges_of(session, data, work / default.name)
    rows = load_examples(data_paths[SET], ())[0]
    asked = sampled(session, sft, rows[::PAIRS_EACH], 1, (1.0, 1.0))
    for x, by_base in zip(asked, answered_by_base(session, data, rows[::PAIRS_EACH]), strict=True):
      x.answers.append(by_base)
    found: dict[str, Any] = {"judges": {name: accuracy(judge_, asked) for name, judge_ in judges.items()}}
    temperature = o.responses.sampling.decoding.temperature
    for top_p in (o.responses.sampling.decoding.top_p, 1.0):
      drawn = sampled(session, sft, rows[::CHOICE_EACH], MOST // len(sft), (temperature, top_p))
      found[f"best_of_n, top_p {top_p:g}"] = {
        "distilled": best_of_n(judges["distilled"], drawn), "fine-tuned": best_of_n(judges["fine-tuned"], drawn)
      }  # fmt: skip
  return found | {"cpu_seconds": round(time.process_time() - began, 1)}


def judges_of(session: Session[Any], data: Data, run: pathlib.Path) -> dict[str, Judge]:
  """The paper's rows of Table 3. The distilled judge is measured whether the run took it or not."""
  o = session.options.judge
  tuned, few_shot = judge.finetuned(session, data, o), judge.few_shot(session, data, o)
  model = run / layout.DISTILLED / layout.MODEL
  return {
    "distilled": dataclasses.replace(tuned, checkpoint=Checkpoint(layout.DISTILLED, model, f"distilled {model}")),
    "fine-tuned": tuned,
    "fine-tuned, integer": dataclasses.replace(tuned, mode="integer"),
    "base 3-shot": few_shot,
    "base 3-shot, integer": dataclasses.replace(few_shot, mode="integer"),
  }


def sampled(
  session: Session[Any], writers: Sequence[Checkpoint], rows: Sequence[SeedRow], each: int, how: tuple[float, float]
) -> list[Asked]:
  """The rows with `each` answers of every writer, at `how` = (temperature, top_p)."""
  asker = evaluation.Asker(session, session.options.eval.template(), ())
  found = [Asked(row, []) for row in rows]
  prompts = [asker.ids(row) for row in rows for _ in range(each)]
  for writer in writers:
    keys = (key_of(session.options.seed, "effects", *how, writer.name, i) for i in range(len(prompts)))
    drawn = drafted(session, writer, list(map(Request, prompts, keys)), asker, how)
    for i, draft in enumerate(drawn):
      found[i // each].answers.append(graded(rows[i // each], draft))
  return found


def answered_by_base(session: Session[Any], data: Data, rows: Sequence[SeedRow]) -> list[Graded]:
  """One answer at temperature 1 of the base model, with examples, to every row."""
  o = session.options
  asker = evaluation.Asker(session, o.eval.template(), data.sft[: o.eval.shots])
  requests = [Request(asker.ids(row), key_of(o.seed, "effects", "base", i)) for i, row in enumerate(rows)]
  drawn = drafted(session, session.base, requests, asker, (1.0, 1.0))
  return [graded(row, draft) for row, draft in zip(rows, drawn, strict=True)]


def drafted(
  session: Session[Any], writer: Checkpoint, requests: list[Request], asker: evaluation.Asker, how: tuple[float, float]
) -> list[sampling.Draft]:
  options: sampling.Options = session.options.eval if asker.shots else session.options.responses.sampling
  decoding = dataclasses.replace(options.decoding, temperature=how[0], top_p=how[1])
  with session.display.bar("effects", len(requests), "answers") as bar:
    return sampling.drafts(
      session.host, writer, requests, dataclasses.replace(options, decoding=decoding), asker.stops, bar
    )


def graded(row: SeedRow, draft: sampling.Draft) -> Graded:
  return Graded(draft.text, world.truth(row.messages, draft.text, draft.finished), draft.finished)


def scores(judge_: Judge, answers: Iterable[tuple[SeedRow, Graded]]) -> np.ndarray:
  """float64 [answers]: the judge's scores."""
  pairs = [Answered(row.messages, a.text, a.finished) for row, a in answers]
  return np.array([verdict.score for verdict in judge_.scores(pairs)], np.float64)


def accuracy(judge_: Judge, asked: Sequence[Asked]) -> dict[str, float]:
  """The share of pairs of different worth that the judge orders rightly: a tie counts as wrong ("strict"), or half."""
  pairs = [
    (x.row, a, b)
    for x in asked
    for a, b in itertools.combinations(x.answers, 2)
    if a.truth != b.truth and a.text and b.text
  ]
  first = scores(judge_, [(row, a) for row, a, _ in pairs])
  second = scores(judge_, [(row, b) for row, _, b in pairs])
  margin = (first - second) * np.sign([a.truth - b.truth for _, a, b in pairs])
  return {
    "pairs": len(pairs),
    "strict": float((margin > 0).mean()),
    "half": float((margin > 0).mean() + (margin == 0).mean() / 2),
  }


def best_of_n(judge_: Judge, asked: Sequence[Asked]) -> dict[str, list[float]]:
  """The mean ground truth of the judge's choice among n samples, and of the truly best one, by n.

  The samples of a prompt are cut into disjoint groups of n, so that each is used once.
  """
  size = len(asked[0].answers)
  order = np.random.default_rng(0).permutation(size)  # mixes the writers
  told = scores(judge_, [(x.row, a) for x in asked for a in x.answers]).reshape(len(asked), size)[:, order]
  truth = np.array([[a.truth for a in x.answers] for x in asked])[:, order]
  eligible = np.array([[a.finished and bool(a.text) for a in x.answers] for x in asked])[:, order]
  told = np.where(eligible, told, -1.0)
  found = {}
  for n in (n for n in SIZES if n <= size):
    j, t = (x[:, : size // n * n].reshape(-1, n) for x in (told, truth))
    found[str(n)] = [float(t[np.arange(len(t)), j.argmax(axis=1)].mean()), float(t.max(axis=1).mean())]
  return found
