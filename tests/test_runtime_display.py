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
