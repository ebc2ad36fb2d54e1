"""Near-duplicates beside datasketch: speed, recall and growth on one core; every finding is checked in the same run.

  python -m benchmarks.dedup [--rows=200000] [--oracle=10000] [--most=800000] [--repeats=3]

The prompts are synthetic, of 10 to 24 words and 110 characters on average. Of every 10,000 prompts, 1,000 are another
spelling of a different one, and 2,000 are a different one with one or two words edited. The script pins itself to one
core and counts process time:

  signatures + index   both read normalised texts and make 128 MinHash values of word bigrams and an index of 32 bands
                       of 4. datasketch: MinHash.generator, its fastest scheme, with the C function crc32 for a hash
                       (its own, sha1, is slower), and MinHashLSH.insertion_session without a search for equal keys,
                       once; its queries for pairs are not counted. alma_jax: steps 1 and 2 of `corpus.duplicates`,
                       with the files they write and the pairs they find, best of --repeats.
  recall               the share of similar pairs of which one text was removed. Similar pairs are found by comparing
                       each of the first --oracle texts with each: a ROUGE-L F1 of at least 0.7
  growth               all four steps on pools up to --most, in parts of 50,000, and the peak memory of a unit beyond
                       the texts (Python's and NumPy's, not pages of mapped files)

It takes two to four minutes. It ends with an AssertionError where a spelling is not recognised, the recall is under
0.98, or a text was removed without a kept one before it that is as similar as stated (calculated again from the words
of both).
"""

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import os
import random
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import datasketch  # pyright: ignore[reportMissingImports]: a peer, installed by the extra [bench] alone
import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

from alma_jax.corpus import duplicates, minhash
from alma_jax.corpus.normalise import normalised

Part = tuple[list[str], list[str]]  # ids and texts
T = TypeVar("T")
BLOCK = 10_000  # prompts whose duplicates are among themselves
PART = 50_000
THRESHOLD, RECALL, SPEED = 0.7, 0.98, 5.0


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast and how complete is the search for near-duplicates?")
  for name, value in dict(rows=200_000, oracle=10_000, most=800_000, repeats=3).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  for line in lines(**vars(flags)):
    print(line, flush=True)


def lines(rows: int, oracle: int, most: int, repeats: int) -> Iterator[str]:
  """Yields each line of the report as soon as it is known."""
  written, spellings = prompts(rows)
  seconds, texts = timed(lambda: different(written))
  assert len(written) - len(texts) == spellings, f"{len(written) - len(texts)} of {spellings} spellings were recognised"
  yield f"{len(written):,} prompts, {spellings:,} of them spellings, all recognised; {per(seconds, written)} per prompt"

  peer = [timed(step)[0] for step in datasketch_steps(texts)]
  parts, runs = in_parts(texts), []
  for _ in range(repeats):
    with tempfile.TemporaryDirectory() as directory:
      runs.append({step: sum(times) for step, times in steps(directory, parts, lambda f: timed(f)[0]).items()})
      removals = removals_of(directory, parts)
  best = min(runs, key=lambda run: run["sign"] + run["pairs"])
  yield f"\n{'':12} {'signatures':>12} {'index':>12} {'together':>12} {'alma_jax':>9} {'target':>7}"
  for name, (one, two) in {"datasketch": peer, "alma_jax": (best["sign"], best["pairs"])}.items():
    ratio = f"{sum(peer) / (best['sign'] + best['pairs']):8.1f}x {SPEED:6.1f}x" if name == "datasketch" else ""
    yield f"{name:12} {per(one, texts):>12} {per(two, texts):>12} {per(one + two, texts):>12} {ratio}"

  check(texts, removals)
  found, pairs = recall(texts[:oracle], {row for row, _, _ in removals})
  yield f"\n{len(removals):,} removed; each has a kept text before it with a ROUGE-L of {THRESHOLD} or more"
  yield f"recall {found:.4f} of {pairs:,} pairs among {len(texts[:oracle]):,} texts; target {RECALL}"
  assert found >= RECALL, f"the recall is {found:.4f}, under {RECALL}"

  yield f"\n{'texts':>9} {'step 1':>10} {'step 2':>10} {'step 3':>10} {'step 4':>10} {'together':>10} {'memory':>9}"
  for size in (most // 16, most // 4, most):
    yield growth(size)
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "rapidfuzz", "datasketch"))
  yield f"process time per text, one core; {versions}"


def prompts(n: int, seed: int = 0) -> tuple[list[str], int]:
  """n prompts, and how many of them are another spelling of one before them."""
  draw, words = random.Random(seed), vocabulary()
  weights = np.cumsum(1 / np.arange(10, len(words) + 10)).tolist()
  found, spellings = [], 0
  for start in range(0, n, BLOCK):
    size = min(BLOCK, n - start)
    spelled, near = size // 10, size // 5
    block = []
    for _ in range(size - spelled - near):
      block.append(draw.choices(words, cum_weights=weights, k=draw.randint(10, 24)))
    originals = draw.sample(block, near)
    block = [" ".join(text) for text in block + [edited(text, words, draw) for text in originals]]
    known = set[str]()  # short texts can be equal by chance: a spelling is drawn for one of them only
    block = [text for text in block if not (text in known or known.add(text))]
    block += [respelled(text, draw) for text in draw.sample(block, spelled)]
    spellings += spelled
    draw.shuffle(block)
    found += block
  return found, spellings


@functools.cache
def vocabulary() -> list[str]:
  """20,000 different words of two or three syllables."""
  draw = random.Random(1)
  syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
  words = dict.fromkeys("".join(draw.choices(syllables, k=draw.randint(2, 3))) for _ in range(60_000))
  return list(words)[:20_000]


