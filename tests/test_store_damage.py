"""Damage: a flipped byte, a cut file or an edited manifest is named where it is read, and nothing is hashed twice."""

import dataclasses
import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest

from alma_jax.errors import RunError
from alma_jax.llama import weights
from alma_jax.report import page
from alma_jax.runtime import alarms
from alma_jax.runtime.host import content_of
from alma_jax.stages import data as human
from alma_jax.store import digests, layout, runs, shards, verify
from alma_jax.store import lock as lock_lib
from alma_jax.store.data import load_examples
from alma_jax.store.records import Judgment
from alma_jax.tools import report

BLOCK = 256  # bytes, for these tests
RECORDS = [Judgment(f"{i:016x}", 0, i / 7, (0.25,) * 4, 1.0) for i in range(40)]
FILES = ("part-00000-of-00002.parquet", "part-00001-of-00002.parquet", "rows.npy", "seeds.jsonl", "model/w.safetensors")


def make(run):
  """A finished stage with two parts and a file of every other kind, each of several blocks."""
  stage = run.stage("round_02/things", {"config": {"x": 1}})
  for i in stage.mine(2):
    stage.write_part(i, 2, RECORDS[i::2], Judgment, {"n": 20})
  if not stage.done:
    shards.save_array(stage.dir / "rows.npy", np.arange(1200.0).reshape(300, 4))
    (stage.dir / "model").mkdir(exist_ok=True)
    (stage.dir / "model/w.safetensors").write_bytes(bytes(range(250)) * 5)
    lines = (json.dumps({"prompt": f"p{i}", "response": "yes"}) + "\n" for i in range(30))
    (stage.dir / "seeds.jsonl").write_text("".join(lines))
  stage.finish(files=FILES[2:])
  return stage


@pytest.fixture
def stage(tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "BLOCK", BLOCK)
  with runs.Run(tmp_path / "run") as run:
    return make(run).dir


def read(path):
  """Reads a file of the stage as its readers do."""
  if path.suffix == ".parquet":
    return shards.read_records(path, Judgment)
  if path.suffix == ".npy":
    return shards.ArrayRows(path)[:]
  if path.suffix == ".jsonl":
    return load_examples(path)
  return verify.check(path)


def flip(path, at):
  with open(path, "r+b") as file:
    file.seek(at)
    byte = file.read(1)[0]
    file.seek(at)
    file.write(bytes([byte ^ 1]))


