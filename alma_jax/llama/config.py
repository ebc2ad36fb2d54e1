"""The shape of a Llama, read from and written to a Hugging Face `config.json`.

  c = read_config("Llama-3.1-8B")      # a ModelError names the file, what is wrong, and how to mend it
  json.dumps(to_hf(c))

Every value that changes the numbers (norm epsilon, rope base and scaling, tied embeddings) comes from the file and has
no default here: a constant that is silently wrong costs a week, a missing one costs a clear error.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from alma_jax.errors import UserError

Directory = str | os.PathLike[str]


class ModelError(UserError):
  """An unusable model directory; the message says what is wrong, where, and how to mend it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Scaling of the rotary frequencies; `model.rope_frequencies` holds the formulas."""

  kind: (
    str  # "llama3" (Llama-3.1 and later) or "linear" (position interpolation); only llama3 has the last three fields
  )
  factor: float  # the divisor of the scaled frequencies
  low_freq_factor: float | None = None  # original_positions / this: from this wavelength on, scaled in full
  high_freq_factor: float | None = None  # original_positions / this: up to this wavelength, kept
  original_positions: int | None = None  # the context length before the scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  vocab: int  # rows of the embedding table; may exceed the tokenizer's size
  width: int  # numbers in a hidden state
  depth: int  # layers
  heads: int  # query heads
  kv_heads: int  # key/value heads; heads / kv_heads query heads share one
  head_dim: int  # numbers in a query, key or value of one head; even
  ffn: int  # width of the feed-forward part
  norm_eps: float  # added to the mean square in RMS norms
  rope_base: float  # longest rotary wavelength is nearly 2 pi times this
  rope_scaling: RopeScaling | None  # None: plain rotary frequencies
  tied: bool  # the embedding table is the output head as well
  max_positions: int  # the context length that the model was made for
  outputs: int | None = None  # values of a head that scores texts; None: the head has one for each token

  @property
  def parameters(self) -> int:
    """The number of weights."""
    attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
    layer = attention + 3 * self.width * self.ffn + 2 * self.width
    return self.depth * layer + self.width + self.vocab * self.width * (1 if self.tied else 2)


# The only values of these keys that this code computes; they are also the defaults.
_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False)

# Our field -> the key of a Hugging Face config, in the order of the files.
_KEYS = dict(
  vocab="vocab_size",
  width="hidden_size",
  ffn="intermediate_size",
  depth="num_hidden_layers",
  heads="num_attention_heads",
  kv_heads="num_key_value_heads",
  head_dim="head_dim",
  norm_eps="rms_norm_eps",
  rope_base="rope_theta",
  rope_scaling="rope_scaling",
  tied="tie_word_embeddings",
  max_positions="max_position_embeddings",
)
_SCALINGS = {
  "linear": dict(factor="factor"),
  "llama3": dict(
    factor="factor",
    low_freq_factor="low_freq_factor",
    high_freq_factor="high_freq_factor",
    original_positions="original_max_position_embeddings",
  ),
}


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
  """The LlamaConfig of a Hugging Face dictionary, in old (`rope_theta`) or new (`rope_parameters`) spelling.

  `where` is the file's name in error messages.
  """
  kind = hf.get("model_type")
  if kind != "llama":
    raise ModelError(
      f"{where}: model_type is {kind!r} (architectures {hf.get('architectures')}); only 'llama' models are supported"
    )
  if hf.get("quantization_config"):
    raise ModelError(f"{where}: the checkpoint is quantised; give the bf16 or fp32 weights instead")
  for key, value in _FIXED.items():
    if hf.get(key, value) != value:
      raise ModelError(f"{where}: {key} is {hf[key]!r}; this model code computes {key}={value!r} only")

  rope = hf.get("rope_parameters") or {}
  base = rope.get("rope_theta", hf.get("rope_theta"))
  if base is None:
    raise ModelError(
      f"{where}: rope_theta is missing; add the value of the released model (Llama-2: 10000.0, Llama-3: 500000.0)"
    )
  for ours, key in _KEYS.items():  # the others may be missing
    if ours not in ("kv_heads", "head_dim", "rope_base", "rope_scaling") and hf.get(key) is None:
      raise ModelError(f"{where}: the key {key!r} is missing")
  found: dict[str, Any] = {ours: hf.get(key) for ours, key in _KEYS.items()}
  heads = found["heads"]
  head_dim, kv_heads = found["head_dim"] or found["width"] // heads, found["kv_heads"] or heads
  if head_dim % 2:
    raise ModelError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
  if heads % kv_heads:
    raise ModelError(f"{where}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
  found |= dict(head_dim=head_dim, kv_heads=kv_heads, rope_base=float(base), tied=bool(found["tied"]))
  found["rope_scaling"] = _rope_scaling(hf.get("rope_scaling") or rope, where)
  return LlamaConfig(**found)


def _rope_scaling(d: Mapping[str, Any], where: str) -> RopeScaling | None:
  kind = d.get("rope_type") or d.get("type") or "default"
  if kind == "default":
    return None
  keys = _SCALINGS.get(kind)
  if keys is None:
    raise ModelError(f"{where}: rope scaling {kind!r} is not supported (supported: default, linear, llama3)")
  missing = [key for key in keys.values() if d.get(key) is None]
  if missing:
    raise ModelError(f"{where}: rope scaling {kind!r} lacks {', '.join(missing)}")
  return RopeScaling(kind=kind, **{ours: d[theirs] for ours, theirs in keys.items()})


def to_hf(c: LlamaConfig) -> dict[str, Any]:
  """The Hugging Face config dictionary of `c` (classic spelling, read by every release of transformers and by vLLM)."""
  s, scaling = c.rope_scaling, None
  if s is not None:
    scaling = {"rope_type": s.kind} | {theirs: getattr(s, ours) for ours, theirs in _SCALINGS[s.kind].items()}
  fields = {theirs: getattr(c, ours) for ours, theirs in _KEYS.items()}
  kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
  if c.outputs:
    labels = {str(i): f"score_{i}" for i in range(c.outputs)}
    kind |= {"architectures": ["LlamaForSequenceClassification"], "id2label": labels, "problem_type": "regression"}
  return kind | fields | {"rope_scaling": scaling} | _FIXED


def read_config(directory: Directory) -> LlamaConfig:
  """The LlamaConfig of a Hugging Face model directory."""
  return from_hf(read_hf(directory), str(pathlib.Path(directory) / "config.json"))


def read_hf(directory: Directory) -> dict[str, Any]:
  """All that a Hugging Face model directory's config.json says."""
  path = pathlib.Path(directory) / "config.json"
  if not path.is_file():
    raise ModelError(f"{path}: no such file; a model directory holds config.json, *.safetensors and a tokenizer")
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ModelError(f"{path}: not valid JSON ({error})") from None
