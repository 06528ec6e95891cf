"""Pretraining examples: span corruption, prefix language modelling and supervised rows, by weight.

`MixtureBatches` is what `pretrain` iterates over. Text files are JSONL with a field `text`,
supervised files JSONL with the fields `input` and `target`; weights are shares of examples.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxprompt.data.objectives import Ids, prefix_lm, span_corruption, span_counts
from jaxprompt.data.packing import EncodedExample, length_buckets
from jaxprompt.data.readers import JsonlSource
from jaxprompt.data.stream import BatchStream, Shapes, StreamOptions, row_order
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.typing import Batch, UserError

_Made = tuple[Ids, Ids, int]  # inputs, targets, tokens cut off

_EXAMPLE_STREAM = 12  # keeps an example's random numbers apart from others made of the same seed


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One part of a pretraining mixture.

    Attributes:
      objective: "span_corruption", "prefix_lm" or "supervised".
      files: JSONL files, plain or .xz or .gz; together they are one data set.
      weight: share of the examples, relative to the other entries' weights.
      max_input_length, max_target_length: tokens with the end token. Text is cut to a random
        stretch that fits both; supervised inputs and targets are cut at their ends, and counted.
      noise_density, mean_span_length: of span corruption.
    """

    objective: str
    files: tuple[str, ...]
    weight: float = 1.0
    max_input_length: int = 512
    max_target_length: int = 114
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self):
        if self.objective not in _OBJECTIVES:
            raise UserError(
                f"there is no objective {self.objective!r}; there are {', '.join(_OBJECTIVES)}"
            )
        if not self.files:
            raise UserError(f"files of the {self.objective} entry is empty; name at least one")
        if self.weight <= 0:
            raise UserError(f"weight is {self.weight}, it has to be above 0")
        if not 0 < self.noise_density < 1:
            raise UserError(f"noise_density is {self.noise_density}, it has to be between 0 and 1")
        if self.mean_span_length < 1:
            raise UserError(f"mean_span_length is {self.mean_span_length}, it has to be at least 1")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A pretraining mixture and the shape of its batches.

    Attributes:
      entries: the parts.
      batch_size: rows of a batch, over all processes.
      pack: several examples in a row, every batch of one shape; otherwise an example a row, in
        batches of like length padded to a multiple of `length_multiple`.
      row_input_length, row_target_length: of a packed row; 0 = the longest of the entries.
      max_segments: examples a packed row may hold.
      window_batches: about so many batches are packed or sorted together.
    """

    entries: tuple[MixtureEntry, ...] = ()
    batch_size: int = 32
    pack: bool = True
    row_input_length: int = 0
    row_target_length: int = 0
    max_segments: int = 16
    window_batches: int = 16
    length_multiple: int = 32


class MixtureBatches:
    """An endless iterator of a mixture's batches with `get_state`, `set_state` and `report`."""

    def __init__(
        self,
        config: MixtureConfig,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 4,
        start_id: int | None = None,
    ):
        """Opens the files.

        Args:
          seed: of order, stretches and spans; batches are a function of config, files and seed.
          process_index, process_count: this process's share of every batch's rows.
          prefetch: batches made ahead in a thread, 0 = no thread.
          start_id: the decoder's first input, the pad id unless given.
        Raises: UserError for a missing file or lengths that do not fit a row.
        """
        if not config.entries:
            raise UserError("the mixture has no entries")
        self._parts = [_Part(entry, tokenizer, seed) for entry in config.entries]
        self._order: Any = grain.MapDataset.mix(
            [
                row_order(len(part), seed + number).map(lambda row, number=number: (number, row))
                for number, part in enumerate(self._parts)
            ],
            weights=[entry.weight for entry in config.entries],
        )  # fmt: skip
        options = StreamOptions(
            shapes=_shapes(config),
            pad_id=tokenizer.pad_id,
            start_id=tokenizer.pad_id if start_id is None else start_id,
            seed=seed,
            window_batches=config.window_batches,
            process_index=process_index,
            process_count=process_count,
        )
        self._rows = [len(part) for part in self._parts]
        self._stream = BatchStream(self._draw, options, prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def get_state(self) -> dict:
        """JSON-ready position after the batch last given out."""
        return {**self._stream.get_state(), "rows": self._rows}

    def set_state(self, state: dict) -> None:
        """Continues from what `get_state` gave.

        Raises: UserError if the files have not the number of rows they had then.
        """
        if state["rows"] != self._rows:
            raise UserError(
                f"the mixture's files have {self._rows} rows, the run was started with"
                f" {state['rows']}; bring the files back or start a new run"
            )
        self._stream.set_state({key: state[key] for key in ("next_draw", "waiting", "batch")})

    def close(self) -> None:
        """Stops the thread that works ahead."""
        self._stream.close()

    @property
    def shape_counts(self) -> dict[tuple[int, int], int]:
        """(encoder length, decoder length) -> batches given out."""
        return self._stream.shape_counts

    def report(self) -> list[dict[str, int]]:
        """Per entry: rows, examples made, rows skipped as too short, examples cut, tokens cut."""
        return [part.report() for part in self._parts]

    def _draw(self, draws: Sequence[int]) -> list[EncodedExample | None]:
        places = [self._order[number] for number in draws]
        found: list[EncodedExample | None] = [None] * len(draws)
        for part_number, part in enumerate(self._parts):
            at = [i for i, (number, _) in enumerate(places) if number == part_number]
            made = part.examples([places[i][1] for i in at], [draws[i] for i in at])
            for i, example in zip(at, made, strict=True):
                found[i] = example
        return found


def mixture_batches(
    entries: Sequence[MixtureEntry],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 32,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
    start_id: int | None = None,
    **options: Any,
) -> MixtureBatches:
    """`MixtureBatches` of entries; `options` are the other fields of `MixtureConfig`."""
    config = MixtureConfig(tuple(entries), batch_size, **options)
    return MixtureBatches(
        config,
        tokenizer,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
        start_id=start_id,
    )


def longest_stretch(entry: MixtureEntry) -> int:
    """How many tokens of text fit an entry's lengths once the objective has been applied.

    Raises: UserError if not even two do.
    """
    room = entry.max_input_length - 1, entry.max_target_length - 1
    if entry.objective == "prefix_lm":
        length = sum(room) if min(room) > 0 else 0
    else:
        length = 0
        while all(np.less_equal(_corrupted_lengths(entry, length + 1), room)):
            length += 1
    if length < 2:
        raise UserError(
            f"max_input_length {entry.max_input_length} and max_target_length"
            f" {entry.max_target_length} leave no room for {entry.objective}"
        )
    return length


def _corrupted_lengths(entry: MixtureEntry, length: int) -> tuple[int, int]:
    noise, spans = span_counts(length, entry.noise_density, entry.mean_span_length)
    return length - noise + spans, noise + spans


def _shapes(config: MixtureConfig) -> Shapes:
    inputs = max(entry.max_input_length for entry in config.entries)
    targets = max(entry.max_target_length for entry in config.entries)
    if not config.pack:
        multiple = config.length_multiple
        return Shapes(
            config.batch_size, length_buckets(inputs, multiple), length_buckets(targets, multiple)
        )
    row_inputs = config.row_input_length or inputs
    row_targets = config.row_target_length or targets
    if row_inputs < inputs or row_targets < targets:
        raise UserError(
            f"rows of {row_inputs} and {row_targets} tokens cannot hold the entries' examples of up"
            f" to {inputs} and {targets}; make row_input_length and row_target_length longer"
        )
    return Shapes(config.batch_size, (row_inputs,), (row_targets,), config.max_segments)


class _SpanCorruption:
    fields = ("text",)

    def __init__(self, entry: MixtureEntry, tokenizer: Tokenizer):
        self._entry, self._stretch = entry, longest_stretch(entry)
        _, spans = span_counts(self._stretch, entry.noise_density, entry.mean_span_length)
        self._sentinels = [tokenizer.sentinel_id(number) for number in range(spans)]

    def __call__(self, parts: list[Ids], rng: np.random.Generator) -> _Made | None:
        ids = _random_stretch(parts[0], self._stretch, rng)
        if len(ids) < 2:
            return None
        density, mean = self._entry.noise_density, self._entry.mean_span_length
        return *span_corruption(ids, rng, self._sentinels, density, mean), 0


class _PrefixLM:
    fields = ("text",)

    def __init__(self, entry: MixtureEntry, tokenizer: Tokenizer):
        self._room = entry.max_input_length - 1, entry.max_target_length - 1
        self._stretch = longest_stretch(entry)

    def __call__(self, parts: list[Ids], rng: np.random.Generator) -> _Made | None:
        ids = _random_stretch(parts[0], self._stretch, rng)
        if len(ids) < 2:
            return None
        return *prefix_lm(ids, rng, *self._room), 0


class _Supervised:
    fields = ("input", "target")

    def __init__(self, entry: MixtureEntry, tokenizer: Tokenizer):
        self._room = entry.max_input_length - 1, entry.max_target_length - 1

    def __call__(self, parts: list[Ids], rng: np.random.Generator) -> _Made | None:
        inputs, targets = (ids[:room] for ids, room in zip(parts, self._room, strict=True))
        if not inputs or not targets:
            return None
        return inputs, targets, sum(map(len, parts)) - len(inputs) - len(targets)


_OBJECTIVES = {
    "span_corruption": _SpanCorruption,
    "prefix_lm": _PrefixLM,
    "supervised": _Supervised,
}


class _Part:
    """One entry's rows, and the examples made of them."""

    def __init__(self, entry: MixtureEntry, tokenizer: Tokenizer, seed: int):
        self._objective = _OBJECTIVES[entry.objective](entry, tokenizer)
        self._tokenizer, self._seed = tokenizer, seed
        self._files = [JsonlSource(path) for path in entry.files]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])
        self._counts = dict.fromkeys(("examples", "skipped", "cut_examples", "cut_tokens"), 0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def report(self) -> dict[str, int]:
        return {"rows": len(self), **self._counts}

    def examples(
        self, rows: Sequence[int], draws: Sequence[int]
    ) -> Iterator[EncodedExample | None]:
        """The examples of some rows; a draw's number seeds what is random in it."""
        texts = [text for row in rows for text in self._texts(row)]
        encoded = iter(self._tokenizer.encode_many(texts))
        eos = self._tokenizer.eos_id
        for row, draw in zip(rows, draws, strict=True):
            parts = [next(encoded) for _ in self._objective.fields]
            made = self._objective(
                parts, np.random.default_rng([self._seed, _EXAMPLE_STREAM, draw])
            )
            if made is None:
                self._counts["skipped"] += 1
                yield None
                continue
            inputs, targets, cut = made
            self._counts["examples"] += 1
            self._counts["cut_examples"] += cut > 0
            self._counts["cut_tokens"] += cut
            slots = np.full(len(inputs) + 1, -1, np.int32)
            yield EncodedExample([*inputs, eos], slots, [*targets, eos], row)

    def _texts(self, row: int) -> Iterator[str]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, line = self._files[number], row - int(self._starts[number])
        fields = file[line]
        for name in self._objective.fields:
            if not isinstance(fields.get(name), str):
                raise UserError(
                    f"{file.where(line)} has no text field {name!r}; it has {', '.join(fields)}"
                )
            yield fields[name]


def _random_stretch(ids: Ids, longest: int, rng: np.random.Generator) -> Ids:
    start = int(rng.integers(max(0, len(ids) - longest) + 1))
    return ids[start : start + longest]
