"""Where weights and activations live: one mesh `(data, fsdp, tensor)`, two rule tables, one function.

A weight's logical axes (recorded by `llama.model.param`) and a rule table give its NamedSharding; optimizer moments are
made of the same Params and get the same shardings. TRAIN spreads every weight over fsdp; DECODE keeps whole weights on
each device (or each tensor group), so that sampling needs no gathering.
"""

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch's rows are spread over both
WHOLE, REPLICA = P(), P(BATCH)

TRAIN = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"}
DECODE = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"}


class MeshError(UserError):
  """A mesh that the devices cannot form; the message gives both sizes."""


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
  """A mesh over `devices` (default: all of all hosts). One size may be -1: what is left."""
  devices = jax.devices() if devices is None else devices
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = 1
  for size in sizes.values():
    fixed *= size if size != -1 else 1
  if len(free) > 1 or any(s == 0 or s < -1 for s in sizes.values()) or len(devices) % fixed:
    raise MeshError(
      f"mesh {sizes} does not fit {len(devices)} devices: give sizes whose product is {len(devices)}, at most one of"
      " them -1 (what is left)"
    )
  if free:
    sizes[free[0]] = len(devices) // fixed
  elif fixed != len(devices):
    raise MeshError(f"mesh {sizes} needs {fixed} devices, {len(devices)} are here; set one size to -1 (what is left)")
  return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def shardings(abstract, mesh, rules):
  """NamedShardings for a model, an optimizer state, or anything made of Params (other leaves are replicated).

  A weight axis that its mesh axis does not divide is kept whole.
  """

  def place(shape, axes):
    spec = [None] * (len(shape) - len(axes))  # the stacked layer axis
    for size, axis in zip(shape[len(spec) :], axes):
      rule = rules.get(axis)
      spec.append(rule if rule and size % mesh.shape[rule] == 0 else None)
    return NamedSharding(mesh, P(*spec))

  def one(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    return leaf.replace(place(leaf.get_value().shape, leaf.get_metadata()["axes"]))

  return jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh):
  """Rows over data and fsdp, everything else whole."""
  return NamedSharding(mesh, P(BATCH))


def replicas(mesh):
  """How many groups of `tensor` devices hold a copy of the model each."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def per_replica(f, mesh, inputs, outputs):
  """f on every replica's own share of the arrays, with nothing exchanged between replicas; `tensor` stays with XLA.

  `inputs` and `outputs` are PartitionSpecs, one for each argument: REPLICA for what leads with the replicas' shares,
  WHOLE for what each has all of. No mesh, or one device: f itself.
  """
  if mesh is None or mesh.size == 1:
    return f
  return jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=set(BATCH), check_vma=False)


def constrain_batch(x):
  """Keep the leading axis spread over the batch axes of the mesh in force (set by jax.set_mesh), if there is one.

  Inside jax.shard_map over those axes it is spread already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or "data" in mesh.manual_axes:
    return x
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  return jax.lax.with_sharding_constraint(x, P(BATCH)) if x.shape[0] % ways == 0 else x


def constrain_vocab(table):
  """The embedding table in whole rows, as a lookup wants it: under a mesh, spread over `tensor` by vocabulary.

  Left to itself, XLA replicates the looked-up activations ("involuntary full rematerialization").
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return table
  rows = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
  return jax.lax.with_sharding_constraint(table, P(rows, None))
