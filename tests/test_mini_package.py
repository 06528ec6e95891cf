"""How backbones of ours are packaged: form, checks, card, on a tiny one."""

import dataclasses
import json
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
from jaxprompt.scale_config import load_scale
from jaxprompt.scale_points import Point, told
from jaxprompt.t5.backbones import Packaged, fingerprint
from jaxprompt.typing import UserError

TOOLS = str(Path(__file__).parents[1] / "tools" / "mini")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return make_world(root, root)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    import package

    return package


def run(tool: ModuleType, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *argv])
    tool.main()


def write_scores(path: Path, weights: str, **changed: object) -> None:
    """What `jaxprompt scale` leaves of a backbone and of another one."""
    own = Point(
        "tiny", "tiny", "prompt tuning", "4M", 10, weights, [80.0, 81.0, 82.0], {"accuracy": []}, 0,
        51.0, 66.0, "an abacus of wood", "2026-11-30",
    )  # fmt: skip
    own = dataclasses.replace(own, **changed)  # type: ignore[arg-type]
    other = dataclasses.replace(own, fingerprint="0f", backbone="1M", scores=[12.5] * 3)
    path.write_text(json.dumps(list(map(told, (other, own)))))


@pytest.fixture
def records(world: World, tmp_path: Path) -> list[str]:
    """What a pretraining run, its data and its scores leave behind: arguments of the tool."""
    write_scores(tmp_path / "scale.json", fingerprint(world.root / "backbone"))
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
        "scores": tmp_path / "scale.json",
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
    words = " ".join(text.split())
    assert "12.5" not in words and "standard deviation over 3 seeds" in words
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
        "| prompt tuning | 4M | 81.0 ± 1.0 |",
        "| bare backbone | 4M | 51.0 |",
        "| most frequent target |  | 66.0 |",
        "A score is accuracy (tiny), from one evaluation after the last step",
        "Measured on an abacus of wood; 2026-11-30.",
        "| output layer | its own |",
        fingerprint(world.root / "backbone"),
    ):
        assert fact in text or fact in words, fact
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    assert "SST-2 development set" not in text


@pytest.mark.parametrize(
    ("task", "said"), [("sst2", "reaches 79.5 % there"), ("e2e", "against all sentences of each")]
)
def test_a_card_says_what_was_known_of_a_measured_task_alone(
    package, records, no_torch, world, tmp_path, monkeypatch, task, said
):
    metrics = {"accuracy": [], "f1": []}
    weights = fingerprint(world.root / "backbone")
    write_scores(tmp_path / "scale.json", weights, task=task, trained_on=task, metrics=metrics)
    run(package, records, monkeypatch)
    text = " ".join((tmp_path / "assets" / "README.md").read_text().split())
    assert said in text and f"A score is the mean of accuracy and f1 ({task}), from" in text


def test_what_a_card_says_of_its_scores_is_in_the_config():
    plan = load_scale("scale/figure1")
    prompts, weights, design = plan.cells[0], plan.cells[3], plan.cells[6]
    assert (prompts.config.method.length, prompts.config.train.eval_every) == (20, 0)
    assert weights.config.tune == "model" and design.shots == 4


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


def test_scores_of_other_backbones_are_refused(
    package, records, no_torch, tmp_path, monkeypatch, capsys
):
    write_scores(tmp_path / "scale.json", "of another")
    with pytest.raises(SystemExit) as stopped:
        run(package, records, monkeypatch)
    assert stopped.value.code == 2
    assert "measured other backbones than" in capsys.readouterr().err
    assert not (tmp_path / "assets").exists()


def test_too_large_a_backbone_leaves_what_was_there(
    package, records, no_torch, tmp_path, monkeypatch, capsys
):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "README.md").write_text("the one before")
    monkeypatch.setitem(package.SHIPPED, "jaxprompt-mini", package.Form(max_bytes=1000))
    with pytest.raises(SystemExit):
        run(package, records, monkeypatch)
    assert "give --quantize int8" in capsys.readouterr().err
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
    write_scores(tmp_path / "scale.json", fingerprint(backbone))
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
        ("jaxprompt-mini", "give --scores"),
        ("jaxprompt-nano", "give --scores"),
        ("jaxprompt-4m-lm", "is not one that ships (jaxprompt-mini, jaxprompt-nano): give --out"),
    ],
)
def test_what_ships_has_scores_and_what_does_not_a_place(
    package, records, monkeypatch, capsys, name, message
):
    argv = [*records[: records.index("--scores")], "--name", name]
    with pytest.raises(SystemExit):
        run(package, argv, monkeypatch)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["mini/metrics.jsonl", "data_card.json", "scale.json"])
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
