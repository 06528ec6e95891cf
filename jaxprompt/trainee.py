"""One of what a run trains: its options, data and first values, and what is kept of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprompt
from jaxprompt.artifact import PromptArtifact, load_artifact, save_artifact
from jaxprompt.backbone import Backbone, identity_of
from jaxprompt.config import RunConfig, step_options
from jaxprompt.data.encoder import TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task
from jaxprompt.model import PromptedT5
from jaxprompt.optim import resolve
from jaxprompt.prompts import METHODS, MethodInputs, PromptMethod, slots_of
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.init import InitContext
from jaxprompt.schema import to_mapping
from jaxprompt.steps import StepOptions
from jaxprompt.t5.model import T5
from jaxprompt.t5.weights import save_hf
from jaxprompt.trees import merge, split
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
    steps = total_steps(config, len(source))
    return Trainee(name, config, task, source, validation, encoder, steps, step_options(config))


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


def keep(
    one: Trainee,
    backbone: Backbone,
    name: str,
    number: int,
    trained: ArrayTree,
    first: Mapping[str, np.ndarray],
    metrics: Mapping[str, float],
    rest: tuple[Any, ArrayTree],
) -> None:
    """Writes what was trained to its directory: an artifact, or a backbone with `tune: model`.

    Args:
      name: of the artifact's directory.
      number: steps taken.
      trained: its trained tree.
      first: the first values of its method, of which some may be constant.
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
    values = {**first, **jax.device_get(trained["method"])}
    save_artifact(place, artifact_of(config, backbone, values, provenance))


def initial_values(config: RunConfig, backbone: Backbone, task: Task) -> dict[str, np.ndarray]:
    """First values of the method's parameters, float32, drawn from `config.seed`."""
    context = InitContext(
        sizes=backbone.config,
        vocab_size=backbone.tokenizer.size,
        rows=backbone.embedding_rows,
        encode=backbone.tokenizer.encode,
        candidates=tuple(task.candidates),
        load=_rows_of,
    )
    key = jax.random.key(config.seed)
    return METHODS[config.method.name].initial(key, config.method, context)


def _rows_of(path: str) -> np.ndarray:
    artifact = load_artifact(path)
    if "prompt" not in artifact.values:
        raise UserError(
            f"prompt {path} is of method {artifact.method['name']} and has no rows to begin from"
        )
    return artifact.values["prompt"]


def text_rows(config: RunConfig, backbone: Backbone) -> np.ndarray | None:
    """Embeddings of `regularize.wayward_text`, repeated to the prompt's slots, float32 [P, D].

    Returns: None without a text.
    Raises: UserError if it has no tokens, or more than the prompt has slots.
    """
    text, slots = config.regularize.wayward_text, slots_of(config.method)
    if not text:
        return None
    ids = backbone.tokenizer.encode(text)
    if not 0 < len(ids) <= slots:
        raise UserError(
            f"regularize.wayward_text {text!r} has {len(ids)} tokens, the prompt {slots} slots: "
            "each slot is pulled towards a token, so there have to be some and not more than slots"
        )
    return backbone.embedding_rows([ids[n % len(ids)] for n in range(slots)])


def taken_apart(
    configs: Sequence[RunConfig],
    backbone: T5,
    values: Sequence[ArrayTree],
    texts: Mapping[int, Any] | None = None,
) -> tuple[Any, ArrayTree, ArrayTree]:
    """Graph definition, trained and frozen tree of a backbone with all prompts on it.

    Args:
      configs: of the runs; all tune the same.
      values: of each prompt's method, arrays or their shapes; not read with `tune: model`.
      texts: of each prompt that is pulled towards one, `text_rows` or their shape.
    Raises: UserError for a text beside a method that makes a prompt for each input.
    """
    if configs[0].tune == "model":
        return split(PromptedT5(backbone), ...)
    methods = [
        METHODS[config.method.name].make(own, config.method)
        for config, own in zip(configs, values, strict=True)
    ]
    for n, text in (texts or {}).items():
        if _slots_shape(methods[n], text.shape[1]) != (1, *text.shape):
            raise UserError(
                f"regularize.wayward pulls one prompt towards a text, method "
                f"{configs[n].method.name} makes a prompt for each input"
            )
    method = methods[0] if len(methods) == 1 else PromptBank(methods)
    return split(PromptedT5(backbone, method, texts))


def _slots_shape(method: PromptMethod, d_model: int) -> tuple[int, ...]:
    """Of what a method puts into slots, for a batch of one token."""
    graphdef, *trees = split(method)

    def slots(*trees: ArrayTree) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        inputs = MethodInputs(jnp.zeros((1, 1, d_model)), -one, one, one - 1)
        return merge(graphdef, *trees)(inputs)

    made = jax.eval_shape(slots, *trees)
    return made.encoder.shape if made.prompt_index_BG is None else ()


def artifact_of(
    config: RunConfig, backbone: Backbone, values: Mapping[str, Any], provenance: Mapping[str, Any]
) -> PromptArtifact:
    """The artifact of all of a method's values; of a plain prompt, where the method folds to one.

    What the method was is then told in its provenance.
    """
    info, method = METHODS[config.method.name], config.method
    if info.fold is not None:
        plain = info.fold({name: jnp.asarray(value) for name, value in values.items()}, method)
        provenance = {**provenance, "method": to_mapping(method)}
        method, values = plain.config, plain.values
    return PromptArtifact(
        method=to_mapping(method),
        layout=config.layout,
        task=to_mapping(config.task),
        backbone=identity_of(backbone),
        values={name: np.asarray(value) for name, value in values.items()},
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
    if config.regularize.reads_slots and not slots_of(config.method):
        raise UserError(
            f"regularize acts on the prompt's slots, and method {config.method.name} has none; set "
            "prompt_dropout, wayward and noise_on=prompt back"
        )
    if not config.data.packing:
        config.train.check_batch_size("data.batch_size", config.data.batch_size)
    encoder.lay([task.example(source[0], source.where(0)) for source in sources])
