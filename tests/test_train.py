"""Training runs of a tiny backbone: what is trained, written, traced, kept and said."""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_fixtures import (
    CONFIG,
    World,
    assert_same_end,
    compiled,
    losses,
    prompt_bytes,
    records,
    review_rows,
    saved_state,
    snapshot,
    world,
    write_rows,
)

from jaxprompt import compiled as compiled_module
from jaxprompt import training as training_module
from jaxprompt import trees
from jaxprompt.artifact import load_artifact
from jaxprompt.backbone import load_backbone
from jaxprompt.borrowed import initial_values
from jaxprompt.config import load_config
from jaxprompt.data.tasks import Task
from jaxprompt.loop import Loop
from jaxprompt.train import TrainResult, train
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

train_module = importlib.import_module("jaxprompt.train")  # `jaxprompt.train` is the function


@dataclasses.dataclass
class Seen:
    """What the runs of a test did inside."""

    traces: int = 0
    before: list[dict[str, bytes]] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)
    steps: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Looks into `train`: counts traces and steps, copies the frozen tree before the first one."""
    return watch(monkeypatch)


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    traced_step = compiled_module.train_step

    class WatchedLoop(Loop):
        def run(self, state, progress):
            def counted(*arguments):
                found.steps += 1
                return self.step(*arguments)

            found.before.append(bytes_of(self.frozen))
            found.loops.append(self)
            return Loop.run(dataclasses.replace(self, step=counted), state, progress)

    def counted_step(*arguments):
        found.traces += 1
        return traced_step(*arguments)

    monkeypatch.setattr(training_module, "Loop", WatchedLoop)
    monkeypatch.setattr(compiled_module, "train_step", counted_step)
    return found


def listen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes of a run, as they come."""
    said: list[str] = []
    note = training_module.RunLogger.note

    def heard(self, text):
        said.append(text)
        note(self, text)

    monkeypatch.setattr(training_module.RunLogger, "note", heard)
    return said


