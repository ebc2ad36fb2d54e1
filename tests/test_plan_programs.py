"""The plan's programs: what their text says they send, and, where libtpu is, the real compiler's figures for v6e:2x4.

Everything is compiled once, at low effort, for a model of two layers; the tests look at the same programs.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alma_jax.engine import losses, train
from alma_jax.engine.choose import Decoding
from alma_jax.engine.optimizer import Optimizer
from alma_jax.llama import attention_nvidia, sharding
from alma_jax.llama.attention_reference import few_runs, packed_workspace
from alma_jax.plan import (
  compiled,
  devices,
  estimate,
  estimate_sampling,
  hlo,
  meshes,
  programs,
  shapes,
  table,
  topology,
  traffic,
)
from alma_jax.plan.assumptions import Given, assumptions
from alma_jax.plan.machine import Machine
from alma_jax.plan.work import Clustering, Reading, Sampling, Training
from alma_jax.runtime import host, training
from alma_jax.runtime.host import EngineOptions, ModelOptions
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.runtime.session import MeshOptions
from benchmarks import compiled as matrix
from tests.compiled_programs import trains_well

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'alma_jax[plan]'")

SMALL = dataclasses.replace(
  shapes.SHAPES["llama3_8b"], depth=2, width=1024, heads=8, kv_heads=8, ffn=2048, vocab=16_384
)


@pytest.fixture(scope="module", autouse=True)
def narrow_tiles():
  """SMALL is a quarter as wide as Llama-3-8B, and eight devices have shares of 128 numbers, so no mesh changes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "LANES", 64)
    yield


TRAINED = dict(batch=16, epochs=1, row_length=512, optimizer=Optimizer(1e-5, 0.0), remat="full")


def trained(name, options, **more):
  return Training(name, 16, 8000.0, 0.0, options, name, 16, 400.0, **more)


DECODING = Decoding(temperature=0.8, top_p=0.95, max_new_tokens=128)
WORKS = [
  trained("sft", training.Options(**TRAINED)),
  trained("dpo", training.PreferenceOptions(**TRAINED, preference=losses.Preference("dpo")), sides=2, forward=1),
  trained("grpo", training.GrpoOptions(**TRAINED, grpo=losses.Grpo()), forward=2),
  Sampling("responses", 3200, 3.2e5, 0.0, ManyOptions(decoding=DECODING, max_prompt_tokens=256, n=32), 100, 200.0, 32),
  Reading("judgments", 3200, 3.2e5, 0.0, 128, 100, 300.0, 256),
  Reading("embeddings", 3200, 3.2e5, 0.0, 256),
  Clustering("clusters", 2**20, 0.0, 0.0, 2**13, 256, 10.0),
]


def machine(word, c=SMALL, **engine):
  how = EngineOptions(**dict(slots=32, rows=16) | engine)
  return Machine(topology.parse(word), c, MeshOptions(), how, ModelOptions(), assumptions(Given()))


# What a text says


LOOPS = """HloModule step

%inner_cond (p: (f32[8], u32[])) -> pred[] {
  %p = (f32[8]{0}, u32[]) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = u32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%inner_body (p.1: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p.1 = (f32[8]{0}, u32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p.1), index=0
  %count.1 = u32[] get-tuple-element(%p.1), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%count.1, %two)
  %start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[8]{0} collective-permute-done(%start)
  %kernel = f32[8]{0} custom-call(%done), backend_config={"body":"
}
"}
  ROOT %out = (f32[8]{0}, u32[]) tuple(%done, %next)
}

%all-reduce-scatter (input: bf16[16,4]) -> bf16[4,4] {
  %input = bf16[16,4]{1,0} parameter(0)
  ROOT %sum = bf16[16,4]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
}

%outer_body (q: (f32[8], u32[])) -> (f32[8], u32[]) {
  %q = (f32[8]{0}, u32[]) parameter(0)
  %whole = bf16[64,4]{1,0} all-gather(%q), replica_groups=mesh['x'=1,'y'=4], device_ids=([4]) {'y'}, dimensions={0}
  ROOT %w = (f32[8]{0}, u32[]) while(%q), condition=%inner_cond, body=%inner_body
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %layers = (f32[8]{0}, u32[]) while(%a), condition=%c, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %shares = bf16[4,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  ROOT %all = (f32[8]{0}, f32[]) all-reduce(%a, %b), replica_groups=[2,2]<=[4], to_apply=%add
}
"""


