"""`jaxprompt plan`: what a run will cost on devices that need not be here, and what costs less.

Compiles the step that `jaxprompt train` would compile, from shapes alone.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.config import RunConfig, dump
from jaxprompt.files import write_file
from jaxprompt.planning.apart import CompilerFailed, estimate_apart
from jaxprompt.planning.chips import CHIPS, GIB, Topology, open_topologies
from jaxprompt.planning.estimate import Estimate
from jaxprompt.planning.search import Tried, overrides, search
from jaxprompt.sweep_config import load_sweep
from jaxprompt.tables import table
from jaxprompt.typing import UserError

ASSUMPTIONS = (
    "at best: the bound named takes all the time and hides the rest, with chips at their peak and "
    "exchanges over every link that leads somewhere",
    "at least: the compiler's own cycles, then exchanges over one link a direction that nothing "
    "hides; where a chip's clock is not known, twice the three bounds one after another",
    "input keeps up; start-up, compilation, evaluation and saving are left out",
)
_TERA = 1e12


def main(args: argparse.Namespace) -> int:
    """The command: `jaxprompt plan CONFIG [key=value ...] --topology T [T ...] [--search]`.

    Returns: the exit code: 2 where the compiler failed for every one of several topologies, 130
      for a search that Ctrl-C ended, which still says what it found.
    """
    names = [name for name in args.topology if "=" not in name]
    typed = [*args.overrides, *(name for name in args.topology if "=" in name)]
    if not names or (args.search and len(names) > 1):
        raise UserError("--topology takes a name such as v5e:2x2, with --search no more than one")
    for option, given in (("--output", args.output), ("--try", args.also)):
        if given and not args.search:
            raise UserError(f"{option} belongs to --search, which looks for settings")
    config, prompts = first_bank(args.config, typed)
    topologies = open_topologies(names)
    if args.search:
        return _search(args, typed, topologies[0], prompts)
    estimates: list[Estimate] = []
    failed: list[str] = []
    for number, topology in enumerate(topologies, start=1):
        _say(f"compiling for {topology.name} ({number} of {len(topologies)})")
        try:
            estimates.append(estimate_apart(config, topology, prompts))
            answer = told(config, estimates[-1])
        except CompilerFailed as error:
            if len(topologies) == 1:
                raise
            _say(str(error))
            failed.append(topology.name)
            answer = _untold(config, topology, error)
        if args.json:
            print(json.dumps(answer), flush=True)
    if not args.json:
        alone = len(topologies) == 1
        print(_details(config, estimates[0]) if alone else _summary(estimates, failed))
    return 0 if estimates else 2


def first_bank(name: str, typed: Sequence[str]) -> tuple[RunConfig, int]:
    """The config of a run, and how many prompts its steps train; of a sweep its first bank.

    Of a bank whose prompts have different rows (tasks, lengths), the first and its like count: the
    others take passes of their own.
    """
    runs = load_sweep(name, typed).runs
    first = runs[0].config
    together = runs[: first.train.at_once or len(runs)]
    alike = [
        run
        for run in together
        if (run.config.task, run.config.data, run.config.layout, run.config.method.length)
        == (first.task, first.data, first.layout, first.method.length)
    ]
    return first, len(alike)


def told(config: RunConfig, found: Estimate) -> dict[str, Any]:
    """An estimate, JSON-ready."""
    return {
        **dataclasses.asdict(found),
        "backbone": config.backbone.name,
        "dtype": config.backbone.dtype,
        "accumulate": config.train.accumulate,
        "weights_over_data": config.mesh.weights_over_data,
        "rows_over_model": config.mesh.rows_over_model,
        "share_of_peak": found.share_of_peak,
        "bound": found.bound,
        "examples_per_second": found.examples_per_second,
        "verdict": verdict(found),
        "assumes": ASSUMPTIONS if found.seconds else (),
    }


def _untold(config: RunConfig, topology: Topology, error: CompilerFailed) -> dict[str, Any]:
    """The JSON of a topology for which the compiler failed."""
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "backbone": config.backbone.name,
        "fits": None,
        "error": str(error),
    }


def verdict(found: Estimate) -> str:
    """Whether it fits, what bounds it and how fast it is, in one sentence."""
    needs = f"{found.total / GIB:.2f}"
    if found.capacity is not None:
        needs += f" of {found.capacity / GIB:.2f}"
    if not found.fits:
        return f"does not fit: needs {needs} GiB a chip; --search looks for settings that do"
    rate = found.examples_per_second
    if rate is None:
        return f"fits: {needs} GiB a device; speed is predicted for {', '.join(CHIPS)} only"
    return (
        f"fits: {needs} GiB a chip; bound by {found.bound}; "
        f"{_number(rate[0])} - {_number(rate[1])} examples/s"
    )


def _details(config: RunConfig, found: Estimate) -> str:
    """Everything about one topology."""
    shape, rest = found.shape, found.total - found.weights - found.state - found.activations
    head = (
        f"{config.backbone.name}, {config.backbone.dtype}, on {found.topology}: mesh data "
        f"{found.data} x model {found.model}, remat {found.remat}\n"
        f"batch: {shape.rows} rows of {shape.encoder} + {shape.decoder} positions, about "
        f"{shape.examples} examples; {shape.note}"
    )
    rows: list[list[object]] = [
        ["weights", f"{found.weights / GIB:.3f}", "GiB"],
        ["trained and its optimizer", f"{found.state / GIB:.3f}", "GiB"],
        ["activations", f"{found.activations / GIB:.3f}", "GiB"],
        ["batch, results, padding", f"{rest / GIB:.3f}", "GiB"],
        ["memory in all", f"{found.total / GIB:.3f}", "GiB"],
        ["of", "?" if found.capacity is None else f"{found.capacity / GIB:.3f}", "GiB"],
        ["matmuls", f"{found.flops / _TERA:.4g}", "TFLOP"],
        ["  needed at least", f"{found.minimum / _TERA:.4g}", "TFLOP"],
        ["  ratio", f"{found.flops / found.minimum:.3f}", ""],
        *([f"sent: {kind}", f"{size / GIB:.3f}", "GiB"] for kind, size in found.sent.items()),
        *([f"{name} alone", f"{1e3 * s:.2f}", "ms"] for name, s in found.bounds.items()),
    ]
    if found.cycles:
        rows.append(["compiler's estimate", f"{found.cycles / 1e6:.1f}", "M cycles"])
    if found.share_of_peak:
        rows.append(["  of the peak", f"{100 * found.share_of_peak:.1f}", "%"])
    lines = [head, "", table(rows, header=["of one chip, a step", "", ""])]
    if found.dearest:
        shares: list[list[object]] = [
            [_short(name), cycles / 1e6, f"{100 * cycles / found.cycles:.0f} %"]
            for name, cycles in found.dearest
        ]
        lines += ["", table(shares, header=["the dearest operations", "M cycles", ""])]
    if found.kernels:
        lines.append(f"without {found.kernels} calls of kernels, which carry no estimate")
    return "\n".join([*lines, "", *_assumed([found]), verdict(found)])


def _short(name: str) -> str:
    """An operation's path without what every path has."""
    common = ("jit(train_step)", "while", "body", "closed_call", "checkpoint")
    return "/".join(part for part in name.split("/") if part not in common)


