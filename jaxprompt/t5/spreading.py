"""Where the rows of activations lie between matmuls: over `data`, or over `data` and `model`.

Devices of `model` share every row's matmuls, by heads and MLP units. What stands between these
(norms, residual sums, what is kept of both) each would do for all rows, were they not spread.
Called by `t5.model`.
"""

from jaxprompt.sharding import ROWS_OVER_MODEL, RULES, constrain
from jaxprompt.t5.config import Compute
from jaxprompt.typing import Array

_AXES = ("batch", "length", "embed")


def is_spread(compute: Compute, x: Array) -> bool:
    """Whether the rows of `x` [B, ...] are divided over `model` too; they are where they divide."""
    mesh = compute.mesh
    return compute.rows_over_model and mesh is not None and x.shape[0] % mesh.size == 0


def between(compute: Compute, x_BSD: Array) -> Array:
    """Activations between matmuls, where they are to lie."""
    rules = ROWS_OVER_MODEL if is_spread(compute, x_BSD) else RULES
    return constrain(compute.mesh, x_BSD, *_AXES, rules=rules)


def gathered(compute: Compute, x_BSD: Array) -> Array:
    """What goes into matmuls: all rows of a group; the gradients of its parts are summed and cut.

    Both constraints matter: gradients pass them in reverse, as `summed` does.
    """
    if not is_spread(compute, x_BSD):
        return x_BSD
    return constrain(compute.mesh, between(compute, x_BSD), *_AXES)


def summed(compute: Compute, x_BSD: Array) -> Array:
    """What comes out of matmuls: summed over `model`, each device left with its own rows.

    The TPU compiler makes of the sum and the cut one reduce-scatter, which with the gathering
    before it sends as many bytes as the sum alone. Without the first constraint it would cut the
    matmul up and overlap its parts with their exchange, for a third more cycles.
    """
    if not is_spread(compute, x_BSD):
        return x_BSD
    return between(compute, constrain(compute.mesh, x_BSD, *_AXES))
