import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import SENTINELS, WORDS, tiny_tokenizer

from jaxprompt.data.objectives import prefix_lm, random_spans_mask, span_corruption, span_counts
from jaxprompt.data.pretraining import (
    MixtureBatches,
    MixtureConfig,
    MixtureEntry,
    longest_stretch,
    mixture_batches,
)
from jaxprompt.typing import UserError

MARKS = list(range(1000, 1400))  # sentinels apart from any token

densities = st.floats(0.05, 0.6)
means = st.floats(1.0, 5.0)
seeds = st.integers(0, 1000)


# ---- objectives --------------------------------------------------------------------------------


@given(st.integers(2, 300), densities, means, seeds)
def test_noise_is_as_much_and_in_as_many_spans_as_t5_makes_it(length, density, mean, seed):
    mask = random_spans_mask(length, np.random.default_rng(seed), density, mean)
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean), 1), noise, length - noise)
    assert mask.shape == (length,) and mask.sum() == noise
    assert not mask[0] and mask[-1]
    assert (np.diff(mask.astype(int)) == 1).sum() == spans
    assert span_counts(length, density, mean) == (noise, spans)


@given(st.lists(st.integers(3, 900), min_size=2, max_size=200), densities, means, seeds)
def test_corrupted_text_can_be_put_together_again(ids, density, mean, seed):
    inputs, targets = span_corruption(ids, np.random.default_rng(seed), MARKS, density, mean)
    taken, sentinel = {}, 0
    for token in targets:
        if token >= 1000:
            sentinel = token
            taken[sentinel] = []
        else:
            taken[sentinel].append(token)
    assert list(taken) == MARKS[: len(taken)]
    assert [token for token in inputs if token >= 1000] == list(taken)
    whole = [part for token in inputs for part in (taken[token] if token >= 1000 else [token])]
    assert whole == ids
    assert all(taken.values())


def test_span_corruption_follows_the_mask():
    ids = list(range(10, 30))
    mask = random_spans_mask(20, np.random.default_rng(3))
    inputs, targets = span_corruption(ids, np.random.default_rng(3), MARKS)
    assert [token for token in inputs if token < 1000] == [
        t for t, m in zip(ids, mask, strict=True) if not m
    ]
    assert [token for token in targets if token < 1000] == [
        t for t, m in zip(ids, mask, strict=True) if m
    ]


def test_every_mask_is_equally_likely():
    rng = np.random.default_rng(0)
    masks = [tuple(random_spans_mask(6, rng, 0.5, 1.5)) for _ in range(4000)]
    found = {mask: masks.count(mask) for mask in set(masks)}  # 2 spans of 3 tokens, 2 of the 3 kept
    assert len(found) == 4
    assert max(found.values()) < 1.2 * min(found.values())


@given(st.lists(st.integers(3, 900), min_size=2, max_size=60), seeds)
def test_prefix_and_rest_are_the_text(ids, seed):
    prefix, rest = prefix_lm(ids, np.random.default_rng(seed))
    assert prefix and rest and prefix + rest == ids


def test_prefixes_are_cut_uniformly_within_bounds():
    rng = np.random.default_rng(0)
    free = [len(prefix_lm(range(5), rng)[0]) for _ in range(4000)]
    assert sorted(set(free)) == [1, 2, 3, 4]
    assert all(900 < free.count(cut) < 1100 for cut in range(1, 5))
    bounded = {len(prefix_lm(range(10), rng, 6, 7)[0]) for _ in range(400)}
    assert bounded == {3, 4, 5, 6}


