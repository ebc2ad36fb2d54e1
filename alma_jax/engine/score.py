"""Scoring: what a judge thinks of a response, without generating anything.

Each row is a full judge prompt that ends right after the forced answer opening (plus the first digits that longer
scores share, when a tokenizer splits "10"). One forward pass gives the log-probabilities at the last positions;
`text.judge` turns them into the probabilities of the eleven scores.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alma_jax.engine import buckets
from alma_jax.llama import model as llama


@functools.partial(jax.jit, static_argnames="reads")
def _read(model, tokens, lengths, columns, reads):
  T = tokens.shape[1]
  positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
  segments = (positions < lengths[:, None]).astype(jnp.int32)
  hidden = llama.hidden_states(model, tokens, positions, segments)
  places = lengths[:, None] - reads + jnp.arange(reads)
  z = llama.logits(model, jnp.take_along_axis(hidden, places[..., None], axis=1))
  return z[..., columns] - jax.nn.logsumexp(z, axis=-1, keepdims=True)


def next_logprobs(model, rows, columns, reads, batch, place=lambda x: x, progress=None):
  """fp32 [rows, reads, columns]: log p(token) for the given token ids after each of the last `reads` positions of
  every row (a sequence of token ids). Rows go in fixed batches of one length bucket each; the order is kept."""
  out = np.zeros((len(rows), reads, len(columns)), np.float32)
  columns = jnp.asarray(columns, jnp.int32)
  for take, tokens, lengths in buckets.batches(rows, batch, least=reads):
    out[take] = np.asarray(_read(model, place(tokens), place(lengths), columns, reads))[: len(take)]
    if progress:
      progress(len(take))
  return out
