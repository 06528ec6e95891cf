"""metrics.jsonl survives kills and resumes, the screen shows what it should, sinks fail well."""

import ast
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import jaxprompt.logging
from jaxprompt.logging import LoggingConfig, RunLogger
from jaxprompt.typing import UserError


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def uncoloured(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def steps(directory):
    return [record["step"] for record in records(directory)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told: `clock.now += 1`."""
    fake = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: fake.now)
    return fake


def test_every_record_is_a_line_of_plain_json(tmp_path):
    with RunLogger(tmp_path / "new" / "run", terminal=False) as logger:
        logger.log(0, {"eval/accuracy": 50.0})
        logger.log(1, {"loss": np.float32(1.5), "examples": np.int64(32), "task": "sst2"})
        logger.log(1, {"loss": float("nan"), "bound": np.inf})
        # Readable before the file is closed: nothing waits in a buffer.
        assert records(tmp_path / "new" / "run") == [
            {"step": 0, "eval/accuracy": 50.0},
            {"step": 1, "loss": 1.5, "examples": 32, "task": "sst2"},
            {"step": 1, "loss": None, "bound": None},
        ]


def test_steps_never_go_back(tmp_path):
    with RunLogger(tmp_path, terminal=False) as logger:
        logger.log(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 4 after one of step 5"):
            logger.log(4, {"loss": 1.0})
    logger = RunLogger(tmp_path, terminal=False, resumed_step=9)
    with logger, pytest.raises(ValueError, match="step 7 after one of step 9"):
        logger.log(7, {"loss": 1.0})
    assert steps(tmp_path) == [5]


def test_resuming_cuts_off_what_comes_again(tmp_path):
    with RunLogger(tmp_path, terminal=False) as logger:
        for step in range(1, 8):
            logger.log(step, {"loss": float(step)})
        logger.log(7, {"eval/accuracy": 50.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with RunLogger(tmp_path, terminal=False, resumed_step=4) as logger:
        assert steps(tmp_path) == [1, 2, 3, 4]
        for step in range(5, 8):
            logger.log(step, {"loss": float(step)})
        logger.log(7, {"eval/accuracy": 50.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_keeps_every_record_of_the_resumed_step(tmp_path):
    with RunLogger(tmp_path, terminal=False) as logger:
        logger.log(4, {"loss": 1.0})
        logger.log(4, {"eval/accuracy": 50.0})
    RunLogger(tmp_path, terminal=False, resumed_step=4).close()
    assert steps(tmp_path) == [4, 4]


def test_a_new_run_starts_a_new_file(tmp_path):
    for _ in range(2):
        with RunLogger(tmp_path, terminal=False) as logger:
            logger.log(0, {"loss": 1.0})
    assert steps(tmp_path) == [0]


def test_a_half_written_last_line_is_dropped_and_reported(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with RunLogger(tmp_path, terminal=False, resumed_step=2) as logger:
        logger.log(3, {"loss": 3.0})
    assert steps(tmp_path) == [1, 3]
    assert f"{path}:2: dropped a half-written last line" in capsys.readouterr().err


def test_a_line_that_is_no_record_is_kept_and_reported(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\nnonsense\n{"step": 2}\n{"step": 3}\n')
    RunLogger(tmp_path, terminal=False, resumed_step=2).close()
    assert path.read_text() == '{"step": 1}\n[1]\nnonsense\n{"step": 2}\n'
    said = capsys.readouterr().err
    assert f"{path}:2: not a record" in said
    assert f"{path}:3: not a record" in said


def test_a_killed_run_leaves_whole_lines(tmp_path):
    script = """
import sys
from jaxprompt.logging import RunLogger
logger = RunLogger(sys.argv[1], terminal=False, line_seconds=1e9)
for step in range(10**9):
    logger.log(step, {"loss": 1.0 / 3})
"""
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        path = tmp_path / "metrics.jsonl"
        while not (path.exists() and path.stat().st_size > 10_000):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    RunLogger(tmp_path, terminal=False, resumed_step=100).close()
    assert steps(tmp_path) == list(range(101))


def test_a_full_disk_is_a_user_error_and_leaves_whole_lines(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path, terminal=False)
    logger.log(1, {"loss": 1.0})
    file = logger._sinks[0]._file

    class Full:
        """Takes half of the line and then says what a full disk says."""

        seek, truncate, close = file.seek, file.truncate, file.close

        def write(self, line):
            file.write(line[: len(line) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logger._sinks[0], "_file", Full())
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        logger.log(2, {"loss": 2.0})
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_directory_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*run/metrics\.jsonl: "):
        RunLogger(tmp_path / "run", terminal=False)


def test_only_the_first_process_writes(tmp_path, capsys):
    with RunLogger(tmp_path / "run", active=False) as logger:
        logger.log(1, {"loss": 1.0})
        logger.progress(2)
        logger.note("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_closing_twice_is_harmless(tmp_path):
    logger = RunLogger(tmp_path, terminal=True, total_steps=2)
    logger.close()
    logger.close()
    logger.note("nobody hears this")


def test_plain_lines(tmp_path, capsys, clock):
    with RunLogger(tmp_path, terminal=False, line_seconds=10, total_steps=400) as logger:
        logger.note("a note")
        logger.log(0, {"eval/accuracy": 50.0, "eval/loss": 0.69324})
        logger.log(1, {"loss": 2.0, "examples_per_second": 31.46, "learning_rate": 0.3})
        for step in range(2, 151):
            clock.now += 0.1  # 14.9 seconds: one line is due on the way
            logger.log(step, {"loss": 1.0, "examples_per_second": 40.0})
            logger.progress(step)
        logger.log(150, {"eval/accuracy": 81.25})
        logger.log(151, {"learning_rate": 0.3})
        clock.now += 0.1
        logger.log(400, {"loss": 0.5})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a note",
        "step 0/400  accuracy 50.0  loss 0.6932",
        "step 1/400  loss 2.0000  31.5 examples/s",
        "step 102/400  loss 1.0000  40.0 examples/s  time left 0:30",
        "step 150/400  accuracy 81.2  time left 0:25",
        "step 400/400  loss 0.5000",
    ]


def test_plain_lines_without_an_end(tmp_path, capsys, clock):
    with RunLogger(tmp_path, terminal=False) as logger:
        logger.log(3, {"loss": 1.0})
    assert capsys.readouterr().err == "step 3  loss 1.0000\n"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (61.4, "1:01"), (7322, "2:02:02")])
def test_time_left(seconds, said):
    assert jaxprompt.logging._clock(seconds) == said


def test_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with RunLogger(tmp_path, terminal=True, total_steps=40, score="eval/f1") as logger:
        logger.log(10, {"loss": 1.25, "examples_per_second": 31.46})
        logger.log(10, {"eval/accuracy": 81.25, "eval/f1": 70.0, "eval/loss": 0.5})
        logger.note("text with [brackets]")
        logger.progress(12)
    out, err = capsys.readouterr()
    err = uncoloured(err)
    assert out == ""
    assert "step 10/40  accuracy 81.2  f1 70.0  loss 0.5000" in err
    assert "text with [brackets]" in err
    assert "12/40 loss 1.2500  f1 70.0  31.5 examples/s" in err


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"eval/loss": 0.5, "eval/accuracy": 81.25, "eval/f1": 70.0}, "9/40 accuracy 81.2 "),
        ({"eval/loss": 0.5}, "9/40 loss 0.5000 "),
    ],
)
def test_progress_bar_picks_a_score(tmp_path, capsys, monkeypatch, values, shown):
    monkeypatch.setenv("COLUMNS", "140")
    with RunLogger(tmp_path, terminal=True, total_steps=40) as logger:
        logger.log(9, values)
    assert shown in uncoloured(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("isatty", "term", "screen"),
    [(True, "xterm", "_Bar"), (True, "dumb", "_Lines"), (False, "xterm", "_Lines")],
)
def test_the_terminal_is_recognised(tmp_path, monkeypatch, isatty, term, screen):
    stream = io.StringIO()
    stream.isatty = lambda: isatty
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    with RunLogger(tmp_path) as logger:
        assert type(logger._screen).__name__ == screen


def test_options_are_keyword_arguments_of_the_logger(tmp_path):
    RunLogger(tmp_path, **vars(LoggingConfig(terminal=False))).close()


class FakeWriter:
    made: list["FakeWriter"] = []  # noqa: RUF012

    def __init__(self, logdir, purge_step):
        self.logdir, self.purge_step, self.calls = logdir, purge_step, []
        self.made.append(self)

    def __getattr__(self, name):
        return lambda *values: self.calls.append((name, *values))


@pytest.mark.parametrize(("resumed_step", "purge_step"), [(None, 0), (0, 1), (7, 8)])
def test_tensorboard(tmp_path, monkeypatch, resumed_step, purge_step):
    monkeypatch.setattr(FakeWriter, "made", [])
    fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    options = {"terminal": False, "sinks": ("tensorboard",), "resumed_step": resumed_step}
    with RunLogger(tmp_path, **options) as logger:
        logger.log(8, {"loss": 1.5, "task": "sst2", "bad": float("inf")})
    (writer,) = FakeWriter.made
    assert (writer.logdir, writer.purge_step) == (str(tmp_path / "tensorboard"), purge_step)
    assert writer.calls == [
        ("add_scalar", "loss", 1.5, 8),
        ("add_text", "task", "sst2", 8),
        ("close",),
    ]


def test_tensorboard_with_tensorboardx_itself(tmp_path):
    pytest.importorskip("tensorboardX")
    with RunLogger(tmp_path, terminal=False, sinks=["tensorboard"]) as logger:
        logger.log(1, {"loss": 1.5})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.fixture
def wandb(monkeypatch):
    """A module like wandb that keeps what it is told in `.calls`."""
    fake = types.SimpleNamespace(Error=type("Error", (Exception,), {}), calls=[])

    def init(**options):
        fake.calls.append(options)
        return types.SimpleNamespace(
            log=lambda values, step: fake.calls.append((values, step)),
            finish=lambda: fake.calls.append("finish"),
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return fake


def test_wandb(tmp_path, wandb):
    for resumed_step in (None, 3, None):
        options = {"terminal": False, "sinks": ["wandb"], "resumed_step": resumed_step}
        with RunLogger(tmp_path, config={"seed": 1}, **options) as logger:
            logger.log(4, {"loss": 1.5, "bad": float("nan")})
    (first, logged, end), (second, *_), (third, *_) = (wandb.calls[i : i + 3] for i in (0, 3, 6))
    assert (logged, end) == (({"loss": 1.5}, 4), "finish")
    assert first["project"] == "jaxprompt"
    assert (first["name"], first["dir"]) == (tmp_path.name, str(tmp_path))
    assert first["config"] == {"seed": 1}
    # The run goes on under its own id when it is resumed, and a new run gets a new one.
    assert first["id"] == second["id"] != third["id"]
    assert first["resume"] == "allow"


def test_wandb_that_does_not_start_is_a_user_error(tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="logging sink wandb did not start: no API key"):
        RunLogger(tmp_path, terminal=False, sinks=["wandb"])


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_names_the_extra_and_leaves_the_file(
    tmp_path, monkeypatch, name, package
):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"sink {name} needs the package {package}: pip install 'jaxprompt\[{name}\]'"
    with pytest.raises(UserError, match=said):
        RunLogger(tmp_path, terminal=False, sinks=[name])
    assert steps(tmp_path) == [1]


def test_an_unknown_sink_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match="unknown logging sink 'comet'; there are: tensorboard, w"):
        RunLogger(tmp_path, sinks=["comet"], active=False)


@pytest.mark.parametrize("name", ["logging", "plots", "metrics"])
def test_nothing_heavy_is_imported_at_the_top(name):
    path = os.path.join(os.path.dirname(jaxprompt.logging.__file__), f"{name}.py")
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    heavy = {"rich", "matplotlib", "tensorboardX", "wandb", "sacrebleu", "jax"}
    assert not {n.split(".")[0] for n in names} & heavy
