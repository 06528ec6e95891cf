"""Several tasks in one run: rates, order and going on, what is scored, kept and begun from."""

import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from method_cases import config_of, context_of
from run_fixtures import (
    World,
    compiled,
    mixture_of,
    records,
    run_mapping,
    world,
    write_backbone,
)
from tiny_tokenizer import WORDS, tiny_tokenizer

from jaxprompt import cli
from jaxprompt.artifact import load_artifact
from jaxprompt.config import dump, load_config
from jaxprompt.data.encoder import DataConfig, TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.mixture import MixedEncoder, MixedSource, rates_of
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.readers import JsonlSource
from jaxprompt.data.tasks import MixedTask, Task, TaskConfig
from jaxprompt.prompts import METHODS
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.train import train
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

SHORT = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "optim.recipe=adamw",
    "optim.learning_rate=0.05", "optim.schedule=constant", "optim.warmup_steps=0",
]  # fmt: skip


# ---- the stream ----------------------------------------------------------------------------------


def mixed(
    root: Path, rates: list[float], counts=(9, 30), **data
) -> tuple[MixedEncoder, MixedSource]:
    """Task n's targets are the word of its own; rows are numbered by their first word."""
    encoders, sources = [], []
    for number, count in enumerate(counts):
        draw = np.random.default_rng(number)
        rows = [
            {"text": " ".join(draw.choice(WORDS.split(), draw.integers(1, 12)))}
            for _ in range(count)
        ]
        path = root / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(JsonlSource(path))
        config = DataConfig(
            **{"batch_size": 4, "max_input_length": 32, "window_batches": 3, **data}
        )
        task = Task(TaskConfig(target=("positive", "negative", "good")[number]))
        encoders.append(
            TaskEncoder(task, Layout.parse("{prompt}{input}", 2), tiny_tokenizer(), config)
        )
    return MixedEncoder(encoders, rates), MixedSource(sources)


