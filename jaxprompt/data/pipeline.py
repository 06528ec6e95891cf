"""Rows to batches: endless and shuffled for training, in order and finite for evaluation.

Training: `TrainBatches`. Evaluation and prediction: `eval_chunks` over examples from any source or
stream; each chunk's batches carry positions in the chunk (`example_index_BG`), so results can be
put back in order, and with candidates each batch comes with its `Candidates`, so the encoder runs
once for all of them.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxprompt.data.encoder import Cuts, TaskEncoder, packed_shapes
from jaxprompt.data.mixture import MixedEncoder
from jaxprompt.data.packing import EncodedExample, Row, candidates_of_rows, sizes_of
from jaxprompt.data.sources import Source
from jaxprompt.data.stream import BatchStream, Shapes, State, StreamOptions
from jaxprompt.data.tasks import Example, Task
from jaxprompt.typing import Batch, Candidates, UserError


class TrainBatches:
    """An endless iterator of training batches with `get_state`, `set_state` and `report`.

    Attributes:
      shapes: what batches look like.
      input_buckets: for an evaluation of like shapes that does not pack.
    """

    def __init__(
        self,
        encoder: TaskEncoder | MixedEncoder,
        source: Any,
        *,
        seed: int = 0,
        row_multiple: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Looks at a sample of the rows to choose shapes; starts at the first batch.

        Args:
          encoder, source: of a task, its `Source`; of a mixture, its `MixedSource`.
          seed: of the order; batches are a function of encoder, source, seed and row_multiple.
          row_multiple: packed rows of a batch are a multiple of it.
          process_index, process_count: this process's share of every batch's rows.
        """
        config = encoder.config
        self._encoder, self._source, self._cuts = encoder, source, Cuts()
        sizes = encoder.sample_sizes(source)
        self.input_buckets = encoder.input_buckets(sizes)
        if config.packing:
            self.shapes = packed_shapes(
                config, encoder.longest, sizes, config.batch_size, row_multiple
            )
        else:
            self.shapes = Shapes(config.batch_size, self.input_buckets, encoder.target_buckets)
        self._rows, self._order = encoder.rows_of(source), encoder.order(source, seed)
        options = StreamOptions(
            shapes=self.shapes,
            pad_id=encoder.tokenizer.pad_id,
            start_id=encoder.start_id,
            seed=seed,
            shuffle=config.shuffle and config.tasks_per_batch == "all",  # else draws stay together
            window_batches=config.window_batches,
            process_index=process_index,
            process_count=process_count,
        )
        self._options = options
        self._stream = BatchStream(self._draw, options, config.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def get_state(self) -> State:
        """JSON-ready position after the batch last given out."""
        return {
            **self._stream.get_state(),
            "rows": self._rows,
            "shapes": self.shapes.to_state(),
        }

    def set_state(self, state: State) -> None:
        """Continues from what `get_state` gave, with the shapes of then, whatever devices are here.

        Raises: UserError if the source has not the number of rows it had then.
        """
        if state["rows"] != self._rows:
            raise UserError(
                f"the training data has {self._rows} rows, the run was started with"
                f" {state['rows']}; bring the data back or start a new run"
            )
        shapes = Shapes.from_state(state["shapes"])
        if shapes != self.shapes:
            self.close()
            self.shapes = shapes
            self._options = dataclasses.replace(self._options, shapes=shapes)
            self._stream = BatchStream(self._draw, self._options, self._encoder.config.prefetch)
        own = {key: state[key] for key in state if key not in ("rows", "shapes")}
        self._stream.set_state(own)

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
        return [*self._encoder.encode_rows(self._source, rows, self._cuts)]


class Asked(NamedTuple):
    """An example, and the number of the prompt that is to answer it."""

    example: Example
    prompt: int = 0


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch and how it is answered.

    Attributes:
      batch: rows; `example_index_BG` holds positions in the chunk.
      candidates: what to rank, the same rows with each candidate; None = generate.
      max_new_tokens: how long a generated answer may be.
    """

    batch: Batch
    candidates: Candidates | None
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class EvalChunk:
    """Consecutive examples and their batches; `example_index_BG` holds positions in `asked`."""

    asked: list[Asked]
    batches: list[EvalBatch]


def eval_chunks(
    encoders: Sequence[TaskEncoder],
    asked: Iterable[Asked],
    *,
    generate: bool = False,
    input_buckets: Sequence[int] = (),
    chunk_batches: int = 16,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    cuts: Sequence[Cuts] = (),
) -> Iterator[EvalChunk]:
    """Batches of examples in chunks of at most `chunk_batches` times `eval_batch_size` examples.

    Within a chunk those whose candidates are ranked are packed into rows whose shape the first of
    them decide; those whose answers are generated stand alone, sorted by length. Every batch has
    the same number of rows over all processes; where examples run out, rows are empty (example
    index -1).

    Args:
      encoders: of each prompt of a bank, of one vocabulary; the first one's `DataConfig` says how
        many rows a batch has and whether rows are packed.
      asked: with or without targets; read as they are needed.
      generate: generate even where there are candidates.
      input_buckets: lengths to pad to, the largest at least max_input_length; () = the encoder's
        `stream_buckets`. Packed rows have a length of their own.
      row_multiple: packed rows of a batch are a multiple of it: devices.
      cuts: of each prompt, to count what was cut off to fit.
    """
    counts, remaining = cuts or [Cuts() for _ in encoders], iter(asked)
    rooms = [
        0 if encoder.candidate_ids and not generate else encoder.config.max_target_length
        for encoder in encoders
    ]
    share = (process_index, process_count)
    groups = {
        room: _Group(encoders, rooms, room, tuple(input_buckets), row_multiple, share)
        for room in dict.fromkeys(rooms)
    }
    while chunk := list(
        itertools.islice(remaining, chunk_batches * encoders[0].config.eval_batch_size)
    ):
        encoded: dict[int, list[EncodedExample]] = {room: [] for room in groups}
        for prompt, encoder in enumerate(encoders):
            own = [at for at, (_, number) in enumerate(chunk) if number == prompt]
            examples = [chunk[at].example for at in own]
            encoded[rooms[prompt]] += encoder.encode(examples, own, counts[prompt], prompt)
        batches = [
            batch for room, group in groups.items() for batch in group.batches(encoded[room])
        ]
        yield EvalChunk(chunk, batches)


class _Group:
    """The prompts whose answers one program gives: candidates ranked, or up to so many tokens."""

    def __init__(
        self,
        encoders: Sequence[TaskEncoder],
        rooms: Sequence[int],
        room: int,
        input_buckets: tuple[int, ...],
        row_multiple: int,
        share: tuple[int, int],
    ):
        own = [encoder for encoder, other in zip(encoders, rooms, strict=True) if other == room]
        self._candidate_ids = [encoder.candidate_ids for encoder in encoders]
        self._first, self._room, self._share = encoders[0], room, share
        self._row_multiple = row_multiple
        self._longest = tuple(max(sizes) for sizes in zip(*(e.longest for e in own), strict=True))
        self._shapes = Shapes(
            encoders[0].config.eval_batch_size,
            input_buckets or max((e.stream_buckets for e in own), key=lambda buckets: buckets[-1]),
            max((e.target_buckets for e in own), key=lambda buckets: buckets[-1]),
        )
        self._awaits_shapes = not room and encoders[0].config.packing

    def batches(self, encoded: Sequence[EncodedExample]) -> list[EvalBatch]:
        """Batches of these examples."""
        sizes = sizes_of(encoded)
        if not self._room:
            sizes[:, 1] = self._longest[1]  # whichever candidate stands there
        if self._awaits_shapes and len(sizes):
            self._awaits_shapes, count = False, self._shapes.batch_size
            config = self._first.config
            self._shapes = packed_shapes(config, self._longest, sizes, count, self._row_multiple)
        index, count = self._share
        options = StreamOptions(
            self._shapes,
            pad_id=self._first.tokenizer.pad_id,
            start_id=self._first.start_id,
            process_index=index,
            process_count=count,
        )
        batches = []
        for shapes, rows in self._shapes.rows_of(sizes):
            if shapes.max_segments == 1:
                rows.sort(key=lambda row: sizes[row[0], 0])
            filled = [[encoded[at] for at in row] for row in rows]
            size = shapes.batch_size
            batches += [
                self._batch(shapes, filled[start : start + size], options)
                for start in range(0, len(filled), size)
            ]
        return batches

    def _batch(self, shapes: Shapes, rows: Sequence[Row], options: StreamOptions) -> EvalBatch:
        batch = options.batch(shapes, rows)
        if self._room:
            return EvalBatch(batch, None, self._room)
        candidates = candidates_of_rows(
            options.own(shapes, rows),
            self._candidate_ids,
            batch_size=len(batch.targets_BT),
            target_length=shapes.target_buckets[-1],
            pad_id=options.pad_id,
            start_id=options.start_id,
        )
        return EvalBatch(batch, candidates, 0)


def examples_of(task: Task, source: Source, with_target: bool = True) -> Iterator[Example]:
    """Every row of a source as an example, in order."""
    for index in range(len(source)):
        yield task.example(source[index], source.where(index), with_target)
