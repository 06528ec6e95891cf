"""`jaxprompt train`: trains a prompt over a frozen backbone, a sweep of them, or the backbone.

What it says at the end of a single run is here; `training` trains, `sweep` runs many.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jaxprompt.config import RunConfig
from jaxprompt.data.sources import has_split
from jaxprompt.hosts import is_first
from jaxprompt.prompts import slots_of
from jaxprompt.sweep import summary, sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.tables import table
from jaxprompt.trainee import part_config
from jaxprompt.training import TrainResult, train


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt train CONFIG [key=value ...]`."""
    words = [args.config, *args.overrides]
    plan = load_sweep(args.config, args.overrides)
    if plan.axes:
        swept = sweep(plan)
        told = summary(plan, swept, words) if is_first() else ""
    else:
        config = plan.runs[0].config
        result = train(config)
        told = _summary(config, result, words) if is_first() else ""
    if told:
        print(told, file=sys.stderr)


def _summary(config: RunConfig, result: TrainResult, words: Sequence[str]) -> str:
    """What the run gained, and what to type next."""
    again = shlex.join(["jaxprompt", "train", *words])
    if not result.finished:
        return f"\nstopped before the end; go on with:\n  {again}"
    names = [name for name in result.metrics if name in result.bare]
    what = "tuned backbone" if config.tune == "model" else f"prompt of {_length(config)} slots"
    rows: list[list[object]] = [
        ["most frequent target", *(result.majority.get(name, "") for name in names)],
        ["bare backbone", *(result.bare[name] for name in names)],
        [f"{what} (step {result.best_step:,})", *(result.metrics[name] for name in names)],
    ]
    task = part_config(config, next(iter(config.task.mixture), "")).task
    prompt, has_test = shlex.quote(str(result.answering)), has_split(task.source, "test")
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


def _length(config: RunConfig) -> int:
    """Slots of what is kept, or keys and values where those stand in no row."""
    return slots_of(config.method) or config.method.length


def _twice(config: RunConfig, result: TrainResult) -> list[str]:
    """Overrides that make a run twice as long as it was."""
    by_epochs = f"train.epochs={2 * config.train.epochs:g}"
    longer = by_epochs if config.train.epochs else f"train.steps={2 * result.steps}"
    return [longer, *(["train.early_stopping=0"] if config.train.early_stopping else [])]
