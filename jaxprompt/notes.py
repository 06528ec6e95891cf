"""What a run says of itself, in lines for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxprompt.backbone import Backbone
from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.members import Progress
from jaxprompt.trainee import Trainee
from jaxprompt.trees import count
from jaxprompt.typing import ArrayTree


def opening(
    trainees: Sequence[Trainee],
    backbone: Backbone,
    trained: ArrayTree,
    directory: Path,
    resumed: int | None,
) -> str:
    """What is trained, over what, on what, for how long."""
    tuning_model = trainees[0].config.tune == "model"
    frozen = "no frozen ones" if tuning_model else f"{count(backbone.params):,} frozen ones"
    kind = "" if backbone.quantize == "none" else f", {backbone.quantize}"
    name = f"{backbone.name}{kind}"
    start = "starting" if resumed is None else f"resuming at step {resumed:,}"
    prompts = f"{len(trainees)} prompts at once, " if len(trainees) > 1 else ""
    tasks = dict.fromkeys(
        f"task {one.config.task.name}, {len(one.source):,} examples" for one in trainees
    )
    return (
        f"{start}: {prompts}{count(trained):,} trained parameters, {frozen} ({name}); "
        f"{'; '.join(tasks)}, {max(one.total_steps for one in trainees):,} steps, output in "
        f"{directory}"
    )


def packing_line(stream: TrainBatches) -> str:
    """The shape of training rows."""
    shapes = stream.shapes
    if shapes.max_segments == 1:
        return f"not packed: {shapes.batch_size} rows"
    return (
        f"packed: {shapes.batch_size} rows of {shapes.input_buckets[-1]} positions, up to "
        f"{shapes.max_segments} examples in each"
    )


def baselines(one: Trainee, progress: Progress) -> dict[str, float]:
    """What its score is compared with, by name."""
    return {
        "bare backbone": progress.baselines["bare"][one.score_names[0]],
        "most frequent target": progress.baselines["majority"][one.score_names[0]],
    }


def baseline_line(one: Trainee, progress: Progress) -> str:
    """A line on these."""
    shown = ", ".join(f"{name} {value:.1f}" for name, value in baselines(one, progress).items())
    task = f"{one.config.task.name}: " if one.name else ""
    return f"{task}validation {one.score_names[0]}: {shown}"


def cut_lines(cuts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each kind of text that was cut off to fit; none was, no line."""
    return [
        f"{counts[f'cut_{side}s']:,} of {counts['examples']:,} {split} {side}s were cut to "
        f"data.max_{side}_length, {counts[f'cut_{side}_tokens']:,} tokens in all"
        for split, counts in cuts.items()
        for side in ("input", "target")
        if counts[f"cut_{side}s"]
    ]
