"""The bytes that one step of a compiled decoding loop takes from and to a device's memory, read from its HLO.

  moved(compiled.as_text(), {1: 350, 16: 1024})    # live keys of a row, by its queries: of a slot, of a prompt's row

Counted are operands and results that lie in the device's memory (HBM), of every instruction of the loop's body:

  inner loops       as often as they run
  branches          the one that moves least: a rare case is what the others are for
  rows looked up    what is taken, not the table; likewise what is put into an array in place, read and written
  attention_over_few   queries and results whole; keys and values by what the caller says is live, and half a block for
                    each row that has keys, because whole blocks are read. The program does not know the lengths.

It is no measurement: caches, padded layouts and what the compiler copies while it computes are not in the text.
"""

import re
from collections.abc import Iterable, Mapping

from alma_jax.llama.attention_decode_tpu import block
from alma_jax.plan import hlo

FREE = {  # what moves nothing by itself
  "after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "tuple",
}  # fmt: skip
LOOKUPS = {"gather": None, "dynamic-slice": None, "scatter": 2, "dynamic-update-slice": 1}  # the operand that is put
_ARRAY = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")
_FEW = re.compile(r"= \(\w+\[\d+,(\d+),.*attention_over_few_(\d+)")  # queries in a row of its result, heads of keys

Lines = dict[str, list[str]]


def moved(text: str, live: Mapping[int, float]) -> float:
  """The bytes of a step of the program's longest loop; 0 if it has none."""
  computations = dict(hlo._computations(text))
  bodies = [name for name in hlo.loops(text) if name in computations]
  body = max(bodies, key=lambda name: len(computations[name]), default=None)
  return _computation(computations, body, live) if body else 0.0


def _computation(computations: Lines, name: str, live: Mapping[int, float]) -> float:
  lines = computations[name]
  defined = hlo._defined(lines)
  return sum(_instruction(computations, defined, line, live) for line in lines if " = " in line)


def _instruction(computations: Lines, defined: dict[str, str], line: str, live: Mapping[int, float]) -> float:
  made = line.partition(" = ")[2]
  if not (op := hlo._OP.search(made)) or op[1] in FREE or op[1].endswith("-done"):
    return 0.0
  operands, called = [_made(defined.get(x, "")) for x in hlo._operands(made, op[1])], hlo._called(line)
  if op[1] == "while":
    body = re.search(r"body=%?([\w.\-]+)", line)
    assert body
    return hlo._trips(line, computations) * _computation(computations, body[1], live)
  if op[1] == "conditional":
    return min(_computation(computations, branch, live) for branch in called if branch in computations)
  if op[1] == "call":
    return sum(_computation(computations, name, live) for name in called if name in computations)
  result = made[: op.start()]
  if op[1] == "custom-call" and (found := _FEW.search(line)):
    return _few(result, operands, live[int(found[1])], int(found[2]))
  if op[1].endswith("-start"):  # its result names its operand again
    return hbm(operands) + hbm(_ARRAY.findall(result)[:1])
  if op[1] == "fusion" and called and called[0] in computations:
    return _fusion(computations[called[0]], result, operands)
  if op[1] in LOOKUPS:
    return _looked_up(op[1], operands, result)
  return hbm(operands) + hbm([result])


def _few(result: str, operands: list[str], live: float, K: int) -> float:
  """attention_over_few: see above. The last two operands are keys and values [rows, S * K, H]."""
  *rest, keys, _ = operands
  S = int(re.findall(r"\d+", keys.partition("[")[2])[1]) // K
  return hbm(rest) + hbm([result]) + 2 * hlo.sizes(keys) * min(S, live + block(S, K) / 2) / S


def _fusion(lines: list[str], result: str, operands: list[str]) -> float:
  """A fusion that takes rows of an operand, or puts rows into one, moves those rows and its other operands."""
  defined, uses = hlo._defined(lines), dict[str, list[str]]()
  for line in lines:
    for name in re.findall(r"%([\w.\-]+)", line.partition(" = ")[2]):
      uses.setdefault(name, []).append(line)
  total, whole = 0.0, hbm([result])
  for name, line in defined.items():
    found = re.search(r" parameter\((\d+)\)", line)
    if not found or int(found[1]) >= len(operands):
      continue
    operand, users = operands[int(found[1])], uses.get(name, [])
    words = [(op[1], user) for user in users if (op := hlo._OP.search(user.partition(" = ")[2]))]
    if len(words) == 1 and words[0][0] in LOOKUPS and hlo._operands(words[0][1], words[0][0])[0] == name:
      op, user = words[0]
      of = [_made(defined.get(x, "")) for x in hlo._operands(user, op)]
      taken = hlo.sizes(_made(user) if LOOKUPS[op] is None else of[LOOKUPS[op] or 0])
      total += taken if hbm([operand]) else 0
      if LOOKUPS[op] is not None and hbm([_made(user)]) <= whole:  # the result is the operand, changed in place
        whole -= hbm([operand])
        total += taken
      continue
    total += hbm([operand])
  return total + max(0.0, whole)


def _looked_up(op: str, operands: list[str], result: str) -> float:
  put = LOOKUPS[op]
  if put is None:
    return 2 * hbm([result])
  return 2 * hbm([operands[put]])


def _made(line: str) -> str:
  """The type of what an instruction makes."""
  made = line.partition(" = ")[2]
  op = hlo._OP.search(made)
  return made[: op.start()] if op else made


def hbm(types: Iterable[str]) -> float:
  """The bytes of all arrays in these types that lie in the device's memory: S(1) and above is memory on the chip."""
  arrays = (array for type_ in types for array in _ARRAY.findall(type_))
  return sum(hlo.sizes(array) for array in arrays if not re.search(r"S\([1-9]", array))
