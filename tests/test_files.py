"""Atomic writes: old or new, never between; full disks, killed writers, odd targets."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from disks import file_size_limit, small_disk

from jaxprompt import files
from jaxprompt.typing import UserError


@pytest.mark.parametrize("content", ["grüße\n", b"\x00\xff", ""])
def test_write_file_replaces_the_whole_content(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text("something longer that was here before")
    files.write_file(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_new_files_have_the_usual_mode_and_old_ones_keep_theirs(tmp_path):
    (tmp_path / "usual").write_text("")
    files.write_file(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "usual").stat().st_mode
    )
    (tmp_path / "usual").chmod(0o640)
    files.write_file(tmp_path / "usual", "x")
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o640


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with files.replacing(tmp_path / "pipe") as stream:
        stream.write("line\n")
    assert os.read(reader, 100) == b"line\n"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), OSError(errno.ENOENT, "reading"), KeyboardInterrupt()]
)
def test_a_block_that_raises_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as stream:
        stream.write("new " * 100_000)
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_full_disk_leaves_the_old_file(tmp_path, pieces):
    """Full at the last flush (1 small piece fits no buffer) and full in the middle of the block."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "out").write_text("old")
        filler = 15 * 4096 if pieces == 1 else 4096
        (disk / "filler").write_bytes(b"x" * (filler - 8192))
        with pytest.raises(UserError) as caught, files.replacing(disk / "out") as stream:
            for _ in range(pieces):
                stream.write("y" * 7000)
            if pieces == 1:
                (disk / "more").write_bytes(b"x" * 8192)
        assert str(caught.value) == (
            f"cannot write {disk / 'out'}: No space left on device; free some space or choose "
            "another place"
        )
        assert (disk / "out").read_text() == "old"
        assert sorted(set(os.listdir(disk)) - {"more"}) == ["filler", "out"]


def test_a_full_disk_leaves_the_old_directory(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        with files.replacing_directory(disk / "prompt") as temporary:
            (temporary / "a").write_text("old")
        with (
            pytest.raises(UserError, match="No space left"),
            files.replacing_directory(disk / "prompt") as temporary,
            files.writing(disk / "prompt"),
        ):
            (temporary / "a").write_text("new")
            (temporary / "b").write_bytes(b"x" * 100_000)
        assert os.listdir(disk) == ["prompt"]
        assert os.listdir(disk / "prompt") == ["a"]
        assert (disk / "prompt" / "a").read_text() == "old"


def test_a_limit_on_file_sizes_leaves_the_old_file(tmp_path):
    with file_size_limit(tmp_path / "disk", 1000) as disk:
        (disk / "out").write_text("old")
        with pytest.raises(UserError, match="File too large; raise the limit"):
            files.write_file(disk / "out", "y" * 2000)
    assert (disk / "out").read_text() == "old"
    assert os.listdir(disk) == ["out"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_directory_is_replaced_as_a_whole(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for number in range(3):
        with files.replacing_directory(tmp_path / "runs" / "prompt") as temporary:
            (temporary / f"only_{number}").write_text("x")
            if number:
                assert os.listdir(tmp_path / "runs" / "prompt") == [f"only_{number - 1}"]
    assert os.listdir(tmp_path / "runs") == ["prompt"]
    assert os.listdir(tmp_path / "runs" / "prompt") == ["only_2"]


def test_a_directory_block_that_raises_leaves_the_old_one(tmp_path):
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "kept").write_text("x")
    with pytest.raises(RuntimeError), files.replacing_directory(tmp_path / "prompt") as temporary:
        (temporary / "new").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["prompt"] and os.listdir(tmp_path / "prompt") == ["kept"]


def test_without_a_swap_a_failed_rename_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "kept").write_text("x")
    rename = Path.replace

    def fails(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with (
        pytest.raises(UserError, match="Input/output error"),
        files.replacing_directory(tmp_path / "prompt"),
    ):
        pass
    assert os.listdir(tmp_path) == ["prompt"] and os.listdir(tmp_path / "prompt") == ["kept"]


def test_a_replacement_killed_halfway_is_still_read(tmp_path):
    """Only where names cannot be swapped: the old directory is aside, the new one not there yet."""
    (tmp_path / ".prompt.previous").mkdir()
    assert files.current_directory(tmp_path / "prompt") == tmp_path / ".prompt.previous"
    with files.replacing_directory(tmp_path / "prompt"):
        assert files.current_directory(tmp_path / "prompt") == tmp_path / ".prompt.previous"
    assert files.current_directory(tmp_path / "prompt") == tmp_path / "prompt"
    assert os.listdir(tmp_path) == ["prompt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """A real SIGKILL in the middle of a write; the living process's own files are not touched."""
    script = textwrap.dedent("""
        import sys, time
        from jaxprompt import files
        with files.replacing_directory(sys.argv[1] + "/prompt") as d, files.replacing(
            sys.argv[1] + "/out"
        ) as stream:
            (d / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
    """)
    (tmp_path / "out").write_text("old")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        files.remove_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 3  # its two temporaries are in use
        writer.send_signal(signal.SIGKILL)
    assert (tmp_path / "out").read_text() == "old" and not (tmp_path / "prompt").exists()
    assert len(os.listdir(tmp_path)) == 3
    files.write_file(tmp_path / "out", "new")
    assert len(os.listdir(tmp_path)) == 2  # the same target's leftover went with the next write
    with files.replacing(tmp_path / "in_use") as stream:
        files.remove_leftovers(tmp_path)
        stream.write("x")
    assert sorted(os.listdir(tmp_path)) == ["in_use", "out"]


def test_remove_directory_and_digest(tmp_path):
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "deep" / "file").write_bytes(b"abc")
    assert files.digest(tmp_path / "old" / "deep" / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    files.remove_directory(tmp_path / "old")
    files.remove_directory(tmp_path / "old")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda base: files.write_file(base / "no" / "x", ""), "No such file or directory"),
        (lambda base: files.write_file(base / "directory", ""), "that is a directory, name a file"),
        (lambda base: files.write_file(base / "file" / "x", ""), "a part of that path is a file"),
        (lambda base: files.make_directory(base / "file"), "something else stands there"),
        (lambda base: files.replacing_directory(base / "file").__enter__(), "a file stands there"),
        (lambda base: files.replacing_directory(base / "file" / "x").__enter__(), "/file"),
    ],
)
def test_impossible_targets_are_named(tmp_path, make, words):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_a_held_directory_is_refused_to_other_processes_until_its_holder_ends(tmp_path):
    code = "import sys, time\nfrom jaxprompt import files\n" + textwrap.dedent("""
        with files.held(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """)
    place = tmp_path / "run"
    command = [sys.executable, "-c", code, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        said = f"another process is writing to {place}: wait"
        with pytest.raises(UserError, match=said), files.held(place):
            pass
        with files.held(place, active=False):
            pass
        holder.kill()
    with files.held(place):
        assert os.listdir(place) == []
