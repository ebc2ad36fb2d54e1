"""Log-probabilities of targets, fp32, that never hold all logits where they are large.

  token_logprobs(model, hidden, targets, where)      log p of every target; what is not asked for is not computed
  weighted_logprobs(model, hidden, targets, weights) their weighted sum, with its gradient made on the way

Only supervised places are taken, a tile of them at a time: prompts and padding cost nothing. `token_logprobs` makes
every tile again in the backward pass, because what a place weighs there follows from whole sequences;
`weighted_logprobs` knows the weights and makes each tile once, at a quarter less of arithmetic. Logits of at most
`DENSE_BYTES` are made at once instead, which is quicker for them. Under a mesh each device has the tiles of its own
rows and its share of the vocabulary. The gradients have the inputs' dtype; statistics and sums are fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from alma_jax.llama import model as llama
from alma_jax.llama.sharding import BATCH

# Bytes are of fp32 logits, on each device. Every tile adds to the gradient of the whole head: with fewer places than
# these that traffic shows beside the arithmetic, and with more tiles less is made that nobody asked for.
DENSE_BYTES = 4 * 2**20
LEAST_PLACES = {"cpu": 128, "gpu": 4096, "tpu": 4096}
TILE_BYTES = {"cpu": 128 * 2**20, "gpu": 2 * 2**30, "tpu": 2 * 2**30}
TILES = 8


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
