"""ISARA (arXiv 2401.06785) on the miniature world: answers after the nearest pairs, or after random ones.

  python launch/sweep.py --config=configs/ablations/isara_retrieval.py --workdir=runs/isara_retrieval

2 kinds of shots x 3 seeds, two iterations each. Questions are the same in the first iteration of both.
Last measured, on an earlier base model:
nearest minus random, paired over the seeds: +0.01 +- 0.49 of ten points after the first iteration, -0.02
+- 0.39 after the second.
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
