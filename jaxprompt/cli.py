"""The command line: arguments, help texts, exit codes; each command is `main` of a room of its own.

Nothing heavy is imported before a command is known, so that help answers at once.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jaxprompt
from jaxprompt import allocator, joining
from jaxprompt.arguments import (
    convert_arguments,
    early_stopping,
    export_arguments,
    import_arguments,
    json_argument,
    methods_arguments,
    plan_arguments,
    positive,
    precision_arguments,
    task_argument,
    train_arguments,
)

_PROMPT_HELP = "a prompt artifact (the directory that training wrote), PEFT's, or a .npy file"
_BARE_HELP = "`none` is the bare backbone that --backbone names"
_INTERRUPTED = 130  # what a shell reports for SIGINT, and below for SIGPIPE
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; None = the process's own.
    Returns: the exit code: 0, 2 for what a user can put right, 130 when interrupted.
    """
    parser = _parser()
    args = _parse(parser, sys.argv[1:] if argv is None else argv)
    if args.room is None:
        parser.print_help()
        return 0
    if argv is None:  # the process is ours
        allocator.keep_pages()
    if argv is None and not args.debug:  # and says things its own way
        sys.unraisablehook = _show_unraisable
        logging.getLogger().addHandler(logging.NullHandler())
    return joining.run(args, _run) if joining.is_asked_for(args) else _run(args)


def _run(args: argparse.Namespace) -> int:
    """The command in this process: its exit code, and what a user can put right in a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = importlib.import_module(args.room).main(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        _end_output()
        return _BROKEN_PIPE
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if args.debug:
            traceback.print_exc()
        _say(f"error: {sentence}")
        _end_output()
        return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of a usage block."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jaxprompt: error: {message}; `{self.prog} --help` shows how\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxprompt",
        description="Prompts for frozen T5 models: trains them, measures them, answers with them.",
        epilog="`jaxprompt COMMAND --help` shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"jaxprompt {jaxprompt.__version__}")
    _add_debug(parser, default=False)
    parser.set_defaults(room=None, command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example:\n  {command.example}",
        )
        subparser.set_defaults(room=f"jaxprompt.{command.room}", command=name)
        command.add_arguments(subparser)
        _add_debug(subparser, default=argparse.SUPPRESS)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses; overrides may also stand behind an option, which argparse alone would refuse."""
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        unknown = [text for text in rest if text.startswith("-")] or rest
        parser.error(f"{args.command or 'jaxprompt'} does not know {unknown[0]!r}")
    if rest:
        args.overrides += rest
    if joining.is_asked_for(args) and (wrong := joining.wrong(args)):
        parser.error(wrong)
    return args


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show the traceback of an error"
    )


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
        ("--early-stopping", early_stopping, False, "true|false|never", early),
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


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
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
    _backbone_arguments(parser)
    _answer_arguments(parser)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _prompt_arguments(parser)
    parser.add_argument(
        "--top", type=positive, default=5, metavar="N", help="nearest tokens shown per slot (5)"
    )


def _prompt_field_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-field",
        default="",
        metavar="F",
        help="the field of a row that names the one of the prompts which answers it",
    )


class _Command(NamedTuple):
    """A command: the file that does it, its arguments, a line on it, an example."""

    room: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    example: str


_COMMANDS = {
    "train": _Command(
        "train",
        train_arguments,
        "train a prompt, or a sweep of them at once; resumes by itself if output_dir holds the run",
        "jaxprompt train quickstart train.steps=200 output_dir=runs/mine",
    ),
    "pretrain": _Command(
        "pretrain",
        train_arguments,
        "pretrain a backbone or adapt one to language modelling, all parameters",
        "jaxprompt pretrain pretrain/mini output_dir=runs/mini",
    ),
    "evaluate": _Command(
        "evaluate",
        _evaluate_arguments,
        "measure one prompt, or several as an ensemble, on a task",
        "jaxprompt evaluate runs/quickstart/prompt",
    ),
    "predict": _Command(
        "predict",
        _predict_arguments,
        "answer the rows of a file of any length",
        "jaxprompt predict runs/quickstart/prompt --input questions.jsonl --output answers.jsonl",
    ),
    "inspect": _Command(
        "inspection",
        _inspect_arguments,
        "show a prompt: method, size, backbone, nearest vocabulary tokens of each slot",
        "jaxprompt inspect runs/quickstart/prompt",
    ),
    "convert": _Command(
        "convert",
        convert_arguments,
        "bring a backbone, also a T5X checkpoint, into the Hugging Face layout",
        "jaxprompt convert t5x/checkpoint_1100000 backbones/base --tokenizer sentencepiece.model",
    ),
    "import": _Command(
        "importing",
        import_arguments,
        "make a prompt artifact of another program's prompt",
        "jaxprompt import sst2.npy prompts/sst2 --backbone google/t5-base-lm-adapt",
    ),
    "export": _Command(
        "exporting",
        export_arguments,
        "write a prompt artifact as another program's prompt",
        "jaxprompt export runs/quickstart/prompt peft/quickstart --format peft",
    ),
    "plan": _Command(
        "plan",
        plan_arguments,
        "say what a run costs on a TPU that is not here: memory, FLOPs, exchanges, speed",
        "jaxprompt plan xxl --topology v5e:2x2",
    ),
    "tasks": _Command("listing", json_argument, "list the tasks that are known", "jaxprompt tasks"),
    "methods": _Command(
        "listing", methods_arguments, "list the prompt methods", "jaxprompt methods --json"
    ),
    "recipes": _Command("listing", json_argument, "list the training recipes", "jaxprompt recipes"),
    "backbones": _Command(
        "listing", json_argument, "list backbones known by name", "jaxprompt backbones --json"
    ),
}


def _sentence(error: BaseException) -> str | None:
    """The one sentence for an error that a user can put right; None for one of ours."""
    from jaxprompt.typing import UserError

    if isinstance(error, UserError):
        return str(error)
    for cause in _causes(error):
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(cause):
            return f"the disk is full{_naming(cause)}; free some space or choose another place"
        if isinstance(cause, PermissionError):
            return f"permission denied{_naming(cause)}; choose a place you may read and write"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _naming(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""


def _end_output() -> None:
    """Drops output that cannot be written any more, so that the interpreter's exit stays quiet."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *place: object) -> None:
    """A warning as one line, without the place in our code that `warnings` would show."""
    _say(f"warning: {' '.join(str(message).split())}")


def _show_unraisable(unraisable: Any) -> None:
    """As Python does it, but for what Orbax's threads stumble over after a save has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _say(text: str) -> None:
    print(f"jaxprompt: {text}", file=sys.stderr)
