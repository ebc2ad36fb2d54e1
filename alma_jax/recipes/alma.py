"""ALMA: alignment with minimal annotation (arXiv 2412.04305, section 3).

From a base model, a few thousand demonstrations and a few thousand annotated responses; no other model anywhere.

  python -m alma_jax.main --config=configs/alma.py:mini --workdir=runs/mini

Every line of `run` is a stage of the run directory; a finished one is read, not made again. Ablations are config
values: draw.method, responses.checkpoints, judge.kind / mode / distil, trainset.method, and any of them per round.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from alma_jax import names
from alma_jax.errors import RunError
from alma_jax.judges import contract
from alma_jax.judges.contract import Judge
from alma_jax.options import Checked, ConfigError, option, refuse, spread
from alma_jax.runtime import training
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.runtime.session import RunOptions
from alma_jax.runtime.session import Session as AnySession
from alma_jax.stages import (
  clusters,
  drafts,
  draw,
  evaluation,
  judge,
  judgments,
  policy,
  prompts,
  quality,
  responses,
  trainset,
)
from alma_jax.stages import data as human
from alma_jax.store import layout
from alma_jax.store.handles import Data, Pool, Trainset
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact
from alma_jax.text import fewshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolOptions(Checked):
  """The section `prompts`: how drafts are written, and which of them enter the pool."""

  writing: drafts.Options = spread(drafts.Options)
  entering: prompts.Options = spread(prompts.Options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseOptions(Checked):
  """The section `responses`: how they are sampled, and which models write them."""

  sampling: ManyOptions = spread(ManyOptions)
  checkpoints: tuple[str, ...] = ("sft", "latest")  # "sft": all initial models; "sft_1": one; "latest" (Table 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
  """What a config of this recipe sets, beside RunOptions; each stage's Options say what is allowed."""

  feedback_rounds: int = option(least=0, most=1000)  # rounds 2, 3, ...; round 1 is the initial SFT
  data: human.Options
  sft_seeds: tuple[int, ...] = option(least=0)  # one initial model for each order of the data
  sft: training.Options
  prompts: PoolOptions
  embeddings: clusters.EmbeddingOptions
  clusters: clusters.Options
  draw: draw.Options
  responses: ResponseOptions
  judge: judge.Options
  trainset: trainset.Options
  policy_seed: int = option(least=0)
  policy: training.PolicyOptions
  dpo: training.PreferenceOptions
  grpo: training.GrpoOptions
  eval: evaluation.Options

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.sft_seeds:
      refuse("sft_seeds", self.sft_seeds, "must name at least one seed")
    initial = tuple(layout.sft_name(i) for i, _ in enumerate(self.sft_seeds, start=1))
    for name in self.responses.checkpoints or ("",):
      if name not in ("sft", "latest", *initial):
        known = ("sft", "latest", *initial)
        refuse("responses.checkpoints", self.responses.checkpoints, f"must be a tuple of {', '.join(known)}")
    for section in ("policy", "dpo", "grpo"):
      for field in ("init_from", "ref_from"):
        name, allowed = getattr(getattr(self, section), field, None), ("base", "latest", *initial)
        allowed = ("init", *allowed) if (section, field) == ("dpo", "ref_from") else allowed
        if name is not None and name not in allowed:
          refuse(f"{section}.{field}", name, f"may be {', '.join(map(repr, allowed))}", allowed)
    if self.trainset.method == "grpo" and self.responses.checkpoints != (self.grpo.init_from,):
      raise ConfigError(
        "trainset.method is 'grpo', which learns from a model's own responses: set responses.checkpoints to"
        f" {(self.grpo.init_from,)!r}, as grpo.init_from is"
      )

  @property
  def draws(self) -> int:
    return self.prompts.writing.draws


Session: TypeAlias = AnySession[Options]


