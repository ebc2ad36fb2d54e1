"""K-means against NumPy in float64 and scikit-learn from the same start; its edges."""

import jax
import numpy as np
import pytest

from alma_jax.engine import kmeans as engine
from alma_jax.engine.kmeans import kmeans

KEY = jax.random.key(0)


def blobs(n, d, centres, seed=0):
  rng = np.random.default_rng(seed)
  means = 3 * rng.normal(size=(centres, d))
  return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.fixture
def start(monkeypatch):
  """Makes k-means begin at given centroids."""
  return lambda centroids: monkeypatch.setattr(engine, "seeds", lambda *_: jax.numpy.asarray(centroids))


def distances(points, centroids):
  return ((points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(axis=-1)


def inertia(points, centroids, labels):
  return distances(points, centroids)[np.arange(len(points)), labels].sum()


def lloyd(points, centroids):
  """One step in float64; the points must leave no cluster empty."""
  labels = distances(points, centroids).argmin(axis=1)
  return np.stack([points[labels == k].astype(np.float64).mean(axis=0) for k in range(len(centroids))])


def test_one_step_equals_numpy_in_float64(start):
  points = blobs(2500, 7, 12)  # more than two tiles, and a part of one
  points[:2] += 100  # a small cluster
  first = points[np.r_[0, np.random.default_rng(1).choice(np.arange(2, 2500), 19, replace=False)]]
  start(first)
  labels, centroids, report = kmeans(points, 20, KEY, iterations=1)
  wanted = lloyd(points, first)
  np.testing.assert_allclose(centroids, wanted, atol=1e-5)
  np.testing.assert_array_equal(labels, distances(points, centroids).argmin(axis=1))
  assert report["inertia"] == pytest.approx(
    [distances(points, first).min(axis=1).sum(), distances(points, wanted).min(axis=1).sum()], rel=1e-5
  )


def test_inertia_from_the_same_start_is_that_of_scikit_learn(start):
  cluster = pytest.importorskip("sklearn.cluster")
  points = blobs(1500, 6, 10)
  first = points[:15]
  start(first)
  labels, centroids, report = kmeans(points, 15, KEY, iterations=100)
  theirs = cluster.KMeans(15, init=first, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(points)
  assert inertia(points, centroids, labels) == pytest.approx(theirs.inertia_, rel=1e-3)
  assert report["inertia"][-1] == pytest.approx(inertia(points, centroids, labels), rel=1e-4)


def test_seeding_finds_clusters_that_are_far_apart():
  rng = np.random.default_rng(2)
  truth = np.repeat(np.arange(16), 40)
  points = (100 * rng.normal(size=(16, 8))[truth] + rng.normal(size=(640, 8))).astype(np.float32)
  # A start from 32 points drawn evenly misses two of the sixteen groups, and pays for it a hundredfold.
  labels, _, report = kmeans(points, 32, KEY, iterations=30)
  assert len(set(zip(truth.tolist(), labels.tolist()))) == len(set(labels.tolist()))  # no cluster holds two groups
  assert report["inertia"][-1] < 640 * 8


def test_inertia_never_rises_and_the_report_counts_the_clusters():
  points = blobs(800, 5, 9)
  labels, _, report = kmeans(points, 24, KEY, iterations=40)
  if not report["empty_repaired"]:
    assert (np.diff(report["inertia"]) <= 1e-3).all()
  sizes = np.bincount(labels, minlength=24)
  assert report["largest"] == sizes.max()
  assert report["singletons"] == (sizes == 1).sum()
  assert report["empty"] == (sizes == 0).sum() == 0


def test_the_key_decides_everything():
  points = blobs(400, 4, 8)
  first, again = kmeans(points, 12, KEY, 10), kmeans(points, 12, KEY, 10)
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_array_equal(first[1], again[1])
  assert first[2] == again[2]
  other = kmeans(points, 12, jax.random.key(1), 10)
  assert (other[0] != first[0]).any()


def test_one_cluster_is_the_mean():
  points = blobs(300, 4, 3)
  labels, centroids, report = kmeans(points, 1, KEY, 5)
  assert not labels.any()
  np.testing.assert_allclose(centroids[0], points.astype(np.float64).mean(axis=0), atol=1e-5)
  assert report["inertia"][-1] == pytest.approx(300 * points.astype(np.float64).var(axis=0).sum(), rel=1e-5)


def test_as_many_clusters_as_points_gives_each_its_own():
  points = blobs(50, 4, 50)
  labels, _, report = kmeans(points, 50, KEY, 5)
  assert len(set(labels.tolist())) == 50
  assert report["singletons"] == 50
  assert report["inertia"][-1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("k", [2, 5, 9])
def test_duplicates_share_a_cluster_and_nothing_breaks(k):
  distinct = 4 * blobs(5, 3, 5)
  points = np.repeat(distinct, 12, axis=0)
  labels, centroids, report = kmeans(points, k, KEY, 20)
  assert np.isfinite(centroids).all()
  assert labels.min() >= 0 and labels.max() < k
  assert [len(set(labels[i : i + 12].tolist())) for i in range(0, 60, 12)] == [1] * 5
  if k >= 5:
    assert report["inertia"][-1] < 1e-5 * (points**2).sum()  # every distinct point has a centroid, but for a hair


def test_equal_points_only():
  labels, centroids, report = kmeans(np.ones((7, 3), np.float32), 3, KEY, 5)
  assert np.isfinite(centroids).all() and len(set(labels.tolist())) == 1
  assert report["empty"] == 2


def test_an_empty_cluster_takes_part_of_the_largest(start):
  points = blobs(600, 4, 2)
  far = np.full((2, 4), 1e3, np.float32)  # nobody's nearest
  start(np.concatenate([points[:2], far]))
  labels, _, report = kmeans(points, 4, KEY, 20)
  assert report["empty_repaired"] >= 2
  sizes = np.bincount(labels, minlength=4)
  assert report["empty"] == 0 and sizes.min() > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named_by_its_point(bad):
  points = blobs(20, 3, 2)
  points[13, 1] = bad
  with pytest.raises(ValueError, match="point 13 "):
    kmeans(points, 2, KEY, 3)


@pytest.mark.parametrize("k", [0, 21])
def test_more_clusters_than_points_are_refused(k):
  with pytest.raises(ValueError, match=f"k={k} .*20 points"):
    kmeans(blobs(20, 3, 2), k, KEY, 3)
