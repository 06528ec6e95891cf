"""How backbones of ours are measured and packaged: report, checks, card, on a tiny one."""

import dataclasses
import json
import lzma
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from run_fixtures import CONFIG, World, make_world, write_backbone

from jaxprompt.config import BackboneConfig, PretrainConfig, dump, load_config
from jaxprompt.convert import convert_backbone
from jaxprompt.data.pretraining import MixtureConfig, MixtureEntry
from jaxprompt.loop import LoopConfig
from jaxprompt.t5.backbones import Packaged, fingerprint
from jaxprompt.train import TrainResult
from jaxprompt.typing import UserError

TOOLS = str(Path(__file__).parents[1] / "tools" / "mini")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return make_world(root, root)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, world: World) -> ModuleType:
    """The tool, with the tiny task in place of the real ones."""
    monkeypatch.syspath_prepend(TOOLS)
    import evaluate

    monkeypatch.setattr(
        evaluate, "MEASURES", {"tiny": evaluate.Measure(str(world.config), model_steps=7)}
    )
    return evaluate


@pytest.fixture
def package(evaluate: ModuleType) -> ModuleType:
    import package

    return package


def arguments(world: World, out: Path, **changes: object) -> list[str]:
    given = {
        "backbone": world.root / "backbone",
        "tasks": "tiny",
        "steps": 2,
        "runs": out,
        **changes,
    }
    given.setdefault("out", out / "report.json")
    words = (word for name, value in given.items() for word in (f"--{name}", value))
    return [*map(str, words)]


def run(tool: ModuleType, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *argv])
    tool.main()


def pretend_to_train(config) -> TrainResult:
    """Scores that depend on what is tuned and on the seed."""
    score = (80.0 if config.tune == "prompt" else 90.0) + config.seed
    directory, steps = Path(config.output_dir), config.train.steps
    directory.mkdir(parents=True)
    return TrainResult(
        output_dir=directory, prompt=directory / "best", metrics={"accuracy": score},
        score_names=["accuracy"], bare={"accuracy": 51.0}, majority={"accuracy": 66.0},
        best_step=steps, steps=steps, examples_per_second=16.0, prompt_bytes=1000,
        backbone_bytes=9999, finished=True,
    )  # fmt: skip


def test_a_measured_run_is_trained_once(evaluate, world, tmp_path, monkeypatch, capsys):
    argv = [*arguments(world, tmp_path), "--seeds", "0", "--tune", "prompt"]
    run(evaluate, argv, monkeypatch)
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    (result,) = report["runs"]
    assert 0 <= result["score"] <= 100 and result["steps"] == 2 and result["length"] == 4
    assert "tiny (accuracy)" in table and f"{result['score']:.1f} (1 seed)" in table
    assert result["machine"] and result["date"].count("-") == 2

    monkeypatch.setattr(evaluate.jaxprompt, "train", None)
    run(evaluate, argv, monkeypatch)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_report_tells_mean_and_spread_of_either_tuning(
    evaluate, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate.jaxprompt, "train", pretend_to_train)
    run(evaluate, arguments(world, tmp_path), monkeypatch)
    words = capsys.readouterr().out.split()
    assert words[-12:] == "66.0 51.0 81.0 ± 1.0 (3 seeds) 91.0 ± 1.0 (3 seeds)".split()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["backbone"]["fingerprint"] == fingerprint(world.root / "backbone")
    assert {(r["tune"], r["seconds"]) for r in report["runs"]} == {("prompt", 1.0), ("model", 1.0)}


def test_a_run_is_evaluated_only_after_its_last_step(evaluate, world, tmp_path):
    config = evaluate.configure("tiny", "prompt", 0, world.root / "backbone", None, 7, tmp_path)
    assert config.train.steps == 7 and config.train.eval_every == 0
    assert (
        evaluate.configure("tiny", "model", 0, world.root / "backbone", None, 0, tmp_path).tune
        == "model"
    )


