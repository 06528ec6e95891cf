"""Reads the TPU compiler's estimate of cycles from the text of a compiled program.

In `compiled.as_text()` every fusion that stands in a computation by itself carries
`"estimated_cycles"`. Loops hold theirs in the body: it counts as often as the loop runs, which is
the constant that its condition compares the counter with. Called by `tpu_cycles.py`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r" compare\((.*?)\), direction=LT")
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


def ops(text: str) -> list[Op]:
    """Every estimated instruction and every kernel call that the program runs.

    Raises: ValueError if there is no entry computation, or a loop without a readable trip count.
    """
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    return list(_run(bodies, entry, 1))


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


def _run(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Op]:
    for line in bodies[name]:
        loop, call, cycles = _LOOP.search(line), _CALL.search(line), _CYCLES.search(line)
        if loop:
            yield from _run(bodies, loop[2], times * _trips(bodies[loop[1]], loop[1]))
        elif call:
            yield from _run(bodies, call[1], times)
        elif cycles or _KERNEL in line:
            path = _NAME.search(line)
            yield Op(
                name=path[1] if path else line.split(" = ")[0].split()[-1].lstrip("%"),
                cycles=int(cycles[1]) if cycles else 0,
                times=times,
                estimated=cycles is not None,
                kernel=_KERNEL in line,
            )


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
