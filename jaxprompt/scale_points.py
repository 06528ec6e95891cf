"""What `scale` measures, point by point, as rows of a table and panels of a picture."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.metrics import Repeated
from jaxprompt.plots import ScalePanel
from jaxprompt.typing import UserError

MEAN = "mean of the tasks"


@dataclasses.dataclass(frozen=True)
class Point(Repeated):
    """What a line comes to over one backbone, on one task.

    Attributes:
      task, trained_on: the same, or "B from A" and A: task B with what was trained on A.
      parameters: of the backbone, embedding table and output layer left out.
      fingerprint: of its weights; a line may have others of that name and size.
      scores: after training, of each seed that did not diverge; percent, the mean of its metrics.
      metrics: the same metric by metric.
      diverged: seeds whose numbers were not finite.
      bare, majority: of the backbone by itself, and of always giving the most frequent target.
      machine, date: where and when it was measured.
    """

    task: str
    trained_on: str
    line: str
    backbone: str
    parameters: int
    fingerprint: str
    scores: Sequence[float]
    metrics: Mapping[str, Sequence[float]]
    diverged: int
    bare: float
    majority: float
    machine: str
    date: str

    @property
    def transferred(self) -> bool:
        """Whether nothing was trained on its task."""
        return self.task != self.trained_on


def told(point: Point) -> dict[str, Any]:
    """A point as JSON-ready values."""
    return {**dataclasses.asdict(point), "mean": point.mean, "stdev": point.deviation}


def read_points(path: Path) -> list[Point]:
    """The points of a `scale.json`.

    Raises: UserError for a file that is not there or holds none.
    """
    names = [field.name for field in dataclasses.fields(Point)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Point(**{name: one[name] for name in names}) for one in content]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no scale.json of `jaxprompt scale`: {error!r}") from error


def names_of(points: Iterable[Point], field: str) -> list[str]:
    """Values of a field, in order of appearance."""
    return list(dict.fromkeys(getattr(point, field) for point in points))


def _tasks(points: Sequence[Point]) -> tuple[list[str], int]:
    """Tasks that were trained on, then the others; and how many the former are."""
    own = names_of([point for point in points if not point.transferred], "task")
    others = names_of([point for point in points if point.transferred], "task")
    return own + others, len(own)


def _sizes(points: Iterable[Point]) -> dict[str, int]:
    """Backbones by size. One name may have several directories, but they are of one size."""
    sizes = {point.backbone: point.parameters for point in points}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def rows_of(points: Sequence[Point]) -> tuple[list[list[object]], list[str]]:
    """A row for each line over each backbone, then what they are compared with.

    The mean is of the tasks that were trained on.
    """
    tasks, own = _tasks(points)
    at = {(p.task, p.line, p.backbone): p for p in points}
    rows: list[list[object]] = []
    for line in names_of(points, "line"):
        for backbone in _sizes(points):
            found = [at.get((task, line, backbone)) for task in tasks]
            if any(found):
                means = [point and point.mean for point in found[:own]]
                rows.append([line, backbone, *map(_spread, found), _mean(means)])
    weights = {(p.backbone, p.fingerprint): p.line for p in reversed(points)}
    for backbone in _sizes(points):
        for line in (line for (name, _), line in reversed(weights.items()) if name == backbone):
            found = [at.get((task, line, backbone)) for task in tasks]
            bare = [None if point is None else point.bare for point in found]
            name = "bare backbone" if line == points[0].line else f"bare backbone of {line}"
            rows.append(
                [name, backbone, *("" if b is None else b for b in bare), _mean(bare[:own])]
            )
    majority = [next(point.majority for point in points if point.task == task) for task in tasks]
    rows.append(["most frequent target", "", *majority, _mean(majority[:own])])
    header = ["validation, %", "backbone", *tasks, MEAN]
    if own == 1:
        return [row[:-1] for row in rows], header[:-1]
    return rows, header


def _spread(point: Point | None) -> str:
    if point is None or point.mean is None:
        return "" if point is None else "diverged"
    spread = "" if point.deviation is None else f" ± {point.deviation:.1f}"
    return f"{point.mean:.1f}{spread}" + (
        f" (+{point.diverged} diverged)" if point.diverged else ""
    )


def _mean(scores: Sequence[float | None]) -> object:
    """Of all tasks; nothing where one is missing."""
    there = [score for score in scores if score is not None]
    return statistics.fmean(there) if len(there) == len(scores) else ""


def panels_of(points: Sequence[Point]) -> dict[str, ScalePanel]:
    """What to draw, the mean of the tasks that were trained on first if there are several."""
    tasks, own = _tasks(points)
    panels = {task: _panel([p for p in points if p.task == task]) for task in tasks}
    if own > 1:
        trained = [point for point in points if not point.transferred]
        panels = {MEAN: _panel(_averaged(trained)), **panels}
    return panels


def _panel(points: Sequence[Point]) -> ScalePanel:
    sizes = _sizes(points)
    lines = {
        line: sorted((p.parameters, p.scores) for p in points if p.line == line and p.scores)
        for line in names_of(points, "line")
    }
    bare = {p.parameters: p.bare for p in reversed(points)}  # of several the first line's
    majority = statistics.fmean(p.majority for p in points) if points else 0.0
    return ScalePanel(sizes, lines, sorted(bare.items()), majority)


def _averaged(points: Sequence[Point]) -> list[Point]:
    """Of each line over each backbone the mean over tasks, where all have all their seeds."""
    tasks, averaged = names_of(points, "task"), []
    for line in names_of(points, "line"):
        for backbone in _sizes(points):
            own = [p for p in points if (p.line, p.backbone) == (line, backbone)]
            counts = {len(p.scores) for p in own}
            if len(own) < len(tasks) or len(counts) > 1:
                continue
            seeds = zip(*(p.scores for p in own), strict=True)
            averaged.append(dataclasses.replace(
                own[0],
                task=MEAN,
                trained_on=MEAN,
                scores=[statistics.fmean(scores) for scores in seeds],
                bare=statistics.fmean(p.bare for p in own),
                majority=statistics.fmean(p.majority for p in own),
            ))  # fmt: skip
    return averaged
