"""The artifact: same bytes for the same prompt, whole or not at all, wrong ones refused by name."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxprompt import artifact as artifact_room
from jaxprompt.artifact import (
    BackboneIdentity,
    PromptArtifact,
    check_backbone,
    load_artifact,
    save_artifact,
)
from jaxprompt.typing import UserError

SMALL = BackboneIdentity(name="google/t5-small", fingerprint="a" * 64, d_model=6, vocab_size=32128)


def make(seed=0, **changes):
    values = np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)
    prompt = PromptArtifact(
        method={"name": "soft", "length": 4, "init": "labels"},
        layout="{prompt:3}review: {text}{prompt}",
        task={"name": "sst2", "input": "{text}", "candidates": ["négatif", "positive"]},
        backbone=SMALL,
        values={"prompt": values},
        lengths={"max_input_length": 20, "max_target_length": 4},
        training={"recipe": "paper", "steps": 10, "metrics": {"accuracy": 0.1 + 0.2}},
    )
    return dataclasses.replace(prompt, **changes)


def assert_equal(left, right):
    assert dataclasses.replace(left, values={}) == dataclasses.replace(right, values={})
    assert left.values.keys() == right.values.keys()
    for name, value in left.values.items():
        assert value.dtype == right.values[name].dtype
        assert value.tobytes() == right.values[name].tobytes()


def test_round_trip(tmp_path):
    save_artifact(tmp_path / "runs" / "prompt", make())
    loaded = load_artifact(tmp_path / "runs" / "prompt")
    assert_equal(loaded, make())
    assert loaded.path == str(tmp_path / "runs" / "prompt")
    assert sorted(os.listdir(tmp_path / "runs" / "prompt")) == [
        "prompt.safetensors",
        "prompt_config.json",
    ]
    assert os.listdir(tmp_path / "runs") == ["prompt"]


def test_several_values_of_several_types_and_layouts_in_memory(tmp_path):
    values = {
        "b/keys": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        "a": np.asarray([1.5, -2.0], np.float16),
        "scalar": np.asarray(3.0, np.float32),
    }
    save_artifact(tmp_path / "p", make(values=values))
    loaded = load_artifact(tmp_path / "p").values
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value)


def test_the_same_prompt_gives_the_same_bytes_in_any_order(tmp_path):
    prompt = make(values={"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32)})
    turned = dataclasses.replace(
        prompt,
        method=dict(reversed(prompt.method.items())),
        values=dict(reversed(prompt.values.items())),
    )
    for name, each in (("one", prompt), ("two", turned)):
        save_artifact(tmp_path / name, each)
    for name in ("prompt.safetensors", "prompt_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / "prompt_config.json").read_text(encoding="utf-8")
    assert "négatif" in text and text.endswith("}\n")


def test_the_bytes_of_the_format_do_not_drift(tmp_path):
    """Version 1, byte for byte; if this has to change, so has `format_version`."""
    prompt = PromptArtifact(
        method={"name": "soft", "length": 1},
        layout="{prompt}{input}",
        task={},
        backbone=BackboneIdentity("b", "f", 2, 8),
        values={"prompt": np.asarray([[1.0, -2.0]], np.float32)},
    )
    save_artifact(tmp_path / "p", prompt)
    header = b'{"__metadata__":{"format":"np"},'
    header += b'"prompt":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    weights = len(header).to_bytes(8, "little") + header + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert (tmp_path / "p" / "prompt.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "p" / "prompt_config.json").read_text()) == {
        "format_version": 1,
        "method": {"name": "soft", "length": 1},
        "layout": "{prompt}{input}",
        "task": {},
        "backbone": {"name": "b", "fingerprint": "f", "d_model": 2, "vocab_size": 8},
        "lengths": {},
        "training": {},
        "values": {"prompt": {"dtype": "float32", "shape": [1, 2]}},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def test_a_new_prompt_replaces_the_old_one(tmp_path):
    save_artifact(tmp_path / "p", make(0))
    save_artifact(tmp_path / "p", make(1))
    assert_equal(load_artifact(tmp_path / "p"), make(1))
    assert os.listdir(tmp_path) == ["p"]


def test_a_prompt_a_killed_replacement_put_aside_is_found(tmp_path):
    save_artifact(tmp_path / ".p.previous", make())
    assert_equal(load_artifact(tmp_path / "p"), make())
    save_artifact(tmp_path / "p", make(1))
    assert_equal(load_artifact(tmp_path / "p"), make(1))
    assert os.listdir(tmp_path) == ["p"]


def test_killed_at_any_moment_it_is_the_old_or_the_new_prompt(tmp_path):
    script = textwrap.dedent("""
        import sys, numpy as np
        from jaxprompt.artifact import BackboneIdentity, PromptArtifact, save_artifact
        print("ready", flush=True)
        for step in range(1, 100_000):
            save_artifact(sys.argv[1], PromptArtifact(
                method={"name": "soft", "length": 4}, layout="{prompt}{input}", task={},
                backbone=BackboneIdentity("b", "f", 6, 8), training={"steps": step},
                values={"prompt": np.full((4, 6), step, np.float32)},
            ))
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "p")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(artifact_room.__file__).parents[1])},
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        seen = set()
        while len(seen) < 5:
            if (tmp_path / "p").exists():
                seen.add(load_consistent(tmp_path / "p"))
        writer.send_signal(signal.SIGKILL)
    assert load_consistent(tmp_path / "p") >= max(seen)
    save_artifact(tmp_path / "p", make())
    assert os.listdir(tmp_path) == ["p"]


