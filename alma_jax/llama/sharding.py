"""Where weights and activations live: one mesh `(data, fsdp, tensor)`, two rule tables, one function.

  mesh = make_mesh(data=-1, fsdp=8)
  places = shardings(jax.eval_shape(lambda: model), mesh, TRAIN)

A weight's logical axes (recorded by `llama.model.param`) and a rule table give its NamedSharding. Optimizer moments are
made of the same Params and get the same shardings. TRAIN spreads every weight over fsdp. DECODE keeps whole weights on
each device (or each tensor group), so sampling gathers nothing. The weight q with 8 heads on a mesh (1, 4, 2):

  logical axes   (layers)  embed   heads    head_dim
  shape             32     4096      8        128
  TRAIN             -      fsdp    tensor      -          each device holds [32, 1024, 4, 128]
  DECODE            -       -      tensor      -          each device holds [32, 4096, 4, 128]
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alma_jax.errors import UserError
from alma_jax.llama.config import LlamaConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch's rows are spread over both
WHOLE, REPLICA = P(), P(BATCH)  # specs for `per_replica`
LANES = 128  # numbers in a row of a TPU's tiles

# Logical axis of a weight -> mesh axis; other logical axes stay whole.
TRAIN = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"}
DECODE = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"}


class MeshError(UserError):
  """The devices cannot form this mesh; the message gives both sizes."""


Result = TypeVar("Result")


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
  """The platform that a program is traced for, or that of a mesh's devices, in JAX's words: "cpu", "gpu" or "tpu".

  A mesh in force (jax.set_mesh, or inside jax.shard_map) gives that of its devices, so a program can be compiled for
  devices that are elsewhere; without a mesh it is that of JAX's default devices.
  """
  device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh or jax.sharding.get_abstract_mesh()).abstract_device
  return jax.default_backend() if device is None else device.platform


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over `devices` (default: those of all hosts). One size may be -1: what is left.

  An axis is made of whole axes of a TPU's torus where it can be; tensor=8 on a torus of 4 x 4 x 4 splits one.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes(len(devices), data, fsdp, tensor)
  types = (AxisType.Auto,) * 3
  try:
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
  except NotImplementedError:
    split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(split, AXES, axis_types=types)


def abstract_mesh(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
  """The mesh that `make_mesh` makes of so many devices, without any."""
  return AbstractMesh(_sizes(devices, data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def with_fewer_replicas(mesh: Mesh, c: LlamaConfig) -> Iterator[Mesh]:
  """Yields meshes of the same devices with 2, 4, ... times as many in each tensor group, so that fewer ways share a
  batch and none is left without a row. The heads, and the devices of a host that is no TPU's, limit the groups."""
  first = mesh.devices.flat[0]
  of_host = sum(device.process_index == first.process_index for device in mesh.devices.flat)
  for sizes in with_larger_groups(mesh.devices.shape, c, of_host if first.platform != "tpu" else mesh.size):
    # The devices keep their order: those of a group are neighbours.
    yield Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def with_larger_groups(sizes: tuple[int, ...], c: LlamaConfig, most: int) -> Iterator[tuple[int, int, int]]:
  """Yields the sizes (data, fsdp, tensor) of `with_fewer_replicas`, with at most so many devices in a group."""
  data, fsdp, tensor = sizes
  most = min(c.kv_heads, most)
  while data * fsdp % 2 == 0 and 2 * tensor <= most and c.kv_heads % (2 * tensor) == 0 == c.ffn % (2 * tensor):
    if fsdp % 2 == 0:
      fsdp //= 2
    elif fsdp == 1:
      data //= 2
    else:
      return
    tensor *= 2
    yield data, fsdp, tensor


def with_whole_lanes(mesh: Mesh, c: LlamaConfig) -> Mesh:
  """The mesh of the same devices whose sizes `in_whole_lanes` gives."""
  sizes = in_whole_lanes(mesh.devices.shape, c, platform(mesh))
  if sizes == mesh.devices.shape:
    return mesh
  return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def in_whole_lanes(sizes: tuple[int, ...], c: LlamaConfig, target: str) -> tuple[int, ...]:
  """The sizes (data, fsdp, tensor) with as many ways, of which on TPUs no more than leave each device 2 LANES of a
  weight's width are fsdp, or LANES in tensor groups: smaller shares are not gathered or scattered there, but whole
  weights all-reduced, twice the bytes."""
  data, fsdp, tensor = sizes
  least = LANES if tensor > 1 else 2 * LANES
  while target == "tpu" and fsdp % 2 == 0 and c.width < least * fsdp:
    data, fsdp = 2 * data, fsdp // 2
  return data, fsdp, tensor


