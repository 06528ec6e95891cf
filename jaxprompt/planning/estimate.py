"""What a compiled step needs and how fast it could be: memory, FLOPs, links, a roofline."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprompt.planning.abstract import AbstractStep, StepShape
from jaxprompt.planning.chips import Chip, Topology
from jaxprompt.planning.flops import matmul_flops, minimal_step_flops
from jaxprompt.planning.program import collectives, dearest, ops, total_cycles
from jaxprompt.t5.config import T5Config

# The runtime keeps some of a chip's memory: the compiler has 15.25 of a v5e's 16 GiB.
_USABLE = 0.953
_FULL = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one topology; bytes and FLOPs of one device.

    Attributes:
      devices: how many.
      examples: of a step, all devices together.
      weights, state, temporaries: bytes of the frozen tree, of what is trained with its optimizer
        and of everything that the step makes on its way.
      capacity: bytes a program may use; None where unknown.
      total: bytes of all; of a program that does not fit, what the compiler said it needs.
      fits: whether it compiled for the memory there is.
      flops: of the matmuls that are computed, loops counted as often as they run.
      minimum: FLOPs of the least that has to be computed.
      sent: bytes that a device sends, by kind of exchange.
      cycles: the compiler's estimate without exchanges; 0 where it gives none.
      dearest: names and cycles of the dearest operations.
      bounds: seconds a step takes at least by what bounds it: "compute", "memory", "links".
      seconds: (at least, by the compiler's cycles with exchanges that nothing hides); None without
        a chip's figures.
    """

    topology: str
    devices: int
    examples: int
    weights: int
    state: int
    temporaries: int
    capacity: float | None
    total: float
    fits: bool
    flops: float
    minimum: float
    sent: Mapping[str, float]
    cycles: int
    dearest: Sequence[tuple[str, int]]
    bounds: Mapping[str, float]
    seconds: tuple[float, float] | None

    @property
    def bound(self) -> str:
        """The name of what bounds a step; empty without a chip's figures."""
        return max(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else ""

    @property
    def examples_per_second(self) -> tuple[float, float] | None:
        """(pessimistic, at most), of all devices."""
        if self.seconds is None:
            return None
        least, likely = self.seconds
        return self.examples / max(least, likely), self.examples / least


def estimate(step: AbstractStep, t5: T5Config, shape: StepShape, topology: Topology) -> Estimate:
    """Compiles a step for a topology and reads what it needs."""
    count = len(topology.devices)
    minimum = minimal_step_flops(t5, shape.rows, shape.encoder, shape.decoder) / count
    flops = matmul_flops(step.trace()) / count
    weights, state = _own_bytes(step.frozen), _own_bytes(step.state)
    chip = topology.chip
    known: dict[str, Any] = {
        "topology": topology.name, "devices": count, "examples": shape.rows * shape.segments,
        "weights": weights, "state": state, "flops": flops, "minimum": minimum,
        "capacity": None if chip is None else chip.memory * _USABLE,
    }  # fmt: skip
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _FULL.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total = float(needed[1]) * _UNITS[needed[2]] if needed else float("nan")
        return Estimate(
            **known, temporaries=0, total=total, fits=False, sent={}, cycles=0, dearest=[],
            bounds={}, seconds=None,
        )  # fmt: skip
    memory, text = compiled.memory_analysis(), compiled.as_text()
    temporaries = memory.temp_size_in_bytes
    total = (
        memory.argument_size_in_bytes + temporaries + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    sent: collections.Counter[str] = collections.Counter()
    for exchange in collectives(text, count):
        sent[exchange.kind] += exchange.sent
    found = ops(text)
    cycles = total_cycles(found)
    bounds = {} if chip is None else _bounds(chip, flops, total, sum(sent.values()))
    return Estimate(
        **known, temporaries=temporaries, total=total,
        fits=known["capacity"] is None or total <= chip.memory if chip else True,
        sent=dict(sent), cycles=cycles, dearest=dearest(found), bounds=bounds,
        seconds=_seconds(chip, cycles, bounds),
    )  # fmt: skip


def _bounds(chip: Chip, flops: float, bytes_used: float, sent: float) -> dict[str, float]:
    """Seconds of a step if one thing alone took time: every byte is read once at least."""
    return {
        "compute": flops / chip.flops,
        "memory": bytes_used / chip.memory_rate,
        "links": sent / chip.link_rate,
    }


def _seconds(
    chip: Chip | None, cycles: int, bounds: Mapping[str, float]
) -> tuple[float, float] | None:
    if chip is None or not chip.cycles_a_second:
        return None if chip is None else (max(bounds.values()), sum(bounds.values()))
    return max(bounds.values()), cycles / chip.cycles_a_second + bounds["links"]


def _own_bytes(tree: Any) -> int:
    """Bytes of a tree's leaves on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf.dtype, "itemsize")
    )
