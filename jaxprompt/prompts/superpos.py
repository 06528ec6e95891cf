"""SuperPos-Prompt (SadraeiJavaeri et al. 2024, arXiv 2406.05279): slots as sums of tokens.

P_i = sum_j w_ij e_j over m rows e_j of the embedding table, drawn once, the same for all slots, and
constant. The paper trains w; it begins here at N(0, 1/m): slots then begin as long as tokens are.
"""

import dataclasses

import jax
import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo
from jaxprompt.prompts.init import InitContext, sampled_rows
from jaxprompt.prompts.soft import MadeRows, folding
from jaxprompt.typing import Array


@dataclasses.dataclass(frozen=True)
class SuperposConfig(MethodConfig):
    """Options of SuperPos-Prompt; of `init` only `init_vocab_size` applies.

    Attributes:
      tokens: m, rows of the embedding table.
    """

    name: str = "superpos"
    length: int = 10
    tokens: int = 128

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("tokens")


class SuperposPrompt(MadeRows):
    """P = W E_m, E_m constant."""

    constants = ("rows_of_table",)

    def rows(self) -> Array:
        """[P, D]."""
        return self["weights"] @ self["rows_of_table"]


def _initial(key: Array, config: SuperposConfig, context: InitContext) -> dict[str, np.ndarray]:
    drawn, weights = jax.random.split(key)
    shape = (config.length, config.tokens)
    return {
        "rows_of_table": sampled_rows(drawn, config.tokens, config, context),
        "weights": np.asarray(jax.random.normal(weights, shape)) * config.tokens**-0.5,
    }


SUPERPOS = MethodInfo(
    formula="P_i = sum_j w_ij e_j over tokens rows e_j of the embedding table",
    paper="SadraeiJavaeri et al. 2024, arXiv 2406.05279",
    cost="as soft once folded",
    config=SuperposConfig,
    make=SuperposPrompt,
    initial=_initial,
    parameters=lambda config, sizes: config.length * config.tokens,
    fold=folding(SuperposPrompt),
)
