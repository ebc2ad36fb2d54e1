"""ISARA (arXiv 2401.06785) on the miniature world: answers after the nearest pairs, or after random ones.

  python launch/sweep.py --config=configs/ablations/isara_retrieval.py --workdir=runs/isara_retrieval

2 kinds of shots x 3 seeds, two iterations each. Questions are the same in the first iteration of both.
On seed 0 the nearest pairs are ahead by 0.01 +- 0.13 of ten points after the first iteration and by -0.17 +- 0.17 after
the second (paired over the 576 evaluation prompts): no difference that could be seen.
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
