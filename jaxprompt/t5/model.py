"""T5 encoder and decoder as functions on the stacked parameters, and the NNX module around them.

Reading order: `encode`, `decode`, `logits`; each scans one layer function over the stacked layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxprompt.quantize import einsum, is_quantized, take
from jaxprompt.t5.attention import (
    attend,
    project,
    project_out,
    with_prefix,
)
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import (
    ParamSpec,
    dropout,
    fold_key,
    mlp,
    param_specs,
    rms_norm,
)
from jaxprompt.t5.paths import layer_bias, path_of, shared_bias_of
from jaxprompt.t5.remat import crosses_at_once, keep, rematerialised, settled
from jaxprompt.t5.sight import Sight
from jaxprompt.t5.slots import SlotPlaces, of_all_layers
from jaxprompt.t5.spreading import between, gathered, summed
from jaxprompt.typing import Array, ArrayTree, Batch, KeysValues, LayerSlots, PromptValues

_HERE = Compute()  # on one device, as far as layers care


class T5(nnx.Module):
    """The backbone: one `nnx.Param` per stacked parameter, at T5X's names.

    Args:
      config: the architecture.
      params: nested dict as `param_specs` describes it (arrays or abstract), quantised or not.
      compute: dtype, unrolling, rematerialisation.
    """

    def __init__(self, config: T5Config, params: ArrayTree, compute: Compute | None = None):
        self.config = config
        self.compute = compute or Compute()
        self.params = _Room(params, param_specs(config))

    def tree(self) -> dict:
        """The parameters as a plain nested dict, in the compute dtype (a no-op when frozen).

        Quantised ones stay what they are; products give the dtype of the activations.
        """
        dtype = self.compute.dtype
        return jax.tree.map(
            lambda leaf: leaf if is_quantized(leaf) else leaf.astype(dtype),
            nnx.to_pure_dict(nnx.state(self.params)),
            is_leaf=is_quantized,
        )


class _Room(nnx.Module):
    """A nested dict of parameters as nested modules; axes travel as inert metadata."""

    def __init__(self, params: ArrayTree, specs: Any):
        for name, leaf in params.items():
            spec = specs[name]
            if isinstance(spec, ParamSpec):
                setattr(self, name, nnx.Param(leaf, axes=spec.axes))
            else:
                setattr(self, name, _Room(leaf, spec))


def embed_tokens(params: ArrayTree, ids: Array, compute: Compute) -> Array:
    """int32 [...] -> [..., D] in the compute dtype."""
    return take(params["token_embedder"]["embedding"], ids, compute.dtype)


def encode(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    embeds_BSD: Array,
    segments_BS: Array,
    *,
    prefix: KeysValues | None = None,
    slots: tuple[SlotPlaces, LayerSlots] | None = None,
    prompt_index_BG: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Encoder over embeddings that already hold the slots: [B, S, D] -> [B, S, D].

    Args:
      segments_BS: segment ids, 0 = padding; attention stays inside a segment.
      prefix: trained keys and values of every layer.
      slots: what stands in the slots of later layers.
      prompt_index_BG: which of the Q a segment uses; None = one segment a row, and the first.
      dropout_key: None = no dropout; one, or [B], of each row.
    """
    stack, compute = params["encoder"], settled(compute, config, *embeds_BSD.shape[:2])
    index_BG = _first_prompt(segments_BS) if prompt_index_BG is None else prompt_index_BG
    sight = Sight(segments_BS, segments_BS, max_distance=config.relative_attention_max_distance)
    has_dropout = dropout_rate > 0 and dropout_key is not None
    path = path_of(compute, config, sight, prefix, index_BG, has_dropout)
    shared_bias = shared_bias_of(config, path, stack)

    def layer(x_BSD: Array, scanned: tuple) -> tuple[Array, None]:
        p, (prefix_QPHK, filling), key = scanned
        keys = _layer_keys(key, 4)
        if slots is not None:
            x_BSD = slots[0].fill(x_BSD, *filling)
        h = rms_norm(p["pre_attention_layer_norm"]["scale"], x_BSD, config.layer_norm_epsilon)
        h = gathered(compute, h)
        query, key_, value = (
            keep(project(p["attention"][n]["kernel"], h), n) for n in ("query", "key", "value")
        )
        if prefix_QPHK is not None:
            key_, value = with_prefix(prefix_QPHK, index_BG, key_, value)
        bias = layer_bias(path, p, shared_bias)
        context = path(query, key_, value, bias, dropout_rate, keys[0])
        attended = summed(compute, project_out(p["attention"]["out"]["kernel"], context))
        x_BSD = keep(x_BSD + dropout(attended, dropout_rate, keys[1]), "residual")
        return _mlp_block(p, config, x_BSD, dropout_rate, keys[2:], compute), None

    x_BSD = _run_stack(
        layer,
        embeds_BSD,
        stack["layers"],
        (_pair(prefix), of_all_layers(slots and slots[1])),
        config.num_layers,
        compute,
        dropout_rate,
        dropout_key,
    )
    x_BSD = rms_norm(stack["encoder_norm"]["scale"], x_BSD, config.layer_norm_epsilon)
    return dropout(x_BSD, dropout_rate, fold_key(dropout_key, 1))


