"""Plans against numbers worked out by hand and figures of the real compilers, for Llama-3-8B."""

import dataclasses
import json
import pathlib
import time
import types

import pytest

from alma_jax import start
from alma_jax.engine import losses
from alma_jax.engine.choose import Decoding
from alma_jax.engine.optimizer import Optimizer
from alma_jax.engine.slots import bytes_of, shapes_for, token_bytes
from alma_jax.engine.train import Objective, kept_numbers, least_bytes
from alma_jax.errors import RunError
from alma_jax.llama.sharding import abstract_mesh
from alma_jax.plan import (
  ahead,
  estimate,
  estimate_reading,
  estimate_sampling,
  estimate_training,
  memory,
  recipes,
  shapes,
  table,
  topology,
)
from alma_jax.plan.assumptions import Given, assumptions, cpu_share
from alma_jax.plan.machine import Machine
from alma_jax.plan.work import Clustering, Reading, Sampling, Scoring, Training, steps
from alma_jax.recipes import alma
from alma_jax.runtime import metrics, training
from alma_jax.runtime.host import EngineOptions, ModelOptions
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.runtime.session import MeshOptions
from alma_jax.store import digests
from alma_jax.store.records import FORMAT
from alma_jax.tools import plan

LLAMA = shapes.SHAPES["llama3_8b"]
TINY = dataclasses.replace(LLAMA, vocab=10, width=8, depth=2, heads=4, kv_heads=2, head_dim=2, ffn=12)
ADAM = Optimizer(1e-5, 0.0)
FULL = Objective(None, "full", 0.0, "bfloat16")
PAPER = ["--config=configs/alma.py:8b", "--model=llama3_8b", "--quick"]


def machine(word, c=LLAMA, tensor=1, **given):
  engine = EngineOptions(tensor=tensor)
  return Machine(topology.parse(word), c, MeshOptions(), engine, ModelOptions(), assumptions(Given(**given)))


def sft(examples=64_000, batch=128, **changes):
  options = training.Options(batch=batch, epochs=2, row_length=2048, optimizer=ADAM, **changes)
  return Training("policy", examples, examples * 1000.0, 0.0, options, "policy", examples, 500.0)


def answers(rows=10_000, n=200.0, new=350.0, **how):
  decoding = Decoding(**dict(temperature=0.8, top_p=0.95, max_new_tokens=1024) | how)
  options = ManyOptions(decoding=decoding, max_prompt_tokens=1024, n=200)
  return Sampling("responses", rows, rows * new, 0.0, options, int(rows / n), 200.0, n)


# By hand


def test_the_arithmetic_of_a_small_model():
  # attention 8 * 2 * (2 * 4 + 2 * 2) = 192, feed-forward 3 * 8 * 12 = 288, two norms 16: 496 a layer
  assert TINY.parameters == 2 * 496 + 8 + 2 * 10 * 8 == 1160
  # 6 for every weight but the embedding's 80, and 6 * 2 layers * 4 heads * 2 numbers * n^2 for attention
  assert metrics.operations(TINY, [3]) == 6 * 1080 * 3 + 6 * 2 * 4 * 2 * 9
  m = machine("cpu", TINY)
  assert (m.layers, m.head, m.model_bytes) == (1000, 80, 4640)
  assert token_bytes(m.shape, None) == 2 * 2 * 2 * 2 * 4  # keys and values, layers, heads, numbers, fp32
  whole = abstract_mesh(1, data=1)
  assert least_bytes(TINY, whole, ADAM, FULL, 0) == 12 * 1160 + 4  # fp32 weights, two moments, a count of steps
  assert least_bytes(TINY, whole, ADAM, FULL, 6) - least_bytes(TINY, whole, ADAM, FULL, 0) == 2 * 6 * 8 * 2
  assert [kept_numbers(TINY, how) for how in ("full", "products", "none")] == [8, 56, 92]


def test_the_arithmetic_of_llama_3_8b():
  assert LLAMA.parameters == 8_030_261_248
  weights = LLAMA.parameters - 128_256 * 4096
  assert metrics.operations(LLAMA, [1]) == pytest.approx(6 * weights, rel=1e-4)  # 45.0 GFLOP a token
  assert token_bytes(machine("h100:8").shape, None) == 128 * 1024
  assert token_bytes(machine("h100:8").shape, abstract_mesh(8, data=-1, tensor=4)) == 32 * 1024
  for moments, each in {"float32": 12, "bfloat16": 8}.items():
    o = dataclasses.replace(ADAM, moments=moments)
    assert least_bytes(LLAMA, abstract_mesh(8, data=1, fsdp=-1), o, FULL, 0) == pytest.approx(
      each * LLAMA.parameters / 8, rel=1e-3
    )


