"""Pretraining runs of a tiny T5: mixtures, adaptation, the exported backbone, resumption."""

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from run_fixtures import (
    CONFIG,
    REST,
    compiled,
    losses,
    records,
    saved_state,
    snapshot,
    write_backbone,
    write_rows,
)
from tiny_tokenizer import WORDS, write_tokenizer

from jaxprompt import trees
from jaxprompt.backbone import load_backbone
from jaxprompt.config import PretrainConfig, load_config
from jaxprompt.data.pretraining import MixtureBatches
from jaxprompt.model import PromptedT5
from jaxprompt.pretrain import pretrain
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import T5
from jaxprompt.typing import UserError

__all__ = ["compiled"]  # a fixture

pretrain_module = importlib.import_module("jaxprompt.pretrain")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, rows, a vocabulary and the config of a mixture of all three objectives."""
    root = tmp_path_factory.mktemp("mixture")
    write_tokenizer(root / "vocabulary")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS.split(), 25)) for _ in range(40)]
    write_rows(root / "text.jsonl", ({"text": text} for text in texts))
    rows = [
        {"input": " ".join(draw.choice(REST.split(), 4)), "target": target}
        for target in ("positive", "negative film of food") * 30
    ]
    write_rows(root / "rows.jsonl", rows)
    write_backbone(root / "backbone")
    model = {k: v for k, v in dataclasses.asdict(CONFIG).items() if isinstance(v, int)}
    lengths = {"max_input_length": 16, "max_target_length": 10}
    text, rows_path = [str(root / "text.jsonl")], [str(root / "rows.jsonl")]
    supervised = {"objective": "supervised", "files": rows_path, **lengths}
    mapping = {
        "output_dir": str(root / "run"),
        "seed": 1,
        "tokenizer": str(root / "vocabulary"),
        "model": {**model, "gated": True, "activation": "gelu_new"},
        "mixture": {
            "batch_size": 4, "row_input_length": 32, "row_target_length": 16, "max_segments": 4,
            "entries": [
                {"objective": "span_corruption", "files": text, "weight": 0.3, **lengths},
                {"objective": "prefix_lm", "files": text, "weight": 0.2, **lengths},
                {**supervised, "weight": 0.5},
            ],
        },
        "validation": [supervised, {"objective": "prefix_lm", "files": text, **lengths}],
        "eval_batches": 2,
        "optim": {"recipe": "pretrain", "learning_rate": 0.05},
        "train": {"steps": 24, "eval_every": 8, "save_every": 4, "log_every": 1},
        "mesh": {"data": 1},
        "logging": {"terminal": False},
    }  # fmt: skip
    (root / "pretrain.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return root


def load(root: Path, output_dir: Path, *overrides: str) -> PretrainConfig:
    return load_config(
        root / "pretrain.yaml", [f"output_dir={output_dir}", *overrides], PretrainConfig
    )


@pytest.fixture(scope="module")
def done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "base"
    assert pretrain(load(root, directory)) == directory / "backbone"
    return directory


def test_the_loss_falls_on_every_objective(done: Path):
    told = losses(done)
    assert len(told) == 24 and np.mean(told[-4:]) < 0.8 * np.mean(told[:2])
    evaluations = [record for record in records(done) if "eval/supervised/loss" in record]
    assert [record["step"] for record in evaluations] == [8, 16, 24]
    for name in ("supervised", "prefix_lm"):
        assert evaluations[-1][f"eval/{name}/loss"] < evaluations[0][f"eval/{name}/loss"]
        assert 0 <= evaluations[-1][f"eval/{name}/exact_match"] <= 100
    assert evaluations[-1]["eval/supervised/accuracy"] > evaluations[0]["eval/supervised/accuracy"]


def test_the_directory_of_a_run(root: Path, done: Path):
    assert {path.name for path in done.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "backbone", "plots",
    }  # fmt: skip
    assert load_config(done / "config.yaml", (), PretrainConfig) == load(root, done)


def test_the_exported_backbone_is_what_was_trained(done: Path):
    step, arrays, _ = saved_state(done)
    assert step == 24
    backbone = load_backbone(str(done / "backbone"))
    assert backbone.config == CONFIG
    names = [name for name in arrays if name.startswith("trained/")]
    exported = trees.flatten(backbone.params)
    assert len(names) == len(exported)
    for path, leaf in exported.items():
        (name,) = [name for name in names if name.endswith(path)]
        np.testing.assert_array_equal(np.asarray(leaf), arrays[name])
    assert backbone.tokenizer.decode(backbone.tokenizer.encode("good film")) == "good film"


def test_it_can_be_exported_in_bfloat16(root: Path, tmp_path: Path):
    options = ["train.steps=1", "export_dtype=bfloat16", "validation=[]"]
    pretrain(load(root, tmp_path / "run", *options))
    whole = load_backbone(str(tmp_path / "run" / "backbone"))
    _, arrays, _ = saved_state(tmp_path / "run")
    (trained,) = [leaf for name, leaf in arrays.items() if name.endswith("embedder/embedding")
                  and name.startswith("trained/")]  # fmt: skip
    loaded = np.asarray(whole.params["token_embedder"]["embedding"])
    assert loaded.dtype == np.float32 and not np.array_equal(loaded, trained)
    np.testing.assert_allclose(loaded, trained, rtol=2**-8)
    assert "eval/" not in "".join(records(tmp_path / "run")[-1])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The next run ends like one that is killed, in the middle of a step."""
    taken, put = [], pretrain_module.shard_batch

    def interrupted(mesh: Any, batch: Any, **options: bool) -> Any:
        taken.append(1)
        if len(taken) > steps:
            raise KeyboardInterrupt
        return put(mesh, batch, **options)

    monkeypatch.setattr(pretrain_module, "shard_batch", interrupted)


