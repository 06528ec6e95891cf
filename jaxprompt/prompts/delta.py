"""A short soft prompt and a change of the text's own embeddings: DePT and ADePT.

DePT: Shi & Lipani 2024, arXiv 2309.05173, E(X) + c A B by position; c = alpha / sqrt(rank), as the
authors' code has it (ZhengxiangShi/DePT). ADePT: Tang et al. 2025, arXiv 2501.03291, E(x) +
ReLU(x A + a) B + b by token. First values as in their code: U(-1/sqrt(rank), 1/sqrt(rank)) for A,
zeros for the rest. The papers train the low-rank part with a rate of its own:
`optim.learning_rates`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, PromptMethod
from jaxprompt.prompts.init import InitContext, initial_rows, linear
from jaxprompt.prompts.networks import affine
from jaxprompt.prompts.reading import is_token, text_positions
from jaxprompt.typing import Array, PromptValues


@dataclasses.dataclass(frozen=True)
class DeptConfig(MethodConfig):
    """Options of DePT.

    Attributes:
      length: m; with rank 30 and 256 positions the paper's budget for T5-base.
      rank: r.
      positions: of the text that are changed, from its first; later ones stay.
      alpha: scales the change.
    """

    name: str = "dept"
    length: int = 60
    rank: int = 30
    positions: int = 256
    alpha: float = 8.0

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("rank", "positions")


@dataclasses.dataclass(frozen=True)
class AdeptConfig(MethodConfig):
    """Options of ADePT.

    Attributes:
      length: m; with rank 19 the paper's budget for T5-base.
      rank: r, width of the network.
    """

    name: str = "adept"
    length: int = 60
    rank: int = 19

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("rank")


class DeptPrompt(PromptMethod):
    """[P; E(X) + c A B]."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [1, P, D] and input_delta [B, S, D]."""
        config = self.config
        changes_LD = config.alpha * config.rank**-0.5 * (self["left"] @ self["right"])
        place_BS = text_positions(inputs)
        inside_BS = (place_BS >= 0) & (place_BS < config.positions)
        delta_BSD = jnp.where(inside_BS[..., None], changes_LD[place_BS], 0)
        return PromptValues(encoder=self["prompt"][None], input_delta=delta_BSD)


class AdeptPrompt(PromptMethod):
    """[P; E(x) + ReLU(x A + a) B + b]."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [1, P, D] and input_delta [B, S, D]."""
        embeds_BSD = inputs.embeds_BSD.astype(jnp.float32)
        hidden = jax.nn.relu(affine(embeds_BSD, self["left"], self["left_bias"]))
        delta_BSD = affine(hidden, self["right"], self["right_bias"])
        delta_BSD = jnp.where(is_token(inputs)[..., None], delta_BSD, 0)
        return PromptValues(encoder=self["prompt"][None], input_delta=delta_BSD)


def _dept_initial(key: Array, config: DeptConfig, context: InitContext) -> dict[str, np.ndarray]:
    rows, left = jax.random.split(key)
    return {
        "prompt": initial_rows(rows, config, context),
        "left": linear(left, config.rank, config.positions, config.rank),
        "right": np.zeros((config.rank, context.sizes.d_model), np.float32),
    }


def _adept_initial(key: Array, config: AdeptConfig, context: InitContext) -> dict[str, np.ndarray]:
    rows, left = jax.random.split(key)
    d, r = context.sizes.d_model, config.rank
    return {
        "prompt": initial_rows(rows, config, context),
        "left": linear(left, r, d, r),
        "left_bias": np.zeros(r, np.float32),
        "right": np.zeros((r, d), np.float32),
        "right_bias": np.zeros(d, np.float32),
    }


DEPT = MethodInfo(
    formula="[P; E(X) + alpha / sqrt(rank) A B], A by position, B in R^(rank x d_model)",
    paper="Shi & Lipani 2024, arXiv 2309.05173",
    cost="length more positions, a table added to the text's embeddings",
    config=DeptConfig,
    make=DeptPrompt,
    initial=_dept_initial,
    parameters=lambda config, sizes: (
        config.length * sizes.d_model + config.rank * (config.positions + sizes.d_model)
    ),
)
ADEPT = MethodInfo(
    formula="[P; E(x) + ReLU(x A + a) B + b], rank wide, for every token x",
    paper="Tang et al. 2025, arXiv 2501.03291",
    cost="length more positions, a small network over the text's embeddings",
    config=AdeptConfig,
    make=AdeptPrompt,
    initial=_adept_initial,
    parameters=lambda config, sizes: (
        config.length * sizes.d_model
        + 2 * config.rank * sizes.d_model
        + config.rank
        + sizes.d_model
    ),
)
