"""`jaxprompt predict`: answers the rows of a file or stream, in order, in constant memory."""

import argparse
import collections
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import IO, Any

from jaxprompt import files
from jaxprompt.answerer import Answer, Answerer
from jaxprompt.data.pipeline import Asked
from jaxprompt.data.readers import Fields, read_stream
from jaxprompt.data.tasks import Task
from jaxprompt.inference import (
    ask_named,
    backbone_of,
    cut_note,
    encoder_of,
    generation_of,
    put_on,
    read_prompts,
    task_of,
    with_candidates,
)
from jaxprompt.typing import UserError

_PLAIN = "\0text"  # the field of a line of plain text while the task takes several fields


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt predict PROMPT --input FILE|- [--output FILE|-] [--json]`.

    With `--prompt-field F` several prompts answer one stream: field F of a row names its prompt.

    Every input row becomes one line of output: the row as a JSON object, `prediction` and `score`
    added, with `scores` where candidates were ranked, and `more` where several answers were asked
    for. An output file takes its place when it is complete; standard output gets lines as soon as a
    batch is answered.
    """
    names, prompts = zip(*read_prompts(args.prompts), strict=True)
    if len(prompts) > 1 and not args.prompt_field:
        raise UserError(
            f"{len(prompts)} prompts are given; --prompt-field says which field of a row names its "
            "prompt"
        )
    tasks = [task_of(prompt, args.task) for prompt in prompts]
    if args.generate:
        tasks = [with_candidates(task, ()) for task in tasks]
    named = next((prompt for prompt in prompts if prompt is not None), None)
    backbone = backbone_of(named, args.backbone, args.dtype, args.quantize)
    prompted = put_on(backbone, *prompts, allow_other=args.allow_other_backbone)
    streams, typed = args.input == "-", args.input == "-" and sys.stdin.isatty()
    encoders = [
        encoder_of(
            backbone,
            prompt,
            task,
            batch_size=1 if typed else args.batch_size,
            max_input_length=args.max_input_length,
            max_target_length=args.max_target_length,
        )
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    answerer = Answerer(
        prompted.graphdef,
        encoders,
        generation=generation_of(args),
        chunk_batches=1 if streams else 16,
    )
    count, rows = 0, collections.deque[Fields]()  # rows read and not yet answered: one chunk
    if args.prompt_field:
        named_rows = _rows(args.input, rows, args.prompt_field)
        asked = ask_named(args.prompt_field, names, tasks, named_rows, with_target=False)
    else:
        asked = _asked(tasks[0], args.input, rows)
    with _opened(args.output) as output:
        for answered in answerer.answers(prompted.trained, prompted.frozen, asked):
            for _, answer in answered:
                line = {**rows.popleft(), **_told(answer)}
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            count += len(answered)
        if not count:
            raise UserError(f"{'standard input' if streams else args.input} has no rows")
    if args.output != "-":
        cut = sum(cuts.cut_inputs for cuts in answerer.cuts)
        told = {"rows": count, "output": args.output, "cut_inputs": cut}
        if args.json:
            print(json.dumps(told, ensure_ascii=False))
        else:
            print(f"{count:,} rows answered in {args.output}", file=sys.stderr)
    for cuts, encoder in zip(answerer.cuts, encoders, strict=True):
        note = cut_note(cuts, encoder.config.max_input_length)
        if note:
            print(note, file=sys.stderr)


def _asked(task: Task, path: str, rows: collections.deque[Fields]) -> Iterator[Asked]:
    """Examples of a file's rows, without targets; the rows themselves are added to `rows`.

    Raises: UserError for a malformed row, or a line of plain text if the task takes several fields.
    """
    try:
        text_field = task.text_field
    except UserError:
        text_field = _PLAIN
    for fields, where in read_stream(path, text_field):
        if _PLAIN in fields:
            _ = task.text_field  # raises and names the fields it takes
        rows.append(fields)
        yield Asked(task.example(fields, where, with_target=False))


def _rows(
    path: str, rows: collections.deque[Fields], prompt_field: str
) -> Iterator[tuple[Fields, str]]:
    """A file's rows that name their prompt, and where they stand; also added to `rows`.

    Raises: UserError for a malformed row, or a line of plain text.
    """
    for fields, where in read_stream(path, _PLAIN):
        if _PLAIN in fields:
            raise UserError(f"{where} is plain text, which has no field {prompt_field!r}")
        rows.append(fields)
        yield fields, where


def _told(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"prediction": answer.text, "score": round(answer.score, 6)}
    if answer.scores:
        told["scores"] = {name: round(score, 6) for name, score in answer.scores.items()}
    elif not answer.complete:
        told["complete"] = False
    if answer.more:
        told["more"] = [_told(another) for another in answer.more]
    return told


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[str]]:
    if path == "-":
        yield sys.stdout
        return
    with files.replacing(path) as output:
        yield output
