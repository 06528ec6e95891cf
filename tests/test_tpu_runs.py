"""Runs by tpu_scripts/, against a stand-in for the cloud that fails on demand."""

import json
import os
import signal
from pathlib import Path

import pytest
from cloud import ODD, OUTPUT, Cloud

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
        if _cmdline(p)[2:3] == ["go"] and str(cloud.directory) in _environ(p) and _leads(p)
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


def _leads(process: Path) -> bool:
    """Whether it began its session: what a script forks looks like the script for a moment."""
    try:
        return os.getsid(int(process.name)) == int(process.name)
    except OSError:
        return False


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


def test_backbones_are_mounted_from_a_bucket(cloud: Cloud):
    """Read only, on every worker, again after a reboot, another one after another setup."""
    (cloud.directory / "workers").write_text("2")
    for name in ("one", "two"):
        (cloud.directory / f"buckets/b/models/{name}").mkdir(parents=True)
    cloud.write_env("MODELS=gs://b/models/one")
    cloud.call("create")
    cloud.call("setup")
    homes = [cloud.directory / f"homes/worker{number}/jaxprompt" for number in (0, 1)]
    mounts = [
        ["gcsfuse", "-o", "ro", "--implicit-dirs", "--only-dir=models/one", "b", f"{home}/models"]
        for home in homes
    ]
    assert cloud.calls("gcsfuse") == mounts
    cloud.write_env("MODELS=gs://b/models/two")
    cloud.call("setup")
    assert [(home / "models").resolve().name for home in homes] == ["two", "two"]
    for home in homes:
        (home / "models").unlink()  # as a reboot leaves it
    cloud.call("run", "train", "x", "backbone.name=models/xxl")
    cloud.wait_until(lambda: "done" in cloud.signs())
    assert [(home / "work/models").resolve().name for home in homes] == ["two", "two"]


def test_a_bucket_that_cannot_be_mounted_fails_the_setup(cloud: Cloud):
    cloud.write_env("MODELS=gs://b")
    cloud.plan(gcsfuse=["denied"] * 3)
    cloud.call("create")
    assert "could be set up" in cloud.call("setup", code=1).stderr
    assert cloud.calls("gcsfuse")[0][-2:] == [
        "b",
        f"{cloud.directory}/homes/worker0/jaxprompt/models",
    ]


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