def _sizes(devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(s == 0 or s < -1 for s in sizes.values()) or devices % fixed:
    raise MeshError(
      f"mesh {sizes} does not fit {devices} devices: give sizes whose product is {devices}, at most one of them -1"
      " (what is left)"
    )
  if free:
    sizes[free[0]] = devices // fixed
  elif fixed != devices:
    raise MeshError(f"mesh {sizes} needs {fixed} devices, {devices} are here; set one size to -1 (what is left)")
  return sizes["data"], sizes["fsdp"], sizes["tensor"]


def shardings(abstract: Any, mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> Any:
  """NamedShardings for a model, an optimizer state, or any tree of Params (other leaves are replicated).

  A weight axis stays whole if the size of its mesh axis does not divide it.
  """

  def place(shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
    spec: list[str | None] = [None] * (len(shape) - len(axes))  # the stacked layer axis has no logical name
    for size, axis in zip(shape[len(spec) :], axes, strict=True):
      rule = rules.get(axis)
      spec.append(rule if rule and size % mesh.shape[rule] == 0 else None)
    return NamedSharding(mesh, P(*spec))

  def one(leaf: Any) -> Any:
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    return leaf.replace(place(leaf.get_value().shape, leaf.get_metadata()["axes"]))

  return jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))


def replicas(mesh: Mesh | AbstractMesh | None) -> int:
  """The number of copies of the model: one for each group of `tensor` devices."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def per_replica(f: Callable[..., Result], mesh: Mesh | None, inputs: Any, outputs: Any) -> Callable[..., Result]:
  """`f` on each replica's own share of the arrays, with no exchange between replicas; XLA handles `tensor`.

  `inputs` and `outputs` are PartitionSpecs, one for each argument: REPLICA where replicas' shares lie along the leading
  axis, WHOLE where each replica has everything. Without a mesh, or on one device, the result is `f` itself.
  """
  if mesh is None or mesh.size == 1:
    return f
  return jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=set(BATCH), check_vma=False)


def holds_all_rows(rows: int) -> bool:
  """True if each device holds all of so many rows: there is no mesh, the batch axes do not divide the rows, or we are
  already inside a shard_map over those axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or "data" in mesh.manual_axes or rows % replicas(mesh) != 0


def on_own_rows(f: Callable[..., Array], width_axis: int, width: int, rows: int) -> Callable[..., Array]:
  """f(tables, arrays by rows) on every device's own rows, for `rows` such arrays, where `holds_all_rows` is False.

  `tables` is a weight, or a tree of them, that TRAIN spreads over fsdp along its axis `width_axis` of size `width`. It
  is gathered inside, because then it travels in its own dtype and its gradient is reduce-scattered, on each platform;
  what XLA is left to choose on GPUs is an all-reduce of the whole gradient. See `summed_shares` for TPUs.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  spread = sizes["fsdp"] > 1 and width % sizes["fsdp"] == 0

  def whole(x: Array) -> Array:
    return _gathered(x, width_axis)

  # What is exchanged by hand over `fsdp` alone, XLA gathers over `tensor` first: the shares of the vocabulary go apart.
  shares = P(*[None if axis == width_axis else "tensor" for axis in range(2)])
  apart = jax.shard_map(whole, in_specs=shares, out_specs=shares, axis_names={"tensor"}, check_vma=False)

  def gathered(tables: Any, *arrays: Array) -> Array:
    return f(jax.tree.map(lambda x: (whole if _in_one(x.shape[1 - width_axis]) else apart)(x), tables), *arrays)

  # The spec names `data` where that has one device: gradients are summed over each axis that no spec names.
  over = BATCH if sizes["data"] == 1 else "fsdp"
  specs = P(*[None] * width_axis, over) if spread else P(), *[P(BATCH)] * rows
  to = gathered if spread else f
  return jax.shard_map(to, in_specs=specs, out_specs=P(BATCH), axis_names=set(BATCH), check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(share: Array, axis: int) -> Array:
  """The whole table inside a shard_map over fsdp, where each device has its share along `axis`."""
  return jax.lax.all_gather(share, "fsdp", axis=axis, tiled=True)


def _gathered_forward(share: Array, axis: int) -> tuple[Array, None]:
  return _gathered(share, axis), None


def _gathered_backward(axis: int, _: None, gradient: Array) -> tuple[Array]:
  return (summed_shares(gradient, axis),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def summed_shares(x: Array, axis: int) -> Array:
  """Each device's share, along `axis`, of the sum of all `x` [V, D] or [D, V] over fsdp, inside a shard_map over fsdp.

  TPUs' compiler turns a reduce-scatter into an all-reduce of the whole and a slice, which sends twice the bytes, in two
  cases: the devices fill more than one axis of their torus, or it cannot cut the shares into even pieces (128,256 rows
  are 256 x 3 x 167). So on TPUs the shares lie along an axis of their own, which lets the compiler pad the pieces, and
  the sum is made in two steps, each over fewer devices. The bytes are those of one step. 16 devices, axis 0:

    step 1   devices 0 4 8 12, 1 5 9 13, ...   [4, D/4, V] -> [D/4, V]     device 6 has the second quarter of 4 devices
    step 2   devices 0 1 2 3, 4 5 6 7, ...     [4, D/16, V] -> [D/16, V]   and of that the third: sixteenth 4 + 2
  """
  ways = jax.sharding.get_abstract_mesh().shape["fsdp"]
  if platform() != "tpu":
    return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
  inner = max(n for n in range(1, math.isqrt(ways) + 1) if ways % n == 0)
  numbers = np.arange(ways).reshape(ways // inner, inner)
  for groups in (numbers.T, numbers):
    n = groups.shape[1]
    if n == 1:
      continue
    shape = *x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :]
    x = jax.lax.psum_scatter(x.reshape(shape), "fsdp", scatter_dimension=axis, axis_index_groups=groups.tolist())
  return x


def _in_one(vocab: int) -> bool:
  """True if `tensor` does not split the vocabulary."""
  ways = jax.sharding.get_abstract_mesh().shape["tensor"]
  return ways == 1 or vocab % ways != 0


def constrain_batch(x: Array) -> Array:
  """`x` with its leading axis kept spread over the batch axes of the mesh in force (set by jax.set_mesh), if any.

  Inside jax.shard_map over those axes it is spread already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or "data" in mesh.manual_axes:
    return x
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  return jax.lax.with_sharding_constraint(x, P(BATCH)) if x.shape[0] % ways == 0 else x


def constrain_vocab(table: Array) -> Array:
  """The embedding table in whole rows, as a lookup wants them: under a mesh, spread over `tensor` by vocabulary.

  Without this, XLA replicates the looked-up activations ("involuntary full rematerialization").
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return table
  return jax.lax.with_sharding_constraint(table, P(None if _in_one(table.shape[0]) else "tensor", None))
