"""The draw against one written out in plain Python, exact counts, and what uniform draws would give."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.corpus import draw
from alma_jax.corpus.draw import Exhausted

MASK = 2**64 - 1
WAYS = (("diverse", "round"), ("diverse", "fresh"), ("random", "round"), ("proportional", "round"))
ways = st.sampled_from(WAYS)
members = st.lists(st.integers(0, 9), min_size=1, max_size=80)  # the cluster of every row


def mix(x):
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
  x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
  return x ^ x >> 31


def h(seed, stream, a):
  return mix(a * draw.GOLDEN + mix(seed * draw.GOLDEN + stream & MASK) & MASK)


def id_with(seed, value):
  """The id whose hash among a cluster's members is this one."""

  def unshift(x, s):
    return x ^ x >> s ^ x >> 2 * s

  x = unshift(value, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
  x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
  x = unshift(x, 30)
  return (x - mix(seed * draw.GOLDEN + draw.MEMBERS & MASK)) * pow(draw.GOLDEN, -1, 2**64) & MASK


def pool(labels, seed=0, ids=None):
  ids = np.array(range(len(labels)) if ids is None else ids, np.uint64)
  return draw.build(np.array(labels, np.int32), ids, seed)


def some_used(data, n, most=None):
  return data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n - 1 if most is None else most))


# The queues


def test_the_hash_is_splitmix64_and_stays_what_it_is():
  state = 1234567  # the first outputs of splitmix64 as they are published for this seed
  published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
  found = draw._mixed(np.array([state + (i + 1) * draw.GOLDEN & MASK for i in range(5)], np.uint64))
  assert found.tolist() == published
  for seed, stream, value in ((0, 1, 0), (7, 1002, 3), (2**63 + 5, 2**33, MASK), (-1, 1, 5)):
    assert draw.hashed(seed, stream, np.array([value], np.uint64)).tolist() == [h(seed, stream, value)]
  assert draw.hashed(0, 1, [0, 1, 2]).tolist() == [h(0, 1, i) for i in range(3)]


HASHES = st.one_of(
  st.integers(0, MASK), st.integers(0, 40), st.integers(2**63, 2**63 + 40), st.integers(MASK - 40, MASK)
)


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.tuples(st.sampled_from([0, 1, 2, 700]), HASHES), min_size=1, max_size=60), st.sampled_from([1, 3, 99])
)
def test_members_are_in_the_order_of_their_hashes_though_leading_bits_are_equal(rows, chunk):
  rows = list({hash: (label, hash) for label, hash in rows}.values())
  patch = pytest.MonkeyPatch()
  patch.setattr(draw, "CHUNK", chunk)
  queues = pool([label for label, _ in rows], 5, [id_with(5, hash) for _, hash in rows])
  patch.undo()
  assert queues.order.tolist() == sorted(range(len(rows)), key=lambda i: rows[i])
  sizes = collections.Counter(label for label, _ in rows)
  assert np.diff(queues.offsets).tolist() == [sizes[c] for c in range(max(sizes) + 1)]


def test_memory_maps_are_read_as_arrays_are(tmp_path):
  labels, ids = np.arange(50, dtype=np.int32) % 7, np.arange(50, dtype=np.uint64) * 3
  np.save(tmp_path / "labels.npy", labels)
  np.save(tmp_path / "ids.npy", ids)
  mapped = draw.build(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("labels", "ids")), 1)
  assert mapped.order.tolist() == draw.build(labels, ids, 1).order.tolist()
  assert draw.draw(mapped, [3], 9, 2).tolist() == draw.draw(draw.build(labels, ids, 1), [3], 9, 2).tolist()


@pytest.mark.parametrize(
  ("labels", "ids", "message"),
  [
    ([0, 1, 1], [5, 6, 6], "rows 1 and 2 have the same id, 0000000000000006"),
    ([0, -1, 1], [5, 6, 7], "row 1 has no cluster: its label is -1"),
    ([0, 1], [5], "2 labels and 1 ids"),
    ([], [], "0 labels and 0 ids"),
  ],
)
def test_rows_that_cannot_be_queued_are_named(labels, ids, message):
  with pytest.raises(ValueError, match=message):
    draw.build(np.array(labels, np.int32), np.array(ids, np.uint64), 0)


# The draw, written out


def plainly(labels, ids, used, k, seed, round, method, coverage):
  """What `draw` gives, one prompt after the other."""
  used, queue = set(used), collections.defaultdict(list)
  for row in sorted(range(len(ids)), key=lambda i: h(seed, 1, ids[i])):
    queue[labels[row]].append(row)
  spent = {c: sum(row in used for row in rows) for c, rows in queue.items()}
  places = [row for c in sorted(queue) for row in queue[c]]
  queue = {c: [row for row in rows if row not in used] for c, rows in queue.items()}
  chosen, j = [], 0
  while len(chosen) < k and method == "diverse":
    for c in sorted(queue, key=lambda c: (spent[c] if coverage == "fresh" else 0, h(seed, 1000 + round, c))):
      chosen += [queue[c].pop(0)] if queue[c] and len(chosen) < k else []
  while len(chosen) < k:
    steps = h(seed, 2**32 + round, j) if method == "random" else h(seed, 2**33 + round, 0) + j * draw.GOLDEN & MASK
    place, j = places[int((steps >> 11) / 2**53 * len(ids))], j + 1
    if method == "random":
      chosen += [place] if place not in used and place not in chosen else []
    else:
      chosen += [queue[labels[place]].pop(0)] if queue[labels[place]] else []
  return chosen


