"""Files of weights are closed on both sides: what is missing, unknown or damaged is named."""

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from stored_backbones import (
    CONFIG,
    TIED,
    UMT5,
    WRITERS,
    assert_tree,
    oracle,
    random_state,
    save,
    write_config,
)

from jaxprompt.t5.backbones import read_config
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.msgpack_file import read_msgpack
from jaxprompt.t5.weight_files import FORMATS
from jaxprompt.t5.weights import load_params
from jaxprompt.tensorfile import (
    read_safetensors,
)
from jaxprompt.typing import UserError


def _message(directory: Path, config: T5Config = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        load_params(directory, config)
    return str(caught.value)


def test_missing_keys_are_named_and_counted(tmp_path: Path):
    state = random_state(CONFIG)
    gone = [name for name in state if "EncDecAttention" in name]
    message = _message(save(tmp_path, {k: v for k, v in state.items() if k not in gone}))
    assert "model.safetensors: does not fit its config.json" in message
    assert "missing: decoder.block.0.layer.1.EncDecAttention.k.weight" in message
    assert message.count("EncDecAttention") == 5 and f"({len(gone)} in all)" in message


def test_unknown_keys_are_named(tmp_path: Path):
    extra = {"classifier.weight": np.ones(2, np.float32), "encoder.block.3.x": np.ones(1)}
    message = _message(save(tmp_path, random_state(CONFIG) | extra))
    assert "unknown: " in message and set(extra) <= set(message.replace(",", "").split())


def test_wrong_shapes_and_kinds_are_named(tmp_path: Path):
    q, norm = "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"
    state = random_state(CONFIG)
    state |= {q: state[q].T.copy(), norm: np.ones(6, np.int32)}
    message = _message(save(tmp_path, state))
    assert f"{q} [6, 8] instead of [8, 6]" in message
    assert f"{norm} of int32 instead of floating point numbers" in message


@pytest.mark.parametrize("writer", ["single", "flax"])
def test_a_missing_key_is_named_as_in_the_file(writer: str, tmp_path: Path):
    state = random_state(CONFIG)
    del state["lm_head.weight"]
    message = _message(save(tmp_path, state, CONFIG, WRITERS[writer]))
    assert ("lm_head/kernel" if writer == "flax" else "lm_head.weight") in message


def test_equal_copies_of_the_embedding_and_known_leftovers_are_fine(tmp_path: Path):
    state = random_state(TIED)
    shared = state["shared.weight"]
    more = dict.fromkeys(("encoder.embed_tokens.weight", "lm_head.weight"), shared)
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    directory = save(tmp_path, state | more | {bias: np.ones((4, 4), np.float32)}, TIED)
    assert read_config(directory) == TIED
    assert_tree(load_params(directory, TIED), oracle(state, TIED))


@pytest.mark.parametrize("writer", ["single", "flax"])
def test_a_tied_output_layer_may_be_stored_if_it_is_equal(writer: str, tmp_path: Path):
    state = random_state(CONFIG)
    state["lm_head.weight"] = state["shared.weight"]
    directory = save(tmp_path, state, CONFIG, WRITERS[writer])
    tied = read_config(directory)
    assert tied.tie_word_embeddings
    load_params(directory, tied)
    state["lm_head.weight"] = state["shared.weight"] + 1
    directory = save(tmp_path, state, CONFIG, WRITERS[writer])
    message = _message(directory, tied)
    assert "unlike the embedding table it should equal: lm_head" in message


def test_unequal_copies_of_the_embedding_are_named(tmp_path: Path):
    state = random_state(CONFIG)
    state["decoder.embed_tokens.weight"] = state["shared.weight"] + 1
    message = _message(save(tmp_path, state))
    assert "unlike the embedding table it should equal: decoder.embed_tokens.weight" in message


def test_the_embedding_may_be_stored_under_another_of_its_names(tmp_path: Path):
    state = random_state(CONFIG)
    renamed = {"decoder.embed_tokens.weight": state.pop("shared.weight"), **state}
    directory = save(tmp_path, renamed)
    params = load_params(directory, read_config(directory))
    np.testing.assert_array_equal(
        params["token_embedder"]["embedding"], renamed["decoder.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    "model_type, flag, stored_head, tied, scaled",
    [
        ("t5", True, False, True, True),  # T5 1.0
        ("t5", False, True, False, False),  # T5 1.1 on the hub
        ("t5", False, False, True, False),  # saved by tools that took the flag for scaling only
        ("mt5", True, True, False, False),  # mT5 as transformers 5 saves it
        ("mt5", False, True, False, False),  # mT5 on the hub
        ("umt5", False, True, False, False),  # umT5 on the hub
    ],
)
def test_the_weights_tell_whether_the_output_layer_is_tied(
    model_type: str, flag: bool, stored_head: bool, tied: bool, scaled: bool, tmp_path: Path
):
    config = UMT5 if model_type == "umt5" else CONFIG
    state = random_state(config)
    if not stored_head:
        del state["lm_head.weight"]
    directory = save(tmp_path, state, config)
    raw = config.to_hf() | {"model_type": model_type, "tie_word_embeddings": flag}
    del raw["scale_decoder_outputs"]
    (directory / "config.json").write_text(json.dumps(raw))
    read = read_config(directory)
    assert (read.tie_word_embeddings, read.scale_decoder_outputs) == (tied, scaled)
    load_params(directory, read)


def _index(places: dict[str, str]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= places
        path.write_text(json.dumps(index))

    return write


BROKEN_INDEXES = {
    "a tensor in the other shard": (
        _index({"shared.weight": "model-00002-of-00002.safetensors"}),
        "model-00001-of-00002.safetensors holds shared.weight, not so in the index",
    ),
    "a tensor nowhere": (
        _index({"ghost": "model-00002-of-00002.safetensors"}),
        "model-00002-of-00002.safetensors lacks ghost, which the index puts there",
    ),
    "a shard that is not there": (_index({"ghost": "model-3.safetensors"}), "cannot be read"),
    "a shard elsewhere": (_index({"ghost": "../model.safetensors"}), "must lie beside the index"),
    "no index": (
        lambda directory: (directory / "model.safetensors.index.json").write_text("[]"),
        "is no index of shards",
    ),
}


@pytest.mark.parametrize("case", BROKEN_INDEXES)
def test_index_and_shards_must_agree(case: str, tmp_path: Path):
    damage, message = BROKEN_INDEXES[case]
    state = dict(sorted(random_state(CONFIG).items(), key=lambda item: item[0] != "shared.weight"))
    directory = save(tmp_path, state, CONFIG, WRITERS["sharded"])
    damage(directory)
    assert message in _message(directory)


def test_a_directory_without_weights_says_what_would_be_weights(tmp_path: Path):
    write_config(tmp_path, CONFIG)
    message = _message(tmp_path)
    assert all(format_.file in message for format_ in FORMATS)


BROKEN_SAFETENSORS = {
    "a name twice": (b'{"a":{},"a":{}}', "'a' is there twice"),
    "an unknown dtype": (b'{"a":{"dtype":"F8","shape":[1],"data_offsets":[0,1]}}', "dtype F8"),
    "bytes that are not there": (
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', "does not fill bytes 0 to 9 of 1"
    ),
    "too few bytes": (
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', "does not fill bytes 0 to 1 of 1"
    ),
    "no header": (b"hello", "damaged safetensors header"),
    "a list": (b"[]", "damaged safetensors header"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_SAFETENSORS)
def test_damaged_safetensors_are_refused(case: str, tmp_path: Path):
    header, message = BROKEN_SAFETENSORS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError) as caught:
        read_safetensors(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


READERS = {"model.safetensors": read_safetensors, "flax_model.msgpack": read_msgpack}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    small = T5Config(vocab_size=3, d_model=2, d_kv=1, num_heads=1, d_ff=2, num_layers=1,
                     num_decoder_layers=1, relative_attention_num_buckets=4)  # fmt: skip
    for writer in (WRITERS["single"], WRITERS["flax"]):
        writer(directory, random_state(small), small)
    return directory


@pytest.mark.parametrize("name", READERS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_damage_never_does_more_than_raise(name: str, data: st.DataObject, intact: Path):
    content = bytearray((intact / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = intact / f"damaged-{name}"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        for tensor in READERS[name](path).values():
            assert tensor.read().shape == tensor.shape
    except UserError as error:
        assert str(path) in str(error)
