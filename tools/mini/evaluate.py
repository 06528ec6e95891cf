"""Measures a backbone by what prompts make of it: prompts, full tuning, bare backbone, majority.

    python tools/mini/evaluate.py --backbone DIR --data RAW [--tasks sst2 ...] [--out report.json]

Every run is `jaxprompt.train` on a config that ships, evaluated once, after its last step: nothing
is chosen by the scores that are reported. A finished run is not repeated, a broken one goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from held_out import cut_e2e

import jaxprompt
from jaxprompt.config import RunConfig, dump, load_config
from jaxprompt.files import make_directory, remove_directory, write_file
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.tables import table
from jaxprompt.typing import UserError

MODEL_TUNING = ("tune=model", "optim={recipe: model-tuning}")


@dataclasses.dataclass(frozen=True)
class Measure:
    """One task: the config that trains it, what is changed in it, its folder of the raw data.

    Full tuning learns in fewer steps than a prompt: `model_steps` of them, 0 = it is not measured.
    `cut` makes the files that the config wants, name -> text, of the raw folder's; None = no need.
    """

    config: str
    overrides: tuple[str, ...] = ()
    folder: str = ""
    model_steps: int = 0
    cut: Callable[[Path], dict[str, str]] | None = None


def _demo(name: str) -> Measure:
    return Measure(
        "quickstart", (f"task={name}", "task.source.validation=package://demo/test.jsonl")
    )


MEASURES = {
    "sst2": Measure("mini/sst2", folder="sst2", model_steps=500),
    "qqp": Measure("mini/qqp", folder="qqp_sample", model_steps=300),
    "mrpc": Measure("mini/mrpc", folder="mrpc", model_steps=300),
    "cola": Measure("mini/cola", folder="cola", model_steps=300),
    "rte": Measure("mini/rte", folder="superglue/RTE", model_steps=300),
    "e2e": Measure(
        "mini/e2e", ("task.source.validation=test.jsonl",), "e2e", model_steps=300, cut=cut_e2e
    ),
    "demo-kind": _demo("demo-kind"),
    "demo-topic": _demo("demo-topic"),
    "demo-sentiment": _demo("demo-sentiment"),
}


def configure(
    task: str, tune: str, seed: int, backbone: Path, data: Path | None, steps: int, out: Path
) -> RunConfig:
    """The config of one run; its directory is named by everything that decides its result."""
    measure = MEASURES[task]
    overrides = [*measure.overrides, f"seed={seed}", f"backbone.name={backbone}"]
    overrides += ["train.eval_every=0", "train.early_stopping=0"]
    if measure.folder:
        overrides.append(f"task.source.data_dir={rows_of(task, data, out)}")
    overrides += MODEL_TUNING if tune == "model" else ()
    steps = steps or (measure.model_steps if tune == "model" else 0)  # 0: as the config says
    overrides += [f"train.steps={steps}"] if steps else ()
    config = load_config(measure.config, overrides)
    decisive = dump(dataclasses.replace(config, output_dir=""))
    digest = hashlib.sha256(f"{decisive}{fingerprint(backbone)}".encode()).hexdigest()[:8]
    return dataclasses.replace(config, output_dir=str(out / f"{task}-{tune}-{seed}-{digest}"))


def rows_of(task: str, data: Path | None, out: Path) -> Path:
    """The directory of a task's rows; what is not as it came is cut into `out`, each time anew.

    Raises: UserError if `data` or a file in it is missing.
    """
    measure = MEASURES[task]
    if data is None:
        raise UserError(f"task {task} needs --data, the folder of the raw data")
    if measure.cut is None:
        return data / measure.folder
    directory = make_directory(out / "data" / task)
    for file, text in measure.cut(data / measure.folder).items():
        write_file(directory / file, text)
    return directory


def measure(task: str, config: RunConfig) -> dict[str, Any]:
    """Trains, or reads what a finished run came to; leaves the artifact and metrics.jsonl."""
    directory = Path(config.output_dir)
    kept = directory / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    result = jaxprompt.train(config)
    if not result.finished:
        raise SystemExit("stopped before the end; the same command goes on")
    metric = config.train.metric or next(iter(result.metrics))
    speed = result.examples_per_second
    told = {
        "task": task,
        "tune": config.tune,
        "seed": config.seed,
        "metric": metric,
        "score": result.metrics[metric],
        "metrics": dict(result.metrics),
        "bare": dict(result.bare),
        "majority": dict(result.majority),
        "length": config.method.length if config.tune == "prompt" else 0,
        "steps": result.steps,
        "batch_size": config.data.batch_size,
        "seconds": round(result.steps * config.data.batch_size / speed, 1) if speed else None,
        "prompt_bytes": result.prompt_bytes if config.tune == "prompt" else None,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_file(kept, json.dumps(told, indent=2) + "\n")
    for name in ("checkpoints", *(("best", "prompt") if config.tune == "model" else ())):
        remove_directory(directory / name)
    return told


def machine() -> str:
    """What this runs on, in words."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task: majority, bare backbone, and mean, spread and count of either tuning."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = [run for run in runs if run["task"] == task]
        metric = mine[0]["metric"]
        row = {
            "task": task,
            "metric": metric,
            "majority": mine[0]["majority"][metric],
            "bare": mine[0]["bare"][metric],
        }
        for tune in ("prompt", "model"):
            scores = [run["score"] for run in mine if run["tune"] == tune]
            if scores:
                row[tune] = {
                    "mean": statistics.mean(scores),
                    "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                    "low": min(scores),
                    "high": max(scores),
                    "seeds": len(scores),
                }
        rows.append(row)
    return rows


