"""Quantised weights: qwix's arrays as leaves of the parameter tree, and products with them.

A quantised weight is a `qwix.QArray`: integer codes and float32 scales, one for each output channel
(or for each group of its inputs); weight = code * scale. Activations and prompts stay float.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.typing import Array, UserError

KINDS = ("none", "int8", "int4")
GROUP = 128  # inputs that share a scale, at most, where an output channel has several


def check_kind(kind: str | None) -> None:
    """Raises: UserError unless it is one of `KINDS`, or None (as it is stored)."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"quantize is {kind!r}; it can be {', '.join(KINDS)}")


def make(codes: Any, scale: Any) -> Any:
    """A QArray of arrays, or of whatever stands for them (shapes, shardings).

    Args:
      codes: int8 or int4 [...].
      scale: float32, as many axes; each axis of `codes` has one scale an entry, one in all, or one
        a group of neighbours.
    """
    import qwix  # when it is needed: most runs have nothing quantised

    return qwix.QArray(codes, scale, qtype=jnp.dtype(codes.dtype).name)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree is a QArray."""
    return hasattr(leaf, "qvalue")


def scale_shape(shape: Sequence[int], inputs: Sequence[int], kind: str) -> tuple[int, ...]:
    """Shape of the scales of a weight.

    Args:
      shape: of the weight.
      inputs: axes that a product sums over.
      kind: "int8", one scale for all inputs; "int4", one for each group of at most `GROUP`, and of
        several input axes one for each entry of all but the last.
    """
    scales = list(shape)
    for axis in inputs:
        scales[axis] = 1
    if kind == "int4":
        *outer, last = inputs
        for axis in outer:
            scales[axis] = shape[axis]
        largest = max(n for n in range(1, min(GROUP, shape[last]) + 1) if shape[last] % n == 0)
        scales[last] = shape[last] // largest
    return tuple(scales)


def scales_of(values: np.ndarray, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Scales such that the largest value of each group has the outermost code, float32 `shape`.

    As `qwix.quantize` has them but for the last bit, which there depends on the device.

    Args:
      values: float [...].
      dtype: of the codes.
    """
    values = values.astype(np.float32, copy=False)
    tiled = values.reshape(
        [n for size, count in zip(values.shape, shape, strict=True) for n in (count, size // count)]
    )
    within = tuple(range(1, tiled.ndim, 2))
    largest = np.maximum(tiled.max(axis=within), -tiled.min(axis=within))
    scale = largest / np.float32(jnp.iinfo(dtype).max + 0.5)
    return np.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)


def codes_of(values: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
    """The nearest codes, `dtype` in the shape of `values`; scales as `spread` gives them."""
    codes = values.astype(np.float32)
    codes /= scale
    np.rint(codes, out=codes)
    limits = jnp.iinfo(dtype)
    return np.clip(codes, limits.min, limits.max, out=codes).astype(dtype)


def spread(scale: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Scales of groups repeated for each member, so that they broadcast against `shape`."""
    for axis, (count, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if 1 < count < size:
            scale = np.repeat(scale, size // count, axis=axis)
    return scale


def dequantized(weight: Any, dtype: Any) -> Array:
    """The float weight that a QArray stands for."""
    import qwix

    return qwix.dequantize(weight).astype(dtype)


def take(table: Any, ids: Array, dtype: Any) -> Array:
    """Rows of an embedding table [V, D], quantised or not: [..., D]."""
    if not is_quantized(table):
        return table[ids].astype(dtype)
    return dequantized(make(table.qvalue[ids], table.scale[ids]), dtype)


def einsum(spec: str, x: Array, weight: Any, preferred_element_type: Any = None) -> Array:
    """`jnp.einsum` of an activation and a weight, quantised or not.

    One scale for each output channel comes after the product, so that no float weight is ever
    made, nor kept for the backward pass: the gradient to `x` is a product with the codes too. With
    groups of inputs a float weight is made on the way, and again in the backward pass.

    Args:
      spec: as "...d,df->...f", the weight's own axes last in what comes out.
      preferred_element_type: dtype of the result, that of `x` if not given.
    """
    if not is_quantized(weight):
        return jnp.einsum(
            spec, x, weight.astype(x.dtype), preferred_element_type=preferred_element_type
        )
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    _, names, outputs = re.split(",|->", spec)
    inputs = tuple(axis for axis, name in enumerate(names) if name not in outputs)
    if any(weight.scale.shape[axis] > 1 for axis in inputs):
        return _einsum_dequantized(spec, dtype, x, weight)
    # sums of codes overflow float16
    summed = jnp.float32 if dtype == jnp.float16 else dtype
    product = jnp.einsum(spec, x, weight.qvalue, preferred_element_type=summed)
    scale = weight.scale.squeeze(inputs)
    scale = scale.reshape((1,) * (product.ndim - scale.ndim) + scale.shape)
    return (product.astype(jnp.float32) * scale).astype(dtype)


@functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
def _einsum_dequantized(spec: str, dtype: Any, x: Array, weight: Any) -> Array:
    kernel = dequantized(weight, x.dtype)
    return jnp.einsum(spec, x, kernel, preferred_element_type=dtype)
