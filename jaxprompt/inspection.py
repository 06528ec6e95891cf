"""`jaxprompt inspect`: what a prompt is, where it comes from, which tokens its slots are near."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.artifact import PromptArtifact, check_backbone
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.inference import method_config, read_prompt, task_of
from jaxprompt.prompts import METHODS, MethodInputs
from jaxprompt.t5.backbones import fingerprint, read_config, resolve_backbone
from jaxprompt.t5.weights import read_embedding
from jaxprompt.typing import UserError

_SLOTS_AT_ONCE = 64  # their similarities to all tokens are held at a time


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt inspect PROMPT [--top N] [--json]`."""
    prompt = read_prompt(args.prompt)
    if prompt is None:
        raise UserError("the bare backbone has no prompt to inspect; name an artifact")
    told = describe(prompt)
    try:
        told["slots"] = nearest_tokens(
            prompt, args.backbone, top=args.top, allow_other=args.allow_other_backbone
        )
    except _NotFoundError as error:
        if args.backbone:
            raise
        print(f"jaxprompt: no nearest tokens: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        print("\n".join(_lines(told)))


def describe(prompt: PromptArtifact) -> dict[str, Any]:
    """All that an artifact says of itself, JSON-ready; needs no backbone."""
    task = task_of(prompt)
    return {
        "prompt": prompt.path,
        "method": dict(prompt.method),
        "layout": prompt.layout,
        "parameters": sum(value.size for value in prompt.values.values()),
        "bytes": _bytes_of(Path(prompt.path)),
        "values": {
            name: {"shape": list(value.shape), "dtype": value.dtype.name}
            for name, value in prompt.values.items()
        },
        "backbone": {
            "name": prompt.backbone.name,
            "fingerprint": prompt.backbone.fingerprint,
            "d_model": prompt.backbone.d_model,
        },
        "task": task.config.name,
        "candidates": list(task.candidates),
        "training": dict(prompt.training),
    }


def nearest_tokens(
    prompt: PromptArtifact, backbone: str | None = None, *, top: int = 5, allow_other: bool = False
) -> list[dict[str, Any]]:
    """The vocabulary's tokens nearest to each encoder slot, by cosine of the embeddings.

    Of the backbone only its vocabulary and embedding table are read.

    Args:
      backbone: name or directory; None = the prompt's own.
      top: how many for each slot.
      allow_other: accept another backbone than the prompt was trained with.
    Returns: for each slot `{"slot", "norm", "nearest": [{"token", "id", "cosine"}, ...]}`, nearest
      first; empty for a method without encoder slots.
    Raises: UserError if the backbone cannot be found or is another one.
    Source: Lester et al. 2021, section 7 (interpretability).
    """
    name = backbone or prompt.backbone.name
    if not name:
        raise _NotFoundError(
            f"prompt {prompt.path} does not say which backbone it belongs to; name it with"
            " --backbone"
        )
    try:
        directory = resolve_backbone(name)
    except UserError as error:
        raise _NotFoundError(str(error)) from error
    config = read_config(directory)
    check_backbone(prompt, name, fingerprint(directory, config), config.d_model, allow_other)
    slots_PD = _slot_embeddings(prompt)
    if slots_PD is None:
        return []
    tokenizer = load_tokenizer(directory)
    table_VD = read_embedding(directory, config)[: tokenizer.size]
    return _nearest(slots_PD, table_VD, tokenizer, top)


class _NotFoundError(UserError):
    """The backbone is not there: all but the nearest tokens can still be shown."""


def _slot_embeddings(prompt: PromptArtifact) -> np.ndarray | None:
    """What the method puts into the encoder's slots for an empty input, float32 [P, D]."""
    config = method_config(prompt)
    method = METHODS[config.name].make(jax.device_put(dict(prompt.values)), config)
    one = jnp.ones((1, 1), jnp.int32)
    embeds_BSD = jnp.zeros((1, 1, prompt.backbone.d_model))
    encoder_QPD = method(MethodInputs(embeds_BSD, -one, one, one - 1)).encoder
    return None if encoder_QPD is None else np.asarray(encoder_QPD[0], np.float32)


def _nearest(
    slots_PD: np.ndarray, table_VD: np.ndarray, tokenizer: Tokenizer, top: int
) -> list[dict[str, Any]]:
    norms_V = np.linalg.norm(table_VD, axis=1)
    table_VD = table_VD / np.maximum(norms_V, 1e-12)[:, None]
    told = []
    for first in range(0, len(slots_PD), _SLOTS_AT_ONCE):
        block_PD = slots_PD[first : first + _SLOTS_AT_ONCE]
        norms_P = np.linalg.norm(block_PD, axis=1)
        cosines_PV = (block_PD / np.maximum(norms_P, 1e-12)[:, None]) @ table_VD.T
        order_PV = np.argsort(-cosines_PV, axis=1, kind="stable")[:, :top]
        for slot, ids in enumerate(order_PV.tolist()):
            nearest = [
                {
                    "token": tokenizer.piece(token),
                    "id": token,
                    "cosine": round(float(cosines_PV[slot, token]), 4),
                }
                for token in ids
            ]
            norm = round(float(norms_P[slot]), 4)
            told.append({"slot": first + slot, "norm": norm, "nearest": nearest})
    return told


def _lines(told: Mapping[str, Any]) -> list[str]:
    method, backbone = told["method"], told["backbone"]
    known = f"fingerprint {backbone['fingerprint']}, " if backbone["fingerprint"] else ""
    candidates = f": {', '.join(told['candidates'])}" if told["candidates"] else ""
    shapes = (
        f"{name} {' x '.join(map(str, value['shape']))} {value['dtype']}"
        for name, value in told["values"].items()
    )
    rows = {
        "prompt": told["prompt"],
        "method": f"{method['name']}, {method.get('length', 0)} slots, layout {told['layout']}",
        "size": f"{told['parameters']:,} parameters ({', '.join(shapes)}), {told['bytes']:,} bytes",
        "backbone": f"{backbone['name'] or 'unknown'} ({known}d_model {backbone['d_model']})",
        "task": f"{told['task'] or 'unknown'}{candidates}",
        "trained": _sentence(told["training"]) or "unknown",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    if told.get("slots"):
        lines += ["", "slot     norm  nearest tokens (cosine)"]
        lines += [
            f"{slot['slot']:>4} {slot['norm']:>8.2f}  "
            + "  ".join(f"{near['token']} {near['cosine']:.2f}" for near in slot["nearest"])
            for slot in told["slots"]
        ]
    return lines


def _sentence(training: Mapping[str, Any]) -> str:
    """`steps 600, seed 0, metrics accuracy 91.2`: a mapping as words."""
    return ", ".join(f"{name} {_words(value)}" for name, value in training.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_words, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _bytes_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
