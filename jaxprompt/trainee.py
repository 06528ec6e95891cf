"""One of what a run trains: its options and data, and all of them taken apart for the step."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt import schema
from jaxprompt.backbone import Backbone
from jaxprompt.borrowed import digests, teacher
from jaxprompt.config import RunConfig, step_options, with_tasks
from jaxprompt.data.encoder import TaskEncoder
from jaxprompt.data.layout import Layout, counted_slots
from jaxprompt.data.mixture import MixedEncoder, MixedSource, rates_of
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task, TaskConfig
from jaxprompt.model import PromptedT5
from jaxprompt.optim import resolve
from jaxprompt.prompts import METHODS, MethodInputs, NoPrompt, PromptMethod, slots_of
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import FixedPrompt
from jaxprompt.schema import to_mapping
from jaxprompt.steps import StepOptions
from jaxprompt.t5.model import T5
from jaxprompt.trees import merge, split
from jaxprompt.typing import ArrayTree, UserError

MEAN = "mean"  # of the scores of several tasks


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tasks that a prompt is trained on.

    Attributes:
      config: of a run on this task alone.
      source, validation: rows to train and to measure on.
    """

    name: str
    config: RunConfig
    task: Task
    source: Source
    validation: Source
    encoder: TaskEncoder

    @property
    def score_names(self) -> Sequence[str]:
        """The metrics whose mean is its score: the one named, or the task's."""
        return [self.config.train.metric] if self.config.train.metric else self.task.metrics


