"""What holds a prompt back in training: its own dropout, a pull towards a text, a loss in noise.

`steps` adds it to what a step minimises. All is off unless asked for, and then costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxprompt.losses import segment_sums
from jaxprompt.typing import Array, Batch, UserError

_KEY = 2**31 - 2  # folded into keys for what is drawn here
_SMALLEST = 1e-12  # of norms that are divided by


@dataclasses.dataclass(frozen=True)
class RegularizeConfig:
    """Regularisers of a prompt's training; each is off until its number is above 0.

    Attributes:
      prompt_dropout: share of the numbers in encoder slots that a step sets to 0, the others
        scaled up; drawn for every row.
      wayward: weight of the squared distance between each slot's embedding and that of its token
        of `wayward_text`, mean over slots (Khashabi et al. 2022, arXiv 2112.08348;
        google-research/prompt-tuning's `extended/train/wayward.py`, where it is 0.01).
      wayward_text: repeated where the prompt is longer.
      noise: weight of the loss under noise on the encoder's side, added to the loss (PTP,
        Chen et al. 2023, arXiv 2305.02423; its code was not at hand, so sizes here are
        ours, in units of embeddings, whose own numbers are about 10 in T5-base).
      noise_kind: "gaussian" noise on embeddings, "adversarial": what raises the loss most, found by
        projected gradient ascent, or "mask": tokens of the text become `<extra_id_0>`. That these
        are three of PTP's four (the other attacks the text with synonyms) is from memory.
      noise_on: the embeddings of the "input" text, of the "prompt" in its slots, or of "both";
        a mask is on the "input".
      noise_share: mask: the probability of each token, drawn for every row.
      noise_std: gaussian: standard deviation.
      noise_radius: adversarial: largest L2 norm of all the noise on an example.
      noise_rate: adversarial: L2 norm of a step of ascent.
      noise_steps: adversarial: how many; each takes a forward and a backward pass.
    """

    prompt_dropout: float = 0.0
    wayward: float = 0.0
    wayward_text: str = ""
    noise: float = 0.0
    noise_kind: Literal["gaussian", "adversarial", "mask"] = "gaussian"
    noise_on: Literal["input", "prompt", "both"] = "input"
    noise_share: float = 0.15
    noise_std: float = 0.1
    noise_radius: float = 1.0
    noise_rate: float = 0.5
    noise_steps: int = 2

    def __post_init__(self):
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(
                f"regularize.prompt_dropout is {self.prompt_dropout}, it must be at least 0 and "
                "below 1"
            )
        for name in ("wayward", "noise"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"regularize.{name} is {getattr(self, name)}, it must be at least 0"
                )
        for name in ("noise_std", "noise_radius", "noise_rate", "noise_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"regularize.{name} is {getattr(self, name)}, it must be above 0")
        if not 0 < self.noise_share <= 1:
            raise UserError(
                f"regularize.noise_share is {self.noise_share}, it must be above 0 and at most 1"
            )
        if self.noise_kind == "mask" and self.noise_on != "input":
            raise UserError(
                f"regularize.noise_on is {self.noise_on!r}, but noise_kind 'mask' replaces tokens, "
                "and the prompt has none: give noise_on=input"
            )
        if self.wayward and not self.wayward_text:
            raise UserError(
                "regularize.wayward pulls the prompt towards a text: give it in "
                "regularize.wayward_text"
            )
        if self.wayward_text and not self.wayward:
            raise UserError(
                "regularize.wayward_text is given, but regularize.wayward, its weight, is 0"
            )

    @property
    def is_on(self) -> bool:
        """Whether any is."""
        return bool(self.prompt_dropout or self.wayward or self.noise)

    @property
    def draws(self) -> bool:
        """Whether it needs random keys."""
        is_drawn = self.noise > 0 and self.noise_kind != "adversarial"
        return self.prompt_dropout > 0 or is_drawn

    @property
    def masks(self) -> bool:
        """Whether it needs the id of a mask."""
        return self.noise > 0 and self.noise_kind == "mask"

    @property
    def reads_slots(self) -> bool:
        """Whether a prompt without encoder slots leaves it without effect."""
        needs = self.noise > 0 and self.noise_on == "prompt"
        return bool(self.prompt_dropout or self.wayward or needs)


def wayward_distance(slots_PD: Array, text_PD: Array) -> Array:
    """Squared L2 distance of a prompt to a text's embeddings, mean over P; float32 []."""
    return jnp.mean(jnp.sum(jnp.square(slots_PD - text_PD), axis=-1))


