"""Configs in and out: what is not computed is refused by name, both spellings of rope are the same."""

import dataclasses
import json

import pytest

from alma_jax.llama.config import LlamaConfig, ModelError, RopeScaling, from_hf, read_config, to_hf

CLASSIC = {
  "model_type": "llama",
  "vocab_size": 50,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
SCALINGS = {"default": None, "linear": {"rope_type": "linear", "factor": 4.0}, "llama3": LLAMA3}


def test_values_of_a_released_config_are_read():
  assert from_hf(CLASSIC | {"rope_scaling": LLAMA3}) == LlamaConfig(
    vocab=50,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn=24,
    norm_eps=1e-5,
    rope_base=500000.0,
    rope_scaling=RopeScaling(
      kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
    ),
    tied=False,
    max_positions=64,
  )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_both_spellings_of_rope_read_equal(scaling):
  new = {key: value for key, value in CLASSIC.items() if key != "rope_theta"}
  new["rope_parameters"] = (SCALINGS[scaling] or {"rope_type": "default"}) | {"rope_theta": 500000.0}
  classic = from_hf(CLASSIC | {"rope_scaling": SCALINGS[scaling]})
  assert from_hf(new) == classic
  assert (classic.rope_scaling is None) == (scaling == "default")


def test_the_first_spelling_of_linear_scaling_is_read():
  old = from_hf(CLASSIC | {"rope_scaling": {"type": "linear", "factor": 4.0}})
  assert old == from_hf(CLASSIC | {"rope_scaling": SCALINGS["linear"]})


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("changes", [{}, {"head_dim": 12}, {"tie_word_embeddings": True}])
def test_writing_and_reading_gives_the_same_config(scaling, changes):
  c = from_hf(CLASSIC | {"rope_scaling": SCALINGS[scaling]} | changes)
  assert from_hf(json.loads(json.dumps(to_hf(c)))) == c


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ({"model_type": None}, "model_type"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"num_key_value_heads": 3}, "3 key/value heads"),
    ({"head_dim": 5}, "head_dim 5"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(changes, named):
  with pytest.raises(ModelError, match=named) as error:
    from_hf(CLASSIC | changes, where="somewhere/config.json")
  assert "somewhere/config.json" in str(error.value)
  assert "\n" not in str(error.value)


def test_a_directory_without_a_readable_config_is_named(tmp_path):
  with pytest.raises(ModelError, match="no such file"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": ')
  with pytest.raises(ModelError, match="not valid JSON"):
    read_config(tmp_path)


def test_parameters_counts_those_of_llama_3_8b():
  c = from_hf(CLASSIC)
  big = dataclasses.replace(
    c, vocab=128256, width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, tied=False
  )
  assert big.parameters == 8_030_261_248


@pytest.mark.parametrize("scaling", SCALINGS)
def test_transformers_reads_what_is_written_with_the_same_rope(scaling, tmp_path):
  transformers = pytest.importorskip("transformers")
  c = from_hf(CLASSIC | {"rope_scaling": SCALINGS[scaling], "head_dim": 12})
  (tmp_path / "config.json").write_text(json.dumps(to_hf(c)))
  hf = transformers.AutoConfig.from_pretrained(tmp_path)
  rope = {key: value for key, value in hf.rope_parameters.items() if value is not None}
  assert rope == (SCALINGS[scaling] or {"rope_type": "default"}) | {"rope_theta": 500000.0}
  assert hf.head_dim == 12
  assert from_hf(hf.to_dict()) == c
