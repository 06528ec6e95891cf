"""How long a plan takes: reading the step off its config, and the compiler of the devices.

python -m benchmarks.plan --topology v5e:2x2 --sizes small base large xl xxl

Nothing is cached between rows; memory is the peak of this process so far. `mesh.model` is as wide
as heads and devices let it be, unless it is given.
"""

import argparse
import math
import time

from benchmarks.common import SIZES, machine, peak_bytes, table
from jaxprompt.compiled import compiler_options
from jaxprompt.config import load_config
from jaxprompt.planning.abstract import abstract_step
from jaxprompt.planning.chips import open_topologies
from jaxprompt.planning.shapes import step_shape
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.backbones import planned_config


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="xxl", help="its backbone and mesh are replaced")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(f"{machine()}\n")
    rows = []
    for topology in open_topologies(args.topology):
        for size in args.sizes:
            name = f"google/t5-{size}-lm-adapt"
            t5 = planned_config(name)
            wide = f"mesh.model={math.gcd(t5.num_heads, len(topology.devices))}"
            config = load_config(
                args.config, ["mesh.data=-1", wide, f"backbone.name={name}", *args.overrides]
            )
            start = time.perf_counter()
            mesh = make_mesh(config.mesh.data, config.mesh.model, topology.devices)
            shape = step_shape(config, t5, mesh.shape["data"])
            memory = None if topology.chip is None else topology.chip.memory
            step = abstract_step(config, t5, mesh, shape, 1, memory)
            traced = time.perf_counter()
            lowered = step.traced.lower()
            compiling = time.perf_counter()
            lowered.compile(compiler_options=compiler_options(topology.devices[0]))
            done = time.perf_counter()
            rows.append([
                topology.name, size, f"{traced - start:.1f} s", f"{compiling - traced:.1f} s",
                f"{done - compiling:.1f} s", f"{peak_bytes() / 2**30:.2f}",
            ])  # fmt: skip
    head = ["topology", "T5 1.1", "traced", "lowered", "compiled", "peak GiB"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
