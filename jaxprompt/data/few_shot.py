"""Prompt design: a task whose inputs begin with examples of it, as text (Brown et al. 2020).

Nothing is trained; a backbone answers by what it reads. Called by `evaluate` and `scale`.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Example, Task
from jaxprompt.typing import UserError

_ASKED = " answer:"  # behind every input, before its target
_BETWEEN = " "  # behind every target


def with_shots(task: Task, source: Source, shots: int, seed: int) -> Task:
    """The task with some of a source's examples, and their answers, before every input.

    With candidates, these take turns as far as the source has them: four shots of two candidates
    show each twice. Their order is random.

    Args:
      source: rows to draw from, those of training.
      shots: how many, from 0 on.
      seed: of the draw.
    Raises: UserError for a negative number, or more than there are rows.
    """
    if not 0 <= shots <= len(source):
        raise UserError(
            f"shots is {shots}; it has to be between 0 and the {len(source):,} rows there are to "
            "show"
        )
    shown = "".join(
        f"{one.input_text}{_ASKED} {one.target}{_BETWEEN}"
        for one in _drawn(task, source, shots, np.random.default_rng(seed))
    )
    text = shown.replace("{", "{{").replace("}", "}}") + task.config.input + _ASKED
    return Task(dataclasses.replace(task.config, input=text))


def _drawn(task: Task, source: Source, shots: int, rng: np.random.Generator) -> Sequence[Example]:
    """Examples in random order; of each candidate no more than its share while others are left."""
    share = -(-shots // max(1, len(task.candidates)))
    taken: list[Example] = []
    spare: list[Example] = []
    counts: Counter[int] = Counter()
    for row in rng.permutation(len(source)).tolist():
        if len(taken) == shots:
            break
        example = task.example(source[row], source.where(row))
        full = bool(task.candidates) and counts[example.label] >= share
        (spare if full else taken).append(example)
        counts[example.label] += not full
    taken += spare[: shots - len(taken)]
    return [taken[int(place)] for place in rng.permutation(len(taken))]
