"""K-means against brute force in float64 and scikit-learn from equal starts; on meshes, from disk, killed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alma_jax.engine import kmeans, seeding
from alma_jax.engine.kmeans import ClusteringError, FitHooks, Settings, fit, mesh_for, starting_at
from alma_jax.engine.lloyd import programs_for
from alma_jax.engine.points import mesh_of

KEY = (1, 2)
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))


def blobs(n, d, centres, seed=0):
  rng = np.random.default_rng(seed)
  means = 1.5 * rng.normal(size=(centres, d))
  return (means[rng.integers(0, centres, n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.fixture(scope="module")
def points():
  """Most tests share their shape, and so their programs."""
  return blobs(1500, 6, 12)


@pytest.fixture
def few(monkeypatch):
  """Rows of a pool, so few that 1500 points are seeded as millions are."""
  monkeypatch.setattr("alma_jax.engine.seeding.POOL", 160)
  monkeypatch.setattr("alma_jax.engine.points.PROBED", 160)
  monkeypatch.setattr("alma_jax.engine.points.NEAR", 0)  # each row of a pool is read alone
  return 160


def mesh(data, k):
  return mesh_of(data, k, jax.devices()[: data * k])


def from_these(points, centroids, iterations=1, mesh=None, chunk=None, **more):
  settings = Settings(len(centroids), iterations, tolerance=0.0, **more)
  return fit(points, settings, KEY, mesh, chunk, starting_at(centroids))


def distances(points, centroids):
  return ((points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(axis=-1)


def lloyd(points, centroids):
  """One step in float64; the points must leave no cluster empty."""
  labels = distances(points, centroids).argmin(axis=1)
  return np.stack([points[labels == k].astype(np.float64).mean(axis=0) for k in range(len(centroids))])


def same_labels(points, centroids, a, b):
  """But for points that are as near to one as to the other."""
  at = np.flatnonzero(a != b)
  apart = [((points[at] - centroids[labels[at]]) ** 2).sum(axis=1) for labels in (a, b)]
  np.testing.assert_allclose(*apart, rtol=1e-4)
  assert len(at) <= 0.01 * len(points)


class Lazy:
  """Points that can only be read in slices."""

  def __init__(self, parts):
    self.parts, self.dtype, self.read = parts, parts[0].dtype, []
    self.shape = (sum(map(len, parts)), parts[0].shape[1])

  def __getitem__(self, part):
    start, stop, step = part.indices(self.shape[0])
    assert step == 1
    self.read.append((start, stop))
    found, at = [], 0
    for rows in self.parts:
      found.append(rows[max(0, start - at) : max(0, stop - at)])
      at += len(rows)
    return np.concatenate(found)


# Lloyd's iterations


def test_one_step_equals_numpy_in_float64(points):
  points = points.copy()
  points[:2] += 100  # a small cluster
  first = points[np.r_[0, np.random.default_rng(1).choice(np.arange(2, 1500), 19, replace=False)]]
  found, wanted = from_these(points, first), lloyd(points, first)
  np.testing.assert_allclose(found.centroids, wanted, atol=1e-5)
  np.testing.assert_array_equal(found.labels, distances(points, wanted).argmin(axis=1))
  assert found.report["inertia"] == pytest.approx([distances(points, first).min(axis=1).sum()], rel=1e-5)
  assert found.report["inertia_final"] == pytest.approx(distances(points, wanted).min(axis=1).sum(), rel=1e-5)


def test_inertia_from_the_same_start_is_that_of_scikit_learn(points):
  cluster = pytest.importorskip("sklearn.cluster")
  found = from_these(points, points[:20], iterations=100)
  theirs = cluster.KMeans(20, init=points[:20], n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(points)
  inertia = ((points - found.centroids[found.labels]).astype(np.float64) ** 2).sum()
  assert inertia == pytest.approx(theirs.inertia_, rel=1e-3)
  assert found.report["inertia_final"] == pytest.approx(inertia, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_of_equally_near_centroids_the_lowest_counts(shape):
  # Whole numbers, so that every score is exact, and many equal ones within a tile, between tiles and between devices.
  rng = np.random.default_rng(0)
  points = rng.integers(-3, 4, (1300, 3)).astype(np.float32)
  centroids = rng.integers(-4, 5, (1100, 3)).astype(np.float32)
  apart = distances(points, centroids)
  assert ((apart == apart.min(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.6
  found = from_these(points, centroids, iterations=0, mesh=mesh(*shape))
  np.testing.assert_array_equal(found.labels, apart.argmin(axis=1))
  assert found.report["inertia_final"] == apart.min(axis=1).sum()


def test_points_by_centroids_never_exist():
  mine, spread = mesh(1, 1), jax.ShapeDtypeStruct
  programs = programs_for(mine, (128, 1024), False)
  n, k, d = 1 << 16, 1 << 14, 8

  def f32(*shape):
    return spread(shape, jnp.float32)

  args = (
    f32(1, k, d),
    spread((1, k), jnp.int32),
    f32(1, k),
    f32(n, d),
    f32(n),
    f32(k, d),
    spread((), int),
    spread((), int),
  )
  memory = programs.accumulate.lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n * k * 4 / 500


def test_spherical_centroids_have_length_one(points):
  points = points / np.linalg.norm(points, axis=1, keepdims=True)
  first = points[:20]
  found = from_these(points, first, spherical=True)
  labels = (points.astype(np.float64) @ first.T.astype(np.float64)).argmax(axis=1)
  sums = np.stack([points[labels == k].astype(np.float64).sum(axis=0) for k in range(20)])
  wanted = sums / np.linalg.norm(sums, axis=1, keepdims=True)
  np.testing.assert_allclose(found.centroids, wanted, atol=1e-5)
  np.testing.assert_array_equal(found.labels, (points.astype(np.float64) @ wanted.T).argmax(axis=1))
  assert found.report["inertia_final"] == pytest.approx(((points - wanted[found.labels]) ** 2).sum(), rel=1e-5)
  report = fit(points, Settings(20, 6, spherical=True, tolerance=0.0), KEY).report
  assert (np.diff([*report["inertia"], report["inertia_final"]]) <= 1e-3).all() and not report["empty_repaired"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64, np.int8])
def test_other_types_are_summed_in_fp32(points, dtype):
  points = (10 * points).astype(dtype)
  exact = fit(points.astype(np.float32), Settings(20), KEY)
  found = fit(points, Settings(20), KEY)
  np.testing.assert_array_equal(found.labels, exact.labels)
  np.testing.assert_array_equal(found.centroids, exact.centroids)
  assert found.centroids.dtype == np.float32
  np.testing.assert_allclose(found.report["inertia"], exact.report["inertia"], rtol=1e-6)


def test_it_stops_where_little_is_gained(points):
  all_of_them = fit(points, Settings(20, 60, tolerance=0.0), KEY).report["inertia"]
  early = fit(points, Settings(20, 60, tolerance=0.01), KEY).report
  inertia = np.array(all_of_them)
  assert early["iterations"] == len(early["inertia"]) == 2 + np.argmax(inertia[:-1] - inertia[1:] <= 0.01 * inertia[1:])
  assert len(all_of_them) < 60 and all_of_them[-1] == all_of_them[-2]  # nothing moves any more


# Empty clusters


def test_an_empty_cluster_takes_part_of_the_largest(points):
  far = np.full((2, 6), 1e3, np.float32)  # nobody's nearest
  first = np.concatenate([points[:8], far, points[8:10]])
  apart = distances(points, first)
  labels = apart.argmin(axis=1)
  sizes = np.bincount(labels, minlength=12)
  means = np.stack([points[labels == k].astype(np.float64).mean(axis=0) if sizes[k] else far[0] for k in range(12)])
  for empty, donor in zip((8, 9), np.argsort(-sizes, kind="stable"), strict=False):
    deviation = np.sqrt(apart[labels == donor, donor].mean() / 6)  # of a dimension
    hair = deviation / 8 * np.array([-1, 1, -1, 1, -1, 1])
    means[empty], means[donor] = means[donor] + hair, means[donor] - hair
  found = from_these(points, first)
  np.testing.assert_allclose(found.centroids, means, rtol=1e-5, atol=1e-5)
  assert found.report["empty_repaired"] == 2 and found.report["empty"] == 0
  streamed = from_these(points, first, chunk=512)
  np.testing.assert_array_equal(streamed.labels, found.labels)
  assert streamed.report["empty_repaired"] == 2


def test_only_clusters_of_different_points_are_split():
  points = np.zeros((60, 6), np.float32)
  points[:, 0], points[-2], points[-1] = 3, 7, 7.5
  first = np.stack([points[0], points[-1], np.full(6, 50.0), np.full(6, 60.0)]).astype(np.float32)
  found = from_these(points, first)
  assert found.report["empty_repaired"] == 1
  # 58 equal points give nothing away, so one centroid finds no donor.
  np.testing.assert_allclose(found.centroids[[0, 3]], first[[0, 3]], atol=1e-6)
  assert (np.abs(found.centroids[[1, 2]] - 7.25) < 0.05).all() and (found.centroids[1] != found.centroids[2]).any()
  settled = from_these(points, first, iterations=9)
  assert settled.report["iterations"] == 4 and settled.report["empty"] == 1
  np.testing.assert_allclose(settled.centroids[:3, 1], [0, 7, 7.5], atol=1e-6)


# Seeds


def test_noise_follows_from_key_stream_and_row():
  noise = seeding.noise(7, 3, 50_000)
  np.testing.assert_array_equal(seeding.noise(7, 3, 1000), noise[:1000])
  assert (
    noise.min() > 0
    and noise.mean() == pytest.approx(1, abs=0.02)
    and np.median(noise) == pytest.approx(np.log(2), abs=0.02)
  )
  for other in (seeding.noise(8, 3, 1000), seeding.noise(7, 4, 1000)):
    assert abs(np.corrcoef(other, noise[:1000])[0, 1]) < 0.15


def greedy(points, importance, apart, uniform):
  """Rows of the pool `points`, in float64: of the tries for each seed the one that leaves the least sum."""
  chosen = []
  for numbers in uniform:
    mass = importance * np.where(np.isinf(apart), 1, apart)
    tried = np.searchsorted(np.cumsum(mass), numbers * mass.sum(), side="right")
    left = np.minimum(apart, distances(points[tried], points))
    chosen.append(tried[(left @ importance).argmin()])
    apart = left[(left @ importance).argmin()]
  return np.array(chosen)


def uniform_numbers(r, most):
  raw = seeding._uniform(seeding._philox(1 | 2 << 32, seeding.UNIFORM + r), most * seeding.TRIES)
  return raw.reshape(most, seeding.TRIES)


def test_seeds_of_few_points_are_those_of_greedy_k_means(points):
  found = fit(points, Settings(20, iterations=0), KEY).centroids
  rows = greedy(points, np.ones(1500), np.full(1500, np.inf), uniform_numbers(0, 20))
  np.testing.assert_array_equal(found, points[rows])


def test_seeds_of_many_points_come_from_pools_by_squared_distance(points, few):
  found = fit(points, Settings(20, iterations=0), KEY).centroids
  rows = np.zeros(0, int)
  for r, size in enumerate([2, 2, 2, 2, 3, 3, 3, 3]):
    apart = distances(points, points[rows]).min(axis=1) if r else np.ones(1500)
    speed = apart / seeding.noise(1 | 2 << 32, r, 1500)
    speed[rows] = -1
    order = np.argsort(-speed)
    pool = np.sort(order[:few])
    importance = 1 / (1 - np.exp(-apart[pool] / speed[order[few]]))
    uniform = uniform_numbers(r, 3)[:size]
    rows = np.append(rows, pool[greedy(points[pool], importance, apart[pool] if r else np.full(few, np.inf), uniform)])
  np.testing.assert_array_equal(found, points[rows])


def test_a_pool_stands_for_all_points():
  """Each row times what it stands for: the sum over the pool is that over all, whichever rows the noise draws."""
  rng = np.random.default_rng(0)
  apart = rng.exponential(size=500).astype(np.float32) ** 3
  value = apart * rng.uniform(size=500)
  sums = []
  for stream in range(400):
    rows, probability = seeding._pool(apart, seeding.noise(3, stream, 500), 60)
    assert len(rows) == 60 and (np.diff(rows) > 0).all()
    sums.append((value[rows] / probability).sum())
  assert np.mean(sums) == pytest.approx(value.sum(), abs=4 * np.std(sums) / 20)
  assert np.std(sums) < 0.15 * value.sum()
  rows, probability = seeding._pool(apart, seeding.noise(3, 0, 500), 500)
  np.testing.assert_array_equal(rows, np.arange(500))
  assert (probability == 1).all()


@pytest.mark.parametrize("blobs_", [12, 90])
def test_inertia_of_blobs_is_that_of_scikit_learn(blobs_, few):
  """Its default, greedy k-means++, of which the seeds alone differ from ours."""
  cluster = pytest.importorskip("sklearn.cluster")
  del few
  for seed in range(3):
    rng = np.random.default_rng(seed)
    means = 10 * rng.normal(size=(blobs_, 6))
    points = (means[rng.integers(0, blobs_, 3000)] + rng.normal(size=(3000, 6))).astype(np.float32)
    theirs = cluster.KMeans(blobs_, random_state=seed).fit(points).inertia_
    ours = fit(points, Settings(blobs_, 30), (seed, 0)).report["inertia_final"]
    assert ours < 1.05 * theirs
    assert seed or fit(points, Settings(blobs_, 30, seeding="random"), (seed, 0)).report["inertia_final"] > 1.2 * theirs


def test_inertia_without_blobs_is_that_of_scikit_learn():
  cluster = pytest.importorskip("sklearn.cluster")
  points = np.random.default_rng(0).normal(size=(1500, 6)).astype(np.float32)
  theirs = cluster.KMeans(20, random_state=0).fit(points).inertia_
  assert fit(points, Settings(20, 30), KEY).report["inertia_final"] == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("seeding", ["distance", "random"])
def test_seeds_are_the_same_whatever_the_chunks_and_devices(points, seeding, few):
  del few
  settings = Settings(20, iterations=0, seeding=seeding)
  seeds = fit(points, settings, KEY).centroids
  assert len(np.unique(seeds, axis=0)) == 20
  for more in (dict(chunk=512), dict(mesh=mesh(8, 1)), dict(mesh=mesh(2, 4), chunk=512)):
    np.testing.assert_array_equal(fit(points, settings, KEY, **more).centroids, seeds)
  assert (fit(points, settings, (1, 3)).centroids != seeds).any()


def test_seeding_finds_clusters_that_are_far_apart():
  rng = np.random.default_rng(2)
  truth = np.repeat(np.arange(16), 90)
  points = (100 * rng.normal(size=(16, 6))[truth] + rng.normal(size=(1440, 6))).astype(np.float32)
  # A start from 32 points drawn evenly misses some of the sixteen groups, and pays for it a hundredfold.
  found = fit(points, Settings(32, iterations=30), KEY)
  assert len(set(zip(truth.tolist(), found.labels.tolist(), strict=True))) == 32  # no cluster holds two groups
  assert found.report["inertia_final"] < 1440 * 6
  assert fit(points, Settings(32, iterations=30, seeding="random"), KEY).report["inertia_final"] > 10 * 1440 * 6


# Far from zero


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_points_far_from_zero_are_clustered_as_those_near_it(offset, few):
  """The oracle is float64. 1/64 and 1e5 have room in fp32 together, so moved points are exact."""
  del few
  near = np.round(64 * blobs(1500, 6, 20, seed=3)) / 64
  here = fit(near, Settings(20, 60, tolerance=0.0), KEY)
  points = (near.astype(np.float64) + np.array([1, -1, 1, 2, -1, 1]) * offset).astype(np.float32)
  found = fit(points, Settings(20, 60, tolerance=0.0), KEY)
  same_labels(near, here.centroids, here.labels, found.labels)
  assert found.report["inertia_final"] == pytest.approx(here.report["inertia_final"], rel=1e-3)
  members = np.stack([points[found.labels == k].astype(np.float64).mean(axis=0) for k in range(20)])
  ulps = np.abs(found.centroids - members) / np.spacing(np.abs(members).astype(np.float32))
  assert ulps.max() <= 2
  apart = distances(points, found.centroids)
  assert (apart[np.arange(1500), found.labels] <= apart.min(axis=1) + 1e-4).all()
  assert found.report["inertia_final"] == pytest.approx(apart.min(axis=1).sum(), rel=1e-5)


def test_float64_points_lose_nothing_to_their_offset():
  points = blobs(1500, 6, 12).astype(np.float64) + 2.0**20  # fp32 has steps of 1/8 there
  found = fit(points, Settings(20, 5), KEY)
  apart = distances(points, found.centroids)
  np.testing.assert_array_equal(found.labels, apart.argmin(axis=1))
  assert found.report["inertia_final"] == pytest.approx(apart.min(axis=1).sum(), rel=1e-6)
  rounded = distances(points.astype(np.float32), found.centroids).min(axis=1).sum()
  assert rounded != pytest.approx(apart.min(axis=1).sum(), rel=1e-5)


def test_half_precision_and_chunks_and_a_mesh_are_centred_alike(points):
  points = (np.round(points * 8) / 8 + 100).astype(np.float16)  # exact in fp16
  settings = Settings(20, 5, tolerance=0.0)
  one, other = fit(points, settings, KEY), fit(points, settings, KEY, mesh(2, 4), chunk=512)
  np.testing.assert_allclose(one.centroids, other.centroids, rtol=1e-6)
  members = np.stack([points[one.labels == k].astype(np.float64).mean(axis=0) for k in range(20)])
  np.testing.assert_allclose(fit(points, Settings(20, 80, tolerance=0.0), KEY).report["inertia_final"],
                             distances(points, members).min(axis=1).sum(), rtol=0.02)  # fmt: skip


def test_directions_are_not_centred(points):
  points = points / np.linalg.norm(points, axis=1, keepdims=True) + 3
  points /= np.linalg.norm(points, axis=1, keepdims=True)  # all in one direction, nearly
  found = fit(points, Settings(20, 60, spherical=True), KEY)
  np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
  cosines = points.astype(np.float64) @ found.centroids.T.astype(np.float64)
  assert (cosines[np.arange(1500), found.labels] >= cosines.max(axis=1) - 1e-6).all()


# Meshes and chunks


@pytest.mark.parametrize("shape", MESHES)
def test_every_step_on_a_mesh_is_that_of_one_device(points, shape):
  centroids = points[:20].copy()
  centroids[5:8] = 1e3  # three to repair
  for _ in range(3):
    one, found = from_these(points, centroids), from_these(points, centroids, mesh=mesh(*shape))
    np.testing.assert_allclose(found.centroids, one.centroids, rtol=1e-5, atol=1e-5)
    same_labels(points, one.centroids, one.labels, found.labels)
    for name in ("inertia", "inertia_final"):
      np.testing.assert_allclose(found.report[name], one.report[name], rtol=1e-6)
    assert found.report["empty_repaired"] == one.report["empty_repaired"]
    centroids = one.centroids


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_chunks_from_disk_give_what_memory_gives(points, few, tmp_path, shape):
  half = points.astype(np.float16)
  for i, part in enumerate(np.array_split(half, 4)):
    np.save(tmp_path / f"{i}.npy", part)
  lazy = Lazy([np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(4)])
  settings = Settings(20, 5, tolerance=0.0)
  whole = fit(half.astype(np.float32), settings, KEY)
  found = fit(lazy, settings, KEY, mesh(*shape), chunk=512)
  np.testing.assert_allclose(found.centroids, whole.centroids, rtol=1e-5, atol=1e-5)
  same_labels(points, whole.centroids, whole.labels, found.labels)
  np.testing.assert_allclose(found.report["inertia"], whole.report["inertia"], rtol=1e-6)
  reads = np.array([stop - start for start, stop in lazy.read])
  assert reads.max() <= 512 // shape[0]
  passes = 7 + 5 + 1  # of seeding, of Lloyd's and for the labels
  assert reads[reads > 1].sum() == passes * 1500
  assert (reads == 1).sum() == 9 * few  # for the mean and for eight pools


def test_chunks_are_chosen_when_memory_is_short(points, few, monkeypatch):
  del few
  monkeypatch.setattr("alma_jax.engine.points._memory", lambda device: 64_000)
  lazy = Lazy([points])
  found = fit(lazy, Settings(20, 2), KEY)
  assert max(stop - start for start, stop in lazy.read) < 600
  np.testing.assert_allclose(found.centroids, fit(points, Settings(20, 2), KEY).centroids, rtol=1e-5, atol=1e-5)


def test_the_mesh_spreads_centroids_only_if_it_must(monkeypatch):
  monkeypatch.setattr(
    "alma_jax.engine.points._memory", lambda device: 4 * 2 * 4 * 100 * 64
  )  # a quarter holds 100 and their sums

  def shape(k):
    return tuple(mesh_for(k, 64).shape.values())

  assert [shape(k) for k in (1, 100, 101, 400, 401, 800)] == [(8, 1), (8, 1), (4, 2), (2, 4), (1, 8), (1, 8)]
  assert mesh_for(10, 64, jax.devices()[:2]).size == 2
  with pytest.raises(ClusteringError, match=r"801 centroids of 64 dimensions .* 8 devices"):
    mesh_for(801, 64)


# Samples


def test_a_sample_loses_little(points):
  whole = fit(points, Settings(20, 20), KEY).report
  found = fit(points, Settings(20, 20, per_centroid=40), KEY)
  assert 1.0 < found.report["inertia_final"] / whole["inertia_final"] < 1.05
  wanted = distances(points, found.centroids)
  assert (wanted[np.arange(1500), found.labels] <= wanted.min(axis=1) + 1e-4).all()
  assert found.report["trained_on"] == 800 and whole["trained_on"] == 1500


def test_a_sample_is_part_of_the_points(points):
  rows = []
  settings = Settings(20, 0, seeding="random", per_centroid=25)
  wanted = fit(points, settings, KEY)
  for centroid in wanted.centroids:
    rows += np.flatnonzero((points == centroid).all(axis=1)).tolist()
  assert len(set(rows)) == 20 and wanted.report["trained_on"] == 500
  chunked = fit(Lazy([points]), settings, KEY, chunk=512)
  np.testing.assert_array_equal(chunked.centroids, wanted.centroids)


# Killed and restored


class Killed(Exception):
  pass


@pytest.mark.parametrize(
  "more", [dict(), dict(chunk=512, offset=70.0), dict(per_centroid=25, seeding="random"), dict(spherical=True)]
)
def test_killed_after_any_step_it_gives_the_same_bits(points, more):
  more = dict(more)
  points = points + np.float32(more.pop("offset", 0))
  place = {"chunk": more.pop("chunk", None)}
  settings, ticks, saved = Settings(20, 5, tolerance=0.0, **more), [], []
  whole = fit(points, settings, KEY, **place, hooks=FitHooks(ticks.append, lambda *x: saved.append(x)))
  assert sum(ticks) == 5 and [step for step, _ in saved] == list(np.cumsum([0, *ticks]))
  assert {type(x) for _, arrays in saved for x in arrays.values()} == {np.ndarray}
  for step in np.cumsum([0, *ticks]):
    kept, left = [], []

    def save(now, arrays):
      kept.append((now, {name: x.copy() for name, x in arrays.items()}))
      if now == step:
        raise Killed

    with pytest.raises(Killed):
      fit(points, settings, KEY, **place, hooks=FitHooks(save=save))
    found = fit(points, settings, KEY, **place, hooks=FitHooks(left.append, restore=lambda: kept[-1]))
    np.testing.assert_array_equal(found.centroids, whole.centroids)
    np.testing.assert_array_equal(found.labels, whole.labels)
    assert found.report == whole.report and sum(left) == 5 - step


def test_a_settled_state_stays_settled(points):
  settings, saved = Settings(20, 60, tolerance=0.01), []
  whole = fit(points, settings, KEY, hooks=FitHooks(save=lambda *x: saved.append(x)))
  hooks = FitHooks(save=lambda *_: pytest.fail("went on"), restore=lambda: saved[-1])
  again = fit(points, settings, KEY, hooks=hooks)
  assert again.report == whole.report


def test_the_state_of_another_run_is_refused(points):
  with pytest.raises(ClusteringError, match=r"centroids of shape \(7, 6\), not \(20, 6\)"):
    fit(points, Settings(20), KEY, hooks=starting_at(points[:7]))


# What is reported, and edges


def test_the_report_counts_the_clusters(points):
  found = fit(points, Settings(20, 40), KEY)
  sizes, report = np.bincount(found.labels, minlength=20), found.report
  assert found.labels.dtype == np.int32 and found.labels.shape == (1500,)
  assert not report["empty_repaired"] and (np.diff([*report["inertia"], report["inertia_final"]]) <= 1e-3).all()
  assert report["largest"] == sizes.max() and report["trained_on"] == 1500
  assert report["singletons"] == (sizes == 1).sum() and report["empty"] == (sizes == 0).sum() == 0
  assert report["balance"] == pytest.approx(20 * (sizes**2).sum() / 1500**2) and report["balance"] >= 1
  assert {type(x) for x in report.values()} <= {int, float, list}


def test_the_key_decides_everything(points):
  first, again, other = (fit(points, Settings(20), key) for key in (KEY, np.array(KEY, np.uint32), (2, 1)))
  np.testing.assert_array_equal(first.labels, again.labels)
  np.testing.assert_array_equal(first.centroids, again.centroids)
  assert first.report == again.report and (other.labels != first.labels).any()


def test_one_cluster_is_the_mean(points):
  found = fit(points, Settings(1, 5), KEY)
  assert not found.labels.any()
  np.testing.assert_allclose(found.centroids[0], points.astype(np.float64).mean(axis=0), atol=1e-5)
  assert found.report["inertia_final"] == pytest.approx(1500 * points.astype(np.float64).var(axis=0).sum(), rel=1e-5)


def test_as_many_clusters_as_points_gives_each_its_own(points):
  found = fit(points[:50], Settings(50, 5), KEY)
  assert sorted(found.labels) == list(range(50)) and found.report["singletons"] == 50
  assert found.report["inertia_final"] == pytest.approx(0, abs=1e-2)
  assert found.report["balance"] == pytest.approx(1)


@pytest.mark.parametrize("k", [2, 5, 9])
def test_duplicates_share_a_cluster_and_nothing_breaks(k):
  points = np.repeat(4 * blobs(5, 6, 5), 12, axis=0)
  found = fit(points, Settings(k, 20), KEY)
  assert np.isfinite(found.centroids).all() and found.labels.min() >= 0 and found.labels.max() < k
  assert [len(set(found.labels[i : i + 12].tolist())) for i in range(0, 60, 12)] == [1] * 5
  if k >= 5:
    assert found.report["empty"] == k - 5
    np.testing.assert_allclose(found.centroids[found.labels], points, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1000])
def test_few_different_points_among_many_copies(offset, few):
  """Seven points, the rarest three times, in 1500 rows: each has its own centroid, and three of ten are empty."""
  del few
  different = np.round(64 * blobs(7, 6, 7)) / 64 + np.float32(offset)
  points = different[np.random.default_rng(0).choice(7, 1500, p=[0.002, *[0.998 / 6] * 6])]
  found = fit(points, Settings(10, 20), KEY)
  assert found.report["empty"] == 3 and np.isfinite(found.centroids).all()
  np.testing.assert_allclose(found.centroids[found.labels], points, rtol=1e-6, atol=1e-6)


def test_equal_points_only():
  found = fit(np.ones((60, 6), np.float32), Settings(3, 5), KEY)
  assert np.isfinite(found.centroids).all() and len(set(found.labels.tolist())) == 1
  assert found.report["empty"] == 2
  assert found.report["iterations"] == 2 and not found.report["empty_repaired"]  # nothing can be repaired
  np.testing.assert_array_equal(found.centroids, np.ones((3, 6)))


@pytest.mark.parametrize("more", [dict(), dict(chunk=512), dict(mesh=(8, 1))])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named_by_its_point(points, more, bad):
  points, more = points.copy(), dict(more)
  points[1213, 1] = points[1490] = bad
  if "mesh" in more:
    more["mesh"] = mesh(*more["mesh"])
  with pytest.raises(ClusteringError, match="point 1213 has a value that is not finite"):
    fit(points, Settings(20, seeding="random"), KEY, **more)


def test_a_bad_row_of_a_sample_has_its_own_number(points):
  points = points.copy()
  points[np.setdiff1d(np.arange(1500), seeding.largest(-seeding.noise(1 | 2 << 32, kmeans.SAMPLE, 1500), 500))] = 0
  row = int(np.flatnonzero(points.any(axis=1))[60])
  points[row, 3] = np.nan
  with pytest.raises(ClusteringError, match=f"point {row} "):
    fit(points, Settings(20, per_centroid=25), KEY)


@pytest.mark.parametrize(
  ("shape", "k", "said"),
  [
    ((20, 3), 21, "k=21 clusters, but there are 20 points"),
    ((20,), 2, r"shape \(20,\); it must be \(n, d\)"),
    ((0, 3), 1, "at least one point"),
    ((3, 2, 2), 1, r"it must be \(n, d\)"),
  ],
)
def test_points_that_cannot_be_clustered_are_refused(shape, k, said):
  with pytest.raises(ClusteringError, match=said):
    fit(np.zeros(shape, np.float32), Settings(k), KEY)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(k=0), "k=0, .* 1 or more"),
    (dict(k=2.5), "k=2.5"),
    (dict(iterations=-1), "iterations=-1"),
    (dict(seeding="k-means++"), "seeding='k-means\\+\\+', .* distance, random"),
    (dict(per_centroid=-1), "per_centroid"),
    (dict(tolerance=1.0), "tolerance=1.0"),
    (dict(tolerance=float("nan")), "tolerance"),
  ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
  with pytest.raises(ClusteringError, match=f"k-means: .*{said}"):
    dataclasses.replace(Settings(4), **change)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(key=jax.random.key(0)), "two whole numbers"),
    (dict(key=(1, 2**32)), "two whole numbers"),
    (dict(chunk=0), "chunk=0"),
    (dict(points=np.zeros((4, 2), complex)), "real numbers"),
    (dict(points=np.zeros((4, 2), "V2")), "bfloat16"),
  ],
)
def test_other_arguments_that_make_no_sense_are_refused(change, said):
  with pytest.raises(ClusteringError, match=said):
    fit(**(dict(points=np.ones((4, 2)), settings=Settings(2), key=KEY) | change))


def test_a_mesh_with_other_axes_is_refused(points):
  with pytest.raises(ClusteringError, match=r"\('a', 'b'\); they must be \('data', 'k'\)"):
    fit(points, Settings(2), KEY, jax.make_mesh((4, 2), ("a", "b")))
