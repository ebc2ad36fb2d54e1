"""K-means by two real processes, joined by jax.distributed, against one with as many devices."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from alma_jax.engine import points as on_devices
from alma_jax.engine import seeding
from alma_jax.engine.kmeans import ClusteringError, FitHooks, Settings, fit, mesh_for
from alma_jax.engine.points import mesh_of

ROOT = pathlib.Path(__file__).parents[1]
N, D, K = 640, 6, 12
# With the mesh of the second case, every process holds all points, but half of the centroids.
CASES = {
  "chunks": ((4, 1), 256, Settings(K, 4, tolerance=0.0)),
  "k": ((1, 4), None, Settings(K, 4, tolerance=0.0)),
  "sample": ((4, 1), None, Settings(K, 4, per_centroid=40, tolerance=0.0)),
}

PROCESS = """
import sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests import test_engine_kmeans_hosts as test
test.process(sys.argv[3], int(sys.argv[2]))
"""


class Watched:
  """Points that remember what was read."""

  def __init__(self, points):
    self.points, self.shape, self.dtype, self.read = points, points.shape, points.dtype, []

  def __getitem__(self, part):
    self.read.append(part.indices(self.shape[0])[:2])
    return self.points[part]


FEW = 80  # rows of a pool, so few that these points are seeded as millions are


def process(directory, index):
  """What either process does."""
  seeding.POOL = on_devices.PROBED = FEW
  on_devices.NEAR = 0  # each row of a pool is read alone
  points = np.load(f"{directory}/points.npy", mmap_mode="r")
  out = {}
  for name, (shape, chunk, settings) in CASES.items():
    watched, saved = Watched(points), []
    mesh = mesh_of(*shape, jax.devices())
    found = fit(watched, settings, (1, 2), mesh, chunk, FitHooks(save=lambda *x: saved.append(x)))
    out |= {f"{name}.labels": found.labels, f"{name}.centroids": found.centroids, f"{name}.read": watched.read}
    out |= {f"{name}.saved": saved[2][1]["centroids"], f"{name}.inertia": found.report["inertia_final"]}
    if name == "chunks":
      out["again"] = fit(points, settings, (1, 2), mesh, chunk, FitHooks(restore=lambda: saved[2])).centroids
  bad = np.array(points)
  bad[600] = np.nan  # in what the second process reads
  try:
    fit(bad, CASES["chunks"][2], (1, 2), mesh_for(K, D), 256)
  except ClusteringError as error:
    out["error"] = str(error)
  np.savez(f"{directory}/{index}.npz", **out)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """(the points, what each of the two processes found)."""
  directory = tmp_path_factory.mktemp("hosts")
  rng = np.random.default_rng(0)
  points = (2 * rng.normal(size=(K, D))[rng.integers(0, K, N)] + rng.normal(size=(N, D))).astype(np.float16)
  np.save(directory / "points.npy", points)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), str(directory)], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ
      | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
      | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # as start.cache_compilations has it
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
  return points, [dict(np.load(directory / f"{i}.npz")) for i in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_both_processes_get_the_clusters_of_one(both, name, monkeypatch):
  points, (first, second) = both
  monkeypatch.setattr(seeding, "POOL", FEW)
  shape, chunk, settings = CASES[name]
  for field in ("labels", "centroids", "saved", "inertia"):
    np.testing.assert_array_equal(first[f"{name}.{field}"], second[f"{name}.{field}"])
  one = fit(points, settings, (1, 2), mesh_of(*shape, jax.devices()[:4]), chunk)
  np.testing.assert_allclose(first[f"{name}.centroids"], one.centroids, rtol=1e-5, atol=1e-5)
  assert (first[f"{name}.labels"] == one.labels).mean() > 0.99
  assert first[f"{name}.inertia"] == pytest.approx(one.report["inertia_final"], rel=1e-6)


def test_each_reads_its_own_rows(both):
  for index, mine in enumerate(both[1]):
    slices = [tuple(part) for part in mine["chunks.read"].tolist()]
    chunks = [part for part in slices if part[1] - part[0] == 64]
    starts = [a + 128 * index for a in (0, 256, 512) if a + 128 * index < N]  # of each chunk of 256 one half
    wanted = [(a + b, a + b + 64) for a in starts for b in (0, 64)]
    assert chunks == wanted * (7 + 4 + 1)  # passes of seeding, of Lloyd's and for the labels
    assert len(slices) - len(chunks) == 9 * FEW // 2  # and half of the rows for the mean and for eight pools


def test_restored_on_both_it_ends_in_the_same_bits(both):
  for mine in both[1]:
    np.testing.assert_array_equal(mine["again"], mine["chunks.centroids"])


def test_both_name_the_row_that_is_not_finite(both):
  assert all("point 600 has a value that is not finite" in str(mine["error"]) for mine in both[1])
