"""`jaxprompt pretrain`: trains all parameters of a T5 on a mixture, by the same step as `train`.

Span corruption makes a backbone, prefix language modelling adapts one (Lester et al. 2021, section
3.1), supervised entries make it steerable. The result is an ordinary Hugging Face directory.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from jaxprompt.backbone import load_backbone
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.config import PretrainConfig, dump, step_options
from jaxprompt.data.pretraining import MixtureBatches, MixtureConfig, MixtureEntry
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.files import held, make_directory, write_file
from jaxprompt.hosts import is_first
from jaxprompt.logging import METRICS_FILE, RunLogger
from jaxprompt.loop import Loop, restore
from jaxprompt.members import Member
from jaxprompt.model import PromptedT5
from jaxprompt.optim import learning_rate_at, make_optimizer, resolve
from jaxprompt.phases import load_phases
from jaxprompt.plots import write_run_plot
from jaxprompt.sharding import data_share, here, make_mesh, meet, replicate, shard_batch, to_host
from jaxprompt.steps import eval_step, init_state, train_step
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import T5
from jaxprompt.t5.weights import save_hf
from jaxprompt.trees import count, merge, split
from jaxprompt.typing import ArrayTree, Batch, UserError


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt pretrain CONFIG.yaml [key=value ...] [--only PHASE]`."""
    for config in load_phases(args.config, args.overrides, args.only).values():
        if not _run(config):
            break


def pretrain(config: PretrainConfig) -> Path:
    """Pretrains or adapts a backbone, resuming what `output_dir` holds.

    Returns: the directory of the finished backbone, `output_dir/backbone`.
    Raises: UserError for a configuration or data that cannot work.
    """
    _run(config)
    return Path(config.output_dir) / "backbone"


def _run(config: PretrainConfig) -> bool:
    """`pretrain`; whether it came to its end, not to a SIGTERM."""
    directory, exported = Path(config.output_dir), Path(config.output_dir) / "backbone"

    mesh = make_mesh(config.mesh.data, config.mesh.model)
    meet(mesh)

    # ---- backbone ----------------------------------------------------------------------------
    t5_config, params, tokenizer, tokenizer_dir = _start(config)
    model = PromptedT5(T5(t5_config, params, config.backbone.compute()))
    graphdef, trained, frozen = split(model, ...)

    # ---- optimizer and step ------------------------------------------------------------------
    if not config.mixture.entries:
        raise UserError("mixture.entries is empty; name what to train on")
    if config.train.epochs:
        raise UserError("train.epochs has no meaning for a mixture; set train.steps instead")
    config.train.check_batch_size("mixture.batch_size", config.mixture.batch_size)
    total_steps = config.train.steps or resolve(config.optim).steps
    optimizer = make_optimizer(config.optim, total_steps)
    options = step_options(config)
    step = jax.jit(functools.partial(train_step, graphdef, [optimizer], options), donate_argnums=0)
    state = replicate(mesh, init_state(trained, [optimizer], [config.seed]))

    # ---- evaluation and export ---------------------------------------------------------------
    score = jax.jit(functools.partial(eval_step, graphdef, options))
    validation = {
        name: _fixed_batches(config, entry, tokenizer, t5_config, mesh)
        for name, entry in _named(config.validation).items()
    }

    def export(trained: ArrayTree) -> None:
        whole = here((trained, frozen))
        if is_first():
            tree, dtype = merge(graphdef, *whole).backbone.tree(), config.export_dtype
            save_hf(exported, tree, t5_config, tokenizer_dir=tokenizer_dir, dtype=dtype)

    def evaluate(number: int, trained: ArrayTree, _: Sequence[int]) -> list[dict[str, float]]:
        metrics = {}
        for name, fixed in validation.items():
            sums = [
                to_host(score(trained, frozen, shard_batch(mesh, batch, own=True)))
                for batch in fixed
            ]
            total = {key: float(sum(part[key] for part in sums)) for key in sums[0]}
            metrics[f"{name}/loss"] = total["loss"] / max(total["units"], 1)
            metrics[f"{name}/accuracy"] = 100 * total["right"] / max(total["tokens"], 1)
            metrics[f"{name}/exact_match"] = 100 * total["exact"] / max(total["examples"], 1)
        losses = [value for name, value in metrics.items() if name.endswith("/loss")]
        metrics["score"] = -sum(losses) / len(losses) if losses else float(number)
        export(trained)
        return [metrics]

    # ---- run ---------------------------------------------------------------------------------
    batches = _batches(config.mixture, tokenizer, t5_config, config.seed, mesh)
    identity = {
        "model": dataclasses.asdict(t5_config),
        "optim": config.optim.recipe,
        "seed": config.seed,
    }
    folder = directory / "checkpoints"
    with (
        held(directory, active=is_first()),
        closing(batches),
        Checkpoints(folder, config.train.keep) as checkpoints,
    ):
        state, progress, resumed = restore(checkpoints, identity, state, batches, [total_steps])
        with RunLogger(
            directory, total_steps=total_steps, resumed_step=resumed,
            config=dataclasses.asdict(config), active=is_first(),
            **dataclasses.asdict(config.logging),
        ) as logger:  # fmt: skip
            if is_first():
                write_file(make_directory(directory) / "config.yaml", dump(config))
            start = "starting" if resumed is None else f"resuming at step {resumed:,}"
            logger.note(
                f"{start}: {count(trained):,} parameters, {total_steps:,} steps, output in "
                f"{directory}"
            )
            rate = functools.partial(learning_rate_at, config.optim, total_steps)
            member = Member("", total_steps, config.train.early_stopping, rate, logger)
            loop = Loop(
                step=step, frozen=frozen, batches=batches,
                put=functools.partial(shard_batch, mesh, own=True),
                config=config.train, checkpoints=checkpoints, identity=identity, logger=logger,
                evaluate=evaluate, members=[member],
            )  # fmt: skip
            state = loop.run(state, progress)
            for number, report in enumerate(batches.report()):
                logger.note(f"mixture entry {number}: {report}")
            title = f"pretraining, {count(trained) / 1e6:.1f} M parameters"
            if is_first():
                metrics, picture = directory / METRICS_FILE, directory / "plots" / "run.png"
                logger.note(write_run_plot(metrics, picture, title=title))
    return all(one.finished for one in progress)


