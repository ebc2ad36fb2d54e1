"""`alma chat`, driven through a pipe: answers in pieces, scores, best-of-N, settings and mistakes."""

import io
import json
import re

import jax
import pytest

from alma_jax.tools import chat

FLAGS = ("--model=mini", "--judge=mini", "--max_new_tokens=8", "--slots=4")
ASK = "give country of volos please"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Programs for one device compile faster."""
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def talk(monkeypatch, tmp_path, capsys):
  """talk(line, ...): the exit status, what was printed, and the conversation at the end."""

  def talk(*lines, flags=FLAGS):
    saved = tmp_path / "saved.jsonl"
    saved.unlink(missing_ok=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, f"/save {saved}"]) + "\n"))
    status = chat.main(flags)
    held = json.loads(saved.read_text())["messages"] if saved.exists() else None
    return status, capsys.readouterr(), held

  return talk


def test_answers_of_a_stream_are_those_of_best_of_n_and_the_best_is_kept(talk, monkeypatch):
  pieces = []
  streamed = chat.sampling.streamed

  def heard(*arguments):
    *rest, show = arguments

    def both(piece):
      pieces.append(piece)
      show(piece)

    return streamed(*rest, both)

  monkeypatch.setattr(chat.sampling, "streamed", heard)
  answers = []
  for more in range(4):  # the k-th answer to a conversation does not depend on how it was asked for
    status, _, held = talk(ASK, *["/again"] * more, "/judge")
    assert status == 0 and [turn["role"] for turn in held] == ["user", "assistant"]
    answers.append(held[1]["content"])
    assert "".join(pieces).endswith(answers[-1]) and sum(map(bool, pieces)) > 2 * (more + 1)
    pieces.clear()
  assert len(set(answers)) > 1
  status, printed, held = talk(ASK, "/best 3", "/judge")
  shown = re.findall(r"^\[([\d.]+)\] ((?:(?!^\[|^best).)*)", printed.out, re.MULTILINE | re.DOTALL)
  scores = [float(score) for score, _ in shown]
  assert sorted(text.strip() for _, text in shown[:3]) == sorted(answers[1:])
  assert scores[:3] == sorted(scores[:3]) and scores[2] == scores[3]  # the best stands last, and /judge agrees
  assert held[1]["content"] == shown[2][1].strip()
  assert f"best of 3: {scores[2]:.3f}; mean {sum(scores[:3]) / 3:.3f}, lowest {scores[0]:.3f}" in printed.out


def test_turns_settings_and_mistakes(talk):
  lines = ("food of quito", "/reset", ASK, "/temperature 0", "and of\\", "lima", "//ok", "/undo", "/show", "/help")
  status, printed, held = talk(*lines)
  assert status == 0 and [turn["role"] for turn in held] == ["user", "assistant"] * 2
  assert held[0]["content"] == ASK and held[2]["content"] == "and of\nlima" and "user: /ok" not in printed.out
  assert "temperature 0, top_p 0.95" in printed.out
  told = re.findall(r"/[a-z_]+", printed.out.rpartition("  /judge ")[2])
  assert {f"/{name}" for name in (*chat.COMMANDS, *chat.SETTINGS)} - {"/judge"} <= {*told}
  for line, said in (
    ("/bset 2", "no command /bset; did you mean /best?"),
    ("/judge", "there is no answer yet"),
    ("/system be brief", "chat format 'mini' has no system turn"),
    ("/best many", "/best N: 'many' is no whole number"),
    ("/temperature -1", "temperature is -1.0; it must be 0 (greedy) or more"),
    ("/max_new_tokens 256", "the model has 256 positions in all"),
    (" ".join(["word"] * 300), "positions less /max_new_tokens 8 leave 248"),
  ):
    status, printed, held = talk(line)
    assert status == 1 and said in printed.err and held is None


def test_a_model_outside_of_runs_has_no_judge_of_its_own(talk):
  status, printed, _ = talk(ASK, "/judge", flags=[flag for flag in FLAGS if "judge" not in flag])
  assert status == 1 and "start again with --judge" in printed.err
