"""K-means: exact Lloyd iterations over points on any number of devices and hosts, or streamed from disk.

  settings = Settings(k=1000)                                        # ten iterations from D-squared seeds
  found = fit(points, settings, key_of(seed, "k-means"))             # found.labels, found.centroids, found.report
  found = fit(points, settings, key, mesh=mesh_for(1000, d))         # over all devices of all hosts
  found = fit(points, settings, key, mesh, chunk=1 << 20)            # a million rows on the devices at a time
  found = fit(points, settings, key, restore=starting_at(centroids)) # no seeding: from these centroids

`points` is anything with a shape (n, d), a dtype and points[a:b]: an array, a memory map, a view over many `.npy`. Half
precision stays as it is until it reaches a tile; everything is summed in fp32. What is to be expected:

- The points-by-centroids matrix never exists: a tile of centroids meets one tile of points after the other, and every
  point keeps the best score so far. Of equally near centroids the lowest counts.
- Seeds are drawn in eight rounds, each with probability in proportion to the squared distance to all seeds before; the
  noise follows from (key, round, row) alone. The same points and key give the same clusters, whatever the chunks; on
  other devices or meshes sums may differ in their last bits. So may they from run to run on a GPU, unless XLA_FLAGS has
  --xla_gpu_deterministic_ops=true.
- An empty cluster takes half of the largest one, the next that of the second largest, and so on.
- Labels are always those of the nearest centroid; `two_level` is cheap at training only.
- Every process of a run calls `fit` with the same points, reads the rows of its own devices (and a share of the seeds),
  and gets the whole result.
- Distances are |x|^2 - 2xc + |c|^2: centre points whose mean is far from zero, or fp32 has no digits left for them.
- spherical: centroids have length 1, and points should; longer ones weigh more.
"""

import dataclasses
import functools
import math
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROUNDS = 8  # of seeding
SAMPLE = 255  # the round number under which training rows are drawn
FOLD = 8  # rows of a tile of scores that are compared in one go
FAR = 3e38  # the score of centroids that only fill a tile
NONE = np.iinfo(np.int32).max
NEAR = 8  # rows no further apart are read as one slice
CPU_TILE = 64, 1024  # points and centroids: their scores stay in the cache of a core
TILE = 16384, 4096  # elsewhere: few kernel launches


@dataclasses.dataclass(frozen=True)
class Settings:
  k: int
  iterations: int = 10  # at most
  seeding: str = "distance"  # "distance": D-squared; "random": any rows
  spherical: bool = False
  method: str = "flat"  # "two_level": about sqrt(k) coarse clusters, each split in proportion to its size
  per_centroid: int = 0  # train on this many rows per centroid, drawn by the key; 0: on all
  tolerance: float = 1e-5  # an iteration that lowers the inertia by no more than this share is the last
  flat_iterations: int = 0  # after two_level

  def __post_init__(self):
    for name, least in dict(k=1, iterations=0, per_centroid=0, flat_iterations=0).items():
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"k-means: {name}={value!r}, but it must be a whole number, {least} or more")
    for name, known in dict(seeding=("distance", "random"), method=("flat", "two_level")).items():
      if getattr(self, name) not in known:
        raise ValueError(f"k-means: {name}={getattr(self, name)!r}, but it must be one of {', '.join(known)}")
    if not 0 <= self.tolerance < 1:
      raise ValueError(f"k-means: tolerance={self.tolerance!r}, but it must be 0 or more, and less than 1")
    if self.flat_iterations and self.method == "flat":
      raise ValueError("k-means: flat_iterations follow method='two_level'; with method='flat' set iterations instead")

  @property
  def steps(self):
    """How often `progress` is called, if no phase settles early."""
    return self.iterations if self.method == "flat" else 2 * self.iterations + self.flat_iterations


@dataclasses.dataclass(frozen=True)
class Clustering:
  labels: np.ndarray  # int32 [n]
  centroids: np.ndarray  # fp32 [k, d]
  report: dict  # plain numbers and lists


