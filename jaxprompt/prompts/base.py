"""What every prompt method is: options, what it may read, what it returns, how it is registered.

Methods never see the backbone's module; they get embeddings to read and hand back prompt values.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from jaxprompt.typing import Array, PromptValues, UserError

INITS = ("uniform", "vocab", "labels", "text", "prompt", "npy")


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Options of a prompt method.

    Attributes:
      name: the method, see `jaxprompt methods`.
      length: P, number of slots.
      init: where the first values come from: "uniform" (from init_low to init_high), "vocab" (rows
        of the embedding table drawn from its first `init_vocab_size` ids), "labels" (mean embedding
        of each candidate, the rest as "vocab"), "text" (embeddings of `init_text`, repeated),
        "prompt" (another artifact at `init_path`), "npy" (a .npy file at `init_path`).
    """

    name: str = "soft"
    length: int = 100
    init: str = "vocab"
    init_low: float = -0.5
    init_high: float = 0.5
    init_vocab_size: int = 5000
    init_text: str = ""
    init_path: str = ""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"method.length is {self.length}, a prompt needs at least 1 slot")
        if self.init not in INITS:
            raise UserError(f"method.init {self.init!r} is not one of {', '.join(INITS)}")
        if self.init_low >= self.init_high:
            raise UserError(
                f"method.init_low {self.init_low} is not below method.init_high {self.init_high}"
            )
        if self.init_vocab_size < 1:
            raise UserError(f"method.init_vocab_size is {self.init_vocab_size}, not at least 1")
        if self.init == "text" and not self.init_text:
            raise UserError("method.init is 'text' but method.init_text is empty")
        if self.init in ("prompt", "npy") and not self.init_path:
            raise UserError(f"method.init is {self.init!r} but method.init_path is empty")


@dataclasses.dataclass(frozen=True)
class MethodInputs:
    """What a method may read; most read nothing.

    Attributes:
      embeds_BSD: input embeddings (zero-information at slots: the pad token's row).
      slots_BS: slot index, -1 = a token.
      segments_BS: segment ids, 0 = padding.
      prompt_index_BG: prompt (or task) of each segment.
    """

    embeds_BSD: Array
    slots_BS: Array
    segments_BS: Array
    prompt_index_BG: Array


class PromptMethod(nnx.Module):
    """Base of all methods: parameters are `trees.PromptParam`, the call returns prompt values."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Prompt values for a batch; shapes as `typing.PromptValues` says."""
        raise NotImplementedError


class NoPrompt(PromptMethod):
    """The bare backbone, also what full-model tuning and pretraining run with."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Nothing."""
        return PromptValues()


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """A registered method.

    Attributes:
      name: as in `method.name`.
      formula: one line for `jaxprompt methods`.
      paper: source.
      make: (values: {"parameter name": array}, config) -> PromptMethod.
      initial: (key, config, rows) -> {"parameter name": float32 array}, where rows(key, config) is
        `init.initial_rows` bound to its context.
      parameters: (config, d_model) -> number of trained scalars.
    """

    name: str
    formula: str
    paper: str
    make: Callable[[Mapping[str, Array], MethodConfig], PromptMethod]
    initial: Callable[[Array, MethodConfig, Callable[..., np.ndarray]], dict[str, np.ndarray]]
    parameters: Callable[[MethodConfig, int], int]