def run(s: Session) -> None:
  o = s.options
  for line in notes(s.by_round):
    s.display.say(line)
  data = human.build(s, o.data, prompt_files(s.by_round))  # D_1, the annotations, the evaluation prompts

  judge.check_annotations(data.judge, o.judge, o.seed)

  # Initial SFT: base on D_1, once per seed                                    M_1^(1), M_1^(2)
  jobs = [policy.Job(layout.sft_name(i), s.base, o.sft, seed) for i, seed in enumerate(o.sft_seeds, start=1)]
  sft = [policy.sft(s, job, data) for job in jobs]

  # Prompts (3.1): few-shot synthesis, each once, clustered                    P
  drafted = drafts.build(s, data, o.prompts.writing, layout.pool_name())
  pools = [clusters.build(s, prompts.build(s, data, drafted, o.prompts.entering), embedder(o), o.clusters)]

  check_pool(s.by_round, pools, o.draws)

  # Judge (3.3): fine-tuned on the annotations, distilled on its own scores    J
  judge_, drawn = made_judge(s, data, sft, pools)
  quality.build(s, judge_, data, judge.held_out(s, data, o.judge))

  evaluation.overlap(s, data, o.eval, [pool.prompts for pool in pools])
  evaluation.build(s.at(0), s.base, judge_, data, o.eval, shots=o.eval.shots)
  scores = [evaluation.build(s.at(1), sft[0], judge_, data, o.eval)]

  # Learning from feedback (3.4), rounds 2, 3, ...
  latest, trainsets, draws = None, [], o.draws
  for r in s.rounds():  # r.options are this round's
    if r.options.draws > draws:
      pools.append(grown(r, data, pools, draws))
      draws = r.options.draws
      check_pool(s.by_round, pools, draws)
    asked = draw.build(r, pools, drawn, r.options.draw)  # K unused prompts
    answered = responses.build(r, asked, writers(r, sft, latest), r.options.responses.sampling)  # N responses each
    scored = judgments.build(r, asked, answered, judge_)  # J
    drawn.append(asked)
    trainsets.append(trainset.build(r, asked, answered, scored, r.options.trainset))  # D_r
    latest = trained(r, sft, latest, data, trainsets)  # M_r
    scores.append(evaluation.build(r, latest, judge_, data, r.options.eval))
    if evaluation.stalled(scores, r.options.eval):
      s.display.say(f"round {r.round}: no better score for {r.options.eval.patience} rounds; the run ends here")
      break


def prompt_files(by_round: Mapping[int, Options]) -> list[str]:
  """The files of all evaluation sets beside data.eval."""
  return sorted({file for o in by_round.values() for file in o.eval.named_sets.values()})


def embedder(o: Options) -> clusters.Embedder:
  """How the pool's prompts become points."""
  return clusters.Embedder(o.embeddings, o.prompts.writing.max_prompt_tokens)


def made_judge(
  s: Session, data: Data, sft: Sequence[Checkpoint], pools: Sequence[Pool]
) -> tuple[Judge, list[Artefact[Prompt]]]:
  """The judge of all rounds, and the prompts that it was distilled on."""
  o = s.options.judge
  if o.kind == "few_shot":
    return judge.few_shot(s, data, o), []
  if o.kind == "regression":
    return judge.regression(s, data, o), []
  if o.kind != "finetuned":
    return judge.of_user(s, o), []
  own = judge.finetuned(s, data, o)
  if not o.distil.prompts:
    return own, []
  one = s.at(1)  # a round of its own
  asked = draw.build(one, pools, [], draw.Options(prompts=o.distil.prompts, method="random"))
  answered = responses.build(one, asked, sft, o.distil.sample)
  scored = judgments.build(one, asked, answered, judge.real_valued(own))
  return judge.distilled(s, own, data, judge.Practice(asked, answered, scored), o), [asked]


def grown(r: Session, data: Data, pools: Sequence[Pool], first: int) -> Pool:
  """More prompts from this round on: the drafts from number `first`, in the clusters of the first pool."""
  o = r.options
  drafted = drafts.build(r, data, o.prompts.writing, layout.pool_name(r.round), first)
  more = prompts.build(r, data, drafted, o.prompts.entering, [pool.prompts for pool in pools])
  return clusters.added(r, more, pools[0], embedder(o), o.clusters)


def writers(r: Session, sft: Sequence[Checkpoint], latest: Checkpoint | None) -> list[Checkpoint]:
  """The models that write a round's responses: M_1^(i), and M_{r-1} if r >= 3.

  "sft" is all initial models, "sft_1" one of them, "latest" the last round's. Before there is a last round, an initial
  model stands in for it.
  """
  chosen = []
  for name in r.options.responses.checkpoints:
    if name == "latest":
      chosen += [latest] if latest else []
    else:
      chosen += [m for m in sft if name in ("sft", m.name)]
  return chosen or list(sft[:1])


