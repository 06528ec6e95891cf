"""A run's options: what ships, presets, overrides, names of configs, errors with their place."""

import dataclasses
from pathlib import Path

import pytest

from jaxprompt import schema
from jaxprompt.config import (
    PretrainConfig,
    RunConfig,
    config_names,
    dump,
    load_config,
)
from jaxprompt.data.tasks import load_task
from jaxprompt.recipes import RECIPES
from jaxprompt.sweep_config import load_sweep
from jaxprompt.t5.known import known_config
from jaxprompt.typing import UserError

MINIMAL = "output_dir: runs/x\ntask: sst2\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error(tmp_path: Path, text: str, *overrides: str, kind: type = RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), overrides, kind)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in message
    return message


def kind_of(name: str) -> type:
    return PretrainConfig if name.startswith("pretrain/") else RunConfig


SWEEPS = {"sweep": 6} | {f"paper/{size}": 24 for size in ("small", "base", "large", "xl", "xxl")}
COMPARISONS = ("compare", "mini/compare-sst2", "mini/compare-e2e")  # test_compare.py reads them
RUNGS = ("250k", "1m", "4m", "16m", "60m")
PHASES = tuple(f"pretrain/ladder/{rung}" for rung in RUNGS)  # test_phases.py
SCALES = config_names("scale")  # test_scale.py
SEVERAL = {*SWEEPS, *COMPARISONS, *PHASES, *(f"scale/{name}" for name in SCALES)}
SINGLE = [name for name in config_names() if "tasks/" not in name and name not in SEVERAL]


@pytest.mark.parametrize("name", SINGLE)
def test_what_ships_reads_and_its_dump_repeats_it(tmp_path, name):
    config = load_config(name, (), kind_of(name))
    again = load_config(write(tmp_path, dump(config)), (), kind_of(name))
    assert again == config


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_ships_reads_and_each_run_s_dump_repeats_it(tmp_path, name):
    plan = load_sweep(name)
    assert len(plan.runs) == SWEEPS[name]
    for run in plan.runs:
        assert load_config(write(tmp_path, dump(run.config))) == run.config


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_the_paper_s_runs_divide_over_the_chips_they_are_for(size: str):
    run = load_sweep(f"paper/{size}").runs[0].config
    t5 = known_config(run.backbone.name)
    assert t5 is not None and run.mesh.data * run.mesh.model in (4, 16)
    assert not any(n % run.mesh.model for n in (t5.num_heads, t5.d_ff, t5.vocab_size))
    assert run.data.batch_size * run.train.at_once % run.mesh.data == 0


def test_there_are_configs_to_read():
    assert {"quickstart", "tasks/sst2"} <= set(config_names())
    assert "sst2" in config_names("tasks")


def test_a_path_and_a_name_are_the_same_config():
    path = schema.configs_directory() / "quickstart.yaml"
    assert load_config(path) == load_config(str(path)) == load_config("quickstart")


def test_dump_is_complete(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    written, _ = schema.read_yaml(write(tmp_path, dump(config)))

    def assert_complete(value: object, keys: object) -> None:
        if dataclasses.is_dataclass(value):
            assert isinstance(keys, dict)
            assert list(keys) == [field.name for field in dataclasses.fields(value)]
            for name, below in keys.items():
                assert_complete(getattr(value, name), below)

    assert_complete(config, written)


def test_a_task_by_name_is_its_preset(tmp_path):
    assert load_config(write(tmp_path, MINIMAL)).task == load_task("sst2").config


def test_a_preset_with_keys_of_its_own(tmp_path):
    text = "output_dir: x\ntask:\n  preset: sst2\n  source: {train: a.tsv, validation: b.tsv}\n"
    preset = load_task("sst2").config
    task = load_config(write(tmp_path, text)).task
    source = dataclasses.replace(preset.source, train="a.tsv", validation="b.tsv")
    assert task == dataclasses.replace(preset, source=source)


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=rte", "task.source.train=a.tsv"],
        ["task.source.train=a.tsv", "task=rte"],
        ["task.source.train=a.tsv", "task.preset=rte"],
    ],
)
def test_a_task_of_the_command_line_in_any_order(tmp_path, overrides):
    text = MINIMAL if "task=rte" in overrides else "output_dir: x\ntask: {preset: sst2}\n"
    task = load_config(write(tmp_path, text), overrides).task
    preset = load_task("rte").config
    assert task == dataclasses.replace(
        preset, source=dataclasses.replace(preset.source, train="a.tsv")
    )


def test_a_task_written_out_in_the_config(tmp_path):
    text = """
output_dir: x
task:
  name: mine
  source: {train: mine.jsonl}
  input: "review: {text}"
  labels: {0: no, 1: yes}
"""
    task = load_config(write(tmp_path, text)).task
    assert task.input == "review: {text}"
    assert task.labels == {"0": "no", "1": "yes"}


