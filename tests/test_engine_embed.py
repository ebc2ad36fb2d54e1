"""Embeddings against means taken by hand and against transformers; projections against NumPy's SVD."""

import itertools
import math

import jax
import numpy as np
import pytest
from engine_models import CONFIG, hidden_states, on_mesh, stacked

from alma_jax.engine import buckets, embed
from alma_jax.engine.embed import Embedding, embeddings
from alma_jax.errors import NotFinite
from alma_jax.llama import sharding, weights

BOS = 1


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  return [(BOS, *rng.integers(2, CONFIG.vocab, n - 1).tolist()) for n in (2, 16, 17, 3, 17, 16, 2, 3, 2)]


@pytest.fixture(scope="module")
def embedded(rows):
  return embeddings(stacked(), rows, batch=4)


def test_an_embedding_is_the_mean_hidden_state_of_the_row_alone_without_bos(rows, embedded):
  assert embedded.dtype == np.float32
  for row, found in zip(rows, embedded, strict=True):
    np.testing.assert_allclose(found, hidden_states(stacked(), row)[1:].mean(axis=0), atol=1e-5)


def test_a_row_whose_embedding_is_not_finite_is_named(rows, embedded):
  model = jax.tree.map(lambda x: x, stacked())
  used = next(token for token in rows[3] if sum(token in row for row in rows) == 1)
  model.embed = model.embed.replace(model.embed[...].at[used].set(np.nan))
  with pytest.raises(NotFinite) as error:
    embeddings(model, rows, batch=4)
  assert error.value.item == 3


def test_company_order_and_devices_change_nothing(rows, embedded):
  order = np.random.default_rng(1).permutation(len(rows))
  heard = []
  permuted = embeddings(stacked(), [rows[i] for i in order], batch=4, progress=heard.append)
  np.testing.assert_allclose(permuted, embedded[order], atol=1e-6, rtol=1e-6)
  assert sum(heard) == len(rows)

  mesh = sharding.make_mesh()
  spread = embeddings(on_mesh(stacked(), mesh, sharding.DECODE), rows, batch=1, mesh=mesh)
  np.testing.assert_allclose(spread, embedded, atol=1e-5)


def test_bos_alone_is_embedded_as_zero_and_nothing_as_nothing():
  assert not embeddings(stacked(), [(BOS,)], batch=4).any()
  assert embeddings(stacked(), [], batch=4).shape == (0, CONFIG.width)


def test_the_last_token_and_the_projection_are_those_of_the_row_alone(rows, embedded):
  fitted, kept = embed.projection(embedded, dims=5)
  assert 0.5 < kept < 1
  found = embeddings(stacked(), rows, batch=4, kind=Embedding(pooling="last", projection=fitted))
  assert found.dtype == np.float32 and found.shape == (len(rows), 5)
  for row, point in zip(rows, found, strict=True):
    x = (hidden_states(stacked(), row)[-1] - fitted.mean) @ fitted.matrix.astype(np.float64)
    np.testing.assert_allclose(point, x / np.linalg.norm(x), atol=2e-5)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

  mesh = sharding.make_mesh()
  kind = Embedding(pooling="last", projection=fitted)
  spread = embeddings(on_mesh(stacked(), mesh, sharding.DECODE), rows, 1, mesh, kind=kind)
  np.testing.assert_allclose(spread, found, atol=1e-5)


