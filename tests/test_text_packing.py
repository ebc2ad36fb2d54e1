"""Packing: every token once, no target across a border, rows nearly full, what is cut is counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.text.packing import clip, pack, rows

ROW = 16
EXAMPLE = st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=24).map(
  lambda pairs: ([i for i, _ in pairs], [m for _, m in pairs])
)


@settings(deadline=None, max_examples=150)
@given(st.lists(EXAMPLE, max_size=20))
def test_rows_hold_every_example_once(examples):
  groups, counts = clip(examples, ROW)
  kept = [example for group in groups if group for example in group]
  assert counts["dropped_without_target"] == sum(not any(m[1:ROW]) for _, m in examples) == len(examples) - len(kept)
  assert counts["truncated"] == sum(len(ids) > ROW for ids, _ in examples)
  packing = pack([len(ids) for ids, _ in kept], ROW)
  assert sorted(i for row in packing for i in row) == list(range(len(kept)))
  batch = rows(kept, packing, ROW, n_rows=len(packing) + 2, pad_id=0)
  assert all(a.shape == (len(packing) + 2, ROW) for a in batch.values())
  assert (batch["tokens"] > 0).sum() == sum(len(ids) for ids, _ in kept)
  assert batch["weights"].sum() == sum(sum(mask[1:]) for _, mask in kept)
  for index, (ids, mask) in enumerate(kept):
    row, columns = (where := np.nonzero(batch["example"] == index))[0][0], where[1]
    assert (where[0] == row).all() and (np.diff(columns) == 1).all()
    assert batch["tokens"][row, columns].tolist() == ids == examples_ids(examples, index)
    assert batch["positions"][row, columns].tolist() == list(range(len(ids)))
    assert len(set(batch["segments"][row, columns])) == 1
    # Brute force: the target of a token is the next one of its own example; the last has none.
    assert batch["targets"][row, columns[:-1]].tolist() == ids[1:]
    assert batch["weights"][row, columns].tolist() == [float(m) for m in mask[1:]] + [0.0]
  pad = batch["segments"] == 0
  assert (batch["example"][pad] == -1).all() and not batch["weights"][pad].any() and not batch["tokens"][pad].any()
  for row, members in zip(batch["segments"], packing, strict=False):
    assert sorted(set(row[row > 0])) == list(range(1, len(members) + 1))


def examples_ids(examples, index):
  return [ids[:ROW] for ids, mask in examples if any(mask[1:ROW])][index]


def test_best_fit_decreasing_by_hand():
  # 7 | 5 | 4+3 -> the 3 goes to the fullest row that takes it (7+3), the 4 to 5+4
  assert pack([3, 7, 4, 5], 10) == [[1, 0], [3, 2]]
  assert pack([], 10) == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_equals_brute_force_best_fit(lengths):
  space, held = [], []
  for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    fits = [s for s in space if s >= lengths[i]]
    if not fits:
      space.append(100)
    row = space.index(min(fits)) if fits else len(space) - 1
    space[row] -= lengths[i]
    held.append(row)
  packing = pack(lengths, 100)
  assert len(packing) == len(space)
  assert sorted(100 - sum(lengths[i] for i in row) for row in packing) == sorted(space)
  assert packing == pack(lengths, 100)


def test_large_packing_is_nearly_full():
  lengths = np.random.default_rng(0).integers(16, 700, 20_000).tolist()
  packing = pack(lengths, 2048)
  assert sum(lengths) / (len(packing) * 2048) > 0.97
  assert max(sum(lengths[i] for i in row) for row in packing) <= 2048


def test_impossible_inputs_are_refused():
  with pytest.raises(ValueError, match=r"1\.\.8, got 3\.\.9"):
    pack([3, 9], 8)
  with pytest.raises(ValueError, match="do not fit into n_rows=1"):
    rows([([1, 2], [True, True])] * 2, [[0], [1]], 2, n_rows=1, pad_id=0)
