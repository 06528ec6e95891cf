"""A backbone directory of a few kilobytes with a vocabulary, prompts for it, and rows to answer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny import make_params
from tiny_tokenizer import WORDS, write_tokenizer

from jaxprompt import trees
from jaxprompt.artifact import BackboneIdentity, PromptArtifact, save_artifact
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.weights import save_hf

CONFIG = T5Config(
    vocab_size=144, d_model=12, d_kv=5, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12,
)  # fmt: skip
SLOTS = 3
TASK = {
    "name": "tiny",
    "input": "{text}",
    "target": "{label}",
    "labels": {"0": "negative", "1": "terrible", "2": "about food"},
    "metrics": ["accuracy", "macro_f1"],
}


def write_backbone(directory: Path, seed: int = 0) -> Path:
    """Random weights whose answers vary with the input, and the tiny vocabulary."""
    write_tokenizer(directory / "vocabulary")

    def scaled(path: str, leaf: np.ndarray) -> np.ndarray:
        if path == "token_embedder/embedding":
            return 0.2 * leaf
        return 2 * leaf if "kernel" in path and "logits" not in path else leaf

    params = trees.map_with_path(scaled, make_params(CONFIG, seed))
    target = directory / f"backbone-{seed}"
    save_hf(target, params, CONFIG, tokenizer_dir=directory / "vocabulary")
    return target


def make_prompt(
    backbone: Path,
    task: Mapping[str, Any] = TASK,
    layout: str = "{prompt}{input}",
    seed: int = 0,
    slots: int = SLOTS,
    **training: Any,
) -> PromptArtifact:
    """A random soft prompt."""
    values = np.random.default_rng(seed).normal(size=(slots, CONFIG.d_model)).astype(np.float32)
    return PromptArtifact(
        method={"name": "soft", "length": slots},
        layout=layout,
        task=dict(task),
        backbone=BackboneIdentity(
            str(backbone), fingerprint(backbone), CONFIG.d_model, CONFIG.vocab_size
        ),
        values={"prompt": values},
        lengths={"max_input_length": 24, "max_target_length": 6},
        training=training,
    )


def write_prompt(directory: Path, backbone: Path, **options: Any) -> Path:
    """`make_prompt`, saved."""
    return save_artifact(directory, make_prompt(backbone, **options))


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of one to nine words, with labels."""
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(rng.choice(WORDS.split(), rng.integers(1, 10))),
            "label": str(rng.integers(0, 3)),
        }
        for _ in range(count)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
