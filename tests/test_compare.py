"""Methods compared: what the table says is what evaluate and the runs' own records say."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_fixtures import World, compiled, records, review_rows, world, write_rows

from jaxprompt.cli import main
from jaxprompt.compare import compare, nearly_there
from jaxprompt.compare_config import load_comparison
from jaxprompt.config import load_config
from jaxprompt.prompts import METHODS
from jaxprompt.sweep_config import load_sweep
from jaxprompt.training import TrainResult
from jaxprompt.typing import UserError

__all__ = ["compiled", "world"]  # fixtures

METHODS_COMPARED = {
    "soft": {"optim.learning_rate": 0.2},
    "low rank": {"method": {"name": "dpt", "rank": 2}, "optim": {"recipe": "adamw"}},
}


@pytest.fixture(scope="module")
def config(world: World) -> Path:
    """A comparison over the tiny world, with a test split."""
    mapping = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    mapping["task"]["source"]["test"] = str(
        write_rows(world.root / "test.jsonl", review_rows(30, seed=9))
    )
    mapping["compare"] = {"seeds": [0, 1], "methods": METHODS_COMPARED}
    path = world.root / "compare.yaml"
    path.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
    return path


def told_by(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_the_table_says_what_evaluate_and_the_runs_say(config: Path, tmp_path: Path, capsys):
    place = tmp_path / "compare"
    words = ["compare", str(config), f"output_dir={place}", "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    rows = {row["name"]: row for row in told_by(said.out)}
    assert set(rows) == set(METHODS_COMPARED)
    plan = load_comparison(config, [f"output_dir={place}"])
    for name, row in rows.items():
        runs = plan.sweeps[name].runs
        kept = [Path(run.config.output_dir) for run in runs]
        assert main(["evaluate", *[str(run / "best") for run in kept], "--split", "test",
                     "--json"]) == 0  # fmt: skip
        alone = told_by(capsys.readouterr().out)[:2]
        assert row["scores"] == pytest.approx([one["scores"]["accuracy"]["value"] for one in alone])
        assert f"\n{name}: {', '.join(f'{one:.1f}' for one in row['scores'])}\n" in said.err
        assert row["mean"] == pytest.approx(np.mean(row["scores"]))
        assert row["stdev"] == pytest.approx(np.std(row["scores"], ddof=1))
        options = runs[0].config.method
        sizes = load_config(kept[0] / "config.yaml").method
        assert sizes == options and row["method"] == options.name
        assert row["artifact_bytes"] == sum(
            path.stat().st_size for path in (kept[0] / "best").iterdir()
        )
        assert row["train_rate"] > 0 and row["predict_rate"] > 0 and row["diverged"] == 0
        steps = []
        for run in kept:
            curve = {r["step"]: r["eval/accuracy"] for r in records(run) if "eval/accuracy" in r}
            steps.append(min(s for s, v in curve.items() if v >= 0.95 * max(curve.values())))
        assert row["nearly_steps"] == np.mean(steps)
    assert rows["soft"]["parameters"] == 4 * 16 and rows["low rank"]["parameters"] == 2 * (4 + 16)
    written = json.loads((place / "compare.json").read_text(encoding="utf-8"))
    assert written["split"] == "test" and written["examples"] == 30
    assert [row["name"] for row in written["methods"]] == list(rows)
    assert f"most frequent target {written['majority']:.1f}" in said.err
    assert [row["mean"] for row in rows.values()] == sorted(
        (row["mean"] for row in rows.values()), reverse=True
    )
    again = compare(load_comparison(config, [f"output_dir={place}"], ["soft"]))  # nothing is left
    assert again is not None and len(again.rows) == 1
    assert again.rows[0].scores == rows["soft"]["scores"]
    assert again.rows[0].train_rate == rows["soft"]["train_rate"]
    assert (place / "plots" / "compare.png").exists() == ("compare.png" in again.picture)


def test_when_a_run_is_nearly_there(tmp_path: Path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 10, "eval/a": 40.0, "eval/b": 90.0},
             {"step": 20, "eval/a": 70.0, "eval/b": 84.0}, {"step": 30, "eval/a": 80.0,
             "eval/b": 80.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def result(diverged: int) -> TrainResult:
        return TrainResult(
            output_dir=tmp_path, prompt=tmp_path, metrics={"a": 80.0, "b": 80.0},
            score_names=["a", "b"], bare={}, majority={}, best_step=30, steps=30,
            examples_per_second=1.0, prompt_bytes=1, backbone_bytes=1, finished=True,
            diverged=diverged,
        )  # fmt: skip

    assert nearly_there(result(0)) == 20  # (70 + 84) / 2 is above 95 % of 80, (40 + 90) / 2 is not
    assert nearly_there(result(12)) is None


@pytest.mark.parametrize(
    ("compared", "words"),
    [
        (None, "there is nothing to compare"),
        ({"methods": {"soft": {}}}, "`seeds` and `methods` and nothing else"),
        ({"seeds": [], "methods": {"soft": {}}}, "list of numbers"),
        ({"seeds": [0, 0], "methods": {"soft": {}}}, "one stands there twice"),
        ({"seeds": ["a"], "methods": {"soft": {}}}, "'a' is no whole number"),
        ({"seeds": [0], "methods": ["soft"]}, "mapping of names"),
        ({"seeds": [0], "methods": {"sofd": {}}}, "begins with the name of no method"),
        ({"seeds": [0], "methods": {"soft": 3}}, "must be a mapping of a run's options"),
        ({"seeds": [0], "methods": {"soft": {"task": "rte"}}}, "task is the same for all"),
        ({"seeds": [0], "methods": {"soft": {"seed": 4}}}, "seed is the same for all"),
        ({"seeds": [0], "methods": {"soft": {"method": {"rank": 2}}}}, "method.rank"),
        ({"seeds": [0], "methods": {"soft": {}, "soft!": {"method.name": "soft"}}}, "rename one"),
    ],
)
def test_what_cannot_be_compared(world: World, tmp_path: Path, compared, words: str):
    mapping = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    if compared is not None:
        mapping["compare"] = compared
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    with pytest.raises(UserError, match=r"compare\.yaml") as error:
        load_comparison(path)
    assert words in str(error.value)


def test_methods_are_compared_on_one_task():
    mixed = "task={mixture: [demo-kind, demo-topic]}"
    with pytest.raises(UserError, match=r"compared on one task, and task\.mixture has several"):
        load_comparison("compare", [mixed])


def test_a_comparison_is_no_run_and_names_are_checked(config: Path):
    for load in (load_config, load_sweep):
        with pytest.raises(UserError, match="`jaxprompt compare` runs it"):
            load(config)
    with pytest.raises(UserError, match=r"--only 'prefix' is not one of .* soft, low rank"):
        load_comparison(config, [], ["prefix"])


@pytest.mark.parametrize("name", ["compare", "mini/compare-sst2", "mini/compare-e2e"])
def test_the_comparisons_that_ship_read(name: str):
    plan = load_comparison(name, ["compare.seeds=[4]"])
    assert all(one.runs[0].config.seed == 4 for one in plan.sweeps.values())
    compared = {run.config.method.name for one in plan.sweeps.values() for run in one.runs}
    others = {"attempt", "mpt", "multitask"}  # want prompts of other tasks
    assert compared == METHODS.keys() - others if "mini" in name else compared < METHODS.keys()