@pytest.fixture
def equal_lengths(monkeypatch):
  """Every example has the mean length."""
  monkeypatch.setattr(estimate.shares, "LENGTHS", (0.0, ""))
  estimate_training._simulated.cache_clear()
  yield
  estimate_training._simulated.cache_clear()


def test_the_hours_of_a_training_by_hand(equal_lengths):
  step = estimate.estimate(machine("h100:8"), sft())
  # 128 examples of 500 tokens in rows of 512; 2 epochs are 1000 steps
  assert (step.shape, step.remat, steps(step.work)) == ((128, 512), "products", 1000)
  each = 6 * (LLAMA.parameters - 128_256 * 4096) * 500 + 6 * 32 * 4096 * 500**2
  seconds = each * (128 * 512 / 500) / (8 * 989e12 * 0.5)
  assert step.seconds == pytest.approx(seconds)
  assert step.hours == pytest.approx(1000 * seconds / 3600)
  full = estimate.estimate(machine("h100:8"), sft(remat="full"))
  assert full.seconds == pytest.approx(4 / 3 * seconds)
  # layers go forward and backward and their gradients back, embedding and head forward and back, all in bf16
  head = 128_256 * 4096
  assert step.collective == pytest.approx(2 * (3 * (LLAMA.parameters - 2 * head) + 2 * 2 * head) * 7 / 8)
  # without fit_rows: whole rows, four examples each, in multiples of 4 and of the devices
  assert estimate.estimate(machine("h100:8"), sft(fit_rows=False)).shape == (32, 2048)
  assert estimate.estimate(machine("h100:8"), sft(batch=36, fit_rows=False)).shape == (16, 2048)


def test_rows_and_groups_follow_the_data_as_in_a_run(equal_lengths):
  # 16 examples of 500 tokens over 64 chips: no way of 64 has half a row, so groups of 4 take one each
  step = estimate.estimate(machine("v6e:8x8"), sft(batch=16))
  assert (step.mesh, step.shape) == (MeshOptions(1, 16, 4), (16, 512))
  found = estimate_training.training(machine("v6e:8x8"), sft(batch=16), as_is=True)
  assert (found.mesh, found.shape) == (MeshOptions(1, 64, 1), (64, 512))
  assert found.seconds > 3 * step.seconds
  # long trainings have the shapes in common, whatever their number of steps
  found = estimate_training._simulated.cache_info().misses
  assert estimate.estimate(machine("v6e:8x8"), sft(examples=9_000, batch=16)).shape == (16, 512)
  assert estimate_training._simulated.cache_info().misses == found
  # two hosts of 8 GPUs: groups stay within one
  assert estimate.estimate(machine("h100:8x2"), sft(batch=1)).mesh.tensor == 8
  # passes divide the rows, too: 16 rows in 4 passes are for 4 ways
  divided = estimate.estimate(machine("h100:8"), sft(batch=16, passes=4))
  assert (divided.mesh, divided.shape) == (MeshOptions(1, 4, 2), (16, 512))


def test_slots_follow_the_requests_as_in_a_run():
  m, few = machine("h100:8"), dataclasses.replace(answers(rows=200, n=1.0), calls=16)
  # 13 requests a call over 8 replicas are two for each; the config's own number stands
  assert estimate.estimate(m, few).slots == 2
  fixed = dataclasses.replace(m, engine=EngineOptions(tensor=1, slots=64))
  assert estimate.estimate(fixed, few).slots == 64


def test_logits_go_through_memory_as_often_as_programs_say():
  greedy, plain = Decoding(max_new_tokens=8, temperature=0.0), Decoding(max_new_tokens=8)
  both = dataclasses.replace(plain, top_k=50, top_p=0.9)
  found = [estimate_sampling._passes(decoding, machine("h100:8")) for decoding in (greedy, plain, both)]
  assert found == [4.1, 4.1, pytest.approx(32.5)]  # compiled: 4.07, 4.09, 32.47
  assert estimate_sampling._passes(both, machine("v6e:2x4")) == 2  # a kernel
  many = dataclasses.replace(LLAMA, vocab=1_000_000)  # which no core's memory holds
  assert estimate_sampling._passes(both, machine("v6e:2x4", many)) == pytest.approx(39.9)  # compiled: 39.89


def test_texts_that_are_read_fill_the_calls_that_the_engine_makes_of_them():
  m = machine("h100:8")
  judged = Reading("judgments", 10**7, 3.5e9, 0.0, 1024, 50_000, 230.0, 1140)
  assert estimate_reading.filled(m, judged) == pytest.approx(0.89, abs=0.01)
  assert estimate_reading.filled(m, Reading("embeddings", 10**6, 2e8, 0.0, 2048)) == pytest.approx(0.88, abs=0.01)
  # A row for each of 13 prompts, and 8 replicas: two in a call of 32
  few = dataclasses.replace(judged, rows=13, tokens=13 * 350.0, prefixes=13)
  assert estimate_reading.filled(m, few) < 2 / 32


