"""`jaxprompt scale`: cells are what `train` and `evaluate` do, in one table and picture."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from run_fixtures import World, compiled, review_rows, world, write_backbone, write_rows

from jaxprompt import scale as room
from jaxprompt.cli import main
from jaxprompt.config import config_names, load_config
from jaxprompt.data.tasks import Task
from jaxprompt.measuring import machine
from jaxprompt.plots import write_scale_plot
from jaxprompt.scale import scale
from jaxprompt.scale_config import load_scale
from jaxprompt.scale_points import MEAN, Point, panels_of, read_points, rows_of
from jaxprompt.sweep_config import load_sweep
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import body_size, init_params
from jaxprompt.train import train
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures


def scale_mapping(world: World, **changed: object) -> dict:
    """Two lines over two backbones on one task, tiny."""
    mapping = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    task = mapping.pop("task")
    mapping["train"] |= {"steps": 4, "eval_every": 0, "save_every": 2}
    mapping["scale"] = {
        "seeds": [0, 1],
        "backbones": {"one": str(world.root / "backbone"), "two": str(world.root / "other")},
        "tasks": {"tiny": task},
        "lines": {"prompts": {}, "weights": {"tune": "model"}, "design": {"shots": 2}},
        **changed,
    }
    return mapping


def write(path: Path, mapping: dict) -> Path:
    path.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(world: World) -> Path:
    write_backbone(world.root / "other", seed=5)
    write_rows(world.root / "short.jsonl", review_rows(9, seed=7))
    mapping = scale_mapping(world)
    other = dict(mapping["scale"]["tasks"]["tiny"], name="short")
    other["source"] = {**other["source"], "validation": str(world.root / "short.jsonl")}
    mapping["scale"]["zero_shot"] = {"tiny": {"short": other}}
    return write(world.root / "scale.yaml", mapping)


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[0])


def test_cells_are_what_train_and_evaluate_say(config: Path, tmp_path: Path, capsys, world: World):
    place = tmp_path / "scale"
    words = ["scale", str(config), f"output_dir={place}", "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    points = [json.loads(line) for line in said.out.splitlines()]
    at = {(p["task"], p["line"], p["backbone"]): p for p in points}
    lines, backbones = ("prompts", "weights", "design"), ("one", "two")
    tasks = ("tiny", "short from tiny")
    assert set(at) == {(t, line, b) for t in tasks for line in lines for b in backbones}
    assert all(len(p["scores"]) == 2 and p["diverged"] == 0 for p in points)
    # prompts: each seed's artifact, measured by `evaluate`
    for seed in (0, 1):
        kept = place / "tiny" / "prompts" / "two" / "prompts" / f"seed-{seed}" / "best"
        own = evaluated(capsys, str(kept))
        other = evaluated(capsys, str(kept), "--data", str(world.root / "short.jsonl"))
        for task, told in zip(tasks, (own, other), strict=True):
            score = told["scores"]["accuracy"]
            assert at[task, "prompts", "two"]["scores"][seed] == pytest.approx(
                score["value"], abs=1e-4
            )
            assert at[task, "prompts", "two"]["majority"] == pytest.approx(
                score["majority"], abs=1e-4
            )
    # weights: the same run alone
    plan = load_scale(config, [f"output_dir={place}"])
    (cell,) = [c for c in plan.cells if (c.line, c.backbone) == ("weights", "one")]
    alone = dataclasses.replace(cell.sweep.runs[1].config, output_dir=str(tmp_path / "alone"))
    result = train(alone)
    assert at["tiny", "weights", "one"]["scores"][1] == pytest.approx(result.score)
    tuned = evaluated(
        capsys, "none", "--backbone", str(tmp_path / "alone" / "best"), "--task",
        str(task_file(tmp_path, plan.zero_shot["tiny"]["short"])),
        "--max-input-length", "20", "--max-target-length", "4",
    )  # fmt: skip
    assert at["short from tiny", "weights", "one"]["scores"][1] == pytest.approx(
        tuned["scores"]["accuracy"]["value"], abs=1e-4
    )
    # design: `evaluate --shots`
    task = task_file(tmp_path, cell.config.task)
    for seed in (0, 1):
        shown = evaluated(
            capsys, "none", "--backbone", str(world.root / "backbone"), "--task", str(task),
            "--shots", "2", "--seed", str(seed), "--max-input-length", "20",
            "--max-target-length", "4",
        )  # fmt: skip
        assert at["tiny", "design", "one"]["scores"][seed] == pytest.approx(
            shown["scores"]["accuracy"]["value"], abs=1e-4
        )
    # nothing large of tuned weights is left, and prompts are kept
    files = [path.name for path in (place / "tiny" / "weights").rglob("*")]
    assert not {"model.safetensors", "checkpoints", "best", "prompt"} & set(files)
    assert all(p["metrics"] == {"accuracy": p["scores"]} for p in points)
    # the table and the picture tell the same
    table = (place / "table.md").read_text(encoding="utf-8")
    for point in points:
        assert f"{point['mean']:.1f} ± {point['stdev']:.1f}" in table
    assert json.loads((place / "scale.json").read_text(encoding="utf-8")) == points
    assert list(map(room.told, read_points(place / "scale.json"))) == points
    assert all(p["machine"] == machine() and p["date"].count("-") == 2 for p in points)
    assert (place / "plots" / "scale.png").exists() == ("scale.png" in said.err)
    assert "bare backbone" in said.err and "most frequent target" in said.err


def task_file(place: Path, task) -> Path:
    path = place / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(task)))), "utf-8")
    return path


def test_a_cell_that_is_done_is_not_measured_again(config: Path, tmp_path: Path, monkeypatch):
    words = [f"output_dir={tmp_path}", "scale.seeds=[0]", "scale.zero_shot=null"]
    first = scale(load_scale(config, words, ["design"]))
    monkeypatch.setattr(room, "sweep", None)
    monkeypatch.setattr(room, "load_backbone", None)
    assert first is not None and scale(load_scale(config, words, ["design"])) == first
    with pytest.raises(UserError, match=r"was trained with shots 2, now 1: set them back"):
        scale(load_scale(config, [*words, "scale.lines={design: {shots: 1}}"]))
    one = [*words, f"scale.backbones={{one: {tmp_path}/nowhere}}"]
    with pytest.raises(UserError, match="nowhere"):
        scale(load_scale(config, one, ["design"]))


def test_pictures_of_some_lines(config: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    words = [f"output_dir={tmp_path}", "scale.seeds=[0]", "scale.zero_shot=null",
             "scale.lines={none: {shots: 0}, two: {shots: 2}}"]  # fmt: skip
    plan = load_scale(config, [*words, "scale.pictures={shots: [none, two], no shots: [none]}"])
    done = scale(plan)
    assert done is not None
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"shots.png", "no-shots.png"} and len(done.pictures) == 2


def test_inputs_that_are_cut_are_said(config: Path, tmp_path: Path, capsys):
    """The question stands last, behind the shots: cut off, nothing would be asked."""
    lines = "scale.lines={cut: {shots: 2, data.max_input_length: 6}}"
    words = [f"output_dir={tmp_path}", "scale.seeds=[0]", "scale.zero_shot=null", lines]
    place = "scale.backbones={one: %s}" % (config.parent / "backbone")
    assert scale(load_scale(config, [*words, place, "data.length_buckets=[]"])) is not None
    said = capsys.readouterr().err
    assert "inputs were cut to 6 tokens" in said and "data.max_input_length takes more" in said


def test_a_stopped_cell_ends_the_command_with_how_to_go_on(
    config: Path, tmp_path: Path, capsys, monkeypatch
):
    class Stopped:
        finished = False

    monkeypatch.setattr(room, "sweep", lambda *_, **__: Stopped())
    assert main(["scale", str(config), f"output_dir={tmp_path}", "--only", "prompts"]) == 0
    said = capsys.readouterr().err
    assert f"jaxprompt scale {config} output_dir={tmp_path} --only prompts" in said
    assert not (tmp_path / "scale.json").exists()


def test_a_lines_own_backbones_and_options(world: World, tmp_path: Path):
    other = str(world.root / "other")
    mapping = scale_mapping(
        world, lines={"long": {"method.length": 7, "backbones": {"two": other}}, "short": {}}
    )
    plan = load_scale(write(tmp_path / "s.yaml", mapping))
    told = [
        (c.line, c.backbone, c.config.method.length, c.config.backbone.name) for c in plan.cells
    ]
    assert told == [
        ("long", "two", 7, other), ("short", "one", 4, str(world.root / "backbone")),
        ("short", "two", 4, other),
    ]  # fmt: skip
    tuned = load_scale(write(tmp_path / "t.yaml", scale_mapping(world))).cells[2]
    assert tuned.config.tune == "model" and tuned.config.train.at_once == 1


def point(task: str, scores: list[float], line: str = "a", **changed: object) -> Point:
    made = Point(
        task, task, line, "b", 10, "0f", scores, {}, 0, 40.0, 50.0, "an abacus", "2026-12-01"
    )
    return dataclasses.replace(made, **changed)  # type: ignore[arg-type]


def test_what_is_no_result_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"scale\.json: cannot be read"):
        read_points(tmp_path / "scale.json")
    for content in ("{", "[{}]", "[3]"):
        (tmp_path / "scale.json").write_text(content)
        with pytest.raises(UserError, match=r"is no scale\.json of `jaxprompt scale`"):
            read_points(tmp_path / "scale.json")


def test_the_mean_is_of_the_tasks_that_have_all():
    points = [point("x", [60.0, 70.0]), point("y", [80.0, 100.0]), point("x", [1.0], "odd")]
    panels = panels_of(points)
    assert list(panels) == [MEAN, "x", "y"]
    assert panels[MEAN].lines == {"a": [(10, [70.0, 85.0])]}
    assert panels["x"].lines == {"a": [(10, [60.0, 70.0])], "odd": [(10, [1.0])]}
    assert panels["x"].bare == [(10, 40.0)] and panels["x"].majority == 50.0
    rows, header = rows_of(points)
    assert header == ["validation, %", "backbone", "x", "y", MEAN]
    assert rows == [
        ["a", "b", "65.0 ± 7.1", "90.0 ± 14.1", 77.5],
        ["odd", "b", "1.0", "", ""],
        ["bare backbone", "b", 40.0, 40.0, 40.0],
        ["most frequent target", "", 50.0, 50.0, 50.0],
    ]


def test_what_was_transferred_is_not_in_the_mean():
    points = [
        point("y from x", [0.0], trained_on="x", majority=0.0),
        point("x", [60.0]),
        point("y", [80.0]),
    ]
    rows, header = rows_of(points)
    assert header[2:] == ["x", "y", "y from x", MEAN]
    assert [row[-1] for row in rows] == [70.0, 40.0, 50.0]
    panels = panels_of(points)
    assert list(panels) == [MEAN, "x", "y", "y from x"]
    assert panels[MEAN].lines == {"a": [(10, [70.0])]}
    rows, header = rows_of(points[:2])
    assert header[2:] == ["x", "y from x"] and rows[0][2:] == ["60.0", "0.0"]


def test_a_line_without_a_score_is_said_to_have_diverged():
    gone = point("x", [], diverged=2)
    assert rows_of([gone])[0][0] == ["a", "b", "diverged"]
    assert panels_of([gone])["x"].lines == {"a": []}
    some = point("x", [7.0], diverged=1)
    assert rows_of([some])[0][0] == ["a", "b", "7.0 (+1 diverged)"]


def test_other_weights_of_a_size_have_a_bare_backbone_of_their_own():
    points = [
        point("x", [9.0]),
        point("x", [8.0], "same"),
        point("x", [7.0], "other", fingerprint="1f", bare=30.0),
    ]
    rows, _ = rows_of(points)
    assert rows[3:5] == [["bare backbone", "b", 40.0], ["bare backbone of other", "b", 30.0]]


def test_the_body_is_all_but_embeddings_and_output_layer():
    config = T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    tree = init_params(config, jax.random.key(0))
    sizes = [math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree)]
    assert body_size(config) == sum(sizes) - 2 * 50 * 8
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    assert body_size(tied) == body_size(config)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "there are no sizes to go over"),
        ({"seed": [0]}, "'seed' is none of them"),
        ({"lines": None}, "scale.lines must be a mapping of names"),
        ({"seeds": []}, "scale.seeds must be a list of numbers"),
        ({"tasks": {"tiny": 3}}, "scale.tasks.tiny must be a mapping of a task's options"),
        ({"tasks": ["sst3"]}, "there is no task 'sst3'; did you mean sst2"),
        ({"backbones": {"one": 3}}, "one must be a directory or a name on the hub, got"),
        ({"lines": {"a": 3}}, "scale.lines.a must be a mapping of a run's options"),
        ({"lines": {"a": {"shots": -1}}}, "shots is -1; it has to be a whole number"),
        ({"lines": {"a": {"seed": 2}}}, "seed is not a line's own"),
        ({"lines": {"a": {"backbone.name": "x"}}}, "backbone.name is not a line's own"),
        ({"lines": {"a": {"backbones": {"six": "x"}}}}, "'six' is none of scale.backbones"),
        ({"lines": {"a": {"methd": {}}}}, "did you mean 'method'"),
        ({"lines": {"a b": {}, "a!b": {}}}, "two names give the same directory"),
        ({"pictures": {"p": "prompts"}}, "scale.pictures.p must be a list of names of lines"),
        ({"pictures": {"p": ["prompt"]}}, "'prompt' is none of scale.lines (prompts, weights"),
        ({"zero_shot": {"rte": ["cb"]}}, "'rte' is none of scale.tasks"),
    ],
)
def test_what_cannot_be_gone_over(world: World, tmp_path: Path, changed, words: str):
    mapping = scale_mapping(world, **(changed or {}))
    if changed is None:
        del mapping["scale"]
        mapping["task"] = "sst2"
    path = write(tmp_path / "scale.yaml", mapping)
    with pytest.raises(UserError, match=r"scale\.yaml") as error:
        load_scale(path)
    assert words in str(error.value)


def test_a_missing_section_and_two_kinds_are_said(world: World, tmp_path: Path):
    mapping = scale_mapping(world)
    del mapping["scale"]["lines"]
    with pytest.raises(UserError, match="'lines' is missing"):
        load_scale(write(tmp_path / "a.yaml", mapping))
    mapping = {**scale_mapping(world), "sweep": {"seed": [1]}}
    with pytest.raises(UserError, match="either `scale` or `sweep`"):
        load_scale(write(tmp_path / "b.yaml", mapping))


def test_it_is_no_run_and_names_are_checked(config: Path):
    for load in (load_config, load_sweep):
        with pytest.raises(UserError, match="`jaxprompt scale` runs it"):
            load(config)
    with pytest.raises(UserError, match=r"--only 'weight' is not one of the lines: prompts"):
        load_scale(config, [], ["weight"])


SHIPPED = {  # cells
    "figure1": 6 * 3 * 3,
    "figure1-lm": 6 * 3 * 3,
    "figure3": 1 * 9 * 3,
    "rates": 1 * 10 * 3,
    "demo": 3 * 3 * 2,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_reads(name: str):
    plan = load_scale(f"scale/{name}")
    assert len(plan.cells) == SHIPPED[name] and plan.output_dir == f"runs/scale/{name}"
    for cell in plan.cells:
        assert cell.seeds[0] == 0 and cell.config.train.eval_every == 0
        assert cell.config.method.length in (1, 5, 20, 100)
    assert sorted(SHIPPED) == sorted(set(config_names("scale")) - {"ladder"})
    with pytest.raises(UserError, match="'tasks' is missing"):
        load_scale("scale/ladder")


def test_what_is_transferred_to_is_asked_in_the_words_of_what_was_trained():
    plan = load_scale("scale/figure1")
    row = {"Quality": "1", "#1 String": "a b", "#2 String": "c"}
    config = plan.zero_shot["qqp"]["mrpc"]
    renamed = {config.source.rename.get(key, key): value for key, value in row.items()}
    example = Task(config).example(renamed, "here")
    assert (example.input_text, example.target) == ("question1: a b question2: c", "duplicate")
    config = plan.zero_shot["mrpc"]["qqp"]
    row = {"text_a": "a?", "text_b": "b?", "label": "0"}
    renamed = {config.source.rename.get(key, key): value for key, value in row.items()}
    example = Task(config).example(renamed, "here")
    assert example.input_text == "sentence1: a? sentence2: b?"
    assert example.target == "not_equivalent"


def test_a_long_name_of_a_line_leaves_the_panel_its_width(tmp_path: Path):
    """The legend stands beside the panels; the picture grows with it."""
    images = pytest.importorskip("matplotlib.image")
    widths = []
    for name in ("a", "20 slots, sampled vocabulary, supervised mixture"):
        panels = panels_of([point("x", [60.0, 70.0], name)])
        write_scale_plot(tmp_path / "scale.png", panels)
        dark = images.imread(tmp_path / "scale.png")[..., :3].max(axis=2) < 0.4
        runs = ("".join("x "[not one] for one in row).split() for row in dark)
        widths.append(max(len(run) for row in runs for run in row))  # the axis below
    assert widths[1] > 0.8 * widths[0] > 150