@pytest.mark.parametrize("steps", [2, 7])
def test_interrupted_it_ends_as_if_unbroken(
    root: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            pretrain(load(root, run))
    assert losses(run) == losses(done)[: len(losses(run))]
    pretrain(load(root, run))
    assert records(run) == records(done)
    (step, arrays, metadata), (other_step, others, other_metadata) = map(saved_state, (run, done))
    assert step == other_step and metadata["data"] == other_metadata["data"]
    assert {k: v.tobytes() for k, v in arrays.items()} == {
        k: v.tobytes() for k, v in others.items()
    }
    assert snapshot(run / "backbone") == snapshot(done / "backbone")


def test_a_finished_run_does_nothing_more_and_says_so(root: Path, done: Path, capsys):
    before = {k: v for k, v in snapshot(done).items() if not k.startswith("plots/")}
    pretrain(load(root, done))
    assert "the run ended at step 24 already" in capsys.readouterr().err
    assert {k: v for k, v in snapshot(done).items() if not k.startswith("plots/")} == before


def test_another_model_in_the_directory_is_refused(root: Path, done: Path):
    with pytest.raises(UserError, match=r"trained with model\.d_ff 24, now 28"):
        pretrain(load(root, done, "model.d_ff=28"))


def test_a_backbone_is_adapted_to_language_modelling(root: Path, tmp_path: Path):
    """Lester et al. 2021, section 3.1.1: training goes on, on prefix language modelling alone."""
    entry = f"{{objective: prefix_lm, files: [{root / 'text.jsonl'}], max_input_length: 16, \
max_target_length: 10}}"
    options = [
        "model=null", "tokenizer=", f"backbone.name={root / 'backbone'}", "train.loss_by=tokens",
        f"mixture.entries=[{entry}]", f"validation=[{entry}, {entry}]", "train.steps=12",
        "train.eval_every=6", "optim.learning_rate=0.01",
    ]  # fmt: skip
    pretrain(load(root, tmp_path / "run", *options))
    before = load_backbone(str(root / "backbone"))
    after = load_backbone(str(tmp_path / "run" / "backbone"))
    assert after.config == before.config and after.fingerprint != before.fingerprint
    told = losses(tmp_path / "run")
    assert np.mean(told[-3:]) < np.mean(told[:2])
    # It began with the backbone's own weights, not with random ones.
    moved = np.abs(np.asarray(after.params["token_embedder"]["embedding"])
                   - np.asarray(before.params["token_embedder"]["embedding"]))  # fmt: skip
    assert 0 < moved.max() < 0.5
    first = next(record for record in records(tmp_path / "run") if "eval/prefix_lm/loss" in record)
    assert first["eval/prefix_lm_2/loss"] == first["eval/prefix_lm/loss"]  # every entry is told


def test_phases_run_one_after_another(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    mapping = yaml.safe_load((root / "pretrain.yaml").read_text(encoding="utf-8"))
    mapping |= {"phases": {"first": {}, "second": {"after": "first"}}, "validation": []}
    path = tmp_path / "phases.yaml"
    path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    words = [f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    args = argparse.Namespace(config=str(path), overrides=words, only=[])
    pretrain_module.main(args)
    weights = [
        trees.flatten(load_backbone(str(tmp_path / "run" / phase / "backbone")).params)
        for phase in ("first", "second")
    ]
    for name, leaf in weights[0].items():  # a step of rate 0.05 from there
        np.testing.assert_allclose(leaf, weights[1][name], atol=0.07)
    assert any(not np.array_equal(leaf, weights[1][name]) for name, leaf in weights[0].items())
    capsys.readouterr()
    pretrain_module.main(args)
    assert capsys.readouterr().err.count("the run ended at step 1 already") == 2

    ran = []  # a phase that was told to stop is not gone on from
    monkeypatch.setattr(pretrain_module, "_run", lambda config: bool(ran.append(config)))
    pretrain_module.main(args)
    assert len(ran) == 1


@pytest.mark.parametrize("loss_by", ["tokens", "examples"])
def test_what_the_loss_is_averaged_over(root: Path, tmp_path: Path, loss_by: str):
    config = load(
        root, tmp_path / "run", "train.steps=1", f"train.loss_by={loss_by}", "validation=[]"
    )
    pretrain(config)
    tokenizer = load_backbone(str(root / "backbone")).tokenizer
    batches = MixtureBatches(config.mixture, tokenizer, seed=1, start_id=0)
    batch = next(batches)
    batches.close()
    params = init_params(CONFIG, jax.random.key(1))
    logits = np.asarray(PromptedT5(T5(CONFIG, params))(batch), np.float64)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, batch.targets_BT[..., None], axis=-1)[..., 0]
    nats, counts = log_z - picked, batch.loss_weights_BT > 0
    if loss_by == "tokens":
        expected = nats[counts].mean()
    else:
        segments = [
            nats[row][(batch.decoder_segments_BT[row] == segment) & counts[row]].mean()
            for row in range(len(nats))
            for segment in range(1, batch.decoder_segments_BT[row].max() + 1)
        ]
        assert len(segments) > len(nats)  # several examples in a row
        expected = np.mean(segments)
    np.testing.assert_allclose(losses(tmp_path / "run"), [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mixture.entries=[]"], "mixture.entries is empty"),
        (["train.epochs=2", "train.steps=0"], "train.epochs has no meaning for a mixture"),
        (["train.accumulate=3"], "mixture.batch_size 4 does not divide into train.accumulate 3"),
        (["model.vocab_size=20"], "tokens, model.vocab_size is only 20"),
        (["mixture.entries.0.files=[nowhere.jsonl]"], "there is no file nowhere.jsonl"),
        (["validation.0.files=[nowhere.jsonl]"], "there is no file nowhere.jsonl"),
        (["validation.0.max_input_length=99"], "cannot hold the entries' examples of up to 99"),
        (["tokenizer=nowhere"], "nowhere is not a directory with a tokenizer in it"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    root: Path, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(UserError) as caught:
        pretrain(load(root, tmp_path / "run", *overrides))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
