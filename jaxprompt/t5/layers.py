"""The parameter tree as data (`param_specs`) and T5's small layers as functions on it.

Weights are loaded, sharded, initialised and checked against `param_specs`: it alone knows shapes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxprompt.quantize import einsum, make, scale_shape
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.remat import keep
from jaxprompt.typing import Array, ArrayTree

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter, or the codes or scales of a quantised one.

    Attributes:
      shape: its sizes.
      axes: the logical name of each axis.
      stddev: scale of its random init; None = ones (norm scales).
      inputs: axes that products with it sum over; () = it is no matrix, and stays float.
      dtype: if it is not for whoever loads it to choose.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float | None
    inputs: tuple[int, ...] = ()
    dtype: str | None = None


def param_specs(config: T5Config, quantize: str = "none") -> dict:
    """Nested dict of ParamSpec, T5X's words, layers stacked on a leading axis.

    Standard deviations follow Mesh TensorFlow's T5; the untied output layer has d_model**-0.5 (not
    transformers' 1), which starts the loss near ln(V).

    Args:
      quantize: "int8" or "int4": matrices are QArrays of ParamSpecs. With "int4" the embedding
        table and the output layer are int8: each of their rows or columns is one word's alone.
    """
    tree = {
        "token_embedder": {
            "embedding": ParamSpec(
                (config.vocab_size, config.d_model), ("vocab", "embed"), 1.0, inputs=(1,)
            )
        },
        "encoder": _stack_specs(config, config.num_layers, decoder=False),
        "decoder": _stack_specs(config, config.num_decoder_layers, decoder=True),
    }
    if not config.tie_word_embeddings:
        kernel = ParamSpec(
            (config.d_model, config.vocab_size), ("embed", "vocab"), config.d_model**-0.5,
            inputs=(0,),
        )  # fmt: skip
        tree["decoder"]["logits_dense"] = {"kernel": kernel}
    if quantize == "none":
        return tree
    return jax.tree.map(lambda spec: _quantized(spec, quantize), tree, is_leaf=_is_spec)


def _quantized(spec: ParamSpec, quantize: str) -> Any:
    """A QArray of the specs of its codes and its scales, if it is a matrix."""
    if not spec.inputs:
        return spec
    dtype = quantize if "layers" in spec.axes else "int8"
    axes = tuple("groups" if n in spec.inputs else name for n, name in enumerate(spec.axes))
    shape = scale_shape(spec.shape, spec.inputs, dtype)
    scale = ParamSpec(shape, axes, spec.stddev, dtype="float32")
    return make(dataclasses.replace(spec, dtype=dtype), scale)


def _stack_specs(config: T5Config, layers: int, *, decoder: bool) -> dict:
    d, heads, kv = config.d_model, config.num_heads, config.d_kv
    scale = ParamSpec((layers, d), ("layers", "embed"), None)

    def projection(stddev: float) -> dict:
        axes = ("layers", "embed", "heads", "kv")
        return {"kernel": ParamSpec((layers, d, heads, kv), axes, stddev, inputs=(1,))}

    def attention() -> dict:
        out = ParamSpec(
            (layers, heads, kv, d), ("layers", "heads", "kv", "embed"), (heads * kv) ** -0.5,
            inputs=(1, 2),
        )  # fmt: skip
        return {
            "query": projection((d * kv) ** -0.5),
            "key": projection(d**-0.5),
            "value": projection(d**-0.5),
            "out": {"kernel": out},
        }

    def dense(inputs: str, outputs: str) -> dict:
        sizes = {"embed": d, "mlp": config.d_ff}
        shape, axes = (layers, sizes[inputs], sizes[outputs]), ("layers", inputs, outputs)
        return {"kernel": ParamSpec(shape, axes, sizes[inputs] ** -0.5, inputs=(1,))}

    mlp = {name: dense("embed", "mlp") for name in (("wi_0", "wi_1") if config.gated else ("wi",))}
    mlp["wo"] = dense("mlp", "embed")
    block: dict = {"mlp": mlp, "pre_mlp_layer_norm": {"scale": scale}}
    if decoder:
        block["self_attention"] = attention()
        block["pre_self_attention_layer_norm"] = {"scale": scale}
        block["encoder_decoder_attention"] = attention()
        block["pre_cross_attention_layer_norm"] = {"scale": scale}
    else:
        block["attention"] = attention()
        block["pre_attention_layer_norm"] = {"scale": scale}
    final_norm = {"scale": ParamSpec((d,), ("embed",), None)}
    stack: dict = {"layers": block, ("decoder_norm" if decoder else "encoder_norm"): final_norm}
    buckets = config.relative_attention_num_buckets
    if config.per_layer_relative_bias:
        table = ParamSpec((layers, heads, buckets), ("layers", "heads", "buckets"), d**-0.5)
        block["relpos_bias"] = {"rel_embedding": table}
    else:
        table = ParamSpec((heads, buckets), ("heads", "buckets"), d**-0.5)
        stack["relpos_bias"] = {"rel_embedding": table}
    return stack


def body_size(config: T5Config) -> int:
    """Parameters outside of the embedding table and the output layer."""
    specs = param_specs(config)
    ends = specs["token_embedder"], specs["decoder"].get("logits_dense", {})

    def size(tree: Any) -> int:
        return sum(math.prod(spec.shape) for spec in jax.tree.leaves(tree, is_leaf=_is_spec))

    return size(specs) - size(ends)


def init_params(config: T5Config, key: Array, dtype: str = "float32") -> dict:
    """Random parameters as T5 is initialised; normal with each spec's stddev."""
    specs, treedef = jax.tree.flatten(param_specs(config), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))

    def draw(spec: ParamSpec, key: Array) -> Array:
        if spec.stddev is None:
            return jnp.ones(spec.shape, dtype)
        return (jax.random.normal(key, spec.shape) * spec.stddev).astype(dtype)

    return treedef.unflatten([draw(spec, key) for spec, key in zip(specs, keys, strict=True)])


