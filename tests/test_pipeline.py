import gc
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import WORDS, tiny_tokenizer

from jaxprompt.data.encoder import Cuts, DataConfig, TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.packing import EncodedExample
from jaxprompt.data.pipeline import Asked, TrainBatches, eval_chunks, examples_of
from jaxprompt.data.readers import JsonlSource, read_stream
from jaxprompt.data.stream import BatchStream, Shapes, StreamOptions, row_order
from jaxprompt.data.tasks import Example, Task, TaskConfig
from jaxprompt.typing import UserError

LABELS = ("negative", "positive")
SMALL = {"batch_size": 4, "eval_batch_size": 4, "max_input_length": 48, "window_batches": 3}


def write_rows(path: Path, count: int, seed: int = 0) -> JsonlSource:
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    rows = [
        {"text": " ".join(rng.choice(words, rng.integers(1, 40))), "label": LABELS[number % 2]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(path)


def asked_of(encoder: TaskEncoder, source: JsonlSource) -> Iterator[Asked]:
    return map(Asked, examples_of(encoder.task, source))


def encoder_of(task: TaskConfig | None = None, slots: int = 3, **data) -> TaskEncoder:
    config = TaskConfig(name="mood", candidates=LABELS) if task is None else task
    layout = Layout.parse("{prompt}{input}", slots)
    return TaskEncoder(Task(config), layout, tiny_tokenizer(), DataConfig(**{**SMALL, **data}))


def same(left, right) -> bool:
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def taken(stream, count: int) -> list:
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


# ---- streams of draws --------------------------------------------------------------------------


def draw_of(sizes):
    """Draw n has the n-th of the cycled sizes; a size of None gives no example."""

    def draw(numbers):
        found = []
        for number in numbers:
            size = sizes[number % len(sizes)]
            ids = None if size is None else [number % 1000] * size[0]
            found.append(ids and EncodedExample(ids, [-1] * len(ids), [1] * size[1], number))
        return found

    return draw


def stream_of(sizes, segments: int = 1, batch_size: int = 3, prefetch: int = 0, **options):
    shapes = Shapes(batch_size, (4, 9), (2, 5), segments)
    options = StreamOptions(shapes, pad_id=0, start_id=0, window_batches=2, **options)
    return BatchStream(draw_of(sizes), options, prefetch)


sizes = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 5))), min_size=1, max_size=9
).filter(any)


@given(sizes, st.integers(1, 5), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_draw_comes_exactly_once(sizes, batch_size: int, segments: int, shuffle: bool):
    stream = stream_of(sizes, segments, batch_size, shuffle=shuffle)
    seen = []
    for _ in range(9):
        batch = next(stream)
        seen += batch.example_index_BG[batch.example_index_BG >= 0].tolist()
    while stream.get_state()["batch"]:
        batch = next(stream)
        seen += batch.example_index_BG[batch.example_index_BG >= 0].tolist()
    state = stream.get_state()
    expected = [n for n in range(state["next_draw"]) if sizes[n % len(sizes)] is not None]
    assert sorted(seen + state["waiting"]) == expected


@given(sizes, st.sampled_from([1, 3]), st.integers(0, 12), st.integers(0, 3))
def test_streams_go_on_where_they_were(sizes, segments: int, at: int, seed: int):
    stream = stream_of(sizes, segments, seed=seed)
    list(itertools.islice(stream, at))
    state = json.loads(json.dumps(stream.get_state()))
    rest = list(itertools.islice(stream, 5))
    resumed = stream_of(sizes, segments, seed=seed)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(rest, itertools.islice(resumed, 5), strict=True))
    assert resumed.get_state() == stream.get_state()


def test_without_shuffling_draws_keep_their_order():
    stream = stream_of([(3, 1), (1, 2), (9, 5)], shuffle=False)
    seen = [
        int(index)
        for batch in itertools.islice(stream, 5)
        for index in batch.example_index_BG.ravel()
    ]
    assert seen == list(range(15))


def test_a_stream_without_examples_ends_with_an_error():
    with pytest.raises(UserError, match="has anything to train on"):
        next(stream_of([None]))


