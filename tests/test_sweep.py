"""Prompts trained side by side: each ends as its own run does, whatever becomes of the others."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_fixtures import World, compiled, losses, records, saved_state, world

from jaxprompt import compiled as compiled_module
from jaxprompt.artifact import load_artifact
from jaxprompt.cli import main
from jaxprompt.config import RunConfig, load_config
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import Sweep, load_sweep
from jaxprompt.training import train, train_together
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

training_module = importlib.import_module("jaxprompt.training")

TOLERANCE = 1e-5  # float32: relative for losses, absolute for prompts; 3e-7 and 2e-6 were measured


def plan(world: World, output_dir: Path, *overrides: str) -> Sweep:
    return load_sweep(world.config, [f"output_dir={output_dir}", *overrides])


def prompt_of(directory: Path, name: str = "prompt") -> np.ndarray:
    return load_artifact(directory / name).values["prompt"]


def alone(config: RunConfig, output_dir: Path) -> Path:
    """A member's own run, elsewhere."""
    train(dataclasses.replace(config, output_dir=str(output_dir)))
    return output_dir


def assert_like_alone(config: RunConfig, own: Path) -> None:
    """A member's results are those of its own run, up to rounding."""
    together = Path(config.output_dir)
    np.testing.assert_allclose(losses(together), losses(own), rtol=TOLERANCE)
    np.testing.assert_allclose(prompt_of(together), prompt_of(own), atol=TOLERANCE)
    told, expected = ([r for r in records(run) if "eval/accuracy" in r] for run in (together, own))
    assert told == expected
    assert (
        load_artifact(together / "best").training["steps"]
        == (load_artifact(own / "best").training["steps"])
    )


def test_each_prompt_ends_as_its_own_run_over_200_steps(world: World, tmp_path: Path):
    made = plan(
        world, tmp_path / "sweep", "train.steps=200", "train.eval_every=50", "train.log_every=1",
        "sweep={seed: [0, 1], optim.learning_rate: [0.05, 0.2]}",
    )  # fmt: skip
    assert len(made.runs) == 4
    sweep(made)
    for run in (made.runs[0], made.runs[3]):
        own = alone(run.config, tmp_path / run.name)
        assert_like_alone(run.config, own)


DIFFERENT = [
    {},
    {"optim": {"recipe": "adamw", "learning_rate": 0.05}, "seed": 1},
    {"optim": {"recipe": "google-oss", "learning_rate": 0.1}, "data": {"batch_size": 4}},
    {"backbone": {"dropout": 0.2}, "seed": 2},
    {"backbone": {"dropout": 0.2}, "seed": 5, "method": {"init": "labels"}},
    {"method": {"length": 6}},
    {"data": {"packing": False}, "train": {"loss_by": "examples", "steps": 9}},
    {
        "task": {
            "input": "text: {text}",
            "target": "{label}",
            "candidates": ["negative", "positive"],
        }
    },
]


def different(world: World, root: Path) -> list[RunConfig]:
    """Configs that differ in recipe, batch, dropout, layout of rows, loss, steps and task."""
    configs = []
    for number, changes in enumerate(DIFFERENT):
        mapping = yaml.safe_load(world.config.read_text(encoding="utf-8"))
        for section, own in changes.items():
            mapping[section] = {**mapping.get(section, {}), **own} if isinstance(own, dict) else own
        path = root / f"{number}.yaml"
        path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        configs.append(load_config(path, [f"output_dir={root / 'together' / str(number)}"]))
    return configs


def test_prompts_of_different_recipes_batches_and_tasks(world: World, tmp_path: Path):
    configs = different(world, tmp_path)
    names = [str(number) for number in range(len(configs))]
    results = train_together(configs, names, str(tmp_path / "together"))
    assert [result.steps for result in results] == [20, 20, 20, 20, 20, 20, 9, 20]
    for name, config in zip(names, configs, strict=True):
        own = alone(config, tmp_path / f"alone-{name}")
        assert_like_alone(config, own)


