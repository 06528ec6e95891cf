"""What the small networks of prompt methods are made of."""

import jax.numpy as jnp

from jaxprompt.typing import Array


def affine(x: Array, weights: Array, bias: Array) -> Array:
    """x [..., d] times weights [d, m], and bias [m]: [..., m]."""
    return jnp.matmul(x, weights) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
