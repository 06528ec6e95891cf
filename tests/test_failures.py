"""What must fail well, through the command line: one sentence, exit code 2, nothing lost."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from disks import mounted
from run_fixtures import (
    assert_same_end,
    compiled,
    losses,
    make_world,
    saved_state,
    snapshot,
    spawn,
    write_backbone,
)

from jaxprompt import cli
from jaxprompt.artifact import load_artifact

__all__ = ["compiled"]  # a fixture


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory, its config seen from inside, with a run of 4 steps in `run`, and more."""
    root = tmp_path_factory.mktemp("finished")
    make_world(root, Path())
    write_backbone(root / "narrow", d_model=12)
    write_backbone(root / "twin", seed=9)
    lengths = {"max_input_length": 12, "max_target_length": 8}
    mixture = {
        "output_dir": "pretrained", "backbone": {"name": "backbone"}, "train": {"steps": 2},
        "mixture": {
            "batch_size": 4,
            "entries": [{"objective": "prefix_lm", "files": ["train.jsonl"], **lengths}],
        },
        "mesh": {"data": 1}, "logging": {"terminal": False},
    }  # fmt: skip
    (root / "mixture.yaml").write_text(yaml.safe_dump(mixture), encoding="utf-8")
    (root / "answers.jsonl").write_text("kept\n", encoding="utf-8")
    with contextlib.chdir(root):
        assert cli.main(["train", "run.yaml", "train.steps=4", "train.save_every=2"]) == 0
    return root


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished directory, to be spoilt, and the working directory."""
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that a user can do wrong.

    Attributes:
      command: what is typed.
      said: what the sentence holds; parts of it, " ... " between them.
      spoil: done before, in the directory.
      starts: the run starts before it finds out, and may have written config.yaml and records.
    """

    command: str
    said: str
    spoil: Callable[[], object] = lambda: None
    starts: bool = False


