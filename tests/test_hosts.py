"""Runs of several processes, real ones: the same as one process; killed, stopped, slow, resumed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_fixtures import (
    World,
    assert_same_end,
    compiled,
    environment,
    losses,
    make_world,
    prompt_bytes,
    records,
    run_mapping,
    saved_state,
    spawn,
    write_backbone,
    write_rows,
)

from jaxprompt import cli, trees
from jaxprompt.artifact import load_artifact
from jaxprompt.config import PretrainConfig, load_config
from jaxprompt.pretrain import pretrain
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.t5.backbones import read_config
from jaxprompt.t5.layers import param_specs
from jaxprompt.train import train

__all__ = ["compiled"]  # fixture

OPTIONS = [
    "train.steps=60", "train.eval_every=20", "train.save_every=5", "data.row_multiple=4",
    "backbone.dropout=0.1",
]  # fmt: skip
BOUND = 240.0  # seconds after which a process that should have ended has failed a test
LOST = "another host of this run ended"

# Imports once, then forks a process for each order, for all imports take longer than a run.
NURSERY = """
    import ctypes, json, os, signal, sys, time
    import jax, transformers
    from transformers import AutoTokenizer
    from jaxprompt import cli, evaluate, pretrain, train

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, end, code = order["wait"], time.monotonic() + order["seconds"], None
            while code is None and time.monotonic() < end:
                there, status = os.waitpid(pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if there else time.sleep(0.02)
            print(json.dumps(code), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with whoever runs the tests
            os.chdir(order["cwd"])
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            for number, name in enumerate(("stdout", "stderr"), start=1):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            jax.config.update("jax_num_cpu_devices", order["devices"])
            code = 70
            try:
                code = cli.main(order["argv"])
            except SystemExit as error:
                code = error.code
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(pid), flush=True)
"""


class Nursery:
    """Where the processes of the tests are born."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NURSERY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo"),
        )  # fmt: skip

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        with self._process:
            self._process.kill()


class Hosts:
    """Processes of one run, each with a directory of its own, as on machines that share no disk."""

    def __init__(self, nursery: Nursery, place: Path, count: int, *words: object, devices: int = 1):
        self.nursery, self.places = nursery, [place / f"host{n}" for n in range(count)]
        self.pids, port = [], free_port()
        for number, own in enumerate(self.places):
            own.mkdir(parents=True, exist_ok=True)
            (own / "stderr").unlink(missing_ok=True)
            where = ["--coordinator", f"127.0.0.1:{port}", "--process-count", count]
            argv = [*words, *where, "--process-index", number, "--join-timeout", 60]
            order = {"argv": [*map(str, argv)], "cwd": str(own), "devices": devices}
            self.pids.append(nursery.ask(order))

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *raised: object) -> None:
        for pid in self.pids:
            for each in (*workers_of(pid), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)

    @property
    def run(self) -> Path:
        """The run's directory, of the first host."""
        return self.places[0] / "run"

    def said(self, number: int) -> str:
        return (self.places[number] / "stderr").read_text(encoding="utf-8")

    def wait(self) -> list[int]:
        """Exit codes, once all have ended."""
        codes = [self.nursery.ask({"wait": pid, "seconds": BOUND}) for pid in self.pids]
        assert None not in codes, [self.said(n)[-2000:] for n in range(len(codes))]
        return codes

    def finish(self) -> Path:
        """The run's directory, once all have ended well."""
        codes = self.wait()
        assert not any(codes), (codes, [self.said(n)[-2000:] for n in range(len(codes))])
        return self.run

    def until(self, steps: int) -> None:
        """Waits until so many steps are logged."""
        path, end = self.run / "metrics.jsonl", time.monotonic() + BOUND
        while not (path.exists() and path.read_bytes().count(b'"loss"') >= steps):
            assert time.monotonic() < end, [self.said(n)[-2000:] for n in range(len(self.pids))]
            time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def workers_of(pid: int) -> list[int]:
    """The process that works for one that watches."""
    with contextlib.suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


