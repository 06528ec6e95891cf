"""One of what a run trains: its options, data and first values, and what is kept of it."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprompt
from jaxprompt.artifact import PromptArtifact, check_backbone, load_artifact, save_artifact
from jaxprompt.backbone import Backbone, identity_of
from jaxprompt.config import RunConfig, step_options
from jaxprompt.data.encoder import TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task
from jaxprompt.model import PromptedT5
from jaxprompt.optim import resolve
from jaxprompt.prompts import METHODS, MethodInputs, NoPrompt, PromptMethod, slots_of
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.init import InitContext
from jaxprompt.prompts.similarity import average_tokens
from jaxprompt.prompts.soft import FixedPrompt
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
      teacher: rows of the prompt that it learns from, float [P, D]; None = there is none.
    """

    name: str
    config: RunConfig
    task: Task
    source: Source
    validation: Source
    encoder: TaskEncoder
    total_steps: int
    options: StepOptions
    teacher: np.ndarray | None = None

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
    options, teacher = step_options(config), None
    if config.distil.prompt:
        teacher = _source_rows(backbone, config.distil.prompt)
        distil = config.distil.weight * _likeness(config, backbone, teacher)
        options = dataclasses.replace(options, distil=distil)
    return Trainee(name, config, task, source, validation, encoder, steps, options, teacher)


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
        candidates=task.candidates or task.config.init_words,
        load=_rows_of,
        source=functools.partial(_source_rows, backbone),
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


def _source_rows(backbone: Backbone, path: str) -> np.ndarray:
    """Rows of a soft prompt of this backbone, float32 [P', D]; UserError for any other."""
    artifact = load_artifact(path)
    if artifact.method["name"] != "soft":
        raise UserError(
            f"prompt {path} is of method {artifact.method['name']}; a source is a soft prompt"
        )
    check_backbone(artifact, backbone.name, backbone.fingerprint, backbone.config.d_model)
    return artifact.values["prompt"].astype(np.float32)


def _likeness(config: RunConfig, backbone: Backbone, teacher: np.ndarray) -> float:
    """Similarity of the teacher to the task, above 0; 1 if it is not to be measured.

    Raises: UserError for a teacher that has other slots than the run, or is not similar at all.
    """
    distil, slots = config.distil, slots_of(config.method)
    if len(teacher) != slots:
        raise UserError(
            f"distil.prompt {distil.prompt} has {len(teacher)} slots, the run's method "
            f"{config.method.name} {slots}: they have to stand in the same ones"
        )
    if not distil.target:
        return 1.0
    similarity = average_tokens(teacher, _source_rows(backbone, distil.target))
    if similarity <= 0:
        raise UserError(
            f"distil.prompt {distil.prompt} has similarity {similarity:.3f} to distil.target "
            f"{distil.target}: it has nothing to teach; choose another (`jaxprompt transfer`)"
        )
    return similarity


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
    teachers: Sequence[Any] = (),
    texts: Sequence[Any] = (),
) -> tuple[Any, ArrayTree, ArrayTree]:
    """Graph definition, trained and frozen tree of a backbone with all prompts on it.

    Args:
      configs: of the runs; all tune the same.
      values: of each prompt's method, arrays or their shapes; not read with `tune: model`.
      teachers: rows of the prompt that each one learns from, None for one without; or none at all.
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
    sources = METHODS[config.method.name].sources(config.method)
    kept: dict[str, Any] = {}
    if sources:
        kept["sources"] = _digests(sources)
    if config.distil.prompt:
        paths = [path for path in (config.distil.prompt, config.distil.target) if path]
        kept["distil"] = {**to_mapping(config.distil), "rows": _digests(paths)}
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


def _digests(paths: Sequence[str]) -> dict[str, str]:
    """What the rows of prompts are, by path."""
    return {path: hashlib.sha256(_rows_of(path).tobytes()).hexdigest()[:16] for path in paths}


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
