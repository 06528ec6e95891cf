"""Reads the text of a compiled program: matmuls, the TPU compiler's cycles, exchanges of devices.

In `compiled.as_text()` every fusion that stands in a computation by itself carries
`"estimated_cycles"`. What stands in a loop's body counts as often as the loop runs: the trip count
that the loop states, or else the constant that its condition compares the counter with.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NONE = 2**63 - 1  # where the compiler has no estimate: of copies and gathers on a SparseCore
_CYCLES = re.compile(rf'"estimated_cycles":"(?!{_NONE}")(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALL = re.compile(r" call(?:-start)?\(.*to_apply=%?([\w.\-]+)")
_INSIDE = re.compile(r" (?!async-done|async-update)[\w\-]+\(.* calls=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r" compare\((.*?)\), direction=LT")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_PRODUCT = re.compile(r"%?([\w.\-]+) = (\S+) (dot|convolution)\(([^)]*)\)")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ([a-z]+\d*\w*\[[\d,]*\])")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
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
    for line, times, inside in _everything(text):
        match = _COLLECTIVE.search(line)
        if match:
            kind, sizes = match[2], [_bytes(*array) for array in _ARRAY.findall(match[1])]
            whole, group = _result_bytes(kind, bool(match[3]), sizes), _group(line, devices)
            if kind == "all-reduce" and "all-reduce-scatter" in inside:  # of which a part is kept
                kind, whole = "reduce-scatter", whole // group
            found.append(Collective(kind, whole, group, times))
    return found


def compiled_flops(text: str) -> int:
    """FLOPs of all matmuls that one device computes, a multiply-add counted as 2.

    The TPU compiler writes matmuls as convolutions: of these only pairs of positions count that
    are neither padding nor the holes of a dilation, as in XLA's own cost analysis.

    Raises: ValueError as `ops`.
    """
    bodies, total = _computations(text)[0], 0
    shapes: dict[str, dict[str, list[int]]] = {}
    for line, times, inside in _everything(text):
        product = _PRODUCT.search(line)
        if product:
            if inside not in shapes:
                results = (_RESULT.match(other) for other in bodies[inside])
                shapes[inside] = {found[1]: _shape(found[2]) for found in results if found}
            names = re.findall(r"%([\w.\-]+)", product[4])
            operands = [shapes[inside][name] for name in names]
            count = _dot if product[3] == "dot" else _convolution
            total += 2 * times * count(line, operands, _shape(product[2]))
    return total


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
    yield from ((line, times) for line, times, _ in _everything(text, into_fusions=False))


def _everything(text: str, into_fusions: bool = True) -> Iterator[tuple[str, int, str]]:
    """Every instruction that runs, how often, and the computation it stands in."""
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    yield from _run(bodies, entry, 1, into_fusions)


def _run(
    bodies: dict[str, list[str]], name: str, times: int, into_fusions: bool
) -> Iterator[tuple[str, int, str]]:
    for line in bodies[name]:
        loop, call = _LOOP.search(line), _CALL.search(line)
        if loop:
            stated = _TRIPS.search(line)
            trips = int(stated[1]) if stated else _trips(bodies[loop[1]], loop[1])
            yield from _run(bodies, loop[2], times * trips, into_fusions)
        elif call:
            yield from _run(bodies, call[1], times, into_fusions)
        else:
            yield line, times, name
            inside = _INSIDE.search(line) if into_fusions else None
            if inside:
                yield from _run(bodies, inside[1], times, into_fusions)


def _shape(text: str) -> list[int]:
    array = _ARRAY.search(text)
    return [int(size) for size in array[2].split(",") if size] if array else []


def _dot(line: str, operands: list[list[int]], result: list[int]) -> int:
    """Multiply-adds of a dot."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    axes = contracted[1].split(",") if contracted and contracted[1] else []
    return math.prod(result) * math.prod(operands[0][int(axis)] for axis in axes)


def _convolution(line: str, operands: list[list[int]], result: list[int]) -> int:
    """Multiply-adds of a convolution."""
    labels = _LABELS.search(line)
    if labels is None:
        raise ValueError(f"a convolution without dimension labels: {line.strip()[:80]}")
    (image, kernel), (left, right, out) = operands, labels.groups()
    count = kernel[right.index("i")] * result[out.index("b")] * result[out.index("f")]
    for number, axis in enumerate(sorted(filter(str.isdigit, out))):

        def window(key: str, default: str, at: int = number) -> str:
            found = re.search(rf"window=\{{[^}}]*\b{key}=([\d_x\-]+)", line)
            return found[1].split("x")[at] if found else default

        stride, holes = int(window("stride", "1")), int(window("lhs_dilate", "1"))
        step, before = int(window("rhs_dilate", "1")), int(window("pad", "0_0").split("_")[0])
        sizes = image[left.index(axis)], kernel[right.index(axis)], result[out.index(axis)]
        count *= sum(
            place % holes == 0 and 0 <= place < sizes[0] * holes
            for o in range(sizes[2])
            for k in range(sizes[1])
            for place in [o * stride - before + k * step]
        )
    return count


def _result_bytes(kind: str, is_start: bool, sizes: list[int]) -> int:
    """Of what an instruction gives; a start of most kinds gives its operands first."""
    if not is_start or kind == "all-reduce":
        return sum(sizes)
    return sizes[1] if kind == "collective-permute" else sum(sizes[len(sizes) // 2 :])


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind in ("pred", "token") else int(re.sub(r"\D.*", "", kind.lstrip("bfsuc")) or 8)
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _group(line: str, devices: int) -> int:
    listed, iota, axes = (pattern.search(line) for pattern in (_GROUPS, _IOTA, _AXES))
    if listed and listed[1]:
        return listed[1].count(",") + 1
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])  # a part of an axis has a size
        return math.prod(int(part or sizes[name]) for name, part in named)
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
