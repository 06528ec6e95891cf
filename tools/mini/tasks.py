"""The table of the supervised tasks of jaxprompt-mini.

Called by `prepare.py`. A builder takes a World (the documents of one split), the number of rows
wanted and a random source, and yields rows. Adding a task is one function and one line in TASKS.
Whatever a builder yields is cut to the rows wanted, so it may yield for ever or stop early.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import labelled_tasks
import text_tasks
from world import Row, World

Builder = Callable[[World, int, random.Random], Iterator[Row]]

TASKS: tuple[tuple[str, int, Builder], ...] = (  # name, rows wanted in training, builder
    ("sentiment_crops", 270_000, text_tasks.sentiment_crops),
    ("sentiment_reviews", 42_000, text_tasks.sentiment_reviews),
    ("stars", 14_000, text_tasks.stars),
    ("kind", 45_000, text_tasks.kind),
    ("topic", 80_000, text_tasks.topic),
    ("thing", 60_000, text_tasks.thing),
    ("title", 22_000, text_tasks.title),
    ("title_yes_no", 35_000, text_tasks.title_yes_no),
    ("title_choice", 40_000, text_tasks.title_choice),
    ("follows", 40_000, text_tasks.follows),
    ("cloze", 50_000, text_tasks.cloze),
    ("author", 22_000, text_tasks.author),
    ("order", 30_000, text_tasks.order),
    ("same_document", 30_000, text_tasks.same_document),
    ("shuffled_words", 25_000, text_tasks.shuffled_words),
    ("squad", 21_500, labelled_tasks.squad),
    ("copa", 2_400, labelled_tasks.copa),
    ("cb", 1_500, labelled_tasks.cb),
)


def build(world: World, scale: float, seed: int) -> Iterator[Row]:
    """Rows of every task, `scale` times the wanted count of each, task after task."""
    for name, rows, builder in TASKS:
        count = max(1, round(rows * scale))
        made = builder(world, count, random.Random(f"{seed}/{name}/{world.is_valid}"))
        for _, row in zip(range(count), made, strict=False):
            yield Row(row.input, row.target, row.candidates, name)
