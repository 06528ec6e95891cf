"""Every prompt method in real runs: trained, resumed to the bit, on a mesh, kept and used again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from method_cases import CASES
from run_fixtures import (
    CONFIG,
    World,
    assert_same_end,
    compiled,
    losses,
    mixture_of,
    saved_state,
    source_of,
    world,
)

from jaxprompt import cli
from jaxprompt.artifact import BackboneIdentity, load_artifact, save_artifact
from jaxprompt.prompts import METHODS
from jaxprompt.train import train
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

OPTIONS = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "optim.recipe=adamw",
    "optim.learning_rate=0.05", "optim.schedule=constant", "optim.warmup_steps=0",
    "backbone.dropout=0.1", "data.row_multiple=2",
]  # fmt: skip
# All but three: `soft` is what test_train, test_resume and test_mesh run; `multitask` has parts for
# tasks as `mpt` has, and runs in a bank in test_mixture; `xprompt` trains twice, as long as three
# others: test_pruning runs it, breaks it off, prunes on two devices and evaluates it.
ELSEWHERE = {"soft", "multitask", "xprompt"}
RUNS = ["p-tuning", "residual", "p-tuning-v2", "prefix", "dpt", "lopt",
        "superpos", "dept", "adept", "smop", "pt-moe", "attempt", "per-layer", "mpt"]  # fmt: skip


def shared_by(case: str, world: World) -> list[str]:
    """The tasks that share a prompt, where the method has parts for each."""
    names = CASES[case].get("tasks", [])
    return [mixture_of(world, **dict.fromkeys(names, 1.0))] if names else []


def kept_in(case: str, directory: Path) -> Path:
    """Where a run's artifacts of one task are."""
    return directory / "tasks" / "second" if "tasks" in CASES[case] else directory


def options_of(case: str, world: World) -> list[str]:
    mapping = {"name": case.split()[0], **CASES[case]}
    mapping.pop("tasks", None)
    if "sources" in mapping:
        mapping["sources"] = [str(source_of(world, name)) for name in mapping["sources"]]
    return [f"method.{key}={json.dumps(value)}" for key, value in mapping.items()]


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    return {}


@pytest.fixture(params=RUNS)
def run(request, world: World, tmp_path_factory, runs: dict[str, Path]) -> tuple[str, Path]:
    """A finished run of each method, made once."""
    case = request.param
    if case not in runs:
        runs[case] = tmp_path_factory.mktemp("runs") / case.replace(" ", "-")
        options = [*OPTIONS, *shared_by(case, world), *options_of(case, world)]
        train(world.load(runs[case], *options))
    return case, runs[case]


def test_a_run_broken_off_ends_as_the_unbroken_one(run, world: World, tmp_path: Path):
    """All trained parameters, also those of a network that the artifact folds away, go on."""
    case, unbroken = run
    broken = tmp_path / "broken"
    options = [*OPTIONS, *shared_by(case, world), *options_of(case, world)]
    train(world.load(broken, *options, "train.steps=2"))
    train(world.load(broken, *options))
    info, prompt = METHODS[case.split()[0]], kept_in(case, broken) / "prompt"
    assert (load_artifact(prompt).training.get("method") is None) == (info.fold is None)
    np.testing.assert_array_equal(losses(broken), losses(unbroken))
    assert_same_end(broken, unbroken)


