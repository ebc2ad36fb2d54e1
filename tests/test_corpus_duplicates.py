"""Near-duplicates: what is found against all pairs, who survives against a plain loop, and nothing that parts, orders,
hosts or interruptions change."""

import hashlib
import itertools
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import process
from rapidfuzz.distance import Indel

from alma_jax.corpus import duplicates, minhash, rouge, search, words
from alma_jax.corpus.duplicates import Search, near_duplicates


def ident(text):
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def edited(text, count, random):
  """The text with so many words changed, left out or put in."""
  text = text.split()
  for _ in range(count):
    place, new = random.randrange(len(text)), f"w{random.randrange(900)}"
    out, put = random.choice([(1, [new]), (0, [new]), (1, [])])
    text[place : place + out] = put
  return " ".join(text)


def planted(n, near, length, seed=0):
  """n different texts: random ones, and `near` copies of different ones of them with one or two words edited."""
  draw = random.Random(seed)
  texts = [" ".join(f"w{int(900 * draw.random() ** 2)}" for _ in range(draw.randint(*length))) for _ in range(n - near)]
  copies = [edited(text, draw.choice([1, 2]), draw) for text in draw.sample(texts, near)]
  return list(dict.fromkeys(texts + copies))


def all_pairs(texts, threshold=0.7):
  """{(i, j)} with i < j of the ROUGE-L that reaches the threshold, of all pairs."""
  codes = {}
  coded = ["".join(chr(0x4000 + codes.setdefault(word, len(codes))) for word in text.split()) for text in texts]
  similar = process.cdist(coded, coded, scorer=Indel.normalized_similarity, dtype=np.float64) >= threshold - 1e-12
  return set(zip(*(side.tolist() for side in np.nonzero(np.triu(similar, 1))), strict=True))


def rouge_l(left, right):
  """ROUGE-L F1 of the texts of two lists, pair by pair."""
  hashes, offsets = words.hashes([*left, *right])
  rows = np.arange(2 * len(left))
  return rouge.of_pairs(lambda rows: words.taken(hashes, offsets, rows), rows[: len(left)], rows[len(left) :])


def lcs(a, b):
  """The plain dynamic program."""
  row = [0] * (len(b) + 1)
  for x in a:
    before = row
    row = [0]
    for i, y in enumerate(b):
      row.append(before[i] + 1 if x == y else max(before[i + 1], row[i]))
  return row[-1]


def survivors(ranks, edges):
  """{x that stay}: in the order of ranks, x goes where an edge leads to one before it that stays."""
  stay = set()
  for x in sorted(ranks, key=ranks.get):
    if not any(y in stay for pair in edges if x in pair for y in pair if ranks[y] < ranks[x]):
      stay.add(x)
  return stay


def run(pool, parts, hosts=1, order=1):
  """All steps, with the units divided over hosts and done in this order; [Removal] of the newest generation."""

  def divided(units):
    return itertools.chain(*(list(units)[host::hosts][::order] for host in range(hosts)))

  for part in divided(range(len(parts))):
    duplicates.sign(pool, part, [ident(text) for text in parts[part]], parts[part])
  for unit in divided(duplicates.pair_units(pool)):
    duplicates.find_pairs(pool, unit)
  for part in divided(duplicates.newest(pool)):
    duplicates.verify(pool, part)
  duplicates.decide(pool)
  found = []
  for part in duplicates.newest(pool):
    keep, removals = duplicates.decisions(pool, part)
    assert np.flatnonzero(~keep).tolist() == [x.row for x in removals]
    for x in removals:
      assert x.id == ident(parts[part][x.row]) and x.kept_id == ident(parts[x.kept_part][x.kept_row])
    found += removals
  return found


def facts(removals):
  return sorted((x.id, x.kept_id, x.similarity) for x in removals)


def files(directory):
  """{path: (bytes, when it was written)}"""
  paths = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
  return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(search.os, "fsync", lambda file: None)
    yield


@pytest.fixture(scope="module")
def texts():
  return planted(3000, 600, (12, 22))


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
  """The decision about all texts as one part."""
  pool = Search(tmp_path_factory.mktemp("whole"), (1,))
  return pool, run(pool, [texts])


