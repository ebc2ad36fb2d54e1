"""Seeds of k-means: greedy k-means++ in a few rounds, each over a pool that the squared distances choose.

  seeds = by_distance(data, k, key)     # fp32 [k, d]
  seeds = at_random(data, k, key)

K-means++ takes seed after seed, each with probability in proportion to D, the squared distance to the seeds so far. The
greedy form (Arthur and Vassilvitskii 2007, scikit-learn) tries several points and takes the one that leaves the least
sum of D. Over n points that is k passes one after the other. Here a round takes many seeds at once:

    n points, D of each    pool: so many rows, each with        seeds of the round: greedy k-means++ among the rows of
                           probability 1 - exp(-t D)            the pool, in which a row stands for 1 / probability
    . . . : : . | . .  ->  : : . | .                        ->  : |
                           (t follows from the pool's size)     then the D of all n points in one pass

The sum of D over the pool, each row times what it stands for, estimates that over all points; seeds of one round keep
away from each other as those of different rounds do. With at most POOL points there is one round, over all of them:
greedy k-means++ itself.

What it costs, in products of points and centroids: less than an iteration of Lloyd's for the passes over the points,
and TRIES x pool / n iterations for the tries, because every seed compares TRIES rows with a pool. With OVERSAMPLING
rows for each seed of a round a pool has as many rows as there are clusters, so that with 100 points per cluster the
tries are a third of an iteration; they are more where POOL decides. `python -m benchmarks.seeding` measures it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils

from alma_jax.engine.choose import inverse_cdf
from alma_jax.engine.lloyd import NOISE, unit
from alma_jax.engine.points import Points

ROUNDS = 8  # or more, where a pool would pass LARGEST
POOL = 2048  # rows, at least
OVERSAMPLING = 8  # rows of a pool for each seed
TRIES = 32  # rows that are compared for each seed; scikit-learn has 2 + log k
LARGEST = 1 << 28  # numbers in a pool, at most
UNIFORM = 1 << 16  # added to a round's number: the stream of the uniform numbers that its tries use


def noise(key: int, stream: int, n: int) -> np.ndarray:
  """Exponential variates, fp32 [n]; the one of a row follows from the key, the stream and the row's number."""
  out = np.empty(n, np.float32)
  philox = _philox(key, stream)
  for at in range(0, n, 1 << 20):
    out[at : at + (1 << 20)] = -np.log1p(-_uniform(philox, min(n - at, 1 << 20)))
  return out


def _philox(key: int, stream: int) -> np.random.Philox:
  """Counter-based; its raw words never change."""
  return np.random.Philox(key=np.array([key, stream], np.uint64))


def _uniform(philox: np.random.Philox, n: int) -> np.ndarray:
  """Between 0 and 1, float64 [n]."""
  return ((philox.random_raw(n) >> np.uint64(11)) + 0.5) * 2.0**-53


def largest(scores: np.ndarray, count: int) -> np.ndarray:
  """Where the largest are, in ascending order; of equal ones the first."""
  least = np.partition(scores, len(scores) - count)[len(scores) - count]
  above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
  return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def at_random(data: Points, k: int, key: int) -> np.ndarray:
  """k points [k, d], each as probable as any other."""
  return _normal(data.chosen(largest(1 / noise(key, 0, data.n), k)), data.spherical)


