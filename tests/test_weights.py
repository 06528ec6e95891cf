"""Weights in and out: every format gives the same tree, streamed, sharded, saved."""

import dataclasses
import gc
import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
from stored_backbones import (
    CONFIG,
    RELU,
    TIED,
    UMT5,
    WRITERS,
    assert_tree,
    oracle,
    random_state,
    save,
)

from jaxprompt import tensorfile
from jaxprompt.t5 import placing, weights
from jaxprompt.t5.backbones import fingerprint, read_config
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.copying import copy_into
from jaxprompt.t5.layers import abstract_params, init_params
from jaxprompt.t5.weight_files import WeightFiles, open_weights
from jaxprompt.t5.weight_names import NAMES, Layout, weight_table
from jaxprompt.t5.weights import load_params, match, save_hf
from jaxprompt.tensorfile import (
    StoredTensor,
    reading_ahead,
)
from jaxprompt.trees import flatten
from jaxprompt.typing import UserError


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("config", [CONFIG, RELU, UMT5], ids=["gated", "relu", "umt5"])
def test_every_format_gives_the_same_tree(writer: str, config: T5Config, tmp_path: Path):
    state = random_state(config)
    directory = save(tmp_path, state, config, WRITERS[writer])
    assert_tree(load_params(directory, read_config(directory)), oracle(state, config))


def test_names_are_those_of_transformers():
    names = [weight.name for weight in weight_table(CONFIG)]
    assert len(set(names)) == len(names)
    assert "encoder.block.2.layer.0.SelfAttention.q.weight" in names
    assert "encoder.block.2.layer.1.DenseReluDense.wi_1.weight" in names
    assert "decoder.block.1.layer.1.EncDecAttention.o.weight" in names
    assert "decoder.block.1.layer.2.layer_norm.weight" in names
    assert "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in names
    flax_names = {weight.stored_name(Layout.FLAX) for weight in weight_table(CONFIG)}
    assert {"shared/embedding", "lm_head/kernel", "encoder/final_layer_norm/weight"} <= flax_names


def test_stored_tensors_become_ours_without_a_copy():
    for layout in Layout:
        for weight in weight_table(CONFIG):
            array = np.zeros(weight.stored_shape(layout), np.float32)
            ours = weight.ours(array, layout)
            assert ours.shape == weight.shape and np.shares_memory(ours, array), weight


