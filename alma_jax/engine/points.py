"""Points and centroids of k-means on a mesh ("data", "k"), of one process or of several.

  points = Points(source, mesh_for(k, d), chunk, k, spherical)
  labels, distances = points.assigned(centroids)        # [n] each, on every host
  c, programs = points.placed(centroids)                # centroids on the devices, and what runs with so many of them
  sums, inertia = points.joined(c, programs, k)         # for programs.move: a pass over all points

`source` stays where it is (memory, disk): each process reads the rows of its own devices, a chunk at a time. Points far
from zero are read as Centred(source, origin_of(source, mesh)).
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alma_jax.engine.lloyd import Programs, look_for, platform_of, programs_for
from alma_jax.engine.nearest import BLOCK
from alma_jax.errors import UserError

NEAR = 8  # rows no further apart are read as one slice
PROBED = 4096  # rows from which the mean is estimated
CPU_TILE = 64, 1024  # points and centroids: their scores stay in the cache of a core
TILE = 16384, 4096  # elsewhere: few kernel launches


class ClusteringError(UserError):
  """Points or settings that k-means cannot use; the message says which, and what is allowed."""


class Source(Protocol):
  """Points [n, d] that are read in slices: an array, a memory map, a view over many `.npy`."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...  # np.dtype; Any, because pyright takes no cached_property for a property

  def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Picked:
  """Some rows of a source, in ascending order, as a source."""

  def __init__(self, source: Source, rows: np.ndarray) -> None:
    self.source, self.rows = source, rows
    self.shape, self.dtype = (len(rows), source.shape[1]), source.dtype

  def __getitem__(self, part: slice, /) -> np.ndarray:
    rows = self.rows[part]
    out = np.empty((len(rows), self.shape[1]), self.dtype)
    cuts = np.flatnonzero(np.diff(rows) > NEAR) + 1
    for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True):
      if a < b:
        out[a:b] = self.source[int(rows[a]) : int(rows[b - 1]) + 1][rows[a:b] - rows[a]]
    return out


class Centred:
  """A source minus an origin [d], as fp32: subtracted before anything is rounded to 32 bits."""

  def __init__(self, source: Source, origin: np.ndarray) -> None:
    self.source, self.origin = source, origin.astype(np.float32)
    self.shape, self.dtype = tuple(source.shape), np.dtype(np.float32)

  def __getitem__(self, part: slice, /) -> np.ndarray:
    x = np.asarray(self.source[part])
    wide = x.astype(np.float64 if x.dtype == np.float64 or x.dtype.kind in "iu" else np.float32, copy=False)
    return (wide - self.origin).astype(np.float32, copy=False)


class Halved:
  """A source in half precision, which accelerators multiply many times faster; its numbers are of the size of 1."""

  def __init__(self, source: Source) -> None:
    self.source, self.shape, self.dtype = source, tuple(source.shape), np.dtype(np.float16)

  def __getitem__(self, part: slice, /) -> np.ndarray:
    return np.asarray(self.source[part]).astype(np.float16)


def origin_of(points: Source, mesh: Mesh) -> np.ndarray:
  """fp32 [d]: what to subtract from the points before squares are summed. It is their mean, in float64 from PROBED rows
  that are evenly spread, if that is further from zero than the points are from it; else zeros."""
  n, d = points.shape
  x = chosen(points, np.unique(np.linspace(0, n - 1, min(n, PROBED)).astype(np.int64)), mesh).astype(np.float64)
  x = x[np.isfinite(x).all(axis=1)]  # the others are found, and named, where all points are read
  if not len(x) or (x.mean(axis=0) ** 2).sum() <= x.var(axis=0).sum():
    return np.zeros(d, np.float32)
  return x.mean(axis=0).astype(np.float32)


