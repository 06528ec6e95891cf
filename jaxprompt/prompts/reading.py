"""What methods read of an input: where its tokens stand, mean and maximum of their embeddings."""

import jax
import jax.numpy as jnp

from jaxprompt.prompts.base import MethodInputs
from jaxprompt.typing import Array


def is_token(inputs: MethodInputs) -> Array:
    """Where text stands, neither slot nor padding, bool [B, S]."""
    return (inputs.slots_BS < 0) & (inputs.segments_BS > 0)


def text_positions(inputs: MethodInputs) -> Array:
    """Each token's number in its own segment's text, from 0; int32 [B, S], -1 elsewhere."""
    there_BS = is_token(inputs)
    before_BS = jnp.cumsum(there_BS, axis=1) - there_BS
    begins_BS = jnp.diff(inputs.segments_BS, axis=1, prepend=0) != 0
    first_BS = jax.lax.cummax(jnp.where(begins_BS, before_BS, 0), axis=1)
    return jnp.where(there_BS, before_BS - first_BS, -1)


def mean_embeddings(inputs: MethodInputs) -> Array:
    """Mean embedding of each segment's tokens, float32 [B, G, D]; 0 for an empty segment."""
    segments = inputs.prompt_index_BG.shape[1]
    owner_BS = jnp.where(is_token(inputs), inputs.segments_BS, 0)
    belongs_BSG = jax.nn.one_hot(owner_BS - 1, segments, dtype=jnp.float32)
    sums_BGD = jnp.einsum("bsg,bsd->bgd", belongs_BSG, inputs.embeds_BSD.astype(jnp.float32))
    return sums_BGD / jnp.maximum(belongs_BSG.sum(1), 1)[..., None]


def max_embeddings(inputs: MethodInputs) -> Array:
    """Largest value of each segment's embeddings, by dimension, float32 [B, G, D]; 0 if empty."""
    segments = inputs.prompt_index_BG.shape[1]
    owner_BS = jnp.where(is_token(inputs), inputs.segments_BS, 0)
    belongs_BSG = jax.nn.one_hot(owner_BS - 1, segments, dtype=bool)
    lowest = jnp.finfo(jnp.float32).min
    embeds_BSD = inputs.embeds_BSD.astype(jnp.float32)
    # nothing of the size B S G D is kept: the comparison is part of the maximum's own loop
    largest_BGD = jnp.where(belongs_BSG[..., None], embeds_BSD[:, :, None], lowest).max(1)
    return jnp.where(belongs_BSG.any(1)[..., None], largest_BGD, 0.0)


def each_segment(inputs: MethodInputs) -> Array:
    """The prompt index of values made for every segment, Q = B * G: int32 [B, G]."""
    shape = inputs.prompt_index_BG.shape
    return jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
