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
from jax.sharding import Mesh

from benchmarks.common import SIZES, Shapes, Step, make_step, random_batch, size_config, table
from jaxprompt import sharding
from jaxprompt.compiled import compiler_options
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


def chips(topology: str, data: int, model: int) -> Mesh:
    """A mesh of the topology's chips, none of which is here."""
    from jax.experimental import topologies

    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one_chip)
    return sharding.make_mesh(data, model, described.devices)


def compile_for(
    mesh: Mesh,
    config: T5Config,
    step: Step,
    weights_over_data: bool = False,
    quantize: str = "none",
) -> jax.stages.Compiled:
    """Compiles with the arguments laid out as training lays them out."""

    def placed(leaf: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    specs = param_specs(config, quantize)
    shardings: ArrayTree = sharding.tree_shardings(mesh, specs, weights_over_data)
    frozen = jax.tree.unflatten(
        jax.tree.structure(step.frozen),
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for leaf, where in zip(
                jax.tree.leaves(step.frozen), jax.tree.leaves(shardings), strict=True
            )
        ],
    )
    state = jax.tree.map(placed, step.state)
    batch = jax.tree.map(lambda leaf: placed(leaf, "data"), step.batch)
    lowered = jax.jit(step.run, donate_argnums=0).lower(state, frozen, batch)
    return lowered.compile(compiler_options=compiler_options(mesh.devices.flat[0]))


def chip_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Of one chip: temporaries, and all that the program holds at once."""
    told = compiled.memory_analysis()
    held = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    return told.temp_size_in_bytes, held + told.temp_size_in_bytes


def kind_table(found: list[Op]) -> str:
    """A Markdown table of `planning.program.by_kind`."""
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
    parser.add_argument("--data", type=int, default=1, help="groups of chips with other rows")
    parser.add_argument("--model", type=int, default=1, help="chips that share the weights")
    parser.add_argument("--weights-over-data", action="store_true")
    parser.add_argument("--rows-over-model", action="store_true")
    parser.add_argument("--layers", type=int, help="of each stack, to try things out")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--real", type=int, default=256, help="positions of an example, with slots")
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--padded", type=int, default=612, help="row length of an example alone")
    parser.add_argument("--row", type=int, default=1024, help="row length of packed examples")
    parser.add_argument("--targets", type=int, default=8, help="of one example")
    parser.add_argument("--remat", nargs="+", choices=REMAT_POLICIES, default=["full"])
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
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers, num_decoder_layers=args.layers)
    mesh = chips(args.topology, args.data, args.model)
    weights = "bfloat16" if args.quantize == "none" else f"bfloat16, {args.quantize} weights"
    print(
        f"T5 1.1 {args.size}, {weights}, {args.topology}, data {args.data} x model {args.model}"
        + args.weights_over_data * ", weights over data"
        + args.rows_over_model * ", rows over model"
    )
    lines, costs = [], []
    variants = [
        (rows, remat, attention)
        for rows in layouts(args.examples, args.real, args.padded, args.row, args.targets)
        for remat in args.remat
        for attention in args.attention
        if rows.name in args.layout
    ]
    for rows, remat, attention in variants:
        over_model = args.rows_over_model
        compute = Compute("bfloat16", 1, remat, attention, mesh, rows_over_model=over_model)
        batch = batch_of(config, rows, args.slots)
        step = make_step(config, compute, batch, quantize=args.quantize)
        start = time.perf_counter()
        compiled = compile_for(mesh, config, step, args.weights_over_data, args.quantize)
        found = ops(compiled.as_text())
        cycles = total_cycles(found)
        least = minimal_step_flops(config, rows.rows, rows.encoder, rows.targets) / mesh.size
        temporaries, held = chip_bytes(compiled)
        title = f"{rows.name} {rows.rows} x {rows.encoder}, {remat}, {attention}"
        lines.append(
            [
                f"{rows.name} {rows.rows} x {rows.encoder}",
                remat,
                attention,
                f"{cycles / 1e6:.1f}",
                f"{cycles * mesh.size / args.examples / 1e6:.2f}",
                f"{100 * least / FLOPS_A_CYCLE / cycles:.1f} %",
                f"{temporaries / GIB:.2f}",
                f"{held / GIB:.2f}",
                str(sum(op.times for op in found if op.kernel)),
                f"{time.perf_counter() - start:.0f}",
            ]
        )
        costs.append((title, found))
        print(lines[-1], file=sys.stderr)
    head = [
        "rows", "remat", "attention", "M cycles a chip", "of all chips an example",
        "minimum / cycles", "temporaries GiB", "all GiB a chip", "kernels", "compile s",
    ]  # fmt: skip
    print(table(head, lines))
    for title, found in costs:
        print(f"\n{title}, M cycles by kind and pass\n\n{kind_table(found)}")
        print(f"\n{title}: the ten dearest, M cycles")
        for name, cycles in dearest(found):
            print(f"  {cycles / 1e6:8.2f}  {name}")


if __name__ == "__main__":
    main()