@pytest.fixture(scope="module")
def nursery(compiled: Path) -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A backbone whose heads divide by 4; meshes take all devices there are."""
    root = tmp_path_factory.mktemp("world")
    made = make_world(root, root)
    write_backbone(root / "backbone", num_heads=4, d_kv=3)
    mapping = {**run_mapping(root), "mesh": {"data": -1}}
    made.config.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def start(nursery: Nursery, world: World) -> Callable[..., Hosts]:
    """Starts a run: (place, processes, option, ...)."""

    def started(place: Path, count: int, *options: str, devices: int = 1) -> Hosts:
        words = ["train", world.config, "output_dir=run", *OPTIONS, *options]
        return Hosts(nursery, place, count, *words, devices=devices)

    return started


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with two devices."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    train(world.load(directory, *OPTIONS, "mesh.data=2"))
    return directory


@pytest.fixture(scope="module")
def two(start: Callable[..., Hosts], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    """A run of two processes, ended well."""
    with start(tmp_path_factory.mktemp("two"), 2) as hosts:
        hosts.finish()
        return hosts


def assert_close(left: Path, right: Path) -> None:
    """Two runs came to the same up to the order of additions."""
    np.testing.assert_allclose(losses(left), losses(right), rtol=1e-4)
    for name in ("prompt", "best"):
        one, other = (load_artifact(run / name).values["prompt"] for run in (left, right))
        np.testing.assert_allclose(one, other, atol=1e-4)
    scores = [[r for r in records(run) if "eval/accuracy" in r] for run in (left, right)]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_two_processes_train_what_one_does_and_the_first_alone_writes(two: Hosts, alone: Path):
    assert_close(two.run, alone)
    np.testing.assert_allclose(losses(two.run)[:20], losses(alone)[:20], rtol=1e-5)
    names = [{path.name for path in place.iterdir()} for place in two.places]
    assert names == [{"run", "stdout", "stderr"}, {"stdout", "stderr"}]
    assert {path.name for path in two.run.iterdir()} == {path.name for path in alone.iterdir()}
    steps = [{path.name for path in (run / "checkpoints").iterdir()} for run in (two.run, alone)]
    assert steps[0] == steps[1]
    assert "packed: " in two.said(0) and "packed: " not in two.said(1)
    assert not any((place / "stdout").read_text(encoding="utf-8") for place in two.places)
    assert "process 1 of 2" in two.said(1)


def test_four_processes_that_share_the_model_train_what_one_does(
    start: Callable[..., Hosts], alone: Path, tmp_path: Path
):
    with start(tmp_path, 4, "mesh.model=2") as hosts:
        assert_close(hosts.finish(), alone)


def test_sigterm_to_one_host_saves_one_step_on_all_and_a_slow_host_is_waited_for(
    start: Callable[..., Hosts], two: Hosts, tmp_path: Path
):
    with start(tmp_path, 2, "train.save_every=0") as hosts:
        hosts.until(4)
        os.kill(hosts.pids[1], signal.SIGTERM)
        hosts.finish()
        step, _, metadata = saved_state(hosts.run)
        assert 4 <= step < 60 and not metadata["progress"][0]["finished"]
        assert f"SIGTERM: stopped and saved at step {step}" in hosts.said(0)
        assert [path.name for path in (hosts.run / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    with start(tmp_path, 2) as hosts:
        hosts.until(step + 3)
        (worker,) = workers_of(hosts.pids[1])
        os.kill(worker, signal.SIGSTOP)
        time.sleep(1)  # in which steps in flight end
        before = len(losses(hosts.run))
        time.sleep(2)
        assert before < 60 and len(losses(hosts.run)) == before
        os.kill(worker, signal.SIGCONT)
        hosts.finish()
        assert f"resuming at step {step}" in hosts.said(0)
    assert losses(hosts.run) == losses(two.run)
    assert prompt_bytes(hosts.run / "prompt") == prompt_bytes(two.run / "prompt")
    assert prompt_bytes(hosts.run / "best") == prompt_bytes(two.run / "best")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_run_soon_and_the_same_command_goes_on_to_the_bit(
    start: Callable[..., Hosts], two: Hosts, alone: Path, tmp_path: Path, victim: int
):
    with start(tmp_path, 2) as hosts:
        hosts.until(12)
        os.kill(hosts.pids[victim], signal.SIGKILL)
        began = time.monotonic()
        codes = hosts.wait()
        assert time.monotonic() - began < 30
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
        last = hosts.said(1 - victim).splitlines()[-1]
        assert last.startswith(f"jaxprompt: error: {LOST}") and "goes on from the last" in last
        assert len(losses(hosts.run)) < 60
    if victim == 0:  # on another number of hosts, and another mesh
        with start(tmp_path, 4, "mesh.model=2") as hosts:
            assert_close(hosts.finish(), alone)
        assert "resuming at step" in hosts.said(0)
        return
    with start(tmp_path, 2) as hosts:
        assert_same_end(hosts.finish(), two.run)
        assert "resuming at step" in hosts.said(0)


def test_a_host_without_a_sign_of_life_is_lost(start: Callable[..., Hosts], tmp_path: Path):
    with start(tmp_path, 2, "--host-timeout", "10") as hosts:
        hosts.until(4)
        (worker,) = workers_of(hosts.pids[1])
        os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        assert hosts.nursery.ask({"wait": hosts.pids[0], "seconds": BOUND}) == 1
        assert time.monotonic() - began < 60
        last = hosts.said(0).splitlines()[-1]
        assert LOST in last and "did not answer for 10 seconds" in last


def test_a_sweep_trains_on_two_hosts_as_on_one(
    start: Callable[..., Hosts], world: World, tmp_path: Path
):
    words = ["sweep={method.length: [3, 4]}", "train.steps=4", "train.eval_every=2"]
    with start(tmp_path, 2, *words) as hosts:
        hosts.finish()
    expected = tmp_path / "alone"
    sweep(load_sweep(world.config, [f"output_dir={expected}", *OPTIONS, *words, "mesh.data=2"]))
    names = sorted(path.name for path in (expected / "prompts").iterdir())
    assert len(names) == 2
    for name in names:
        own, other = hosts.run / "prompts" / name, expected / "prompts" / name
        np.testing.assert_allclose(losses(own), losses(other), rtol=1e-5)
        assert {path.name for path in own.iterdir()} == {path.name for path in other.iterdir()}
    assert json.loads((hosts.run / "sweep.json").read_text())["settings"]
    assert not (hosts.places[1] / "run").exists()


def test_a_backbone_is_tuned_on_two_hosts_as_on_one(
    start: Callable[..., Hosts], world: World, tmp_path: Path
):
    words = ["tune=model", "optim.recipe=adamw", "optim.learning_rate=0.001", "train.steps=4"]
    with start(tmp_path, 2, *words, "train.eval_every=2") as hosts:
        hosts.finish()
    expected = tmp_path / "alone"
    train(world.load(expected, *OPTIONS, *words, "train.eval_every=2", "mesh.data=2"))
    np.testing.assert_allclose(losses(hosts.run), losses(expected), rtol=1e-5)
    assert {path.name for path in (hosts.run / "best").iterdir()} == {
        path.name for path in (expected / "best").iterdir()
    }


def test_pretraining_on_two_hosts_is_that_on_one(nursery: Nursery, world: World, tmp_path: Path):
    rows = [{"text": "the food was good and the film was about a book of this film"}] * 40
    text = write_rows(tmp_path / "text.jsonl", rows)
    entry = {
        "objective": "prefix_lm", "files": [str(text)], "weight": 1.0,
        "max_input_length": 16, "max_target_length": 16,
    }  # fmt: skip
    mapping = {
        "backbone": {"name": str(world.root / "backbone")},
        "mixture": {"batch_size": 4, "entries": [entry]}, "validation": [entry], "eval_batches": 1,
        "optim": {"recipe": "pretrain", "learning_rate": 0.01},
        "train": {"steps": 4, "eval_every": 2, "save_every": 2, "log_every": 1},
        "logging": {"terminal": False}, "output_dir": "run",
    }  # fmt: skip
    config = tmp_path / "pretrain.yaml"
    config.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    with Hosts(nursery, tmp_path, 2, "pretrain", config) as hosts:
        hosts.finish()
    pretrain(load_config(config, [f"output_dir={tmp_path}/alone", "mesh.data=2"], PretrainConfig))
    np.testing.assert_allclose(losses(hosts.run), losses(tmp_path / "alone"), rtol=1e-5)
    assert (hosts.run / "backbone" / "model.safetensors").is_file()
    assert not (hosts.places[1] / "run").exists()


# Reads a backbone as one of two processes and says which parts of the files it touched.
READER = """
    import json, sys
    import jax
    import numpy as np

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), initialization_timeout=60)
    from jaxprompt import trees
    from jaxprompt.sharding import here, make_mesh, tree_shardings
    from jaxprompt.t5 import placing, weights
    from jaxprompt.t5.backbones import read_config
    from jaxprompt.t5.layers import param_specs

    directory, model = sys.argv[1], int(sys.argv[4])
    config, touched, filler = read_config(directory), {}, placing._filler

    def watched(sources, layout):
        fill, path = filler(sources, layout), sources[0][0].path

        def noted(block, index):
            touched.setdefault(path, []).append([[part.start, part.stop] for part in index])
            fill(block, index)

        return noted

    alone = weights.load_params(directory, config)
    placing._filler = watched
    shardings = tree_shardings(make_mesh(-1, model), param_specs(config))
    params = weights.load_params(directory, config, shardings=shardings)
    for leaf, sharding in zip(*map(jax.tree.leaves, (params, shardings)), strict=True):
        assert leaf.sharding == sharding
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(here(params)), alone)
    print(json.dumps(touched))