@settings(max_examples=60, deadline=None)
@given(members, ways, st.data())
def test_every_method_draws_what_is_written_out(labels, way, data):
  used, (seed, round) = some_used(data, len(labels)), data.draw(st.tuples(st.integers(0, 5), st.integers(0, 20)))
  k = data.draw(st.integers(1, len(labels) - len(used)))
  ids = data.draw(st.lists(st.integers(0, MASK), min_size=len(labels), max_size=len(labels), unique=True))
  found = draw.draw(pool(labels, seed, ids), used, k, round, *way)
  assert found.tolist() == plainly(labels, ids, used, k, seed, round, *way)


@settings(max_examples=60, deadline=None)
@given(members, ways, st.data())
def test_rounds_never_repeat_a_prompt_and_spread_over_clusters_until_nothing_is_left(labels, way, data):
  queues, used, room = pool(labels), [], collections.Counter(labels)
  for round in range(2, 6):
    left = len(labels) - len(used)
    with pytest.raises(Exhausted, match=f"{left + 1} prompts are asked for, and only {left} are unused") as told:
      draw.draw(queues, used, left + 1, round, *way)
    assert (told.value.left, told.value.asked) == (left, left + 1)
    if not left:
      break
    rows = draw.draw(queues, used, data.draw(st.integers(1, left)), round, *way).tolist()
    assert not set(rows) & set(used) and len(set(rows)) == len(rows)
    gave = collections.Counter(labels[row] for row in rows)
    assert all(gave[c] <= room[c] for c in gave)  # none from an exhausted one
    if way[0] == "diverse":  # as even as the clusters allow: one that gave less than another's last has no more
      assert all(gave[c] >= min(room[c], max(gave.values()) - 1) for c in room)
      first = [labels[row] for row in rows[: sum(n > 0 for n in room.values())]]
      assert len(set(first)) == len(first)
    used, room = used + rows, room - gave


@settings(max_examples=60, deadline=None)
@given(members, ways, st.randoms(), st.data())
def test_order_of_rows_and_of_used_ones_plays_no_part(labels, way, rng, data):
  used, ids = some_used(data, len(labels)), [7 * i + 3 for i in range(len(labels))]
  k, turned = data.draw(st.integers(1, len(labels) - len(used))), list(range(len(labels)))
  rng.shuffle(turned)
  before = draw.draw(pool(labels, 3, ids), used, k, 2, *way)
  moved = pool([labels[i] for i in turned], 3, [ids[i] for i in turned])
  again = [turned.index(row) for row in used + used[:2]]
  rng.shuffle(again)
  assert [turned[row] for row in draw.draw(moved, again, k, 2, *way)] == before.tolist()


@settings(max_examples=60, deadline=None)
@given(members, ways, st.data())
def test_a_larger_draw_begins_with_the_smaller_one(labels, way, data):
  used, queues = some_used(data, len(labels)), pool(labels)
  longest = draw.draw(queues, used, len(labels) - len(used), 2, *way).tolist()
  for k in range(1, len(longest) + 1):
    assert draw.draw(queues, used, k, 2, *way).tolist() == longest[:k]


@settings(max_examples=60, deadline=None)
@given(members, st.sampled_from(WAYS[:2]), st.lists(st.integers(0, 9), min_size=1, max_size=20), st.data())
def test_prompts_added_to_clusters_change_only_what_these_give(labels, way, added, data):
  used = some_used(data, len(labels))
  active = {labels[row] for row in range(len(labels)) if row not in used}
  k, added = data.draw(st.integers(1, len(active))), [c for c in added if c in active]
  before = draw.draw(pool(labels), used, k, 2, *way).tolist()
  after = draw.draw(pool(labels + added), used, k, 2, *way).tolist()
  assert not set(after) & set(used)
  grown = labels + added
  assert [grown[row] for row in after] == [labels[row] for row in before]  # the same clusters
  assert all(a == b or (grown[a] in added and a >= len(labels)) for a, b in zip(after, before, strict=True))


# What chance gives


