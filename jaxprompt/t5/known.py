"""Backbones known by their name on the hub: one line about each, and its architecture.

`jaxprompt backbones` lists them, `plan` needs no more of them than the architecture.
Sizes are those of T5X's gin files (t5x/examples/t5, scalable_t5/umt5), which the hub's agree with.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprompt.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class Family:
    """Backbones that differ in size alone.

    Attributes:
      pattern: of their names on the hub.
      line: about them.
      sizes: "small" and so on -> the sizes that fill the pattern, as `_sizes` makes them.
      common: what all of them have.
    """

    pattern: str
    line: str
    sizes: Mapping[str, Mapping[str, int]]
    common: Mapping[str, Any]


def _sizes(
    d_model: int, d_ff: int, heads: int, layers: int, decoder_layers: int = 0, d_kv: int = 64
) -> dict[str, int]:
    return {
        "d_model": d_model, "d_ff": d_ff, "num_heads": heads, "d_kv": d_kv, "num_layers": layers,
        "num_decoder_layers": decoder_layers or layers,
    }  # fmt: skip


_T5_1_1 = {
    "small": _sizes(512, 1024, 6, 8),
    "base": _sizes(768, 2048, 12, 12),
    "large": _sizes(1024, 2816, 16, 24),
    "xl": _sizes(2048, 5120, 32, 24),
    "xxl": _sizes(4096, 10240, 64, 24),
}
_T5_1_0 = {
    "small": _sizes(512, 2048, 8, 6),
    "base": _sizes(768, 3072, 12, 12),
    "large": _sizes(1024, 4096, 16, 24),
    "3b": _sizes(1024, 16384, 32, 24, d_kv=128),
    "11b": _sizes(1024, 65536, 128, 24, d_kv=128),
}
_BYT5 = {
    "small": _sizes(1472, 3584, 6, 12, 4),
    "base": _sizes(1536, 3968, 12, 18, 6),
    "large": _sizes(1536, 3840, 16, 36, 12),
    "xl": _sizes(2560, 6720, 32, 36, 12),
    "xxl": _sizes(4672, 12352, 64, 36, 12),
}
_UMT5 = {size: _T5_1_1[size] for size in ("small", "base", "xl", "xxl")}
_UL2: dict[str, dict[str, int]] = dict.fromkeys(
    ("ul2", "flan-ul2"), _sizes(4096, 16384, 16, 32, d_kv=256)
)
_RELU = {
    "activation": "relu", "gated": False, "tie_word_embeddings": True, "scale_decoder_outputs": True
}  # fmt: skip
_FAMILIES = (
    Family(
        "google/t5-{size}-lm-adapt", "T5 1.1 adapted as a language model; best to prompt",
        _T5_1_1, {},
    ),
    Family("google/t5-v1_1-{size}", "T5 1.1, span corruption only; hard to prompt", _T5_1_1, {}),
    Family("google-t5/t5-{size}", "T5 1.0, pretrained on many tasks", _T5_1_0, _RELU),
    Family("google/flan-t5-{size}", "T5 1.1 tuned on instructions", _T5_1_1, {}),
    Family(
        "google/mt5-{size}", "T5 1.1 for 101 languages",
        _T5_1_1, {"model_type": "mt5", "vocab_size": 250112},
    ),
    Family(
        "google/umt5-{size}", "T5 1.1 for 107 languages, biases in every layer",
        _UMT5, {"model_type": "umt5", "vocab_size": 256384, "per_layer_relative_bias": True},
    ),
    Family(
        "google/byt5-{size}", "bytes instead of a vocabulary, deep encoder",
        _BYT5, {"vocab_size": 384},
    ),
    Family("google/{size}", "20 billion parameters, gated SiLU", _UL2, {"activation": "silu"}),
)  # fmt: skip
# Older names of the same repositories, without an owner.
_ALIASES = {f"t5-{size}": f"google-t5/t5-{size}" for size in _T5_1_0}


def known_backbones() -> dict[str, str]:
    """Names on the hub -> one line about each."""
    return {
        family.pattern.format(size=size): family.line
        for family in _FAMILIES
        for size in family.sizes
    }


def known_config(name: str) -> T5Config | None:
    """The architecture of a backbone by its name on the hub; None if the name is not listed."""
    name = _ALIASES.get(name, name)
    for family in _FAMILIES:
        for size, sizes in family.sizes.items():
            if family.pattern.format(size=size) == name:
                return T5Config(**{**sizes, **family.common})
    return None
