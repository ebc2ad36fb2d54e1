"""Losses, all fp32, over one core of log-probabilities (engine/crossentropy.py).

  loss, metrics = sft(model, batch)
  loss, metrics = preference(model, batch, Preference("ipo", beta=0.1))
  loss, metrics = grpo(model, batch, Grpo())

A loss and its metrics are sums over the batch divided by `totals` of it. Given the totals of the whole batch, the
losses of its parts add up to that of the whole.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alma_jax.engine.crossentropy import mixed_logprobs, token_logprobs, weighted_logprobs
from alma_jax.llama import model as llama
from alma_jax.options import Checked, ConfigError, option, refuse

# Arrays by name, as `text.packing` and `runtime.batches` make them; "other" is a batch inside a batch.
Batch = Mapping[str, Any]
Totals = dict[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class How:
  """How the model is run: what is kept for the backward pass (a word of `llama.model.REMAT`), the dropout of the last
  layer, and whether every row holds few examples (see `llama.attention.causal`; None: not known)."""

  remat: str = "none"
  dropout: float = 0.0
  few: bool | None = None


def totals(batch: Batch) -> Totals:
  """What the losses of a batch are divided by."""
  found = {"weight": jnp.maximum(batch["weights"].sum(), 1.0)}
  return found | ({"pairs": jnp.maximum(batch["real"].sum(), 1.0)} if "real" in batch else {})


def batch_logprobs(model: llama.Llama, batch: Batch, how: How = How()) -> Array:
  """fp32 [rows, T] log-probs of the batch's targets, zero where nothing is supervised."""
  return _logprobs(model, _hidden(model, batch, how), batch)


def _logprobs(model: llama.Llama, hidden: Array, batch: Batch) -> Array:
  return token_logprobs(model, hidden, batch["targets"], batch["weights"] > 0)


def _hidden(model: llama.Llama, batch: Batch, how: How) -> Array:
  forks = llama.Forks(batch["second"], batch["order"], batch["order_segments"]) if "second" in batch else None
  dropout = llama.Dropout(how.dropout, jax.random.wrap_key_data(batch["key"])) if how.dropout else None
  text = batch["tokens"], batch["positions"], batch["segments"]
  return llama.hidden_states(model, *text, forks, llama.TrainingPass(how.remat, dropout, how.few))


def sequence_logprobs(logprobs: Array, batch: Batch, sequences: int) -> Array:
  """Sums [sequences] of the weighted token log-probs of each packed sequence; padding falls into a spare bin.

  example   0  0  0  1  1 -1        sums of a row, with sequences = 2:
  index     0  0  0  1  1  2        [0 + 0 + 0, 1 + 1], and bin 2 is dropped
  """
  index = jnp.where(batch["example"] >= 0, batch["example"], sequences)
  sums = jax.ops.segment_sum((logprobs * batch["weights"]).ravel(), index.ravel(), sequences + 1)
  return sums[:sequences]


def sft(model: llama.Llama, batch: Batch, how: How = How(), whole: Totals | None = None) -> tuple[Array, Metrics]:
  """Loss and metrics: the weighted NLL of the batch divided by the whole batch's weight."""
  total = weighted_logprobs(model, _hidden(model, batch, how), batch["targets"], batch["weights"])
  loss = -total / (whole or totals(batch))["weight"]
  return loss, {"loss": loss, "target_tokens": (batch["weights"] > 0).sum()}


@dataclasses.dataclass(frozen=True)
class Regression:
  """The squared error of a head that scores texts, read at the last token of every example."""


def regression(
  model: llama.Llama, batch: Batch, how: How = How(), whole: Totals | None = None
) -> tuple[Array, Metrics]:
  """Loss and metrics: the mean squared error of the examples' scores, `weights` being 1 at their last places."""
  values = llama.logits(model, _hidden(model, batch, how))[..., 0]
  error, total = values - batch["score"], (whole or totals(batch))["weight"]
  loss = (batch["weights"] * error**2).sum() / total
  absolute = (batch["weights"] * jnp.abs(error)).sum() / total
  return loss, {"loss": loss, "absolute_error": absolute, "target_tokens": (batch["weights"] > 0).sum()}


# Preferences

# Every preference loss and the parameters it has beside beta and nll_weight.
PREFERENCES: dict[str, tuple[str, ...]] = {
  "dpo": (),
  "cdpo": ("label_smoothing",),
  "rdpo": ("label_smoothing",),
  "ipo": (),
  "ipo_sum": (),
  "dpo_norm": (),
  "simpo": ("label_smoothing", "gamma_beta_ratio"),
  "hinge": (),
  "kto": (),
}