def test_the_files_and_table_of_a_sweep(world: World, tmp_path: Path, capsys):
    words = [str(world.config), f"output_dir={tmp_path / 'sweep'}",
             "sweep={seed: [0, 1], optim.learning_rate: [0.1, 0.3]}"]  # fmt: skip
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    rows = [line.split("  ") for line in said.splitlines() if line.startswith("optim.learning")]
    assert [row[0] for row in rows] == ["optim.learning_rate 0.1", "optim.learning_rate 0.3"]
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    for setting, row in zip(told["settings"], rows, strict=True):
        own = [run["score"] for run in told["runs"] if setting["name"].endswith(
            str(run["values"]["optim.learning_rate"]))]  # fmt: skip
        assert len(own) == setting["runs"] == 2 and setting["diverged"] == 0
        assert setting["mean"] == pytest.approx(np.mean(own))
        assert setting["stdev"] == pytest.approx(np.std(own, ddof=1))
        assert setting["best"] == max(own)
        assert f"{setting['mean']:.1f}" in row and f"{setting['best']:.1f}" in " ".join(row)
    for run in told["runs"]:
        found = {path.name for path in Path(run["prompt"]).parent.iterdir()}
        assert found == {"config.yaml", "metrics.jsonl", "best", "prompt", "plots"}
        assert run["metrics"] == load_artifact(run["prompt"]).training["metrics"]
        repeat = load_config(Path(run["prompt"]).parent / "config.yaml")
        assert repeat.seed == run["values"]["seed"]
    assert "jaxprompt evaluate " in said and "as an ensemble" in said
    means = records(tmp_path / "sweep")
    ours = [losses(Path(run["prompt"]).parent) for run in told["runs"]]
    np.testing.assert_allclose([r["loss"] for r in means if "loss" in r], np.mean(ours, axis=0))


