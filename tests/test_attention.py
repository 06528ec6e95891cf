"""Relative positions, masks, attention and prefixes against small oracles that loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt.t5.attention import (
    MASKED,
    attend,
    project,
    project_out,
    relative_bias,
    relative_position_bucket,
    segment_mask,
    with_prefix,
)

# Buckets of relative positions -70, -63, ... 70, 16 buckets to distance 40, made with the float32
# torch code of transformers 5.23 (`T5Attention._relative_position_bucket`).
GOLDEN_POSITIONS = np.arange(-70, 71, 7)
GOLDEN_BOTH = [7, 7, 7, 7, 7, 7, 7, 6, 6, 4, 0, 12, 14, 14, 15, 15, 15, 15, 15, 15, 15]
GOLDEN_PAST = [15, 15, 15, 15, 15, 15, 14, 12, 10, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def bucket_by_definition(relative: int, both: bool, buckets: int, max_distance: int) -> int:
    """Half of the buckets one by one, the others by logarithm; Raffel et al. 2020, section 2.1."""
    base = 0
    if both:
        buckets //= 2
        base = buckets if relative > 0 else 0
    distance = abs(relative) if both else max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    share = np.float32(math.log(distance / exact)) / math.log(max_distance / exact)
    return base + min(exact + int(share * (buckets - exact)), buckets - 1)


def on_an_edge(relative: int, both: bool, buckets: int, max_distance: int) -> bool:
    """Whether rounding may decide the bucket, as at distance 16 = exact * 2**k."""
    exact = (buckets // 2 if both else buckets) // 2
    if abs(relative) < exact:
        return False
    share = math.log(abs(relative) / exact) / math.log(max_distance / exact)
    place = share * ((buckets // 2 if both else buckets) - exact)
    return abs(place - round(place)) < 1e-5


@given(
    relative=st.lists(st.integers(-600, 600), min_size=16, max_size=16),
    both=st.booleans(),
    quarter=st.integers(1, 16),
    further=st.integers(1, 500),
)
def test_bucket_is_the_definition(relative: list[int], both: bool, quarter: int, further: int):
    buckets, max_distance = 4 * quarter, 4 * quarter + further
    got = np.asarray(
        relative_position_bucket(
            np.asarray(relative, np.int32),
            bidirectional=both,
            num_buckets=buckets,
            max_distance=max_distance,
        )
    )
    for position, bucket in zip(relative, got, strict=True):
        if not on_an_edge(position, both, buckets, max_distance):
            assert bucket == bucket_by_definition(position, both, buckets, max_distance)


@pytest.mark.parametrize(("both", "golden"), [(True, GOLDEN_BOTH), (False, GOLDEN_PAST)])
def test_bucket_golden(both: bool, golden: list[int]):
    got = relative_position_bucket(
        GOLDEN_POSITIONS.astype(np.int32), bidirectional=both, num_buckets=16, max_distance=40
    )
    assert got.dtype == jnp.int32
    assert got.tolist() == golden


def test_relative_bias_reads_key_minus_query():
    table = jnp.arange(2 * 8, dtype=jnp.float32).reshape(2, 8)
    queries, keys = np.array([3, 5]), np.array([0, 3, 4, 9])
    got = relative_bias(table, queries, keys, bidirectional=True, max_distance=12)
    assert got.shape == (2, 2, 4) and got.dtype == jnp.float32
    for head in range(2):
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                bucket = bucket_by_definition(int(key - query), True, 8, 12)
                assert got[head, i, j] == table[head, bucket]


def _segments(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 3), min_size=length, max_size=length)


@given(queries=_segments(6), keys=_segments(5))
def test_mask_is_the_definition(queries: list[int], keys: list[int]):
    got = segment_mask(jnp.asarray([queries]), jnp.asarray([keys]))
    np.testing.assert_array_equal(got, [[[q == k for k in keys] for q in queries]])


def attention_by_loops(query, key, value, bias, mask) -> np.ndarray:
    rows, queries, heads, _ = query.shape
    out = np.zeros((rows, queries, heads, value.shape[-1]))
    for b in range(rows):
        for h in range(heads):
            for t in range(queries):
                seen = [s for s in range(key.shape[1]) if mask[b, t, s]]
                scores = [
                    query[b, t, h] @ key[b, s, h] + (0 if bias is None else bias[h, t, s])
                    for s in seen
                ]
                weights = np.exp(scores) / np.sum(np.exp(scores))
                out[b, t, h] = sum(w * value[b, s, h] for w, s in zip(weights, seen, strict=True))
    return out


def _arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
def test_attend_is_softmax_attention(biased: bool):
    query, key, value, bias = _arrays((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), (2, 3, 5))
    mask = np.random.default_rng(1).random((2, 3, 5)) < 0.6
    mask[:, :, 0] = True
    got = jax.jit(attend)(query, key, value, bias if biased else None, mask)
    want = attention_by_loops(query, key, value, bias if biased else None, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_query_that_sees_nothing_stays_finite_with_its_gradient():
    query, key, value = _arrays((1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    mask = np.zeros((1, 2, 3), bool)

    def total(query: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value, None, mask))

    value_and_gradient = jax.value_and_grad(total)(query)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradient))
    assert MASKED < -1e6


def test_scores_of_bfloat16_are_float32():
    """Scores near 300 are 2 apart in bfloat16; the sharp softmax shows where they were rounded."""
    query = jnp.asarray([[[[17.0, 1.0]]]], jnp.bfloat16)
    key = jnp.asarray([[[[17.0, 1.0]], [[17.0, 0.5]]]], jnp.bfloat16)
    value = jnp.asarray([[[[1.0]], [[0.0]]]], jnp.bfloat16)
    got = attend(query, key, value, None, np.ones((1, 1, 2), bool))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(got[0, 0, 0, 0]), 1 / (1 + math.exp(-0.5)), atol=3e-3)


def test_projections_are_matmuls():
    x, kernel, out_kernel = _arrays((2, 3, 6), (6, 2, 4), (2, 4, 6))
    heads = project(kernel, x)
    want = (x.reshape(6, 6) @ kernel.reshape(6, 8)).reshape(2, 3, 2, 4)
    np.testing.assert_allclose(heads, want, atol=1e-5)
    back = np.asarray(heads).reshape(6, 8) @ out_kernel.reshape(8, 6)
    np.testing.assert_allclose(project_out(out_kernel, heads), back.reshape(2, 3, 6), atol=1e-5)


def test_prefix_keys_and_values_are_those_of_each_segments_prompt_and_come_first():
    prefix_keys, prefix_values, key, value = _arrays(
        (3, 2, 2, 4), (3, 2, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4)
    )
    prompt_index = np.array([[2, 0], [1, 2]], np.int32)
    pair = (jnp.asarray(prefix_keys), jnp.asarray(prefix_values))
    got = with_prefix(pair, prompt_index, key, value)
    for prefix, own, both in zip((prefix_keys, prefix_values), (key, value), got, strict=True):
        for b in range(2):
            first, second = prefix[prompt_index[b]]
            np.testing.assert_array_equal(both[b], np.concatenate([first, second, own[b]]))


def test_prefix_takes_the_dtype_of_the_rows_own_keys():
    prefix, own = jnp.ones((1, 2, 1, 3)), jnp.ones((1, 4, 1, 3), jnp.bfloat16)
    keys, values = with_prefix((prefix, prefix), np.zeros((1, 1), np.int32), own, own)
    assert keys.dtype == values.dtype == jnp.bfloat16