@dataclasses.dataclass(frozen=True)
class Preference(Checked):
  """A preference loss. h is the log-ratio log p / p_ref of the chosen response minus that of the rejected one.

  dpo        -log sigmoid(beta h)
  cdpo       dpo if a share `label_smoothing` of the pairs is the wrong way round
  rdpo       the unbiased estimate of dpo under that noise (robust DPO)
  ipo        (h - 1 / (2 beta))^2 of log-ratios per token; ipo_sum: of summed ones
  dpo_norm   dpo of log-ratios per token
  simpo      -log sigmoid(beta (h - gamma_beta_ratio)) of log-probs per token, without a reference
  hinge      max(0, 1 - beta h)
  kto        1 - sigmoid(beta (r - z)) for the chosen and 1 - sigmoid(beta (z - r)) for the rejected response: each
             log-ratio r against z, the average log-ratio of responses to other prompts (each pair's third sequence)
  """

  loss: Literal["dpo", "cdpo", "rdpo", "ipo", "ipo_sum", "dpo_norm", "simpo", "hinge", "kto"] = "dpo"
  beta: float = option(0.1, above=0)  # how sharply a difference counts; losses per token want more (simpo 2 .. 10)
  label_smoothing: float = 0.0  # cdpo, rdpo, simpo: share of pairs that are the wrong way round
  gamma_beta_ratio: float = 0.0  # simpo: the lead that the chosen response must have, in nats per token (0.3 .. 0.5)
  nll_weight: float = option(0.0, least=0)  # of the chosen responses' NLL per token, added to any loss

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("label_smoothing", "gamma_beta_ratio"):
      if getattr(self, name) and name not in PREFERENCES[self.loss]:
        having = ", ".join(loss for loss, names in PREFERENCES.items() if name in names)
        raise ConfigError(
          f"{name} is {getattr(self, name)}, but the loss {self.loss!r} has none: set it to 0, or the loss to one that"
          f" has it ({having})"
        )
    if not 0 <= self.label_smoothing < 0.5:
      refuse("label_smoothing", self.label_smoothing, "is the share of wrong pairs and must be at least 0, below 0.5")
    if self.loss in ("cdpo", "rdpo") and not self.label_smoothing:
      raise ConfigError(f"label_smoothing is 0, with which the loss {self.loss!r} is 'dpo': set it, for example to 0.1")

  @property
  def sides(self) -> int:
    """Sequences of a pair: chosen, rejected and, for kto, a response to another prompt."""
    return 3 if self.loss == "kto" else 2

  @property
  def has_reference(self) -> bool:
    return self.loss != "simpo"

  @property
  def per_token(self) -> bool:
    return self.loss in ("ipo", "dpo_norm", "simpo")


@dataclasses.dataclass(frozen=True)
class SelfRefinement(Preference):
  """DPO that does not trust the pairs it is least sure of, with de-coupled noise detection (SPA, arXiv 2406.04412).

  A pair is believed if its margin beta h~ is above tau; the order of the others counts as wrong with the probability e:

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        e = 0 for pairs that are believed, else `smoothing`

  tau is a low quantile of the margins of the last `window` steps, and 0 until there are so many. h~ is h under the
  log-probs of the logits l + mix (l - l_ref), a policy that has gone further from its reference. No gradient goes
  through e. With smoothing 0 this is DPO.
  """

  smoothing: float = option(0.1, least=0, below=0.5)  # e of the pairs that are not believed (the paper's alpha)
  believing: float = option(0.2, least=0, most=1)  # in this first share of the steps every pair is believed
  mix: float = option(0.0, least=0)  # how far the policy is extrapolated to find noise (lambda); 0: h~ is h
  window: int = option(50, least=1)  # steps whose margins tau is found in
  quantile: float = option(0.1, least=0, below=1)  # tau is this quantile of them

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.loss != "dpo":
      refuse("loss", self.loss, "must be 'dpo': it is DPO that self-refinement changes")

  def smoothing_at(self, step: int, steps: int) -> float:
    return self.smoothing if step >= self.believing * steps else 0.0


Memory = dict[str, Array]  # what a training remembers of its steps: "margins" [size], "seen"; {} for most


def no_margins(size: int) -> Memory:
  """An empty memory of so many margins."""
  return {"margins": jnp.zeros(size, jnp.float32), "seen": jnp.zeros((), jnp.int32)} if size else {}


