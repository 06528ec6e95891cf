"""Searches against transformers, golden and live, against exact distributions, and by hand."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from searches import (
    ANSWERED,
    EVERYWHERE,
    NEW,
    NOTHING,
    ONE_BY_ONE,
    ending_config,
    every_value,
    find,
    golden,
    make_batch,
    make_config,
    make_params,
    searches_of,
    theirs,
    torch_model,
    weight_sum,
)
from test_bank import LENGTHS, Everything, own_examples

from jaxprompt import steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.t5 import model as t5
from jaxprompt.t5 import stepwise
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.search import Search, controlled, warped
from jaxprompt.typing import Batch, UserError

CONTROLLED = EVERYWHERE["beams controlled"]
every_family = pytest.mark.parametrize("family", ANSWERED)


@functools.cache
def ours(family: str, seed: int, label: str) -> Generated:
    config = ending_config(family)
    found = find(
        config, make_batch(rows=7), searches_of(family)[label], params=make_params(config, seed)
    )
    there = 6 * searches_of(family)[label].num_return_sequences
    return jax.tree.map(lambda x: x[:there], found)


@every_family
def test_equals_golden_answers_of_transformers(family: str):
    arrays = golden()
    seeds = ANSWERED[family][1]
    sums = [weight_sum(make_params(make_config(family), seed)) for seed in seeds]
    again = "run tests/golden/make_generate_golden.py again"
    np.testing.assert_allclose(sums, arrays[f"{family}/weights"], 1e-9, err_msg=again)
    endings = set()
    for label in searches_of(family):
        for number, seed in enumerate(seeds):
            found = ours(family, seed, label)
            ids = arrays[f"{family}/{label}/ids"][number]
            np.testing.assert_array_equal(found.ids_BT, ids, err_msg=f"{label} {seed}")
            if searches_of(family)[label].num_beams > 1:
                scores = arrays[f"{family}/{label}/scores"][number]
                np.testing.assert_allclose(found.score_B, scores, 5e-3, 1e-3, err_msg=label)
            endings |= set(found.ended_B.tolist())
    assert endings == {False, True}


def test_when_a_beam_search_ends_makes_a_difference():
    """In what transformers said, so that equality with it says something."""
    said = {golden()[f"t5-1.1/{label}/ids"].tobytes() for label in ("first", "better", "never")}
    assert len(said) == 3


@every_family
def test_equals_live_answers_of_transformers(family: str, tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config, batch = ending_config(family), make_batch(rows=7)
    for seed in ANSWERED[family][1][:2]:
        model = torch_model(family, config, seed, tmp_path / str(seed))
        for label, search in searches_of(family).items():
            ids, scores = theirs(model, batch, search, config.eos_id)
            found = ours(family, seed, label)
            np.testing.assert_array_equal(found.ids_BT, ids, err_msg=f"{label} {seed}")
            if search.num_beams > 1:
                np.testing.assert_allclose(found.score_B, scores, 5e-3, 1e-3, err_msg=label)


def test_beams_do_not_depend_on_the_rest_of_their_batch():
    batch = make_batch(rows=7)
    config = ending_config("t5-1.1")
    together = find(config, batch, CONTROLLED)
    shape = (7, CONTROLLED.num_return_sequences)
    for row in (0, 4, 6):
        alone = find(config, jax.tree.map(lambda x: x[row : row + 1], batch), CONTROLLED)  # noqa: B023
        for own, all_of_them in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            rows = all_of_them.reshape(*shape, *all_of_them.shape[1:])[row]
            np.testing.assert_allclose(own, rows, atol=1e-3)


def test_a_row_without_an_example_says_nothing():
    batch = make_batch(rows=7)
    found = find(ending_config("t5-1.1"), batch, CONTROLLED)
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
    """4,000 answers of two tokens against the distributions computed with numpy."""
    count = 4000
    search = dataclasses.replace(search, max_new_tokens=2, num_return_sequences=count)
    config = dataclasses.replace(make_config("t5-1.1"), eos_id=-1)
    row = jax.tree.map(lambda x: x[:1], make_batch())
    params = dict(make_params(config))
    params["decoder"] = trees.map_with_path(
        lambda path, leaf: leaf * (0.2 if "logits_dense" in path else 1), params["decoder"]
    )
    found = find(config, row, search, params=params)
    first_X, second_X = found.ids_BT.T
    often = int(np.bincount(first_X).argmax())
    logits_TV = two_logits(config)(params, row, often)
    check_counts(first_X, exact_distribution(logits_TV[0], search, [0]))
    after = first_X == often
    check_counts(second_X[after], exact_distribution(logits_TV[1], search, [0, often]))
    own_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    gained = own_TV[0, often] + own_TV[1, second_X[after]]
    np.testing.assert_allclose(found.log_likelihood_B[after], gained, atol=1e-3)


def check_counts(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of tokens drawn against their distribution."""
    assert (expected > 0).sum() > 2, "a sure thing shows nothing"
    count, seen = len(tokens), np.bincount(tokens, minlength=len(expected))
    assert not seen[expected == 0].any()
    often = expected * count >= 5
    rare = [(seen[~often].sum(), expected[~often].sum() * count)]
    pairs = [(s, e * count) for s, e in zip(seen[often], expected[often], strict=True)] + rare
    chi = sum((s - e) ** 2 / e for s, e in pairs if e > 0)
    freedom = sum(e > 0 for _, e in pairs) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square over freedom is almost normal
    spread = np.sqrt(2 / (9 * freedom))
    assert ((chi / freedom) ** (1 / 3) - (1 - spread**2)) / spread < 3.5


