"""Atomic writes: a file or directory is either what it was or what it should be, never in between.

Everything of the project that ends on disk goes through here: new content is written beside its
place under a temporary name, flushed, and renamed into it. Failures become one-sentence UserErrors.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxprompt.typing import UserError

PathLike = str | os.PathLike[str]

_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.tmp-(?P<pid>\d+)-\d+$")
_ADVICE = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "raise the limit on file sizes or choose another place",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "choose a place you may write to",
    errno.ENOTDIR: "a part of that path is a file, choose another place",
    errno.EEXIST: "something else stands there, choose another place",
    errno.EISDIR: "that is a directory, name a file",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # file systems that cannot flush a directory
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # some network drives
_counter = itertools.count()
_ours: set[str] = set()


def write_error(path: PathLike, error: Exception) -> UserError:
    """The one sentence for a write that failed: the path, the system's reason, what would help.

    Args:
      path: what was to be written.
      error: an OSError, or another library's exception whose text holds the system's reason.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = next((n for n in _ADVICE if os.strerror(n) in str(error)), None)
    lines = str(error).splitlines() or [type(error).__name__]
    reason = lines[0] if number is None else os.strerror(number)
    advice = _ADVICE.get(number or 0)
    return UserError(
        f"cannot write {os.fspath(path)}: {reason}" + (f"; {advice}" if advice else "")
    )


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Turns an OSError of the block into the UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def make_directory(path: PathLike) -> Path:
    """Creates a directory and its parents; fine if it is there.

    Raises: UserError if that cannot be, for example because `path` is a file.
    """
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def held(directory: PathLike, active: bool = True) -> Iterator[None]:
    """Keeps a directory, created if missing, for this process while the block runs.

    The system lets go of it when the process ends, however it ends. File systems that know no
    locks are taken as they are.

    Args:
      directory: where this process is about to write.
      active: whether to; one of several processes that write there together does it for all.
    Raises: UserError if another process holds it.
    """
    if not active:
        yield
        return
    with writing(make_directory(directory)):
        descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {directory}: wait for its end, or choose another "
                "output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise write_error(directory, error) from error
        yield


@contextlib.contextmanager
def replacing(path: PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a new version of a file for writing; at the end it takes the old one's place.

    It may get any length. If the block raises, the old file stays and the new one is gone. A
    symbolic link keeps pointing where it did. A device or a pipe (`/dev/stdout`) is written as is.

    Args:
      path: the file; its directory must exist.
      mode: "w" (UTF-8) or "wb".
    Raises: UserError if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    encoding = None if "b" in mode else "utf-8"
    if target.exists() and not target.is_file():
        with writing(path), target.open(mode, encoding=encoding) as stream:
            yield stream
        return
    with _temporary(target) as temporary, contextlib.ExitStack() as opened:
        with writing(path):
            stream = temporary.open(mode, encoding=encoding)
        opened.callback(_close_quietly, stream)
        try:
            yield stream
        except OSError as error:
            if error.errno in _FULL:
                raise write_error(path, error) from error
            raise
        with writing(path):
            stream.flush()
            os.fsync(stream.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
            _sync(target.parent)


def write_file(path: PathLike, content: str | bytes) -> None:
    """Writes a whole file atomically; text as UTF-8.

    Raises: UserError if it cannot be written; an older file is then still there.
    """
    with replacing(path, "wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_directory(path: PathLike) -> Iterator[Path]:
    """Yields an empty temporary directory that takes the place of `path` when the block ends well.

    If the block raises, what was at `path` stays. Read with `current_directory`.

    Raises: UserError if it cannot be written, or if `path` is a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot write {path}: a file stands there; name a directory")
    make_directory(target.parent)
    with _temporary(target) as temporary:
        with writing(path):
            temporary.mkdir()
        yield temporary
        move_directory(temporary, target)


def move_directory(source: PathLike, target: PathLike) -> None:
    """Flushes a complete directory to the disk and puts it in the place of another, at once.

    Raises: UserError if that fails; `target` is then what it was.
    """
    with writing(target):
        sync_tree(source)
        _put_in_place(Path(source), Path(target))
    _discard(Path(source))


def current_directory(path: PathLike) -> Path:
    """The directory to read for `path`: itself, or what a replacement killed halfway put aside."""
    aside = _aside(Path(os.path.realpath(path)))
    return aside if not Path(path).exists() and aside.is_dir() else Path(path)


def remove_directory(path: PathLike) -> None:
    """Removes a directory tree, if there is one, so that it is never seen half there."""
    if not Path(path).exists():
        return
    with writing(path), _temporary(Path(path)) as temporary:
        Path(path).replace(temporary)


def remove_leftovers(directory: PathLike) -> None:
    """Removes temporary files and directories that killed processes left in `directory`."""
    for entry in sorted(Path(directory).glob(".*.tmp-*")):
        _remove_if_left(entry)


def digest(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_tree(directory: PathLike) -> None:
    """Flushes every file below a directory, and the directories, to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A free name beside `target`; whatever stands there in the end is removed."""
    for entry in target.parent.glob(".*.tmp-*"):
        match = _TEMPORARY.match(entry.name)
        if match and match["name"] == target.name:
            _remove_if_left(entry)
    path = target.with_name(f".{target.name}.tmp-{os.getpid()}-{next(_counter)}")
    _ours.add(path.name)
    try:
        yield path
    finally:
        _discard(path)
        _ours.discard(path.name)


def _remove_if_left(entry: Path) -> None:
    match = _TEMPORARY.match(entry.name)
    if match and entry.name not in _ours and not _runs(int(match["pid"])):
        _discard(entry)


def _runs(pid: int) -> bool:
    """Whether another process of that number is alive; our own number is a dead one's, reused."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _close_quietly(stream: IO) -> None:
    """Closing a stream on a full disk tries to write once more; what matters was raised before."""
    with contextlib.suppress(OSError):
        stream.close()


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames a directory onto another, which lands on the temporary name or is gone."""
    aside = _aside(target)
    if not target.exists():
        temporary.replace(target)
    elif not _exchange(temporary, target):
        _discard(aside)
        target.replace(aside)
        try:
            temporary.replace(target)
        except OSError:
            aside.replace(target)
            raise
    _sync(target.parent)
    _discard(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step where the system can (Linux, macOS); False where it cannot."""
    library = ctypes.CDLL(None)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        here, swap = -100, 2
        return library.renameat2(here, names[0], here, names[1], ctypes.c_uint(swap)) == 0
    if hasattr(library, "renamex_np"):
        return library.renamex_np(*names, ctypes.c_uint(2)) == 0
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def size_on_disk(directory: Path) -> int:
    """Bytes of the files in a directory; 0 where there is none."""
    return sum(path.stat().st_size for path in directory.glob("*")) if directory.is_dir() else 0
