"""`jaxprompt plan` where the TPU compiler crashes, or the command is ended."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import run_fixtures
from planned import plan, planned
from run_fixtures import World

from jaxprompt.planning import apart, chips

world = run_fixtures.world  # pytest finds fixtures by the module's names
STAND_IN = (sys.executable, str(Path(__file__).with_name("crashing_compiler.py")))


@pytest.fixture
def crashing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """TPUs are CPUs here, and what their compiler does says `crashing_compiler.py`."""
    monkeypatch.setattr(chips, "_check_tpu", lambda name: None)
    monkeypatch.setattr(chips, "_devices_there", lambda name: jax.devices()[:1])
    monkeypatch.setattr(apart, "COMMAND", STAND_IN)


@pytest.mark.usefixtures("crashing_compiler")
def test_a_compiler_that_crashes_ends_in_a_sentence(
    world: World, capsys: pytest.CaptureFixture[str]
):
    crash = "crashed on the step for v4:1x1x1 (SIGSEGV: Check failed: a == b); other settings"
    killed = "was killed on the step for v6e:1x1 (SIGKILL), as the system does when memory runs out"
    code, out, err = plan(capsys, world.config, "--topology", "v4:1x1x1", "--json")
    assert (code, out) == (2, "") and crash in err and "Traceback" not in err

    first, second, told = planned(
        capsys, world.config, "--topology", "v4:1x1x1", "v6e:1x1", "v5e:1x1"
    )
    assert (first["topology"], first["fits"]) == ("v4:1x1x1", None) and crash in first["error"]
    assert killed in second["error"]
    assert told["fits"] and told["seconds"] and told["shape"]["rows"] >= 1 and "error" not in told

    code, out, err = plan(capsys, world.config, "--topology", "v4:1x1x1", "v5p:1x1x1")
    assert code == 2 and crash in err and "v5p:1x1x1 (SIGABRT: Check failed: a == b)" in err
    lines = [line for line in out.splitlines() if line.startswith(("v4", "v5p"))]
    assert len(lines) == 2 and all(line.endswith("compiler failed") for line in lines)


@pytest.mark.usefixtures("crashing_compiler")
def test_a_search_leaves_out_what_crashes(world: World, capsys: pytest.CaptureFixture[str]):
    argv = ["--topology", "v3:1x1", "--search", "--limit", "1", "--try", "optim.warmup_steps=0,1"]
    code, out, err = plan(capsys, world.config, *argv)
    assert code == 0 and out == "nothing was compiled\n"
    assert re.search(r"1: .*warmup_steps=0.*: the compiler failed", err)
    assert re.search(r"left out: .*warmup_steps=0.*INTERNAL: RET_CHECK failure", err)
    assert re.search(r"left out: .*warmup_steps=1.*after 1 compilations", err)


def test_a_compilation_ends_with_its_plan(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C kills the child; where its parent was killed, the child sees the end of its input."""
    argv = [*STAND_IN, str(world.config), "v5e:2x2", "1"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as orphan:
        assert orphan.stdin is not None
        orphan.stdin.close()
        assert orphan.wait(timeout=120) == 1

    children: list[subprocess.Popen[bytes]] = []

    def started(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*args, **options))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return children[-1]

    popen, before = subprocess.Popen, signal.signal(signal.SIGALRM, signal.default_int_handler)
    monkeypatch.setattr(apart.subprocess, "Popen", started)
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(chips, "_check_tpu", lambda name: None)
    monkeypatch.setattr(chips, "_devices_there", lambda name: jax.devices()[:1])
    try:
        code, out, err = plan(capsys, world.config, "--topology", "v5e:1x1")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (code, out) == (130, "") and "interrupted" in err
    assert [child.returncode for child in children] == [-signal.SIGKILL]
