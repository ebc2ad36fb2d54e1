"""AdamW with a clipped gradient and a schedule: what may be set, the rate of a step, the update.

o = Optimizer(learning_rate=2e-5, final_learning_rate=2e-6, warmup=0.1)
learning_rate(o, step=0, steps=100)      # 2e-6: the first of ten steps of warm-up
transformation(o)                        # optax's Adam and decay; `engine.train` clips and applies the rate
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax

from alma_jax.options import Checked, ConfigError, option, refuse

Tree = TypeVar("Tree")

# schedule -> the share of the way from the peak to the final rate after a share `done` of the steps
SCHEDULES: dict[str, Callable[[float], float]] = {
  "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
  "linear": lambda done: done,
  "constant": lambda done: 0.0,
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
  learning_rate: float = option(above=0)  # the peak
  final_learning_rate: float = option(least=0)  # the schedule ends here
  warmup: float = option(0.0, least=0, most=1)  # fraction of all steps
  beta1: float = option(0.9, least=0, below=1)
  beta2: float = option(0.95, least=0, below=1)
  eps: float = option(1e-8, least=0)
  weight_decay: float = option(0.1, least=0)  # of everything but norms
  clip: float = option(1.0, infinite=True)  # of the global gradient norm; float("inf"): no clipping
  schedule: Literal["cosine", "linear", "constant"] = "cosine"  # from the peak down to the final rate
  moments: Literal["float32", "bfloat16"] = "float32"  # bfloat16: 4 bytes less for each weight

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.final_learning_rate > self.learning_rate:
      allowed = f"must lie between 0 and learning_rate, {self.learning_rate}"
      refuse("final_learning_rate", self.final_learning_rate, allowed)
    if not self.clip > 0:
      refuse("clip", self.clip, "must be above 0 (float('inf'): no clipping)")
    if self.moments == "bfloat16" and self.beta2 > 0.99:
      raise ConfigError(
        f"moments is 'bfloat16' with beta2={self.beta2}: bfloat16 has 8 bits, in which a change of"
        f" {1 - self.beta2:.2g} of a moment is lost, so that it would never fall; set beta2 to at most 0.99 or moments"
        " to 'float32'"
      )


def learning_rate(o: Optimizer, step: int, steps: int) -> float:
  """Linear warm-up, then the schedule from the peak to the final rate; `step` counts from 0."""
  warm = round(o.warmup * steps)
  if step < warm:
    return o.learning_rate * (step + 1) / warm
  done = (step - warm) / max(1, steps - warm)
  return o.learning_rate + (o.final_learning_rate - o.learning_rate) * SCHEDULES[o.schedule](done)


def transformation(o: Optimizer) -> optax.GradientTransformation:
  """AdamW without clipping and learning rate; norms are not decayed."""

  def decayed(tree: Any) -> Any:
    def one(variable: Any) -> bool:
      return variable.get_metadata()["axes"] != ("norm",)

    return jax.tree.map(one, tree, is_leaf=lambda v: hasattr(v, "get_metadata"))

  return optax.chain(
    _kept_in(o.moments, optax.scale_by_adam(o.beta1, o.beta2, o.eps)),
    optax.add_decayed_weights(o.weight_decay, mask=decayed),
  )


def _kept_in(dtype: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with its state in another dtype between updates, which are fp32."""
  if dtype == "float32":
    return tx

  def cast(tree: Tree, to: Any) -> Tree:
    return jax.tree.map(lambda x: x.astype(to) if x.dtype != jnp.int32 else x, tree)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = tx.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)
