"""The command line: what is parsed, what is said when something is wrong, and the exit codes."""

import argparse
import errno
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxprompt
from jaxprompt import cli
from jaxprompt.prompts import METHODS
from jaxprompt.typing import UserError

COMMANDS = [
    "train",
    "pretrain",
    "evaluate",
    "predict",
    "inspect",
    "compare",
    "scale",
    "convert",
    "import",
    "export",
    "transfer",
    "plan",
    "tasks",
    "methods",
    "recipes",
    "backbones",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, argparse.Namespace]]:
    """Runs the command line over rooms that only take note of their arguments, or do `work`."""

    def run(
        *argv: str, work: Callable[[], object] = lambda: None
    ) -> tuple[int, argparse.Namespace]:
        seen = []

        def main(args: argparse.Namespace) -> object:
            seen.append(args)
            return work()

        rooms = (
            "train pretrain evaluate predict inspection compare convert importing exporting "
            "transfer plan scale listing"
        )
        for room in rooms.split():
            fake = types.SimpleNamespace(main=main)
            monkeypatch.setitem(sys.modules, f"jaxprompt.{room}", fake)
        return cli.main(list(argv)), seen[0]

    return run


@pytest.mark.parametrize(
    ("argv", "room", "expected"),
    [
        ("train quickstart", "train", {"config": "quickstart", "overrides": [], "debug": False}),
        ("train c.yaml a=1 b.c=x", "train", {"config": "c.yaml", "overrides": ["a=1", "b.c=x"]}),
        ("train c.yaml a=1 --debug b=2", "train", {"overrides": ["a=1", "b=2"], "debug": True}),
        ("--debug train c.yaml", "train", {"debug": True}),
        ("train c.yaml a=-1", "train", {"overrides": ["a=-1"]}),
        ("pretrain pretrain/nano seed=1", "pretrain", {"overrides": ["seed=1"]}),
        ("evaluate p", "evaluate", {"prompts": ["p"], "task": None, "data": None, "json": False}),
        ("evaluate p q --task sst2 --json", "evaluate", {"prompts": ["p", "q"], "task": "sst2"}),
        ("evaluate p --data f.csv", "evaluate", {"data": "f.csv", "split": "validation"}),
        ("evaluate p --split test --batch-size 8", "evaluate", {"split": "test", "batch_size": 8}),
        ("evaluate p --backbone b --dtype bfloat16", "evaluate", {"backbone": "b"}),
        ("predict p --input -", "predict", {"prompts": ["p"], "input": "-", "output": "-"}),
        ("predict p --input a --output b --json", "predict", {"output": "b", "json": True}),
        ("predict p --input a --allow-other-backbone", "predict", {"allow_other_backbone": True}),
        ("predict p --input a --early-stopping true", "predict", {"early_stopping": True}),
        ("predict p --input a --early-stopping never", "predict", {"early_stopping": "never"}),
        ("evaluate p --early-stopping false --num-beams 2", "evaluate", {"early_stopping": False}),
        ("inspect p --top 3", "inspection", {"prompt": "p", "top": 3, "json": False}),
        ("convert a b", "convert", {"source": "a", "output": "b", "config": None, "dtype": None}),
        ("convert a b --tokenizer t --dtype bfloat16", "convert", {"tokenizer": "t"}),
        ("import a b --backbone c", "importing", {"backbone": "c", "layout": "{prompt}{input}"}),
        ("import a b --backbone c --task t --json", "importing", {"task": "t", "json": True}),
        ("transfer a b --recycle lin-comb", "transfer", {"prompt": "a", "out": "b", "seed": 0}),
        ("transfer --library d --to p", "transfer", {"library": "d", "to": "p", "prompt": None}),
        ("plan c --topology v5e:2x2 cpu:1", "plan", {"topology": ["v5e:2x2", "cpu:1"]}),
        ("plan c --topology cpu:1 --search a=1", "plan", {"search": True, "overrides": ["a=1"]}),
        ("plan c --topology cpu:1 --try a=1,2 --try b=x", "plan", {"also": ["a=1,2", "b=x"]}),
        ("tasks --json", "listing", {"command": "tasks", "json": True}),
        ("methods", "listing", {"command": "methods"}),
        ("recipes", "listing", {"command": "recipes"}),
        ("backbones", "listing", {"command": "backbones"}),
    ],
)
def test_arguments_reach_the_room(run, argv, room, expected):
    code, args = run(*argv.split())
    assert code == 0
    assert args.room == f"jaxprompt.{room}"
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("trian c.yaml", "invalid choice: 'trian'"),
        ("train", "the following arguments are required: CONFIG"),
        ("train c.yaml --steps 3", "train does not know '--steps'"),
        ("evaluate", "required: PROMPT"),
        ("evaluate p --split dev", "invalid choice: 'dev'"),
        ("evaluate p --batch-size 0", "'0' is not a whole number above 0"),
        ("predict p", "required: --input"),
        ("predict p --input a --early-stopping 1", "'1' is not one of true, false, never"),
        ("import p q", "required: --backbone"),
        ("plan c", "required: --topology"),
        ("inspect p q", "inspect does not know 'q'"),
        ("--jsn tasks", "does not know '--jsn'"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_2(capsys, argv, expected):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv.split())
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("jaxprompt: error: ") and printed.err.count("\n") == 1
    assert expected in printed.err


