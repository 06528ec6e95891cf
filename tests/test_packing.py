import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt.data.packing import (
    EncodedExample,
    batch_of_rows,
    bucket_length,
    candidates_of_rows,
    first_fit_rows,
    fitted_buckets,
    fitted_rows,
    length_buckets,
    roomy_rows,
    row_lengths,
    sizes_of,
)

PAD, START = 0, 7
SIZES = {"input_length": 12, "target_length": 6, "max_segments": 3}

lengths = st.tuples(st.integers(1, 12), st.integers(0, 6))


def example(number: int, inputs: int, targets: int) -> EncodedExample:
    """Ids that tell whose they are: 100 * number + position; the first two inputs are slots."""
    ids = [100 * (number + 1) + position for position in range(inputs)]
    slots = [position if position < min(2, inputs - 1) else -1 for position in range(inputs)]
    answer = [100 * (number + 1) + 50 + position for position in range(targets)]
    return EncodedExample(ids, slots, answer, index=number, prompt_index=number % 4)


def examples_of(sizes: list[tuple[int, int]]) -> list[EncodedExample]:
    return [example(number, *size) for number, size in enumerate(sizes)]


def batch_from(rows, batch_size: int):
    return batch_of_rows(rows, batch_size=batch_size, pad_id=PAD, start_id=START, **SIZES)


@given(st.lists(lengths, max_size=30))
def test_first_fit_loses_nothing_and_keeps_within_rows(sizes: list[tuple[int, int]]):
    examples = examples_of(sizes)
    rows = first_fit_rows(sizes_of(examples), *SIZES.values())
    assert sorted(position for row in rows for position in row) == list(range(len(examples)))
    for row in rows:
        assert 1 <= len(row) <= SIZES["max_segments"]
        assert sum(sizes[position][0] for position in row) <= SIZES["input_length"]
        assert sum(sizes[position][1] for position in row) <= SIZES["target_length"]


@given(st.lists(lengths, max_size=20))
def test_first_fit_is_the_textbook_algorithm(sizes: list[tuple[int, int]]):
    capacity = list(SIZES.values())
    rows: list[list[int]] = []
    for position in sorted(range(len(sizes)), key=lambda at: -sum(sizes[at])):
        for row in rows:
            together = [*row, position]
            used = [sum(sizes[at][side] for at in together) for side in (0, 1)] + [len(together)]
            if all(u <= c for u, c in zip(used, capacity, strict=True)):
                row.append(position)
                break
        else:
            rows.append([position])
    assert first_fit_rows(sizes_of(examples_of(sizes)), *capacity) == rows


def test_first_fit_refuses_what_no_row_holds():
    with pytest.raises(ValueError, match="does not fit"):
        first_fit_rows(sizes_of([example(0, 13, 1)]), *SIZES.values())


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(0, 2))
def test_batches_hold_every_example_as_one_contiguous_segment(sizes, empty_rows: int):
    examples = examples_of(sizes)
    rows = [
        [examples[at] for at in row] for row in first_fit_rows(sizes_of(examples), *SIZES.values())
    ]
    batch = batch_from(rows, len(rows) + empty_rows)
    seen = []
    for number, row in enumerate(rows):
        starts, answers = [], []
        for segment, item in enumerate(row, start=1):
            here = np.flatnonzero(batch.encoder_segments_BS[number] == segment)
            assert (np.diff(here) == 1).all() and len(here) == len(item.encoder_ids)
            slots = np.asarray(item.encoder_slots)
            assert batch.encoder_slots_BS[number, here].tolist() == list(item.encoder_slots)
            ids = np.where(slots < 0, item.encoder_ids, PAD)
            assert batch.encoder_ids_BS[number, here].tolist() == ids.tolist()
            there = np.flatnonzero(batch.decoder_segments_BT[number] == segment)
            assert (np.diff(there) == 1).all()
            assert batch.targets_BT[number, there].tolist() == list(item.target_ids)
            shifted = [START, *item.target_ids][: len(item.target_ids)]
            assert batch.decoder_ids_BT[number, there].tolist() == shifted
            assert (batch.loss_weights_BT[number, there] == 1).all()
            assert batch.example_index_BG[number, segment - 1] == item.index
            assert batch.prompt_index_BG[number, segment - 1] == item.prompt_index
            seen.append(item.index)
            starts.append(here[0])
            answers.append(len(there))
        assert starts == sorted(starts) and starts[0] == 0
        assert batch.loss_weights_BT[number].sum() == sum(answers)
    assert sorted(seen) == list(range(len(examples)))
    assert (batch.example_index_BG >= 0).sum() == len(examples)
    padding = batch.encoder_segments_BS == 0
    assert (batch.encoder_ids_BS[padding] == PAD).all()
    assert (batch.encoder_slots_BS[padding] == -1).all()
    assert not batch.loss_weights_BT[batch.decoder_segments_BT == 0].any()
    assert not batch.encoder_segments_BS[len(rows) :].any()


def test_dtypes_and_shapes():
    batch = batch_from([[example(0, 3, 2)]], 2)
    for name, array in vars(batch).items():
        assert array.dtype == (np.float32 if name == "loss_weights_BT" else np.int32), name
        expected = {"S": (2, 12), "T": (2, 6), "G": (2, 3)}[name[-1]]
        assert array.shape == expected, name
    assert (batch.decoder_slots_BT == -1).all()