def test_the_hours_of_sampling_and_clustering_by_hand():
  m, work = machine("h100:8"), answers()
  step = estimate.estimate(m, work)
  decode = work.tokens / (step.slots * 8 * 0.9) * step.traffic / (3.35e12 * 0.6)
  weights = LLAMA.parameters - 2 * 128_256 * 4096
  prefill = 50 * 200 * (2 * weights + 2 * 32 * 4096 * 200) / (8 * 989e12 * 0.56)
  assert step.hours == pytest.approx((decode + prefill) / 3600)
  points = estimate.estimate(m, Clustering("clusters", 2**21, 0.0, 0.0, 2**16, 1024, 10))
  assert points.hours == pytest.approx(10 * 2 * 1024 * 2**21 * 2**16 / (8 * 989e12 * 0.56) / 3600)
  read = estimate.estimate(m, Reading("embeddings", 1000, 2e5, 0.0, 2048))
  assert read.flops == 2e5 * (2 * weights + 2 * 32 * 4096 * 200)


# From a run


def made(run, name, speed=(), **manifest):
  """A finished stage with this manifest and these lines of speed.jsonl."""
  stage, fields = run / name, {"fingerprint": {"format": FORMAT, "config.batch": 2}, "parts": [], "counts": {}}
  stage.mkdir(parents=True)
  (stage / "fingerprint.json").write_text(json.dumps({"format": FORMAT}))
  (stage / "manifest.json").write_text(json.dumps(digests.sealed(fields | manifest)))
  (stage / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in speed))


def test_lengths_and_rates_come_from_a_run(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"recipe": "alma", "trainset": {"method": "best_of_n"}}))
  counts = {"sft": {"kept": 96}, "judge": {"kept": 251}}
  made(tmp_path, "seeds", counts=counts)
  lines = [{"tokens": 20, "seconds": 9.0, "mfu": 0.01}, {"tokens": 10, "seconds": 1.0, "mfu": 0.3}] * 2
  made(tmp_path, "sft_1", lines, counts={"examples": 3})  # two epochs of two steps: 60 tokens in 6 examples
  made(tmp_path, "pool/drafts", counts={"draws": 100})
  made(tmp_path, "pool/prompts", rows=60)
  made(tmp_path, "round_02/prompts", rows=7)
  made(tmp_path, "round_02/responses", counts={"samples": 10, "tokens": 40}, parts=[{"size": 500}, {"size": 100}])
  found = assumptions(Given(demonstrations=5), tmp_path)
  assert (found.response, found.example, found.prompt, found.response_bytes) == (4, 10, 6, 60)
  assert (found.demonstrations, found.annotations, found.usable, found.mfu) == (5, 251, 0.6, 0.3)
  assert found.where["demonstrations"] == "given" and found.where["response"] == f"measured in {tmp_path}"
  assert f"0.30 of the peak in training, useful arithmetic alone (measured in {tmp_path})" in found.lines()
  step = estimate.estimate(dataclasses.replace(machine("h100:8"), assumptions=found), sft(remat="full"))
  assert step.seconds == pytest.approx(128 * metrics.operations(LLAMA, [500]) / (8 * 989e12 * 0.3))
  assert cpu_share(tmp_path, TINY, 1e6) == pytest.approx(metrics.operations(TINY, [1]) * 10 / 1e6)
  (tmp_path / "round_02/responses/manifest.json").write_text("{}")
  with pytest.raises(RunError, match="round_02/responses"):
    assumptions(Given(), tmp_path)


# What the compilers said (jax 0.10.2, libtpu 0.0.42.1, the CUDA plugin's compiler), in GiB on each device

COMPILED = [
  ("v6e:2x4", 32, "full", 40, 2048, 21.21),
  ("v6e:2x4", 32, "full", 16, 2048, 18.81),
  ("v6e:2x4", 32, "full", 32, 4096, 24.39),
  ("v6e:2x4", 32, "products", 40, 2048, 44.3),
  ("v6e:2x4", 4, "none", 8, 2560, 9.79),
  ("v6e:2x4", 4, "none", 16, 8192, 25.81),
  ("v5e:4x4", 32, "full", 48, 2048, 13.03),
  ("v5e:4x4", 32, "products", 48, 2048, 27.3),
  ("v5e:8x8", 32, "full", 64, 2048, 6.08),
  ("v5p:2x2x2", 32, "products", 40, 2048, 51.5),
  ("v5p:2x2x2", 32, "none", 40, 2048, 105.3),
  ("h100:8", 8, "full", 16, 2048, 10.95),
  ("h100:8", 8, "full", 32, 4096, 14.37),
  ("h100:8", 8, "none", 16, 2048, 20.90),
  ("h100:8", 4, "none", 8, 2560, 10.83),
  ("h100:8", 4, "none", 16, 8192, 32.76),
  ("h100:1", 4, "none", 10, 2048, 56.84),
  ("h100:1", 4, "full", 32, 4096, 64.14),
]