def text(path: str, content: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(content, encoding="utf-8")


def line(path: str, number: int, content: str) -> Callable[[], None]:
    """Puts a text in the place of a line."""

    def spoil() -> None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        lines[number - 1] = content
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


def row(path: str, number: int, **fields: str) -> Callable[[], None]:
    return line(path, number, json.dumps(fields))


def flip(path: str) -> Callable[[], None]:
    """Changes one byte of each file at or below a path."""

    def spoil() -> None:
        for file in [p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()]:
            content = bytearray(file.read_bytes() or b"\0")
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(bytes(content))

    return spoil


def file_in_place_of(path: str) -> Callable[[], None]:
    return lambda: (shutil.rmtree(path), Path(path).write_text("a file\n", encoding="utf-8"))


def small_table() -> None:
    """A backbone with fewer rows than its tokenizer has tokens."""
    write_backbone(Path("mixed"), vocab_size=40)


def notes_in_best() -> None:
    Path("new/best").mkdir(parents=True)
    Path("new/best/notes.txt").touch()


MORE = "train run.yaml train.steps=16"  # goes on with the run that is there
NEW = "train run.yaml output_dir=new"
ANSWER = "predict run/best --input train.jsonl --output answers.jsonl"
CASES = {
    # ---- configuration
    "unknown key": Case(
        f"{MORE} train.stps=9", "unknown key 'train.stps' ... did you mean 'train.steps'?"
    ),
    "unknown key in the file": Case(
        "train run.yaml",
        "run.yaml:1: unknown key 'backbon'; did you mean 'backbone'?",
        line("run.yaml", 1, "backbon:"),
    ),
    "wrong type": Case(
        f"{MORE} data.batch_size=many", "'data.batch_size' must be an integer ... 'many'"
    ),
    "bad override": Case(f"{MORE} train.steps", "override 'train.steps' is not of the form key"),
    "no such choice": Case(f"{NEW} tune=head", "'tune' must be one of prompt, model ... 'head'"),
    "no such config": Case("train quickstrt", "'quickstrt' ... did you mean 'quickstart'?"),
    "config that is no YAML": Case(
        "train run.yaml", "run.yaml:3: not valid YAML", text("run.yaml", "a: b\nc: [\n")
    ),
    "no such task": Case(f"{NEW} task=sst3", "there is no task 'sst3'; did you mean sst2?"),
    "no such recipe": Case(f"{NEW} optim.recipe=papr", "optim.recipe is 'papr' ... paper?"),
    "no such metric": Case(f"{NEW} train.metric=f1", "train.metric is 'f1' ... has accuracy"),
    "no such sink": Case(f"{NEW} logging.sinks=[papyrus]", "unknown logging sink 'papyrus'"),
    "steps and epochs": Case(f"{NEW} train.epochs=1", "train.steps and train.epochs are both set"),
    "parts of a batch": Case(
        f"{NEW} data.packing=off train.accumulate=3",
        "data.batch_size 8 does not divide into train.accumulate 3",
    ),
    "too many devices": Case(f"{NEW} mesh.data=64", "mesh of data 64 x model 1 ... 8 are here"),
    "rows over devices": Case(
        f"{NEW} data.packing=off mesh.data=3",
        "batch of 8 rows does not divide over 3 data devices",
        starts=True,
    ),
    "rate out of range": Case(f"{NEW} optim.learning_rate=-1", "optim.learning_rate is -1"),
    # ---- prompt and layout
    "prompt length 0": Case(f"{NEW} method.length=0", "method.length is 0 ... at least 1 slot"),
    "prompt longer than the row": Case(
        f"{NEW} method.length=19",
        "19 slots and the end token leave no room for text in max_input_length 20",
    ),
    "layout without a slot": Case(
        f"{NEW} layout={{input}}", "the layout '{input}' has no slot ... put {prompt} into it"
    ),
    "layout that counts wrong": Case(
        f"{NEW} layout={{prompt:3}}{{input}}", "counts 3 slots, the prompt has length 4"
    ),
    "layout of an unknown field": Case(
        f"{NEW} layout={{prompt}}{{title}}", "train.jsonl:1 has no field 'title' ... 'text'"
    ),
    "prompt of another d_model": Case(
        "evaluate run/best --backbone narrow", "run/best has d_model 16, backbone narrow has 12"
    ),
    "prompt of another d_model to start from": Case(
        f"{NEW} method.init=npy method.init_path=narrow.npy",
        "the initial prompt is 4 x 12 ... backbone d_model 16",
        lambda: np.save("narrow.npy", np.ones((4, 12), np.float32)),
    ),
    "prompt of another backbone": Case(
        f"{ANSWER} --backbone twin",
        "trained with backbone backbone (fingerprint ... this is twin (fingerprint",
    ),
    "no prompt there": Case("inspect nowhere", "no prompt at nowhere"),
    "damaged prompt": Case(
        "evaluate run/best", "prompt.safetensors is damaged", flip("run/best/prompt.safetensors")
    ),
    # ---- data
    "missing file": Case(f"{NEW} task.source.train=nowhere.jsonl", "no file nowhere.jsonl"),
    "missing input": Case("predict run/best --input nowhere.jsonl", "no file nowhere.jsonl"),
    "no such split": Case("evaluate run/best --split test", "no test data; set task.source.test"),
    "malformed JSONL": Case(
        MORE, "train.jsonl:7 is not a JSON object", line("train.jsonl", 7, "{oh"), starts=True
    ),
    "malformed JSONL to measure on": Case(
        NEW,
        "validation.jsonl:3 is not a JSON object",
        line("validation.jsonl", 3, "[]"),
        starts=True,
    ),
    "malformed JSONL to answer": Case(
        ANSWER, "train.jsonl:60 is not a JSON object", line("train.jsonl", 60, "{")
    ),
    "empty data": Case(NEW, "train.jsonl has no rows", text("train.jsonl", "\n\n")),
    "empty data to measure on": Case(
        NEW, "validation.jsonl has no rows", text("validation.jsonl", "")
    ),
    "empty data to answer": Case(ANSWER, "train.jsonl has no rows", text("train.jsonl", "")),
    "label outside the candidates": Case(
        MORE,
        "train.jsonl:5: label 'neutral' is not among ... positive, negative",
        row("train.jsonl", 5, text="a book", label="neutral"),
        starts=True,
    ),
    "missing field": Case(
        MORE,
        "train.jsonl:6 has no field 'text' ... 'words', 'label'",
        row("train.jsonl", 6, words="a book", label="positive"),
        starts=True,
    ),
    "text that tokenises to nothing": Case(
        MORE,
        "train.jsonl:9 has no text: its input tokenises to nothing",
        row("train.jsonl", 9, text="  ", label="positive"),
        starts=True,
    ),
    "candidate that tokenises to nothing": Case(
        f"{NEW} task.candidates=[positive,negative,'']", "candidate '' of task tiny is 0 tokens"
    ),
    # ---- backbone
    "no such directory": Case(
        f"{NEW} backbone.name=./nowhere", "backbone './nowhere' is no directory and no hub name"
    ),
    "a hub name offline": Case(
        f"{NEW} backbone.name=google/t5-base-lm-adapt",
        "'google/t5-base-lm-adapt' ... did not come from the hub ... give a directory",
    ),
    "vocabulary of another backbone": Case(
        f"{NEW} backbone.name=mixed",
        "mixed: the tokenizer has ... table 40 rows; they do not belong together",
        small_table,
    ),
    "no tokenizer": Case(
        f"{NEW} backbone.name=twin",
        "twin has no tokenizer",
        lambda: [path.unlink() for path in Path("twin").glob("*token*")],
    ),
    "damaged weights": Case(
        f"{NEW} backbone.name=twin",
        "twin/model.safetensors",
        lambda: os.truncate("twin/model.safetensors", 5000),
    ),
    # ---- the run's directory
    "another backbone in the directory": Case(
        f"{MORE} backbone.name=twin",
        "was trained with backbone.fingerprint ... backbone.name backbone, now twin",
    ),
    "another task in the directory": Case(
        f"{MORE} task.input=this:{{text}}", "was trained with task.input {text}, now this:{text}"
    ),
    "another method in the directory": Case(
        f"{MORE} method.length=5", "was trained with method.length 4, now 5"
    ),
    "another layout in the directory": Case(
        f"{MORE} layout={{input}}{{prompt}}", "layout {prompt}{input}, now {input}{prompt}"
    ),
    "fewer steps than the run has": Case(
        "train run.yaml train.steps=3", "is at step 4 already, this run has 3 ... train.steps"
    ),
    "checkpoints that are a file": Case(
        MORE,
        "run/checkpoints is a file; checkpoints need a directory",
        file_in_place_of("run/checkpoints"),
    ),
    "a directory that is a file": Case(
        "train run.yaml output_dir=answers.jsonl", "cannot write answers.jsonl"
    ),
    "nothing whole to resume from": Case(
        MORE, "no checkpoint in ... is whole ... step 4: ... step 2: ", flip("run/checkpoints")
    ),
    "something else in best": Case(
        NEW, "will not write a prompt over new/best ... notes.txt", notes_in_best, starts=True
    ),
    # ---- pretraining
    "no mixture": Case("pretrain mixture.yaml mixture.entries=[]", "mixture.entries is empty"),
    "no such objective": Case(
        "pretrain mixture.yaml mixture.entries.0.objective=spans", "no objective 'spans'"
    ),
    "malformed text": Case(
        "pretrain mixture.yaml",
        "train.jsonl:2 is not a JSON object",
        line("train.jsonl", 2, "x"),
        starts=True,
    ),
    "a model without a vocabulary": Case(
        "pretrain mixture.yaml model.d_model=8", "`model` ... `tokenizer` ... go together"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_fails_well(here: Path, name: str, capsys: pytest.CaptureFixture):
    case = CASES[name]
    case.spoil()
    before = snapshot(here)
    capsys.readouterr()
    code = cli.main(case.command.split(" "))
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert_one_sentence(printed.err, case.said)
    assert leftovers(here) == []
    if not case.starts:
        assert snapshot(here) == before
        return
    outside = {path: digest for path, digest in before.items() if not path.startswith("run/")}
    assert outside.items() <= snapshot(here).items()
    assert_run_is_whole(Path("run"))


def test_the_same_commands_work_when_nothing_is_spoilt(here: Path, capsys: pytest.CaptureFixture):
    """So each of the cases fails because of what it spoils."""
    for command in (
        MORE,
        NEW,
        f"{NEW}er backbone.name=twin train.steps=1",
        "pretrain mixture.yaml",
        "inspect run/best",
        "evaluate run/best",
        f"{ANSWER} --backbone twin --allow-other-backbone",
        ANSWER,
    ):
        assert cli.main(command.split(" ")) == 0, capsys.readouterr().err
    assert len(Path("answers.jsonl").read_text(encoding="utf-8").splitlines()) == 64


def assert_one_sentence(stderr: str, said: str) -> None:
    """The last line, and no other, is the error, and holds what it should."""
    lines = stderr.splitlines()
    assert [each for each in lines if "error:" in each.lower()] == lines[-1:], stderr
    sentence = lines[-1]
    assert sentence.startswith("jaxprompt: error: ") and "Traceback" not in stderr
    at = 0
    for part in said.split(" ... "):
        assert part in sentence[at:], f"{part!r} is not in {sentence[at:]!r}"
        at = sentence.index(part, at) + len(part)


def assert_run_is_whole(run: Path) -> None:
    """It can be gone on from, and its prompts can be used."""
    assert saved_state(run)[0] >= 4
    for name in ("best", "prompt"):
        assert load_artifact(run / name).values["prompt"].shape == (4, 16)
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["seed"] == 3
    assert len(losses(run)) >= 4


def leftovers(root: Path) -> list[str]:
    """What is left of a write that did not end."""
    names = (".*.tmp-*", ".saving_*", ".*.previous")
    return [str(path) for pattern in names for path in root.rglob(pattern)]


# ---- in a process of its own ---------------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(here: Path):
    before = snapshot(here)
    process = spawn(*MORE.split(" "), "optim.learning_rate=1e38")
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (2, ""), stderr
    assert_one_sentence(
        stderr, " is not finite at step ... (found by step ... checkpoint is step 4: ... rate"
    )
    assert leftovers(here) == []
    for name in ("run/checkpoints", "run/best", "run/prompt"):
        kept = {path: digest for path, digest in before.items() if path.startswith(name)}
        assert kept.items() <= snapshot(here).items()
    assert cli.main(MORE.split(" ")) == 0
    assert saved_state(Path("run"))[0] == 16 and len(losses(Path("run"))) == 16


def test_a_hub_name_without_a_network(here: Path):
    before = snapshot(here)
    name = "backbone.name=google/t5-base-lm-adapt"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here.parent / "hub")}
    process = spawn(*NEW.split(" "), name, HF_HUB_OFFLINE="0", **nowhere)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (2, ""), stderr
    assert_one_sentence(
        stderr, "'google/t5-base-lm-adapt' ... without a network give a directory that holds config"
    )
    assert snapshot(here) == before


# ---- places that cannot be written ---------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the finished run comes to when nothing is in its way."""
    root = tmp_path_factory.mktemp("longer") / "here"
    shutil.copytree(finished, root)
    with contextlib.chdir(root):
        assert cli.main(MORE.split(" ")) == 0
    return root / "run"


def run_more(argv: list[str], own_process: bool, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and standard error."""
    if not own_process:
        return cli.main(argv), capsys.readouterr().err
    process = spawn(*argv)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


@pytest.mark.parametrize(("free", "own_process"), [(0, False), (12, True), (40, True)])
def test_a_full_disk(
    here: Path, longer: Path, free: int, own_process: bool, capsys: pytest.CaptureFixture
):
    """With so many kilobytes left: too few for the config, for the arrays, for the manifest."""
    with mounted(here / "disk", "size=600k") as disk:
        run, filler = disk / "run", disk / "filler"
        shutil.copytree("run", run)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(b"\0" * (room - free * 1024))
        before = snapshot(run / "checkpoints")
        argv = [*MORE.split(" "), f"output_dir={run}"]
        code, said = run_more(argv, own_process, capsys)
        assert code == 2, said
        assert_one_sentence(said, f"cannot write {run} ... No space left on device; free some")
        lost = "the checkpoint of step 5 was not saved (the last good one is step 4)"
        # with the most room the artifacts, written meanwhile, may be what does not fit
        others = {0: ["config.yaml"], 12: [], 40: ["best", "prompt"]}[free]
        assert lost in said or any(f"cannot write {run / name}" in said for name in others)
        assert snapshot(run / "checkpoints") == before and leftovers(run) == []
        assert_run_is_whole(run)
        filler.unlink()
        assert cli.main(argv) == 0
        assert_same_end(run, longer)


def test_a_limit_on_the_size_of_files(here: Path, longer: Path, capsys: pytest.CaptureFixture):
    argv, (soft, hard) = MORE.split(" "), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = snapshot(here / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code = cli.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2
    assert_one_sentence(said, "cannot write ... File too large; raise the limit on file sizes")
    assert leftovers(here) == []
    kept = {path: digest for path, digest in before.items() if path.startswith("checkpoints")}
    assert kept.items() <= snapshot(here / "run").items()
    assert_run_is_whole(here / "run")
    assert cli.main(argv) == 0
    assert_same_end(here / "run", longer)


def test_an_output_that_may_not_be_written(here: Path, capsys: pytest.CaptureFixture):
    with mounted(here / "disk", "ro"):
        for command in (f"{NEW} output_dir=disk/run", f"{ANSWER} --output disk/answers.jsonl"):
            assert cli.main(command.split(" ")) == 2
            printed = capsys.readouterr()
            assert_one_sentence(printed.err, "cannot write disk/ ... Read-only file system ... may")
            assert printed.out == ""
