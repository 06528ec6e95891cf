"""Soft prompt (Lester et al. 2021): the slots' embeddings are the parameters themselves."""

from collections.abc import Callable, Mapping

import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, PromptMethod
from jaxprompt.trees import PromptParam
from jaxprompt.typing import Array, PromptValues


class SoftPrompt(PromptMethod):
    """P trained vectors of size D; float32 whatever the backbone's dtype."""

    def __init__(self, prompt_PD: Array):
        self.prompt = PromptParam(prompt_PD, axes=("prompt", "embed"))

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder = prompt [1, P, D]."""
        return PromptValues(encoder=self.prompt[...][None])


def _make(values: Mapping[str, Array], config: MethodConfig) -> SoftPrompt:
    return SoftPrompt(values["prompt"])


def _initial(
    key: Array, config: MethodConfig, rows: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    return {"prompt": rows(key, config)}


SOFT = MethodInfo(
    name="soft",
    formula="[P; E(X)], P in R^(length x d_model)",
    paper="Lester et al. 2021, arXiv 2104.08691",
    make=_make,
    initial=_initial,
    parameters=lambda config, d_model: config.length * d_model,
)
