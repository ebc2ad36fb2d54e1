"""Sampling: continuations of many prompts, several per prompt, from one model on the local devices.

A fixed number of slots decodes together in compiled segments of a few steps; between segments the host hands finished
slots to the next request. A prompt's keys and values are computed once and shared by all its samples; what many prompts
begin with is computed once, too. Every request brings its own key, and token t of a request is drawn by inverse CDF
from one uniform number of (key, t): the same request gives the same tokens whatever else is in the batch.

    results = sample(unrolled_model, requests, Decoding(max_new_tokens=64, stop_ids=(2,), temperature=0.7), slots=64)

Under a mesh every group of `tensor` devices is a replica with its own share of the slots; the replicas take requests
from one queue and exchange nothing.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets, prefixes
from alma_jax.engine.choose import Decoding, choose
from alma_jax.errors import UserError
from alma_jax.llama import model as llama
from alma_jax.llama.sharding import BATCH, REPLICA, WHOLE, per_replica, replicas

__all__ = ["Decoding", "Request", "Sampled", "SlotsError", "plan_for", "sample", "slots_that_fit"]


@dataclasses.dataclass(frozen=True)
class Request:
  prompt: tuple  # token ids
  key: tuple  # two 32-bit words, whatever tells the request from all others


@dataclasses.dataclass(frozen=True)
class Sampled:
  tokens: tuple  # without the stop token
  finished: bool  # a stop token was drawn, or `ends` said so
  logprobs: tuple  # of all drawn tokens, the stop token included, as the model gives them (before any warping)


TILE = 16  # slots of one prompt that read its keys together
PREFILL_ROWS = 8  # prompts prefilled per call; a single one goes alone
CHUNK = 64  # requests of one prompt that a replica takes at a time
MOST_SLOTS = 512  # more do not decode faster: from a few hundred on, the matrix products are the limit


# On the devices. Every array of the state leads with the slots or with the prompts' rows, a replica's own share.


@functools.partial(jax.jit, static_argnames=("plan", "decoding", "mesh"))
def _empty(model, plan, decoding, mesh):
  """The state with nothing in any slot. It is made where it stays: the cache of all devices would not fit on one."""
  c, ways = model.c, replicas(mesh)
  slots, rows = plan.slots * ways, plan.rows * ways
  state = {
    "cache": llama.new_cache(model, slots, decoding.max_new_tokens),
    "prefix": llama.new_cache(model, rows, plan.room),
    "prefix_length": jnp.zeros(rows, jnp.int32),
    "prefix_logits": jnp.zeros((rows, c.vocab), jnp.float32),
    "logits": jnp.zeros((slots, c.vocab), jnp.float32),
    "count": jnp.zeros(slots, jnp.int32),
    "done": jnp.ones(slots, bool),
    "key": jnp.zeros((slots, 2), jnp.uint32),
    "tokens": jnp.zeros((slots, decoding.max_new_tokens), jnp.int32),
    "logprobs": jnp.zeros((slots, decoding.max_new_tokens), jnp.float32),
  }
  if decoding.remembers:
    state["said"] = jnp.zeros((slots, c.vocab), bool)
  return state if mesh is None else jax.lax.with_sharding_constraint(state, _placed(state, c, mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def _head(model, tokens, lengths, mesh):
  """Keys and values of one head per replica."""
  prefill = lambda model, *rows: llama.prefill(model, *rows)[1]
  return per_replica(prefill, mesh, (WHOLE, REPLICA, REPLICA), REPLICA)(model, tokens, lengths)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="mesh")
def _fill(model, state, head, tokens, lengths, into, mesh):
  """Prefill prompts and put them into the rows `into` of the prefixes; a row that is none is left out.

  head: (keys and values, lengths) of what all prompts of a replica begin with, or None; `tokens` is what follows.
  """

  def fill(model, state, head, tokens, lengths, into):
    hidden, kv = llama.prefill(model, tokens, lengths, None if head is None else llama.Prefix(*head))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    before = 0 if head is None else head[1][0]
    room = state["prefix"][0][0].shape[1]

    def whole(rest, start=None):
      """[rows, room]: the head and then the rest."""
      if start is None:
        return jnp.pad(rest, ((0, 0), (0, room - rest.shape[1]), (0, 0), (0, 0)))
      start = jnp.broadcast_to(start, (rest.shape[0], *start.shape[1:]))
      buffer = jnp.pad(start, ((0, 0), (0, room - start.shape[1] + rest.shape[1]), (0, 0), (0, 0)))
      return jax.lax.dynamic_update_slice_in_dim(buffer, rest, before, axis=1)[:, :room]

    put = lambda old, new: old.at[into].set(new, mode="drop")
    new = {
      "prefix": jax.tree.map(put, state["prefix"], jax.tree.map(whole, kv, *(() if head is None else (head[0],)))),
      "prefix_length": put(state["prefix_length"], lengths + before),
      "prefix_logits": put(state["prefix_logits"], llama.logits(model, last)),
    }
    return state | new

  specs = (WHOLE, *(REPLICA,) * 5)
  return per_replica(fill, mesh, specs, REPLICA)(model, state, head, tokens, lengths, into)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("decoding", "mesh"))
def _start(state, rows, keys, said, decoding, mesh):
  """Slots with rows[b] >= 0 begin a request with the prompt of that row. `said`: the prompts' tokens [rows, room] where
  they count, padded with the vocabulary's size."""

  def start(state, rows, keys, said):
    fresh, row = rows >= 0, jnp.maximum(rows, 0)
    put = lambda old, new: jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)
    new = {
      "logits": put(state["logits"], state["prefix_logits"][row]),
      "count": put(state["count"], jnp.zeros_like(row)),
      "key": put(state["key"], keys),
    }
    if decoding.remembers:
      mark = jax.vmap(lambda tokens: jnp.zeros(state["said"].shape[1], bool).at[tokens].set(True, mode="drop"))
      new["said"] = put(state["said"], mark(said)[row])
    return state | new

  return per_replica(start, mesh, (REPLICA,) * 4, REPLICA)(state, rows, keys, said)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("decoding", "steps", "mesh"))
