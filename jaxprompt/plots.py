"""Pictures: a run's loss and scores, from metrics.jsonl; the scores of a sweep; a prompt library.

Called by training, pretrain and sweep at the end, and by transfer. matplotlib comes with the
extra `plots`; it is used through figure objects, without pyplot and its global state.
"""

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EVAL = "eval/"
# Okabe & Ito 2008: eight colours that the colour-blind tell apart.
_BLUE, _VERMILION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_PURPLE, _SKY, _GREY = "#CC79A7", "#56B4E9", "#666666"
_SCORE_COLOURS = (_BLUE, _VERMILION, _GREEN, _ORANGE, _PURPLE, _SKY)
_MARKERS = "osD^vP"
_NO_MATPLOTLIB = "no picture: it needs matplotlib (pip install 'jaxprompt[plots]')"
_NAME_LENGTH = 48  # of a row
_DASHES = ((0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)))


def write_run_plot(
    metrics_jsonl: Path | str,
    png: Path | str,
    *,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
) -> str:
    """Draws loss and scores over steps into a PNG of 1200 pixels' width.

    Args:
      metrics_jsonl: the run's records; `loss` is raw and smoothed, `eval/.../loss` beside it,
        every other `eval/...` a score in percent. Lines that are no record are passed over.
      png: replaced as a whole; its directory is made where missing.
      title: for instance "sst2 on jaxprompt-mini".
      baselines: name -> percent, dashed lines among the scores (majority, bare backbone).
    Returns: one sentence for the user: where the picture is, or why there is none.
    """
    drawing = _drawing()
    if drawing is None:
        return _NO_MATPLOTLIB
    curves = _curves(Path(metrics_jsonl))
    held_out = [n for n in curves if n.startswith(EVAL) and n.rpartition("/")[2] == "loss"]
    losses = {name: curves[name] for name in ("loss", *held_out) if name in curves}
    scores = {n: c for n, c in curves.items() if n.startswith(EVAL) and n not in losses}
    panels = [
        (draw, data) for draw, data in ((_draw_losses, losses), (_draw_scores, scores)) if data
    ]
    if not panels:
        return f"no picture: {metrics_jsonl} holds neither a loss nor a score"
    figure = drawing.figures.Figure(figsize=(8, 1 + 3 * len(panels)), dpi=150, layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (draw, data) in zip(all_axes, panels, strict=True):
        draw(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    if scores:
        _draw_baselines(all_axes[-1], baselines or {})
    for axes in all_axes:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    all_axes[-1].set_xlabel("step")
    all_axes[-1].locator_params(axis="x", integer=True)
    figure.suptitle(title, fontweight="bold")
    return _saved(drawing, figure, png)


class SweepRow(NamedTuple):
    """One setting of a sweep: its name, the scores of its runs and what they are compared with."""

    name: str
    scores: Sequence[float]
    bare: float
    majority: float


def write_sweep_plot(
    png: Path | str,
    rows: Sequence[SweepRow],
    *,
    title: str = "",
    what: str = "best validation score, %",
) -> str:
    """Draws the scores of every setting, one below the other: a dot a run, a bar at their mean.

    Args:
      png: replaced as a whole; its directory is made where missing.
      rows: scores in percent, from the top.
      what: the scores.
    Returns: as `write_run_plot`.
    """
    drawing = _drawing()
    if drawing is None:
        return _NO_MATPLOTLIB
    figure = drawing.figures.Figure(
        figsize=(8, 1.6 + 0.34 * len(rows)), dpi=150, layout="constrained"
    )
    axes = figure.subplots()
    for place, row in enumerate(rows):
        first = place == 0
        marks = {"linestyle": "none", "markersize": 6, "zorder": 2}
        axes.plot([row.bare], [place], marker="|", color=_GREY, markeredgewidth=2,
                  label="bare backbone" if first else None, **marks)  # fmt: skip
        axes.plot([row.majority], [place], marker="x", color=_GREY,
                  label="most frequent target" if first else None, **marks)  # fmt: skip
        axes.plot(row.scores, [place] * len(row.scores), marker="o", color=_BLUE, alpha=0.6,
                  label="a run" if first else None, **marks)  # fmt: skip
        if row.scores:
            mean = sum(row.scores) / len(row.scores)
            axes.plot([mean], [place], marker="D", color=_VERMILION,
                      label="mean" if first else None, **{**marks, "zorder": 3})  # fmt: skip
    axes.set_yticks(range(len(rows)), [_fitting(row.name) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(what)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, fontweight="bold")
    return _saved(drawing, figure, png)


class ScalePanel(NamedTuple):
    """One task of a picture over sizes.

    Attributes:
      sizes: name of each backbone -> its parameters, which are its place.
      lines: name of each -> (parameters, scores in percent of its seeds), in order.
      bare: (parameters, score) of the backbones by themselves.
      majority: score of the most frequent target.
    """

    sizes: Mapping[str, int]
    lines: Mapping[str, Sequence[tuple[int, Sequence[float]]]]
    bare: Sequence[tuple[int, float]]
    majority: float


def write_scale_plot(
    png: Path | str, panels: Mapping[str, ScalePanel], *, what: str = "validation score, %"
) -> str:
    """Draws scores over sizes of backbones, a panel a task: means, bars of a standard deviation.

    Args:
      png: replaced as a whole; its directory is made where missing.
      panels: by their titles.
      what: the scores.
    Returns: as `write_run_plot`.
    """
    drawing = _drawing()
    if drawing is None:
        return _NO_MATPLOTLIB
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.lines))
    beside = 0.7 + 0.08 * max([20, *map(len, names)])  # inches of the legend
    figure = drawing.figures.Figure(
        figsize=(3.2 * columns + beside, 0.9 + 2.6 * rows), dpi=150, layout="constrained"
    )
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    known: dict[str, Any] = {}
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=False):
        known |= _draw_panel(axes, panel, names)
        axes.set_title(title, fontsize="medium")
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes in all_axes[::columns]:
        axes.set_ylabel(what)
    figure.supxlabel("parameters of the backbone, embeddings left out", fontsize="medium")
    figure.legend(known.values(), known.keys(), loc="outside right upper", frameon=False)
    return _saved(drawing, figure, png)


