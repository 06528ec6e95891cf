"""Batches of several prompts in one: each row is one that its prompt would have had by itself."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxprompt.data.packing import EncodedExample, batch_of_rows
from jaxprompt.data.side_by_side import Part, SideBySide
from jaxprompt.data.stream import Shapes
from jaxprompt.typing import Batch

PAD = 7
USUAL = Shapes(2, (6,), (3,), 2)
ROOMY = dataclasses.replace(USUAL, roomy=Shapes(1, (12,), (6,), 4))


class Stream:
    """Batches 0, 1, 2, ... of a prompt; example numbers say which prompt and batch they are of."""

    def __init__(self, name: int, shapes: Shapes = USUAL, roomy_at: tuple[int, ...] = ()):
        self.name, self.shapes, self.roomy_at = name, shapes, roomy_at
        self.number, self.closed = 0, False

    def __next__(self) -> Batch:
        shapes = self.shapes
        if self.number in self.roomy_at and shapes.roomy is not None:
            shapes = shapes.roomy
        made = batch_of(self.name, self.number, shapes)
        self.number += 1
        return made

    def get_state(self) -> dict[str, Any]:
        return {"number": self.number}

    def set_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]

    def close(self) -> None:
        self.closed = True


def batch_of(name: int, number: int, shapes: Shapes) -> Batch:
    index = 100 * name + number
    example = EncodedExample([11 + name, 12, 13], [-1, 0, -1], [21 + number, 2], index)
    return batch_of_rows(
        [[example]] * shapes.batch_size, batch_size=shapes.batch_size,
        input_length=shapes.input_buckets[-1], target_length=shapes.target_buckets[-1],
        max_segments=shapes.max_segments, pad_id=PAD, start_id=1,
    )  # fmt: skip


def side_by_side(*streams: Stream, kinds: Any = None) -> SideBySide:
    return SideBySide(streams, kinds or ["one"] * len(streams), PAD)  # pyright: ignore


def rows_of(parts: tuple[Part, ...]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(prompt, arrays) of every row that has an example."""
    for _, batch in parts:
        for row in range(len(batch.targets_BT)):
            if batch.example_index_BG[row, 0] >= 0:
                fields = {f.name: getattr(batch, f.name)[row] for f in dataclasses.fields(Batch)}
                yield int(batch.prompt_index_BG[row, 0]), fields


def assert_own_rows(parts: tuple[Part, ...], prompt: int, own: Batch) -> None:
    found = [fields for number, fields in rows_of(parts) if number == prompt]
    assert len(found) == len(own.targets_BT)
    for row, fields in enumerate(found):
        for name, values in fields.items():
            if name == "prompt_index_BG":
                assert set(values.tolist()) == {prompt}
                continue
            expected = getattr(own, name)[row]
            np.testing.assert_array_equal(values[: len(expected)], expected, err_msg=name)


def test_like_rows_are_joined_and_each_is_its_prompt_s_own():
    joined = side_by_side(Stream(0), Stream(1), Stream(2))
    for number in range(3):
        parts = next(joined)
        assert [part.batch.encoder_ids_BS.shape for part in parts] == [(6, 6)]
        for prompt in range(3):
            assert_own_rows(parts, prompt, batch_of(prompt, number, USUAL))
    assert joined.shape_counts == {((6, 6, 3),): 3}


def test_other_kinds_and_other_shapes_are_other_parts():
    wide = dataclasses.replace(USUAL, input_buckets=(9,))
    joined = side_by_side(Stream(0), Stream(1, wide), Stream(2), kinds=["a", "a", "b"])
    parts = next(joined)
    assert [(part.kind, part.batch.encoder_ids_BS.shape) for part in parts] == [
        ("a", (2, 6)), ("a", (2, 9)), ("b", (2, 6)),
    ]  # fmt: skip


def test_roomy_rows_are_a_part_by_themselves_and_empty_rows_hold_their_place():
    joined = side_by_side(Stream(0, ROOMY), Stream(1, ROOMY, roomy_at=(1,)), Stream(2, ROOMY))
    shapes = [[part.batch.encoder_ids_BS.shape for part in next(joined)]]
    parts = next(joined)
    shapes += [[part.batch.encoder_ids_BS.shape for part in parts]]
    assert shapes == [[(6, 6)], [(6, 6), (1, 12)]]
    assert_own_rows(parts, 1, batch_of(1, 1, ROOMY.roomy))  # pyright: ignore
    assert_own_rows(parts, 2, batch_of(2, 1, USUAL))
    empty = [row for row in range(6) if parts[0].batch.example_index_BG[row, 0] < 0]
    assert len(empty) == 2
    nothing = batch_of_rows(
        [], batch_size=2, input_length=6, target_length=3, max_segments=2, pad_id=PAD, start_id=1
    )
    for field in dataclasses.fields(Batch):
        values = getattr(parts[0].batch, field.name)[empty]
        np.testing.assert_array_equal(values, getattr(nothing, field.name), err_msg=field.name)


def test_if_all_are_roomy_no_empty_part_is_made():
    joined = side_by_side(Stream(0, ROOMY, (0,)), Stream(1, ROOMY, (0,)))
    assert [part.batch.encoder_ids_BS.shape for part in next(joined)] == [(1, 12), (1, 12)]


def test_unpacked_batches_are_padded_to_the_longest():
    short = Shapes(2, (4, 8), (3,))

    class Growing(Stream):
        def __next__(self) -> Batch:
            self.number += 1
            bucket = short.input_buckets[(self.name + self.number) % 2]
            return batch_of(self.name, self.number - 1, dataclasses.replace(
                short, input_buckets=(bucket,)))  # fmt: skip

    joined = side_by_side(Growing(0, short), Growing(1, short))
    (part,) = next(joined)
    assert part.batch.encoder_ids_BS.shape == (4, 8)
    assert (part.batch.encoder_ids_BS[2:, 4:] == PAD).all()


def test_a_dropped_prompt_leaves_and_places_shrink_now_and_then():
    streams = [Stream(number) for number in range(8)]
    joined = side_by_side(*streams)
    rows = []
    for prompt in (3, 0, 7, 1, 2, 4, 5):
        next(joined)
        joined.drop(prompt)
        parts = next(joined)
        rows.append(len(parts[0].batch.targets_BT))
        assert prompt not in {number for number, _ in rows_of(parts)}
        for other in range(8):
            if other in {number for number, _ in rows_of(parts)}:
                assert_own_rows(parts, other, batch_of(other, streams[other].number - 1, USUAL))
    assert rows == [16, 12, 12, 8, 6, 4, 2]  # two rows a place
    joined.drop(6)
    assert next(joined) == ()


def test_it_goes_on_from_its_state():
    first = side_by_side(Stream(0), Stream(1))
    next(first)
    state = first.get_state()
    expected = next(first)
    again = side_by_side(Stream(0), Stream(1))
    again.set_state(state)
    for left, right in zip(next(again), expected, strict=True):
        for field in dataclasses.fields(Batch):
            np.testing.assert_array_equal(
                getattr(left.batch, field.name), getattr(right.batch, field.name)
            )


def test_closing_closes_all():
    streams = Stream(0), Stream(1)
    side_by_side(*streams).close()
    assert all(stream.closed for stream in streams)
