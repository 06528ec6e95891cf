"""`jaxprompt compare`: prompt methods on one task and backbone, several seeds each, in one table.

Trains what is not trained yet, answers the test split with every prompt, then times all methods in
turn.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.backbone import load_backbone
from jaxprompt.compare_config import Comparison, load_comparison
from jaxprompt.data.sources import has_split
from jaxprompt.data.tasks import Task
from jaxprompt.files import write_file
from jaxprompt.logging import METRICS_FILE
from jaxprompt.measuring import Answers
from jaxprompt.metrics import Repeated
from jaxprompt.plots import EVAL, SweepRow, write_sweep_plot
from jaxprompt.prompts import METHODS
from jaxprompt.sweep import sweep
from jaxprompt.tables import table
from jaxprompt.trainee import mean_of
from jaxprompt.training import TrainResult

NEARLY = 0.95  # of the best score: when a run is nearly there
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Row(Repeated):
    """What a method came to.

    Attributes:
      name: as the config calls it.
      method: its `method.name`.
      scores: of each seed's best prompt on the compared split, percent, but of those that diverged.
      diverged: seeds whose numbers were not finite.
      parameters: scalars trained for one prompt.
      artifact_bytes: of the files a user keeps.
      train_rate: training examples/s, all seeds together, evaluation left out.
      predict_rate: examples/s that one prompt answers, the median of rounds that took turns.
      nearly_steps: mean over seeds of the first evaluation at 95 % of the run's best validation
        score.
    """

    name: str
    method: str
    scores: Sequence[float]
    diverged: int
    parameters: int
    artifact_bytes: int
    train_rate: float
    predict_rate: float
    nearly_steps: float | None


@dataclasses.dataclass(frozen=True)
class ComparisonResult:
    """What a comparison came to.

    Attributes:
      split: where scores come from: "test", or "validation" where the task has no test rows.
      rows: the best mean first.
      bare, majority: score of the bare backbone, and of the most frequent target.
      picture: a sentence that says where it is.
    """

    split: str
    rows: Sequence[Row]
    bare: float
    majority: float
    picture: str


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt compare CONFIG [key=value ...] [--only NAME] [--json]`."""
    plan = load_comparison(args.config, args.overrides, args.only)
    result = compare(plan)
    if result is None:
        only = [word for name in args.only for word in ("--only", name)]
        again = shlex.join(["jaxprompt", "compare", args.config, *args.overrides, *only])
        print(f"\nstopped before the end; go on with:\n  {again}", file=sys.stderr)
        return
    if args.json:
        for row in result.rows:
            print(json.dumps(_told(row), ensure_ascii=False), flush=True)
    print(_summary(plan, result), file=sys.stderr)


