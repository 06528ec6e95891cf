"""Reads traced programs: every equation with how often it runs, and the FLOPs of its matmul."""

import math
from collections.abc import Iterator
from typing import Any


def equations(program: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation, how often it runs) of a traced program and of all programs inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation, times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from equations(value, inner)


def matmul_flops(program: Any) -> int:
    """FLOPs of all matmuls, a multiply-add counted as 2."""
    total = 0
    for equation, times in equations(program):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * times * math.prod(left[axis] for axis in contracted) * math.prod(out)
    return total
