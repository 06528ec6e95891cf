"""Inspection: nearest tokens by definition, what is shown, and what needs no backbone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_backbone import CONFIG, make_prompt, write_backbone

import jaxprompt as jp
from jaxprompt.artifact import BackboneIdentity, PromptArtifact, save_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.cli import main
from jaxprompt.inspection import nearest_tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def backbone(directory: Path) -> Backbone:
    return jp.load_backbone(str(directory))


@pytest.fixture(scope="module")
def prompt(directory: Path) -> PromptArtifact:
    return make_prompt(directory, recipe="paper", steps=600, metrics={"accuracy": 91.24})


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, argv)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_nearest_tokens_by_cosine(backbone: Backbone, prompt: PromptArtifact):
    table = np.asarray(backbone.params["token_embedder"]["embedding"])[: backbone.tokenizer.size]
    assert len(table) < CONFIG.vocab_size, "rows beyond the vocabulary are never shown"
    slots = prompt.values["prompt"]
    norms = np.linalg.norm(slots, axis=1)[:, None] * np.linalg.norm(table, axis=1)
    cosines = (slots @ table.T) / norms
    for slot, told in enumerate(nearest_tokens(prompt, top=4)):
        best = np.argsort(-cosines[slot])[:4]
        assert told["slot"] == slot
        assert told["norm"] == pytest.approx(np.linalg.norm(slots[slot]), abs=1e-4)
        assert [near["id"] for near in told["nearest"]] == best.tolist()
        assert [near["cosine"] for near in told["nearest"]] == pytest.approx(
            cosines[slot, best], abs=1e-4
        )
        assert [near["token"] for near in told["nearest"]] == [
            backbone.tokenizer.piece(token) for token in best
        ]


def test_a_slot_that_is_a_token_finds_it(backbone: Backbone, prompt: PromptArtifact):
    words = [backbone.tokenizer.encode(word)[0] for word in ("food", "film", "bad")] * 50
    values = {"prompt": 3 * backbone.embedding_rows(words)}
    method = {"name": "soft", "length": len(words)}
    told = nearest_tokens(dataclasses.replace(prompt, values=values, method=method), top=1)
    assert [slot["nearest"][0]["id"] for slot in told] == words
    assert all(slot["nearest"][0]["cosine"] == pytest.approx(1, abs=1e-3) for slot in told)


def test_command(
    directory: Path, prompt: PromptArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved = save_artifact(tmp_path / "prompt", prompt)
    code, out, err = run(capsys, saved, "--json", "--top", 2)
    assert code == 0 and err == "" and out.count("\n") == 1
    told = json.loads(out)
    assert told["method"]["name"] == "soft" and told["parameters"] == prompt.values["prompt"].size
    assert told["bytes"] == sum(file.stat().st_size for file in saved.iterdir())
    assert told["backbone"]["fingerprint"] == prompt.backbone.fingerprint
    assert told["task"] == "tiny" and told["candidates"][2] == "about food"
    assert told["training"]["steps"] == 600
    assert [len(slot["nearest"]) for slot in told["slots"]] == [2, 2, 2]
    code, out, err = run(capsys, saved)
    assert code == 0 and err == ""
    for shown in (
        "soft, 3 slots, layout {prompt}{input}", "36 parameters (prompt 3 x 12 float32)",
        str(directory), prompt.backbone.fingerprint, "tiny: negative, terrible, about food",
        "recipe paper", "steps 600", "accuracy 91.2", told["slots"][2]["nearest"][0]["token"],
    ):  # fmt: skip
        assert shown in out


def test_without_the_backbone_all_but_the_tokens_is_shown(
    prompt: PromptArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    gone = BackboneIdentity(str(tmp_path / "gone"), "0" * 32, CONFIG.d_model, 144)
    saved = save_artifact(tmp_path / "prompt", dataclasses.replace(prompt, backbone=gone))
    np.save(tmp_path / "bare.npy", prompt.values["prompt"])
    for path, why in ((saved, "gone"), (tmp_path / "bare.npy", "does not say which backbone")):
        code, out, err = run(capsys, path, "--json")
        told = json.loads(out)
        assert code == 0 and "slots" not in told and told["parameters"] == 36
        assert "no nearest tokens" in err and why in err
        assert run(capsys, path)[0] == 0


def test_another_backbone(
    directory: Path,
    prompt: PromptArtifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    saved = save_artifact(tmp_path / "prompt", prompt)
    np.save(tmp_path / "bare.npy", prompt.values["prompt"])
    other = write_backbone(tmp_path, seed=1)
    code, out, err = run(capsys, saved, "--backbone", other)
    assert code == 2 and out == "" and str(directory) in err and str(other) in err
    assert run(capsys, saved, "--backbone", tmp_path / "gone")[0] == 2
    code, out, _ = run(capsys, saved, "--backbone", other, "--allow-other-backbone", "--json")
    assert code == 0 and len(json.loads(out)["slots"]) == 3
    code, out, _ = run(capsys, tmp_path / "bare.npy", "--backbone", other, "--json")
    assert code == 0 and len(json.loads(out)["slots"]) == 3
    code, _, err = run(capsys, "none")
    assert code == 2 and "no prompt to inspect" in err
