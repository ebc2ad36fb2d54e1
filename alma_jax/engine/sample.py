"""Sampling: continuations of many prompts, several per prompt, from one model on the local devices.

A fixed number of slots decodes together in compiled segments of a few steps; between segments the host hands finished
slots to the next request. A prompt is prefilled once for all its samples that start together. Every request brings its
own key, and token t of a request is drawn by inverse CDF from one uniform number of (key, t): the same request gives
the same tokens whatever else is in the batch.

    results = sample(unrolled_model, requests, Decoding(max_new_tokens=64, stop_ids=(2,), temperature=0.7), slots=64)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets
from alma_jax.llama import model as llama


@dataclasses.dataclass(frozen=True)
class Decoding:
  max_new_tokens: int
  stop_ids: tuple
  temperature: float = 1.0  # 0: greedy
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Request:
  prompt: tuple  # token ids
  key: tuple  # two 32-bit words, see `request_key`


@dataclasses.dataclass(frozen=True)
class Sampled:
  tokens: tuple  # without the stop token
  finished: bool  # a stop token was drawn
  logprob: float  # of all drawn tokens, the stop token included, at temperature 1


STEPS = 8  # decode steps per compiled segment
PREFILL_ROWS = 16  # prompts prefilled per call


def choose(logits, uniform, decoding):
  """One token per row of fp32 logits [B, V] from one uniform number each; exact, and greedy takes the lowest index."""
  if decoding.temperature == 0:
    return jnp.argmax(logits, axis=-1)
  p = jax.nn.softmax(logits / decoding.temperature, axis=-1)
  if decoding.top_p < 1:
    order = jnp.argsort(-p, axis=-1, stable=True)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # mass ranked above a token: it stays while that is below top_p
    kept = jnp.where(before < max(decoding.top_p, 1e-30), ranked, 0.0)  # the first one always stays
    return jnp.take_along_axis(order, _inverse_cdf(kept, uniform)[:, None], axis=-1)[:, 0]
  return _inverse_cdf(p, uniform)


def _inverse_cdf(p, uniform):
  """The first token whose cumulative mass is above the number. A parallel sum is not quite monotonic, so tokens of
  probability 0 are ruled out by name, and where rounding leaves none, it is the last of the others."""
  cdf, possible = jnp.cumsum(p, axis=-1), p > 0
  reached = possible & (cdf > uniform[:, None] * cdf[:, -1:])
  last = p.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
  return jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), last)


@functools.partial(jax.jit, static_argnames=("slots", "capacity", "max_new", "rows"))
def _empty(model, slots, capacity, max_new, rows):
  """The state with nothing in any slot. It is made where it stays (`rows`: the slots' sharding, if they have one): the
  cache of all devices would not fit on one."""
  state = {
    "cache": llama.new_cache(model, slots, capacity),
    "logits": jnp.zeros((slots, model.c.vocab), jnp.float32),
    "length": jnp.zeros(slots, jnp.int32),
    "count": jnp.zeros(slots, jnp.int32),
    "done": jnp.ones(slots, bool),
    "key": jnp.zeros((slots, 2), jnp.uint32),
    "tokens": jnp.zeros((slots, max_new), jnp.int32),
    "logprob": jnp.zeros(slots, jnp.float32),
  }
  if rows is None:
    return state
  mesh, ways = rows.mesh, rows.mesh.shape["tensor"]
  tensor = lambda size: "tensor" if size % ways == 0 else None
  whole = jax.tree.map(lambda x: rows, state)
  heads = NamedSharding(mesh, P(*rows.spec, None, tensor(model.c.kv_heads)))
  logits = NamedSharding(mesh, P(*rows.spec, tensor(model.c.vocab)))
  shardings = whole | {"cache": jax.tree.map(lambda x: heads, state["cache"]), "logits": logits}
  return jax.lax.with_sharding_constraint(state, shardings)


@functools.partial(jax.jit, donate_argnames="state")
def _fill(model, state, tokens, lengths, source, keys):
  """Prefill prompts [P, T] and put prompt source[b] into slot b where source[b] >= 0."""
  hidden, kv = llama.prefill(model, tokens, (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32))
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  fresh, row = source >= 0, jnp.maximum(source, 0)
  put = lambda old, new: jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  write = lambda buffer, new: buffer.at[:, : tokens.shape[1]].set(put(buffer[:, : tokens.shape[1]], new[row]))
  return {
    "cache": jax.tree.map(write, state["cache"], kv),
    "logits": put(state["logits"], llama.logits(model, last)[row]),
    "length": put(state["length"], lengths[row]),
    "count": put(state["count"], jnp.zeros_like(row)),
    "done": put(state["done"], jnp.zeros_like(fresh)),
    "key": put(state["key"], keys),
    "tokens": state["tokens"],
    "logprob": put(state["logprob"], jnp.zeros(row.shape, jnp.float32)),
  }


@functools.partial(jax.jit, donate_argnames="state", static_argnames="decoding")
def _segment(model, state, decoding):
  """STEPS decode steps on all slots; finished slots stand still."""
  stops = jnp.asarray(decoding.stop_ids, jnp.int32)

  def step(_, s):
    fold = lambda key, count: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), count))
    token = choose(s["logits"], jax.vmap(fold)(s["key"], s["count"]), decoding).astype(jnp.int32)
    logprob = jnp.take_along_axis(s["logits"], token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(s["logits"], axis=-1)
    live = ~s["done"]
    place = jnp.minimum(s["count"], decoding.max_new_tokens - 1)
    # Written row by row: indexed with [rows, place], every device would ask all others for their rows' indices.
    put = lambda written, at, token, live: written.at[at].set(jnp.where(live, token, written[at]))
    tokens = jax.vmap(put)(s["tokens"], place, token, live)
    count = s["count"] + live
    done = s["done"] | (token[:, None] == stops).any(axis=1) | (count >= decoding.max_new_tokens)
    hidden, cache = llama.decode(model, token, s["length"], s["cache"])
    return {
      "cache": cache,
      "logits": llama.logits(model, hidden),
      "length": jnp.where(done, s["length"], s["length"] + 1),
      "count": count,
      "done": done,
      "key": s["key"],
      "tokens": tokens,
      "logprob": s["logprob"] + jnp.where(live, logprob, 0.0),
    }

  return jax.lax.fori_loop(0, STEPS, step, state)


def sample(model, requests, decoding, slots, longest_prompt=None, place=lambda x: x, progress=None):
  """list[Sampled] in the order of `requests`; the model is in the unrolled layout.

  `longest_prompt` fixes the prompt room (so that calls with shorter prompts share one compilation), `place` spreads
  host arrays with a leading slot axis over a mesh's devices, `progress(requests, tokens)` hears of what is finished.
  """
  requests = list(requests)
  if not requests:
    return []
  room = max(longest_prompt or 0, max(len(r.prompt) for r in requests))
  room = buckets.rounded(room)
  results, waiting = [None] * len(requests), list(range(len(requests)))[::-1]
  holds = np.full(slots, -1)  # the request in each slot
  rows = getattr(place(holds), "sharding", None)
  state = _empty(model, slots, room + decoding.max_new_tokens, decoding.max_new_tokens, rows)
  while waiting or (holds >= 0).any():
    state, holds = _refill(model, state, requests, waiting, holds, room, place)
    state = _segment(model, state, decoding)
    done, count = np.asarray(state["done"]), np.asarray(state["count"])
    ended = np.flatnonzero(done & (holds >= 0))
    if len(ended):
      tokens, logprob = np.asarray(state["tokens"]), np.asarray(state["logprob"])
      for slot in ended:
        drawn = tuple(int(t) for t in tokens[slot, : count[slot]])
        stopped = drawn[-1] in decoding.stop_ids
        results[holds[slot]] = Sampled(drawn[:-1] if stopped else drawn, stopped, float(logprob[slot]))
      holds[ended] = -1
      if progress:
        progress(len(ended), int(count[ended].sum()))
  return results


def _refill(model, state, requests, waiting, holds, room, place):
  """Hand free slots to waiting requests, a prompt's samples together, PREFILL_ROWS prompts per compiled call."""
  free = list(np.flatnonzero(holds < 0))[::-1]
  while free and waiting:
    prompts, source, keys = {}, np.full(len(holds), -1, np.int32), np.zeros((len(holds), 2), np.uint32)
    while free and waiting:
      request = requests[waiting[-1]]
      if request.prompt not in prompts and len(prompts) == PREFILL_ROWS:
        break
      slot = free.pop()
      source[slot] = prompts.setdefault(request.prompt, len(prompts))
      keys[slot] = request.key
      holds[slot] = waiting.pop()
    tokens, lengths = np.zeros((PREFILL_ROWS, room), np.int32), np.ones(PREFILL_ROWS, np.int32)
    for prompt, row in prompts.items():
      tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    state = _fill(model, state, tokens, lengths, place(source), place(keys))
  return state, holds