@functools.cache
def two_logits(config: T5Config) -> Callable:
    """Logits of the first token and, after a given one, of the second: float64 [2, V]."""

    def run(params: dict, batch: Batch) -> jax.Array:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, NOTHING)
        hidden = t5.decode_batch(params, config, ONE_BY_ONE, batch, NOTHING, encoded)
        return t5.logits(params, config, hidden)[0]

    compiled = jax.jit(run)

    def logits(params: dict, row: Batch, first: int) -> np.ndarray:
        ids = np.array([[0, first]], np.int32)
        said = dataclasses.replace(
            row,
            decoder_ids_BT=ids,
            decoder_slots_BT=np.full_like(ids, -1),
            decoder_segments_BT=np.ones_like(ids),
        )
        return np.asarray(compiled(params, said), np.float64)

    return logits


def exact_distribution(logits: np.ndarray, search: Search, said: Sequence[int]) -> np.ndarray:
    logits, penalty = logits.copy(), search.repetition_penalty
    for token in set(said):
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
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
    config = dataclasses.replace(make_config("t5-1.1"), eos_id=-1)
    search = Search(NEW, temperature=8.0, num_return_sequences=2)
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


@pytest.mark.parametrize(
    "search",
    [CONTROLLED, Search(NEW, temperature=2.0, num_return_sequences=2)],
    ids=["beam", "drawn"],
)
def test_answers_do_not_depend_on_the_other_prompts(search: Search):
    """Rows of prompts of three lengths, with values of every kind, in batches of other rows."""
    methods = [Everything(length, seed) for seed, length in enumerate(LENGTHS)]
    examples = [example for number in range(3) for example in own_examples(number)]
    order = np.array([3, 8, 0, 1, 6, 4, 7, 2, 5])
    numbers = np.arange(9) + 20

    def answers(method: Any, rows: np.ndarray, length: int, prompt: int | None = None) -> Generated:
        """`prompt` where it is not that of the examples."""
        of = [examples[row] for row in rows]
        if prompt is not None:
            of = [dataclasses.replace(example, prompt=prompt) for example in of]
        batch = tiny.make_batch([[example] for example in of], length, 8, 1)
        start = np.zeros((len(rows), 1), np.int32)
        batch = dataclasses.replace(
            batch, decoder_ids_BT=start, decoder_slots_BT=start - 1, decoder_segments_BT=start + 1
        )
        model = PromptedT5(t5.T5(tiny.CONFIG, make_params(tiny.CONFIG), ONE_BY_ONE), method)
        draw = stepwise.Draw(np.uint32(3), numbers[rows].astype(np.int32))
        found = jax.jit(steps.generate, static_argnums=0)(
            *trees.split(model), batch, draw, rules=search.rules
        )
        shape = (len(rows), search.num_return_sequences)
        return jax.tree.map(lambda x: np.asarray(x).reshape(*shape, *x.shape[1:]), found)

    together = answers(PromptBank(methods), order, 10)
    assert len(np.unique(together.ids_BT.reshape(-1, NEW), axis=0)) > 12
    for alone, rows in (
        (answers(methods[0], np.arange(3), 12, prompt=0), range(3)),
        (answers(PromptBank(methods[::-1]), np.array([6]), 9, prompt=0), [6]),
    ):
        places = [int(np.flatnonzero(order == row)[0]) for row in rows]
        np.testing.assert_array_equal(alone.ids_BT, together.ids_BT[places])
        np.testing.assert_allclose(alone.score_B, together.score_B[places], atol=5e-3)