def bytes_of(tree: Any) -> dict[str, bytes]:
    def joined(leaf: Any) -> bytes:
        return b"".join(np.asarray(part).tobytes() for part in jax.tree.leaves(leaf))

    return {path: joined(leaf) for path, leaf in trees.flatten(tree).items()}


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished run that several tests look at."""

    directory: Path
    result: TrainResult
    seen: Seen
    files_before: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Done:
    directory = tmp_path_factory.mktemp("runs") / "base"
    files_before = snapshot(world.root)
    with pytest.MonkeyPatch.context() as patch:
        found, said = watch(patch), listen(patch)
        result = train(world.load(directory))
    return Done(directory, result, found, files_before, "\n".join(said))


def test_the_files_of_a_run(done: Done):
    assert {path.name for path in done.directory.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "best", "prompt", "plots",
    }  # fmt: skip
    for name in ("best", "prompt"):
        kept = {path.name for path in (done.directory / name).iterdir()}
        assert kept == {"prompt_config.json", "prompt.safetensors"}
    kept = {path.name for path in (done.directory / "checkpoints").iterdir()}
    assert kept == {"step_00000015", "step_00000020"}


def test_a_picture_where_matplotlib_is(done: Done):
    pytest.importorskip("matplotlib")
    assert (done.directory / "plots" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_prompt_is_trained(world: World, done: Done):
    (before,), (loop,) = done.seen.before, done.seen.loops
    assert len(before) > 10 and bytes_of(loop.frozen) == before
    assert snapshot(world.root) == done.files_before
    config = world.load(done.directory)
    backbone = load_backbone(config.backbone.name)
    first = initial_values(config, backbone, Task(config.task))["prompt"]
    last = load_artifact(done.directory / "prompt").values["prompt"]
    assert first.shape == last.shape == (4, CONFIG.d_model)
    assert np.abs(last - first).min(axis=1).max() > 0.1


def test_a_checkpoint_holds_no_backbone(done: Done):
    step, arrays, metadata = saved_state(done.directory)
    assert step == 20 and int(arrays["step"]) == 20
    trained = {name: a.shape for name, a in arrays.items() if name.startswith("trained")}
    assert trained == {"trained/method/prompt": (4, CONFIG.d_model)}
    assert {name.split("/")[0] for name in arrays} == {"step", "trained", "opt_state", "rng"}
    assert max(array.size for array in arrays.values()) == 4 * CONFIG.d_model
    assert metadata["identity"]["backbone"]["fingerprint"] == (
        load_artifact(done.directory / "best").backbone.fingerprint
    )


def test_the_loss_falls(done: Done):
    told = losses(done.directory)
    assert len(told) == 20 and np.mean(told[-5:]) < 0.75 * np.mean(told[:3])


def test_metrics_of_every_step_and_evaluation(done: Done):
    told = records(done.directory)
    steps = [r["step"] for r in told if "loss" in r]
    assert steps == list(range(1, 21))
    evaluations = {r["step"]: r["eval/accuracy"] for r in told if "eval/accuracy" in r}
    assert list(evaluations) == [10, 20]
    assert {r["learning_rate"] for r in told if "loss" in r} == {0.3}
    assert np.mean([r["examples"] for r in told if "loss" in r]) == pytest.approx(8, abs=1.5)
    assert done.result.best_step == max(evaluations, key=lambda step: evaluations[step])
    assert done.result.metrics == {"accuracy": evaluations[done.result.best_step]}
    assert done.result.majority == {"accuracy": 65.0}
    assert done.result.finished and done.result.steps == 20
    assert done.result.examples_per_second > 0
    assert done.result.backbone_bytes == trees.size_in_bytes(load_backbone_params(done))
    weights = sum(path.stat().st_size for path in (done.directory / "best").iterdir())
    assert done.result.prompt_bytes == weights


def load_backbone_params(done: Done) -> Any:
    return load_backbone(load_artifact(done.directory / "best").backbone.name).params


def test_artifacts_say_what_they_are(world: World, done: Done):
    for name, step in (("best", done.result.best_step), ("prompt", 20)):
        artifact = load_artifact(done.directory / name)
        assert artifact.training["steps"] == step and artifact.training["recipe"] == "paper"
        assert artifact.layout == "{prompt}{input}" and artifact.method["length"] == 4
        assert artifact.task["candidates"] == ["positive", "negative"]
        assert artifact.backbone.d_model == CONFIG.d_model
        assert artifact.lengths == {"max_input_length": 20, "max_target_length": 4}


def test_the_opening_says_what_is_trained(done: Done):
    frozen = f"{trees.count(load_backbone_params(done)):,} frozen ones"
    assert f"starting: 64 trained parameters, {frozen}" in done.said
    assert "task tiny, 64 examples, 20 steps" in done.said
    assert re.search(
        r"validation accuracy: bare backbone \d+\.0, most frequent target 65\.0", done.said
    )


def test_the_resolved_config_repeats_the_run(world: World, done: Done, tmp_path: Path):
    written = done.directory / "config.yaml"
    assert load_config(written) == world.load(done.directory)
    train(load_config(written, [f"output_dir={tmp_path / 'again'}"]))
    assert_same_end(done.directory, tmp_path / "again")


def test_a_finished_run_started_again_does_nothing_and_says_so(
    world: World, done: Done, seen: Seen, capsys: pytest.CaptureFixture
):
    before = {k: v for k, v in snapshot(done.directory).items() if not k.startswith("plots/")}
    result = train(world.load(done.directory))
    after = {k: v for k, v in snapshot(done.directory).items() if not k.startswith("plots/")}
    assert (seen.steps, seen.traces) == (0, 0) and after == before
    assert (
        "the run ended at step 20 already; train.steps makes it longer" in capsys.readouterr().err
    )
    same = {"examples_per_second"}
    assert {k: v for k, v in vars(result).items() if k not in same} == {
        k: v for k, v in vars(done.result).items() if k not in same
    }


def test_more_steps_go_on_to_the_end_of_a_longer_run(
    world: World, done: Done, tmp_path: Path, seen: Seen
):
    short, long = tmp_path / "short", tmp_path / "long"
    options = ["backbone.dropout=0.1", "train.eval_every=4", "train.save_every=3"]
    train(world.load(short, *options, "train.steps=4"))
    result = train(world.load(short, *options, "train.steps=8"))
    assert seen.steps == 8 and result.steps == 8
    train(world.load(long, *options, "train.steps=8"))
    assert_same_end(short, long)  # so dropout's random numbers went on as well
    assert losses(long) != losses(done.directory)[:8]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A run with two batch shapes and inputs that are too long."""

    seen: Seen
    said: str


