"""The training step of a config from abstract arrays: nothing is loaded, nothing allocated."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprompt.compiled import CompiledStep
from jaxprompt.config import RunConfig, step_options
from jaxprompt.optim import make_optimizer
from jaxprompt.planning.shapes import StepShape
from jaxprompt.prompts import METHODS, slots_of
from jaxprompt.prompts.init import InitContext
from jaxprompt.sharding import named_sharding, tree_shardings
from jaxprompt.steps import TrainState, init_state
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params, param_specs
from jaxprompt.t5.model import T5
from jaxprompt.t5.remat import settled
from jaxprompt.trainee import taken_apart, total_steps
from jaxprompt.typing import ArrayTree, Batch


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step as training calls it.

    Attributes:
      mesh: of devices, which need not be here.
      remat: the policy, also where the config leaves it to the step.
      traced: the program as JAX sees it: `.jaxpr`, and `.lower().compile()`.
      state, frozen, batch: shapes, types and places of what it is called with.
    """

    mesh: Mesh
    remat: str
    traced: jax.stages.Traced
    state: TrainState
    frozen: ArrayTree
    batch: Batch


def abstract_step(
    config: RunConfig,
    t5: T5Config,
    mesh: Mesh,
    shape: StepShape,
    prompts: int = 1,
    memory: float | None = None,
) -> AbstractStep:
    """The step that `jaxprompt train` compiles for a config, on a mesh.

    Args:
      prompts: trained at once, all with this config.
      memory: bytes of an accelerator that a program may use.
    Raises: UserError for sizes that do not divide over the mesh.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = functools.partial(_placed, everywhere)
    params = _weights(config, t5, mesh)
    room = None if memory is None or config.tune == "model" else memory - own_bytes(params)
    compute = dataclasses.replace(config.compute(), mesh=mesh, room=room)
    remat = settled(compute, t5, shape.rows // config.train.accumulate, shape.encoder).remat
    values = jax.tree.map(placed, _method_values(config, t5))
    rows = (slots_of(config.method), t5.d_model)
    teacher = None
    if config.distil.is_on:
        taught = (max(1, len(config.distil.teachers)), *rows)
        teacher = placed(jax.ShapeDtypeStruct(taught, jnp.float32))
    text = placed(jax.ShapeDtypeStruct(rows, jnp.float32)) if config.regularize.wayward else None
    graphdef, trained, frozen = taken_apart(
        [config] * prompts,
        T5(t5, params, compute),
        [values] * prompts,
        [teacher] * prompts,
        [text] * prompts,
    )
    optimizers = [make_optimizer(config.optim, total_steps(config, 0))] * prompts
    init = functools.partial(init_state, optimizers=optimizers, seeds=range(prompts))
    state = jax.tree.map(placed, jax.eval_shape(init, trained))
    batch = _batch(mesh, shape)
    step = CompiledStep(graphdef, optimizers)
    traced = step.traced(step_options(config), state, frozen, batch)
    return AbstractStep(mesh, remat, traced, state, frozen, batch)


def weights_on_a_device(config: RunConfig, t5: T5Config, mesh: Mesh) -> int:
    """Bytes of the backbone on each device; nothing is traced or compiled for it.

    Raises: UserError as `abstract_step`.
    """
    return own_bytes(_weights(config, t5, mesh))


def own_bytes(tree: ArrayTree) -> int:
    """Bytes of a tree's leaves on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _weights(config: RunConfig, t5: T5Config, mesh: Mesh) -> ArrayTree:
    dtype = "float32" if config.tune == "model" else config.backbone.dtype
    kind = config.backbone.quantize or "none"
    shardings = tree_shardings(mesh, param_specs(t5, kind), config.mesh.weights_over_data)
    return jax.tree.map(_placed, shardings, abstract_params(t5, dtype, kind))


def _placed(where: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _method_values(config: RunConfig, t5: T5Config) -> Mapping[str, Any]:
    """First values for the sake of their shapes: no vocabulary is at hand for real ones."""
    context = InitContext(
        sizes=t5,
        vocab_size=t5.vocab_size,
        rows=lambda ids: np.zeros((len(ids), t5.d_model), np.float32),
        encode=lambda text: [],
        source=lambda path: np.zeros((config.method.length, t5.d_model), np.float32),
    )
    method = dataclasses.replace(config.method, init="uniform")
    return METHODS[method.name].initial(jax.random.key(0), method, context)


def _batch(mesh: Mesh, shape: StepShape) -> Batch:
    widths = {"BS": shape.encoder, "BT": shape.decoder, "BG": shape.segments}
    arrays = {}
    for field in dataclasses.fields(Batch):
        size = (shape.rows, widths[field.name[-2:]])
        dtype = jnp.float32 if field.name == "loss_weights_BT" else jnp.int32
        axes = ("batch", "segments" if field.name.endswith("BG") else "length")
        arrays[field.name] = jax.ShapeDtypeStruct(
            size, dtype, sharding=named_sharding(mesh, axes, size)
        )
    return Batch(**arrays)
