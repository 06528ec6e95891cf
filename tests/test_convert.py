"""`jaxprompt convert`: the same answers in the Hugging Face layout, whatever the source."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from disks import small_disk
from t5x_writer import scanned_tree, t5x_tree, write_orbax, write_t5x
from tiny import make_params
from tiny_backbone import CONFIG, write_backbone
from tiny_tokenizer import write_tokenizer

import jaxprompt as jp
from jaxprompt import cli
from jaxprompt.t5 import backbones
from jaxprompt.t5.backbones import fingerprint, read_config
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weight_names import Layout, weight_table
from jaxprompt.t5.weights import convert_hf, load_params, save_hf
from jaxprompt.trees import flatten, unflatten
from jaxprompt.typing import UserError

DEEP = dataclasses.replace(
    CONFIG, num_layers=3, num_decoder_layers=2, relative_attention_max_distance=128
)
SQUARE = dataclasses.replace(DEEP, d_kv=4)
RELU = dataclasses.replace(SQUARE, gated=False, activation="relu")
CONFIGS = {
    "heads x head size is not d_model": DEEP,
    "square kernels": SQUARE,
    "T5 1.0": dataclasses.replace(RELU, tie_word_embeddings=True, scale_decoder_outputs=True),
    "own biases": dataclasses.replace(SQUARE, per_layer_relative_bias=True, model_type="umt5"),
}
IDS = np.asarray([[5, 9, 3, 7, 1, 0], [8, 4, 1, 0, 0, 0]]), np.asarray([[0, 6, 2], [0, 11, 30]])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(directory)
    return directory


def convert(capsys: Any, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["convert", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("write", ["layers", "scanned", "orbax"])
@pytest.mark.parametrize("case", CONFIGS)
def test_t5x_answers_as_the_model_it_was_made_of(
    case: str, write: str, vocabulary: Path, tmp_path: Path, capsys: Any
):
    config, source = CONFIGS[case], tmp_path / "checkpoint_7"
    params = make_params(config, seed=3)
    if write == "layers":
        write_t5x(source, t5x_tree(params))
    elif write == "scanned":
        write_t5x(source, scanned_tree(params, "same"))
    else:
        write_orbax(source, t5x_tree(params), use_ocdbt=True)
    save_hf(tmp_path / "ours", params, config, vocabulary)
    out = tmp_path / "out"
    code, told, err = convert(capsys, source, out, "--tokenizer", vocabulary, "--json")
    assert (code, err) == (0, "")
    assert json.loads(told)["fingerprint"] == fingerprint(tmp_path / "ours")
    logits = [np.asarray(jp.logits(jp.load_backbone(str(place)), None, *IDS))
              for place in (tmp_path / "ours", out)]  # fmt: skip
    assert np.abs(logits[0]).max() > 0.1
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)
    assert read_config(out) == config


def test_square_kernels_would_answer_otherwise_transposed(vocabulary: Path, tmp_path: Path):
    """That the test above sees it: the same checkpoint, its square kernels turned round."""
    params, turned = make_params(SQUARE, seed=3), t5x_tree(make_params(SQUARE, seed=3))
    for name in [name for name in turned if "attention" in name and name.endswith("kernel")]:
        turned[name] = turned[name].T
    save_hf(tmp_path / "ours", params, SQUARE, vocabulary)
    write_t5x(tmp_path / "source", turned)
    convert_hf(tmp_path / "out", open_weights(tmp_path / "source"), SQUARE, vocabulary)
    logits = [np.asarray(jp.logits(jp.load_backbone(str(tmp_path / place)), None, *IDS))
              for place in ("ours", "out")]  # fmt: skip
    assert np.abs(logits[1] - logits[0]).max() > 1e-2


def test_what_is_said(vocabulary: Path, tmp_path: Path, capsys: Any):
    source = write_t5x(tmp_path / "checkpoint_7", t5x_tree(make_params(DEEP)))
    code, out, err = convert(capsys, source, tmp_path / "out")
    assert code == 0 and "has no tokenizer" in err and err.count("\n") == 1
    assert "3 + 2 layers, d_model 12, 3 heads of 5, float32, fingerprint" in out
    assert out.count("\n") == 1
    (tmp_path / "hf").mkdir()
    code, out, err = convert(capsys, source, tmp_path / "hf", "--tokenizer", vocabulary)
    assert (code, err) == (0, "") and jp.load_backbone(str(tmp_path / "hf")).tokenizer.size == 135


@pytest.mark.parametrize(("asked", "expected"), [(None, "bfloat16"), ("float32", "float32")])
def test_numbers_are_stored_as_they_were_or_as_asked(
    asked: str | None, expected: str, tmp_path: Path, capsys: Any
):
    target = {k: v.astype(ml_dtypes.bfloat16) for k, v in t5x_tree(make_params(DEEP)).items()}
    source = write_t5x(tmp_path / "source", target)
    options = ["--dtype", asked] if asked else []
    assert convert(capsys, source, tmp_path / "out", *options)[0] == 0
    tensors = open_weights(tmp_path / "out").tensors
    assert {stored.dtype.name for stored in tensors.values()} == {expected}
    for path, leaf in flatten(load_params(tmp_path / "out", DEEP)).items():
        expected_leaf = flatten(make_params(DEEP))[path].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(leaf, expected_leaf.astype(np.float32), path)


def test_a_backbone_in_the_usual_layout(tmp_path: Path, capsys: Any):
    source, out = write_backbone(tmp_path), tmp_path / "out"
    assert convert(capsys, source, out, "--dtype", "bfloat16")[0::2] == (0, "")
    assert fingerprint(out) == fingerprint(source)
    assert read_config(out) == read_config(source)
    assert jp.load_backbone(str(out)).tokenizer.size == jp.load_backbone(str(source)).tokenizer.size


def test_flax_weights(tmp_path: Path, capsys: Any):
    source, out = tmp_path / "source", tmp_path / "out"
    save_hf(source, make_params(SQUARE), SQUARE)
    stored = open_weights(source).tensors
    flat = {
        weight.stored_name(Layout.FLAX): stored[weight.name].read().T.copy()
        if weight.word == "kernel"
        else stored[weight.name].read()
        for weight in weight_table(SQUARE)
    }
    content = flax.serialization.msgpack_serialize(unflatten(flat))
    (source / "flax_model.msgpack").write_bytes(content)
    (source / "model.safetensors").unlink()
    assert convert(capsys, source, out)[0] == 0
    for path, leaf in flatten(load_params(out, SQUARE)).items():
        np.testing.assert_array_equal(leaf, flatten(make_params(SQUARE))[path], path)


def test_a_config_takes_the_place_of_what_shapes_say(tmp_path: Path, capsys: Any):
    source = write_t5x(tmp_path / "source", t5x_tree(make_params(DEEP)))
    config = dataclasses.replace(DEEP, activation="silu", layer_norm_epsilon=1e-5, eos_id=2)
    (tmp_path / "c.json").write_text(json.dumps(config.to_hf()))
    assert convert(capsys, source, tmp_path / "out", "--config", tmp_path / "c.json")[0] == 0
    assert read_config(tmp_path / "out") == config


def test_scaling_of_tied_logits_is_t5x_s_whatever_the_config_says(tmp_path: Path, capsys: Any):
    source = write_t5x(tmp_path / "source", t5x_tree(make_params(CONFIGS["T5 1.0"])))
    (tmp_path / "c.json").write_text(json.dumps(RELU.to_hf()))
    assert convert(capsys, source, tmp_path / "out", "--config", tmp_path / "c.json")[0] == 0
    assert read_config(tmp_path / "out") == CONFIGS["T5 1.0"]


def test_a_sentencepiece_file_is_a_tokenizer(tmp_path: Path, capsys: Any):
    pieces = backbones.resolve_backbone(backbones.MINI) / "spiece.model"
    size = jp.load_backbone(backbones.MINI).tokenizer.size
    for rows, code in ((size + 3, 0), (size - 1, 2)):
        config = T5Config(vocab_size=rows, d_model=4, d_kv=3, d_ff=4, num_layers=1,
                          num_decoder_layers=1, num_heads=2)  # fmt: skip
        source = write_t5x(tmp_path / f"source{rows}", t5x_tree(make_params(config)))
        out = tmp_path / f"out{rows}"
        got, _, err = convert(capsys, source, out, "--tokenizer", pieces)
        assert got == code and out.exists() == (code == 0), err
    assert f"the tokenizer has {size} tokens, the backbone's embedding table {size - 1} rows" in err
    assert jp.load_backbone(str(tmp_path / f"out{size + 3}")).tokenizer.size == size


def test_nothing_is_overwritten(tmp_path: Path, capsys: Any):
    source = write_t5x(tmp_path / "source", t5x_tree(make_params(DEEP)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, err = convert(capsys, source, tmp_path / "out")
    assert (code, out) == (2, "") and "it is not empty" in err
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    assert convert(capsys, source, tmp_path / "file")[0] == 2
    assert convert(capsys, source, tmp_path / "file" / "out")[0] == 2


def test_a_full_disk(tmp_path: Path, capsys: Any):
    source = write_t5x(tmp_path / "source", t5x_tree(make_params(DEEP)))
    with small_disk(tmp_path / "disk", "16k") as disk:
        code, out, err = convert(capsys, source, disk / "out")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "No space left on device; free some space" in err
        assert list(disk.iterdir()) == []


def test_a_checkpoint_named_as_a_backbone_says_what_to_do(tmp_path: Path):
    write_t5x(tmp_path, t5x_tree(make_params(DEEP)))
    with pytest.raises(UserError, match="`jaxprompt convert` makes one of a T5X checkpoint"):
        jp.load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("nowhere/", [], "'nowhere/' is no directory and no hub name"),
        ("run", [], "run holds several steps of a run; name one, as run/checkpoint_12"),
        ("empty", [], "empty: holds no weights"),
        ("run/checkpoint_12", ["--tokenizer", "empty"], "empty has no tokenizer"),
        ("run/checkpoint_12", ["--tokenizer", "gone"], "gone is not a directory"),
        ("run/checkpoint_12", ["--config", "gone"], "gone: is no config.json"),
        ("run/checkpoint_12", ["--config", "list"], "list: is no config.json"),
        (
            "run/checkpoint_12",
            ["--config", "wrong"],
            "decoder/relpos_bias/rel_embedding [3, 8] ins",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(
    source: str, options: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    for step in (2, 12):
        write_t5x(Path("run", f"checkpoint_{step}"), t5x_tree(make_params(DEEP)))
    Path("empty").mkdir()
    Path("list").write_text("[]")
    Path("wrong").write_text(json.dumps(dataclasses.replace(DEEP, num_heads=5, d_kv=3).to_hf()))
    code, out, err = convert(capsys, source, "out", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not Path("out").exists()


def test_a_shard_at_a_time_is_held(tmp_path: Path):
    big = T5Config(vocab_size=64, d_model=128, d_kv=64, num_heads=2, d_ff=2048, num_layers=8,
                   num_decoder_layers=8)  # fmt: skip
    source, out = tmp_path / "source", tmp_path / "out"
    save_hf(source, make_params(big), big)
    files, tensor = open_weights(source), big.d_model * big.d_ff * 4
    tracemalloc.start()
    convert_hf(out, files, big, shard_bytes=2 * tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(out.glob("model-*.safetensors"))) > 20
    assert peak < 3 * tensor < (source / "model.safetensors").stat().st_size / 12
    assert fingerprint(out) == fingerprint(source)
