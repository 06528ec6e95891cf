"""The step of pretraining against this machine's float32 matmul, in turns, and where its time goes.

python -m benchmarks.pretrain --configs pretrain/ladder/1m pretrain/ladder/4m --pairs 5

Rows are random and full. Times are of all threads of the process, so that others at work on the
machine count for less.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import Shapes, alternate, machine, random_batch, table
from jaxprompt import allocator, steps, trees
from jaxprompt.config import PretrainConfig, step_options
from jaxprompt.losses import cross_entropy, is_likeliest
from jaxprompt.model import PromptedT5
from jaxprompt.optim import make_optimizer
from jaxprompt.phases import load_phases
from jaxprompt.planning.flops import matmul_flops
from jaxprompt.t5.config import Compute
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import T5
from jaxprompt.typing import Batch

MATMUL = 2048  # rows and columns of the matmul that stands for the peak


class Program(NamedTuple):
    """`function(state, *arguments)`, which returns another state and something else."""

    function: Callable[..., tuple[Any, Any]]
    state: Any
    arguments: tuple[Any, ...]

    def compiled(self) -> Callable[[], None]:
        """It as something to call again and again, each time on the state of the last."""
        arguments = jax.device_put(self.arguments)
        state = jax.tree.map(jnp.copy, self.state)  # which the first call takes for itself
        program = jax.jit(self.function, donate_argnums=0).lower(state, *arguments).compile()

        def run() -> None:
            nonlocal state
            state, out = program(state, *arguments)
            jax.block_until_ready((state, out))

        return run


def programs(config: PretrainConfig, batch: Batch) -> dict[str, Program]:
    """The whole step first, then what can be timed of it alone."""
    model = config.model
    assert model is not None, "the run begins from a backbone"
    params = init_params(model, jax.random.key(0))
    compute = Compute(config.backbone.dtype)
    graphdef, trained, frozen = trees.split(PromptedT5(T5(model, params, compute)), ...)
    options, optimizer = step_options(config), make_optimizer(config.optim, 10_000)
    state = steps.init_state(trained, [optimizer], [0])
    step = functools.partial(steps.train_step, graphdef, [optimizer], options)
    hidden_BTD = jax.random.normal(jax.random.key(1), (*batch.targets_BT.shape, model.d_model))
    kernel_DV = params["decoder"]["logits_dense"]["kernel"]

    def output(state: Any, targets_BT: jax.Array) -> tuple[Any, Any]:
        def loss(state: Any) -> tuple[jax.Array, jax.Array]:
            logits_BTV = jnp.einsum("btd,dv->btv", *state)
            right_BT = is_likeliest(logits_BTV, targets_BT)
            return jnp.sum(cross_entropy(logits_BTV, targets_BT)), jnp.sum(right_BT)

        return jax.grad(loss, has_aux=True)(state)

    def update(state: Any, grads: Any) -> tuple[Any, Any]:
        sums = dict.fromkeys(("loss", "units", "right", "tokens", "examples"), jnp.ones(1))
        return steps.update([optimizer], state, grads, sums)

    return {
        "step": Program(step, state, (frozen, batch)),
        "output layer and loss": Program(output, (hidden_BTD, kernel_DV), (batch.targets_BT,)),
        "optimizer": Program(update, state, (trained,)),
    }


def step_flops(step: Program) -> int:
    """Of all its matmuls, a multiply-add counted as 2."""
    return matmul_flops(jax.make_jaxpr(step.function)(step.state, *step.arguments))


def measure(name: str, phase: str, pairs: int) -> list[str]:
    """A line of the table."""
    phases = load_phases(name)
    config = phases.get(phase) or next(iter(phases.values()))
    assert config.model is not None, f"{name} begins from a backbone"
    mixture = config.mixture
    shapes = Shapes(mixture.batch_size, mixture.row_input_length, 0, mixture.row_target_length)
    whole, *parts = programs(config, random_batch(config.model, shapes)).values()
    flops = step_flops(whole)
    square = jax.random.normal(jax.random.key(2), (MATMUL, MATMUL))
    times = max(1, round(flops / (2 * MATMUL**3)))  # about as much work as the step
    matmul = jax.jit(jnp.matmul).lower(square, square).compile()

    def multiply() -> None:
        for _ in range(times):
            jax.block_until_ready(matmul(square, square))

    step, peak = alternate(whole.compiled(), multiply, pairs)
    rates = [
        [work / second / 1e9 for second in timed.processor]
        for work, timed in ((flops, step), (2 * MATMUL**3 * times, peak))
    ]
    shares = sorted(100 * a / b for a, b in zip(*rates, strict=True))
    seconds = statistics.median(step.processor)
    told = []
    for part in parts:
        of_part, _ = alternate(part.compiled(), lambda: None, pairs)
        told.append(f"{100 * statistics.median(of_part.processor) / seconds:.0f} %")
    return [
        name,
        f"{shapes.rows} x ({shapes.tokens} + {shapes.targets})",
        f"{flops / 1e9:.1f}",
        f"{seconds:.3f}",
        *(f"{statistics.median(rate):.0f}" for rate in rates),
        f"{statistics.median(shares):.0f} % ({shares[0]:.0f} - {shares[-1]:.0f})",
        *told,
        f"{shapes.rows * (shapes.tokens + shapes.targets) / seconds:,.0f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--configs", nargs="+", default=["pretrain/ladder/1m", "pretrain/ladder/4m"]
    )
    parser.add_argument("--phase", default="span", help="of a config that has phases")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    allocator.keep_pages()  # as commands do
    print(machine() + "\n")
    lines = []
    for name in args.configs:
        lines.append(measure(name, args.phase, args.pairs))
        print(lines[-1], file=sys.stderr)
    head = [
        "config", "rows", "GFLOP a step", "processor s", "GFLOP/s", "matmul GFLOP/s",
        "step / matmul", "output layer and loss", "optimizer", "positions/s",
    ]  # fmt: skip
    print(table(head, lines))


if __name__ == "__main__":
    main()