def test_processes_share_every_batch():
    whole = stream_of([(3, 1), (1, 2), (9, 5), (5, 5)], batch_size=4)
    parts = [
        stream_of([(3, 1), (1, 2), (9, 5), (5, 5)], batch_size=4, process_index=i, process_count=2)
        for i in (0, 1)
    ]
    for _ in range(6):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(next, parts))
        assert same(joined, next(whole))


def test_rows_that_processes_cannot_share_evenly_leave_empty_ones_in_the_last():
    sizes = [(3, 1), (1, 2), (9, 5)]
    whole = next(stream_of(sizes, batch_size=3))
    parts = [next(stream_of(sizes, batch_size=3, process_index=i, process_count=2)) for i in (0, 1)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    assert same(jax.tree.map(lambda leaf: leaf[:3], joined), whole)
    assert joined.example_index_BG[3].tolist() == [-1]


def test_the_thread_gives_the_same_batches_passes_errors_on_and_goes_away():
    before = threading.active_count()
    ahead, plain = stream_of([(3, 1), (9, 2)], prefetch=3), stream_of([(3, 1), (9, 2)])
    assert all(same(next(ahead), next(plain)) for _ in range(8))
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    failing = stream_of([None], prefetch=3)
    for _ in range(2):
        with pytest.raises(UserError, match="train on"):
            next(failing)
    forgotten = stream_of([(3, 1)], prefetch=1)
    next(forgotten)
    del forgotten, failing
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2, 100, 70_000])
def test_row_order_is_a_new_permutation_every_epoch(count: int):
    order = row_order(count, seed=3)
    epochs = [[order[n] for n in range(epoch * count, (epoch + 1) * count)] for epoch in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 2
    assert count < 3 or epochs[0] != epochs[1]
    assert [row_order(count, seed=3)[n] for n in (0, count, 5)] == [order[n] for n in (0, count, 5)]
    plain = row_order(count, seed=3, shuffle=False)
    assert [plain[n] for n in (0, 1, count, 2 * count + 1)] == [0, 1 % count, 0, 1 % count]


# ---- training ----------------------------------------------------------------------------------


def test_an_epoch_shows_every_row_once_and_epochs_differ(tmp_path: Path):
    encoder = encoder_of(packing=False)
    batches = TrainBatches(encoder, write_rows(tmp_path / "a.jsonl", 24))
    epochs = [[next(batches) for _ in range(6)] for _ in range(2)]
    orders = [
        [int(i) for batch in epoch for i in batch.example_index_BG.ravel()] for epoch in epochs
    ]
    batches.close()
    assert [sorted(order) for order in orders] == [list(range(24))] * 2
    assert orders[0] != orders[1]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_processes_together_lose_no_row_and_see_none_twice(
    tmp_path: Path, packing: bool, count: int
):
    """Three epochs of a number of rows, and batches, that nothing divides."""
    encoder = encoder_of(packing=packing, batch_size=6, max_input_length=24)
    source = write_rows(tmp_path / "a.jsonl", 23)
    streams = [
        TrainBatches(encoder, source, process_index=index, process_count=count)
        for index in range(count)
    ]
    seen: Counter[int] = Counter()
    state = {"next_draw": 0, "batch": 1}
    while state["next_draw"] < 3 * 23 or state["batch"]:
        for stream in streams:
            indices = next(stream).example_index_BG.ravel()
            seen.update(indices[indices >= 0].tolist())
        state = streams[0].get_state()
        assert all(stream.get_state() == state for stream in streams)
    for stream in streams:
        stream.close()
    order = row_order(23, 0)
    drawn = Counter(order[n] for n in range(state["next_draw"]) if n not in state["waiting"])
    assert seen == drawn


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_the_rows_laid_out(tmp_path: Path, packing: bool):
    encoder = encoder_of(packing=packing)
    source = write_rows(tmp_path / "a.jsonl", 24)
    tokenizer = encoder.tokenizer
    seen = []
    for batch in taken(TrainBatches(encoder, source), 12):
        for number, segment in np.argwhere(batch.example_index_BG >= 0).tolist():
            index = int(batch.example_index_BG[number, segment])
            row = source[index]
            here = batch.encoder_segments_BS[number] == segment + 1
            there = batch.decoder_segments_BT[number] == segment + 1
            ids, targets = batch.encoder_ids_BS[number][here], batch.targets_BT[number][there]
            assert batch.encoder_slots_BS[number][here][:4].tolist() == [0, 1, 2, -1]
            assert tokenizer.decode(ids[3:]) == row["text"]
            assert tokenizer.decode(targets) == row["label"]
            assert batch.decoder_ids_BT[number][there].tolist() == [0, *targets[:-1]]
            seen.append(index)
    assert set(seen) == set(range(24))


def test_packed_batches_have_one_shape_are_full_and_show_every_row_as_often(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 200)
    batches = TrainBatches(encoder_of(batch_size=12, window_batches=8), source)
    counts, examples = np.zeros(200, int), 0
    for batch in taken(batches, 120):
        shown = batch.example_index_BG[batch.example_index_BG >= 0]
        np.add.at(counts, shown, 1)
        examples += len(shown)
    assert len(batches.shape_counts) == 1 and batches.shapes.max_segments > 1
    assert batches.fill >= 0.95
    assert 0.8 * 12 <= examples / 120 <= 1.2 * 12
    assert counts.max() - counts.min() <= 2


def test_packed_rows_come_in_multiples(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 60)
    batches = TrainBatches(encoder_of(batch_size=12), source, row_multiple=4)
    assert len(taken(batches, 1)[0].encoder_ids_BS) % 4 == 0


def test_rare_long_examples_have_rows_of_their_own_with_others_beside_them(tmp_path: Path):
    """Rows fit the sample, not max_input_length; a longer example still comes once an epoch."""
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS.split(), rng.integers(1, 6))), "label": LABELS[0]}
        for _ in range(400)
    ]
    rows[133]["text"] = "good film " * 40
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = encoder_of(batch_size=8, max_input_length=200, bucket_multiple=8)
    batches = TrainBatches(encoder, JsonlSource(path))
    roomy = batches.shapes.roomy
    assert roomy is not None
    assert batches.shapes.input_buckets[-1] < 100 < 200 <= roomy.input_buckets[-1]
    shown, beside = np.zeros(400, int), []
    while shown.min() < 2:
        batch = next(batches)
        index = batch.example_index_BG[batch.example_index_BG >= 0]
        np.add.at(shown, index, 1)
        assert (133 in index) == (batch.encoder_ids_BS.shape[1] == roomy.input_buckets[-1])
        if 133 in index:
            beside.append(len(index))
    batches.close()
    assert shown.max() - shown.min() <= 2 and min(beside) >= 4
    assert len(batches.shape_counts) == 2


