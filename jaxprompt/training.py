"""Trains a prompt over a frozen backbone, several side by side, or with `tune: model` the backbone.

What `train` and `sweep` share. `_train` reads top to bottom; XPrompt comes to it twice.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprompt import pruning
from jaxprompt.backbone import Backbone, load_backbone
from jaxprompt.borrowed import initial_values, text_rows
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.compiled import CompiledStep, room_for_activations
from jaxprompt.config import RunConfig, dump
from jaxprompt.data.pipeline import Asked, examples_of
from jaxprompt.data.side_by_side import Part, SideBySide
from jaxprompt.evaluate import Evaluator
from jaxprompt.files import held, make_directory, size_on_disk, write_file
from jaxprompt.hosts import is_first
from jaxprompt.keeping import keep, prompts_of_tasks
from jaxprompt.logging import METRICS_FILE, RunLogger
from jaxprompt.loop import Loop, restore
from jaxprompt.members import Member, Progress
from jaxprompt.model import PromptedT5
from jaxprompt.notes import baseline_line, baselines, cut_lines, opening, packing_line
from jaxprompt.optim import learning_rate_at, make_optimizer
from jaxprompt.plots import write_run_plot
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.bank import PromptBank, members
from jaxprompt.schema import to_mapping
from jaxprompt.sharding import data_share, here, make_mesh, meet, replicate, shard_batch
from jaxprompt.steps import init_state
from jaxprompt.trainee import (
    Trainee,
    encoder_of,
    make_trainee,
    mean_of,
    run_identity,
    taken_apart,
    train_batches,
)
from jaxprompt.trees import size_in_bytes, split
from jaxprompt.typing import ArrayTree


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
      output_dir: the run's directory.
      prompt: directory of the best evaluation's artifact (a backbone with `tune: model`).
      metrics: of the best evaluation on the validation split; empty if there was none.
      score_names: which of them the best evaluation is chosen by, their mean.
      bare: the same of the backbone without a prompt.
      majority: the same of always answering with the most frequent target.
      best_step: when the best evaluation was.
      steps: steps taken so far.
      examples_per_second: of training, evaluation left out.
      prompt_bytes, backbone_bytes: the artifact's files; the backbone's parameters.
      finished: False if a SIGTERM stopped it; the same command goes on.
      diverged: the step at which its numbers were not finite, one of several; 0 = none.
      tasks: names of a mixture's; each has its own artifact, in `tasks/NAME/best`.
    """

    output_dir: Path
    prompt: Path
    metrics: Mapping[str, float]
    score_names: Sequence[str]
    bare: Mapping[str, float]
    majority: Mapping[str, float]
    best_step: int
    steps: int
    examples_per_second: float
    prompt_bytes: int
    backbone_bytes: int
    finished: bool
    diverged: int = 0
    tasks: Sequence[str] = ()

    @property
    def answering(self) -> Path:
        """An artifact that answers a task: of several tasks the first one's."""
        return self.output_dir / "tasks" / self.tasks[0] / "best" if self.tasks else self.prompt

    @property
    def score(self) -> float:
        """What the best evaluation is chosen by."""
        return mean_of(self.metrics, self.score_names)

    def baseline(self, name: str) -> float:
        """The same of "bare" or "majority"."""
        return mean_of({"bare": self.bare, "majority": self.majority}[name], self.score_names)


def train(config: RunConfig) -> TrainResult:
    """Trains a prompt, resuming what `output_dir` holds.

    Writes `config.yaml`, `metrics.jsonl`, `checkpoints/`, `best/` and `prompt/` (artifacts of the
    best and the last evaluation; ordinary backbone directories with `tune: model`) and `plots/`.

    Raises: UserError for a configuration, data or backbone that cannot work, a loss that is not
      finite, or a directory that holds another run.
    """
    return train_together([config], [""], config.output_dir)[0]


