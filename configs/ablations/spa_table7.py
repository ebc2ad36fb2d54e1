"""Table 7 of SPA (arXiv 2406.04412) on the miniature world: what the policy's log-probs are compared with.

  python launch/sweep.py --config=configs/ablations/spa_table7.py --workdir=runs/spa_table7

The reference of the judgement: the SFT model, the policy before, none; 3 seeds, two iterations each. The paper
(AlpacaEval 2, length-controlled, iteration 2): 15.08, 13.73, 12.83. Each run's report shows the agreement with the gold
judge by iteration.

Last measured by `python -m benchmarks.papers run --paper=spa`, ten seeds, ground truth of sampled answers: SFT model
minus the policy before +0.06 +- 0.09, minus none -0.76 +- 0.49: reversed, and docs/spa.md says why.
"""

from collections.abc import Callable

from configs import spa
from configs.common import Config


def get_config() -> Config:
  return spa.mini()


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for reference in ("sft", "previous", "none"):
      add(seed=seed, judge=dict(reference=reference))
