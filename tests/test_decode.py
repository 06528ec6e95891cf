"""Greedy decoding with caches against decoding without any; `test_search` has transformers'."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import (
    FAMILIES,
    NEW,
    NOTHING,
    ONE_BY_ONE,
    every_value,
    find,
    make_batch,
    make_config,
    make_params,
)

from jaxprompt import steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5 import model as t5
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.search import Search
from jaxprompt.typing import Batch, KeysValues, PromptValues, UserError


@functools.cache
def forced(config: T5Config) -> Callable:
    """Logits of all positions with teacher forcing, jitted."""

    def logits(params: dict, batch: Batch, values: PromptValues) -> jax.Array:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, values)
        hidden = t5.decode_batch(params, config, ONE_BY_ONE, batch, values, encoded)
        return t5.logits(params, config, hidden)

    return jax.jit(logits)


def greedy(
    config: T5Config, batch: Batch, values: PromptValues = NOTHING, count: int = NEW
) -> Generated:
    return find(config, batch, Search(count), values=values)


def without_cache(
    config: T5Config, batch: Batch, values: PromptValues = NOTHING, count: int = NEW
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced argmax over the growing output: ids [B, count], summed log-likelihood [B]."""
    program = forced(dataclasses.replace(config, eos_id=-1))
    ended = batch.example_index_BG[:, 0] < 0
    rows, start = batch.decoder_ids_BT.shape
    longer = dataclasses.replace(
        batch,
        decoder_ids_BT=np.pad(batch.decoder_ids_BT, ((0, 0), (0, count))),
        decoder_slots_BT=np.pad(batch.decoder_slots_BT, ((0, 0), (0, count)), constant_values=-1),
        decoder_segments_BT=np.ones((rows, start + count), np.int32),
    )
    total = np.zeros(rows)
    for at in range(start, start + count):
        logits = np.asarray(program(make_params(config), longer, values))[:, at - 1]
        token = np.where(ended, config.pad_id, logits.argmax(-1))
        total += np.where(ended, 0.0, logits.max(-1) - np.log(np.exp(logits).sum(-1)))
        ended = ended | (token == config.eos_id)
        longer.decoder_ids_BT[:, at] = token
    return longer.decoder_ids_BT[:, start:], total


def ending(config: T5Config, batch: Batch, values: PromptValues = NOTHING) -> T5Config:
    """The config with the end token replaced by one that some row says in the middle."""
    ids, _ = without_cache(dataclasses.replace(config, eos_id=-1), batch, values)
    return dataclasses.replace(config, eos_id=int(ids[0, NEW // 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_decoding_without_cache(family: str):
    batch = make_batch()
    config = ending(make_config(family), batch)
    ids, total = without_cache(config, batch)
    found = greedy(config, batch)
    np.testing.assert_array_equal(found.ids_BT, ids)
    np.testing.assert_allclose(found.log_likelihood_B, total, atol=1e-4)
    np.testing.assert_array_equal(
        found.ended_B, (ids == config.eos_id).any(1) | (batch.example_index_BG[:, 0] < 0)
    )
    assert len(np.unique(ids[:-1], axis=0)) > 1, "a model that says one thing shows nothing"


@pytest.mark.parametrize("shorter", [False, True])
def test_decoder_slots_and_prefixes(shorter: bool):
    batch = make_batch(slots=3, decoder_slots=2, prompts=2)
    values = every_value(make_config("umt5"), slots=3, decoder_slots=2, prefix=4)
    assert set(batch.prompt_index_BG[:-1, 0]) == {0, 1}
    if shorter:
        mask = jnp.asarray([[True] * 4, [True, False, True, False]])
        values = jax.tree.map(
            lambda kv: (
                dataclasses.replace(kv, mask_QP=mask, before_text=True)
                if isinstance(kv, KeysValues)
                else kv
            ),
            values,
            is_leaf=lambda leaf: isinstance(leaf, KeysValues),
        )
    config = ending(make_config("umt5"), batch, values)
    ids, total = without_cache(config, batch, values)
    found = greedy(config, batch, values)
    np.testing.assert_array_equal(found.ids_BT, ids)
    # weights changed by 1e-7 of themselves change the second of these numbers by 1e-2
    np.testing.assert_allclose(found.log_likelihood_B, total, atol=1e-3)


def test_an_answer_does_not_depend_on_the_rest_of_its_batch():
    batch = make_batch()
    config = ending(make_config("t5-1.1"), batch)
    together = greedy(config, batch)
    for row in range(4):
        alone = greedy(config, jax.tree.map(lambda x: x[row : row + 1], batch))  # noqa: B023
        np.testing.assert_array_equal(alone.ids_BT[0], together.ids_BT[row])
    padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], 3, 0)]), batch)
    np.testing.assert_array_equal(greedy(config, padded).ids_BT[:5], together.ids_BT)


def test_stops_when_all_rows_have_ended():
    """Every row ends at once, so that a loop which went on would overwrite or never return pads."""
    batch = make_batch()
    config = make_config("t5-1.1")
    first = greedy(dataclasses.replace(config, eos_id=-1), batch, count=1).ids_BT[0, 0]
    row = jax.tree.map(lambda x: x[:1], batch)
    config = dataclasses.replace(config, eos_id=int(first))
    found = greedy(config, row, count=1000)
    np.testing.assert_array_equal(found.ids_BT[0], [first] + [0] * 999)
    assert found.ended_B.all()


def test_one_token_and_none():
    batch = make_batch()
    config = dataclasses.replace(make_config("t5-1.1"), eos_id=-1)
    assert greedy(config, batch, count=1).ids_BT.shape == (5, 1)
    with pytest.raises(UserError, match="at least 1"):
        greedy(config, batch, count=0)


def test_packed_rows_are_refused():
    batch = make_batch()
    packed = dataclasses.replace(batch, prompt_index_BG=np.zeros((5, 2), np.int32))
    with pytest.raises(ValueError, match="1 example a row, got room for 2"):
        greedy(make_config("t5-1.1"), packed)


def test_prompted_model_generates_with_its_prompt():
    config = make_config("t5-1.1")
    batch = make_batch(slots=3)
    prompt = jax.random.normal(jax.random.key(1), (3, config.d_model))
    model = PromptedT5(t5.T5(config, make_params(config)), SoftPrompt(prompt))
    graphdef, trained, frozen = trees.split(model)
    program = jax.jit(functools.partial(steps.generate, graphdef, rules=Search(NEW).rules))
    ids, _ = without_cache(config, batch, PromptValues(encoder=prompt[None]))
    np.testing.assert_array_equal(program(trained, frozen, batch).ids_BT, ids)
