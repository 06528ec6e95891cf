"""A prompt bank: several prompts of one method over one backbone; every segment says which it uses.

What N prompts hand the backbone is put side by side on the axis Q of prompt values, so a batch of
rows for different prompts is the same program as one for a single prompt.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from jaxprompt.prompts.base import MethodInputs, NoPrompt, PromptMethod
from jaxprompt.typing import Array, ArrayTree, KeysValues, LayerSlots, PromptValues, UserError


class PromptBank(PromptMethod):
    """N prompts; prompt n is the one that segments with `prompt_index_BG` n use.

    Args:
      prompts: of one method, the bare backbone (`NoPrompt`) aside; lengths may differ, since a
        segment has the slots of its own prompt only.
    Raises: UserError for prompts of different methods.
    """

    def __init__(self, prompts: Sequence[PromptMethod]):
        kinds = {type(prompt).__name__ for prompt in prompts if not isinstance(prompt, NoPrompt)}
        if len(kinds) > 1:
            raise UserError(
                f"prompts of different methods cannot share a bank: {', '.join(sorted(kinds))}; "
                "run them one by one"
            )
        self.prompts = nnx.Dict({bank_key(n): prompt for n, prompt in enumerate(prompts)})

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """The values of all prompts, padded to the longest."""
        all_values = [self.prompts[bank_key(n)](inputs) for n in range(len(self.prompts))]
        counts = [_count(values) for values in all_values]
        return PromptValues(
            encoder=_joined([v.encoder for v in all_values], counts, axis=0),
            encoder_layers=_joined_layers([v.encoder_layers for v in all_values], counts),
            decoder=_joined([v.decoder for v in all_values], counts, axis=0),
            encoder_self=_joined_keys([v.encoder_self for v in all_values], counts),
            decoder_self=_joined_keys([v.decoder_self for v in all_values], counts),
            decoder_cross=_joined_keys([v.decoder_cross for v in all_values], counts),
            input_delta=_own_delta([v.input_delta for v in all_values], inputs),
            prompt_index_BG=_index(all_values, counts, inputs.prompt_index_BG),
        )


def bank_key(number: int) -> str:
    """The name of a bank's prompt in parameter trees; in the order of numbers, as jax sorts."""
    return f"{number:04d}"


def members(trained: ArrayTree, count: int) -> list[ArrayTree]:
    """What each of a bank's prompts trains, as trees of a prompt by itself.

    Args:
      trained: of a `PromptedT5` with a bank of `count` prompts, or with 1 of anything else.
    """
    if count == 1:
        return [trained]
    return [{"method": trained["method"]["prompts"][bank_key(n)]} for n in range(count)]


def bank_of(trees: Sequence[ArrayTree]) -> ArrayTree:
    """The trained tree of a bank; inverse of `members`."""
    if len(trees) == 1:
        return trees[0]
    return {"method": {"prompts": {bank_key(n): tree["method"] for n, tree in enumerate(trees)}}}


def _count(values: PromptValues) -> int:
    """Q of one prompt's values, at least 1: a place of its own even if it has none."""
    pairs = (values.encoder_self, values.decoder_self, values.decoder_cross)
    sizes = [leaf.shape[0] for leaf in (values.encoder, values.decoder) if leaf is not None]
    return max([1, *sizes, *(pair.keys.shape[1] for pair in pairs if pair is not None)])


def _joined(
    parts: Sequence[Array | None], counts: Sequence[int], axis: int, in_front: bool = False
) -> Array | None:
    """Arrays [..., Q, P, ...] with Q on `axis`, one behind the other, shorter ones padded."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    slots = max(part.shape[axis + 1] for part in there)
    like = there[0]
    padded = []
    for part, count in zip(parts, counts, strict=True):
        if part is None:
            shape = (*like.shape[:axis], count, slots, *like.shape[axis + 2 :])
            padded.append(jnp.zeros(shape, like.dtype))
            continue
        widths = [(0, 0)] * part.ndim
        widths[axis + 1] = _padding(slots - part.shape[axis + 1], in_front)
        padded.append(jnp.pad(part, widths))
    return jnp.concatenate(padded, axis)


def _joined_keys(parts: Sequence[KeysValues | None], counts: Sequence[int]) -> KeysValues | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    before_text = there[0].before_text
    if any(part.before_text != before_text for part in there):
        raise UserError(
            "prompts whose keys stand before the text (method.before_text) and prompts whose keys "
            "stand nowhere cannot share a bank; run them one by one"
        )
    keys = _joined([part and part.keys for part in parts], counts, 1, in_front=before_text)
    values = _joined([part and part.values for part in parts], counts, 1, in_front=before_text)
    assert keys is not None and values is not None
    slots = keys.shape[2]
    lengths = [0 if part is None else part.keys.shape[2] for part in parts]
    masks = []
    for part, count, length in zip(parts, counts, lengths, strict=True):
        padding = _padding(slots - length, before_text)
        mask = jnp.ones((count, length), bool)
        if part is not None and part.mask_QP is not None:
            mask = part.mask_QP
        mask = jnp.pad(mask, ((0, 0), padding))
        masks.append(mask)
    even = min(lengths) == slots and all(part.mask_QP is None for part in there)
    return KeysValues(keys, values, None if even else jnp.concatenate(masks), before_text)


def _padding(missing: int, in_front: bool) -> tuple[int, int]:
    """Where a shorter prompt is padded: in front if its last slot is next to the text."""
    return (missing, 0) if in_front else (0, missing)


def _joined_layers(parts: Sequence[LayerSlots | None], counts: Sequence[int]) -> LayerSlots | None:
    values = _joined([part and part.values for part in parts], counts, axis=1)
    if values is None:
        return None
    adds = [
        jnp.ones(count, bool) if part is None else part.adds_Q
        for part, count in zip(parts, counts, strict=True)
    ]
    return LayerSlots(values, jnp.concatenate(adds))


def _own_delta(parts: Sequence[Array | None], inputs: MethodInputs) -> Array | None:
    """Each position's delta from the prompt that its segment uses, [B, S, D]."""
    if all(part is None for part in parts):
        return None
    segment_BS = jnp.maximum(inputs.segments_BS - 1, 0)
    prompt_BS = jnp.take_along_axis(inputs.prompt_index_BG, segment_BS, axis=1)
    return sum(
        jnp.where((prompt_BS == number)[..., None], part, 0)
        for number, part in enumerate(parts)
        if part is not None
    )  # pyright: ignore[reportReturnType]


def _index(
    all_values: Sequence[PromptValues], counts: Sequence[int], prompt_index_BG: Array
) -> Array | None:
    """Which of all values a segment uses; None if those are just the bank's numbers."""
    if all(count == 1 for count in counts):
        return None
    index_BG = jnp.zeros_like(prompt_index_BG)
    for number, values in enumerate(all_values):
        own_BG = 0 if values.prompt_index_BG is None else values.prompt_index_BG
        index_BG = jnp.where(prompt_index_BG == number, sum(counts[:number]) + own_BG, index_BG)
    return index_BG
