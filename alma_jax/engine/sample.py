"""Sampling: continuations of many prompts, several per prompt, from one model on the local devices.

A fixed number of slots decodes together in compiled segments of a few steps; between segments the host hands finished
slots to the next request. A prompt's keys and values are computed once and shared by all its samples; what many prompts
begin with is computed once, too. Every request brings its own key, and token t of a request is drawn by inverse CDF
from one uniform number of (key, t): the same request gives the same tokens whatever else is in the batch. Another
number of slots rounds differently: that changes last digits, and in bfloat16 on accelerators many tokens.

    results = sample(unrolled_model, requests, Decoding(max_new_tokens=64, stop_ids=(2,)), Limits(slots=64))

Under a mesh every group of `tensor` devices is a replica with its own share of the slots; the replicas take requests
from one queue and exchange nothing. What a replica holds, for two prompts p and q:

    slots     0   1   2   3   4   5     one request each; its answer's keys and values are the slot's own cache
    holds     r0  r1  r2  r7  -1  r3    the request in every slot; slot 4 is free
    rows      0: p    1: q    2: p      a prompt's keys and values, its length and the logits after it
    tiles     [0 1]   [3 .]   [2 5]     the slots that read a row together, so that its keys are read once for them
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.engine import buckets, prefixes
from alma_jax.engine.choose import Decoding, choose, sharpness_of
from alma_jax.engine.slots import PREFILL_ROWS, Shapes, shapes_at_hand, shapes_for
from alma_jax.errors import NotFinite
from alma_jax.keys import Key
from alma_jax.llama import decoder, reading
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.model import Llama
from alma_jax.llama.sharding import BATCH, REPLICA, WHOLE, per_replica, replicas

SEVERAL = 8  # samples of a prompt, wherever it has more than one and coarse shapes serve
CHUNK = 64  # requests of one prompt that a replica takes at a time

State = dict[str, Any]  # arrays by name; "cache" and "prefix" are trees of them
Head = tuple[Any, Array] | None  # keys and values, lengths [replicas]


@dataclasses.dataclass(frozen=True)
class Request:
  prompt: tuple[int, ...]  # token ids
  key: Key  # tells the request from all others
  name: str = ""  # for messages


@dataclasses.dataclass(frozen=True)
class Sampled:
  tokens: tuple[int, ...]  # without the stop token
  finished: bool  # a stop token was drawn, or `ends` said so
  logprobs: tuple[float, ...]  # of all drawn tokens, the stop token included, in the model's own distribution


@dataclasses.dataclass(frozen=True)
class Limits:
  slots: int  # on each replica, at most: fewer requests take fewer
  longest_prompt: int | None = None  # of this call and later ones: no room is made for more; None: this call's
  steps: int = 0  # tokens that are drawn before the host hears of them; 0: as many as pay
  fixed: bool = False  # all slots and all room, however few requests there are: calls share their programs and rounding


@dataclasses.dataclass(frozen=True)
class SamplingHooks:
  progress: Callable[[int, int], object] | None = None  # hears how many requests and tokens are finished
  # ends(request, tokens, seen) is asked after every segment about the tokens drawn so far; the first `seen` of them it
  # has been asked about before. A number ends the request with so many tokens, None lets it go on.
  ends: Callable[[Request, tuple[int, ...], int], int | None] | None = None


NO_HOOKS = SamplingHooks()


# On the devices. Every array of the state leads with the slots or with the prompts' rows, a replica's own share.


@functools.partial(jax.jit, static_argnames=("shapes", "decoding", "mesh"))
def _empty(model: Llama, shapes: Shapes, decoding: Decoding, mesh: Mesh | None) -> State:
  """The state with nothing in any slot. It is made where it stays: the cache of all devices would not fit on one."""
  c, ways = model.c, replicas(mesh)
  slots, rows = shapes.slots * ways, shapes.rows * ways
  state = {
    "cache": decoder.new_cache(model, slots, decoding.max_new_tokens, mesh),
    "prefix": decoder.new_cache(model, rows, shapes.room, mesh),
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
def _head(model: Llama, tokens: Array, lengths: Array, mesh: Mesh | None) -> Any:
  """Keys and values of one head per replica."""

  def prefill(model: Llama, tokens: Array, lengths: Array) -> Any:
    return reading.prefill(model, tokens, lengths)[1]

  return per_replica(prefill, mesh, (WHOLE, REPLICA, REPLICA), REPLICA)(model, tokens, lengths)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="mesh")
def _fill(
  model: Llama, state: State, head: Head, tokens: Array, lengths: Array, into: Array, mesh: Mesh | None
) -> State:
  """Prefill prompts into the rows `into` [R]; where that is past the last row, the place holds no prompt.

  head: what all prompts of a replica begin with; `tokens` [R, T] is what follows.
  """

  def fill(model: Llama, state: State, head: Head, tokens: Array, lengths: Array, into: Array) -> State:
    hidden, kv = reading.prefill(model, tokens, lengths, None if head is None else reading.Prefix(*head))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    before = 0 if head is None else head[1][0]
    room = state["prefix"][0][0].shape[1]

    def whole(rest: Array, start: Array | None = None) -> Array:
      """[R, room, K, H]: the head and then the rest, [start . . .] + [rest .] -> [start rest . .]."""
      if start is None:
        return jnp.pad(rest, ((0, 0), (0, room - rest.shape[1]), (0, 0), (0, 0)))
      start = jnp.broadcast_to(start, (rest.shape[0], *start.shape[1:]))
      # Wide enough for the rest wherever the head ends; what is past the room is padding.
      buffer = jnp.pad(start, ((0, 0), (0, room - start.shape[1] + rest.shape[1]), (0, 0), (0, 0)))
      return jax.lax.dynamic_update_slice_in_dim(buffer, rest, before, axis=1)[:, :room]

    def put(old: Array, new: Array) -> Array:
      return old.at[into].set(new.reshape(-1, *old.shape[1:]), mode="drop")

    new = {
      "prefix": jax.tree.map(put, state["prefix"], jax.tree.map(whole, kv, *(() if head is None else (head[0],)))),
      "prefix_length": put(state["prefix_length"], lengths + before),
      "prefix_logits": put(state["prefix_logits"], llama.logits(model, last)),
    }
    return state | new

  specs = (WHOLE, *(REPLICA,) * 5)
  return per_replica(fill, mesh, specs, REPLICA)(model, state, head, tokens, lengths, into)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="mesh")
def _copy(state: State, rows: Array, into: Array, mesh: Mesh | None) -> State:
  """Copies of the prompts in `rows` [R] in the rows `into`; where that is past the last row, nothing is copied."""

  def copy(state: State, rows: Array, into: Array) -> State:
    prompts = {name: x for name, x in state.items() if name.startswith("prefix")}
    return state | jax.tree.map(lambda x: x.at[into].set(x[rows], mode="drop"), prompts)

  return per_replica(copy, mesh, (REPLICA,) * 3, REPLICA)(state, rows, into)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("decoding", "mesh"))
def _start(state: State, rows: Array, keys: Array, said: Array | None, decoding: Decoding, mesh: Mesh | None) -> State:
  """Slots with rows[b] >= 0 begin a request with the prompt of that row. `said`: the prompts' tokens [rows, room] where
  they count, padded with the vocabulary's size."""

  def start(state: State, rows: Array, keys: Array, said: Array | None) -> State:
    fresh, row = rows >= 0, jnp.maximum(rows, 0)

    def put(old: Array, new: Array) -> Array:
      return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

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
def _segment(
  model: Llama, state: State, tiles: decoder.Tiles | None, decoding: Decoding, steps: int, mesh: Mesh | None
) -> State:
  """So many decode steps on all slots; finished slots stand still."""

  def segment(model: Llama, state: State, tiles: decoder.Tiles | None) -> State:
    prefix = reading.Prefix(state["prefix"], state["prefix_length"])
    stops = jnp.asarray(decoding.stop_ids, jnp.int32)
    changing = {k: v for k, v in state.items() if not k.startswith("prefix")}

    def uniform(key: Array, count: Array) -> Array:
      return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), count))

    def step(_: Array, s: State) -> State:
      # Token t of a request comes from the logits after token t - 1 and the uniform number of (key, t).
      drawn = jax.vmap(uniform)(s["key"], s["count"])
      token, logprob = choose(s["logits"], drawn, decoding, s.get("said"), s["count"], s.get("sharpness"))
      token, live = token.astype(jnp.int32), ~s["done"]
      # A slot that is over reads and writes its first place only, which is no longer needed.
      place = jnp.where(live, jnp.minimum(s["count"], decoding.max_new_tokens - 1), 0)
      put = jax.vmap(lambda row, at, new, live: row.at[at].set(jnp.where(live, new, row[at])))
      count = s["count"] + live
      # Its keys and values enter the slot's cache, and the logits for the next step are made.
      hidden, cache = decoder.decode(model, token, place, s["cache"], prefix, tiles)
      new = {
        "cache": cache,
        "logits": llama.logits(model, hidden),
        "count": count,
        "done": s["done"] | (token[:, None] == stops).any(axis=1) | (count >= decoding.max_new_tokens),
        "tokens": put(s["tokens"], place, token, live),
        "logprobs": put(s["logprobs"], place, logprob, live),
      }
      if decoding.remembers:
        new["said"] = put(s["said"], token, live, live)
      return s | new

    return state | jax.lax.fori_loop(0, steps, step, changing)

  return per_replica(segment, mesh, (WHOLE, REPLICA, REPLICA), REPLICA)(model, state, tiles)


