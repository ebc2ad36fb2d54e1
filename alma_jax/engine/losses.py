"""Log-probabilities and losses, all fp32, over one core: `token_logprobs`.

Everything that trains or scores sequences (SFT, DPO, the judge, reference log-probs) goes through that core. It makes
(rows, vocab) logits at once only while they are small; beyond `TILE_BYTES` it walks over row tiles and recomputes
them in the backward pass, so (batch, time, vocab) never exists when it would be large.
"""

import jax
import jax.numpy as jnp

from alma_jax.llama import model as llama

TILE_BYTES = 512 * 2**20  # of fp32 logits


def token_logprobs(model, hidden, targets):
  """fp32 log p(target) for hidden [..., D] and targets [...]."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  flat = targets.reshape(-1)
  tile = max(8, TILE_BYTES // (4 * model.c.vocab))

  def logprobs(x, y):
    z = llama.logits(model, x)
    return jnp.take_along_axis(z, y[:, None], axis=1)[:, 0] - jax.nn.logsumexp(z, axis=-1)

  if rows.shape[0] <= tile:
    return logprobs(rows, flat).reshape(targets.shape)
  short = -rows.shape[0] % tile
  rows, flat = jnp.pad(rows, ((0, short), (0, 0))), jnp.pad(flat, (0, short))
  tiles = (rows.reshape(-1, tile, rows.shape[-1]), flat.reshape(-1, tile))
  out = jax.lax.map(lambda t: jax.checkpoint(logprobs)(*t), tiles)
  return out.reshape(-1)[: targets.size].reshape(targets.shape)


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
  reward = beta * (logprobs - batch["reference"])
  margin = reward[:, 0] - reward[:, 1]
  real = batch["real"]
  count = jnp.maximum(real.sum(), 1.0)
  mean = lambda x: (x * real).sum() / count
  loss = mean(-jax.nn.log_sigmoid(margin))
  return loss, {
    "loss": loss,
    "margin": mean(margin),
    "accuracy": mean(margin > 0),
    "chosen_logprob": mean(logprobs[:, 0]),
    "rejected_logprob": mean(logprobs[:, 1]),
    "target_tokens": batch["weights"].sum(),
  }
