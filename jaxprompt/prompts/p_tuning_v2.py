"""P-Tuning v2 (Liu et al. 2022, arXiv 2110.07602): trained keys and values in every layer.

Also the plain form that Prefix Tuning folds to. On an encoder-decoder each attention can have its
own: the encoder's, the decoder's, and the decoder's over the encoder (cross).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxprompt.prompts.base import (
    MethodConfig,
    MethodInfo,
    MethodInputs,
    PromptMethod,
    Sizes,
    Values,
)
from jaxprompt.prompts.init import InitContext
from jaxprompt.typing import Array, KeysValues, PromptValues, UserError

PLACES = {"encoder": "encoder_self", "decoder": "decoder_self", "cross": "decoder_cross"}


@dataclasses.dataclass(frozen=True)
class KeysValuesConfig(MethodConfig):
    """Options of what trains keys and values; `init` does not apply to them.

    Attributes:
      places: which attentions have them: "encoder", "decoder", "cross".
      init_std: of the normal distribution that first values are drawn from.
      before_text: whether keys of self-attentions stand at the positions before the text and take
        the relative bias there, as Hugging Face PEFT's do; else they stand nowhere.
    """

    name: str = "p-tuning-v2"
    length: int = 20
    places: tuple[str, ...] = ("encoder", "decoder", "cross")
    init_std: float = 0.02
    before_text: bool = False

    def __post_init__(self):
        super().__post_init__()
        wrong = [place for place in self.places if place not in PLACES]
        if wrong or not self.places or len(set(self.places)) < len(self.places):
            raise UserError(
                f"method.places is {', '.join(self.places) or 'empty'}; it has some of "
                f"{', '.join(PLACES)}, each once"
            )
        if self.init_std <= 0:
            raise UserError(f"method.init_std is {self.init_std}, it has to be above 0")


class PTuningV2(PromptMethod):
    """Keys and values [N, P, H, K] of each place, the parameters themselves."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Keys and values with Q = 1."""
        pairs = {
            place: (self[keys][:, None], self[values][:, None])
            for place in self.config.places
            for keys, values in [names_of(place)]
        }
        return prompt_values(pairs, self.config)


def prompt_values(pairs: dict[str, tuple[Array, Array]], config: KeysValuesConfig) -> PromptValues:
    """Prompt values of keys and values [N, Q, P, H, K] by place."""
    made: dict[str, Any] = {
        PLACES[place]: KeysValues(*pair, before_text=config.before_text and place != "cross")
        for place, pair in pairs.items()
    }
    return PromptValues(**made)


def names_of(place: str) -> tuple[str, str]:
    """What the arrays of a place are called."""
    return f"{PLACES[place]}_keys", f"{PLACES[place]}_values"


def layers_of(place: str, sizes: Sizes) -> int:
    """N, layers of the stack that a place is in."""
    return sizes.num_layers if place == "encoder" else sizes.num_decoder_layers


def _initial(key: Array, config: KeysValuesConfig, context: InitContext) -> dict[str, np.ndarray]:
    sizes, values = context.sizes, {}
    for place, own in zip(PLACES, jax.random.split(key, len(PLACES)), strict=True):
        if place in config.places:
            layers = layers_of(place, sizes)
            shape = (2, layers, config.length, sizes.num_heads, sizes.d_kv)
            drawn = config.init_std * jax.random.normal(own, shape)
            values |= dict(zip(names_of(place), np.asarray(drawn), strict=True))
    return values


def _parameters(config: KeysValuesConfig, sizes: Sizes) -> int:
    width = sizes.num_heads * sizes.d_kv
    return sum(2 * layers_of(place, sizes) * config.length * width for place in config.places)


def _check(values: Values, config: KeysValuesConfig, sizes: Sizes) -> None:
    for place in config.places:
        layers, _, heads, size = values[names_of(place)[0]].shape
        want = (layers_of(place, sizes), sizes.num_heads, sizes.d_kv)
        if (layers, heads, size) != want:
            stack = "encoder" if place == "encoder" else "decoder"
            raise UserError(
                f"the prompt has keys for {layers} layers with {heads} heads of size {size}, the "
                f"backbone's {stack} has {want[0]} with {want[1]} of {want[2]}"
            )


def no_slots(config: MethodConfig) -> int:
    """Keys and values stand in no row."""
    return 0


P_TUNING_V2 = MethodInfo(
    formula="[K_l; X W_k], [V_l; X W_v] in every layer l, K_l, V_l in R^(length x heads x d_kv)",
    paper="Liu et al. 2022, arXiv 2110.07602",
    cost="length more keys and values in each attention of `places`, no positions",
    config=KeysValuesConfig,
    make=PTuningV2,
    initial=_initial,
    parameters=_parameters,
    check=_check,
    slots=no_slots,
)