def test_a_pack_length_too_short_for_an_example_is_refused():
    with pytest.raises(UserError, match=r"data\.pack_length 20 cannot hold examples of .* 48"):
        encoder_of(pack_length=20)


def test_the_order_depends_on_the_seed_and_nothing_else(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    first = taken(TrainBatches(encoder_of(), source, seed=1), 12)
    again = taken(TrainBatches(encoder_of(prefetch=0), source, seed=1), 12)
    other = taken(TrainBatches(encoder_of(), source, seed=2), 12)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_training_resumes_bit_for_bit_and_refuses_other_data(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    unbroken = TrainBatches(encoder_of(), source, seed=5)
    states, reference = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(unbroken.get_state())))
        reference.append(next(unbroken))
    unbroken.close()
    resumed = TrainBatches(encoder_of(), source, seed=5)
    for start in (7, 3, 11):
        resumed.set_state(states[start])
        assert all(same(next(resumed), batch) for batch in reference[start:])
    resumed.close()
    other = TrainBatches(encoder_of(prefetch=0), write_rows(tmp_path / "b.jsonl", 31))
    with pytest.raises(UserError, match="has 31 rows, the run was started with 30"):
        other.set_state(states[1])


def test_shapes_are_few_and_each_is_traced_once(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 200)
    encoder = encoder_of(packing=False, bucket_count=3, bucket_multiple=8, window_batches=8)
    batches = TrainBatches(encoder, source)
    traces = []

    @jax.jit
    def step(batch):
        traces.append(batch.encoder_ids_BS.shape)
        return batch.encoder_ids_BS.sum()

    positions = 0
    for batch in itertools.islice(batches, 60):
        step(batch)
        positions += batch.encoder_ids_BS.size
    batches.close()
    assert len(traces) == len(set(traces)) == len(batches.shape_counts) <= 4
    assert {length for length, _ in batches.shape_counts} <= set(batches.input_buckets)
    assert sum(batches.shape_counts.values()) == 60
    used = sum(len(row.ids) for row in encoder.lay(list(examples_of(encoder.task, source)))) / 200
    assert positions / 240 < 1.4 * used  # padding to the longest of the data would be over 1.8


