"""`jaxprompt scale`: prompt tuning, model tuning or prompt design over backbones of several sizes.

Measures what is not measured yet, cell by cell, then draws one table and one picture of all, as
figures 1 and 3 of Lester et al. 2021.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.backbone import load_backbone
from jaxprompt.config import RunConfig
from jaxprompt.data.few_shot import with_shots
from jaxprompt.data.tasks import Task, TaskConfig
from jaxprompt.files import make_directory, remove_directory, write_file
from jaxprompt.identity import check_identity
from jaxprompt.measuring import Answers, machine
from jaxprompt.plots import write_scale_plot
from jaxprompt.scale_config import Cell, Scale, load_scale
from jaxprompt.scale_points import Point, names_of, panels_of, rows_of, told
from jaxprompt.schema import to_mapping
from jaxprompt.sweep import sweep
from jaxprompt.t5.backbones import fingerprint, read_config, resolve_backbone
from jaxprompt.t5.layers import body_size
from jaxprompt.tables import markdown_table, table

_KEPT = "result.json"


@dataclasses.dataclass(frozen=True)
class ScaleResult:
    """All points of a config, and sentences that say where the pictures are."""

    points: Sequence[Point]
    pictures: Sequence[str]


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt scale CONFIG [key=value ...] [--only LINE] [--json]`."""
    plan = load_scale(args.config, args.overrides, args.only)
    result = scale(plan)
    if result is None:
        only = [word for name in args.only for word in ("--only", name)]
        again = shlex.join(["jaxprompt", "scale", args.config, *args.overrides, *only])
        print(f"\nstopped before the end; go on with:\n  {again}", file=sys.stderr)
        return
    if args.json:
        for point in result.points:
            print(json.dumps(told(point), ensure_ascii=False), flush=True)
    rows, header = rows_of(result.points)
    print("\n".join(["", table(rows, header=header), "", *result.pictures]), file=sys.stderr)


def scale(plan: Scale) -> ScaleResult | None:
    """Measures every cell, resuming what is there; a cell that is done is not measured again.

    Each cell has its directory `output_dir/TASK/LINE/BACKBONE`, with a sweep's files; of tuned
    backbones nothing but the scores is kept. `scale.json`, `table.md` and
    `plots/scale.png`, or a picture for each of `pictures`, tell of all cells.

    Returns: None if a SIGTERM stopped it; the same call goes on.
    Raises: UserError as `sweep.sweep`, or for a directory that holds another cell's result.
    """
    points: list[Point] = []
    for number, cell in enumerate(plan.cells, 1):
        place = f"{cell.task}, {cell.line}, {cell.backbone} ({number} of {len(plan.cells)})"
        print(f"\n{place}", file=sys.stderr)
        found = _measured(cell, plan.zero_shot.get(cell.task, {}))
        if found is None:
            return None
        points += found
    directory = Path(plan.output_dir)
    write_file(directory / "scale.json", json.dumps(list(map(told, points)), indent=1))
    write_file(directory / "table.md", markdown_table(*rows_of(points)) + "\n")
    pictures = [
        write_scale_plot(directory / "plots" / f"{name}.png", panels_of(drawn))
        for name, lines in (plan.pictures or {"scale": names_of(points, "line")}).items()
        if (drawn := [point for line in lines for point in points if point.line == line])
    ]
    return ScaleResult(points, pictures)


def _measured(cell: Cell, others: Mapping[str, TaskConfig]) -> list[Point] | None:
    """A cell's points, of its own task first; kept in its directory. None if it was stopped."""
    directory = Path(cell.sweep.output_dir)
    source, kept = resolve_backbone(cell.config.backbone.name), directory / _KEPT
    weights = fingerprint(source)
    what = _identity(cell, others, weights)
    if kept.is_file():
        held = json.loads(kept.read_text(encoding="utf-8"))
        check_identity(held["what"], what, directory)
        points = held["points"]
    else:
        answered = _trained(cell, others) if cell.shots is None else _shown(cell, others)
        if answered is None:
            return None
        measured = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        points = [{"task": task, **one, **measured} for task, one in answered.items()]
        make_directory(directory)
        write_file(kept, json.dumps({"what": what, "points": points}, indent=1))
    about = {
        "trained_on": cell.task,
        "line": cell.line,
        "backbone": cell.backbone,
        "parameters": body_size(read_config(source)),
        "fingerprint": weights,
    }
    return [Point(**about, **point) for point in points]


