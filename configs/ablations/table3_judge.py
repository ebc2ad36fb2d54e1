"""Table 3 of ALMA (arXiv 2412.04305) on the miniature world: what makes a judge worth training on.

  python launch/sweep.py --config=configs/ablations/table3_judge.py --workdir=runs/table3

The paper compares judges by how often they agree with people; here each judge trains a policy and the ground truth
scores the policy. 4 judges x 3 seeds, two rounds of feedback each. The fine-tuned judges' accuracy on the held-out
annotations is in the manifest of each run's `judge` and `judge_distilled`.

Last measured by `python -m benchmarks.effects run --parts=judges`, ten seeds on each of two base models, size
mini_paper, pairs in the right order: base 3-shot .917, fine-tuned .944, with integer scores .904, self-distilled .941.
"""

from collections.abc import Callable

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.mini()
  c.feedback_rounds = 2
  return c


def sweep(add: Callable[..., None]) -> None:
  undistilled = dict(prompts=0)
  for seed in range(3):
    add(seed=seed, judge=dict(kind="few_shot", mode="expected"))
    add(seed=seed, judge=dict(kind="finetuned", mode="integer", distil=undistilled))
    add(seed=seed, judge=dict(kind="finetuned", mode="expected", distil=undistilled))
    add(seed=seed, judge=dict(kind="finetuned", mode="expected"))
