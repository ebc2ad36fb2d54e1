"""benchmarks/device.py on a CPU, with a tiny model: every part runs, and a part that fails costs no other."""

import dataclasses
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # benchmarks are no package that is installed

from benchmarks import device


@pytest.mark.parametrize("part", device.PARTS)
def test_every_part_runs_without_an_accelerator(part, monkeypatch):
  monkeypatch.setattr(device, "memory", room)
  found = list(device.MAKERS[part](device.SIZES["tiny"]))
  assert found
  for row in found:
    assert "failed" not in row
    assert device.line({"part": part} | row).startswith(part)
  if part in ("judge", "embed", "sft", "dpo", "kmeans"):
    assert float(found[0]["rate"].split()[0].replace(",", "")) > 0
  if part in ("sft", "dpo"):  # the whole tiny model fits, and the plan says how much it needs
    assert "2 of 2 layers" in found[0]["what"]
    assert found[0]["planned_gib"] > 0


def room():
  """Bytes, as if the CPU device had an allocator that tells."""
  return 1 << 30


def test_a_refused_step_is_tried_with_fewer_layers(monkeypatch):
  """By the compiler at first, then by the device; an error of another kind ends the part."""
  depths = []

  def never(*_):
    raise AssertionError

  def planned(c, task, batch, memory):
    depths.append(c.depth)
    if c.depth == 8:
      raise device.train.TrainingError("training needs 85 GB")
    return device.train.Plan(never, "none", 1, 1, 1, device.train.kind_of(batch, task.mesh))

  def steps(c, task, plan, made):
    if c.depth == 6:
      raise device.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    if c.depth == 3:
      raise device.jax.errors.JaxRuntimeError("INTERNAL: no kernel")
    return [1.0, 1.5]

  monkeypatch.setattr(device, "memory", room)
  monkeypatch.setattr(device.train, "planned", planned)
  monkeypatch.setattr(device, "steps_of", steps)
  deep = dataclasses.replace(device.SIZES["tiny"], model=dataclasses.replace(device._TINY, depth=8))
  refused, again, found = device.sft(deep)
  assert (refused["what"], refused["note"]) == ("8 of 8 layers: refused", "training needs 85 GB")
  assert again["what"] == "6 of 8 layers: refused" and "Out of memory" in again["note"]
  assert "4 of 8 layers" in found["what"] and found["seconds"] == 0.5
  assert depths == [8, 6, 4]
  with pytest.raises(device.jax.errors.JaxRuntimeError, match="no kernel"):
    list(device.sft(dataclasses.replace(deep, model=dataclasses.replace(device._TINY, depth=3))))


def test_the_layers_that_the_plan_has_room_for_are_planned_in_the_leanest_way(monkeypatch):
  asked = []

  def planned(c, task, batch, memory):
    asked.append((c.depth, task.objective.remat))
    raise RuntimeError("enough")

  monkeypatch.setattr(device.train, "planned", planned)
  monkeypatch.setattr(device, "ids", lambda random, c, length: (3,) * length)
  monkeypatch.setattr(device, "dtype", lambda: device.jnp.bfloat16)
  monkeypatch.setattr(device, "memory", lambda: 80.5e9)
  for part in (device.sft, device.dpo):
    with pytest.raises(RuntimeError, match="enough"):
      list(part(device.SIZES["8b"]))
  assert [remat for _, remat in asked] == ["full", "full"]
  assert all(14 <= depth <= 24 for depth, _ in asked)


def test_rows_are_written_as_they_come_and_a_part_that_fails_is_a_status(tmp_path, monkeypatch, capsys):
  out, page, seen = tmp_path / "device.json", tmp_path / "device.md", []

  def ran(part, model, limit):
    yield {"about": {"jax": "1"}}
    yield {"what": model, "rate": "3 a second", "share": 0.5, "peak_gib": 2.0}
    seen.append([row["part"] for row in json.loads(out.read_text())["rows"]])  # what is on the disk by now
    if part == "judge":
      yield {"what": "failed", "failed": "RuntimeError: no"}

  monkeypatch.setattr(device, "in_own_process", ran)
  given = ["device", "--model=tiny", "--parts=decode,judge,sft", f"--json={out}", f"--table={page}"]
  monkeypatch.setattr(sys, "argv", given)
  with pytest.raises(SystemExit, match="1"):
    device.main()
  assert seen == [["decode"], ["decode", "judge"], ["decode", "judge", "judge", "sft"]]
  assert "FAILED: RuntimeError: no" in capsys.readouterr().out
  assert "| decode | tiny | 3 a second | 50.0% | 2.0 GiB |  |  |\n" in page.read_text()
  assert "| judge | failed |  |  |  |  | RuntimeError: no |\n" in page.read_text()
  monkeypatch.setattr(sys, "argv", ["device", "--parts=decode,nothing"])
  with pytest.raises(SystemExit, match="nothing is none of check, decode"):
    device.main()


@pytest.mark.parametrize(
  ("does", "limit", "says"),
  [
    ("print('{\"what\": \"a\"}', flush=True); print('of a library')", 60, "in all"),
    ("print('{\"what\": \"a\"}', flush=True); sys.exit('the end')", 60, "the end"),
    ('print(\'{"what": "a"}\', flush=True); time.sleep(60)', 1.5, "took longer than 1.5 s"),
  ],
)
def test_a_process_gives_its_rows_before_it_ends_badly(does, limit, says, monkeypatch):
  popen = device.subprocess.Popen

  def instead(command, **options):
    return popen([sys.executable, "-S", "-c", f"import sys, time; {does}"], **options)

  monkeypatch.setattr(device.subprocess, "Popen", instead)
  first, last = device.in_own_process("sft", "tiny", limit)
  assert first == {"what": "a"} and says in (last["what"], last.get("failed"))