@pytest.mark.parametrize("word, depth, remat, rows, width, gib", COMPILED)
def test_training_takes_what_the_compilers_say(word, depth, remat, rows, width, gib):
  where, c = topology.parse(word), dataclasses.replace(LLAMA, depth=depth)
  kind = losses.Preference("dpo") if width >= 4096 else None
  mesh, objective = abstract_mesh(where.devices, data=1, fsdp=-1), dataclasses.replace(FULL, remat=remat, kind=kind)
  found = memory.training_bytes(c, mesh, where.chip.platform, ADAM, objective, rows * width, 1)
  assert found / 2**30 == pytest.approx(gib, rel=0.15)
  if "v5p" not in word:  # there it is the sum of arguments and temporaries, and not the peak
    assert found / 2**30 == pytest.approx(gib, rel=0.07)


@pytest.mark.parametrize("mesh, gib", [(dict(fsdp=64), 24.8), (dict(fsdp=8, tensor=8), 38.7)])
def test_training_in_tensor_groups_takes_what_the_compilers_say(mesh, gib):
  # Llama-3-70B on v5p:4x4x4, 64 rows: tensor groups divide heads and feed-forward numbers, not the stream
  c = shapes.SHAPES["llama3_70b"]
  found = memory.training_bytes(c, abstract_mesh(64, data=1, **mesh), "tpu", ADAM, FULL, 64 * 2048, 1)
  assert found / 2**30 == pytest.approx(gib, rel=0.07)


def test_one_gpu_holds_a_whole_copy_and_its_gradients():
  # 19 layers in 8 rows of 2,048, moments in bf16: 27.8 GB beside the state (jax 0.11.2); pairs: 29.9
  c, o = dataclasses.replace(LLAMA, depth=19), dataclasses.replace(ADAM, moments="bfloat16")
  one = abstract_mesh(1, data=1)
  for kind, gb in (None, 27.8), (losses.Preference("dpo"), 29.9):
    objective = dataclasses.replace(FULL, kind=kind)
    found = memory.training_bytes(c, one, "gpu", o, objective, 8 * 2048, 1) - least_bytes(c, one, o, objective, 0)
    assert found / 1e9 == pytest.approx(gb, rel=0.07)


@pytest.mark.parametrize(
  "word, work, gib",
  [
    ("v6e:2x4", Reading("judgments", 10**6, 3e8, 0.0, 1024, 10**4, 500.0, 1140), 13.96),
    ("v6e:2x4", Reading("eval.judge", 200, 6e4, 0.0, 1024, 200, 500.0, 2164), 17.10),
    ("h100:8", Reading("eval.judge", 200, 6e4, 0.0, 1024, 200, 500.0, 2164), 17.19),
    ("v6e:2x4", Reading("embeddings", 10**6, 2e8, 0.0, 2048), 14.33 + 0.98),
    ("h100:8", Reading("embeddings", 10**6, 2e8, 0.0, 2048), 14.41 + 0.98),
  ],
)
def test_reading_takes_what_the_compilers_say(word, work, gib):
  # The head, 0.98 GiB, is no part of the embeddings' program, and lies beside it.
  step = estimate.estimate(machine(word, dataclasses.replace(LLAMA, depth=4)), work)
  assert step.peak / 2**30 == pytest.approx(gib, rel=0.05)


def test_long_prefixes_are_read_by_fewer_rows_where_memory_is_short():
  m, work = machine("v6e:2x4"), Reading("eval.judge", 200, 6e4, 0.0, 1024, 200, 500.0, 2164)
  rows = {word: estimate_reading.rows_of_calls(machine(word), work) for word in ("v6e:2x4", "h100:8", "cpu")}
  assert rows == {"v6e:2x4": 16, "h100:8": 32, "cpu": 32}
  assert estimate.estimate(m, work).fits
  shared = dataclasses.replace(work, rows=64 * 200)  # four rows share a prefix's copy: so many are left
  assert estimate_reading.rows_of_calls(machine("v5e:2x2"), shared) == 4


@pytest.mark.parametrize(
  "word, depth, gib", [("v6e:2x4", 4, 9.05), ("v6e:2x4", 8, 15.43), ("h100:8", 4, 9.11), ("h100:8", 8, 15.48)]
)
def test_the_slots_of_sampling_take_at_least_what_the_compilers_say(word, depth, gib):
  # The largest of its programs: on TPUs that is the prefill.
  m = machine(word, dataclasses.replace(LLAMA, depth=depth))
  decoding, shapes = answers().options.decoding, shapes_for(256, 1024, 200)
  found = m.model_bytes + bytes_of(m.shape, decoding, shapes, None, m.platform)
  assert gib <= found / 2**30 <= 1.08 * gib


