"""Programs for accelerators on every kind of mesh, lowered on a CPU: the mesh alone says what they are for."""

import dataclasses
import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from alma_jax.engine import crossentropy, embed, sample, score, slots
from alma_jax.engine.choose import Decoding
from alma_jax.engine.losses import How, sft, totals
from alma_jax.llama import attention, attention_nvidia, decoder, reading, sharding
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig

CONFIG = LlamaConfig(
  vocab=256,
  width=128,
  depth=2,
  heads=16,
  kv_heads=8,
  head_dim=128,
  ffn=256,
  norm_eps=1e-5,
  rope_base=10000.0,
  rope_scaling=None,
  tied=False,
  max_positions=512,
)
ROWS, T = 8, 256
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 1, 1)]
KERNELS = {"tpu": r"splash_mha_\w+|attention_over_few", "cuda": r"custom_call @__cudnn\$\w+"}


def elsewhere(sizes, platform):
  """A mesh of devices that are not here."""
  device = AbstractDevice("elsewhere", None, platform)
  return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


@pytest.fixture(params=["tpu", "cuda"])
def platform(request):
  """In the words of `lowering_platforms`."""
  return request.param


@pytest.fixture(params=MESHES, ids=str)
def mesh(request, platform, monkeypatch):
  """A mesh in force."""
  if platform == "tpu":
    mesh = elsewhere(request.param, "tpu")
    with jax.sharding.use_abstract_mesh(mesh):
      yield mesh
    return
  # cuDNN's calls are lowered for a mesh with devices only: those of the CPU, as if they were H100s with cuDNN 9.10.
  for module in (attention, crossentropy, llama):
    monkeypatch.setattr(module, "platform", lambda *mesh: "gpu")
  monkeypatch.setattr(attention_nvidia.cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention_nvidia.cudnn, "check_compute_capability", lambda capability: True)
  mesh = sharding.make_mesh(*request.param, devices=jax.devices()[: math.prod(request.param)])
  with jax.set_mesh(mesh):
    yield mesh


def weights(mesh, rules, unrolled=False):
  """Shapes and shardings of a bf16 model."""
  tree = jax.eval_shape(lambda: llama.cast(llama.init(CONFIG, 0), jnp.bfloat16))
  tree = jax.eval_shape(llama.unrolled, tree) if unrolled else tree
  places = sharding.shardings(tree, mesh, rules)
  return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, places)


def array(mesh, *shape, dtype=jnp.int32, spec=sharding.REPLICA):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def lowered(program, platform, *args, **options):
  return program.trace(*args, **options).lower(lowering_platforms=(platform,)).as_text()


def kernels(program, platform, *args, **options):
  """The attention kernels in a jitted program, one for each place that calls them."""
  return len(re.findall(KERNELS[platform], lowered(program, platform, *args, **options)))


def test_training_meets_its_kernels_on_every_mesh(mesh, platform, monkeypatch):
  monkeypatch.setattr(crossentropy, "_tile", lambda model, targets: 64)  # as where logits are large

  @jax.jit
  def gradient(model, batch):
    return jax.grad(lambda model: sft(model, batch, How("full", few=True), totals(batch))[0])(model)

  batch = {name: array(mesh, ROWS, T) for name in ("tokens", "targets", "segments", "positions", "example")}
  batch["weights"] = array(mesh, ROWS, T, dtype=jnp.float32)
  # TPU: forward; forward, dq and dkv in the backward pass. cuDNN: forward; forward and backward.
  text = lowered(gradient, platform, weights(mesh, sharding.TRAIN), batch)
  assert len(re.findall(KERNELS[platform], text)) == {"tpu": 4, "cuda": 3}[platform]
  # The embedding and the head, or a tensor group's shares of them, are gathered in bf16 and their gradients reduce-
  # scattered, and no device asks the host.
  fsdp, share = mesh.shape["fsdp"] > 1, 256 // mesh.shape["tensor"]
  gathered = re.findall(r'"stablehlo.all_gather".* -> tensor<(\w+)>', text)
  assert set(gathered) == ({f"{share}x128xbf16", f"128x{share}xbf16"} if fsdp else set())
  steps = 2 if platform == "tpu" and mesh.shape["fsdp"] > 2 else 1
  assert text.count('"stablehlo.reduce_scatter"') == (2 * steps if fsdp else 0)
  assert "stablehlo.case" not in text and "stablehlo.if" not in text