def chi_square(counts, expected):
  """In deviations of a chi-square of as many degrees of freedom."""
  counts, free = np.asarray(counts), len(counts) - 1
  return (((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5


def test_clusters_and_prompts_in_them_are_uniform_over_seeds():
  labels = [0] * 10 + [1] * 2 + list(range(2, 20))
  clusters, firsts, seconds = np.zeros(20), np.zeros(10), np.zeros(10)
  for seed in range(3000):
    queues = pool(labels, seed)
    rows = draw.draw(queues, [], 5, 2)
    clusters += np.bincount(np.array(labels)[rows], minlength=20)
    first = draw.draw(queues, [], 20, 3)
    firsts += np.bincount(first[first < 10], minlength=10)
    second = draw.draw(queues, first, 2, 4)
    seconds += np.bincount(second[second < 10], minlength=10)
  assert firsts.sum() == seconds.sum() == 3000 and clusters.sum() == 15000
  assert chi_square(firsts, 300) < 4 and chi_square(seconds, 300) < 4
  assert chi_square(clusters / (15 / 20) ** 0.5, 750 / (15 / 20) ** 0.5) < 4  # 5 of 20 without replacement vary less


def test_random_prompts_are_uniform_over_the_unused_ones_and_shares_proportional_to_sizes():
  labels = [0] * 1 + [1] * 9 + [2] * 20 + [3] * 30
  used, queues = [0, 11, 12, 13, 14, 15, 59], pool(labels)
  drawn, shares = np.zeros(60), np.zeros(4)
  for seed in range(3000):
    queues = dataclasses.replace(queues, seed=seed)
    drawn[draw.draw(queues, used, 8, 2, "random")] += 1
    shares += np.bincount(np.array(labels)[draw.draw(queues, [], 1, 2, "proportional")], minlength=4)
  assert drawn[used].sum() == 0
  unused, vary = np.delete(drawn, used), (45 / 53) ** 0.5  # 8 of 53 without replacement
  assert chi_square(unused / vary, 3000 * 8 / 53 / vary) < 4
  assert chi_square(shares, 3000 * np.array([1, 9, 20, 30]) / 60) < 4


def test_a_proportional_draw_gives_every_cluster_its_share():
  sizes = np.random.default_rng(0).pareto(1.1, 300).astype(int) * 20 + 20
  labels = np.repeat(np.arange(300), sizes)
  for round in range(20):
    rows = draw.draw(pool(labels), [], 1500, round, "proportional")
    for k in (100, 700, 1500):
      assert np.abs(np.bincount(labels[rows[:k]], minlength=300) - sizes / len(labels) * k).max() < 2.5


def test_rounds_and_seeds_are_independent():
  clusters, k = 2000, 200
  seeds = [pool(range(clusters), s) for s in range(8)]
  drawn = {(s, r): set(draw.draw(seeds[s], [], k, r).tolist()) for s in range(8) for r in range(2, 10)}
  pairs = [len(drawn[a] & drawn[b]) for a in drawn for b in drawn if a < b]
  p = k / clusters
  deviation = (k * p * (1 - p) * (clusters - k) / (clusters - 1)) ** 0.5  # of a hypergeometric number
  assert abs(np.mean(pairs) - k * p) < 4 * deviation / len(pairs) ** 0.5
  assert abs(np.std(pairs) / deviation - 1) < 0.1 and max(pairs) < k * p + 6 * deviation


def test_rounds_reach_as_many_clusters_as_independent_permutations_do_and_fresh_ones_all_that_can_be():
  clusters, k, rounds = 5000, 250, 10
  labels = np.repeat(np.arange(clusters), 12)
  queues = pool(labels, 1)
  for coverage in ("round", "fresh"):
    used, reached = [], []
    for round in range(2, 2 + rounds + 15 * (coverage == "fresh")):
      used = np.append(np.array(used, int), draw.draw(queues, used, k, round, "diverse", coverage))
      reached.append(len(set(labels[used].tolist())))
    if coverage == "fresh":
      assert reached == [min(clusters, k * r) for r in range(1, 26)]
      assert set(np.bincount(labels[used]).tolist()) == {1, 2}
    else:
      out = (1 - k / clusters) ** rounds
      both = ((clusters - k) * (clusters - k - 1) / (clusters * (clusters - 1))) ** rounds
      deviation = (clusters * out * (1 - out) + clusters * (clusters - 1) * (both - out**2)) ** 0.5
      assert abs(reached[-1] - clusters * (1 - out)) < 4 * deviation


def test_methods_may_change_from_round_to_round():
  labels, used = np.arange(400) % 40, np.empty(0, int)
  for round, way in enumerate(WAYS * 2):
    used = np.append(used, draw.draw(pool(labels), used, 50, round, *way))
  assert sorted(used.tolist()) == list(range(400))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "diverce"}, "method 'diverce'"),
    ({"coverage": "all"}, "coverage 'all'"),
    ({"k": 0}, "k=0"),
    ({"used": [2, 5]}, "used rows are 2 to 5, and there are 5 rows"),
    ({"used": [-1, 2]}, "used rows are -1 to 2"),
  ],
)
def test_what_is_no_draw_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    draw.draw(**({"queues": pool(range(5)), "used": [], "k": 2, "round": 2} | changes))
