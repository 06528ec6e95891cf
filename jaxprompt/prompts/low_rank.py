"""Prompts that are products of thin matrices: DPT and LoPT.

DPT: Xiao et al. 2023, arXiv 2310.10094, and its code (XYaoooo/DPT), P = A B. LoPT: Guo et al. 2024,
arXiv 2406.19486: variant 1 is the same product, variant 2 sends the prompt's first values, which
stay as they are, through a narrow layer, P = act(P0 U) V. Both papers begin at random, DPT's code
at U(-0.5, 0.5); here A and B begin as the best approximation of rank `rank` to what `init` gives,
so that every init means what it says.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    MethodConfig,
    MethodInfo,
    Sizes,
    Values,
)
from jaxprompt.prompts.init import InitContext, factors, initial_rows, linear
from jaxprompt.prompts.soft import MadeRows, folding
from jaxprompt.typing import Array

ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class DptConfig(MethodConfig):
    """Options of DPT.

    Attributes:
      rank: r, at most the prompt's length.
    """

    name: str = "dpt"
    rank: int = 10

    def __post_init__(self):
        super().__post_init__()
        self.check_rank(self.rank)


@dataclasses.dataclass(frozen=True)
class LoptConfig(DptConfig):
    """Options of LoPT.

    Attributes:
      length, rank: the paper's best are about 20 and 2 to 5.
      variant: 1, P = U V; 2, P = act(P0 U) V.
      activation: of variant 2.
    """

    name: str = "lopt"
    length: int = 20
    rank: int = 5
    variant: Literal[1, 2] = 2
    activation: Literal["relu", "sigmoid", "tanh"] = "sigmoid"


class ProductPrompt(MadeRows):
    """P = A B."""

    def rows(self) -> Array:
        """[P, D]."""
        return self["left"] @ self["right"]


class NarrowPrompt(MadeRows):
    """P = act(P0 U) V, P0 constant."""

    constants = ("first",)

    def rows(self) -> Array:
        """[P, D]."""
        act = ACTIVATIONS[self.config.activation]
        return act(self["first"] @ self["left"]) @ self["right"]


def _product(key: Array, config: DptConfig, context: InitContext) -> dict[str, np.ndarray]:
    left, right = factors(initial_rows(key, config, context), config.rank)
    return {"left": left, "right": right}


def _narrow(key: Array, config: LoptConfig, context: InitContext) -> dict[str, np.ndarray]:
    if config.variant == 1:
        return _product(key, config, context)
    rows, left, right = jax.random.split(key, 3)
    d, r = context.sizes.d_model, config.rank
    return {
        "first": initial_rows(rows, config, context),
        "left": linear(left, d, d, r),
        "right": linear(right, r, r, d),
    }


def _make_lopt(values: Values, config: Any) -> ProductPrompt | NarrowPrompt:
    return (ProductPrompt if config.variant == 1 else NarrowPrompt)(values, config)


def _lopt_parameters(config: LoptConfig, sizes: Sizes) -> int:
    wide = config.length if config.variant == 1 else sizes.d_model
    return config.rank * (wide + sizes.d_model)


DPT = MethodInfo(
    formula="P = A B, A in R^(length x rank), B in R^(rank x d_model)",
    paper="Xiao et al. 2023, arXiv 2310.10094",
    cost="as soft once folded",
    config=DptConfig,
    make=ProductPrompt,
    initial=_product,
    parameters=lambda config, sizes: config.rank * (config.length + sizes.d_model),
    fold=folding(ProductPrompt),
)
LOPT = MethodInfo(
    formula="P = U V, or act(P0 U) V with P0 as it began",
    paper="Guo et al. 2024, arXiv 2406.19486",
    cost="as soft once folded",
    config=LoptConfig,
    make=_make_lopt,
    initial=_narrow,
    parameters=_lopt_parameters,
    fold=folding(_make_lopt),
)
