"""The parameter tree as data and the small layers, against numpy and torch-free definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt import trees
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import (
    ParamSpec,
    abstract_params,
    dropout,
    init_params,
    mlp,
    param_specs,
    rms_norm,
)
from jaxprompt.t5.slots import SlotPlaces

# Scalars of the published checkpoints, by hand from their config.json and the papers' tables.
SIZES = {
    "t5-small": (60_506_624, T5Config(
        d_model=512, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8,
        activation="relu", gated=False, tie_word_embeddings=True,
    )),
    "t5-v1_1-small": (76_961_152, T5Config()),
    "t5-v1_1-xxl": (11_135_332_352, T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_as_many_scalars_as_the_published_model(name: str):
    """T5 1.1 of Lester et al. table 4: 77,012,352 and 11,135,741,952 with a prompt of 100 x D."""
    count, config = SIZES[name]
    assert trees.count(abstract_params(config)) == count


def test_prompt_tuning_paper_counts():
    for name, total in (("t5-v1_1-small", 77_012_352), ("t5-v1_1-xxl", 11_135_741_952)):
        count, config = SIZES[name]
        assert count + 100 * config.d_model == total


def test_umt5_has_a_relative_bias_in_every_layer():
    config = dataclasses.replace(tiny.CONFIG, model_type="umt5", per_layer_relative_bias=True)
    specs = trees.flatten(param_specs(config))
    assert specs["encoder/layers/relpos_bias/rel_embedding"].shape == (3, 4, 8)
    assert specs["decoder/layers/relpos_bias/rel_embedding"].shape == (2, 4, 8)
    assert "encoder/relpos_bias/rel_embedding" not in specs


def test_init_follows_each_spec():
    config = dataclasses.replace(tiny.CONFIG, vocab_size=500, d_model=64, d_ff=96)
    params = trees.flatten(jax.jit(lambda key: init_params(config, key))(jax.random.key(0)))
    specs: dict[str, ParamSpec] = trees.flatten(param_specs(config))
    assert params.keys() == specs.keys()
    for path, spec in specs.items():
        assert params[path].shape == spec.shape
        if spec.stddev is None:
            np.testing.assert_array_equal(params[path], np.ones(spec.shape))
        else:
            size = math.prod(spec.shape)
            np.testing.assert_allclose(np.std(params[path]), spec.stddev, rtol=4 / math.sqrt(size))
    leaves = [
        np.asarray(leaf).ravel()[:4].tobytes()
        for path, leaf in params.items()
        if "scale" not in path
    ]
    assert len(set(leaves)) == len(leaves)  # no two parameters drawn from one key


def test_rms_norm_has_no_mean_and_no_bias():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 6)).astype(np.float32)
    scale = np.linspace(0.5, 2, 6, dtype=np.float32)
    want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(scale), jnp.asarray(x), 1e-3), want, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 512)), jnp.bfloat16)
    got = rms_norm(jnp.ones(512, jnp.bfloat16), x, 1e-6)
    x32 = np.asarray(x, np.float32)
    want = x32 / np.sqrt(np.mean(x32**2, -1, keepdims=True) + 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8)


def _gelu_new(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


NUMPY_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu_new": _gelu_new,
    "gelu": _gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("activation", NUMPY_ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_is_the_formula(activation: str, gated: bool):
    draw = np.random.default_rng(0)
    x, wi_0, wi_1 = (draw.normal(size=s).astype(np.float32) for s in ((1, 3, 4), (4, 6), (4, 6)))
    wo = draw.normal(size=(6, 4)).astype(np.float32)
    act = NUMPY_ACTIVATIONS[activation]
    if gated:
        params = {"wi_0": {"kernel": wi_0}, "wi_1": {"kernel": wi_1}, "wo": {"kernel": wo}}
        want = (act(x @ wi_0) * (x @ wi_1)) @ wo
    else:
        params = {"wi": {"kernel": wi_0}, "wo": {"kernel": wo}}
        want = act(x @ wi_0) @ wo
    got = mlp(params, jnp.asarray(x), activation)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean_and_is_the_identity_without_key_or_rate():
    x = jnp.full((100, 100), 2.0)
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x, 0.5, None) is x
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(2 / 0.75)}
    np.testing.assert_allclose(dropped.mean(), 2, atol=0.05)
    assert dropout(x.astype(jnp.bfloat16), 0.25, jax.random.key(0)).dtype == jnp.bfloat16


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Any slots anywhere in any segments: slots [2, 7], segments [2, 7], prompt index [2, 3]."""
    slots = draw(st.lists(st.integers(-1, 3), min_size=14, max_size=14))
    segments = draw(st.lists(st.integers(0, 3), min_size=14, max_size=14))
    prompts = draw(st.lists(st.integers(0, 1), min_size=6, max_size=6))
    shaped = (np.array(values, np.int32) for values in (slots, segments, prompts))
    return tuple(values.reshape(2, -1) for values in shaped)


@given(layout=layouts())
def test_slots_stand_where_the_layout_says(layout: tuple[np.ndarray, np.ndarray, np.ndarray]):
    slots, segments, prompts = layout
    embeds = np.arange(2 * 7 * 2, dtype=np.float32).reshape(2, 7, 2)
    values = 100 + np.arange(2 * 4 * 2, dtype=np.float32).reshape(2, 4, 2)
    want = embeds.copy()
    for b in range(2):
        for s in range(7):
            if slots[b, s] >= 0:
                prompt = prompts[b, max(segments[b, s] - 1, 0)]
                want[b, s] = values[prompt, slots[b, s]]
    np.testing.assert_array_equal(_placed(embeds, slots, segments, values, prompts), want)


def place_slots(embeds, slots, segments, values, index) -> jax.Array:
    return SlotPlaces(slots, segments, index).fill(embeds, values)


_placed = jax.jit(place_slots)


def test_gradient_of_slots_sums_over_the_places_they_stand_in():
    slots = np.array([[0, -1, 1], [1, 1, -1]], np.int32)
    segments, index = np.ones((2, 3), np.int32), np.zeros((2, 1), np.int32)
    weights = np.array([[1, 10, 100], [1000, 10000, 100000]], np.float32)

    def total(values: jax.Array) -> jax.Array:
        placed = place_slots(jnp.zeros((2, 3, 1)), slots, segments, values, index)
        return jnp.sum(placed[..., 0] * weights)

    gradient = jax.grad(total)(jnp.ones((1, 2, 1)))
    np.testing.assert_array_equal(gradient, [[[1], [11100]]])


def test_slots_take_the_dtype_of_the_embeddings():
    embeds = jnp.zeros((1, 2, 2), jnp.bfloat16)
    slots, ones, zero = np.array([[0, -1]]), np.ones((1, 2), np.int32), np.zeros((1, 1), np.int32)
    assert place_slots(embeds, slots, ones, jnp.ones((1, 1, 2)), zero).dtype == jnp.bfloat16
