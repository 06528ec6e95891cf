"""XPrompt (Ma et al. 2022, arXiv 2210.04457): a soft prompt, pruned, rewound and trained again.

Slots that the loss hardly depends on are taken out, then pieces of the others' embeddings: of k
equal parts each. A slot's importance is E|dL/dgamma_i| and a piece's E|dL/dzeta_ij|, gamma and zeta
masks of ones that multiply them. Here is what is trained in the end and how to choose what stays;
`jaxprompt.pruning` measures importance between the two trainings. The authors' code is not public;
these formulas are from memory of the paper; that what is left goes on from its trained values
follows its figure 3. Ours: of every slot that stays so does its best piece, and L is the mean over
an example's targets.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    MethodConfig,
    MethodInfo,
    MethodInputs,
    PromptMethod,
    Sizes,
)
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.prompts.reading import each_segment
from jaxprompt.prompts.soft import MadeRows, folding
from jaxprompt.typing import Array, PromptValues, UserError


@dataclasses.dataclass(frozen=True)
class XPromptConfig(MethodConfig):
    """Options of XPrompt.

    Attributes:
      length: slots of the prompt that is pruned.
      pieces: k, equal parts of an embedding; divides d_model.
      keep_tokens: share of the slots that stays.
      keep_pieces: share of their pieces that stays, at least one of each slot.
      rewind: what the rest begins again from: "trained", its values after the first training, as
        the paper does, or "first", those before it, as the lottery ticket hypothesis has it.
      scored: training examples that importance is measured on, at most.
    """

    name: str = "xprompt"
    length: int = 20
    pieces: int = 16
    keep_tokens: float = 0.5
    keep_pieces: float = 0.5
    rewind: Literal["trained", "first"] = "trained"
    scored: int = 1024

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("pieces", "scored")
        for name in ("keep_tokens", "keep_pieces"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"method.{name} is {getattr(self, name)}, it must be above 0 and at most 1"
                )
        if not self.tokens_kept:
            raise UserError(
                f"method.keep_tokens {self.keep_tokens} of method.length {self.length} leaves no "
                "slot; keep more"
            )

    @property
    def tokens_kept(self) -> int:
        """Slots that stay."""
        return round(self.keep_tokens * self.length)

    @property
    def pieces_kept(self) -> int:
        """Pieces that stay, of all of these slots together."""
        return max(self.tokens_kept, round(self.keep_pieces * self.tokens_kept * self.pieces))

    def check_divides(self, d_model: int) -> None:
        """Raises: UserError if embeddings do not divide into pieces."""
        if d_model % self.pieces:
            raise UserError(
                f"method.pieces {self.pieces} does not divide the backbone's d_model {d_model}"
            )


class XPrompt(MadeRows):
    """The pieces that stay, [pieces kept, D / k], and where: a mask of ones and zeros [P, k]."""

    constants = ("mask",)

    def rows(self) -> Array:
        """zeta * P, of the slots that stay: [P, D]."""
        kept, mask_PK = self["kept"], self["mask"]
        (places,) = jnp.nonzero(mask_PK.reshape(-1), size=len(kept))
        whole = jnp.zeros((mask_PK.size, kept.shape[1]), kept.dtype).at[places].set(kept)
        return whole.reshape(len(mask_PK), -1)


class EachExamplesPrompt(PromptMethod):
    """A soft prompt [B, P, D] for each row, so that each has a gradient of its own."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [B, P, D]; rows have one segment."""
        return PromptValues(encoder=self["prompts"], prompt_index_BG=each_segment(inputs))


def most_important(scores_P: np.ndarray, count: int) -> list[int]:
    """Numbers of the highest scores, in order; of equals the earlier."""
    return sorted(np.argsort(-scores_P, kind="stable")[:count].tolist())


def piece_mask(scores_PK: np.ndarray, count: int) -> np.ndarray:
    """Ones at each slot's best piece and then at the best of the rest, float32 [P, k]."""
    mask_PK = np.zeros(scores_PK.shape, np.float32)
    mask_PK[np.arange(len(mask_PK)), scores_PK.argmax(1)] = 1
    rest = np.where(mask_PK > 0, -np.inf, scores_PK).reshape(-1)
    mask_PK.reshape(-1)[most_important(rest, count - len(mask_PK))] = 1
    return mask_PK


def pruned(rows_PD: np.ndarray, mask_PK: np.ndarray) -> dict[str, np.ndarray]:
    """The method's values, of the rows of slots that stay."""
    pieces = rows_PD.reshape(mask_PK.size, -1)
    return {"kept": pieces[mask_PK.reshape(-1) > 0].astype(np.float32), "mask": mask_PK}


def _initial(key: Array, config: XPromptConfig, context: InitContext) -> dict[str, np.ndarray]:
    """What stays if all is of equal importance: the earlier."""
    config.check_divides(context.sizes.d_model)
    rows_PD = initial_rows(key, config, context)[: config.tokens_kept]
    scores_PK = np.zeros((len(rows_PD), config.pieces), np.float32)
    return pruned(rows_PD, piece_mask(scores_PK, config.pieces_kept))


def _parameters(config: XPromptConfig, sizes: Sizes) -> int:
    return config.pieces_kept * sizes.d_model // config.pieces


XPROMPT = MethodInfo(
    formula="zeta * P without its less important slots; zeta in {0, 1}^(slots x pieces)",
    paper="Ma et al. 2022, arXiv 2210.04457",
    cost="as soft with keep_tokens * length slots once folded; trains twice",
    config=XPromptConfig,
    make=XPrompt,
    initial=_initial,
    parameters=_parameters,
    fold=folding(XPrompt),
    slots=lambda config: config.tokens_kept,  # pyright: ignore[reportAttributeAccessIssue]
)
