"""LIMA's ablation of quality and quantity (arXiv 2305.11206, section 5) on the miniature world.

  python launch/sweep.py --config=configs/ablations/lima_quality.py --workdir=runs/lima_quality

The best 48 of the annotated answers as demonstrations, 48 answers of any quality, and 192 of any quality; 15 epochs for
all, 3 seeds. On data of your own: `alma curate` with its rules and without them makes the two sets, and
--config.data.sft names them.

Last measured by `python -m benchmarks.papers run --paper=lima`, ten seeds, ground truth of the chosen epochs on 2,208
other prompts: the best 48 6.53 +- 0.29, 48 of any quality 5.82 +- 0.25, 192 of any quality 5.43 +- 0.26; paired, the
best 48 lead the 192 by 1.10 +- 0.28 and the other 48 by 0.72 +- 0.25.
"""

from collections.abc import Callable

from configs import lima
from configs.common import Config


def get_config() -> Config:
  c = lima.mini()
  c.data.validation_held_out = 0
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    add(seed=seed, data=dict(sft="mini_filtered"))
    add(seed=seed, data=dict(sft="mini_unfiltered"))
    add(seed=seed, data=dict(sft="mini_quantity"))
