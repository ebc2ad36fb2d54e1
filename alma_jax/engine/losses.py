"""Log-probabilities and losses, all fp32, over one core that never holds all logits where they are large.

  token_logprobs(model, hidden, targets, where)      log p of every target; what is not asked for is not computed
  weighted_logprobs(model, hidden, targets, weights) their weighted sum, with its gradient made on the way
  sft(model, batch), preference(model, batch, Preference("ipo", beta=0.1)), grpo(model, batch, Grpo())

The core takes supervised places only, a tile of them at a time: prompts and padding cost nothing. `token_logprobs`
makes every tile again in the backward pass, because what a place weighs there follows from whole sequences;
`weighted_logprobs` knows the weights and makes each tile once, at a quarter less of arithmetic. Logits of at most
`DENSE_BYTES` are made at once instead, which is quicker for them. Under a mesh each device has the tiles of its own
rows and its share of the vocabulary. The gradients have the inputs' dtype; statistics and sums are fp32.

A loss and its metrics are sums over the batch divided by `totals` of it. Given the totals of the whole batch, the
losses of its parts add up to that of the whole.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alma_jax.llama import model as llama
from alma_jax.llama.sharding import BATCH

# Bytes are of fp32 logits, on each device. Every tile adds to the gradient of the whole head: with fewer places than
# these that traffic shows beside the arithmetic, and with more tiles less is made that nobody asked for.
DENSE_BYTES = 4 * 2**20
LEAST_PLACES = {"cpu": 128, "gpu": 4096, "tpu": 4096}
TILE_BYTES = {"cpu": 128 * 2**20, "gpu": 2 * 2**30, "tpu": 2 * 2**30}
TILES = 8


# The core


def token_logprobs(model, hidden, targets, where=None):
  """fp32 log p(target) [B, T] for hidden [B, T, D] and targets [B, T]; 0 where `where` [B, T] is False."""
  tile, where = _tile(model, targets), jnp.ones(targets.shape, bool) if where is None else where
  if not tile:
    return jnp.where(where, _dense(model, hidden, targets), 0.0)

  def logprobs(weight, *rows):
    return _tiled(_axes(model), tile, weight, *map(_flat, rows)).reshape(rows[1].shape)

  return _on_own_rows(logprobs, targets)(_weight(model), hidden, targets, where)


def weighted_logprobs(model, hidden, targets, weights):
  """Sum of weights * log p(target), a scalar. The weights are constants; where they are 0, nothing is computed."""
  tile, weights = _tile(model, targets), jax.lax.stop_gradient(weights)
  if not tile:
    return (jnp.where(weights != 0, _dense(model, hidden, targets), 0.0) * weights).sum()

  def total(weight, *rows):
    return _tiled_sum(_axes(model), tile, weight.dtype, weight, *map(_flat, rows))[None]  # one for each device

  return _on_own_rows(total, targets)(_weight(model), hidden, targets, weights).sum()


def _weight(model):
  return (model.embed if model.c.tied else model.head)[...]


def _axes(model):
  return "vd" if model.c.tied else "dv"


def _flat(x):
  return x.reshape(-1, *x.shape[2:])


def _dense(model, hidden, targets):
  z = llama.logits(model, hidden)
  return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(z, axis=-1)


def _picked(z, targets):
  """The logits of the targets: a sum over what `tensor` has split, where indexing would gather it."""
  return jnp.where(_hits(z, targets), z, 0.0).sum(axis=-1)


def _hits(z, targets):
  return jnp.arange(z.shape[-1]) == targets[..., None]


def _tile(model, targets):
  """How many places a device takes at a time; 0: all at once."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if _whole(targets, mesh) else mesh.shape["data"] * mesh.shape["fsdp"]
  shared = 1 if mesh.empty or model.c.vocab % mesh.shape["tensor"] else mesh.shape["tensor"]
  places, each = targets.size // ways, 4 * model.c.vocab // shared
  if places * each <= DENSE_BYTES:
    return 0
  platform = jax.default_backend()
  return max(1, min(TILE_BYTES[platform] // each, places, max(LEAST_PLACES[platform], places // TILES)))


def _whole(targets, mesh):
  """Whether every device has all the rows that there are here: no mesh, rows that its ways do not divide, or the inside
  of a shard_map over these ways."""
  return mesh.empty or "data" in mesh.manual_axes or targets.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"])


def _on_own_rows(f, targets):
  """f(weight, arrays by rows) on every device's own rows: then no tile takes from two devices, and the devices' shares
  of the weight's gradient meet once, at the end."""
  if _whole(targets, jax.sharding.get_abstract_mesh()):
    return f
  specs = P(), P(BATCH), P(BATCH), P(BATCH)
  return jax.shard_map(f, in_specs=specs, out_specs=P(BATCH), axis_names=set(BATCH), check_vma=False)


def _tiles(tile, where):
  """(places [tiles, tile], those where `where` is True first and then none, which is one too far; tiles with any)."""
  n = where.shape[0]
  places = jnp.nonzero(where, size=-(-n // tile) * tile, fill_value=n)[0].reshape(-1, tile)
  return places, (where.sum() + tile - 1) // tile


def _at(x, places):
  return x.at[places].get(mode="fill", fill_value=0)


def _put(x, places, values):
  return x.at[places].set(values.astype(x.dtype), mode="drop")


def _logits(axes, weight, x):
  return jnp.einsum(f"nd,{axes}->nv", x, weight, preferred_element_type=jnp.float32)


def _gradients(axes, weight, x, dz):
  """(of x, of the weight) for dz, the gradient of the logits."""
  dz = dz.astype(jnp.result_type(x, weight))
  dx = jnp.einsum(f"nv,{axes}->nd", dz, weight, preferred_element_type=jnp.float32)
  return dx, jnp.einsum(f"nd,nv->{axes}", x, dz, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(axes, tile, weight, x, y, where):
  """log p(y) [N] for x [N, D], 0 where `where` is False."""
  return _tiled_forward(axes, tile, weight, x, y, where)[0]


def _tiled_forward(axes, tile, weight, x, y, where):
  places, count = _tiles(tile, where)

  def step(i, found):
    at = places[i]
    z = _logits(axes, weight, _at(x, at))
    lse = jax.nn.logsumexp(z, axis=-1)
    return _put(found[0], at, _picked(z, _at(y, at)) - lse), _put(found[1], at, lse)

  zeros = jnp.zeros(y.shape, jnp.float32)
  logprobs, lse = jax.lax.fori_loop(0, count, step, (zeros, zeros))
  return logprobs, (weight, x, y, where, lse)


def _tiled_backward(axes, tile, kept, g):
  weight, x, y, where, lse = kept
  places, count = _tiles(tile, where)

  def step(i, found):
    at = places[i]
    mine = _at(x, at)
    z = _logits(axes, weight, mine)
    dz = (_hits(z, _at(y, at)) - jnp.exp(z - _at(lse, at)[:, None])) * _at(g, at)[:, None]
    dx, dw = _gradients(axes, weight, mine, dz)
    return _put(found[0], at, dx), found[1] + dw

  dx, dw = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(x), jnp.zeros(weight.shape, jnp.float32)))
  return dw.astype(weight.dtype), dx, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled_sum(axes, tile, dtype, weight, x, y, weights):
  """Sum of weights * log p(y) for x [N, D]."""
  return (_tiled(axes, tile, weight, x, y, weights != 0) * weights).sum()


def _tiled_sum_forward(axes, tile, dtype, weight, x, y, weights):
  places, count = _tiles(tile, weights != 0)

  def step(i, found):
    at = places[i]
    mine, targets, w = _at(x, at), _at(y, at), _at(weights, at)
    z = _logits(axes, weight, mine)
    most = z.max(axis=-1, keepdims=True)
    p = jnp.exp(z - most)
    mass = p.sum(axis=-1, keepdims=True)
    logprobs = _picked(z, targets) - (most + jnp.log(mass))[:, 0]
    dx, dw = _gradients(axes, weight, mine, (_hits(z, targets) - p * (1 / mass)) * w[:, None])
    return found[0] + (logprobs * w).sum(), _put(found[1], at, dx), found[2] + dw

  start = jnp.float32(0), jnp.zeros_like(x), jnp.zeros(weight.shape, jnp.float32)
  total, dx, dw = jax.lax.fori_loop(0, count, step, start)
  return total, (dx, dw)


def _tiled_sum_backward(axes, tile, dtype, kept, g):
  dx, dw = kept
  return (g * dw).astype(dtype), (g * dx).astype(dx.dtype), None, None


_tiled_sum.defvjp(_tiled_sum_forward, _tiled_sum_backward)


# Losses


@dataclasses.dataclass(frozen=True)
class How:
  """How the model is run: what is kept for the backward pass (`llama.model.REMAT`), and the last layer's dropout."""

  remat: str = "none"
  dropout: float = 0.0


def totals(batch):
  """What the losses of a batch are divided by."""
  found = {"weight": jnp.maximum(batch["weights"].sum(), 1.0)}
  return found | ({"pairs": jnp.maximum(batch["real"].sum(), 1.0)} if "real" in batch else {})


def batch_logprobs(model, batch, how=How()):
  """fp32 [rows, T] log-probs of the batch's targets, zero where nothing is supervised."""
  return token_logprobs(model, _hidden(model, batch, how), batch["targets"], batch["weights"] > 0)


def _hidden(model, batch, how):
  forks = llama.Forks(batch["second"], batch["order"], batch["order_segments"]) if "second" in batch else None
  dropout = llama.Dropout(how.dropout, jax.random.wrap_key_data(batch["key"])) if how.dropout else None
  text = batch["tokens"], batch["positions"], batch["segments"]
  return llama.hidden_states(model, *text, remat=how.remat, forks=forks, dropout=dropout)


def sequence_logprobs(logprobs, batch, sequences):
  """Sum of the weighted token log-probs of every packed sequence, [sequences]; padding falls into a spare bin."""
  index = jnp.where(batch["example"] >= 0, batch["example"], sequences)
  sums = jax.ops.segment_sum((logprobs * batch["weights"]).ravel(), index.ravel(), sequences + 1)
  return sums[:sequences]


def sft(model, batch, how=How(), whole=None):
  """(loss, metrics): weighted NLL over the whole batch divided by its weight."""
  total = weighted_logprobs(model, _hidden(model, batch, how), batch["targets"], batch["weights"])
  loss = -total / (whole or totals(batch))["weight"]
  return loss, {"loss": loss, "target_tokens": (batch["weights"] > 0).sum()}


# Every preference loss and the parameters it has beside beta and nll_weight.
PREFERENCES = {
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
class Preference:
  """A preference loss; h is how much more the log-ratio log p / p_ref of the chosen response is than the rejected's.

  dpo        -log sigmoid(beta h)
  cdpo       the same, if a share `label_smoothing` of the pairs is the wrong way round
  rdpo       its unbiased estimate under that noise (robust DPO)
  ipo        (h - 1 / (2 beta))^2 of log-ratios per token; ipo_sum: of summed ones
  dpo_norm   dpo of log-ratios per token
  simpo      -log sigmoid(beta (h - gamma_beta_ratio)) of log-probs per token, without a reference
  hinge      max(0, 1 - beta h)
  kto        chosen and rejected against the average log-ratio z of responses to other prompts, which are each pair's
             third sequence: 1 - sigmoid(beta (r - z)) and 1 - sigmoid(beta (z - r))

  To all of them nll_weight * NLL per token of the chosen response may be added.
  """

  loss: str = "dpo"
  beta: float = 0.1
  label_smoothing: float = 0.0
  gamma_beta_ratio: float = 0.0
  nll_weight: float = 0.0

  def __post_init__(self):
    if self.loss not in PREFERENCES:
      raise ValueError(f"there is no preference loss {self.loss!r}; there are {', '.join(PREFERENCES)}")
    for name in ("label_smoothing", "gamma_beta_ratio"):
      if getattr(self, name) and name not in PREFERENCES[self.loss]:
        having = ", ".join(loss for loss, names in PREFERENCES.items() if name in names)
        raise ValueError(
          f"{name} is {getattr(self, name)}, but the loss {self.loss!r} has none: set it to 0, or the loss to one that"
          f" has it ({having})"
        )
    if not self.beta > 0:
      raise ValueError(f"beta is {self.beta}; it must be above 0")
    if not self.nll_weight >= 0:
      raise ValueError(f"nll_weight is {self.nll_weight}; it must not be negative")
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(
        f"label_smoothing is {self.label_smoothing}; it is the share of wrong pairs and must be at least 0, below 0.5"
      )
    if self.loss in ("cdpo", "rdpo") and not self.label_smoothing:
      raise ValueError(f"the loss {self.loss!r} without label_smoothing is 'dpo': give it one, for example 0.1")

  @property
  def sides(self):
    """Sequences of a pair: chosen, rejected and, for kto, a response to another prompt."""
    return 3 if self.loss == "kto" else 2

  @property
  def has_reference(self):
    return self.loss != "simpo"

  @property
  def per_token(self):
    return self.loss in ("ipo", "dpo_norm", "simpo")


def preference(model, batch, p, how=How(), whole=None):
  """(loss, metrics). The sequences 2 i and 2 i + 1 are pair i's chosen and rejected; `reference` [pairs, sides] holds
  the reference's log-probs, if the loss has one, `real` [pairs] is 0 for what only fills the batch up, and `kl` is
  `divergence`, if the loss has that."""
  pairs = batch["real"].shape[0]
  of = lambda x: sequence_logprobs(x, batch, 2 * pairs).reshape(pairs, 2)
  logprobs, lengths = of(batch_logprobs(model, batch, how)), of(jnp.ones(batch["weights"].shape))
  reference = batch["reference"][:, :2] if p.has_reference else None
  here = batch["real"] * (lengths[:, 0] > 0)  # the others are in other parts of the batch
  count = (whole or totals(batch))["pairs"]
  loss, metrics = preference_of(p, logprobs, lengths, reference, here, count, batch.get("kl"))
  return loss, metrics | {"target_tokens": (batch["weights"] > 0).sum()}


def divergence(logprobs, reference, real):
  """The average log-ratio of sequences [pairs], at least 0: a constant, without a gradient."""
  ratios = (logprobs - reference) * real
  return jax.lax.stop_gradient(jnp.maximum(ratios.sum() / jnp.maximum(real.sum(), 1.0), 0.0))


def preference_of(p, logprobs, lengths, reference, real, count=None, kl=None):
  """`preference` from the log-probs and lengths [pairs, 2]: the sum over the real pairs divided by `count`, which is
  how many there are, unless the batch has more."""
  count, lengths = jnp.maximum(real.sum(), 1.0) if count is None else count, jnp.maximum(lengths, 1.0)
  mean = lambda x: (x * real).sum() / count
  ratios = logprobs - reference if p.has_reference else logprobs
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
    away = p.beta * kl - rewards
    loss = mean(jax.nn.sigmoid(away[:, 0]) + jax.nn.sigmoid(-away[:, 1])) / 2
    metrics["kl"] = kl * (real.sum() / count)
  else:
    loss = mean(_of_margin(p, margin))
  if p.nll_weight:
    metrics["nll"] = mean(-logprobs[:, 0] / lengths[:, 0])
    loss = loss + p.nll_weight * metrics["nll"]
  return loss, {"loss": loss} | metrics


def _of_margin(p, margin):
  if p.loss in ("ipo", "ipo_sum"):
    return (margin / p.beta - 1 / (2 * p.beta)) ** 2
  if p.loss == "hinge":
    return jax.nn.relu(1 - margin)
  e, margin = p.label_smoothing, margin - p.beta * p.gamma_beta_ratio
  right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
  if p.loss == "rdpo":
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)
  return (1 - e) * right + e * wrong if e else right


@dataclasses.dataclass(frozen=True)
class Grpo:
  """Policy gradient on groups of responses to one prompt, each with its advantage over its group: clipped as PPO's, and
  held near a reference by `kl` times an estimate of the divergence (exp(d) - d - 1, d = log p_ref - log p)."""

  clip_ratio: float = 0.2
  kl: float = 0.02

  def __post_init__(self):
    if not 0 < self.clip_ratio < 1:
      raise ValueError(f"clip_ratio is {self.clip_ratio}; it must lie between 0 and 1")
    if not self.kl >= 0:
      raise ValueError(f"kl is {self.kl}; it must not be negative")


def advantages(scores):
  """[N] of one prompt's N scores: what each has over the mean, in standard deviations; zeros where all are equal."""
  scores = np.asarray(scores, np.float64)
  if len(scores) < 2 or np.ptp(scores) == 0:
    return np.zeros(len(scores))
  return (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)


def grpo(model, batch, g, how=How(), whole=None):
  """(loss, metrics) by tokens: `advantage`, `old` and `reference` [rows, T] are a place's advantage, and its log-prob
  under the model that the response is from and under the reference."""
  logprobs, weight = batch_logprobs(model, batch, how), (whole or totals(batch))["weight"]
  mean = lambda x: (x * batch["weights"]).sum() / weight
  loss, metrics = grpo_of(g, logprobs, batch["old"], batch["reference"], batch["advantage"], mean)
  return loss, metrics | {"target_tokens": (batch["weights"] > 0).sum()}


def grpo_of(g, logprobs, old, reference, advantage, mean=jnp.mean):
  """`grpo` from log-probs and advantages of any shape."""
  ratio, apart = jnp.exp(logprobs - old), reference - logprobs
  clipped = jnp.clip(ratio, 1 - g.clip_ratio, 1 + g.clip_ratio)
  kl = mean(jnp.exp(apart) - apart - 1)
  loss = g.kl * kl - mean(jnp.minimum(ratio * advantage, clipped * advantage))
  return loss, {"loss": loss, "kl": kl, "clipped": mean(ratio * advantage > clipped * advantage)}
