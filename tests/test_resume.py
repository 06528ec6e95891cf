"""Runs that are killed, stopped and damaged end as if nothing had happened, to the bit."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import (
    World,
    assert_same_end,
    compiled,
    environment,
    losses,
    records,
    saved_state,
    spawn,
    world,
)

from jaxprompt import cli
from jaxprompt.train import train

__all__ = ["compiled", "world"]  # fixtures

OPTIONS = ["train.steps=30", "train.eval_every=6", "train.save_every=2", "backbone.dropout=0.1"]

# Imports once, then forks a process for each entry of a plan: {"argv", "kill", "seed"}. A process
# is killed at a random moment: once it has logged `after` steps, or has begun to save after that.
KILLER = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from jaxprompt import cli, train

    def steps(run):
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b'"loss"') if path.exists() else 0

    def saves(run):
        return any(entry.name.startswith(".saving_") for entry in (run / "checkpoints").glob(".*"))

    for leg in json.load(sys.stdin):
        run, draw = Path(leg["run"]), random.Random(leg["seed"])
        already = steps(run)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            said = os.open(leg["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            code = 70
            try:
                code = cli.main(leg["argv"])
            finally:
                sys.stderr.flush()
                os._exit(code)
        if leg["kill"]:
            while steps(run) < already + leg["after"] and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.0005)
            while leg["kill"] == "saving" and not saves(run):
                time.sleep(0.0002)
            time.sleep(draw.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        checkpoints = sorted(entry.name for entry in (run / "checkpoints").glob("step_*"))
        print(json.dumps({"code": code, "steps": steps(run), "checkpoints": checkpoints}))
"""


def killer(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER)],
        input=json.dumps(plan), env=environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    train(world.load(directory, *OPTIONS))
    assert len(losses(directory)) == 30
    return directory


def test_killed_at_random_moments_it_ends_as_if_unbroken(
    world: World, unbroken: Path, tmp_path: Path
):
    run, stderr = tmp_path / "run", tmp_path / "stderr"
    leg = {
        "run": str(run), "stderr": str(stderr), "seed": 0,
        "argv": ["train", str(world.config), f"output_dir={run}", *OPTIONS],
    }  # fmt: skip
    kills = [("", 3), ("saving", 2), ("anywhere", 5), ("saving", 4), ("anywhere", 1)]
    plan = [
        {**leg, "kill": kind or "anywhere", "after": after, "seed": seed}
        for seed, (kind, after) in enumerate(kills)
    ]
    legs = killer([*plan, {**leg, "kill": ""}])
    assert [each["code"] for each in legs] == [-signal.SIGKILL] * len(kills) + [0]
    assert all(each["steps"] < 30 for each in legs[:-1]) and legs[-1]["steps"] == 30
    assert any(each["checkpoints"] for each in legs[:-1])
    assert "resuming at step" in stderr.read_text(encoding="utf-8")
    assert_same_end(run, unbroken)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step_00000028", "step_00000030"}
    assert {path.name for path in run.iterdir()} == {path.name for path in unbroken.iterdir()}


def logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def test_sigterm_saves_exits_0_and_the_same_command_ends_the_run(
    world: World, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    argv = ["train", str(world.config), f"output_dir={run}", *OPTIONS, "train.save_every=0"]
    process = spawn(*argv)
    while logged(run) < 4 and process.poll() is None:
        time.sleep(0.001)
    process.terminate()
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (0, ""), stderr
    step, _, metadata = saved_state(run)
    assert 4 <= step < 30 and losses(run) == losses(unbroken)[:step]
    assert f"SIGTERM: stopped and saved at step {step}; the same command goes on" in stderr
    assert not metadata["progress"][0]["finished"]
    last = stderr.splitlines()[-1]
    assert last.split() == ["jaxprompt", *argv]

    assert cli.main(argv) == 0
    assert f"resuming at step {step}" in capsys.readouterr().err
    assert_same_end(run, unbroken)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    world: World, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    argv = ["train", str(world.config), f"output_dir={run}", *OPTIONS]
    assert cli.main([*argv, "train.steps=11"]) == 0
    newest = run / "checkpoints" / "step_00000011" / "state"
    files = [path for path in newest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    capsys.readouterr()

    assert cli.main(argv) == 0
    said = capsys.readouterr().err.splitlines()
    warnings = [line for line in said if line.startswith("jaxprompt: warning: ")]
    assert len(warnings) == 1 and "warning" not in "".join(set(said) - set(warnings))
    assert re.search(
        r"checkpoint of step 11: \S+ has \d+ bytes, not \d+; going back to step 10$", warnings[0]
    )
    assert any("resuming at step 10" in line for line in said)
    # The shorter run had evaluated at its end; what comes after step 10 is cut off and comes again.
    assert losses(run) == losses(unbroken)
    assert [r for r in records(run) if r["step"] != 11] == [
        r for r in records(unbroken) if r["step"] != 11
    ]
    assert (run / "prompt" / "prompt.safetensors").read_bytes() == (
        unbroken / "prompt" / "prompt.safetensors"
    ).read_bytes()