@pytest.mark.parametrize("depth, gb", [(4, 5.46), (8, 9.60)])
def test_a_decode_step_moves_what_the_compilers_say(depth, gb):
  # `traffic.moved` of the compiled program, with 350 live keys in a slot and 200 in a prompt's row.
  m = machine("v6e:2x4", dataclasses.replace(LLAMA, depth=depth))
  found = estimate_sampling.decoding_bytes(m, answers(), shapes_for(256, 1024, 200), 350.0)
  assert found / 1e9 == pytest.approx(gb, rel=0.05)


# More of anything


@pytest.mark.parametrize(
  "word, remat, rows, width, gb", [("v6e:2x4", "products", 8, 2560, 50.8), ("h100:8", "none", 8, 2560, 40.4)]
)
def test_a_step_sends_what_the_compilers_say(word, remat, rows, width, gb):
  found = estimate_training._exchanged(machine(word), abstract_mesh(8, data=1, fsdp=-1), rows * width, 1, remat)
  assert found / 1e9 == pytest.approx(gb, rel=0.02)


def test_a_tensor_group_sends_and_waits_for_what_the_compilers_say():
  # Llama-3-8B on two chips of v5e: 8 prompts of 1,024 tokens, and a step of 72 slots; Llama-3-70B on four chips of v5p,
  # and on four GPUs, which gather the logits
  pair, large = machine("v5e:4x4", tensor=2), shapes.SHAPES["llama3_70b"]
  assert estimate_sampling.shared(pair, 8 * 1024) == pytest.approx(4.362e9, rel=0.01)
  assert estimate_sampling.shared(pair, 72, logits=True) == pytest.approx(0.8425e9 / 16, rel=0.1)
  assert estimate_sampling.shared(machine("v5p:4x4x4", large, 4), 512, logits=True) == pytest.approx(
    33.43e9 / 16, rel=0.03
  )
  assert estimate_sampling.shared(machine("h100:8x8", large, 4), 400, logits=True) == pytest.approx(
    28.40e9 / 16, rel=0.03
  )
  # By hand: a chip of v5e has four links, of which a pair uses one and a ring two
  assert pair.topology.link_in_groups(2) == 50e9 and pair.topology.link_in_groups(4) == 100e9
  assert machine("v5p:4x4x4").topology.link_in_groups(4) == 200e9
  assert machine("h100:8x8").topology.link_in_groups(4) == 450e9
  step = estimate.estimate(pair, answers())
  assert step.collective == estimate_sampling.shared(pair, step.slots, logits=True)
  alone = step.traffic / (819e9 * 0.6)
  assert step.seconds == pytest.approx(alone + step.collective / (50e9 * 0.7))
  assert estimate.estimate(machine("v5e:4x4", tensor=1), answers(rows=10)).collective == 0


def test_more_work_takes_more_and_more_devices_take_less():
  m = machine("h100:8")
  assert estimate.estimate(m, sft(128_000)).hours == pytest.approx(2 * estimate.estimate(m, sft()).hours)
  assert estimate.estimate(m, sft(batch=256, remat="full")).peak > estimate.estimate(m, sft(remat="full")).peak
  longer = [estimate.estimate(m, answers(new=new)).hours for new in (100.0, 350.0, 1000.0)]
  assert longer == sorted(longer) and longer[0] < longer[-1]
  for work in (sft(remat="full"), answers(), Reading("embeddings", 10**6, 2e8, 0.0, 2048)):
    few, many = (estimate.estimate(machine(word), work) for word in ("h100:8", "h100:8x4"))
    assert many.hours < few.hours and few.flops == many.flops
    assert many.peak <= few.peak
  peaks = [estimate.estimate(m, sft(remat=remat)).peak for remat in ("none", "products", "full")]
  assert peaks == sorted(peaks, reverse=True)
  passes = [estimate.estimate(m, sft(remat="full", passes=n)) for n in (2, 4)]
  assert passes[1].peak < passes[0].peak and passes[1].collective > passes[0].collective


# What does not fit


def test_what_does_not_fit_says_what_would():
  v5e = machine("v5e:2x2")
  assert estimate.estimate(v5e, sft()).helps == "--topology=v5e:4x4"
  assert estimate.estimate(v5e, answers()).helps == "config.engine.tensor=2"
  tight = estimate.estimate(machine("h100:8"), sft(batch=3800))
  assert tight.fits and (tight.remat, tight.passes) == ("full", 2)
  assert tight.peak == estimate.estimate(machine("h100:8"), sft(batch=3800, passes=2)).peak
  full = estimate.estimate(machine("h100:8"), sft(batch=3800, remat="full"))
  assert not full.fits and (full.passes, full.helps) == (1, "config.policy.remat='auto'")
  one = estimate.estimate(machine("h100:8"), sft(batch=256, remat="none"))
  assert not one.fits and one.helps == "config.policy.remat='auto'"
  # a host of v5p has four chips
  wide = estimate.estimate(machine("v5p:4x4x4", tensor=8), answers())
  assert not wide.fits and wide.helps.startswith("engine.tensor is 8 and a host of v5p:4x4x4 has 4 devices")


