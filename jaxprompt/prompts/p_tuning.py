"""P-Tuning (Liu et al. 2021, arXiv 2103.10385): an MLP or a bidirectional LSTM makes the prompt.

The networks are those of Hugging Face PEFT's `PromptEncoder`: MLP d-h-h-d with ReLU; or an LSTM of
`layers` layers with h units a direction, then 2h-2h-d with ReLU. Slots may stand anywhere among the
text (`layout`), as in the paper.
"""

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    MethodConfig,
    MethodInfo,
    Sizes,
)
from jaxprompt.prompts.init import InitContext, initial_rows, linear
from jaxprompt.prompts.networks import affine
from jaxprompt.prompts.soft import MadeRows, folding
from jaxprompt.typing import Array


@dataclasses.dataclass(frozen=True)
class PTuningConfig(MethodConfig):
    """Options of P-Tuning.

    Attributes:
      encoder: what makes the prompt of `length` trained vectors.
      hidden: h.
      layers: of the LSTM.
    """

    name: str = "p-tuning"
    length: int = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = 512
    layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("hidden", "layers")


class PTuning(MadeRows):
    """Trained vectors and the network they go through; only what comes out is kept."""

    def rows(self) -> Array:
        """What the network makes of the vectors, [P, D]."""
        x = self["prompt"]
        if self.config.encoder == "lstm":
            for layer in range(self.config.layers):
                x = jnp.concatenate(
                    [self._pass(x, layer, "forward"), self._pass(x, layer, "backward")], axis=-1
                )
        linears = range(_linears(self.config))
        for number in linears:
            x = affine(x, self[f"linear_{number}"], self[f"linear_{number}_bias"])
            x = jax.nn.relu(x) if number < linears[-1] else x
        return x

    def _pass(self, x_PD: Array, layer: int, direction: str) -> Array:
        """One direction of an LSTM layer: [P, D] -> [P, h]; gates in torch's order i, f, g, o."""
        name = f"lstm_{layer}_{direction}"
        gates_P4H = affine(x_PD, self[f"{name}_input"], self[f"{name}_bias"])
        recurrent = self[f"{name}_hidden"]

        def step(carry: tuple[Array, Array], gates_4H: Array) -> tuple:
            hidden, cell = carry
            enter, forget, new, out = jnp.split(gates_4H + hidden @ recurrent, 4)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros(self.config.hidden)
        _, hidden_PH = jax.lax.scan(
            step, (zeros, zeros), gates_P4H, reverse=direction == "backward"
        )
        return hidden_PH


def _linears(config: PTuningConfig) -> int:
    return 2 if config.encoder == "lstm" else 3


def _shapes(config: PTuningConfig, sizes: Sizes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of the network's arrays: what `linear` begins them with, and their shapes."""
    d, h = sizes.d_model, config.hidden
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    widths = [d, h, h, d]
    if config.encoder == "lstm":
        for layer in range(config.layers):
            for direction in ("forward", "backward"):
                name = f"lstm_{layer}_{direction}"
                shapes[f"{name}_input"] = (h, (2 * h if layer else d, 4 * h))
                shapes[f"{name}_hidden"] = (h, (h, 4 * h))
                shapes[f"{name}_bias"] = (h, (4 * h,))
        widths = [2 * h, 2 * h, d]
    for number, (width, next_width) in enumerate(itertools.pairwise(widths)):
        shapes[f"linear_{number}"] = (width, (width, next_width))
        shapes[f"linear_{number}_bias"] = (width, (next_width,))
    return shapes


def _initial(key: Array, config: PTuningConfig, context: InitContext) -> dict[str, np.ndarray]:
    shapes = _shapes(config, context.sizes)
    rows_key, *keys = jax.random.split(key, len(shapes) + 1)
    network = {
        name: linear(own, fan_in, *shape)
        for own, (name, (fan_in, shape)) in zip(keys, shapes.items(), strict=True)
    }
    return {"prompt": initial_rows(rows_key, config, context), **network}


def _parameters(config: PTuningConfig, sizes: Sizes) -> int:
    network = sum(int(np.prod(shape)) for _, shape in _shapes(config, sizes).values())
    return config.length * sizes.d_model + network


P_TUNING = MethodInfo(
    formula="P' = MLP(P) or MLP(biLSTM(P)), hidden wide",
    paper="Liu et al. 2021, arXiv 2103.10385",
    cost="as soft once folded",
    config=PTuningConfig,
    make=PTuning,
    initial=_initial,
    parameters=_parameters,
    fold=folding(PTuning),
)
