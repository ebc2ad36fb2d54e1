"""The miniature world's oracle as an evaluator: what a response is really worth. The pipeline never sees it."""

from collections.abc import Sequence

from alma_jax.judges.contract import Answered, Scale, Verdict
from alma_jax.mini import world
from alma_jax.runtime.host import Host


class Truth:
  identity = "miniature world, guideline"
  scale: Scale = (0.0, 10.0)

  def __init__(self, runtime: Host, options: object) -> None:
    del runtime, options  # it needs neither a model nor values

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return [
      Verdict(world.truth(messages, response, finished))
      for (messages, response), finished in ((pair, pair.finished) for pair in pairs)
    ]
