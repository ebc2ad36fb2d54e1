"""K-means: exact Lloyd iterations with batched D-squared seeding; the points-by-centroids matrix never exists.

Distances are taken tile by tile, sums and counts by segment. Seeding draws the centroids in a few rounds, each with
probability proportional to the squared distance to what was drawn before. An empty cluster takes half of the largest
one. Everything follows from the key: same points, same key, same clusters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TILE = 1024  # points per tile
ROUNDS = 8  # of seeding


@jax.jit
def assign(points, centroids, valid):
  """(label [n], squared distance [n]) of the nearest of the first `valid` centroids; ties go to the lowest index."""
  n, d = points.shape
  half = jnp.where(jnp.arange(len(centroids)) < valid, (centroids**2).sum(axis=1) / 2, jnp.inf)

  def tile(x):
    score = half - jnp.matmul(x, centroids.T, precision="highest")
    label = jnp.argmin(score, axis=1)
    best = jnp.take_along_axis(score, label[:, None], axis=1)[:, 0]
    return label.astype(jnp.int32), jnp.maximum((x**2).sum(axis=1) + 2 * best, 0.0)

  padded = jnp.pad(points, ((0, -n % TILE), (0, 0))).reshape(-1, TILE, d)
  label, distance = jax.lax.map(tile, padded)
  return label.reshape(-1)[:n], distance.reshape(-1)[:n]


@functools.partial(jax.jit, static_argnames="k")
def _update(points, label, centroids, k):
  sums = jax.ops.segment_sum(points, label, k)
  counts = jnp.bincount(label, length=k)
  return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centroids), counts


def _repaired(centroids, counts):
  """The e-th empty centroid becomes a copy of the e-th largest cluster's, both moved a hair apart."""
  empty = np.flatnonzero(counts == 0)
  if not len(empty):
    return centroids, 0
  centroids = np.array(centroids)
  donors = np.argsort(-counts, kind="stable")[: len(empty)]
  sign = np.where(np.arange(centroids.shape[1]) % 2, 1 + 1 / 1024, 1 - 1 / 1024).astype(centroids.dtype)
  centroids[empty] = centroids[donors] * sign
  centroids[donors] = centroids[donors] * (2 - sign)
  return jnp.asarray(centroids), len(empty)


def seeds(points, k, key):
  """k distinct points, drawn in ROUNDS batches without replacement with p ~ squared distance (Gumbel top-k)."""
  n = len(points)
  centroids, drawn = jnp.zeros((k, points.shape[1]), points.dtype), 0
  distance = jnp.ones(n, jnp.float32)
  taken = jnp.zeros(n, bool)
  for r in range(min(ROUNDS, k)):
    size = (k - drawn) // (min(ROUNDS, k) - r)
    noise = jax.random.gumbel(jax.random.fold_in(key, r), (n,))
    # Points at distance zero (duplicates) come last, but before k would be missed.
    score = jnp.where(taken, -jnp.inf, jnp.log(jnp.maximum(distance, 1e-30)) + noise)
    _, chosen = jax.lax.top_k(score, size)
    taken = taken.at[chosen].set(True)
    centroids = jax.lax.dynamic_update_slice(centroids, points[chosen], (drawn, 0))
    drawn += size
    _, distance = assign(points, centroids, drawn)
  return centroids


def kmeans(points, k, key, iterations, progress=None):
  """(labels [n], centroids [k, d], report) of fp32 points [n, d]; k <= n."""
  points = jnp.asarray(points, jnp.float32)
  if not bool(jnp.isfinite(points).all()):
    bad = int(jnp.argmin(jnp.isfinite(points).all(axis=1)))
    raise ValueError(f"k-means: point {bad} has a value that is not finite")
  if not 1 <= k <= len(points):
    raise ValueError(f"k-means: k={k} needs 1 <= k <= {len(points)} points")
  centroids, inertia, repaired = seeds(points, k, key), [], 0
  for _ in range(iterations):
    label, distance = assign(points, centroids, k)
    inertia.append(float(distance.sum()))
    centroids, counts = _update(points, label, centroids, k)
    centroids, empty = _repaired(centroids, np.asarray(counts))
    repaired += empty
    if progress:
      progress(1)
    if len(inertia) > 1 and inertia[-2] - inertia[-1] <= 1e-5 * inertia[-2] and not empty:
      break
  label, distance = assign(points, centroids, k)
  inertia.append(float(distance.sum()))
  sizes = np.bincount(np.asarray(label), minlength=k)
  report = {
    "inertia": inertia,
    "empty_repaired": repaired,
    "largest": int(sizes.max()),
    "singletons": int((sizes == 1).sum()),
    "empty": int((sizes == 0).sum()),
  }
  return np.asarray(label), np.asarray(centroids), report
