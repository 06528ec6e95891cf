"""The stand-in for the cloud as tests of tpu_scripts/ use it: what it is asked, how it fails."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
STAND_IN = Path(__file__).with_name("stand_in_cloud.py")
ENV = """\
PROJECT=my-project
ZONE=us-west4-a   # a comment
NAME=xxl
BUCKET="gs://bucket/prompts/"
ACCELERATOR_TYPE=v5litepod-4
RUNTIME_VERSION=v2-alpha-tpuv5-lite
PROVISIONING=spot
CHIP_HOUR=1.20
"""
RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
OUTPUT = "gs://bucket/prompts/runs/xxl"
ODD = "task={name: mine, input: \"it's {text}\",\n target: '$HOME *'}"


class Cloud:
    """A directory that stands in for the cloud, and the scripts called beside it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.env_file = directory / "my env"
        self.started: list[subprocess.Popen[str]] = []
        self.plan()
        self.write_env()
        (directory / "workers").write_text("1")
        (directory / "buckets/bucket").mkdir(parents=True)
        self.scripts = self._checkout() / "tpu_scripts"
        (directory / "bin").mkdir()
        clouds, here = ("gcloud", "xpk", "kubectl"), ("uv", "python", "hostname")
        for name in (*clouds, *here, "gcsfuse", "mountpoint", "fusermount"):
            program = directory / "bin" / name
            program.write_text(
                f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "
                f'{shlex.quote(str(STAND_IN))} {name} "$@"\n'
            )
            program.chmod(0o755)

    def _checkout(self) -> Path:
        """A checkout that is quickly packed: the scripts, and little else."""
        checkout = self.directory / "checkout"
        shutil.copytree(SCRIPTS, checkout / "tpu_scripts", ignore=shutil.ignore_patterns("env"))
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            (checkout / name).write_text("")
        for name in ("jaxprompt", "configs"):
            (checkout / name).mkdir()
            (checkout / name / "file").write_text("")
        subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
        return checkout

    def write_env(self, *lines: str) -> None:
        """The env file, with some lines instead of those of the same key."""
        keys = {line.partition("=")[0] for line in lines}
        kept = [line for line in ENV.splitlines() if line.partition("=")[0] not in keys]
        self.env_file.write_text("\n".join([*kept, *lines]) + "\n")

    def plan(self, **verbs: list[object]) -> None:
        """What goes wrong; `ssh_alive` is the verb `ssh alive`."""
        plan = {name.replace("_", " "): entries for name, entries in verbs.items()}
        with (self.directory / "plan.json").open("a+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.truncate(0)
            stream.write(json.dumps(plan))

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "STAND_IN": str(self.directory),
            "NAME": "of-another-program",
            "POLL_SECONDS": "0",
            "RETRY_SECONDS": "0",
            "TICK_SECONDS": "0.05",
            "SYNC_SECONDS": "0",
            "START_SECONDS": "0.3",
        }

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.scripts / script, "--env", self.env_file, *words],
            cwd=self.directory,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def call(self, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"{script}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess([], code, out, err)

    def dry(self, script: str, *words: str) -> list[list[str]]:
        """The commands a dry run shows, read again as a shell would."""
        shown = self.call(script, "--dry-run", *words).stdout
        assert not self.calls(), "a dry run calls nothing"
        lines = re.sub(r"^(printf .*) \| ", r"\1 '|' ", shown, flags=re.M).splitlines()
        read = 'for line; do eval "words=($line)"; printf "%s\\0" "${words[@]}" ""; done'
        done = subprocess.run(["bash", "-c", read, "-", *lines], capture_output=True, text=True)
        return [command.split("\0") for command in done.stdout.split("\0\0")[:-1]]

    def calls(self, *start: str) -> list[list[str]]:
        """The recorded calls that start so."""
        file = self.directory / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        recorded = [json.loads(line) for line in lines]
        return [call for call in recorded if call[: len(start)] == list(start)]

    def count(self, verb: str) -> int:
        return len(self.calls(*RESOURCES, verb))

    def signs(self) -> list[str]:
        """Names of the signs of all attempts at the usual place."""
        return sorted(path.name for path in self.bucket(".tpu").glob("2*/*"))

    def bucket(self, name: str) -> Path:
        return self.directory / "buckets/bucket/prompts/runs/xxl" / name

    def metrics(self) -> list[dict]:
        file = self.bucket("metrics.jsonl")
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def state(self) -> str:
        file = self.directory / "state"
        return file.read_text() if file.exists() else "ABSENT"

    def wait_for(self, path: Path) -> None:
        self.wait_until(path.exists)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1200):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("that did not come within a minute")

    def end(self) -> None:
        """Whatever still runs, here and on the workers, is killed."""
        for process in self.started:
            process.kill()
            process.communicate()
        command = [sys.executable, "-I", STAND_IN, "end"]
        subprocess.run(command, env=self.environment(), check=True)
