"""How fast the files of finished stages are verified, and what that means for large models.

  python -m benchmarks.digests --megabytes=1024

Writes a file, hashes it on one core, verifies it as its readers do, and once more, which hashes nothing. The file lies
in the page cache: a disk that is slower than the hash sets the pace.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from alma_jax.store import digests, verify

SIZES = {"8B in bf16": 16e9, "70B in bf16": 140e9}


def main(arguments: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--megabytes", type=int, default=1024, help="the size of the file (1024)")
  for line in measured(parser.parse_args(arguments).megabytes * 2**20):
    print(line)


def measured(size: int) -> Iterator[str]:
  """Lines with rates and projections."""
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "file"
    block = os.urandom(min(size, 2**24))
    with open(path, "wb") as file:
      for begin in range(0, size, len(block)):
        file.write(block[: size - begin])
    found = digests.of_file(path)
    # CPU seconds of this thread, which other work on the machine does not change
    one = _seconds(time.thread_time, lambda: [digests.of_block(path, i) for i in range(len(found.blocks))])
    voucher = verify.Voucher(path, found, path.parent)
    voucher.check()
    again = _seconds(time.perf_counter, voucher.check)
  yield f"{size / 1e6:,.0f} MB in {len(found.blocks)} blocks"
  yield f"one core   {size / one / 1e6:,.0f} MB/s of CPU time"
  yield f"once more  {again * 1e3:.2f} ms"
  for name, large in SIZES.items():
    yield f"{large / 1e9:,.0f} GB ({name}): {large * one / size:,.0f} s on one core"


def _seconds(clock: Callable[[], float], work: Callable[[], object]) -> float:
  begin = clock()
  work()
  return clock() - begin


if __name__ == "__main__":
  import sys

  main(sys.argv[1:])
