"""Table 6 of SPA (arXiv 2406.04412) on the miniature world: what each part of the method adds.

  python launch/sweep.py --config=configs/ablations/spa_table6.py --workdir=runs/spa_table6

DPO on people's pairs alone; then two iterations with plain DPO (data expansion), with self-refinement, and with
de-coupled noise detection too; 3 seeds. The paper (AlpacaEval 2, length-controlled): 9.03, 14.41, 14.70, 15.39.

Last measured by `python -m benchmarks.papers run --paper=spa`, ten seeds, ground truth of sampled answers: DPO alone
6.62, then against it -0.65 +- 0.51, against the row before +0.03 +- 0.07 and -0.01 +- 0.02 (docs/spa.md says why).
"""

from collections.abc import Callable

from configs import spa
from configs.common import Config


def get_config() -> Config:
  return spa.mini()


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    add(seed=seed, policy=dict(smoothing=0.0, mix=0.0), feedback_rounds=0)
    add(seed=seed, policy=dict(smoothing=0.0, mix=0.0), feedback_rounds=2)
    add(seed=seed, policy=dict(smoothing=0.1, mix=0.0), feedback_rounds=2)
    add(seed=seed, policy=dict(smoothing=0.1, mix=0.5), feedback_rounds=2)