def test_collectives_are_counted_as_often_as_loops_run():
  found = {(c.kind, c.shape): (c.times, c.bytes) for c in hlo.collectives(LOOPS)}
  assert found == {
    ("collective-permute", "f32[8]"): (12, 12 * 32),  # 3 x (0, 2, 4, 6)
    ("all-gather", "bf16[64,4]"): (3, 3 * 512 * 3 / 4),
    ("reduce-scatter", "bf16[16,4]"): (1, 128 * 3 / 4),
    ("all-reduce", "f32[8]"): (1, 2 * 36 / 2),
  }
  assert hlo.sent(hlo.collectives(LOOPS)) == 12 * 32 + 3 * 384 + 96 + 36
  assert hlo.summary(hlo.collectives(LOOPS)).startswith("3 x all-gather 1.15e-06 GB, 12 x collective-permute")
  assert hlo.loops(LOOPS) == {"outer_body": 3, "inner_body": 12}
  assert sum("collective-permute-start" in line for line in hlo.lines_in_loops(LOOPS)) == 1


STEP = """HloModule decode

%table (a: f32[64,8], b: s32[4]) -> f32[4,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = s32[4]{0} parameter(1)
  ROOT %rows = f32[4,8]{1,0} gather(%a, %b), offset_dims={1}
}

%put (c: bf16[4,256,2,128], d: s32[4], e: bf16[4,2,128]) -> bf16[4,256,2,128] {
  %c = bf16[4,256,2,128]{3,2,1,0} parameter(0)
  %d = s32[4]{0} parameter(1)
  %e = bf16[4,2,128]{2,1,0} parameter(2)
  ROOT %s = bf16[4,256,2,128]{3,2,1,0} scatter(%c, %d, %e), to_apply=%set
}

%often (x.1: f32[100]) -> f32[100] {
  %x.1 = f32[100]{0} parameter(0)
  ROOT %y.1 = f32[100]{0} negate(%x.1)
}

%rare (x.2: f32[100]) -> f32[100] {
  %x.2 = f32[100]{0} parameter(0)
  %y.2 = f32[100]{0} negate(%x.2)
  ROOT %z.2 = f32[100]{0} negate(%y.2)
}

%step (p: (bf16[4,256,2,128], f32[64,8], s32[4], bf16[4,2,128], f32[100])) -> (bf16[4,256,2,128]) {
  %p = (bf16[4,256,2,128]{3,2,1,0}, f32[64,8]{1,0}, s32[4]{0}, bf16[4,2,128]{2,1,0}, f32[100]{0}) parameter(0)
  %cache = bf16[4,256,2,128]{3,2,1,0} get-tuple-element(%p), index=0
  %embed = f32[64,8]{1,0} get-tuple-element(%p), index=1
  %at = s32[4]{0} get-tuple-element(%p), index=2
  %new = bf16[4,2,128]{2,1,0} get-tuple-element(%p), index=3
  %z = f32[100]{0} get-tuple-element(%p), index=4
  %looked.up = f32[4,8]{1,0} fusion(%embed, %at), kind=kCustom, calls=%table
  %written = bf16[4,256,2,128]{3,2,1,0} fusion(%cache, %at, %new), kind=kCustom, calls=%put
  %flat = bf16[4,512,128]{2,1,0} bitcast(%written)
  %on.chip = f32[100]{0:T(128)S(1)} copy(%z)
  %branch = f32[100]{0} conditional(%z, %z, %z), branch_computations={%often, %rare}
  %few = (bf16[4,1,2,128]{3,2,1,0}, f32[4,1,2]{2,1,0}) custom-call(%at, %new, %flat, %flat), metadata={op_name="attention_over_few_2/pallas_call"}
  ROOT %out = (bf16[4,256,2,128]{3,2,1,0}) tuple(%written)
}

ENTRY %main (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  ROOT %loop = f32[8]{0} while(%a.1), condition=%c.1, body=%step, backend_config={"known_trip_count":{"n":"16"}}
}
"""  # noqa: E501


