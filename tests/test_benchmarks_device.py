"""benchmarks/device.py on a CPU, with a tiny model: every part runs, and a part that fails costs no other."""

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


def test_a_part_that_fails_is_a_row_and_a_status(tmp_path, monkeypatch, capsys):
  def ran(part, model):
    if part == "judge":
      return {"rows": [{"part": part, "what": "failed", "failed": "RuntimeError: no"}]}
    return {"about": {"jax": "1"}, "rows": [{"part": part, "what": model, "rate": "3 a second"}]}

  out = tmp_path / "device.json"
  monkeypatch.setattr(device, "in_own_process", ran)
  monkeypatch.setattr(sys, "argv", ["device", "--model=tiny", "--parts=decode,judge,sft", f"--json={out}"])
  with pytest.raises(SystemExit, match="1"):
    device.main()
  assert [row["part"] for row in json.loads(out.read_text())["rows"]] == ["decode", "judge", "sft"]
  assert "FAILED: RuntimeError: no" in capsys.readouterr().out
  monkeypatch.setattr(sys, "argv", ["device", "--parts=decode,nothing"])
  with pytest.raises(SystemExit, match="nothing is none of check, decode"):
    device.main()
