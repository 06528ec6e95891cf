"""The training step over packed rows by way of attention, in turns in one process.

python -m benchmarks.windows --rows small:2x1024+100:130-350 mini:4x1024+20:40-115
"""

import argparse
import dataclasses
import re
import statistics
import sys
import time

import jax
import numpy as np

from benchmarks.common import Shapes, machine, make_step, random_batch, size_config, table
from jaxprompt import allocator
from jaxprompt.t5.config import ATTENTION_PATHS, Compute, T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.typing import Batch

TARGETS = 8  # of an example
REST = 0.1  # seconds between two timed steps


def packed_batch(
    config: T5Config, rows: int, encoder: int, slots: int, shortest: int, longest: int
) -> Batch:
    """Rows filled with random examples of `shortest` to `longest` positions, slots first."""
    draw = np.random.default_rng(0)
    segments = np.zeros((rows, encoder), np.int32)
    encoder_slots = np.full((rows, encoder), -1, np.int32)
    for row in range(rows):
        at, number = 0, 1
        while at + (length := int(draw.integers(shortest, longest + 1))) <= encoder:
            segments[row, at : at + length] = number
            encoder_slots[row, at : at + slots] = np.arange(slots)
            at, number = at + length, number + 1
    most = int(segments.max())
    targets = np.tile(np.repeat(np.arange(1, most + 1, dtype=np.int32), TARGETS), (rows, 1))
    targets = np.where(targets <= segments.max(axis=1, keepdims=True), targets, 0)
    index = np.zeros((rows, most), np.int32)
    return dataclasses.replace(
        random_batch(config, Shapes(rows, encoder - slots, slots, most * TARGETS)),
        encoder_segments_BS=segments,
        encoder_slots_BS=encoder_slots,
        decoder_segments_BT=targets,
        loss_weights_BT=(targets > 0).astype(np.float32),
        prompt_index_BG=index,
        example_index_BG=index,
    )


def measure(given: str, ways: list[str], repetitions: int) -> list[list[str]]:
    """Rows of the table for one kind of rows; ratios are of steps that ran one after another."""
    found = re.fullmatch(r"(\w+):(\d+)x(\d+)\+(\d+):(\d+)-(\d+)", given)
    if found is None:
        raise ValueError(f"rows are SIZE:ROWSxLENGTH+SLOTS:SHORTEST-LONGEST, not {given!r}")
    config = size_config(found[1])
    batch = packed_batch(config, *map(int, found.groups()[1:]))
    params = init_params(config, jax.random.key(0))
    prompt = np.asarray(jax.random.normal(jax.random.key(1), (int(found[4]), config.d_model)))
    runs, states, costs = {}, {}, {way: [] for way in ways}
    for way in ways:
        made = make_step(config, Compute(attention=way), batch, params, prompt)
        lowered = jax.jit(made.run, donate_argnums=0).lower(made.state, made.frozen, made.batch)
        runs[way] = lowered.compile(), *jax.device_put((made.frozen, made.batch))
        states[way] = jax.device_put(made.state)
    for repetition in range(repetitions + 1):
        for way, (step, frozen, rows) in runs.items():
            time.sleep(REST)
            wall, processor = time.perf_counter(), time.process_time()
            states[way], _ = step(states[way], frozen, rows)
            jax.block_until_ready(states[way])
            if repetition:
                costs[way].append((time.perf_counter() - wall, time.process_time() - processor))
    lines = []
    for way in ways:
        walls, processors = zip(*costs[way], strict=True)
        ratios = [a[1] / b[1] for a, b in zip(costs[ways[0]], costs[way], strict=True)]
        temporaries = runs[way][0].memory_analysis().temp_size_in_bytes / 2**30
        seconds = [f"{statistics.median(walls):.2f}", f"{statistics.median(processors):.2f}"]
        lines.append(
            [given, way, f"{temporaries:.2f}", *seconds, f"{statistics.median(ratios):.2f}"]
        )
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[
            "small:2x1024+100:130-350",
            "small:4x512+100:130-250",
            "mini:4x1024+20:40-115",
            "mini:8x512+20:40-115",
        ],
        help="SIZE:ROWSxLENGTH+SLOTS:SHORTEST-LONGEST, positions of an example with its slots",
    )
    parser.add_argument(
        "--attention", nargs="+", choices=ATTENTION_PATHS, default=["plain", "chunked", "windowed"]
    )
    parser.add_argument("--repetitions", type=int, default=6)
    args = parser.parse_args()
    kept = allocator.keep_pages()  # as commands do
    print(f"{machine()} · freed pages {'kept' if kept else 'given back'}\n")
    lines = []
    for given in args.rows:
        lines += measure(given, args.attention, args.repetitions)
        print(*lines[-len(args.attention) :], sep="\n", file=sys.stderr)
    head = ["rows", "attention", "temporaries GiB", "wall s", "processor s", "first / this one"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
