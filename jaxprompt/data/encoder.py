"""Examples of a task -> ids, and the shapes that rows of them should have: `TaskEncoder`.

`pipeline` makes batches of what it encodes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxprompt.data.layout import LaidRow, Layout
from jaxprompt.data.packing import EncodedExample, fitted_buckets, fitted_rows, sizes_of
from jaxprompt.data.sources import Source
from jaxprompt.data.stream import Shapes, row_order
from jaxprompt.data.tasks import Example, Task
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.typing import UserError

_SAMPLE = 2048  # examples of a window that is looked at to choose buckets, at most


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How a task's rows become batches.

    Attributes:
      batch_size, eval_batch_size: rows of a batch, over all processes.
      max_input_length: slots, tokens and end token of an input; longer text is cut, and counted.
      max_target_length: tokens of a target with its end token; longer ones are cut, and counted.
      length_buckets: input lengths that batches are padded to; empty = chosen to pad a sample of
        the training data least.
      bucket_count: how many lengths to choose below max_input_length; each costs one compilation.
      bucket_multiple: chosen lengths are multiples of this.
      packing: several examples stand in a row, so that few positions are padding; batch_size is
        then how many examples a batch has on average.
      pack_length: positions of a packed row; 0 = chosen to fill rows to 95 % of a sample.
      row_multiple: packed rows of a batch are a multiple of it; 0 = of the devices along
        `mesh.data` times `train.accumulate`, so that none is empty. Runs with the same number have
        the same batches on any mesh.
      shuffle: whether training rows come in random order.
      window_batches: about so many batches are sorted by length together.
      tasks_per_batch: of a mixture: "all" mixes tasks freely; "random" gives each batch a few, how
        many and which is drawn anew (see `mixture.SomeTasks`), and needs `packing` off.
      prefetch: batches made ahead in a thread; 0 = none.
    """

    batch_size: int = 32
    eval_batch_size: int = 64
    max_input_length: int = 512
    max_target_length: int = 128
    length_buckets: tuple[int, ...] = ()
    bucket_count: int = 4
    bucket_multiple: int = 16
    packing: bool = True
    pack_length: int = 0
    row_multiple: int = 0
    shuffle: bool = True
    window_batches: int = 16
    tasks_per_batch: Literal["all", "random"] = "all"
    prefetch: int = 4

    def __post_init__(self):
        smallest = {"max_input_length": 2, "max_target_length": 2}
        smallest |= dict.fromkeys(("prefetch", "pack_length", "row_multiple"), 0)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < smallest.get(field.name, 1):
                raise UserError(
                    f"data.{field.name} is {value}, it has to be at least"
                    f" {smallest.get(field.name, 1)}"
                )
        if self.tasks_per_batch == "random" and self.packing:
            raise UserError(
                "data.tasks_per_batch is 'random', and packed rows are filled from the examples of "
                "many batches: give data.packing=off too"
            )
        if 0 < self.pack_length < self.max_input_length:
            raise UserError(
                f"data.pack_length {self.pack_length} cannot hold examples of data.max_input_length"
                f" {self.max_input_length}; make it as long, or the other shorter"
            )
        if any(length < 1 or length > self.max_input_length for length in self.length_buckets):
            raise UserError(
                f"data.length_buckets {list(self.length_buckets)} do not lie between 1 and"
                f" data.max_input_length {self.max_input_length}"
            )


