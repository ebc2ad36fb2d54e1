"""The plan of the house: which room may import which, held against all imports of alma_jax, also inside functions."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "alma_jax"

# A room is a folder or a file at the top of alma_jax. It may import the rooms after its arrow and all below those.
ARROWS = """
  main      -> check start tools recipes plan report sweeps config_files
  check     -> start stages
  start     -> recipes report runtime
  tools     -> start recipes plan stages report evals config_files
  sweeps    -> options report config_files
  recipes   -> stages
  plan      -> stages
  stages    -> judges corpus
  judges    -> runtime evals
  runtime   -> engine text store
  engine    -> llama keys options
  llama     -> errors
  report    -> store
  options   -> names
  names     -> errors
  corpus    -> keys errors
  text      -> errors
  store     -> errors
  evals     -> store errors
  keys      ->
  errors    ->
  config_files ->
"""
DOWN = {above: below.split() for above, below in (line.split("->") for line in ARROWS.strip().splitlines())}
DOWN = {above.strip(): below for above, below in DOWN.items()}
SHARED = {"command", "jsonl"}  # of tools/: what the tools have in common, no tools themselves

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def reachable(name):
  """The rooms that a room may import, itself among them."""
  found, new = {name}, [name]
  while new:
    new = [below for above in new for below in DOWN[above] if below not in found]
    found |= set(new)
  return found


def file_of(module):
  """The file of a module of ours, None if there is no such module."""
  path = ROOT.joinpath(*module.split("."))
  return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imports(path):
  """The files of alma_jax that a file imports, with the lines: `from alma_jax.engine import score` is score.py."""
  found = []
  for node in ast.walk(TREES[path]):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: a relative import"
      whole = [f"{node.module}.{alias.name}" for alias in node.names]
      modules = [name if file_of(name) else node.module for name in whole]
    else:
      continue
    ours = [module for module in modules if module.partition(".")[0] == "alma_jax"]
    files = {file for file in map(file_of, ours) if file and file != PACKAGE / "__init__.py"}
    found += [(file, node.lineno) for file in sorted(files)]
  return found


def where(path, line, other):
  return f"{path.relative_to(ROOT)}:{line} imports {other.relative_to(ROOT)}"


def test_every_room_has_its_place():
  assert {room(path) for path in FILES} - {"mini"} <= set(DOWN)
  assert not [name for name in DOWN if name in reachable(name) and any(name in reachable(b) for b in DOWN[name])]


def test_imports_point_down_only():
  found = [
    where(path, line, other)
    for path in FILES
    for other, line in imports(path)
    if room(path) != "mini" and room(other) not in reachable(room(path))
  ]
  assert not found, "\n".join(found)


@pytest.mark.parametrize("folder, shared", [("stages", set()), ("tools", SHARED)])
def test_no_stage_imports_a_stage_and_no_tool_a_tool(folder, shared):
  found = [
    where(path, line, other)
    for path in FILES
    for other, line in imports(path)
    if room(path) == room(other) == folder
    and other.stem not in shared | {"__init__"}
    and not other.stem.startswith(f"{path.stem}_")  # a part of the tool
  ]
  assert not found, "\n".join(found)


def test_nobody_imports_the_miniature_world():
  found = [
    where(path, line, other)
    for path in FILES
    for other, line in imports(path)
    if room(other) == "mini" and room(path) != "mini"
  ]
  assert not found, "\n".join(found)


def test_no_files_import_each_other():
  after = {path: {other for other, _ in imports(path)} for path in FILES}
  while free := [path for path, others in after.items() if not others & after.keys()]:
    for path in free:  # it imports nothing that is left, so no circle goes through it
      del after[path]
  circle = [f"{path.relative_to(ROOT)} imports {', '.join(sorted(o.stem for o in others & after.keys()))}"
            for path, others in after.items()]  # fmt: skip
  assert not circle, "\n".join(circle)


# The word `mini`

EXAMPLES = re.compile(
  r"configs/(alma|lima|isara|spa)\.py:mini|runs/mini|--model=mini"
)  # commands that a docstring or a flag shows
WORD = re.compile(r"\bmini\b", re.IGNORECASE)


def said(tree):
  """Every identifier and text of a file with its line, without the example commands."""
  for node in ast.walk(tree):
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield line, EXAMPLES.sub("", node.value)
    for field in ("id", "attr", "arg", "name", "asname", "module"):
      if isinstance(name := getattr(node, field, None), str):
        yield line, name.replace("_", " ")


def test_no_file_knows_the_miniature_world_but_the_table_of_names():
  found = [
    f"{path.relative_to(ROOT)}:{line}: {WORD.search(text)[0]} in {' '.join(text.split())[:80]!r}"
    for path in FILES
    if room(path) not in ("mini", "names")
    for line, text in said(TREES[path])
    if WORD.search(text)
  ]
  assert not found, "\n".join(found)