def test_what_a_step_of_a_loop_moves():
  looked_up = 2 * 4 * 8 * 4 + 16  # four rows are read and written, and where they stand
  written = 2 * 4 * 2 * 128 * 2 + 16 + 4 * 2 * 128 * 2  # places read and written, where, and what
  few = 16 + 2 * 2048 + 4 * 2 * 4  # lengths; queries and results; log-sum-exps
  keys = 2 * 4 * 2 * 128 * 2  # of a token in all rows
  rest = looked_up + written + 400 + 800 + few  # the copy to the chip is read only; the branch that moves least
  assert traffic.moved(STEP, {1: 0}) == rest + keys * 128  # half a block: min(256, 512) keys are one
  assert traffic.moved(STEP, {1: 100}) == rest + keys * 228
  assert traffic.moved(STEP, {1: 200}) == rest + keys * 256
  assert traffic.moved("ENTRY %main (a: f32[8]) -> f32[8] {\n}\n", {}) == 0


def test_a_program_on_the_devices_that_are_here():
  mesh = sharding.make_mesh(fsdp=8, data=1)
  place = jax.NamedSharding(mesh, jax.P("fsdp"))
  x = jax.ShapeDtypeStruct((64, 8), jax.numpy.float32, sharding=place)
  step = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: y * x.sum(), x), out_shardings=place).lower(x).compile()
  (found,) = hlo.collectives(step.as_text())
  assert (found.kind, found.shape, found.bytes / found.times) == ("all-reduce", "f32[]", 2 * 4 * 7 / 8)
  assert compiled.peak_of(step, "cpu") >= 2 * 8 * 8 * 4


# What is not there


def test_a_compiler_that_is_not_installed(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  for word, extra in {"v6e:2x4": "plan", "h100:8": "gpu"}.items():
    says = rf"not installed: pip install 'alma_jax\[{extra}\]'; --quick plans"
    with pytest.raises(devices.CompilerError, match=says), devices.described(topology.parse(word)):
      pass
  assert all(getattr(jax.config, name, devices.DEFAULT) == devices.DEFAULT for name in devices.EFFORTS)


@needs_libtpu
def test_a_libtpu_that_is_not_that_of_jax_is_an_error(monkeypatch):
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: ['libtpu==0.0.7.*; extra == "tpu"'])
  says = r"libtpu 0\.\S+: this jax wants libtpu 0\.0\.7\.\*.*pip install -U 'alma_jax\[plan\]'"
  with pytest.raises(devices.CompilerError, match=says), devices.described(topology.parse("v6e:2x4")):
    pass


def test_effort_is_set_in_the_words_of_the_jax_at_hand(monkeypatch):
  before = {name: getattr(jax.config, name) for name in devices.LEVELS}
  monkeypatch.setattr(devices, "EFFORTS", ("jax_no_such_effort", "jax_no_other"))  # gone since jax 0.11
  with devices.described(topology.parse("cpu"), devices.LOW):
    assert [getattr(jax.config, name) for name in devices.LEVELS] == ["O1", "O1"]
  # What is low for TPUs has GPUs' compiler do more, in which it crashes.
  assert devices._effort(devices.LOW, "gpu") == {}
  with devices.described(topology.parse("cpu"), devices.DEFAULT):
    assert {name: getattr(jax.config, name) for name in devices.LEVELS} == before
  assert {name: getattr(jax.config, name) for name in devices.LEVELS} == before