def fit(points, settings, key, mesh=None, chunk=None, progress=None, save=None, restore=None):
  """The Clustering of points [n, d].

  key: two 32-bit words. mesh: axes "data", which spreads the points, and "k", which spreads the centroids (see
  `mesh_for`); None: one device. chunk: rows on all devices together at a time; None: all if they fit, else what does.
  progress(1) after every iteration. save(step, arrays) is called after seeding and every iteration, restore() gives the
  last (step, arrays) that was saved or None; both are called on every process, with the same arrays.
  """
  n = _checked(points, settings.k, mesh, chunk)
  key = _words(key)
  mesh = _mesh(1, 1, jax.local_devices()[:1]) if mesh is None else mesh
  rows, train = settings.per_centroid * settings.k, points
  if 0 < rows < n:
    train = _Rows(points, _largest(-_noise(key, SAMPLE, n), rows))

  def tell(step, arrays, ticks=1):
    if save:
      save(step, arrays())
    if progress and ticks:
      progress(ticks)

  data = _Data(train, mesh, chunk, settings.k, settings.spherical)
  run = _flat if settings.method == "flat" else _two_level
  centroids, report = run(data, settings, key, tell, restore and restore())
  if train is not points:
    data = _Data(points, mesh, chunk, settings.k, settings.spherical)
  labels, distances = data.assigned(centroids)
  sizes = np.bincount(labels, minlength=settings.k)
  facts = {
    "inertia_final": float(distances.sum(dtype=np.float64)),
    "trained_on": train.shape[0],
    "largest": int(sizes.max()),
    "singletons": int((sizes == 1).sum()),
    "empty": int((sizes == 0).sum()),
    "balance": float(settings.k * (sizes.astype(np.float64) ** 2).sum() / n**2),
  }
  return Clustering(labels, centroids, report | facts)


def starting_at(centroids):
  """For `restore`: begin with these centroids [k, d] instead of seeds."""
  return lambda: (0, _State(np.asarray(centroids, np.float32)).arrays())


