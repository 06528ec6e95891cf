"""The decoder with cached keys and values; `t5.stepwise` and `t5.beam` search with it.

`begin` runs the decoder's beginning and `advance` one position more. Between two calls a search may
repeat or reorder the rows of `Cache`; `Encoded` stays as it is, once per example.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprompt.t5.attention import relative_bias
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import rms_norm
from jaxprompt.t5.model import (
    cross_projections,
    decoder_layer,
    embed_tokens,
    logits,
    self_projections,
)
from jaxprompt.t5.slots import SlotPlaces
from jaxprompt.typing import Array, ArrayTree, Batch, KeysValues, PromptValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What self-attention has seen so far.

    Attributes:
      keys, values: [N, B, P+L, H, K], a trained prefix of P first, then up to L positions.
      prefix_mask_BP: bool, False at places that a row's prompt, shorter than P, does not have.
      position: int32 [], how many of the L are filled.
      before_text: whether the prefix takes the relative bias of the P positions before the L.
    """

    keys: Array
    values: Array
    prefix_mask_BP: Array
    position: Array
    before_text: bool = dataclasses.field(default=False, metadata={"static": True})

    def repeated(self, times: int) -> "Cache":
        """Every row `times` times, one after another: [N, B*times, ...]."""
        keys, values = (jnp.repeat(x, times, axis=1) for x in (self.keys, self.values))
        mask_BP = jnp.repeat(self.prefix_mask_BP, times, axis=0)
        return dataclasses.replace(self, keys=keys, values=values, prefix_mask_BP=mask_BP)

    def reordered(self, rows_B: Array) -> "Cache":
        """Row b taken from row `rows_B[b]`, which is one of the same example."""
        keys, values = (x[:, rows_B] for x in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """What cross-attention looks at in every step, made once.

    Attributes:
      keys, values: [N, B, P+S, H, K], a trained prefix of P first, then the encoder's positions.
      mask_B1S: bool [B, 1, P+S], True where a query may attend.
    """

    keys: Array
    values: Array
    mask_B1S: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What a search found; B counts every sequence of every example, an example's own together.

    Attributes:
      ids_BT: int32 [B, max_new_tokens], pad id after the end token.
      log_likelihood_B: float32, summed over the generated tokens, the end token included, as the
        model gives it: no temperature, penalty or filter.
      ended_B: bool, False where `max_new_tokens` came before the end token.
      score_B: float32, what the search ranks sequences by: with beams the sum of log-probabilities,
        penalties of repetition included, over length ** length_penalty; else the log-likelihood.
    """

    ids_BT: Array
    log_likelihood_B: Array
    ended_B: Array
    score_B: Array


def begin(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    encoded_BSD: Array,
    *,
    max_new_tokens: int,
) -> tuple[Encoded, Cache, Array]:
    """Runs the decoder's beginning.

    Args:
      batch: one segment a row; its decoder fields hold the beginning (start token, decoder slots),
        equally long in every row.
      values: prompt values of the batch.
      encoded_BSD: the encoder's output.
    Returns: what cross-attention looks at, the cache with room for `max_new_tokens` more positions,
      and the logits of the first new token, float32 [B, V].
    Raises: ValueError if a row has several segments.
    """
    index_BG = batch.prompt_index_BG if values.prompt_index_BG is None else values.prompt_index_BG
    if index_BG.shape[1] != 1:
        raise ValueError(f"generation takes 1 example a row, got room for {index_BG.shape[1]}")
    index_B = index_BG[:, 0]
    encoded = _encoded(
        params, encoded_BSD, batch.encoder_segments_BS, values.decoder_cross, index_B
    )
    embeds_BTD = embed_tokens(params, batch.decoder_ids_BT, compute)
    if values.decoder is not None:
        places = SlotPlaces(batch.decoder_slots_BT, batch.decoder_segments_BT, index_BG)
        embeds_BTD = places.fill(embeds_BTD, values.decoder)
    rows, length, _ = embeds_BTD.shape
    room = length + max_new_tokens
    cache = _empty_cache(config, rows, room, embeds_BTD.dtype, values.decoder_self, index_B)
    cache, logits_BV = advance(params, config, compute, encoded, cache, embeds_BTD)
    return encoded, cache, logits_BV


def advance(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    encoded: Encoded,
    cache: Cache,
    embeds_BTD: Array,
) -> tuple[Cache, Array]:
    """Runs the next T positions of the decoder.

    Args:
      encoded: of as many rows as the cache, or of the examples, of which the cache has the same
        number of rows each, one after another.
      embeds_BTD: embeddings of those positions.
    Returns: the cache with them in it, and the logits of the last one, float32 [B, V].
    """
    stack = params["decoder"]
    length = embeds_BTD.shape[1]
    slots = cache.prefix_mask_BP.shape[1]
    query_positions_T = cache.position + jnp.arange(length)
    key_positions_S = jnp.arange(cache.keys.shape[2]) - slots
    behind_TS = key_positions_S[None, :] <= query_positions_T[:, None]
    there_BS = jnp.pad(
        cache.prefix_mask_BP,
        ((0, 0), (0, len(key_positions_S) - slots)),
        constant_values=True,
    )
    mask_BTS = behind_TS[None] & there_BS[:, None]

    def bias_of(table_HR: Array) -> Array:
        bias_HTS = relative_bias(
            table_HR,
            query_positions_T,
            key_positions_S,
            bidirectional=False,
            max_distance=config.relative_attention_max_distance,
        )
        if cache.before_text:
            return bias_HTS
        return jnp.where((key_positions_S >= 0)[None, None], bias_HTS, 0.0)

    shared = (
        None if config.per_layer_relative_bias else bias_of(stack["relpos_bias"]["rel_embedding"])
    )

    def layer(carry: tuple[Array, Array, Array], scanned: tuple) -> tuple[tuple, None]:
        x_BTD, keys_NBSHK, values_NBSHK = carry
        number, p, cross_keys, cross_values = scanned
        query, key, value = self_projections(p, config, x_BTD)
        at = (number, 0, slots + cache.position, 0, 0)
        keys_NBSHK = jax.lax.dynamic_update_slice(keys_NBSHK, key[None], at)
        values_NBSHK = jax.lax.dynamic_update_slice(values_NBSHK, value[None], at)
        bias = bias_of(p["relpos_bias"]["rel_embedding"]) if shared is None else shared
        self_over = (keys_NBSHK[number], values_NBSHK[number], bias, mask_BTS)
        cross_over = (cross_keys, cross_values, None, encoded.mask_B1S)
        x_BTD = decoder_layer(p, config, x_BTD, query, self_over, cross_over)
        return (x_BTD, keys_NBSHK, values_NBSHK), None

    layers = config.num_decoder_layers
    # on CPU too the layers of a step are a loop: unrolled, each is copied out of the stack first
    (x_BTD, keys, values), _ = jax.lax.scan(
        layer,
        (embeds_BTD, cache.keys, cache.values),
        (jnp.arange(layers), stack["layers"], encoded.keys, encoded.values),
        unroll=min(compute.scan_unroll or 1, layers),
    )
    x_BD = rms_norm(stack["decoder_norm"]["scale"], x_BTD[:, -1], config.layer_norm_epsilon)
    position = cache.position + length
    cache = dataclasses.replace(cache, keys=keys, values=values, position=position)
    return cache, logits(params, config, x_BD)


def _encoded(
    params: ArrayTree,
    encoded_BSD: Array,
    segments_BS: Array,
    prefix: KeysValues | None,
    index_B: Array,
) -> Encoded:
    """Cross-attention's keys and values of all layers, a trained prefix before them."""
    project_all = jax.vmap(cross_projections, in_axes=(0, None))
    keys, values = project_all(params["decoder"]["layers"], encoded_BSD)
    mask_B1S = (segments_BS == 1)[:, None]
    if prefix is not None:
        keys, values = _behind(prefix, index_B, keys, values)
        mask_B1S = jnp.concatenate([_mask(prefix, index_B)[:, None], mask_B1S], axis=2)
    return Encoded(keys, values, mask_B1S)


def _empty_cache(
    config: T5Config,
    rows: int,
    room: int,
    dtype: jnp.dtype,
    prefix: KeysValues | None,
    index_B: Array,
) -> Cache:
    """A cache with a trained prefix and `room` positions to fill."""
    shape = (config.num_decoder_layers, rows, room, config.num_heads, config.d_kv)
    keys = values = jnp.zeros(shape, dtype)
    mask_BP, before_text = jnp.zeros((rows, 0), bool), False
    if prefix is not None:
        keys, values = _behind(prefix, index_B, keys, values)
        mask_BP, before_text = _mask(prefix, index_B), prefix.before_text
    return Cache(keys, values, mask_BP, jnp.zeros((), jnp.int32), before_text)


def _behind(prefix: KeysValues, index_B: Array, keys: Array, values: Array) -> tuple[Array, ...]:
    """Keys and values [N, B, S, H, K] with each row's prefix before them: [N, B, P+S, H, K]."""
    pairs = ((prefix.keys, keys), (prefix.values, values))
    return tuple(
        jnp.concatenate([trained[:, index_B].astype(own.dtype), own], axis=2)
        for trained, own in pairs
    )


def _mask(prefix: KeysValues, index_B: Array) -> Array:
    """bool [B, P], where each row's prompt has a place."""
    if prefix.mask_QP is None:
        return jnp.ones((index_B.shape[0], prefix.keys.shape[2]), bool)
    return prefix.mask_QP[index_B]
