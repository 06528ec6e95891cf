"""What holds for every test: CPU, strict shapes, no network, the same numbers every time."""

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Compiles the tests' small programs in a third of the time; in the processes that they start, too.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_cpu_use_fusion_emitters=false", *os.environ.get("XLA_FLAGS", "").split()]
)

import hypothesis
import jax
import pytest
from cloud import Cloud

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # LLVM's only; halves compile times
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first
gc.set_threshold(200_000, 50, 100)  # tracing makes many objects that live: a tenth of the time
# The same examples on every machine, and no limit that a busy one would break.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to another machine is an error, so that no test comes to need one."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture(autouse=True, scope="module")
def fresh_programs() -> Iterator[None]:
    """A file's compiled programs go with it: their pieces of the memory map are counted."""
    yield
    jax.clear_caches()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A stand-in for Google's cloud; whatever runs on its machines ends with the test."""
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()
