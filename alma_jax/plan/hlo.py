"""What a compiled program sends between devices, read from the text of its HLO.

  for found in collectives(compiled.as_text()): ...     # Collective("all-gather", "bf16[4096,14336]", 1.0e8, times=32)

Loops are counted as often as they run: GPUs' and CPUs' programs say how often, in TPUs' the loop's condition compares a
counter with a constant. A loop of another kind counts once.

  ENTRY main:  while(...), condition=c, body=b        c: compare(counter, constant(32)), direction=LT     b x 32
  b:           while(...), condition=d, body=e        d: compare(counter, constant(4)),  direction=LT     e x 32 x 4
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all"

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SIZES |= {"f64": 8, "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(rf"\b({'|'.join(_SIZES)})\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  kind: str  # one of KINDS
  shape: str  # the largest array that it makes, as HLO writes it
  bytes: float  # that each device sends, all `times` together
  times: int  # in a step


def collectives(text: str) -> list[Collective]:
  """The collectives of a program, those that send most first; equal ones are one."""
  computations = dict(_computations(text))
  times = _times(computations)
  found: dict[tuple[str, str], list[float]] = {}
  for name, lines in computations.items():
    for line in lines if times[name] else ():
      kind = _kind(line)
      if kind is None:
        continue
      if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's fusion of it with its slice
        kind = "reduce-scatter"
      shape, sent = _sent(kind, line, fused=name.startswith("all-reduce-scatter"))
      entry = found.setdefault((kind, shape), [0.0, 0.0])
      entry[0] += sent * times[name]
      entry[1] += times[name]
  made = [Collective(kind, shape, sent, int(n)) for (kind, shape), (sent, n) in found.items()]
  return sorted(made, key=lambda c: -c.bytes)


def sent(found: Iterable[Collective]) -> float:
  """The bytes that each device sends in a step."""
  return sum(c.bytes for c in found)


def summary(found: Iterable[Collective]) -> str:
  """In a line: "448 x all-gather 26.1 GB, 2 x all-reduce 1.84 GB"."""
  by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for c in found:
    by_kind[c.kind][0] += c.times
    by_kind[c.kind][1] += c.bytes
  ordered = sorted(by_kind.items(), key=lambda item: -item[1][1])
  return ", ".join(f"{n:,.0f} x {kind} {size / 1e9:.3g} GB" for kind, (n, size) in ordered) or "none"


def sizes(shape: str) -> int:
  """The bytes of all arrays in a piece of HLO."""
  found = _SHAPE.findall(shape)
  return sum(_SIZES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in found)


def loops(text: str) -> dict[str, int]:
  """The bodies of all loops, and how often each runs in one step."""
  computations = dict(_computations(text))
  times = _times(computations)
  bodies = {m[1] for lines in computations.values() for line in lines if (m := re.search(r"body=%?([\w.\-]+)", line))}
  return {name: int(times[name]) for name in bodies if name in times}


def lines_in_loops(text: str) -> Iterator[str]:
  """Every instruction that runs in a loop, those of its fusions included."""
  computations = dict(_computations(text))
  waiting, seen = list(loops(text)), set()
  while waiting:
    name = waiting.pop()
    if name in seen or name not in computations:
      continue
    seen.add(name)
    for line in computations[name]:
      yield line
      waiting += _called(line)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  """The instructions of each computation. Kernels stand in them with line breaks and braces of their own, so that only
  the next computation ends one."""
  name, lines = "", []
  for line in text.splitlines():
    if not line.startswith(" ") and (head := _HEAD.match(line)):
      if name:
        yield name, lines
      name, lines = head[1], []
    elif name:
      lines.append(line)
  if name:
    yield name, lines


def _called(line: str) -> list[str]:
  found = _CALLED.findall(line)
  if branches := _BRANCHES.search(line):
    found += re.findall(r"[\w.\-]+", branches[1])
  return found


def _times(computations: dict[str, list[str]]) -> dict[str, float]:
  """How often each computation runs in a step: the entry, which nothing calls, once."""
  calls: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
  for name, lines in computations.items():
    for line in lines:
      if "=" not in line or not (called := _called(line)):
        continue
      trips = _trips(line, computations) if " while(" in line else 1
      calls[name] += [(other, trips) for other in called if other in computations]
  callers = collections.Counter(other for made in calls.values() for other, _ in made)
  times = {name: 0.0 if callers[name] else 1.0 for name in computations}
  ready = [name for name in computations if not callers[name]]
  while ready:
    name = ready.pop()
    for other, trips in calls[name]:
      times[other] += times[name] * trips
      callers[other] -= 1
      if not callers[other]:
        ready.append(other)
  return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """How often a loop runs that counts from 0: its limit over its step, which is 2 where the compiler has unrolled it
  once. 1 where the program does not say.

    condition   c = get-tuple-element(p), index=4     k = constant(8)     ROOT compare(c, k), direction=LT
    body        c = get-tuple-element(p), index=4     n = add(c, constant(2))     ROOT tuple(.., .., .., .., n, ..)
  """
  if known := _TRIPS.search(line):
    return int(known[1])
  condition, body = (computations.get(name, []) for name in re.findall(r"(?:condition|body)=%?([\w.\-]+)", line)[:2])
  found, rest = _defined(condition), _defined(body)
  root = next((x for x in condition if "ROOT" in x and "direction=LT" in x), "")
  limit, place = None, None
  for operand in _operands(root, "compare"):
    limit = _constant(found.get(operand, "")) if limit is None else limit
    if at := re.search(r"get-tuple-element\(.*index=(\d+)", found.get(operand, "")):
      place = int(at[1])
  if limit is None:
    return 1
  next_ = _operands(next((x for x in body if "ROOT" in x), ""), "tuple")
  added = rest.get(next_[place], "") if place is not None and place < len(next_) else ""
  steps = [step for x in _operands(added, "add") if (step := _constant(rest.get(x, "")))]
  return -(-limit // (steps[0] if steps else 1))


def _defined(lines: list[str]) -> dict[str, str]:
  """The line of each name."""
  return {m[1]: line for line in lines if (m := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line))}


def _operands(line: str, op: str) -> list[str]:
  return re.findall(r"%([\w.\-]+)", line.partition(f" {op}(")[2].partition(")")[0])


def _constant(line: str) -> int | None:
  found = re.search(r" constant\((\d+)\)", line)
  return int(found[1]) if found else None


def _kind(line: str) -> str | None:
  """The kind of the collective that this line begins, None if it begins none."""
  op = _OP.search(line.partition(" = ")[2])
  word = op[1].removesuffix("-start") if op else ""
  return word if word in KINDS else None


def _sent(kind: str, line: str, fused: bool) -> tuple[str, float]:
  """The largest array of a collective's result, and the bytes that each device sends for it once."""
  made = line.partition(" = ")[2]
  op = _OP.search(made)
  assert op is not None  # the line is a collective
  arrays = [m.group() for m in _SHAPE.finditer(made[: op.start()])]
  if op[1].endswith("-start") and len(arrays) > 1 and kind != "all-reduce":
    # The results of a start are its inputs, then what it makes, then perhaps words that it waits with.
    whole = [x for x in arrays if not x.endswith("[]")]
    arrays = whole[len(whole) // 2 :] or arrays
  size, n = sum(map(sizes, arrays)), _group(line)
  others = (n - 1) / n if n else 1.0
  factor = {"all-reduce": 2 * others, "reduce-scatter": others * (1 if fused else n or 1), "collective-permute": 1.0}
  return max(arrays, key=sizes, default=""), size * factor.get(kind, others)


def _group(line: str) -> int:
  """How many devices take part with each other; 0 where the line does not say."""
  if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(m[1].split(","))
  if m := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(m[1])
  if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", line):
    axes = dict(re.findall(r"'([^']+)'=(\d+)", m[1]))
    return math.prod(int(axes[name]) for name in re.findall(r"'([^']+)'", m[2]))
  return 0
