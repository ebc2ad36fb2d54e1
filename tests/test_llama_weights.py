"""Hugging Face directories in and out: bit-equal both ways, sharded as asked, broken directories named."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fixtures.make_llama_fixtures import KINDS, hf_logits, hf_model, tokens_for
from jax.sharding import PartitionSpec as P

from alma_jax.llama import model as llama
from alma_jax.llama.config import ModelError
from alma_jax.llama.sharding import DECODE, make_mesh
from alma_jax.llama.weights import TextSide, load, reinit_untrained, resize, save

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "llama"


def tensors(directory):
  """All tensors of a directory, read by the safetensors library."""
  return {name: x for path in directory.glob("*.safetensors") for name, x in safetensors.numpy.load_file(path).items()}


def assert_same_tensors(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_models(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.fixture
def copy(tmp_path):
  """A copy of the llama3 fixture, and a function that rewrites its tensors."""
  directory = tmp_path / "model"
  shutil.copytree(FIXTURES / "llama3", directory)

  def rewrite(change):
    changed = tensors(directory)
    change(changed)
    safetensors.numpy.save_file(changed, directory / "model.safetensors")

  return directory, rewrite


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_writing_gives_the_same_bits(kind, tmp_path):
  model = load(FIXTURES / kind)
  original = tensors(FIXTURES / kind)
  save(tmp_path / "fp32", model)
  assert_same_tensors(tensors(tmp_path / "fp32"), original)
  save(tmp_path / "bf16", model, dtype=jnp.bfloat16)
  rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in original.items()}
  assert_same_tensors(tensors(tmp_path / "bf16"), rounded)
  assert load(tmp_path / "bf16").blocks.q[...].dtype == jnp.bfloat16
  save(tmp_path / "again", load(tmp_path / "bf16"))
  assert_same_tensors(tensors(tmp_path / "again"), rounded)


def test_weights_are_cast_while_reading_and_mixed_files_take_the_widest_type(copy):
  directory, rewrite = copy
  fp32 = load(directory)
  assert load(directory, dtype=jnp.bfloat16).embed[...].dtype == jnp.bfloat16
  assert_same_models(load(directory, dtype=jnp.bfloat16), llama.cast(fp32, jnp.bfloat16))
  rewrite(lambda t: t.update({name: x.astype(np.float16) for name, x in t.items()}))
  assert_same_models(load(directory), llama.cast(fp32, jnp.float16))
  rewrite(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float32)}))
  assert_same_models(load(directory), llama.cast(llama.cast(fp32, jnp.float16), jnp.float32))


def test_every_device_gets_its_own_slice_and_the_export_does_not_depend_on_the_mesh(tmp_path):
  alone = load(FIXTURES / "llama3")
  save(tmp_path / "alone", alone)
  for mesh, rules in ((make_mesh(2, 2, 2), None), (make_mesh(1, 8, 1), None), (make_mesh(4, 1, 2), DECODE)):
    model = load(FIXTURES / "llama3", mesh, **({"rules": rules} if rules else {}))
    assert_same_models(model, alone)
    save(tmp_path / "sharded", model)
    sharded = (tmp_path / "sharded" / "model.safetensors").read_bytes()
    assert sharded == (tmp_path / "alone" / "model.safetensors").read_bytes()
  model = load(FIXTURES / "llama3", make_mesh(2, 2, 2))
  assert model.blocks.o[...].sharding.spec == P(None, "tensor", None, "fsdp")
  assert {s.data.shape for s in model.blocks.o[...].addressable_shards} == {(2, 2, 4, 8)}
  assert {s.data.shape for s in model.head[...].addressable_shards} == {(8, 25)}


def test_a_large_export_is_split_with_an_index_and_replaces_the_old_one_whole(tmp_path):
  model, limit = load(FIXTURES / "llama3"), 6000
  save(tmp_path / "out", model, max_shard_bytes=limit)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
  assert files == sorted(set(index["weight_map"].values()))
  assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  for file in files:
    held = safetensors.numpy.load_file(tmp_path / "out" / file)
    assert sum(x.nbytes for x in held.values()) <= limit
    assert all(index["weight_map"][name] == file for name in held)
  original = tensors(FIXTURES / "llama3")
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())
  assert_same_tensors(tensors(tmp_path / "out"), original)
  assert_same_models(load(tmp_path / "out", make_mesh(1, 8, 1)), model)
  (tmp_path / "out" / files[1]).unlink()
  with pytest.raises(ModelError, match=files[1]):
    load(tmp_path / "out")
  save(tmp_path / "out", model)
  assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_the_old_one_untouched(tmp_path):
  class Broken:
    def save(self, directory, eos_token=None):
      raise OSError("disk full")

  model = load(FIXTURES / "llama2")
  save(tmp_path / "out", model, TextSide(stop_ids=[7]))
  before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  with pytest.raises(OSError, match="disk full"):
    save(tmp_path / "out", llama.cast(model, jnp.bfloat16), TextSide(tokenizer=Broken()))
  assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_directory_of_other_things_is_never_replaced(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ModelError, match="holds no model"):
    save(tmp_path, load(FIXTURES / "llama2"))
  assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stop_ids_and_other_ids_are_written_where_each_reader_looks(tmp_path):
  save(tmp_path / "out", load(FIXTURES / "llama2"), TextSide(stop_ids=[2, 9], bos_id=1), dtype=jnp.bfloat16)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 9], None)
  assert config["torch_dtype"] == "bfloat16"
  generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert generation == {"bos_token_id": 1, "eos_token_id": [2, 9]}


BROKEN = {
  "missing": (
    lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)],
    "2 of 21 .*layers.0.mlp",
  ),
  "spare": (
    lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}),
    "q_proj.bias",
  ),
  "misshapen": (
    lambda t: t.update({"lm_head.weight": np.zeros((51, 16), np.float32)}),
    r"\(51, 16\).*\(50, 16\)",
  ),
  "integers": (
    lambda t: t.update({"lm_head.weight": np.zeros((50, 16), np.int8)}),
    "lm_head.weight has type I8",
  ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_wrong_tensors_are_named(copy, kind):
  directory, rewrite = copy
  change, message = BROKEN[kind]
  rewrite(change)
  with pytest.raises(ModelError, match=message) as error:
    load(directory)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 300, 20000])
def test_a_file_cut_short_is_named(copy, keep):
  directory, _ = copy
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ModelError, match=rf"model.safetensors: cut short .*\({keep} bytes\)"):
    load(directory)


@pytest.mark.parametrize(
  ("left", "message"),
  [
    (["pytorch_model.bin"], "pytorch_model.bin; .*save_pretrained"),
    (["consolidated.00.pth"], "consolidated.00.pth; .*convert_llama_weights_to_hf"),
    (["model-00001-of-00002.safetensors"], "index of several, only model-00001"),
    ([], "no model.safetensors"),
  ],
)
def test_a_directory_without_safetensors_says_what_to_do(copy, left, message):
  directory, _ = copy
  (directory / "model.safetensors").unlink()
  for name in left:
    (directory / name).write_bytes(b"")
  with pytest.raises(ModelError, match=message):
    load(directory)


def test_known_harmless_tensors_are_passed_over(tmp_path):
  shutil.copytree(FIXTURES / "llama32", tmp_path / "model")
  held = tensors(tmp_path / "model")
  held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file(held, tmp_path / "model" / "model.safetensors")
  assert_same_models(load(tmp_path / "model"), load(FIXTURES / "llama32"))
  held["lm_head.weight"][0, 0] += 1
  safetensors.numpy.save_file(held, tmp_path / "model" / "model.safetensors")
  with pytest.raises(ModelError, match="tie_word_embeddings"):
    load(tmp_path / "model")


def test_a_tied_model_may_store_its_embedding_as_the_head_alone(tmp_path):
  """As safetensors' `save_model` does, which keeps one name of a shared tensor."""
  shutil.copytree(FIXTURES / "llama32", tmp_path / "model")
  held = tensors(tmp_path / "model")
  held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
  safetensors.numpy.save_file(held, tmp_path / "model" / "model.safetensors")
  assert_same_models(load(tmp_path / "model"), load(FIXTURES / "llama32"))