def spread_text(spread: dict[str, Any] | None) -> str:
    """`81.3 ± 0.4 (3 seeds)`."""
    if spread is None:
        return "-"
    about = "" if spread["deviation"] is None else f" ± {spread['deviation']:.1f}"
    plural = "s" if spread["seeds"] > 1 else ""
    return f"{spread['mean']:.1f}{about} ({spread['seeds']} seed{plural})"


def report_table(summary: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"{row['task']} ({row['metric']})",
            row["majority"],
            row["bare"],
            spread_text(row.get("prompt")),
            spread_text(row.get("model")),
        ]
        for row in summary
    ]
    header = ["%", "most frequent target", "bare backbone", "prompt", "full tuning"]
    return table(rows, header=header)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All runs asked for, prompts first; the report is written anew after each."""
    runs: list[dict[str, Any]] = []
    make_directory(args.out.parent)
    for tune, seed, task in itertools.product(args.tune, args.seeds, args.tasks):
        if tune == "model" and not MEASURES[task].model_steps:
            continue
        config = configure(task, tune, seed, args.backbone, args.data, args.steps, args.runs)
        runs.append(measure(task, config))
        write_file(args.out, json.dumps(_report(args.backbone, runs), indent=2) + "\n")
    return _report(args.backbone, runs)


def _report(backbone: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "jaxprompt": jaxprompt.__version__,
        "backbone": {"fingerprint": fingerprint(backbone)},
        "summary": summarise(runs),
        "runs": list(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True, help="directory of the backbone")
    parser.add_argument("--data", type=Path, help="folder of the raw data sets")
    parser.add_argument("--tasks", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--tune",
        nargs="+",
        choices=("prompt", "model"),
        default=["prompt", "model"],
        help="model: full tuning, of " + ", ".join(n for n, m in MEASURES.items() if m.model_steps),
    )
    parser.add_argument("--steps", type=int, default=0, help="of every run; 0 = its config's")
    parser.add_argument("--runs", type=Path, default=Path("runs/mini-evaluation"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini-evaluation/report.json"))
    args = parser.parse_args()
    try:
        report = evaluate(args)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(report_table(report["summary"]))


if __name__ == "__main__":
    main()