@given(
    st.sampled_from(["span_corruption", "prefix_lm"]), st.integers(4, 80), st.integers(4, 80),
    densities, means, seeds,
)  # fmt: skip
def test_the_longest_stretch_fits_and_one_more_token_would_not(
    objective, max_input, max_target, density, mean, seed
):
    entry = MixtureEntry(objective, ("x",), 1.0, max_input, max_target, density, mean)
    try:
        length = longest_stretch(entry)
    except UserError:
        assert min(max_input, max_target) < 6
        return
    rng = np.random.default_rng(seed)
    for shorter in (length, max(2, length // 2)):
        if objective == "prefix_lm":
            sides = prefix_lm(range(shorter), rng, max_input - 1, max_target - 1)
        else:
            sides = span_corruption(range(shorter), rng, MARKS, density, mean)
        assert len(sides[0]) < max_input and len(sides[1]) < max_target
    if objective == "span_corruption":
        noise, spans = span_counts(length + 1, density, mean)
        assert length + 1 - noise + spans >= max_input or noise + spans >= max_target


def test_a_length_of_512_takes_the_568_tokens_of_the_t5_code():
    assert longest_stretch(MixtureEntry("span_corruption", ("x",), 1.0, 512, 114)) == 568


# ---- mixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    words = WORDS.split()

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(2, longest)))

    rows = {
        "text": [{"text": text(60)} for _ in range(40)],
        "more": [{"text": text(60)} for _ in range(10)],
        "supervised": [{"input": text(30), "target": f"topic {text(3)}"} for _ in range(25)],
    }
    for name, content in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: str(directory / f"{name}.jsonl") for name in rows}


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def entries(files: dict[str, str]) -> tuple[MixtureEntry, ...]:
    return (
        MixtureEntry("span_corruption", (files["text"], files["more"]), 1.0, 32, 16),
        MixtureEntry("prefix_lm", (files["text"],), 1.0, 24, 24),
        MixtureEntry("supervised", (files["supervised"],), 2.0, 24, 8),
    )


SHAPES = [{}, {"pack": False, "length_multiple": 8}, {"row_input_length": 64, "max_segments": 3}]


def mixture(files: dict[str, str], **options) -> MixtureBatches:
    defaults = {"batch_size": 4, "window_batches": 3, "prefetch": 0}
    return mixture_batches(entries(files), tiny_tokenizer(), **{**defaults, **options})


