"""Heads that turn a Llama's hidden states into rewards, as published reward models have them.

  head = read("models/Skywork-Reward-Llama-3.1-8B")      # a Scalar or an Armo; a ModelError says what is wrong
  model = trunk(directory, head, mesh, DECODE, dtype)    # the Llama below it, without an output head
  values = head.values(hidden)                           # of engine.score.last_states

The head's numbers are computed on the host, in fp32 whatever dtype the trunk has: a head is less than a thousandth of
its model.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import Mesh

from alma_jax.llama import weights
from alma_jax.llama.config import Directory, ModelError, read_hf
from alma_jax.llama.model import Llama
from alma_jax.llama.weights import SCORE

ATTRIBUTES = (  # what ArmoRM's nineteen rewards are about, in its order
  "helpsteer-helpfulness",
  "helpsteer-correctness",
  "helpsteer-coherence",
  "helpsteer-complexity",
  "helpsteer-verbosity",
  "ultrafeedback-overall_score",
  "ultrafeedback-instruction_following",
  "ultrafeedback-truthfulness",
  "ultrafeedback-honesty",
  "ultrafeedback-helpfulness",
  "beavertails-is_safe",
  "prometheus-score",
  "argilla-overall_quality",
  "argilla-judge_lm",
  "code-complexity",
  "code-style",
  "code-explanation",
  "code-instruction-following",
  "code-readability",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
  """LlamaForSequenceClassification: a linear map to one value, or to one for each label."""

  weight: np.ndarray  # fp32 [labels, D]
  labels: tuple[str, ...]
  tensors: tuple[str, ...] = (SCORE,)  # the head's own, in the files

  def values(self, hidden: np.ndarray) -> np.ndarray:
    """fp32 [n, labels] of the hidden states [n, D] at the last token of each conversation."""
    return hidden @ self.weight.T


@dataclasses.dataclass(frozen=True, eq=False)
class Armo:
  """ArmoRM (LlamaForRewardModelWithGating): rewards for several objectives, weighted by a gate that reads the prompt.

  score = sum of gate * (rewards @ transform). The transform takes the verbosity reward out of the other rewards.
  """

  regression: np.ndarray  # fp32 [objectives, D]
  transform: np.ndarray  # fp32 [objectives, objectives]
  layers: tuple[tuple[np.ndarray, np.ndarray], ...]  # of the gate: (weight [out, in], bias [out]), ReLU between them
  temperature: float
  scale: float
  labels: tuple[str, ...]
  tensors: tuple[str, ...]

  def values(self, hidden: np.ndarray) -> np.ndarray:
    """fp32 [n, objectives]: the rewards, of the hidden states [n, D] at the last token of each conversation."""
    return hidden @ self.regression.T

  def gates(self, hidden: np.ndarray) -> np.ndarray:
    """fp32 [n, objectives], of the hidden states at the token that ends the user's last turn; a row sums to `scale`."""
    x = hidden
    for i, (weight, bias) in enumerate(self.layers):
      x = (x if i == 0 else np.maximum(x, 0)) @ weight.T + bias
    x = np.exp((x - x.max(axis=-1, keepdims=True)) / self.temperature)
    return self.scale * x / x.sum(axis=-1, keepdims=True)

  def scores(self, values: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """fp32 [n]"""
    return (gates * (values @ self.transform)).sum(axis=-1)


Head: TypeAlias = Scalar | Armo


def read(directory: Directory, check: weights.Check | None = None) -> Head:
  """The head of a reward model. All files' headers are checked: missing and unknown tensors are a ModelError.

  `check` as in weights.load.
  """
  hf = read_hf(directory)
  where = f"{pathlib.Path(directory) / 'config.json'}"
  kinds = hf.get("architectures") or []
  if kinds == ["LlamaForSequenceClassification"]:
    labels = _labels(hf, where)
    found = _tensors(directory, {SCORE: (len(labels), hf["hidden_size"])}, check)
    return Scalar(found[SCORE], labels)
  if kinds == ["LlamaForRewardModelWithGating"]:
    return _armo(directory, hf, where, check)
  raise ModelError(
    f"{where}: architectures is {kinds}, which is no reward model that this code computes:"
    " LlamaForSequenceClassification (one value or several), LlamaForRewardModelWithGating (ArmoRM)"
  )


def trunk(
  directory: Directory,
  head: Head,
  mesh: Mesh | None,
  rules: Mapping[str, str],
  dtype: str,
  check: weights.Check | None = None,
) -> Llama:
  """The Llama below the head, whose hidden states the head reads; `check` as in weights.load."""
  return weights.load(directory, mesh, rules, dtype, head.tensors, check)


def _labels(hf: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """The names of the head's values, in their order."""
  names = hf.get("id2label")
  if names is None:
    return tuple(f"LABEL_{i}" for i in range(hf.get("num_labels", 2)))  # transformers' default
  try:
    by_number = {int(i): str(name) for i, name in names.items()}
    return tuple(by_number[i] for i in range(len(by_number)))
  except (AttributeError, KeyError, ValueError):
    raise ModelError(f"{where}: id2label must name the labels 0, 1, ...; found {str(names)[:80]}") from None


def _armo(directory: Directory, hf: Mapping[str, Any], where: str, check: weights.Check | None) -> Armo:
  keys = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
  missing = [key for key in keys if not isinstance(hf.get(key), int | float)]
  if missing:
    raise ModelError(f"{where}: a LlamaForRewardModelWithGating needs {', '.join(missing)}")
  n, temperature, hidden, depth = (hf[key] for key in keys)
  sizes = [hf["hidden_size"], *[hidden] * depth, n]
  gate = {f"gating.layers.{i}.weight": (sizes[i + 1], sizes[i]) for i in range(depth + 1)}
  biases = {f"gating.layers.{i}.bias": (sizes[i + 1],) for i in range(depth + 1)}
  others = {
    "regression_layer.weight": (n, hf["hidden_size"]),
    "reward_transform_matrix": (n, n),
    "gating.logit_scale": (1,),
  }
  shapes = others | gate | biases
  found = _tensors(directory, shapes, check)
  return Armo(
    regression=found["regression_layer.weight"],
    transform=found["reward_transform_matrix"],
    layers=tuple((found[w], found[b]) for w, b in zip(gate, biases, strict=True)),
    temperature=float(temperature),
    scale=float(found["gating.logit_scale"][0]),
    labels=ATTRIBUTES if n == len(ATTRIBUTES) else tuple(f"objective_{i}" for i in range(n)),
    tensors=tuple(shapes),
  )


def _tensors(
  directory: Directory, shapes: Mapping[str, tuple[int, ...]], check: weights.Check | None
) -> dict[str, np.ndarray]:
  """The head's tensors as fp32."""
  found = weights.files(directory, shapes, check).tensors
  for name, shape in shapes.items():
    if found[name].x.shape != shape:
      raise ModelError(f"{directory}: {name} has shape {found[name].x.shape}, config.json asks for {shape}")
  return {name: np.array(found[name].read(), np.float32) for name in shapes}
