"""Makes the golden arrays of the T5 tests from transformers' torch T5 and from `torch.save`.

Run it with torch installed, `python tests/golden/make_t5_golden.py`, when a family is added or
changed; those that did not change keep their numbers. The live parity tests use its models too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
GRADIENT_FAMILY = "t5_1_1"
# what a config.json on the hub says; odd sizes: heads x head size is never d_model, most stacks
# differ in depth
FAMILIES: dict[str, dict[str, Any]] = {
    "t5_1_0": {
        "model_type": "t5", "feed_forward_proj": "relu", "tie_word_embeddings": True,
        "vocab_size": 37, "d_model": 12, "d_kv": 5, "num_heads": 3, "d_ff": 20,
        "num_layers": 2, "num_decoder_layers": 3,
    },
    "t5_1_1": {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "vocab_size": 41, "d_model": 10, "d_kv": 4, "num_heads": 2, "d_ff": 14,
        "num_layers": 3, "num_decoder_layers": 2,
    },
    "flan": {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "vocab_size": 35, "d_model": 8, "d_kv": 3, "num_heads": 5, "d_ff": 11,
        "num_layers": 2, "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
    },
    "mt5": {
        "model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "vocab_size": 53, "d_model": 9, "d_kv": 4, "num_heads": 3, "d_ff": 13,
        "num_layers": 1, "num_decoder_layers": 2,
    },
    "byt5": {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "vocab_size": 384, "d_model": 7, "d_kv": 5, "num_heads": 2, "d_ff": 12,
        "num_layers": 4, "num_decoder_layers": 1,
    },
    "ul2": {
        "model_type": "t5", "feed_forward_proj": "gated-silu", "tie_word_embeddings": False,
        "vocab_size": 43, "d_model": 11, "d_kv": 4, "num_heads": 2, "d_ff": 15,
        "num_layers": 2, "num_decoder_layers": 3,
    },
    "umt5": {
        "model_type": "umt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "vocab_size": 47, "d_model": 12, "d_kv": 5, "num_heads": 2, "d_ff": 17,
        "num_layers": 3, "num_decoder_layers": 2,
    },
}  # fmt: skip


def make_model(family: str, seed: int = 0) -> Any:
    """A random torch model of a family, for evaluation; no norm scale or bias is one or zero."""
    import torch
    import transformers

    raw = FAMILIES[family]
    kinds = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
    kind = kinds[raw["model_type"]]
    config = getattr(transformers, f"{kind}Config")(
        **{name: value for name, value in raw.items() if name != "model_type"},
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if not raw["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    if raw["model_type"] == "umt5":
        # released umT5s do not scale decoder outputs; transformers 5 does, whatever they say
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name or "relative_attention_bias" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def make_inputs(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Encoder ids [3, S], two rows with padding at the end; decoder ids [3, T] starting with 0."""
    rng = np.random.default_rng(len(family))
    long = family == "t5_1_0"  # past the last relative position bucket
    encoder_ids = rng.integers(2, 30, (3, 150 if long else 13))
    encoder_ids[1, -5:] = encoder_ids[2, 1:] = 0
    decoder_ids = rng.integers(2, 30, (3, 40 if long else 6))
    decoder_ids[:, 0] = 0
    return encoder_ids.astype(np.int32), decoder_ids.astype(np.int32)


def torch_logits(model: Any, encoder_ids: np.ndarray, decoder_ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V], padding of the encoder masked."""
    import torch

    ids = torch.from_numpy(encoder_ids).long()
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            decoder_input_ids=torch.from_numpy(decoder_ids).long(),
        ).logits.float().numpy()  # fmt: skip


def torch_gradient(model: Any, encoder_ids: np.ndarray, decoder_ids: np.ndarray) -> np.ndarray:
    """Gradient of sum(sin(index) * logits) by the encoder's input embeddings, [B, S, D]."""
    import torch

    ids = torch.from_numpy(encoder_ids).long()
    embeds = model.shared(ids).detach().requires_grad_()
    logits = model(
        inputs_embeds=embeds,
        attention_mask=(ids != 0).long(),
        decoder_input_ids=torch.from_numpy(decoder_ids).long(),
    ).logits
    (torch.sin(torch.arange(logits.numel())).reshape(logits.shape) * logits).sum().backward()
    return embeds.grad.numpy()


def make_bin_tensors() -> dict[str, Any]:
    """Tensors of every dtype, with offsets, strides, a shared storage, and a parameter."""
    import torch

    torch.manual_seed(1)
    base = torch.randn(6, 4)
    return {
        "float": base,
        "shared": base,
        "transposed": base.t(),
        "part": base[2:5, 1:3],
        "strided": base[::2],
        "expanded": torch.arange(3.0).expand(2, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(4),
        "int": torch.arange(4, dtype=torch.int32),
        "short": torch.arange(4, dtype=torch.int16),
        "char": torch.arange(-2, 2, dtype=torch.int8),
        "byte": torch.arange(4, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }


def make() -> None:
    import torch

    for family, raw in FAMILIES.items():
        model = make_model(family)
        encoder_ids, decoder_ids = make_inputs(family)
        arrays = {f"state/{name}": value.numpy() for name, value in model.state_dict().items()}
        for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            del arrays[f"state/{copy}"]
        if family == GRADIENT_FAMILY:
            arrays["gradient"] = torch_gradient(model, encoder_ids, decoder_ids)
        arrays |= {
            "config": np.array(json.dumps(raw)),
            "encoder_ids": encoder_ids,
            "decoder_ids": decoder_ids,
            "logits": torch_logits(model, encoder_ids, decoder_ids),
        }
        np.savez_compressed(HERE / f"{family}.npz", **arrays)

    tensors = make_bin_tensors()
    torch.save(tensors, HERE / "torch_zip.bin")
    torch.save(tensors, HERE / "torch_stream.bin", _use_new_zipfile_serialization=False)
    values = {name: value.detach().float().numpy() for name, value in tensors.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    np.savez_compressed(HERE / "torch_bin.npz", dtypes=np.array(json.dumps(dtypes)), **values)


if __name__ == "__main__":
    make()
