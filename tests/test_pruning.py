"""XPrompt: importance against its definition, what stays, and both trainings of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import World, assert_same_end, compiled, losses, saved_state, snapshot, world

from jaxprompt import cli, pruning
from jaxprompt.artifact import load_artifact
from jaxprompt.backbone import load_backbone
from jaxprompt.losses import cross_entropy
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.prompts.xprompt import most_important, piece_mask
from jaxprompt.sharding import make_mesh
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.tensorfile import read_safetensors
from jaxprompt.train import train
from jaxprompt.trainee import make_trainee, train_batches
from jaxprompt.trees import merge, split
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

OPTIONS = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "optim.recipe=adamw",
    "optim.learning_rate=0.05", "optim.schedule=constant", "optim.warmup_steps=0",
    "backbone.dropout=0.1", "data.row_multiple=2",
]  # fmt: skip
METHOD = ["method.name=xprompt", "method.length=4", "method.pieces=4", "method.scored=16"]


def test_what_stays_is_the_best_and_of_each_slot_its_best_piece():
    assert most_important(np.array([1.0, 3, 3, 0, 2]), 3) == [1, 2, 4]
    scores = np.array([[9.0, 8, 7, 6], [1, 2, 3, 3], [5, 5, 0, 0]])
    assert piece_mask(scores, 3).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert piece_mask(scores, 6).tolist() == [[1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert piece_mask(scores, 12).all()


def test_importance_is_the_mean_size_of_slopes_of_masks(world: World, tmp_path: Path):
    """Each example by itself, by differences of its loss."""
    config = world.load(tmp_path / "run", *OPTIONS, *METHOD)
    whole = pruning.unpruned(config)
    backbone, mesh = load_backbone(config.backbone.name), make_mesh(1)
    rows_PD = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    method: Any = config.method
    found_P, found_PK = pruning.importance(whole, backbone, mesh, rows_PD, method)
    on_two = load_backbone(config.backbone.name, mesh=make_mesh(2))
    spread = pruning.importance(whole, on_two, make_mesh(2), rows_PD, method)
    np.testing.assert_allclose(spread[0], found_P, rtol=1e-5)
    np.testing.assert_allclose(spread[1], found_PK, rtol=1e-4, atol=1e-6)
    data = dataclasses.replace(whole.data, packing=False)
    batches = train_batches(
        make_trainee("", dataclasses.replace(whole, data=data), backbone), 1, (0, 1)
    )
    first = [next(batches) for _ in range(2)]
    batches.close()
    graphdef, _, frozen = split(PromptedT5(backbone.module(), SoftPrompt(jnp.asarray(rows_PD))))

    @jax.jit
    def row_losses(rows_PD: Any, batch: Any) -> Any:
        logits_BTV = merge(graphdef, {"method": {"prompt": rows_PD}}, frozen)(batch)
        loss_BT = cross_entropy(logits_BTV, batch.targets_BT) * batch.loss_weights_BT
        return loss_BT.sum(1) / batch.loss_weights_BT.sum(1)

    def slopes(mask_PD: np.ndarray, size: float = 0.01) -> np.ndarray:
        up, down = (
            np.concatenate([row_losses(rows_PD * (1 + sign * size * mask_PD), b) for b in first])
            for sign in (1, -1)
        )
        return (up - down) / (2 * size)

    for slot in range(4):
        mask_PD = np.zeros_like(rows_PD)
        mask_PD[slot] = 1
        np.testing.assert_allclose(found_P[slot], np.abs(slopes(mask_PD)).mean(), rtol=0.02)
        for piece in range(4):
            mask_PD[:] = 0
            mask_PD[slot, 4 * piece : 4 * piece + 4] = 1
            want = np.abs(slopes(mask_PD)).mean()
            np.testing.assert_allclose(found_PK[slot, piece], want, rtol=0.05, atol=1e-4)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its first training to the end of its second."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(world.load(directory, *OPTIONS, *METHOD))
    return directory


def test_a_run_trains_prunes_rewinds_and_trains_again(whole: Path, capsys):
    kept = read_safetensors(whole / "tuned" / "pruned.safetensors")
    kept = {name: np.array(tensor.read()) for name, tensor in kept.items()}
    slots, mask_PK = kept["slots"], kept["mask"]
    assert len(slots) == 2 and mask_PK.sum() == 4 and mask_PK.any(1).all()
    assert min(kept["slot_scores"][slots]) >= max(np.delete(kept["slot_scores"], slots))
    first = load_artifact(whole / "tuned" / "best").values["prompt"][slots]
    np.testing.assert_array_equal(kept["kept"], first.reshape(8, 4)[mask_PK.reshape(-1) > 0])
    _, arrays, _ = saved_state(whole)
    assert arrays["trained/method/kept"].shape == (4, 4)
    assert not np.array_equal(arrays["trained/method/kept"], kept["kept"])
    artifact = load_artifact(whole / "prompt")
    assert artifact.method["name"] == "soft" and artifact.method["length"] == 2
    assert artifact.training["method"]["keep_tokens"] == 0.5
    pieces = artifact.values["prompt"].reshape(8, 4)
    assert pieces.any(1).tolist() == (mask_PK.reshape(-1) > 0).tolist()
    capsys.readouterr()
    assert cli.main(["evaluate", str(whole / "prompt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"]["value"] == artifact.training["metrics"]["accuracy"]


def test_broken_off_in_its_first_training_it_ends_the_same(
    whole: Path, world: World, tmp_path: Path
):
    """And what is pruned stays pruned when the run is made longer."""
    own = world.load(tmp_path / "broken", *OPTIONS, *METHOD)
    half = dataclasses.replace(own, train=dataclasses.replace(own.train, steps=2))
    train(pruning.unpruned(half))
    train(own)
    assert_same_end(tmp_path / "broken" / "tuned", whole / "tuned")
    assert_same_end(tmp_path / "broken", whole)
    tuned = snapshot(tmp_path / "broken" / "tuned")
    train(dataclasses.replace(own, train=dataclasses.replace(own.train, steps=6)))
    assert snapshot(tmp_path / "broken" / "tuned") == tuned
    assert len(losses(tmp_path / "broken")) == 6
    with pytest.raises(UserError, match="rewind trained, now first"):
        train(world.load(tmp_path / "broken", *OPTIONS, *METHOD, "method.rewind=first"))


def test_runs_of_a_sweep_train_twice_and_rewind_to_where_they_are_told(
    whole: Path, world: World, tmp_path: Path
):
    options = [*OPTIONS, *METHOD, "sweep.method.rewind=[first]"]
    plan = load_sweep(world.config, [f"output_dir={tmp_path / 'sweep'}", *options])
    sweep(plan)
    own = Path(plan.runs[0].config.output_dir)
    assert losses(own / "tuned") == losses(whole / "tuned") and losses(own) != losses(whole)
    ours, theirs = (read_safetensors(one / "tuned" / "pruned.safetensors") for one in (own, whole))
    np.testing.assert_array_equal(ours["mask"].read(), theirs["mask"].read())
    assert not np.isin(ours["kept"].read(), theirs["kept"].read()).any()


WRONG = {
    "counted slots": (["layout={prompt:2}{input}{prompt:2}"], "one {prompt} without a count"),
    "two places": (["layout={prompt}{input}{prompt:1}"], "one {prompt} without a count"),
    "text": (["regularize.wayward=1", "regularize.wayward_text=good"], "takes slots out between"),
    "a teacher": (["distil.prompt=one"], "distil compares with a teacher in the same slots"),
    "pieces": (["method.pieces=5"], "method.pieces 5 does not divide the backbone's d_model 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_pruned_is_refused_before_training(case, world: World, tmp_path: Path):
    words, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        train(world.load(tmp_path / "run", *OPTIONS, *METHOD, *words))
    assert not (tmp_path / "run").exists()


def test_other_methods_train_by_themselves(world: World, tmp_path: Path):
    axes = "sweep.method={name: [xprompt, soft]}"
    plan = load_sweep(world.config, [f"output_dir={tmp_path / 'sweep'}", *OPTIONS, axes])
    with pytest.raises(UserError, match="shares no bank with soft"):
        sweep(plan)
