"""ISARA (arXiv 2401.06785) on the miniature world: answers after the nearest pairs, or after random ones.

  python launch/sweep.py --config=configs/ablations/isara_retrieval.py --workdir=runs/isara_retrieval

2 kinds of shots x 3 seeds, two iterations each. Questions are the same in the first iteration of both.

Last measured by `python -m benchmarks.papers run --paper=isara`, ten seeds: nearest minus random -0.03 +- 0.13 of ten
points after one iteration, -0.07 +- 0.05 after two.
"""

from collections.abc import Callable

from configs import isara
from configs.common import Config


def get_config() -> Config:
  c = isara.mini()
  c.feedback_rounds = 2
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for method in ("knn", "random"):
      add(seed=seed, neighbours=dict(method=method))