@pytest.fixture(scope="module")
def cut(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    options = ["data.max_input_length=12", "data.length_buckets=[9]", "train.steps=12"]
    with pytest.MonkeyPatch.context() as patch:
        found, said = watch(patch), listen(patch)
        train(world.load(tmp_path_factory.mktemp("runs") / "cut", *options))
    return Cut(found, "\n".join(said))


def test_one_trace_for_each_batch_shape(cut: Cut):
    (loop,) = cut.seen.loops
    assert len(loop.batches.shape_counts) == cut.seen.traces == 1  # packed rows have one shape
    assert cut.seen.steps == sum(loop.batches.shape_counts.values()) == 12


def test_what_is_cut_off_is_reported_with_counts(cut: Cut):
    rows = review_rows(20, seed=2)
    over = [len(row["text"].split()) - 7 for row in rows]  # 4 slots and the end token are kept
    tokens = [count for count in over if count > 0]
    assert 0 < len(tokens) < 20
    assert (
        f"{len(tokens)} of 20 validation inputs were cut to data.max_input_length, {sum(tokens)} "
        "tokens in all" in cut.said
    )
    assert re.search(
        r"\d+ of \d+ training inputs were cut to data\.max_input_length, \d+ ", cut.said
    )


def test_epochs_are_passes_over_the_rows(world: World, tmp_path: Path, seen: Seen):
    result = train(world.load(tmp_path / "run", "train.steps=0", "train.epochs=0.5"))
    assert result.steps == seen.steps == 4  # of 8 rows, of 64


def test_accumulated_microbatches_are_one_batch(world: World, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unpacked = ["train.steps=3", "data.packing=off"]  # packed rows are shaped to divide
    train(world.load(whole, *unpacked))
    train(world.load(parts, *unpacked, "train.accumulate=4"))
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    left, right = (load_artifact(run / "prompt").values["prompt"] for run in (parts, whole))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_rows_over_two_devices_are_one_batch(world: World, tmp_path: Path):
    unpacked = ["train.steps=3", "data.packing=off"]
    for devices in (1, 2):
        train(world.load(tmp_path / f"{devices}", *unpacked, f"mesh.data={devices}"))
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


def test_stopping_early_and_the_best_of_all(world: World, tmp_path: Path, capsys):
    options = ["train.steps=40", "train.eval_every=1", "train.early_stopping=3"]
    result = train(world.load(tmp_path / "run", *options))
    scores = [r["eval/accuracy"] for r in records(tmp_path / "run") if "eval/accuracy" in r]
    best = [i for i, score in enumerate(scores) if score > max(scores[:i], default=-1)]
    assert result.best_step == best[-1] + 1 and result.steps == len(scores) == best[-1] + 4 < 40
    assert "stopped early at step" in capsys.readouterr().err
    steps = {n: load_artifact(tmp_path / "run" / n).training["steps"] for n in ("best", "prompt")}
    assert steps == {"best": result.best_step, "prompt": result.steps}
    assert prompt_bytes(tmp_path / "run" / "best") != prompt_bytes(tmp_path / "run" / "prompt")
    assert load_artifact(tmp_path / "run" / "best").training["metrics"] == result.metrics


def test_nothing_is_reported_where_nothing_was_cut(done: Done):
    assert "cut" not in done.said


@pytest.mark.parametrize("layout", ["{input}{prompt}", "{prompt:1}text: {text}{prompt}"])
def test_other_layouts_train_and_are_kept(world: World, tmp_path: Path, layout: str):
    result = train(world.load(tmp_path / "run", "train.steps=2", f"layout='{layout}'"))
    assert result.finished and load_artifact(result.prompt).layout == layout


def test_generation_is_measured_by_exact_match(world: World, tmp_path: Path):
    result = train(world.load(tmp_path / "run", "train.steps=1", "task.candidates=[]"))
    assert set(result.metrics) == set(result.bare) == {"exact_match"}


def test_tuning_the_model_gives_a_backbone(world: World, tmp_path: Path, seen: Seen):
    options = ["tune=model", "optim.recipe=model-tuning", "backbone.dropout=0.1"]
    options += ["train.steps=6", "train.eval_every=3", "optim.learning_rate=0.05"]
    directory = tmp_path / "whole"
    result = train(world.load(directory, *options))
    start = load_backbone(str(world.root / "backbone"))
    for name in ("best", "prompt"):
        tuned = load_backbone(str(directory / name))
        assert tuned.config == dataclasses.replace(
            start.config, dropout_rate=tuned.config.dropout_rate
        )
        assert (
            tuned.fingerprint != start.fingerprint and tuned.tokenizer.size == start.tokenizer.size
        )
        before, after = bytes_of(start.params), bytes_of(tuned.params)
        assert before.keys() == after.keys()
        assert [path for path in before if before[path] == after[path]] == []
    (frozen,) = seen.before
    assert frozen == {}
    _, arrays, _ = saved_state(directory)
    trained = {k.removeprefix("trained/backbone/"): v for k, v in arrays.items() if "trained" in k}
    assert bytes_of(load_backbone(str(directory / "prompt")).params).keys() == {
        path.removeprefix("params/") for path in trained
    }
    told = losses(directory)
    assert np.mean(told[-2:]) < np.mean(told[:2]) and result.prompt == directory / "best"


def test_a_prompt_over_a_bfloat16_backbone_is_float32(world: World, tmp_path: Path, seen: Seen):
    train(world.load(tmp_path / "run", "backbone.dtype=bfloat16", "train.steps=2"))
    (loop,) = seen.loops
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loop.frozen)} == {"bfloat16"}
    assert load_artifact(tmp_path / "run" / "prompt").values["prompt"].dtype == np.float32
    _, arrays, _ = saved_state(tmp_path / "run")
    floats = {a.dtype.name for name, a in arrays.items() if a.dtype.kind not in "iu"}
    assert floats == {"float32"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_prompt_over_a_quantised_backbone(world: World, tmp_path: Path, seen: Seen, kind: str):
    directory, options = tmp_path / "run", [f"backbone.quantize={kind}", "train.eval_every=2"]
    train(world.load(directory, *options, "train.steps=2"))
    train(world.load(directory, *options, "train.steps=4"))
    whole = tmp_path / "whole"
    train(world.load(whole, *options, "train.steps=4"))
    assert prompt_bytes(directory / "prompt") == prompt_bytes(whole / "prompt")
    loop, before = seen.loops[0], seen.before[0]
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(loop.frozen)}
    assert dtypes == {kind, "int8", "float32"} and bytes_of(loop.frozen) == before
    artifact = load_artifact(directory / "best")
    assert artifact.training["quantize"] == kind
    float_backbone = load_backbone(str(world.root / "backbone"))
    assert artifact.backbone.fingerprint == float_backbone.fingerprint
    floats = tmp_path / "floats"
    train(world.load(floats, "train.eval_every=2", "train.steps=4"))
    assert "quantize" not in load_artifact(floats / "best").training
    np.testing.assert_allclose(
        losses(whole), losses(floats), rtol={"int8": 0.02, "int4": 0.3}[kind]
    )
    assert losses(whole) != losses(floats)


