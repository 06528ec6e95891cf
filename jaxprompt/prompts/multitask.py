"""Prompts with a part that several tasks share and a part of each task's own.

The four of google-research/prompt-tuning (extended/multitask_prompts.py), by `combine`: "add",
P + T_k; "concat", [P; T_k]; "concat-features", every slot's vector half shared, half the task's;
"project", P W_k + b_k. There the first token of an input names the task and all parts begin at
random; here a segment knows its task, and all parts begin so that every task's prompt is what
`init` gives. MPT: Wang et al. 2023, arXiv 2303.02861, P_k = P o (u_k v_k^T); a run on one task
begins from another's P and the mean u and v (sections 3.2 and 3.3), and u v^T begins at ones. Its
drawing of a few tasks for each batch is `data.tasks_per_batch`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.prompts.base import (
    Folded,
    MethodConfig,
    MethodInfo,
    MethodInputs,
    PromptMethod,
    Sizes,
    Values,
)
from jaxprompt.prompts.init import InitContext, initial_rows, linear
from jaxprompt.typing import Array, PromptValues, UserError

TASK_PARTS = ("tasks", "kernels", "biases", "left", "right")
"""Arrays with a part for each task on their first axis."""


@dataclasses.dataclass(frozen=True)
class SharedConfig(MethodConfig):
    """What prompts with shared parts have in common.

    Attributes:
      tasks: those that have parts of their own, in their order; filled in from `task.mixture`.
      init_task: with `init` "prompt" and several tasks at `init_path`, the one whose parts to begin
        from; empty = their mean.
    """

    tasks: tuple[str, ...] = ()
    init_task: str = ""

    @property
    def count(self) -> int:
        """T, of tasks."""
        return max(1, len(self.tasks))


@dataclasses.dataclass(frozen=True)
class MultitaskConfig(SharedConfig):
    """Options of the original's multi-task prompts.

    Attributes:
      length: slots of the shared part.
      combine: what a task's prompt is made of, see above.
      task_length: with "concat", slots of a task's part; 0 = as many as the shared part has.
      shared_features: numbers of a slot that are shared; 0 = half of d_model with
        "concat-features", all with "project".
    """

    name: str = "multitask"
    combine: Literal["add", "concat", "concat-features", "project"] = "add"
    task_length: int = 0
    shared_features: int = 0

    def __post_init__(self):
        super().__post_init__()
        uses = {"concat": "task_length", "concat-features": "shared_features"}
        uses["project"] = "shared_features"
        for name in ("task_length", "shared_features"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} is {getattr(self, name)}, it cannot be negative")
            if getattr(self, name) and uses.get(self.combine) != name:
                raise UserError(
                    f"method.{name} is {getattr(self, name)}, but method.combine "
                    f"{self.combine!r} has none: leave it out"
                )

    @property
    def slots(self) -> int:
        """Encoder slots of an example."""
        own = (self.task_length or self.length) if self.combine == "concat" else 0
        return self.length + own

    def features(self, d_model: int) -> int:
        """Numbers of a slot's vector that are shared.

        Raises: UserError if a task has none left of its own.
        """
        if self.combine == "concat-features":
            shared = self.shared_features or d_model // 2
            if shared >= d_model:
                raise UserError(
                    f"method.shared_features {shared} leaves nothing of the backbone's d_model "
                    f"{d_model} to the tasks"
                )
            return shared
        return self.shared_features or d_model


@dataclasses.dataclass(frozen=True)
class MptConfig(SharedConfig):
    """Options of MPT.

    Attributes:
      rank: r of u_k v_k^T; the paper's is 1.
    """

    name: str = "mpt"
    rank: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.check_rank(self.rank)


class TaskRows(PromptMethod):
    """A prompt of rows for each of T tasks; a segment's task picks."""

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        """encoder [T, P, D]."""
        index_BG = inputs.task_index_BG
        if index_BG is None:
            index_BG = jnp.zeros_like(inputs.prompt_index_BG)
        return PromptValues(encoder=self.rows(), prompt_index_BG=index_BG)

    def rows(self) -> Array:
        """What stands in the slots of each task, [T, P, D]."""
        raise NotImplementedError


class MultitaskPrompt(TaskRows):
    """A shared part, and each task's own put to it."""

    def rows(self) -> Array:
        """[T, P, D]."""
        shared = self["prompt"]
        if self.config.combine == "add":
            return shared[None] + self["tasks"]
        if self.config.combine == "project":
            return jnp.einsum("pf,tfd->tpd", shared, self["kernels"]) + self["biases"][:, None]
        own = self["tasks"]
        axis = 1 if self.config.combine == "concat" else 2
        return jnp.concatenate([jnp.broadcast_to(shared, (len(own), *shared.shape)), own], axis)


class MptPrompt(TaskRows):
    """P_k = P o (u_k v_k^T)."""

    def rows(self) -> Array:
        """[T, P, D]."""
        return self["prompt"][None] * jnp.matmul(self["left"], self["right"])


