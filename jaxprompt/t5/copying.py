"""Copies of weights that go as fast as memory: `copy_into` turns matrices, `empty` holds results.

Called by `t5.placing` and `t5.quantized`, for every weight that is loaded.
"""

import math
from collections.abc import Sequence

import numpy as np

_ROWS = 64  # of a file, turned at a time: they and what they become stay in the cache
_APART = 64  # bytes between them; rows a power of two apart would share a few lines of the cache
_SMALL = 2**15  # bytes that are not worth it
_ALIGNMENT = 64  # bytes; what XLA asks of memory that it takes over on CPU


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """`np.empty`, aligned so that `jax.device_put` to a CPU need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_into(block: np.ndarray, values: np.ndarray) -> None:
    """`block[...] = values`, cast to the block's dtype.

    Where `values` is a transposed view, numpy would gather the block number by number from all over
    the file. Here some rows of the file are copied (and cast) as they lie, and turned in the cache.

    Args:
      block: C order, or a part of such.
      values: of its shape.
    """
    order = sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))
    if not order or order[-1] == values.ndim - 1 or values.nbytes < _SMALL:
        block[...] = values
        return
    target, source = block.transpose(order), values.transpose(order)
    turned = order.index(values.ndim - 1)  # along it the block is contiguous, the source a column
    width = math.prod(source.shape[turned + 1 :])
    room = np.empty((_ROWS, width + _APART // block.itemsize), block.dtype)[:, :width]
    for outer in np.ndindex(source.shape[:turned]):
        for first in range(0, source.shape[turned], _ROWS):
            rows = (*outer, slice(first, first + _ROWS))
            part = source[rows]
            turning = room[: len(part)].reshape(part.shape)
            turning[...] = part
            target[rows] = turning
