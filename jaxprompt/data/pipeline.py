"""A task's rows to batches: endless and shuffled for training, in order and finite for evaluation.

Training: `TrainBatches`. Evaluation and prediction: `eval_chunks` over examples from any source or
stream; each chunk's batches carry positions in the chunk (`example_index_BG`), so results can be
put back in order, and with candidates each batch comes with its `Candidates`, so the encoder runs
once for all of them.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from jaxprompt.data.encoder import Cuts, TaskEncoder
from jaxprompt.data.packing import EncodedExample, Row, candidates_of_rows, sizes_of
from jaxprompt.data.sources import Source
from jaxprompt.data.stream import BatchStream, Shapes, State, StreamOptions, row_order
from jaxprompt.data.tasks import Example, Task
from jaxprompt.typing import Batch, Candidates, UserError


class TrainBatches:
    """An endless iterator of a task's training batches with `get_state`, `set_state` and `report`.

    Attributes:
      example_count: rows of the source.
      shapes: what batches look like.
      input_buckets: for an evaluation of like shapes that does not pack.
    """

    def __init__(
        self,
        encoder: TaskEncoder,
        source: Source,
        *,
        seed: int = 0,
        row_multiple: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Looks at a sample of the rows to choose shapes; starts at the first batch.

        Args:
          seed: of the order; batches are a function of encoder, source, seed and row_multiple.
          row_multiple: packed rows of a batch are a multiple of it: devices, microbatches.
          process_index, process_count: this process's share of every batch's rows.
        """
        config = encoder.config
        self._encoder, self._source, self._cuts = encoder, source, Cuts()
        self.example_count = len(source)
        sizes = encoder.sample_sizes(source)
        self.input_buckets = encoder.input_buckets(sizes)
        if config.packing:
            self.shapes = encoder.packed_shapes(sizes, config.batch_size, row_multiple)
        else:
            self.shapes = Shapes(config.batch_size, self.input_buckets, encoder.target_buckets)
        self._order = row_order(len(source), seed, config.shuffle)
        options = StreamOptions(
            shapes=self.shapes,
            pad_id=encoder.tokenizer.pad_id,
            start_id=encoder.start_id,
            seed=seed,
            shuffle=config.shuffle,
            window_batches=config.window_batches,
            process_index=process_index,
            process_count=process_count,
        )
        self._stream = BatchStream(self._draw, options, config.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def get_state(self) -> State:
        """JSON-ready position after the batch last given out."""
        return {**self._stream.get_state(), "rows": self.example_count}

    def set_state(self, state: State) -> None:
        """Continues from what `get_state` gave.

        Raises: UserError if the source has not the number of rows it had then.
        """
        if state["rows"] != self.example_count:
            raise UserError(
                f"the training data has {self.example_count} rows, the run was started with"
                f" {state['rows']}; bring the data back or start a new run"
            )
        self._stream.set_state({key: state[key] for key in state if key != "rows"})

    def close(self) -> None:
        """Stops the thread that works ahead."""
        self._stream.close()

    @property
    def shape_counts(self) -> dict[tuple[int, int], int]:
        """(encoder length, decoder length) -> batches given out."""
        return self._stream.shape_counts

    @property
    def fill(self) -> float:
        """Share of the encoder positions given out so far that are not padding."""
        return self._stream.fill

    def report(self) -> dict[str, int]:
        """Examples made so far, those made ahead included, and what was cut off to fit."""
        return self._cuts.report()

    def _draw(self, draws: Sequence[int]) -> list[EncodedExample | None]:
        rows = [int(self._order[number]) for number in draws]
        task, source = self._encoder.task, self._source
        examples = [task.example(source[row], source.where(row)) for row in rows]
        return [*self._encoder.encode(examples, rows, self._cuts)]


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch and, for a task with candidates, what to rank: the same rows with each candidate."""

    batch: Batch
    candidates: Candidates | None


@dataclasses.dataclass(frozen=True)
class EvalChunk:
    """Consecutive examples and their batches; `example_index_BG` holds positions in `examples`."""

    examples: list[Example]
    batches: list[EvalBatch]


def eval_chunks(
    encoder: TaskEncoder,
    examples: Iterable[Example],
    *,
    input_buckets: Sequence[int] = (),
    chunk_batches: int = 16,
    packed: bool = False,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    cuts: Cuts | None = None,
) -> Iterator[EvalChunk]:
    """Batches of examples in chunks of at most `chunk_batches` times `eval_batch_size` examples.

    Within a chunk examples are sorted by length, or packed into rows whose shape the first chunk
    decides. Every batch has the same number of rows over all processes; where examples run out,
    rows are empty (example index -1).

    Args:
      examples: with or without targets; read as they are needed.
      input_buckets: lengths to pad to, the largest at least max_input_length; () = the encoder's
        `stream_buckets`. Packed rows have a length of their own.
      packed: several examples a row; only for a task with candidates.
      row_multiple: packed rows of a batch are a multiple of it: devices.
      cuts: counts what was cut off to fit.
    """
    config = encoder.config
    shapes = Shapes(
        config.eval_batch_size,
        tuple(input_buckets) or encoder.stream_buckets,
        encoder.target_buckets,
    )
    if packed and not encoder.candidate_ids:
        raise ValueError("answers are generated for one example a row")
    counts, remaining, is_first = cuts or Cuts(), iter(examples), True
    while chunk := list(itertools.islice(remaining, chunk_batches * config.eval_batch_size)):
        encoded = encoder.encode(chunk, range(len(chunk)), counts)
        sizes = sizes_of(encoded)
        if packed:
            sizes[:, 1] = encoder.target_buckets[-1]  # whichever candidate stands there
            if is_first:
                shapes = encoder.packed_shapes(sizes, config.eval_batch_size, row_multiple)
        rows = shapes.rows_of(sizes)
        if not packed:
            rows.sort(key=lambda row: sizes[row[0], 0])
        options = StreamOptions(
            shapes,
            pad_id=encoder.tokenizer.pad_id,
            start_id=encoder.start_id,
            process_index=process_index,
            process_count=process_count,
        )
        is_first = False
        filled = [[encoded[at] for at in row] for row in rows]
        batches = [
            filled[at : at + shapes.batch_size] for at in range(0, len(filled), shapes.batch_size)
        ]
        yield EvalChunk(chunk, [_eval_batch(batch, encoder, options) for batch in batches])


def examples_of(task: Task, source: Source, with_target: bool = True) -> Iterator[Example]:
    """Every row of a source as an example, in order."""
    for index in range(len(source)):
        yield task.example(source[index], source.where(index), with_target)


def _eval_batch(rows: Sequence[Row], encoder: TaskEncoder, options: StreamOptions) -> EvalBatch:
    batch = options.batch(rows)
    if not encoder.candidate_ids:
        return EvalBatch(batch, None)
    candidates = candidates_of_rows(
        options.own(rows),
        encoder.candidate_ids,
        batch_size=len(batch.targets_BT),
        target_length=options.shapes.target_buckets[-1],
        pad_id=options.pad_id,
        start_id=options.start_id,
    )
    return EvalBatch(batch, candidates)