def same(left, right) -> bool:
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def segments_of(batch) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in range(len(batch.targets_BT)):
        for segment in range(1, batch.example_index_BG.shape[1] + 1):
            inputs = batch.encoder_ids_BS[row][batch.encoder_segments_BS[row] == segment]
            targets = batch.targets_BT[row][batch.decoder_segments_BT[row] == segment]
            if len(inputs):
                found.append((inputs.tolist(), targets.tolist()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_segment_is_an_example_of_its_objective(files, shape: dict):
    tokenizer = tiny_tokenizer()
    sentinels = {tokenizer.sentinel_id(number) for number in range(SENTINELS)}
    texts = [row["text"] for row in rows_of(files["text"])]
    rows = rows_of(files["supervised"])
    pairs = {(tuple(tokenizer.encode(row["input"])[:23]), row["target"]) for row in rows}
    kinds = {"supervised": 0, "span_corruption": 0, "prefix_lm": 0}
    for batch in itertools.islice(mixture(files, **shape), 12):
        for inputs, targets in segments_of(batch):
            assert inputs[-1] == targets[-1] == tokenizer.eos_id
            inputs, targets = inputs[:-1], targets[:-1]
            if sentinels & set(inputs):
                kinds["span_corruption"] += 1
                assert targets[0] == tokenizer.sentinel_id(0)
            elif (tuple(inputs), tokenizer.decode(targets)) in pairs:
                kinds["supervised"] += 1
            else:
                kinds["prefix_lm"] += 1
                whole = tokenizer.decode(inputs + targets)
                assert any(whole in text for text in texts)
    total = sum(kinds.values())
    for kind, share in (("supervised", 0.5), ("span_corruption", 0.25), ("prefix_lm", 0.25)):
        assert abs(kinds[kind] / total - share) < 0.12, kinds


@pytest.mark.parametrize("shape", SHAPES)
def test_mixtures_resume_bit_for_bit_with_and_without_a_thread(files, shape: dict):
    states, reference = [], []
    plain = mixture(files, seed=4, **shape)
    for _ in range(14):
        states.append(json.loads(json.dumps(plain.get_state())))
        reference.append(next(plain))
    ahead = mixture(files, seed=4, prefetch=3, **shape)
    for start in (0, 9, 5):
        ahead.set_state(states[start])
        assert all(same(next(ahead), batch) for batch in reference[start:])
    ahead.close()
    other = mixture(files, seed=5, **shape)
    assert not all(same(next(other), batch) for batch in reference)


def test_packed_batches_have_one_shape_and_are_mostly_full(files):
    batches = mixture(files, row_input_length=128, row_target_length=96)
    made = list(itertools.islice(batches, 10))
    assert batches.shape_counts == {(128, 96): 10}
    assert made[0].example_index_BG.shape == (4, 16)
    full = np.mean([(batch.encoder_segments_BS > 0).mean() for batch in made])
    assert full > 0.85


def test_unpacked_batches_are_padded_to_multiples(files):
    batches = mixture(files, pack=False, length_multiple=8)
    assert all(batch.example_index_BG.shape == (4, 1) for batch in itertools.islice(batches, 20))
    assert all(s % 8 == t % 8 == 0 for s, t in batches.shape_counts)


def test_processes_share_every_batch(files):
    whole = mixture(files)
    parts = [mixture(files, process_index=i, process_count=2) for i in (0, 1)]
    for _ in range(5):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(next, parts))
        assert same(joined, next(whole))


def test_an_epoch_of_a_part_shows_every_row_once(files):
    entry = MixtureEntry("supervised", (files["supervised"],), 1.0, 40, 10)
    batches = mixture_batches(
        [entry], tiny_tokenizer(), batch_size=5, pack=False, window_batches=5, prefetch=0
    )
    seen = [
        int(i) for batch in itertools.islice(batches, 5) for i in batch.example_index_BG.ravel()
    ]
    assert sorted(seen) == list(range(25))


def test_the_report_counts_rows_examples_cuts_and_what_was_skipped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [("film " * 9, "good"), ("film", "good bad " * 3), (" ", "good"), ("book", "")]
    path.write_text("".join(json.dumps({"input": i, "target": t}) + "\n" for i, t in rows))
    entry = MixtureEntry("supervised", (str(path),), 1.0, 6, 4)
    batches = mixture_batches(
        [entry], tiny_tokenizer(), batch_size=2, pack=False, window_batches=2, prefetch=0
    )
    next(batches)
    assert batches.report() == [
        {"rows": 4, "examples": 2, "skipped": 2, "cut_examples": 2, "cut_tokens": 4 + 3}
    ]


def test_one_word_texts_are_skipped_and_nothing_but_them_is_an_error(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "film"}\n{"text": ""}\n')
    entry = MixtureEntry("span_corruption", (str(path),), 1.0, 32, 16)
    with pytest.raises(UserError, match="has anything to train on"):
        next(mixture_batches([entry], tiny_tokenizer(), batch_size=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "masking"}, "no objective 'masking'; there are span_corruption, prefix_lm"),
        ({"files": ()}, "files of the prefix_lm entry is empty"),
        ({"weight": 0.0}, "weight is 0.0, it has to be above 0"),
        ({"noise_density": 1.0}, "noise_density is 1.0, it has to be between 0 and 1"),
        ({"mean_span_length": 0.5}, "mean_span_length is 0.5, it has to be at least 1"),
    ],
)
def test_entries_out_of_range(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        MixtureEntry(**{"objective": "prefix_lm", "files": ("x",), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ("none.jsonl",)}, r"there is no file none\.jsonl"),
        ({"max_target_length": 1}, "max_target_length 1 leave no room for span_corruption"),
        ({"max_input_length": 2000, "max_target_length": 900}, "has no sentinel <extra_id_30>"),
    ],
)
def test_entries_that_cannot_work(files, changes: dict, message: str):
    entry = {"objective": "span_corruption", "files": (files["text"],), **changes}
    with pytest.raises(UserError, match=message):
        mixture_batches([MixtureEntry(**entry)], tiny_tokenizer())


def test_mixtures_that_cannot_work(files):
    with pytest.raises(UserError, match="the mixture has no entries"):
        MixtureBatches(MixtureConfig(), tiny_tokenizer())
    with pytest.raises(UserError, match="rows of 16 and 24 tokens cannot hold"):
        mixture(files, row_input_length=16)
    state = mixture(files).get_state()
    state["rows"][1] += 1
    with pytest.raises(UserError, match="the mixture's files have"):
        mixture(files).set_state(state)


def test_rows_without_the_field_are_named(files):
    entry = MixtureEntry("supervised", (files["text"],), 1.0, 24, 8)
    with pytest.raises(UserError, match=r"text\.jsonl:\d+ has no text field 'input'; it has text"):
        next(mixture_batches([entry], tiny_tokenizer(), prefetch=2))
