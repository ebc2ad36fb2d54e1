"""How each benchmark has its answers decoded, by category where it says so.

  PRESETS["mt_bench"].of("math").temperature   # 0.0

The numbers are those of the benchmarks' own code: FastChat for MT-Bench, arena-hard-auto, the LIMA paper, and
lm-evaluation-harness for IFEval. AlpacaEval leaves decoding to each model; 0.7 and 2,048 tokens are what most of its
configs of chat models set.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Preset:
  """The first four fields are those of the options of sampling."""

  max_new_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  temperatures: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of categories with one of their own
  turns: int = 1  # how many of the user's turns are asked

  def of(self, category: str | None, required: float | None = None) -> "Preset":
    """The preset of one prompt; `required` is a temperature that its row asks for (`required_temperature`)."""
    temperature = self.temperatures.get(category or "", self.temperature) if required is None else required
    return dataclasses.replace(self, temperature=temperature)


PRESETS: dict[str, Preset] = {
  "mt_bench": Preset(
    1024,
    temperature=0.7,  # of a category that is not listed
    temperatures={
      "writing": 0.7,
      "roleplay": 0.7,
      "extraction": 0.0,
      "math": 0.0,
      "coding": 0.0,
      "reasoning": 0.0,
      "stem": 0.1,
      "humanities": 0.1,
    },
    turns=2,
  ),
  "alpaca_eval": Preset(2048, temperature=0.7),
  "arena_hard_2024": Preset(4096),
  "arena_hard_2025": Preset(4096),
  "lima": Preset(2048, temperature=0.7, top_p=0.9, repetition_penalty=1.2),
  "ifeval": Preset(1280),
  "plain": Preset(2048),
}
