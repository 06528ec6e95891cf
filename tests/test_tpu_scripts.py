"""tpu_scripts/, against a stand-in for the cloud that records its calls and fails on demand."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
STAND_IN = Path(__file__).with_name("stand_in_cloud.py")
COMMANDS = ["create", "setup", "run", "supervise", "logs", "fetch", "list", "delete"]
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
PLACE = ["--project=my-project", "--zone=us-west4-a"]
RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
VERBS = ("create", "describe", "delete", "ssh", "cp", "ls")
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
        for name in ("gcloud", "xpk", "kubectl", "uv", "python", "hostname"):
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


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


# ---- what a user reads ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*COMMANDS, "worker", "lib.sh"])
def test_shellcheck(script: str):
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    command = [program, "--external-sources", "--source-path", str(ROOT), str(SCRIPTS / script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_help_needs_no_env_file(script: str):
    done = subprocess.run([SCRIPTS / script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"tpu_scripts/{script} ")
    assert "set -euo" not in done.stdout and "shellcheck" not in done.stdout
    assert not done.stderr


def test_the_example_is_a_whole_env_file(cloud: Cloud):
    cloud.env_file.write_text((SCRIPTS / "env.example").read_text())
    (command,) = cloud.dry("delete")
    assert command[4:7] == ["delete", "jaxprompt", "--project=my-project"]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        (["NAME=Has Space"], [], "NAME is 'Has Space'"),
        (["ZONE="], [], "ZONE is not set"),
        (["ZONEE=x"], [], "ZONEE is not known"),
        (["just words"], [], ":9: not KEY=value: just words"),
        (["BUCKET=bucket"], [], "BUCKET is 'bucket', it must start with gs://"),
        (["PROVISIONING=cheap"], [], "must be on-demand, spot or flex-start"),
        (["PROVISIONING=flex-start"], [], "wants MAX_RUN_DURATION"),
        (["SLICES=0"], [], "SLICES is '0'"),
        (["CHIP_HOUR=cheap"], [], "CHIP_HOUR is 'cheap'"),
        (["PLATFORM=aws"], [], "PLATFORM is 'aws'"),
        (["PLATFORM=gke"], [], "CLUSTER is not set"),
        ([], ["--wat"], "does not know '--wat'"),
        ([], ["--wait", "soon"], "--wait wants a number"),
    ],
)
def test_bad_input_of_create(cloud: Cloud, lines: list[str], words: list[str], said: str):
    cloud.write_env(*lines)
    err = cloud.call("create", *words, code=2).stderr
    assert said in err and err.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "wants train or pretrain"),
        (["quickstart"], "wants train or pretrain"),
        (["train"], "train wants a config"),
        (["--files", "nowhere", "train", "x"], "nowhere is not a directory"),
        (["--what", "train", "x"], "does not know '--what'"),
        (["train", "x", "output_dir=gs://bucket/a b"], "output_dir is 'gs://bucket/a b'"),
        (["train", "x", "output_dir="], "output_dir is empty"),
    ],
)
@pytest.mark.parametrize("script", ["run", "supervise"])
def test_bad_input_of_a_run(cloud: Cloud, script: str, words: list[str], said: str):
    assert said in cloud.call(script, *words, code=2).stderr
    assert not cloud.calls()


def test_a_missing_env_file_is_named_with_what_to_do(cloud: Cloud):
    cloud.env_file.unlink()
    assert "env.example" in cloud.call("list", code=2).stderr


# ---- the exact commands --------------------------------------------------------------------------


def creating(*options: str) -> list[str]:
    return [
        "compute", "tpus", "queued-resources", "create", "xxl", *PLACE, "--quiet",
        "--accelerator-type=v5litepod-4", "--runtime-version=v2-alpha-tpuv5-lite", *options,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "command"),
    [
        ([], ["gcloud", *creating("--node-id=xxl", "--spot")]),
        (["PROVISIONING=on-demand"], ["gcloud", *creating("--node-id=xxl")]),
        (
            ["PROVISIONING=flex-start", "MAX_RUN_DURATION=24h"],
            ["gcloud", "alpha", *creating(
                "--node-id=xxl", "--provisioning-model=flex-start", "--max-run-duration=24h"
            )],
        ),
        (
            ["SLICES=2", "VALID_UNTIL=6h", "SERVICE_ACCOUNT=me@x.iam.gserviceaccount.com"],
            ["gcloud", *creating(
                "--node-count=2", "--node-prefix=xxl", "--spot", "--valid-until-duration=6h",
                "--service-account=me@x.iam.gserviceaccount.com",
            )],
        ),
        (
            ["PLATFORM=gke", "CLUSTER=mine", "IMAGE=x/y/z", "PROVISIONING=flex-start"],
            ["xpk", "cluster", "create", "--cluster=mine", "--tpu-type=v5litepod-4",
             "--num-slices=1", "--flex", *PLACE],
        ),
    ],
    ids=["spot", "on-demand", "flex-start", "multislice", "gke"],
)  # fmt: skip
def test_create_shows_its_commands(cloud: Cloud, lines: list[str], command: list[str]):
    cloud.write_env(*lines)
    assert cloud.dry("create")[0] == command


def workers(command: str) -> list[str]:
    where = ["xxl", *PLACE, "--quiet", "--node=all", "--worker=all"]
    return [*RESOURCES, "ssh", *where, f"--command={command}"]


def test_setup_shows_its_commands(cloud: Cloud):
    copy, ssh = cloud.dry("setup")
    source = "gs://bucket/prompts/.tpu/xxl-source.tar.gz"
    assert copy[:3] == ["gcloud", "storage", "cp"] and copy[4:] == [source, "--quiet"]
    assert ssh[:-1] == workers("")[:-1]
    assert source in ssh[-1] and ssh[-1].endswith("worker install")


def test_run_shows_its_commands(cloud: Cloud, tmp_path: Path):
    files = tmp_path / "my files"
    files.mkdir()
    copied, words, attempt, ssh = cloud.dry(
        "run", "--files", str(files), "train", "x", ODD, "output_dir=deep/place"
    )
    output = "gs://bucket/prompts/deep/place"
    assert copied == [
        "gcloud", "storage", "rsync", str(files), f"{output}/.tpu/files", "--recursive",
        "--delete-unmatched-destination-objects", "--quiet",
    ]  # fmt: skip
    *printed, place, quiet = words
    assert printed == [
        "printf", "%s\\0", "train", "x", ODD, "|", "gcloud", "storage", "cp", "-"
    ]  # fmt: skip
    name = place.split("/")[-2]
    assert place == f"{output}/.tpu/{name}/words" and quiet == "--quiet"
    assert attempt == [
        "printf", "%s", name, "|", "gcloud", "storage", "cp", "-", f"{output}/.tpu/attempt",
        "--quiet",
    ]  # fmt: skip
    assert ssh == workers(f"bash jaxprompt/tpu_scripts/worker start {output} {name}")


def test_the_other_scripts_show_their_commands(cloud: Cloud):
    follow = cloud.dry("logs", "--follow", "--worker", "3", "--slice", "1", "--lines", "5")
    assert follow == [
        [*RESOURCES, "ssh", "xxl", *PLACE, "--quiet", "--node=1", "--worker=3",
         "--command=tail -n 5 -F jaxprompt/run.log"]
    ]  # fmt: skip
    assert cloud.dry("delete") == [[*RESOURCES, "delete", "xxl", *PLACE, "--quiet", "--force"]]
    assert cloud.dry("list", "--all-zones") == [
        [*RESOURCES, "list", "--project=my-project", "--zone=-"],
        ["gcloud", "compute", "tpus", "tpu-vm", "list", "--project=my-project", "--zone=-"],
    ]
    made, results, logs = cloud.dry("fetch", "gs://other/place")
    assert made == ["mkdir", "-p", "runs/place/logs"]
    assert results[:5] == ["gcloud", "storage", "rsync", "gs://other/place", "runs/place"]
    assert logs[3:5] == ["gs://other/place/.tpu", "runs/place/logs"]


def test_supervise_shows_what_it_would_do(cloud: Cloud):
    shown = cloud.dry("supervise", "train", "x", ODD)
    assert [verb for command in shown for verb in VERBS if verb in command] == [
        "create", "describe", "cp", "ssh", "cp", "cp", "ssh", "ls", "describe", "ssh", "delete",
    ]  # fmt: skip
    assert ["gcloud", "storage", "ls", f"{OUTPUT}/.tpu/ATTEMPT/"] in shown


def test_on_gke_xpk_does_it(cloud: Cloud):
    cloud.write_env("PLATFORM=gke", "CLUSTER=mine", "IMAGE=x/y/z", "SLICES=2")
    (build,) = cloud.dry("setup")
    assert build == [
        "gcloud", "builds", "submit", "CHECKOUT", "--tag=x/y/z", "--project=my-project", "--quiet",
    ]  # fmt: skip
    start = cloud.dry("run", "train", "x", ODD)[-1]
    assert start[:-1] == [
        "xpk", "workload", "create", "--workload=xxl", "--cluster=mine", "--tpu-type=v5litepod-4",
        "--num-slices=2", "--docker-image=x/y/z", "--max-restarts=100",
        "--termination-grace-period-seconds=120", *PLACE,
    ]  # fmt: skip
    assert start[-1].startswith(f"--command=bash /jaxprompt/tpu_scripts/worker go {OUTPUT} 2")
    assert [command[:3] for command in cloud.dry("delete")] == [
        ["xpk", "workload", "delete"], ["xpk", "cluster", "delete"]
    ]  # fmt: skip
    assert [command[:3] for command in cloud.dry("list")] == [
        ["xpk", "cluster", "list"], ["xpk", "workload", "list"]
    ]  # fmt: skip
    (logs,) = cloud.dry("logs", "--follow")
    assert logs[:4] == ["kubectl", "logs", "--tail=100", "--follow"]


# ---- from nothing to results ---------------------------------------------------------------------


def test_create_setup_run_fetch_delete(cloud: Cloud, tmp_path: Path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "data.tsv").write_text("text\tlabel\n")
    created = cloud.call("create").stderr
    assert "4 chips at 1.20 dollars are 4.80 dollars an hour, 115.20 a day" in created
    cloud.call("setup")
    started = cloud.call("run", "--files", str(files), "train", "x.yaml", ODD).stderr
    assert "is billed until you delete it" in started and "tpu_scripts/delete" in started
    (attempt,) = [p for p in cloud.bucket(".tpu").iterdir() if p.name.startswith("2")]
    cloud.wait_for(attempt / "done")
    assert "one step" in cloud.call("logs").stdout
    cloud.call("fetch", "runs/xxl", "my results")
    results = cloud.directory / "my results"
    assert json.loads((results / "metrics.jsonl").read_text())["words"] == ["train", "x.yaml", ODD]
    assert (results / "data.txt").read_text() == "data.tsv"
    assert not (results / ".saving").exists() and not cloud.bucket(".saving").exists()
    assert list((results / "logs").glob("*/*.log"))
    assert cloud.state == "ACTIVE"
    assert "is gone" in cloud.call("delete").stderr
    assert cloud.state == "ABSENT"
    assert "is gone" in cloud.call("delete").stderr, "again is no error"


def test_only_one_run_at_a_time(cloud: Cloud):
    cloud.plan(run=["long"])
    for script in ("create", "setup"):
        cloud.call(script)
    cloud.call("run", "train", "x")
    cloud.wait_for(cloud.directory / "homes/worker0/jaxprompt/.process")
    refused = cloud.call("run", "train", "y", code=1).stderr
    assert "a run goes on here already" in refused and "tpu_scripts/delete" in refused
    assert "a run goes on here already" in cloud.call("setup", code=1).stderr
    other = cloud.call("supervise", "train", "y", "output_dir=y", code=1).stderr
    assert "another run goes on on xxl" in other
    assert cloud.state == "ACTIVE" and not cloud.count("delete")


def test_a_worker_told_to_stop_leaves_no_sign_but_what_it_wrote(cloud: Cloud):
    cloud.plan(run=["long"])
    for script in ("create", "setup"):
        cloud.call(script)
    cloud.call("run", "train", "x")
    home = cloud.directory / "homes/worker0/jaxprompt"
    cloud.wait_for(home / ".process")
    (pid,) = [
        int(p.name) for p in Path("/proc").glob("[0-9]*")
        if _cmdline(p)[2:3] == ["go"] and str(cloud.directory) in _environ(p)
    ]  # fmt: skip
    os.kill(pid, signal.SIGTERM)
    cloud.wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert cloud.metrics()[0]["words"] == ["train", "x"]
    assert [name for name in cloud.signs() if not name.endswith(".log")] == ["words"]
    assert "was told to stop" in (home / "run.log").read_text()


def _cmdline(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def _environ(process: Path) -> str:
    try:
        return (process / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_of_several_workers_the_first_one_writes(cloud: Cloud):
    (cloud.directory / "workers").write_text("2")
    cloud.plan(run=["long", "long"])
    for script in ("create", "setup"):
        cloud.call(script)
    cloud.call("run", "train", "x")
    homes = [cloud.directory / f"homes/worker{number}/jaxprompt" for number in (0, 1)]
    for home in homes:
        cloud.wait_for(home / ".process")
        cloud.wait_for(home / "runs/bucket/prompts/runs/xxl/data.txt")
    (homes[1] / "runs/bucket/prompts/runs/xxl/of_worker_1").write_text("")
    cloud.wait_for(cloud.bucket("data.txt"))
    (attempt,) = [p for p in cloud.bucket(".tpu").iterdir() if p.name.startswith("2")]
    for _ in range(2):  # copies of the second worker: the second one has begun since
        cloud.wait_for(attempt / "worker1.log")
        (attempt / "worker1.log").unlink()
    assert not cloud.bucket("of_worker_1").exists()
    assert len(cloud.metrics()) == 1


def test_a_failure_of_any_worker_is_one_of_the_run(cloud: Cloud):
    (cloud.directory / "workers").write_text("2")
    cloud.plan(run=["long", 2])
    assert "exit code 2" in cloud.call("supervise", "train", "x", code=2).stderr
    assert cloud.state == "ABSENT" and "failed-2" in cloud.signs()


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_quota_error_is_one_sentence_and_leaves_nothing(cloud: Cloud):
    cloud.plan(create=["quota"])
    err = cloud.call("create", code=2).stderr
    assert "the quota of my-project does not allow xxl (v5litepod-4, spot) in us-west4-a" in err
    assert "billed" not in err and cloud.count("create") == 1


@pytest.mark.parametrize("verb", ["create", "describe"])
def test_an_account_that_may_not(cloud: Cloud, verb: str):
    cloud.plan(**{verb: ["denied"]})
    err = cloud.call("create", code=2).stderr
    assert "gcloud may not use TPUs in my-project" in err and "billed" not in err


def test_a_program_that_is_not_installed(cloud: Cloud):
    cloud.write_env("PLATFORM=gke", "CLUSTER=mine", "IMAGE=x/y/z")
    (cloud.directory / "bin/xpk").unlink()
    assert "xpk is not installed" in cloud.call("create", code=2).stderr


@pytest.mark.parametrize(
    ("kind", "chips"), [("v5litepod-4", 4), ("v5litepod-16", 16), ("v5p-8", 4), ("v4-32", 16)]
)
def test_create_says_how_many_chips_are_billed(cloud: Cloud, kind: str, chips: int):
    cloud.write_env(f"ACCELERATOR_TYPE={kind}")
    err = cloud.call("create").stderr
    assert f" {chips} chips" in err and "warning" not in err


def test_what_passes_is_tried_again(cloud: Cloud):
    cloud.plan(create=["unavailable", "unavailable"])
    assert "attempt 2 of 3 failed" in cloud.call("create").stderr
    assert cloud.count("create") == 3


def test_what_does_not_pass_is_said_with_how_to_look_and_delete(cloud: Cloud):
    cloud.plan(create=["unavailable"] * 3)
    err = cloud.call("create", code=1).stderr
    assert "may still be there" in err and "tpu_scripts/list" in err and "tpu_scripts/delete" in err


def test_a_request_that_waits_can_be_left_in_the_queue(cloud: Cloud):
    cloud.plan(describe=["ABSENT", "ABSENT", *["WAITING_FOR_RESOURCES"] * 50])
    err = cloud.call("create", "--wait", "0", code=1).stderr
    assert "still WAITING_FOR_RESOURCES after 0 minutes" in err
    assert "tpu_scripts/delete" in err


def test_create_waits_until_it_is_there(cloud: Cloud):
    waits = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "unavailable", "PROVISIONING"]
    cloud.plan(describe=["ABSENT", "ABSENT", *waits, "ACTIVE"])
    err = cloud.call("create").stderr
    assert err.count("xxl is WAITING_FOR_RESOURCES") == 1 and "xxl is PROVISIONING" in err
    assert cloud.count("create") == 1
    cloud.call("create")
    assert cloud.count("create") == 1, "what is there is left as it is"


def test_a_request_that_failed_is_named(cloud: Cloud):
    cloud.plan(describe=["ABSENT", "ABSENT", "FAILED"])
    err = cloud.call("create", code=1).stderr
    assert "xxl is FAILED" in err and "tpu_scripts/delete" in err


def test_a_worker_that_dies_in_setup(cloud: Cloud):
    cloud.call("create")
    cloud.plan(uv=["full", "full", "full"])
    err = cloud.call("setup", code=1).stderr
    assert "No space left" in err and "not every worker of xxl could be set up" in err
    assert "tpu_scripts/delete" in err
    cloud.call("setup")


def test_ssh_that_fails_in_passing(cloud: Cloud):
    cloud.call("create")
    cloud.plan(ssh=["down"])
    cloud.call("setup")
    cloud.plan(ssh=["down"])
    err = cloud.call("run", "train", "x", code=1).stderr
    assert "did not start on every worker" in err and "tpu_scripts/delete" in err


def test_a_delete_that_fails_says_so(cloud: Cloud):
    cloud.call("create")
    cloud.plan(delete=["unavailable"])
    assert "is gone" in cloud.call("delete").stderr
    cloud.call("create")
    cloud.plan(delete=["unavailable"] * 3)
    err = cloud.call("delete", code=1).stderr
    assert "could not be deleted" in err and "may still be there, and billed" in err


# ---- supervised ----------------------------------------------------------------------------------


def test_supervise_does_all_of_it_and_deletes(cloud: Cloud):
    err = cloud.call("supervise", "train", "x", ODD).stderr
    assert f"done: {OUTPUT}" in err and "tpu_scripts/fetch" in err
    assert cloud.state == "ABSENT"
    assert [entry["words"] for entry in cloud.metrics()] == [["train", "x", ODD]]
    creates = cloud.count("create")
    assert "done already" in cloud.call("supervise", "train", "x", ODD).stderr
    assert cloud.count("create") == creates, "a run that is done needs no machine"


def test_supervise_can_keep_the_machine(cloud: Cloud):
    err = cloud.call("supervise", "--keep", "train", "x").stderr
    assert cloud.state == "ACTIVE" and "is billed until you delete it" in err


def test_a_preempted_run_is_created_again_and_resumes(cloud: Cloud):
    cloud.plan(run=["long", "long", 0], describe=["ABSENT"])
    process = cloud.start("supervise", "train", "x")
    for starts, left in ((1, ["long", 0]), (2, [0])):
        cloud.wait_until(lambda starts=starts: len(cloud.metrics()) == starts)
        cloud.plan(run=left, describe=["SUSPENDED"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("preempted; creating it again") == 2
    assert [entry["resumed"] for entry in cloud.metrics()] == [False, True, True]
    assert cloud.count("create") == 3 and cloud.state == "ABSENT"


def test_exit_code_2_is_not_started_again(cloud: Cloud):
    cloud.plan(run=[2])
    err = cloud.call("supervise", "train", "x", code=2).stderr
    assert "which starting again cannot cure" in err and "one step" in err
    assert cloud.count("create") == 1 and cloud.state == "ABSENT"
    assert "failed-2" in cloud.signs()


def test_other_failures_are_started_again_a_few_times(cloud: Cloud):
    cloud.plan(run=[1, 134])
    assert "failure 2 of at most 3" in cloud.call("supervise", "train", "x").stderr
    assert len(cloud.metrics()) == 3 and cloud.count("create") == 1
    cloud.plan(run=[1, 1])
    err = cloud.call("supervise", "--max-failures", "1", "train", "y", code=1).stderr
    assert "gave up after 2 failures: the run ended with exit code 1" in err
    assert cloud.state == "ABSENT"


def test_a_machine_without_sign_of_life_is_replaced(cloud: Cloud):
    cloud.plan(run=["long", 0], ssh_alive=["down"] * 3)
    err = cloud.call("supervise", "train", "x").stderr
    assert "no sign of the run on xxl (3 of 3)" in err
    assert cloud.count("create") == 2 and cloud.state == "ABSENT"


def test_a_machine_preempted_in_setup_counts_as_no_failure(cloud: Cloud):
    cloud.plan(uv=["full"] * 3, describe=[*["ABSENT"] * 4, "ACTIVE", "SUSPENDED"])
    err = cloud.call("supervise", "--max-failures", "0", "train", "x").stderr
    assert "was preempted before it ran" in err
    assert cloud.count("create") == 2 and cloud.state == "ABSENT"


def test_a_machine_that_somebody_deletes_is_not_created_again(cloud: Cloud):
    cloud.plan(run=["long"])
    process = cloud.start("supervise", "train", "x")
    cloud.wait_for(cloud.bucket("metrics.jsonl"))
    cloud.call("delete")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "was deleted while the run went on" in err
    assert cloud.count("create") == 1


def test_what_is_done_does_not_end_another_run(cloud: Cloud):
    cloud.call("supervise", "--keep", "train", "x")
    cloud.plan(run=["long"])
    cloud.call("run", "train", "y", "output_dir=y")
    cloud.wait_for(cloud.directory / "homes/worker0/jaxprompt/.process")
    err = cloud.call("supervise", "train", "x").stderr
    assert "done already" in err and cloud.state == "ACTIVE" and not cloud.count("delete")


def test_supervise_stops_at_a_quota_error(cloud: Cloud):
    cloud.plan(create=["quota"])
    assert "the quota" in cloud.call("supervise", "train", "x", code=2).stderr
    assert cloud.count("create") == 1


def test_supervise_names_what_it_could_not_delete(cloud: Cloud):
    cloud.plan(run=[2], delete=["unavailable"] * 3)
    err = cloud.call("supervise", "train", "x", code=1).stderr
    assert "may still be there, and billed" in err and "tpu_scripts/delete" in err


def test_supervise_that_is_interrupted_names_the_machine_and_can_go_on(cloud: Cloud):
    cloud.plan(run=["long"])
    process = cloud.start("supervise", "train", "x")
    cloud.wait_for(cloud.bucket("metrics.jsonl"))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "may still be there, and billed" in err and cloud.state == "ACTIVE"
    process = cloud.start("supervise", "train", "x")
    (attempt,) = [p for p in cloud.bucket(".tpu").iterdir() if p.name.startswith("2")]
    (attempt / "done").write_text("worker\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(cloud.metrics()) == 1 and cloud.count("create") == 1 and cloud.state == "ABSENT"


def test_supervise_on_gke_watches_what_xpk_restarts(cloud: Cloud):
    cloud.write_env("PLATFORM=gke", "CLUSTER=mine", "IMAGE=x/y/z")
    noise = "[XPK] Task: `List Jobs with filter-by-jobs=^xxl$`"
    cloud.plan(xpk_workload_list=[noise, f"{noise}\nxxl   2026-11-23   Finished   JobSet failed"])
    err = cloud.call("supervise", "train", "x", code=1).stderr
    assert "xpk gave it up" in err and len(cloud.calls("xpk", "workload", "list")) == 2
    assert cloud.calls("xpk", "cluster", "delete")


# ---- what goes where -----------------------------------------------------------------------------


def test_the_wheel_has_none_of_it():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "tpu_scripts" not in json.dumps(targets["targets"]["wheel"])


def test_setup_packs_the_checkout_with_what_the_workers_need(cloud: Cloud):
    cloud.scripts = SCRIPTS
    for script in ("create", "setup"):
        cloud.call(script)
    home = cloud.directory / "homes/worker0/jaxprompt"
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "jaxprompt/cli.py",
        "configs/paper/large.yaml",
        "tpu_scripts/worker",
        "tpu_scripts/join.py",
    ):
        assert (home / name).is_file(), name
    assert not (home / "tpu_scripts/env").exists()
