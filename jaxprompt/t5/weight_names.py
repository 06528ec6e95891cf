"""The one table of our parameter names and the formats', and how each tensor lies in a file."""

import dataclasses
import enum
import math

import numpy as np

from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.trees import flatten


class Layout(enum.Enum):
    """How a format spells names and how it stores matrices.

    TORCH: "a.b.weight", kernels [out, in]. FLAX: "a/b/kernel", kernels [in, out]. T5X: our names
    with "layers_3" for row 3 of a stack, everything as we have it but heads joined. T5X_SCANNED:
    the same, but with "[3]" behind the name of the stack (the reader takes it apart).
    """

    TORCH = enum.auto()
    FLAX = enum.auto()
    T5X = enum.auto()
    T5X_SCANNED = enum.auto()


_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
# their block -> the kernels in it, our name first
_KERNELS = {
    "SelfAttention": _PROJECTIONS,
    "EncDecAttention": _PROJECTIONS,
    "DenseReluDense": {name: name for name in ("wi", "wi_0", "wi_1", "wo")},
}
# last word of our path -> last word of a Flax name (torch's is always "weight")
_FLAX_WORDS = {
    "embedding": "embedding",
    "rel_embedding": "embedding",
    "scale": "weight",
    "kernel": "kernel",
}


def _stack(stack: str, sublayers: list[tuple[str, str, str]]) -> dict[str, str]:
    """The names of one stack; sublayers are (our block, our norm, their block) in order."""
    names = {
        f"{stack}/{stack}_norm/scale": f"{stack}.final_layer_norm.weight",
        f"{stack}/relpos_bias/rel_embedding": f"{stack}.block.0.{_BIAS}",
        f"{stack}/layers/relpos_bias/rel_embedding": f"{stack}.block.{{layer}}.{_BIAS}",
    }
    for number, (block, norm, theirs) in enumerate(sublayers):
        prefix = f"{stack}.block.{{layer}}.layer.{number}"
        names[f"{stack}/layers/{norm}/scale"] = f"{prefix}.layer_norm.weight"
        for ours, kernel in _KERNELS[theirs].items():
            names[f"{stack}/layers/{block}/{ours}/kernel"] = f"{prefix}.{theirs}.{kernel}.weight"
    return names


# our path -> Hugging Face's torch name; {layer} where ours stacks all layers of a stack
NAMES: dict[str, str] = {
    "token_embedder/embedding": "shared.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
    **_stack(
        "encoder",
        [
            ("attention", "pre_attention_layer_norm", "SelfAttention"),
            ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
        ],
    ),
    **_stack(
        "decoder",
        [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
            ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
        ],
    ),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of Hugging Face's and its place in our tree.

    Attributes:
      path: of the parameter ("encoder/layers/mlp/wo/kernel").
      layer: row of a stacked parameter; None = the parameter is not stacked.
      name: Hugging Face's torch name.
      shape: ours, without the layer axis.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]

    @property
    def word(self) -> str:
        """What kind of parameter it is: embedding, rel_embedding, scale or kernel."""
        return self.path.rsplit("/", 1)[1]

    def transposed(self, layout: Layout) -> bool:
        """Whether the stored matrix is [out, in] where ours is [in, out]."""
        words = {Layout.TORCH: ("rel_embedding", "kernel"), Layout.FLAX: ("rel_embedding",)}
        return self.word in words.get(layout, ())

    def flat_shape(self) -> tuple[int, ...]:
        """Ours with heads and head size merged, as every stored format has them."""
        if len(self.shape) < 3:
            return self.shape
        inputs = 2 if "/out/" in self.path else 1
        return math.prod(self.shape[:inputs]), math.prod(self.shape[inputs:])

    def stored_name(self, layout: Layout) -> str:
        """The name in a file of that format."""
        if layout is Layout.TORCH:
            return self.name
        if layout is Layout.FLAX:
            return spell(self.name, _FLAX_WORDS[self.word])
        if self.layer is None:
            return self.path
        if layout is Layout.T5X:
            return self.path.replace("/layers/", f"/layers_{self.layer}/")
        return f"{self.path}[{self.layer}]"

    def stored_shape(self, layout: Layout) -> tuple[int, ...]:
        """The shape in a file of that format."""
        return self.flat_shape()[::-1] if self.transposed(layout) else self.flat_shape()

    def ours(self, array: np.ndarray, layout: Layout) -> np.ndarray:
        """A stored array as a view in our layout (a copy only where strides allow no view)."""
        return (array.T if self.transposed(layout) else array).reshape(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array in torch's layout."""
        flat = array.reshape(self.flat_shape())
        return flat.T if self.transposed(Layout.TORCH) else flat


def spell(name: str, word: str) -> str:
    """Torch's "a.b.weight" as Flax's "a/b/word"."""
    return "/".join([*name.split(".")[:-1], word])


def weight_table(config: T5Config) -> list[Weight]:
    """Every tensor that a model of this architecture has; paths in tree order, layers in order."""
    table = []
    for path, leaf in flatten(abstract_params(config)).items():
        if "/layers/" not in path:
            table.append(Weight(path, None, NAMES[path], leaf.shape))
            continue
        for layer in range(leaf.shape[0]):
            table.append(Weight(path, layer, NAMES[path].format(layer=layer), leaf.shape[1:]))
    return table