@pytest.mark.parametrize("mesh", [None, (1, 8, 1)])
def test_every_byte_is_checked_before_it_is_read(mesh, copy):
  directory, _ = copy
  path, checked = directory / "model.safetensors", []
  load(directory, mesh and make_mesh(*mesh), check=lambda file, begin, end: checked.append((file, begin, end)))
  assert {file for file, _, _ in checked} == {path}
  covered = np.zeros(path.stat().st_size, bool)
  for _, begin, end in checked:
    assert 0 <= begin < end <= len(covered)
    covered[begin:end] = True
  assert covered.all()

  def refuse(file, begin, end):
    if begin <= len(covered) - 1 < end:
      raise ModelError("damaged at its end")

  with pytest.raises(ModelError, match="damaged at its end"):
    load(directory, mesh and make_mesh(*mesh), check=refuse)


def test_an_unrolled_model_is_read_layer_by_layer_to_the_same_weights_and_places():
  mesh, directory, asked = make_mesh(tensor=2), FIXTURES / "llama3", []
  stacked = load(directory, mesh, DECODE, jnp.bfloat16)
  straight = load(directory, mesh, DECODE, jnp.bfloat16, unrolled=True)
  assert_same_models(straight, llama.unrolled(stacked))
  for name in ("q", "o", "down"):
    whole, layer = (getattr(block, name)[...].sharding.spec for block in (stacked.blocks, straight.blocks[1]))
    assert tuple(layer) == tuple(whole)[1:]
  assert_same_models(resize(straight, 56, mesh, DECODE), llama.unrolled(resize(stacked, 56, mesh, DECODE)))
  load(directory, unrolled=True, check=lambda path, begin, end: asked.append(end - begin))
  assert sum(asked) >= sum(x.nbytes for x in tensors(directory).values())  # every byte is checked


