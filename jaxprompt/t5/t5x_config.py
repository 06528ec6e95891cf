"""The architecture of a T5X checkpoint, which holds no config.json: read off names and shapes."""

import collections
import re

from jaxprompt.t5.config import T5Config
from jaxprompt.t5.weight_files import WeightFiles
from jaxprompt.t5.weight_names import Layout
from jaxprompt.t5.weights import T5X_HEAD, T5X_TABLE
from jaxprompt.typing import UserError

_LAYERS = {
    Layout.T5X: re.compile(r"(encoder|decoder)/layers_(\d+)/.*"),
    Layout.T5X_SCANNED: re.compile(r"(encoder|decoder)/layers/.*\[(\d+)\]"),
}
_BIAS = "relpos_bias/rel_embedding"


def derive_config(files: WeightFiles) -> T5Config:
    """What the shapes of a T5X checkpoint say, the rest as in T5 1.1 (T5 1.0 if it is not gated).

    Kernels join heads and head size; the number of heads is that of the relative biases. Not to be
    seen, hence assumed: gated GELU (ReLU without a gate), distances up to 128, epsilon 1e-6, ids.

    Raises: UserError for a tensor that is needed and missing (it is named), or odd shapes.
    """

    def first(stack: str, name: str) -> str:
        inside = {
            Layout.T5X: f"{stack}/layers_0/{name}",
            Layout.T5X_SCANNED: f"{stack}/layers/{name}[0]",
        }
        return inside[files.layout]

    def shape(*names: str) -> tuple[int, int]:
        stored = next((files.tensors[name] for name in names if name in files.tensors), None)
        if stored is None:
            raise UserError(f"{files.path}: has no {names[0]}, so it is no T5 that can be read")
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise UserError(
                f"{files.path}: {names[0]} has shape {list(stored.shape)}, not two axes"
            )
        return stored.shape

    own_bias = first("encoder", _BIAS)
    heads, buckets = shape(f"encoder/{_BIAS}", own_bias)
    vocab_size, d_model = shape(T5X_TABLE)
    _, joined = shape(first("encoder", "attention/query/kernel"))
    if joined % heads:
        raise UserError(
            f"{files.path}: the query kernel gives {joined} numbers, which are not {heads} heads"
        )
    gated = first("encoder", "mlp/wi_0/kernel") in files.tensors
    _, d_ff = shape(first("encoder", "mlp/wi_0/kernel" if gated else "mlp/wi/kernel"))
    layers = collections.Counter({"encoder": 0, "decoder": 0})
    for name in files.tensors:
        found = _LAYERS[files.layout].fullmatch(name)
        if found:
            layers[found[1]] = max(layers[found[1]], int(found[2]) + 1)
    tied, own = T5X_HEAD not in files.tensors, own_bias in files.tensors
    return T5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=joined // heads, d_ff=d_ff,
        num_layers=layers["encoder"], num_decoder_layers=layers["decoder"], num_heads=heads,
        relative_attention_num_buckets=buckets,
        activation="gelu_new" if gated else "relu", gated=gated,
        # where T5X takes the embedding table for the logits, it scales what goes in
        tie_word_embeddings=tied, scale_decoder_outputs=tied,
        per_layer_relative_bias=own, model_type="umt5" if own else "t5",
    )  # fmt: skip
