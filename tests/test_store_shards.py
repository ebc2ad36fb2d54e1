"""Shards: equal records back, equal bytes for equal records, nothing half-written."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.errors import RunError
from alma_jax.store import records, shards

KINDS = [kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)]
TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
VALUE = {
  str: TEXT,
  bool: st.booleans(),
  int: st.integers(-(2**63), 2**63 - 1),
  float: st.none() | st.floats(allow_nan=False),
  tuple[int, ...]: st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
  tuple[float, ...]: st.lists(st.floats(allow_nan=False), max_size=11).map(tuple),
  records.Turns: st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3).map(tuple),
}
VALUE |= {kind | None: st.none() | value for kind, value in VALUE.items()}


def any_records(kind):
  return st.lists(st.builds(kind, **{f.name: VALUE[f.type] for f in dataclasses.fields(kind)}), max_size=5)


RESPONSES = [
  records.Response("ab" * 8, i, "round_02", f"text {i}\u2028\U0001f600", (1, 2, i), bool(i % 2), -0.1 * i)
  for i in range(50)
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_equals_what_was_written(kind, tmp_path):
  @settings(max_examples=25, deadline=None)
  @given(any_records(kind))
  def check(written):
    path = tmp_path / "x.parquet"
    returned = shards.write_records(path, written, kind)
    assert shards.read_records(path, kind) == written
    first = path.read_bytes()
    assert hashlib.sha256(first).hexdigest() == returned.whole
    shards.write_records(path, written, kind)
    assert path.read_bytes() == first

  check()


def test_same_records_same_bytes_whatever_the_path_and_container(tmp_path):
  listy = [dataclasses.replace(r, tokens=list(r.tokens)) for r in RESPONSES]
  arrays = [dataclasses.replace(r, tokens=np.array(r.tokens), logprob=np.float64(r.logprob)) for r in RESPONSES]
  digests = {
    shards.write_records(tmp_path / name, rows, records.Response)
    for name, rows in [
      ("a.parquet", RESPONSES),
      ("sub/b.parquet", tuple(RESPONSES)),
      ("c", listy),
      ("d", arrays),
    ]
  }
  assert len(digests) == 1
  other = shards.write_records(tmp_path / "e.parquet", RESPONSES[:-1], records.Response)
  assert other not in digests


def test_several_files_are_read_in_the_order_given(tmp_path):
  paths = [tmp_path / shards.part_name(i, 3) for i in range(3)]
  for i, path in enumerate(paths):
    shards.write_records(path, RESPONSES[i * 4 : i * 4 + 4] if i != 1 else [], records.Response)
  assert shards.read_records(paths[::-1], records.Response) == RESPONSES[8:12] + RESPONSES[:4]
  assert paths[2].name == "part-00002-of-00003.parquet"


def test_rows_of_a_file_are_read_in_the_order_asked_from_the_groups_that_have_them(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "ROW_GROUP", 8)
  path = tmp_path / "x.parquet"
  shards.write_records(path, RESPONSES, records.Response)
  assert pq.ParquetFile(path).num_row_groups == 7
  read, plain = [], pq.ParquetFile.read_row_group
  monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, i: read.append(i) or plain(file, i))
  rows = [17, 0, 49, 17, 16, 8, 7]
  assert shards.read_rows(path, rows, records.Response) == [RESPONSES[row] for row in rows]
  assert read == [0, 1, 2, 6]
  assert shards.read_rows(path, np.arange(50)[::-1], records.Response) == RESPONSES[::-1]
  assert shards.read_rows(path, [], records.Response) == []
  with pytest.raises(ValueError, match="holds no Judgment records"):
    shards.read_rows(path, [1], records.Judgment)


def test_ids_of_prompts_are_read_as_numbers(tmp_path):
  ids = ["0000000000000001", "ffffffffffffffff", "8000000000000000", "00c0ffee00c0ffee"]
  paths = [tmp_path / f"{i}.parquet" for i in range(3)]
  for path, mine in zip(paths, (ids[:1], [], ids[1:]), strict=True):
    shards.write_records(path, [records.Prompt(id, (), "test") for id in mine], records.Prompt)
  found = shards.read_ids(paths)
  assert found.dtype == np.uint64 and found.tolist() == [int(id, 16) for id in ids]
  assert [f"{id:016x}" for id in found] == ids
  shards.write_records(paths[1], [records.Judgment(ids[1], 0, 1.0, None, None)], records.Judgment)
  assert shards.read_ids(paths[1:2], "prompt_id").tolist() == [2**64 - 1]
  shards.write_records(paths[1], [], records.Prompt)
  for nothing in (shards.read_ids([]), shards.read_ids(paths[1:2]), shards.id_numbers([])):
    assert nothing.dtype == np.uint64 and nothing.shape == (0,)


def test_any_parquet_reader_sees_the_columns(tmp_path):
  pair = records.Pair("0" * 16, ({"role": "user", "content": "hi"},), "good", "bad", 7.5, None, 2)
  shards.write_records(tmp_path / "p.parquet", [pair], records.Pair)
  table = pq.read_table(tmp_path / "p.parquet")
  assert table.column_names == [f.name for f in dataclasses.fields(records.Pair)]
  assert table.to_pylist() == [dataclasses.asdict(pair) | {"messages": [{"role": "user", "content": "hi"}]}]


def test_only_floats_may_be_none_and_what_is_annotated_so(tmp_path):
  bare = [records.Judgment("0" * 16, i, -3.5, None, None) for i in range(2)]
  shards.write_records(tmp_path / "j.parquet", bare, records.Judgment)
  assert shards.read_records(tmp_path / "j.parquet", records.Judgment) == bare
  (tmp_path / "j.parquet").unlink()
  for field in ("text", "sample_id", "finished", "tokens"):
    with pytest.raises(ValueError, match=f"Response record has None in its field {field}"):
      broken = dataclasses.replace(RESPONSES[0], **{field: None})
      shards.write_records(tmp_path / "x.parquet", [RESPONSES[1], broken], records.Response)
  with pytest.raises(pa.ArrowInvalid, match="null"):
    broken = dataclasses.replace(RESPONSES[0], tokens=(1, None))
    shards.write_records(tmp_path / "x.parquet", [broken], records.Response)
  with pytest.raises(pa.ArrowInvalid, match="content"):
    cut = records.Prompt("0" * 16, ({"role": "user"},), "seed")
    shards.write_records(tmp_path / "x.parquet", [cut], records.Prompt)
  assert list(tmp_path.iterdir()) == []


def test_the_wrong_kind_of_file_is_named(tmp_path):
  shards.write_records(tmp_path / "x.parquet", RESPONSES, records.Response)
  with pytest.raises(ValueError, match=r"x.parquet holds no Judgment records: its columns are prompt_id, sample_id"):
    shards.read_records(tmp_path / "x.parquet", records.Judgment)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "x.bin"
  path.write_bytes(b"old")
  with pytest.raises(KeyboardInterrupt), shards.atomic(path) as file:
    file.write(b"half")
    assert path.read_bytes() == b"old"
    raise KeyboardInterrupt
  assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
  assert path.read_bytes() == b"old"


def test_files_get_the_usual_permissions(tmp_path):
  (tmp_path / "plain").write_bytes(b"")
  shards.write_json(tmp_path / "ours.json", {})
  assert os.stat(tmp_path / "ours.json").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize("shape", [(7, 3), (0, 3), ()])
def test_arrays_come_back_as_memory_maps(shape, tmp_path):
  array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
  one, two = (shards.save_array(tmp_path / name, array) for name in ("a.npy", "b.npy"))
  assert one.whole == two.whole == shards.digest(tmp_path / "a.npy")
  back = shards.load_array(tmp_path / "a.npy")
  assert isinstance(back, np.memmap) or back.size == 0
  assert back.dtype == array.dtype
  np.testing.assert_array_equal(back, array)


def test_json_is_strict_and_names_the_number_that_it_lacks(tmp_path):
  value = {"a": np.float32(0.5), "place": tmp_path, "rows": [{"b": 1.0}, {"b": np.float64("nan"), "c": float("inf")}]}
  with pytest.raises(RunError, match=r"^rows\[1\]\.b is nan, which cannot be written as JSON"):
    shards.write_json(tmp_path / "x.json", value)
  assert not list(tmp_path.iterdir())
  value["rows"].pop()
  assert json.loads(shards.json_lines([value, 1])[:-3]) == {"a": 0.5, "place": str(tmp_path), "rows": [{"b": 1.0}]}
