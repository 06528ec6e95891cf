"""Logical axis names, the one table that maps them to mesh axes, and the helpers that apply it.

A parameter or activation with an axis that has no rule is an error, never a silent replication.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprompt.typing import Array, ArrayTree, UserError

RULES: dict[str, str | None] = {
    "batch": "data",
    "length": None,
    "embed": None,
    "heads": "model",
    "kv": None,
    "mlp": "model",
    "vocab": "model",
    "layers": None,
    "prompt": None,
    "buckets": None,
    "groups": None,
    "segments": None,
}


# Where weights are divided over `data` too, each device holds a part and gets the rest in passing.
WEIGHTS_OVER_DATA: dict[str, str | None] = {**RULES, "embed": "data"}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes (data, model) with Auto axis types.

    Args:
      data: devices along `data`; -1 takes what `model` leaves.
      model: devices along `model`.
      devices: the devices, default all of `jax.devices()`.
    Raises: UserError if the devices there are do not fill the mesh.
    """
    pool = list(jax.devices() if devices is None else devices)
    if data == -1 and model >= 1:
        data = len(pool) // model
    if data < 1 or model < 1 or data * model > len(pool):
        raise UserError(
            f"a mesh of data {data} x model {model} needs that many devices, {len(pool)} are here"
        )
    grid = np.asarray(pool[: data * model], dtype=object).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition_spec(axes: Sequence[str], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """Maps logical axis names to a PartitionSpec.

    Raises: UserError for an axis without a rule, or two axes on one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in rules]
    if unknown:
        raise UserError(f"no sharding rule for axis {unknown[0]!r}; rules: {', '.join(rules)}")
    mapped = [rules[axis] for axis in axes]
    used = [name for name in mapped if name is not None]
    if len(used) != len(set(used)):
        raise UserError(f"axes {tuple(axes)} would use a mesh axis twice: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def named_sharding(
    mesh: Mesh,
    axes: Sequence[str],
    shape: Sequence[int],
    rules: Mapping[str, str | None] = RULES,
) -> NamedSharding:
    """The sharding of an array with these logical axes and sizes on `mesh`.

    Raises: UserError if a sharded size does not divide, naming the sizes that would.
    """
    spec = partition_spec(axes, rules)
    for axis, size, name in zip(axes, shape, spec, strict=True):
        if name is not None and size % mesh.shape[name]:
            fitting = [n for n in range(1, mesh.shape[name] + 1) if size % n == 0]
            raise UserError(
                f"axis {axis!r} of size {size} does not divide over mesh axis {name!r} of "
                f"{mesh.shape[name]}; {name} sizes that would: {fitting}"
            )
    return NamedSharding(mesh, spec)


def tree_shardings(mesh: Mesh, specs: ArrayTree, over_data: bool = False) -> ArrayTree:
    """Shardings for a tree of objects with `.axes` and `.shape` (see `t5.layers.ParamSpec`).

    Args:
      over_data: divide them over `data` too, by `WEIGHTS_OVER_DATA`.
    """
    rules = WEIGHTS_OVER_DATA if over_data else RULES
    return jax.tree.map(
        lambda spec: named_sharding(mesh, spec.axes, spec.shape, rules),
        specs,
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )


def constrain(mesh: Mesh | None, x: Array, *axes: str) -> Array:
    """An activation laid out by its logical axes; as it is without a mesh or with one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes)))


def shard_batch(mesh: Mesh, batch: ArrayTree, axis: int = 0) -> ArrayTree:
    """Puts a host batch on the mesh, its rows (on `axis`) over `data`; sizes must divide."""
    devices = mesh.shape["data"]

    def put(leaf):
        rows = leaf.shape[axis]
        if rows % devices:
            raise UserError(f"batch of {rows} rows does not divide over {devices} data devices")
        spec = PartitionSpec(*("data" if n == axis else None for n in range(leaf.ndim)))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, batch)


def replicate(mesh: Mesh, tree: ArrayTree) -> ArrayTree:
    """Puts every leaf whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
