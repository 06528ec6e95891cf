"""Chips and topologies: what each can do, and devices to compile for without having any.

Figures are those of Google's documentation of each TPU, per JAX device: where a chip shows itself
as two devices (v3, tpu7x), half a chip.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from jaxprompt.typing import UserError

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: as a topology begins, such as "v5e".
      memory: bytes of HBM.
      flops: bfloat16 FLOP/s at most.
      memory_rate: bytes/s from HBM.
      link_rate: bytes/s to all neighbours together, in one direction.
      flops_a_cycle: bfloat16; 0 = not documented.
      device: what one device is.
    """

    name: str
    memory: float
    flops: float
    memory_rate: float
    link_rate: float
    flops_a_cycle: int
    device: str = "chip"

    @property
    def cycles_a_second(self) -> float:
        """Of the matrix units; 0 where unknown."""
        return self.flops / self.flops_a_cycle if self.flops_a_cycle else 0.0


_MXU = 128 * 128 * 2  # FLOPs a cycle of one matrix unit
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", 16 * GIB, 61.5e12, 450 * GB, 82 * GB, 2 * _MXU, "half a chip (one core)"),
        Chip("v4", 32 * GIB, 275e12, 1228 * GB, 300 * GB, 8 * _MXU),
        Chip("v5e", 16 * GIB, 197e12, 819 * GB, 200 * GB, 4 * _MXU),
        Chip("v5p", 95 * GIB, 459e12, 2765 * GB, 600 * GB, 8 * _MXU),
        Chip("v6e", 32 * GIB, 918e12, 1638 * GB, 400 * GB, 2 * 4 * 2 * _MXU),
        Chip("tpu7x", 96 * GIB, 1153.5e12, 3690 * GB, 300 * GB, 0, "half a chip (one core)"),
    )
}
_PLATFORM = {  # what the TPU compiler wants to see where there is no TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
_TPU = re.compile(r"(\w+):(\d+x\d+(?:x\d+)?)")
_HERE = re.compile(r"(cpu|gpu):(\d+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: such as "v5e:2x2", "cpu:8", "gpu:1".
      chip: None for a CPU or GPU.
      devices: in order.
    """

    name: str
    chip: Chip | None
    devices: list[Any]


def open_topology(name: str) -> Topology:
    """Devices of a topology, of a TPU that is nowhere near, or of the machine at hand.

    Args:
      name: "KIND:AxB" or "KIND:AxBxC" for TPUs, "cpu:N" or "gpu:N" for N devices of this machine.
    Raises: UserError for a name that is none, a kind that is not in `CHIPS`, a missing TPU
      compiler, a shape the compiler does not know, or fewer devices here than asked for.
    """
    here, there = _HERE.fullmatch(name), _TPU.fullmatch(name)
    if here:
        return Topology(name, None, _devices_here(here[1], int(here[2])))
    if not there:
        raise UserError(f"topology {name!r} is not of the form v5e:2x2, v4:2x2x4, cpu:8 or gpu:1")
    if there[1] not in CHIPS:
        raise UserError(f"topology {name!r}: there are {', '.join(CHIPS)}, and cpu:N, gpu:N")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: pip install 'jaxprompt[plan]' (it needs no TPU)"
        )
    return Topology(name, CHIPS[there[1]], _devices_there(name))


def _devices_here(kind: str, count: int) -> list[Any]:
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise UserError(f"there is no {kind} here") from error
    if len(found) < count:
        hint = f"; JAX_NUM_CPU_DEVICES={count} simulates them" if kind == "cpu" else ""
        raise UserError(f"{kind}:{count} was asked for, {len(found)} are here{hint}")
    return found[:count]


def _devices_there(name: str) -> list[Any]:
    from jax.experimental import topologies

    for variable, value in _PLATFORM.items():
        os.environ.setdefault(variable, value)
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except Exception as error:  # the compiler's own kinds of error, by version
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the TPU compiler does not know topology {name!r} ({reason})") from error
    return list(described.devices)
