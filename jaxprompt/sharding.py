"""Logical axis names, the one table that maps them to mesh axes, and the helpers that apply it.

A parameter or activation with an axis that has no rule is an error, never a silent replication.
Where a run has several processes, what comes from and goes to the host does so here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprompt.typing import Array, ArrayTree, UserError

Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
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
WEIGHTS_OVER_DATA: Rules = {**RULES, "embed": "data"}
# Between matmuls, whose parts are on `model`, activations have rows to divide over it.
ROWS_OVER_MODEL: Rules = {**RULES, "batch": ("data", "model")}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes (data, model) with Auto axis types.

    Devices of one process are neighbours, along `model` first. Of several processes each has an
    equal part of the mesh.

    Args:
      data: devices along `data`; -1 takes what `model` leaves.
      model: devices along `model`.
      devices: the devices, default all of `jax.devices()`.
    Raises: UserError if the devices there are do not fill the mesh, or if a process has no equal
      part of it.
    """
    pool = list(jax.devices() if devices is None else devices)
    pool.sort(key=lambda device: device.process_index)
    if data == -1 and model >= 1:
        data = len(pool) // model
    if data < 1 or model < 1 or data * model > len(pool):
        raise UserError(
            f"a mesh of data {data} x model {model} needs that many devices, {len(pool)} are here"
        )
    hosts = len({device.process_index for device in pool})
    if hosts > 1 and data * model < len(pool):
        raise UserError(
            f"a mesh of data {data} x model {model} leaves devices of {hosts} hosts idle, there "
            f"are {len(pool)}; on several hosts it has to take all of them (mesh.data=-1)"
        )
    each = len(pool) // hosts
    if hosts > 1 and each % model and model % each:
        raise UserError(
            f"mesh.model {model} does not fit hosts of {each} devices; it has to divide {each}, or "
            "be a multiple of it"
        )
    grid = np.asarray(pool[: data * model], dtype=object).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def meet(mesh: Mesh) -> None:
    """Lets the processes of a mesh connect along its axes while they are still together.

    Gloo, between CPUs, gives up if one comes to its first program 30 s after another.
    """
    for axis in mesh.axis_names if jax.process_count() > 1 else ():
        ones = np.ones(mesh.shape[axis], np.float32)
        jax.device_get(jax.jit(jnp.sum)(put_whole(ones, NamedSharding(mesh, PartitionSpec(axis)))))


def partition_spec(axes: Sequence[str], rules: Rules = RULES) -> PartitionSpec:
    """Maps logical axis names to a PartitionSpec.

    Raises: UserError for an axis without a rule, or two axes on one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in rules]
    if unknown:
        raise UserError(f"no sharding rule for axis {unknown[0]!r}; rules: {', '.join(rules)}")
    mapped = [rules[axis] for axis in axes]
    used = [part for name in mapped if name for part in _parts(name)]
    if len(used) != len(set(used)):
        raise UserError(f"axes {tuple(axes)} would use a mesh axis twice: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def named_sharding(
    mesh: Mesh,
    axes: Sequence[str],
    shape: Sequence[int],
    rules: Rules = RULES,
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


def constrain(mesh: Mesh | None, x: Array, *axes: str, rules: Rules = RULES) -> Array:
    """An activation laid out by its logical axes; as it is without a mesh or with one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, rules)))


def _parts(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process's devices hold: (number of the part, how many).

    Processes that share a row of the mesh, because `model` is larger than a host, share a part.
    """
    here = jax.process_index()
    rows = [n for n, row in enumerate(mesh.devices) if any(d.process_index == here for d in row)]
    return rows[0] // len(rows), mesh.shape["data"] // len(rows)


def shard_batch(mesh: Mesh, batch: ArrayTree, axis: int = 0, *, own: bool = False) -> ArrayTree:
    """Puts a host batch on the mesh, its rows (on `axis`) over `data`; sizes must divide.

    Args:
      own: the batch is this process's share of it alone, see `data_share`; else every process has
        the whole of it.
    """
    devices, shares = mesh.shape["data"], data_share(mesh)[1] if own else 1

    def put(leaf):
        rows = leaf.shape[axis] * shares
        if rows % devices:
            raise UserError(f"batch of {rows} rows does not divide over {devices} data devices")
        spec = PartitionSpec(*("data" if n == axis else None for n in range(leaf.ndim)))
        sharding = NamedSharding(mesh, spec)
        if shares > 1:
            shape = tuple(rows if n == axis else size for n, size in enumerate(leaf.shape))
            with jax.transfer_guard("allow"):  # asked for, though jax does not see it so
                return jax.make_array_from_process_local_data(sharding, leaf, shape)
        return put_whole(leaf, sharding)

    return jax.tree.map(put, batch)


def replicate(mesh: Mesh, tree: ArrayTree) -> ArrayTree:
    """Puts every leaf whole on every device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put_whole(leaf, sharding), tree)


def put_whole(leaf: Any, sharding: Any) -> Array:
    """An array that every process has the whole of, or one on devices, sharded in another way."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        there = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        return leaf if there else _resharded(sharding)(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data, kind = jax.random.key_data(leaf), jax.random.key_impl(leaf)
        return jax.random.wrap_key_data(put_whole(data, sharding), impl=kind)
    host = np.asarray(jax.device_get(leaf))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def read_sharding(sharding: Any, shape: Sequence[int]) -> Any:
    """How to lay an array out while it is read, so that no two hosts read the same of it.

    Hosts that will hold equal parts get parts of these, along the first axis that divides (the
    layers, if there are enough); `put_whole` then gives each the rest over the devices' network,
    which is faster than any disk. An array that does not divide is read by every host.

    Args:
      sharding: how it will lie, on a mesh of `make_mesh`.
    """
    if jax.process_count() == 1 or not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh), "arrays are read onto devices"
    shares = data_share(mesh)[1]
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    if shares == 1 or "data" in spec:
        return sharding
    grid = mesh.devices.reshape(shares, -1, mesh.shape["model"])
    by_host = Mesh(grid, ("hosts", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    for axis, (size, name) in enumerate(zip(shape, spec, strict=True)):
        if size % (shares * (mesh.shape[name] if name else 1)) == 0:
            spec[axis] = (name, "hosts") if name else "hosts"
            return NamedSharding(by_host, PartitionSpec(*spec))
    return sharding


def to_host(tree: ArrayTree) -> ArrayTree:
    """Numpy arrays of leaves wherever they lie; where that is on several processes, all ask."""
    return jax.device_get(here(tree))


def here(tree: ArrayTree) -> ArrayTree:
    """What is spread over processes, whole on a device of this one, so that it can go on alone."""

    def bring(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, NamedSharding), "what meshes hold has named shardings"
            leaf = _resharded(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(bring, tree)


@functools.cache
def _resharded(sharding: Any) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)