def train_together(
    configs: Sequence[RunConfig], names: Sequence[str], output_dir: str
) -> list[TrainResult]:
    """Trains several prompts over one backbone at once, resuming what `output_dir` holds.

    Each has its own data order, optimizer, early stopping and results, in its own `output_dir`;
    the first one's config says what they share: backbone, mesh, when to evaluate, save and log.
    One that diverges is taken out. `output_dir` gets `checkpoints/` and, of several, the means of
    what they log.

    Args:
      names: of each, for people and directories; one empty name for a run of its own.
    Raises: UserError as `train`, for prompts of different methods, or for more than fit in memory.
    """
    shared = configs[0]
    mesh = make_mesh(shared.mesh.data, shared.mesh.model)
    meet(mesh)
    backbone = load_backbone(
        shared.backbone.name,
        revision=shared.backbone.revision,
        mesh=mesh,
        weights_over_data=shared.mesh.weights_over_data,
        compute=shared.compute(),
        param_dtype="float32" if shared.tune == "model" else None,
        quantize="none" if shared.tune == "model" else shared.backbone.quantize,
    )
    if shared.tune == "prompt":
        compute = dataclasses.replace(backbone.compute, room=room_for_activations())
        backbone = dataclasses.replace(backbone, compute=compute)
    if any(map(pruning.is_pruned, configs)):
        return _train_twice(configs, names, output_dir, backbone, mesh)
    return _train(configs, names, output_dir, backbone, mesh)


def _train_twice(
    configs: Sequence[RunConfig],
    names: Sequence[str],
    directory: str,
    backbone: Backbone,
    mesh: Mesh,
) -> list[TrainResult]:
    """Soft prompts first, then what is left of each when it is pruned (XPrompt)."""
    pruning.check(configs, backbone)
    starts = [pruning.read_pruned(config, backbone) for config in configs]
    results: list[Any] = [None] * len(configs)
    if None in starts:
        first = list(map(pruning.unpruned, configs)), names, f"{directory}/{pruning.TUNED}"
        results = _train(*first, backbone, mesh)
        if not all(result.finished for result in results):
            return results
        for n, config in enumerate(configs):
            if starts[n] is None and not results[n].diverged:
                starts[n] = pruning.prune(config, backbone, mesh)
    left = {n: start for n, start in enumerate(starts) if start is not None}
    if left:
        second = [configs[n] for n in left], [names[n] for n in left], directory
        ended = _train(*second, backbone, mesh, list(left.values()))
        results = [ended.pop(0) if n in left else result for n, result in enumerate(results)]
    return results


