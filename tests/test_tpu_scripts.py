"""tpu_scripts/: help, bad input, and the exact commands that a cloud would get."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cloud import ODD, OUTPUT, RESOURCES, ROOT, SCRIPTS, Cloud

COMMANDS = ["create", "setup", "run", "supervise", "logs", "fetch", "list", "delete"]
PLACE = ["--project=my-project", "--zone=us-west4-a"]
VERBS = ("create", "describe", "delete", "ssh", "cp", "ls")


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
        (["MODELS=models"], [], "MODELS is 'models', it must start with gs://"),
        (["MODELS=gs://b", "PLATFORM=gke", "CLUSTER=c", "IMAGE=i"], [], "MODELS is for TPU VMs"),
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
    cloud.write_env("MODELS=gs://b/models/")
    assert cloud.dry("setup")[1][-1].endswith("worker install gs://b/models")


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