def trained(
  r: Session, sft: Sequence[Checkpoint], latest: Checkpoint | None, data: Data, trainsets: Sequence[Trainset]
) -> Checkpoint:
  """M_r: SFT of M_0 on D_1 .. D_r, DPO of M_1 on D_2 .. D_r, or GRPO of M_{r-1} on D_r, which it wrote."""
  o, name, seed = r.options, layout.stage_name(r.round, layout.POLICY), r.options.policy_seed + r.round
  models = {"base": r.base, "latest": latest or sft[0], **{m.name: m for m in sft}}
  if o.trainset.method == "grpo":
    job = policy.Job(name, models[o.grpo.init_from], o.grpo, seed)
    return policy.grpo(r, job, models[o.grpo.ref_from], trainsets[-1])
  options = o.dpo if o.trainset.method == "dpo" else o.policy
  learnt = trainsets if options.history == "all" else trainsets[-1:]
  init = models[options.init_from]
  if isinstance(options, training.PreferenceOptions):
    reference = init if options.ref_from == "init" else models[options.ref_from]
    return policy.dpo(r, policy.Job(name, init, options, seed), reference, learnt)
  return policy.sft(r, policy.Job(name, init, options, seed), data, learnt)


def check(by_round: Mapping[int, Options]) -> None:
  """Raise a ConfigError for values that are wrong together: rounds that draw more prompts than can be there."""
  first = by_round[0]
  asked = first.judge.distil.prompts if first.judge.distils else 0
  draws = first.draws
  for round in sorted(by_round.keys() - {0}):
    o = by_round[round]
    asked, draws = asked + o.draw.prompts, max(draws, o.draws)
    if asked > draws:
      raise ConfigError(
        f"config.draw.prompts is {o.draw.prompts}: up to round {round} {asked:,} prompts are drawn, each once, and"
        f" config.prompts.draws makes {draws:,} at most; it must be at least {asked:,}"
      )


def check_pool(by_round: Mapping[int, Options], pools: Sequence[Pool], draws: int) -> None:
  """Raise a RunError if the rounds draw more prompts than there can be in `pools`, which `draws` drafts have made. A
  later round with more drafts adds a prompt for each of them at most."""
  first = by_round[0]
  asked = first.judge.distil.prompts if first.judge.distils else 0
  there = made = sum(pool.prompts.manifest["rows"] for pool in pools)
  for round in sorted(by_round.keys() - {0}):
    o = by_round[round]
    there, draws = there + max(0, o.draws - draws), max(draws, o.draws)
    asked += o.draw.prompts
    if asked > there:
      override = f"{{{round}: {{'prompts': {{'draws': NUMBER}}}}}}"
      raise RunError(
        f"the pool has {made:,} different prompts, and up to round {round} {asked:,} are drawn, each once. What helps:"
        f' a smaller draw.prompts or judge.distil.prompts, or more drafts from a round on: --config.rounds="{override}"'
        f" (pool/prompts/manifest.json says how many drafts of {first.draws:,} made how many prompts)"
      )


# What is checked at the start, and what `--check` says


def checks(host: Host, by_round: Mapping[int, Options]) -> Iterator[Callable[[], object]]:
  """Steps that raise a UserError where a template does not suit the tokenizer, a length does not suit the model, or a
  user's judge cannot be made."""
  o = by_round[0]
  lists = names.resolve(names.LISTS, o.prompts.writing.template, "prompts.template")
  yield lambda: fewshot.check_writable(host.tokenizer, lists)
  if o.eval.shots:
    yield lambda: fewshot.check_writable(host.tokenizer, o.eval.template())
  if o.judge.kind in ("finetuned", "few_shot"):
    yield lambda: judge.check(host, o.judge)
    for where, written in {"responses": o.responses.sampling, "judge.distil.sample": o.judge.distil.sample}.items():
      if where == "responses" or o.judge.distils:
        yield functools.partial(judge.check_lengths, host, o.judge, written, f"config.{where}")
  for where, trained_with in _trainings(by_round).items():
    yield functools.partial(policy.check_row_length, host, trained_with, where)
  if o.judge.kind not in names.JUDGES.words:
    yield lambda: contract.without_rows(
      contract.by_name(names.JUDGES, o.judge.kind, host, o.judge, "judge.kind"), "judge.kind"
    )
  yield functools.partial(evaluation.check, host, by_round[0].eval)
  for options in {o.eval for round, o in by_round.items() if round and o.eval != by_round[0].eval}:
    yield functools.partial(evaluation.check, host, options)