def remembered(memory: Memory, margins: Array, real: Array) -> Memory:
  """The memory with the margins [pairs] of a step, those that are not real left out; the oldest make room.

  A memory of 4 that has seen 5 margins, and the next three, of which the second is not real:

    margins   e b c d      ->      e f g d      the next ones go to the places 5 and 6 modulo 4
    seen      5                    7
  """
  size, count = memory["margins"].shape[0], jnp.cumsum(real > 0)
  at = jnp.where(real > 0, (memory["seen"] + count - 1) % size, size)
  kept = memory["margins"].at[at].set(margins.astype(jnp.float32), mode="drop")
  return {"margins": kept, "seen": memory["seen"] + count[-1].astype(jnp.int32)}


def threshold(p: SelfRefinement, memory: Memory) -> Array:
  """tau: the middle of the margins k and k + 1 in their order, k = quantile * their number; 0 until all are known. Of
  50 margins and the quantile 0.1 these are numbers 5 and 6, from 0, as in the paper's code."""
  ordered = jnp.sort(memory["margins"])
  k = min(int(p.quantile * len(ordered) + 1e-9), len(ordered) - 1)
  tau = (ordered[k] + ordered[min(k + 1, len(ordered) - 1)]) / 2
  return jnp.where(memory["seen"] >= len(ordered), tau, 0.0)


class ScoredPairs(NamedTuple):
  """What a preference loss is computed from; chosen and rejected stand in the columns."""

  logprobs: Array  # [pairs, 2] of the whole responses
  lengths: Array  # [pairs, 2] in tokens
  reference: Array | None  # [pairs, 2] the reference's log-probs, if the loss has one
  real: Array  # [pairs] 0 for what only fills the batch up
  kl: Array | float = 0.0  # kto: the average log-ratio, see `divergence`
  smoothing: Array | float = 0.0  # self-refinement: [pairs] the probability that a pair is the wrong way round


def preference(
  model: llama.Llama,
  batch: Batch,
  p: Preference,
  how: How = How(),
  whole: Totals | None = None,
  compared: llama.Llama | None = None,
) -> tuple[Array, Metrics]:
  """Loss and metrics of pairs: the sequences 2 i and 2 i + 1 are pair i's chosen and rejected. `real` [pairs] is 0 for
  what only fills the batch up; `reference` [pairs, sides] and `kl` are there if the loss has them.

  For self-refinement `threshold` and `smoothing` are numbers, `compared` is the reference model if the loss mixes
  logits, and the metric "margins" [pairs] is what noise was looked for in.
  """
  pairs = batch["real"].shape[0]

  def by_pair(x: Array) -> Array:
    return sequence_logprobs(x, batch, 2 * pairs).reshape(pairs, 2)

  hidden = _hidden(model, batch, how)
  logprobs, lengths = by_pair(_logprobs(model, hidden, batch)), by_pair(jnp.ones(batch["weights"].shape))
  reference = batch["reference"][:, :2] if p.has_reference else None
  here = batch["real"] * (lengths[:, 0] > 0)  # the others are in other parts of the batch
  scored = ScoredPairs(logprobs, lengths, reference, here, batch.get("kl", 0.0))
  count, refined = (whole or totals(batch))["pairs"], {}
  if isinstance(p, SelfRefinement):
    surer = logprobs
    if compared is not None:
      states = hidden, _hidden(compared, batch, How(few=how.few))
      where = batch["weights"] > 0
      surer = by_pair(mixed_logprobs((model, compared), states, p.mix, batch["targets"], where))
    ratios = surer - batch["reference"][:, :2]
    margins = jax.lax.stop_gradient(p.beta * (ratios[:, 0] - ratios[:, 1]))
    doubted = margins <= batch["threshold"]
    scored = scored._replace(smoothing=batch["smoothing"] * doubted)
    refined = {"margins": margins * here, "doubted": (doubted * here).sum() / count}
  loss, metrics = preference_of(p, scored, count)
  return loss, metrics | refined | {"target_tokens": (batch["weights"] > 0).sum()}


def divergence(logprobs: Array, reference: Array, real: Array) -> Array:
  """The average log-ratio of sequences [pairs], at least 0: a constant, without a gradient."""
  ratios = (logprobs - reference) * real
  return jax.lax.stop_gradient(jnp.maximum(ratios.sum() / jnp.maximum(real.sum(), 1.0), 0.0))