def mesh_for(k, d, devices=None):
  """A mesh ("data", "k") over the devices (default: all of all hosts): all on "data" while centroids and sums take at
  most a quarter of a device's memory, else the fewest on "k" with which they do."""
  devices = jax.devices() if devices is None else devices
  room = _agreed(_memory(next(x for x in devices if x.process_index == jax.process_index())), devices) // 4
  ways = [w for w in range(1, len(devices) + 1) if len(devices) % w == 0]
  fits = [w for w in ways if 2 * 4 * d * -(-k // w) <= room]
  if not fits:
    raise ValueError(
      f"k-means: {k} centroids of {d} dimensions and their sums do not fit a quarter of the memory of {len(devices)}"
      " devices; take more devices, fewer clusters or fewer dimensions"
    )
  return _mesh(len(devices) // fits[0], fits[0], devices)


def _mesh(data, k, devices):
  return jax.make_mesh((data, k), ("data", "k"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def _checked(points, k, mesh, chunk):
  """How many points there are."""
  shape = tuple(points.shape)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f"k-means: the points have shape {shape}; it must be (n, d), with at least one point")
  if np.dtype(points.dtype).kind not in "fiuV" or np.dtype(points.dtype).names:
    raise ValueError(f"k-means: the points are {points.dtype}; they must be real numbers")
  if np.dtype(points.dtype).kind == "V" and np.dtype(points.dtype) != jnp.bfloat16:
    raise ValueError(f"k-means: the points are {points.dtype}; view them as the type they were saved in (bfloat16?)")
  if k > shape[0]:
    raise ValueError(f"k-means: k={k} clusters, but there are {shape[0]} points; k can be at most that")
  if mesh is not None and mesh.axis_names != ("data", "k"):
    raise ValueError(f"k-means: the mesh has axes {mesh.axis_names}; they must be ('data', 'k'), see mesh_for")
  if chunk is not None and chunk < 1:
    raise ValueError(f"k-means: chunk={chunk}, but it must be 1 or more rows, or None")
  return shape[0]


def _words(key):
  words = np.asarray(key if isinstance(key, tuple | list | np.ndarray) else [], dtype=object).ravel()
  if len(words) != 2 or not all(isinstance(w, int | np.integer) and 0 <= w < 2**32 for w in words):
    raise ValueError(f"k-means: the key is {key!r}; it must be two whole numbers below 2**32")
  return int(words[0]) | int(words[1]) << 32


def _memory(device):
  """Bytes; of a CPU device its share of this machine's."""
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, jax.local_device_count())


def _agreed(value, devices):
  """The least value of all processes that have these devices: all must plan alike."""
  if len({x.process_index for x in devices}) == 1:
    return value
  return int(multihost_utils.process_allgather(np.array(value >> 20, np.int32)).min()) << 20  # there are no 64 bits


def _up(n, step):
  return -(-n // step) * step


def _power(n):
  """The next power of two."""
  return 1 << (n - 1).bit_length()


def _cpu(mesh):
  return mesh.devices.flat[0].platform == "cpu"


def _tile(mesh):
  return CPU_TILE if _cpu(mesh) else TILE


# Randomness and rows, on the host


def _noise(key, stream, n):
  """Exponential variates, fp32 [n]; the one of a row follows from the key, the stream and the row's number."""
  philox = np.random.Philox(key=np.array([key, stream], np.uint64))  # counter-based; its raw words never change
  noise = np.empty(n, np.float32)
  for at in range(0, n, 1 << 20):
    raw = philox.random_raw(min(n - at, 1 << 20))
    noise[at : at + len(raw)] = -np.log1p(-((raw >> np.uint64(11)) + 0.5) * 2.0**-53)
  return noise


def _largest(scores, count):
  """Where the largest are, in ascending order; of equal ones the first."""
  least = np.partition(scores, len(scores) - count)[len(scores) - count]
  above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
  return np.sort(np.concatenate([above, equal[: count - len(above)]]))


class _Rows:
  """Some rows of points, in ascending order, as points."""

  def __init__(self, points, rows):
    self.points, self.rows = points, rows
    self.shape, self.dtype = (len(rows), points.shape[1]), points.dtype

  def __getitem__(self, part):
    rows = self.rows[part]
    out = np.empty((len(rows), self.shape[1]), self.dtype)
    cuts = np.flatnonzero(np.diff(rows) > NEAR) + 1
    for a, b in zip([0, *cuts], [*cuts, len(rows)]):
      if a < b:
        out[a:b] = self.points[int(rows[a]) : int(rows[b - 1]) + 1][rows[a:b] - rows[a]]
    return out


def _number(points, row):
  """The row's number in the caller's points."""
  while isinstance(points, _Rows):
    row, points = int(points.rows[row]), points.points
  return row


# Programs


def _nearest(x, c, half, rows, k, tile):
  """(score, index) [L] of the nearest of the first k centroids for the first `rows` points: the least half - xc.

  x [L, d], c [K, d], half [K]; tile: points, centroids of one, which divide L and K. The loops go as far as rows and k
  do, so that padding costs next to nothing. With the points of a score tile in columns, comparing needs whole vectors
  only; folding the tile by eight keeps XLA from going over it twice.
  """
  points, centroids = tile
  fold = min(FOLD, centroids // 64)
  part = centroids // fold

  def against(s, best):
    ct = lax.dynamic_slice_in_dim(c, s * centroids, centroids)
    ht = lax.dynamic_slice_in_dim(half, s * centroids, centroids)[:, None]

    def one(t, better):
      xt = lax.dynamic_slice_in_dim(x, t * points, points).astype(c.dtype)
      dot = lax.dot_general(ct, xt, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)
      score, which = (ht - dot)[:part], jnp.zeros((part, points), jnp.int32)
      for r in range(1, fold):
        other = (ht - dot)[r * part : (r + 1) * part]
        which = jnp.where(other < score, r, which)
        score = jnp.where(other < score, other, score)
      score, which = lax.optimization_barrier((score, which))
      least = score.min(axis=0)
      index = which * part + lax.broadcasted_iota(jnp.int32, which.shape, 0)
      index = jnp.where(score == least, index, len(half)).min(axis=0) + s * centroids
      held = [lax.dynamic_slice_in_dim(b, t * points, points) for b in best]
      held = jnp.where(least < held[0], least, held[0]), jnp.where(least < held[0], index, held[1])
      return tuple(lax.dynamic_update_slice_in_dim(b, h, t * points, 0) for b, h in zip(better, held))

    # What a step reads is not what it writes, or XLA would copy all scores in every step.
    return lax.fori_loop(0, -(-rows // points), one, best)

  start = jnp.full(len(x), jnp.inf, jnp.float32), jnp.zeros(len(x), jnp.int32)
  return lax.fori_loop(0, -(-k // centroids), against, start)


def _unit(c):
  return c / jnp.maximum(jnp.linalg.norm(c, axis=1, keepdims=True), 1e-30)


def _share(count, axis, mine):
  """How many of the first `count` are this device's, of which each along the axis has as many as `mine`."""
  return jnp.clip(count - lax.axis_index(axis) * mine, 0, mine)


def _wrapped(mesh, f, inputs, outputs, **more):
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False), **more)


@functools.cache
def _look(mesh):
  """The program that gives |x|^2 of a chunk's points, and where the first is that is not finite."""

  def look(x, rows):
    squares = (x.astype(jnp.float32) ** 2).sum(axis=1)
    wrong = ~jnp.isfinite(squares) & (jnp.arange(len(x)) < _share(rows, "data", len(x)))
    first = jnp.where(wrong.any(), jnp.argmax(wrong) + lax.axis_index("data") * len(x), NONE)
    return squares, lax.pmin(first, "data")

  return _wrapped(mesh, look, (P("data"), P()), (P("data"), P()))


@functools.cache
def _programs(mesh, tile, spherical):
  """The programs that run on the mesh. On every device x [L, d] are its share of a chunk's points, c [K, d] of the
  centroids; of all points of the chunk `rows` count, of all centroids k."""

  def nearest(x, squares, c, rows, k):
    """(index among all centroids, squared distance) of this device's points."""
    c = c.astype(jnp.float32 if _cpu(mesh) else x.dtype)  # a CPU has no fast product of halves
    half = 0.5 if spherical else (c.astype(jnp.float32) ** 2).sum(axis=1) / 2
    half = jnp.where(jnp.arange(len(c)) < _share(k, "k", len(c)), half, FAR)
    score, index = _nearest(x, c, half, _share(rows, "data", len(x)), _share(k, "k", len(c)), tile)
    if mesh.shape["k"] > 1:
      index += lax.axis_index("k") * len(c)
      least = lax.pmin(score, "k")
      score, index = least, lax.pmin(jnp.where(score == least, index, NONE), "k")
    return index, jnp.maximum(squares + 2 * score, 0.0)

  def assign(x, squares, c, rows, k):
    return tuple(lax.all_gather(y, "data", tiled=True) for y in nearest(x, squares, c, rows, k))

  def accumulate(sums, counts, x, squares, c, rows, k):
    index, distance = nearest(x, squares, c, rows, k)
    mine = jnp.arange(len(x)) < _share(rows, "data", len(x))
    index -= lax.axis_index("k") * len(c)
    index = jnp.where(mine & (index >= 0) & (index < len(c)), index, len(c))  # which is dropped

    def add(t, to):
      xt, at = (lax.dynamic_slice_in_dim(y, t * tile[0], tile[0]) for y in (x, index))
      return to[0].at[at].add(xt.astype(jnp.float32), mode="drop"), to[1].at[at].add(1, mode="drop")

    sums, counts = lax.fori_loop(0, -(-_share(rows, "data", len(x)) // tile[0]), add, (sums[0], counts[0]))
    objective = jnp.where(mine, distance, 0.0).reshape(-1, tile[0]).sum(axis=1)  # the host adds these up
    return sums[None], counts[None], lax.all_gather(objective, "data", tiled=True)

  def move(sums, counts, c):
    sums, counts = lax.psum(sums[0], "data"), lax.psum(counts[0], "data")
    means = sums / jnp.maximum(counts, 1)[:, None]
    # A sum of points may be zero, and then has no direction.
    moves = counts > 0 if not spherical else (counts > 0) & (jnp.abs(means).max(axis=1) > 0)
    c = jnp.where(moves[:, None], _unit(means) if spherical else means, c)
    return c, lax.all_gather(counts, "k", tiled=True)

  def repair(c, empty, donors):
    sign = jnp.where(jnp.arange(c.shape[1]) % 2, 1 + 1 / 1024, 1 - 1 / 1024)
    rows = c.at[donors].get(mode="fill", fill_value=0)
    halves = (_unit(rows * s) if spherical else rows * s for s in (sign, 2 - sign))
    for at, half in zip((empty, donors), halves):
      c = c.at[at].set(half, mode="drop")
    return c

  x, c, own, whole = P("data"), P("k"), P("data", "k"), P()
  block = lambda c, at, size: lax.dynamic_slice_in_dim(c, at, size)
  return types.SimpleNamespace(
    assign=_wrapped(mesh, assign, (x, x, c, whole, whole), (whole, whole)),
    accumulate=_wrapped(mesh, accumulate, (own, own, x, x, c, whole, whole), (own, own, whole), donate_argnums=(0, 1)),
    move=_wrapped(mesh, move, (own, own, c), (c, whole), donate_argnums=(0, 1)),
    repair=jax.jit(repair, out_shardings=NamedSharding(mesh, c), donate_argnums=0),
    block=jax.jit(block, static_argnums=2, out_shardings=NamedSharding(mesh, whole)),
  )


# Points on the devices


class _Data:
  """Points that pass over the devices chunk by chunk, or stay there if they are one chunk."""

  def __init__(self, points, mesh, chunk, k, spherical, rounded=False):
    """k: the most centroids there will be. rounded: few shapes for many sizes, so that few programs are compiled."""
    self.points, self.mesh, self.chunk, self.spherical, self.rounded = points, mesh, chunk, spherical, rounded
    self.n, self.d = points.shape
    self.dtype = np.dtype(points.dtype)
    if self.dtype.itemsize != 2 or self.dtype.kind in "iu":
      self.dtype = np.dtype(np.float32)
    self.held, self.several = None, len({x.process_index for x in mesh.devices.flat}) > 1
    each = -(-min(self.n, chunk or self._fitting(k), 1 << 30) // mesh.shape["data"])
    each = _power(each) if rounded else each
    self.tile = min(_up(each, 16), _tile(mesh)[0])
    self.rows = _up(each, self.tile) * mesh.shape["data"]

  def _fitting(self, k):
    """Rows that the devices hold at a time."""
    mine = next(x for x in self.mesh.devices.flat if x.process_index == jax.process_index())
    room = _agreed(_memory(mine), list(self.mesh.devices.flat)) * (0.4 if _cpu(self.mesh) else 0.8)
    room -= 4 * 4 * self.d * -(-k // self.mesh.shape["k"])  # centroids old and new, sums and a spare
    rows = int(max(room, 0) // (self.d * self.dtype.itemsize + 32)) * self.mesh.shape["data"]
    return self.n if rows >= self.n else max(rows // 2, 1)  # the next chunk is read while one is used

  def each(self, f):
    """What f(x, squares, rows) gives for every chunk, on the host; the next one is read while one computes."""
    found, running = [], None
    for at in range(0, self.n, self.rows):
      x, squares, wrong = self.held or self._read(at)
      if running:
        found.append(self._ended(*running))
      running = at, wrong, f(x, squares, min(self.n - at, self.rows))
    return [*found, self._ended(*running)]

  def _read(self, at):
    rows = min(self.n - at, self.rows)

    @functools.cache  # devices that differ in "k" only hold the same rows
    def share(start, stop):
      out = np.zeros((stop - start, self.d), self.dtype)
      if start < rows:
        stop = min(stop, rows)
        out[: stop - start] = self.points[at + start : at + stop]
      return out

    read = lambda index: share(*index[0].indices(self.rows)[:2])
    x = jax.make_array_from_callback((self.rows, self.d), NamedSharding(self.mesh, P("data")), read)
    block = (x, *_look(self.mesh)(x, rows))
    if self.rows >= self.n:
      self.held = block
    return block

  def _ended(self, at, wrong, result):
    if int(wrong) < self.rows:
      row = _number(self.points, at + int(wrong))
      raise ValueError(f"k-means: point {row} has a value that is not finite, or too large for its square in fp32")
    return jax.device_get(result)

  def placed(self, centroids):
    """Centroids of the host on the devices, and the programs for so many."""
    k, ways = len(centroids), self.mesh.shape["k"]
    each = -(-(_power(k) if self.rounded else k) // ways)
    tiles = -(-each // _tile(self.mesh)[1])
    tile = _up(-(-each // tiles), 64)
    padded = np.zeros((tile * tiles * ways, self.d), np.float32)
    padded[:k] = centroids
    c = jax.make_array_from_callback(padded.shape, NamedSharding(self.mesh, P("k")), lambda index: padded[index])
    return c, _programs(self.mesh, (self.tile, tile), self.spherical)

  def assigned(self, centroids):
    """(labels int32 [n], squared distances fp32 [n]), on every host."""
    c, programs = self.placed(centroids)
    parts = self.each(lambda x, squares, rows: programs.assign(x, squares, c, rows, len(centroids)))
    return tuple(np.concatenate(part)[: self.n] for part in zip(*parts))

  def chosen(self, rows):
    """These points as fp32 on every host, each of which reads a share of them."""
    if not self.several:
      return np.asarray(_Rows(self.points, rows)[:], np.float32)
    ways, mine = jax.process_count(), jax.process_index()
    share = -(-len(rows) // ways)
    padded = np.pad(rows, (0, share * ways - len(rows)), mode="edge")
    read = np.asarray(_Rows(self.points, padded[mine * share : (mine + 1) * share])[:], np.float32)
    return multihost_utils.process_allgather(read).reshape(-1, self.d)[: len(rows)]


def _fetched(c, k, programs):
  """The first k centroids on every host; in blocks, because there may be more than one device can hold."""
  if c.is_fully_addressable:
    return np.array(c)[:k]
  size = next(s for s in (65536, 4096, 64) if len(c) % s == 0)
  return np.concatenate([np.asarray(programs.block(c, at, size)) for at in range(0, len(c), size)])[:k]


# The methods


@dataclasses.dataclass
class _State:
  """Where Lloyd's iterations are: what is saved after each."""

  centroids: np.ndarray  # fp32 [k, d]
  inertia: list = dataclasses.field(default_factory=list)  # of every iteration
  repaired: int = 0  # empty clusters
  settled: bool = False

  def arrays(self):
    return {
      "centroids": self.centroids, "inertia": np.array(self.inertia, np.float64),
      "repaired": np.array(self.repaired), "settled": np.array(self.settled),
    }  # fmt: skip


def _restored(arrays, k, d):
  shape = np.shape(arrays["centroids"])
  if shape != (k, d):
    raise ValueError(f"k-means: what was restored has centroids of shape {shape}, not {(k, d)}: it is another run's")
  found = {name: np.asarray(arrays[name]) for name in ("centroids", "inertia", "repaired", "settled")}
  return _State(
    found["centroids"].astype(np.float32), found["inertia"].tolist(), int(found["repaired"]), bool(found["settled"])
  )


def _seeds(data, k, settings, key, stream=0):
  """k different points: in each round so many with p ~ squared distance to those of the rounds before."""
  rounds = min(ROUNDS, k) if settings.seeding == "distance" else 1
  distance, chosen = np.full(data.n, np.inf, np.float32), []
  for r in range(rounds):
    size = (k - sum(map(len, chosen))) // (rounds - r)
    # The largest distance / noise are a draw without replacement. Copies of seeds, at distance 0, come last, but still
    # before what was drawn already.
    rows = _largest((distance if r else 1) / _noise(key, stream + r, data.n), size)
    chosen.append(data.chosen(rows))
    distance[rows] = -1
    if r + 1 < rounds:
      np.minimum(distance, data.assigned(_normal(chosen[-1], settings))[1], out=distance)
  return _normal(np.concatenate(chosen), settings)


def _normal(centroids, settings):
  if not settings.spherical:
    return centroids
  return centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.float32(1e-30))


def _lloyd(data, state, iterations, tolerance, after):
  """Iterates until the state settles. after(state, fetch) follows each iteration; fetch() gives the centroids."""
  k = len(state.centroids)
  c, programs = data.placed(state.centroids)
  while not state.settled and len(state.inertia) < iterations:
    sums = _zeros(data.mesh, c.shape)

    def accumulate(x, squares, rows):
      nonlocal sums
      *sums, objective = programs.accumulate(*sums, x, squares, c, rows, k)
      return objective

    inertia = float(sum(part.sum(dtype=np.float64) for part in data.each(accumulate)))
    c, counts = programs.move(*sums, c)
    c, repaired = _repaired(c, np.asarray(counts)[:k], programs)
    gain = state.inertia[-1] - inertia if state.inertia else math.inf
    state.inertia.append(inertia)
    state.repaired += repaired
    state.settled = not repaired and gain <= tolerance * inertia
    after(state, lambda: _fetched(c, k, programs))
  state.centroids = _fetched(c, k, programs)
  return state


def _zeros(mesh, shape):
  """Sums and counts of each device's own points."""
  place, ways = NamedSharding(mesh, P("data", "k")), mesh.shape["data"]
  return jnp.zeros((ways, *shape), jnp.float32, device=place), jnp.zeros((ways, shape[0]), jnp.int32, device=place)


def _repaired(c, counts, programs):
  """The e-th empty centroid becomes a copy of the e-th largest cluster's, both moved a hair apart."""
  empty = np.flatnonzero(counts == 0)
  donors = np.argsort(-counts, kind="stable")[: len(empty)]
  donors = donors[counts[donors] > 1]
  if not len(donors):
    return c, 0
  pad = lambda at: np.pad(at, (0, _power(len(donors)) - len(donors)), constant_values=len(c)).astype(np.int32)
  return programs.repair(c, pad(empty[: len(donors)]), pad(donors)), len(donors)


def _flat(data, settings, key, tell, restored):
  if restored:
    state = _restored(restored[1], settings.k, data.d)
  else:
    state = _State(_seeds(data, settings.k, settings, key))
    tell(0, state.arrays, 0)
  state = _iterated(data, state, settings, settings.iterations, tell)
  return state.centroids, _facts(state)


def _iterated(data, state, settings, iterations, tell, before=0, more=None):
  """Lloyd's iterations as the steps after `before`; `more` arrays are saved with each."""

  def after(state, fetch):
    arrays = lambda: dataclasses.replace(state, centroids=fetch()).arrays() | (more or {})
    tell(before + len(state.inertia), arrays)

  return _lloyd(data, state, iterations, settings.tolerance, after)


def _facts(state):
  return {"iterations": len(state.inertia), "inertia": state.inertia, "empty_repaired": state.repaired}


def _two_level(data, settings, key, tell, restored):
  """Steps: the coarse iterations, as many for parts of the fine clusters, and the flat iterations."""
  k, steps = round(math.sqrt(settings.k)), settings.iterations
  step, arrays = restored or (-1, None)
  if step <= steps:
    if restored:
      coarse = _restored(arrays, k, data.d)
    else:
      coarse = _State(_seeds(data, k, settings, key))
      tell(0, coarse.arrays, 0)
    coarse = _iterated(data, coarse, settings, steps, tell)
    arrays = coarse.arrays() | {"coarse": coarse.centroids, "coarse_inertia": np.array(coarse.inertia)}
    arrays |= {"centroids": np.zeros((0, data.d), np.float32), "done": np.array(0)}
  if step <= 2 * steps:
    arrays = _fine(data, settings, key, tell, arrays)
  coarse = {"coarse_inertia": np.asarray(arrays["coarse_inertia"])}
  state = _restored(arrays, settings.k, data.d)
  state = _iterated(data, state, settings, settings.flat_iterations, tell, 2 * steps, coarse)
  return state.centroids, _facts(state) | {"coarse_clusters": k, "coarse_inertia": coarse["coarse_inertia"].tolist()}


def _fine(data, settings, key, tell, arrays):
  """What is saved when every coarse cluster has its centroids."""
  labels, _ = data.assigned(arrays["coarse"])
  data.held = None  # room for the parts
  parts, repaired = len(arrays["coarse"]), int(arrays["repaired"])
  sizes = np.bincount(labels, minlength=parts)
  shares, order, ends = _shares(settings.k, sizes), np.argsort(labels, kind="stable"), np.cumsum(sizes)
  found = [arrays["centroids"]]
  whole = lambda: np.concatenate(found)
  for i in range(int(arrays["done"]), parts):
    if sizes[i]:
      mine = _Rows(data.points, order[ends[i] - sizes[i] : ends[i]])
      part = _Data(mine, data.mesh, data.chunk, int(shares[i]), data.spherical, rounded=True)
      state = _State(_seeds(part, int(shares[i]), settings, key, 256 * (i + 1)))
      state = _lloyd(part, state, settings.iterations, settings.tolerance, lambda *_: None)
      found.append(state.centroids)
      repaired += state.repaired
    ticks = settings.iterations * (i + 1) // parts - settings.iterations * i // parts
    if ticks:
      now = {"done": np.array(i + 1), "repaired": np.array(repaired)}
      step = settings.iterations + settings.iterations * (i + 1) // parts
      tell(step, lambda: arrays | now | {"centroids": whole()}, ticks)
  return arrays | _State(whole(), repaired=repaired).arrays()


def _shares(k, sizes):
  """k in proportion to the sizes; at most the size, and at least 1 where that is not 0."""
  wanted = k * sizes / sizes.sum()
  shares = np.clip(np.floor(wanted), sizes > 0, sizes).astype(np.int64)
  while (missing := k - shares.sum()) != 0:
    gap = np.where(shares < sizes, wanted - shares, -np.inf) if missing > 0 else shares - wanted
    shares[np.argmax(gap)] += np.sign(missing)
  return shares
