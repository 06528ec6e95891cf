"""Arguments of the commands: what several share, and those of runs; imports nothing heavy."""

import argparse


def task_argument(parser: argparse.ArgumentParser) -> None:
    """`--task T`."""
    parser.add_argument(
        "--task",
        metavar="T",
        help="a name that `jaxprompt tasks` lists, or a task's YAML file (the prompt's own task)",
    )


def json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line on standard output"
    )


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt methods`."""
    parser.add_argument(
        "--backbone",
        metavar="B",
        default="jaxprompt-mini",
        help="directory or hub name to count trained parameters for (jaxprompt-mini)",
    )
    json_argument(parser)


def precision_arguments(parser: argparse.ArgumentParser) -> None:
    """`--dtype D` and `--quantize K`, of a backbone that is loaded."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the backbone's weights and activations (float32)",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "int4"),
        help="of the backbone's matrices (as they are stored)",
    )


def positive(text: str) -> int:
    """A whole number above 0, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on, as an argument's type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def host_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the commands that run on several hosts: who they are."""
    group = parser.add_argument_group(
        "on several hosts", "the same command on every one of them; see docs/hosts.md"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other hosts of this Cloud TPU, GKE, Slurm or Open MPI job",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 is, and a free port"
    )
    group.add_argument(
        "--process-count", type=positive, metavar="N", help="elsewhere: how many there are"
    )
    group.add_argument(
        "--process-index", type=natural, metavar="I", help="elsewhere: which one this is, from 0 on"
    )
    group.add_argument(
        "--join-timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the others at the start (300)",
    )
    group.add_argument(
        "--host-timeout",
        type=positive,
        default=100,
        metavar="SECONDS",
        help="after how long without a sign of life a host is lost, and the run ends (100)",
    )


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt plan`."""
    run_arguments(parser)
    parser.add_argument(
        "--topology",
        metavar="T",
        nargs="+",
        required=True,
        help="what it would run on: v5e:2x2, v4:2x2x4, cpu:8, gpu:1; several give a line each",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, division of weights, rematerialisation, microbatches and unrolling",
    )
    parser.add_argument(
        "--try",
        dest="also",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="with --search: values of a config key to try too, as backbone.dtype=float32,bfloat16",
    )
    parser.add_argument(
        "--limit", type=positive, default=24, metavar="N", help="compilations of a search (24)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="with --search: write the best as a complete config"
    )
    json_argument(parser)


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt compare`."""
    run_arguments(parser)
    _only_argument(parser, "NAME", "take this method")
    json_argument(parser)


def scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt scale`."""
    run_arguments(parser)
    _only_argument(parser, "LINE", "take this line")
    json_argument(parser)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt train`."""
    run_arguments(parser)
    host_arguments(parser)


def pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt pretrain`."""
    train_arguments(parser)
    _only_argument(parser, "PHASE", "run this phase")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """`CONFIG [key.sub=value ...]`."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, or the name of a config that ships with jaxprompt",
    )
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="options to change, values as in YAML"
    )


def _only_argument(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """`--only NAME`, of commands whose configs hold several things by name."""
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar=metavar,
        help=f"{what} of the config alone; may be given several times",
    )