def load_consistent(path):
    """Loads while another process replaces; a swap between two reads may look like damage."""
    for _ in range(100):
        try:
            loaded = load_artifact(path)
        except UserError:
            continue
        assert (loaded.values["prompt"] == loaded.training["steps"]).all()
        return loaded.training["steps"]
    raise AssertionError("no prompt could be read")


@pytest.mark.parametrize("shape", [(100, 768), (1, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("name", ["sst2.npy", "encoder.prompt.prompt.prompt"])
def test_bare_arrays_of_the_original(tmp_path, shape, dtype, name):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    with (tmp_path / name).open("wb") as stream:
        np.save(stream, array)
    loaded = load_artifact(tmp_path / name)
    assert loaded.method == {"name": "soft", "length": shape[0]}
    assert loaded.layout == "{prompt}{input}" and loaded.task == {}
    assert loaded.backbone == BackboneIdentity(d_model=shape[1])
    assert loaded.values["prompt"].dtype == np.float32
    np.testing.assert_array_equal(loaded.values["prompt"], array.astype(np.float32))
    save_artifact(tmp_path / "kept", loaded)
    assert_equal(load_artifact(tmp_path / "kept"), loaded)


def write_npy(path, array):
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda path: write_npy(path, np.ones(3, np.float32)),
            "holds a float32 array of shape (3,)",
        ),
        (lambda path: write_npy(path, np.ones((2, 2), np.int64)), "holds a int64 array"),
        (lambda path: write_npy(path, np.ones((0, 2), np.float32)), "is empty, of shape (0, 2)"),
        (lambda path: write_npy(path, np.full((2, 2), np.nan)), "not finite"),
        (lambda path: write_npy(path, np.full((2, 2), 1e300)), "not finite"),
        (
            lambda path: write_npy(path, np.asarray([[object()]])),
            "is damaged: Object arrays cannot",
        ),
        (lambda path: write_npy(path, np.ones((2, 2))) or os.truncate(path, 140), "is damaged: "),
        (lambda path: write_npy(path, np.ones((2, 2))) or os.truncate(path, 20), "is damaged: "),
        (lambda path: path.write_bytes(b"PK\x03\x04 a zip"), "is no prompt: neither a directory"),
        (lambda path: path.write_bytes(b""), "is no prompt: neither a directory"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, spoil, words):
    spoil(tmp_path / "x.npy")
    with pytest.raises(UserError) as caught:
        load_artifact(tmp_path / "x.npy")
    assert words in str(caught.value) and str(tmp_path / "x.npy") in str(caught.value)


def edit(directory, **changes):
    config = json.loads((directory / "prompt_config.json").read_text())
    config |= changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "prompt_config.json").write_text(json.dumps(kept))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def corrupt_header(directory):
    """A header that is not one, under a digest that fits."""
    weights = (99).to_bytes(8, "little") + b"{"
    (directory / "prompt.safetensors").write_bytes(weights)
    edit(directory, weights_sha256=hashlib.sha256(weights).hexdigest())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: shutil.rmtree(p), "no prompt at"),
        (lambda p: (p / "prompt_config.json").unlink(), "it has no prompt_config.json"),
        (lambda p: (p / "prompt.safetensors").unlink(), "it has no prompt.safetensors"),
        (lambda p: cut(p / "prompt_config.json", 40), "prompt_config.json is damaged: not JSON"),
        (lambda p: (p / "prompt_config.json").write_bytes(b"\xff"), "is damaged: not JSON"),
        (lambda p: (p / "prompt_config.json").write_text("[]"), "format_version is not a number"),
        (lambda p: edit(p, format_version=None), "format_version is not a number"),
        (lambda p: edit(p, origin=[]), "origin should be a dict and is []"),
        (lambda p: edit(p, format_version=2), "has format_version 2, this jaxprompt reads up to 1"),
        (lambda p: edit(p, layout=None), "layout should be a str and is None"),
        (lambda p: edit(p, task=[1]), "task should be a dict and is [1]"),
        (lambda p: edit(p, backbone={"name": "x"}), "backbone.fingerprint is None"),
        (lambda p: edit(p, values={}), "names {}"),
        (lambda p: cut(p / "prompt.safetensors", -1), "is damaged or of another prompt"),
        (lambda p: cut(p / "prompt.safetensors", 0), "is damaged or of another prompt"),
        (lambda p: flip(p / "prompt.safetensors", 3), "is damaged or of another prompt"),
        (lambda p: flip(p / "prompt.safetensors", -3), "is damaged or of another prompt"),
        (corrupt_header, "prompt.safetensors is damaged: "),
        (
            lambda p: shutil.move(p / "prompt_config.json", p / "adapter_config.json"),
            "is a PEFT adapter, not a prompt artifact: bring it in with `jaxprompt import",
        ),
    ],
)
def test_damaged_artifacts_are_refused(tmp_path, spoil, words):
    save_artifact(tmp_path / "prompt", make())
    spoil(tmp_path / "prompt")
    with pytest.raises(UserError) as caught:
        load_artifact(tmp_path / "prompt")
    assert words in str(caught.value) and str(tmp_path / "prompt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_artifact_can_be_named_by_either_of_its_files(tmp_path):
    save_artifact(tmp_path / "p", make())
    assert_equal(load_artifact(tmp_path / "p" / "prompt.safetensors"), make())
    assert_equal(load_artifact(tmp_path / "p" / "prompt_config.json"), make())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.full((2, 2), np.inf, np.float32), "value 'prompt' of the prompt holds numbers"),
        (np.zeros((2, 0), np.float32), "is empty"),
        (np.zeros((2, 2), np.int32), "is int32; a prompt is one of float32"),
    ],
)
def test_a_useless_prompt_is_not_written(tmp_path, value, words):
    save_artifact(tmp_path / "p", make())
    with pytest.raises(UserError) as caught:
        save_artifact(tmp_path / "p", make(values={"prompt": value}))
    assert words in str(caught.value)
    assert_equal(load_artifact(tmp_path / "p"), make())