def test_candidates_stand_where_the_targets_would():
    examples = examples_of([(3, 2), (4, 2), (5, 2)])
    rows = [[examples[0], examples[1]], [examples[2]]]
    answers = [[60, 1], [61, 62, 1]]
    candidates = candidates_of_rows(
        rows, [answers] * 4, batch_size=3, target_length=6, pad_id=PAD, start_id=START
    )
    for number, answer in enumerate(answers):
        swapped = [
            [EncodedExample(e.encoder_ids, e.encoder_slots, answer, e.index) for e in row]
            for row in rows
        ]
        batch = batch_from(swapped, 3)
        assert (candidates.decoder_ids_CBT[number] == batch.decoder_ids_BT).all()
        assert (candidates.decoder_slots_CBT[number] == batch.decoder_slots_BT).all()
        assert (candidates.decoder_segments_CBT[number] == batch.decoder_segments_BT).all()
        assert (candidates.targets_CBT[number] == batch.targets_BT).all()
        assert (candidates.loss_weights_CBT[number] == batch.loss_weights_BT).all()


def test_lengths_of_rows():
    examples = examples_of([(3, 2), (9, 0), (4, 6)])
    assert row_lengths([[item] for item in examples]) == (9, 6)
    assert row_lengths([examples]) == (16, 8)
    assert row_lengths([]) == (0, 0)


@given(st.integers(0, 100), st.lists(st.integers(1, 100), min_size=1, unique=True).map(sorted))
def test_bucket_length_is_the_smallest_that_holds(length: int, buckets: list[int]):
    if length > buckets[-1]:
        with pytest.raises(ValueError, match="over the largest bucket"):
            bucket_length(length, buckets)
        return
    bucket = bucket_length(length, buckets)
    assert bucket in buckets and bucket >= length
    assert not [smaller for smaller in buckets if length <= smaller < bucket]


@given(st.integers(1, 200), st.integers(1, 64))
def test_length_buckets_are_multiples_up_to_the_longest(longest: int, multiple: int):
    buckets = length_buckets(longest, multiple)
    assert buckets[-1] == longest and list(buckets) == sorted(set(buckets))
    assert all(bucket % multiple == 0 for bucket in buckets[:-1])


def padded(sample: list[int], buckets: tuple[int, ...]) -> int:
    return sum(bucket_length(length, buckets) for length in sample)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 3), st.sampled_from([4, 5, 8]))
def test_fitted_buckets_pad_as_little_as_any_choice(sample: list[int], count: int, multiple: int):
    buckets = fitted_buckets(sample, 40, multiple, count)
    assert buckets[-1] == 40 and len(buckets) <= count + 1
    options = list(range(multiple, 40, multiple))
    choices = itertools.chain.from_iterable(
        itertools.combinations(options, n) for n in range(1, count + 1)
    )
    assert padded(sample, buckets) == min(padded(sample, (*choice, 40)) for choice in choices)


@given(
    st.lists(st.tuples(st.integers(5, 60), st.integers(1, 4)), min_size=200, max_size=300),
    st.integers(8, 64),
    st.sampled_from([1, 2, 4]),
)
def test_fitted_rows_are_full_and_hold_what_was_asked_for(sizes, wanted: int, multiple: int):
    array = np.array(sizes, np.int32)
    shape = fitted_rows(array, wanted, (60, 4), row_multiple=multiple, length_multiple=4)
    assert shape.rows % multiple == 0 and shape.input_length % 4 == 0
    assert shape.input_length >= 60 and shape.target_length >= 4
    rows = first_fit_rows(array, shape.input_length, shape.target_length, shape.max_segments)
    held = len(sizes) / len(rows) * shape.rows  # examples in a batch
    if shape.input_length > 60:  # or else one row is already more than was asked for
        assert 0.75 * wanted <= held <= 1.25 * wanted


def test_fitted_rows_of_real_lengths_are_95_percent_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 0.7, size=(2000, 1)), 4, 200).astype(np.int32) + 100
    sizes = np.concatenate([lengths, np.full_like(lengths, 3)], axis=1)
    shape = fitted_rows(sizes, 32, (300, 3))
    rows = first_fit_rows(sizes, shape.input_length, shape.target_length, shape.max_segments)
    assert lengths.sum() / (shape.input_length * len(rows)) >= 0.95


def test_fitted_rows_of_a_given_length():
    sizes = np.full((100, 2), (30, 2), np.int32)
    shape = fitted_rows(sizes, 16, (60, 4), input_length=100)
    assert (shape.rows, shape.input_length, shape.max_segments) == (5, 100, 3)


@given(st.lists(lengths, min_size=1, max_size=30), st.integers(1, 3))
def test_roomy_rows_take_every_long_example_and_others_to_fill_up(
    sizes: list[tuple[int, int]], batch_rows: int
):
    array = np.array(sizes, np.int32)
    is_long = array[:, 0] > 7
    rows = roomy_rows(array, is_long, batch_rows=batch_rows, **SIZES)
    placed = [position for row in rows for position in row]
    assert len(placed) == len(set(placed)) and set(np.flatnonzero(is_long)) <= set(placed)
    for row in rows:
        assert 0 < len(row) <= SIZES["max_segments"]
        assert (array[row].sum(0) <= (SIZES["input_length"], SIZES["target_length"])).all()
    if not is_long.any():
        assert not rows
    left = np.setdiff1d(np.arange(len(array)), placed)
    if len(rows) < -(-int(is_long.sum()) // batch_rows) * batch_rows:
        assert not len(left)  # there is room for whole rows yet