def test_what_cudnn_would_ask_for_is_part_of_a_program_for_absent_gpus():
  q = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
  k, segments = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16), np.ones((2, 256), np.int32)

  def out(q, k, v):
    return attention_nvidia.causal(q, k, v, segments, few=True)[0].astype(jnp.float32).sum()

  with devices._hopper():
    text = jax.jit(jax.grad(out)).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
  size = packed_workspace(few_runs(256), 2 * 256, 8, 64)
  assert size == 4 * 8 * 2 * 256 * 8 * 65
  asked = re.findall(r"@__cudnn.*tensor<(\d+)xui8>", text)
  assert [int(x) for x in asked] == [0, size]  # forwards nothing, backwards dq in fp32 for every run


def test_what_does_not_compile_is_a_row_with_its_message(capsys):
  def refuse():
    raise NotImplementedError("Mosaic kernels cannot be partitioned.\nMore words.")

  m, work = machine("v6e:2x4"), WORKS[5]
  made = compiled.made_of(programs.Program("embed", refuse), "embeddings", "tpu")
  step = compiled._with(m, estimate.estimate(m, work), [made])
  assert not step.fits and step.hours == 0
  said = "\n".join(table.lines(table.Plan(m, [step], compilers="libtpu")))
  assert "does not compile: embeddings: embed: Mosaic kernels cannot be partitioned." in said and "REFUSED" in said
  assert table.as_json(table.Plan(m, [step]))["stages"][0]["fits"] is False


# Layers that are not compiled


def test_a_sampling_program_is_continued_to_all_layers(monkeypatch):
  # What stands in a program of L layers is 3 + L; beside it lie a second model, on so large a device, and the refill's.
  m = machine("v5p:2x2x2", dataclasses.replace(SMALL, depth=32), slots=0, tensor=0)
  step, depths = estimate.estimate(m, WORKS[3]), []
  assert m.others and step.slots

  def made_of(program, stage, platform):
    depth = depths[-1]
    sends = (
      hlo.Collective("all-reduce", "bf16[8,64]", 10.0 * 2 * depth, 2 * depth),
      hlo.Collective("all-reduce", "f32[8,512]", 70.0, 1),
    )
    return compiled.Made(program.name, 3 + depth + program.beside, sends, moved=5.0 + 2 * depth, seconds=1.0)

  real = compiled.programs

  def remembered(small, step, devices):
    found = real(small, step, devices)
    return [dataclasses.replace(p, make=functools.partial(depths.append, small.c.depth)) for p in found]

  def asked(program, stage, platform):
    program.make()
    return made_of(program, stage, platform)

  monkeypatch.setattr(compiled, "programs", remembered)
  monkeypatch.setattr(compiled, "made_of", asked)
  found = [task() for task in compiled._tasks(m, step, jax.devices()[:4])]
  assert [made.name for made in found] == ["prefill", "refill", "decode"] and depths == [*compiled.DEPTHS] * 3
  for made in found:
    beside = m.others + (m.model_bytes if made.name == "refill" else 0)
    assert made.peak == pytest.approx(3 + 32 + beside, abs=20) and made.moved == 5 + 2 * 32 and made.seconds == 2
    assert [(c.shape, c.bytes, c.times) for c in made.collectives] == [
      ("bf16[8,64]", 640.0, 64), ("f32[8,512]", 70.0, 1),
    ]  # fmt: skip
  refused = compiled.Made("decode", refused="no room")
  assert compiled.deep(found[0], refused, 32) is refused
  shallow = dataclasses.replace(m, c=dataclasses.replace(SMALL, depth=8))
  assert not compiled.in_line(shallow, step) and not compiled.in_line(m, estimate.estimate(m, WORKS[0]))


def test_a_step_that_the_compiler_refuses_is_compiled_in_more_passes_as_a_run_does(monkeypatch):
  tried = []

  def planned(c, task, batch, passes, memory):
    tried.append((passes, batch["tokens"].shape[0] % (8 * passes)))
    if passes < 4:
      raise train.TooLarge("too large", in_more_passes=True)
    return "the plan"

  monkeypatch.setattr(train, "planned", planned)
  m = machine("v6e:2x4")
  options = training.Options(**TRAINED | dict(remat="auto", batch=64))
  work = dataclasses.replace(trained("sft", options), examples=256)
  assert programs.planned_training(m, estimate.estimate(m, work), jax.devices()) == "the plan"
  assert tried == [(1, 0), (2, 0), (4, 0)]


