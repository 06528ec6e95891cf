"""What the processes of one run tell each other; a run of one process asks nobody.

Every process makes these calls at the same points: each is a program on all devices.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprompt.typing import Array, UserError


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def from_first(make: Callable[[], tuple[Any, list[np.ndarray]]]) -> tuple[Any, list[np.ndarray]]:
    """What the first process makes, in all of them: JSON data and arrays, to the bit.

    Args:
      make: called in the first process only.
    Raises: UserError, the first process's, in every process.
    """
    if jax.process_count() == 1:
        return make()
    told, arrays = {}, []
    if is_first():
        try:
            data, arrays = make()
            told = {"data": data, "arrays": [(a.dtype.name, a.shape) for a in arrays]}
        except UserError as error:
            told = {"refused": str(error)}
    told = json.loads(_bytes_of_first(json.dumps(told).encode("utf-8")))
    if "refused" in told:
        raise UserError(told["refused"])
    kinds = [(jnp.dtype(name), tuple(shape)) for name, shape in told["arrays"]]
    mine = [array.tobytes() for array in arrays] or [b""] * len(kinds)
    everyones = [
        np.frombuffer(_bytes_of_first(content), kind).reshape(shape)
        for content, (kind, shape) in zip(mine, kinds, strict=True)
    ]
    return told["data"], everyones


class Agreement:
    """Whether any process has seen something, known to all of them at the same step.

    Alone a process knows at once. Several learn at a call what was so at the call before it, by
    when the devices have long answered: no step waits for it.
    """

    def __init__(self, seen: Callable[[], bool]):
        """Args: seen: whether this process has; from then on it stays so."""
        self._seen, self._asked = seen, None
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
            self._spread = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Whether to act on it now; the same in every process."""
        if jax.process_count() == 1:
            return self._seen()
        before, self._asked = self._asked, self._ask()
        return before is not None and bool(jax.device_get(before))

    def _ask(self) -> Array:
        flags = np.full(jax.local_device_count(), self._seen(), np.int32)
        with jax.transfer_guard("allow"):  # asked for, though jax does not see it so
            return self._any(jax.make_array_from_process_local_data(self._spread, flags))


def _bytes_of_first(content: bytes) -> bytes:
    """The first process's bytes; what the others give does not matter."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not size:
        return b""
    given = content if is_first() else bytes(size)
    whole = multihost_utils.broadcast_one_to_all(np.frombuffer(given, np.uint8))
    return np.asarray(whole).tobytes()
