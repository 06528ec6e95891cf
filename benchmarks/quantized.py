"""What int8 and int4 weights cost and save: bytes, loading, quantising while loading, a step.

python -m benchmarks.quantized --size base --steps 5
python -m benchmarks.quantized --losses
Random weights of a T5 1.1 are written as float32, converted, and loaded in turns. `--losses`: what
quantising does to the packaged backbone instead, without a prompt, on texts of the demo set.
"""

import argparse
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprompt as jp
from benchmarks.common import (
    REST,
    SIZES,
    Shapes,
    machine,
    make_step,
    random_batch,
    size_config,
    spread,
    table,
)
from jaxprompt.data.tasks import load_task
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.t5.config import Compute
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.quantized import config_entry
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weights import convert_hf, load_params, save_hf
from jaxprompt.trees import size_in_bytes

MIB = 2**20
# stored as, loaded as
WAYS = [
    ("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("int8", "int8"),
    ("float32", "int4"), ("int4", "int4"),
]  # fmt: skip
LOSS_WAYS = [
    ("none", "float32"), ("none", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"),
    ("int4", "float32"),
]  # fmt: skip
ANSWERS = ["review", "support", "positive", "negative"]
EVERY = 4  # of the test split


def losses() -> str:
    """A table: mean negative log-likelihood of `ANSWERS` to demo texts, by weights and activations.

    Nats are per answer; the same best answer: of the four, as in float32.
    """
    source = load_task("demo-kind").open("test")
    texts = [source[number]["text"] for number in range(0, len(source), EVERY)]
    scores_BC = {}
    for kind, dtype in LOSS_WAYS:
        backbone = jp.load_backbone("jaxprompt-mini", dtype=dtype, quantize=kind)
        scores_BC[kind, dtype] = np.asarray(jp.score(backbone, None, texts, ANSWERS))
    exact = scores_BC[LOSS_WAYS[0]]
    rows = []
    for (kind, dtype), scores in scores_BC.items():
        change = scores.mean() / exact.mean() - 1
        same = np.mean(scores.argmax(1) == exact.argmax(1))
        rows.append([
            dtype if kind == "none" else kind, dtype, f"{-scores.mean():.4f}", f"{change:+.3%}",
            f"{same:.0%}",
        ])  # fmt: skip
    print(f"{len(texts)} texts, {len(ANSWERS)} answers each")
    return table(["weights", "activations", "nats", "against float32", "same best answer"], rows)


def write_all(root: Path, size: str) -> dict[str, float]:
    """A directory for each way to store; how long writing each took, in seconds."""
    config = size_config(size)
    params = init_params(config, jax.random.key(0))
    took = {}
    for dtype in ("float32", "bfloat16"):
        start = time.perf_counter()
        save_hf(root / dtype, params, config, dtype=dtype)
        took[dtype] = time.perf_counter() - start
    files, identity = open_weights(root / "float32"), fingerprint(root / "float32", config)
    for kind in ("int8", "int4"):
        start = time.perf_counter()
        convert_hf(root / kind, files, config, quantization=config_entry(kind, identity))
        took[kind] = time.perf_counter() - start
    return took


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes, after what was there before is gone."""
    gc.collect()
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """Prints machine and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--loads", type=int, default=3, help="of each, in turns, after one more")
    parser.add_argument("--steps", type=int, default=5, help="of each, in turns, after one more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--losses", action="store_true", help="of jaxprompt-mini, nothing timed")
    args = parser.parse_args()
    if args.losses:
        print(machine())
        print(losses())
        return
    config, compute = size_config(args.size), Compute(args.dtype)
    print(machine())
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        wrote = write_all(root, args.size)
        took: dict[tuple, list[float]] = {way: [] for way in WAYS}
        sizes = {}
        for turn in range(1 + args.loads):
            for stored, kind in WAYS:
                load = functools.partial(
                    load_params, root / stored, config, dtype=args.dtype, quantize=kind
                )
                elapsed = seconds(load)
                if turn:
                    took[stored, kind].append(elapsed)
        params = {
            kind: load_params(root / "float32", config, dtype=args.dtype, quantize=kind)
            for kind in ("none", "int8", "int4")
        }
        for stored, kind in WAYS:
            on_disk = sum(path.stat().st_size for path in (root / stored).iterdir())
            sizes[stored, kind] = on_disk, size_in_bytes(params[kind])
    rows = [
        [stored, kind if kind != "none" else args.dtype, f"{sizes[stored, kind][0] / MIB:.0f}",
         f"{sizes[stored, kind][1] / MIB:.0f}", spread(took[stored, kind]), f"{wrote[stored]:.1f}"]
        for stored, kind in WAYS
    ]  # fmt: skip
    head = ["stored as", "loaded as", "MiB on disk", "MiB of parameters", "loading", "writing s"]
    print(table(head, rows))

    batch, prompt = random_batch(config, Shapes()), np.zeros((100, config.d_model), np.float32)
    made = {kind: make_step(config, compute, batch, tree, prompt) for kind, tree in params.items()}
    programs = {kind: jax.jit(step.run) for kind, step in made.items()}
    temporaries = {
        kind: programs[kind].lower(step.state, step.frozen, step.batch).compile().memory_analysis()
        for kind, step in made.items()
    }
    stepped: dict[str, list[float]] = {kind: [] for kind in made}
    for turn in range(1 + args.steps):
        for kind, step in made.items():
            time.sleep(REST)
            # by jit: what is compiled ahead wants int4 packed as no array of it is
            elapsed = seconds(
                functools.partial(programs[kind], step.state, step.frozen, step.batch)
            )
            print(kind, f"{elapsed:.2f}", file=sys.stderr)
            if turn:
                stepped[kind].append(elapsed)
    base = statistics.median(stepped["none"])
    rows = [
        [kind if kind != "none" else args.dtype,
         f"{temporaries[kind].temp_size_in_bytes / MIB:.0f}", spread(times),
         f"{statistics.median(times) / base:.2f}"]
        for kind, times in stepped.items()
    ]  # fmt: skip
    print(f"\nA step of 8 rows of 100 slots and 128 tokens, 8 targets, {args.dtype} activations")
    print(table(["weights", "temporaries MiB", "step", "/ float"], rows))


if __name__ == "__main__":
    main()