def test_arrays_that_flax_cut_into_chunks_are_joined(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    state = random_state(CONFIG)
    directory = save(tmp_path, state, CONFIG, WRITERS["flax"])
    assert b"__msgpack_chunked_array__" in (directory / "flax_model.msgpack").read_bytes()
    assert_tree(load_params(directory, CONFIG), oracle(state, CONFIG))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("writer", ["single", "flax"])
def test_values_are_cast_to_the_dtype_asked_for(writer: str, stored: Any, tmp_path: Path):
    state = {name: array.astype(stored) for name, array in random_state(CONFIG).items()}
    directory = save(tmp_path, state, CONFIG, WRITERS[writer])
    for dtype in ("float32", "bfloat16"):
        expected = {k: v.astype(dtype) for k, v in oracle(state, CONFIG).items()}
        assert_tree(load_params(directory, CONFIG, dtype=dtype), expected)


@pytest.fixture(params=["taken over", "copied"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a device makes of the host's arrays: a CPU takes them over, any other copies them."""
    if request.param == "copied":
        monkeypatch.setattr(placing, "_taken_over", lambda dtype, platform: False)
    return request.param


@pytest.mark.parametrize("host_bytes", [1, 100, 500, 10**9])
def test_block_by_block_gives_the_same(host_bytes: int, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(placing, "_taken_over", lambda dtype, platform: False)
    state = random_state(CONFIG)
    directory = save(tmp_path, state)
    assert_tree(load_params(directory, CONFIG, host_bytes=host_bytes), oracle(state, CONFIG))


def test_one_copy_of_a_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: Any):
    """With a reader that must copy, as for chunked arrays; counted by who is still referred to."""
    state = random_state(CONFIG)
    directory = save(tmp_path, state)
    alive, peak = 0, 0

    def copying(stored: StoredTensor) -> StoredTensor:
        def died() -> None:
            nonlocal alive
            alive -= 1

        def read() -> np.ndarray:
            nonlocal alive, peak
            copy = stored.read().copy()
            alive += 1
            peak = max(peak, alive)
            weakref.finalize(copy, died)
            return copy

        return StoredTensor(stored.shape, stored.dtype, read)

    def opened(path: Path) -> WeightFiles:
        files = open_weights(path)
        tensors = {name: copying(stored) for name, stored in files.tensors.items()}
        return dataclasses.replace(files, tensors=tensors)

    monkeypatch.setattr(weights, "open_weights", opened)
    assert_tree(load_params(directory, CONFIG), oracle(state, CONFIG))
    assert (alive, peak) == (0, 1)


def test_a_cpu_takes_over_what_the_host_filled(tmp_path: Path, monkeypatch: Any):
    """No second copy, and nobody else who could write to it."""
    filled, empty = [], placing.empty

    def noted(*args: Any) -> np.ndarray:
        array = empty(*args)
        filled.append(array.ctypes.data)
        return array

    monkeypatch.setattr(placing, "empty", noted)
    state = random_state(CONFIG)
    params = load_params(save(tmp_path, state), CONFIG)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)] == filled
    gc.collect()
    rubbish = [np.full(leaf.shape, np.nan, leaf.dtype) for leaf in jax.tree.leaves(params)]
    assert_tree(params, oracle(state, CONFIG))
    del rubbish


def test_the_host_holds_one_block(memory: str, tmp_path: Path, monkeypatch: Any):
    """Above what is loaded, where a CPU takes that over: less still."""
    monkeypatch.setattr("jaxprompt.t5.copying._ROWS", 8)  # tensors are small
    big = T5Config(vocab_size=64, d_model=256, d_kv=64, num_heads=2, d_ff=4096, num_layers=3,
                   num_decoder_layers=3)  # fmt: skip
    directory = save(tmp_path, random_state(big), big)
    load_params(directory, big, host_bytes=1)  # compiles
    tensor = big.d_model * big.d_ff * 4
    tracemalloc.start()
    params = load_params(directory, big, host_bytes=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if memory == "taken over":
        assert peak - total < 0.5 * tensor
    else:
        assert peak < 1.3 * tensor < total / 10


@pytest.mark.parametrize("cast", ["float32", "bfloat16", "int8", "float64"])
def test_turned_copies_are_those_of_numpy(cast: str):
    """Kernels of every layout, whole and in parts, with rows that are no multiple of a block's."""
    draw = np.random.default_rng(0)
    flat = draw.integers(-100, 100, (150, 210)).astype(np.float32)
    flat += draw.standard_normal(flat.shape) if cast != "int8" else 0
    flat[3, 5:8] = [np.inf, -0.0, 3e38] if cast != "int8" else 0
    turned = [
        flat.T, flat.T.reshape(210, 3, 50), flat.T.reshape(3, 70, 150), flat,
        flat.T[::-1], flat.T.reshape(210, 3, 50)[:, 1:], flat.T.reshape(3, 70, 150)[:, :, 9:],
    ]  # fmt: skip
    for values in turned:
        whole = np.zeros((*values.shape[:-1], values.shape[-1] + 3), cast)
        for block in (np.zeros(values.shape, cast), whole[..., 2:-1]):
            copy_into(block, values)
            np.testing.assert_array_equal(block, values.astype(cast))
        assert not whole[..., :2].any() and not whole[..., -1].any()


@pytest.mark.parametrize(
    ("read", "expected"),
    [([0], [1, 2, 4]), ([0, 0, 1], [1, 2, 4, 5]), ([5], [6]), (range(7), [1, 2, 4, 5, 6])],
)
def test_what_comes_next_is_fetched_meanwhile(
    read: Sequence[int], expected: list[int], monkeypatch: Any
):
    """In order, each once, the next one at least and nothing beyond the bound."""
    fetched: list[int] = []
    monkeypatch.setattr(tensorfile, "_AHEAD", 25)
    monkeypatch.setattr(tensorfile, "_touch", lambda mapped, stop: fetched.append(int(mapped[0])))
    sizes = [10, 10, 10, 10, 10, 10, 100]
    arrays = [np.full(size, number, np.uint8) for number, size in enumerate(sizes)]
    tensors = [StoredTensor.of(array) for array in arrays]
    tensors[3] = dataclasses.replace(tensors[3], mapped=None)  # a reader that copies
    with reading_ahead(tensors) as same:
        assert all(same[number].read() is arrays[number] for number in read)
    assert fetched == expected


SHARDED = """
import sys
import jax, numpy as np
from pathlib import Path
from jaxprompt.sharding import make_mesh, tree_shardings
from jaxprompt.t5.backbones import read_config
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.weights import load_params
directory = Path(sys.argv[1])
config = read_config(directory)
alone = load_params(directory, config)
shardings = tree_shardings(make_mesh(2, 2), param_specs(config))
for host_bytes in (1, 2**26):
    params = load_params(directory, config, shardings=shardings, host_bytes=host_bytes)
    for leaf, expected, sharding in zip(*map(jax.tree.leaves, (params, alone, shardings))):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, expected)
        assert jax.jit(lambda x: x + 0)(leaf).sharding == sharding
kernel = params["encoder"]["layers"]["attention"]["query"]["kernel"]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 6, 2, 2)}
assert len({shard.device for shard in kernel.addressable_shards}) == 4
print("sharded as asked")
"""


def test_four_devices_hold_their_shards(tmp_path: Path):
    config = dataclasses.replace(CONFIG, vocab_size=12)
    directory = save(tmp_path, random_state(config), config)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(directory)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "sharded as asked", done.stderr


@pytest.mark.parametrize("config", [CONFIG, RELU, UMT5], ids=["gated", "relu", "umt5"])
@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_what_is_saved_loads_again(config: T5Config, shard_bytes: int, tmp_path: Path):
    params = init_params(config, jax.random.key(0))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(b"pieces")
    (tokenizer / "model.safetensors").write_bytes(b"not a tokenizer")
    saved = tmp_path / "saved"
    save_hf(saved, params, config, tokenizer, shard_bytes=shard_bytes)
    assert read_config(saved) == config
    assert (saved / "spiece.model").read_bytes() == b"pieces"
    assert (saved / "model.safetensors").exists() == (shard_bytes > 500)
    assert {path.stat().st_mode for path in saved.iterdir()} == {
        (saved / "config.json").stat().st_mode
    }  # who may read one may read all
    expected = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    assert_tree(load_params(saved, config), expected)
    assert set(open_weights(saved).tensors) == {weight.name for weight in weight_table(config)}


def test_saving_replaces_whole_directories_or_nothing(tmp_path: Path, monkeypatch: Any):
    saved = tmp_path / "saved"
    params = init_params(CONFIG, jax.random.key(0))
    save_hf(saved, params, CONFIG, shard_bytes=500)
    before = fingerprint(saved)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_safetensors", full)
        with pytest.raises(UserError, match=r"cannot write .*saved: No space left on device"):
            save_hf(saved, params, CONFIG)
    assert fingerprint(saved) == before and [p.name for p in tmp_path.iterdir()] == ["saved"]
    save_hf(saved, params, CONFIG, dtype="bfloat16")
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert open_weights(saved).tensors["shared.weight"].dtype == ml_dtypes.bfloat16


def test_parameters_of_another_config_are_not_saved(tmp_path: Path):
    params = init_params(TIED, jax.random.key(0))
    with pytest.raises(UserError, match="differ in decoder/logits_dense/kernel"):
        save_hf(tmp_path / "saved", params, CONFIG)
    assert not (tmp_path / "saved").exists()


def test_every_parameter_of_every_family_has_a_name():
    named = {path for config in (CONFIG, RELU, UMT5) for path in flatten(abstract_params(config))}
    assert named == NAMES.keys()


def test_match_gives_layers_in_order(tmp_path: Path):
    files = open_weights(save(tmp_path, random_state(CONFIG)))
    matched = match(files, CONFIG)
    layers = [weight.layer for weight, _ in matched["encoder/layers/mlp/wo/kernel"]]
    assert layers == [0, 1, 2]
