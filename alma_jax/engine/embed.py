"""Embeddings of prompts: the base model's final-norm hidden states, averaged over the prompt's tokens without BOS.

BOS is left out because Llama parks huge activations on the first token, which would own every distance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alma_jax.engine import buckets
from alma_jax.llama import model as llama
from alma_jax.llama.sharding import REPLICA, WHOLE, per_replica, replicas


@functools.partial(jax.jit, static_argnames="mesh")
def _mean_states(model, tokens, lengths, mesh):
  def mean_states(model, tokens, lengths):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = llama.hidden_states(model, tokens, positions, segments).astype(jnp.float32)
    counted = ((positions > 0) & (positions < lengths[:, None])).astype(jnp.float32)[..., None]
    return (hidden * counted).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1.0)

  return per_replica(mean_states, mesh, (WHOLE, REPLICA, REPLICA), REPLICA)(model, tokens, lengths)


def embeddings(model, rows, batch, mesh=None, progress=None):
  """fp32 [rows, D] for rows of token ids that begin with BOS; length buckets in batches of `batch` rows for each
  replica of the model, the order is kept."""
  out = np.zeros((len(rows), model.c.width), np.float32)
  for take, tokens, lengths in buckets.batches(rows, batch * replicas(mesh)):
    out[take] = np.asarray(_mean_states(model, tokens, lengths, mesh=mesh))[: len(take)]
    if progress:
      progress(len(take))
  return out


def whitened(x):
  """Centred, each dimension by its deviation (floored, so that dead dimensions stay small), rows of unit length."""
  x = np.asarray(x, np.float32)  # they are kept in fp16, in which the floors below would be 0
  x = x - x.mean(axis=0)
  deviation = x.std(axis=0)
  x = x / np.maximum(deviation, 1e-3 * np.median(deviation) + 1e-12)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