def _trainings(by_round: Mapping[int, Options]) -> dict[str, training.Options]:
  """The Options of the trainings on conversations, by the field they stand in; a later round's where they differ."""
  found: dict[str, training.Options] = {"config.sft": by_round[0].sft}
  for round, o in sorted(by_round.items()):
    section = {"dpo": "dpo", "grpo": "grpo"}.get(o.trainset.method, "policy")
    options, name = getattr(o, section), f"config.{section}"
    if round and options not in found.values():
      found[name if options == getattr(by_round[0], section) else f"in round {round}: {name}"] = options
  return found


def notes(by_round: Mapping[int, Options]) -> Iterator[str]:
  """What a user may not expect: rounds whose responses are not shared evenly by the models that write them."""
  rounds: dict[tuple[int, int], list[int]] = {}
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    sizes = {"sft": len(r.sft_seeds), "latest": int(round > 2)}
    writers = max(1, sum(sizes.get(name, 1) for name in r.responses.checkpoints))
    if r.responses.sampling.n % writers:
      rounds.setdefault((r.responses.sampling.n, writers), []).append(round)
  for (n, writers), of in rounds.items():
    span = f"round {of[0]}" if len(of) == 1 else f"rounds {of[0]} .. {of[-1]}"
    yield (
      f"{span}: {n} responses per prompt from {writers} checkpoints are {n // writers} or {n // writers + 1} from each;"
      " which ones write one more rotates from prompt to prompt"
    )


def models(by_round: Mapping[int, Options]) -> int:
  """How many trained models a run keeps."""
  o = by_round[0]
  judges = (o.judge.kind in ("finetuned", "regression")) + o.judge.distils
  return len(o.sft_seeds) + judges + len(by_round) - 1


def stages(by_round: Mapping[int, Options]) -> dict[str, float]:
  """The stages of a run in about their order, with their sizes beside others of their kind."""
  o = by_round[0]
  found = {layout.SEEDS: 1.0, **{layout.sft_name(i): 1.0 for i, _ in enumerate(o.sft_seeds, start=1)}}
  pooled = (layout.DRAFTS, layout.PROMPTS, layout.EMBEDDINGS, layout.CLUSTERS)
  found |= {layout.pool_stage(0, name): float(o.draws) for name in (*pooled, layout.PROJECTION)}
  if o.judge.kind in ("finetuned", "regression"):
    found[layout.JUDGE] = 1.0
  if o.judge.distils:
    size = float(o.judge.distil.prompts * o.judge.distil.sample.n)
    found |= {layout.stage_name(1, name): size for name in (layout.PROMPTS, layout.RESPONSES, layout.JUDGMENTS)}
    found[layout.DISTILLED] = 1.0
  found[layout.QUALITY] = 1.0
  found |= evaluation.stages(0, o.eval, True) | evaluation.stages(1, by_round.get(1, o).eval, True)
  draws, sets = o.draws, 1
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    if r.draws > draws:
      found |= {layout.pool_stage(round, name): float(r.draws - draws) for name in pooled}
      draws = r.draws
    size, sets = float(r.draw.prompts * r.responses.sampling.n), sets + 1
    made = (layout.PROMPTS, layout.RESPONSES, layout.JUDGMENTS, layout.TRAINSET)
    found |= {layout.stage_name(round, name): size for name in made}
    learnt = {"dpo": r.dpo, "best_of_n": r.policy}.get(r.trainset.method)
    grows = learnt is not None and learnt.history == "all"  # a training on the sets of all rounds so far
    found[layout.stage_name(round, layout.POLICY)] = float(sets) if grows else 1.0
    found |= evaluation.stages(round, r.eval, True)
  return found


def plan(by_round: Mapping[int, Options]) -> Iterator[str]:
  """What a run would do, a line for each kind of work."""
  o = by_round[0]
  yield f"sft       {len(o.sft_seeds)} models, {o.sft.epochs:g} epochs"
  yield f"pool      {o.draws:,} drafts, at most {o.clusters.k:,} clusters"
  distilled = f", distilled on the responses to {o.judge.distil.prompts:,} prompts" if o.judge.distils else ""
  yield f"judge     {o.judge.kind}, {o.judge.mode} scores, template {o.judge.template}{distilled}"
  for round, r in sorted(by_round.items()):
    if round:
      n = r.responses.sampling.n
      yield (
        f"round {round:<3} {r.draw.prompts:,} prompts x {n:,} responses = {r.draw.prompts * n:,} from"
        f" {', '.join(r.responses.checkpoints)}, of at most {r.responses.sampling.decoding.max_new_tokens:,} tokens;"
        f" {r.trainset.method}"
      )
  yield from notes(by_round)