def test_the_matrix_compiles_what_stages_share_once_and_goes_on(monkeypatch, tmp_path, capsys):
  asked, output = [], tmp_path / "rows.jsonl"

  def made_of(program, stage, platform):
    asked.append((stage, program.name))
    return compiled.Made(program.name, peak=2**30 * len(asked), remat="full")

  @contextlib.contextmanager
  def described(where, effort):
    yield ()

  monkeypatch.setattr(matrix.compiled, "made_of", made_of)
  monkeypatch.setattr(matrix.devices, "described", described)
  flags = [f"--output={output}", "--only=llama3_8b@v6e:2x4", "--stages=sft_1,sft_2,dpo"]
  for _ in range(2):
    monkeypatch.setattr(sys, "argv", ["compiled", *flags])
    matrix.main()
    assert asked == [("sft_1", "step"), ("dpo", "step")]
    output.write_text(output.read_text() + '{"cut off')
  rows = list(matrix._rows(output))
  assert [(row["stage"], row["peak"] / 2**30) for row in rows] == [("sft_1", 1), ("sft_2", 1), ("dpo", 2)]
  assert capsys.readouterr().out.count("| llama3_8b | v6e:2x4 | sft_2 step | 1.00 | 31.25 |") == 3


# Copies of a model on a host


def test_the_devices_of_a_copy_are_chosen_by_size():
  large, whole = shapes.SHAPES["llama3_70b"], shapes.SHAPES["llama3_8b"]
  chosen = {}
  for word in ("v5e:4x4", "v6e:2x4", "v5p:4x4x4", "h100:8"):
    chosen[word] = [machine(word, c, tensor=0).tensor for c in (whole, large)]
  assert chosen == {"v5e:4x4": [4, 4], "v6e:2x4": [2, 8], "v5p:4x4x4": [1, 4], "h100:8": [1, 4]}
  # Keys and values of every head take four times the room of Llama 3's.
  assert machine("h100:8", shapes.SHAPES["llama2_7b"], tensor=0).tensor == 2
  step = estimate.estimate(machine("v5e:4x4", large, tensor=0), WORKS[3])
  assert not step.fits and step.helps.startswith(
    "no host of v5e:4x4 (4 devices) has room for a copy of the model; --top"
  )


def test_a_copy_that_no_host_holds_is_said_at_the_start(monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100_000}, platform="tpu")
  made = []
  monkeypatch.setattr(sharding, "make_mesh", lambda **how: made.append(how["tensor"]))
  options = ModelOptions("mini", "mini")
  c = host.llama_config.read_config(host.model_directory("mini"))
  room = c.parameters * 2 / 100_000  # in devices
  with pytest.raises(host.ConfigError, match=r"a copy of mini takes .* no copy fits this host"):
    host.local_mesh(options, EngineOptions(), [device] * max(1, int(room / 2)))
  device.memory_stats = lambda: {"bytes_limit": 2 * c.parameters}
  host.local_mesh(options, EngineOptions(), [device] * 4)
  assert made == [2]
  with pytest.raises(host.ConfigError, match=r"engine\.tensor is 1.* raise engine.tensor, or 0 chooses"):
    host.local_mesh(options, EngineOptions(tensor=1), [device] * 4)
  with pytest.raises(host.ConfigError, match=r"engine\.tensor is 8 and this host has 4 devices"):
    host.local_mesh(options, EngineOptions(tensor=8), [device] * 4)


# Meshes