def noise_for(
    config: RegularizeConfig,
    batch: Batch,
    d_model: int,
    keys_B: Array | None,
    loss_under: Callable[[Array], Array],
) -> Array:
    """The noise on embeddings that a step's second loss is taken under, float32 [B, S, D].

    Args:
      keys_B: of each row, for gaussian noise.
      loss_under: noise -> summed loss of the batch; nothing else may have a gradient in it.
    Source: PTP, Chen et al. 2023, arXiv 2305.02423. What is ascended is the loss of each example by
      itself, by steps of one length, from no noise at all, inside a ball.
    """
    is_slot_BS = batch.encoder_slots_BS >= 0
    is_text_BS = (batch.encoder_segments_BS > 0) & ~is_slot_BS
    places = {"input": is_text_BS, "prompt": is_slot_BS, "both": is_text_BS | is_slot_BS}
    there_BS1 = places[config.noise_on][..., None]
    shape = (batch.encoder_ids_BS.shape[1], d_model)
    if config.noise_kind == "gaussian":
        noise_BSD = jax.vmap(lambda key: jax.random.normal(key, shape))(_own_keys(keys_B))
        return jnp.where(there_BS1, config.noise_std * noise_BSD, 0)

    def ascend(noise_BSD: Array, _: None) -> tuple[Array, None]:
        upwards_BSD = jnp.where(there_BS1, jax.grad(loss_under)(noise_BSD), 0)
        norm_BS1 = _norms(upwards_BSD, batch)
        noise_BSD += config.noise_rate * upwards_BSD / jnp.maximum(norm_BS1, _SMALLEST)
        norm_BS1 = _norms(noise_BSD, batch)
        inside = jnp.minimum(1.0, config.noise_radius / jnp.maximum(norm_BS1, _SMALLEST))
        return noise_BSD * inside, None

    start = jnp.zeros((len(batch.encoder_ids_BS), *shape))
    noise_BSD, _ = jax.lax.scan(ascend, start, length=config.noise_steps)
    return jax.lax.stop_gradient(noise_BSD)


def masked(
    config: RegularizeConfig, batch: Batch, keys_B: Array | None, mask_id: int, end_id: int
) -> Batch:
    """The batch with tokens of its texts masked, of each the same share of the time.

    It is the tokens that change, not their embeddings alone, so that a method that reads its input
    or changes it (`smop`, `adept`) gets to see the mask.

    Args:
      keys_B: of each row.
      mask_id, end_id: what a masked token becomes; which one never is.
    Source: PTP's random mask, Chen et al. 2023, arXiv 2305.02423: from memory, the code was not at
      hand; T5 has no mask token, and `<extra_id_0>` stood for what was masked in its pretraining.
    """
    ids_BS = batch.encoder_ids_BS
    is_text_BS = (batch.encoder_segments_BS > 0) & (batch.encoder_slots_BS < 0)
    draw = functools.partial(jax.random.bernoulli, p=config.noise_share, shape=ids_BS.shape[1:])
    is_masked_BS = jax.vmap(draw)(_own_keys(keys_B)) & is_text_BS & (ids_BS != end_id)
    return dataclasses.replace(batch, encoder_ids_BS=jnp.where(is_masked_BS, mask_id, ids_BS))


def _own_keys(keys_B: Array | None) -> Array:
    """Of each row a key that nothing else draws from, [B]."""
    assert keys_B is not None, "noise is drawn"
    return jax.vmap(lambda key: jax.random.fold_in(key, _KEY))(keys_B)


def _norms(x_BSD: Array, batch: Batch) -> Array:
    """L2 norm over a position's whole segment, [B, S, 1]."""
    segments_BS = batch.encoder_segments_BS
    squares_BS = jnp.sum(jnp.square(x_BSD), axis=-1)
    sums_BG = segment_sums(squares_BS, segments_BS, batch.example_index_BG.shape[1])
    own_BS = jnp.take_along_axis(sums_BG, jnp.maximum(segments_BS - 1, 0), axis=1)
    return jnp.sqrt(own_BS)[..., None]
