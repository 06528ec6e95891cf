"""Arguments of commands, beside those in `cli`: what several share, and what brings things in.

Imports nothing heavy, as `cli`.
"""

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


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a T5X checkpoint (directory or gs:// path), a backbone's directory, or a hub name",
    )
    parser.add_argument("output", metavar="OUT", help="a directory that is new or empty")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a Hugging Face config.json to take instead of what the source says or its shapes do",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PLACE",
        help="a directory with a tokenizer, or a SentencePiece .model file (the source's own)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the stored numbers (bfloat16 where the source's are, else float32)",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "int4"),
        help="store matrices as integers and scales, which jaxprompt alone reads (as the source)",
    )
    json_argument(parser)


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt import`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a numpy file, a run of google-research/prompt-tuning, or its T5X checkpoint",
    )
    parser.add_argument("output", metavar="OUT", help="the prompt artifact to write, a directory")
    parser.add_argument(
        "--backbone",
        metavar="B",
        required=True,
        help="the backbone it was trained with: directory or hub name",
    )
    parser.add_argument(
        "--task",
        metavar="T",
        help="the task to store with it: a name that `jaxprompt tasks` lists, or a YAML file",
    )
    parser.add_argument(
        "--layout",
        default="{prompt}{input}",
        help="where its slots stand ({prompt}{input}, where google-research puts them)",
    )
    json_argument(parser)