def test_whatever_decides_a_result_is_in_the_name_of_its_directory(evaluate, world, tmp_path):
    other = write_backbone(tmp_path / "other", seed=1)
    settings = [
        ("prompt", 0, world.root / "backbone", 7),
        ("model", 0, world.root / "backbone", 7),
        ("prompt", 1, world.root / "backbone", 7),
        ("prompt", 0, world.root / "backbone", 8),
        ("prompt", 0, other, 7),
    ]
    places = [
        evaluate.configure("tiny", tune, seed, place, None, steps, tmp_path).output_dir
        for tune, seed, place, steps in settings
    ]
    assert len(set(places)) == len(settings)


def test_a_stopped_run_leaves_no_result(evaluate, world, tmp_path, monkeypatch):
    def stopped(config):
        return dataclasses.replace(pretend_to_train(config), finished=False)

    monkeypatch.setattr(evaluate.jaxprompt, "train", stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        run(evaluate, arguments(world, tmp_path), monkeypatch)
    assert not list(tmp_path.rglob("result.json"))


def write_e2e(directory: Path) -> None:
    """Raw files of E2E: six inputs of two sentences each."""
    directory.mkdir(parents=True)
    for file in ("devset.csv", "testset_w_refs.csv"):
        lines = [f'"{file}, {mr}",says {mr} {n}\n' for mr in range(6) for n in range(2)]
        (directory / file).write_text("mr,ref\n" + "".join(lines))


def test_the_real_tasks_are_configs_that_ship(evaluate, world, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    write_e2e(tmp_path / "e2e")
    for task, measure in evaluate.MEASURES.items():
        for tune in ("prompt", "model"):
            config = evaluate.configure(
                task, tune, 0, world.root / "backbone", tmp_path, 0, tmp_path
            )
            assert config.task.name in (task, measure.folder) or measure.folder
            assert (config.tune, config.method.length) == (tune, 20)
            steps = measure.model_steps if tune == "model" else 0
            assert config.train.steps == (steps or load_config(measure.config).train.steps)
    with pytest.raises(UserError, match="needs --data"):
        evaluate.configure("sst2", "prompt", 0, world.root / "backbone", None, 0, tmp_path)


def test_rows_that_the_raw_data_has_not_are_cut_from_it(evaluate, world, tmp_path, monkeypatch):
    """E2E: answers are held against all sentences of an input of the test set."""
    monkeypatch.undo()
    write_e2e(tmp_path / "raw" / "e2e")
    config = evaluate.configure(
        "e2e", "prompt", 0, world.root / "backbone", tmp_path / "raw", 0, tmp_path / "runs"
    )
    source = config.task.source
    assert Path(source.data_dir) == tmp_path / "runs" / "data" / "e2e"
    rows = (Path(source.data_dir) / source.validation).read_text().splitlines()
    assert len(rows) == 6 and all(len(json.loads(row)["refs"]) == 2 for row in rows)
    assert all("testset" in row for row in rows) and config.task.references == "refs"


# ---------------------------------------------------------------- packaging


@pytest.fixture
def records(evaluate: ModuleType, world: World, tmp_path: Path, monkeypatch) -> list[str]:
    """What a pretraining run, its data and its evaluation leave behind: arguments of the tool."""
    monkeypatch.setattr(evaluate.jaxprompt, "train", pretend_to_train)
    run(evaluate, arguments(world, tmp_path / "runs"), monkeypatch)
    place = tmp_path / "mini"
    place.mkdir()
    (place / "backbone").symlink_to(world.root / "backbone")
    entries = (
        MixtureEntry("supervised", ("a.jsonl",), 0.75),
        MixtureEntry("span_corruption", ("b.jsonl",), 0.25),
    )
    config = PretrainConfig(
        str(place),
        MixtureConfig(entries, batch_size=8, row_input_length=96, row_target_length=32),
        model=CONFIG,
        tokenizer="mini_data/tokenizer",
    )
    train = dataclasses.replace(config.train, **dataclasses.asdict(LoopConfig(steps=400)))
    (place / "config.yaml").write_text(dump(dataclasses.replace(config, train=train)))
    lines = [
        {"step": 100, "loss": 4.0, "examples": 40.0, "tokens": 90.0, "examples_per_second": 4.0},
        {"step": 200, "loss": 2.5, "examples": 60.0, "tokens": 110.0, "examples_per_second": 2.0},
        {
            "step": 200,
            "eval/supervised/loss": 1.25,
            "eval/supervised/accuracy": 71.5,
            "eval/supervised/exact_match": 61.5,
        },
        {"step": 250, "loss": 9.0, "examples": 1.0, "tokens": 1.0, "examples_per_second": 1.0},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"squad": 1234, "topic": 700, "kind": 65}
    data = {
        "dropped": {"imdb: also in the test split": 383},
        "teacher_report": {"sst2_dev_accuracy": 79.47},
        "vocab_size": 8000,
        "files": {
            "text.jsonl": {
                "rows_by_source": {"novels": 1111},
                "tokens_by_source": {"novels": 22222},
            },
            "supervised.jsonl": {"rows_by_task": counts, "tokens_by_task": counts},
        },
    }
    (tmp_path / "data_card.json").write_text(json.dumps(data))
    given = {
        "run": place,
        "data-card": tmp_path / "data_card.json",
        "report": tmp_path / "runs" / "report.json",
        "out": tmp_path / "assets",
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


@pytest.fixture
def no_torch(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with torch is one test's business; importing torch takes long."""
    monkeypatch.setattr(package, "torch_difference", lambda backbone: None)


def test_the_package_holds_a_backbone_and_a_card_of_what_was_recorded(
    package, records, no_torch, tmp_path, world, monkeypatch
):
    picture = tmp_path / "mini" / "plots" / "run.png"
    picture.parent.mkdir()
    picture.write_bytes(b"the loss")
    run(package, [*records, "--trained-on", "an abacus"], monkeypatch)
    assert fingerprint(tmp_path / "assets") == fingerprint(world.root / "backbone")
    assert (tmp_path / "assets" / "loss-mini.png").read_bytes() == b"the loss"
    text = (tmp_path / "assets" / "README.md").read_text()
    for fact in (
        "| steps | 200 of 400 planned |",  # the last evaluation's, when the weights were written
        "| examples | 10,000 |",
        "| input positions | 153,600 |",
        "| target tokens | 20,000 |",
        "| machine | an abacus |",
        "![loss of mini over its steps](loss-mini.png)",
        "| loss | 2.500 at the end |",
        "loss 1.250, tokens right 71.5 %, whole targets 61.5 %",
        "0.9 hours at 3 examples/s",
        "supervised 75%, span corruption 25%",
        "public domain | 1,111 passages | 22,222 |",
        "Tasks made from these texts: topic, kind | as the texts | 765 rows |",
        "CC BY-SA 4.0 | 1,234 rows |",
        "| imdb: also in the test split | 383 |",
        "81.0 ± 1.0 (3 seeds)",
        "| output layer | its own |",
        "Prompts of 4 slots over the frozen backbone, and full tuning of the same backbone.",
        fingerprint(world.root / "backbone"),
    ):
        assert fact in text, fact
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    assert "SST-2 development set" not in text and "quickstart (demo-kind)" not in text


@pytest.mark.parametrize(
    ("task", "said"), [("sst2", "reaches 79.5 % there"), ("e2e", "against all sentences of each")]
)
def test_a_card_says_what_was_known_of_a_measured_task_alone(
    package, records, no_torch, tmp_path, monkeypatch, task, said
):
    report = tmp_path / "runs" / "report.json"
    content = json.loads(report.read_text().replace('"tiny"', f'"{task}"'))
    content["runs"] = [run for run in content["runs"] if run["tune"] == "prompt"]
    report.write_text(json.dumps(content))
    run(package, records, monkeypatch)
    text = " ".join((tmp_path / "assets" / "README.md").read_text().split())
    assert said in text and "quickstart (demo-kind)" not in text
    assert "Prompts of 4 slots over the frozen backbone. Every score" in text


def test_the_card_of_a_backbone_that_was_adapted_tells_both_runs(
    package, records, no_torch, tmp_path, world, monkeypatch
):
    second = tmp_path / "lm"
    second.mkdir()
    (second / "backbone").symlink_to(world.root / "backbone")
    config = load_config(tmp_path / "mini" / "config.yaml", (), PretrainConfig)
    adapted = dataclasses.replace(
        config, output_dir=str(second), model=None, tokenizer="",
        backbone=BackboneConfig(str(tmp_path / "mini" / "backbone")),
    )  # fmt: skip
    (second / "config.yaml").write_text(dump(adapted))
    shutil.copyfile(tmp_path / "mini" / "metrics.jsonl", second / "metrics.jsonl")
    argv = ["--run", str(second), "--data-card", str(tmp_path / "data_card.json")]
    argv += ["--name", "jaxprompt-4m-lm", "--quantize", "int8"]
    run(package, [*argv, "--out", str(tmp_path / "assets")], monkeypatch)
    assert fingerprint(tmp_path / "assets") == fingerprint(world.root / "backbone")
    text = (tmp_path / "assets" / "README.md").read_text()
    assert text.index("# jaxprompt-4m-lm") < text.index("## Training: mini")
    assert text.index("## Training: mini") < text.index("## Training: lm")
    assert "None was measured." in text and "| files | int8, " in text


def test_a_report_of_another_backbone_is_refused(
    package, records, no_torch, tmp_path, monkeypatch, capsys
):
    report = tmp_path / "runs" / "report.json"
    content = json.loads(report.read_text()) | {"backbone": {"fingerprint": "of another"}}
    report.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        run(package, records, monkeypatch)
    assert stopped.value.code == 2
    assert "measured another backbone" in capsys.readouterr().err
    assert not (tmp_path / "assets").exists()


def test_too_large_a_backbone_leaves_what_was_there(
    package, records, no_torch, tmp_path, monkeypatch, capsys
):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "README.md").write_text("the one before")
    monkeypatch.setitem(package.SHIPPED, "jaxprompt-mini", package.Form(max_bytes=1000))
    with pytest.raises(SystemExit):
        run(package, records, monkeypatch)
    assert "export_dtype: bfloat16" in capsys.readouterr().err
    assert (tmp_path / "assets" / "README.md").read_text() == "the one before"


def test_nano_is_bfloat16_and_has_its_vocabulary_once(
    package, records, no_torch, tmp_path, monkeypatch, capsys
):
    tied = {"tie_word_embeddings": True, "scale_decoder_outputs": True}
    backbone = write_backbone(tmp_path / "tied", **tied)
    vocabulary = (backbone / "tokenizer.json").read_text(encoding="utf-8")
    (backbone / "spiece.model").write_bytes(b"what tokenizer.json says")
    (tmp_path / "mini" / "backbone").unlink()
    (tmp_path / "mini" / "backbone").symlink_to(backbone)
    report = tmp_path / "runs" / "report.json"
    content = json.loads(report.read_text()) | {"backbone": {"fingerprint": fingerprint(backbone)}}
    report.write_text(json.dumps(content))
    place = tmp_path / "nano"
    monkeypatch.setitem(package.PACKAGED, "jaxprompt-nano", Packaged(place, ""))
    argv = [*records[: records.index("--out")], "--name", "jaxprompt-nano"]
    run(package, argv, monkeypatch)
    assert not (place / "spiece.model").exists()
    written = (place / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(vocabulary) and "\n" not in written
    loaded = package.load_backbone(str(place))
    assert loaded.config == dataclasses.replace(CONFIG, **tied)
    assert loaded.fingerprint == fingerprint(backbone)
    card = (place / "README.md").read_text()
    assert "# jaxprompt-nano" in card and "T5 1.0's tied embeddings" in " ".join(card.split())
    assert "| files | bfloat16, " in card and "| output layer | the embedding table; " in card

    monkeypatch.setitem(package.SHIPPED, "jaxprompt-nano", package.Form(max_bytes=1000))
    with pytest.raises(SystemExit):
        run(package, argv, monkeypatch)
    assert "MB with its card, jaxprompt-nano may be 0:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jaxprompt-mini", "give --report"),
        ("jaxprompt-nano", "give --report"),
        ("jaxprompt-4m-lm", "is not one that ships (jaxprompt-mini, jaxprompt-nano): give --out"),
    ],
)
def test_what_ships_has_a_report_and_what_does_not_a_place(
    package, records, monkeypatch, capsys, name, message
):
    argv = [*records[: records.index("--report")], "--name", name]
    with pytest.raises(SystemExit):
        run(package, argv, monkeypatch)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["mini/metrics.jsonl", "data_card.json", "runs/report.json"])