def decoding(mesh, platform):
  """A sampler's state, and its decode segment lowered."""
  model, decoding = weights(mesh, sharding.DECODE, unrolled=True), Decoding(max_new_tokens=128, stop_ids=(2,))
  shapes, ways = slots.shapes_for(16, T, 8), sharding.replicas(mesh)
  state = jax.eval_shape(lambda model: sample._empty(model, shapes, decoding, mesh), model)
  places = sample._placed(state, CONFIG, mesh)
  state = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, places)
  tiles = decoder.Tiles(
    array(mesh, ways * shapes.rows, shapes.tile), array(mesh, ways * shapes.rows), array(mesh, ways * shapes.slots)
  )
  text = lowered(sample._segment, platform, model, state, tiles, decoding=decoding, steps=4, mesh=mesh)
  return state, text


def test_sampling_meets_its_kernels_on_every_mesh(mesh, platform):
  model, ways = weights(mesh, sharding.DECODE, unrolled=True), sharding.replicas(mesh)
  state, text = decoding(mesh, platform)
  rows = array(mesh, ways * 2)
  fill = functools.partial(kernels, sample._fill, platform, model, state, None, array(mesh, ways * 2, T), rows, rows)
  assert fill(mesh=mesh) == {"tpu": 1, "cuda": 2}[platform]  # equal layers are one function on TPUs
  # The prefixes and the cache of each layer, in kernels that read what is live; and one that chooses tokens.
  assert len(re.findall(KERNELS[platform], text)) == 4
  assert text.count('kernel_name = "choose_token"') == {"tpu": 1, "cuda": 0}[platform]


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 1, 1)])
def test_narrow_heads_lie_side_by_side_in_the_cache_of_a_tpu(sizes, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, head_dim=64))
  mesh = elsewhere(sizes, "tpu")
  with jax.sharding.use_abstract_mesh(mesh):
    state, decode = decoding(mesh, "tpu")
  assert state["cache"][0][0].shape[2:] == state["prefix"][1][1].shape[2:] == (4, 128)
  assert len(re.findall(KERNELS["tpu"], decode)) == 4


def test_judging_meets_its_kernels_on_every_mesh(mesh, platform):
  rows = ROWS * sharding.replicas(mesh)
  kv = array(mesh, 2, rows // 4, 128, 8, 128, dtype=jnp.bfloat16, spec=score.PREFIX.kv)
  held, columns = array(mesh, rows // 4), array(mesh, 11, spec=sharding.WHOLE)
  prefix = reading.Prefix((kv, kv), held, held)
  args = weights(mesh, sharding.DECODE), prefix, array(mesh, rows, T), array(mesh, rows), columns
  # The first layer: its rows and their prefixes. The last one reads one place, and its few queries over the prefixes.
  assert kernels(score._read, platform, *args, reads=1, mesh=mesh) == 4


def test_embedding_meets_its_kernels_on_every_mesh(mesh, platform):
  rows = ROWS * sharding.replicas(mesh)
  args = weights(mesh, sharding.DECODE), None, array(mesh, rows, T), array(mesh, rows)
  assert kernels(embed._pooled, platform, *args, mesh=mesh, layers=None, pooling="mean") == 1


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_platform_is_that_of_the_mesh_in_force(platform):
  mesh, seen = elsewhere((2, 2, 2), platform), []

  def f(x):
    seen.append(sharding.platform())
    return x

  inside = sharding.per_replica(f, mesh, (sharding.REPLICA,), sharding.REPLICA)
  jax.jit(inside).trace(array(mesh, 8))  # as in sampling
  with jax.sharding.use_abstract_mesh(mesh):
    jax.jit(f).trace(array(mesh, 8))  # as in training
  assert seen == [platform, platform] and sharding.platform() == "cpu"
  with jax.set_mesh(sharding.make_mesh()):
    assert sharding.platform() == "cpu"


def test_only_devices_that_are_here_check_a_back_end(monkeypatch):
  checked = []
  monkeypatch.setattr(attention, "disagreement", lambda *a: checked.append(jax.config.jax_default_device))
  attention._flaw.cache_clear()
  try:
    assert attention._flaw("tpu", "tpu", "causal", np.dtype(np.float32), 1, 64) is None and not checked
    assert attention._flaw("cpu", "cpu", "causal", np.dtype(np.float32), 1, 64) is None
    assert checked == jax.devices()[:1]
  finally:
    attention._flaw.cache_clear()
