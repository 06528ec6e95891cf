"""Cross-entropy, sums per segment, and what the loss is averaged over, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt.losses import cross_entropy, is_likeliest, segment_sums, token_weights


def _logits_and_targets() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return (
        draw.normal(scale=5, size=(2, 3, 7)).astype(np.float32),
        draw.integers(0, 7, (2, 3)).astype(np.int32),
    )


def test_cross_entropy_is_minus_log_of_the_targets_probability():
    logits, targets = _logits_and_targets()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = [[-np.log(probabilities[b, t, targets[b, t]]) for t in range(3)] for b in range(2)]
    got = cross_entropy(logits, targets)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_target_is_likeliest_where_no_token_has_a_larger_logit():
    logits = jnp.asarray([[[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [3.0, 3.0, -1.0]]])
    got = is_likeliest(logits, jnp.asarray([[1, 2, 1]]))
    np.testing.assert_array_equal(got, [[True, False, True]])


def test_z_loss_adds_the_squared_log_normaliser():
    logits, targets = _logits_and_targets()
    log_z = np.log(np.exp(logits).sum(-1))
    got = cross_entropy(logits, targets, 1e-2) - cross_entropy(logits, targets)
    np.testing.assert_allclose(got, 1e-2 * log_z**2, rtol=1e-4)


def test_gradient_is_probability_minus_one_hot():
    logits, targets = _logits_and_targets()
    got = jax.grad(lambda logits: jnp.sum(cross_entropy(logits, targets)))(logits)
    want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(7)[targets]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_large_logits_stay_finite():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]])
    got = cross_entropy(logits, jnp.asarray([[1]]))
    np.testing.assert_allclose(got, [[2e4]])


segment_rows = st.lists(st.integers(0, 3), min_size=6, max_size=6)
value_rows = st.lists(st.integers(-4, 4), min_size=6, max_size=6)


@given(segments=segment_rows, values=value_rows)
def test_segment_sums_are_sums_over_each_segment(segments: list[int], values: list[int]):
    got = segment_sums(jnp.asarray([values], jnp.float32), jnp.asarray([segments]), 3)
    want = [
        sum(v for v, s in zip(values, segments, strict=True) if s == segment)
        for segment in (1, 2, 3)
    ]
    np.testing.assert_array_equal(got, [want])


SEGMENTS = np.array([[1, 1, 1, 2, 0], [1, 2, 2, 2, 2], [0, 0, 0, 0, 0]], np.int32)
WEIGHTS = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.float32)
LOSS = np.array([[9, 1, 3, 5, 9], [7, 1, 2, 3, 4], [9, 9, 9, 9, 9]], np.float32)


def test_by_tokens_every_target_token_counts_the_same():
    weights, units = token_weights(WEIGHTS, SEGMENTS, 2, "tokens")
    np.testing.assert_array_equal(units, [3, 5, 0])
    assert np.sum(LOSS * weights) / np.sum(units) == (1 + 3 + 5 + 7 + 1 + 2 + 3 + 4) / 8


def test_by_examples_every_example_counts_the_same():
    weights, units = token_weights(WEIGHTS, SEGMENTS, 2, "examples")
    np.testing.assert_array_equal(units, [2, 2, 0])
    np.testing.assert_allclose(np.sum(LOSS * weights) / np.sum(units), (2 + 5 + 7 + 2.5) / 4)


@pytest.mark.parametrize("by", ["tokens", "examples"])
def test_rows_without_targets_weigh_nothing_and_stay_finite(by: str):
    weights, units = token_weights(WEIGHTS[2:], SEGMENTS[2:], 2, by)
    np.testing.assert_array_equal(units, [0])
    np.testing.assert_array_equal(weights, np.zeros((1, 5)))


def test_an_unknown_mean_is_refused():
    with pytest.raises(ValueError, match="not 'rows'"):
        token_weights(WEIGHTS, SEGMENTS, 2, "rows")
