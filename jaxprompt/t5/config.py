"""What a T5 is (`T5Config`, from a `config.json`) and how it is computed (`Compute`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxprompt.typing import UserError

MODEL_TYPES = ("t5", "mt5", "umt5")
ACTIVATIONS = ("relu", "gelu_new", "gelu", "silu")
REMAT_POLICIES = ("none", "frozen", "frozen_mlp", "frozen_attention", "full", "dots")
ATTENTION_PATHS = ("auto", "plain", "chunked", "windowed", "rowwise")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of an encoder-decoder T5; sizes as in `typing`'s shape letters.

    Attributes:
      vocab_size: V, rows of the embedding table (may exceed the tokenizer's).
      d_model: D.
      d_kv: K, size of one head; `num_heads * d_kv` need not be `d_model`.
      d_ff: F.
      num_layers: N of the encoder.
      num_decoder_layers: N of the decoder.
      num_heads: H.
      activation: of the MLP; `gated` adds a second, linear input projection (T5 1.1).
      tie_word_embeddings: logits use the embedding table (T5 1.0).
      scale_decoder_outputs: decoder outputs are multiplied by d_model**-0.5 before tied logits.
      per_layer_relative_bias: every layer has its own relative bias (umT5).
      dropout_rate: what the model was pretrained with; runs choose their own.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_decoder_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    activation: str = "gelu_new"
    gated: bool = True
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    per_layer_relative_bias: bool = False
    model_type: str = "t5"
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0
    dropout_rate: float = 0.1

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        if self.model_type not in MODEL_TYPES:
            raise UserError(
                f"model type {self.model_type!r} is not one of {', '.join(MODEL_TYPES)}"
            )
        if self.relative_attention_num_buckets % 4:
            raise UserError(
                f"relative_attention_num_buckets {self.relative_attention_num_buckets} is not a "
                "multiple of 4"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "T5Config":
        """Reads the content of a Hugging Face `config.json`.

        Raises: UserError for another model type, an unknown activation or a missing size.
        """
        model_type = raw.get("model_type", "t5")
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"{where}: model_type {model_type!r} is not a T5 ({', '.join(MODEL_TYPES)})"
            )
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        missing = [key for key in sizes if raw.get(key) is None]
        if missing:
            raise UserError(f"{where}: {missing[0]!r} is missing")
        feed_forward = raw.get("feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu")
        gate, _, activation = feed_forward.rpartition("-")
        if gate not in ("", "gated"):
            raise UserError(
                f"{where}: feed_forward_proj {feed_forward!r} is neither ACT nor gated-ACT"
            )
        if feed_forward == "gated-gelu":
            activation = "gelu_new"
        # transformers means by this key now that decoder outputs are scaled, which mT5's never are;
        # whether an output layer is stored, only the weights tell: `t5.backbones.read_config`
        tied = raw.get("tie_word_embeddings", model_type != "mt5")
        eos_id = raw.get("eos_token_id", 1)
        pad_id = raw.get("pad_token_id", 0)
        start_id = raw.get("decoder_start_token_id")
        return cls(
            vocab_size=raw["vocab_size"],
            d_model=raw["d_model"],
            d_kv=raw["d_kv"],
            d_ff=raw["d_ff"],
            num_layers=raw["num_layers"],
            num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            num_heads=raw["num_heads"],
            relative_attention_num_buckets=raw.get("relative_attention_num_buckets", 32),
            relative_attention_max_distance=raw.get("relative_attention_max_distance", 128),
            layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-6),
            activation=activation,
            gated=gate == "gated",
            tie_word_embeddings=tied,
            scale_decoder_outputs=raw.get("scale_decoder_outputs", tied and model_type != "mt5"),
            per_layer_relative_bias=model_type == "umt5",
            model_type=model_type,
            pad_id=pad_id,
            eos_id=eos_id[0] if isinstance(eos_id, list) else eos_id,
            decoder_start_id=pad_id if start_id is None else start_id,
            dropout_rate=raw.get("dropout_rate", 0.1),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` and `from_hf` both read."""
        activation = "gelu" if self.activation == "gelu_new" and self.gated else self.activation
        return {
            "architectures": [
                {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}.get(
                    self.model_type, "UMT5ForConditionalGeneration"
                )
            ],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_heads,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "relative_attention_max_distance": self.relative_attention_max_distance,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "feed_forward_proj": f"gated-{activation}" if self.gated else activation,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scale_decoder_outputs": self.scale_decoder_outputs,
            "pad_token_id": self.pad_id,
            "eos_token_id": self.eos_id,
            "decoder_start_token_id": self.decoder_start_id,
            "dropout_rate": self.dropout_rate,
        }


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the backbone is computed; changes speed and memory, not what is computed.

    Attributes:
      dtype: of weights and activations ("float32", "bfloat16"); norms, softmax and logits are
        float32 always.
      scan_unroll: layers per scan iteration; 0 = all of them on CPU without remat, 1 elsewhere
        (compile time) and where a decoder generates.
      remat: what the backward pass recomputes: "none", "frozen" (no matmul by a weight: what the
        gradients of activations read is kept), "frozen_mlp" (kept is the MLP's part of that),
        "frozen_attention" (attention's part), "full" (everything but layer inputs), "dots"
        (matmul results without batch dimensions are kept) or "auto" (`t5.remat.settled`).
      attention: "plain" keeps the scores of whole rows, "chunked" those of some queries and
        computes them again in the backward pass, so that memory is linear in the row's length,
        "windowed" those of some queries and only the keys that their segments span, "rowwise" those
        of one row; "auto" takes what suits the rows and the platform (`t5.paths.choose`).
      mesh: lays activations out over its devices, see `sharding.constrain`; None = they lie where
        the arguments lie.
      room: bytes of a device that activations may take, for "auto"; None = unknown.
      rows_over_model: between matmuls rows lie over the mesh's `model` too, see `spreading`.
    """

    dtype: str = "float32"
    scan_unroll: int = 0
    remat: str = "none"
    attention: str = "auto"
    mesh: Mesh | None = None
    room: float | None = None
    rows_over_model: bool = False

    def __post_init__(self):
        if self.attention not in ATTENTION_PATHS:
            raise UserError(
                f"attention {self.attention!r} is not one of {', '.join(ATTENTION_PATHS)}"
            )
        if self.remat not in ("auto", *REMAT_POLICIES):
            raise UserError(f"remat {self.remat!r} is not one of auto, {', '.join(REMAT_POLICIES)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r} is not float32, bfloat16 or float16")

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu": of the mesh's devices, or else of this machine's."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def is_spread(self) -> bool:
        """Whether rows or weights lie on several devices."""
        return self.mesh is not None and self.mesh.size > 1