def _placed(state: State, c: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
  """Shardings of the state: shares of the batch axes; heads and vocabulary over `tensor`, too, if it divides them."""

  def tensor(size: int) -> str | None:
    return "tensor" if size % mesh.shape["tensor"] == 0 else None

  own = NamedSharding(mesh, P(BATCH))
  heads = NamedSharding(mesh, P(BATCH, None, tensor(c.kv_heads)))
  vocab = NamedSharding(mesh, P(BATCH, tensor(c.vocab)))
  special = {"cache": heads, "prefix": heads, "logits": vocab, "prefix_logits": vocab}
  return {name: jax.tree.map(lambda x: special.get(name, own), leaf) for name, leaf in state.items()}


# On the host


def sample(
  model: Llama, requests: Sequence[Request], decoding: Decoding, limits: Limits, mesh: Mesh | None = None,
  hooks: SamplingHooks = NO_HOOKS,
) -> list[Sampled]:  # fmt: skip
  """The Sampled of each request, in their order. The model is in the unrolled layout, on the devices of `mesh`.

  NotFinite, with the request's index, if a token was drawn with a log-prob that is not finite.
  """
  requests = list(requests)
  if not requests:
    return []
  prompts = list(dict.fromkeys(r.prompt for r in requests))
  if not min(map(len, prompts)):
    raise ValueError("a prompt has no tokens: there is nothing to continue")
  lengths, mesh = [len(prompt) for prompt in prompts], None if mesh is None or mesh.size == 1 else mesh
  room = buckets.rounded(max(limits.longest_prompt or 0, *lengths))
  # A single prompt is often one of many calls (a chat), whose padding adds up.
  coarse = len(prompts) > 1 and buckets.little(model.c.parameters, prompts)
  if limits.fixed:
    share = len(requests) / len(prompts)
    shapes = shapes_for(limits.slots, room, SEVERAL if coarse and share >= 2 else share)
  else:
    shapes = shapes_at_hand(lengths, len(requests), limits.slots, room, replicas(mesh))
  sampler = _Sampler(model, requests, decoding, shapes, mesh, coarse)
  # As long as a refill pays: short answers end, and free their slots, after fewer steps.
  steps = limits.steps or min(16, max(4, decoding.max_new_tokens // 48))
  results, seen = {}, [0] * len(requests)  # by request; how many of its tokens `ends` has seen
  while sampler.refill():
    state = sampler.decode(steps)
    # Tokens and log-probabilities come to the host only if a request may have ended.
    done, count = np.asarray(state["done"]), np.asarray(state["count"])
    held = np.flatnonzero(sampler.holds >= 0)
    if not (hooks.ends or done[held].any()):
      continue
    tokens, logprobs = np.asarray(state["tokens"]), np.asarray(state["logprobs"])
    for slot in held:
      if not (hooks.ends or done[slot]):
        continue
      request, n = int(sampler.holds[slot]), int(count[slot])
      drawn = tuple(tokens[slot, :n].tolist())
      finished = bool(done[slot]) and drawn[-1] in decoding.stop_ids
      kept = drawn[:-1] if finished else drawn
      end = hooks.ends(requests[request], kept, seen[request]) if hooks.ends else None
      seen[request] = len(kept)
      if end is None and not done[slot]:
        continue
      if end is not None:
        kept, finished, n = kept[:end], True, end
      if not np.isfinite(logprobs[slot, :n]).all():  # as when a logit was not finite
        token = int(np.flatnonzero(~np.isfinite(logprobs[slot, :n]))[0])
        raise NotFinite(request, f"the log-prob of token {token + 1} of the answer is {logprobs[slot, token]}")
      results[request] = Sampled(kept, finished, tuple(logprobs[slot, :n].tolist()))
      sampler.holds[slot] = -1
      if hooks.progress:
        hooks.progress(1, n)
  return [results[request] for request in range(len(requests))]


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """Requests of one prompt, and how much of it is a head that others share."""

  prompt: tuple[int, ...]
  head: tuple[int, ...]
  requests: list[int]


class _Fill(NamedTuple):
  """A row to prefill."""

  row: int
  chunk: _Chunk


class _Copy(NamedTuple):
  """A row that becomes a copy of another."""

  row: int
  into: int


class _Seat(NamedTuple):
  slot: int
  row: int  # that holds the request's prompt
  request: int


class _Taken(NamedTuple):
  """What a replica does at once, in this order."""

  fills: list[_Fill]  # at most PREFILL_ROWS, whose prompts share their head
  copies: list[_Copy]
  seats: list[_Seat]


class _Sampler:
  """The device state of one call of `sample`, and what the host knows of it: the request in every slot, and the prompt
  in every row.

  A prompt has enough rows for its live slots, shapes.tile to a row. Which of its slots read which of its rows is open
  until `tiles`, because they are copies: so slots that become free leave at most one row of a prompt partly used.
  """

  def __init__(
    self, model: Llama, requests: Sequence[Request], decoding: Decoding, shapes: Shapes, mesh: Mesh | None,
    coarse: bool = False,
  ) -> None:  # fmt: skip
    """`coarse`: padding costs less than compiling, see buckets.little."""
    self.model, self.requests, self.shapes, self.mesh, self.coarse = model, requests, shapes, mesh, coarse
    self.ways, one = replicas(mesh), coarse and decoding.temperature > 0  # one program for all temperatures
    self.decoding = dataclasses.replace(decoding, temperature=1.0) if one else decoding
    self.state: State = _empty(model, shapes, self.decoding, mesh)
    if one:
      sharpness = np.full(self.ways * shapes.slots, sharpness_of(decoding.temperature))
      self.state["sharpness"] = jax.device_put(sharpness, mesh and NamedSharding(mesh, P(BATCH)))
    weights = model.embed.get_value().sharding
    if mesh is None and isinstance(weights, NamedSharding):  # as every later state, or the first prefill compiles twice
      self.state = jax.device_put(self.state, NamedSharding(weights.mesh, P()))
    self.holds = np.full(self.ways * shapes.slots, -1)  # the request in each slot
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
    self.prompts = list(number)
    self.asks = np.array([number[request.prompt] for request in requests])  # the number of each request's prompt
    self.rows = np.full((self.ways, shapes.rows), -1)  # the number of the prompt in each row
    # the requests of the chunk that each replica has at hand, and the chunks that are still to be taken
    self.waiting = [collections.deque[int]() for _ in range(self.ways)]
    self.queue = collections.deque(_chunks(requests, min(CHUNK, shapes.slots) if shapes.tile > 1 else 1))
    self.heads: tuple[tuple[int, ...], ...] = ()  # of the replicas, as the last prefill had them
    self.heads_kv: Any = None

  def refill(self) -> bool:
    """Hand free slots to waiting requests. True if any slot is at work then."""
    seats = []
    # One prefill after the other, until no replica seats any more requests.
    while True:
      taken = [self._take(replica) for replica in range(self.ways)]
      seats += [seat for mine in taken for seat in mine.seats]
      if any(mine.fills for mine in taken):
        self._fill([mine.fills for mine in taken])
      if any(mine.copies for mine in taken):
        self._copy([mine.copies for mine in taken])
      if not any(mine.seats for mine in taken):
        break
    if seats:
      rows, keys = np.full(self.holds.size, -1, np.int32), np.zeros((self.holds.size, 2), np.uint32)
      for slot, row, request in seats:
        rows[slot], keys[slot] = row, self.requests[request].key
      self.state = _start(self.state, rows, keys, self._said(), decoding=self.decoding, mesh=self.mesh)
    return bool((self.holds >= 0).any())

  def _take(self, replica: int) -> _Taken:
    """What to prefill and copy, and which requests to seat on a replica: as many as one prefill serves.

    Slots 3, 4 and 5 are free, tiles have 2 slots, r8 of prompt p is at hand, and the queue has chunks (q: r9 r10 r11):

      slot 3  r8     p has three live slots and two rows: there is a place
      slot 4  r9     q is to be prefilled into a row that no live slot needs
      slot 5  r10    in the same row; r11 is at hand, and will need a copy of it
    """
    tile, taken = self.shapes.tile, _Taken([], [], [])
    first = replica * self.shapes.slots
    holds, held, waiting = self.holds[first : first + self.shapes.slots], self.rows[replica], self.waiting[replica]
    live = np.bincount(self.asks[holds[holds >= 0]], minlength=len(self.prompts))  # slots of each prompt
    for slot in np.flatnonzero(holds < 0).tolist():
      # The chunk at hand, or the next one if that is used up.
      if not (waiting or self.queue):
        break
      chunk = None if waiting else self.queue[0]
      prompt = self.asks[chunk.requests[0] if chunk else waiting[0]]
      rows = np.flatnonzero(held == prompt) if tile > 1 else np.array([], int)
      if live[prompt] == tile * len(rows) or tile == 1:
        # Another row for the prompt: a copy of one that it has, or a prefill.
        row = slot if tile == 1 else _spare(held, live, tile)
        if row is None:  # every row has a sample that is not over: the slot waits for one
          break
        if len(rows):
          taken.copies.append(_Copy(int(rows[0]), row))
        else:
          assert chunk is not None  # the prompt of a chunk at hand keeps its row
          if len(taken.fills) == PREFILL_ROWS or (taken.fills and taken.fills[0].chunk.head != chunk.head):
            break
          taken.fills.append(_Fill(row, chunk))
          rows = np.array([row])
        held[row] = prompt
      if chunk:
        self.queue.popleft()
        waiting.extend(chunk.requests)
      holds[slot] = request = waiting.popleft()
      live[prompt] += 1
      taken.seats.append(_Seat(first + slot, int(rows[0]), request))
    return taken

  def _fill(self, fills: list[list[_Fill]]) -> None:
    """One prefill for all replicas, each with its own fills."""
    shapes, R = self.shapes, 1 if max(map(len, fills)) == 1 and not self.coarse else PREFILL_ROWS
    heads = tuple(mine[0].chunk.head if mine else () for mine in fills)
    rests, into = [], []
    for mine, start in zip(fills, heads, strict=True):
      free = R - len(mine)
      rests += [*(chunk.prompt[len(start) :] for _, chunk in mine), *[()] * free]
      into += [*(row for row, _ in mine), *[shapes.rows] * free]
    tokens, lengths = self._padded(rests, buckets.STEP)
    head = None
    if any(heads):
      if self.heads != heads:
        self.heads, self.heads_kv = heads, _head(self.model, *self._padded(heads, buckets.LONG), mesh=self.mesh)
      head = self.heads_kv, np.array([len(h) for h in heads], np.int32)
    self.state = _fill(self.model, self.state, head, tokens, lengths, np.array(into, np.int32), mesh=self.mesh)

  def _padded(self, rows: Sequence[tuple[int, ...]], least: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, width] and lengths; the width is one of few, and if it is coarse, at least `least`. An empty row
    has length 1, and is not used."""
    longest = max(map(len, rows))
    width = buckets.coarse(longest, least) if self.coarse else buckets.rounded(longest)
    return buckets.padded([row or None for row in rows], min(self.shapes.room, width), least=1)

  def _copy(self, copies: list[list[_Copy]]) -> None:
    """Copies of rows on all replicas, as many at a time as are prefilled."""
    nothing = _Copy(0, self.shapes.rows)
    for start in range(0, max(map(len, copies)), PREFILL_ROWS):
      some = [mine[start : start + PREFILL_ROWS] for mine in copies]
      flat = np.array([copy for mine in some for copy in (*mine, *[nothing] * (PREFILL_ROWS - len(mine)))], np.int32)
      self.state = _copy(self.state, flat[:, 0], flat[:, 1], mesh=self.mesh)

  def _said(self) -> np.ndarray | None:
    """The prompts' tokens of all rows, if the penalty counts them."""
    if not self.decoding.remembers:
      return None
    said = np.full((self.ways * self.shapes.rows, self.shapes.room), self.model.c.vocab, np.int32)
    if self.decoding.penalize_prompt:
      for row, number in enumerate(self.rows.ravel()):
        prompt = self.prompts[number] if number >= 0 else ()
        said[row, : len(prompt)] = prompt
    return said

  def decode(self, steps: int) -> State:
    """The state after so many steps."""
    tiles = None if self.shapes.tile == 1 else self.tiles()
    state = self.state | {"done": self.holds < 0}  # also those that `ends` ended
    self.state = _segment(self.model, state, tiles, decoding=self.decoding, steps=steps, mesh=self.mesh)
    return self.state

  def tiles(self) -> decoder.Tiles:
    """The live slots of each prompt, up to shapes.tile of them at each of its rows. The picture above, tiles of 2:

    rows      p      q      p          a row for each tile
    slots     0 1    3 0    2 5        its slots; 0 also fills
    live      2      1      2          how many they are
    place     0 1 4 2 0 5              where slot b's result stands: row x 2 + place in the tile
    """
    shapes, made = self.shapes, []
    for replica, held in enumerate(self.rows):
      holds = self.holds[replica * shapes.slots : (replica + 1) * shapes.slots]
      slots, place = np.zeros((shapes.rows, shapes.tile), np.int32), np.zeros(shapes.slots, np.int32)
      live, seated = np.zeros(shapes.rows, np.int32), np.flatnonzero(holds >= 0)
      for prompt in np.unique(self.asks[holds[seated]]):
        mine, rows = seated[self.asks[holds[seated]] == prompt], np.flatnonzero(held == prompt)
        for row, start in zip(rows, range(0, len(mine), shapes.tile), strict=False):  # it may have rows to spare
          some = mine[start : start + shapes.tile]
          live[row] = len(some)
          slots[row, : len(some)], place[some] = some, row * shapes.tile + np.arange(len(some))
      made.append(decoder.Tiles(slots, live, place))
    return jax.tree.map(lambda *x: np.concatenate(x), *made)


def _spare(held: np.ndarray, live: np.ndarray, tile: int) -> int | None:
  """The first row that no live slot needs: a prompt needs the first of its rows, as many as its live slots fill."""
  left = -(-live // tile)  # rows that each prompt still needs
  for row, prompt in enumerate(held.tolist()):
    if prompt < 0 or not left[prompt]:
      return row
    left[prompt] -= 1
  return None


def _chunks(requests: Sequence[Request], size: int) -> Iterator[_Chunk]:
  """The requests in the order of work: prompts that share a head together, a prompt's samples together."""
  of = collections.defaultdict(list)
  for i, request in enumerate(requests):
    of[request.prompt].append(i)
  prompts = list(of)
  for length, members in prefixes.plan(prompts):
    for prompt in (prompts[i] for i in members):
      for start in range(0, len(of[prompt]), size):
        yield _Chunk(prompt, prompt[:length], of[prompt][start : start + size])