def test_layers_and_pooling_are_those_of_transformers(rows, embedded, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  weights.save(tmp_path, stacked(), weights.TextSide(bos_id=BOS, stop_ids=(2,)))
  hf = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
  first = {x: embeddings(stacked(), rows, batch=4, kind=Embedding(layers=1, pooling=x)) for x in ("mean", "last")}
  for i, row in enumerate(rows):
    with torch.inference_mode():
      states = hf(torch.tensor([row]), output_hidden_states=True).hidden_states  # the last has passed the final norm
      one, both = hf.norm(states[1])[0].numpy(), states[2][0].numpy()
    np.testing.assert_allclose(first["mean"][i], one[1:].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(first["last"][i], one[-1], atol=1e-5)
    np.testing.assert_allclose(embedded[i], both[1:].mean(axis=0), atol=1e-5)
  assert np.abs(first["mean"] - embedded).max() > 0.1


# Projections


def projected(x, dims):
  """(points float64, the share of the variance that is kept)."""
  fitted, kept = embed.projection(x, dims)
  points = (x - fitted.mean.astype(np.float64)) @ fitted.matrix.astype(np.float64)
  return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12), kept


def test_principal_dimensions_and_their_variance_are_those_of_a_singular_value_decomposition():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) + 5
  scaled = (x - x.mean(axis=0)) / x.std(axis=0)
  _, values, axes = np.linalg.svd(scaled)
  for dims in (1, 4, 11):
    fitted, kept = embed.projection(x.astype(np.float32), dims)
    assert fitted.mean.dtype == fitted.matrix.dtype == np.float32 and fitted.matrix.shape == (12, dims)
    assert kept == pytest.approx((values[:dims] ** 2).sum() / (values**2).sum(), rel=1e-6)
    points, other = (x - fitted.mean) @ fitted.matrix, scaled @ axes[:dims].T
    np.testing.assert_allclose(points * np.sign((points * other).sum(axis=0)), other, atol=1e-4)
    # No sign of their own: the same axes from rows in another order, whatever the decomposition makes of them.
    again, _ = embed.projection(x[::-1].astype(np.float32), dims)
    np.testing.assert_allclose(again.matrix, fitted.matrix, atol=1e-5)


def test_projection_is_what_scikit_learn_calls_pca():
  decomposition = pytest.importorskip("sklearn.decomposition")
  x = np.random.default_rng(3).normal(size=(60, 9)) @ np.diag(np.arange(1, 10))
  theirs = decomposition.PCA(3).fit((x - x.mean(axis=0)) / x.std(axis=0))
  fitted, kept = embed.projection(x, 3)
  assert kept == pytest.approx(theirs.explained_variance_ratio_.sum())
  np.testing.assert_allclose(np.abs(fitted.matrix * x.std(axis=0)[:, None]), np.abs(theirs.components_.T), atol=1e-6)


def test_points_have_unit_length_and_no_dimension_owns_the_distances():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(500, 8)) * [1, 2, 3, 1, 1, 1, 1, 1000] + [0, 5, 0, 0, 0, 0, 0, -3000]
  points, kept = projected(x.astype(np.float32), 8)
  centred = (x - x.mean(axis=0)) / x.std(axis=0)
  np.testing.assert_allclose(points, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)
  share = (points**2).mean(axis=0)
  assert kept == 1 and share.max() < 1.5 * share.min()


@pytest.mark.parametrize("dims", [3, 6])
def test_scale_and_offset_of_the_dimensions_do_not_matter(dims):
  x = np.random.default_rng(3).normal(size=(50, 6)).astype(np.float32)
  for one, two in zip(
    projected(x * np.float32([4, 1, 2, 1, 8, 1]) + np.float32(16), dims), projected(x, dims), strict=True
  ):
    np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("dims", [4, 8])
def test_dead_dimensions_and_equal_and_few_rows_stay_finite(dims):
  x = np.random.default_rng(4).normal(size=(50, 6)).astype(np.float32)
  x[:, 2] = 7.0
  points, kept = projected(x, dims)
  assert np.isfinite(points).all() and 0 < kept <= 1
  if dims < 6:
    assert np.abs(embed.projection(x, dims)[0].matrix[2]).max() < 1e-9  # principal axes leave it out
  else:
    assert not points[:, 2].any()
  points, kept = projected(np.ones((3, 6), np.float32), dims)
  assert not points.any() and np.isfinite(kept)
  assert np.isfinite(projected(x[:2], dims)[0]).all()