"""


@pytest.mark.parametrize("model", [1, 2])
def test_hosts_read_each_byte_of_the_weights_once(world: World, model: int):
    config, address = read_config(world.root / "backbone"), f"127.0.0.1:{free_port()}"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(READER),
             str(world.root / "backbone"), address, str(number), str(model)],
            env=environment(JAX_NUM_CPU_DEVICES="2"), stdout=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        said = [reader.communicate(timeout=BOUND)[0].splitlines()[-1] for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
    touched = [json.loads(line) for line in said]
    for path, leaf in trees.flatten(param_specs(config)).items():
        times = np.zeros(leaf.shape, int)
        for own in touched:
            for spans in own[path]:
                times[tuple(slice(*span) for span in spans)] += 1
        assert np.all(times == 1), path


# ---- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coordinator", "here:1"], "--process-count"),
        (["--distributed", "--process-count", "2"], "--distributed finds out"),
        (["--coordinator", "here", "--process-count", "2", "--process-index", "0"], "HOST:PORT"),
        (["--coordinator", "h:1", "--process-count", "2", "--process-index", "2"], "the last is 1"),
        (["--coordinator", "h:1", "--process-count", "0", "--process-index", "0"], "above 0"),
    ],
)
def test_options_that_make_no_sense(
    words: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "quickstart", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_hosts_that_do_not_come_together_say_so_in_time(world: World):
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--join-timeout", "2"]
    process = spawn("train", world.config, *where, "--process-count", "2", "--process-index", "1")
    try:
        stdout, stderr = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("jaxprompt: error: the hosts did not come together in 2 seconds")
    assert where[1] in stderr


def test_hosts_that_disagree_on_how_many_they_are(nursery: Nursery, world: World, tmp_path: Path):
    address = f"127.0.0.1:{free_port()}"
    pids = []
    for index, count in ((0, 2), (2, 3)):
        where = ["--coordinator", address, "--process-count", count, "--process-index", index]
        argv = ["train", world.config, *where, "--join-timeout", 5]
        pids.append(nursery.ask({"argv": [*map(str, argv)], "cwd": str(tmp_path), "devices": 1}))
    codes = [nursery.ask({"wait": pid, "seconds": BOUND}) for pid in pids]
    assert codes == [2, 2]
    assert (tmp_path / "stderr").read_text().count("did not come together") == 2


def test_what_is_wrong_on_every_host_ends_every_host_with_a_sentence(
    start: Callable[..., Hosts], tmp_path: Path
):
    with start(tmp_path, 2, "task.source.train=nowhere.jsonl") as hosts:
        assert hosts.wait() == [2, 2]
        for number in (0, 1):
            assert "nowhere.jsonl" in hosts.said(number).splitlines()[-1]
