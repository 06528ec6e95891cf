"""Soft prompt (Lester et al. 2021): the slots' embeddings are the parameters themselves."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    Folded,
    MethodConfig,
    MethodInfo,
    MethodInputs,
    PromptMethod,
    Values,
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


class FixedPrompt(PromptMethod):
    """Soft prompts that are not trained, teachers of another: one, or one of each of T tasks."""

    constants = ("prompt",)

    def __init__(self, prompt_TPD: Array):
        super().__init__({"prompt": prompt_TPD}, MethodConfig())

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [T, P, D]; a segment's task picks, unless there is one for all."""
        index_BG = None
        if len(self["prompt"]) > 1:
            index_BG = inputs.task_index_BG
            if index_BG is None:
                index_BG = jnp.zeros_like(inputs.prompt_index_BG)
        return PromptValues(encoder=self["prompt"], prompt_index_BG=index_BG)


class MadeRows(PromptMethod):
    """A prompt that is made of other arrays whatever the input; only its rows are kept."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder = rows [1, P, D]."""
        return PromptValues(encoder=self.rows()[None])

    def rows(self) -> Array:
        """What stands in the slots, [P, D]."""
        raise NotImplementedError


def folding(make: Callable[[Values, Any], MadeRows]) -> Callable[[Values, MethodConfig], Folded]:
    """A `MethodInfo.fold` that takes the rows of what `make` makes as a soft prompt."""

    def fold(values: Values, config: MethodConfig) -> Folded:
        rows_PD = make(values, config).rows()
        return Folded(MethodConfig(length=len(rows_PD)), {"prompt": rows_PD})

    return fold


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
