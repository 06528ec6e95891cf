"""Soft prompt (Lester et al. 2021): the slots' embeddings are the parameters themselves."""

import numpy as np

from jaxprompt.prompts.base import (
    Folded,
    MethodConfig,
    MethodInfo,
    MethodInputs,
    PromptMethod,
)
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.typing import Array, PromptValues


class SoftPrompt(PromptMethod):
    """P trained vectors of size D."""

    def __init__(self, prompt_PD: Array):
        super().__init__({"prompt": prompt_PD}, MethodConfig())

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder = prompt [1, P, D]."""
        return PromptValues(encoder=self["prompt"][None])


def folded(prompt_PD: Array, config: MethodConfig) -> Folded:
    """A soft prompt with these rows, in place of another method's prompt."""
    return Folded(MethodConfig(length=config.length), {"prompt": prompt_PD})


def _initial(key: Array, config: MethodConfig, context: InitContext) -> dict[str, np.ndarray]:
    return {"prompt": initial_rows(key, config, context)}


SOFT = MethodInfo(
    formula="[P; E(X)], P in R^(length x d_model)",
    paper="Lester et al. 2021, arXiv 2104.08691",
    cost="length more positions in the encoder",
    config=MethodConfig,
    make=lambda values, config: SoftPrompt(values["prompt"]),
    initial=_initial,
    parameters=lambda config, sizes: config.length * sizes.d_model,
)
