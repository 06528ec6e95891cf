"""The optimizer of a run: plain optax from a recipe and what the user changes of it."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprompt import trees
from jaxprompt.recipes import RECIPES, Recipe
from jaxprompt.typing import Array, ArrayTree, UserError

OPTIMIZERS = ("adafactor", "adamw")
_STACKED = "layers"  # below this name a leaf holds one tensor per layer on axis 0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """What the user may say about the optimizer, fields as in `Recipe`; None = its value."""

    recipe: str = "paper"
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    parameter_scale: bool | None = None
    decay_rate: float | None = None
    start_step: int | None = None
    factored: bool | None = None
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    learning_rates: dict[str, float] | None = None


# name -> what the peak rate is multiplied by, after (or with "rsqrt" including) the warm-up, from:
# numpy or jax.numpy, the part done of the run after the warm-up (0..1), finished steps, warm-up
SCHEDULES: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "constant": lambda xp, done, step, warmup: 1.0,
    "linear": lambda xp, done, step, warmup: 1.0 - done,
    "cosine": lambda xp, done, step, warmup: 0.5 * (1.0 + xp.cos(math.pi * done)),
    "rsqrt": lambda xp, done, step, warmup: (
        (max(warmup, 1) / xp.maximum(step + 1.0, max(warmup, 1))) ** 0.5
    ),
}


def resolve(config: OptimConfig) -> Recipe:
    """The recipe a configuration names, with the user's values in it.

    Raises: UserError for an unknown name or a value out of range.
    """
    _known("optim.recipe", config.recipe, RECIPES)
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "recipe" and getattr(config, field.name) is not None
    }
    recipe = dataclasses.replace(RECIPES[config.recipe], **given)
    _known("optim.optimizer", recipe.optimizer, OPTIMIZERS)
    _known("optim.schedule", recipe.schedule, SCHEDULES)
    for name, rate in recipe.learning_rates.items():
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"optim.learning_rates.{name} is {rate}; it should be above 0")
    for name, (test, right) in _RANGES.items():
        value = getattr(recipe, name)
        if not (math.isfinite(value) and test(value)):
            raise UserError(f"optim.{name} is {value}; it should be {right}")
    return recipe


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run.

    Adafactor's clipping and the parameter scale look at one tensor at a time, so a leaf that stacks
    layers (below the name "layers") is treated layer by layer. The functions are pure, one prompt's
    numbers do not depend on another's, and `jax.vmap` over a leading axis trains a bank.

    Args:
      config: recipe and overrides.
      total_steps: length of the run, for the schedule.
    Returns: an optax transformation for nested dicts of float arrays; its state is of arrays only.
    Raises: UserError as `resolve` does, or if the warm-up does not fit the run.
    """
    recipe = resolve(config)
    warmup = _warmup(config, recipe, total_steps)

    def of(rate: float) -> optax.GradientTransformation:
        def schedule(step: jax.typing.ArrayLike) -> Array:
            scaled = rate / recipe.learning_rate * _rate(recipe, warmup, total_steps, step, jnp)
            return jnp.asarray(scaled, jnp.float32)

        return _BUILDERS[recipe.optimizer](recipe, schedule)

    own = {name: of(rate) for name, rate in recipe.learning_rates.items()}
    each = _per_tensor(of(recipe.learning_rate), own, tuple(config.learning_rates or ()))
    if recipe.clip_norm:
        return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), each)
    return each


def state_shardings(optimizer: optax.GradientTransformation, params: ArrayTree) -> ArrayTree:
    """How the optimizer's state of sharded parameters is laid out: for `out_shardings` of `init`.

    Moments of a parameter's own shape lie as the parameter does; counts and factored means are
    small and are replicated.

    Args:
      optimizer: from `make_optimizer`.
      params: arrays, or ShapeDtypeStructs with shardings.
    Returns: shardings in the structure of `optimizer.init(params)`.
    Raises: KeyError if a leaf of the state belongs to no parameter.
    """
    owners = trees.flatten(params)

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        owner = owners[names[0]]
        sharding = owner.sharding
        if leaf.shape != owner.shape and isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return sharding

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def learning_rate_at(config: OptimConfig, total_steps: int, step: int) -> float:
    """The learning rate of the update after `step` finished ones, computed on the host."""
    recipe = resolve(config)
    warmup = _warmup(config, recipe, total_steps)
    return float(_rate(recipe, warmup, total_steps, step, np))


