"""Quantised backbones on disk and on their way in: streamed, sharded, saved once, told apart."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_backbone
from quantized_params import as_floats, quantized
from t5x_writer import t5x_tree, write_t5x
from tiny import make_params
from tiny_backbone import CONFIG, make_prompt, write_backbone, write_prompt, write_rows

import jaxprompt as jp
from jaxprompt import cli, quantize
from jaxprompt.convert import convert_backbone
from jaxprompt.sharding import make_mesh, tree_shardings
from jaxprompt.t5 import placing
from jaxprompt.t5.backbones import fingerprint, read_config
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weights import convert_hf, load_params, save_hf
from jaxprompt.tensorfile import read_safetensors, write_safetensors
from jaxprompt.trees import flatten, size_in_bytes
from jaxprompt.typing import UserError

KINDS = ("int8", "int4")
# odd numbers of heads and of outputs, several layers and groups
DEEP = dataclasses.replace(CONFIG, num_layers=3, num_decoder_layers=2, d_ff=15, d_model=12)
TIED = dataclasses.replace(DEEP, tie_word_embeddings=True, scale_decoder_outputs=True)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups in weights of this size."""
    monkeypatch.setattr(quantize, "GROUP", 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("source"))


def assert_same_tree(found: dict, wanted: dict) -> None:
    assert flatten(found).keys() == flatten(wanted).keys()
    for path, leaf in flatten(wanted).items():
        for ours, theirs in zip(*map(jax.tree.leaves, (flatten(found)[path], leaf)), strict=True):
            assert ours.dtype == theirs.dtype, path
            np.testing.assert_array_equal(ours, theirs, path)


def convert(source: Path, out: Path, kind: str | None) -> Path:
    convert_backbone(str(source), str(out), quantize=kind)
    return out