def preference_of(p: Preference, pairs: ScoredPairs, count: Array | None = None) -> tuple[Array, Metrics]:
  """`preference` from the log-probs: the sum over the real pairs divided by their number in the whole batch, `count`
  (default: these are all)."""
  logprobs, real = pairs.logprobs, pairs.real
  count = jnp.maximum(real.sum(), 1.0) if count is None else count
  lengths = jnp.maximum(pairs.lengths, 1.0)

  def mean(x: Array) -> Array:
    return (x * real).sum() / count

  ratios = logprobs if pairs.reference is None else logprobs - pairs.reference
  ratios = ratios / lengths if p.per_token else ratios
  rewards = p.beta * ratios
  margin = rewards[:, 0] - rewards[:, 1]
  metrics = {
    "margin": mean(margin),
    "accuracy": mean(margin > 0),
    "chosen_logprob": mean(logprobs[:, 0]),
    "rejected_logprob": mean(logprobs[:, 1]),
    "chosen_length": mean(lengths[:, 0]),
    "rejected_length": mean(lengths[:, 1]),
  }
  if p.loss == "kto":
    away = p.beta * pairs.kl - rewards
    loss = mean(jax.nn.sigmoid(away[:, 0]) + jax.nn.sigmoid(-away[:, 1])) / 2
    metrics["kl"] = pairs.kl * (real.sum() / count)
  else:
    loss = mean(_of_margin(p, margin, pairs.smoothing))
  if p.nll_weight:
    metrics["nll"] = mean(-logprobs[:, 0] / lengths[:, 0])
    loss = loss + p.nll_weight * metrics["nll"]
  return loss, {"loss": loss} | metrics


def _of_margin(p: Preference, margin: Array, smoothing: Array | float = 0.0) -> Array:
  """The losses [pairs] of margins beta h; `smoothing` is self-refinement's."""
  if p.loss in ("ipo", "ipo_sum"):
    return (margin / p.beta - 1 / (2 * p.beta)) ** 2
  if p.loss == "hinge":
    return jax.nn.relu(1 - margin)
  e, margin = p.label_smoothing, margin - p.beta * p.gamma_beta_ratio
  right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
  if isinstance(p, SelfRefinement):
    return (1 - smoothing) * right + smoothing * wrong
  if p.loss == "rdpo":
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)
  return (1 - e) * right + e * wrong if e else right


# Policy gradients


@dataclasses.dataclass(frozen=True)
class Grpo(Checked):
  """Policy gradient on groups of responses to one prompt, each with its advantage over its group: clipped as in PPO,
  and held near a reference by `kl` times an estimate of the divergence (exp(d) - d - 1, d = log p_ref - log p)."""

  clip_ratio: float = 0.2  # how far a token's probability may move before it stops counting
  kl: float = option(0.02, least=0)  # weight of the divergence from the reference

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.clip_ratio < 1:
      refuse("clip_ratio", self.clip_ratio, "must lie between 0 and 1")


def advantages(scores: Sequence[float]) -> np.ndarray:
  """The leads [N] of one prompt's N finite scores over their mean, in standard deviations; zeros if all are equal."""
  of = np.asarray(scores, np.float64)
  if not np.isfinite(of).all():
    raise ValueError(f"scores must be finite; score {int(np.argmin(np.isfinite(of)))} is not")
  if len(of) < 2 or np.ptp(of) == 0:
    return np.zeros(len(of))
  return (of - of.mean()) / (of.std(ddof=1) + 1e-4)


def grpo(
  model: llama.Llama, batch: Batch, g: Grpo, how: How = How(), whole: Totals | None = None
) -> tuple[Array, Metrics]:
  """Loss and metrics by tokens. `advantage`, `old` and `reference` [rows, T] are each place's advantage, its log-prob
  under the model that wrote the response, and that under the reference."""
  logprobs, weight = batch_logprobs(model, batch, how), (whole or totals(batch))["weight"]

  def mean(x: Array) -> Array:
    return (x * batch["weights"]).sum() / weight

  loss, metrics = grpo_of(g, logprobs, batch["old"], batch["reference"], batch["advantage"], mean)
  return loss, metrics | {"target_tokens": (batch["weights"] > 0).sum()}


def grpo_of(
  g: Grpo, logprobs: Array, old: Array, reference: Array, advantage: Array, mean: Callable[[Array], Array] = jnp.mean
) -> tuple[Array, Metrics]:
  """`grpo` from log-probs and advantages of any shape."""
  ratio, apart = jnp.exp(logprobs - old), reference - logprobs
  clipped = jnp.clip(ratio, 1 - g.clip_ratio, 1 + g.clip_ratio)
  kl = mean(jnp.exp(apart) - apart - 1)
  loss = g.kl * kl - mean(jnp.minimum(ratio * advantage, clipped * advantage))
  return loss, {"loss": loss, "kl": kl, "clipped": mean(ratio * advantage > clipped * advantage)}
