"""Arguments of the commands that take prompts or backbones: to answer with, to bring in, to write.

Imports nothing heavy, as `cli`.
"""

import argparse

from jaxprompt.arguments import json_argument, natural, positive, precision_arguments, task_argument

_PROMPT_HELP = "a prompt artifact (the directory that training wrote), PEFT's, or a .npy file"
_BARE_HELP = "`none` is the bare backbone that --backbone names"


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt evaluate`."""
    parser.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="+",
        help=f"{_PROMPT_HELP}; several are an ensemble; {_BARE_HELP}; NAME=PATH gives it a name",
    )
    _prompt_field_argument(parser)
    task_argument(parser)
    parser.add_argument(
        "--data", metavar="FILE", help="JSONL, CSV or TSV file to take instead of the task's own"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the task's own files are")
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="validation",
        help="of the task's data (validation)",
    )
    parser.add_argument(
        "--shots",
        type=natural,
        metavar="K",
        help="with `none`: put K training examples and their answers before every input, as text; "
        "--seed draws them",
    )
    _backbone_arguments(parser)
    _answer_arguments(parser)


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt predict`."""
    parser.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="+",
        help=f"{_PROMPT_HELP}; NAME=PATH gives it a name; several need --prompt-field",
    )
    _prompt_field_argument(parser)
    _backbone_arguments(parser)
    task_argument(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="JSONL, CSV, TSV or plain lines; - = standard input",
    )
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="what to write; - = standard output (the default)",
    )
    _answer_arguments(parser)


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt inspect`."""
    _prompt_arguments(parser)
    parser.add_argument(
        "--top", type=positive, default=5, metavar="N", help="nearest tokens shown per slot (5)"
    )


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
        help="a PEFT directory, a numpy file, a run of google-research/prompt-tuning, or its T5X "
        "checkpoint",
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
        help="where its slots stand ({prompt}{input}, where PEFT and google-research put them)",
    )
    parser.add_argument(
        "--peft-task",
        type=natural,
        metavar="N",
        help="which task of a multitask prompt of PEFT, from 0 on",
    )
    json_argument(parser)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt export`."""
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt artifact to take")
    parser.add_argument(
        "output", metavar="OUT", help="what to write: a directory for PEFT, a file for numpy"
    )
    parser.add_argument(
        "--format",
        choices=("peft", "numpy"),
        required=True,
        help="the files of Hugging Face PEFT, or the slots as one array, as google-research has it",
    )
    parser.add_argument(
        "--backbone",
        metavar="B",
        help="for PEFT: the prompt's backbone, of which only the config is read (as it says)",
    )
    json_argument(parser)


def transfer_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `jaxprompt transfer`."""
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="with --recycle: what to recycle"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="with --recycle: what to write")
    group = parser.add_argument_group("which prompts to begin from (SPoT)")
    for name, letter, text in (
        ("--library", "DIR", "a directory of prompts of one backbone, or of runs"),
        ("--to", "PROMPT", "rank the library by similarity to this prompt (all pairs without it)"),
        ("--output", "OUT", "with --to: write the prompt to begin from"),
        ("--plot", "PNG", "draw similarities and the tree of the library"),
    ):
        group.add_argument(name, metavar=letter, help=text)
    group.add_argument(
        "--similarity",
        choices=("per-token", "average-tokens"),
        default="per-token",
        help="mean cosine of all pairs of slots, or cosine of the mean slots (per-token)",
    )
    group.add_argument(
        "--top", type=positive, default=1, metavar="K", help="with --output: the K likest (1)"
    )
    group.add_argument(
        "--combine",
        choices=("best", "average"),
        default="best",
        help="with --output: each of the K to try in turn, or their mean by similarity (best)",
    )
    group = parser.add_argument_group("the same prompt for another backbone (recycling)")
    group.add_argument("--recycle", choices=("v2v-nn", "v2v-lin", "lin-comb"), help="by what map")
    group.add_argument("--to-backbone", metavar="B", help="the backbone to make a prompt for")
    group.add_argument("--from-backbone", metavar="A", help="the prompt's (as it says itself)")
    for name, kind, default, text in (
        ("--seed", natural, 0, "of v2v-nn (0)"),
        ("--words", positive, 4000, "words to learn from (4000)"),
        ("--skip-words", natural, 1000, "of the most frequent words (1000)"),
    ):
        group.add_argument(name, type=kind, default=default, metavar="N", help=text)
    json_argument(parser)


def _prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=_PROMPT_HELP)
    _backbone_arguments(parser)


def _backbone_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone", metavar="B", help="directory or hub name to use for the prompt's own backbone"
    )
    precision_arguments(parser)
    parser.add_argument(
        "--allow-other-backbone",
        action="store_true",
        help="use the prompt with another backbone than it was trained with, where shapes allow",
    )
    json_argument(parser)


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="rows at a time (64)"
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="generate the answer even if the task has candidates to choose from",
    )
    parser.add_argument(
        "--max-input-length",
        type=positive,
        metavar="N",
        help="tokens of an input, slots included (what the prompt was trained with, else 512)",
    )
    parser.add_argument(
        "--max-target-length",
        type=positive,
        metavar="N",
        help="tokens of a generated answer (what the prompt was trained with, else 128)",
    )
    _search_arguments(parser)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where answers are generated")
    early = (
        "beams: end with N answers (true), when no better one is in sight (false, the default), "
        "when none is possible (never)"
    )
    options = (
        ("--num-beams", int, 1, "N", "width of a beam search (1 = none)"),
        ("--length-penalty", float, 1.0, "X", "beams: log-probability / length ** X (1.0)"),
        ("--early-stopping", _early_stopping, False, "true|false|never", early),
        ("--temperature", float, 0.0, "X", "above 0 draws tokens at random (0 = the likeliest)"),
        ("--top-k", int, 0, "K", "draw from the K likeliest tokens (0 = from all)"),
        ("--top-p", float, 1.0, "P", "draw from the likeliest tokens that make up P (1.0 = all)"),
        ("--repetition-penalty", float, 1.0, "X", "make tokens that came less likely again (1.0)"),
        ("--no-repeat-ngram-size", int, 0, "N", "let no N tokens in a row come twice (0 = may)"),
        ("--num-return-sequences", int, 1, "N", "answers for each input, in `predict` (1)"),
        ("--seed", int, 0, "N", "of drawing at random (0)"),
    )
    for name, kind, default, letter, text in options:
        group.add_argument(name, type=kind, default=default, metavar=letter, help=text)
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer where this text comes; may be given several times",
    )


def _early_stopping(text: str) -> bool | str:
    known: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def _prompt_field_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-field",
        default="",
        metavar="F",
        help="the field of a row that names the one of the prompts which answers it",
    )
