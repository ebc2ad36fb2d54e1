"""Eight devices compute what one computes, and hold what they should."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.llama import decoder, reading, sharding
from alma_jax.llama import model as llama
from alma_jax.llama.config import read_config
from alma_jax.llama.sharding import (
  AXES,
  BATCH,
  DECODE,
  TRAIN,
  MeshError,
  constrain_vocab,
  make_mesh,
  on_own_rows,
  shardings,
)
from alma_jax.llama.weights import load

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "llama"
TOKENS = np.random.default_rng(3).integers(0, 50, (8, 16))


def loss_and_logits(model, tokens):
  positions, segments = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens)
  hidden = llama.hidden_states(model, tokens, positions, segments, training=llama.TrainingPass("full"))
  out = llama.logits(model, hidden)
  return -jnp.mean(jax.nn.log_softmax(out)[..., 3]), out


@jax.jit
def logits_and_grads(model, tokens):
  (_, out), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(model, tokens)
  return out, grads


@pytest.fixture(scope="module")
def alone():
  return jax.device_get(logits_and_grads(load(FIXTURES / "llama3"), TOKENS))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_logits_and_gradients_on_eight_devices_equal_those_on_one(sizes, alone, capfd):
  mesh = make_mesh(*sizes)
  model = load(FIXTURES / "llama3", mesh)
  with jax.set_mesh(mesh):
    out, grads = logits_and_grads(model, jax.device_put(TOKENS, NamedSharding(mesh, P(BATCH))))
  assert len(out.sharding.device_set) == 8
  np.testing.assert_allclose(out, alone[0], atol=2e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), jax.device_get(grads), alone[1])
  assert "rematerialization" not in capfd.readouterr().err  # XLA's warning of a resharding that replicates


def test_decoding_under_decode_rules_equals_the_full_forward_on_one_device(alone):
  mesh = make_mesh(data=4, tensor=2)
  model = load(FIXTURES / "llama3", mesh, DECODE)
  assert model.embed[...].sharding.spec == P("tensor", None)
  assert model.blocks.down[...].sharding.spec == P(None, "tensor", None)
  T = 10
  with jax.set_mesh(mesh):
    fast = jax.jit(llama.unrolled)(model)
    rows = NamedSharding(mesh, P(BATCH))
    hidden, kept = jax.jit(reading.prefill)(fast, jax.device_put(TOKENS[:, :T], rows), np.full(8, T))
    np.testing.assert_allclose(llama.logits(model, hidden), alone[0][:, :T], atol=2e-5)
    prefix, cache, step = reading.Prefix(kept, np.full(8, T)), decoder.new_cache(fast, 8, 6), jax.jit(decoder.decode)
    for at in range(3):
      token = jax.device_put(TOKENS[:, T + at], rows)
      hidden, cache = step(fast, token, np.full(8, at), cache, prefix, None)
      np.testing.assert_allclose(llama.logits(model, hidden), alone[0][:, T + at], atol=2e-5)


def leaf_shardings(tree):
  return [x.sharding for x in jax.tree.leaves(tree)]


def test_adam_moments_are_sharded_like_the_weights_and_updated_alike(alone):
  mesh, optimizer = make_mesh(2, 2, 2), optax.adam(1e-2)
  model = load(FIXTURES / "llama3", mesh)
  places = shardings(jax.eval_shape(optimizer.init, model), mesh, TRAIN)
  state = jax.jit(optimizer.init, out_shardings=places)(model)
  wanted = leaf_shardings(model)
  assert leaf_shardings(state[0].mu) == leaf_shardings(state[0].nu) == wanted
  assert model.blocks.q[...].sharding.spec == P(None, "fsdp", "tensor", None)
  assert state[0].mu.blocks.q[...].addressable_shards[0].data.shape == (2, 8, 2, 4)
  assert state[0].count.sharding.spec == P()

  with jax.set_mesh(mesh):
    grads = logits_and_grads(model, jax.device_put(TOKENS, NamedSharding(mesh, P(BATCH))))[1]
    _, state = jax.jit(optimizer.update, out_shardings=(places[0].mu, places))(grads, state)
  assert leaf_shardings(state[0].mu) == wanted
  single = optimizer.update(alone[1], optimizer.init(alone[1]))[1]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *map(jax.device_get, (state, single)))


def test_an_axis_that_its_mesh_axis_does_not_divide_is_kept_whole():
  model = jax.eval_shape(lambda: llama.init(read_config(FIXTURES / "llama31"), 0))  # 1 key/value head, vocabulary of 50
  places = shardings(model, make_mesh(fsdp=2, tensor=4), TRAIN)
  assert places.blocks.k.get_value().spec == P(None, "fsdp", None, None)
  assert places.embed.get_value().spec == P(None, "fsdp")
  assert places.blocks.gate.get_value().spec == P(None, "fsdp", "tensor")


def test_leaves_that_are_not_weights_are_replicated():
  places = shardings({"step": jnp.zeros(8), "w": nnx.Param(jnp.zeros((8, 8)), axes=("embed", "ffn"))}, make_mesh(), {})
  assert places["step"].spec == P()
  assert places["w"].get_value().spec == P(None, None)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_sums_in_two_steps_leave_each_device_its_share(monkeypatch, sizes, axis):
  mesh, (data, fsdp, tensor) = make_mesh(*sizes), sizes
  x = np.random.default_rng(0).integers(-9, 9, (data, fsdp, tensor, 16, 24)).astype(np.float32)
  others = P("data", "tensor", *[None] * axis, "fsdp")

  def summed(x):
    return sharding.summed_shares(x[0, 0, 0], axis)[None, None]

  for name, steps in {"gpu": 1, "tpu": 1 + (fsdp > 2)}.items():
    monkeypatch.setattr(sharding, "platform", functools.partial(str, name))
    of_each = jax.shard_map(summed, mesh=mesh, in_specs=P(*AXES), out_specs=others, check_vma=False)
    lowered = jax.jit(of_each).lower(x)
    assert lowered.as_text().count("reduce_scatter") == steps
    assert np.array_equal(lowered.compile()(x), x.sum(axis=1))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (2, 2, 1), (-1, 3, 1)])
def test_a_mesh_that_the_devices_cannot_form_names_both_sizes(sizes):
  with pytest.raises(MeshError, match=r"8 devices|needs 4 devices, 8"):
    make_mesh(*sizes)


def test_one_free_mesh_size_takes_what_is_left():
  assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_table_spread_over_tensor_is_gathered_and_its_gradient_reduced_share_by_share():
  mesh = make_mesh(data=1, fsdp=4, tensor=2)
  table = jax.device_put(np.arange(48.0, dtype=np.float32).reshape(6, 8), NamedSharding(mesh, P("tensor", "fsdp")))
  tokens = np.array([[0, 5], [3, 3], [1, 2], [5, 4]])

  def picked(table, tokens):
    return constrain_vocab(table)[tokens]

  def weighed(table):
    found = on_own_rows(picked, 1, 8, 1)(table, tokens)
    return (found * jnp.arange(1.0, 5)[:, None, None]).sum(), found

  with jax.set_mesh(mesh):
    program = jax.jit(jax.value_and_grad(weighed, has_aux=True)).lower(table).compile()
    (_, found), gradient = program(table)
  assert np.array_equal(found, np.asarray(table)[tokens])
  wanted = np.zeros((6, 8))
  np.add.at(wanted, tokens, np.arange(1.0, 5)[:, None, None])
  assert np.array_equal(gradient, wanted)
  gathers = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", program.as_text())
  assert gathers and "6,8" not in gathers, gathers