def _multitask_initial(
    key: Array, config: MultitaskConfig, context: InitContext
) -> dict[str, np.ndarray]:
    like = ("combine", "task_length", "shared_features")
    if (found := _begun(config, context, like)) is not None:
        return found
    count, features = config.count, config.features(context.sizes.d_model)
    rows_PD = initial_rows(key, config, context)
    if config.combine == "add":
        return {"prompt": rows_PD, "tasks": _each(np.zeros_like(rows_PD), count)}
    if config.combine == "concat-features":
        return {"prompt": rows_PD[:, :features], "tasks": _each(rows_PD[:, features:], count)}
    if config.combine == "concat":
        own = dataclasses.replace(config, length=config.slots - config.length)
        if config.init in ("prompt", "npy"):
            own = dataclasses.replace(own, init="vocab")
        rows = [initial_rows(jax.random.fold_in(key, n + 1), own, context) for n in range(count)]
        return {"prompt": rows_PD, "tasks": np.stack(rows)}
    shared, kernel = _through(key, rows_PD, features)
    biases = np.zeros((count, rows_PD.shape[1]), np.float32)
    return {"prompt": shared, "kernels": _each(kernel, count), "biases": biases}


def _mpt_initial(key: Array, config: MptConfig, context: InitContext) -> dict[str, np.ndarray]:
    if (found := _begun(config, context, ("rank",))) is not None:
        return found
    d, r = context.sizes.d_model, config.rank
    left = np.ones((config.length, r), np.float32)
    left[:, 1:] = 0
    right = np.concatenate([np.ones((1, d), np.float32), linear(key, d, r - 1, d)])
    return {
        "prompt": initial_rows(key, config, context),
        "left": _each(left, config.count),
        "right": _each(right, config.count),
    }


def _each(part: np.ndarray, count: int) -> np.ndarray:
    """The same part for each task, with a first axis."""
    return np.repeat(part[None], count, axis=0)


def _through(key: Array, rows_PD: np.ndarray, features: int) -> tuple[np.ndarray, np.ndarray]:
    """P [P, F] and W [F, D] whose product is the best for these rows; what is over of W is drawn.

    Sides that the rows do not need begin at zero in P and at random in W, so that both can move.
    """
    left, sizes, right = np.linalg.svd(rows_PD, full_matrices=False)
    used = min(features, len(sizes))
    shared = np.zeros((len(rows_PD), features), np.float32)
    kernel = linear(key, features, features, rows_PD.shape[1])
    shared[:, :used] = left[:, :used] * np.sqrt(sizes[:used])
    kernel = np.concatenate([np.sqrt(sizes[:used])[:, None] * right[:used], kernel[used:]])
    return shared, kernel.astype(np.float32)


def _begun(
    config: Any, context: InitContext, like: tuple[str, ...]
) -> dict[str, np.ndarray] | None:
    """Shared parts and each task's from the artifact of a run on other tasks; None without one.

    A prompt of another method has no parts for tasks: its rows are then what `init` gives.

    Raises: UserError for other sizes, another `combine`, or a task it does not have.
    """
    if config.init != "prompt" or context.artifact is None:
        return None
    method, values = context.artifact(config.init_path)
    if method["name"] != config.name:
        return None
    for option in ("length", *like):
        if method[option] != getattr(config, option):
            raise UserError(
                f"the prompt at method.init_path {config.init_path} has {option} "
                f"{method[option]}, the run has method.{option} {getattr(config, option)}"
            )
    names = list(method["tasks"])
    if config.init_task and config.init_task not in names:
        raise UserError(
            f"method.init_task is {config.init_task!r}; the prompt at {config.init_path} has parts "
            f"of {', '.join(names) or 'one task'}"
        )
    found = {}
    for name, value in values.items():
        if name in TASK_PARTS:
            picked = value[names.index(config.init_task)] if config.init_task else value.mean(0)
            value = _each(picked, config.count)
        found[name] = value.astype(np.float32)
    return found


def _multitask_parameters(config: MultitaskConfig, sizes: Sizes) -> int:
    d, features = sizes.d_model, config.features(sizes.d_model)
    own = {
        "add": config.length * d,
        "concat": (config.slots - config.length) * d,
        "concat-features": config.length * (d - features),
        "project": features * d + d,
    }
    return config.length * features + config.count * own[config.combine]


def _folding(make: type[TaskRows]) -> Callable[[Values, Any], Folded]:
    """A `MethodInfo.fold` that takes the rows of the only task as a soft prompt."""

    def fold(values: Values, config: Any) -> Folded:
        (rows_PD,) = make(values, config).rows()
        return Folded(MethodConfig(length=len(rows_PD)), {"prompt": rows_PD})

    return fold


MULTITASK = MethodInfo(
    formula="P + T_k, [P; T_k], or P W_k + b_k: P of all tasks, the rest of task k",
    paper="google-research/prompt-tuning, extended/multitask_prompts.py",
    cost="as soft once folded",
    config=MultitaskConfig,
    make=MultitaskPrompt,
    initial=_multitask_initial,
    parameters=_multitask_parameters,
    fold=_folding(MultitaskPrompt),
    slots=lambda config: config.slots,  # pyright: ignore[reportAttributeAccessIssue]
    task_parts=("tasks", "kernels", "biases"),
)
MPT = MethodInfo(
    formula="P o (u_k v_k^T): P of all tasks, u_k and v_k of task k",
    paper="Wang et al. 2023, arXiv 2303.02861",
    cost="as soft once folded",
    config=MptConfig,
    make=MptPrompt,
    initial=_mpt_initial,
    parameters=lambda config, sizes: (
        config.length * sizes.d_model + config.count * config.rank * (config.length + sizes.d_model)
    ),
    fold=_folding(MptPrompt),
    task_parts=("left", "right"),
)