@dataclasses.dataclass(frozen=True)
class Trainee:
    """One of what a run trains: its own options and data.

    Attributes:
      name: empty if there is one only.
      config: of the run it would be by itself; `output_dir` is where its results go.
      parts: its task, or those of its mixture.
      source, encoder: what it is trained on.
      options: what is compiled into its step.
      teacher: rows of the prompt that it learns from, or of each task's, float32 [T, P, D]; None =
        there is none.
    """

    name: str
    config: RunConfig
    parts: Sequence[Part]
    source: Source | MixedSource
    encoder: TaskEncoder | MixedEncoder
    total_steps: int
    options: StepOptions
    teacher: np.ndarray | None = None

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def score_names(self) -> Sequence[str]:
        """The metrics whose mean its best evaluation is chosen by."""
        return self.parts[0].score_names if len(self.parts) == 1 else [MEAN]

    def metrics_of(self, each: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Its metrics, of each task's; of several tasks first the mean of their scores."""
        if len(self.parts) == 1:
            return dict(each[0])
        both = list(zip(self.parts, each, strict=True))
        scores = [mean_of(metrics, part.score_names) for part, metrics in both]
        return {MEAN: sum(scores) / len(scores)} | {
            f"{part.name}/{name}": value
            for part, metrics in both
            for name, value in metrics.items()
        }


def mean_of(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """Mean of some metrics, for a score."""
    return sum(metrics[name] for name in names) / len(names)


def make_trainee(name: str, config: RunConfig, backbone: Backbone) -> Trainee:
    """Opens the data of a run and finds beforehand what would stop it.

    Raises: UserError for options at odds, or data that is missing or cannot be laid out.
    """
    if with_tasks(config) != config:
        raise UserError(
            f"method {config.method.name} has parts for each task, and method.tasks does not name "
            "those of task.mixture; jaxprompt.load_config fills it in"
        )
    mixture = config.task.mixture
    if METHODS[config.method.name].task_parts and not mixture and config.method.init != "prompt":
        raise UserError(
            f"method {config.method.name} shares a prompt among tasks, and the run has one: give "
            "several (task: {mixture: [NAME, NAME]}), or go on from what was trained on several "
            "with method.init=prompt and method.init_path"
        )
    if config.data.tasks_per_batch != "all" and not mixture:
        raise UserError(
            f"data.tasks_per_batch is {config.data.tasks_per_batch!r}, and the run has one task: "
            "give several (task: {mixture: [NAME, NAME]})"
        )
    parts = [_make_part(name, part_config(config, name), backbone) for name in (mixture or [""])]
    source, encoder = parts[0].source, parts[0].encoder
    if mixture:
        source = MixedSource([part.source for part in parts])
        rates = rates_of(list(mixture.values()), source.counts)
        encoder = MixedEncoder([part.encoder for part in parts], rates)
    steps, options, rows = total_steps(config, len(source)), step_options(config), None
    if config.distil.is_on:
        rows, likeness = teacher(config, backbone)
        options = dataclasses.replace(options, distil=config.distil.distances(likeness))
    if config.regularize.masks:
        tokenizer = backbone.tokenizer
        mask_ids = tokenizer.sentinel_id(0), tokenizer.eos_id
        options = dataclasses.replace(options, mask_ids=mask_ids)
    return Trainee(name, config, parts, source, encoder, steps, options, rows)


def _make_part(name: str, config: RunConfig, backbone: Backbone) -> Part:
    task = Task(config.task)
    source, validation = task.open("train"), task.open("validation")
    encoder = encoder_of(config, task, backbone, bare=config.tune == "model")
    _check(config, encoder, [source, validation])
    return Part(name, config, task, source, validation, encoder)


def part_config(config: RunConfig, name: str) -> RunConfig:
    """A run on one task of the mixture alone, its results in `tasks/NAME`; itself without one."""
    if not name:
        return config
    task = schema.from_mapping(TaskConfig, config.task.mixture[name].task, f"task.mixture.{name}")
    method = config.method
    if METHODS[method.name].task_parts:
        method = dataclasses.replace(method, tasks=())
    place = str(Path(config.output_dir) / "tasks" / name)
    return dataclasses.replace(config, output_dir=place, task=task, method=method)


def train_batches(one: Trainee, devices: int, share: tuple[int, int] = (0, 1)) -> TrainBatches:
    """Its training batches.

    Args:
      devices: along the mesh's `data`.
      share: which part of each batch is this process's, of how many (`sharding.data_share`).
    """
    return TrainBatches(
        one.encoder,
        one.source,
        seed=one.config.seed,
        row_multiple=one.config.data.row_multiple or devices * one.config.train.accumulate,
        process_index=share[0],
        process_count=share[1],
    )


def taken_apart(
    configs: Sequence[RunConfig],
    backbone: T5,
    values: Sequence[ArrayTree],
    teachers: Sequence[Any] = (),
    texts: Sequence[Any] = (),
) -> tuple[Any, ArrayTree, ArrayTree]:
    """Graph definition, trained and frozen tree of a backbone with all prompts on it.

    Args:
      configs: of the runs; all tune the same.
      values: of each prompt's method, arrays or their shapes; not read with `tune: model`.
      teachers: rows [T, P, D] of the prompts that each one learns from, None for one without; or
        none at all.
      texts: what each one is pulled towards, `text_rows` or their shape, None for one without; or
        none at all.
    Raises: UserError for a text beside a method that makes a prompt for each input.
    """
    if configs[0].tune == "model":
        return split(PromptedT5(backbone), ...)
    methods = [
        METHODS[config.method.name].make(own, config.method)
        for config, own in zip(configs, values, strict=True)
    ]
    for config, method, text in zip(configs, methods, texts or [None] * len(methods), strict=True):
        if text is not None and _slots_shape(method, text.shape[1]) != (1, *text.shape):
            raise UserError(
                f"regularize.wayward pulls one prompt towards a text, method {config.method.name} "
                "makes a prompt for each input"
            )
    fixed = [NoPrompt() if rows is None else FixedPrompt(rows) for rows in teachers]
    taught = any(rows is not None for rows in teachers)
    return split(
        PromptedT5(
            backbone,
            _together(methods),
            _together(fixed) if taught else None,
            {n: text for n, text in enumerate(texts) if text is not None},
        )
    )


def _together(methods: Sequence[PromptMethod]) -> PromptMethod:
    return methods[0] if len(methods) == 1 else PromptBank(methods)


def _slots_shape(method: PromptMethod, d_model: int) -> tuple[int, ...]:
    """Of what a method puts into slots, for a batch of one token."""
    graphdef, *trees = split(method)

    def slots(*trees: ArrayTree) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        inputs = MethodInputs(jnp.zeros((1, 1, d_model)), -one, one, one - 1)
        return merge(graphdef, *trees)(inputs)

    made = jax.eval_shape(slots, *trees)
    return made.encoder.shape if made.prompt_index_BG is None else ()


def run_identity(config: RunConfig, backbone: Backbone) -> dict[str, Any]:
    """What a directory's run is; going on with anything else is refused."""
    sources = METHODS[config.method.name].sources(config.method)
    kept: dict[str, Any] = {}
    if sources:
        kept["sources"] = digests(sources)
    if config.distil.is_on:
        rows = digests(config.distil.paths)
        kept["distil"] = {**to_mapping(config.distil), "rows": rows}
    return {
        **kept,
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "task": to_mapping(config.task),
        "method": to_mapping(config.method),
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
        Layout.parse(config.layout, 0 if bare else slots_of(config.method)),
        backbone.tokenizer,
        config.data,
        start_id=backbone.config.decoder_start_id,
    )


def total_steps(config: RunConfig, rows: int) -> int:
    """Steps of a run over so many rows; 0 rows = not known, then what the recipe takes."""
    if config.train.epochs and rows:
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
    counted = config.tune == "prompt" and counted_slots(config.layout)
    if counted and not slots_of(config.method):
        raise UserError(
            f"the layout {config.layout!r} counts {counted} slots, and what method "
            f"{config.method.name} trains stands in none; leave the count out"
        )
    if config.regularize.reads_slots and not slots_of(config.method):
        raise UserError(
            f"regularize acts on the prompt's slots, and method {config.method.name} has none; set "
            "prompt_dropout, wayward and noise_on=prompt back"
        )
    if not config.data.packing:
        config.train.check_batch_size("data.batch_size", config.data.batch_size)
    encoder.lay([task.example(source[0], source.where(0)) for source in sources])