def _train(
    configs: Sequence[RunConfig],
    names: Sequence[str],
    output_dir: str,
    backbone: Backbone,
    mesh: Mesh,
    starts: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[TrainResult]:
    """One training, from `starts` or from what each method begins with."""
    shared, directory = configs[0], Path(output_dir)

    # ---- tasks, data -------------------------------------------------------------------------
    trainees = [make_trainee(*both, backbone) for both in zip(names, configs, strict=True)]

    # ---- what is trained, by what step -------------------------------------------------------
    firsts = starts or [_first_values(one, backbone) for one in trainees]
    values = [replicate(mesh, first) for first in firsts]
    teachers = [replicate(mesh, one.teacher) for one in trainees]  # None stays None
    texts = [replicate(mesh, text_rows(one.config, backbone)) for one in trainees]
    graphdef, trained, frozen = taken_apart(configs, backbone.module(), values, teachers, texts)
    optimizers = [make_optimizer(one.config.optim, one.total_steps) for one in trainees]
    seeds = [one.config.seed for one in trainees]
    state = replicate(mesh, init_state(trained, optimizers, seeds))
    batches = SideBySide(
        [train_batches(one, mesh.shape["data"], data_share(mesh)) for one in trainees],
        [one.options for one in trainees],
        backbone.tokenizer.pad_id,
        mesh.shape["data"] // data_share(mesh)[1] * shared.train.accumulate,
    )

    # ---- evaluation and what is kept ---------------------------------------------------------
    longest = max((stream.input_buckets for stream in batches.streams), key=max)
    encoders = [part.encoder for one in trainees for part in one.parts]
    offsets = [0, *itertools.accumulate(len(one.parts) for one in trainees)]
    cuts: list[dict[str, Mapping[str, int]]] = [{} for _ in trainees]

    def keep_one(n: int, name: str, number: int, trained: ArrayTree, metrics: Mapping) -> None:
        whole = here((trained, frozen if shared.tune == "model" else {}))
        if is_first():
            tree = members(whole[0], len(trainees))[n]
            rest = (graphdef, whole[1])
            keep(trainees[n], backbone, name, number, tree, firsts[n], metrics, rest)

    def answering(trained: ArrayTree) -> tuple[Any, ArrayTree, ArrayTree]:
        """What answers: the prompts as trained; for a mixture those that are kept of each task."""
        if shared.tune == "model" or len(encoders) == len(trainees):
            return graphdef, trained, frozen
        trees = members(here(trained), len(trainees))
        kept = [
            prompt
            for one, first, tree in zip(trainees, firsts, trees, strict=True)
            for prompt in prompts_of_tasks(one, {**first, **tree["method"]})
        ]
        methods = [METHODS[method.name].make(replicate(mesh, own), method) for method, own in kept]
        return split(PromptedT5(backbone.module(), PromptBank(methods)))

    def evaluate(number: int, trained: ArrayTree, which: Sequence[int]) -> list[dict[str, float]]:
        asked = _side_by_side({
            offsets[n] + at: examples_of(part.task, part.validation)
            for n in which
            for at, part in enumerate(trainees[n].parts)
        })  # fmt: skip
        program, own_trained, own_frozen = answering(trained)
        evaluator = Evaluator(program, encoders, mesh=mesh, input_buckets=longest)
        results = evaluator.run_asked(own_trained, own_frozen, asked)
        all_metrics = []
        for n in which:
            own = results[offsets[n] : offsets[n + 1]]
            metrics = trainees[n].metrics_of([result.metrics for result in own])
            cuts[n]["validation"] = _added([result.cuts.report() for result in own])
            keep_one(n, "prompt", number, trained, metrics)
            all_metrics.append({**metrics, "score": mean_of(metrics, trainees[n].score_names)})
        return all_metrics

    def on_best(n: int, number: int, trained: ArrayTree, metrics: Mapping[str, float]) -> None:
        keep_one(n, "best", number, trained, metrics)

    # ---- run ---------------------------------------------------------------------------------
    identities = [run_identity(one.config, backbone) for one in trainees]
    identity = identities[0] if len(trainees) == 1 else dict(zip(names, identities, strict=True))
    with (
        held(directory, active=is_first()),
        closing(batches),
        Checkpoints(directory / "checkpoints", shared.train.keep) as checkpoints,
        contextlib.ExitStack() as loggers,
    ):
        lengths = [one.total_steps for one in trainees]
        state, all_progress, resumed = restore(checkpoints, identity, state, batches, lengths)
        logger = loggers.enter_context(RunLogger(
            directory, total_steps=max(lengths), resumed_step=resumed,
            score=f"eval/{trainees[0].score_names[0]}", config=dataclasses.asdict(shared),
            active=is_first(), **dataclasses.asdict(shared.logging),
        ))  # fmt: skip
        own_loggers = [logger] if not names[0] else [
            loggers.enter_context(RunLogger(
                one.directory, resumed_step=resumed, active=is_first(), screen=False
            ))
            for one in trainees
        ]  # fmt: skip
        for one in trainees if is_first() else ():
            write_file(make_directory(one.directory) / "config.yaml", dump(one.config))
        logger.note(opening(trainees, backbone, trained, directory, resumed))
        for line in dict.fromkeys(packing_line(stream) for stream in batches.streams):
            logger.note(line)
        _measure_baselines(trainees, all_progress, backbone, mesh)
        for line in dict.fromkeys(map(baseline_line, trainees, all_progress)):
            logger.note(line)
        loop = Loop(
            step=CompiledStep(graphdef, optimizers), frozen=frozen, batches=batches,
            put=lambda parts: [
                Part(kind, shard_batch(mesh, batch, own=True)) for kind, batch in parts
            ],
            config=shared.train, checkpoints=checkpoints, identity=identity, logger=logger,
            members=[
                Member(
                    one.name, one.total_steps, one.config.train.early_stopping,
                    functools.partial(learning_rate_at, one.config.optim, one.total_steps), own,
                )
                for one, own in zip(trainees, own_loggers, strict=True)
            ],
            evaluate=evaluate, on_best=on_best, on_end=batches.drop,
        )  # fmt: skip
        state = loop.run(state, all_progress)
        if fills := [stream.fill for stream in batches.streams if stream.fill]:
            logger.note(f"training rows were filled to {100 * sum(fills) / len(fills):.1f} %")
        for one, stream, own_cuts in zip(trainees, batches.streams, cuts, strict=True):
            own_cuts["training"] = stream.report()
            for line in cut_lines(own_cuts):
                logger.note(f"{one.name}: {line}" if one.name else line)
        for one, progress in zip(trainees, all_progress, strict=True) if is_first() else ():
            picture = write_run_plot(
                one.directory / METRICS_FILE,
                one.directory / "plots" / "run.png",
                title=f"{one.config.task.name} on {backbone.name}",
                baselines=baselines(one, progress),
            )
            if not one.name:
                logger.note(picture)

    # ---- results -----------------------------------------------------------------------------
    return [
        TrainResult(
            output_dir=one.directory,
            prompt=one.directory / "best",
            metrics=progress.best_metrics,
            score_names=one.score_names,
            bare=progress.baselines["bare"],
            majority=progress.baselines["majority"],
            best_step=progress.best_step,
            steps=progress.ended or int(jax.device_get(state.step)),
            examples_per_second=progress.examples_per_second,
            prompt_bytes=size_on_disk(one.directory / "best"),
            backbone_bytes=size_in_bytes(backbone.params),
            finished=progress.finished,
            diverged=progress.diverged,
            tasks=tuple(one.config.task.mixture),
        )
        for one, progress in zip(trainees, all_progress, strict=True)
    ]


def _first_values(one: Trainee, backbone: Backbone) -> dict[str, np.ndarray]:
    if one.config.tune == "model":
        return {}
    return initial_values(one.config, backbone, *(part.task for part in one.parts))


def _side_by_side(examples: Mapping[int, Iterator[Any]]) -> Iterator[Asked]:
    """Examples for several prompts, a row of each in turn."""
    for row in itertools.zip_longest(*examples.values()):
        for n, example in zip(examples, row, strict=True):
            if example is not None:
                yield Asked(example, n)


def _measure_baselines(
    trainees: Sequence[Trainee],
    all_progress: Sequence[Progress],
    backbone: Backbone,
    mesh: Mesh,
) -> None:
    """The bare backbone and the most frequent target, once for each task and its lengths."""
    known: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    graphdef, _, frozen = split(PromptedT5(backbone.module()))
    for one, progress in zip(trainees, all_progress, strict=True):
        if progress.baselines:
            continue
        measured = []
        for part in one.parts:
            config = part.config
            key = json.dumps([to_mapping(config.task), config.layout, to_mapping(config.data)])
            if key not in known:
                encoder = encoder_of(config, part.task, backbone, bare=True)
                (bare,) = Evaluator(graphdef, [encoder], mesh=mesh).run({}, frozen, part.validation)
                known[key] = bare.metrics, bare.majority
            measured.append(known[key])
        bares, majorities = zip(*measured, strict=True)
        progress.baselines = {"bare": one.metrics_of(bares), "majority": one.metrics_of(majorities)}


def _added(reports: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(report[name] for report in reports) for name in reports[0]}
