import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_tokenizer import WORDS, tiny_tokenizer

from jaxprompt.data.layout import Layout
from jaxprompt.typing import UserError

texts = st.lists(st.sampled_from(WORDS.split()), max_size=12).map(" ".join)


def shape_of(layout: Layout) -> list:
    """Slot counts as ints, texts as "T"."""
    return [piece if isinstance(piece, int) else "T" for piece in layout.pieces]


@pytest.mark.parametrize(
    ("template", "length", "shape"),
    [
        ("{prompt}{input}", 20, [20, "T"]),
        ("{input}{prompt}", 7, ["T", 7]),
        ("{prompt:5}question: {question}{prompt}", 8, [5, "T", 3]),
        ("{prompt:2}{a}{prompt:3}{b} and {c}{prompt:4}", 9, [2, "T", 3, "T", 4]),
        ("{prompt}{input}", 0, [0, "T"]),
        ("{a}{prompt:4}{b}", 0, ["T", 0, "T"]),
        ("only {input}", 0, ["T"]),
    ],
)
def test_parsed_pieces(template: str, length: int, shape: list):
    layout = Layout.parse(template, length)
    assert shape_of(layout) == shape
    assert layout.slot_count == length


def test_fields_are_those_of_texts():
    assert Layout.parse("{prompt:3}{a} {b}{prompt:1}{a}", 4).fields() == ["a", "b"]


@pytest.mark.parametrize(
    ("template", "length", "message"),
    [
        ("{input}", 5, "no slot for the prompt"),
        ("{prompt}{input}{prompt}", 5, "2 {prompt} without a count"),
        ("{prompt:3}{input}", 5, "counts 3 slots, the prompt has length 5"),
        ("{prompt:6}{input}", 5, "counts 6 slots, the prompt has length 5"),
        ("{prompt:5}{input}{prompt}", 5, "counts 5 slots"),
        ("{prompt:x}{input}", 5, "a count of at least 1"),
        ("{prompt:0}{input}{prompt}", 5, "a count of at least 1"),
        ("{prompt}{input", 5, "cannot be read"),
        ("{prompt}{}", 5, "cannot be read"),
    ],
)
def test_layouts_that_cannot_be(template: str, length: int, message: str):
    with pytest.raises(UserError, match=message):
        Layout.parse(template, length)


def test_a_row_by_hand():
    tokenizer = tiny_tokenizer()
    layout = Layout.parse("{prompt:2}review: {text}{prompt}{topic}", 3)
    row = layout.lay({"text": "good film", "topic": "book"}, tokenizer, 64)
    head, tail = tokenizer.encode("review: good film"), tokenizer.encode("book")
    assert row.ids.tolist() == [0, 0, *head, 0, *tail, 1]
    assert row.slots.tolist() == [0, 1, *[-1] * len(head), 2, *[-1] * len(tail), -1]
    assert row.truncated_tokens == 0


def test_without_a_prompt_the_texts_keep_their_tokens():
    tokenizer = tiny_tokenizer()
    fields = {"a": "good", "b": "book"}
    bare = Layout.parse("{a}{prompt}{b}", 0).lay(fields, tokenizer, 64)
    prompted = Layout.parse("{a}{prompt}{b}", 3).lay(fields, tokenizer, 64)
    assert bare.ids.tolist() == prompted.ids[prompted.slots < 0].tolist()


@given(
    pieces=st.lists(st.one_of(st.integers(1, 4), st.sampled_from("abc")), min_size=1, max_size=7),
    values=st.fixed_dictionaries({"a": texts, "b": texts, "c": texts}),
    max_length=st.integers(2, 60),
)
def test_slots_are_complete_and_only_text_is_cut(pieces: list, values: dict, max_length: int):
    tokenizer = tiny_tokenizer()
    template = "".join(f"{{prompt:{p}}}" if isinstance(p, int) else f"{{{p}}}" for p in pieces)
    slot_count = sum(piece for piece in pieces if isinstance(piece, int))
    layout = Layout.parse(template, slot_count)
    if slot_count + 2 > max_length:
        with pytest.raises(UserError, match="leave no room for text"):
            layout.lay(values, tokenizer, max_length)
        return
    joined = "".join(values[name] for name in pieces if not isinstance(name, int))
    if not joined:
        with pytest.raises(UserError, match="tokenises to nothing"):
            layout.lay(values, tokenizer, max_length)
        return
    row = layout.lay(values, tokenizer, max_length)
    assert row.slots[row.slots >= 0].tolist() == list(range(slot_count))
    assert len(row.ids) == len(row.slots) <= max_length
    assert row.ids[-1] == tokenizer.eos_id and row.slots[-1] == -1
    assert (row.ids[row.slots >= 0] == tokenizer.pad_id).all()
    kept = int((row.slots < 0).sum()) - 1
    uncut = layout.lay(values, tokenizer, 10_000)
    assert kept + row.truncated_tokens == int((uncut.slots < 0).sum()) - 1
    assert row.truncated_tokens == 0 or len(row.ids) == max_length


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 30))
def test_the_longest_text_is_cut_first(lengths: list[int], room: int):
    tokenizer = tiny_tokenizer()
    template = "{prompt:1}".join(f"{{f{i}}}" for i in range(len(lengths)))
    slots = len(lengths) - 1
    assume(sum(lengths))
    layout = Layout.parse(template, slots)
    fields = {f"f{i}": "film " * length for i, length in enumerate(lengths)}
    row = layout.lay(fields, tokenizer, room + slots + 1)
    # the reference takes one token at a time from the longest, of equals from the last
    expected = list(lengths)
    while sum(expected) > room:
        longest = max(range(len(expected)), key=lambda i: (expected[i], i))
        expected[longest] -= 1
    runs = "".join("s" if slot >= 0 else "t" for slot in row.slots[:-1]).split("s")
    assert [len(run) for run in runs] == expected
    assert row.truncated_tokens == sum(lengths) - sum(expected)


def test_text_is_cut_at_its_end():
    tokenizer = tiny_tokenizer()
    row = Layout.parse("{prompt}{input}", 2).lay({"input": "a good film about food"}, tokenizer, 6)
    assert row.ids.tolist() == [0, 0, *tokenizer.encode("a good film"), 1]
    assert row.truncated_tokens == 2


def test_errors_name_the_row():
    layout = Layout.parse("{prompt}{input}", 2)
    with pytest.raises(UserError, match=r"f\.jsonl:7 has no text: its input tokenises to nothing"):
        layout.lay({"input": "  "}, tiny_tokenizer(), 9, "f.jsonl:7")
    with pytest.raises(UserError, match=r"f\.jsonl:7 has no field 'input'"):
        layout.lay({"text": "x"}, tiny_tokenizer(), 9, "f.jsonl:7")