def test_a_missing_record_is_named(
    package, records, no_torch, tmp_path, monkeypatch, capsys, missing
):
    (tmp_path / missing).unlink()
    with pytest.raises(SystemExit):
        run(package, records, monkeypatch)
    message = capsys.readouterr().err
    assert str(tmp_path / missing) in message and message.count("\n") == 1


def test_torch_computes_the_same_and_a_difference_is_refused(package, world, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    backbone = package.load_backbone(str(world.root / "backbone"))
    assert package.torch_difference(backbone) < 1e-5
    convert_backbone(str(world.root / "backbone"), str(tmp_path / "int8"), quantize="int8")
    assert package.torch_difference(package.load_backbone(str(tmp_path / "int8"))) < 1e-5
    monkeypatch.setattr(package, "MAX_DIFFERENCE", 0.0)
    with pytest.raises(UserError, match="differ from torch's"):
        package.torch_difference(backbone)


def test_what_is_held_out_is_in_no_other_part(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import held_out

    monkeypatch.setattr(held_out, "SST2_TRAIN", 12)
    monkeypatch.setattr(held_out, "SST2_VALIDATION", 5)
    monkeypatch.setattr(held_out, "E2E_VALIDATION", 2)
    monkeypatch.setattr(held_out, "E2E_TEST", 3)
    write_e2e(tmp_path / "raw" / "e2e")
    (tmp_path / "raw" / "sst2").mkdir()
    rows = [f"sentence {number}\t{number % 2}" for number in range(30)]
    train = "\n".join(["sentence\tlabel", *rows, *rows[:3]])
    (tmp_path / "raw/sst2/train.tsv.xz").write_bytes(lzma.compress(train.encode()))
    (tmp_path / "raw/sst2/dev.tsv").write_text("sentence\tlabel\nits own\t1\n")
    argv = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    held_out.main(argv)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}

    sst2, e2e = tmp_path / "out/sst2", tmp_path / "out/e2e"
    trained, chosen = ((sst2 / f).read_text().splitlines() for f in ("train.tsv", "dev.tsv"))
    assert (len(trained), len(chosen)) == (13, 6) and trained[0] == chosen[0] == "sentence\tlabel"
    assert len({*trained[1:], *chosen[1:]}) == 17 and {*trained[1:], *chosen[1:]} <= {*rows}
    assert (sst2 / "test.tsv").read_text() == "sentence\tlabel\nits own\t1\n"
    parts = {
        name: [json.loads(line) for line in (e2e / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 8, "validation": 2, "test": 3
    }  # fmt: skip
    assert not {row["mr"] for row in parts["train"]} & {row["mr"] for row in parts["validation"]}
    assert all(len(row["refs"]) == 2 for row in (*parts["validation"], *parts["test"]))
    assert all(row["mr"].startswith("testset") for row in parts["test"])

    held_out.main(argv)
    assert {path: path.read_bytes() for path in first} == first
    (tmp_path / "raw/e2e/devset.csv").unlink()
    with pytest.raises(UserError, match=r"devset\.csv is not there, nor devset\.csv\.xz"):
        held_out.main(argv)
