"""Damaged, hostile and foreign T5X checkpoints: one sentence each, and nothing written."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from t5x_writer import scanned_tree, t5x_tree, write_orbax, write_t5x
from tiny import make_params

from jaxprompt import cli
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.t5x_config import derive_config
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weights import load_params
from jaxprompt.typing import UserError

CONFIG = T5Config(
    vocab_size=23, d_model=12, d_kv=5, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8,
)  # fmt: skip
QUERY = "target.encoder.layers_0.attention.query.kernel"


def change(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Changes the metadata of an array."""

    def spoil(directory: Path) -> None:
        path = directory / name / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return spoil


def spoil_tree(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes the msgpack tree."""

    def spoil(directory: Path) -> None:
        path = directory / "checkpoint"
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        change(tree)
        path.write_bytes(flax.serialization.msgpack_serialize(tree))

    return spoil


def query(tree: dict) -> dict:
    return tree["optimizer"]["target"]["encoder"]["layers_0"]["attention"]["query"]


def cut(directory: Path) -> None:
    chunk = directory / QUERY / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing leaf": (
        spoil_tree(lambda tree: query(tree).clear()),
        "encoder/layers_0/attention/query/kernel",
    ),
    "a missing leaf of a later layer": (
        spoil_tree(lambda t: t["optimizer"]["target"]["decoder"]["layers_1"]["mlp"].pop("wo")),
        "missing: decoder/layers_1/mlp/wo/kernel",
    ),
    "an unknown leaf": (
        spoil_tree(lambda tree: tree["optimizer"]["target"].update(x=np.ones(3, np.float32))),
        "unknown: x",
    ),
    "a leaf of another shape": (
        spoil_tree(lambda t: t["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["wo"].update(
            kernel=np.ones((12, 16), np.float32))),
        "encoder/layers_1/mlp/wo/kernel [12, 16] instead of [16, 12]",
    ),
    "a leaf of integers": (
        spoil_tree(lambda tree: query(tree).update(kernel=np.ones((12, 20), np.uint16))),
        "query/kernel of uint16 instead of floating point numbers",
    ),
    "no array where the tree says one": (
        lambda directory: shutil.rmtree(directory / QUERY), f"{QUERY}: there is no such array"
    ),
    "a missing chunk": (lambda directory: (directory / QUERY / "1.1").unlink(), "is missing"),
    "a truncated chunk": (cut, f"{QUERY}: cannot be read, it may be damaged"),
    "a chunk of something else": (
        lambda directory: (directory / QUERY / "0.0").write_bytes(b"hello"), "may be damaged"
    ),
    "an absurd shape": (change(QUERY, "shape", [10**15, 20]), "more than this machine's memory"),
    "absurd chunks": (change(QUERY, "chunks", [10**14, 20]), "more than this machine's memory"),
    "a compressor that is none": (change(QUERY, "compressor", {"id": "evil"}), "may be damaged"),
    "objects": (change(QUERY, "dtype", "|O"), "may be damaged"),
    "an array elsewhere": (
        spoil_tree(lambda tree: query(tree)["kernel"]["kvstore"].update(path="..")),
        "refused to read the array '..'",
    ),
    "another driver": (
        spoil_tree(lambda tree: query(tree)["kernel"].update(driver="json")), "driver 'json'"
    ),
    "an unknown version": (
        spoil_tree(lambda tree: tree.update(version=4)),
        "has version 4 of the T5X format; versions 2 and 3 can be read",
    ),
    "no version": (spoil_tree(lambda tree: tree.pop("version")), "names no version"),
    "no model": (
        spoil_tree(lambda tree: tree["optimizer"].pop("target")), "no T5X checkpoint of a model"
    ),
    "a tree that is none": (
        lambda directory: (directory / "checkpoint").write_bytes(b"model_checkpoint_path: x"),
        "checkpoint: is no T5X checkpoint, or damaged",
    ),
    "an empty tree": (lambda directory: (directory / "checkpoint").write_bytes(b""), "cannot be"),
    "a tree cut short": (
        lambda d: (d / "checkpoint").write_bytes((d / "checkpoint").read_bytes()[:-5]), "cut short"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_is_one_sentence(case: str, tmp_path: Path, capsys: Any):
    spoil, said = SPOILT[case]
    source = write_t5x(tmp_path / "checkpoint_3", t5x_tree(make_params(CONFIG)))
    spoil(source)
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint_3"]


def spoil_json(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes Orbax's metadata."""

    def spoil(state: Path) -> None:
        metadata = json.loads((state / "_METADATA").read_text())
        change(metadata)
        (state / "_METADATA").write_text(json.dumps(metadata))

    return spoil


def cut_database(state: Path) -> None:
    for file in state.glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:-40])