def _summary(estimates: Sequence[Estimate], failed: Sequence[str]) -> str:
    """One line for each of several topologies, those for which the compiler failed last."""
    header = [
        "topology", "mesh", "rows", "weights", "activations", "GiB in all", "of", "TFLOP",
        "/ least", "GiB sent", "bound", "examples/s",
    ]  # fmt: skip
    rows = [_row(found) for found in estimates]
    rows += [[name, *["-"] * (len(header) - 2), "compiler failed"] for name in failed]
    return "\n".join([table(rows, header), "", *_assumed(estimates)]).rstrip()


def _row(found: Estimate) -> list[object]:
    rate, shape = found.examples_per_second, found.shape
    cells: list[object] = [
        found.topology,
        f"{found.data} x {found.model}",
        f"{shape.rows} x {shape.encoder}+{shape.decoder}",
        f"{found.weights / GIB:.2f}",
        f"{found.activations / GIB:.2f}",
        f"{found.total / GIB:.2f}",
        "?" if found.capacity is None else f"{found.capacity / GIB:.2f}",
        f"{found.flops / _TERA:.4g}",
        f"{found.flops / found.minimum:.2f}",
        f"{sum(found.sent.values()) / GIB:.2f}",
    ]
    if not found.fits:
        return [*cells[:-1], "-", "memory", "does not fit"]
    speed = f"{_number(rate[0])} - {_number(rate[1])}" if rate else "-"
    return [*cells, found.bound or "-", speed]