def test_a_prompt_starts_from_another(world: World, done: Done, tmp_path: Path, seen: Seen):
    source = f"method.init_path={done.directory / 'best'}"
    config = world.load(tmp_path / "run", "method.init=prompt", source, "train.steps=1")
    first = initial_values(config, load_backbone(config.backbone.name), Task(config.task))
    np.testing.assert_array_equal(
        first["prompt"], load_artifact(done.directory / "best").values["prompt"]
    )


def test_seeds_differ(world: World, done: Done, tmp_path: Path):
    train(world.load(tmp_path / "run", "seed=4", "train.steps=2"))
    assert losses(tmp_path / "run")[0] != losses(done.directory)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: ["method.length=5"], "method.length 4, now 5"),
        (lambda root: ["layout='{input}{prompt}'"], "layout {prompt}{input}, now {input}{prompt}"),
        (lambda root: ["task.input='this: {text}'"], "task.input {text}, now this: {text}"),
        (lambda root: ["task.name=another"], "task.name tiny, now another"),
        (lambda root: [f"backbone.name={root / 'other'}"], "backbone.fingerprint "),
        (lambda root: ["tune=model"], "tune prompt, now model"),
        (lambda root: ["seed=4"], "seed 3, now 4"),
        (lambda root: ["optim.recipe=adamw"], "recipe paper, now adamw"),
    ],
)
def test_another_run_in_the_directory_is_refused(
    world: World, done: Done, change: Callable[[Path], list[str]], named: str
):
    other = world.root / "other"
    if not other.exists():
        from run_fixtures import write_backbone

        write_backbone(other, seed=5)
    before = snapshot(done.directory)
    with pytest.raises(UserError) as caught:
        train(world.load(done.directory, *change(world.root)))
    assert f"run directory {done.directory} was trained with " in str(caught.value)
    assert named in str(caught.value)
    assert snapshot(done.directory) == before


