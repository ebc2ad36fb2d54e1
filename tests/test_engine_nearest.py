"""The kernels of k-means in their interpreters on a CPU, and lowered for the accelerators they are for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from alma_jax.engine import embed, lloyd, nearest, nearest_gpu, nearest_tpu, points
from alma_jax.engine.kmeans import Settings, fit, starting_at
from alma_jax.runtime import clustering

WHOLE = P()
KERNELS = {"tpu": (nearest_tpu.nearest, jnp.bfloat16), "gpu": (nearest_gpu.nearest, jnp.float16)}


@pytest.fixture(params=["tpu", "gpu"])
def platform(request):
  return request.param


def elsewhere(sizes, platform):
  """A mesh of devices that are not here."""
  device = AbstractDevice({"tpu": "TPU v6e", "gpu": "NVIDIA H100 80GB HBM3"}[platform], None, platform)
  return AbstractMesh(sizes, ("data", "k"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)


def interpreted(platform):
  return functools.partial(KERNELS[platform][0], interpret=True)


@pytest.mark.parametrize("d", [40, 64])
def test_kernels_agree_with_the_definition(platform, d):
  assert nearest.disagreement(interpreted(platform), KERNELS[platform][1], d, 512, 512) is None


def test_a_wrong_kernel_is_found(platform):
  def last_of_equals(x, c, half, rows, tile):
    score, index = interpreted(platform)(x, c[::-1], half[::-1], rows, tile)
    return score, len(c) - 1 - index

  def rounded(x, c, half, rows, tile):
    score, index = interpreted(platform)(x, c, half, rows, tile)
    return score.astype(jnp.bfloat16).astype(jnp.float32), index

  dtype = KERNELS[platform][1]
  assert "its index is wrong for" in nearest.disagreement(last_of_equals, dtype, 64, 256, 256)
  assert "its least score is wrong" in nearest.disagreement(rounded, dtype, 64, 256, 256)


def test_a_flaw_leads_to_plain_xla_and_a_warning(monkeypatch, platform):
  monkeypatch.setattr(nearest, "flaw", lambda *a: "no such instruction")
  nearest._warn.cache_clear()
  x = jax.ShapeDtypeStruct((256, 64), KERNELS[platform][1])
  with pytest.warns(UserWarning, match=f"plain XLA, .* kernel for a {platform}: no such instruction"):
    search = nearest.chosen(platform, x, 256, (256, 256))
  assert search.func is nearest.plain


def test_what_has_a_kernel():
  half, bfloat = jnp.float16, jnp.bfloat16
  assert nearest.fits("gpu", half, 2048, 512, 100) and nearest.fits("gpu", bfloat, 2048, 512, 100)
  assert nearest.fits("tpu", bfloat, 2048, 512, 100) and not nearest.fits("tpu", half, 2048, 512, 100)
  assert not nearest.fits("gpu", jnp.float32, 2048, 512, 100) and not nearest.fits("cpu", bfloat, 2048, 512, 100)
  assert not nearest.fits("gpu", half, 2048, 2**21, 1024)  # addresses of 32 bits
  assert nearest.flaw("tpu", jnp.dtype(bfloat), 64) is None  # there is none here


def test_clusters_through_a_kernel_are_those_of_a_cpu(monkeypatch, platform):
  kernel, dtype = KERNELS[platform]
  rng = np.random.default_rng(0)
  source = rng.integers(-15, 16, (700, 24)).astype(np.float16)
  first = starting_at(source[:20].astype(np.float32))  # 20 centroids fill a small part of the kernel's block
  settings = Settings(20, 1, tolerance=0.0)
  wanted = fit(source, settings, (1, 2), hooks=first)
  traced = []

  def counted(*args, **options):
    traced.append(args[0].dtype)
    return kernel(*args, **options, interpret=True)

  for module in (lloyd, points):
    monkeypatch.setattr(module, "platform_of", lambda mesh: platform)
  monkeypatch.setattr(nearest, "_kernel", lambda platform: counted)
  monkeypatch.setattr(nearest, "flaw", lambda *a: None)
  lloyd.programs_for.cache_clear()
  try:
    found = fit(source, settings, (1, 2), points.mesh_of(2, 1, jax.devices()[:2]), 512, hooks=first)
  finally:
    lloyd.programs_for.cache_clear()
  assert traced == [dtype, dtype]  # accumulate and assign
  np.testing.assert_allclose(found.centroids, wanted.centroids, rtol=1e-5, atol=1e-6)
  assert found.report["inertia"] == pytest.approx(wanted.report["inertia"], rel=1e-6)
  assert (found.labels == wanted.labels).mean() > 0.98  # centroids are rounded to half precision


def test_accelerators_get_16_bits_of_rows_that_come_from_16_bits(platform):
  x = np.random.default_rng(0).normal(size=(9, 4))
  here, away = points.mesh_of(1, 1, jax.devices()[:1]), elsewhere((1, 1), platform)
  for dtype, unit in ((np.float16, True), (np.float16, False), (np.float32, True)):
    rows = embed.Rows((x.astype(dtype),), unit=unit)
    assert clustering.source_for(here, rows) is rows
    found = clustering.source_for(away, rows)
    assert found[2:5].dtype == found.dtype == dtype
    np.testing.assert_array_equal(found[2:5], rows[2:5].astype(dtype))


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8), (1, 1)], ids=str)
def test_passes_meet_their_kernel_on_every_mesh(platform, sizes):
  mesh = elsewhere(sizes, platform)
  programs = lloyd.programs_for(mesh, (256, 512), False)

  def array(*shape, dtype=jnp.float32, spec=WHOLE):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

  n, k, d = 512 * sizes[0], 512 * sizes[1], 64
  chunk = array(n, d, dtype=KERNELS[platform][1], spec=P("data")), array(n, spec=P("data")), array(k, d, spec=P("k"))
  counts = array(dtype=jnp.int32), array(dtype=jnp.int32)
  own = P("data", "k")
  sums = array(sizes[0], k, d, spec=own), array(sizes[0], k, dtype=jnp.int32, spec=own), array(sizes[0], k, spec=own)
  for program, args in ((programs.assign, (*chunk, *counts)), (programs.accumulate, (*sums, *chunk, *counts))):
    text = program.trace(*args).lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()
    assert len(re.findall(r"custom_call @(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)", text)) == 1
