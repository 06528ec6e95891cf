"""Stands in for gcloud, xpk, kubectl, and for what a worker has: uv, Python, mounts (cloud.py).

Called with the name of what it stands in for. Every call is a line of `calls.jsonl`; buckets and
the workers' homes are directories; `ssh` really runs its command in them. `plan.json` says what
goes wrong: for each verb a list, of which each call takes the first entry, nothing if it is empty.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
BUCKETS = HERE / "buckets"
HOMES = HERE / "homes"
MARK = f"STAND_IN_WORKER={HERE}"
ERRORS = {
    "quota": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded.",
    "denied": "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied.",
    "unavailable": "ERROR: UNAVAILABLE: the service is currently unavailable.",
}


def planned(verb: str, take: bool = True) -> object:
    """The next entry of the plan for a verb; None if there is none."""
    with (HERE / "plan.json").open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        plan = json.load(stream)
        entry = (plan.get(verb) or [None])[0]
        if entry is None or not take:
            return entry
        plan[verb].pop(0)
        stream.seek(0)
        stream.truncate()
        json.dump(plan, stream)
    return entry


def fail(message: str, code: int = 1) -> int:
    print(message, file=sys.stderr)
    return code


# ---- machines ------------------------------------------------------------------------------------


def state(new: str | None = None) -> str:
    file = HERE / "state"
    if new is not None:
        file.write_text(new)
    return file.read_text() if file.exists() else "ABSENT"


def lose_workers() -> None:
    """What runs on the workers is killed, what is on their disks gone."""
    while kill_workers():  # one that was just starting another is not alone
        time.sleep(0.01)
    shutil.rmtree(HOMES, ignore_errors=True)


def kill_workers() -> bool:
    """Whether anything still ran on the workers."""
    found = False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
                found = True
        except OSError:
            continue
    return found


def create(words: list[str]) -> int:
    if (trouble := planned("create")) is not None:
        return fail(ERRORS[str(trouble)])
    if state() != "ABSENT":
        return fail("ERROR: ALREADY_EXISTS")
    state("ACTIVE")
    return 0


def describe(words: list[str]) -> int:
    entry = planned("describe")
    if entry in ERRORS:
        return fail(ERRORS[str(entry)])
    if entry is not None:
        state(str(entry))
        if entry in ("SUSPENDED", "FAILED", "ABSENT"):
            lose_workers()
    if state() == "ABSENT":
        return fail("ERROR: NOT_FOUND: queued resource not found")
    print(state())
    on_its_way = state() not in ("ACTIVE", "SUSPENDED", "FAILED", "DELETING")
    if on_its_way and planned("describe", take=False) is None:
        state("ACTIVE")
    return 0


def delete(words: list[str]) -> int:
    if planned("delete") is not None:
        return fail(ERRORS["unavailable"])
    state("DELETING")
    lose_workers()
    state("ABSENT")
    return 0


def ssh(words: list[str]) -> int:
    command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
    trouble = planned("ssh alive" if "worker alive" in command else "ssh")
    if trouble is not None or state() != "ACTIVE":
        return fail("ssh: connect to host 10.0.0.2 port 22: Connection timed out", 255)
    codes = []
    for number in range(int((HERE / "workers").read_text()) if "--worker=all" in words else 1):
        home = HOMES / f"worker{number}"
        home.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"HOME": str(home), MARK.partition("=")[0]: str(HERE)}
        codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode)
    return max(codes)


# ---- buckets -------------------------------------------------------------------------------------


def local(place: str) -> Path:
    return BUCKETS / place[5:] if place.startswith("gs://") else Path(place)


def storage(words: list[str]) -> int:
    verb = words.pop(0)
    if planned(f"storage {verb}") is not None:
        return fail(ERRORS["unavailable"])
    places = [word for word in words if not word.startswith("--")]
    if verb == "ls":
        there = sorted(local(places[0]).glob("*"))
        print("".join(f"{places[0]}{path.name}\n" for path in there), end="")
        return 0 if there else fail("ERROR: One or more URLs matched no objects.")
    if verb == "cat":
        folder, _, name = places[0].rpartition("/")
        there = sorted(local(folder).glob(name))
        sys.stdout.buffer.write(b"".join(path.read_bytes() for path in there))
        return 0 if there else fail("ERROR: The following URLs matched no objects.")
    source, target = places
    if verb == "cp":
        content = sys.stdin.buffer.read() if source == "-" else local(source).read_bytes()
        put(local(target), content)
        return 0
    return rsync(local(source), local(target), words)


def put(target: Path, content: bytes) -> None:
    """An object is there whole or not at all, also when the worker that copies it is killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = HERE / f"part-{os.getpid()}"
    part.write_bytes(content)
    part.replace(target)


