"""Encoded examples -> rows -> `Batch`: what stands in which row is decided here, as data.

A row is a list of examples, each of which becomes one segment: one alone, or as many as
`first_fit_rows` finds room for in rows of a shape that `fitted_rows` chooses. The compiled program
is the same for both.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprompt.typing import Batch, Candidates


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """One example as ids, ready to stand in a row.

    Attributes:
      encoder_ids: token ids with the end token last, any id where a slot stands.
      encoder_slots: as long as encoder_ids; the slot's index, -1 for a token.
      target_ids: token ids with the end token last; may be empty when there is nothing to predict.
      index: the example's number in its source.
      prompt_index: which prompt of a bank it uses.
      task_index: which task of a mixture it is of.
    """

    encoder_ids: Sequence[int] | np.ndarray
    encoder_slots: Sequence[int] | np.ndarray
    target_ids: Sequence[int]
    index: int
    prompt_index: int = 0
    task_index: int = 0


Row = list[EncodedExample]
Indices = list[int]


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that holds `length`.

    Raises: ValueError if none does.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"length {length} is over the largest bucket {buckets[-1]}")


def length_buckets(longest: int, multiple: int) -> tuple[int, ...]:
    """Every multiple of `multiple` below `longest`, and `longest`."""
    return (*range(multiple, longest, multiple), longest)


def fitted_buckets(
    lengths: Sequence[int], longest: int, multiple: int, count: int
) -> tuple[int, ...]:
    """The buckets that pad a sample of lengths least.

    Args:
      lengths: a sample of what will be padded, none over `longest`.
      longest: always the last bucket, for what the sample does not show.
      multiple: the other buckets are multiples of this.
      count: at most so many buckets beside `longest`.
    Returns: ascending lengths; the exact optimum, by dynamic programming over the multiples.
    """
    options = [length for length in length_buckets(longest, multiple) if length < longest]
    if not options or not len(lengths):
        return (longest,)
    fits = np.searchsorted(np.sort(np.asarray(lengths)), options, side="right")
    # best[j]: padded total of what fits options[j], and buckets up to it; a round allows one more
    best = [(float(n * length), (length,)) for n, length in zip(fits, options, strict=True)]
    for _ in range(count - 1):
        best = [
            min(
                [best[j]]
                + [
                    (
                        best[i][0] + float((fits[j] - fits[i]) * options[j]),
                        (*best[i][1], options[j]),
                    )
                    for i in range(j)
                ],
                key=lambda pair: pair[0],
            )
            for j in range(len(options))
        ]
    rest = [
        total + float((len(lengths) - n) * longest)
        for (total, _), n in zip(best, fits, strict=True)
    ]
    return (*best[int(np.argmin(rest))][1], longest)


def sizes_of(examples: Sequence[EncodedExample]) -> np.ndarray:
    """Encoder and decoder length of each example, int32 [examples, 2]."""
    sizes = [(len(example.encoder_ids), len(example.target_ids)) for example in examples]
    return np.array(sizes, np.int32).reshape(-1, 2)


def first_fit_rows(
    sizes: np.ndarray, input_length: int, target_length: int, max_segments: int
) -> list[Indices]:
    """Packs examples into rows: longest first, each into the first row with room for both sides.

    First-fit decreasing bin packing with two sizes an item.

    Args:
      sizes: as `sizes_of` gives them.
    Returns: rows as lists of positions in `sizes`, every position exactly once.
    Raises: ValueError if an example is longer than a row.
    """
    capacity = np.array([input_length, target_length, max_segments], np.int32)
    if len(sizes) and (sizes.max(0) > capacity[:2]).any():
        raise ValueError(f"an example of {sizes.max(0)} does not fit a row of {capacity[:2]}")
    order = np.argsort(-sizes.sum(1), kind="stable")
    return _first_fit(sizes, order, capacity, len(sizes))


def roomy_rows(
    sizes: np.ndarray,
    is_long: np.ndarray,
    *,
    batch_rows: int,
    input_length: int,
    target_length: int,
    max_segments: int,
) -> list[Indices]:
    """Rows for the examples that need long ones, filled up with others.

    So a long example shares its batch with about as many examples as any other does, and weighs as
    much in the loss.

    Args:
      sizes: as `sizes_of` gives them.
      is_long: bool [examples], those that have to be in.
      batch_rows: the number of rows is a multiple of it.
    Returns: as `first_fit_rows`, each long example once, others at most once.
    """
    capacity = np.array([input_length, target_length, max_segments], np.int32)
    long, others = np.flatnonzero(is_long), np.flatnonzero(~is_long)
    long = long[np.argsort(-sizes[long].sum(1), kind="stable")]
    needed = len(_first_fit(sizes, long, capacity, len(long)))
    return _first_fit(sizes, np.concatenate([long, others]), capacity, _up(needed, batch_rows))


def _first_fit(
    sizes: np.ndarray, order: np.ndarray, capacity: np.ndarray, most_rows: int
) -> list[Indices]:
    """Positions in this order, each into the first row with room; left out if there is none."""
    sizes = np.insert(sizes, 2, 1, axis=1)
    free = np.tile(capacity, (most_rows, 1))
    rows: list[Indices] = []
    for position in order:
        fits = (free[: len(rows) + 1] >= sizes[position]).all(1)  # one row beyond is always empty
        if not fits.any():
            continue
        number = int(fits.argmax())
        if number == len(rows):
            rows.append([])
        rows[number].append(int(position))
        free[number] -= sizes[position]
    return rows


@dataclasses.dataclass(frozen=True)
class PackShape:
    """The shape of batches of packed rows.

    Attributes:
      rows: rows of a batch, over all processes.
      input_length, target_length: positions of a row in encoder and decoder.
      max_segments: examples a row may hold.
    """

    rows: int
    input_length: int
    target_length: int
    max_segments: int


FULL = 0.955  # the least share of positions used that `fitted_rows` is content with


def fitted_rows(
    sizes: np.ndarray,
    examples: int,
    longest: tuple[int, int],
    *,
    input_length: int = 0,
    row_multiple: int = 1,
    length_multiple: int = 16,
) -> PackShape:
    """Rows that hold about `examples` examples a batch and are short and full.

    Attention costs the square of a row's length, so the shortest rows of which a sample fills 95 %
    are chosen, or else those it fills best.

    Args:
      sizes: of a sample, as `sizes_of` gives them; not empty.
      examples: wanted in a batch, on average.
      longest: encoder and decoder length that an example may have.
      input_length: given instead of chosen; 0 = choose.
      row_multiple: the number of rows is a multiple of it: processes, devices, microbatches.
      length_multiple: lengths are multiples of it.
    """
    wanted = examples * float(sizes[:, 0].mean())  # positions of a batch
    best: tuple[float, PackShape] | None = None
    count = row_multiple * max(1, int(wanted / longest[0] / row_multiple))
    while best is None or (count and not input_length and best[0] < FULL):
        length = input_length or max(longest[0], math.ceil(wanted / (count * 0.98)))
        length = _up(length, 1 if input_length else length_multiple)
        if input_length:
            count = row_multiple * max(1, round(wanted / (length * 0.98 * row_multiple)))
        full, shape = _tried(sizes, count, length, longest[1], length_multiple)
        full *= min(1.0, 1.25 * wanted / (count * length))  # room for far more than is wanted
        if best is None or full > best[0]:
            best = full, shape
        count -= row_multiple
    shape = best[1]
    if shape.rows * shape.input_length <= 1.25 * wanted:
        return shape
    most = math.ceil(
        examples / shape.rows
    )  # rows of this length could hold far more than is wanted
    return dataclasses.replace(shape, max_segments=min(shape.max_segments, most))


def _tried(
    sizes: np.ndarray, count: int, length: int, longest_target: int, multiple: int
) -> tuple[float, PackShape]:
    """How full a sample makes rows of a length, and their shape with room to spare elsewhere."""
    most = len(sizes) * max(longest_target, int(sizes[:, 1].max()))
    rows = first_fit_rows(sizes, length, most, len(sizes))
    rows = rows[: max(1, len(rows) - 1)]  # the last one waits for more
    segments = max(map(len, rows))
    targets = max(int(sizes[row, 1].sum()) for row in rows)
    full = float(sum(sizes[row, 0].sum() for row in rows) / (len(rows) * length))
    return full, PackShape(
        count, length, _up(max(longest_target, targets), multiple // 2), segments
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def row_lengths(rows: Sequence[Row]) -> tuple[int, int]:
    """Encoder and decoder length that the longest of `rows` needs."""
    inputs = max((sum(len(e.encoder_ids) for e in row) for row in rows), default=0)
    targets = max((sum(len(e.target_ids) for e in row) for row in rows), default=0)
    return inputs, targets


def batch_of_rows(
    rows: Sequence[Row],
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    max_segments: int,
    pad_id: int,
    start_id: int,
) -> Batch:
    """Writes rows into the arrays of one `Batch`; missing rows are all padding, with example -1.

    Args:
      rows: at most `batch_size` rows of at most `max_segments` examples that fit the two lengths.
      start_id: the decoder's first input of every segment.
    Returns: numpy arrays; B = batch_size, S = input_length, T = target_length, G = max_segments.
    """
    shape = (batch_size, input_length)
    encoder_ids_BS = np.full(shape, pad_id, np.int32)
    encoder_slots_BS = np.full(shape, -1, np.int32)
    encoder_segments_BS = np.zeros(shape, np.int32)
    prompt_index_BG = np.zeros((batch_size, max_segments), np.int32)
    task_index_BG = np.zeros((batch_size, max_segments), np.int32)
    example_index_BG = np.full((batch_size, max_segments), -1, np.int32)
    for number, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row):
            here = slice(at, at := at + len(example.encoder_ids))
            slots = np.asarray(example.encoder_slots, np.int32)
            ids = np.asarray(example.encoder_ids, np.int32)
            encoder_ids_BS[number, here] = np.where(slots < 0, ids, pad_id)
            encoder_slots_BS[number, here] = slots
            encoder_segments_BS[number, here] = segment + 1
            prompt_index_BG[number, segment] = example.prompt_index
            task_index_BG[number, segment] = example.task_index
            example_index_BG[number, segment] = example.index
    answers = [[example.target_ids for example in row] for row in rows]
    decoder = _decoder_side(answers, (batch_size, target_length), pad_id, start_id)
    arrays: dict[str, Any] = {
        "encoder_ids_BS": encoder_ids_BS,
        "encoder_slots_BS": encoder_slots_BS,
        "encoder_segments_BS": encoder_segments_BS,
        "decoder_ids_BT": decoder.ids,
        "decoder_slots_BT": decoder.slots,
        "decoder_segments_BT": decoder.segments,
        "targets_BT": decoder.targets,
        "loss_weights_BT": decoder.weights,
        "prompt_index_BG": prompt_index_BG,
        "example_index_BG": example_index_BG,
        "task_index_BG": task_index_BG,
    }
    return Batch(**arrays)


def candidates_of_rows(
    rows: Sequence[Row],
    candidate_ids: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    target_length: int,
    pad_id: int,
    start_id: int,
) -> Candidates:
    """The decoder side of the same rows, once for each of C candidates in place of the target.

    An example whose prompt has fewer than C candidates has nothing at the missing ones.

    Args:
      candidate_ids: of each prompt of a bank, token ids of each candidate, the end token last.
      target_length: room for as many candidates as a row has examples.
    Returns: numpy arrays [C, B, T].
    """
    shape = (batch_size, target_length)
    prompts = [[example.prompt_index for example in row] for row in rows]
    sides = [
        _decoder_side(
            [[answer[prompt] for prompt in row] for row in prompts], shape, pad_id, start_id
        )
        for answer in itertools.zip_longest(*candidate_ids, fillvalue=())
    ]
    arrays: dict[str, Any] = {
        "decoder_ids_CBT": np.stack([side.ids for side in sides]),
        "decoder_slots_CBT": np.stack([side.slots for side in sides]),
        "decoder_segments_CBT": np.stack([side.segments for side in sides]),
        "targets_CBT": np.stack([side.targets for side in sides]),
        "loss_weights_CBT": np.stack([side.weights for side in sides]),
    }
    return Candidates(**arrays)


class _DecoderSide(NamedTuple):
    ids: np.ndarray
    slots: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def _decoder_side(
    answers: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int], pad_id: int, start_id: int
) -> _DecoderSide:
    """Decoder inputs, slots, segments, targets and loss weights, all [B, T], of rows of targets."""
    side = _DecoderSide(
        ids=np.full(shape, pad_id, np.int32),
        slots=np.full(shape, -1, np.int32),
        segments=np.zeros(shape, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        weights=np.zeros(shape, np.float32),
    )
    for number, row in enumerate(answers):
        at = 0
        for segment, ids in enumerate(row):
            here = slice(at, at := at + len(ids))
            side.targets[number, here] = ids
            side.ids[number, here] = [start_id, *ids][:-1]
            side.segments[number, here] = segment + 1
            side.weights[number, here] = 1.0
    return side