def test_a_mesh_that_the_topology_has_not_is_what_does_not_fit():
  m = dataclasses.replace(machine("h100:8"), mesh=MeshOptions(tensor=3))
  step = estimate.estimate(m, sft())
  assert not step.fits and "does not fit 8 devices" in step.helps
  assert step.helps.endswith("; config.mesh.fsdp=-1, the others 1")
  read = Reading("judgments", 10**6, 3e8, 0.0, 1024, 10**4, 500.0, 2400)
  step = estimate.estimate(machine("v5e:2x2"), read)  # the model alone takes more than there is
  assert not step.fits and step.helps == "config.engine.tensor=2"


def test_topologies():
  hosts = {"v5e:4x4": "v5e:2x2", "v6e:2x4": "v6e:2x4", "v5p:4x4x4": "v5p:2x2x1", "h100:8x8": "h100:8", "cpu": "cpu"}
  assert {word: topology.parse(word).host.name for word in hosts} == hosts
  found = topology.parse("h100:8x2")
  assert (found.devices, found.hosts, found.local, found.link) == (16, 2, 8, 400e9)
  assert [(t.devices, t.hosts) for t in map(topology.parse, ("v6e:2x4", "v6e:8x8", "v5p:4x4x4"))] == [
    (8, 1), (64, 16), (64, 16),
  ]  # fmt: skip
  assert next(topology.larger(found)).name == "h100:8x4"
  cpu = topology.parse("cpu")
  assert cpu.devices == 1 and not list(topology.larger(cpu))
  small = dataclasses.replace(cpu, chip=dataclasses.replace(cpu.chip, memory=2**30))
  step = estimate.estimate(dataclasses.replace(machine("cpu"), topology=small), answers())
  assert step.slots == 64 and not step.fits and step.helps.startswith("--topology=v")
  for wrong in ("v7:2x2", "h100", "h100:16", "v5p:4x4", "v6e:2x2x2", "v6e:0x2"):
    with pytest.raises(topology.TopologyError, match=f"--topology={wrong}"):
      topology.parse(wrong)


# The command


def test_the_papers_run_on_eight_gpus(tmp_path, capsys):
  path = tmp_path / "plan.json"
  assert plan.main([*PAPER, "--topology=h100:8", f"--json={path}", "--price=2"]) == 0
  found, said = json.loads(path.read_text()), capsys.readouterr().out
  assert list(found) == ["topology", "hbm_gib", "stages", "device_hours", "disk_gb"]
  keys = ["stage", "fits", "peak_gib", "remat", "passes", "slots", "step_seconds", "hours", "disk_gb"]
  assert all(list(stage) == keys and stage["fits"] for stage in found["stages"])
  assert (found["topology"], found["hbm_gib"]) == ("h100:8", 79.0)
  names = [stage["stage"] for stage in found["stages"]]
  assert len(names) == len(set(names)) and {"sft_1", "pool/drafts", "round_11/policy", "round_02/eval.judge"} <= set(
    names
  )
  hours = sum(stage["hours"] for stage in found["stages"])
  assert found["device_hours"] == pytest.approx(8 * hours, rel=1e-4)
  assert found["device_hours"] <= 1500
  assert f"{2 * found['device_hours']:,.0f} USD" in said
  assert "A quick plan" in said and "everything fits on h100:8" in said and "200 tokens of a prompt (assumed)" in said


def test_the_docs_hold_what_the_command_prints():
  text = (pathlib.Path(__file__).parents[1] / "docs" / "speed.md").read_text()
  found = [plan.made(plan.FLAGS.values([*PAPER, f"--topology={word}"])) for word in ("h100:8", "v5p:4x4x4")]
  assert f"| in all | {found[0].device_hours:,.0f} | {found[1].device_hours:,.0f} |" in text
  for row, kind in {"responses, 100 million": "responses", "judgments": "judgments"}.items():
    hours = [hours_of(p, kind) for p in found]
    assert f"| {row} | {hours[0]:,.0f} | {hours[1]:,.0f} |" in text


def hours_of(made, kind):
  """The device-hours of a kind of stage in the feedback rounds."""
  steps = [s for s in made.steps if s.work.stage.endswith(f"/{kind}") and not s.work.stage.startswith("round_01")]
  return sum(s.hours for s in steps) * made.machine.topology.devices