def compare(plan: Comparison) -> ComparisonResult | None:
    """Trains every method with every seed, resuming what is there, and measures them.

    Each method's runs are a sweep in `output_dir/methods/NAME`; `compare.json` and
    `plots/compare.png` tell of all.

    Returns: None if a SIGTERM stopped it; the same call goes on.
    Raises: UserError as `sweep.sweep`.
    """
    trained: dict[str, Sequence[TrainResult]] = {}
    for number, (name, one) in enumerate(plan.sweeps.items(), 1):
        print(f"\n{name} ({number} of {len(plan.sweeps)})", file=sys.stderr)
        swept = sweep(one, all_may_diverge=True)
        if not swept.finished:
            return None
        trained[name] = list(swept.results.values())
    shared = plan.shared
    split = "test" if has_split(shared.task.source, "test") else "validation"
    backbone = load_backbone(
        shared.backbone.name, revision=shared.backbone.revision,
        compute=shared.backbone.compute(), quantize=shared.backbone.quantize,
    )  # fmt: skip
    source = Task(shared.task).open(split)
    scores: dict[str, list[float]] = {name: [] for name in trained}
    timed: dict[str, Callable[[], float]] = {}
    print(f"\nanswering {split}, {len(source):,} examples with each prompt", file=sys.stderr)
    for name, results in trained.items():
        config = plan.sweeps[name].runs[0].config
        for result in results:
            if result.diverged:
                continue
            answer = Answers(backbone, config, result.prompt)
            scores[name].append(answer.score(source))
            timed.setdefault(name, lambda answer=answer: answer.rate(source))
        said = ", ".join(f"{one:.1f}" for one in scores[name]) or "every seed diverged"
        print(f"{name}: {said}", file=sys.stderr)
    print("timing one prompt of each method, in turns", file=sys.stderr)
    rates = _taking_turns(timed)
    rows = []
    for name, results in trained.items():
        config = plan.sweeps[name].runs[0].config
        steps = [step for result in results if (step := nearly_there(result)) is not None]
        rows.append(Row(
            name=name,
            method=config.method.name,
            scores=scores[name],
            diverged=sum(result.diverged > 0 for result in results),
            parameters=METHODS[config.method.name].parameters(config.method, backbone.config),
            artifact_bytes=results[0].prompt_bytes,
            train_rate=sum(result.examples_per_second for result in results),
            predict_rate=rates.get(name, 0.0),
            nearly_steps=statistics.fmean(steps) if steps else None,
        ))  # fmt: skip
    rows.sort(key=lambda row: -(row.mean if row.mean is not None else -1.0))
    bare, majority = Answers(backbone, shared, None).baselines(source)
    told = {
        "task": shared.task.name, "backbone": backbone.name, "split": split,
        "examples": len(source), "bare": bare, "majority": majority,
        "methods": [_told(row) for row in rows],
    }  # fmt: skip
    directory = Path(plan.output_dir)
    write_file(directory / "compare.json", json.dumps(told, indent=1))
    picture = write_sweep_plot(
        directory / "plots" / "compare.png",
        [SweepRow(row.name, row.scores, bare, majority) for row in rows],
        title=f"{shared.task.name} on {Path(backbone.name).name}",
        what=f"{split} score, %",
    )
    return ComparisonResult(split, rows, bare, majority, picture)


def nearly_there(result: TrainResult) -> float | None:
    """The step of a run's first evaluation at 95 % of its best validation score.

    Returns: None for a run without one, or that diverged.
    """
    if result.diverged or not result.metrics:
        return None
    enough = NEARLY * result.score
    for line in (result.output_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        record: Mapping[str, float] = json.loads(line)
        names = [f"{EVAL}{name}" for name in result.score_names]
        if all(name in record for name in names) and mean_of(record, names) >= enough:
            return record["step"]
    return None


def _taking_turns(timed: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The median rate of each over rounds in which all take a turn; a first round compiles."""
    rounds = [{name: rate() for name, rate in timed.items()} for _ in range(_ROUNDS + 1)]
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in timed}


def _told(row: Row) -> dict[str, Any]:
    """JSON-ready."""
    return {**dataclasses.asdict(row), "mean": row.mean, "stdev": row.deviation}


def _summary(plan: Comparison, result: ComparisonResult) -> str:
    rows: list[list[object]] = []
    for row in result.rows:
        seeds = f"{len(row.scores)}" + (f" (+{row.diverged} diverged)" if row.diverged else "")
        rows.append([
            row.name, "" if row.mean is None else row.mean,
            "" if row.deviation is None else row.deviation, seeds, f"{row.parameters:,}",
            f"{row.artifact_bytes:,}", f"{row.train_rate:.0f}", f"{row.predict_rate:.0f}",
            "" if row.nearly_steps is None else f"{row.nearly_steps:.0f}",
        ])  # fmt: skip
    header = [
        f"{result.split}, %", "mean", "std. dev.", "seeds", "trained", "bytes kept",
        "train ex/s", "predict ex/s", f"steps to {NEARLY:.0%} of best",
    ]  # fmt: skip
    lines = [
        "",
        table(rows, header=header),
        "",
        f"bare backbone {result.bare:.1f}, most frequent target {result.majority:.1f}; "
        f"{result.picture}",
    ]
    if result.split == "validation":
        lines.append("the task has no test split: scores are of the split that picked the prompts")
    found = [row for row in result.rows if row.scores]
    if found:
        best = plan.sweeps[found[0].name]
        prompts = [shlex.quote(f"{run.config.output_dir}/best") for run in best.runs]
        lines += ["", "next:", f"  jaxprompt evaluate {' '.join(prompts)}"]
    return "\n".join(lines)
