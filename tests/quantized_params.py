"""Parameter trees quantised in memory, and the float trees that they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt import quantize, trees
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params


def quantized(params: dict, config: T5Config, kind: str) -> dict:
    """Every matrix as a QArray."""
    leaves = trees.flatten(abstract_params(config, quantize=kind))

    def leaf(path: str, values: jax.Array) -> Any:
        wanted, floats = leaves[path], np.asarray(values)
        if not quantize.is_quantized(wanted):
            return values
        scale = quantize.scales_of(floats, wanted.scale.shape, wanted.qtype)
        codes = quantize.codes_of(floats, quantize.spread(scale, floats.shape), wanted.qtype)
        return quantize.make(jnp.asarray(codes), jnp.asarray(scale))

    return trees.map_with_path(leaf, params)


def as_floats(params: dict) -> dict:
    """Codes times scales, by numpy, float32."""

    def leaf(path: str, weight: Any) -> Any:
        if not quantize.is_quantized(weight):
            return weight
        scale = np.asarray(weight.scale)
        for axis, (count, size) in enumerate(zip(scale.shape, weight.shape, strict=True)):
            scale = np.repeat(scale, size // count, axis=axis)
        return jnp.asarray(np.asarray(weight.qvalue).astype(np.float32) * scale)

    return trees.map_with_path(leaf, params)
