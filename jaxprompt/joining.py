"""Joins this process to the other hosts of a run, and says it in one sentence when one is lost.

`cli` comes here if the command line names hosts. The work is done in a child process: where a host
is lost, JAX aborts the process, and nobody in it could say why. Imports nothing heavy, as `cli`;
and nothing that starts threads before the child is there.
"""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import IO

_LOST = 75  # a child's exit code: the work ended because another host did
_JOINED = b"joined\n"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_LEAVING_SECONDS = 5  # in which the others may come to the same error
_ENDING_SECONDS = 3600  # in which the first process may write its results
# What errors say of a computation that lost a host, whichever way the devices are connected.
_LOSS = re.compile(
    r"gloo|nccl|UNAVAILABLE:|DEADLINE_EXCEEDED:|heartbeat|connection (closed|reset)|"
    r"distributed service",
    re.IGNORECASE,
)


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether the command line names other hosts."""
    named = ("distributed", "coordinator", "process_count", "process_index")
    return any(getattr(args, name, None) not in (None, False) for name in named)


def wrong(args: argparse.Namespace) -> str:
    """What is wrong with the options of `arguments.host_arguments`; empty if nothing is."""
    given = {
        "--coordinator": args.coordinator,
        "--process-count": args.process_count,
        "--process-index": args.process_index,
    }
    missing = [name for name, value in given.items() if value is None]
    if args.distributed and len(missing) < len(given):
        there = next(name for name, value in given.items() if value is not None)
        return f"--distributed finds out what {there} says; give one of them"
    if args.distributed:
        return ""
    if missing:
        return f"{', '.join(given)} go together, {missing[0]} is missing"
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        return f"--coordinator is {args.coordinator!r}, not HOST:PORT"
    if args.process_index >= args.process_count:
        return (
            f"--process-index is {args.process_index}, of {args.process_count} processes the last "
            f"is {args.process_count - 1}"
        )
    return ""


def run(args: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> int:
    """Joins the other hosts, works, and leaves them.

    Args:
      args: with what `arguments.host_arguments` adds.
      work: args -> exit code; says itself what a user can put right, and raises the rest.
    Returns: the exit code: the work's, 2 if the hosts did not come together, 1 if one was lost.
    """
    ear, mouth = os.pipe()
    parent, noise = os.getpid(), tempfile.TemporaryFile()  # noqa: SIM115
    child = os.fork()
    if child:
        os.close(mouth)
        return _watch(args, child, ear, noise)
    os.close(ear)
    _follow(parent)
    code = 1
    try:
        with contextlib.nullcontext() if args.debug else _muted(noise):
            _join(args)
        os.write(mouth, _JOINED)
        _greet()
        code = work(args)
    except BaseException as error:
        code = _code_of(error, args.debug)
    finally:
        _leave(code, mouth)
    return code


def _follow(parent: int) -> None:
    """The child of a parent: signals come through it, and it does not outlive it."""
    os.setpgid(0, 0)
    with contextlib.suppress(AttributeError):  # where the system has no such call
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(2, 1)  # the commands that run here print nothing but libraries' chatter


@contextlib.contextmanager
def _muted(noise: IO[bytes]) -> Iterator[None]:
    """Standard error goes to a file: C++ says there with a stack trace why hosts did not join."""
    said = os.dup(2)
    os.dup2(noise.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(said, 2)
        os.close(said)


def _join(args: argparse.Namespace) -> None:
    import jax

    from jaxprompt.typing import UserError

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs that do not wait for each other would meet the other hosts' in any order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the loop's
    where = {} if args.distributed else {
        "coordinator_address": args.coordinator, "num_processes": args.process_count,
        "process_id": args.process_index, "cluster_detection_method": "deactivate",
    }  # fmt: skip
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=args.join_timeout,
            heartbeat_timeout_seconds=args.host_timeout,
            shutdown_timeout_seconds=_ENDING_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if args.distributed:
            raise UserError(
                f"--distributed found no hosts to join ({reason}); it knows Cloud TPU, GKE, Slurm "
                "and Open MPI, elsewhere name them with --coordinator, --process-count and "
                "--process-index"
            ) from error
        raise UserError(f"{_not_joined(args)} ({reason})") from error


def _greet() -> None:
    """Meets the others on the devices, says who this is."""
    import jax
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("joined")  # Gloo wants all there within 30 s of the first
    _say(
        f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of "
        f"{jax.device_count()} devices"
    )


def _code_of(error: BaseException, debug: bool) -> int:
    """The exit code for what work raised, said where only this process can say it."""
    from jaxprompt.typing import UserError

    if isinstance(error, UserError):
        _say(f"error: {error}")
        return 2
    lost = _is_loss(error)
    if debug or not lost:
        traceback.print_exception(error)
    return _LOST if lost else 1


def _is_loss(error: BaseException | None) -> bool:
    while error is not None:  # jax raises either
        if isinstance(error, RuntimeError | ValueError) and _LOSS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leave(code: int, mouth: int) -> None:
    """Ends the child: what it came to counts, whatever becomes of the others now."""
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    os.write(mouth, b"%d\n" % code)
    if code != _LOST:
        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(_LEAVING_SECONDS if code else None)
    os._exit(code)


def _watch(args: argparse.Namespace, child: int, ear: int, noise: IO[bytes]) -> int:
    """The parent: passes signals on, waits, and says what the child could not."""

    def forward(signum: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signum)

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    told = b""
    while heard := os.read(ear, 64):
        told += heard
    joined, words = told.startswith(_JOINED), told.removeprefix(_JOINED)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = int(words) if words else ended
    if not joined and code in (_LOST, -signal.SIGABRT):
        noise.seek(0)
        reason = re.search(r"absl::Status: (.+)", noise.read().decode("utf-8", "replace"))
        _say(f"error: {_not_joined(args)}" + (f" ({reason[1]})" if reason else ""))
        return 2
    if code in (_LOST, -signal.SIGABRT):
        _say(
            f"error: another host of this run ended, or did not answer for {args.host_timeout} "
            "seconds; the same command on every host goes on from the last checkpoint"
        )
        return 1
    if code < 0:
        _say(f"ended by {signal.Signals(-code).name}")
        return 128 - code
    return code


def _not_joined(args: argparse.Namespace) -> str:
    if args.distributed:
        return f"the hosts did not come together in {args.join_timeout} seconds"
    return (
        f"the hosts did not come together in {args.join_timeout} seconds: process 0 has to run at "
        f"{args.coordinator}, and {args.process_count} processes in all, each with a "
        "--process-index of its own"
    )


def _say(text: str) -> None:
    print(f"jaxprompt: {text}", file=sys.stderr, flush=True)
