"""The training step of a config from abstract arrays: nothing is loaded, nothing allocated."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprompt.config import RunConfig, step_options
from jaxprompt.model import PromptedT5
from jaxprompt.optim import make_optimizer, state_shardings
from jaxprompt.prompts import METHODS
from jaxprompt.sharding import named_sharding, tree_shardings
from jaxprompt.steps import init_state, train_step
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params, param_specs
from jaxprompt.t5.model import T5
from jaxprompt.trees import split
from jaxprompt.typing import ArrayTree, Batch, UserError


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Of a batch: rows B, encoder and decoder positions S and T of a row, examples in it G."""

    rows: int
    encoder: int
    decoder: int
    segments: int = 1


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step and the shapes, types and places of what it is called with.

    Attributes:
      run: (state, frozen, batch) -> (state, metrics).
      state, frozen, batch: ShapeDtypeStructs with shardings.
    """

    run: Any
    state: ArrayTree
    frozen: ArrayTree
    batch: Batch

    def compile(self) -> jax.stages.Compiled:
        """Compiles for the devices of the shardings, the state donated as in training."""
        return jax.jit(self.run, donate_argnums=0).lower(
            self.state, self.frozen, self.batch
        ).compile()  # fmt: skip

    def trace(self) -> Any:
        """The program as JAX sees it, before any compiler."""
        return jax.make_jaxpr(self.run)(self.state, self.frozen, self.batch)


def abstract_step(config: RunConfig, t5: T5Config, mesh: Mesh, shape: StepShape) -> AbstractStep:
    """The step that `jaxprompt train` compiles for a config, on a mesh.

    Raises: UserError for sizes that do not divide over the mesh, or rows that do not.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = functools.partial(_placed, everywhere)
    tuning_model = config.tune == "model"
    dtype = "float32" if tuning_model else config.backbone.dtype
    specs = param_specs(t5)
    shardings = tree_shardings(mesh, specs, config.mesh.weights_over_data)
    params = jax.tree.map(
        lambda leaf, where: _placed(where, leaf), abstract_params(t5, dtype), shardings
    )
    compute = dataclasses.replace(config.backbone.compute(), mesh=mesh)
    backbone = T5(t5, params, compute)
    if tuning_model:
        graphdef, trained, frozen = split(PromptedT5(backbone), ...)
    else:
        values = jax.tree.map(placed, _method_values(config, t5))
        method = METHODS[config.method.name].make(values, config.method)
        graphdef, trained, frozen = split(PromptedT5(backbone, method))
    optimizer = make_optimizer(config.optim, max(1, config.train.steps))
    state = jax.eval_shape(
        functools.partial(init_state, optimizers=[optimizer], seeds=[0]), trained
    )
    state = _state_placed(state, trained, optimizer, placed)
    run = functools.partial(train_step, graphdef, [optimizer], step_options(config))
    return AbstractStep(run, state, frozen, _batch(mesh, shape))


def _placed(where: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _state_placed(state: Any, trained: ArrayTree, optimizer: Any, placed: Any) -> Any:
    """Trained parameters and their moments lie as the parameters do, the rest everywhere."""
    where = jax.tree.map(lambda leaf: leaf.sharding, trained)
    moments = [state_shardings(optimizer, trained)]
    rest = jax.tree.map(placed, state)
    return dataclasses.replace(
        rest,
        trained=jax.tree.map(lambda leaf, at: _placed(at, leaf), state.trained, where),
        opt_state=jax.tree.map(lambda leaf, at: _placed(at, leaf), state.opt_state, moments),
    )


def _method_values(config: RunConfig, t5: T5Config) -> Mapping[str, Any]:
    """Shapes of the method's first values."""

    def rows(key: Any, method: Any) -> np.ndarray:
        return np.zeros((method.length, t5.d_model), np.float32)

    return METHODS[config.method.name].initial(jax.random.key(0), config.method, rows)


def _batch(mesh: Mesh, shape: StepShape) -> Batch:
    if shape.rows % mesh.shape["data"]:
        raise UserError(
            f"{shape.rows} rows do not divide over {mesh.shape['data']} data devices; rows that "
            f"would: {mesh.shape['data'] * -(-shape.rows // mesh.shape['data'])}"
        )
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