def abstract_params(config: T5Config, dtype: str = "float32", quantize: str = "none") -> dict:
    """The tree as ShapeDtypeStructs: all that planning and loading need to know.

    Args:
      dtype: of what is not quantised.
      quantize: as in `param_specs`.
    """
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype)),
        param_specs(config, quantize),
        is_leaf=_is_spec,
    )


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ParamSpec)


def rms_norm(scale_D: Array, x: Array, epsilon: float) -> Array:
    """T5's layer norm: no mean, no bias; computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
    return normed * scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity when the rate is 0 or no key is given.

    Args:
      x: [B, ...].
      key: one typed key, or [B], of each row: then a row's draws do not depend on its neighbours.
    """
    if not rate or key is None:
        return x
    if key.ndim:
        kept = jax.vmap(lambda row: jax.random.bernoulli(row, 1.0 - rate, x.shape[1:]))(key)
    else:
        kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def fold_key(key: Array | None, number: jax.typing.ArrayLike) -> Array | None:
    """A key for another purpose from one typed key, or from each of [B]."""
    if key is None:
        return None
    if key.ndim:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, number)
    return jax.random.fold_in(key, number)


def mlp(
    params: ArrayTree, x_BSD: Array, activation: str, rate: float = 0.0, key: Array | None = None
) -> Array:
    """Feed-forward block, gated (T5 1.1: `wi_0` activated times `wi_1`) or plain (`wi`)."""
    hidden: Any  # a type checker does not see through custom_vjp
    if "wi" in params:
        hidden = ACTIVATIONS[activation](keep(_dense(params["wi"], x_BSD), "wi"))
    else:
        hidden = gated(activation, _dense(params["wi_0"], x_BSD), _dense(params["wi_1"], x_BSD))
    return _dense(params["wo"], dropout(hidden, rate, key))


def _dense(params: ArrayTree, x: Array) -> Array:
    return einsum("...i,io->...o", x, params["kernel"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str, gate: Array, linear: Array) -> Array:
    """The activated gate times the linear part, all of one shape.

    Kept for the backward pass are the two factors that gradients are multiplied by: from `gate` and
    `linear` a compiler works the activation out again for every tile of the matmuls that read them.
    """
    return ACTIVATIONS[activation](gate) * linear


def _gated_forward(activation: str, gate: Array, linear: Array) -> tuple[Array, tuple]:
    activated, pull = jax.vjp(ACTIVATIONS[activation], gate)
    (slope,) = pull(jnp.ones_like(gate))
    activated, slope = keep(activated, "wi_0"), keep(slope * linear, "wi_1")
    return activated * linear, (activated, slope)


def _gated_backward(activation: str, factors: tuple, gradient: Array) -> tuple[Array, Array]:
    activated, slope = factors
    return gradient * slope, gradient * activated


gated.defvjp(_gated_forward, _gated_backward)
