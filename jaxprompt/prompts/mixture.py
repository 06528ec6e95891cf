"""Prompts chosen or mixed by the input: SMoP and PT-MoE.

SMoP: Choi et al. 2023 (EMNLP) and its code (jyjohnchoi/SMoP): softmax of a linear router over the
mean of the input's embeddings; the likeliest prompt, times its probability; in training its logits
times (1 + e), e ~ N(0, 1). The code's loss for an even load is not here, nor that it gives every
row of a batch the sum of all rows' prompts, times the row's own probability. PT-MoE: Li et al.
2025, arXiv 2505.09519: P = sum_i w_i(X) A_i B, one B for all experts; its code is not public, the
router here is a linear layer over the same mean and a softmax.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, PromptMethod, Sizes
from jaxprompt.prompts.init import InitContext, factors, initial_rows, linear
from jaxprompt.prompts.networks import affine
from jaxprompt.prompts.reading import each_segment, mean_embeddings
from jaxprompt.typing import Array, PromptValues, UserError


@dataclasses.dataclass(frozen=True)
class SmopConfig(MethodConfig):
    """Options of SMoP.

    Attributes:
      length: slots of each prompt, and of an example.
      prompts: how many there are to choose from.
      noise: standard deviation of e.
    """

    name: str = "smop"
    length: int = 5
    prompts: int = 4
    noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("prompts")
        if self.noise < 0:
            raise UserError(f"method.noise is {self.noise}, it cannot be negative")


@dataclasses.dataclass(frozen=True)
class PtMoeConfig(MethodConfig):
    """Options of PT-MoE.

    Attributes:
      experts: how many A_i there are.
      rank: r, at most the prompt's length.
    """

    name: str = "pt-moe"
    length: int = 40
    experts: int = 4
    rank: int = 10

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("experts")
        self.check_rank(self.rank)


class SmopPrompt(PromptMethod):
    """One of `prompts` prompts, picked for every segment."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [B * G, P, D]."""
        logits_BGN = jnp.matmul(mean_embeddings(inputs), self["router"])
        if inputs.keys_B is not None and self.config.noise:
            size = logits_BGN.shape[1:]
            drawn_BGN = jax.vmap(lambda key: jax.random.normal(key, size))(inputs.keys_B)
            logits_BGN += self.config.noise * drawn_BGN * jax.lax.stop_gradient(logits_BGN)
        shares_BGN = jax.nn.softmax(logits_BGN)
        best_BG = jnp.argmax(shares_BGN, axis=-1)
        share_BG = jnp.take_along_axis(shares_BGN, best_BG[..., None], -1)[..., 0]
        picked = self["prompts"][best_BG] * share_BG[..., None, None]
        return PromptValues(
            encoder=picked.reshape(-1, *picked.shape[2:]), prompt_index_BG=each_segment(inputs)
        )


class PtMoePrompt(PromptMethod):
    """A mixture of low-rank prompts, weighted for every segment."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [B * G, P, D]."""
        means_BGD = mean_embeddings(inputs)
        shares_BGN = jax.nn.softmax(affine(means_BGD, self["router"], self["router_bias"]))
        left = jnp.einsum("bgn,npr->bgpr", shares_BGN, self["left"])
        made = jnp.matmul(left, self["right"])
        return PromptValues(
            encoder=made.reshape(-1, *made.shape[2:]), prompt_index_BG=each_segment(inputs)
        )


def _smop_initial(key: Array, config: SmopConfig, context: InitContext) -> dict[str, np.ndarray]:
    rows, router = jax.random.split(key)
    prompts = [
        initial_rows(jax.random.fold_in(rows, n), config, context) for n in range(config.prompts)
    ]
    orthogonal = jax.nn.initializers.orthogonal()(router, (context.sizes.d_model, config.prompts))
    return {"prompts": np.stack(prompts), "router": np.asarray(orthogonal)}


def _moe_initial(key: Array, config: PtMoeConfig, context: InitContext) -> dict[str, np.ndarray]:
    rows, experts, router, bias = jax.random.split(key, 4)
    left, right = factors(initial_rows(rows, config, context), config.rank)
    d, n = context.sizes.d_model, config.experts
    spread = 0.1 * left.std() * np.asarray(jax.random.normal(experts, (n, *left.shape)))
    return {
        "left": (left + spread).astype(np.float32),
        "right": right,
        "router": linear(router, d, d, n),
        "router_bias": linear(bias, d, n),
    }


def _moe_parameters(config: PtMoeConfig, sizes: Sizes) -> int:
    experts = config.experts * config.length * config.rank
    return experts + config.rank * sizes.d_model + (sizes.d_model + 1) * config.experts


SMOP = MethodInfo(
    formula="p_i P_i with i = argmax p, p = softmax(W mean E(X)), of prompts prompts",
    paper="Choi et al. 2023, EMNLP, doi 10.18653/v1/2023.emnlp-main.884",
    cost="length more positions, one matrix-vector product",
    config=SmopConfig,
    make=SmopPrompt,
    initial=_smop_initial,
    parameters=lambda config, sizes: config.prompts * (config.length + 1) * sizes.d_model,
    draws=lambda config: config.noise > 0,
)
PT_MOE = MethodInfo(
    formula="P = sum_i w_i(X) A_i B, w = softmax(W mean E(X) + b), of experts experts",
    paper="Li et al. 2025, arXiv 2505.09519",
    cost="length more positions, a router and a small product",
    config=PtMoeConfig,
    make=PtMoePrompt,
    initial=_moe_initial,
    parameters=_moe_parameters,
)