def _segment(model, state, tiles, decoding, steps, mesh):
  """So many decode steps on all slots; finished slots stand still."""

  def segment(model, state, tiles):
    prefix = llama.Prefix(state["prefix"], state["prefix_length"])
    stops = jnp.asarray(decoding.stop_ids, jnp.int32)
    changing = {k: v for k, v in state.items() if not k.startswith("prefix")}

    def step(_, s):
      fold = lambda key, count: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), count))
      token, logprob = choose(s["logits"], jax.vmap(fold)(s["key"], s["count"]), decoding, s.get("said"), s["count"])
      token, live = token.astype(jnp.int32), ~s["done"]
      # A slot that is over reads and writes its first place only, which nobody needs any more.
      place = jnp.where(live, jnp.minimum(s["count"], decoding.max_new_tokens - 1), 0)
      put = jax.vmap(lambda row, at, new, live: row.at[at].set(jnp.where(live, new, row[at])))
      count = s["count"] + live
      hidden, cache = llama.decode(model, token, place, s["cache"], prefix, tiles)
      new = {
        "cache": cache,
        "logits": llama.logits(model, hidden),
        "count": count,
        "done": s["done"] | (token[:, None] == stops).any(axis=1) | (count >= decoding.max_new_tokens),
        "key": s["key"],
        "tokens": put(s["tokens"], place, token, live),
        "logprobs": put(s["logprobs"], place, logprob, live),
      }
      return new | ({"said": put(s["said"], token, live, live)} if decoding.remembers else {})

    return state | jax.lax.fori_loop(0, steps, step, changing)

  return per_replica(segment, mesh, (WHOLE, REPLICA, REPLICA), REPLICA)(model, state, tiles)


def _placed(state, c, mesh):
  """Shares of the batch axes; heads and vocabulary over `tensor`, too, where it divides them."""
  tensor = lambda size: "tensor" if size % mesh.shape["tensor"] == 0 else None
  sharding = lambda *axes: NamedSharding(mesh, P(BATCH, *axes))
  heads_, vocab = sharding(None, tensor(c.kv_heads)), sharding(tensor(c.vocab))
  special = {"cache": heads_, "prefix": heads_, "logits": vocab, "prefix_logits": vocab}
  return {name: jax.tree.map(lambda x: special.get(name, sharding()), leaf) for name, leaf in state.items()}