def _adafactor(recipe: Recipe, schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax's Adafactor equals T5X's, whose decay offset has the other sign of `start_step`."""
    return optax.adafactor(
        schedule,
        decay_rate=recipe.decay_rate,
        decay_offset=-recipe.start_step,
        multiply_by_parameter_scale=recipe.parameter_scale,
        weight_decay_rate=recipe.weight_decay or None,
        factored=recipe.factored,
    )


def _adamw(recipe: Recipe, schedule: optax.Schedule) -> optax.GradientTransformation:
    parts = [optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon)]
    if recipe.parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if recipe.weight_decay:
        parts.append(optax.add_decayed_weights(recipe.weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


_BUILDERS = {"adafactor": _adafactor, "adamw": _adamw}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda value: value > 0, "above 0"),
    "warmup_steps": (lambda value: value >= 0, "0 or more"),
    "weight_decay": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "clip_norm": (lambda value: value >= 0, "0 (no clipping) or more"),
    "decay_rate": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "start_step": (lambda value: value >= 0, "0 or more"),
    "beta1": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "beta2": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "epsilon": (lambda value: value > 0, "above 0"),
}


def _per_tensor(
    rest: optax.GradientTransformation,
    own: Mapping[str, optax.GradientTransformation],
    wanted: Sequence[str],
) -> optax.GradientTransformation:
    """Runs a transformation on every leaf alone, and on every layer of a stacked leaf alone.

    The state is {path of the leaf: its state}, with a leading layer axis for stacked leaves.

    Args:
      own: by the last word of a leaf's path; `rest` takes the others.
      wanted: words that have to be there.
    """

    def inner(path: str) -> optax.GradientTransformation:
        return own.get(path.rpartition("/")[2], rest)

    def apply(function: Callable[..., Any], path: str, *trees_: Any) -> Any:
        function = jax.vmap(function) if _STACKED in path.split("/") else function
        return function(*trees_)

    def init(params: ArrayTree) -> dict[str, Any]:
        leaves = trees.flatten(params)
        names = {path.rpartition("/")[2] for path in leaves}
        for name in wanted:
            if name not in names:
                raise UserError(
                    f"optim.learning_rates names {name!r}; what is trained is called "
                    f"{', '.join(sorted(names))}"
                )
        return {path: apply(inner(path).init, path, leaf) for path, leaf in leaves.items()}

    def update(
        grads: ArrayTree, state: dict[str, Any], params: ArrayTree | None = None
    ) -> tuple[ArrayTree, dict[str, Any]]:
        if params is None:
            raise ValueError("the optimizer needs the parameters beside their gradients")
        leaves = trees.flatten(params)
        results = {
            path: apply(inner(path).update, path, grad, state[path], leaves[path])
            for path, grad in trees.flatten(grads).items()
        }
        updates = trees.unflatten({path: result[0] for path, result in results.items()})
        return updates, {path: result[1] for path, result in results.items()}

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _rate(recipe: Recipe, warmup: int, total_steps: int, step: Any, xp: Any) -> Any:
    """Learning rate with numpy or jax.numpy; the first step of a warm-up already moves."""
    done = xp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
    factor = SCHEDULES[recipe.schedule](xp, done, step, warmup)
    if warmup and recipe.schedule != "rsqrt":
        factor = factor * xp.minimum((step + 1.0) / warmup, 1.0)
    return recipe.learning_rate * factor


def _warmup(config: OptimConfig, recipe: Recipe, total_steps: int) -> int:
    if total_steps < 1:
        raise UserError(f"a run of {total_steps} steps trains nothing; it needs at least 1")
    if config.warmup_steps is None:
        return min(recipe.warmup_steps, total_steps // 10)
    if recipe.warmup_steps >= total_steps:
        raise UserError(
            f"optim.warmup_steps is {recipe.warmup_steps} and the run has {total_steps} steps; the "
            "warm-up should be shorter"
        )
    return recipe.warmup_steps


def _known(key: str, name: str, table: Any) -> None:
    if name not in table:
        near = difflib.get_close_matches(str(name), list(table), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{key} is {name!r}{hint}; there are {', '.join(table)}")