def edited(text: Sequence[str], words: Sequence[str], draw: random.Random) -> list[str]:
  """The words of the text with one or two of them changed, left out or put in."""
  text = list(text)
  for _ in range(draw.randint(1, 2)):
    place, new = draw.randrange(len(text)), draw.choice(words)
    out, put = draw.choice([(1, [new]), (0, [new]), (1, [])])
    text[place : place + out] = put
  return text


def respelled(text: str, draw: random.Random) -> str:
  return draw.choice([text.capitalize(), f"{text}.", text.replace(" ", "  ", 1), f"“{text}?”", f"{text.upper()}!"])


def different(written: Sequence[str]) -> list[str]:
  """The normalised texts, each once."""
  return list(dict.fromkeys(map(normalised, written)))


def in_parts(texts: list[str]) -> list[Part]:
  parts = [texts[at : at + PART] for at in range(0, len(texts), PART)]
  return [([hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in part], part) for part in parts]


def datasketch_steps(texts: Sequence[str]) -> tuple[Callable[[], None], Callable[[], None]]:
  """Two functions to call one after the other: signatures and index."""
  hashes, index = [], datasketch.MinHashLSH(num_perm=minhash.PERMUTATIONS, params=(minhash.BANDS, 4))

  def signatures() -> None:
    shingles = ([f"{a} {b}".encode() for a, b in itertools.pairwise(text)] for text in map(str.split, texts))
    hashes.extend(datasketch.MinHash.generator(shingles, num_perm=minhash.PERMUTATIONS, hashfunc=zlib.crc32))

  def insertions() -> None:
    with index.insertion_session() as session:
      for row, minhash in enumerate(hashes):
        session.insert(row, minhash, check_duplication=False)

  return signatures, insertions


def search_of(directory: str, parts: Sequence[Part]) -> duplicates.Search:
  return duplicates.Search(directory, (1,) * len(parts), THRESHOLD)


def steps(
  directory: str, parts: Sequence[Part], measure: Callable[[Callable[[], None]], float]
) -> dict[str, list[float]]:
  """Runs every unit of all steps; for each step what `measure` returned for its units."""
  search = search_of(directory, parts)
  return {
    "sign": [measure(lambda: duplicates.sign(search, part, *content)) for part, content in enumerate(parts)],
    "pairs": [measure(lambda: duplicates.find_pairs(search, unit)) for unit in duplicates.pair_units(search)],
    "verify": [measure(lambda: duplicates.verify(search, part)) for part in duplicates.newest(search)],
    "decide": [measure(lambda: duplicates.decide(search))],
  }


def removals_of(directory: str, parts: Sequence[Part]) -> list[tuple[int, int, float]]:
  """The row of each removed text, the row of the kept one, both in the whole pool, and their similarity."""
  search = search_of(directory, parts)
  found = [(part, x) for part in range(len(parts)) for x in duplicates.decisions(search, part)[1]]
  return [(part * PART + x.row, x.kept_part * PART + x.kept_row, x.similarity) for part, x in found]


def check(texts: list[str], removals: list[tuple[int, int, float]]) -> None:
  """Checks every removal by the texts themselves, word by word."""
  removed = {row for row, _, _ in removals}
  ids = [id for ids, _ in in_parts(texts) for id in ids]
  for row, kept, similarity in removals:
    true = Indel.normalized_similarity(texts[row].split(), texts[kept].split())
    right = kept not in removed and ids[kept] < ids[row] and abs(true - similarity) < 1e-12 and similarity >= THRESHOLD
    assert right, f"wrongly removed, ROUGE-L {true:.3f}: {texts[row]!r} beside {texts[kept]!r}"


def recall(texts: list[str], removed: set[int]) -> tuple[float, int]:
  """The share of similar pairs of which one text was removed, and the number of such pairs, from all pairs."""
  codes: dict[str, int] = {}
  coded = ["".join(chr(0x10000 + codes.setdefault(word, len(codes))) for word in text.split()) for text in texts]
  pairs, left = 0, 0
  for at in range(0, len(coded), 1000):
    similar = process.cdist(coded[at : at + 1000], coded, scorer=Indel.normalized_similarity, score_cutoff=THRESHOLD)
    for a, b in zip(*(side.tolist() for side in np.nonzero(similar)), strict=True):
      if at + a < b:
        pairs += 1
        left += at + a not in removed and b not in removed
  return 1 - left / max(pairs, 1), pairs


def growth(rows: int) -> str:
  """A line about a pool of this size: all steps are run for the time, and again for the memory."""
  texts = different(prompts(rows, seed=rows)[0])
  parts = in_parts(texts)
  with tempfile.TemporaryDirectory() as directory:
    times = {step: sum(times) for step, times in steps(directory, parts, lambda f: timed(f)[0]).items()}
  with tempfile.TemporaryDirectory() as directory:
    memory = max(max(bytes) for bytes in steps(directory, parts, extra_memory).values())
  columns = " ".join(f"{per(seconds, texts):>10}" for seconds in [*times.values(), sum(times.values())])
  return f"{len(texts):9,} {columns} {memory / 2**20:6.0f} MB"


def extra_memory(step: Callable[[], None]) -> float:
  """The peak memory of a step in bytes, beyond what was held before."""
  tracemalloc.start()
  step()
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return most


def timed(step: Callable[[], T]) -> tuple[float, T]:
  """The seconds of process time that `step` took, and what it returns."""
  start = time.process_time()
  found = step()
  return time.process_time() - start, found


def per(seconds: float, texts: Sequence[str]) -> str:
  return f"{1e6 * seconds / len(texts):.2f} us"


if __name__ == "__main__":
  main()
