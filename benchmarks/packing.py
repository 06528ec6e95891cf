"""What packing saves on real lengths: positions, FLOPs and seconds of a training example.

python -m benchmarks.packing --vocabulary DIR --data boolq=DIR rte=DIR sst2=DIR multirc=DIR

Batches come from jaxprompt's own pipeline; weights are random. "fixed" pads every row to
max_input_length, "longest" to the longest of its batch (as PEFT's collators do), "sorted" is
`data.packing=off` (rows of like length share a batch, few lengths), "packed" is the default.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import SIZES, machine, make_step, size_config, table
from jaxprompt.data.encoder import DataConfig, TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.tasks import Task, load_task
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.planning.flops import minimal_step_flops
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.typing import Batch

WAYS = ("fixed", "longest", "sorted", "packed")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a way of padding is asked for: examples a batch, text tokens at most, slots."""

    split: str
    batch_size: int
    max_tokens: int
    slots: int


def batches_of(way: str, task: Task, tokenizer: Tokenizer, options: Options) -> Iterator[Batch]:
    """Endless training batches, numpy, laid out in one of the `WAYS`."""
    longest = options.max_tokens + options.slots
    config = DataConfig(
        batch_size=options.batch_size,
        max_input_length=longest,
        packing=way == "packed",
        length_buckets={"fixed": (longest,), "longest": tuple(range(1, longest))}.get(way, ()),
        window_batches=1 if way == "longest" else 16,
        prefetch=0,
    )
    encoder = TaskEncoder(task, Layout.parse("{prompt}{input}", options.slots), tokenizer, config)
    return iter(TrainBatches(encoder, task.open(options.split)))


@dataclasses.dataclass(frozen=True)
class Counted:
    """A number of batches: positions an example, their share in use, GFLOP an example at least."""

    positions: float
    fill: float
    gflop: float


def counted(config: T5Config, batches: list[Batch]) -> Counted:
    """What these batches cost by their shapes alone."""
    examples = sum(int((batch.example_index_BG >= 0).sum()) for batch in batches)
    positions = sum(batch.encoder_segments_BS.size for batch in batches)
    used = sum(int(np.count_nonzero(batch.encoder_segments_BS)) for batch in batches)
    flops = sum(
        minimal_step_flops(config, *batch.encoder_segments_BS.shape, batch.targets_BT.shape[1])
        for batch in batches
    )
    return Counted(positions / examples, used / positions, flops / examples / 1e9)


class Timer:
    """Runs batches of one way; compiles each of their shapes before the clock starts.

    Attributes:
      examples: in all the batches.
      temporaries: bytes that the largest of their programs needs beside its arguments.
    """

    def __init__(self, config: T5Config, batches: list[Batch], slots: int):
        params = init_params(config, jax.random.key(0))
        prompt = np.asarray(jax.random.normal(jax.random.key(1), (slots, config.d_model)))
        step = make_step(config, Compute(), batches[0], params, prompt)
        self._state, self._frozen = jax.device_put((step.state, step.frozen))
        self._batches = jax.device_put(batches)
        run = jax.jit(step.run)
        programs = {
            _shape(batch): run.lower(self._state, self._frozen, batch).compile()
            for batch in self._batches
        }
        self._runs = [programs[_shape(batch)] for batch in batches]
        self.examples = sum(int((batch.example_index_BG >= 0).sum()) for batch in batches)
        self.temporaries = max(
            program.memory_analysis().temp_size_in_bytes for program in programs.values()
        )
        self.seconds()

    def seconds(self) -> float:
        """Wall clock of all the batches, one after another."""
        start, state = time.perf_counter(), self._state
        for run, batch in zip(self._runs, self._batches, strict=True):
            state, _ = run(state, self._frozen, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - start


def _shape(batch: Batch) -> tuple[int, ...]:
    parts = (batch.encoder_segments_BS, batch.targets_BT, batch.prompt_index_BG)
    return tuple(size for part in parts for size in part.shape)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", required=True, help="directory of a T5 tokenizer")
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=DIR")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--size", choices=[*SIZES, "mini"], default="small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--batches", type=int, default=64, help="counted")
    parser.add_argument("--timed", type=int, default=0, help="batches timed of each way; 0 = none")
    parser.add_argument("--rounds", type=int, default=3, help="the ways take turns so often")
    args = parser.parse_args()

    config, tokenizer = size_config(args.size), load_tokenizer(args.vocabulary)
    options = Options(args.split, args.batch_size, args.max_tokens, args.slots)
    print(machine())
    print(f"T5 1.1 {args.size}, float32, {options}\n")
    rows = []
    for place in args.data:
        name = place.partition("=")[0]
        rows += _rows(name, task_of(place), tokenizer, config, options, args)
    head = ["task", "rows", "positions / example", "in use", "GFLOP / example", "examples/s",
            "against longest", "temporaries GiB"]  # fmt: skip
    print(table(head, rows))


def task_of(place: str) -> Task:
    """The task of `TASK=DIR`, its files in that directory."""
    name, _, directory = place.partition("=")
    task = load_task(name)
    source = dataclasses.replace(task.config.source, data_dir=str(Path(directory)))
    return Task(dataclasses.replace(task.config, source=source))


def _rows(
    name: str,
    task: Task,
    tokenizer: Tokenizer,
    config: T5Config,
    options: Options,
    args: argparse.Namespace,
) -> list[list[str]]:
    streams = {way: batches_of(way, task, tokenizer, options) for way in WAYS}
    made = {way: [next(stream) for _ in range(args.batches)] for way, stream in streams.items()}
    costs = {way: counted(config, batches) for way, batches in made.items()}
    speeds: dict[str, float] = {}
    memory = dict.fromkeys(WAYS, "-")
    if args.timed:
        timers = {way: Timer(config, made[way][: args.timed], options.slots) for way in WAYS}
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, timer in timers.items():
                taken[way].append(timer.seconds())
        memory = {way: f"{timer.temporaries / 2**30:.2f}" for way, timer in timers.items()}
        speeds = {way: timers[way].examples / float(np.median(taken[way])) for way in WAYS}
    return [
        [
            name,
            way,
            f"{cost.positions:.0f}",
            f"{100 * cost.fill:.1f} %",
            f"{cost.gflop:.2f}",
            f"{speeds[way]:.2f}" if speeds else "-",
            f"{speeds[way] / speeds['longest']:.2f}"
            if speeds
            else f"{costs['longest'].gflop / cost.gflop:.2f} (FLOP)",
            memory[way],
        ]
        for way, cost in costs.items()
    ]


if __name__ == "__main__":
    main()