def test_configured_buckets_are_taken_with_the_longest(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    batches = TrainBatches(encoder_of(length_buckets=(30, 20)), source)
    taken(batches, 10)
    assert batches.input_buckets == (20, 30, 48)


def test_what_is_cut_off_is_counted(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [("film " * 30, "good " * 9), ("film " * 3, "good"), ("film " * 14, "good " * 2)]
    path.write_text("".join(json.dumps({"text": t, "label": a}) + "\n" for t, a in rows))
    encoder = encoder_of(TaskConfig(), max_input_length=14, max_target_length=4, batch_size=1)
    batches = TrainBatches(encoder, JsonlSource(path))
    taken(batches, 3)
    report, made = batches.report(), batches.report()["examples"] // 3
    assert report == {
        "examples": 3 * made,
        "cut_inputs": 2 * made,
        "cut_input_tokens": (20 + 4) * made,
        "cut_targets": made,
        "cut_target_tokens": 6 * made,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": "mixed"}', r"a\.jsonl:3: label 'mixed' is not among"),
        ('{"text": " ", "label": "positive"}', r"a\.jsonl:3 has no text"),
        ('{"text": "x", "label"', r"a\.jsonl:3 is not a JSON object"),
        ('{"label": "positive"}', r"a\.jsonl:3 has no field 'text'"),
    ],
)
def test_bad_rows_stop_training_and_are_named(tmp_path: Path, line: str, message: str):
    source = write_rows(tmp_path / "a.jsonl", 2)
    with open(tmp_path / "a.jsonl", "a") as stream:
        stream.write(line + "\n")
    source = JsonlSource(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message):
        next(TrainBatches(encoder_of(length_buckets=(48,)), source))


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (TaskConfig(candidates=("good", " ")), {}, "candidate ' ' .* is 0 tokens"),
        (
            TaskConfig(candidates=("good bad good", "bad")),
            {"max_target_length": 3},
            "'good bad good' .* is 3 tokens; it has to be between 1 and 2",
        ),
    ],
)
def test_candidates_must_have_tokens_and_fit(config: TaskConfig, data: dict, message: str):
    with pytest.raises(UserError, match=message):
        encoder_of(config, **data)


