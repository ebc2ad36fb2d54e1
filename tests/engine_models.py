"""A tiny random Llama for the engine's tests, and its results computed the slow way: one row, no padding, no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from alma_jax.llama import model as llama
from alma_jax.llama import sharding
from alma_jax.llama.config import LlamaConfig

CONFIG = LlamaConfig(
  vocab=96,
  width=32,
  depth=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ffn=64,
  norm_eps=1e-5,
  rope_base=10000.0,
  rope_scaling=None,
  tied=False,
  max_positions=128,
)


@functools.cache
def stacked(seed=0):
  """Logits with a deviation of about 2, so that some tokens are likely and many are not."""
  model = jax.jit(llama.init, static_argnums=(0, 1))(CONFIG, seed)
  model.head[...] = 2 * model.head[...]
  return model


@functools.cache
def unrolled(seed=0):
  return jax.jit(llama.unrolled)(stacked(seed))


def on_mesh(model, mesh, rules=sharding.TRAIN):
  return jax.device_put(model, sharding.shardings(jax.eval_shape(lambda: model), mesh, rules))


@jax.jit
def _hidden_and_logits(model, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = llama.hidden_states(model, tokens, positions, jnp.ones_like(tokens))
  return hidden[0], llama.logits(model, hidden)[0]


def hidden_states(model, ids):
  """float64 [T, D] of one row."""
  return np.asarray(_hidden_and_logits(model, np.asarray(ids, np.int32)[None])[0], np.float64)


def logprobs(model, ids, room=None):
  """float64 log-softmax [T, V] of one row; `room` pads it with zeros, which a causal model does not see."""
  padded = np.zeros((1, room or len(ids)), np.int32)
  padded[0, : len(ids)] = ids
  return log_softmax(np.asarray(_hidden_and_logits(model, padded)[1], np.float64)[: len(ids)])


def log_softmax(z):
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def exact(logits, temperature, top_p):
  """float64 probabilities after temperature and top-p. As in transformers' TopPLogitsWarper, tokens are dropped in
  ascending order while their cumulative probability is at most 1 - top_p; the likeliest always stays."""
  p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
  order = np.argsort(p, kind="stable")
  gone = np.cumsum(p[order]) <= 1 - top_p
  gone[-1] = False
  p[order[gone]] = 0
  return p / p.sum()


def assert_drawn_from(p, tokens):
  """A chi-square test; rare tokens are counted together."""
  drawn, wanted = np.bincount(tokens, minlength=len(p)), len(tokens) * p
  assert drawn[p == 0].sum() == 0
  common = wanted >= 5
  drawn, wanted = (np.append(x[common], x[~common].sum()) for x in (drawn, wanted))
  drawn, wanted = drawn[wanted > 0], wanted[wanted > 0]
  assert len(wanted) > 2
  assert scipy.stats.chisquare(drawn, wanted).pvalue > 1e-3
