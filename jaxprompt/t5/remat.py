"""What a layer's backward pass keeps and what it computes again, knowing that weights are frozen.

A frozen weight has no gradient, so the input of its matmul is needed by nobody: neither the result
of attention nor the MLP's hidden units, which take up most of what JAX would keep. `t5.model` marks
what the gradients of activations do need (`keep`) and wraps its layers (`rematerialised`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.typing import Array

_ATTENTION = ("query", "key", "value")  # gradients of scores and of context, each by the other
_MLP = ("wi", "wi_0", "wi_1")  # what the activation's gradients read or are multiplied by
_NORMS = ("residual",)  # what the norms behind attention read; the first reads the layer's input

KEPT = {
    "frozen": (*_NORMS, *_ATTENTION, *_MLP),
    "frozen_mlp": (*_NORMS, *_MLP),
    "frozen_attention": (*_NORMS, *_ATTENTION),
}


BESIDE = 1.5  # bytes that a step takes beside weights, over those it keeps: compiled for v5e, XXL

# To make queries, keys and values again takes d_model FLOPs for each of their bytes, to keep one a
# write, a change of layout and a read. Up to this d_model (T5-XL's) the TPU compiler's estimates
# have fewer cycles for the former, at XXL's 4096 for the latter. Where heads are divided, rows have
# to be exchanged again for it, which costs more than it saves. docs/plan.md has the figures.
CHEAP_TO_PROJECT = 2048


def settled(compute: Compute, config: T5Config, rows: int, encoder: int) -> Compute:
    """With a policy where `remat` is "auto": of what fits `compute.room`, the fewest cycles.

    That is the first of "frozen", "frozen_mlp", "frozen_attention" that fits, or "frozen_mlp" alone
    for undivided heads and a d_model up to `CHEAP_TO_PROJECT`; else "full". It is "none" where the
    room is unknown, as it is on CPU and where weights are trained.

    Args:
      rows, encoder: B and S of the batch, both of all devices together.
    """
    if compute.remat != "auto":
        return compute
    remat = "none"
    if compute.room is not None:
        alone = compute.mesh is None or compute.mesh.shape["model"] == 1
        cheap = alone and config.d_model <= CHEAP_TO_PROJECT
        worth = ("frozen_mlp",) if cheap else tuple(KEPT)
        fitting = [
            policy
            for policy in worth
            if BESIDE * kept_bytes(policy, compute, config, rows, encoder) <= compute.room
        ]
        remat = fitting[0] if fitting else "full"
    return dataclasses.replace(compute, remat=remat)


def kept_bytes(policy: str, compute: Compute, config: T5Config, rows: int, encoder: int) -> float:
    """Bytes of one device that a policy of `KEPT` leaves for the backward pass.

    Of what the encoder's positions need; targets are few beside them.
    """
    data, model = (1, 1) if compute.mesh is None else compute.mesh.shape.values()
    spread = model if compute.rows_over_model and rows % (data * model) == 0 else 1
    heads = config.num_heads * config.d_kv
    parts = dict.fromkeys(_ATTENTION, heads / model)
    parts |= {name: config.d_ff / model for name in _MLP[1:] if config.gated}
    parts |= {} if config.gated else {_MLP[0]: config.d_ff / model}
    parts |= dict.fromkeys(_NORMS, config.d_model / spread)
    numbers = config.num_layers * (
        config.d_model / spread + sum(parts.get(name, 0) for name in KEPT[policy])
    )
    if "key" in KEPT[policy]:
        numbers += config.num_decoder_layers * 2 * heads / model
    size = 4 if compute.dtype == "float32" else 2
    return rows * encoder / data * numbers * size


def keep(x: Array, name: str) -> Array:
    """`x` [B, S, ...], under a name that policies know; changes nothing by itself."""
    flat = checkpoint_name(x.reshape(*x.shape[:2], -1), name)
    return flat.reshape(x.shape)


def rematerialised(layer: Callable[..., Any], compute: Compute, looped: bool) -> Callable[..., Any]:
    """A layer whose backward pass keeps what `compute.remat` says.

    Args:
      layer: (x, scanned) -> (x, None), its parts marked with `keep`.
      looped: forward and backward pass run as loops over layers. The compiler cannot undo
        rematerialisation across two loops, and is not held back from fusing a weight's slice into
        the matmul that reads it.
    """
    if compute.remat == "none":
        return layer
    policy = None
    if compute.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    elif compute.remat in KEPT:
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[compute.remat])
    return jax.checkpoint(layer, policy=policy, prevent_cse=not looped)


def crosses_at_once(compute: Compute) -> bool:
    """Whether keys and values of all cross-attentions are made in one matmul before the decoder.

    Where they are kept anyway, this adds up the gradient of the encoder's output inside a matmul,
    not layer by layer in memory. On CPU it would copy the weights into another order first; on GPU
    nothing was measured.
    """
    kept = KEPT.get(compute.remat, ("key",) if compute.remat != "full" else ())
    return compute.platform == "tpu" and "key" in kept
