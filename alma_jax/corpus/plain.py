"""HTML of question-and-answer sites as plain text: code blocks and lists stay, all other markup goes.

  plain("<p>Use <code>x</code>:</p><pre><code>x = 1</code></pre>")         "Use `x`:\\n\\n```\\nx = 1\\n```"

Links keep their text, images leave nothing. `prose` is the text without its code, for rules about words.
"""

import html.parser
import re

BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "table", "tr", "hr", "pre"}
_FENCED = re.compile(r"```.*?(```|\Z)|`[^`\n]*`", re.DOTALL)


def plain(text: str) -> str:
  """The text with its code blocks, fenced, and its lists."""
  reader = _Reader()
  reader.feed(text)
  reader.close()
  return reader.text()


def prose(text: str) -> str:
  """The text of `plain` without what stands in code."""
  return _FENCED.sub(" ", text)


class _Reader(html.parser.HTMLParser):
  """Collects lines; `lists` holds the open lists, None for one of bullets, else the number of its last item."""

  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.out: list[str] = []
    self.lists: list[int | None] = []
    self.code: list[str] | None = None  # the text of a code block that is open

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    if tag == "pre":
      self._end_block()
      self.code = []
    elif self.code is not None:
      return
    elif tag in ("ul", "ol"):
      self.out.append("" if self.lists else "\n\n")
      self.lists.append(0 if tag == "ol" else None)
    elif tag == "li":
      self.out.append(f"\n{'  ' * max(0, len(self.lists) - 1)}{self._mark()} ")
    elif tag == "br":
      self.out.append("\n")
    elif tag == "code":
      self.out.append("`")
    elif tag in BLOCKS and not self._in_item():
      self._end_block()

  def handle_endtag(self, tag: str) -> None:
    if tag == "pre" and self.code is not None:
      block, self.code = "".join(self.code).strip("\n"), None
      self.out.append(f"```\n{block}\n```\n\n")
    elif self.code is not None:
      return
    elif tag in ("ul", "ol") and self.lists:
      self.lists.pop()
      self.out.append("" if self.lists else "\n\n")
    elif tag == "code":
      self.out.append("`")
    elif tag in BLOCKS and not self._in_item():
      self._end_block()

  def handle_data(self, data: str) -> None:
    if self.code is not None:
      self.code.append(data)
    else:
      self.out.append(re.sub(r"\s+", " ", data))

  def text(self) -> str:
    """Blank lines are single, and lines of prose have no space at their ends."""
    parts = re.split(r"(```\n.*?\n```)", "".join(self.out), flags=re.DOTALL)
    for i, part in enumerate(parts):
      if not part.startswith("```"):
        lines = [line.rstrip() for line in part.split("\n")]
        lines = [line if re.match(r" *(-|\d+\.) ", line) else line.strip() for line in lines]
        parts[i] = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    return "".join(parts).strip()

  def _end_block(self) -> None:
    self.out.append("\n\n")

  def _in_item(self) -> bool:
    return bool(self.lists)

  def _mark(self) -> str:
    if not self.lists or self.lists[-1] is None:
      return "-"
    self.lists[-1] += 1
    return f"{self.lists[-1]}."