# ---- while loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DEEP, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken_over", [True, False])
def test_every_tensor_is_quantised_as_a_whole_one_is(
    kind: str, config: T5Config, taken_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the blocks of the host are, and whether a device takes them over or copies them."""
    if not taken_over:
        monkeypatch.setattr(placing, "_taken_over", lambda dtype, platform: False)
    params = make_params(config)
    save_hf(tmp_path / "hf", params, config)
    write_t5x(tmp_path / "t5x", t5x_tree(params))
    wanted = quantized(params, config, kind)
    for host_bytes, block_bytes in ((1, 2**20), (300, 100), (2**26, 1000)):
        monkeypatch.setattr("jaxprompt.t5.quantized._BLOCK_BYTES", block_bytes)
        for place in ("hf", "t5x"):
            found = load_params(tmp_path / place, config, quantize=kind, host_bytes=host_bytes)
            assert_same_tree(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_of_bfloat16_files_the_scales_are_float32(kind: str, tmp_path: Path):
    params = make_params(DEEP)
    save_hf(tmp_path, params, DEEP, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    found = load_params(tmp_path, DEEP, dtype="bfloat16", quantize=kind)
    floats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), rounded)
    wanted = quantized(floats, DEEP, kind)
    for path, leaf in flatten(wanted).items():
        if not quantize.is_quantized(leaf):
            leaf = np.asarray(leaf, ml_dtypes.bfloat16)
        assert_same_tree({"leaf": flatten(found)[path]}, {"leaf": leaf})


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_parts_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scales of divided inputs take the largest of all of them, groups may be cut in two."""
    monkeypatch.setattr("jaxprompt.t5.quantized._BLOCK_BYTES", 500)
    config = dataclasses.replace(DEEP, num_heads=4, d_ff=24)
    save_hf(tmp_path / "float", make_params(config), config)
    convert_hf(
        tmp_path / kind, open_weights(tmp_path / "float"), config,
        quantization={"quantize": kind, "fingerprint": "0"},
    )  # fmt: skip
    wanted = load_params(tmp_path / "float", config, quantize=kind)
    for data, model, over_data in ((1, 2, False), (2, 2, True)):
        specs = param_specs(config, kind)
        shardings = tree_shardings(make_mesh(data, model), specs, over_data)
        for name in ("float", kind):
            found = load_params(tmp_path / name, config, quantize=kind, shardings=shardings)
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
            assert_same_tree(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_holds_one_tensor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Less than that: codes, and a block of it as floats. Never a float copy of it."""
    monkeypatch.setattr(quantize, "GROUP", 128)
    monkeypatch.setattr("jaxprompt.t5.quantized._BLOCK_BYTES", 2**18)
    monkeypatch.setattr(placing, "_taken_over", lambda dtype, platform: False)
    big = T5Config(vocab_size=64, d_model=256, d_kv=64, num_heads=2, d_ff=4096, num_layers=2,
                   num_decoder_layers=2)  # fmt: skip
    save_hf(tmp_path / "float", make_params(big), big)
    load_params(tmp_path / "float", big, quantize=kind, host_bytes=1)  # compiles
    tensor = big.d_model * big.d_ff * 4
    tracemalloc.start()
    params = load_params(tmp_path / "float", big, quantize=kind, host_bytes=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    convert_hf(
        tmp_path / "out", open_weights(tmp_path / "float"), big, shard_bytes=1,
        quantization={"quantize": kind, "fingerprint": "0"},
    )  # fmt: skip
    _, writing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(peak, writing) < tensor
    assert size_in_bytes(params) < 16 * tensor / 3.5  # less than 16 such, four times smaller


# ---- saved once ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_quantised_is_what_loading_would_make(kind: str, source: Path, tmp_path: Path):
    out = convert(source, tmp_path / "out", kind)
    made, saved = jp.load_backbone(str(source), quantize=kind), jp.load_backbone(str(out))
    assert made.quantize == saved.quantize == kind
    assert_same_tree(saved.params, made.params)
    assert saved.config == made.config
    assert saved.fingerprint == made.fingerprint == fingerprint(source)
    again = convert(out, tmp_path / "again", None)
    for name in ("quantized.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_many_shards(kind: str, tmp_path: Path):
    params = make_params(DEEP)
    save_hf(tmp_path / "float", params, DEEP)
    files = open_weights(tmp_path / "float")
    entry = {"quantize": kind, "fingerprint": "0"}
    convert_hf(tmp_path / "out", files, DEEP, shard_bytes=700, quantization=entry)
    index = json.loads((tmp_path / "out" / "quantized.safetensors.index.json").read_text())
    stored = {
        name: tensor for file in set(index["weight_map"].values())
        for name, tensor in read_safetensors(tmp_path / "out" / file).items()
    }  # fmt: skip
    assert len(set(index["weight_map"].values())) > 10 and stored.keys() == {*index["weight_map"]}
    size = sum(tensor.read().nbytes for tensor in stored.values())
    assert index["metadata"]["total_size"] == size
    assert_same_tree(
        load_params(tmp_path / "out", DEEP, quantize=kind), quantized(params, DEEP, kind)
    )


def test_what_a_quantised_directory_holds(source: Path, tmp_path: Path):
    """The format is written down in docs/int8.md; whoever changes it breaks people's files."""
    raw = json.loads((convert(source, tmp_path / "int8", "int8") / "config.json").read_text())
    assert raw["quantization_config"] == {
        "quant_method": "jaxprompt", "quantize": "int8", "fingerprint": fingerprint(source),
    }  # fmt: skip
    heads, width = CONFIG.num_heads * CONFIG.d_kv, CONFIG.d_model
    stored = read_safetensors(tmp_path / "int8" / "quantized.safetensors")
    seen = {name: (tensor.dtype.name, tensor.shape) for name, tensor in stored.items()}
    query = "encoder/layers_0/attention/query/kernel"
    assert seen[query] == ("int8", (width, heads))
    assert seen[f"{query}_scale"] == ("float32", (1, heads))
    assert seen["token_embedder/embedding"] == ("int8", (CONFIG.vocab_size, width))
    assert seen["token_embedder/embedding_scale"] == ("float32", (CONFIG.vocab_size, 1))
    assert seen["encoder/encoder_norm/scale"] == ("float32", (width,))
    stored = read_safetensors(convert(source, tmp_path / "int4", "int4") / "quantized.safetensors")
    seen = {name: (tensor.dtype.name, tensor.shape) for name, tensor in stored.items()}
    assert seen[query] == ("uint8", (width, -(-heads // 2)))
    assert seen[f"{query}_scale"] == ("float32", (2, heads))
    assert seen["decoder/logits_dense/kernel"] == ("int8", (width, CONFIG.vocab_size))
    codes = load_params(tmp_path / "int4", CONFIG, quantize="int4")["encoder"]["layers"]
    codes = np.asarray(codes["attention"]["query"]["kernel"].qvalue, np.int8).reshape(width, heads)
    first = int(stored[query].read()[0, 0])
    assert [first & 15, first >> 4] == [int(code) & 15 for code in codes[0, :2]]


@pytest.mark.parametrize("kind", KINDS)
def test_float_again_is_codes_times_scales(kind: str, source: Path, tmp_path: Path):
    out = convert(source, tmp_path / "out", kind)
    quantised = jp.load_backbone(str(out))
    floats = jp.load_backbone(str(out), quantize="none")
    assert floats.quantize == "none"
    assert_same_tree(floats.params, as_floats(quantised.params))
    written = jp.load_backbone(str(convert(out, tmp_path / "written", "none")))
    assert_same_tree(written.params, floats.params)
    assert written.fingerprint != quantised.fingerprint == floats.fingerprint
    rows = quantised.embedding_rows([3, 9])
    np.testing.assert_array_equal(rows, floats.embedding_rows([3, 9]))


def test_one_kind_can_be_made_of_the_other(source: Path, tmp_path: Path):
    out = convert(source, tmp_path / "out", "int8")
    found = jp.load_backbone(str(out), quantize="int4")
    floats = as_floats(load_params(out, CONFIG, quantize="int8"))
    wanted = quantized(floats, CONFIG, "int4")
    for path in ("encoder", "decoder"):
        assert_same_tree(found.params[path]["layers"], wanted[path]["layers"])


def test_the_command(source: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "out"
    assert cli.main(["convert", str(source), str(out), "--quantize", "int8"]) == 0
    assert "int8 and float32, fingerprint" in capsys.readouterr().out
    prompt = write_prompt(tmp_path / "prompt", source)
    rows = write_rows(tmp_path / "rows.jsonl", tiny_backbone.make_rows(3))
    argv = ["predict", str(prompt), "--input", str(rows), "--output", "-", "--json"]
    said = []
    for options in (["--backbone", str(out)], ["--quantize", "int8"]):
        assert cli.main([*argv, *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count("\n") == 3


def test_transformers_finds_nothing_that_it_would_misread(source: Path, tmp_path: Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = convert(source, tmp_path / "out", "int8")
    with pytest.raises(OSError, match="no file named"):
        transformers.T5ForConditionalGeneration.from_pretrained(out)


# ---- prompts ---------------------------------------------------------------------------------


def test_a_prompt_goes_with_the_float_and_the_quantised_backbone(source: Path, tmp_path: Path):
    prompt = make_prompt(source)
    texts = ["a good film", "the food was bad"]
    out = convert(source, tmp_path / "out", "int8")
    scores = [
        jp.score(jp.load_backbone(str(place), quantize=kind), prompt, texts, ["negative", "travel"])
        for place, kind in ((source, None), (source, "int8"), (out, None))
    ]
    np.testing.assert_array_equal(scores[1], scores[2])
    assert 0 < np.abs(scores[1] - scores[0]).max() < 0.2


def test_mini_loses_less_than_a_hundredth(monkeypatch: pytest.MonkeyPatch):
    """Log-likelihood of demo answers; docs/int8.md has the measurement over whole data sets."""
    monkeypatch.setattr(quantize, "GROUP", 128)
    inputs = [
        "The zip broke on the first day.", "A wonderful film with a moving end.",
        "Could you send the other half of my order?", "The room was loud and the bed was hard.",
    ]  # fmt: skip
    losses = {}
    for kind in ("none", *KINDS):
        backbone = jp.load_backbone("jaxprompt-mini", quantize=kind)
        losses[kind] = -jp.score(backbone, None, inputs, ["positive", "review", "the"]).mean()
    assert abs(losses["int8"] / losses["none"] - 1) < 0.01
    assert 1e-5 < abs(losses["int4"] / losses["none"] - 1) < 0.1


# ---- refused ---------------------------------------------------------------------------------


def spoil(directory: Path, **changes: Any) -> None:
    """Puts other tensors into a file, or takes them out (None)."""
    file = directory / "quantized.safetensors"
    tensors = {name: np.array(tensor.read()) for name, tensor in read_safetensors(file).items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    write_safetensors(file, tensors)


TABLE, SCALE = "token_embedder/embedding", "token_embedder/embedding_scale"
CODES = np.ones((CONFIG.vocab_size, CONFIG.d_model), np.int8)
SPOILED = {
    "scales are missing": ({SCALE: None}, "of int8 instead of floating point"),
    "codes are missing": ({TABLE: None}, "missing: token_embedder/embedding; unknown"),
    "scales of another shape": ({SCALE: np.ones((7, 1), np.float32)}, "do not fit each other"),
    "scales of one axis": ({SCALE: np.ones(144, np.float32)}, "do not fit each other"),
    "scales of float16": ({SCALE: np.ones((144, 1), np.float16)}, "do not fit each other"),
    "unknown scales": ({"other_scale": np.ones(1, np.float32)}, "unknown: other_scale"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_codes_and_scales_that_do_not_fit_are_named(case: str, source: Path, tmp_path: Path):
    changes, told = SPOILED[case]
    out = convert(source, tmp_path / "out", "int8")
    spoil(out, **changes)
    with pytest.raises(UserError, match=told) as error:
        jp.load_backbone(str(out))
    assert "quantized.safetensors" in str(error.value)


def test_weights_and_config_of_different_kinds_are_refused(source: Path, tmp_path: Path):
    eight, four = (convert(source, tmp_path / kind, kind) for kind in KINDS)
    for place, config, told in (
        (eight, four, "the weights beside it are int8; they do not belong together"),
        (four, source, "the weights beside it are int4"),
        (source, eight, "the weights beside it are float"),
    ):
        mixed = tmp_path / f"{place.name}-{config.name}"
        mixed.mkdir()
        file = "model.safetensors" if place == source else "quantized.safetensors"
        for name, where in ((file, place), ("config.json", config)):
            (mixed / name).write_bytes((where / name).read_bytes())
        with pytest.raises(UserError, match=told):
            read_config(mixed)


def test_weights_that_another_program_quantised_are_refused(source: Path, tmp_path: Path):
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"quantised by 'gptq', which cannot be read.*backbone\."):
        jp.load_backbone(str(tmp_path))


def test_kinds_that_there_are_not(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match="it can be none, int8, int4"):
        jp.load_backbone(str(source), quantize="int2")
    with pytest.raises(UserError, match="it can be none, int8, int4"):
        convert(source, tmp_path / "out", "fp8")


def test_quantised_parameters_are_not_written_from_memory(source: Path, tmp_path: Path):
    params = jp.load_backbone(str(source), quantize="int8").params
    with pytest.raises(UserError, match="jaxprompt convert --quantize"):
        save_hf(tmp_path / "out", params, CONFIG)
    assert not (tmp_path / "out").exists()


def test_what_trains_weights_refuses_codes():
    task = "task={name: t, input: '{text}', target: '{label}'}"
    with pytest.raises(UserError, match=r"tune: model trains .* leave out backbone.quantize"):
        jp.load_config("quickstart", [task, "tune=model", "backbone.quantize=int8"])
    with pytest.raises(UserError, match=r"pretraining trains .* leave out backbone.quantize"):
        from jaxprompt.config import PretrainConfig, load_config

        load_config("pretrain/nano", ["backbone.quantize=int4"], PretrainConfig)
    with pytest.raises(UserError, match=r"backbone.quantize"):
        jp.load_config("quickstart", ["backbone.quantize=int2"])
