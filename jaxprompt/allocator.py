"""Keeps the pages of freed memory in the process, which a training step on CPU wants back at once.

XLA takes the temporaries of every step from malloc in one piece. glibc gets so large a piece from
the kernel and gives it back, and the kernel clears every page of it anew in every step: a seventh
to a quarter of the processor's time. Called by `cli`, whose process is ours to tune.
"""

import ctypes
import importlib.util
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # mallopt's, from malloc.h
_OWN_SETTINGS = (
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
)


def keep_pages() -> bool:
    """Tells glibc to keep what is freed; to be called before JAX starts its threads.

    Large pieces come from the heap, the heap never shrinks, and all threads share the one heap that
    can grow. Nothing is done where glibc is missing or told otherwise by its environment variables,
    or where JAX may find an accelerator, whose temporaries are not malloc's.

    Returns: whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    if not _only_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) for name, value in settings)


def _only_cpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS")
    if wanted:
        return wanted == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins"))
