"""What a compiled step needs and how fast it could be: memory, FLOPs, exchanges, a roofline."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxprompt.compiled import compiler_options, free_bytes
from jaxprompt.config import RunConfig
from jaxprompt.planning.abstract import AbstractStep, abstract_step, own_bytes
from jaxprompt.planning.chips import Topology
from jaxprompt.planning.flops import forward_flops, matmul_flops, minimal_step_flops
from jaxprompt.planning.program import collectives, compiled_flops, dearest, ops, total_cycles
from jaxprompt.planning.shapes import StepShape, step_shape
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.backbones import planned_config
from jaxprompt.t5.config import T5Config
from jaxprompt.typing import UserError

_FULL = re.compile(
    r"(?:Used |required for [\w ]+\()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) "
    r"\(?([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one topology; bytes and FLOPs are of one chip (one device).

    Attributes:
      topology, devices, data, model: name, how many devices, and the mesh they make.
      shape: of the batch.
      weights, state: bytes of the frozen tree, and of what is trained with its optimizer.
      activations: bytes of all that the step makes on its way.
      total: bytes of these, the batch, results and padding together; of a program that does not
        fit, what the compiler said it needs.
      capacity: bytes a program may use; None where that is not known.
      fits: whether it compiled, for no more than the capacity.
      flops: of the matmuls that are computed, loops counted as often as they run.
      minimum: FLOPs of the least that has to be computed.
      traffic: bytes that go from and to memory at least.
      sent: bytes sent to other devices, by kind of exchange.
      cycles: the compiler's estimate, exchanges left out; 0 where it gives none.
      kernels: calls of kernels that the cycles leave out.
      dearest: names and cycles of the dearest operations.
      bounds: seconds that a step takes if "compute", "memory" or "exchanges" were all there is;
        empty without a chip's figures, as `seconds` is None.
      seconds: (at best, as the compiler sees it) of a step.
      share_of_peak: the least FLOPs over what the chip could do in the cycles; exchanges and
        kernels left out; None without an estimate of cycles.
      remat: what the backward pass keeps, also where the config leaves it to the step.
    """

    topology: str
    devices: int
    data: int
    model: int
    shape: StepShape
    weights: int
    state: int
    activations: int
    total: float
    capacity: float | None
    fits: bool
    minimum: float
    flops: float
    traffic: float = 0.0
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cycles: int = 0
    kernels: int = 0
    dearest: Sequence[tuple[str, int]] = ()
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: tuple[float, float] | None = None
    share_of_peak: float | None = None
    remat: str = ""

    @property
    def bound(self) -> str:
        """The name of what bounds a step; empty without a chip's figures."""
        return max(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else ""

    @property
    def examples_per_second(self) -> tuple[float, float] | None:
        """(as the compiler sees it, at best), of all devices together."""
        if self.seconds is None:
            return None
        best, likely = self.seconds
        return self.shape.examples / likely, self.shape.examples / best


def estimate(config: RunConfig, topology: Topology, prompts: int = 1) -> Estimate:
    """Compiles the training step of a run for a topology and reads what it needs.

    Args:
      prompts: trained at once, all with this config.
    Raises: UserError for a backbone whose sizes are not known, a mesh that leaves devices idle, or
      sizes that do not divide over it.
    """
    t5 = planned_config(config.backbone.name, config.backbone.revision)
    devices = topology.devices
    mesh = make_mesh(config.mesh.data, config.mesh.model, devices)
    if mesh.size < len(devices):
        raise UserError(
            f"mesh.data {mesh.shape['data']} x mesh.model {mesh.shape['model']} uses {mesh.size} "
            f"of the {len(devices)} devices of {topology.name}; mesh.data=-1 takes all"
        )
    shape = step_shape(config, t5, mesh.shape["data"], prompts)
    memory = None if topology.chip is None else topology.chip.memory
    step = abstract_step(config, t5, mesh, shape, prompts, memory)
    return read_step(config, t5, topology, shape, step)


def read_step(
    config: RunConfig, t5: T5Config, topology: Topology, shape: StepShape, step: AbstractStep
) -> Estimate:
    """Compiles a step and reads what it needs."""
    chip, count = topology.chip, len(topology.devices)
    known: dict[str, Any] = {
        "topology": topology.name,
        "devices": count,
        **step.mesh.shape,
        "shape": shape,
        "remat": step.remat,
        "weights": own_bytes(step.frozen),
        "state": own_bytes(step.state),
        "minimum": _minimum(config, t5, shape) / count,
        "flops": matmul_flops(step.traced.jaxpr) / count,
    }
    held = known["weights"] + known["state"]
    capacity = _capacity_here(topology) if chip is None else chip.memory
    try:
        options = compiler_options(topology.devices[0])
        compiled = step.traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = _FULL.search(str(error))
        total = max(held, float(told[1]) * _UNITS[told[2]] if told else 0.0)
        capacity = float(told[3]) * _UNITS[told[4]] if told else capacity
        activations = int(total - held)
        return Estimate(
            **known, activations=activations, total=total, capacity=capacity, fits=False
        )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise UserError(f"the compiler for {topology.name} does not say what a program needs")
    activations = memory.temp_size_in_bytes
    known["total"] = total = (
        memory.argument_size_in_bytes + activations + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    known |= {"activations": activations, "capacity": capacity}
    known["fits"] = chip is not None or capacity is None or total <= capacity
    known["traffic"] = 2 * config.train.accumulate * (known["weights"] + activations)
    try:
        if count > 1:
            known["sent"] = _sent(text, count)
        if chip is None:
            return Estimate(**known)
        known["flops"], found = compiled_flops(text), ops(text)
    except ValueError as error:
        raise UserError(
            f"the compiled step loops as long as its data say ({error}), so it cannot be counted; "
            "plan it with backbone.attention=chunked instead of windowed"
        ) from error
    known |= {"cycles": total_cycles(found), "dearest": dearest(found)}
    known["kernels"] = sum(op.times for op in found if not op.estimated)
    return timed(Estimate(**known), topology)


def timed(found: Estimate, topology: Topology) -> Estimate:
    """With what a chip's figures make of it."""
    chip = topology.chip
    assert chip is not None
    sent = sum(found.sent.values())
    bounds = {
        "compute": found.flops / chip.flops,
        "memory": found.traffic / chip.memory_rate,
        "exchanges": sent / (chip.link_rate * max(1, topology.links)),
    }
    best, share = max(bounds.values()), None
    if found.cycles and chip.cycles_per_second:
        share = found.minimum / (chip.flops * found.cycles / chip.cycles_per_second)
        alone = sent / (chip.link_rate * max(1, len(topology.sides)))
        likely = found.cycles / chip.cycles_per_second + alone
    else:
        likely = 2 * sum(bounds.values())
    return dataclasses.replace(
        found, bounds=bounds, seconds=(best, max(best, likely)), share_of_peak=share
    )


def _sent(text: str, devices: int) -> dict[str, float]:
    sent: dict[str, float] = collections.defaultdict(float)
    for exchange in collectives(text, devices):
        if exchange.group > 1:
            sent[exchange.kind] += exchange.sent
    return dict(sent)


def _minimum(config: RunConfig, t5: T5Config, shape: StepShape) -> int:
    """The whole model's gradients take as much again for its weights as for its activations."""
    sizes = shape.rows, shape.encoder, shape.decoder
    if config.tune == "model":
        return 3 * forward_flops(t5, *sizes)
    return minimal_step_flops(t5, *sizes)


def _capacity_here(topology: Topology) -> float | None:
    """Free memory of a device of this machine; CPU devices share what there is."""
    free = free_bytes()
    if free is None or topology.devices[0].platform != "cpu":
        return free
    return free / len(topology.devices)
