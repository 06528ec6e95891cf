"""Prefix Tuning (Li & Liang 2021, arXiv 2101.00190): a network makes every layer's keys and values.

As the authors' code does for encoder-decoders, each attention has trained vectors and a network of
its own: d-m-(2 N H K) with tanh. H K need not be d_model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    Folded,
    MethodInfo,
    MethodInputs,
    PromptMethod,
    Sizes,
    Values,
)
from jaxprompt.prompts.init import InitContext, linear
from jaxprompt.prompts.networks import affine
from jaxprompt.prompts.p_tuning_v2 import (
    KeysValuesConfig,
    layers_of,
    names_of,
    no_slots,
    prompt_values,
)
from jaxprompt.typing import Array, PromptValues


@dataclasses.dataclass(frozen=True)
class PrefixConfig(KeysValuesConfig):
    """Options of Prefix Tuning.

    Attributes:
      hidden: m, width of the networks.
      init_std: of the trained vectors' first values.
    """

    name: str = "prefix"
    init_std: float = 1.0
    hidden: int = 512

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("hidden")


class PrefixTuning(PromptMethod):
    """Of each place vectors [P, D] and a network; only the keys and values they make are kept."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Keys and values with Q = 1."""
        return prompt_values(
            {
                place: (keys[:, None], values[:, None])
                for place, (keys, values) in self.pairs().items()
            },
            self.config,
        )

    def pairs(self) -> dict[str, tuple[Array, Array]]:
        """Keys and values [N, P, H, K] by place."""
        return {place: self._pair(place) for place in self.config.places}

    def _pair(self, place: str) -> tuple[Array, Array]:
        prompt_PD, up, up_bias, out, out_bias = (getattr(self, name)[...] for name in _names(place))
        hidden_PM = jnp.tanh(affine(prompt_PD, up, up_bias))
        made = jnp.einsum("pm,mcnhk->cnphk", hidden_PM, out) + out_bias[:, :, None]
        return made[0], made[1]


def _names(place: str) -> list[str]:
    return [f"{place}_{part}" for part in ("prompt", "up", "up_bias", "out", "out_bias")]


def _initial(key: Array, config: PrefixConfig, context: InitContext) -> dict[str, np.ndarray]:
    sizes, m, values = context.sizes, config.hidden, {}
    d, heads = sizes.d_model, (sizes.num_heads, sizes.d_kv)
    for number, place in enumerate(config.places):
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        out = (2, layers_of(place, sizes), *heads)  # keys and values
        arrays = [
            np.asarray(config.init_std * jax.random.normal(keys[0], (config.length, d))),
            linear(keys[1], d, d, m),
            linear(keys[2], d, m),
            linear(keys[3], m, m, *out),
            linear(keys[4], m, *out),
        ]
        values |= dict(zip(_names(place), arrays, strict=True))
    return values


def _parameters(config: PrefixConfig, sizes: Sizes) -> int:
    d, m, width = sizes.d_model, config.hidden, sizes.num_heads * sizes.d_kv
    return sum(
        config.length * d + d * m + m + (m + 1) * 2 * layers_of(place, sizes) * width
        for place in config.places
    )


def _fold(values: Values, config: PrefixConfig) -> Folded:
    pairs = PrefixTuning(values, config).pairs()
    plain = {
        name: array
        for place, pair in pairs.items()
        for name, array in zip(names_of(place), pair, strict=True)
    }
    folded = KeysValuesConfig(
        length=config.length, places=config.places, before_text=config.before_text
    )
    return Folded(folded, plain)


PREFIX = MethodInfo(
    formula="K_l, V_l = W_out tanh(W_up P) in every layer l, hidden wide",
    paper="Li & Liang 2021, arXiv 2101.00190",
    cost="as p-tuning-v2 once folded",
    config=PrefixConfig,
    make=PrefixTuning,
    initial=_initial,
    parameters=_parameters,
    fold=_fold,
    slots=no_slots,
)