def test_other_things_are_never_written_over(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("kept")
    with pytest.raises(UserError, match=r"home: it also holds thesis\.tex"):
        save_artifact(tmp_path / "home", make())
    with pytest.raises(UserError, match="a file stands there"):
        save_artifact(tmp_path / "home" / "thesis.tex", make())
    assert (tmp_path / "home" / "thesis.tex").read_text() == "kept"
    assert os.listdir(tmp_path) == ["home"]
    (tmp_path / "empty").mkdir()
    assert_equal(load_artifact(save_artifact(tmp_path / "empty", make())), make())


def test_a_failed_write_leaves_the_old_prompt(tmp_path, monkeypatch):
    save_artifact(tmp_path / "p", make(0))

    def full(self, content, encoding=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'p'}: No space left"):
        save_artifact(tmp_path / "p", make(1))
    monkeypatch.undo()
    assert_equal(load_artifact(tmp_path / "p"), make(0))
    assert os.listdir(tmp_path) == ["p"]


def test_the_right_backbone_passes_whatever_it_is_called():
    check_backbone(make(), "google/t5-small", "a" * 64, 6)
    check_backbone(make(), "some/directory", "a" * 64, 6)


@pytest.mark.parametrize("allow_other", [False, True])
def test_another_backbone(allow_other):
    prompt = make(path="runs/sst2/prompt")
    if allow_other:
        check_backbone(prompt, "google/t5-other", "b" * 64, 6, allow_other=True)
        return
    with pytest.raises(UserError) as caught:
        check_backbone(prompt, "google/t5-other", "b" * 64, 6)
    assert str(caught.value) == (
        "prompt runs/sst2/prompt was trained with backbone google/t5-small (fingerprint "
        "aaaaaaaaaaaa), this is google/t5-other (fingerprint bbbbbbbbbbbb): use the backbone it "
        "was trained with, or allow another one with --allow-other-backbone"
    )


@pytest.mark.parametrize("allow_other", [False, True])
def test_another_width_is_never_allowed(allow_other):
    with pytest.raises(UserError, match="the prompt has d_model 6, backbone t5-large has 1024"):
        check_backbone(make(), "t5-large", "b" * 64, 1024, allow_other)


def test_a_prompt_of_unknown_backbone_only_has_to_fit():
    check_backbone(make(backbone=BackboneIdentity(d_model=6)), "any", "b" * 64, 6)
    with pytest.raises(UserError, match="has d_model 6, backbone any has 7"):
        check_backbone(make(backbone=BackboneIdentity(d_model=6)), "any", "b" * 64, 7)