def test_a_plan_that_does_not_fit(tmp_path, capsys):
  path = tmp_path / "plan.json"
  wanted = ["--topology=v5e:4x4", "--stages=responses,policy", f"--json={path}", "--config.responses.n=64"]
  assert plan.main([*PAPER, *wanted, "--config.engine.tensor=1"]) == plan.TOO_LARGE == 3
  said = capsys.readouterr().out
  assert "A quick plan" in said and "Nothing was compiled" in said
  assert "does not fit: round_01/responses, rounds 2..11 responses" in said and "config.engine.tensor=2" in said
  stages = {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}
  assert stages["round_02/policy"]["fits"] and stages["round_02/policy"]["remat"] == "full"
  assert not stages["round_02/responses"]["fits"] and stages["round_02/responses"]["hours"] is None


def test_a_run_says_at_its_start_what_it_will_take(monkeypatch, tmp_path):
  device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", process_index=0)
  monkeypatch.setattr(ahead.jax, "devices", lambda: [device] * 8)
  config = plan._config("configs/alma.py:8b", ())
  config.data.sft = config.data.judge = "not_given.jsonl"
  by_round = start.checked_options(config)
  s = types.SimpleNamespace(
    options=by_round[0], by_round=by_round, config=config, run=types.SimpleNamespace(dir=tmp_path),
    host=types.SimpleNamespace(trained_config=LLAMA),
  )  # fmt: skip
  monkeypatch.setattr(ahead, "free_bytes", lambda path: 10**15)
  began = time.process_time()
  (said,) = ahead.lines(s)
  took = time.process_time() - began
  found = plan.made(plan.FLAGS.values([*PAPER, "--topology=h100:8"]))
  assert f"8 x H100: {found.hours:,.3g} hours, {found.device_hours:,.4g} device-hours" in said and took < 3
  monkeypatch.setattr(ahead, "free_bytes", lambda path: 10**9)
  assert list(ahead.lines(s))[1].startswith(f"{tmp_path}: the run takes up to {found.disk / 1e9:,.3g} GB, and 1 GB are")
  device.device_kind = "cpu"
  assert not list(ahead.lines(s))


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--config=configs/lima.py:mini", "--config.recipe=limo"], "did you mean 'lima'?"),
    (["--config=configs/lima.py:8b"], "configs/lima.py has no size '8b'; there are mini, 7b, 65b"),
    (["--config=configs/spa.py:7b", "--model=mistral_7b", "--config.responses.n=1"], "it must be at least 2"),
    (["--config=configs/alma.py:8b"], "give --model, which may be llama3_8b"),
    (["--config=configs/alma.py:8b", "--model=gpt2"], "no shape has this name"),
    ([*PAPER, "--stages=polcy"], "did you mean 'policy'?"),
    ([*PAPER, "--config.responses.nn=2"], "did you mean 'responses.n'?"),
    ([*PAPER, "--run=/nowhere"], "is no run directory"),
  ],
)
def test_mistakes_are_one_line(flags, says, capsys):
  assert plan.main([*flags, "--topology=h100:8"]) == 1
  said = capsys.readouterr().err
  assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_planned_stages_are_stages_of_the_recipe():
  config = plan._config("configs/alma.py:mini", ["--config.rounds={4: {'prompts': {'draws': 4096}}}"])
  by_round = start.checked_options(config)
  found = list(recipes.works(by_round, assumptions(Given(), None, recipes.defaults(by_round)), 96))
  sizes, made = alma.stages(by_round), {task.stage for task in found}
  assert made <= sizes.keys()
  # What is left out takes no device: the checks of data and judge, draws, evaluators of other kinds
  left = {name.rpartition("/")[2] for name in sizes.keys() - made}
  assert left == {"seeds", "judge_quality", "prompts", "clusters", "eval.truth"}
  assert sum(task.rows for task in found if task.stage.endswith("/drafts")) == 4096
  assert next(task.dims for task in found if isinstance(task, Clustering)) == 96  # no more than the model's width
  rows = {task.stage: task.rows for task in found}
  assert rows["round_02/responses"] == rows["round_02/judgments"] == 24 * 24
  assert rows["round_02/policy"] == 5000 + 24 and rows["round_05/policy"] == 5000 + 4 * 24


def works_of(file, *overrides):
  config = plan._config(file, overrides)
  plan._stand_ins(config, overrides)
  by_round = start.checked_options(config)
  a = assumptions(Given(), None, recipes.defaults(by_round))
  return start.recipe_of(config).stages(by_round), {w.stage: w for w in recipes.works(by_round, a, 96)}


# A recipe's stages that take no device, and what is planned beside those that it lists
@pytest.mark.parametrize(
  "file, left, beside",
  [
    ("configs/lima.py:mini", {"seeds", "choice", "eval.truth", "eval.judge"}, {"eval-test"}),
    ("configs/isara.py:mini", {"seeds", "prompts", "trainset", "eval.truth", "categories.truth"}, set()),
    (
      "configs/spa.py:mini",
      {"seeds", "prompts", "trainset", "eval.truth", "gold"},
      {"reference_sft_1", "reference_round_01_policy", "reference_round_02_policy"},
    ),
  ],
)
def test_planned_stages_are_those_of_every_recipe(file, left, beside):
  stages, made = works_of(file)
  assert {name.rpartition("/")[2] for name in stages.keys() - made.keys()} == left
  assert {name.rpartition("/")[2] for name in made.keys() - stages.keys()} == beside


