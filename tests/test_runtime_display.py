"""Progress bars in a log file: few whole lines; TQDM_DISABLE leaves them out."""

import itertools
import re

from alma_jax.runtime import display


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


def bar_at(clock, total):
  bar = display.Display().bar("sft_1", total, "steps")
  bar._time = clock
  bar.start_t = bar.last_print_t = clock.now
  return bar


def test_a_log_file_has_few_whole_lines(capsys, monkeypatch):
  monkeypatch.delenv("TQDM_DISABLE", raising=False)
  clock = Clock()
  with bar_at(clock, 36_000) as bar:
    for _ in range(36_000):  # ten hours, a step a second
      clock.now += 1
      bar.update(1)
  text = capsys.readouterr().err
  lines = text.splitlines()
  assert "\r" not in text and all(line.startswith("sft_1") for line in lines)
  assert " 30/36000 [00:30<" in lines[0] and "100% 36000/36000 [10:00:00<" in lines[-1]
  assert 60 < len(lines) < 120
  seconds = [int(found) for found in re.findall(r" (\d+)/36000", text)]
  assert max(b - a for a, b in itertools.pairwise(seconds)) <= display.LATE + 1


def test_a_short_bar_is_one_line_and_one_that_is_disabled_none(capsys, monkeypatch):
  monkeypatch.delenv("TQDM_DISABLE", raising=False)
  clock = Clock()
  with bar_at(clock, 3) as bar:
    for _ in range(3):
      clock.now += 1
      bar.advance(1, 10)
  text = capsys.readouterr().err
  assert text.count("\n") == 1 and "100% 3/3 [00:03<" in text and "tokens/s" in text
  monkeypatch.setenv("TQDM_DISABLE", "1")
  with display.Display().bar("sft_1", 3, "steps") as bar:
    bar.update(3)
  display.Display().say("a line")
  assert capsys.readouterr().err == "a line\n"


def test_the_whole_run_has_one_line_with_the_time_left(capsys, monkeypatch):
  """Two rounds: the second is twice as large. A kind's time is its last rate times the size of what is left."""
  monkeypatch.delenv("TQDM_DISABLE", raising=False)
  clock = Clock()
  planned = {"seeds": 1.0, "round_02/responses": 10.0, "round_02/policy": 1.0}
  planned |= {"round_03/responses": 20.0, "round_03/policy": 1.0}
  whole = display.Whole(planned, display.Display(), clock)
  whole.there("seeds", {"seconds": 7.0})  # an earlier start's
  assert whole.text() == "run: 1 of 5 stages, 0:00:07 so far, 4 stages whose kind is not measured yet left"
  whole.begun("round_02/responses")
  clock.now += 100
  whole.finished("round_02/responses", {"seconds": 100.0})
  known = "run: 2 of 5 stages, 0:01:47 so far, about 0:03:20 left"
  assert whole.text() == f"{known} and 2 stages whose kind is not measured yet"
  whole.begun("round_02/policy")
  clock.now += 50
  whole.finished("round_02/policy", {"seconds": 50.0})
  whole.begun("round_03/responses")
  clock.now += 60  # of the 200 seconds that it will take
  assert whole.text() == "run: 3 of 5 stages, 0:02:37 so far, about 0:03:10 left"
  whole.begun("round_03/extra")  # what was not foreseen joins
  assert whole.text().startswith("run: 3 of 6 stages")
  for name in ("round_03/responses", "round_03/extra", "round_03/policy"):
    whole.finished(name, {"seconds": 1.0})
  assert whole.text() == "run: 6 of 6 stages, 0:02:40 so far"
  lines = capsys.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 4 and all(line.startswith("run: ") for line in lines)  # at most one in 30 seconds


def test_the_whole_line_is_left_out_where_bars_are(capsys, monkeypatch):
  monkeypatch.setenv("TQDM_DISABLE", "1")
  whole = display.Whole({"seeds": 1.0}, display.Display(), Clock())
  whole.finished("seeds", {"seconds": 1.0})
  display.Whole({"seeds": 1.0}, display.Display(speaks=False), Clock()).finished("seeds", {"seconds": 1.0})
  assert capsys.readouterr().err == ""
