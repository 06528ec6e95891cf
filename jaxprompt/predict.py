"""`jaxprompt predict`: answers the rows of a file or stream, in order, in constant memory."""

import argparse
import collections
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import IO, Any

from jaxprompt import files
from jaxprompt.data.readers import Fields, read_stream
from jaxprompt.data.tasks import Example, Task
from jaxprompt.inference import (
    Answer,
    Answerer,
    backbone_of,
    cut_note,
    encoder_of,
    generation_of,
    put_on,
    read_prompt,
    task_of,
    with_candidates,
)
from jaxprompt.typing import UserError

_PLAIN = "\0text"  # the field of a line of plain text while the task takes several fields


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt predict PROMPT --input FILE|- [--output FILE|-] [--json]`.

    Every input row becomes one line of output: the row as a JSON object, `prediction` and `score`
    added, with `scores` where candidates were ranked, and `more` where several answers were asked
    for. An output file takes its place when it is complete; standard output gets lines as soon as a
    batch is answered.
    """
    prompt = read_prompt(args.prompt)
    task = task_of(prompt, args.task)
    if args.generate:
        task = with_candidates(task, ())
    backbone = backbone_of(prompt, args.backbone, args.dtype)
    prompted = put_on(backbone, prompt, allow_other=args.allow_other_backbone)
    streams, typed = args.input == "-", args.input == "-" and sys.stdin.isatty()
    encoder = encoder_of(
        backbone,
        prompt,
        task,
        batch_size=1 if typed else args.batch_size,
        max_input_length=args.max_input_length,
        max_target_length=args.max_target_length,
    )
    answerer = Answerer(
        prompted.graphdef,
        encoder,
        generation=generation_of(args),
        chunk_batches=1 if streams else 16,
    )
    count, rows = 0, collections.deque[Fields]()  # rows read and not yet answered: one chunk
    examples = _examples(task, args.input, rows)
    with _opened(args.output) as output:
        for answered in answerer.answers(prompted.trained, prompted.frozen, examples):
            for _, answer in answered:
                line = {**rows.popleft(), **_told(answer)}
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            count += len(answered)
        if not count:
            raise UserError(f"{'standard input' if streams else args.input} has no rows")
    if args.output != "-":
        told = {"rows": count, "output": args.output, "cut_inputs": answerer.cuts.cut_inputs}
        if args.json:
            print(json.dumps(told, ensure_ascii=False))
        else:
            print(f"{count:,} rows answered in {args.output}", file=sys.stderr)
    note = cut_note(answerer.cuts, encoder.config.max_input_length)
    if note:
        print(note, file=sys.stderr)


def _examples(task: Task, path: str, rows: collections.deque[Fields]) -> Iterator[Example]:
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
        yield task.example(fields, where, with_target=False)


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