def assert_named(error, path, stage):
  text = str(error.value)
  assert str(path) in text and f"delete {stage} to have the stage made again" in text and "\n" not in text


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_named_with_its_block(name, stage):
  path = stage / name
  size = path.stat().st_size
  assert size > 2 * BLOCK
  wanted = digests.of_file(path)
  for at in (0, BLOCK - 1, BLOCK, size // 2, size - 1):
    flip(path, at)
    with pytest.raises(verify.DamageError) as error:
      read(path)
    assert_named(error, path, stage)
    block = at // BLOCK
    assert wanted.blocks[block] in str(error.value) and f"between bytes {block * BLOCK} and " in str(error.value)
    flip(path, at)
  read(path)  # whole again
  for change, said in ((path.read_bytes()[:-1], f"{size - 1} bytes instead of {size}"), (None, "is missing")):
    path.write_bytes(change) if change else path.unlink()
    with pytest.raises(verify.DamageError, match=said) as error:
      read(path)
    assert_named(error, path, stage)
    assert wanted.whole in str(error.value)


def test_only_the_blocks_of_a_read_are_hashed_and_each_once(stage, monkeypatch):
  hashed, plain = [], digests.of_block
  monkeypatch.setattr(digests, "of_block", lambda path, i: hashed.append((os.path.basename(path), i)) or plain(path, i))
  rows = shards.ArrayRows(stage / "rows.npy")  # 128 bytes of header, then 32 a row: row 4 begins the second block
  assert hashed == [("rows.npy", 0)]
  np.testing.assert_array_equal(rows[12:20], np.arange(48.0, 80.0).reshape(8, 4))
  assert hashed == [("rows.npy", 0), ("rows.npy", 2)]
  flip(stage / "rows.npy", 5 * BLOCK)
  os.utime(stage / "rows.npy", ns=(1, 1))  # another time: what was verified counts no more
  rows[4:20]
  with pytest.raises(verify.DamageError, match="between bytes 1280 and 1536"):
    rows[4:40]
  hashed.clear()
  for _ in range(3):
    assert len(shards.read_records(stage / FILES[0], Judgment)) == 20
  assert sorted(hashed) == [(FILES[0], i) for i in range(-(-(stage / FILES[0]).stat().st_size // BLOCK))]


def test_what_no_manifest_vouches_for_passes(stage, tmp_path):
  user = tmp_path / "model"
  shutil.copytree(stage / "model", user)
  (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
  flip(user / "w.safetensors", 3)
  verify.check(user / "w.safetensors")
  (stage / "unlisted.txt").write_text("x")
  verify.check(stage / "unlisted.txt")


def test_damaged_weights_of_a_stage_are_not_loaded(tmp_path):
  fixture = pathlib.Path(__file__).parent / "fixtures/llama/llama2"
  with runs.Run(tmp_path) as run:
    stage = run.stage("sft_1", {})
    shutil.copytree(fixture, stage.dir / "model")
    stage.finish(files=["model/config.json", "model/model.safetensors"])
  path = stage.dir / "model/model.safetensors"
  weights.load(path.parent, check=verify.check)
  for at in (5, path.stat().st_size - 1):  # in the header, in the last weight
    flip(path, at)
    with pytest.raises(verify.DamageError) as error:
      weights.load(path.parent, check=verify.check)
    assert_named(error, path, stage.dir)
    flip(path, at)


def test_a_data_file_that_is_gone_is_named_and_the_run_goes_on_with_its_copy(tmp_path):
  rows = [{"prompt": f"Say {i}", "response": f"Here is {i}.", "score": i % 11} for i in range(24)]
  for name in ("sft", "judge"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  options = human.Options(sft=str(tmp_path / "sft.jsonl"), judge=str(tmp_path / "judge.jsonl"))
  said = []
  with runs.Run(tmp_path / "run") as run:
    s = types.SimpleNamespace(run=run, display=types.SimpleNamespace(say=said.append), tell=lambda *_: None)
    s.options = types.SimpleNamespace(seed=0, alarms=alarms.Options())
    first = human.build(s, options)
    (tmp_path / "sft.jsonl").unlink()
    assert human.build(s, options) == first
    assert len(said) == 1 and f"the file {tmp_path}/sft.jsonl is missing" in said[0]
    with pytest.raises(runs.ChangedError, match=r"config\.data\.sft"):  # another name is a change
      human.build(s, dataclasses.replace(options, sft="other.jsonl"))
    (tmp_path / "sft.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(runs.ChangedError, match=r"contents\.sft"):
      human.build(s, options)


EDITS = {
  "a part left out": lambda m: m["parts"].pop(),
  "a digest": lambda m: m["files"]["rows.npy"].update(digest="0" * 64),
  "the counts": lambda m: m["counts"].update(n=41),
  "the rows": lambda m: m.update(rows=41),
  "the seal": lambda m: m.pop("seal"),
  "everything": lambda m: m.clear(),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_manifest_is_refused_by_every_reader(what, stage, tmp_path, capsys):
  path = stage / "manifest.json"
  manifest = json.loads(path.read_text())
  EDITS[what](manifest)
  path.write_text(json.dumps(manifest))
  with runs.Run(tmp_path / "run") as run:
    for reads in (lambda: make(run), lambda: layout.parts_of(stage), lambda: read(stage / "rows.npy"),
                  lambda: layout.stages(tmp_path / "run")):  # fmt: skip
      with pytest.raises(RunError) as error:
        reads()
      assert_named(error, path, stage)
  (tmp_path / "run/config.json").write_text("{}")
  assert report.main([str(tmp_path / "run")]) == 1
  assert "Traceback" not in capsys.readouterr().err and page.write(tmp_path / "run") is None


def test_a_manifest_of_an_older_form_is_named_by_its_version(stage):
  path = stage / "manifest.json"
  manifest = {k: v for k, v in json.loads(path.read_text()).items() if k != "seal"}
  path.write_text(json.dumps(manifest | {"fingerprint": {"format": 2}}))
  with pytest.raises(
    RunError, match=r"was written by alma_jax 0\.2 before its release, and only that version"
  ) as error:
    layout.load_manifest(stage)
  assert "damaged" not in str(error.value)
  verify.check(stage / "model/w.safetensors")  # its model is a directory like any other


@pytest.mark.parametrize("spoil", ["part", "cut", "sidecar {}", "sidecar edited", "sidecar binary", "seconds.json"])
def test_what_is_damaged_of_a_half_made_stage_is_made_again(spoil, stage, tmp_path, caplog):
  whole = {p.name: p.read_bytes() for p in stage.glob("part-*")}
  (stage / "manifest.json").unlink()
  part, sidecar = stage / FILES[1], (stage / FILES[1]).with_suffix(".json")
  if spoil == "part":
    flip(part, part.stat().st_size // 2)
  elif spoil == "cut":
    part.write_bytes(part.read_bytes()[:-1])
  elif spoil == "seconds.json":
    (stage / "seconds.json").write_bytes(b"\xff{")
  else:
    text = {"{}": b"{}", "edited": sidecar.read_bytes().replace(b'"n": 20', b'"n": 21'), "binary": b"\xff\x00"}
    sidecar.write_bytes(text[spoil.removeprefix("sidecar ")])
  with runs.Run(tmp_path / "run") as run:
    opened = run.stage("round_02/things", {"config": {"x": 1}})
    assert opened.missing(2) == ([] if spoil == "seconds.json" else [1])
    assert make(run).manifest["counts"] == {"n": 40}
  assert {p.name: p.read_bytes() for p in stage.glob("part-*")} == whole
  assert ("is damaged and is made again" in caplog.text) == (spoil == "part")


@pytest.mark.parametrize("text", [b"{", b"{}", b"[]", b"\xff\x00"])
def test_a_damaged_fingerprint_is_named_or_written_again(text, stage, tmp_path):
  path = stage / "fingerprint.json"
  before = path.read_bytes()
  path.write_bytes(text)
  with runs.Run(tmp_path / "run") as run:
    assert make(run).done and path.read_bytes() == before  # the manifest of a finished stage holds it, too
    path.write_bytes(text)
    (stage / "manifest.json").unlink()
    with pytest.raises(RunError, match="is damaged") as error:
      run.stage("round_02/things", {"config": {"x": 1}})
  assert_named(error, path, stage)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff\x00", b'{"pid": "x", "host": "y", "process": null}'])
def test_a_lock_that_names_nobody_is_made_again(text, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(lock_lib, "UNREADABLE", 0.05)
  (tmp_path / ".lock").write_bytes(text)
  with runs.Run(tmp_path) as run:
    run.log("mine")
  assert "names no process" in caplog.text and not (tmp_path / ".lock").exists()


def test_damaged_logs_and_tables(tmp_path, caplog):
  with runs.Run(tmp_path) as run:
    run.progress({"round": 2, "score": 7.5})
    run.log("start")
    for text in (b"\xff\x00\xfe", b"score\n1\n", b"round,score\n1,2,3\n"):
      (tmp_path / "progress.csv").write_bytes(text)
      with pytest.raises(
        RunError, match=r"progress\.csv is damaged .*delete it, and the next start .* writes it again"
      ):
        layout.progress(tmp_path)
      run.progress({"round": 3, "score": 7.0})
      assert layout.progress(tmp_path) == [{"round": "3", "score": "7.0"}] and "is written again" in caplog.text
    (tmp_path / "log.jsonl").write_bytes(b'\xff\x00\n[1]\n{"event": "end"}\n')
    assert layout.finished(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    run.save_config({"a": 1})
    assert layout.read_json(tmp_path / "config.json") == {"a": 1}


def test_the_content_of_a_model_covers_every_byte_and_a_later_start_reads_it_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "BLOCK", BLOCK)
  model, hashed, plain = tmp_path / "model", [], digests.of_block
  monkeypatch.setattr(digests, "of_block", lambda path, i: hashed.append(i) or plain(path, i))
  model.mkdir()
  (model / "config.json").write_text("{}")
  (model / "w.safetensors").write_bytes(bytes(1000))
  first = content_of(model)
  assert len(hashed) == 5 and content_of(model) == first and len(hashed) == 6  # the small file alone is read again
  with runs.Run(tmp_path / "run") as run:
    run.stage("s", {})
  digests._known.clear()  # as in a new process
  digests._kept.clear()
  with runs.Run(tmp_path / "run"):
    hashed.clear()
    assert content_of(model) == first and hashed == [0]
  flip(model / "w.safetensors", 500)
  os.utime(model / "w.safetensors", ns=(1, 1))
  assert content_of(model) != first
  (tmp_path / "run/.digests.json").write_bytes(b"\xff")
  runs.Run(tmp_path / "run").close()


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_file_is_hashed_alike_while_it_is_written_and_after(size, tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "BLOCK", BLOCK)
  data = np.random.default_rng(size).bytes(size)
  with shards.atomic(tmp_path / "x") as file:
    writer = digests.Writer(file)
    for at in range(0, size, 100):
      writer.write(data[at : at + 100])
  found = digests.of_file(tmp_path / "x")
  assert (tmp_path / "x").read_bytes() == data and writer.digest() == found
  assert digests.Digest.of_fields(found.fields()) == found and len(found.blocks) == max(1, -(-size // BLOCK))
