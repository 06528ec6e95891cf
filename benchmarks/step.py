"""One training step: compiled FLOPs against the analytic minimum, memory, time.

python -m benchmarks.step --size small --rows 8 --tokens 128 --slots 100 --targets 8
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from benchmarks.common import (
    SIZES,
    Shapes,
    Step,
    machine,
    make_step,
    random_batch,
    size_config,
    spread,
    table,
)
from jaxprompt.planning.flops import minimal_step_flops, step_terms
from jaxprompt.t5.config import REMAT_POLICIES, Compute, T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import layers_unrolled

GIB = 2**30


def counted_flops(
    config: T5Config, compute: Compute, shapes: Shapes, compiled: jax.stages.Compiled
) -> float:
    """The compiler's count for the optimised program, with the layers unrolled.

    `cost_analysis` counts a loop's body once, so a step that scans over layers is compiled once
    more without the loop.
    """
    layers = max(config.num_layers, config.num_decoder_layers)
    if layers_unrolled(compute, layers) < layers:
        compute = dataclasses.replace(compute, scan_unroll=layers)
        compiled = compile_step(make_step(config, compute, random_batch(config, shapes)))
    return compiled.cost_analysis()["flops"]


def compile_step(step: Step) -> jax.stages.Compiled:
    """Compiles for the machine at hand, state donated as in training."""
    return jax.jit(step.run, donate_argnums=0).lower(step.state, step.frozen, step.batch).compile()


def step_seconds(step: Step, compiled: jax.stages.Compiled, repetitions: int) -> list[float]:
    """Wall clock of each repetition, the first two (warm-up) left out."""
    state, frozen, batch = jax.device_put((step.state, step.frozen, step.batch))
    seconds = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES, "mini"], default="small")
    for field in dataclasses.fields(Shapes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", nargs="+", choices=REMAT_POLICIES, default=["none"])
    parser.add_argument(
        "--scan-unroll", type=int, default=0, help="0: all layers on CPU, 1 elsewhere"
    )
    parser.add_argument(
        "--repetitions", type=int, default=5, help="timed steps; 0: compile only, nothing allocated"
    )
    parser.add_argument("--terms", action="store_true", help="print the minimum term by term")
    args = parser.parse_args()

    shapes = Shapes(args.rows, args.tokens, args.slots, args.targets)
    config = size_config(args.size)
    minimum = minimal_step_flops(config, shapes.rows, shapes.encoder, shapes.targets)
    print(machine())
    print(
        f"T5 1.1 {args.size}, {args.dtype}: {shapes.rows} rows x ({shapes.slots} slots + "
        f"{shapes.tokens} tokens), {shapes.targets} targets; "
        f"analytic minimum {minimum / 1e9:.2f} GFLOP a step\n"
    )
    if args.terms:
        terms = step_terms(config, shapes.rows, shapes.encoder, shapes.targets)
        rows = [[t.name, f"{t.forward / 1e9:.2f}", f"{t.backward / 1e9:.2f}"] for t in terms]
        print(table(["term", "forward GFLOP", "activation gradient GFLOP"], rows) + "\n")
    rows = [
        _row(config, Compute(args.dtype, args.scan_unroll, remat), shapes, args.repetitions)
        for remat in args.remat
    ]
    head = [
        "remat",
        "compiled GFLOP",
        "/ minimum",
        "weights GiB",
        "temporaries GiB",
        "step",
        "GFLOP/s of minimum",
    ]
    print(table(head, rows))


def _row(config: T5Config, compute: Compute, shapes: Shapes, repetitions: int) -> list[str]:
    minimum = minimal_step_flops(config, shapes.rows, shapes.encoder, shapes.targets)
    batch = random_batch(config, shapes)
    params = prompt = None
    if repetitions:
        params = init_params(config, jax.random.key(0), compute.dtype)
        prompt = np.asarray(jax.random.normal(jax.random.key(1), (shapes.slots, config.d_model)))
    step = make_step(config, compute, batch, params, prompt)
    compiled = compile_step(step)
    flops = counted_flops(config, compute, shapes, compiled)
    memory = compiled.memory_analysis()
    timed = ["-", "-"]
    if repetitions:
        seconds = step_seconds(step, compiled, repetitions)
        timed = [spread(seconds), f"{minimum / statistics.median(seconds) / 1e9:.0f}"]
    return [
        compute.remat,
        f"{flops / 1e9:.2f}",
        f"{flops / minimum:.3f}",
        f"{memory.argument_size_in_bytes / GIB:.2f}",
        f"{memory.temp_size_in_bytes / GIB:.2f}",
        *timed,
    ]


if __name__ == "__main__":
    main()
