"""Stored tensors onto devices, a block of rows at a time; called by `t5.weights.load_params`.

On CPU the devices' memory is the host's: an array is filled where it stays.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.quantize import is_quantized, make
from jaxprompt.sharding import put_whole, read_sharding
from jaxprompt.t5.copying import copy_into, empty
from jaxprompt.t5.quantized import Coded, Index
from jaxprompt.t5.weight_names import Layout, Weight
from jaxprompt.tensorfile import StoredTensor

Sources = list[tuple[Weight, StoredTensor]]
Filler = Callable[[np.ndarray, Index], None]


def place(sources: Sources, layout: Layout, leaf: Any, sharding: Any, host_bytes: int) -> Any:
    """One parameter as a (sharded) array, or as a QArray of such.

    Args:
      sources: its stored tensors, one or one for each layer.
      layout: of their file.
      leaf: its shape and dtype; a QArray of them if it is to be quantised.
      sharding: where to; as `leaf`, or one for codes and scales.
      host_bytes: bound on the copy that the host makes.
    """
    if not is_quantized(leaf):
        return _place(_filler(sources, layout), leaf, sharding, host_bytes)
    fill_codes, fill_scales = _coded_fillers(sources, layout, leaf)
    alike = not is_quantized(sharding)
    return make(
        _place(fill_codes, leaf.qvalue, sharding if alike else sharding.qvalue, host_bytes),
        _place(fill_scales, leaf.scale, sharding if alike else sharding.scale, host_bytes),
    )


def _filler(sources: Sources, layout: Layout) -> Filler:
    """A function that writes one part of a parameter into a block, cast to the block's dtype."""

    def part_of(weight: Weight, stored: StoredTensor) -> Filler:
        if weight.layer is None:
            values = weight.ours(stored.read(), layout)
            return lambda block, index: copy_into(block, values[index])
        return lambda block, index: copy_into(block, weight.ours(stored.read(), layout)[index])

    return _stacked([part_of(*source) for source in sources], sources[0][0])


def _coded_fillers(sources: Sources, layout: Layout, leaf: Any) -> tuple[Filler, Filler]:
    """The same of a quantised parameter's codes and of its scales."""
    first = sources[0][0]
    shape = leaf.scale.shape[leaf.ndim - len(first.shape) :]
    coded = [Coded(weight, stored, layout, leaf.qtype, shape) for weight, stored in sources]
    return (
        _stacked([one.fill_codes for one in coded], first),
        _stacked([one.fill_scale for one in coded], first),
    )


def _stacked(parts: list[Filler], first: Weight) -> Filler:
    """Fills a block from what fills any part of each layer, or of what is not stacked."""

    def fill(block: np.ndarray, index: Index) -> None:
        if first.layer is None:
            parts[0](block, index)
            return
        layers, *rest = index
        for row, part in zip(block, parts[layers], strict=True):
            part(row, tuple(rest))

    return fill


def _place(
    fill: Filler, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, host_bytes: int
) -> jax.Array:
    """One (sharded) array, no part of it read by two hosts where that can be."""
    reading = read_sharding(sharding, leaf.shape)
    placed = _built(fill, leaf, reading, host_bytes)
    return placed if reading is sharding else put_whole(placed, sharding)


def _built(
    fill: Filler, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, host_bytes: int
) -> jax.Array:
    """Builds one (sharded) array: each distinct shard block by block, each on all its devices."""
    holders = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        parts = zip(index or (), leaf.shape, strict=True)
        holders[tuple(part.indices(size)[:2] for part, size in parts)].append(device)
    shards = []
    for spans, devices in holders.items():
        (start, stop), *rest = spans
        shape = tuple(high - low for low, high in spans)
        row_bytes = math.prod(shape[1:]) * leaf.dtype.itemsize
        rows = min(max(1, host_bytes // max(1, row_bytes)), stop - start)
        if _taken_over(leaf.dtype, devices[0].platform):
            rows = stop - start
        whole = rows == stop - start
        zeros = functools.partial(jnp.zeros, shape, leaf.dtype)
        buffers = [] if whole else [zeros(device=device) for device in devices]
        # after the buffers: only when it is called again does jax let go of the block before this
        host = empty((rows, *shape[1:]), leaf.dtype)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            block = host[: last - first]
            fill(block, (slice(first, last), *(slice(*span) for span in rest)))
            if whole:
                buffers = [jax.device_put(block, device) for device in devices]
            else:
                buffers = [_put_rows(buffer, block, first - start) for buffer in buffers]
            # transfers are asynchronous, and the block is written again
            jax.block_until_ready(buffers)
        shards += buffers
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _taken_over(dtype: np.dtype, platform: str) -> bool:
    """Whether `device_put` makes a host's array the device's: on CPU, but for packed numbers."""
    return platform == "cpu" and dtype != jnp.int4


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(buffer: jax.Array, block: Any, first: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, block, first, axis=0)
