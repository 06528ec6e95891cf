"""How fast a backbone's weights come off the disk, and how much memory it takes.

python -m benchmarks.load --gigabytes 2

Generates a T5 1.1 of that size as safetensors, then in turns reads the file's bytes into one small
block, reads and holds all of them, and loads it, each in a process of its own and with the file
dropped from the system's cache before; medians are told. What holding takes more than reading is
what the system takes to give a process that much memory, which loading needs too. Memory is what
the process holds of its own (on CPU the loaded arrays too), pages of the file not counted, above
what it held once everything was imported. What is more than the result is told in largest tensors
of the dtype that is loaded, of what is quantised: of the dtype that is stored.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from benchmarks.common import machine, size_config, table
from jaxprompt import trees
from jaxprompt.quantize import KINDS
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.weight_names import Weight, weight_table
from jaxprompt.t5.weights import load_params
from jaxprompt.tensorfile import write_safetensors

WIDE = "xl"  # its widths; as many layers as the bytes ask for
BLOCK = 16 * 2**20  # bytes of a raw read
GB, GIB = 10**9, 2**30


def make(directory: Path, gigabytes: float, dtype: str) -> T5Config:
    """Writes a random backbone of about that size and returns its architecture."""
    wide = size_config(WIDE)
    one, two = (trees.count(abstract_params(_layers(wide, layers))) for layers in (1, 2))
    wanted = gigabytes * GB / np.dtype(_dtype(dtype)).itemsize
    config = _layers(wide, max(1, round((wanted - one) / (two - one)) + 1))
    draw = np.random.default_rng(0)

    def random(weight: Weight) -> np.ndarray:
        return weight.theirs(draw.standard_normal(weight.shape, np.float32)).astype(_dtype(dtype))

    (directory / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    tensors = {weight.name: random(weight) for weight in weight_table(config)}
    write_safetensors(directory / "model.safetensors", tensors)
    with (directory / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # only pages that are on the disk can be dropped
    return config


def _layers(config: T5Config, layers: int) -> T5Config:
    return dataclasses.replace(config, num_layers=layers, num_decoder_layers=layers)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read(path: Path) -> None:
    """Every byte of a file, into one block of memory again and again."""
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def hold(path: Path) -> np.ndarray:
    """Every byte of a file, into memory of its size."""
    return np.fromfile(path, np.uint8)


def drop(path: Path) -> None:
    """Lets the system forget what it keeps of a file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(work: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds of some work, processor seconds, and the most bytes that this process held more."""
    before, peak, done = _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        start, began = time.perf_counter(), time.process_time()
        held = work()
        seconds, busy = time.perf_counter() - start, time.process_time() - began
        peak = max(peak, _own_bytes())
        del held
    finally:
        done.set()
        watcher.join()
    return seconds, busy, peak - before


def _own_bytes() -> int:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kinds = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * int(kinds["RssAnon"].split()[0])


SIDES: dict[str, Callable[[Path], object]] = {"read": read, "hold": hold}


def one_side(side: str, directory: Path, dtype: str) -> None:
    """Does it once and prints seconds and bytes; dtype may be a kind of quantisation."""
    config = T5Config.from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    path = directory / "model.safetensors"
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    drop(path)
    if side in SIDES:
        result = measured(lambda: SIDES[side](path))
    else:
        result = measured(
            lambda: jax.block_until_ready(load_params(directory, config, **_options(dtype)))
        )
    print(*result)


def _options(loaded_as: str) -> dict[str, str]:
    """What `load_params` and `abstract_params` call it."""
    if loaded_as in KINDS:
        return {"dtype": "float32", "quantize": loaded_as}
    return {"dtype": loaded_as, "quantize": "none"}


def _run(side: str, directory: Path, dtype: str) -> tuple[float, float, int]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", "--one-side", side, str(directory), dtype],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds, busy, held = done.stdout.split()
    return float(seconds), float(busy), int(held)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="loaded as; int8 or int4 too"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", help="directory for the file (the system's temporary one)")
    parser.add_argument("--one-side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_side:
        side, directory, dtype = args.one_side
        one_side(side, Path(directory), dtype)
        return
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.place) as name:
        directory = Path(name)
        config = make(directory, args.gigabytes, args.stored)
        size = (directory / "model.safetensors").stat().st_size
        largest = max(int(np.prod(weight.shape)) for weight in weight_table(config))
        print(
            f"{size / GB:.2f} GB of {args.stored}, {config.num_layers} + "
            f"{config.num_decoder_layers} layers; the largest tensor has {largest / 1e6:.0f} M "
            f"numbers; {args.rounds} rounds\n"
        )
        rows = []
        for dtype in args.dtypes:
            turns = [
                [_run(side, directory, dtype) for side in (*SIDES, "load")]
                for _ in range(args.rounds)
            ]
            (raw, raw_busy, _), (held, held_busy, _), (loaded, busy, peak) = (
                [statistics.median(values) for values in zip(*runs, strict=True)]
                for runs in zip(*turns, strict=True)
            )
            result = trees.size_in_bytes(abstract_params(config, **_options(dtype)))
            itemsize = _dtype(args.stored if dtype in KINDS else dtype).itemsize
            rows.append([
                dtype, *(f"{size / GB / seconds:.2f}" for seconds in (loaded, raw, held)),
                f"{raw / loaded:.2f}", f"{held / loaded:.2f}",
                f"{raw_busy:.2f}, {held_busy:.2f}, {busy:.2f}",
                f"{peak / GIB:.2f}", f"{result / GIB:.2f}",
                f"{(peak - result) / (largest * itemsize):.2f}",
            ])  # fmt: skip
    head = [
        "loaded as", "GB/s of the file", "read GB/s", "read and held GB/s",
        "loading / reading", "loading / holding", "processor s: read, hold, load",
        "peak GiB", "result GiB",
        "more than the result, in largest tensors",
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
