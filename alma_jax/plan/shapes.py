"""The shapes of released models by name, so that a plan needs no directory."""

import dataclasses
import pathlib

from alma_jax import names
from alma_jax.llama.config import LlamaConfig, ModelError, RopeScaling, read_config
from alma_jax.runtime.host import model_directory

_LLAMA_3 = LlamaConfig(
  vocab=128_256,
  width=4096,
  depth=32,
  heads=32,
  kv_heads=8,
  head_dim=128,
  ffn=14_336,
  norm_eps=1e-5,
  rope_base=500_000.0,
  rope_scaling=None,
  tied=False,
  max_positions=8192,
)
_SCALED = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)


_LLAMA_2 = dataclasses.replace(_LLAMA_3, vocab=32_000, kv_heads=32, ffn=11_008, rope_base=10_000.0, max_positions=4096)

SHAPES = {
  "llama3_8b": _LLAMA_3,
  "llama3_70b": dataclasses.replace(_LLAMA_3, width=8192, depth=80, heads=64, ffn=28_672),
  "llama32_1b": dataclasses.replace(
    _LLAMA_3, width=2048, depth=16, head_dim=64, ffn=8192, rope_scaling=_SCALED, tied=True, max_positions=131_072
  ),
  "llama2_7b": _LLAMA_2,
  "llama_7b": dataclasses.replace(_LLAMA_2, norm_eps=1e-6, max_positions=2048),
  "llama_65b": dataclasses.replace(
    _LLAMA_2, width=8192, depth=80, heads=64, kv_heads=64, ffn=22_016, max_positions=2048
  ),
  "mistral_7b": dataclasses.replace(_LLAMA_2, kv_heads=8, ffn=14_336, max_positions=32_768),
}


def shape(name: str) -> LlamaConfig:
  """The shape of this name, of a word of names.MODELS, or in a directory's config.json; no weights are read."""
  if name in SHAPES:
    return SHAPES[name]
  known = f"{', '.join(SHAPES)}, or a directory with config.json"
  if not name:
    raise ModelError(f"config.model.path is empty: give --model, which may be {known}")
  directory = model_directory(name)
  if name not in names.MODELS.words and not pathlib.Path(directory).is_dir():
    raise ModelError(f"--model={name}: no shape has this name and no directory is there; it may be {known}")
  return read_config(directory)