@dataclasses.dataclass
class Cuts:
    """How many examples were made and what was cut off to fit; the counts of a run's report."""

    examples: int = 0
    cut_inputs: int = 0
    cut_input_tokens: int = 0
    cut_targets: int = 0
    cut_target_tokens: int = 0

    def report(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class TaskEncoder:
    """Examples of a task -> ids: its layout, vocabulary and lengths in one place."""

    def __init__(
        self,
        task: Task,
        layout: Layout,
        tokenizer: Tokenizer,
        config: DataConfig,
        start_id: int | None = None,
    ):
        """`start_id` is the decoder's first input, the pad id unless given.

        Raises: UserError for a candidate without tokens or over max_target_length.
        """
        self.task, self.layout, self.tokenizer, self.config = task, layout, tokenizer, config
        self.start_id = tokenizer.pad_id if start_id is None else start_id
        self.candidate_ids = [
            [*ids, tokenizer.eos_id] for ids in tokenizer.encode_many(task.candidates)
        ]
        for candidate, ids in zip(task.candidates, self.candidate_ids, strict=True):
            if not 1 < len(ids) <= config.max_target_length:
                raise UserError(
                    f"candidate {candidate!r} of task {task.config.name} is {len(ids) - 1} tokens;"
                    f" it has to be between 1 and {config.max_target_length - 1}, one less than"
                    " data.max_target_length"
                )

    def lay(self, examples: Sequence[Example]) -> list[LaidRow]:
        """The input side of examples."""
        return self.layout.lay_many(
            [example.fields for example in examples],
            self.tokenizer,
            self.config.max_input_length,
            [example.where for example in examples],
        )

    def encode(
        self, examples: Sequence[Example], indices: Sequence[int], cuts: Cuts, prompt: int = 0
    ) -> list[EncodedExample]:
        """Both sides of examples; no target gives no target ids. Adds to `cuts`.

        Args:
          indices: the examples' numbers.
          prompt: the number of their prompt in a bank.
        Raises: UserError for an input or target that tokenises to nothing.
        """
        targets = self.tokenizer.encode_many([example.target or "" for example in examples])
        room = self.config.max_target_length - 1
        encoded = []
        for example, row, ids, index in zip(
            examples, self.lay(examples), targets, indices, strict=True
        ):
            if example.target is not None and not ids:
                raise UserError(f"{example.where}: target {example.target!r} tokenises to nothing")
            cuts.examples += 1
            cuts.cut_inputs += row.truncated_tokens > 0
            cuts.cut_input_tokens += row.truncated_tokens
            cuts.cut_targets += len(ids) > room
            cuts.cut_target_tokens += max(0, len(ids) - room)
            target_ids = [*ids[:room], self.tokenizer.eos_id] if ids else []
            encoded.append(EncodedExample(row.ids, row.slots, target_ids, index, prompt))
        return encoded

    def encode_rows(
        self,
        source: Source,
        rows: Sequence[int],
        cuts: Cuts,
        *,
        task: int = 0,
        offset: int = 0,
    ) -> list[EncodedExample]:
        """The examples of a source's rows, numbered as they are.

        Args:
          task: the task's number in a mixture.
          offset: added to the examples' numbers.
        """
        examples = [self.task.example(source[row], source.where(row)) for row in rows]
        encoded = self.encode(examples, [row + offset for row in rows], cuts)
        if not task:
            return encoded
        return [dataclasses.replace(example, task_index=task) for example in encoded]

    def rows_of(self, source: Source) -> int:
        """How many rows there are, which a run that goes on has to find again."""
        return len(source)

    def order(self, source: Source, seed: int) -> Any:
        """Draw n -> a row of the source, see `stream.row_order`."""
        return row_order(len(source), seed, self.config.shuffle)

    @property
    def longest(self) -> tuple[int, int]:
        """Encoder and decoder length that an example may have."""
        return self.config.max_input_length, self.target_buckets[-1]

    @property
    def target_buckets(self) -> tuple[int, ...]:
        """Target lengths: one with candidates, the powers of two without."""
        if self.candidate_ids:
            return (max(map(len, self.candidate_ids)),)
        longest = self.config.max_target_length
        powers = itertools.takewhile(lambda n: n < longest, (8 * 2**k for k in itertools.count()))
        return (*powers, longest)

    @property
    def stream_buckets(self) -> tuple[int, ...]:
        """Input lengths for text of unknown length: room for 32, 64, 128, ... tokens."""
        first, longest = self.layout.slot_count + 32, self.config.max_input_length
        rooms = (first - 32 + 32 * 2**k for k in itertools.count())
        return (*itertools.takewhile(lambda n: n < longest, rooms), longest)

    def sample_sizes(self, source: Source) -> np.ndarray:
        """Encoder and decoder length of examples from all over a source, int32 [examples, 2]."""
        window = min(self.config.window_batches * self.config.batch_size, _SAMPLE)
        places = np.unique(np.linspace(0, len(source) - 1, 2 * window).astype(int))
        examples = [self.task.example(source[int(i)], source.where(int(i))) for i in places]
        return sizes_of(self.encode(examples, [0] * len(places), Cuts()))

    def input_buckets(self, sizes: np.ndarray) -> tuple[int, ...]:
        """The configured input lengths, or those that pad the batches of a sample least."""
        config = self.config
        if config.length_buckets:
            return tuple(sorted({*config.length_buckets, config.max_input_length}))
        lengths = sizes[:, 0].tolist()
        longest_of_batches = []
        for parity in (0, 1):  # two windows as training makes them, sorted and cut into batches
            ordered = sorted(lengths[parity::2])
            longest_of_batches += ordered[:: -config.batch_size]
        return fitted_buckets(
            longest_of_batches, config.max_input_length, config.bucket_multiple, config.bucket_count
        )


def packed_shapes(
    config: DataConfig,
    longest: tuple[int, int],
    sizes: np.ndarray,
    examples: int,
    row_multiple: int = 1,
) -> Shapes:
    """Packed rows for about so many examples a batch, chosen by the sizes of a sample.

    Rows are as long as the sample needs them to be, not as `longest` allows: attention costs the
    square of it. Longer examples, of which the sample has none, get roomy rows.

    Args: `longest` and `sizes` as `packing.fitted_rows` takes them.
    """

    def fitted(longest: tuple[int, int]) -> Shapes:
        shape = fitted_rows(
            sizes,
            examples,
            longest,
            input_length=config.pack_length,
            row_multiple=row_multiple,
            length_multiple=config.bucket_multiple,
        )
        lengths = (shape.input_length,), (shape.target_length,)
        return Shapes(shape.rows, *lengths, shape.max_segments)

    roomy = fitted(longest)
    shapes = fitted((int(sizes[:, 0].max()), int(sizes[:, 1].max())))
    if shapes.input_buckets >= roomy.input_buckets:
        return roomy
    return dataclasses.replace(shapes, roomy=roomy)