def by_distance(data: Points, k: int, key: int) -> np.ndarray:
  """k points [k, d], of which two are equal only where there are fewer different ones."""
  rounds = 1
  if data.n > POOL:
    rounds = min(k, max(ROUNDS, -(-OVERSAMPLING * k * data.d // LARGEST)))
  most = -(-k // rounds)  # seeds of a round
  size = min(data.n, max(OVERSAMPLING * most, POOL))
  distance, chosen = np.full(data.n, np.inf, np.float32), []
  for r in range(rounds):
    count = (k - sum(map(len, chosen))) // (rounds - r)
    drawn, probability = _pool(distance, noise(key, r, data.n), min(size, int((distance >= 0).sum())))
    pool = data.chosen(drawn)
    # One program for all rounds: rows that stand for nothing fill the pool, and numbers that are not read the tries.
    importance, apart = np.zeros(size, np.float32), np.zeros(size, np.float32)
    importance[: len(drawn)], apart[: len(drawn)] = 1 / probability, distance[drawn]
    uniform = _uniform(_philox(key, UNIFORM + r), most * TRIES).astype(np.float32).reshape(most, TRIES)
    padded = np.pad(pool, ((0, size - len(pool)), (0, 0)))
    device = data.mesh.local_devices[0]
    arrays = jax.device_put((padded, importance, apart, uniform, np.int32(count)), device)
    taken = np.asarray(_greedy(*arrays, spherical=data.spherical))[:count]
    if data.processes > 1:  # the last bits of sums are not those of another machine
      taken = np.asarray(multihost_utils.broadcast_one_to_all(taken))
    chosen.append(_normal(pool[taken], data.spherical))
    distance[drawn[taken]] = -1
    if r + 1 < rounds:
      np.minimum(distance, data.assigned(chosen[-1])[1], out=distance)
  return np.concatenate(chosen)


def _pool(distance: np.ndarray, noise: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """`size` rows, in ascending order, and the probability of each to be one of them; the distance of seeds is -1.

  Rows are those that come first in a race in which a row of squared distance D arrives after noise / D. If the first
  one that is left out arrives at t, each row has come before it with probability 1 - exp(-t D).
  """
  known = np.where(np.isinf(distance), np.float32(1), distance)  # before there are seeds: all alike
  speed = known / noise
  rows = largest(speed, size)
  left_out = np.partition(speed, len(speed) - size - 1)[len(speed) - size - 1] if size < len(speed) else 0.0
  if left_out <= 0:  # all rows that are no seeds or copies of seeds are in the pool
    return rows, np.ones(size)
  return rows, np.maximum(-np.expm1(-known[rows].astype(np.float64) / left_out), 1e-30)


@functools.partial(jax.jit, static_argnames="spherical")
def _greedy(x: Array, importance: Array, distance: Array, uniform: Array, count: Array, spherical: bool) -> Array:
  """int32 [B]: `count` different rows of the pool x [S, d], then zeros.

  importance [S]: how many points a row stands for, 0 for none. distance [S]: D, or inf before there are seeds.
  uniform [B, T]: what draws the T tries for each seed.
  """
  squares = (x**2).sum(axis=1)
  real = importance > 0

  def take(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    distance, free, taken = state
    mass = jnp.where(jnp.isinf(distance), 1.0, distance) * importance
    if spherical:  # a row whose length is not 1 is away from its own direction
      mass = jnp.where(free, mass, 0.0)
    mass = jnp.where(mass.sum() > 0, mass, free.astype(jnp.float32))  # only copies of seeds are left
    tried = inverse_cdf(jnp.broadcast_to(mass, (uniform.shape[1], len(x))), uniform[i])
    y = unit(x[tried]) if spherical else x[tried]
    own = (y**2).sum(axis=1)[:, None]
    dot = lax.dot_general(y, x, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)
    new = own + squares - 2 * dot
    new = jnp.minimum(jnp.where(new > NOISE * (own + squares), new, 0.0), distance)  # [T, S]
    left = jnp.where(real, new * importance, 0.0).sum(axis=1)
    best = jnp.argmin(left)
    return new[best], free.at[tried[best]].set(False), taken.at[i].set(tried[best])

  distance = jnp.where(distance > 2 * NOISE * squares, distance, 0.0)
  taken = jnp.zeros(len(uniform), jnp.int32)
  return lax.fori_loop(0, count, take, (distance, real, taken))[2]


def _normal(centroids: np.ndarray, spherical: bool) -> np.ndarray:
  if not spherical:
    return centroids
  return centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.float32(1e-30))
