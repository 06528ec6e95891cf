"""ATTEMPT: a prompt of its own and trained ones of other tasks, mixed by attention.

Asai et al. 2022, arXiv 2205.11961, and its code (AkariAsai/ATTEMPT, attention "sub",
the target among what is attended to). The maximum over an input is over its own tokens here, in
the code over padding as well. The network begins at N(0, 0.01^2), as there.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, PromptMethod
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.prompts.reading import each_segment, max_embeddings
from jaxprompt.typing import Array, PromptValues, UserError

_EPSILON = 1e-5
_FIRST_STD = 0.01


@dataclasses.dataclass(frozen=True)
class AttemptConfig(MethodConfig):
    """Options of ATTEMPT.

    Attributes:
      sources: soft prompts of the same backbone and length, artifacts; kept as they are.
      hidden: width of the attention's bottleneck.
      temperature: what scores are divided by; null = e times d_model, 2087 on T5-base.
    """

    name: str = "attempt"
    sources: tuple[str, ...] = ()
    hidden: int = 100
    temperature: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("hidden")
        if self.temperature is not None and self.temperature <= 0:
            raise UserError(f"method.temperature is {self.temperature}, it has to be above 0")


class AttemptPrompt(PromptMethod):
    """The target's prompt plus a mixture of it and the sources, weighted for every segment."""

    constants = ("sources",)

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [B * G, P, D]."""
        prompt_PD = self["prompt"]
        # sources are [N, P, D]; the target is the last of what is attended to
        all_NPD = jnp.concatenate([self["sources"], prompt_PD[None]])
        shares_BGN = jax.nn.softmax(self._scores(max_embeddings(inputs), all_NPD.max(1)))
        made = prompt_PD[None, None] + jnp.einsum("bgn,npd->bgpd", shares_BGN, all_NPD)
        return PromptValues(
            encoder=made.reshape(-1, *made.shape[2:]), prompt_index_BG=each_segment(inputs)
        )

    def _scores(self, largest_BGD: Array, keys_ND: Array) -> Array:
        hidden = jax.nn.silu(jnp.matmul(largest_BGD, self["down"]))
        query_BGD = jnp.matmul(hidden, self["up"])
        query_BGD -= query_BGD.mean(-1, keepdims=True)
        query_BGD *= jax.lax.rsqrt(jnp.mean(query_BGD**2, -1, keepdims=True) + _EPSILON)
        query_BGD = query_BGD * self["scale"] + self["bias"]
        temperature = self.config.temperature or math.e * keys_ND.shape[-1]
        return jnp.einsum("bgd,nd->bgn", query_BGD, keys_ND) / temperature


def _initial(key: Array, config: AttemptConfig, context: InitContext) -> dict[str, np.ndarray]:
    if not config.sources:
        raise UserError(
            "method.sources is empty: name the trained prompts that attempt mixes, as "
            "'method.sources=[runs/a/prompt,runs/b/prompt]'"
        )
    assert context.source is not None, "no reader of sources"
    rows, down, up = jax.random.split(key, 3)
    d, m = context.sizes.d_model, config.hidden
    sources = [np.asarray(context.source(path), np.float32) for path in config.sources]
    for path, source in zip(config.sources, sources, strict=True):
        if source.shape != (config.length, d):
            raise UserError(
                f"source {path} is {' x '.join(map(str, source.shape))}, the run wants "
                f"method.length {config.length} x backbone d_model {d}"
            )
    return {
        "prompt": initial_rows(rows, config, context),
        "sources": np.stack(sources),
        "down": np.asarray(_FIRST_STD * jax.random.normal(down, (d, m))),
        "up": np.asarray(_FIRST_STD * jax.random.normal(up, (m, d))),
        "scale": np.ones((1, 1, d), np.float32),
        "bias": np.zeros((1, 1, d), np.float32),
    }


ATTEMPT = MethodInfo(
    formula="P_T + sum_j a_j P_j, a = softmax_j(max(P_j) . LN(W_up SiLU(W_down max E(X))) / tau)",
    paper="Asai et al. 2022, arXiv 2205.11961",
    cost="length more positions, a small network, one more prompt kept for each source",
    config=AttemptConfig,
    make=AttemptPrompt,
    initial=_initial,
    parameters=lambda config, sizes: (config.length + 2 * config.hidden + 2) * sizes.d_model,
    sources=lambda config: config.sources,
)