def test_a_prompt_longer_than_the_row(tmp_path: Path):
    source = write_rows(tmp_path / "a.jsonl", 5)
    with pytest.raises(UserError, match="60 slots and the end token leave no room"):
        TrainBatches(encoder_of(slots=60), source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size is 0, it has to be at least 1"),
        ({"max_input_length": 1}, r"data\.max_input_length is 1, it has to be at least 2"),
        ({"prefetch": -1}, r"data\.prefetch is -1"),
        ({"length_buckets": (600,)}, "do not lie between 1 and"),
    ],
)
def test_data_options_out_of_range(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


# ---- evaluation and prediction -----------------------------------------------------------------


def test_eval_chunks_hold_every_example_once_in_full_shapes(tmp_path: Path):
    encoder = encoder_of(packing=False)
    source = write_rows(tmp_path / "a.jsonl", 23)
    chunks = list(eval_chunks([encoder], asked_of(encoder, source), chunk_batches=2))
    assert [len(chunk.asked) for chunk in chunks] == [8, 8, 7]
    texts = [one.example.fields["text"] for chunk in chunks for one in chunk.asked]
    assert texts == [source[i]["text"] for i in range(23)]
    for chunk in chunks:
        assert len(chunk.batches) == 2
        seen = []
        for evaluated in chunk.batches:
            batch = evaluated.batch
            assert batch.encoder_ids_BS.shape[0] == 4
            for number, (index,) in enumerate(batch.example_index_BG):
                segments = batch.encoder_segments_BS[number]
                assert (index < 0) == (not segments.any())
                if index >= 0:
                    ids = batch.encoder_ids_BS[number][segments == 1]
                    assert encoder.tokenizer.decode(ids) == chunk.asked[index].example.input_text
                    seen.append(int(index))
        assert sorted(seen) == list(range(len(chunk.asked)))


def test_candidates_come_with_every_batch(tmp_path: Path):
    encoder = encoder_of(TaskConfig(candidates=("positive", "not positive")), packing=False)
    examples = [Example.of_text("a good film"), Example.of_text("bad")]
    (chunk,) = eval_chunks([encoder], map(Asked, examples))
    (evaluated,) = chunk.batches
    candidates = evaluated.candidates
    assert candidates is not None
    assert candidates.targets_CBT.shape == (2, 4, 3)
    for number, word in enumerate(("positive", "not positive")):
        for row in range(2):
            assert encoder.tokenizer.decode(candidates.targets_CBT[number, row]) == word
    assert not candidates.loss_weights_CBT[:, 2:].any()
    assert candidates.loss_weights_CBT[:, 0].sum(-1).tolist() == [2, 3]
    assert not evaluated.batch.loss_weights_BT.any()  # these examples have no targets


def test_free_generation_has_no_candidates_and_pads_targets_to_powers_of_two(tmp_path: Path):
    encoder = encoder_of(TaskConfig(target="{label}"), max_target_length=20)
    assert encoder.target_buckets == (8, 16, 20)
    source = write_rows(tmp_path / "a.jsonl", 3)
    (chunk,) = eval_chunks([encoder], asked_of(encoder, source))
    assert chunk.batches[0].candidates is None
    assert chunk.batches[0].batch.targets_BT.shape == (4, 8)


def test_processes_share_eval_batches(tmp_path: Path):
    encoder = encoder_of(packing=False)
    source = write_rows(tmp_path / "a.jsonl", 10)
    whole = list(eval_chunks([encoder], asked_of(encoder, source)))
    parts = [
        list(eval_chunks([encoder], asked_of(encoder, source), process_index=i, process_count=2))
        for i in (0, 1)
    ]
    for chunk, left, right in zip(whole, *parts, strict=True):
        for batch, a, b in zip(chunk.batches, left.batches, right.batches, strict=True):
            joined = jax.tree.map(lambda x, y: np.concatenate([x, y]), a.batch, b.batch)
            assert same(joined, batch.batch)
            joined = jax.tree.map(
                lambda x, y: np.concatenate([x, y], axis=1), a.candidates, b.candidates
            )
            assert same(joined, batch.candidates)


def test_streams_are_read_a_chunk_at_a_time():
    asked = []

    def rows():
        for number in itertools.count():
            asked.append(number)
            yield Asked(Example.of_text("good film"))

    chunks = eval_chunks([encoder_of()], rows(), chunk_batches=2)
    next(chunks)
    next(chunks)
    assert len(asked) == 16
    chunks.close()


def test_prediction_reads_text_lines_into_the_task_s_field(tmp_path: Path):
    path = tmp_path / "in.txt"
    path.write_text("good film\n\n" + "bad food " * 40 + "\n")
    encoder = encoder_of(TaskConfig(input="review: {sentence}", candidates=LABELS), packing=False)
    field = encoder.task.text_field
    examples = (
        encoder.task.example(row, where, with_target=False)
        for row, where in read_stream(path, field)
    )
    cuts = Cuts()
    (chunk,) = eval_chunks([encoder], map(Asked, examples), cuts=[cuts])
    assert [one.example.where for one in chunk.asked] == [f"{path}:1", f"{path}:3"]
    assert chunk.asked[0].example.input_text == "review: good film"
    assert (cuts.examples, cuts.cut_inputs) == (2, 1)
    assert chunk.batches[0].batch.encoder_ids_BS.shape == (4, 48)
    assert encoder.stream_buckets == (35, 48)
