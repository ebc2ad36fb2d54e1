"""The names in a run directory, and what is read from one at any moment of its life."""

import json

import pytest

from alma_jax.errors import RunError
from alma_jax.store import layout
from alma_jax.store.runs import Run


def test_names():
  assert layout.stage_name(2, layout.RESPONSES) == "round_02/responses"
  assert layout.stage_name(100, layout.EVALUATION) == "round_100/eval"
  assert [layout.pool_name(), layout.pool_name(3), layout.pool_stage(0, "drafts")] == ["pool", "pool_03", "pool/drafts"]
  assert layout.beside("pool_03/drafts", layout.PROMPTS) == "pool_03/prompts"
  assert layout.parent_of("round_02/eval") == "round_02" and layout.parent_of("judge") == ""
  names = ("round_02/eval", "round_12", "sft_1", "pool_03/drafts", "round_x/eval", "judge_distilled")
  assert [layout.round_of(name) for name in names] == [2, 12, None, None, None, None]
  names = ("sft_1", "round_03/policy", "pool_03/drafts")
  assert [layout.kind_of(name) for name in names] == ["sft", "policy", "drafts"]


def test_what_is_finished_and_what_is_newest(tmp_path):
  assert layout.stages(tmp_path) == layout.rounds(tmp_path) == layout.progress(tmp_path) == []
  assert layout.pools(tmp_path) == {0: "pool"} and not layout.finished(tmp_path)
  for pick, wanted in ((layout.newest_policy, "no finished policy yet; wait for its stage sft_1"),
                       (layout.judge_of, "no finished judge; wait for its stage judge,")):  # fmt: skip
    with pytest.raises(RunError, match=wanted):
      pick(tmp_path)
  with Run(tmp_path) as run:
    run.stage("judge", {}).finish()
    run.stage("sft_1", {}).finish()
    assert layout.newest_policy(tmp_path) == tmp_path / "sft_1"
    for r in (2, 10, 9):
      run.stage(layout.stage_name(r, layout.POLICY), {"round": r}).finish()
    run.stage(layout.stage_name(11, layout.POLICY), {})  # begun
    run.stage("pool_03/drafts", {}).finish()
    run.log("end")
    assert layout.finished(tmp_path)
    run.log("start")
    run.progress({"round": 2, "score": 7.5})
  assert layout.newest_policy(tmp_path) == tmp_path / "round_10" / "policy"
  assert layout.rounds(tmp_path) == [2, 9, 10, 11] and layout.pools(tmp_path) == {0: "pool", 3: "pool_03"}
  assert layout.stages(tmp_path)[-1] == layout.Found("round_11/policy", tmp_path / "round_11/policy", None)
  assert {found.name for found in layout.stages(tmp_path)[:-1]} >= {"judge", "sft_1", "round_02/policy"}
  assert layout.progress(tmp_path) == [{"round": "2", "score": "7.5"}] and not layout.finished(tmp_path)
  assert layout.parts_of(tmp_path / "judge") == [] and layout.parts_of(tmp_path / "round_11/policy") is None


@pytest.mark.parametrize("accepted", [False, True])
def test_the_judge_is_the_distilled_one_if_it_was_accepted(accepted, tmp_path):
  with Run(tmp_path) as run:
    run.stage("judge", {}).finish()
    run.stage("judge_distilled", {}).finish(accepted=accepted)
  assert layout.judge_of(tmp_path).name == ("judge_distilled" if accepted else "judge")


def test_the_config_of_a_stage_is_that_of_its_round_else_of_its_run(tmp_path):
  stage = tmp_path / "round_02" / "policy"
  (stage / "model").mkdir(parents=True)
  with pytest.raises(RunError, match=r"no config\.json of a run lies above this stage"):
    layout.config_of(stage)
  (tmp_path / "config.json").write_text(json.dumps({"recipe": "alma", "rounds": {}}))
  (stage / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
  assert layout.config_in(stage / "model") is None
  assert layout.config_of(stage) == layout.config_of(tmp_path) == {"recipe": "alma", "rounds": {}}
  (tmp_path / "round_02" / "config.json").write_text(json.dumps({"recipe": "alma"}))
  assert layout.is_round(layout.config_of(stage)) and not layout.is_round(layout.config_of(tmp_path / "sft_1"))
  (tmp_path / "config.json").write_bytes(b'{"recipe": "\xff"}')
  with pytest.raises(RunError, match=r"config\.json is damaged .*; restore or delete it"):
    layout.config_in(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
  (tmp_path / "log.jsonl").write_text('{"event": "start"}\n{"event": "e')
  assert layout.json_lines(tmp_path / "log.jsonl") == [{"event": "start"}]
