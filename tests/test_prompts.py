"""Initialisers against oracles, method options, and the soft prompt's way to prompt values."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt import trees
from jaxprompt.prompts import METHODS, MethodConfig, MethodInputs, NoPrompt
from jaxprompt.prompts.base import INITS
from jaxprompt.prompts.init import INITIALISERS, InitContext, initial_rows
from jaxprompt.t5.config import T5Config
from jaxprompt.typing import UserError

D, VOCABULARY = 3, 30
TABLE = np.random.default_rng(0).normal(10, 5, (VOCABULARY, D)).astype(np.float32)
WORDS = {"good": [4], "very bad": [5, 6, 7], "fine": [8], "a b": [9, 10]}
FILE = np.arange(4 * D, dtype=np.float64).reshape(4, D)
KEY = jax.random.key(0)


def _rows(ids: Sequence[int]) -> np.ndarray:
    return TABLE[np.asarray(ids, int)]


CONTEXT = InitContext(
    sizes=T5Config(d_model=D, num_layers=2, num_decoder_layers=3, num_heads=2, d_kv=4),
    vocab_size=VOCABULARY,
    rows=_rows,
    encode=lambda text: WORDS.get(text, []),
    candidates=("good", "very bad"),
    load=lambda path: FILE,
)


def _ids_of(rows: np.ndarray) -> list[int]:
    """Which row of the table each is."""
    return [int(np.flatnonzero((row == TABLE).all(1))[0]) for row in rows]


def test_every_kind_that_a_config_may_name_exists():
    assert set(INITIALISERS) == set(INITS)


def test_uniform_fills_its_range_evenly():
    config = MethodConfig(length=1000, init="uniform", init_low=-0.25, init_high=0.75)
    rows = initial_rows(KEY, config, CONTEXT)
    assert rows.shape == (1000, D) and rows.dtype == np.float32
    assert -0.25 <= rows.min() < -0.24 and 0.74 < rows.max() < 0.75
    np.testing.assert_allclose(np.quantile(rows, [0.25, 0.5, 0.75]), [0, 0.25, 0.5], atol=0.03)


def test_the_papers_range_is_the_default():
    rows = initial_rows(KEY, MethodConfig(length=1000, init="uniform"), CONTEXT)
    assert -0.5 <= rows.min() < -0.49 and 0.49 < rows.max() < 0.5


def test_vocab_takes_different_rows_of_the_first_ids():
    config = MethodConfig(length=6, init="vocab", init_vocab_size=7)
    ids = _ids_of(initial_rows(KEY, config, CONTEXT))
    assert len(set(ids)) == 6 and max(ids) < 7
    others = _ids_of(initial_rows(jax.random.key(1), config, CONTEXT))
    assert ids != others


def test_vocab_stays_inside_a_small_vocabulary():
    config = MethodConfig(length=VOCABULARY, init="vocab", init_vocab_size=5000)
    assert sorted(_ids_of(initial_rows(KEY, config, CONTEXT))) == list(range(VOCABULARY))


def test_vocab_repeats_rows_only_when_there_are_too_few():
    config = MethodConfig(length=9, init="vocab", init_vocab_size=4)
    assert set(_ids_of(initial_rows(KEY, config, CONTEXT))) <= {0, 1, 2, 3}


def test_labels_are_means_of_their_pieces_and_the_rest_is_sampled():
    config = MethodConfig(length=5, init="labels", init_vocab_size=7)
    rows = initial_rows(KEY, config, CONTEXT)
    np.testing.assert_allclose(rows[0], TABLE[4], rtol=1e-6)
    np.testing.assert_allclose(rows[1], TABLE[5:8].mean(0), rtol=1e-6)
    assert max(_ids_of(rows[2:])) < 7


@pytest.mark.parametrize("length", [1, 2])
def test_labels_that_do_not_all_fit_are_cut(length: int):
    rows = initial_rows(KEY, MethodConfig(length=length, init="labels"), CONTEXT)
    want = [TABLE[4], TABLE[5:8].mean(0)][:length]
    np.testing.assert_allclose(rows, want, rtol=1e-6)


def test_text_is_repeated_and_cut():
    config = MethodConfig(length=5, init="text", init_text="very bad")
    assert _ids_of(initial_rows(KEY, config, CONTEXT)) == [5, 6, 7, 5, 6]


@pytest.mark.parametrize("init", ["prompt", "npy"])
def test_a_files_rows_become_float32(init: str):
    rows = initial_rows(KEY, MethodConfig(length=4, init=init, init_path="x"), CONTEXT)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, FILE)


@pytest.mark.parametrize("shape", [(3, D), (4, D + 1), (4 * D,), (1, 4, D)])
def test_a_file_of_another_shape_names_both(shape: tuple[int, ...]):
    context = dataclasses.replace(CONTEXT, load=lambda path: np.zeros(shape))
    config = MethodConfig(length=4, init="npy", init_path="x")
    got = " x ".join(map(str, shape))
    with pytest.raises(UserError, match=f"is {got}, .* 4 x backbone d_model {D}"):
        initial_rows(KEY, config, context)


FAILURES = {
    "no candidates": ({"init": "labels"}, {"candidates": ()}, "no candidates"),
    "label without tokens": (
        {"init": "labels"}, {"candidates": ("?",)}, r"'\?' tokenises to nothing",
    ),
    "text without tokens": (
        {"init": "text", "init_text": "?"}, {}, r"init_text '\?' tokenises to nothing",
    ),
    "no reader": ({"init": "npy", "init_path": "a.npy"}, {"load": None}, "no reader for a.npy"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_start_a_prompt_is_refused(case: str):
    options, changes, message = FAILURES[case]
    with pytest.raises(UserError, match=message):
        initial_rows(KEY, MethodConfig(**options), dataclasses.replace(CONTEXT, **changes))


WRONG_OPTIONS = {
    "length": ({"length": 0}, "method.length is 0"),
    "init": ({"init": "labes"}, "'labes' is not one of uniform, vocab"),
    "range": ({"init_low": 0.5}, "not below method.init_high"),
    "vocabulary": ({"init_vocab_size": 0}, "method.init_vocab_size is 0"),
    "text": ({"init": "text"}, "method.init_text is empty"),
    "path": ({"init": "prompt"}, "method.init_path is empty"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_refused(case: str):
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(UserError, match=message):
        MethodConfig(**options)


def _inputs() -> MethodInputs:
    ids = jnp.zeros((2, 4), jnp.int32)
    return MethodInputs(jnp.zeros((2, 4, D)), ids, ids, jnp.zeros((2, 1), jnp.int32))


def test_a_soft_prompt_is_its_own_values():
    method = METHODS["soft"].make(
        {"prompt": jnp.asarray(FILE, jnp.float32)}, MethodConfig(length=4)
    )
    values = method(_inputs())
    np.testing.assert_array_equal(values.encoder, FILE[None])
    assert jax.tree.leaves(dataclasses.replace(values, encoder=None)) == []


def test_no_prompt_has_neither_parameters_nor_values():
    assert trees.split(NoPrompt())[1:] == ({}, {})
    assert jax.tree.leaves(NoPrompt()(_inputs())) == []