def test_a_search_of_one_possible_token_is_greedy():
    batch = make_batch(rows=7)
    config = ending_config("t5-1.1")
    greedy = find(config, batch, Search(NEW))
    for search in (Search(NEW, temperature=1.0, top_k=1), Search(NEW, temperature=1.0, top_p=1e-6)):
        np.testing.assert_array_equal(find(config, batch, search).ids_BT, greedy.ids_BT)


@pytest.mark.parametrize("search", [Search(NEW), Search(NEW, temperature=2.0)])
def test_halting_changes_nothing(search: Search):
    batch = make_batch(rows=7)
    config = ending_config("t5-1.1")
    params = make_params(config)
    whole = find(config, batch, search)
    traces = []

    @jax.jit
    def start(batch: Batch) -> stepwise.Halted:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, NOTHING)
        return stepwise.start(params, config, ONE_BY_ONE, batch, NOTHING, encoded, search.rules)

    @jax.jit
    def go_on(halted: stepwise.Halted, until: int) -> stepwise.Halted:
        traces.append(until)
        return stepwise.go_on(params, config, ONE_BY_ONE, search.rules, halted, until)

    halted = start(batch)
    for until in (2, 3, 7, 100):
        halted = go_on(halted, until)
        got = np.asarray(halted.ids_BT)[:, : min(until, NEW)]
        np.testing.assert_array_equal(np.where(got < 0, 0, got), whole.ids_BT[:, : min(until, NEW)])
    found = stepwise.result(config, halted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), whole)
    assert len(traces) == 1

    halted = start(batch)
    row_ended = dataclasses.replace(halted, ended_B=halted.ended_B | (jnp.arange(7) == 1))
    ids = np.asarray(stepwise.result(config, go_on(row_ended, 100)).ids_BT)
    assert not ids[1, 1:].any()
    np.testing.assert_array_equal(ids[[0, 2, 3]], whole.ids_BT[[0, 2, 3]])


def test_repetition_by_hand():
    history = jnp.asarray([[0, 4, 5, 4, -1, -1], [0, -3, 2, 2, -1, -1]])
    scores = jnp.asarray([[2.0, -1.0, 1.0, 0.5, -2.0, 4.0]] * 2)
    penalised = controlled(Search(repetition_penalty=2.0).rules, scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(penalised, [[1, -1, 1, 0.5, -4, 2], [1, -1, 0.5, 0.5, -2, 4]])
    bigrams = controlled(Search(no_repeat_ngram_size=2).rules, scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(np.argwhere(np.isinf(bigrams)), [[0, 5], [1, 2]])
    longer = controlled(Search(no_repeat_ngram_size=6).rules, scores, history, jnp.asarray(4))
    np.testing.assert_array_equal(longer, scores)


def test_filters_by_hand():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.1, 0.4]]))
    for search, kept in (
        (Search(temperature=1.0, top_k=1), [1, 3]),  # a tie
        (Search(temperature=1.0, top_p=0.5), [1, 3]),
        (Search(temperature=1.0, top_k=9), [0, 1, 2, 3]),
        (Search(temperature=1.0, top_p=0.85), [0, 1, 2, 3]),
    ):
        np.testing.assert_array_equal(
            np.flatnonzero(np.isfinite(warped(search.rules, logits)[0])), kept
        )


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
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"temperature": -0.5}, "temperature is -0.5; it has to be 0 or above"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it has to be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it has to be above 0"),
        ({"top_k": 3}, "top_k is 3, but nothing is drawn at temperature 0"),
        ({"top_p": 0.5}, "top_p is 0.5, but nothing is drawn at temperature 0"),
        ({"temperature": 1.0, "num_beams": 2}, "take one of sampling and beam search"),
        (
            {"length_penalty": 2.0},
            "length_penalty is 2.0, but there is no beam to rank",
        ),
        ({"early_stopping": "never"}, "early_stopping is never, but there is no beam"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, num_beams 1"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        Search(**options)
