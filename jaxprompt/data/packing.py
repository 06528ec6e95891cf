"""Encoded examples -> rows -> `Batch`: what stands in which row is decided here, as data.

A row is a list of examples, each of which becomes one segment. `one_example_rows` gives a row to
every example; `first_fit_rows` fills rows with several. The compiled program is the same for both.
"""

import dataclasses
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
    """

    encoder_ids: Sequence[int] | np.ndarray
    encoder_slots: Sequence[int] | np.ndarray
    target_ids: Sequence[int]
    index: int
    prompt_index: int = 0


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


def one_example_rows(examples: Sequence[EncodedExample]) -> list[Indices]:
    """A row for every example, in the same order; rows are lists of positions in `examples`."""
    return [[position] for position in range(len(examples))]


def first_fit_rows(
    examples: Sequence[EncodedExample], input_length: int, target_length: int, max_segments: int
) -> list[Indices]:
    """Packs examples into rows: longest first, each into the first row with room for both sides.

    First-fit decreasing bin packing with two sizes an item.

    Returns: rows as lists of positions in `examples`, every position exactly once.
    Raises: ValueError if an example is longer than a row.
    """
    sizes = np.array([(len(e.encoder_ids), len(e.target_ids), 1) for e in examples], np.int32)
    capacity = np.array([input_length, target_length, max_segments], np.int32)
    if len(examples) and (sizes.max(0) > capacity).any():
        raise ValueError(f"an example of {sizes.max(0)[:2]} does not fit a row of {capacity[:2]}")
    free = np.tile(capacity, (len(examples), 1))
    rows: list[Indices] = []
    for position in np.argsort(-sizes[:, :2].sum(1), kind="stable") if len(examples) else ():
        fits = (free[: len(rows) + 1] >= sizes[position]).all(1)  # one row beyond is always empty
        number = int(fits.argmax())
        if number == len(rows):
            rows.append([])
        rows[number].append(int(position))
        free[number] -= sizes[position]
    return rows


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
    }
    return Batch(**arrays)


def candidates_of_rows(
    rows: Sequence[Row],
    candidate_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    target_length: int,
    pad_id: int,
    start_id: int,
) -> Candidates:
    """The decoder side of the same rows, once for each of C candidates in place of the target.

    Args:
      candidate_ids: token ids of each candidate, the end token last.
      target_length: room for as many candidates as a row has examples.
    Returns: numpy arrays [C, B, T].
    """
    shape = (batch_size, target_length)
    sides = [
        _decoder_side([[ids] * len(row) for row in rows], shape, pad_id, start_id)
        for ids in candidate_ids
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
