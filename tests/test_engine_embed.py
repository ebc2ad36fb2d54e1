"""Embeddings against means taken by hand; what whitening promises."""

import numpy as np
import pytest
from engine_models import CONFIG, hidden_states, on_mesh, stacked

from alma_jax.engine.embed import embeddings, whitened
from alma_jax.llama import sharding

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
  for row, found in zip(rows, embedded):
    np.testing.assert_allclose(found, hidden_states(stacked(), row)[1:].mean(axis=0), atol=1e-5)


def test_company_order_and_devices_change_nothing(rows, embedded):
  order = np.random.default_rng(1).permutation(len(rows))
  heard = []
  permuted = embeddings(stacked(), [rows[i] for i in order], batch=4, progress=heard.append)
  np.testing.assert_allclose(permuted, embedded[order], atol=1e-6, rtol=1e-6)
  assert sum(heard) == len(rows)

  mesh = sharding.make_mesh()
  spread = embeddings(on_mesh(stacked(), mesh, sharding.DECODE), rows, batch=1, mesh=mesh)
  np.testing.assert_allclose(spread, embedded, atol=1e-5)


def test_bos_alone_is_embedded_as_zero():
  assert not embeddings(stacked(), [(BOS,)], batch=4).any()


# Whitening


def test_whitened_rows_have_unit_length_and_no_dimension_owns_the_distances():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(500, 8)) * [1, 2, 3, 1, 1, 1, 1, 1000] + [0, 5, 0, 0, 0, 0, 0, -3000]
  white = whitened(x.astype(np.float32))
  np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1, atol=1e-6)
  centred = (x - x.mean(axis=0)) / x.std(axis=0)
  np.testing.assert_allclose(white, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)
  share = (white**2).mean(axis=0)
  assert share.max() < 1.5 * share.min()


def test_scale_and_offset_of_the_dimensions_do_not_matter():
  x = np.random.default_rng(3).normal(size=(50, 6)).astype(np.float32)
  np.testing.assert_allclose(whitened(x * [4, 1, 2, 1, 8, 1] + 16), whitened(x), atol=1e-5)


def test_dead_dimensions_and_equal_rows_stay_finite():
  x = np.random.default_rng(4).normal(size=(50, 6)).astype(np.float32)
  x[:, 2] = 7.0
  white = whitened(x)
  assert np.isfinite(white).all() and not white[:, 2].any()
  assert not whitened(np.ones((3, 4), np.float32)).any()


def test_embeddings_kept_in_half_precision_are_whitened_in_single():
  # Final-norm states may be large in a few dimensions, and a dead one's floor is 0 in half precision.
  x = np.random.default_rng(5).normal(size=(300, 64)) * 1e-3
  x[:, 0] *= 1e7
  x[:, 1] = 1e-3
  half = x.astype(np.float16)
  white = whitened(half)
  assert white.dtype == np.float32
  np.testing.assert_allclose(white, whitened(half.astype(np.float64)), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1, atol=1e-6)
