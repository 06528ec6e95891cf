"""What every prompt method is: options, what it may read, what it returns, how it is registered.

Methods never see the backbone's module; they get embeddings to read and hand back prompt values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from flax import nnx

from jaxprompt.trees import PromptParam
from jaxprompt.typing import Array, PromptValues, UserError

INITS = ("uniform", "vocab", "labels", "text", "prompt", "npy")

Values = Mapping[str, Array]
"""A method's arrays by name: what is trained, and what it keeps as it is."""


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Options of a prompt method; those with options of their own extend it.

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

    def check_positive(self, *names: str) -> None:
        """Raises: UserError if one of these options is not at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"method.{name} is {getattr(self, name)}, it has to be at least 1")

    def check_rank(self, rank: int) -> None:
        """Raises: UserError if `method.rank` is not at least 1 and at most the prompt's length."""
        self.check_positive("rank")
        if rank > self.length:
            raise UserError(
                f"method.rank {rank} is larger than the prompt, method.length {self.length}"
            )


class Sizes(Protocol):
    """What a method may know of the backbone's architecture (a `T5Config` is one).

    d_model D, num_layers and num_decoder_layers N, num_heads H, d_kv K.
    """

    @property
    def d_model(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_decoder_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def d_kv(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class MethodInputs:
    """What a method may read; most read nothing.

    Attributes:
      embeds_BSD: input embeddings (zero-information at slots: the pad token's row).
      slots_BS: slot index, -1 = a token.
      segments_BS: segment ids, 0 = padding.
      prompt_index_BG: prompt of each segment.
      keys_B: random keys of each row in training, for methods that draw; None when they are used.
      task_index_BG: task of each segment, for methods with parts for each; None = there is one.
    """

    embeds_BSD: Array
    slots_BS: Array
    segments_BS: Array
    prompt_index_BG: Array
    keys_B: Array | None = None
    task_index_BG: Array | None = None


class Constant(nnx.Param):
    """An array of a method that no optimizer sees."""


class PromptMethod(nnx.Module):
    """Base of all methods: its `trees.PromptParam`s are trained, the call makes prompt values.

    Attributes:
      constants: names of the values that are kept as they are.
      config: its options.
    """

    constants: ClassVar[tuple[str, ...]] = ()
    config: Any

    def __init__(self, values: Values, config: MethodConfig):
        """Args: values: arrays by name, float32 whatever the backbone's dtype."""
        self.config = config
        for name, value in values.items():
            kind = Constant if name in self.constants else PromptParam
            setattr(self, name, kind(value))

    def __getitem__(self, name: str) -> Array:
        """One of its values."""
        return getattr(self, name)[...]

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Prompt values for a batch; shapes as `typing.PromptValues` says."""
        raise NotImplementedError


class NoPrompt(PromptMethod):
    """The bare backbone, also what full-model tuning and pretraining run with."""

    def __init__(self):
        super().__init__({}, MethodConfig())

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """Nothing."""
        return PromptValues()


@dataclasses.dataclass(frozen=True)
class Folded:
    """A plain prompt that says the same as what was trained.

    Attributes:
      config: of the method "soft" or "p-tuning-v2".
      values: its arrays.
    """

    config: MethodConfig
    values: Values


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """A registered method.

    Attributes:
      formula: one line for `jaxprompt methods`.
      paper: source.
      cost: what it adds to an answer, one line.
      config: its options; the default of `name` is what it is called.
      make: (values, config) -> PromptMethod.
      initial: (key, config, context) -> first values, float32; see `init.InitContext`.
      parameters: (config, sizes) -> number of trained scalars.
      fold: (values, config) -> a plain prompt; None = cannot be folded.
      check: (values, config, sizes) -> raises UserError if the values do not fit the backbone; that
        of embeddings of another width is not its matter.
      slots: config -> encoder slots that an example has.
      draws: config -> whether it draws in training.
      task_parts: names of values with a part for each of several tasks on their first axis; such a
        method's options have `tasks`, their names, and it folds where there is one.
      sources: config -> artifacts of other prompts that it keeps the rows of.
    """

    formula: str
    paper: str
    cost: str
    config: type[MethodConfig]
    make: Callable[[Values, MethodConfig], PromptMethod]
    initial: Callable[..., dict[str, np.ndarray]]
    parameters: Callable[..., int]
    fold: Callable[..., Folded] | None = None
    check: Callable[..., None] = lambda values, config, sizes: None
    slots: Callable[[MethodConfig], int] = lambda config: config.length
    draws: Callable[..., bool] = lambda config: False
    task_parts: tuple[str, ...] = ()
    sources: Callable[..., tuple[str, ...]] = lambda config: ()

    @property
    def name(self) -> str:
        """As in `method.name`."""
        return self.config.name
