"""What keeping freed pages saves of a training step on CPU: both ways in turns, in one process.

python -m benchmarks.pages --rows small:8x128+100 mini:32x96+20
"""

import argparse
import ctypes
import re
import resource
import statistics
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.common import Shapes, machine, make_step, random_batch, size_config, table
from jaxprompt import allocator
from jaxprompt.t5.config import REMAT_POLICIES, Compute
from jaxprompt.t5.layers import init_params

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt
GIVEN_BACK = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 * 1024}  # glibc's defaults
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
REST = 0.2  # seconds between two timed steps


class Cost(NamedTuple):
    """Of one step: seconds on the clock and of all threads together, page faults."""

    wall: float
    processor: float
    faults: float


def parse(given: str) -> tuple[str, Shapes]:
    """A size and shapes from "small:8x128+100": rows, tokens, slots.

    Raises: ValueError if it is not of that form.
    """
    found = re.fullmatch(r"(\w+):(\d+)x(\d+)\+(\d+)", given)
    if found is None:
        raise ValueError(f"rows are SIZE:ROWSxTOKENS+SLOTS, not {given!r}")
    return found[1], Shapes(*map(int, found.groups()[1:]))


def measure(size: str, shapes: Shapes, remat: str, pairs: int) -> tuple[Cost, Cost, float, float]:
    """Medians given back and kept, the median ratio of processor time, temporaries in GiB."""
    config, compute = size_config(size), Compute(remat=remat)
    batch = random_batch(config, shapes)
    params = init_params(config, jax.random.key(0))
    prompt = np.asarray(jax.random.normal(jax.random.key(1), (shapes.slots, config.d_model)))
    made = make_step(config, compute, batch, params, prompt)
    step = jax.jit(made.run, donate_argnums=0).lower(made.state, made.frozen, made.batch).compile()
    state, frozen, rows = jax.device_put((made.state, made.frozen, made.batch))
    mallopt = ctypes.CDLL(None).mallopt
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    for pair in range(-1, pairs):
        for kept in (False, True):
            for name, value in (KEPT if kept else GIVEN_BACK).items():
                mallopt(name, value)
            for timed in (False, True):  # the first step after a change settles the heap
                time.sleep(REST)
                start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
                state, _ = step(state, frozen, rows)
                jax.block_until_ready(state)
                wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
                processor = sum(
                    getattr(after, name) - getattr(before, name)
                    for name in ("ru_utime", "ru_stime")
                )
                if timed and pair >= 0:
                    costs[kept].append(Cost(wall, processor, after.ru_minflt - before.ru_minflt))
    ratios = [a.processor / b.processor for a, b in zip(costs[False], costs[True], strict=True)]
    medians = [Cost(*map(statistics.median, zip(*costs[kept], strict=True))) for kept in costs]
    temporaries = step.memory_analysis().temp_size_in_bytes / 2**30
    return medians[0], medians[1], statistics.median(ratios), temporaries


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["small:8x128+100", "small:2x412+100", "mini:32x96+20", "mini:16x492+20"],
        help="SIZE:ROWSxTOKENS+SLOTS",
    )
    parser.add_argument("--remat", nargs="+", choices=REMAT_POLICIES, default=["none", "dots"])
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    if not allocator.keep_pages():  # before JAX has threads, which then share one heap
        sys.exit("pages are kept on CPU with glibc only; unset its own variables, if any")
    print(machine() + "\n")
    lines = []
    for given in args.rows:
        size, shapes = parse(given)
        for remat in args.remat:
            back, kept, ratio, temporaries = measure(size, shapes, remat, args.pairs)
            pairs = [f"{a:.2f} -> {b:.2f}" for a, b in zip(back[:2], kept[:2], strict=True)]
            faults = f"{back.faults:.0f} -> {kept.faults:.0f}"
            lines.append([given, remat, f"{temporaries:.2f}", faults, *pairs, f"{ratio:.2f}"])
            print(lines[-1], file=sys.stderr)
    head = [
        "rows", "remat", "temporaries GiB", "page faults", "wall s", "processor s",
        "processor given back / kept",
    ]  # fmt: skip
    print(table(head, lines))


if __name__ == "__main__":
    main()
