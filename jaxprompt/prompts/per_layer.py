"""Per-layer prompts: the slots hold trained vectors before every layer of the encoder.

As google-research/prompt-tuning's `extended/train/per_layer.py`, which they come through the frozen
queries, keys and values as (unlike P-Tuning v2): `replace` puts a layer's own prompt in place of
the slots' hidden states, `add` adds it to them, close to the deep perturbations of Qin & Eisner
2021, arXiv 2104.06599. There the embedding layer has one more prompt, which `replace` makes
unreachable and `add` sums with the first layer's; here the first layer's prompt is the slots'
embedding. What is added begins at zero, which is a soft prompt.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, PromptMethod
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.typing import Array, LayerSlots, PromptValues


@dataclasses.dataclass(frozen=True)
class PerLayerConfig(MethodConfig):
    """Options of per-layer prompts.

    Attributes:
      mode: "replace" the hidden states of the slots, or "add" to them.
    """

    name: str = "per-layer"
    length: int = 10
    mode: Literal["replace", "add"] = "replace"


class PerLayerPrompt(PromptMethod):
    """A prompt for each encoder layer, [N, P, D]."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [1, P, D] and encoder_layers [N - 1, 1, P, D]."""
        prompts_NPD = self["prompts"]
        later = LayerSlots(prompts_NPD[1:, None], jnp.array([self.config.mode == "add"]))
        return PromptValues(encoder=prompts_NPD[:1], encoder_layers=later)


def _initial(key: Array, config: PerLayerConfig, context: InitContext) -> dict[str, np.ndarray]:
    count = context.sizes.num_layers
    first, *rest = jax.random.split(key, count)
    rows = initial_rows(first, config, context)
    later = [
        np.zeros_like(rows) if config.mode == "add" else initial_rows(own, config, context)
        for own in rest
    ]
    return {"prompts": np.stack([rows, *later])}


PER_LAYER = MethodInfo(
    formula="h_l = P_l, or h_l + P_l, at the slots before every encoder layer l",
    paper="google-research/prompt-tuning, per_layer; Qin & Eisner 2021, arXiv 2104.06599",
    cost="length more positions, a gather in each layer",
    config=PerLayerConfig,
    make=PerLayerPrompt,
    initial=_initial,
    parameters=lambda config, sizes: sizes.num_layers * config.length * sizes.d_model,
)