def test_other_data_in_the_directory_is_refused(world: World, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", review_rows(64, seed=1))
    options = [f"task.source.train={rows}", "train.steps=1"]
    train(world.load(tmp_path / "run", *options))
    write_rows(rows, review_rows(65, seed=1))
    with pytest.raises(
        UserError, match="the training data has 65 rows, the run was started with 64"
    ):
        train(world.load(tmp_path / "run", *options, "train.steps=2"))


def test_the_summary_compares_and_says_what_to_type_next(world: World, done: Done):
    said = train_module._summary(world.load(done.directory), done.result, ["my run.yaml", "a=1"])
    rows = {line.split("  ")[0]: line.split()[-1] for line in said.splitlines() if line}
    assert rows["most frequent target"] == "65.0"
    assert float(rows["bare backbone"]) == done.result.bare["accuracy"]
    best = f"prompt of 4 slots (step {done.result.best_step})"
    assert float(rows[best]) == pytest.approx(done.result.metrics["accuracy"])
    assert (
        f"{done.result.prompt_bytes:,} bytes, backbone: {done.result.backbone_bytes:,} byt" in said
    )
    assert f"jaxprompt predict {done.directory / 'best'} --input -" in said
    assert "--split test" not in said  # the task has no such split
    assert "jaxprompt train 'my run.yaml' a=1 train.steps=40 " in said
    stopped = dataclasses.replace(done.result, finished=False)
    said = train_module._summary(world.load(done.directory), stopped, ["run.yaml"])
    assert said == "\nstopped before the end; go on with:\n  jaxprompt train run.yaml"


def test_results_are_json(done: Done):
    json.dumps([done.result.metrics, done.result.bare, done.result.majority])
