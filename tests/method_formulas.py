"""The formulas of prompt methods, transcribed from papers and code into numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxprompt.prompts import MethodConfig

Oracle = Callable[[dict[str, np.ndarray], MethodConfig], np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def residual(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    rows = []
    for n, row in enumerate(v["prompt"]):
        own = n if config.per_token else 0
        added = relu(row @ v["down"][own] + v["down_bias"][own]) @ v["up"][own] + v["up_bias"][own]
        if config.layer_norm:
            added = (added - added.mean()) / np.sqrt(added.var() + 1e-5)
            added = added * v["scale"][own] + v["bias"][own]
        rows.append(row + added)
    return np.stack(rows)


def p_tuning(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    x, last = v["prompt"], 2
    if config.encoder == "lstm":
        last = 1
        for layer in range(config.layers):
            sides = []
            for side in ("forward", "backward"):
                name, h = f"lstm_{layer}_{side}", config.hidden
                hidden, cell, out = np.zeros(h), np.zeros(h), {}
                order = range(len(x)) if side == "forward" else reversed(range(len(x)))
                for n in order:
                    gates = x[n] @ v[f"{name}_input"] + hidden @ v[f"{name}_hidden"]
                    gates = gates + v[f"{name}_bias"]
                    i, f, g, o = (gates[k * h : (k + 1) * h] for k in range(4))
                    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
                    out[n] = hidden = sigmoid(o) * np.tanh(cell)
                sides.append(np.stack([out[n] for n in range(len(x))]))
            x = np.concatenate(sides, 1)
    for number in range(last + 1):
        x = x @ v[f"linear_{number}"] + v[f"linear_{number}_bias"]
        x = relu(x) if number < last else x
    return x


def lopt(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    first = v["left"] if config.variant == 1 else sigmoid(v["first"] @ v["left"])
    return first @ v["right"]


def superpos(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    return np.stack(
        [sum(w * e for w, e in zip(ws, v["rows_of_table"], strict=True)) for ws in v["weights"]]
    )


def xprompt(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    pieces = iter(v["kept"])
    nothing = np.zeros(v["kept"].shape[1])
    return np.stack([
        np.concatenate([next(pieces) if there else nothing for there in row]) for row in v["mask"]
    ])  # fmt: skip


ROWS: dict[str, Oracle] = {
    "soft": lambda v, config: v["prompt"],
    "p-tuning": p_tuning,
    "residual": residual,
    "dpt": lambda v, config: v["left"] @ v["right"],
    "lopt": lopt,
    "superpos": superpos,
    "dept": lambda v, config: v["prompt"],
    "adept": lambda v, config: v["prompt"],
    "per-layer": lambda v, config: v["prompts"][0],
    "xprompt": xprompt,
}


def prefix(v: dict[str, np.ndarray], config: Any, place: str) -> tuple[np.ndarray, ...]:
    hidden = np.tanh(v[f"{place}_prompt"] @ v[f"{place}_up"] + v[f"{place}_up_bias"])
    out, bias = v[f"{place}_out"], v[f"{place}_out_bias"]
    flat = hidden @ out.reshape(len(out), -1) + bias.reshape(-1)
    keys, values = np.moveaxis(flat.reshape(len(hidden), *bias.shape), 0, 2)
    return keys, values


def p_tuning_v2(v: dict[str, np.ndarray], config: Any, place: str) -> tuple[np.ndarray, ...]:
    name = {"encoder": "encoder_self", "decoder": "decoder_self", "cross": "decoder_cross"}[place]
    return v[f"{name}_keys"], v[f"{name}_values"]


PAIRS: dict[str, Callable] = {"p-tuning-v2": p_tuning_v2, "prefix": prefix}


def dept(v: dict[str, np.ndarray], config: Any, place: int, embedding: np.ndarray) -> np.ndarray:
    if place >= config.positions:
        return np.zeros_like(embedding)
    return 8.0 / np.sqrt(config.rank) * (v["left"][place] @ v["right"])


def adept(v: dict[str, np.ndarray], config: Any, place: int, embedding: np.ndarray) -> np.ndarray:
    return relu(embedding @ v["left"] + v["left_bias"]) @ v["right"] + v["right_bias"]


DELTAS: dict[str, Callable] = {"dept": dept, "adept": adept}


def mean_of(rows: np.ndarray) -> np.ndarray:
    return rows.mean(0) if len(rows) else np.zeros(rows.shape[1])


def smop(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    mean = mean_of(rows)
    shares = np.exp(mean @ v["router"])
    shares = shares / shares.sum()
    return shares.max() * v["prompts"][shares.argmax()]


def pt_moe(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    shares = np.exp(mean_of(rows) @ v["router"] + v["router_bias"])
    shares = shares / shares.sum()
    return sum(w * (left @ v["right"]) for w, left in zip(shares, v["left"], strict=True))


def attempt(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    largest = rows.max(0) if len(rows) else np.zeros(rows.shape[1])
    hidden = largest @ v["down"]
    query = (hidden * sigmoid(hidden)) @ v["up"]
    query = (query - query.mean()) / np.sqrt(query.var() + 1e-5)
    query = query * v["scale"][0, 0] + v["bias"][0, 0]
    prompts = [*v["sources"], v["prompt"]]
    scores = np.exp([prompt.max(0) @ query / config.temperature for prompt in prompts])
    return v["prompt"] + sum(s * p for s, p in zip(scores / scores.sum(), prompts, strict=True))


MIXTURES: dict[str, Callable] = {"smop": smop, "pt-moe": pt_moe, "attempt": attempt}


def multitask(v: dict[str, np.ndarray], config: Any, task: int) -> np.ndarray:
    shared = v["prompt"]
    if config.combine == "project":
        kernel = v["kernels"][task]
        return np.stack([row @ kernel + v["biases"][task] for row in shared])
    own = v["tasks"][task]
    if config.combine == "add":
        return shared + own
    return np.concatenate([shared, own], 0 if config.combine == "concat" else 1)


def mpt(v: dict[str, np.ndarray], config: Any, task: int) -> np.ndarray:
    pairs = zip(v["left"][task].T, v["right"][task], strict=True)
    return v["prompt"] * sum(np.outer(one, other) for one, other in pairs)


TASKS: dict[str, Callable] = {"multitask": multitask, "mpt": mpt}
