"""Tiny random backbones as others store them, in every format, and the tree they become."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np

from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.weight_names import NAMES, Layout, weight_table
from jaxprompt.tensorfile import (
    write_safetensors,
)
from jaxprompt.trees import flatten

CONFIG = T5Config(
    vocab_size=11, d_model=6, d_kv=2, num_heads=4, d_ff=10, num_layers=3, num_decoder_layers=2,
    relative_attention_num_buckets=4,
)  # fmt: skip


TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True, scale_decoder_outputs=True)


UMT5 = dataclasses.replace(CONFIG, model_type="umt5", per_layer_relative_bias=True)


RELU = dataclasses.replace(TIED, activation="relu", gated=False)


State = dict[str, np.ndarray]


def random_state(config: T5Config, seed: int = 0) -> State:
    """Random tensors under torch's names, in torch's layout."""
    rng = np.random.default_rng(seed)
    table = weight_table(config)
    return {w.name: rng.standard_normal(w.stored_shape(Layout.TORCH), np.float32) for w in table}


def flax_state(state: State, config: T5Config) -> State:
    """The same under Flax's names, in Flax's layout: only kernels are the other way round."""
    kernels = {weight.name for weight in weight_table(config) if weight.word == "kernel"}
    spelled = {weight.name: weight.stored_name(Layout.FLAX) for weight in weight_table(config)}
    return {spelled[name]: a.T.copy() if name in kernels else a for name, a in state.items()}


def nested(flat: State) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *rooms, last = name.split("/")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[last] = array
    return tree


def write_config(directory: Path, config: T5Config) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))


def write_index(directory: Path, file: str, shards: dict[str, State]) -> None:
    places = {name: shard for shard, state in shards.items() for name in state}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / f"{file}.index.json").write_text(json.dumps(index))


def halves(state: State, pattern: str) -> dict[str, State]:
    names = list(state)
    halves = names[::2], names[1::2]
    return {pattern.format(n): {k: state[k] for k in half} for n, half in enumerate(halves, 1)}


def _single(directory: Path, state: State, config: T5Config) -> None:
    write_safetensors(directory / "model.safetensors", state)


def _sharded(directory: Path, state: State, config: T5Config) -> None:
    shards = halves(state, "model-{:05}-of-00002.safetensors")
    for name, shard in shards.items():
        write_safetensors(directory / name, shard)
    write_index(directory, "model.safetensors", shards)


def _flax(directory: Path, state: State, config: T5Config) -> None:
    content = flax.serialization.msgpack_serialize(nested(flax_state(state, config)))
    (directory / "flax_model.msgpack").write_bytes(content)


def _flax_sharded(directory: Path, state: State, config: T5Config) -> None:
    shards = halves(flax_state(state, config), "flax_model-{:05}-of-00002.msgpack")
    for name, shard in shards.items():
        content = flax.serialization.msgpack_serialize(nested(shard))
        (directory / name).write_bytes(content)
    write_index(directory, "flax_model.msgpack", shards)


WRITERS = {"single": _single, "sharded": _sharded, "flax": _flax, "flax sharded": _flax_sharded}


def save(
    directory: Path, state: State, config: T5Config = CONFIG, writer: Callable[..., None] = _single
) -> Path:
    write_config(directory, config)
    writer(directory, state, config)
    return directory


def oracle(state: State, config: T5Config) -> dict[str, np.ndarray]:
    """The tree by the book: transpose, split heads, stack."""
    heads, size = config.num_heads, config.d_kv

    def one(path: str, name: str) -> np.ndarray:
        array = state[name]
        if path.endswith(("embedding", "scale")) and "relpos" not in path:
            return array
        if "/out/" in path:
            return array.T.reshape(heads, size, -1)
        if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            return array.T.reshape(-1, heads, size)
        return array.T

    def whole(path: str, layers: int) -> np.ndarray:
        if "/layers/" not in path:
            return one(path, NAMES[path])
        return np.stack([one(path, NAMES[path].format(layer=n)) for n in range(layers)])

    depth = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    paths = flatten(abstract_params(config))
    return {path: whole(path, depth.get(path.split("/")[0], 0)) for path in paths}


def assert_tree(params: dict, expected: dict[str, np.ndarray]) -> None:
    flat = flatten(params)
    assert flat.keys() == expected.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path], path, strict=True)