def _assumed(estimates: Sequence[Estimate]) -> list[str]:
    if not any(found.seconds for found in estimates):
        return []
    return ["examples/s assume", *(f"- {line}" for line in ASSUMPTIONS), ""]


def _search(
    args: argparse.Namespace, typed: Sequence[str], topology: Topology, prompts: int
) -> int:
    """The ranking, what was left out, the winner as a config; the exit code."""
    if args.output and prompts > 1:
        raise UserError("--output writes one run's config, and this is a sweep: leave it out")

    def config_with(settings: Mapping[str, Any]) -> RunConfig:
        return first_bank(args.config, [*typed, *overrides(settings)])[0]

    asked = dict(_values(text) for text in args.also)
    found = search(config_with, topology, prompts=prompts, limit=args.limit, asked=asked, say=_say)
    if args.json:
        for one in found.ranking:
            own = told(config_with(one.settings), one.estimate)
            print(json.dumps({"settings": one.settings, **own}))
    else:
        print(_ranking(found.ranking))
    if found.stopped:
        _say("stopped before all was tried: this is of what was")
    for settings, reason in found.skipped:
        _say(f"left out: {' '.join(overrides(settings))}: {reason}")
    best = next((one for one in found.ranking if one.estimate.fits), None)
    if best is None:
        _say("nothing that was tried fits: take more chips, shorter rows or a smaller batch")
    elif args.output:
        write_file(Path(args.output), dump(config_with(best.settings)))
        _say(f"wrote the best to {args.output}: jaxprompt train {shlex.quote(args.output)}")
    else:
        words = shlex.join(["jaxprompt", "train", args.config, *typed, *overrides(best.settings)])
        _say(f"the best: {words}")
    return 130 if found.stopped else 0


def _ranking(ranking: Sequence[Tried]) -> str:
    keys = list(dict.fromkeys(key for one in ranking for key in one.settings))
    short = [key.rpartition(".")[2] for key in keys if key != "mesh.data"]
    header = ["rank", "mesh", "GiB", "of", "TFLOP", "bound", "examples/s", *short]
    rows = []
    for number, one in enumerate(ranking, start=1):
        cells = _row(one.estimate)
        own = [_cell(one.settings.get(key, "")) for key in keys if key != "mesh.data"]
        rows.append([str(number), cells[1], *cells[5:8], *cells[10:], *own])
    return table(rows, header) if rows else "nothing was compiled"


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _values(text: str) -> tuple[str, list[str]]:
    """`KEY=VALUE,VALUE` -> the key and its values."""
    key, _, values = text.partition("=")
    if not key or not values:
        raise UserError(f"--try {text!r} is not of the form backbone.dtype=float32,bfloat16")
    return key, values.split(",")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _say(text: str) -> None:
    print(f"jaxprompt: {text}", file=sys.stderr, flush=True)