@pytest.mark.parametrize("kind", ["llama3", "llama32"])
def test_resize_adds_mean_rows_and_keeps_the_others(kind, tmp_path):
  model, original = load(FIXTURES / kind), tensors(FIXTURES / kind)
  save(tmp_path / "out", resize(model, 53))
  grown = tensors(tmp_path / "out")
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    if name in original:
      mean = original[name].mean(0, dtype=np.float64)
      np.testing.assert_array_equal(grown[name][:50], original[name])
      np.testing.assert_allclose(grown[name][50:], np.tile(mean, (3, 1)), atol=1e-6)
  assert grown.keys() == original.keys()
  assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 53
  mesh = make_mesh(2, 2, 2)
  sharded = resize(load(FIXTURES / kind, mesh), 56, mesh)
  assert sharded.embed[...].sharding.spec == P("tensor", "fsdp")
  np.testing.assert_array_equal(np.asarray(sharded.embed[...])[:50], original["model.embed_tokens.weight"])
  with pytest.raises(ModelError, match="cannot shrink"):
    resize(model, 49)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_reinit_untrained_resets_empty_and_repeated_rows_only(copy, mesh):
  directory, rewrite = copy

  def untrain(t):
    t["model.embed_tokens.weight"][[40, 41]] = 1e-9
    t["model.embed_tokens.weight"][42] = t["model.embed_tokens.weight"][49]
    t["lm_head.weight"][[41, 43]] = 0

  rewrite(untrain)
  held = tensors(directory)
  mesh = mesh and make_mesh(*mesh)
  model, reset = reinit_untrained(load(directory, mesh), [44, 43, 42, 41, 3])
  assert reset == [41, 42, 43]
  embed, head = np.asarray(model.embed[...]), np.asarray(model.head[...]).T
  others = [i for i in range(50) if i not in (40, 41, 42)]
  mean = held["model.embed_tokens.weight"][others].mean(0)
  np.testing.assert_allclose(embed[[41, 42]], np.stack([mean, mean]), atol=1e-6)
  np.testing.assert_array_equal(embed[[*others, 40]], held["model.embed_tokens.weight"][[*others, 40]])
  others = [i for i in range(50) if i not in (41, 43)]
  np.testing.assert_allclose(head[43], held["lm_head.weight"][others].mean(0), atol=1e-6)
  np.testing.assert_array_equal(head[others], held["lm_head.weight"][others])
  if mesh:
    assert model.embed[...].sharding.spec == P("tensor", "fsdp")


@pytest.mark.parametrize("kind", KINDS)
def test_live_transformers_loads_the_export_with_equal_logits(kind, tmp_path):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  save(tmp_path / "out", load(FIXTURES / kind), TextSide(stop_ids=[7, 9]), max_shard_bytes=12000)
  hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert hf.dtype == torch.float32
  assert hf.generation_config.eos_token_id == [7, 9]
  tokens = tokens_for(kind)
  np.testing.assert_allclose(hf_logits(hf, tokens), hf_logits(hf_model(kind), tokens), atol=1e-6)


def test_live_transformers_reads_type_tokenizer_and_chat_template_of_the_export(tmp_path):
  pytest.importorskip("transformers")
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

  class Words:
    def save(self, directory, eos_token=None):
      words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
      words.pre_tokenizer = pre_tokenizers.Whitespace()
      PreTrainedTokenizerFast(tokenizer_object=words, chat_template="old").save_pretrained(directory)

  template = "{% for m in messages %}a {{ m['content'] }}{% endfor %}"
  model = load(FIXTURES / "llama2")
  save(tmp_path / "out", model, TextSide(tokenizer=Words(), chat_template=template), dtype=jnp.bfloat16)
  assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith("bfloat16")
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
  assert tokenizer.chat_template == template
  ids = tokenizer.apply_chat_template([{"role": "user", "content": "b"}], return_dict=False)
  assert ids == [0, 1]
  # Releases before the .jinja file read it here.
  assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == template