def _draw_panel(axes: Any, panel: ScalePanel, names: Sequence[str]) -> dict[str, Any]:
    """Returns: what the legend shows, by name."""
    known: dict[str, Any] = {}
    for name, points in panel.lines.items():
        if not points:
            continue
        place = names.index(name)
        means = [float(np.mean(scores)) for _, scores in points]
        spreads = [float(np.std(s, ddof=1)) if len(s) > 1 else 0.0 for _, s in points]
        known[name] = axes.errorbar(
            [size for size, _ in points], means, yerr=spreads, capsize=3, markersize=5,
            color=_SCORE_COLOURS[place % len(_SCORE_COLOURS)], linewidth=1.6,
            marker=_MARKERS[place % len(_MARKERS)],
        )  # fmt: skip
    if panel.bare:
        (known["bare backbone"],) = axes.plot(
            *zip(*panel.bare, strict=True), color=_GREY, marker=".", linestyle=_DASHES[0]
        )
    known["most frequent target"] = axes.axhline(
        panel.majority, color=_GREY, linestyle=_DASHES[1], linewidth=1.3
    )
    axes.set_xscale("log")
    axes.set_xticks(list(panel.sizes.values()), list(panel.sizes))
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return known


def write_similarity_plot(
    png: Path | str,
    names: Sequence[str],
    similarity_QQ: np.ndarray,
    joints: Sequence[tuple[Sequence[int], Sequence[int], float]],
    *,
    title: str = "",
) -> str:
    """Draws how like prompts are: a map of all pairs, above it the tree that they are ordered by.

    Args:
      png: replaced as a whole; its directory is made where missing.
      joints: members of two groups that join, and how high; the last one joins all.
    Returns: as `write_run_plot`.
    """
    drawing = _drawing()
    if drawing is None:
        return _NO_MATPLOTLIB
    order = [*joints[-1][0], *joints[-1][1]] if joints else list(range(len(names)))
    tops: dict[tuple[int, ...], tuple[float, float]] = {}
    tops |= {(number,): (float(x), 0.0) for x, number in enumerate(order)}
    side = 4 + 0.4 * len(names)
    figure = drawing.figures.Figure(figsize=(side, side), dpi=150, layout="constrained")
    tree, axes = figure.subplots(2, height_ratios=[1, 4])
    for left, right, height in joints:
        (x, low), (other_x, other_low) = tops[tuple(left)], tops[tuple(right)]
        tree.plot([x, x, other_x, other_x], [low, height, height, other_low], color=_BLUE)
        tops[(*left, *right)] = (x + other_x) / 2, height
    tree.set_xlim(-0.5, len(names) - 0.5)
    tree.set_xticks([])
    tree.set_ylabel("1 - cosine")
    tree.spines[["top", "right", "bottom"]].set_visible(False)
    shown_QQ = similarity_QQ[np.ix_(order, order)]
    picture = axes.imshow(shown_QQ, cmap="viridis", aspect="auto")
    middle = (shown_QQ.min() + shown_QQ.max()) / 2
    for (row, column), value in np.ndenumerate(shown_QQ):
        colour = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    labels = [_fitting(names[number]) for number in order]
    axes.set_yticks(range(len(names)), labels)
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    figure.colorbar(picture, ax=axes, label="cosine")
    figure.suptitle(title, fontweight="bold")
    return _saved(drawing, figure, png)


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Gaussian mean over neighbours, standard deviation `width` places, float64 [len].

    At both ends the weights that fall outside are left out and the rest add up to one.
    """
    half = min(3 * width, (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / max(width, 1)) ** 2)
    sums = np.convolve(np.asarray(values, np.float64), kernel, mode="same")
    return sums / np.convolve(np.ones(len(values)), kernel, mode="same")


_Curve = tuple[list[float], list[float]]  # steps, values


def _curves(path: Path) -> dict[str, _Curve]:
    curves: dict[str, _Curve] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def _draw_losses(axes: Any, losses: Mapping[str, _Curve]) -> None:
    axes.set_ylabel("loss")
    shown: list[float] = []
    if "loss" in losses:
        steps, values = losses["loss"]
        smoothed = smooth(values, width=len(values) // 80)
        axes.plot(steps, values, color=_SKY, linewidth=0.8, alpha=0.6, label="training, raw")
        axes.plot(steps, smoothed, color=_BLUE, linewidth=2, label="training, smoothed")
        # A few spikes must not flatten the curve that matters.
        shown += [*np.percentile(values, [0, 99]), *smoothed]
    held_out = {name: curve for name, curve in losses.items() if name != "loss"}
    for place, (name, (steps, values)) in enumerate(held_out.items(), 1):  # 0 is training's blue
        of_what = name.removeprefix(EVAL).removesuffix("loss").rstrip("/").replace("_", " ")
        style = {
            "color": _SCORE_COLOURS[place % len(_SCORE_COLOURS)],
            "marker": _MARKERS[(place - 1) % len(_MARKERS)], "markersize": 4, "linewidth": 1.5,
        }  # fmt: skip
        axes.plot(
            steps, values, label=f"evaluation, {of_what}" if of_what else "evaluation", **style
        )
        shown += values
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _draw_scores(axes: Any, scores: Mapping[str, _Curve]) -> None:
    axes.set_ylabel("score, %")
    for place, (name, (steps, values)) in enumerate(scores.items()):
        axes.plot(
            steps,
            values,
            color=_SCORE_COLOURS[place % len(_SCORE_COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=4,
            linewidth=1.8,
            linestyle="-" if place < len(_SCORE_COLOURS) else "--",
            label=f"{name.removeprefix(EVAL).replace('_', ' ')}, last {values[-1]:.1f}",
        )


def _draw_baselines(axes: Any, baselines: Mapping[str, float]) -> None:
    for place, (name, percent) in enumerate(baselines.items()):
        dashes = _DASHES[place % len(_DASHES)]
        label = f"{name} {percent:.1f}"
        axes.axhline(percent, color=_GREY, linestyle=dashes, linewidth=1.3, label=label)


class _Drawing(NamedTuple):
    """The parts of matplotlib that draw without a screen."""

    agg: Any
    figures: Any


def _drawing() -> _Drawing | None:
    try:
        return _Drawing(
            importlib.import_module("matplotlib.backends.backend_agg"),
            importlib.import_module("matplotlib.figure"),
        )
    except ImportError:
        return None


def _fitting(name: str) -> str:
    """A name as long as fits beside the axes: its beginning and its end."""
    half = _NAME_LENGTH // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[:half]}…{name[-half + 1 :]}"


def _saved(drawing: _Drawing, figure: Any, png: Path | str) -> str:
    """Writes the picture; the sentence for the user."""
    try:
        _save(drawing.agg.FigureCanvasAgg(figure), Path(png))
    except OSError as error:
        return f"no picture: cannot write {png}: {error.strerror}"
    return f"picture: {png}"


def _save(canvas: Any, png: Path) -> None:
    png.parent.mkdir(parents=True, exist_ok=True)
    partial = png.with_name(f".{png.name}.partial")
    try:
        canvas.print_png(str(partial))
        os.replace(partial, png)
    finally:
        partial.unlink(missing_ok=True)