# Rows of several arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_several_arrays_are_those_of_one(tmp_path, dtype):
  rng, arrays = np.random.default_rng(5), []
  for i, n in enumerate((0, 3, 1, 0, 5, 0)):
    np.save(tmp_path / f"{i}.npy", rng.normal(size=(n, 4)).astype(np.float16 if i == 1 else dtype))
    arrays.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
  rows, whole = embed.Rows(tuple(arrays)), np.concatenate(arrays).astype(dtype)
  assert (len(rows), rows.shape, rows.dtype) == (9, (9, 4), dtype)
  for a in range(10):
    for b in range(11):
      np.testing.assert_array_equal(rows[a:b], whole[a:b], strict=True)
  np.testing.assert_array_equal(rows[:], whole)
  np.testing.assert_array_equal(rows[-2:], whole[-2:])
  lengths = np.linalg.norm(embed.Rows(tuple(arrays), unit=True)[2:8].astype(np.float64), axis=1)
  np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_rows_are_centred_and_scaled_in_single_precision():
  # Final-norm states may be large in a few dimensions, and in half precision their squares are infinite.
  x = np.random.default_rng(5).normal(size=(300, 64)) * 1e-3
  x[:, 0] *= 1e7
  half = x.astype(np.float16)
  whitening = np.stack([half.mean(axis=0, dtype=np.float64), half.std(axis=0, dtype=np.float64)]).astype(np.float32)
  rows = embed.Rows((half[:100], half[100:]), whitening, unit=True)
  found, exact = rows[:], (half.astype(np.float64) - whitening[0]) / whitening[1]
  assert found.dtype == rows.dtype == np.float32
  np.testing.assert_allclose(found, exact / np.linalg.norm(exact, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(("longest", "count", "batch"), [(40, 36, 32), (20, 36, 32), (60, 48, 32), (120, 24, 32)])
def test_a_few_short_rows_fill_their_batches(longest, count, batch):
  rng = np.random.default_rng(0)
  short = [tuple(range(1, n + 1)) for n in rng.integers(5, longest + 1, count)]
  made = list(buckets.batches(short, batch, unit=2))
  assert sum(map(len, short)) >= 0.7 * sum(found.tokens.size for found in made)
  assert len({found.tokens.shape for found in made}) <= 3
  assert sorted(i for found in made for i in found.indices) == list(range(count))
  for indices, tokens, lengths in made:
    assert len(tokens) <= batch and len(tokens) % 2 == 0
    for i, row, length in zip(indices, tokens, lengths, strict=False):
      assert tuple(row[:length]) == short[i] and not row[length:].any()
    assert (lengths[len(indices) :] == 1).all()


def test_many_rows_have_batches_of_one_size():
  rows = [tuple(range(n)) for n in range(1, 34)]
  assert {found.tokens.shape for found in buckets.batches(rows, 8)} == {(8, 16), (8, 32), (8, 48)}


@pytest.mark.parametrize("most", [1, 2, 3])
def test_levels_are_the_best_of_all(most):
  for seed in range(5):
    sizes = np.random.default_rng(seed).integers(1, 12, 20)

    def cost(levels, sizes=sizes):
      levels = sorted(levels)
      return sum(next(x for x in levels if x >= size) for size in sizes) * (1 + 0.02 * (len(levels) - 1))

    found = buckets.levels(sizes, most, 0.02)
    subsets = (of for n in range(1, most + 1) for of in itertools.combinations(sorted(set(sizes.tolist())), n))
    assert tuple(found.tolist()) == min(
      (of for of in subsets if max(of) == sizes.max()), key=cost
    )  # of equal ones the first
  assert buckets.levels(np.arange(1, 201), 4, 0.0).tolist() == [50, 100, 150, 200]


def test_runs_have_the_least_cost_of_all():
  for seed in range(5):
    costs = np.where(np.tri(7, dtype=bool).T, np.random.default_rng(seed).random((7, 7)), math.inf)
    prices = np.array([1.0, 1.1, 1.5])

    def cost(ends, costs=costs, prices=prices):
      return sum(costs[i, j] for i, j in zip([0, *(j + 1 for j in ends)], ends, strict=False)) * prices[len(ends) - 1]

    every = [(*ends, 6) for n in range(3) for ends in itertools.combinations(range(6), n)]
    assert tuple(buckets.runs(costs, prices)) == min(every, key=cost)