def raiser(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    def work() -> None:
        raise error from cause

    return work


FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/x")


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (UserError("file.jsonl:3: no."), None, "file.jsonl:3: no."),
        (FULL, None, "the disk is full (/runs/x); free some space"),
        (RuntimeError("save failed"), FULL, "the disk is full (/runs/x); free some space"),
        (ValueError("writing /x: No space left on device [os]"), None, "the disk is full; free"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), None, "permission denied (/x)"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), None, "/x: No such file"),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence_and_exit_2(run, capsys, error, cause, expected):
    code, _ = run("train", "c", work=raiser(error, cause))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith(f"jaxprompt: error: {expected}") and printed.err.count("\n") == 1


def test_debug_shows_the_traceback_before_the_sentence(run, capsys):
    code, _ = run("train", "c", "--debug", work=raiser(UserError("no.")))
    printed = capsys.readouterr()
    assert code == 2
    assert "Traceback" in printed.err and printed.err.endswith("jaxprompt: error: no.\n")


def test_a_defect_of_ours_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run("train", "c", work=lambda: 1 / 0)


def test_an_interrupted_command_exits_130(run, capsys):
    assert run("train", "c", work=raiser(KeyboardInterrupt()))[0] == 130
    assert capsys.readouterr().err == "jaxprompt: interrupted\n"


def test_a_room_may_choose_its_exit_code(run):
    assert run("train", "c", work=lambda: 3)[0] == 3


def test_no_command_and_help_show_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == text
    lines = [line for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    listed = [line.split()[0] for line in lines]
    assert listed == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_an_example_that_parses(capsys, run, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    program, *argv = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert program == "jaxprompt" and argv[0] == command
    assert run(*argv)[0] == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"jaxprompt {jaxprompt.__version__}\n"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("tasks", "sst2"),
        ("recipes", "paper"),
        ("backbones", "google/t5-base-lm-adapt"),
    ],
)
def test_lists(capsys, command, name):
    assert cli.main([command]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert cli.main([command, "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in plain] == [entry["name"] for entry in objects]
    assert all(entry["description"] for entry in objects)
    assert name in [entry["name"] for entry in objects]


def test_methods_with_what_they_train_over_a_backbone(capsys):
    assert cli.main(["methods"]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["methods", "--json"]) == 0
    told = {one["name"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    starts = [line.split()[0] for line in plain.splitlines() if not line.startswith(" ")]
    assert starts == list(told) == list(METHODS)
    assert told["soft"]["parameters"] == 100 * mini_d_model()
    assert told["dpt"]["folds"] and not told["dept"]["folds"]
    assert all(one["formula"] in plain and one["paper"] in plain for one in told.values())


def mini_d_model() -> int:
    config = Path(jaxprompt.__file__).parent / "assets" / "mini" / "config.json"
    return json.loads(config.read_text(encoding="utf-8"))["d_model"]


def spawn(*argv: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxprompt", *argv], stderr=subprocess.PIPE, text=True, **options
    )


def test_a_reader_that_goes_away_is_no_error():
    process = spawn("backbones", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output():
    with open("/dev/full", "w") as full:
        process = spawn("backbones", stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith("jaxprompt: error: the disk is full") and stderr.count("\n") == 1