def _start(config: PretrainConfig) -> tuple[T5Config, Any, Tokenizer, Path]:
    """Architecture, float32 parameters, and the vocabulary with its directory."""
    if config.model is None:
        backbone = load_backbone(
            config.backbone.name, revision=config.backbone.revision, quantize="none"
        )
        return backbone.config, backbone.params, backbone.tokenizer, backbone.directory
    directory = Path(config.tokenizer)
    tokenizer = load_tokenizer(directory)
    if tokenizer.size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.size} tokens, model.vocab_size is only "
            f"{config.model.vocab_size}"
        )
    params = init_params(config.model, jax.random.key(config.seed))
    return config.model, params, tokenizer, directory


def _named(entries: Sequence[MixtureEntry]) -> dict[str, MixtureEntry]:
    """Entries by objective; the second of one objective is `objective_2`, and so on."""
    named: dict[str, MixtureEntry] = {}
    for entry in entries:
        number = 1 + sum(other.objective == entry.objective for other in named.values())
        named[entry.objective + (f"_{number}" if number > 1 else "")] = entry
    return named


def _fixed_batches(
    config: PretrainConfig,
    entry: MixtureEntry,
    tokenizer: Tokenizer,
    t5_config: T5Config,
    mesh: jax.sharding.Mesh,
) -> list[Batch]:
    """The first `eval_batches` batches of an entry, on the host: the same in every evaluation."""
    alone = _alone(entry, config.mixture)
    with closing(_batches(alone, tokenizer, t5_config, 0, mesh)) as batches:
        return [next(batches) for _ in range(config.eval_batches)]


def _alone(entry: MixtureEntry, mixture: MixtureConfig) -> MixtureConfig:
    """A mixture of one entry with rows of the training shape, so that nothing compiles anew."""
    return dataclasses.replace(
        mixture,
        entries=(entry,),
        row_input_length=mixture.row_input_length
        or max(e.max_input_length for e in mixture.entries),
        row_target_length=mixture.row_target_length
        or max(e.max_target_length for e in mixture.entries),
    )


def _batches(
    mixture: MixtureConfig,
    tokenizer: Tokenizer,
    t5_config: T5Config,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> MixtureBatches:
    number, shares = data_share(mesh)
    return MixtureBatches(
        mixture,
        tokenizer,
        seed=seed,
        process_index=number,
        process_count=shares,
        start_id=t5_config.decoder_start_id,
    )