def test_planted_pairs_are_found_and_nothing_else_is_removed(texts, whole):
  pool, removals = whole
  true = all_pairs(texts)
  assert len(true) >= 590
  (path,) = pathlib.Path(pool.directory).glob("generation-1-*/edges-*.npy")
  edges = np.load(path)
  found = {tuple(sorted(pair)) for pair in zip(edges["later"].tolist(), edges["earlier"].tolist(), strict=True)}
  assert found <= true and len(found) >= 0.98 * len(true)
  removed = {x.row for x in removals}
  for x in removals:
    a, b = texts[x.row].split(), texts[x.kept_row].split()
    assert x.similarity == pytest.approx(2 * lcs(a, b) / (len(a) + len(b)), abs=1e-12) and x.similarity >= 0.7
    assert x.kept_row not in removed and x.kept_id < x.id
  assert set(range(len(texts))) - removed == survivors({i: ident(text) for i, text in enumerate(texts)}, found)


@pytest.mark.parametrize("hosts, parts, slices", [(1, 1, 1), (3, 5, 3), (2, 16, 1)])
def test_order_parts_slices_and_hosts_change_nothing(texts, whole, tmp_path, monkeypatch, hosts, parts, slices):
  monkeypatch.setattr(duplicates, "_SLICE", -(-len(texts) // slices))
  monkeypatch.setattr(minhash, "TEXTS", 100 * hosts)
  if parts > 1:  # and pieces of pairs
    monkeypatch.setattr(duplicates, "_PAIRS", 300)
    monkeypatch.setattr(duplicates, "_COMPARISONS", 97)
    monkeypatch.setattr(rouge, "WORDS", 1500)
  shuffled = random.Random(parts).sample(texts, len(texts))
  cuts = [0, *sorted(random.Random(parts).sample(range(len(texts)), parts - 1)), len(texts)]
  mine = [shuffled[a:b] for a, b in itertools.pairwise(cuts)]
  pool = Search(tmp_path, (1,) * parts)
  assert facts(run(pool, mine, hosts, order=-1)) == facts(whole[1])
  assert duplicates.pair_units(pool)[-2:] == [(31, slices - 1, slices), (32, 0, 1)]


def test_short_texts_are_found_by_what_they_share(tmp_path, monkeypatch):
  """Of up to ten words, with one or two edited: signatures alone find too few of them."""
  texts = planted(3000, 800, (3, 10))
  true, ids = all_pairs(texts), [ident(text) for text in texts]
  assert len(true) > 600

  def found(name, parts=1, hosts=1):
    pool = Search(tmp_path / name, (1,) * parts)
    removals = run(pool, [texts[part::parts] for part in range(parts)], hosts, order=-1)
    assert min(x.similarity for x in removals) >= 0.7
    return pool, removals

  pool, removals = found("whole")
  (path,) = pool.directory.glob("generation-1-*/edges-*.npy")
  edges = set(zip(*(np.sort([np.load(path)[side] for side in ("later", "earlier")], axis=0).tolist()), strict=True))
  assert edges <= true and len(edges) > 0.99 * len(true)
  assert {x.row for x in removals} == set(range(len(texts))) - survivors(dict(enumerate(ids)), edges)
  monkeypatch.setattr(duplicates, "_SLICE", 10_000)
  pool, others = found("divided", parts=4, hosts=3)
  assert facts(others) == facts(removals) and duplicates.pair_units(pool)[-1][1] > 3
  monkeypatch.setattr(minhash, "SHORT", 2)
  assert len(found("signatures alone")[1]) < 0.9 * len(removals)


def test_one_call_gives_the_same(texts, whole, tmp_path):
  ids = [ident(text) for text in texts]
  keep, removals = near_duplicates(texts, ids)
  assert removals == whole[1]
  assert np.flatnonzero(~keep).tolist() == [x.row for x in removals]
  some = texts[:200]
  assert near_duplicates(some, ids[:200], directory=tmp_path)[1] == near_duplicates(some, ids[:200])[1]
  assert near_duplicates([], [])[1] == []


def test_another_seed_finds_them_too(texts, whole, tmp_path):
  other = run(Search(tmp_path, (1,), seed=2**40 + 5), [texts])
  assert len(set(facts(other)) ^ set(facts(whole[1]))) < 0.04 * len(other)
  assert not np.array_equal(*(minhash.permutations(seed)[0] for seed in (0, 2**40 + 5)))


def test_protected_texts_come_first_and_stay(texts):
  ids = [ident(text) for text in texts]
  true = all_pairs(texts)
  protected = np.random.default_rng(0).random(len(texts)) < 0.5
  keep, removals = near_duplicates(texts, ids, protected)
  assert keep[protected].all()
  both = {pair for pair in true if protected[list(pair)].all()}
  assert len(both) > 100
  for x in removals:
    assert keep[x.kept_row] and ids[x.row] == x.id and ids[x.kept_row] == x.kept_id
    assert (not protected[x.kept_row], x.kept_id) < (not protected[x.row], x.id)
  # Beside a protected text none of its near-duplicates stays, whatever the ids.
  beside = [i if protected[j] else j for i, j in true if protected[i] != protected[j]]
  assert len(beside) > 200 and np.mean(keep[beside]) < 0.03


def chain():
  """{name: text} of a, b and c of which b is like both others, which are not alike."""
  base, last, first = ([f"{name}{i}" for i in range(n)] for name, n in (("w", 40), ("b", 8), ("c", 8)))
  found = {"a": base, "b": base[:32] + last, "c": first + base[8:32] + last}
  return {name: " ".join(text) for name, text in found.items()}


@pytest.mark.parametrize("order, kept", [("abc", "ac"), ("acb", "ac"), ("bac", "b"), ("cba", "ac"), ("cab", "ac")])
def test_chains_remove_nobody_without_a_kept_partner(order, kept):
  text = chain()
  similar = rouge_l([text["a"], text["b"], text["a"]], [text["b"], text["c"], text["c"]])
  assert similar.tolist() == [0.8, 0.8, 0.6]
  ids = [f"{order.index(name):016x}" for name in text]
  keep, removals = near_duplicates(list(text.values()), ids)
  assert "".join(name for name, stays in zip(text, keep, strict=True) if stays) == kept
  assert all(keep[x.kept_row] for x in removals)


def test_long_chains_and_dense_groups_end_as_a_plain_loop_says(tmp_path):
  draw = random.Random(3)
  texts = [" ".join(f"w{draw.randrange(30)}" for _ in range(14))]
  for _ in range(400):  # each a neighbour of one before it
    texts.append(edited(draw.choice(texts[-20:]), 1, draw))
  parts = [list(dict.fromkeys(texts))]
  pool = Search(tmp_path, (1,))
  removed = {x.row for x in run(pool, parts)}
  (path,) = tmp_path.glob("generation-1-*/edges-*.npy")
  edges = set(zip(*(np.load(path)[name].tolist() for name in ("later", "earlier")), strict=True))
  assert len(edges) > 1000
  ranks = {i: ident(text) for i, text in enumerate(parts[0])}
  assert set(ranks) - removed == survivors(ranks, edges)
  similar = dict(
    zip(
      ((x, y) for x, y in edges),
      rouge_l(*([parts[0][i] for i in side] for side in zip(*edges, strict=True))),
      strict=True,
    )
  )
  for x in run(pool, parts):
    kept = [(-similar[e], ranks[e[1]]) for e in edges if e[0] == x.row and e[1] not in removed]
    assert (-x.similarity, x.kept_id) == min(kept)
  # Here buckets have more texts than are compared, and still their order does not matter.
  pairs = [np.load(path) for path in tmp_path.glob("generation-1-*/pairs-[012]*.npy")]
  assert max(np.unique(column >> minhash.ROW_BITS, return_counts=True)[1].max() for column in pairs) == 8
  shuffled = draw.sample(parts[0], len(parts[0]))
  again = run(Search(tmp_path / "again", (1, 1)), [shuffled[:100], shuffled[100:]])
  assert facts(again) == facts(run(pool, parts))


def test_a_killed_run_goes_on_to_the_same_bytes(texts, tmp_path, monkeypatch):
  some = [texts[:100], texts[100:200], texts[-150:]]
  pool = Search(tmp_path / "whole", (0, 1, 1))
  run(pool, some)
  expected = {path: content for path, (content, _) in files(pool.directory).items()}
  save, saved = search.save, []

  def killed(path, array):
    saved.append(path)
    if len(saved) == stop:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.with_name(f".{path.name}.tmp").write_bytes(b"half")
      raise KeyboardInterrupt
    save(path, array)

  monkeypatch.setattr(duplicates, "save", killed)
  for stop in [*range(1, 14, 2), 30, *range(len(expected) - 4, len(expected) + 1)]:
    pool = Search(tmp_path / f"killed at {stop}", (0, 1, 1))
    saved.clear()
    with pytest.raises(KeyboardInterrupt):
      run(pool, some)
    before = files(pool.directory)
    saved.extend([None] * stop)
    run(pool, some, hosts=2)
    after = files(pool.directory)
    assert {path: content for path, (content, _) in after.items()} == expected
    again = {path for path, written in before.items() if after.get(path) != written and not path.endswith(".tmp")}
    # Of a part that was not finished, the columns are written anew, with the same bytes.
    assert all("/bands" not in path and path.startswith("signed") for path in again)


def test_a_later_generation_leaves_the_earlier_ones_as_they_are(texts, tmp_path):
  shuffled = random.Random(0).sample(texts, len(texts))
  first, second = shuffled[:1500], shuffled[1500:]
  pool = Search(tmp_path, (1, 1))
  before = run(pool, [first[:700], first[700:]])
  assert len(before) > 100
  written = files(tmp_path)
  grown = Search(tmp_path, (1, 1, 2))
  after = run(grown, [first[:700], first[700:], second])
  assert all(files(tmp_path)[path] == this for path, this in written.items())
  assert [x for part in (0, 1) for x in duplicates.decisions(grown, part)[1]] == before
  for path in tmp_path.glob("generation-2-*/pairs-*.npy"):  # what is decided is not looked at again
    assert (np.load(path) >> minhash.ROW_BITS >= len(first)).all()
  gone = {x.id for x in before}
  stay = set(map(ident, texts)) - gone - {x.id for x in after}
  assert all(x.kept_id in stay and (x.kept_part < 2 or x.kept_id < x.id) for x in after)
  by_first = {x.id for x in after if x.kept_part < 2}
  # The same as with the survivors as protected texts, but for what a seat in a bucket decides.
  survivors_of_first = [text for text in first if ident(text) not in gone]
  other = run(Search(tmp_path / "other", (0, 1)), [survivors_of_first, second])
  assert {x.id for x in other} == {x.id for x in after} and by_first == {x.id for x in other if x.kept_part == 0}
  assert len(by_first) > 100


def test_a_removed_text_of_an_earlier_generation_removes_nobody(tmp_path):
  text = chain()
  first = sorted([text["a"], text["b"]], key=ident)
  before = run(Search(tmp_path, (1,)), [first])
  assert [(x.row, x.kept_row) for x in before] == [(1, 0)]
  other = text["c"] if first[1] == text["b"] else " ".join([*text["a"].split()[8:], *(f"d{i}" for i in range(8))])
  assert rouge_l([other] * 2, first).tolist() == [0.6, 0.8]
  assert run(Search(tmp_path, (1, 2)), [first, [other]]) == []


def test_a_template_that_all_share_costs_no_square(tmp_path):
  template = "please write a short and friendly letter to my neighbour about the topic of"
  draw = random.Random(0)
  parts = [[f"{template} x{i} y{draw.randrange(50)}" for i in range(4000)]]
  pool = Search(tmp_path, (1,))
  removals = run(pool, parts)
  pairs = sum(len(np.load(path)) for path in tmp_path.glob("generation-1-*/pairs-*.npy"))
  assert 4000 < pairs <= minhash.BANDS * duplicates.COMPARED * 4000
  assert len(removals) == 3999 and {x.kept_id for x in removals} == {min(map(ident, parts[0]))}
  assert min(x.similarity for x in removals) >= 0.7


def test_texts_of_no_or_few_words(tmp_path):
  texts = ["", "hello", "hallo", "!", "hello there", "hello there you", "there", "a b"]
  _, removals = near_duplicates(texts, [f"{i:016x}" for i in range(len(texts))])
  assert [(x.row, x.kept_row, x.similarity) for x in removals] == [(5, 4, 0.8)]


def test_the_threshold_is_reached_exactly():
  base = [f"w{i}" for i in range(30)]
  other = " ".join(base[:21] + [f"x{i}" for i in range(9)])
  texts, ids = [" ".join(base), other], ["0" * 16, "1" * 16]
  assert rouge_l(texts[:1], texts[1:]).tolist() == [0.7]
  assert near_duplicates(texts, ids)[0].tolist() == [True, False]
  assert near_duplicates(texts, ids, threshold=0.7001)[0].all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from("abcde"), max_size=9)] * 2), max_size=8), st.integers(1, 30))
