"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937).

P + LN(W_up ReLU(W_down P)). What it follows is the paper and its code (arazd/ResidualPrompts,
`ResMLP` of kind MLP1): linear layers with biases, layer norm with epsilon 1e-5, the skip connection
around all of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    MethodConfig,
    MethodInfo,
    Sizes,
)
from jaxprompt.prompts.init import InitContext, initial_rows, linear
from jaxprompt.prompts.soft import MadeRows, folding
from jaxprompt.typing import Array

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ResidualConfig(MethodConfig):
    """Options of residual prompt tuning.

    Attributes:
      hidden: m, width of the bottleneck.
      per_token: every slot has a network of its own.
      layer_norm: normalise what is added.
    """

    name: str = "residual"
    length: int = 10
    hidden: int = 400
    per_token: bool = False
    layer_norm: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("hidden")


class ResidualPrompt(MadeRows):
    """A soft prompt and a small network around it; both are trained, only their sum is kept."""

    def rows(self) -> Array:
        """P' = P + Phi(P), [P, D]."""
        prompt_PD = self["prompt"]
        # weights are [1 or P, ...]: one network for all slots, or one each
        hidden = jnp.einsum("pd,pdm->pm", prompt_PD, self._of_each("down")) + self["down_bias"]
        hidden = jax.nn.relu(hidden)
        added = jnp.einsum("pm,pmd->pd", hidden, self._of_each("up")) + self["up_bias"]
        if self.config.layer_norm:
            added = added - added.mean(-1, keepdims=True)
            added = added * jax.lax.rsqrt(jnp.mean(added**2, -1, keepdims=True) + _EPSILON)
            added = added * self["scale"] + self["bias"]
        return prompt_PD + added

    def _of_each(self, name: str) -> Array:
        array = self[name]
        return jnp.broadcast_to(array, (self.config.length, *array.shape[1:]))


def _initial(key: Array, config: ResidualConfig, context: InitContext) -> dict[str, np.ndarray]:
    rows_key, down, down_bias, up, up_bias = jax.random.split(key, 5)
    d, m = context.sizes.d_model, config.hidden
    n = config.length if config.per_token else 1
    values = {
        "prompt": initial_rows(rows_key, config, context),
        "down": linear(down, d, n, d, m),
        "down_bias": linear(down_bias, d, n, m),
        "up": linear(up, m, n, m, d),
        "up_bias": linear(up_bias, m, n, d),
    }
    if config.layer_norm:
        values |= {"scale": np.ones((n, d), np.float32), "bias": np.zeros((n, d), np.float32)}
    return values


def _parameters(config: ResidualConfig, sizes: Sizes) -> int:
    d, m = sizes.d_model, config.hidden
    network = 2 * d * m + m + d + (2 * d if config.layer_norm else 0)
    return config.length * d + network * (config.length if config.per_token else 1)


RESIDUAL = MethodInfo(
    formula="P' = P + LN(W_up ReLU(W_down P)), hidden wide",
    paper="Razdaibiedina et al. 2023, arXiv 2305.03937",
    cost="as soft once folded",
    config=ResidualConfig,
    make=ResidualPrompt,
    initial=_initial,
    parameters=_parameters,
    fold=folding(ResidualPrompt),
)
