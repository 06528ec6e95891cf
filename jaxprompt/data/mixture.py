"""Training examples of several tasks in one stream, at given rates; each knows its task.

`pipeline.TrainBatches` takes the pair `MixedEncoder` and `MixedSource` as it takes one task's.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jaxprompt.data.encoder import Cuts, TaskEncoder
from jaxprompt.data.packing import EncodedExample
from jaxprompt.data.sources import Source
from jaxprompt.data.stream import row_order
from jaxprompt.data.tasks import MixedTask
from jaxprompt.typing import UserError

_MOST_SAMPLED = 512  # rows of each task that are looked at to choose shapes
_TASK_STREAM = 17  # keeps its random numbers apart from others of the same seed


class MixedSource:
    """The rows of several tasks: row n is of the task whose rows n lies among.

    Attributes:
      parts: each task's rows.
      counts: how many these are.
      offsets: number of each task's first row.
    """

    def __init__(self, parts: Sequence[Source]):
        self.parts = list(parts)
        self.counts = [len(part) for part in parts]
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)]).tolist()

    def __len__(self) -> int:
        return self.offsets[-1]


class MixedEncoder:
    """Examples of several tasks -> ids, each by its own task's encoder.

    Args:
      encoders: of each task; all of one vocabulary and one `DataConfig`.
      rates: shares of the examples, relative to each other.
    """

    def __init__(self, encoders: Sequence[TaskEncoder], rates: Sequence[float]):
        self.encoders, self.rates = list(encoders), list(rates)
        first = encoders[0]
        self.config, self.tokenizer, self.start_id = first.config, first.tokenizer, first.start_id

    @property
    def longest(self) -> tuple[int, int]:
        """Encoder and decoder length that an example may have."""
        return self.config.max_input_length, self.target_buckets[-1]

    @property
    def target_buckets(self) -> tuple[int, ...]:
        """The target lengths of all tasks."""
        return tuple(sorted({size for one in self.encoders for size in one.target_buckets}))

    def rows_of(self, source: MixedSource) -> list[int]:
        """Each task's rows, which a run that goes on has to find again."""
        return list(source.counts)

    def order(self, source: MixedSource, seed: int) -> Any:
        """Draw n -> a row of the source: tasks by their rates, each in an order of its own.

        The smallest rate is met exactly, the others to 1 % of it; with `SomeTasks` all on average.
        """
        orders = [
            row_order(count, seed + number, self.config.shuffle).map(
                lambda row, offset=offset: int(row) + offset
            )
            for number, (count, offset) in enumerate(
                zip(source.counts, source.offsets, strict=False)
            )
        ]
        if self.config.tasks_per_batch == "random":
            return SomeTasks(orders, self.rates, self.config.batch_size, seed)
        return grain.MapDataset.mix(orders, weights=self.rates)

    def sample_sizes(self, source: MixedSource) -> np.ndarray:
        """Lengths of examples, as `TaskEncoder.sample_sizes`, as many of each task as it has draws.

        Returns: int32 [examples, 2].
        """
        sizes = []
        for encoder, part, rate in zip(self.encoders, source.parts, self.rates, strict=True):
            own = encoder.sample_sizes(part)
            wanted = max(1, round(_MOST_SAMPLED * rate / max(self.rates)))
            sizes.append(own[np.linspace(0, len(own) - 1, wanted).astype(int)])
        return np.concatenate(sizes)

    def input_buckets(self, sizes: np.ndarray) -> tuple[int, ...]:
        """As `TaskEncoder.input_buckets`."""
        return self.encoders[0].input_buckets(sizes)

    def encode_rows(
        self, source: MixedSource, rows: Sequence[int], cuts: Cuts
    ) -> list[EncodedExample]:
        """The examples of rows, in their order; see `TaskEncoder.encode_rows`."""
        owners = np.searchsorted(source.offsets, rows, side="right") - 1
        encoded: dict[int, EncodedExample] = {}
        for number, (encoder, part) in enumerate(zip(self.encoders, source.parts, strict=True)):
            places = np.flatnonzero(owners == number).tolist()
            offset = source.offsets[number]
            own = [rows[place] - offset for place in places]
            made = encoder.encode_rows(part, own, cuts, task=number, offset=offset)
            encoded |= dict(zip(places, made, strict=True))
        return [encoded[place] for place in range(len(rows))]


class SomeTasks:
    """Draws whose every `batch_size` are of a few tasks: MPT's stochastic task sampling.

    For each batch K is drawn from 2 to T, then K times a task by the rates, so that one may come
    twice; these take turns in the batch. Which tasks is a function of seed and batch; a task's rows
    come in its own order, none left out.

    Source: Wang et al. 2023, arXiv 2303.02861, as `loader.py` of XYaoooo/DPT has it, which is built
      on MPT's code; there what K does not divide goes to any of the tasks, here to the first.
    """

    def __init__(self, orders: Sequence[Any], rates: Sequence[float], batch_size: int, seed: int):
        self._orders, self._size, self._seed = orders, batch_size, seed
        self._shares = np.asarray(rates) / np.sum(rates)
        self._before = [np.zeros(len(orders), int)]  # draws of each task before batch n
        self._places = functools.lru_cache(maxsize=64)(self._tasks)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> int:
        batch, place = divmod(draw, self._size)
        while len(self._before) <= batch:
            counts = np.bincount(self._places(len(self._before) - 1), minlength=len(self._orders))
            self._before.append(self._before[-1] + counts)
        tasks = self._places(batch)
        task = tasks[place]
        turn = self._before[batch][task] + np.count_nonzero(tasks[:place] == task)
        return self._orders[task][int(turn)]

    def _tasks(self, batch: int) -> np.ndarray:
        """The task of each draw of a batch, [batch_size]."""
        rng, count = np.random.default_rng([self._seed, _TASK_STREAM, batch]), len(self._orders)
        drawn = rng.choice(count, rng.integers(2, count, endpoint=True), p=self._shares)
        return np.resize(drawn, self._size)


def rates_of(mixture: Sequence[MixedTask], counts: Sequence[int]) -> list[float]:
    """The rates that are given, or the tasks' numbers of rows, each at most its `cap`.

    Raises: UserError if some tasks have a rate and others none.
    Source: Raffel et al. 2020, section 3.5.2 (examples-proportional mixing).
    """
    given = [one.rate for one in mixture if one.rate is not None]
    if not given:
        return [float(min(count, one.cap)) for one, count in zip(mixture, counts, strict=True)]
    if len(given) < len(mixture):
        raise UserError(
            "some tasks of task.mixture have a rate and others have none: give all of them one, or "
            "none, for rates by their numbers of rows"
        )
    return given
