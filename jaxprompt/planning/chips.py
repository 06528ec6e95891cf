"""Chips and topologies: what each can do, and devices to compile for without having any.

`CHIPS` is the one table of figures, docs/plan.md says where they are from. All are of one JAX
device: where a chip shows itself as two devices (v3, tpu7x), of half a chip.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
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
      memory: bytes of HBM that a program may use, as the compiler says when one needs more.
      flops: bfloat16 FLOP/s at most.
      memory_rate: bytes/s from HBM.
      link_rate: bytes/s over one link, in one direction.
      links: to neighbours.
      cycles_per_second: of the compiler's estimates; 0 = not known.
    """

    name: str
    memory: float
    flops: float
    memory_rate: float
    link_rate: float
    links: int
    cycles_per_second: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v3", 15.48 * GIB, 61.5e12, 450 * GB, 35 * GB, 4, 0.94e9),
        Chip("v4", 30.75 * GIB, 275e12, 1228 * GB, 50 * GB, 6, 1.05e9),
        Chip("v5e", 15.75 * GIB, 197e12, 819 * GB, 50 * GB, 4, 1.5e9),
        Chip("v5p", 95.74 * GIB, 459e12, 2765 * GB, 100 * GB, 6, 1.75e9),
        Chip("v6e", 31.25 * GIB, 918e12, 1638 * GB, 100 * GB, 4, 1.75e9),
        Chip("tpu7x", 94.75 * GIB, 1153.5e12, 3690 * GB, 50 * GB, 6, 0),
    )
}
_PLATFORM = {  # what the TPU compiler wants to see where there is no TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so several plans may be made at once
}
_TPU = re.compile(r"([a-z]\w*):(\d+x\d+(?:x\d+)?)")
_HERE = re.compile(r"(cpu|gpu):([1-9]\d*)")


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
    devices: Sequence[Any]

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each direction in which there are several."""
        shape = self.name.partition(":")[2]
        return tuple(side for side in map(int, shape.split("x")) if side > 1)

    @property
    def links(self) -> int:
        """Links to neighbours that a chip of this topology can have in use."""
        if self.chip is None:
            return 0
        return min(self.chip.links, sum(1 if side == 2 else 2 for side in self.sides))


def open_topologies(names: Sequence[str]) -> list[Topology]:
    """Devices of TPU topologies that are nowhere near, or of the machine at hand.

    In a process of its own this also makes JAX leave TPUs that are here alone, and show as many
    CPU devices as are asked for; in one that has used devices before, what is there is there.

    Args:
      names: "KIND:AxB" or "KIND:AxBxC" for TPUs, "cpu:N" or "gpu:N" for N devices of this machine.
    Raises: UserError for a name that is none, a kind that is not in `CHIPS`, a missing TPU
      compiler, a shape the compiler does not know, or fewer devices here than asked for.
    """
    here = {name: _HERE.fullmatch(name) for name in names}
    for name in names:
        if not here[name]:
            _check_tpu(name)
    kinds = {found[1] for found in here.values() if found}
    counts = [int(found[2]) for found in here.values() if found and found[1] == "cpu"]
    _prepare("gpu" not in kinds, max(counts, default=0))
    return [
        Topology(name, None, _devices_here(found[1], int(found[2])))
        if found
        else Topology(name, CHIPS[name.partition(":")[0]], _devices_there(name))
        for name, found in here.items()
    ]


def _check_tpu(name: str) -> None:
    there = _TPU.fullmatch(name)
    if not there:
        raise UserError(f"topology {name!r} is not of the form v5e:2x2, v4:2x2x4, cpu:8 or gpu:1")
    if there[1] not in CHIPS:
        raise UserError(
            f"topology {name!r} is of no chip that is known: {', '.join(CHIPS)}, or cpu:N and gpu:N"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {name!r} needs the TPU compiler (not a TPU), which is not installed: "
            "pip install 'jaxprompt[plan]'"
        )


def _prepare(leaves_accelerators: bool, cpus: int) -> None:
    now: Any = jax.config
    if leaves_accelerators and not now.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    if cpus > max(1, now.jax_num_cpu_devices):
        try:
            jax.config.update("jax_num_cpu_devices", cpus)
        except RuntimeError:  # devices were used before; `_devices_here` says what there is
            return


def _devices_here(kind: str, count: int) -> list[Any]:
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise UserError(f"topology '{kind}:{count}': there is no {kind} here") from error
    if len(found) < count:
        hint = f"; JAX_NUM_CPU_DEVICES={count} simulates them" if kind == "cpu" else ""
        raise UserError(f"topology '{kind}:{count}': {len(found)} are here{hint}")
    return found[:count]


def _devices_there(name: str) -> list[Any]:
    from jax.experimental import topologies

    for variable, value in _PLATFORM.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name.startswith("v4:"):  # both cores as one device, as a v4 shows itself to JAX
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # the compiler's own kinds of error, by version
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the TPU compiler does not know topology {name!r} ({reason})") from error
    return list(described.devices)
