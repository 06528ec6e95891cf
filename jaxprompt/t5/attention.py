"""Attention of T5: relative position bias, projections, softmax attention, trained prefixes.

Pure functions on arrays; called by `t5.paths` and `t5.model`, and with caches by `t5.decode`.
"""

import math

import jax
import jax.numpy as jnp

from jaxprompt.quantize import einsum
from jaxprompt.t5.layers import dropout
from jaxprompt.typing import Array

MASKED = -1e9  # finite, so that a row that may attend to nothing stays finite


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Bucket of each relative position (key position minus query position).

    Half of the buckets are exact small distances, the rest grow logarithmically up to
    `max_distance`, beyond which all share the last one.

    Args:
      relative_position: int32, any shape.
      bidirectional: encoder (sign matters) or decoder (the future shares bucket 0).
    Returns: int32 bucket ids, same shape.
    Source: Raffel et al. 2020, section 2.1; Mesh TensorFlow `_relative_position_bucket`.
    """
    offset = jnp.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2
    scaled = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = exact + (scaled * (num_buckets - exact)).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def relative_bias(
    table_HR: Array,
    query_positions_T: Array,
    key_positions_S: Array,
    *,
    bidirectional: bool,
    max_distance: int,
) -> Array:
    """Additive bias of the attention scores, float32 [H, T, S].

    Args:
      table_HR: [heads, buckets].
      query_positions_T, key_positions_S: int32 array indices.
    """
    relative_TS = key_positions_S[None, :] - query_positions_T[:, None]
    bucket_TS = relative_position_bucket(
        relative_TS,
        bidirectional=bidirectional,
        num_buckets=table_HR.shape[1],
        max_distance=max_distance,
    )
    return table_HR.astype(jnp.float32)[:, bucket_TS]


def project(kernel_DHK: Array, x_BSD: Array) -> Array:
    """Queries, keys or values of all heads: [B, S, D] -> [B, S, H, K]."""
    return einsum("bsd,dhk->bshk", x_BSD, kernel_DHK)


def attend(
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    bias: Array | None,
    mask_BTS: Array,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Softmax attention without the 1/sqrt(K) of Vaswani et al. (T5 folds it into the weights).

    Args:
      bias: float32 relative bias [H, T, S] or [B, H, T, S], or None (cross-attention has none).
      mask_BTS: bool, True where a query may attend; scores and softmax are float32.
    Returns: [B, T, H, K] in the dtype of the values.
    """
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", query_BTHK, key_BSHK, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores_BHTS = scores_BHTS + (bias if bias.ndim == 4 else bias[None])
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(value_BSHK.dtype)
    weights_BHTS = dropout(weights_BHTS, dropout_rate, dropout_key)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, value_BSHK)


def project_out(kernel_HKD: Array, context_BTHK: Array) -> Array:
    """[B, T, H, K] -> [B, T, D]."""
    return einsum("bthk,hkd->btd", context_BTHK, kernel_HKD)


def segment_mask(query_segments_BT: Array, key_segments_BS: Array) -> Array:
    """bool [B, T, S]: a query sees the keys of its own segment.

    Padding (segment 0) sees padding, which keeps its softmax finite and reaches no segment.
    """
    return query_segments_BT[:, :, None] == key_segments_BS[:, None, :]


def with_prefix(
    prefix_QPHK: tuple[Array, Array],
    prompt_index_BG: Array,
    key_BSHK: Array,
    value_BSHK: Array,
) -> tuple[Array, Array]:
    """Puts each segment's trained keys and values before a row's own.

    Who may see them, `paths.Sight.behind_prefix` says.

    Args:
      prefix_QPHK: (keys, values), each [Q, P, H, K].
      prompt_index_BG: which of the Q a segment uses.
    Returns: keys and values [B, G*P+S, H, K], in the dtype of the row's own.
    """
    rows, segments = prompt_index_BG.shape
    slots = prefix_QPHK[0].shape[1]
    keys, values = (
        prefix[prompt_index_BG].reshape(rows, segments * slots, *prefix.shape[2:]).astype(own.dtype)
        for prefix, own in zip(prefix_QPHK, (key_BSHK, value_BSHK), strict=True)
    )
    return (
        jnp.concatenate([keys, key_BSHK], axis=1),
        jnp.concatenate([values, value_BSHK], axis=1),
    )
