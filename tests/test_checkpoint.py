"""Checkpoints come back bit by bit, survive kills, full disks and damage, and are never skipped."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import file_size_limit, small_disk

from jaxprompt import checkpoint, files
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.identity import check_identity
from jaxprompt.optim import OptimConfig, make_optimizer
from jaxprompt.typing import UserError


def make_state(step, recipe="adamw", shape=(3, 4)):
    """A state whose every leaf depends on the step."""
    params = {
        "prompt": jnp.full(shape, step + 0.1, jnp.float32),
        "deep": {"half": jnp.arange(5, dtype=jnp.bfloat16) * step},
    }
    optimizer = make_optimizer(OptimConfig(recipe=recipe), 1000)
    grads = jax.tree.map(lambda leaf: leaf * 0.3 + step, params)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    return {
        "trained": params,
        "opt_state": opt_state,
        "rng": jax.random.key_data(jax.random.fold_in(jax.random.key(7), step)),
    }


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(directory, *steps, keep=2):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


@pytest.fixture
def state_files(tmp_path):
    """Two checkpoints, and the files of the newer one."""
    save(tmp_path / "ck", 10, 20)
    newest = tmp_path / "ck" / "step_00000020"
    return newest, sorted(path for path in newest.rglob("*") if path.is_file())


@pytest.mark.parametrize("recipe", ["paper", "adamw"])
def test_round_trip_is_bit_identical(tmp_path, recipe):
    state = make_state(30, recipe)
    metadata = {"position": {"epoch": 1}, "loss": 0.1 + 0.2, "odd": float("nan"), "text": "grün"}
    with Checkpoints(tmp_path / "ck") as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(30, state, metadata)
    with Checkpoints(tmp_path / "ck") as checkpoints:
        restored = checkpoints.restore_latest(jax.tree.map(jnp.zeros_like, state))
    assert restored is not None
    step, restored_state, restored_metadata = restored
    assert step == 30
    assert_same_bits(restored_state, state)
    assert str(restored_metadata) == str(metadata)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored_state))


def test_leaves_without_a_sharding_come_back_as_numpy(tmp_path):
    save(tmp_path, 10)
    restored = Checkpoints(tmp_path).restore_latest(jax.eval_shape(lambda: make_state(0)))
    assert restored is not None
    assert_same_bits(restored[1], make_state(10))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored[1]))


def test_restores_to_the_sharding_asked_for():
    """Saved from one device, restored over four: in a process of its own, for its devices."""
    run_python("""
        import jax, numpy as np, tempfile
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from jaxprompt.checkpoint import Checkpoints
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        value = jnp.arange(24.0).reshape(8, 3)
        with tempfile.TemporaryDirectory() as directory:
            for number, saved in enumerate((value, jax.device_put(value, rows))):
                with Checkpoints(directory + f"/{number}") as checkpoints:
                    checkpoints.save(1, {"trained": saved})
                    checkpoints.wait()
                    abstract = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=rows)
                    _, state, _ = checkpoints.restore_latest({"trained": abstract})
                assert state["trained"].sharding == rows, state["trained"].sharding
                assert len(state["trained"].addressable_shards) == 4
                np.testing.assert_array_equal(state["trained"], value)
    """)


def test_saves_in_a_row_are_none_skipped(tmp_path):
    save(tmp_path, *range(1, 7), keep=10)
    assert Checkpoints(tmp_path).steps() == [1, 2, 3, 4, 5, 6]


def test_keeps_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000004"]
    save(tmp_path / "one", 1, 2, keep=1)
    assert os.listdir(tmp_path / "one") == ["step_00000002"]


def test_old_ones_stay_until_the_new_one_is_whole(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    go, there = threading.Event(), []
    move = files.move_directory

    def watched(source, target):
        there.append(Checkpoints(tmp_path).steps())
        go.wait(30)
        move(source, target)

    monkeypatch.setattr(files, "move_directory", watched)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore_latest(make_state(0)) is not None
        checkpoints.save(2, make_state(2))  # returns while the save still runs
        assert checkpoints.steps() == [1]
        go.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    assert there == [[1]]


def test_donated_and_changed_arrays_are_saved_as_they_were(tmp_path):
    overwrite = jax.jit(lambda leaf: leaf * 0 - 1, donate_argnums=0)
    value, host = jnp.full((64, 64), 5.0), np.full((3,), 5.0, np.float32)
    metadata = {"position": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"trained": value, "host": host}, metadata)
        overwrite(value).block_until_ready()
        host[:] = -1
        metadata["position"].append(2)
    restored = Checkpoints(tmp_path).restore_latest(
        {"trained": np.zeros((64, 64), np.float32), "host": np.zeros((3,), np.float32)}
    )
    assert restored is not None
    assert (restored[1]["trained"] == 5.0).all() and (restored[1]["host"] == 5.0).all()
    assert restored[2] == {"position": [1]}


def test_saving_moves_nothing_implicitly_between_host_and_device(tmp_path):
    with jax.transfer_guard("disallow"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"trained": jax.device_put(np.ones((2, 2), np.float32))})


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_reported_and_the_one_before_used(state_files, damage):
    newest, paths = state_files
    assert len(paths) > 5
    pristine = newest.with_name("copy")
    newest.rename(pristine)
    for path in paths:
        shutil.copytree(pristine, newest)
        if path.stat().st_size:
            DAMAGES[damage](path)
        else:
            path.unlink()
        with pytest.warns(UserWarning, match="checkpoint of step 20: .*; going back to step 10"):
            restored = Checkpoints(newest.parent).restore_latest(make_state(0))
        assert restored is not None and restored[0] == 10 and restored[2] == {"position": 10}
        assert_same_bits(restored[1], make_state(10))
        shutil.rmtree(newest)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda newest: shutil.rmtree(newest / "state"), "is missing"),
        (lambda newest: shutil.rmtree(newest) or newest.mkdir(), "has no manifest.json"),
        (
            lambda newest: (newest / "manifest.json").write_text("[1]"),
            "manifest.json cannot be read",
        ),
        (
            lambda newest: shutil.rmtree(newest) or newest.write_text(""),
            "manifest.json cannot be read",
        ),
        (
            lambda newest: (newest / "manifest.json").write_text(
                (newest / "manifest.json").read_text().replace('"position": 20', '"position": 21')
            ),
            "manifest.json was changed",
        ),
        (
            lambda newest: (
                shutil.rmtree(newest) or shutil.copytree(newest.with_name("step_00000010"), newest)
            ),
            "manifest.json was changed",
        ),
    ],
)
def test_the_reason_is_named(state_files, damage, reason):
    newest, _ = state_files
    damage(newest)
    with pytest.warns(UserWarning, match=reason):
        restored = Checkpoints(newest.parent).restore_latest(make_state(0))
    assert restored is not None and restored[0] == 10


def test_what_orbax_cannot_load_is_damaged_too(state_files, monkeypatch):
    newest, _ = state_files
    load = checkpoint.ocp.load_checkpointables

    def fails(path, abstract):
        if "step_00000020" in str(path):
            raise ValueError("corrupt chunk")
        return load(path, abstract)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fails)
    with pytest.warns(UserWarning, match=r"cannot be loaded \(ValueError: corrupt chunk\)"):
        restored = Checkpoints(newest.parent).restore_latest(make_state(0))
    assert restored is not None and restored[0] == 10


def test_all_damaged_is_an_error_and_deletes_nothing(state_files):
    newest, _ = state_files
    shutil.rmtree(newest / "state")
    (newest.with_name("step_00000010") / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step 20: .*; step 10: "):
        Checkpoints(newest.parent).restore_latest(make_state(0))
    assert len(os.listdir(newest.parent)) == 2


@pytest.mark.parametrize("next_step", [15, 20, 30])
def test_training_goes_on_after_damage(state_files, next_step):
    newest, _ = state_files
    (newest / "manifest.json").unlink()
    with Checkpoints(newest.parent) as checkpoints:
        with pytest.warns(UserWarning, match="going back to step 10"):
            checkpoints.restore_latest(make_state(0))
        checkpoints.save(next_step, make_state(next_step), {"position": next_step})
    assert Checkpoints(newest.parent).steps() == [10, next_step]
    restored = Checkpoints(newest.parent).restore_latest(make_state(0))
    assert restored is not None and restored[0] == next_step
    assert_same_bits(restored[1], make_state(next_step))


def test_what_a_killed_save_left_is_ignored_and_removed_by_the_next(tmp_path):
    save(tmp_path, 10)
    half = tmp_path / ".saving_00000020" / "state.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "step_00000010" / "state", half)
    (tmp_path / "notes.txt").write_text("the user's")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(make_state(0))
        assert restored is not None and restored[0] == 10
        checkpoints.save(20, make_state(20))
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step_00000010", "step_00000020"]


def test_later_steps_are_not_overwritten_unseen(state_files):
    newest, _ = state_files
    with pytest.raises(UserError, match="holds a checkpoint of step 20, later than step 5"):
        save(newest.parent, 5)
    with pytest.raises(ValueError, match="step 1 saved after step 2"):
        save(newest.parent / "other", 2, 1)


@pytest.mark.parametrize(
    ("scarce", "amount", "reason"),
    [(small_disk, "700k", "No space left on device"), (file_size_limit, 200_000, "File too large")],
)
@pytest.mark.parametrize("next_call", ["save", "wait", "close"])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_one(
    tmp_path, scarce, amount, reason, next_call
):
    small = {"trained": np.ones((2, 2), np.float32)}
    noise = np.random.default_rng(0).normal(size=(400, 500)).astype(np.float32)
    with scarce(tmp_path / "disk", amount) as disk:
        checkpoints = Checkpoints(disk / "run")
        checkpoints.save(10, small)
        checkpoints.save(20, {"trained": noise})
        with pytest.raises(UserError) as caught:
            if next_call == "save":
                checkpoints.save(30, small)
            else:
                getattr(checkpoints, next_call)()
        message = str(caught.value)
        assert "the checkpoint of step 20 was not saved (the last good one is step 10)" in message
        assert f"cannot write {disk / 'run'}: {reason}; " in message and "\n" not in message
        checkpoints.close()
        assert os.listdir(disk / "run") == ["step_00000010"]
        restored = Checkpoints(disk / "run").restore_latest(small)
        assert restored is not None and restored[0] == 10


def test_saving_goes_on_once_there_is_room(tmp_path, monkeypatch):
    move = files.move_directory

    def full(source, target):
        raise UserError("cannot write there")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(files, "move_directory", full)
        checkpoints.save(1, make_state(1))
        with pytest.raises(UserError, match=r"step 1 was not saved \(there is no earlier one\)"):
            checkpoints.wait()
        monkeypatch.setattr(files, "move_directory", move)
        checkpoints.save(2, make_state(2))
    assert os.listdir(tmp_path) == ["step_00000002"]


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_save(tmp_path, monkeypatch):
    def full(source, target):
        raise UserError("cannot write there")

    monkeypatch.setattr(files, "move_directory", full)
    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        raise KeyError("the run's own")
    assert "step 1 was not saved" in caught.value.__notes__[0]


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "ck").write_text("kept")
    with pytest.raises(UserError, match="ck is a file; checkpoints need a directory"):
        Checkpoints(tmp_path / "ck")
    with pytest.raises(UserError, match=r"step 1 was not saved .* a part of that path is a file"):
        Checkpoints(tmp_path / "ck" / "deeper").save(1, make_state(1))
    assert (tmp_path / "ck").read_text() == "kept"
    with pytest.raises(UserError, match="keep is 0"):
        Checkpoints(tmp_path / "other", keep=0)


def test_nothing_is_made_by_looking(tmp_path):
    with Checkpoints(tmp_path / "run" / "ck") as checkpoints:
        assert checkpoints.restore_latest(make_state(0)) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"trained": {"prompt": np.zeros((3, 4), np.float32)}},
            "deep/half is saved and unknown here",
        ),
        ({"extra": np.zeros((), np.int32)}, "extra is not saved"),
        ({"rng": np.zeros((4,), np.uint32)}, "rng is uint32 [2], here uint32 [4]"),
        ({"rng": np.zeros((2,), np.int32)}, "rng is uint32 [2], here int32 [2]"),
    ],
)
def test_another_structure_is_refused_by_name(tmp_path, change, words):
    save(tmp_path, 10, 20)
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).restore_latest({**make_state(0), **change})
    assert words in str(caught.value) and "step_00000020" in str(caught.value)


def test_another_optimizer_is_refused_by_name(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"opt_state/.* and \d+ more"):
        Checkpoints(tmp_path).restore_latest(make_state(0, "paper"))


def test_random_keys_are_saved_as_their_data(tmp_path):
    with pytest.raises(TypeError, match="rng is a random key"):
        Checkpoints(tmp_path).save(1, {"rng": jax.random.key(0)})


def test_a_newer_format_is_not_taken_for_damage(state_files):
    newest, _ = state_files
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["format_version"] += 1
    manifest["sha256"] = checkpoint._digest_of(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step_00000020 was written by a newer jaxprompt"):
        Checkpoints(newest.parent).restore_latest(make_state(0))


IDENTITY = {"backbone": {"name": "a", "fingerprint": "12"}, "task": "sst2", "sizes": [1, 2]}


def test_same_identity_in_another_order_is_the_same():
    check_identity(IDENTITY, {"sizes": (1, 2), **dict(reversed(IDENTITY.items()))}, "runs/x")


@pytest.mark.parametrize(
    ("current", "words"),
    [
        ({**IDENTITY, "task": "rte"}, "trained with task sst2, now rte: "),
        (
            {**IDENTITY, "backbone": {"name": "b", "fingerprint": "34"}},
            "with backbone.fingerprint 12, now 34; with backbone.name a, now b: ",
        ),
        ({**IDENTITY, "sizes": [2, 1]}, "with sizes [1, 2], now [2, 1]: "),
        ({**IDENTITY, "method": "soft"}, "with method not set, now soft: "),
        ({**IDENTITY, "task": "x" * 1000}, f"now {'x' * 80}...: "),
    ],
)
def test_another_identity_is_refused_naming_what_differs(tmp_path, current, words):
    with pytest.raises(UserError) as caught:
        check_identity(IDENTITY, current, "runs/x")
    assert str(caught.value).startswith("run directory runs/x was trained with ")
    assert words in str(caught.value)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1), {"identity": IDENTITY})
        checkpoints.wait()
        assert checkpoints.restore_latest(make_state(0), IDENTITY) is not None
        with pytest.raises(UserError, match=f"run directory {tmp_path / 'run'} was trained"):
            checkpoints.restore_latest({"unlike": np.zeros(1)}, current)


def run_python(script, *arguments, timeout=120):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(checkpoint.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_random_moments_it_always_resumes(tmp_path):
    """One process imports; its children save without pause, are killed, resume."""
    output = run_python(
        """
        import os, random, signal, sys, time
        import jax, numpy as np
        from jaxprompt import checkpoint

        def consistent(step):
            draw = np.random.default_rng(step)
            trained = draw.normal(size=(300, 100)).astype(np.float32)
            return {"trained": trained, "step": np.int32(step)}

        def child(said):
            import jax.numpy as jnp
            jnp.zeros(1).block_until_ready()
            checkpoints = checkpoint.Checkpoints(sys.argv[1])
            found = checkpoints.restore_latest(consistent(0))
            start = 0
            if found is not None:
                start, state, metadata = found
                assert metadata == {"position": start} and state["step"] == start
                assert state["trained"].tobytes() == consistent(start)["trained"].tobytes()
            os.write(said, f"{start} ".encode())
            for step in range(start + 1, start + 10_000):
                checkpoints.save(step, consistent(step), {"position": step})

        for seed in range(6):
            listening, said = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    child(said)
                finally:
                    os._exit(3)
            os.close(said)
            start = os.read(listening, 100).decode()
            delay = random.Random(seed).uniform(0.0, 0.3)
            first = f"{sys.argv[1]}/step_{int(start) + 1:08d}"
            while seed % 2 and not os.path.exists(first):
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), (seed, status)
            print(start)
        """,
        tmp_path,
    )
    starts = [int(line) for line in output.split()]
    assert len(starts) == 6 and starts == sorted(starts)
    restored = Checkpoints(tmp_path).restore_latest(
        {"trained": np.zeros((300, 100), np.float32), "step": np.zeros((), np.int32)}
    )
    assert restored is not None and restored[0] == restored[1]["step"] == restored[2]["position"]
    assert restored[0] >= starts[-1] and restored[0] >= 3 and starts[0] == 0
