"""ISARA (arXiv 2401.06785) on the miniature world: three iterations, or one of the same size altogether.

  python launch/sweep.py --config=configs/ablations/isara_oneshot.py --workdir=runs/isara_oneshot

3 x 512 generated questions against 1 x 1,536, 3 seeds. The one large iteration is the paper's control: the same number
of samples by the first model alone.

Last measured by `python -m benchmarks.papers run --paper=isara`, ten seeds: three iterations minus one of the same size
-0.06 +- 0.19 of ten points, with 16.4 and 16.1 generated pairs for each human one.
"""

from collections.abc import Callable

from configs import isara
from configs.common import Config


def get_config() -> Config:
  return isara.mini()


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for rounds in (3, 1):
      add(seed=seed, feedback_rounds=rounds, prompts=dict(draws=1536 // rounds))
