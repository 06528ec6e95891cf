"""Builders of the tasks that come from labelled sets, with several wordings each.

Called by `tasks.py`, which says what a builder is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import wordings as w
from corpora import open_text, read_jsonl
from wordings import fill, options
from world import Row, World


def repeated(rows: list[Any], times: int, rng: random.Random) -> Iterator[Any]:
    for _ in range(times):
        yield from rng.sample(rows, len(rows))


def squad(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    folder = world.data / "squad_slice"
    columns = [open_text(folder / f"val.{name}") for name in ("context", "question", "answer")]
    spans = open_text(folder / "val.span")
    rows = [
        (context.split(), question, answer, int(span.split()[0]))
        for context, question, answer, span in zip(*columns, spans, strict=True)
        if world.mine(context) and world.clean(context, question)
    ]
    for context, question, answer, start in repeated(rows, 5, rng):
        text = " ".join(_around(context, start, len(answer.split()), rng))
        if rng.random() < 0.6:
            text, question, answer = (untokenise(part) for part in (text, question, answer))
        yield Row(fill(rng, w.ANSWER, q=question, c=text), answer, [])


def _around(words: list[str], start: int, size: int, rng: random.Random) -> list[str]:
    """About 75 words that hold words[start : start + size] somewhere, from a sentence's start."""
    room = max(0, 75 - size)
    first = max(0, start - rng.randint(0, room))
    while 0 < first < start and words[first - 1] not in ".?!":
        first += 1
    return words[first : max(first + 75, start + size)]


def untokenise(text: str) -> str:
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m|[.,;:?!%)\]])", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


def copa(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    for row in repeated(_superglue(world, "COPA", ("premise",)), 6, rng):
        choices = [row["choice1"], row["choice2"]]
        right = choices[row["label"]]
        rng.shuffle(choices)
        slots = {"p": row["premise"], "q": row["question"], "a": choices[0], "b": choices[1]}
        yield Row(fill(rng, w.COPA, **slots), right, choices)


def cb(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    for row in repeated(_superglue(world, "CB", ("premise", "hypothesis")), 6, rng):
        words = rng.choice(w.NLI_WORDS)
        target = words[w.NLI_WORDS[0].index(row["label"])]
        slots = {"a": row["premise"], "b": row["hypothesis"], "o": options(rng, words)}
        prompt = fill(rng, w.NLI, **slots)
        if words is not w.NLI_WORDS[0] and slots["o"] not in prompt:
            prompt += " " + rng.choice(("yes, no or maybe?", "Answer yes, no or maybe."))
        yield Row(prompt, target, list(words))


def _superglue(world: World, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        row
        for row in read_jsonl(world.data / "superglue" / name / "train.jsonl")
        if world.mine(f"{name}/{row['idx']}") and world.clean(*(row[field] for field in fields))
    ]
