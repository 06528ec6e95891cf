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
    compare_arguments,
    json_argument,
    methods_arguments,
    plan_arguments,
    pretrain_arguments,
    scale_arguments,
    train_arguments,
)
from jaxprompt.prompt_arguments import (
    convert_arguments,
    evaluate_arguments,
    export_arguments,
    import_arguments,
    inspect_arguments,
    predict_arguments,
    transfer_arguments,
)

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
        pretrain_arguments,
        "pretrain a backbone or adapt one to language modelling, all parameters",
        "jaxprompt pretrain pretrain/ladder/1m",
    ),
    "evaluate": _Command(
        "evaluate",
        evaluate_arguments,
        "measure one prompt, or several as an ensemble, on a task",
        "jaxprompt evaluate runs/quickstart/prompt",
    ),
    "predict": _Command(
        "predict",
        predict_arguments,
        "answer the rows of a file of any length",
        "jaxprompt predict runs/quickstart/prompt --input questions.jsonl --output answers.jsonl",
    ),
    "inspect": _Command(
        "inspection",
        inspect_arguments,
        "show a prompt: method, size, backbone, nearest vocabulary tokens of each slot",
        "jaxprompt inspect runs/quickstart/prompt",
    ),
    "compare": _Command(
        "compare",
        compare_arguments,
        "train several prompt methods with several seeds each, and put them in one table",
        "jaxprompt compare compare --only soft --only residual",
    ),
    "scale": _Command(
        "scale",
        scale_arguments,
        "measure prompt tuning, model tuning and prompt design over backbones of several sizes",
        "jaxprompt scale scale/figure1 scale.seeds=[0]",
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
    "transfer": _Command(
        "transfer",
        transfer_arguments,
        "find the trained prompts a new one should begin from, or recycle one for another backbone",
        "jaxprompt transfer --library runs --to runs/mine/prompt --top 3 --combine average "
        "--output start",
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