def test_rouge_l_is_that_of_the_dynamic_program(pairs, at_once):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rouge, "WORDS", at_once)
    found = rouge_l([" ".join(a) for a, _ in pairs], [" ".join(b) for _, b in pairs])
  assert found == pytest.approx([2 * lcs(a, b) / max(len(a) + len(b), 1) for a, b in pairs], abs=1e-12)


def test_rouge_l_of_more_words_than_there_are_short_code_points():
  a = " ".join(f"w{i}" for i in range(70_000))
  assert rouge_l([a, a], [a, a.replace("w60000 ", "")]).tolist() == [1.0, 2 * 69_999 / 139_999]


def test_signatures_estimate_the_jaccard_similarity_of_bigrams():
  draw = random.Random(0)
  left = [" ".join(f"w{draw.randrange(5000)}" for _ in range(draw.randint(8, 24))) for _ in range(2000)]
  right = [edited(text, draw.randint(0, 4), draw) for text in left]

  def bigrams(text):
    return set(itertools.pairwise(text.split()))

  sides = [(bigrams(a), bigrams(b)) for a, b in zip(left, right, strict=True)]
  true = np.array([len(a & b) / len(a | b) for a, b in sides])
  for seed in (0, 1):
    a, b = (minhash.signatures(*words.hashes(side), seed) for side in (left, right))
    error = (a == b).mean(axis=0) - true
    theory = np.sqrt((true * (1 - true)).mean() / minhash.PERMUTATIONS)
    assert 0.9 < np.sqrt((error**2).mean()) / theory < 1.1 and abs(error.mean()) < 0.1 * theory
    together = (minhash.band_keys(a) == minhash.band_keys(b)).mean()
    assert together == pytest.approx((true**4).mean(), rel=0.05)


def test_what_cannot_be_right_is_named(tmp_path):
  with pytest.raises(ValueError, match="threshold=0"):
    Search(tmp_path, (0, 1), threshold=0)
  with pytest.raises(ValueError, match="protected"):
    Search(tmp_path, (0, 0))
  with pytest.raises(ValueError, match="same id"):
    near_duplicates(["a b", "a c"], ["0" * 16] * 2)
  pool = Search(tmp_path, (1, 1))
  with pytest.raises(ValueError, match="'xyz'"):
    duplicates.sign(pool, 0, ["xyz"], ["a b"])
  with pytest.raises(ValueError, match="2 ids for 1 texts"):
    duplicates.sign(pool, 0, ["0" * 16, "1" * 16], ["a b"])
  duplicates.sign(pool, 0, ["0" * 16], ["a b"])
  with pytest.raises(ValueError, match="other texts"):
    duplicates.sign(pool, 0, ["1" * 16], ["a c"])
  with pytest.raises(ValueError, match="part 1 is not signed"):
    duplicates.pair_units(pool)
  duplicates.sign(pool, 1, ["1" * 16], ["a b c"])
  with pytest.raises(ValueError, match="part 0 is not decided"):
    run(Search(tmp_path / "empty", (1, 2)), [[], []])