def elsewhere(metadata: dict) -> None:
    for entry in metadata["tree_metadata"].values():
        entry["key_metadata"][-1]["key"] += "/../x"


SPOILT_ORBAX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda state: (state / "_METADATA").write_text("{"), "is no T5X checkpoint, or"),
    "a list": (lambda state: (state / "_METADATA").write_text("[]"), "is no T5X checkpoint, or"),
    "no tree": (spoil_json(dict.clear), "it has no `target`"),
    "no model": (spoil_json(lambda m: m["tree_metadata"].clear()), "it has no `target`"),
    "names that lead elsewhere": (spoil_json(elsewhere), "refused to read the array"),
    "the other zarr": (spoil_json(lambda m: m.update(use_zarr3=True)), "there is no such array"),
    "no database": (lambda state: (state / "manifest.ocdbt").unlink(), "there is no such array"),
    "a database that is cut short": (cut_database, "state/target."),
}


@pytest.mark.parametrize("case", SPOILT_ORBAX)
def test_what_is_wrong_with_orbax_is_one_sentence(case: str, tmp_path: Path):
    spoil, said = SPOILT_ORBAX[case]
    source = write_orbax(tmp_path / "checkpoint_3", t5x_tree(make_params(CONFIG)))
    spoil(source / "state")
    with pytest.raises(UserError) as caught:
        load_params(source, CONFIG)
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder/layers/pre_mlp_layer_norm/scale", (12,)),
        ("encoder/layers/mlp/wo/kernel", (16, 0, 12)),
        ("encoder/layers/mlp/wo/kernel", (0, 4000, 12)),
        ("token_embedder/embedding", (0, 12)),
        ("encoder/relpos_bias/rel_embedding", (0, 8)),
        ("encoder/relpos_bias/rel_embedding", (3, 8)),
        ("token_embedder/embedding", (12,)),
    ],
)
def test_shapes_that_are_none_of_a_t5(name: str, shape: tuple[int, ...], tmp_path: Path):
    target = scanned_tree(make_params(CONFIG)) | {name: np.ones(shape, np.float32)}
    write_t5x(tmp_path, target, inline=lambda name: True)
    with pytest.raises(UserError, match=r"has shape|are not 3 heads"):
        derive_config(open_weights(tmp_path))


def test_a_leaf_under_two_names(tmp_path: Path):
    target = scanned_tree(make_params(CONFIG))
    double = {"encoder/encoder/mlp/wo/kernel": target["encoder/layers/mlp/wo/kernel"]}
    write_t5x(tmp_path, target | double, inline=lambda name: True)
    with pytest.raises(UserError, match="mlp/wo/kernel is there under two names"):
        open_weights(tmp_path)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_a_damaged_tree_never_does_more_than_raise(data: st.DataObject, intact: Path):
    content = bytearray((intact / "checkpoint").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "checkpoint").write_bytes(content)
        with contextlib.suppress(UserError):
            derive_config(open_weights(directory))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = t5x_tree(make_params(CONFIG))
    return write_t5x(tmp_path_factory.mktemp("intact"), target, inline=lambda name: True)