def test_meshes_are_compared_by_what_fits_and_what_is_sent():
  m = machine("v5p:4x4x4", shapes.SHAPES["llama3_70b"])
  work = trained("policy", training.Options(**TRAINED | dict(batch=128, row_length=2048)))
  work = dataclasses.replace(work, examples=5000)
  found = meshes.candidates(m, work)
  assert len({mesh.name for mesh in found}) == len(found) == 7 + 6 + 5 + 4
  assert [mesh.fits for mesh in found] == sorted((mesh.fits for mesh in found), reverse=True)
  plan = table.Plan(m, [estimate.estimate(m, work)])
  said = list(meshes.lines(plan, quick=True))
  best = found[0]
  assert said[-1].startswith(f"the best: {best.name} (--config.mesh.data={best.options.data} ")
  assert sum("DOES NOT FIT" in line for line in said) == sum(not mesh.fits for mesh in found) > 0


def test_the_best_mesh_is_named_by_what_the_compiler_says(monkeypatch):
  # The config's mesh and the three best by bounds are compiled, in default effort; one is refused, one is too large.
  m = machine("v5p:4x4x4", shapes.SHAPES["llama3_70b"])
  work = trained("policy", training.Options(**TRAINED | dict(batch=128, row_length=2048)))
  work = dataclasses.replace(work, examples=5000)
  efforts, asked = [], []

  @contextlib.contextmanager
  def described(where, effort):
    efforts.append((where, effort))
    yield ("a device",) * 64

  def planned_training(own, step, there):
    assert len(there) == 64 and step.mesh == own.mesh
    return own.mesh

  def made_of(program, stage, platform):
    at = len(asked)
    asked.append(program.make())
    sends = (hlo.Collective("all-gather", "bf16[8192,28672]", (4e9, 1e9, 2e9, 3e9)[at], 80),)
    if at == 1:  # it sends least, and is refused
      return compiled.Made("step", refused="step: no room")
    return compiled.Made("step", peak=2**30 * (40, 0, 96, 30)[at], collectives=sends)

  monkeypatch.setattr(meshes.devices, "described", described)
  monkeypatch.setattr(meshes, "planned_training", planned_training)
  monkeypatch.setattr(meshes.compiled, "made_of", made_of)
  said = list(meshes.lines(table.Plan(m, [estimate.estimate(m, work)]), quick=False))
  found, given = meshes.candidates(m, work), MeshOptions(1, 64, 1)
  assert given not in [mesh.options for mesh in found[:3]]
  assert efforts == [(m.topology, devices.DEFAULT)]
  assert asked == [given, *(mesh.options for mesh in found[:3])]
  rows = said[next(i for i, line in enumerate(said) if line.startswith("compiled (jax ")) + 1 :]
  assert rows[0].startswith("  1 x 64 x 1 *") and "40.0" in rows[0] and rows[1] == "    80 x all-gather 4 GB"
  assert rows[2].startswith(f"  {found[0].name} ") and "does not compile: step: no room" in rows[2]
  assert rows[3].startswith(f"  {found[1].name} ") and "96.0" in rows[3] and "DOES NOT FIT" in rows[3]
  best = asked[3]  # 3 GB and 30 GiB: the one with 2 GB does not fit
  flags = f"--config.mesh.data={best.data} --config.mesh.fsdp={best.fsdp} --config.mesh.tensor={best.tensor}"
  assert said[-1].startswith("the best: ") and f"({flags}), 30.0 GiB, 3 GB sent" in said[-1]


# The TPU's compiler


@pytest.fixture(scope="module")
def tpu():
  """{"sft step": (program, compiled, text), ...} for v6e:2x4."""
  m, found = machine("v6e:2x4"), {}
  with devices.described(m.topology) as there:
    for work in WORKS:
      for program in programs.programs(m, estimate.estimate(m, work), there):
        made = program.make()
        made = made.step if isinstance(made, train.Plan) else made
        found[f"{work.stage} {program.name}"] = program, made, made.as_text()
  return found


def id_(x):
  return x


@needs_libtpu
def test_every_program_compiles_for_tpus_and_takes_what_the_quick_plan_says(tpu):
  names = {name.partition(" ")[0] for name in tpu}
  assert names == {work.stage for work in WORKS} and len(tpu) == 14
  m = machine("v6e:2x4")
  for work in WORKS[:1]:
    quick = estimate.estimate(m, work).peak
    assert compiled.peak_of(tpu[f"{work.stage} step"][1], "tpu") == pytest.approx(quick, rel=0.3)
  for name in ("embeddings embed", "judgments prefixes"):  # JAX leaves the head out of them, and it lies beside
    program, made, _ = tpu[name]
    lies = made.memory_analysis().argument_size_in_bytes + program.beside - m.others
    assert lies == pytest.approx(m.model_bytes, rel=0.01)


