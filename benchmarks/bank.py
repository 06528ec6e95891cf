"""N prompts trained at once against N runs one after another: time, start-up, memory.

    python -m benchmarks.bank --sizes small base --prompts 1 2 4 8 16

Weights and rows are random, rows full. One step of the bank and N steps of single runs take turns.
Start-up is a process of its own from its start to the end of the first step: imports, weights,
compilation.
"""

import argparse
import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

from benchmarks.common import (
    SIZES,
    Shapes,
    alternate,
    machine,
    peak_bytes,
    random_batch,
    ratios,
    size_config,
    table,
)
from jaxprompt import steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import T5
from jaxprompt.typing import ArrayTree, Batch

GIB = 2**30


@dataclasses.dataclass
class Bank:
    """A compiled step of N prompts.

    Attributes:
      temporaries: bytes that the step needs beside its arguments.
      loss: of the last step, [N].
    """

    run: Callable[[steps.TrainState, ArrayTree, Batch], tuple[steps.TrainState, dict]]
    state: steps.TrainState
    frozen: ArrayTree
    batch: Batch
    temporaries: int
    loss: np.ndarray | None = None

    def step(self) -> None:
        """One step, to its end."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        self.loss = np.asarray(jax.device_get(metrics["loss"]))


def make_bank(config: T5Config, params: ArrayTree, shapes: Shapes, prompts: int) -> Bank:
    """N soft prompts, each with rows of its own; with one prompt the plain step."""
    batches = [random_batch(config, shapes, seed) for seed in range(prompts)]
    for number, batch in enumerate(batches):
        batch.prompt_index_BG[:] = number
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    draws = [
        jax.random.normal(jax.random.key(seed), (shapes.slots, config.d_model))
        for seed in range(prompts)
    ]
    methods = [SoftPrompt(draw) for draw in draws]
    method = methods[0] if prompts == 1 else PromptBank(methods)
    graphdef, trained, frozen = trees.split(PromptedT5(T5(config, params, Compute()), method))
    optimizers = [optax.adamw(0.3)] * prompts
    state = steps.init_state(trained, optimizers, list(range(prompts)))
    run = functools.partial(steps.train_step, graphdef, optimizers, steps.StepOptions())
    state, frozen, batch = jax.device_put((state, frozen, batch))
    compiled = jax.jit(run, donate_argnums=0).lower(state, frozen, batch).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Bank(compiled, state, frozen, batch, temporaries)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, "mini"], default=["small"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    for field, default in (("rows", 4), ("tokens", 64), ("slots", 20), ("targets", 8)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of a run, for the total")
    parser.add_argument("--first-step-of", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = Shapes(args.rows, args.tokens, args.slots, args.targets)
    if args.first_step_of:
        first_step(size_config(args.sizes[0]), shapes, args.first_step_of)
        return
    print(machine())
    print(
        f"T5 1.1, float32; each prompt {shapes.rows} rows x ({shapes.slots} slots + "
        f"{shapes.tokens} tokens), {shapes.targets} targets; {args.rounds} rounds\n"
    )
    head = [
        "backbone", "prompts", "a step of all", "N steps of one", "N steps / the step: medians",
        "middle half of rounds", "best", "processor time",
        "start-up of a bank / of one", f"N runs / bank: {args.steps:,} steps with start-up",
        "temporaries GiB", "peak memory of the process GiB",
    ]  # fmt: skip
    rows = [row for size in args.sizes for row in _rows(size, shapes, args)]
    print(table(head, rows))


def first_step(config: T5Config, shapes: Shapes, prompts: int) -> None:
    """What a process of its own does; prints its peak memory in bytes."""
    bank = make_bank(config, init_params(config, jax.random.key(0)), shapes, prompts)
    bank.step()
    print(peak_bytes())


def _rows(size: str, shapes: Shapes, args: argparse.Namespace) -> list[list[str]]:
    config = size_config(size)
    params = jax.block_until_ready(init_params(config, jax.random.key(0)))
    single = make_bank(config, params, shapes, 1)
    one_start, _ = _started(size, shapes, 1)
    rows = []
    for prompts in args.prompts:
        bank = single if prompts == 1 else make_bank(config, params, shapes, prompts)
        together, in_turn = alternate(
            bank.step, functools.partial(_steps, single, prompts), args.rounds
        )
        assert bank.loss is not None and np.isfinite(bank.loss).all()
        own, other = statistics.median(together.wall), statistics.median(in_turn.wall)
        start, peak = _started(size, shapes, prompts)
        total = prompts * one_start + args.steps * other
        rows.append([
            size, str(prompts), str(together), str(in_turn), *ratios(together, in_turn),
            f"{start:.1f} s / {one_start:.1f} s", f"{total / (start + args.steps * own):.2f}",
            f"{bank.temporaries / GIB:.2f}", f"{peak / GIB:.2f}",
        ])  # fmt: skip
    return rows


def _steps(bank: Bank, times: int) -> None:
    for _ in range(times):
        bank.step()


def _started(size: str, shapes: Shapes, prompts: int) -> tuple[float, int]:
    """Seconds of a process that takes one step, and its peak memory in bytes."""
    options = [
        word
        for field in dataclasses.fields(shapes)
        for word in (f"--{field.name}", str(getattr(shapes, field.name)))
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bank", "--sizes", size, "--first-step-of", str(prompts),
         *options],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return time.perf_counter() - start, int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