def segments(batch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(task, example, target) of every segment."""
    found = []
    for b, g in np.argwhere(batch.example_index_BG >= 0):
        own = batch.decoder_segments_BT[b] == g + 1
        target = tuple(batch.targets_BT[b][own].tolist())
        found.append((int(batch.task_index_BG[b, g]), int(batch.example_index_BG[b, g]), target))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_tasks_come_by_their_rates_and_segments_know_theirs(tmp_path: Path, packing: bool):
    encoder, source = mixed(tmp_path, [1.0, 3.0], packing=packing)
    batches = TrainBatches(encoder, source, seed=1)
    seen = [one for batch in itertools.islice(batches, 60) for one in segments(batch)]
    state = batches.get_state()
    batches.close()
    tasks = Counter(task for task, _, _ in seen)
    whole = len(seen) / (tasks[0] + tasks[1])
    assert abs(tasks[0] / len(seen) - 0.25) < 0.05 and whole == 1
    for task, index, target in seen:
        assert (index >= 9) == (task == 1)
        word = encoder.tokenizer.encode(("positive", "negative")[task])
        assert target == (*word, encoder.tokenizer.eos_id)
    counts = Counter(index for task, index, _ in seen if task == 0)
    assert len(counts) == 9 and max(counts.values()) - min(counts.values()) <= 3
    assert state["rows"] == [9, 30]


@pytest.mark.parametrize("packing", [True, False])
def test_a_mixture_goes_on_where_it_was(tmp_path: Path, packing: bool):
    encoder, source = mixed(tmp_path, [2.0, 1.0], packing=packing)
    unbroken = TrainBatches(encoder, source, seed=3)
    for _ in range(5):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = TrainBatches(encoder, source, seed=3)
    resumed.set_state(state)
    for left, right in itertools.islice(zip(unbroken, resumed, strict=False), 8):
        assert all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))
    unbroken.close()
    resumed.close()
    other = TrainBatches(*mixed(tmp_path, [2.0, 1.0], (9, 29), packing=packing))
    with pytest.raises(UserError, match=r"has \[9, 29\] rows, the run was started with \[9, 30\]"):
        other.set_state(state)
    other.close()


def test_batches_of_a_few_tasks(tmp_path: Path):
    """As many as is drawn, in turns; on all processes, and going on, the same batches."""
    options = {"packing": False, "tasks_per_batch": "random", "batch_size": 6, "prefetch": 0}
    encoder, source = mixed(tmp_path, [1.0, 2.0, 1.0], (9, 30, 12), **options)
    batches, seen = TrainBatches(encoder, source, seed=5), []
    for number in range(240):
        if number == 100:
            resumed = TrainBatches(encoder, source, seed=5)
            resumed.set_state(json.loads(json.dumps(batches.get_state())))
            batches = resumed
        seen.append(segments(next(batches)))
    kinds, tasks = Counter(), Counter(task for batch in seen for task, _, _ in batch)
    for batch in seen:
        own = [task for task, _, _ in batch]
        turns = [k for k in (2, 3) if own == [own[n % k] for n in range(6)]]
        assert len(own) == 6 and turns, own
        kinds[len(set(own)), min(turns)] += 1
    assert kinds.keys() == {(1, 2), (2, 2), (2, 3), (3, 3)}
    # half are drawn from two tasks; of those drawn from three, 10 in 64 have the same one thrice
    assert abs(sum(kinds[n, 2] for n in (1, 2)) / 240 - (0.5 + 0.5 * 10 / 64)) < 0.08
    assert all(abs(tasks[n] / 1440 - share) < 0.05 for n, share in enumerate((0.25, 0.5, 0.25)))
    for task in range(3):
        times = Counter(row for batch in seen for own, row, _ in batch if own == task)
        assert len(times) == (9, 30, 12)[task] and max(times.values()) - min(times.values()) <= 1
    shares = [
        TrainBatches(encoder, source, seed=5, process_index=n, process_count=2) for n in (0, 1)
    ]
    for batch, *parts in zip(seen[:40], *shares, strict=False):
        assert [one for part in parts for one in segments(part)] == batch
    assert segments(next(TrainBatches(encoder, source, seed=6))) != seen[0]
    with pytest.raises(UserError, match=r"give data\.packing=off too"):
        mixed(tmp_path, [1.0, 1.0], tasks_per_batch="random")


def test_rates_by_numbers_of_rows():
    by_rows = [MixedTask(), MixedTask(cap=500), MixedTask()]
    assert rates_of(by_rows, [100, 900, 2**20]) == [100, 500, 2**19]
    assert rates_of([MixedTask(2.0), MixedTask(0.5)], [1, 1]) == [2.0, 0.5]
    with pytest.raises(UserError, match="give all of them one, or none"):
        rates_of([MixedTask(2.0), MixedTask()], [1, 1])


# ---- configs -------------------------------------------------------------------------------------


def test_every_way_to_write_a_mixture_is_the_same_config(tmp_path: Path):
    ways = [
        "task={mixture: [demo-kind, demo-topic]}",
        "task={mixture: {demo-kind: , demo-topic: {task: {preset: demo-topic}}}}",
    ]
    config, other = (load_config("quickstart", [way, "method.name=mpt"]) for way in ways)
    assert config == other
    assert config.task.name == "demo-kind+demo-topic"
    assert config.method.tasks == ("demo-kind", "demo-topic")
    place = tmp_path / "again.yaml"
    place.write_text(dump(config), encoding="utf-8")
    assert load_config(place) == config
    given = load_config("quickstart", [
        "task={mixture: {demo-kind: 1, demo-topic: 0.5}}", "task.mixture.demo-kind.rate=2",
        "task.mixture.demo-topic.task.source.train=mine.jsonl",
    ])  # fmt: skip
    topic = given.task.mixture["demo-topic"]
    assert (given.task.mixture["demo-kind"].rate, topic.rate) == (2.0, 0.5)
    assert topic.task["source"]["train"] == "mine.jsonl" and topic.task["target"] == "{topic}"


WRONG = {
    "unknown": (
        "{mixture: [demo-kind, demo-topi]}",
        "no task 'demo-topi'; did you mean demo-topic",
    ),
    "one": ("{mixture: {demo-kind: 1}}", "one task only; write task: demo-kind"),
    "no rate": (
        "{mixture: {demo-kind: a, demo-topic: 1}}",
        "demo-kind must be a rate or a mapping",
    ),
    "rate": ("{mixture: {demo-kind: 0, demo-topic: 1}}", "rate is 0.0, it has to be above 0"),
    "beside": ("{mixture: [demo-kind, demo-topic], input: x}", "input is given beside mixture"),
    "form": ("{mixture: demo-kind}", "task.mixture must be a list of tasks' names"),
    "key": ("{mixture: {demo-kind: {tsk: x}, demo-topic: 1}}", "did you mean 'task.mixture.demo-k"),
    "name": (
        "{mixture: {a/b: {task: rte}, demo-topic: 1}}",
        "'a/b', which cannot name a directory",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_mixtures_are_refused(case: str):
    text, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [f"task={text}"])


def test_other_tasks_in_the_method_are_refused():
    with pytest.raises(
        UserError, match=r"method.tasks is a, b, the run's are demo-kind, demo-topic"
    ):
        load_config("quickstart", [
            "task={mixture: [demo-kind, demo-topic]}", "method={name: mpt, tasks: [a, b]}",
        ])  # fmt: skip
    with pytest.raises(UserError, match=r"init_task is 'demo-kind', but method.init is 'vocab'"):
        load_config("quickstart", ["method.name=mpt", "method.init_task=demo-kind"])


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_run(world: World, tmp_path_factory) -> Path:
    """MPT on two tasks."""
    place = tmp_path_factory.mktemp("source") / "run"
    options = [mixture_of(world, one=1.0, two=2.0), "method.name=mpt"]
    result = train(world.load(place, *SHORT, *options))
    own = [result.metrics[f"{name}/accuracy"] for name in ("one", "two")]
    assert result.score == result.metrics["mean"] == sum(own) / 2
    assert {"eval/mean", "eval/one/accuracy", "eval/two/accuracy"} <= set(records(place)[-1])
    return place


def test_one_soft_prompt_of_several_tasks_begins_another(world: World, tmp_path: Path):
    """SPoT: what is kept of each task is the same prompt with the task's own words."""
    options = [*SHORT, mixture_of(world, one=None, two=None)]
    train(world.load(tmp_path / "source", *options))
    whole = load_artifact(tmp_path / "source" / "best")
    parts = [load_artifact(tmp_path / "source" / "tasks" / n / "best") for n in ("one", "two")]
    assert whole.method["name"] == "soft" and not whole.task
    assert [part.task["name"] for part in parts] == ["one", "two"]
    for part in parts:
        np.testing.assert_array_equal(part.values["prompt"], whole.values["prompt"])
    config = world.load(
        tmp_path / "target", *SHORT, "method.init=prompt",
        f"method.init_path={tmp_path / 'source' / 'best'}", "train.steps=1",
        "optim.learning_rate=1e-9",
    )  # fmt: skip
    train(config)
    begun = load_artifact(tmp_path / "target" / "prompt").values["prompt"]
    np.testing.assert_allclose(begun, whole.values["prompt"], atol=1e-6)


def test_a_bank_over_a_mixture(world: World, tmp_path: Path):
    """Two seeds of a method with parts for tasks, side by side as each alone."""
    options = [*SHORT, mixture_of(world, one=1.0, two=1.0), "method.name=multitask"]
    made = load_sweep(
        world.config, [*options, f"output_dir={tmp_path / 'sweep'}", "sweep.seed=[0,1]"]
    )
    result = sweep(made)
    (setting,) = result.settings
    assert len(setting.scores) == 2
    train(world.load(tmp_path / "alone", *options, "seed=1"))
    together = Path(made.runs[1].config.output_dir)
    for name in ("best", "tasks/two/best"):
        left, right = (load_artifact(run / name).values for run in (together, tmp_path / "alone"))
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_allclose(left[key], right[key], atol=1e-5)


def test_a_target_run_begins_from_shared_parts(world: World, source_run: Path, tmp_path: Path):
    source = load_artifact(source_run / "best")
    assert source.method["name"] == "mpt" and source.values["left"].shape[0] == 2
    start = [*SHORT, "method.name=mpt", "method.init=prompt",
             f"method.init_path={source_run / 'best'}"]  # fmt: skip
    still = ["train.steps=1", "optim.learning_rate=1e-9", "optim.learning_rates={left: 1e-9}"]
    train(world.load(tmp_path / "mean", *start, *still))
    kept = load_artifact(tmp_path / "mean" / "prompt")
    shared, left, right = (source.values[name] for name in ("prompt", "left", "right"))
    want = shared * (left.mean(0) @ right.mean(0))
    assert kept.method["name"] == "soft"
    np.testing.assert_allclose(kept.values["prompt"], want, atol=1e-6)
    train(world.load(tmp_path / "two", *start, *still, "method.init_task=two"))
    own = load_artifact(tmp_path / "two" / "prompt").values["prompt"]
    np.testing.assert_allclose(own, shared * (left[1] @ right[1]), atol=1e-6)
    assert not np.allclose(own, want, atol=1e-7)
    for wrong, message in (
        ("method.init_task=three", "has parts of one, two"),
        ("method.rank=2", "has rank 1, the run has method.rank 2"),
        ("method.length=3", "has length 4, the run has method.length 3"),
    ):
        with pytest.raises(UserError, match=message):
            train(world.load(tmp_path / "wrong", *start, wrong))


def test_parts_and_sources_of_another_backbone_begin_nothing(
    world: World, source_run: Path, tmp_path: Path, capsys
):
    """Neither MPT's nor ATTEMPT's, nor a teacher's: they are read before anything is trained."""
    config = tmp_path / "run.yaml"
    own = {**run_mapping(world.root), "output_dir": str(tmp_path / "run")}
    own["backbone"] = {"name": str(write_backbone(tmp_path / "other", seed=2))}
    config.write_text(json.dumps(own), encoding="utf-8")
    parts, prompt = source_run / "best", source_run / "tasks" / "one" / "best"
    for options in (
        ["method.name=mpt", "method.init=prompt", f"method.init_path={parts}"],
        ["method.name=attempt", f"method.sources=[{prompt}]"],
        [f"distil.teachers={{tiny: {prompt}}}"],
    ):
        assert cli.main(["train", str(config), *options]) == 2
        err = capsys.readouterr().err.strip()
        assert "\n" not in err and "was trained with backbone" in err, err
        assert str(tmp_path / "other") in err and not (tmp_path / "run").exists()


def test_shared_parts_answer_no_task(source_run: Path, capsys):
    assert cli.main(["evaluate", str(source_run / "best"), "--task", "demo-kind"]) == 2
    assert "holds the parts of several tasks" in capsys.readouterr().err
    assert cli.main(["inspect", str(source_run / "best"), "--json"]) == 0


def test_one_task_shares_nothing(world: World, tmp_path: Path):
    few = ["data.packing=off", "data.tasks_per_batch=random"]
    with pytest.raises(UserError, match="tasks_per_batch is 'random', and the run has one task"):
        train(world.load(tmp_path / "run", *SHORT, *few))
    with pytest.raises(UserError, match="method mpt shares a prompt among tasks, and the run has"):
        train(world.load(tmp_path / "run", *SHORT, "method.name=mpt"))


@pytest.mark.parametrize("case", ["multitask", "multitask features", "multitask project", "mpt"])
def test_every_task_s_prompt_begins_as_init_says(case: str):
    config, context = config_of(case), context_of()
    info = METHODS[config.name]
    rows = METHODS["soft"].initial(jax.random.key(2), config_of("soft"), context)["prompt"]
    made = info.make(info.initial(jax.random.key(2), config, context), config).rows()
    for own in made:
        if case == "multitask project":
            assert np.linalg.matrix_rank(np.asarray(own)) == 4
        np.testing.assert_allclose(own, rows, atol=1e-5)