@needs_libtpu
def test_state_and_cache_are_updated_in_place(tpu):
  for name in ("sft step", "dpo step", "grpo step"):
    memory = tpu[name][1].memory_analysis()
    state = 12 * SMALL.parameters / 8
    assert memory.alias_size_in_bytes >= 0.98 * state and memory.output_size_in_bytes <= 1.05 * state + 2**20
  shape = estimate_sampling.shapes_of(machine("v6e:2x4"), WORKS[3], 32)
  cache = 4 * SMALL.depth * SMALL.kv_heads * SMALL.head_dim * (shape.slots * 128 + shape.rows * shape.room)
  for name in ("prefill", "refill", "decode"):
    memory = tpu[f"responses {name}"][1].memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.05 * cache
  sums = 4 * 2**13 * 256
  assert tpu["clusters accumulate"][1].memory_analysis().alias_size_in_bytes >= sums


@needs_libtpu
def test_a_decode_step_gathers_no_prefixes(tpu):
  text, shape = tpu["responses decode"][2], estimate_sampling.shapes_of(machine("v6e:2x4"), WORKS[3], 32)
  assert hlo.loops(text)
  prefix = 2 * shape.rows * shape.room * SMALL.kv_heads * SMALL.head_dim  # bytes of a layer's keys
  gathered = [hlo.sizes(line.partition(" gather(")[0]) for line in hlo.lines_in_loops(text) if " gather(" in line]
  assert max(gathered, default=0) < prefix / 2


@needs_libtpu
@pytest.mark.parametrize("name", ["sft step", "dpo step", "grpo step"])
def test_steps_gather_in_bf16_and_never_branch(tpu, name):
  trains_well(tpu[name][2], SMALL, sharding.abstract_mesh(8, data=1, fsdp=-1))


@needs_libtpu
@pytest.mark.parametrize(
  "word, sizes", [("v6e:8x8", (1, 32, 2)), ("v6e:8x8", (1, 8, 8)), ("v5e:4x4", (1, 16, 1)), ("v5p:2x2x2", (1, 8, 1))]
)
def test_gradients_of_8bs_tables_are_reduced_to_shares(word, sizes):
  # What these compilers cannot cut in one step: 128,256 is 256 x 3 x 167, and some groups span two or three axes.
  V, D = 128_256, 4096

  def looked_up(table, tokens):
    return sharding.constrain_vocab(table)[tokens]

  def logits(head, x):
    return x @ head

  def loss(tables, tokens):
    x = sharding.on_own_rows(looked_up, 1, D, 1)(tables["embed"], tokens)
    return jax.numpy.square(sharding.on_own_rows(logits, 0, D, 1)(tables["head"], x)).sum()

  with devices.described(topology.parse(word)) as there:
    mesh = sharding.make_mesh(*sizes, devices=there)

    def placed(shape, dtype, *axes):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes)))

    tables = {
      "embed": placed((V, D), jax.numpy.bfloat16, "tensor", "fsdp"),
      "head": placed((D, V), jax.numpy.bfloat16, "fsdp", "tensor"),
    }
    step = jax.jit(jax.grad(loss), out_shardings={name: table.sharding for name, table in tables.items()})
    with jax.set_mesh(mesh):
      lowered = step.lower(tables, placed((sizes[1], 8), jax.numpy.int32, "fsdp"))
    found = hlo.collectives(lowered.compile().as_text())
  sent = {kind: hlo.sent(c for c in found if c.kind == kind) for kind in hlo.KINDS}
  once = 2 * 2 * V // sizes[2] * D * (sizes[1] - 1) / sizes[1]
  assert sent["all-gather"] == once and once <= sent["reduce-scatter"] <= 1.005 * once
  assert sent["all-reduce"] < 0.01 * once and sent["collective-permute"] < 0.005 * once, found