# On the host


@dataclasses.dataclass(frozen=True)
class Plan:
  """The shapes of a call, per replica. They follow from few coarse classes, so that calls of one kind share them."""

  slots: int
  rows: int  # prompts whose keys and values are held
  room: int  # tokens per prompt
  tile: int  # slots per tile; 1: slot b has row b

  @property
  def tiles(self):
    """Enough for any distribution of the slots over the rows."""
    return self.rows + self.slots // self.tile


def plan_for(slots, room, samples_per_prompt):
  """Prompts linger until their longest sample ends, so more rows are held than slots / samples."""
  if samples_per_prompt < 2:
    return Plan(slots, slots, room, 1)
  share, tile = (1, 4) if samples_per_prompt < 5 else (4, TILE) if samples_per_prompt < 32 else (8, TILE)
  return Plan(slots, min(slots, max(8, slots // share)), room, tile)


def sample(model, requests, decoding, slots, longest_prompt=None, mesh=None, progress=None, ends=None):
  """list[Sampled] in the order of `requests`; the model is in the unrolled layout, on the devices of `mesh`.

  `slots`: per replica. `longest_prompt` fixes the room for prompts, so that calls with shorter ones compile nothing.
  `progress(requests, tokens)` hears of what is finished. `ends(request, tokens, seen)` looks at what a request has so
  far (of which it knows the first `seen`) and gives the number of tokens after which it is over, or None.
  """
  requests = list(requests)
  if not requests:
    return []
  prompts = list(dict.fromkeys(r.prompt for r in requests))
  if not min(map(len, prompts)):
    raise ValueError("a prompt has no tokens: there is nothing to continue")
  room = buckets.rounded(max(longest_prompt or 0, max(map(len, prompts))))
  plan = plan_for(slots, room, len(requests) / len(prompts))
  mesh = None if mesh is None or mesh.size == 1 else mesh
  call = _Call(model, requests, decoding, plan, mesh)
  # As long as a refill pays: short answers end, and free their slots, after fewer steps.
  steps = min(16, max(4, decoding.max_new_tokens // 48))
  results, seen = [None] * len(requests), np.zeros(len(requests), int)
  while call.refill():
    state = call.decode(steps)
    done, count = np.asarray(state["done"]), np.asarray(state["count"])
    held = np.flatnonzero(call.holds >= 0)
    tokens = logprobs = None
    if ends or done[held].any():
      tokens, logprobs = np.asarray(state["tokens"]), np.asarray(state["logprobs"])
    for slot in held:
      request, n = call.holds[slot], int(count[slot])
      if not (ends or done[slot]):
        continue
      drawn = tuple(tokens[slot, :n].tolist())
      finished = bool(done[slot]) and drawn[-1] in decoding.stop_ids
      kept = drawn[:-1] if finished else drawn
      end = ends(requests[request], kept, int(seen[request])) if ends else None
      seen[request] = len(kept)
      if end is None and not done[slot]:
        continue
      if end is not None:
        kept, finished, n = kept[:end], True, end
      results[request] = Sampled(kept, finished, tuple(logprobs[slot, :n].tolist()))
      call.holds[slot] = -1
      if progress:
        progress(1, n)
  return results


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """Requests of one prompt, and how much of it is a head that others share."""

  prompt: tuple
  head: tuple
  requests: list


class _Call:
  """The device state of one call of `sample`, and what the host knows of it: who is in which slot and row."""

  def __init__(self, model, requests, decoding, plan, mesh):
    self.model, self.requests, self.decoding, self.plan, self.mesh = model, requests, decoding, plan, mesh
    self.ways = replicas(mesh)
    self.state = _empty(model, plan, decoding, mesh)
    self.holds = np.full(self.ways * plan.slots, -1)  # the request in each slot
    self.row = np.zeros(self.ways * plan.slots, int)  # and the row of its prompt, in its replica
    self.prompts = [[None] * plan.rows for _ in range(self.ways)]
    self.waiting = [collections.deque() for _ in range(self.ways)]  # of the chunk that each replica has at hand
    self.queue = collections.deque(_chunks(requests, CHUNK if plan.tile > 1 else 1))
    self.head = (None, None)  # the heads of the replicas, and their keys and values

  def refill(self):
    """Hand free slots to waiting requests; whether any slot is at work then."""
    starts = []
    while True:
      taken = [self._take(replica) for replica in range(self.ways)]
      starts += [start for _, more in taken for start in more]
      if any(fills for fills, _ in taken):
        self._fill([fills for fills, _ in taken])
      if not any(more for _, more in taken):
        break
    if starts:
      rows, keys = np.full(self.holds.size, -1, np.int32), np.zeros((self.holds.size, 2), np.uint32)
      for slot, row, request in starts:
        rows[slot], keys[slot] = row, self.requests[request].key
      self.state = _start(self.state, rows, keys, self._said(), decoding=self.decoding, mesh=self.mesh)
    return (self.holds >= 0).any()

  def _take(self, replica):
    """([(row, chunk)] to prefill, [(slot, row, request)] to start): as many as one prefill serves."""
    plan, fills, starts = self.plan, [], []
    mine = slice(replica * plan.slots, (replica + 1) * plan.slots)
    holds, row_of, prompts, waiting = self.holds[mine], self.row[mine], self.prompts[replica], self.waiting[replica]
    for slot in np.flatnonzero(holds < 0):
      if not waiting:
        if not self.queue:
          break
        chunk = self.queue[0]
        row = next((r for r, p in enumerate(prompts) if p == chunk.prompt), None) if plan.tile > 1 else None
        if row is None:
          if len(fills) == PREFILL_ROWS or (fills and fills[0][1].head != chunk.head):
            break
          used = np.bincount(row_of[holds >= 0], minlength=plan.rows)
          row = slot if plan.tile == 1 else next((r for r in range(plan.rows) if not used[r]), None)
          if row is None:  # every row has a sample that is not over: the slot waits for one
            break
          prompts[row] = chunk.prompt
          fills.append((row, chunk))
        self.queue.popleft()
        waiting.extend((row, request) for request in chunk.requests)
      row, request = waiting.popleft()
      holds[slot], row_of[slot] = request, row
      starts.append((mine.start + slot, row, request))
    return fills, starts

  def _fill(self, fills):
    """One prefill for all replicas. fills: [(row, chunk)] of each."""
    plan, rows = self.plan, 1 if max(map(len, fills)) == 1 else PREFILL_ROWS
    heads_ = tuple(mine[0][1].head if mine else () for mine in fills)
    rests = [[chunk.prompt[len(head) :] for _, chunk in mine] for mine, head in zip(fills, heads_)]
    tokens, lengths = _padded([rest for mine in rests for rest in mine + [()] * (rows - len(mine))], plan.room)
    into = np.concatenate([[r for r, _ in mine] + [plan.rows] * (rows - len(mine)) for mine in fills])
    head = None
    if any(heads_):
      if self.head[0] != heads_:
        self.head = heads_, _head(self.model, *_padded(heads_, plan.room), mesh=self.mesh)
      head = self.head[1], np.array([len(h) for h in heads_], np.int32)
    self.state = _fill(self.model, self.state, head, tokens, lengths, into.astype(np.int32), mesh=self.mesh)

  def _said(self):
    """The prompts' tokens of all rows, if the penalty counts them."""
    if not self.decoding.remembers:
      return None
    said = np.full((self.ways * self.plan.rows, self.plan.room), self.model.c.vocab, np.int32)
    if self.decoding.penalize_prompt:
      for row, prompt in enumerate(p for mine in self.prompts for p in mine):
        said[row, : len(prompt or ())] = prompt or ()
    return said

  def decode(self, steps):
    """The state after so many steps."""
    tiles = None if self.plan.tile == 1 else self._tiles()
    state = self.state | {"done": self.holds < 0}  # also those that `ends` ended
    self.state = _segment(self.model, state, tiles, decoding=self.decoding, steps=steps, mesh=self.mesh)
    return self.state

  def _tiles(self):
    plan, made = self.plan, []
    for replica in range(self.ways):
      mine = slice(replica * plan.slots, (replica + 1) * plan.slots)
      prefix, slots = np.full(plan.tiles, -1, np.int32), np.zeros((plan.tiles, plan.tile), np.int32)
      place, tile = np.zeros(plan.slots, np.int32), 0
      live = np.flatnonzero(self.holds[mine] >= 0)
      rows = self.row[mine][live]
      for row in np.unique(rows):
        members = live[rows == row]
        for start in range(0, len(members), plan.tile):
          some = members[start : start + plan.tile]
          prefix[tile], slots[tile, : len(some)] = row, some
          place[some] = tile * plan.tile + np.arange(len(some))
          tile += 1
      made.append(llama.Tiles(prefix, slots, place))
    return jax.tree.map(lambda *x: np.concatenate(x), *made)


def _chunks(requests, size):
  """The requests in the order of work: prompts that share a head together, a prompt's samples together."""
  of = collections.defaultdict(list)
  for i, request in enumerate(requests):
    of[request.prompt].append(i)
  prompts = list(of)
  for length, members in prefixes.plan(prompts):
    for prompt in (prompts[i] for i in members):
      for start in range(0, len(of[prompt]), size):
        yield _Chunk(prompt, prompt[:length], of[prompt][start : start + size])


def _padded(rows, room):
  """(tokens [rows, width], lengths): the width is one of few. An empty row has one token, which nobody reads."""
  width = min(room, buckets.rounded(max(map(len, rows))))
  return buckets.padded([row or None for row in rows], width, least=1)


# Memory


class SlotsError(UserError):
  """The devices have no room for what is asked; the message says what would fit."""


def slots_that_fit(model, decoding, longest_prompt, samples_per_prompt, free, mesh=None, wanted=0):
  """How many slots each replica has room for in `free` bytes per device, at most MOST_SLOTS; or those that are
  `wanted`, if they fit. Where nobody knows what is free (None: CPUs) it is what is wanted, or 64."""
  if free is None:
    return wanted or 64
  room = buckets.rounded(longest_prompt)
  needed = lambda slots: _bytes(model, decoding, plan_for(slots, room, samples_per_prompt), mesh)
  if wanted and needed(wanted) <= free:
    return wanted
  fits = next((n for n in [*range(MOST_SLOTS, 0, -8), 4, 2, 1] if needed(n) <= free), 0)
  if fits and not wanted:
    return fits
  gib = lambda size: f"{size / 2**30:.1f} GiB"
  texts = f"prompts of {longest_prompt} and answers of {decoding.max_new_tokens} tokens"
  if fits:
    raise SlotsError(
      f"engine.slots is {wanted}: with {texts} they need {gib(needed(wanted))} on each device, and {gib(free)} are free"
      f" beside the weights. {fits} would fit; 0 takes as many as fit"
    )
  most = decoding.max_new_tokens + room + (free - needed(1)) // _token_bytes(model, mesh)
  raise SlotsError(
    f"not one sequence fits: {texts} need {gib(needed(1))} on each device, and {gib(free)} are free beside the weights."
    f" About {max(0, most):,} tokens in all would fit: lower max_prompt_tokens or max_new_tokens, or raise"
    " engine.tensor (devices that share one copy of the model)"
  )


def _bytes(model, decoding, plan, mesh):
  """What a call holds on each device beside the weights, and what it works with."""
  c, itemsize = model.c, model.embed[...].dtype.itemsize
  ways = 1 if mesh is None else mesh.shape["tensor"]
  cached = _token_bytes(model, mesh) * (plan.slots * decoding.max_new_tokens + plan.rows * plan.room)
  logits = 4 * c.vocab // (ways if c.vocab % ways == 0 else 1) * (4 * plan.slots + plan.rows)
  prefill = PREFILL_ROWS * plan.room * (4 * c.width + 3 * c.ffn // ways) * itemsize
  tiles = 2 * (0 if plan.tile == 1 else plan.tiles) * plan.room * _token_bytes(model, mesh) // c.depth
  return cached + logits + max(prefill, tiles)


def _token_bytes(model, mesh):
  """Keys and values of one token in all layers, on each device."""
  c, ways = model.c, 1 if mesh is None else mesh.shape["tensor"]
  heads_ = c.kv_heads // ways if c.kv_heads % ways == 0 else c.kv_heads
  return 2 * c.depth * heads_ * c.head_dim * model.embed[...].dtype.itemsize