def decode(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    embeds_BTD: Array,
    segments_BT: Array,
    encoded_BSD: Array,
    encoder_segments_BS: Array,
    *,
    self_prefix: KeysValues | None = None,
    cross_prefix: KeysValues | None = None,
    prompt_index_BG: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Decoder with teacher forcing: embeddings [B, T, D] -> final hidden states [B, T, D]."""
    stack, compute = params["decoder"], settled(compute, config, *encoded_BSD.shape[:2])
    index_BG = _first_prompt(segments_BT) if prompt_index_BG is None else prompt_index_BG
    self_sight = Sight(
        segments_BT, segments_BT,
        causal=True, max_distance=config.relative_attention_max_distance,
    )  # fmt: skip
    has_dropout = dropout_rate > 0 and dropout_key is not None
    cross_sight = Sight(segments_BT, encoder_segments_BS)
    self_path = path_of(compute, config, self_sight, self_prefix, index_BG, has_dropout)
    cross_path = path_of(compute, config, cross_sight, cross_prefix, index_BG, has_dropout)
    shared_bias = shared_bias_of(config, self_path, stack)

    def layer(x_BTD: Array, scanned: tuple) -> tuple[Array, None]:
        p, prefixes, key = scanned
        self_QPHK, cross_QPHK, crossed = prefixes
        keys = _layer_keys(key, 6)
        query, key_, value = self_projections(p, config, x_BTD, compute)
        if self_QPHK is not None:
            key_, value = with_prefix(self_QPHK, index_BG, key_, value)
        self_over = (key_, value, layer_bias(self_path, p, shared_bias))
        key_, value = crossed or cross_projections(p, encoded_BSD)
        if cross_QPHK is not None:
            key_, value = with_prefix(cross_QPHK, index_BG, key_, value)
        cross_over = (key_, value, None)
        x_BTD = decoder_layer(
            p, config, x_BTD, query, self_over, cross_over, dropout_rate, keys,
            attends=(self_path, cross_path), compute=compute,
        )  # fmt: skip
        return x_BTD, None

    crossed, encoded_BSD = None, gathered(compute, encoded_BSD)
    if crosses_at_once(compute):
        crossed = jax.vmap(cross_projections, (0, None))(stack["layers"], encoded_BSD)
    x_BTD = _run_stack(
        layer,
        embeds_BTD,
        stack["layers"],
        (_pair(self_prefix), _pair(cross_prefix), crossed),
        config.num_decoder_layers,
        compute,
        dropout_rate,
        dropout_key,
    )
    x_BTD = rms_norm(stack["decoder_norm"]["scale"], x_BTD, config.layer_norm_epsilon)
    return dropout(x_BTD, dropout_rate, fold_key(dropout_key, 1))


def self_projections(
    p: ArrayTree, config: T5Config, x_BTD: Array, compute: Compute = _HERE
) -> tuple[Array, Array, Array]:
    """Queries, keys and values [B, T, H, K] of a decoder layer's self-attention."""
    h = rms_norm(p["pre_self_attention_layer_norm"]["scale"], x_BTD, config.layer_norm_epsilon)
    h = gathered(compute, h)
    kernels = p["self_attention"]
    query, key, value = (
        keep(project(kernels[name]["kernel"], h), name) for name in ("query", "key", "value")
    )
    return query, key, value


def cross_projections(p: ArrayTree, encoded_BSD: Array) -> tuple[Array, Array]:
    """Keys and values [B, S, H, K] of a decoder layer's cross-attention."""
    kernels = p["encoder_decoder_attention"]
    key, value = (
        keep(project(kernels[name]["kernel"], encoded_BSD), name) for name in ("key", "value")
    )
    return key, value


def decoder_layer(
    p: ArrayTree,
    config: T5Config,
    x_BTD: Array,
    query_BTHK: Array,
    self_over: tuple,
    cross_over: tuple,
    dropout_rate: float = 0.0,
    dropout_keys: tuple = (None,) * 6,
    attends: tuple[Callable[..., Array], Callable[..., Array]] = (attend, attend),
    compute: Compute = _HERE,
) -> Array:
    """One decoder layer, given what its attentions look at; training and cached decoding share it.

    Args:
      query_BTHK: of the self-attention, from `self_projections`.
      self_over, cross_over: what `attends` take after the query; (keys, values, bias, mask). What
        is crossed over to may have fewer rows, an example's each: then x_BTD has the same number
        of rows for every example, one after another, and all see the whole of it.
      attends: functions as `attend` for self- and cross-attention.
      compute: where rows lie between matmuls.
    """
    keys = dropout_keys
    self_attend, cross_attend = attends
    context = self_attend(query_BTHK, *self_over, dropout_rate, keys[0])
    attended = summed(compute, project_out(p["self_attention"]["out"]["kernel"], context))
    x_BTD = keep(x_BTD + dropout(attended, dropout_rate, keys[1]), "residual")
    h = rms_norm(p["pre_cross_attention_layer_norm"]["scale"], x_BTD, config.layer_norm_epsilon)
    kernels = p["encoder_decoder_attention"]
    query = keep(project(kernels["query"]["kernel"], gathered(compute, h)), "query")
    # an example's rows stand side by side in T, so that its keys and values need no repetition
    folded = query.reshape(cross_over[0].shape[0], -1, *query.shape[2:])
    context = cross_attend(folded, *cross_over, dropout_rate, keys[2]).reshape(query.shape)
    attended = summed(compute, project_out(kernels["out"]["kernel"], context))
    x_BTD = keep(x_BTD + dropout(attended, dropout_rate, keys[3]), "residual")
    return _mlp_block(p, config, x_BTD, dropout_rate, keys[4:], compute)


def logits(params: ArrayTree, config: T5Config, hidden: Array) -> Array:
    """Final hidden states [..., D] -> float32 [..., V]."""
    if config.scale_decoder_outputs:
        hidden = hidden * config.d_model**-0.5
    if config.tie_word_embeddings:
        table = params["token_embedder"]["embedding"]
        return einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    return einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def encode_batch(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    prompt_dropout: float = 0.0,
    noise_BSD: Array | None = None,
) -> Array:
    """Embeds a batch's encoder side, places its slots and encodes it: float [B, S, D].

    Args:
      prompt_dropout: rate of dropout on what stands in the slots alone; the same in all layers.
      noise_BSD: added to the embeddings, slots' and tokens'.
    """
    index_BG = batch.prompt_index_BG if values.prompt_index_BG is None else values.prompt_index_BG
    embeds_BSD = embed_tokens(params, batch.encoder_ids_BS, compute)
    if values.input_delta is not None:
        embeds_BSD = embeds_BSD + values.input_delta.astype(embeds_BSD.dtype)
    scale_BSD = None
    if prompt_dropout and dropout_key is not None:
        ones_BSD = jnp.ones_like(embeds_BSD)
        scale_BSD = dropout(ones_BSD, prompt_dropout, fold_key(dropout_key, 4))
    places = SlotPlaces(batch.encoder_slots_BS, batch.encoder_segments_BS, index_BG, scale_BSD)
    if values.encoder is not None:
        embeds_BSD = places.fill(embeds_BSD, values.encoder)
    if noise_BSD is not None:
        embeds_BSD = embeds_BSD + noise_BSD.astype(embeds_BSD.dtype)
    embeds_BSD = dropout(embeds_BSD, dropout_rate, fold_key(dropout_key, 0))
    return encode(
        params, config, compute, embeds_BSD, batch.encoder_segments_BS,
        prefix=values.encoder_self,
        slots=None if values.encoder_layers is None else (places, values.encoder_layers),
        prompt_index_BG=index_BG, dropout_rate=dropout_rate, dropout_key=fold_key(dropout_key, 1),
    )  # fmt: skip


def decode_batch(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    encoded_BSD: Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Runs a batch's decoder side over its encoder output: final hidden states [B, T, D]."""
    index_BG = batch.prompt_index_BG if values.prompt_index_BG is None else values.prompt_index_BG
    embeds_BTD = embed_tokens(params, batch.decoder_ids_BT, compute)
    if values.decoder is not None:
        places = SlotPlaces(batch.decoder_slots_BT, batch.decoder_segments_BT, index_BG)
        embeds_BTD = places.fill(embeds_BTD, values.decoder)
    embeds_BTD = dropout(embeds_BTD, dropout_rate, fold_key(dropout_key, 2))
    return decode(
        params, config, compute, embeds_BTD, batch.decoder_segments_BT,
        encoded_BSD, batch.encoder_segments_BS,
        self_prefix=values.decoder_self, cross_prefix=values.decoder_cross,
        prompt_index_BG=index_BG,
        dropout_rate=dropout_rate, dropout_key=fold_key(dropout_key, 3),
    )  # fmt: skip


def _mlp_block(
    p: ArrayTree, config: T5Config, x: Array, rate: float, keys: tuple, compute: Compute
) -> Array:
    h = rms_norm(p["pre_mlp_layer_norm"]["scale"], x, config.layer_norm_epsilon)
    out = mlp(p["mlp"], gathered(compute, h), config.activation, rate, keys[0])
    return x + dropout(summed(compute, out), rate, keys[1])


def _pair(prefix: KeysValues | None) -> tuple[Array, Array] | None:
    return None if prefix is None else (prefix.keys, prefix.values)


def _run_stack(layer, x, layers, prefixes, count, compute, dropout_rate, dropout_key):
    """Scans `layer` over stacked parameters, prefixes and dropout keys."""

    def laid_out(x: Array, scanned: tuple) -> tuple[Array, None]:
        x, _ = layer(between(compute, x), scanned)
        return between(compute, x), None

    keys = None
    if dropout_rate and dropout_key is not None:
        folded = fold_key(dropout_key, 0)
        keys = jax.vmap(functools.partial(fold_key, folded))(jnp.arange(count))
    unroll = layers_unrolled(compute, count)
    laid_out = rematerialised(laid_out, compute, looped=unroll < count)
    x, _ = jax.lax.scan(laid_out, x, (layers, prefixes, keys), unroll=unroll)
    return x


def layers_unrolled(compute: Compute, count: int) -> int:
    """How many of `count` layers one scan iteration holds.

    Unrolling is faster on CPU, but there a loop is what makes rematerialisation save memory: with
    unrolled layers the scheduler recomputes early and keeps everything.
    """
    unrolled = count if compute.platform == "cpu" and compute.remat in ("none", "auto") else 1
    return min(compute.scan_unroll or unrolled, count)


def _layer_keys(key: Array | None, count: int) -> tuple:
    return tuple(fold_key(key, number) for number in range(count))


def _first_prompt(segments_BS: Array) -> Array:
    return jnp.zeros((segments_BS.shape[0], 1), jnp.int32)
