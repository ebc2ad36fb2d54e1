"""Evaluators: what a response is really worth, as far as somebody other than our own judge can say.

An evaluator is a function (messages, response text, finished) -> score 0..10. `none` leaves the judge's score as the
only one; `mini` is the ground truth of the miniature world.
"""

from alma_jax.options import ConfigError


def evaluator_by_name(name):
  """The function, or None for "none"."""
  if name == "none":
    return None
  if name == "mini":
    from alma_jax.mini import world

    return lambda messages, text, finished: float(world.score(messages[-1]["content"], text, finished))
  raise ConfigError(f"eval.evaluator is {name!r}; there are 'mini' and 'none'")
