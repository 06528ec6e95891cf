"""What a prompt's checkpoint costs: bytes on disk, and how long a save keeps the step waiting.

python -m benchmarks.checkpoint --slots 100 --d-model 4096
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.common import machine, table
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.optim import OptimConfig, make_optimizer
from jaxprompt.steps import init_state


def measure(recipe: str, slots: int, d_model: int, saves: int) -> list[str]:
    """A row of the table: saves with a second's work between them, as in a run."""
    prompt = jax.random.normal(jax.random.key(0), (slots, d_model), jnp.float32)
    optimizer = make_optimizer(OptimConfig(recipe=recipe), 1000)
    state = init_state({"method": {"prompt": prompt}}, [optimizer], [0])
    gradient = jax.tree.map(lambda leaf: leaf**2, state.trained)  # moments that are not all zero
    _, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
    tree = {
        "trained": state.trained,
        "opt_state": opt_state,
        "rng": jax.random.key_data(state.rng),
    }
    blocked = []
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(Path(folder) / "checkpoints") as checkpoints:
            for step in range(saves + 1):
                start = time.perf_counter()
                checkpoints.save(step, tree)
                blocked.append(1000 * (time.perf_counter() - start))
                time.sleep(1)
        newest = max((Path(folder) / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    blocked = blocked[1:]
    return [
        recipe,
        f"{size / 1e6:.2f}",
        f"{statistics.median(blocked):.1f}",
        f"{max(blocked):.1f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--saves", type=int, default=20)
    args = parser.parse_args()
    print(machine())
    print(f"prompt of {args.slots} x {args.d_model}, float32, {args.saves} saves\n")
    rows = [measure(recipe, args.slots, args.d_model, args.saves) for recipe in ("paper", "adamw")]
    print(table(["recipe", "MB", "blocked ms, median", "most"], rows))


if __name__ == "__main__":
    main()