def test_lima_keeps_its_epochs_and_chooses_by_what_they_write():
  _, made = works_of("configs/lima.py:mini")
  step = estimate.estimate(machine("h100:1", TINY), made["sft_1"])
  assert steps(made["sft_1"]) == 15 * 63 and step.disk == 2 * TINY.parameters * (1 + 10)  # epochs 5 .. 14, and the last
  assert made["round_05/eval"].rows == 96 and isinstance(made["round_05/loss"], Scoring)
  assert steps(made["round_05/loss"]) == 1 and made["round_10/eval-test"].rows == 50
  # its own judge is trained, and grades
  _, own = works_of("configs/lima.py:mini", "--config.choice.judge=own")
  graded = {"round_10/eval-test.judge", *(f"round_{i:02d}/eval.judge" for i in range(5, 11))}
  assert own.keys() - made.keys() == {"judge", *graded}


def test_isara_asks_after_shots_and_learns_from_all_pairs():
  _, made = works_of("configs/isara.py:7b")
  assert [made[f"round_0{i}/policy"].examples for i in (2, 3)] == [64 + 512, 64 + 2 * 512]
  assert made["round_02/drafts"].prompt_tokens == 5 * 200
  assert made["round_02/responses"].prompt_tokens == 1536 < 200 + 5 * 500  # as many shots as find room
  assert made["round_03/neighbours"].rows == 512 + 64 + 512 and made["round_03/neighbours"].longest == 256 + 32
  _, other = works_of("configs/isara.py:7b", "--config.neighbours.method=random")
  assert made.keys() - other.keys() == {f"round_0{i}/neighbours" for i in range(2, 8)}


def test_spa_judges_with_two_models_and_trains_beside_one():
  _, made = works_of("configs/spa.py:7b", "--config.sft_model=zephyr")
  assert "sft_1" not in made and made["round_01/policy"].examples == 2000 - 200
  judged, people = made["round_02/judgments"], made["round_02/agreement"]
  assert (judged.rows, judged.prefixes, judged.models, judged.logprobs) == (16_000, 8000, 2, True)
  assert people.rows == 2 * 200 and made["round_03/responses"].rows == 40_000
  # both sides of every pair, under the policy before
  assert made["round_03/reference_round_02_policy"].examples == 2 * 20_000
  m, work = machine("h100:8"), made["round_02/policy"]
  mixed = estimate.estimate(m, work)
  alone = estimate.estimate(
    m, estimate_training.with_options(work, preference=dataclasses.replace(work.options.preference, mix=0.0))
  )
  assert mixed.remat == alone.remat == "none" and mixed.seconds == pytest.approx(4 / 3 * alone.seconds)
  # every layer, the embedding and the head once more
  assert mixed.collective - alone.collective == pytest.approx(2 * LLAMA.parameters * 7 / 8)
  once = estimate.estimate(m, dataclasses.replace(judged, models=1))
  assert estimate.estimate(m, judged).hours == pytest.approx(2 * once.hours)
  # no pairs of people: nothing to measure the judgement on
  _, none = works_of("configs/spa.py:7b", "--config.data.preferences=", "--config.sft_model=x")
  assert not {"round_01/policy", "round_02/agreement"} & none.keys() and "round_02/reference_sft_1" in none


def test_a_reference_is_scored_once_for_each_trainset():
  _, made = works_of("configs/alma.py:mini", "--config.trainset.method=dpo", "--config.feedback_rounds=3")
  assert {name for name in made if "reference" in name} == {f"round_0{i}/reference_sft_1" for i in (2, 3, 4)}
  assert made["round_04/reference_sft_1"].examples == 2 * 24 and made["round_04/policy"].examples == 3 * 24


def test_json_and_table_of_all_methods():
  options = plan.FLAGS.values([*PAPER, "--topology=v5p:4x4x4"])
  for method, more in {"dpo": [], "grpo": ["--config.responses.checkpoints=('latest',)"], "random": []}.items():
    found = plan.made(options, [f"--config.trainset.method={method}", *more])
    assert len(table.as_json(found)["stages"]) == len(found.steps) and list(table.lines(found))
    assert not found.missing
  odd = [
    "--config.judge.template=a2_reasoned",
    "--config.judge.distil.prompts=0",
    "--config.eval.judges=('rules:length',)",
  ]
  assert plan.made(options, odd).missing == [
    "the reasonings of the judge's template 'a2_reasoned'", "config.eval.judges: rules:length",
  ]  # fmt: skip
