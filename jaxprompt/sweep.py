"""A sweep: many prompts over one backbone, trained side by side; one table and one picture of all.

`jaxprompt train` comes here if its config has a `sweep:`.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.files import write_file
from jaxprompt.hosts import is_first
from jaxprompt.metrics import Repeated
from jaxprompt.plots import SweepRow, write_sweep_plot
from jaxprompt.sweep_config import Sweep, SweptRun
from jaxprompt.tables import table
from jaxprompt.training import TrainResult, train_together
from jaxprompt.typing import UserError

_REPEATS = "seed"  # runs that differ in this alone are repeats of one setting


@dataclasses.dataclass(frozen=True)
class Setting(Repeated):
    """Runs that differ in nothing but the seed.

    Attributes:
      name: its values, as words.
      names, scores: of its runs that have a score; percent, of the best evaluation.
      diverged: how many runs ended because their numbers were not finite.
      bare, majority: score of the bare backbone, and of the most frequent target.
    """

    name: str
    names: Sequence[str]
    scores: Sequence[float]
    diverged: int
    bare: float
    majority: float

    @property
    def best(self) -> tuple[float, str] | None:
        """Score and name of the best run."""
        return max(zip(self.scores, self.names, strict=True), default=None, key=lambda one: one[0])


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Attributes:
      output_dir: its directory; `sweep.json` and `plots/sweep.png` are in it.
      results: of each run, by name.
      settings: in the order of the config.
      picture: a sentence that says where it is.
    """

    output_dir: Path
    results: Mapping[str, TrainResult]
    settings: Sequence[Setting]
    picture: str

    @property
    def finished(self) -> bool:
        """Whether every run has ended."""
        return all(result.finished for result in self.results.values())


def sweep(plan: Sweep, *, all_may_diverge: bool = False) -> SweepResult:
    """Trains all runs of a sweep, `train.at_once` of them at a time, resuming what is there.

    Each run has its directory `output_dir/prompts/NAME`, with what `training.train` writes but
    checkpoints; these are of all that are trained together.

    Args:
      all_may_diverge: a sweep without a single finite run is a result too.
    Raises: UserError as `training.train_together`, or if every run diverged.
    """
    directory = Path(plan.output_dir)
    at_once = plan.runs[0].config.train.at_once or len(plan.runs)
    banks = _banks(plan.runs, at_once)
    results: dict[str, TrainResult] = {}
    for number, bank in enumerate(banks):
        place = directory if len(banks) == 1 else directory / f"bank-{number}"
        names = [run.name for run in bank]
        trained = train_together([run.config for run in bank], names, str(place))
        results |= dict(zip(names, trained, strict=True))
        if not all(result.finished for result in trained):
            break
    if all(result.diverged for result in results.values()) and not all_may_diverge:
        raise UserError(
            f"every run of the sweep diverged, the first at step "
            f"{min(result.diverged for result in results.values())}: lower optim.learning_rate"
        )
    settings = _settings([run for run in plan.runs if run.name in results], results)
    picture = ""
    if is_first():
        write_file(directory / "sweep.json", json.dumps(_told(plan, results, settings), indent=1))
        rows = [SweepRow(one.name, one.scores, one.bare, one.majority) for one in settings]
        picture = write_sweep_plot(directory / "plots" / "sweep.png", rows, title=_title(plan))
    return SweepResult(directory, results, settings, picture)


def summary(plan: Sweep, result: SweepResult, words: Sequence[str]) -> str:
    """The table, and what to type next.

    Args:
      words: what followed `jaxprompt train`.
    """
    if not result.finished:
        again = shlex.join(["jaxprompt", "train", *words])
        return f"\nstopped before the end; go on with:\n  {again}"
    rows: list[list[object]] = []
    for one in result.settings:
        mean, deviation, best = one.mean, one.deviation, one.best
        rows.append([
            one.name, len(one.scores) + one.diverged, one.diverged,
            "" if mean is None else mean, "" if deviation is None else deviation,
            *(("", "") if best is None else (best[0], best[1])), one.bare, one.majority,
        ])  # fmt: skip
    header = ["validation, %", "runs", "diverged", "mean", "std. dev.", "best", "by", "bare",
              "majority"]  # fmt: skip
    speed = sum(one.examples_per_second for one in result.results.values())
    lines = ["", table(rows, header=header), "", f"{speed:.0f} examples/s in training; "
             f"{result.picture}"]  # fmt: skip
    found = [one for one in result.settings if one.best]
    if found:
        setting = max(found, key=lambda one: one.mean or 0.0)
        _, name = max((one.best for one in found if one.best), key=lambda pair: pair[0])
        best, together = result.results[name].answering, [
            shlex.quote(str(result.results[other].answering)) for other in setting.names
        ]  # fmt: skip
        lines += ["", "next:", f"  jaxprompt inspect {shlex.quote(str(best))}"]
        if len(together) > 1:
            lines.append(f"  jaxprompt evaluate {' '.join(together)}    # as an ensemble")
    return "\n".join(lines)


def _banks(runs: Sequence[SweptRun], at_once: int) -> list[Sequence[SweptRun]]:
    return [runs[start : start + at_once] for start in range(0, len(runs), at_once)]


def _settings(runs: Sequence[SweptRun], results: Mapping[str, TrainResult]) -> list[Setting]:
    """Runs by what they differ in beside the seed."""
    groups: dict[str, list[SweptRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_setting(run)), []).append(run)
    settings = []
    for group in groups.values():
        name = ", ".join(f"{key} {_word(value)}" for key, value in _setting(group[0]).items())
        scored = {
            run.name: results[run.name].score
            for run in group
            if results[run.name].metrics and not results[run.name].diverged
        }
        first = results[group[0].name]
        settings.append(Setting(
            name or group[0].config.task.name,
            list(scored),
            list(scored.values()),
            sum(results[run.name].diverged > 0 for run in group),
            first.baseline("bare"),
            first.baseline("majority"),
        ))  # fmt: skip
    return settings


def _setting(run: SweptRun) -> dict[str, Any]:
    """What the sweep sets of a run, the seed aside."""
    return {key: value for key, value in run.values.items() if key != _REPEATS}


def _told(
    plan: Sweep, results: Mapping[str, TrainResult], settings: Sequence[Setting]
) -> dict[str, Any]:
    """The results as JSON-ready values."""
    runs = []
    for run in plan.runs:
        if run.name in results:
            result = results[run.name]
            runs.append({
                "name": run.name, "values": dict(run.values), "prompt": str(result.prompt),
                "score": result.score if result.metrics else None, "metrics": dict(result.metrics),
                "best_step": result.best_step, "steps": result.steps,
                "finished": result.finished, "diverged": result.diverged,
            })  # fmt: skip
    told = [
        {
            "name": one.name, "runs": len(one.scores) + one.diverged, "diverged": one.diverged,
            "mean": one.mean, "stdev": one.deviation, "best": one.best and one.best[0],
            "best_run": one.best and one.best[1], "bare": one.bare, "majority": one.majority,
        }
        for one in settings
    ]  # fmt: skip
    return {"axes": {key: list(names) for key, names in plan.axes.items()}, "settings": told,
            "runs": runs}  # fmt: skip


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("preset") or value.get("name") or (json.dumps(value) if value else "")
    return str(value) or "none"


def _title(plan: Sweep) -> str:
    tasks = dict.fromkeys(run.config.task.name for run in plan.runs)
    return f"{', '.join(tasks)} on {Path(plan.runs[0].config.backbone.name).name}"
