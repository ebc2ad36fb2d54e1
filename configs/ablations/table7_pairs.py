"""DPO's pairs, ALMA (arXiv 2412.04305, 5.3) on the miniature world: which two responses are compared.

  python launch/sweep.py --config=configs/ablations/table7_pairs.py --workdir=runs/table7_pairs

The best response against a random one, which the paper found best and uses, against the worst one, and two random
responses in the judge's order; 3 seeds, five rounds of feedback each.
"""

from collections.abc import Callable

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.mini()
  c.feedback_rounds = 5
  c.trainset.method = "dpo"
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for pairs in ("best_random", "best_worst", "ordered_random"):
      add(seed=seed, trainset=dict(pairs=pairs))
