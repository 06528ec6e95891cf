"""`jaxprompt train`: trains a prompt over a frozen backbone, or with `tune: model` the backbone.

Reads top to bottom: backbone, task, prompt, step, evaluation, run, summary.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprompt
from jaxprompt.artifact import PromptArtifact, load_artifact, save_artifact
from jaxprompt.backbone import Backbone, identity_of, load_backbone
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.config import RunConfig, dump, load_config
from jaxprompt.data.encoder import TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.sources import Source, has_split
from jaxprompt.data.tasks import Task
from jaxprompt.evaluate import Evaluator
from jaxprompt.files import held, make_directory, write_file
from jaxprompt.logging import METRICS_FILE, RunLogger, table
from jaxprompt.loop import Loop, restore
from jaxprompt.model import PromptedT5
from jaxprompt.optim import learning_rate_at, make_optimizer, resolve
from jaxprompt.plots import write_run_plot
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.init import InitContext, initial_rows
from jaxprompt.schema import to_mapping
from jaxprompt.sharding import make_mesh, replicate, shard_batch
from jaxprompt.steps import StepOptions, init_state, train_step
from jaxprompt.t5.weights import save_hf
from jaxprompt.trees import count, merge, size_in_bytes, split
from jaxprompt.typing import ArrayTree, UserError


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
      output_dir: the run's directory.
      prompt: directory of the best evaluation's artifact (a backbone with `tune: model`).
      metrics: of the best evaluation on the validation split.
      bare: the same of the backbone without a prompt.
      majority: the same of always answering with the most frequent target.
      best_step: when the best evaluation was.
      steps: steps taken so far.
      examples_per_second: of training, evaluation left out.
      prompt_bytes, backbone_bytes: the artifact's files; the backbone's parameters.
      finished: False if a SIGTERM stopped it; the same command goes on.
    """

    output_dir: Path
    prompt: Path
    metrics: Mapping[str, float]
    bare: Mapping[str, float]
    majority: Mapping[str, float]
    best_step: int
    steps: int
    examples_per_second: float
    prompt_bytes: int
    backbone_bytes: int
    finished: bool


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt train CONFIG [key=value ...]`."""
    config = load_config(args.config, args.overrides)
    result = train(config)
    print(_summary(config, result, [args.config, *args.overrides]), file=sys.stderr)


def train(config: RunConfig) -> TrainResult:
    """Trains a prompt, resuming what `output_dir` holds.

    Writes `config.yaml`, `metrics.jsonl`, `checkpoints/`, `best/` and `prompt/` (artifacts of the
    best and the last evaluation; ordinary backbone directories with `tune: model`) and `plots/`.

    Raises: UserError for a configuration, data or backbone that cannot work, a loss that is not
      finite, or a directory that holds another run.
    """
    directory = Path(config.output_dir)
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    tuning_model = config.tune == "model"

    # ---- backbone, task, data ----------------------------------------------------------------
    backbone = load_backbone(
        config.backbone.name,
        revision=config.backbone.revision,
        mesh=mesh,
        compute=config.backbone.compute(),
        param_dtype="float32" if tuning_model else None,
    )
    task = Task(config.task)
    source = task.open("train")
    layout = Layout.parse(config.layout, 0 if tuning_model else config.method.length)
    encoder = _encoder(config, task, layout, backbone)
    total_steps = _total_steps(config, len(source))
    validation = task.open("validation")
    _check(config, encoder, [source, validation])

    # ---- what is trained ---------------------------------------------------------------------
    bare_graphdef, _, bare_frozen = split(PromptedT5(backbone.module()))
    if tuning_model:
        graphdef, trained, frozen = split(PromptedT5(backbone.module()), ...)
    else:
        values = replicate(mesh, initial_values(config, backbone, task))
        method = METHODS[config.method.name].make(values, config.method)
        graphdef, trained, frozen = split(PromptedT5(backbone.module(), method))

    # ---- optimizer and step ------------------------------------------------------------------
    recipe = resolve(config.optim)
    optimizer = make_optimizer(config.optim, total_steps)
    dropout, z_loss = config.backbone.dropout, config.train.z_loss
    options = StepOptions(
        z_loss=recipe.z_loss if z_loss is None else z_loss,
        loss_by=config.train.loss_by,
        dropout_rate=recipe.dropout if dropout is None else dropout,
        accumulate=config.train.accumulate,
    )
    step = jax.jit(functools.partial(train_step, graphdef, optimizer, options), donate_argnums=0)
    state = replicate(mesh, init_state(trained, optimizer, config.seed))

    # ---- evaluation and what is kept ---------------------------------------------------------
    batches = TrainBatches(
        encoder, source, seed=config.seed,
        row_multiple=mesh.shape["data"] * config.train.accumulate,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    evaluator = Evaluator(graphdef, [encoder], mesh=mesh, input_buckets=batches.input_buckets)
    score_name = config.train.metric or task.metrics[0]
    cuts: dict[str, Mapping[str, int]] = {}

    def keep(place: Path, number: int, trained: ArrayTree, metrics: Mapping[str, float]) -> None:
        if jax.process_index():
            return
        if tuning_model:
            tree = merge(graphdef, trained, frozen).backbone.tree()
            save_hf(place, tree, backbone.config, tokenizer_dir=backbone.directory)
            return
        provenance = {
            "recipe": config.optim.recipe, "steps": number, "seed": config.seed,
            "metrics": dict(metrics), "jaxprompt": jaxprompt.__version__,
        }  # fmt: skip
        save_artifact(place, artifact_of(config, backbone, trained["method"], provenance))

    def evaluate(number: int, trained: ArrayTree) -> dict[str, float]:
        (result,) = evaluator.run(trained, frozen, validation)
        metrics, cuts["validation"] = result.metrics, result.cuts.report()
        keep(directory / "prompt", number, trained, metrics)
        score = metrics[score_name] if config.train.metric else _mean(metrics, task.metrics)
        return {**metrics, "score": score}

    def on_best(number: int, trained: ArrayTree, metrics: Mapping[str, float]) -> None:
        keep(directory / "best", number, trained, metrics)

    # ---- run ---------------------------------------------------------------------------------
    identity = run_identity(config, backbone)
    with (
        held(directory, active=jax.process_index() == 0),
        closing(batches),
        Checkpoints(directory / "checkpoints", config.train.keep) as checkpoints,
    ):
        state, progress, resumed = restore(
            checkpoints, identity, state, batches, config.train, total_steps
        )
        with RunLogger(
            make_directory(directory), total_steps=total_steps, resumed_step=resumed,
            score=f"eval/{score_name}", config=dataclasses.asdict(config),
            active=jax.process_index() == 0,
            **dataclasses.asdict(config.logging),
        ) as logger:  # fmt: skip
            write_file(directory / "config.yaml", dump(config))
            logger.note(_opening(config, backbone, trained, len(source), total_steps, resumed))
            if config.data.packing:
                logger.note(_packing(batches))
            if not progress.baselines:
                bare_encoder = _encoder(config, task, Layout.parse(config.layout, 0), backbone)
                (bare,) = Evaluator(bare_graphdef, [bare_encoder], mesh=mesh).run(
                    {}, bare_frozen, validation
                )
                progress.baselines = {"bare": bare.metrics, "majority": bare.majority}
            baselines = {
                "bare backbone": progress.baselines["bare"][score_name],
                "most frequent target": progress.baselines["majority"][score_name],
            }
            shown = ", ".join(f"{name} {value:.1f}" for name, value in baselines.items())
            logger.note(f"validation {score_name}: {shown}")
            loop = Loop(
                step=step, frozen=frozen, batches=batches, put=functools.partial(shard_batch, mesh),
                config=config.train, total_steps=total_steps, checkpoints=checkpoints,
                identity=identity, logger=logger, evaluate=evaluate, on_best=on_best,
                learning_rate=functools.partial(learning_rate_at, config.optim, total_steps),
            )  # fmt: skip
            state = loop.run(state, progress)
            logger.note(f"training rows were filled to {100 * batches.fill:.1f} %")
            cuts["training"] = batches.report()
            for line in _cut_lines(cuts):
                logger.note(line)
            picture = write_run_plot(
                directory / METRICS_FILE,
                directory / "plots" / "run.png",
                title=f"{task.config.name} on {backbone.name}",
                baselines=baselines,
            )
            logger.note(picture)

    # ---- summary -----------------------------------------------------------------------------
    return TrainResult(
        output_dir=directory,
        prompt=directory / "best",
        metrics=progress.best_metrics,
        bare=progress.baselines["bare"],
        majority=progress.baselines["majority"],
        best_step=progress.best_step,
        steps=int(jax.device_get(state.step)),
        examples_per_second=progress.examples_per_second,
        prompt_bytes=_bytes_in(directory / "best"),
        backbone_bytes=size_in_bytes(backbone.params),
        finished=progress.finished,
    )


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


def _encoder(config: RunConfig, task: Task, layout: Layout, backbone: Backbone) -> TaskEncoder:
    return TaskEncoder(
        task, layout, backbone.tokenizer, config.data, start_id=backbone.config.decoder_start_id
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


def _mean(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(metrics[name] for name in names) / len(names)


def _opening(
    config: RunConfig,
    backbone: Backbone,
    trained: ArrayTree,
    rows: int,
    steps: int,
    resumed: int | None,
) -> str:
    frozen = (
        "no frozen ones" if config.tune == "model" else f"{count(backbone.params):,} frozen ones"
    )
    start = "starting" if resumed is None else f"resuming at step {resumed:,}"
    return (
        f"{start}: {count(trained):,} trained parameters, {frozen} ({backbone.name}); task "
        f"{config.task.name}, {rows:,} examples, {steps:,} steps, output in {config.output_dir}"
    )


def _packing(batches: TrainBatches) -> str:
    shapes = batches.shapes
    return (
        f"packed: {shapes.batch_size} rows of {shapes.input_buckets[-1]} positions, up to "
        f"{shapes.max_segments} examples in each"
    )


def _cut_lines(cuts: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"{counts[f'cut_{side}s']:,} of {counts['examples']:,} {split} {side}s were cut to "
        f"data.max_{side}_length, {counts[f'cut_{side}_tokens']:,} tokens in all"
        for split, counts in cuts.items()
        for side in ("input", "target")
        if counts[f"cut_{side}s"]
    ]


def _summary(config: RunConfig, result: TrainResult, words: Sequence[str]) -> str:
    """What the run gained, and what to type next."""
    again = shlex.join(["jaxprompt", "train", *words])
    if not result.finished:
        return f"\nstopped before the end; go on with:\n  {again}"
    names = [name for name in result.metrics if name in result.bare]
    what = "tuned backbone" if config.tune == "model" else f"prompt of {config.method.length} slots"
    rows: list[list[object]] = [
        ["most frequent target", *(result.majority.get(name, "") for name in names)],
        ["bare backbone", *(result.bare[name] for name in names)],
        [f"{what} (step {result.best_step:,})", *(result.metrics[name] for name in names)],
    ]
    prompt, has_test = shlex.quote(str(result.prompt)), has_split(config.task.source, "test")
    lines = [
        "",
        table(rows, header=["validation, %", *names]),
        "",
        f"{result.examples_per_second:.0f} examples/s in training; {what}: "
        f"{result.prompt_bytes:,} bytes, backbone: {result.backbone_bytes:,} bytes",
    ]
    if config.tune == "prompt":
        kept = [word for word in words if not word.startswith(("train.steps=", "train.epochs="))]
        longer = shlex.join(["jaxprompt", "train", *kept, *_twice(config, result)])
        lines += [
            "",
            "next:",
            f"  echo 'your own text' | jaxprompt predict {prompt} --input -",
            *([f"  jaxprompt evaluate {prompt} --split test"] if has_test else []),
            f"  jaxprompt inspect {prompt}",
            f"  {longer}    # goes on with the run",
        ]
    return "\n".join(lines)


def _twice(config: RunConfig, result: TrainResult) -> list[str]:
    """Overrides that make a run twice as long as it was."""
    by_epochs = f"train.epochs={2 * config.train.epochs:g}"
    longer = by_epochs if config.train.epochs else f"train.steps={2 * result.steps}"
    return [longer, *(["train.early_stopping=0"] if config.train.early_stopping else [])]


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*")) if directory.is_dir() else 0
