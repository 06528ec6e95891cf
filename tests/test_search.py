"""Beam search, control of repetition and sampling, against transformers and exact distributions."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import (
    FAMILIES,
    NEW,
    NOTHING,
    ONE_BY_ONE,
    ending,
    every_value,
    make_batch,
    make_config,
    make_params,
)

from jaxprompt import trees
from jaxprompt.t5 import model as t5
from jaxprompt.t5 import stepwise
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.generate import generate
from jaxprompt.t5.search import Search, controlled, warped
from jaxprompt.t5.weights import save_hf
from jaxprompt.typing import Batch, PromptValues, UserError

SEEDS = (0, 1)
BEAMS = {
    "plain": Search(NEW, num_beams=3),
    "early": Search(NEW, num_beams=3, early_stopping=True, num_return_sequences=2),
    "short": Search(NEW, num_beams=4, length_penalty=-1.5, num_return_sequences=4),
    "long": Search(NEW, num_beams=2, length_penalty=2.0, early_stopping="never"),
    "even": Search(NEW, num_beams=4, length_penalty=0.0, early_stopping=True),
    "controlled": Search(
        NEW, num_beams=3, length_penalty=0.7, repetition_penalty=1.4, no_repeat_ngram_size=2,
        num_return_sequences=3,
    ),
}  # fmt: skip
GREEDY = {
    "penalty": Search(NEW, repetition_penalty=1.7),
    "bigrams": Search(NEW, no_repeat_ngram_size=2, repetition_penalty=0.8),
    "trigrams": Search(NEW, no_repeat_ngram_size=3, repetition_penalty=0.7),
}


@functools.cache
def seeded(config: T5Config, seed: int) -> dict:
    """The model's random weights, moved about by `seed`."""
    keys = iter(range(1000))

    def move(path: str, leaf: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), next(keys))
        return leaf * (1 + 0.5 * jax.random.normal(key, leaf.shape))

    return trees.map_with_path(move, make_params(config)) if seed else make_params(config)


@functools.cache
def compiled(config: T5Config, search: Search) -> Callable:
    def run(params: dict, batch: Batch, values: PromptValues, draw: Any) -> Generated:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, values)
        return generate(params, config, ONE_BY_ONE, batch, values, encoded, search, draw)

    return jax.jit(run)


def find(
    config: T5Config,
    batch: Batch,
    search: Search,
    *,
    params: dict | None = None,
    values: PromptValues = NOTHING,
    draw: stepwise.Draw | None = None,
) -> Generated:
    params = make_params(config) if params is None else params
    return jax.device_get(compiled(config, search)(params, batch, values, draw))


