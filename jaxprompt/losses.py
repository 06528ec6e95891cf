"""Cross-entropy over target tokens and the sums that steps and scorers build on it."""

import jax
import jax.numpy as jnp

from jaxprompt.typing import Array


def cross_entropy(logits_BTV: Array, targets_BT: Array, z_loss: float = 0.0) -> Array:
    """Negative log-likelihood of each target token, in nats.

    Args:
      logits_BTV: float32 [B, T, V].
      targets_BT: int32 [B, T].
      z_loss: weight of log(Z)^2, which keeps the normaliser near 1 (Mesh TensorFlow, T5X: 1e-4).
    Returns: float32 [B, T], z-loss included.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = log_z_BT - picked_BT
    if z_loss:
        loss_BT = loss_BT + z_loss * jnp.square(log_z_BT)
    return loss_BT


def is_likeliest(logits_BTV: Array, targets_BT: Array) -> Array:
    """Whether no token is likelier than the target: bool [B, T].

    The largest logit is what `cross_entropy` needs too; to look for its place would be a pass over
    all logits more, which a CPU does one by one.
    """
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return picked_BT >= jnp.max(logits_BTV, axis=-1)


def segment_sums(values_BT: Array, segments_BT: Array, num_segments: int) -> Array:
    """Sums values over each segment of a row: float32 [B, T] -> [B, G]; padding is left out."""
    one_hot_BTG = jax.nn.one_hot(segments_BT - 1, num_segments, dtype=values_BT.dtype)
    # a TPU's default precision would round the values to bfloat16
    return jnp.einsum("bt,btg->bg", values_BT, one_hot_BTG, precision=jax.lax.Precision.HIGHEST)


def token_weights(
    weights_BT: Array, segments_BT: Array, num_segments: int, by: str
) -> tuple[Array, Array]:
    """Weights whose weighted loss sum is the mean `by` says, up to one global divisor.

    Args:
      weights_BT: 1 where a target counts.
      segments_BT: segment ids.
      num_segments: G.
      by: "tokens" (every target token counts the same) or "examples" (every example counts the
        same, whatever its target's length; what mixtures of tasks need).
    Returns: (float32 [B, T] weights, float32 [B] units of each row: tokens or examples).
    """
    if by == "tokens":
        return weights_BT, jnp.sum(weights_BT, axis=1)
    if by != "examples":
        raise ValueError(f"loss is averaged by tokens or examples, not {by!r}")
    tokens_BG = segment_sums(weights_BT, segments_BT, num_segments)
    inverse_BG = jnp.where(tokens_BG > 0, 1.0 / jnp.maximum(tokens_BG, 1.0), 0.0)
    index_BT = jnp.maximum(segments_BT - 1, 0)
    per_token_BT = jnp.take_along_axis(inverse_BG, index_BT, axis=1)
    return weights_BT * per_token_BT, jnp.sum(tokens_BG > 0, axis=1, dtype=jnp.float32)
