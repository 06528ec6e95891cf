"""Cycles a training step takes on a TPU v5e by the TPU compiler's own estimate; needs no TPU.

python -m benchmarks.tpu_cycles --size base --examples 8 --attention plain chunked
pip install libtpu==0.0.42.1 first. The estimate compares variants of one program; it is no
measurement, and collectives, asynchronous copies and custom calls carry none.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import SIZES, Shapes, Step, make_step, random_batch, size_config, table
from jaxprompt import sharding
from jaxprompt.planning.flops import minimal_step_flops
from jaxprompt.planning.program import Op, by_kind, dearest, ops, total_cycles
from jaxprompt.quantize import KINDS
from jaxprompt.t5.config import ATTENTION_PATHS, REMAT_POLICIES, Compute, T5Config
from jaxprompt.t5.layers import param_specs
from jaxprompt.typing import ArrayTree, Batch

PLATFORM = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
FLOPS_A_CYCLE = 4 * 128 * 128 * 2  # v5e, bfloat16
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the examples stand in rows.

    Attributes:
      name: for the table.
      rows: B, segments: examples a row, encoder: S, targets: T.
    """

    name: str
    rows: int
    segments: int
    encoder: int
    targets: int


def layouts(examples: int, real: int, padded: int, row: int, targets: int) -> list[Rows]:
    """The same examples of `real` positions: each padded to a row, and packed into rows.

    Raises: ValueError if the examples do not fill rows.
    """
    segments = row // real
    if examples % segments:
        raise ValueError(f"{examples} examples do not fill rows of {segments}")
    return [
        Rows("padded", examples, 1, padded, targets),
        Rows("packed", examples // segments, segments, row, segments * targets),
    ]


def batch_of(config: T5Config, rows: Rows, slots: int) -> Batch:
    """A batch of these shapes; compiling reads nothing else of it."""
    batch = random_batch(config, Shapes(rows.rows, rows.encoder - slots, slots, rows.targets))
    index = np.zeros((rows.rows, rows.segments), np.int32)
    return dataclasses.replace(batch, prompt_index_BG=index, example_index_BG=index)


def compile_for(
    topology: str, model: int, config: T5Config, step: Step, quantize: str = "none"
) -> jax.stages.Compiled:
    """Compiles for `model` chips of the topology that share one copy of the weights."""
    from jax.experimental import topologies

    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one_chip)
    mesh = sharding.make_mesh(1, model, described.devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(leaf: Any, where: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    shardings: ArrayTree = sharding.tree_shardings(mesh, param_specs(config, quantize))
    frozen = jax.tree.unflatten(
        jax.tree.structure(step.frozen),
        jax.tree.map(placed, jax.tree.leaves(step.frozen), jax.tree.leaves(shardings)),
    )
    state, batch = jax.tree.map(placed, (step.state, step.batch))
    return jax.jit(step.run, donate_argnums=0).lower(state, frozen, batch).compile()


def kind_table(found: list[Op]) -> str:
    """A Markdown table of `hlo_cycles.by_kind`."""
    cycles, whole = by_kind(found), total_cycles(found)
    passes = ["forward", "recomputed", "backward", ""]
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in cycles):
        parts = [cycles.get((kind, when), 0) for when in passes]
        numbers = [f"{part / 1e6:.1f}" for part in (*parts, sum(parts))]
        rows.append([kind, *numbers, f"{100 * sum(parts) / whole:.0f} %"])
    return table(["kind", *passes[:3], "neither", "all", "share"], rows)


def main() -> None:
    """Prints the table, and each variant's cycles by kind and its dearest operations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--model", type=int, default=1, help="chips that share the weights")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--real", type=int, default=256, help="positions of an example, with slots")
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--padded", type=int, default=612, help="row length of an example alone")
    parser.add_argument("--row", type=int, default=1024, help="row length of packed examples")
    parser.add_argument("--targets", type=int, default=8, help="of one example")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="full")
    parser.add_argument("--quantize", choices=KINDS, default="none")
    parser.add_argument(
        "--attention", nargs="+", choices=ATTENTION_PATHS, default=["plain", "chunked"]
    )
    parser.add_argument("--layout", nargs="+", default=["padded", "packed"])
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("the TPU compiler is not installed: pip install libtpu==0.0.42.1")
    os.environ.update(PLATFORM)

    config = size_config(args.size)
    weights = "bfloat16" if args.quantize == "none" else f"bfloat16, {args.quantize} weights"
    print(f"T5 1.1 {args.size}, {weights}, remat {args.remat}, {args.topology}, model {args.model}")
    lines, costs = [], []
    for rows in layouts(args.examples, args.real, args.padded, args.row, args.targets):
        if rows.name not in args.layout:
            continue
        for attention in args.attention:
            compute = Compute("bfloat16", scan_unroll=1, remat=args.remat, attention=attention)
            step = make_step(
                config, compute, batch_of(config, rows, args.slots), quantize=args.quantize
            )
            start = time.perf_counter()
            compiled = compile_for(args.topology, args.model, config, step, args.quantize)
            found = ops(compiled.as_text())
            cycles = total_cycles(found)
            least = minimal_step_flops(config, rows.rows, rows.encoder, rows.targets)
            share = least / args.model / FLOPS_A_CYCLE / cycles
            lines.append(
                [
                    f"{rows.name} {rows.rows} x {rows.encoder}",
                    attention,
                    f"{cycles / 1e6:.1f}",
                    f"{cycles / args.examples / 1e6:.2f}",
                    f"{100 * share:.0f} %",
                    f"{compiled.memory_analysis().temp_size_in_bytes / GIB:.2f}",
                    str(sum(op.times for op in found if op.kernel)),
                    f"{time.perf_counter() - start:.0f}",
                ]
            )
            costs.append((f"{rows.name}, {attention}", found))
            print(lines[-1], file=sys.stderr)
    head = [
        "rows", "attention", "M cycles", "M cycles an example", "minimum / cycles",
        "temporaries GiB", "kernels", "compile s",
    ]  # fmt: skip
    print(table(head, lines))
    for title, found in costs:
        print(f"\n{title}, M cycles by kind and pass\n\n{kind_table(found)}")
        print(f"\n{title}: the ten dearest, M cycles")
        for name, cycles in dearest(found):
            print(f"  {cycles / 1e6:8.2f}  {name}")


if __name__ == "__main__":
    main()
