"""Where backbones come from: fingerprints, directories, the hub, known names."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from stored_backbones import (
    CONFIG,
    WRITERS,
    random_state,
    save,
    write_config,
)

from jaxprompt.t5 import weights
from jaxprompt.t5.backbones import (
    PACKAGED,
    Packaged,
    fingerprint,
    list_backbones,
    local_directory,
    planned_config,
    resolve_backbone,
)
from jaxprompt.typing import UserError


def test_the_fingerprint_is_of_the_weights_not_of_the_files(tmp_path: Path):
    state = random_state(CONFIG)
    prints = {
        fingerprint(save(tmp_path / name, state, CONFIG, writer))
        for name, writer in WRITERS.items()
    }
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    prints.add(fingerprint(save(tmp_path / "half", half)))
    other = dataclasses.replace(CONFIG, dropout_rate=0.0)
    prints.add(fingerprint(save(tmp_path / "dropout", state, other)))
    assert len(prints) == 1 and len(prints.pop()) == 32


def test_the_fingerprint_tells_models_apart(tmp_path: Path):
    state = random_state(CONFIG)
    norm = "decoder.final_layer_norm.weight"
    layers = [f"encoder.block.{n}.layer.0.layer_norm.weight" for n in (0, 1)]
    variants = {
        "same": (state, CONFIG),
        "one value": (state | {norm: state[norm] * np.float32([1, 1, 1, 1, 1, 1.01])}, CONFIG),
        "layers": (state | {layers[0]: state[layers[1]], layers[1]: state[layers[0]]}, CONFIG),
        "activation": (state, dataclasses.replace(CONFIG, activation="silu")),
        "scaling": (state, dataclasses.replace(CONFIG, scale_decoder_outputs=True)),
        "seed": (random_state(CONFIG, seed=1), CONFIG),
    }
    prints = {
        fingerprint(save(tmp_path / name, variant, config))
        for name, (variant, config) in variants.items()
    }
    assert len(prints) == len(variants)


def test_local_backbones_are_found(tmp_path: Path, monkeypatch: Any):
    directory = save(tmp_path / "mine", random_state(CONFIG))
    assert resolve_backbone(str(directory)) == directory
    monkeypatch.chdir(tmp_path)
    assert resolve_backbone("mine").resolve() == directory


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_backbone_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: Any):
    assert PACKAGED[name].directory.parts[-3:] == ("jaxprompt", "assets", name.split("-")[1])
    directory = save(tmp_path / "packaged", random_state(CONFIG))
    monkeypatch.setitem(PACKAGED, name, Packaged(directory, ""))
    assert resolve_backbone(name) == local_directory(name) == directory
    assert planned_config(name) == CONFIG


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_backbone_that_is_missing_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setitem(PACKAGED, name, Packaged(tmp_path / name, ""))
    hub = _Hub(monkeypatch, save(tmp_path / "cached", random_state(CONFIG)), ["config.json"])
    for find in (resolve_backbone, planned_config):
        with pytest.raises(UserError, match=f"{tmp_path / name} is missing from this installation"):
            find(name)
    assert local_directory(name) is None and not hub.asked


@pytest.mark.parametrize(
    "name, message",
    [
        ("./nowhere", "is no directory and no hub name"),
        ("/a/b/c", "is no directory and no hub name"),
        ("a b", "is no directory and no hub name"),
        ("empty", "holds no config.json, so it is not a backbone"),
    ],
)
def test_backbones_that_are_none(name: str, message: str, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve_backbone(name)


class _Hub:
    """Stands in for the hub: which files it lists, what is in the cache, what was asked of it."""

    def __init__(self, monkeypatch: Any, cache: Path, files: list[str] | None):
        self.asked: list[dict[str, Any]] = []
        self.files, self.cache = files, cache
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def model_info(self, name: str, revision: str | None) -> SimpleNamespace:
        if self.files is None:
            raise OSError("Name or service not known\nmore about it")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append(options)
        if not self.cache.is_dir():
            raise OSError("not in the cache")
        return str(self.cache)


@pytest.mark.parametrize(
    "files, weights_asked",
    [
        (["pytorch_model.bin", "model.safetensors", "tf_model.h5"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (["flax_model.msgpack"], ["flax_model.msgpack"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
            ["pytorch_model.bin.index.json", "pytorch_model-*.bin"],
        ),
    ],
)
def test_one_format_of_weights_is_downloaded(
    files: list[str], weights_asked: list[str], tmp_path: Path, monkeypatch: Any
):
    hub = _Hub(monkeypatch, tmp_path, ["config.json", "spiece.model", *files])
    assert resolve_backbone("google/t5-small-lm-adapt", "abc") == tmp_path
    (asked,) = hub.asked
    assert asked["revision"] == "abc"
    assert asked["allow_patterns"] == ["config.json", *weights.TOKENIZER_FILES, *weights_asked]


def test_without_a_network_the_cache_is_used(tmp_path: Path, monkeypatch: Any):
    directory = save(tmp_path / "cached", random_state(CONFIG))
    hub = _Hub(monkeypatch, directory, None)
    assert resolve_backbone("owner/model") == directory
    assert hub.asked == [{"revision": None, "local_files_only": True}]


@pytest.mark.parametrize("cached", ["nothing", "config only"])
def test_without_network_and_cache_the_error_says_how_to_go_on(
    cached: str, tmp_path: Path, monkeypatch: Any
):
    if cached == "config only":
        write_config(tmp_path / "cached", CONFIG)
    _Hub(monkeypatch, tmp_path / "cached", None)
    with pytest.raises(UserError) as caught:
        resolve_backbone("google/t5-xxl-lm-adapt")
    message = str(caught.value)
    assert "'google/t5-xxl-lm-adapt'" in message and "(Name or service not known)" in message
    assert "give a directory that holds config.json" in message


def test_a_repository_without_weights_is_no_backbone(tmp_path: Path, monkeypatch: Any):
    _Hub(monkeypatch, tmp_path, ["config.json", "tf_model.h5"])
    with pytest.raises(UserError, match="no weights in a format that can be read"):
        resolve_backbone("owner/model")


def test_known_backbones_are_listed_in_one_line_each():
    known = list_backbones()
    assert list(known)[:2] == ["jaxprompt-mini", "jaxprompt-nano"]
    assert {"google/t5-xxl-lm-adapt", "google/flan-ul2", "google/umt5-base"} <= known.keys()
    assert all("\n" not in line and "{" not in name for name, line in known.items())