def test_overrides_reach_every_room(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "seed=7",
            "tune=model",
            "backbone.name=google/t5-base-lm-adapt",
            "backbone.dtype=bfloat16",
            "method.length=5",
            "layout={prompt:2}{input}{prompt:3}",
            "data.batch_size=4",
            "optim.recipe=adamw",
            "optim.learning_rate=1e-3",
            "train.steps=10",
            "mesh.model=2",
            "logging.sinks=[tensorboard]",
        ],
    )
    assert (config.seed, config.tune, config.layout) == (7, "model", "{prompt:2}{input}{prompt:3}")
    assert config.backbone.compute().dtype == "bfloat16"
    assert (config.method.length, config.data.batch_size, config.train.steps) == (5, 4, 10)
    assert (config.optim.recipe, config.optim.learning_rate) == ("adamw", 0.001)
    assert (config.mesh.model, config.logging.sinks) == (2, ("tensorboard",))


def test_a_recipe_fixes_what_the_config_leaves_open(tmp_path):
    path = write(tmp_path, MINIMAL + "data: {eval_batch_size: 8}\ntrain:\nmethod: {length: 7}\n")
    recipe = RECIPES["google-oss"]
    config = load_config(path, ["optim.recipe=google-oss", "backbone={dtype: bfloat16}"])
    assert (config.data.batch_size, config.data.eval_batch_size) == (recipe.batch_size, 8)
    assert (config.train.steps, config.train.z_loss) == (recipe.steps, recipe.z_loss)
    assert (config.backbone.dropout, config.backbone.dtype) == (recipe.dropout, "bfloat16")
    assert (config.method.length, config.method.init) == (7, "labels")
    assert load_config(path, ["train.epochs=2"]).train.steps == 0
    assert load_config(path, ["train.steps=5", "backbone.dropout=0.2"]).backbone.dropout == 0.2


def test_without_labels_a_prompt_does_not_start_from_them(tmp_path):
    config = load_config(write(tmp_path, "output_dir: x\ntask: {source: {train: a.jsonl}}\n"))
    assert RECIPES["paper"].init == "labels"
    assert config.method.init == "vocab"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (MINIMAL + "optimizer: adamw", [], "run.yaml:3: unknown key 'optimizer'"),
        (MINIMAL, ["learning_rate=1"], "did you mean 'optim.learning_rate'?"),
        (MINIMAL, ["optim.learning_rte=1"], "did you mean 'optim.learning_rate'?"),
        (MINIMAL, ["train.steps=ten"], "'train.steps' must be an integer, got the text 'ten'"),
        (MINIMAL, ["train.steps=-1"], "train.steps is -1"),
        (MINIMAL, ["method.length=0"], "override 'method.length=0': method.length is 0"),
        (MINIMAL, ["data.batch_size=0"], "data.batch_size is 0"),
        (MINIMAL, ["mesh.model=0"], "mesh.model is 0, it must be at least 1"),
        (MINIMAL, ["backbone.dropout=1"], "backbone.dropout is 1.0"),
        (MINIMAL, ["backbone.dtype=bf16"], "did you mean 'bfloat16'?"),
        ("task: sst2", [], "run.yaml: 'output_dir' is missing"),
        ("output_dir: x", [], "run.yaml: 'task' is missing"),
        (
            "output_dir: x\ntask: stt2",
            [],
            "run.yaml:2: there is no task 'stt2'; did you mean sst2?",
        ),
        ("output_dir: x\ntask:\n  preset: stt2", [], "there is no task 'stt2'; did you mean sst2?"),
        (MINIMAL, ["task=zzzz"], "override 'task=zzzz': there is no task 'zzzz'; there are"),
        (MINIMAL, ["task.sourc.train=x"], "unknown key 'task.sourc'; did you mean 'task.source'?"),
        (MINIMAL + "optim: {recipe: [a]}", [], "'optim.recipe' must be text, got a list of 1"),
        (MINIMAL, ["data=3"], "override 'data=3': 'data' must be a mapping (key: value), got 3"),
        (MINIMAL, ["steps"], "override 'steps' is not of the form key.sub=value"),
    ],
)
def test_errors(tmp_path, text, overrides, expected):
    assert expected in error(tmp_path, text, *overrides)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quikstart", "no config of that name ships; did you mean 'quickstart'?"),
        ("zzz.yaml", "no config of that name ships; those that ship are"),
        ("/", "no config file '/'"),
    ],
)
def test_a_config_that_is_not_there(name, expected):
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert expected in str(caught.value)


def test_pretraining_starts_from_sizes_or_from_a_backbone(tmp_path):
    text = "output_dir: x\nmixture: {entries: [{objective: prefix_lm, files: [a.jsonl]}]}\n"
    adapted = load_config(
        write(tmp_path, text), ["backbone.name=google/t5-v1_1-small"], PretrainConfig
    )
    assert adapted.model is None and adapted.optim.recipe == "pretrain"
    new = load_config(write(tmp_path, text), ["model.d_model=64", "tokenizer=t"], PretrainConfig)
    assert new.model is not None and new.model.d_model == 64
    for lonely in ("model.d_model=64", "tokenizer=t"):
        assert "go together" in error(tmp_path, text, lonely, kind=PretrainConfig)
