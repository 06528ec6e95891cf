"""Reads the text of a compiled program: the TPU compiler's cycles, and what goes over the links.

In `compiled.as_text()` every fusion that stands in a computation by itself carries
`"estimated_cycles"`. Loops hold theirs in the body: it counts as often as the loop runs, which is
the constant that its condition compares the counter with.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r" compare\((.*?)\), direction=LT")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_KINDS = {  # part of an instruction's path, the first that is there; einsums show their letters
    "bthk,bshk->bhts/dot_general": "scores",
    "bhts,bshk->bthk/dot_general": "context",
    "bsd,dhk->bshk/dot_general": "projections",
    "bthk,hkd->btd/dot_general": "projections",
    "->...v": "logits",
    "dot_general": "mlp",
    "jit(dynamic_index_in_dim)": "slices of stacked arrays",
}
_PASSES = {"rematted_computation": "recomputed", "transpose(jvp": "backward", "jvp(": "forward"}


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a computation that runs.

    Attributes:
      name: JAX's path to what it computes, or the instruction's own name.
      cycles: of one run; 0 where the compiler gives no estimate.
      times: how often it runs.
      estimated: whether there is an estimate.
      kernel: whether it is a kernel of its own (Pallas), which carries no estimate.
    """

    name: str
    cycles: int
    times: int
    estimated: bool
    kernel: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      bytes: of its result, on one device.
      group: devices that take part together.
      times: how often it runs.
    """

    kind: str
    bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all, by the ring algorithms."""
        others = self.group - 1
        share = {
            "all-reduce": 2 * others / self.group,
            "all-gather": others / self.group,
            "reduce-scatter": others,
            "all-to-all": others / self.group,
        }.get(self.kind, 1.0)
        return self.bytes * share * self.times


def ops(text: str) -> list[Op]:
    """Every estimated instruction and every kernel call that the program runs.

    Raises: ValueError if there is no entry computation, or a loop without a readable trip count.
    """
    return [
        Op(
            name=path[1] if path else line.split(" = ")[0].split()[-1].lstrip("%"),
            cycles=int(cycles[1]) if cycles else 0,
            times=times,
            estimated=cycles is not None,
            kernel=_KERNEL in line,
        )
        for line, times in _lines(text)
        if (cycles := _CYCLES.search(line)) or _KERNEL in line
        for path in [_NAME.search(line)]
    ]


def collectives(text: str, devices: int) -> list[Collective]:
    """Every exchange between devices that the program makes.

    Args:
      devices: that the program runs on; the group of an exchange that names none.
    Raises: ValueError as `ops`.
    """
    found = []
    for line, times in _lines(text):
        match = _COLLECTIVE.search(line)
        if match:
            sizes = [_bytes(kind, shape) for kind, shape in _ARRAY.findall(match[1])]
            whole = max(sizes) if match[3] else sum(sizes)  # a start's result has its operands too
            found.append(Collective(match[2], whole, _group(line, devices), times))
    return found


def total_cycles(found: list[Op]) -> int:
    """Entry plus each loop's body times its trip count."""
    return sum(op.cycles * op.times for op in found)


def dearest(found: list[Op], count: int = 10) -> list[tuple[str, int]]:
    """(name, cycles) of the dearest names, instructions of one name added up."""
    by_name: collections.Counter[str] = collections.Counter()
    for op in found:
        by_name[op.name] += op.cycles * op.times
    return by_name.most_common(count)


def by_kind(found: list[Op]) -> dict[tuple[str, str], int]:
    """Cycles by (kind, pass), dearest kind first; a fusion counts as what its last operation is.

    Kinds are the matmuls of a T5, slices of what loops run over, and "rest" (softmax, masks, norms,
    gradients summed, optimizer); passes "forward", "recomputed" and "backward", "" for neither.
    """
    cycles: collections.Counter[tuple[str, str]] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for op in found:
        kind = next((kind for part, kind in _KINDS.items() if part in op.name), "rest")
        when = next((when for part, when in _PASSES.items() if part in op.name), "")
        cycles[kind, when] += op.cycles * op.times
        kinds[kind] += op.cycles * op.times
    return dict(sorted(cycles.items(), key=lambda item: -kinds[item[0][0]]))


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    bodies: dict[str, list[str]] = {}
    entry, lines = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """Every instruction that runs by itself, and how often."""
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    yield from _run(bodies, entry, 1)


def _run(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in bodies[name]:
        loop, call = _LOOP.search(line), _CALL.search(line)
        if loop:
            yield from _run(bodies, loop[2], times * _trips(bodies[loop[1]], loop[1]))
        elif call:
            yield from _run(bodies, call[1], times)
        else:
            yield line, times


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind in ("pred", "token") else int(re.sub(r"\D.*", "", kind.lstrip("bfsuc")) or 8)
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _group(line: str, devices: int) -> int:
    listed, iota = _GROUPS.search(line), _IOTA.search(line)
    if listed and listed[1]:
        return listed[1].count(",") + 1
    return int(iota[1]) if iota else devices


def _trips(condition: list[str], name: str) -> int:
    constants = {
        found[1]: int(found[2]) for line in condition for found in _CONSTANT.finditer(line)
    }
    for line in condition:
        compared = _COMPARE.search(line)
        if compared:
            for operand, trips in constants.items():
                if re.search(rf"%?{re.escape(operand)}$", compared[1]):
                    return trips
    raise ValueError(f"the trip count of a loop is not in its condition {name}")