def test_a_picture_of_a_sweep(world: World, tmp_path: Path):
    pytest.importorskip("matplotlib")
    result = sweep(plan(world, tmp_path / "sweep", "train.steps=2", "sweep.seed=[0,1]"))
    assert (tmp_path / "sweep" / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "sweep.png" in result.picture


def poison(monkeypatch: pytest.MonkeyPatch, prompt: int, step: int) -> None:
    """Makes one prompt's loss infinite at one step, inside the compiled program."""
    gradients = compiled_module.train_step.__globals__["gradients"]
    jnp = importlib.import_module("jax.numpy")

    def poisoned(graphdef: Any, options: Any, state: Any, frozen: Any, batch: Any) -> Any:
        grads, sums = gradients(graphdef, options, state, frozen, batch)
        here = (jnp.arange(len(state.live)) == prompt) & (state.step == step - 1)
        return grads, {**sums, "loss": jnp.where(here, jnp.inf, sums["loss"])}

    steps_module = importlib.import_module("jaxprompt.steps")
    monkeypatch.setattr(steps_module, "gradients", poisoned)
    monkeypatch.setattr(compiled_module, "gradients", poisoned)


def test_a_prompt_that_diverges_leaves_the_others_as_they_are(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    axes = "sweep={seed: [0, 1, 2, 3]}"
    with monkeypatch.context() as patch:  # the same program, but for when
        poison(patch, prompt=2, step=1000)
        well = sweep(plan(world, tmp_path / "well", axes))
    with monkeypatch.context() as patch:
        poison(patch, prompt=2, step=13)
        result = sweep(plan(world, tmp_path / "sweep", axes))
    assert [one.diverged for one in result.results.values()] == [0, 0, 13, 0]
    assert "seed-2: loss is not finite at step 13" in capsys.readouterr().err
    assert result.finished and result.settings[0].diverged == 1
    assert result.settings[0].names == ["seed-0", "seed-1", "seed-3"]
    for name, one in result.results.items():
        other = well.results[name]
        if name == "seed-2":
            assert losses(one.output_dir) == losses(other.output_dir)[:12]
            assert one.best_step == 10 and one.steps == 13
            kept = prompt_of(one.output_dir, "best")
            np.testing.assert_allclose(kept, prompt_of(one.output_dir), atol=0)
            continue
        np.testing.assert_allclose(losses(one.output_dir), losses(other.output_dir), rtol=1e-5)
        np.testing.assert_allclose(
            prompt_of(one.output_dir), prompt_of(other.output_dir), atol=1e-5
        )
    arrays = saved_state(tmp_path / "sweep")[1]
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_if_all_diverge_the_run_ends_with_an_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, prompt=0, step=3)
    poison(monkeypatch, prompt=1, step=3)
    with pytest.raises(UserError, match="every run of the sweep diverged, the first at step 3"):
        sweep(plan(world, tmp_path / "sweep", "sweep.seed=[0,1]"))


def test_prompts_stop_early_each_by_itself(world: World, tmp_path: Path, capsys):
    made = plan(
        world, tmp_path / "sweep", "train.steps=60", "train.eval_every=1", "train.save_every=0",
        "sweep={seed: [0, 1, 2], train.early_stopping: [2, 4]}",
    )  # fmt: skip
    result = sweep(made)
    steps = [one.steps for one in result.results.values()]
    assert len(set(steps)) > 2 and max(steps) < 60
    said = capsys.readouterr().err
    for run in made.runs[:4]:
        own = train(dataclasses.replace(run.config, output_dir=str(tmp_path / run.name)))
        one = result.results[run.name]
        assert (one.steps, one.best_step, one.metrics) == (own.steps, own.best_step, own.metrics)
        assert f"{run.name}: stopped early at step {own.steps}" in said
        np.testing.assert_allclose(
            prompt_of(one.prompt.parent), prompt_of(own.prompt.parent), atol=1e-4
        )


class Killed(BaseException):
    """A run that ends in the middle of a step."""


@pytest.mark.parametrize("after", [3, 14])
def test_a_sweep_that_was_killed_goes_on_to_the_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    options = ["sweep={seed: [0, 1, 2], train.steps: [8, 20]}", "backbone.dropout=0.1"]
    sweep(plan(world, tmp_path / "whole", *options))
    step, taken = compiled_module.CompiledStep.__call__, []

    def killed(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) > after:
            raise Killed
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(compiled_module.CompiledStep, "__call__", killed)
        with pytest.raises(Killed):
            sweep(plan(world, tmp_path / "broken", *options))
    sweep(plan(world, tmp_path / "broken", *options))
    left, right = tmp_path / "broken", tmp_path / "whole"
    assert saved_state(left)[0] == saved_state(right)[0] == 20
    pairs = zip(saved_state(left)[1].items(), saved_state(right)[1].items(), strict=True)
    assert all(a == b and x.tobytes() == y.tobytes() for (a, x), (b, y) in pairs)
    for run in plan(world, right, *options).runs:
        ours, theirs = left / "prompts" / run.name, Path(run.config.output_dir)
        assert records(ours) == records(theirs)
        for name in ("best", "prompt"):
            assert prompt_of(ours, name).tobytes() == prompt_of(theirs, name).tobytes()


def test_a_finished_sweep_is_read_not_repeated(world: World, tmp_path: Path, capsys):
    options = ["train.steps=4", "sweep.seed=[0,1]"]
    first = sweep(plan(world, tmp_path / "sweep", *options))
    capsys.readouterr()
    again = sweep(plan(world, tmp_path / "sweep", *options))
    assert "the run ended at step 4 already" in capsys.readouterr().err
    assert [one.metrics for one in again.results.values()] == [
        one.metrics for one in first.results.values()
    ]
    longer = sweep(plan(world, tmp_path / "sweep", "train.steps=6", "sweep.seed=[0,1]"))
    assert [one.steps for one in longer.results.values()] == [6, 6]


def test_some_at_a_time(world: World, tmp_path: Path):
    options = ["train.steps=5", "sweep.seed=[0,1,2]"]
    all_at_once = sweep(plan(world, tmp_path / "all", *options))
    in_turn = sweep(plan(world, tmp_path / "two", *options, "train.at_once=2"))
    assert list(in_turn.results) == ["seed-0", "seed-1", "seed-2"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "bank-0", "bank-1", "plots", "prompts", "sweep.json",
    }  # fmt: skip
    for name, one in in_turn.results.items():
        np.testing.assert_allclose(
            losses(one.output_dir), losses(all_at_once.results[name].output_dir), rtol=1e-5
        )


def test_a_bank_that_does_not_fit_says_how_many_would(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds = "sweep.seed=[0,1,2,3,4,5,6,7]"
    needed: list[int] = []
    free = compiled_module.free_bytes
    monkeypatch.setattr(compiled_module, "free_bytes", lambda: needed.append(1) or free())
    sweep(plan(world, tmp_path / "fits", "train.steps=1", seeds))
    assert needed  # it was asked
    monkeypatch.setattr(compiled_module, "free_bytes", lambda: 100_000)
    with pytest.raises(UserError) as caught:
        sweep(plan(world, tmp_path / "sweep", "train.steps=1", seeds))
    said = str(caught.value)
    assert "training 8 prompts at once" in said and "GiB are free" in said
    fitting = int(said.split("about ")[1].split()[0]) if "about" in said else 0
    assert 0 <= fitting < 8 and f"train.at_once={max(fitting, 1)}" in said


def test_prompts_of_different_methods_are_refused(world: World, tmp_path: Path):
    with pytest.raises(UserError, match="prompts of different methods cannot share a bank"):
        sweep(plan(world, tmp_path / "sweep", "sweep={method.name: [soft, residual]}"))


def test_names_and_values(world: World, tmp_path: Path):
    task = yaml.safe_load(world.config.read_text(encoding="utf-8"))["task"]
    made = plan(
        world, tmp_path, "sweep.seed=[4,5]", "sweep.optim.learning_rate=[0.1]",
        f"sweep.task=[{json.dumps({**task, 'name': 'one two'})}, sst2]",
    )  # fmt: skip
    assert [run.name for run in made.runs] == [
        "seed-4_learning_rate-0.1_task-one-two", "seed-4_learning_rate-0.1_task-sst2",
        "seed-5_learning_rate-0.1_task-one-two", "seed-5_learning_rate-0.1_task-sst2",
    ]  # fmt: skip
    assert [run.config.task.name for run in made.runs] == ["one two", "sst2"] * 2
    assert [run.config.seed for run in made.runs] == [4, 4, 5, 5]
    assert all(run.config.optim.learning_rate == 0.1 for run in made.runs)
    assert made.runs[0].config.output_dir == str(tmp_path / "prompts" / made.runs[0].name)
    assert plan(world, tmp_path).axes == {} and len(plan(world, tmp_path).runs) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.seed=3", "sweep.seed must be a list of values"),
        ("sweep.seed=[]", "sweep.seed must be a list of values"),
        ("sweep.seed=[1, 1]", "sweep.seed has a value twice"),
        ("sweep.seed=[one]", "seed"),
        ("sweep.optim.learning_rate=[0.1, high]", "optim.learning_rate"),
        ("sweep.optim.learning_rat=[0.1]", "learning_rate"),
        ("sweep=[1]", "sweep must hold `key: [value, ...]` lines"),
        ("sweep.backbone.name=[a, b]", "backbone.name is the same for all runs"),
        ("sweep.train.eval_every=[1, 2]", "train.eval_every is the same for all runs"),
    ],
)
def test_a_wrong_sweep_says_what_is_wrong(world: World, tmp_path: Path, override, message):
    with pytest.raises(UserError) as caught:
        plan(world, tmp_path, override)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert override.partition("=")[0].split(".")[0] in str(caught.value)


def test_an_override_of_a_swept_key_is_refused(world: World, tmp_path: Path):
    with pytest.raises(UserError, match=r"seed is swept; set sweep.seed=\[\.\.\.\] instead"):
        plan(world, tmp_path, "sweep.seed=[0,1]", "seed=3")


def test_a_wrong_value_names_its_line(world: World, tmp_path: Path):
    text = world.config.read_text(encoding="utf-8") + "sweep:\n  seed:\n  - 1\n  - one\n"
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"run.yaml:{len(text.splitlines())}: "):
        load_sweep(path)
    with pytest.raises(UserError, match="this config has a sweep"):
        load_config(path)


def test_a_longer_run_of_prompts_that_ended_apart_is_refused(world: World, tmp_path: Path):
    sweep(plan(world, tmp_path / "sweep", "sweep={train.steps: [4, 8]}"))
    with pytest.raises(UserError):
        sweep(plan(world, tmp_path / "sweep", "sweep={train.steps: [6, 10]}"))