def rsync(source: Path, target: Path, words: list[str]) -> int:
    if not source.is_dir():
        return fail("ERROR: Did not find existing container")
    excluded = [w.partition("=")[2].split(",") for w in words if w.startswith("--exclude=")]

    def files(root: Path) -> set[str]:
        found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        patterns = [pattern for group in excluded for pattern in group]
        return {name for name in found if not any(re.match(p, name) for p in patterns)}

    for name in files(source):
        put(target / name, (source / name).read_bytes())
    if "--delete-unmatched-destination-objects" in words:
        for name in files(target) - files(source):
            (target / name).unlink()
    return 0


# ---- a worker ------------------------------------------------------------------------------------


def uv(words: list[str]) -> int:
    if planned("uv") is not None:
        return fail("error: No space left on device (os error 28)", 2)
    if words[0] == "venv":
        python = Path(".venv/bin/python")
        python.parent.mkdir(parents=True)
        python.symlink_to(HERE / "bin" / "python")
    return 0


def python(words: list[str]) -> int:
    """`join.py`: without words a count of chips, with them a run as the plan says."""
    if len(words) == 1:
        return 0
    number, output = Path(words[1]), Path(words[-1].partition("=")[2])
    number.write_text(os.environ["HOME"][-1])
    resumed = (output / "metrics.jsonl").exists()
    entry = planned("run")
    with (output / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"words": words[2:-1], "resumed": resumed}) + "\n")
    (output / ".saving").write_text("half a checkpoint")
    (output / "data.txt").write_text("".join(sorted(p.name for p in Path().iterdir())))
    print("one step", flush=True)
    if entry == "long":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        while not stopped:
            time.sleep(0.02)
        return 0
    return int(str(entry or 0))


def mount(name: str, words: list[str]) -> int:
    """A bucket's directory as a link; what is mounted is what is one."""
    place = Path(words[-1])
    if name == "mountpoint":
        return 0 if place.is_symlink() else 1
    if name == "fusermount":
        place.unlink()
        return 0
    if planned("gcsfuse") is not None:
        return fail("Error: bucket does not exist")
    below = next((word for word in words if word.startswith("--only-dir=")), "").partition("=")[2]
    place.rmdir()
    place.symlink_to(BUCKETS / words[-2] / below)
    return 0


def main(name: str, words: list[str]) -> int:
    if name == "end":
        lose_workers()
        return 0
    with (HERE / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps([name, *words]) + "\n")
    if name == "hostname":
        print(Path(os.environ["HOME"]).name)
        return 0
    if name in ("uv", "python"):
        return {"uv": uv, "python": python}[name](words)
    if name in ("gcsfuse", "mountpoint", "fusermount"):
        return mount(name, words)
    if name in ("xpk", "kubectl"):
        trouble = planned(" ".join([name, *words[:2]]))
        print(trouble or "")
        return 1 if trouble == "fails" else 0
    words = [word for word in words if word not in ("alpha", "--quiet")]
    if words[0] == "storage":
        return storage(words[1:])
    verbs = {"create": create, "describe": describe, "delete": delete, "ssh": ssh}
    if words[:3] == ["compute", "tpus", "queued-resources"] and words[3] in verbs:
        return verbs[words[3]](words[4:])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).name, sys.argv[2:]))
