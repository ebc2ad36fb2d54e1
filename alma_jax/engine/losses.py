"""Log-probabilities and losses, all fp32, over one core: `token_logprobs`.

Everything that trains or scores sequences (SFT, DPO, the judge, reference log-probs) goes through that core. It makes
(batch, time, vocab) logits at once only while they are small; beyond `TILE_BYTES` it walks along time and recomputes
every stretch in the backward pass, so (batch, time, vocab) never exists when it would be large.
"""

import jax
import jax.numpy as jnp

from alma_jax.llama import model as llama

TILE_BYTES = 512 * 2**20  # of fp32 logits, per device


def token_logprobs(model, hidden, targets):
  """fp32 log p(target) [B, T] for hidden [B, T, D] and targets [B, T]."""

  def logprobs(x, y):
    z = llama.logits(model, x)
    return jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(z, axis=-1)

  (B, T), mesh = targets.shape, jax.sharding.get_abstract_mesh()
  # A tile is a stretch of time of all rows: the rows stay spread over the devices, and each computes its own share.
  tile = max(1, TILE_BYTES * (1 if mesh.empty else mesh.size) // (4 * model.c.vocab * B))
  if tile >= T:
    return logprobs(hidden, targets)
  short = -T % tile
  split = lambda x: jnp.moveaxis(x.reshape(B, -1, tile, *x.shape[2:]), 1, 0)
  tiles = (split(jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))), split(jnp.pad(targets, ((0, 0), (0, short)))))
  out = jax.lax.map(lambda t: jax.checkpoint(logprobs)(*t), tiles)
  return jnp.moveaxis(out, 0, 1).reshape(B, -1)[:, :T]


def batch_logprobs(model, batch, remat=False):
  """fp32 [rows, T] log-probs of the batch's targets, zero where nothing is supervised."""
  hidden = llama.hidden_states(model, batch["tokens"], batch["positions"], batch["segments"], remat=remat)
  return jnp.where(batch["weights"] > 0, token_logprobs(model, hidden, batch["targets"]), 0.0)


def sequence_logprobs(logprobs, batch, sequences):
  """Sum of the weighted token log-probs of every packed sequence, [sequences]; padding falls into a spare bin."""
  index = jnp.where(batch["example"] >= 0, batch["example"], sequences)
  sums = jax.ops.segment_sum((logprobs * batch["weights"]).ravel(), index.ravel(), sequences + 1)
  return sums[:sequences]


def sft(model, batch, remat=False):
  """(loss, metrics): total NLL over the global batch divided by its target tokens."""
  logprobs = batch_logprobs(model, batch, remat)
  tokens = jnp.maximum(batch["weights"].sum(), 1.0)
  loss = -(logprobs * batch["weights"]).sum() / tokens
  return loss, {"loss": loss, "target_tokens": tokens}


def dpo(model, batch, beta, remat=False):
  """(loss, metrics). Sequence 2i is pair i's chosen, 2i + 1 its rejected; `reference` [pairs, 2] holds the reference's
  log-probs and `real` [pairs] is 0 for pairs that only fill the batch up."""
  pairs = batch["reference"].shape[0]
  logprobs = sequence_logprobs(batch_logprobs(model, batch, remat), batch, 2 * pairs).reshape(pairs, 2)
  loss, metrics = dpo_of(logprobs, batch["reference"], batch["real"], beta)
  return loss, metrics | {"target_tokens": batch["weights"].sum()}


def dpo_of(logprobs, reference, real, beta):
  """`dpo` from the log-probs [pairs, 2] of both sides: -log sigmoid(beta h), h the difference of the log-ratios."""
  reward = beta * (logprobs - reference)
  margin = reward[:, 0] - reward[:, 1]
  count = jnp.maximum(real.sum(), 1.0)
  mean = lambda x: (x * real).sum() / count
  loss = mean(-jax.nn.log_sigmoid(margin))
  return loss, {
    "loss": loss,
    "margin": mean(margin),
    "accuracy": mean(margin > 0),
    "chosen_logprob": mean(logprobs[:, 0]),
    "rejected_logprob": mean(logprobs[:, 1]),
  }