def chosen(source: Source, rows: np.ndarray, mesh: Mesh) -> np.ndarray:
  """These points as fp32 on every host of the mesh, each of which reads a share of them."""
  if _processes(mesh) == 1:
    return np.asarray(Picked(source, rows)[:], np.float32)
  ways, mine = jax.process_count(), jax.process_index()
  share = -(-len(rows) // ways)
  padded = np.pad(rows, (0, share * ways - len(rows)), mode="edge")
  read = np.asarray(Picked(source, padded[mine * share : (mine + 1) * share])[:], np.float32)
  return np.asarray(multihost_utils.process_allgather(read)).reshape(-1, source.shape[1])[: len(rows)]


def _processes(mesh: Mesh) -> int:
  return len({x.process_index for x in mesh.devices.flat})


def mesh_of(data: int, k: int, devices: Sequence[Any]) -> Mesh:
  return jax.make_mesh((data, k), ("data", "k"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def mesh_for(k: int, d: int, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh ("data", "k") over the devices (default: those of all hosts), with as few of them along "k" as let centroids
  and sums take at most a quarter of a device's memory."""
  devices = jax.devices() if devices is None else devices
  along = ways_of_centroids(k, d, len(devices), _room(devices))
  if along is None:
    raise ClusteringError(
      f"k-means: {k} centroids of {d} dimensions and their sums do not fit a quarter of the memory of {len(devices)}"
      " devices; take more devices, fewer clusters or fewer dimensions"
    )
  return mesh_of(len(devices) // along, along, devices)


def ways_of_centroids(k: int, d: int, devices: int, memory: int) -> int | None:
  """How many devices share centroids and sums, so that they take at most a quarter of each one's `memory`; None if even
  all of them have too little."""
  ways = (w for w in range(1, devices + 1) if devices % w == 0)
  return next((w for w in ways if 2 * 4 * d * -(-k // w) <= memory // 4), None)


def _room(devices: Sequence[Any]) -> int:
  """Bytes of memory of a device, the least that any process of these devices has: all must plan alike."""
  mine = _memory(next(x for x in devices if x.process_index == jax.process_index()))
  if len({x.process_index for x in devices}) == 1:
    return mine
  return int(multihost_utils.process_allgather(np.array(mine >> 20, np.int32)).min()) << 20  # there are no 64 bits


def _memory(device: Any) -> int:
  """Bytes; of a CPU device its share of this machine's."""
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, jax.local_device_count())


def dtype_on(platform: str, dtype: DTypeLike) -> np.dtype:
  """The type of points on the devices: half precision is kept, on TPUs as bfloat16, because they multiply no other."""
  dtype = np.dtype(dtype)
  if dtype.itemsize != 2 or dtype.kind in "iu":
    return np.dtype(np.float32)
  return np.dtype(jnp.bfloat16) if platform == "tpu" else dtype


def _up(n: int, step: int) -> int:
  return -(-n // step) * step


class Loaded(NamedTuple):
  """A chunk on the devices."""

  x: Array  # [rows, d]
  squares: Array  # [rows] |x|^2
  wrong: Array  # where the first point is that is not finite, or at least `rows`


class Points:
  """Points that pass over the devices chunk by chunk, or stay there if they are one chunk."""

  def __init__(
    self, source: Source, mesh: Mesh, chunk: int | None, k: int, spherical: bool, kernels: bool = True
  ) -> None:
    """k: the most centroids there will be. kernels: see `programs_for`."""
    self.source, self.mesh, self.spherical, self.kernels = source, mesh, spherical, kernels
    self.n, self.d = source.shape
    self.processes = _processes(mesh)
    self.platform = platform_of(mesh)
    self.dtype = dtype_on(self.platform, source.dtype)
    self.held: Loaded | None = None  # the only chunk, once it is read
    # L, the rows of a device, are a whole number of tiles; a chunk has L rows for each device along "data".
    each = -(-min(self.n, chunk or self._fitting(k), 1 << 30) // mesh.shape["data"])
    if self.platform == "cpu":
      self._tiles, self._step = CPU_TILE, 64
      self.tile = min(_up(each, 16), CPU_TILE[0])
    else:
      self._tiles, self._step = TILE, BLOCK[1]
      even = -(-each // -(-each // TILE[0]))
      self.tile = _up(even, BLOCK[0] if even < 2048 else 2048)
    self.rows = _up(each, self.tile) * mesh.shape["data"]

  def _fitting(self, k: int) -> int:
    """Rows that the devices hold at a time."""
    room = _room(list(self.mesh.devices.flat)) * (0.4 if self.platform == "cpu" else 0.8)
    room -= 4 * 4 * self.d * -(-k // self.mesh.shape["k"])  # centroids old and new, sums and a spare
    rows = int(max(room, 0) // (self.d * self.dtype.itemsize + 32)) * self.mesh.shape["data"]
    return self.n if rows >= self.n else max(rows // 2, 1)  # the next chunk is read while one is used

  def each(self, f: Callable[[Array, Array, int], Any]) -> list[Any]:
    """What f(x, squares, rows) gives for every chunk, on the host; the next one is read while one computes."""
    found, running = [], None
    for at in range(0, self.n, self.rows):
      x, squares, wrong = self.held or self._read(at)
      if running:
        found.append(self._ended(*running))
      running = at, wrong, f(x, squares, min(self.n - at, self.rows))
    return [*found, self._ended(*running)] if running else found

  def _read(self, at: int) -> Loaded:
    """The chunk from row `at` on."""
    rows = min(self.n - at, self.rows)

    @functools.cache  # devices that differ in "k" only hold the same rows
    def share(start: int, stop: int) -> np.ndarray:
      out = np.zeros((stop - start, self.d), self.dtype)
      if start < rows:
        stop = min(stop, rows)
        out[: stop - start] = self.source[at + start : at + stop]
      return out

    def read(index: Any) -> np.ndarray:
      return share(*index[0].indices(self.rows)[:2])

    x = jax.make_array_from_callback((self.rows, self.d), NamedSharding(self.mesh, P("data")), read)
    loaded = Loaded(x, *look_for(self.mesh)(x, rows))
    if self.rows >= self.n:
      self.held = loaded
    return loaded

  def _ended(self, at: int, wrong: Array, result: Any) -> Any:
    if int(wrong) < self.rows:
      source, row = self.source, at + int(wrong)
      if isinstance(source, Picked):  # its number in the caller's points
        source, row = source.source, int(source.rows[row])
      raise ClusteringError(f"k-means: point {row} has a value that is not finite, or too large for its square in fp32")
    return jax.device_get(result)

  def tiled(self, k: int) -> tuple[int, int]:
    """How many centroids make a tile, and how many places k of them take in whole tiles on all devices."""
    ways = self.mesh.shape["k"]
    each = -(-k // ways)
    tiles = -(-each // self._tiles[1])
    tile = _up(-(-each // tiles), self._step)
    return tile, tile * tiles * ways

  def placed(self, centroids: np.ndarray) -> tuple[Array, Programs]:
    """Centroids of the host on the devices, and the programs for so many."""
    tile, places = self.tiled(len(centroids))
    padded = np.zeros((places, self.d), np.float32)
    padded[: len(centroids)] = centroids
    c = jax.make_array_from_callback(padded.shape, NamedSharding(self.mesh, P("k")), lambda index: padded[index])
    return c, programs_for(self.mesh, (self.tile, tile), self.spherical, self.kernels)

  def joined(self, c: Array, programs: Programs, k: int) -> tuple[tuple[Array, ...], float]:
    """What `programs.move` takes, after every point has joined the sum of the nearest of the first k centroids, and the
    inertia."""
    sums = self._zeros(c)

    def accumulate(x: Array, squares: Array, rows: int) -> Array:
      nonlocal sums
      *sums, objective = programs.accumulate(*sums, x, squares, c, rows, k)
      return objective

    objectives = self.each(accumulate)
    return tuple(sums), float(sum(part.sum(dtype=np.float64) for part in objectives))

  def _zeros(self, c: Array) -> tuple[Array, ...]:
    """Sums, counts and spreads of each device's own points for the centroids c."""
    place, ways = NamedSharding(self.mesh, P("data", "k")), self.mesh.shape["data"]
    sums = jnp.zeros((ways, *c.shape), jnp.float32, device=place)
    counts, spread = (jnp.zeros((ways, c.shape[0]), dtype, device=place) for dtype in (jnp.int32, jnp.float32))
    return sums, counts, spread

  def assigned(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 [n] and squared distances fp32 [n], on every host."""
    c, programs = self.placed(centroids)
    parts = self.each(lambda x, squares, rows: programs.assign(x, squares, c, rows, len(centroids)))
    labels, distances = (np.concatenate(part)[: self.n] for part in zip(*parts, strict=True))
    return labels, distances

  def chosen(self, rows: np.ndarray) -> np.ndarray:
    """These points as fp32 on every host, each of which reads a share of them."""
    return chosen(self.source, rows, self.mesh)


def fetched(c: Array, k: int, programs: Programs) -> np.ndarray:
  """The first k centroids on every host; in blocks, because there may be more than one device can hold."""
  if c.is_fully_addressable:
    return np.array(c)[:k]
  size = next(s for s in (65536, 4096, 64) if len(c) % s == 0)
  return np.concatenate([np.asarray(programs.block(c, at, size)) for at in range(0, len(c), size)])[:k]
