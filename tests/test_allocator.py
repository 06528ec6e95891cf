"""Freed memory stays with the process, seen in the page faults of a compiled step."""

import ctypes
import os
import platform
import subprocess
import sys
import types

import pytest

from jaxprompt import allocator, cli

STEP = """
import resource, sys
from jaxprompt import allocator
kept = sys.argv[1] == "keep" and allocator.keep_pages()
import jax, jax.numpy as jnp
step = jax.jit(lambda x, y: jnp.sin(x) @ y)
x, y = jnp.ones((8192, 2048)), jnp.ones((2048, 4))
assert step.lower(x, y).compile().memory_analysis().temp_size_in_bytes >= 2**26
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x, y).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sorted(faults[-10:])[3])
"""
PAGES = 2**26 // 4096  # more than glibc's own highest threshold for pieces of their own
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")


def faults(keep: str, **environment: str) -> tuple[bool, int]:
    """Whether a fresh process keeps pages, and the page faults of an ordinary late step in it.

    Now and then another thread's arena takes the piece, on a busy machine above all.
    """
    own = {key: value for key, value in os.environ.items() if key not in allocator._OWN_SETTINGS}
    own |= {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-c", STEP, keep], env=own, check=True, capture_output=True, text=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@glibc
def test_a_step_finds_its_pages_where_the_last_one_left_them():
    kept, count = faults("keep")
    assert kept and count < PAGES // 10
    kept, count = faults("as it is")
    assert not kept and count > PAGES // 2


@glibc
@pytest.mark.parametrize(
    ("environment", "packages", "done"),
    [
        ({}, [], True),
        ({"JAX_PLATFORMS": "cpu"}, ["libtpu"], True),
        ({}, ["libtpu"], False),
        ({}, ["jax_plugins"], False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], False),
        ({"MALLOC_ARENA_MAX": "4"}, [], False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, [], False),
    ],
)
def test_accelerators_and_own_settings_are_left_alone(
    environment: dict[str, str],
    packages: list[str],
    done: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return 1

    for name in ("JAX_PLATFORMS", *allocator._OWN_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        allocator.importlib.util, "find_spec", lambda name: name if name in packages else None
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    assert allocator.keep_pages() is done
    assert bool(calls) is done


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked for a mallopt"))
    assert not allocator.keep_pages()


def test_only_a_process_of_its_own_is_tuned(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    room = types.SimpleNamespace(main=lambda args: 0)
    monkeypatch.setitem(sys.modules, "jaxprompt.listing", room)
    monkeypatch.setattr(allocator, "keep_pages", lambda: asked.append(True))
    assert cli.main(["methods"]) == 0 and not asked
    monkeypatch.setattr(sys, "argv", ["jaxprompt", "methods"])
    assert cli.main() == 0
    assert asked == [True]