def theirs(model: Any, batch: Batch, config: T5Config, search: Search) -> tuple[Any, Any]:
    """ids [rows, at most NEW] and scores of transformers' generate."""
    import torch

    options = dataclasses.asdict(search)
    if search.num_beams == 1:
        del options["length_penalty"], options["early_stopping"]
    for name in ("temperature", "top_k", "top_p"):
        del options[name]
    out = model.generate(
        input_ids=torch.tensor(batch.encoder_ids_BS[:-1]).long(),
        attention_mask=torch.tensor(batch.encoder_segments_BS[:-1]),
        eos_token_id=None if config.eos_id < 0 else config.eos_id,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    sequences = out.sequences.numpy()[:, 1:]
    if config.eos_id >= 0:  # its beam search fills up with the end token where the pad id is 0
        after = np.cumsum(sequences == config.eos_id, axis=1) - (sequences == config.eos_id) > 0
        sequences = np.where(after, config.pad_id, sequences)
    return sequences, getattr(out, "sequences_scores", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, tmp_path: Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = "UMT5ForConditionalGeneration" if family == "umt5" else "T5ForConditionalGeneration"
    batch = make_batch(rows=7)
    config = ending(make_config(family), batch)
    endings = set()
    for seed in SEEDS:
        save_hf(tmp_path / str(seed), seeded(config, seed), config)
        model = getattr(transformers, name).from_pretrained(tmp_path / str(seed))
        # transformers 5 scales decoder outputs, whatever an untied config says
        model.config.tie_word_embeddings = config.tie_word_embeddings
        model.config.scale_decoder_outputs = config.scale_decoder_outputs
        for label, search in {**BEAMS, **GREEDY}.items():
            sequences, scores = theirs(model, batch, config, search)
            found = find(config, batch, search, params=seeded(config, seed))
            ours = found.ids_BT[: len(sequences)]
            message = f"{family} {seed} {label}"
            np.testing.assert_array_equal(ours[:, : sequences.shape[1]], sequences, err_msg=message)
            assert not ours[:, sequences.shape[1] :].any(), message
            if scores is not None:
                np.testing.assert_allclose(
                    found.score_B[: len(sequences)], scores.numpy(), 1e-3, 1e-3, err_msg=message
                )
            endings |= set(found.ended_B[: len(sequences)].tolist())
    assert endings == {False, True}


def test_beams_do_not_depend_on_the_rest_of_their_batch():
    batch = make_batch(rows=7)
    config = ending(make_config("t5-1.1"), batch)
    for search in (BEAMS["early"], BEAMS["controlled"]):
        together = find(config, batch, search)
        shape = (7, search.num_return_sequences)
        for row in (0, 4, 6):
            alone = find(config, jax.tree.map(lambda x: x[row : row + 1], batch), search)  # noqa: B023
            for ours, all_of_them in zip(
                jax.tree.leaves(alone), jax.tree.leaves(together), strict=True
            ):
                rows = all_of_them.reshape(*shape, *all_of_them.shape[1:])[row]
                np.testing.assert_allclose(ours, rows, atol=1e-3)


def test_a_row_without_an_example_says_nothing():
    batch = make_batch()
    found = find(make_config("t5-1.1"), batch, BEAMS["early"])
    assert not found.ids_BT[-2:].any() and found.ended_B[-2:].all()
    np.testing.assert_array_equal(found.log_likelihood_B[-2:], 0)
    np.testing.assert_array_equal(found.score_B[-2:], 0)


def test_a_beam_as_wide_as_all_sentences_finds_the_best_with_a_prompt():
    """Against every sentence of two tokens, scored without a cache, with values of every kind."""
    batch = make_batch(slots=3, decoder_slots=2, prompts=2)
    config = dataclasses.replace(make_config("umt5"), eos_id=-1)
    values = every_value(config, slots=3, decoder_slots=2, prefix=4)
    search = Search(2, num_beams=config.vocab_size, num_return_sequences=5)
    found = find(config, batch, search, values=values)

    def score(batch: Batch) -> jax.Array:
        params = make_params(config)
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, values)
        hidden = t5.decode_batch(params, config, ONE_BY_ONE, batch, values, encoded)
        return jax.nn.log_softmax(t5.logits(params, config, hidden))

    score = jax.jit(score)
    V = config.vocab_size
    total = np.zeros((4, V, V))
    for first in range(V):
        said = dataclasses.replace(
            batch,
            decoder_ids_BT=np.pad(batch.decoder_ids_BT, ((0, 0), (0, 1)), constant_values=first),
            decoder_slots_BT=np.pad(batch.decoder_slots_BT, ((0, 0), (0, 1)), constant_values=-1),
            decoder_segments_BT=np.pad(
                batch.decoder_segments_BT, ((0, 0), (0, 1)), constant_values=1
            ),
        )
        got = np.asarray(score(said))[:4]
        total[:, first] = got[:, -2, first, None] + got[:, -1]
    order = np.argsort(-total.reshape(4, -1), axis=1)[:, :5]
    expected = np.stack(np.divmod(order, V), axis=-1)
    np.testing.assert_array_equal(found.ids_BT[: 4 * 5].reshape(4, 5, 2), expected)
    best = np.take_along_axis(total.reshape(4, -1), order, axis=1)
    np.testing.assert_allclose(found.log_likelihood_B[:20].reshape(4, 5), best, atol=1e-3)
    np.testing.assert_allclose(found.score_B[:20].reshape(4, 5), best / 2, atol=1e-3)


@pytest.mark.parametrize(
    "search",
    [
        Search(temperature=1.0),
        Search(temperature=2.5),
        Search(temperature=0.8, top_k=5),
        Search(temperature=1.5, top_p=0.7),
        Search(temperature=1.2, top_k=9, top_p=0.9, repetition_penalty=1.3),
    ],
    ids=lambda search: f"t{search.temperature}-k{search.top_k}-p{search.top_p}",
)
def test_samples_come_from_the_filtered_distribution(search: Search):
    """Chi-square of 4,000 first tokens against the distribution computed with numpy."""
    count = 4000
    search = dataclasses.replace(search, max_new_tokens=1, num_return_sequences=count)
    config = dataclasses.replace(make_config("t5-1.1"), eos_id=-1)
    row = jax.tree.map(lambda x: x[:1], make_batch())
    params = dict(make_params(config))
    params["decoder"] = trees.map_with_path(
        lambda path, leaf: leaf * (0.5 if "logits_dense" in path else 1), params["decoder"]
    )
    found = find(config, row, search, params=params)
    encoded = t5.encode_batch(params, config, ONE_BY_ONE, row, NOTHING)
    hidden = t5.decode_batch(params, config, ONE_BY_ONE, row, NOTHING, encoded)
    logits = np.asarray(t5.logits(params, config, hidden)[0, 0], np.float64)
    expected = exact_distribution(logits, search)
    assert (expected > 0).sum() > 2, "a sure thing shows nothing"
    seen = np.bincount(found.ids_BT[:, 0], minlength=len(expected))
    assert not seen[expected == 0].any()
    often = expected * count >= 5
    rare = [(seen[~often].sum(), expected[~often].sum() * count)]
    pairs = [(s, e * count) for s, e in zip(seen[often], expected[often], strict=True)] + rare
    chi = sum((s - e) ** 2 / e for s, e in pairs if e > 0)
    freedom = sum(e > 0 for _, e in pairs) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square over freedom is almost normal
    spread = np.sqrt(2 / (9 * freedom))
    assert ((chi / freedom) ** (1 / 3) - (1 - spread**2)) / spread < 3.5
    own = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(found.log_likelihood_B, own[found.ids_BT[:, 0]], atol=1e-4)


def exact_distribution(logits: np.ndarray, search: Search) -> np.ndarray:
    logits = logits.copy()
    start = logits[0]  # the start token has been said
    logits[0] = (
        start * search.repetition_penalty if start < 0 else start / search.repetition_penalty
    )
    logits /= search.temperature
    order = np.argsort(-logits)
    if search.top_k:
        order = order[: search.top_k]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    kept = np.cumsum(weights) - weights < search.top_p
    expected = np.zeros(len(logits))
    expected[order[kept]] = weights[kept] / weights[kept].sum()
    return expected


def test_what_is_drawn_does_not_depend_on_the_batch():
    batch = make_batch(rows=7)
    config = ending(make_config("t5-1.1"), batch)
    search = Search(NEW, temperature=3.0, num_return_sequences=2)
    numbers = np.array([40, 41, 7, 43, 44, 45, -1], np.int32)
    seed = np.uint32(5)
    together = find(config, batch, search, draw=stepwise.Draw(seed, numbers))
    order = np.array([3, 0, 2])
    others = jax.tree.map(lambda x: x[order], batch)
    found = find(config, others, search, draw=stepwise.Draw(seed, numbers[order]))
    rows = together.ids_BT.reshape(7, 2, NEW)
    np.testing.assert_array_equal(found.ids_BT.reshape(3, 2, NEW), rows[order])
    assert len({tuple(ids) for ids in rows[:-1].reshape(-1, NEW).tolist()}) == 12
    again = find(config, batch, search, draw=stepwise.Draw(np.uint32(6), numbers))
    assert (again.ids_BT != together.ids_BT).any()


def test_a_search_of_one_possible_token_is_greedy():
    batch = make_batch()
    config = ending(make_config("t5-1.1"), batch)
    greedy = find(config, batch, Search(NEW))
    for search in (Search(NEW, temperature=1.0, top_k=1), Search(NEW, temperature=1.0, top_p=1e-6)):
        np.testing.assert_array_equal(find(config, batch, search).ids_BT, greedy.ids_BT)


@pytest.mark.parametrize("search", [Search(NEW), Search(NEW, temperature=2.0)])
def test_halting_changes_nothing(search: Search):
    batch = make_batch()
    config = ending(make_config("t5-1.1"), batch)
    params = make_params(config)
    whole = find(config, batch, search)
    traces = []

    @jax.jit
    def start(batch: Batch) -> stepwise.Halted:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, NOTHING)
        return stepwise.start(params, config, ONE_BY_ONE, batch, NOTHING, encoded, search)

    @jax.jit
    def go_on(halted: stepwise.Halted, until: int) -> stepwise.Halted:
        traces.append(until)
        return stepwise.go_on(params, config, ONE_BY_ONE, search, halted, until)

    halted = start(batch)
    for until in (2, 3, 7, 100):
        halted = go_on(halted, until)
        got = np.asarray(halted.ids_BT)[:, : min(until, NEW)]
        np.testing.assert_array_equal(np.where(got < 0, 0, got), whole.ids_BT[:, : min(until, NEW)])
    found = stepwise.result(config, halted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), whole)
    assert len(traces) == 1

    row_ended = dataclasses.replace(start(batch), ended_B=jnp.arange(5) == 1)
    ids = np.asarray(stepwise.result(config, go_on(row_ended, 100)).ids_BT)
    assert not ids[1, 1:].any()
    np.testing.assert_array_equal(ids[[0, 2, 3]], whole.ids_BT[[0, 2, 3]])


