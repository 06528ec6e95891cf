"""One of what a run trains: its options, data and first values, and what is kept of it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprompt
from jaxprompt.artifact import PromptArtifact, load_artifact, save_artifact
from jaxprompt.backbone import Backbone, identity_of
from jaxprompt.config import RunConfig, step_options
from jaxprompt.data.encoder import TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task
from jaxprompt.optim import resolve
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.schema import to_mapping
from jaxprompt.steps import StepOptions
from jaxprompt.t5.weights import save_hf
from jaxprompt.trees import merge
from jaxprompt.typing import ArrayTree, UserError


@dataclasses.dataclass(frozen=True)
class Trainee:
    """One of what a run trains: its own options and data.

    Attributes:
      name: empty if there is one only.
      config: of the run it would be by itself; `output_dir` is where its results go.
      source, validation: rows to train and to measure on.
      options: what is compiled into its step.
    """

    name: str
    config: RunConfig
    task: Task
    source: Source
    validation: Source
    encoder: TaskEncoder
    total_steps: int
    options: StepOptions

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def score_names(self) -> Sequence[str]:
        """The metrics whose mean its best evaluation is chosen by: the one named, or the task's."""
        return [self.config.train.metric] if self.config.train.metric else self.task.metrics


def mean_of(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """Mean of some metrics, for a score."""
    return sum(metrics[name] for name in names) / len(names)


def make_trainee(name: str, config: RunConfig, backbone: Backbone) -> Trainee:
    """Opens the data of a run and finds beforehand what would stop it.

    Raises: UserError for options at odds, or data that is missing or cannot be laid out.
    """
    task = Task(config.task)
    source, validation = task.open("train"), task.open("validation")
    encoder = encoder_of(config, task, backbone, bare=config.tune == "model")
    _check(config, encoder, [source, validation])
    steps = _total_steps(config, len(source))
    return Trainee(name, config, task, source, validation, encoder, steps, step_options(config))


def keep(
    one: Trainee,
    backbone: Backbone,
    name: str,
    number: int,
    trained: ArrayTree,
    metrics: Mapping[str, float],
    rest: tuple[Any, ArrayTree],
) -> None:
    """Writes what was trained to its directory: an artifact, or a backbone with `tune: model`.

    Args:
      name: of the artifact's directory.
      number: steps taken.
      trained: its trained tree.
      rest: graph definition and frozen tree, for a backbone.
    """
    place, config = one.directory / name, one.config
    if config.tune == "model":
        graphdef, frozen = rest
        tree = merge(graphdef, trained, frozen).backbone.tree()
        save_hf(place, tree, backbone.config, tokenizer_dir=backbone.directory)
        return
    provenance = {
        "recipe": config.optim.recipe, "steps": number, "seed": config.seed,
        "metrics": dict(metrics), "jaxprompt": jaxprompt.__version__,
    }  # fmt: skip
    if backbone.quantize != "none":
        provenance["quantize"] = backbone.quantize
    save_artifact(place, artifact_of(config, backbone, trained["method"], provenance))


def initial_values(config: RunConfig, backbone: Backbone, task: Task) -> dict[str, np.ndarray]:
    """First values of the method's parameters, float32, drawn from `config.seed`."""
    context = InitContext(
        d_model=backbone.config.d_model,
        vocab_size=backbone.tokenizer.size,
        rows=backbone.embedding_rows,
        encode=backbone.tokenizer.encode,
        candidates=tuple(task.candidates),
        load=lambda path: load_artifact(path).values["prompt"],
    )
    rows = functools.partial(initial_rows, context=context)
    return METHODS[config.method.name].initial(jax.random.key(config.seed), config.method, rows)


def artifact_of(
    config: RunConfig, backbone: Backbone, values: ArrayTree, provenance: Mapping[str, Any]
) -> PromptArtifact:
    """The artifact of a method's parameters `values`, fetched to the host."""
    return PromptArtifact(
        method=dataclasses.asdict(config.method),
        layout=config.layout,
        task=to_mapping(config.task),
        backbone=identity_of(backbone),
        values={name: np.asarray(value) for name, value in jax.device_get(values).items()},
        lengths={
            "max_input_length": config.data.max_input_length,
            "max_target_length": config.data.max_target_length,
        },
        training=provenance,
    )


def run_identity(config: RunConfig, backbone: Backbone) -> dict[str, Any]:
    """What a directory's run is; going on with anything else is refused."""
    return {
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "task": to_mapping(config.task),
        "method": dataclasses.asdict(config.method),
        "layout": config.layout,
        "tune": config.tune,
        "seed": config.seed,
        "recipe": config.optim.recipe,
        "batch_size": config.data.batch_size,
        "packing": config.data.packing,
    }


def encoder_of(config: RunConfig, task: Task, backbone: Backbone, *, bare: bool) -> TaskEncoder:
    """What turns the task's examples into rows, with the prompt's slots unless `bare`."""
    return TaskEncoder(
        task,
        Layout.parse(config.layout, 0 if bare else config.method.length),
        backbone.tokenizer,
        config.data,
        start_id=backbone.config.decoder_start_id,
    )


def _total_steps(config: RunConfig, rows: int) -> int:
    if config.train.epochs:
        return max(1, round(config.train.epochs * rows / config.data.batch_size))
    return config.train.steps or resolve(config.optim).steps


def _check(config: RunConfig, encoder: TaskEncoder, sources: Sequence[Source]) -> None:
    """Finds before a run what would stop it: options at odds, a first row that cannot be laid."""
    task = encoder.task
    if config.train.metric and config.train.metric not in task.metrics:
        raise UserError(
            f"train.metric is {config.train.metric!r}, task {config.task.name} has "
            f"{', '.join(task.metrics)}"
        )
    if not config.data.packing:
        config.train.check_batch_size("data.batch_size", config.data.batch_size)
    encoder.lay([task.example(source[0], source.where(0)) for source in sources])