@needs_libtpu
def test_a_decode_step_reads_what_is_live(tpu):
  text, c, shape = tpu["responses decode"][2], SMALL, estimate_sampling.shapes_of(machine("v6e:2x4"), WORKS[3], 32)
  lines = list(hlo.lines_in_loops(text))
  assert sum("custom-call(" in line and "attention_over_few" in line for line in lines) == 2 * c.depth
  layer = 2 * shape.slots * 128 * c.kv_heads * c.head_dim  # bytes of the keys of a layer
  copied = [hlo.sizes(line.partition(" copy(")[0]) for line in lines if " copy(" in line]
  assert max(copied, default=0) < layer / 2  # no cache, no scores
  weights = 2 * (c.parameters - c.vocab * c.width)  # the embedding is looked up
  token = 4 * c.depth * c.kv_heads * c.head_dim
  keys = token * (shape.slots * 128 + shape.rows * 192)
  logits = 4 * c.vocab * shape.slots
  assert sum("custom-call(" in line and "choose_token" in line for line in lines) == 1  # it reads them, the head writes
  assert traffic.moved(text, {1: 64, shape.tile: 128}) <= 1.15 * (weights + keys) + 5 * logits


@needs_libtpu
def test_what_each_program_sends(tpu):
  head = SMALL.vocab * SMALL.width
  layers = (SMALL.parameters - 2 * head) // SMALL.depth
  for name, (_, _, text) in tpu.items():
    stage, _, program = name.partition(" ")
    found = hlo.collectives(text)
    largest = max((hlo.sizes(c.shape) for c in found), default=0)
    if stage in ("responses", "judgments", "embeddings"):
      assert not found, f"{name} sends {hlo.summary(found)}"
    elif stage == "clusters":
      # the sums of all devices, the labels of all points
      allowed = {"accumulate": 4 * 2**17 // 128 * 8, "move": 4 * 2**13 * 256, "assign": 4 * 2**20}[program]
      assert largest <= allowed, (name, found[:3])
      assert ('"tpu_custom_call"' in text) == (program != "move")  # scores stay on the chip
    else:
      assert largest <= 4 * head, (name, found[:3])  # the embedding, in fp32 at low effort
      # weights forward and backward, gradients back: no more than a tenth above, and the vocabulary's tables
      passes = {"step": 3, "log-probs": 2}[program]
      assert hlo.sent(found) <= 1.3 * (passes * 2 * layers * SMALL.depth) + (4 + 2 * 4 + 3 * 2) * head, name
      activations = 16 * 512 * SMALL.width * 2
      # The embedding and the head once, or a tensor group's shares of them; no activations of the whole batch.
      gathers = [c for c in found if c.kind == "all-gather" and hlo.sizes(c.shape) >= activations and "16" in c.shape]
      shares = r"\b16384\b", r"\[(8192,1024|1024,8192)\]"
      assert all(any(re.search(s, c.shape) for s in shares[: 1 + (c.times == 1)]) for c in gathers), gathers


@needs_libtpu
def test_a_plan_has_the_compilers_figures(tpu, monkeypatch):
  m, heard = machine("v6e:2x4"), []
  steps = [estimate.estimate(m, WORKS[4]), estimate.estimate(m, WORKS[6])]

  def ready(machine, step, devices):
    stage = step.work.stage
    return [dataclasses.replace(p, make=functools.partial(id_, x)) for n, (p, x, _) in tpu.items() if stage in n]

  monkeypatch.setattr(compiled, "programs", ready)
  found = compiled.compiled(m, steps, (), heard.append)
  assert len(heard) == 5 and all(step.fits and step.compiled for step in found)
  assert found[0].peak == max(
    compiled.peak_of(made, "tpu") + program.beside
    for name, (program, made, _) in tpu.items()
    if name[:9] == "judgments"
  )
  assert [c.kind for c in found[1].collectives]