def test_two_devices_train_the_same(run, world: World, tmp_path: Path):
    """Also what is drawn: dropout, and SMoP's noise, belong to rows."""
    case, alone = run
    options = [*OPTIONS, *shared_by(case, world), *options_of(case, world)]
    train(world.load(tmp_path / "two", *options, "mesh.data=2"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(alone), rtol=1e-5)


def test_every_method_is_run():
    assert {case.split()[0] for case in RUNS} == {*METHODS} - ELSEWHERE


def test_what_is_kept_answers_as_training_measured(run, world: World, capsys):
    """`evaluate` of the artifact, folded where it folds, gives the run's own last measurement."""
    case, directory = run[0], kept_in(*run)
    artifact = load_artifact(directory / "prompt")
    info = METHODS[case.split()[0]]
    if info.fold is not None:
        assert artifact.method["name"] in ("soft", "p-tuning-v2")
        assert artifact.training["method"]["name"] == case.split()[0]
    else:
        assert artifact.method["name"] == case.split()[0]
    capsys.readouterr()
    assert cli.main(["evaluate", str(directory / "prompt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"]["value"] == artifact.training["metrics"]["accuracy"]
    assert cli.main(["inspect", str(directory / "prompt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(run):
    case, directory = run
    _, arrays, _ = saved_state(directory)
    trained = {name for name in arrays if name.startswith("trained/")}
    method = METHODS[case.split()[0]]
    assert trained and not any("first" in name or "rows_of_table" in name for name in trained)
    assert method.name == case.split()[0]


def test_rates_of_parameters(world: World, tmp_path: Path):
    """A rate for one array changes that one's first step, and no other."""
    options = [*OPTIONS, "train.steps=1", *options_of("dept", world)]
    train(world.load(tmp_path / "one", *options, "optim.learning_rate=0.1"))
    rates = "optim.learning_rates={right: 0.001}"
    train(world.load(tmp_path / "two", *options, "optim.learning_rate=0.1", rates))
    one, two = (load_artifact(tmp_path / name / "prompt").values for name in ("one", "two"))
    np.testing.assert_array_equal(one["prompt"], two["prompt"])
    np.testing.assert_allclose(two["right"], one["right"] / 100, rtol=1e-4)
    with pytest.raises(UserError, match="learning_rates names 'wrong'; what is trained is called"):
        train(world.load(tmp_path / "three", *options, "optim.learning_rates={wrong: 0.1}"))


def test_a_prompt_without_rows_starts_no_other(run, world: World, tmp_path: Path):
    case, directory = run
    if case != "p-tuning-v2":
        pytest.skip("one is enough")
    start = ["method.length=3", "method.init=prompt", f"method.init_path={directory / 'prompt'}"]
    with pytest.raises(UserError, match="has no rows to begin from"):
        train(world.load(tmp_path / "run", *OPTIONS, *start))


def test_sources_are_kept_and_watched(run, world: World, tmp_path: Path):
    """The artifact needs its sources no more; a run does not go on over others."""
    case, directory = run
    if case != "attempt":
        pytest.skip("it alone has sources")
    options = options_of(case, world)
    first = load_artifact(source_of(world, "one"))
    kept = load_artifact(directory / "prompt").values["sources"]
    np.testing.assert_array_equal(kept[0], first.values["prompt"])
    wrong = {"soft prompt": {"method": {"name": "dept", "length": 4}},
             "was trained with backbone": {"backbone": BackboneIdentity("b", "0", CONFIG.d_model)},
             "was trained with sources": {"values": {"prompt": 2 * kept[0]}}}  # fmt: skip
    try:
        for message, change in wrong.items():
            save_artifact(first.path, dataclasses.replace(first, **change))
            with pytest.raises(UserError, match=message):
                train(world.load(directory, *OPTIONS, *options, "train.steps=6"))
    finally:
        save_artifact(first.path, first)


def test_keys_and_values_take_no_slots(world: World, tmp_path: Path):
    layout = "layout={input}"
    train(world.load(tmp_path / "run", *OPTIONS, *options_of("p-tuning-v2", world), layout))
    assert load_artifact(tmp_path / "run" / "prompt").layout == "{input}"
    with pytest.raises(UserError, match="counts 3 slots, and what method p-tuning-v2 trains"):
        counted = [*options_of("p-tuning-v2", world), "layout={prompt:2}{input}{prompt:1}"]
        train(world.load(tmp_path / "counted", *OPTIONS, *counted))
