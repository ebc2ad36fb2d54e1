"""Log-probabilities of targets, fp32, without all logits where those are large.

  token_logprobs(model, hidden, targets, where)        log p of every target; 0 where `where` is False
  weighted_logprobs(model, hidden, targets, weights)   their weighted sum, with its gradient made on the way
  mixed_logprobs(models, hidden, mix, targets, where)  log p under a mixture of two models' logits, without a gradient

Prompts and padding cost nothing: only supervised places are taken, a tile of them at a time. With 2 rows of 6 tokens,
x for what is supervised, and tiles of 3 places:

  where      . . x x . .        places   2  3  8        logits of a tile   [3, V]
             . . x x x .                 9 10 12        2 tiles are made; a third and fourth would hold no x
  numbered   0 .. 11            12 is one too far: reading there gives 0, writing there does nothing

`token_logprobs` makes every tile again in the backward pass, because the weight of a place there follows from whole
sequences; `weighted_logprobs` knows the weights and makes each tile once, with a quarter less arithmetic. Logits of at
most `DENSE_BYTES` are made at once instead, which is quicker for them. Under a mesh each device has the tiles of its
own rows and its share of the vocabulary. The gradients have the inputs' dtype; statistics and sums are fp32.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from alma_jax.llama import model as llama
from alma_jax.llama.sharding import holds_all_rows, on_own_rows, platform, replicas

Axes = Literal["vd", "dv"]  # of the head's weight: [V, D] where it is the embedding table, else [D, V]

# Bytes are of fp32 logits, on each device. Every tile adds to the gradient of the whole head: with fewer places than
# these that traffic shows beside the arithmetic, and with more tiles fewer unsupervised places are computed.
DENSE_BYTES = 4 * 2**20
LEAST_PLACES = {"cpu": 128, "gpu": 4096, "tpu": 4096}
TILE_BYTES = {"cpu": 128 * 2**20, "gpu": 2 * 2**30, "tpu": 2 * 2**30}
TILES = 8


def token_logprobs(model: llama.Llama, hidden: Array, targets: Array, where: Array | None = None) -> Array:
  """fp32 log p(target) [B, T] for hidden [B, T, D] and targets [B, T]; 0 where `where` [B, T] is False."""
  tile, where = _tile(model, targets), jnp.ones(targets.shape, bool) if where is None else where
  if not tile:
    return jnp.where(where, _dense(model, hidden, targets), 0.0)

  def logprobs(weight: Array, *rows: Array) -> Array:
    out: Any = _tiled(_axes(model), tile, weight, *map(_flat, rows))
    return out.reshape(rows[1].shape)

  return _on_own_rows(model, logprobs, targets)(_weight(model), hidden, targets, where)


def weighted_logprobs(model: llama.Llama, hidden: Array, targets: Array, weights: Array) -> Array:
  """Sum of weights * log p(target), a scalar. The weights are constants; where they are 0, nothing is computed."""
  tile, weights = _tile(model, targets), jax.lax.stop_gradient(weights)
  if not tile:
    return (jnp.where(weights != 0, _dense(model, hidden, targets), 0.0) * weights).sum()

  def total(weight: Array, *rows: Array) -> Array:
    out: Any = _tiled_sum(_axes(model), tile, weight.dtype, weight, *map(_flat, rows))
    return out[None]  # one for each device

  return _on_own_rows(model, total, targets)(_weight(model), hidden, targets, weights).sum()


def mixed_logprobs(
  models: tuple[llama.Llama, llama.Llama], hidden: tuple[Array, Array], mix: float, targets: Array, where: Array
) -> Array:
  """fp32 log p(target) [B, T] of the logits l + mix (l - l') of two models and their hidden states; 0 where `where` is
  False. No gradient goes through it."""
  ours, theirs = models
  hidden, tile = jax.lax.stop_gradient(hidden), _tile(ours, targets)
  if not tile:
    z = jax.lax.stop_gradient((1 + mix) * llama.logits(ours, hidden[0]) - mix * llama.logits(theirs, hidden[1]))
    return jnp.where(where, jnp.take_along_axis(z, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(z, axis=-1), 0.0)

  def logprobs(heads: tuple[Array, Array], *rows: Array) -> Array:
    x, other, y, supervised = map(_flat, rows)
    places, count = _tiles(max(1, tile // 2), supervised)  # two models' logits are there at a time

    def step(i: Array, found: Array) -> Array:
      at = places[i]
      z = (1 + mix) * _logits(_axes(ours), heads[0], _at(x, at)) - mix * _logits(
        _axes(theirs), heads[1], _at(other, at)
      )
      return _put(found, at, _picked(z, _at(y, at)) - jax.nn.logsumexp(z, axis=-1))

    return jax.lax.fori_loop(0, count, step, jnp.zeros(y.shape, jnp.float32)).reshape(rows[2].shape)

  heads = jax.lax.stop_gradient((_weight(ours), _weight(theirs)))
  return _on_own_rows(ours, logprobs, targets, rows=4)(heads, *hidden, targets, where)


def _weight(model: llama.Llama) -> Array:
  return (model.embed if model.head is None else model.head)[...]


def _axes(model: llama.Llama) -> Axes:
  return "vd" if model.c.tied else "dv"


def _flat(x: Array) -> Array:
  return x.reshape(-1, *x.shape[2:])


def _dense(model: llama.Llama, hidden: Array, targets: Array) -> Array:
  z = llama.logits(model, hidden)
  return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(z, axis=-1)


def _picked(z: Array, targets: Array) -> Array:
  """The logits of the targets: a sum over what `tensor` has split, where indexing would gather it."""
  return jnp.where(_hits(z, targets), z, 0.0).sum(axis=-1)


def _hits(z: Array, targets: Array) -> Array:
  return jnp.arange(z.shape[-1]) == targets[..., None]


def _tile(model: llama.Llama, targets: Array) -> int:
  """The number of places that a device takes at a time; 0: all at once.

  A tile's logits fit into TILE_BYTES. Within that it takes a TILES-th of the places, but at least LEAST_PLACES: with
  8 rows of 512 places and a vocabulary of 32,000 on one CPU device, max(128, 4096 / 8) = 512.
  """
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if holds_all_rows(targets.shape[0]) else replicas(mesh)
  shared = 1 if mesh.empty or model.c.vocab % mesh.shape["tensor"] else mesh.shape["tensor"]
  return tile_of(targets.size // ways, model.c.vocab // shared, platform())


def tile_of(places: int, vocab: int, target: str) -> int:
  """`_tile` of so many places of a device with its share of the vocabulary; `target`: its platform, in JAX's words."""
  each = 4 * vocab
  if places * each <= DENSE_BYTES:
    return 0
  return max(1, min(TILE_BYTES[target] // each, places, max(LEAST_PLACES[target], places // TILES)))


def _on_own_rows(model: llama.Llama, f: Callable[..., Array], targets: Array, rows: int = 3) -> Callable[..., Array]:
  """f(weight, arrays by rows) on every device's own rows: then no tile takes from two devices, and the devices' shares
  of the weight's gradient meet once, at the end. `rows` is the number of these arrays."""
  if holds_all_rows(targets.shape[0]):
    return f
  return on_own_rows(f, _axes(model).index("d"), model.c.width, rows)


# The parts of a tile; N = B * T places are numbered through


def _tiles(tile: int, where: Array) -> tuple[Array, Array]:
  """Places [tiles, tile] where `where` [N] is True, then N, which is one too far; and the number of tiles with any."""
  n = where.shape[0]
  places = jnp.nonzero(where, size=-(-n // tile) * tile, fill_value=n)[0].reshape(-1, tile)
  return places, (where.sum() + tile - 1) // tile


def _at(x: Array, places: Array) -> Array:
  return x.at[places].get(mode="fill", fill_value=0)


def _put(x: Array, places: Array, values: Array) -> Array:
  return x.at[places].set(values.astype(x.dtype), mode="drop")


def _logits(axes: Axes, weight: Array, x: Array) -> Array:
  """Logits [n, V] for x [n, D]."""
  return jnp.einsum(f"nd,{axes}->nv", x, weight, preferred_element_type=jnp.float32)


def _gradients(axes: Axes, weight: Array, x: Array, dz: Array) -> tuple[Array, Array]:
  """The gradients of x and of the weight for dz [n, V], that of the logits."""
  dz = dz.astype(jnp.result_type(x, weight))
  dx = jnp.einsum(f"nv,{axes}->nd", dz, weight, preferred_element_type=jnp.float32)
  return dx, jnp.einsum(f"nd,nv->{axes}", x, dz, preferred_element_type=jnp.float32)


# log p of every place. The backward pass gets the gradient g [N] of each and makes the tiles again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(axes: Axes, tile: int, weight: Array, x: Array, y: Array, where: Array) -> Array:
  """log p(y) [N] for x [N, D], 0 where `where` is False."""
  return _tiled_forward(axes, tile, weight, x, y, where)[0]


def _tiled_forward(axes: Axes, tile: int, weight: Array, x: Array, y: Array, where: Array) -> tuple[Array, Any]:
  places, count = _tiles(tile, where)

  def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
    at = places[i]
    z = _logits(axes, weight, _at(x, at))
    lse = jax.nn.logsumexp(z, axis=-1)
    return _put(found[0], at, _picked(z, _at(y, at)) - lse), _put(found[1], at, lse)

  zeros = jnp.zeros(y.shape, jnp.float32)
  logprobs, lse = jax.lax.fori_loop(0, count, step, (zeros, zeros))
  return logprobs, (weight, x, y, where, lse)


def _tiled_backward(axes: Axes, tile: int, kept: Any, g: Array) -> tuple[Array, Array, None, None]:
  weight, x, y, where, lse = kept
  places, count = _tiles(tile, where)

  def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
    at = places[i]
    mine = _at(x, at)
    z = _logits(axes, weight, mine)
    # d log p(y) / dz = (1 at y, 0 elsewhere) - p, and p = exp(z - lse)
    dz = (_hits(z, _at(y, at)) - jnp.exp(z - _at(lse, at)[:, None])) * _at(g, at)[:, None]
    dx, dw = _gradients(axes, weight, mine, dz)
    return _put(found[0], at, dx), found[1] + dw

  dx, dw = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(x), jnp.zeros(weight.shape, jnp.float32)))
  return dw.astype(weight.dtype), dx, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


# Their weighted sum. Its gradients are known in the forward pass, where the logits are; the backward pass scales them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled_sum(axes: Axes, tile: int, dtype: Any, weight: Array, x: Array, y: Array, weights: Array) -> Array:
  """Sum of weights * log p(y) for x [N, D]."""
  logprobs: Any = _tiled(axes, tile, weight, x, y, weights != 0)
  return (logprobs * weights).sum()


def _tiled_sum_forward(
  axes: Axes, tile: int, dtype: Any, weight: Array, x: Array, y: Array, weights: Array
) -> tuple[Array, tuple[Array, Array]]:
  places, count = _tiles(tile, weights != 0)

  def step(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    at = places[i]
    mine, targets, w = _at(x, at), _at(y, at), _at(weights, at)
    z = _logits(axes, weight, mine)
    # One exp of the logits gives the log-prob and, divided by its sum, the probabilities of the gradient.
    most = z.max(axis=-1, keepdims=True)
    p = jnp.exp(z - most)
    mass = p.sum(axis=-1, keepdims=True)
    logprobs = _picked(z, targets) - (most + jnp.log(mass))[:, 0]
    dx, dw = _gradients(axes, weight, mine, (_hits(z, targets) - p * (1 / mass)) * w[:, None])
    return found[0] + (logprobs * w).sum(), _put(found[1], at, dx), found[2] + dw

  start = jnp.float32(0), jnp.zeros_like(x), jnp.zeros(weight.shape, jnp.float32)
  total, dx, dw = jax.lax.fori_loop(0, count, step, start)
  return total, (dx, dw)


def _tiled_sum_backward(
  axes: Axes, tile: int, dtype: Any, kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array, None, None]:
  dx, dw = kept
  return (g * dw).astype(dtype), (g * dx).astype(dx.dtype), None, None


_tiled_sum.defvjp(_tiled_sum_forward, _tiled_sum_backward)
