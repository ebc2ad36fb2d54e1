"""Judge reads against unpadded full forwards, whatever the batch; a score of two tokens against all sequences."""

import jax
import numpy as np
import pytest
from engine_models import CONFIG, logprobs, on_mesh, stacked

from alma_jax.engine import score as engine
from alma_jax.engine.score import next_logprobs
from alma_jax.llama import sharding
from alma_jax.text.judge import ScoreTrie, expected_score

COLUMNS = [5, 2, 90, 17]
LENGTHS = [2, 16, 17, 17, 3, 16, 2, 17, 2]  # both sides of a bucket's end


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  return [tuple(rng.integers(1, CONFIG.vocab, n).tolist()) for n in LENGTHS]


@pytest.fixture(scope="module")
def read(rows):
  return next_logprobs(stacked(), rows, COLUMNS, reads=2, batch=4)


def test_reads_equal_full_forwards_of_each_row_alone(rows, read):
  assert read.shape == (len(rows), 2, len(COLUMNS))
  for row, found in zip(rows, read):
    np.testing.assert_allclose(found, logprobs(stacked(), row)[-2:][:, COLUMNS], atol=1e-5)


@pytest.mark.parametrize("batch", [4, 16])
def test_company_order_and_padding_change_nothing(batch, rows, read):
  order = np.random.default_rng(1).permutation(len(rows))
  permuted = next_logprobs(stacked(), [rows[i] for i in order], COLUMNS, 2, batch)
  np.testing.assert_allclose(permuted, read[order], atol=1e-6, rtol=1e-6)
  for i in (1, 3):
    alone = next_logprobs(stacked(), [rows[i]], COLUMNS, 2, batch)[0]
    np.testing.assert_allclose(alone, read[i], atol=1e-6, rtol=1e-6)


def test_one_read_is_the_last_of_two_and_a_column_does_not_depend_on_the_others(rows, read):
  short = [row for row in rows if len(row) <= 16]
  found = next_logprobs(stacked(), short, COLUMNS[2:3], reads=1, batch=4)
  wanted = [x[1, 2] for row, x in zip(rows, read) if len(row) <= 16]
  np.testing.assert_allclose(found[:, 0, 0], wanted, atol=1e-6, rtol=1e-6)


def test_eight_devices_read_what_one_does_and_compile_once(rows, read):
  mesh = sharding.make_mesh(data=4, tensor=2)
  model = on_mesh(stacked(), mesh, sharding.DECODE)
  place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
  spread = lambda: next_logprobs(model, rows, COLUMNS, 2, batch=8, place=place)
  np.testing.assert_allclose(spread(), read, atol=1e-5)
  size = engine._read._cache_size()
  spread()
  assert engine._read._cache_size() == size


def test_progress_hears_of_every_row(rows):
  heard = []
  next_logprobs(stacked(), rows, COLUMNS, 2, 4, progress=heard.append)
  assert sum(heard) == len(rows)


def test_a_score_of_two_tokens_equals_a_sum_over_whole_sequences():
  # As with Llama-2: "1" is token 21, "0" is 20, "]]" is 50; "1" competes with "10" with its closer included.
  digits = [(20 + score,) for score in range(10)]
  digits[1] = (21, 50)
  trie = ScoreTrie(paths=(*digits, (21, 20)), inner=(21,))
  prefix = tuple(np.random.default_rng(3).integers(60, CONFIG.vocab, 15).tolist())

  total = np.zeros(11)
  for score, path in enumerate(trie.paths):
    p = logprobs(stacked(), [*prefix, *path])  # the model on the whole sequence of this score
    total[score] = np.exp(sum(p[len(prefix) - 1 + i, token] for i, token in enumerate(path)))
  wanted = total / total.sum()

  found = next_logprobs(stacked(), [(*prefix, *trie.inner)], np.arange(CONFIG.vocab), reads=2, batch=2)
  score, probs, mass = expected_score(trie, found[0])
  np.testing.assert_allclose(probs, wanted, atol=1e-6)
  assert score == pytest.approx(wanted @ np.arange(11), abs=1e-5)
  assert mass == pytest.approx(total.sum(), rel=1e-5)
