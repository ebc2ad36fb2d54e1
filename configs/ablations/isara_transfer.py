"""ISARA (arXiv 2401.06785) on the miniature world: human pairs of one category, all categories evaluated.

  python launch/sweep.py --config=configs/ablations/isara_transfer.py --workdir=runs/isara_transfer

8 human pairs of one category each, or of any, x 3 seeds, two iterations each. Every run's report has the seen and the
unseen categories round by round, with SFT on the human pairs alone as round 1; the sweep's table has the mean of all.

Last measured by `python -m benchmarks.papers run --paper=isara`, ten seeds, from round 1 to round 3: unseen categories
6.56 to 6.68 with pairs of the common kind, 7.33 to 7.81 with pairs of the second one.
"""

from collections.abc import Callable

from configs import isara
from configs.common import Config


def get_config() -> Config:
  c = isara.mini()
  c.feedback_rounds = 2
  c.data.pairs = 8  # the rare kinds have few demonstrations, and the rarest one has fewer
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for chosen in ((), ("country",), ("food",)):
      add(seed=seed, categories=dict(seeds=chosen))