def _identity(cell: Cell, others: Mapping[str, TaskConfig], backbone: str) -> dict[str, Any]:
    """What a cell's scores depend on; not where its files lie or how it is logged."""
    config = to_mapping(cell.config)
    for name in ("output_dir", "seed", "logging", "mesh"):
        config.pop(name)
    config["backbone"].pop("name")
    config |= {"backbone fingerprint": backbone, "seeds": cell.seeds, "shots": cell.shots}
    return {**config, "zero_shot": {name: to_mapping(task) for name, task in others.items()}}


def _trained(cell: Cell, others: Mapping[str, TaskConfig]) -> dict[str, Any] | None:
    """Task -> its scores, with what each seed trained. None if that was stopped."""
    swept = sweep(cell.sweep, all_may_diverge=True)
    if not swept.finished:
        return None
    results = list(swept.results.values())
    whole = [result for result in results if not result.diverged]
    tuned, first = cell.config.tune == "model", results[0]
    found = {cell.task: {
        "scores": [result.score for result in whole],
        "metrics": _by_name([result.metrics for result in whole]),
        "bare": first.baseline("bare"), "majority": first.baseline("majority"),
    }}  # fmt: skip

    def answering(task: Task) -> Iterator[Answers]:
        for result in whole:
            name = str(result.prompt) if tuned else cell.config.backbone.name
            prompt = None if tuned else result.prompt
            yield Answers(_loaded(cell.config, name), cell.config, prompt, task)

    found |= _others(cell, others, answering)
    if tuned:  # each is as large as the backbone, with its checkpoints several times that
        directory = Path(cell.sweep.output_dir)
        banks = [directory / f"bank-{number}" for number in range(len(results))]
        kept = [one.output_dir / name for one in results for name in ("best", "prompt")]
        for place in (directory / "checkpoints", *banks, *kept):
            remove_directory(place)
    return {task: {"diverged": len(results) - len(whole), **one} for task, one in found.items()}


def _shown(cell: Cell, others: Mapping[str, TaskConfig]) -> dict[str, Any]:
    """Task -> the backbone's scores with examples of the cell's task before the input."""
    assert cell.shots is not None
    own, shots = Task(cell.config.task), cell.shots
    backbone, rows = _loaded(cell.config, cell.config.backbone.name), own.open("train")

    def answering(task: Task) -> Iterator[Answers]:
        for seed in cell.seeds:
            text = with_shots(own, rows, shots, seed).config.input
            asked = Task(dataclasses.replace(task.config, input=text))
            yield Answers(backbone, cell.config, None, asked)

    found = {cell.task: _measured_on(cell, own, answering), **_others(cell, others, answering)}
    return {task: {"diverged": 0, **one} for task, one in found.items()}


def _others(
    cell: Cell, others: Mapping[str, TaskConfig], answering: Callable[[Task], Iterable[Answers]]
) -> dict[str, Any]:
    """The same for tasks that nothing was trained on."""
    return {
        f"{name} from {cell.task}": _measured_on(cell, Task(config), answering)
        for name, config in others.items()
    }


def _measured_on(
    cell: Cell, task: Task, answering: Callable[[Task], Iterable[Answers]]
) -> dict[str, Any]:
    """What each seed's answers to a task come to, and what they are compared with."""
    source = task.open("validation")
    alone = Answers(_loaded(cell.config, cell.config.backbone.name), cell.config, None, task)
    bare, majority = alone.baselines(source)
    metrics = [one.metrics(source) for one in answering(task)]
    return {
        "scores": list(map(alone.score_of, metrics)), "metrics": _by_name(metrics),
        "bare": bare, "majority": majority,
    }  # fmt: skip


def _by_name(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [one[name] for one in metrics] for name in (metrics[0] if metrics else ())}


def _loaded(config: RunConfig, name: str) -> Any:
    options = config.backbone
    return load_backbone(
        name, revision=options.revision, compute=options.compute(), quantize=options.quantize
    )