def test_repetition_by_hand():
    history = jnp.asarray([[0, 4, 5, 4, -1, -1], [0, -3, 2, 2, -1, -1]])
    scores = jnp.asarray([[2.0, -1.0, 1.0, 0.5, -2.0, 4.0]] * 2)
    penalised = controlled(Search(repetition_penalty=2.0), scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(penalised, [[1, -1, 1, 0.5, -4, 2], [1, -1, 0.5, 0.5, -2, 4]])
    bigrams = controlled(Search(no_repeat_ngram_size=2), scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(np.argwhere(np.isinf(bigrams)), [[0, 5], [1, 2]])
    longer = controlled(Search(no_repeat_ngram_size=6), scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(longer, scores)


def test_filters_by_hand():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.1, 0.4]]))
    for search, kept in (
        (Search(temperature=1.0, top_k=1), [1, 3]),  # a tie
        (Search(temperature=1.0, top_p=0.5), [1, 3]),
        (Search(temperature=1.0, top_k=9), [0, 1, 2, 3]),
        (Search(temperature=1.0, top_p=0.85), [0, 1, 2, 3]),
    ):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(warped(search, logits)[0])), kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it has to be a whole number, at least 1"),
        ({"num_beams": 2.5}, "num_beams is 2.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size is True"),
        ({"length_penalty": "long"}, "length_penalty is 'long'; it has to be a number"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"temperature": -0.5}, "temperature is -0.5; it has to be 0 or above"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it has to be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it has to be above 0"),
        ({"top_k": 3}, "top_k is 3, but nothing is drawn at temperature 0"),
        ({"top_p": 0.5}, "top_p is 0.5, but nothing is drawn at temperature 0"),
        ({"temperature": 1.0, "num_beams": 2}, "take one of sampling and beam search"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, num_beams 1"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        Search(**options)
