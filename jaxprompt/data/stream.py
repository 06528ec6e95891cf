"""Batches from numbered draws: shuffled windows, few shapes, exact resumption, one thread ahead.

`BatchStream` knows nothing of what an example is, so training on a task (`pipeline`) and
pretraining on a mixture (`pretraining`) share it.
"""

import dataclasses
import functools
import queue
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxprompt.data.packing import (
    EncodedExample,
    Indices,
    Row,
    batch_of_rows,
    bucket_length,
    first_fit_rows,
    roomy_rows,
    row_lengths,
    sizes_of,
)
from jaxprompt.typing import Batch, UserError

Draw = Callable[[Sequence[int]], list[EncodedExample | None]]
"""Draw numbers -> their examples, the same on every call; None where a draw gives no example."""

State = dict[str, Any]

_GIVE_UP = 10_000  # draws without an example before training ends with an error
_FEW_ROWS = 2**16  # below this many a permutation is kept as a table
# Keep random numbers made of the same seed for different ends apart.
_WINDOW_STREAM, _ORDER_STREAM = 11, 13


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Which shapes batches may have.

    Attributes:
      batch_size: rows of a batch, over all processes.
      input_buckets: encoder lengths, ascending; the last is the longest an example may be.
      target_buckets: the same for the decoder.
      max_segments: examples a row may hold; over 1, rows are packed and all have the last lengths.
      roomy: packed rows for the few examples that are too long for these; None = all fit.
    """

    batch_size: int
    input_buckets: tuple[int, ...]
    target_buckets: tuple[int, ...]
    max_segments: int = 1
    roomy: "Shapes | None" = None

    def to_state(self) -> "State":
        """JSON-ready; `from_state` makes it again."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: "State") -> "Shapes":
        """Inverse of `to_state`, after a way through JSON."""
        lists = {key: tuple(state[key]) for key in ("input_buckets", "target_buckets")}
        roomy = state["roomy"] and cls.from_state(state["roomy"])
        return cls(**{**state, **lists, "roomy": roomy})

    def rows_of(self, sizes: np.ndarray) -> list[tuple["Shapes", list[Indices]]]:
        """Which examples share a row, by their sizes as `packing.sizes_of` gives them.

        Returns: rows for each shape of batch; with `roomy`, an example that is too long for the
          other rows takes as many others with it as a batch of them has room for.
        """
        if self.roomy is None:
            return [(self, self._own_rows(sizes))]
        is_long = np.any(sizes > (self.input_buckets[-1], self.target_buckets[-1]), axis=1)
        rows = roomy_rows(
            sizes,
            is_long,
            batch_rows=self.roomy.batch_size,
            input_length=self.roomy.input_buckets[-1],
            target_length=self.roomy.target_buckets[-1],
            max_segments=self.roomy.max_segments,
        )
        taken = np.zeros(len(sizes), bool)
        taken[[position for row in rows for position in row]] = True
        rest = np.flatnonzero(~taken)
        own = [[int(rest[at]) for at in row] for row in self._own_rows(sizes[rest])]
        return [(self, own), (self.roomy, rows)]

    def _own_rows(self, sizes: np.ndarray) -> list[Indices]:
        if self.max_segments == 1:
            return [[position] for position in range(len(sizes))]
        return first_fit_rows(
            sizes, self.input_buckets[-1], self.target_buckets[-1], self.max_segments
        )

    def of_rows(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Encoder and decoder length for these rows."""
        if self.max_segments > 1:
            return self.input_buckets[-1], self.target_buckets[-1]
        inputs, targets = row_lengths(rows)
        return (
            bucket_length(inputs, self.input_buckets),
            bucket_length(targets, self.target_buckets),
        )


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How draws become batches.

    Attributes:
      shapes: the batches' shapes.
      pad_id, start_id: padding, and the decoder's first input.
      seed: of the order of batches.
      shuffle: False keeps the order of the draws, and mixes lengths in a batch.
      window_batches: about so many batches are sorted by length together.
      process_index, process_count: this process's share of every batch.
    """

    shapes: Shapes
    pad_id: int
    start_id: int
    seed: int = 0
    shuffle: bool = True
    window_batches: int = 16
    process_index: int = 0
    process_count: int = 1

    def own(self, shapes: Shapes, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's share of a batch's rows; the last processes may have fewer, or none."""
        share = self.share(shapes)
        return rows[self.process_index * share : (self.process_index + 1) * share]

    def share(self, shapes: Shapes) -> int:
        """Rows of a batch in each process, empty ones included."""
        return -(-shapes.batch_size // self.process_count)

    def batch(self, shapes: Shapes, rows: Sequence[Row]) -> Batch:
        """This process's share of a batch, in the shape that the whole batch needs."""
        input_length, target_length = shapes.of_rows(rows)
        return batch_of_rows(
            self.own(shapes, rows),
            batch_size=self.share(shapes),
            input_length=input_length,
            target_length=target_length,
            max_segments=shapes.max_segments,
            pad_id=self.pad_id,
            start_id=self.start_id,
        )


class BatchStream:
    """An endless iterator of batches over draws 0, 1, 2, ..., resumable at every batch.

    Draws are taken in windows. Within a window, examples of like length share a batch (or are
    packed into rows), and the batches come in random order; what does not fill a batch waits for
    the next window. Every process makes the same windows and keeps its own rows of each batch, so
    shapes agree among processes and the batches do not depend on how many there are.
    """

    def __init__(self, draw: Draw, options: StreamOptions, prefetch: int = 4):
        """Starts at draw 0; a thread makes `prefetch` batches ahead, none if 0."""
        self._draw, self._options, self._prefetch = draw, options, prefetch
        self._shape_counts: Counter[tuple[int, int]] = Counter()
        self._filled = self._positions = 0
        self._batches: _Ahead | Iterator[tuple[Batch, State]] = iter(())
        self.set_state({"next_draw": 0, "waiting": [], "batch": 0})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._state = next(self._batches)
        self._shape_counts[batch.encoder_ids_BS.shape[1], batch.targets_BT.shape[1]] += 1
        self._filled += int(np.count_nonzero(batch.encoder_segments_BS))
        self._positions += batch.encoder_segments_BS.size
        return batch

    def get_state(self) -> State:
        """JSON-ready position after the batch last given out."""
        return dict(self._state)

    def set_state(self, state: State) -> None:
        """Continues from what `get_state` gave under the same draws, options and seed."""
        self.close()
        self._state = dict(state)
        batches = _batches(self._draw, self._options, self._state)
        self._batches = _Ahead(batches, self._prefetch) if self._prefetch else batches

    def close(self) -> None:
        """Stops the thread that works ahead."""
        if isinstance(self._batches, _Ahead):
            self._batches.close()

    @property
    def fill(self) -> float:
        """Share of the encoder positions given out so far that are not padding."""
        return self._filled / max(1, self._positions)

    @property
    def shape_counts(self) -> dict[tuple[int, int], int]:
        """(encoder length, decoder length) -> batches given out."""
        return dict(self._shape_counts)


def _batches(draw: Draw, options: StreamOptions, state: State) -> Iterator[tuple[Batch, State]]:
    """Batches from `state` on, each with the state after it."""
    first = state["batch"]
    while True:
        batches, following = _window(draw, options, state["next_draw"], state["waiting"])
        for number in range(first, len(batches)):
            is_last = number + 1 == len(batches)
            yield (
                options.batch(*batches[number]),
                following if is_last else {**state, "batch": number + 1},
            )
        state, first = following, 0


def _window(
    draw: Draw, options: StreamOptions, next_draw: int, waiting: Sequence[int]
) -> tuple[list[tuple[Shapes, list[Row]]], State]:
    """The batches (rows of a shape) of the window that starts here, and the state after it."""
    shapes, size = options.shapes, options.shapes.batch_size
    step = options.window_batches * size * max(1, shapes.max_segments // 2)
    rng = np.random.default_rng([options.seed, _WINDOW_STREAM, next_draw])
    examples: list[EncodedExample] = []
    draws: list[int] = []
    batches: list[tuple[Shapes, list[Indices]]] = []
    left: list[int] = []
    wanted, first_draw = list(waiting), next_draw
    while not batches:
        wanted += range(next_draw, next_draw + step)
        next_draw += step
        drawn = [(number, e) for number, e in zip(wanted, draw(wanted), strict=True) if e]
        draws += [number for number, _ in drawn]
        examples += [example for _, example in drawn]
        wanted, left = [], []
        for kind, rows in shapes.rows_of(sizes_of(examples)):
            if options.shuffle:
                rows = [rows[at] for at in rng.permutation(len(rows))]
            full = len(rows) - len(rows) % kind.batch_size
            left += [draws[position] for row in rows[full:] for position in row]
            rows = rows[:full]
            if options.shuffle and kind.max_segments == 1:
                rows.sort(key=lambda row: _length(examples[row[0]]))
            size = kind.batch_size
            batches += [(kind, rows[at : at + size]) for at in range(0, full, size)]
        if not examples and next_draw - first_draw > _GIVE_UP:
            raise UserError(f"of {_GIVE_UP} rows drawn in turn none has anything to train on")
    order = rng.permutation(len(batches)) if options.shuffle else range(len(batches))
    filled = [
        (kind, [[examples[position] for position in row] for row in rows])
        for kind, rows in (batches[at] for at in order)
    ]
    return filled, {"next_draw": next_draw, "waiting": sorted(left), "batch": 0}


def _length(example: EncodedExample) -> tuple[int, int]:
    return len(example.encoder_ids), len(example.target_ids)


def row_order(count: int, seed: int, shuffle: bool = True) -> Any:
    """An endless Grain data set of row numbers: draw n -> a row of `count`, epoch after epoch.

    Every epoch has every row once; with `shuffle` each epoch has an order of its own, a function of
    `seed`. Takes constant memory where `count` is large.
    """
    rows = grain.MapDataset.range(count)
    if not shuffle:
        return rows.repeat()
    if count < _FEW_ROWS:
        return grain.MapDataset.source(_FewRows(count, seed))
    return rows.seed(seed).shuffle().repeat()


class _FewRows:
    """Permutations as tables, because Grain's shuffling by index is slow for small numbers."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._table = functools.lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> int:
        epoch, position = divmod(int(index), self._count)
        return int(self._table(epoch)[position])

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, _ORDER_STREAM, epoch])
        return rng.permutation(self._count)


class _Ahead:
    """Runs an iterator in a daemon thread, a few items ahead; its exceptions come out of `next`."""

    def __init__(self, items: Iterator[Any], count: int):
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(items, self._ready, self._stopped), daemon=True
        )
        self._thread.start()
        # The thread holds no reference to this object. At exit it is waited for: a thread that is
        # in a tokenizer while the interpreter goes away would abort the process.
        weakref.finalize(self, _stop, self._stopped, self._thread)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        return item

    def close(self) -> None:
        _stop(self._stopped, self._thread)


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join()


def _fill(items: Iterator[Any], ready: queue.Queue, stopped: threading.Event) -> None:
    def put(item: Any, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    try:
        for item in items:
            put(item, None)
            if stopped.is_set():
                return
        put(None, StopIteration())
    except BaseException as error:
        put(None, error)
